"""The parts of emoji-flux: sizes, construction, and the folder they are saved to."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from common import MAX_TOKENS, MODEL_FOLDER
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

SHARD_SIZE = "9MB"  # a Space takes files up to 10 MB without large-file storage
WORD_START = "▁"  # how a Unigram vocabulary marks the start of a word


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """11.1 M parameters at width 256."""

    double_blocks: int = 2
    single_blocks: int = 6
    heads: int = 4
    head_channels: int = 64
    text_channels: int = 256
    pooled_channels: int = 256


def learn_merges(words: Counter) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol; ties go to the alphabetically first pair.

    The `tokenizers` trainer breaks ties by hash order, so its token ids differ from one build to the next.
    """
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in sorted(words)}
    merges = []
    while pairs := Counter(pair for symbols in spelled.values() for pair in pairwise(symbols)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def make_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Byte-level BPE under CLIP's own pre-tokenization, merged until every word of the captions is one token."""
    words = Counter(word for caption in captions for word in caption.split())
    merges = learn_merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_t5_tokenizer(captions: Iterable[str]) -> T5Tokenizer:
    """Unigram over whole words, with single letters as a costly fallback for words no caption has."""
    words = sorted({word for caption in captions for word in caption.split()})
    letters = [chr(code) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (WORD_START, -10.0)]
    vocab += [(WORD_START + word, -5.0) for word in words]
    vocab += [(letter, -20.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Pooled output of 256 channels, read at the first end token."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=256,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Four layers of width 256; padding is not masked by FluxPipeline, so padding tokens are free registers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        num_heads=4,
        d_ff=768,
        num_layers=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        relative_attention_max_distance=2 * MAX_TOKENS,
        tie_word_embeddings=False,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def make_transformer(size: TransformerSize, zero_start: bool = True) -> FluxTransformer2DModel:
    """`zero_start`: zero modulation and zero output (adaLN-zero), Xavier elsewhere; else torch's own random weights."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=size.head_channels,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_channels,
        pooled_projection_dim=size.pooled_channels,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in transformer.named_modules():
        if zero_start and isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if ".norm" in name or name.startswith("norm_out") or name == "proj_out":
                nn.init.zeros_(module.weight)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths, no shift: at 64 image tokens the even sigma grid is the trained one."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False)


def write_index() -> None:
    """`model_index.json`, which makes the folder a FluxPipeline."""
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (MODEL_FOLDER / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    make_scheduler().save_pretrained(MODEL_FOLDER / "scheduler")


def save_part(name: str, part: nn.Module) -> None:
    """Write a part's weights in float16; a stale shard of an earlier layout is removed first."""
    folder = MODEL_FOLDER / name
    for stale in folder.glob("*.safetensors*"):
        stale.unlink()
    part.to(torch.float16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "dtype" in config:
        # transformers loads in the recorded type, diffusers in float32 unless told: one pipeline needs one type.
        config["dtype"] = "float32"
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
