"""A tiny FluxPipeline and the ways to damage a copy of its folder, whose files are links until they are written anew."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from workbench.models import sources
from workbench.options import BadInput, ModelSpec

WEIGHTS = {"transformer": "transformer/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors",
           "text_encoder": "text_encoder/model.safetensors", "text_encoder_2": "text_encoder_2/model.safetensors"}
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def tiny_pipeline(**transformer):
    """`transformer`: settings of it that differ, such as guidance_embeds."""
    tokenizers = sources.EMBEDDED["emoji-flux"]
    torch.manual_seed(0)
    clip = transformers.CLIPTextConfig(vocab_size=3252, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                                       projection_dim=8, max_position_embeddings=16, bos_token_id=3250, eos_token_id=3251,
                                       pad_token_id=3251)
    t5 = transformers.T5Config(vocab_size=1410, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
                               tie_word_embeddings=False, is_encoder_decoder=False, use_cache=False)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.CLIPTextModel(clip), tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"),
        text_encoder_2=transformers.T5EncoderModel(t5), tokenizer_2=transformers.T5Tokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        transformer=diffusers.FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8,
                                                     num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
                                                     axes_dims_rope=(2, 2, 4), **transformer),
        vae=diffusers.AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
                                    up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, sample_size=32, shift_factor=0.1),
    )


def linked_copy(source: Path, target: Path) -> Path:
    """The same tree, every file a link."""
    for path in sorted(source.rglob("*")):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            to.symlink_to(path.resolve())
    return target


def put(path: Path, content) -> None:
    """Replace a link or a file by other content: bytes, or anything as JSON."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def set_values(path: Path, **values) -> None:
    put(path, {**json.loads(path.read_bytes()), **values})


def edit_tensors(path: Path, change) -> None:
    """Replace a checkpoint by one whose tensors `change` has edited in place."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def refusal(folder: Path) -> str:
    """The line that refuses a folder."""
    with pytest.raises(BadInput) as error:
        sources.load(ModelSpec(source=str(folder), device="cpu"))
    line = str(error.value)
    assert line.startswith(f"{folder.name}") and line.isprintable() and len(line) < 400, line
    return line


def load(folder: Path):
    return sources.load(ModelSpec(source=str(folder), device="cpu"))
