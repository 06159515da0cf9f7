"""The embedded model: it loads offline as a FluxPipeline, its token ids are stable, and its files can be pushed as they are."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from transformers import CLIPTokenizer, T5Tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = ASSETS / "models" / "emoji-flux"
PROMPTS = ASSETS / "prompts" / "emoji-flux.json"
FOLDER_LIMIT_BYTES = 40e6
FILE_LIMIT_BYTES = 9.5e6
TOKENIZE = {"padding": "max_length", "max_length": 16, "truncation": True}


def all_prompts() -> list[str]:
    sets = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return [prompt for prompts in sets.values() for prompt in prompts]


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    loaded = FluxPipeline.from_pretrained(MODEL, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_loads_offline_in_one_precision(pipe):
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    assert {part.dtype for part in parts} == {torch.float32}


def test_sizes_are_those_the_families_expect(pipe):
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert 8e6 < parameters < 15e6
    assert pipe.transformer.config.attention_head_dim == 64
    assert pipe.vae.config.latent_channels == 16
    assert pipe.vae_scale_factor == 8


def test_draws_128_px_from_the_trained_prompt_length(pipe):
    image = pipe(
        "noto pizza", height=128, width=128, num_inference_steps=2, max_sequence_length=16, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (128, 128)


def test_seed_decides_the_image_and_another_seed_another(pipe):
    def latents(seed: int) -> torch.Tensor:
        return pipe(
            "twemoji red heart",
            height=128,
            width=128,
            num_inference_steps=2,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images

    first = latents(0)
    assert torch.equal(first, latents(0))
    assert not torch.equal(first, latents(1))


@pytest.mark.parametrize(("name", "kind"), [("tokenizer", CLIPTokenizer), ("tokenizer_2", T5Tokenizer)])
def test_token_ids_survive_save_and_reload(name, kind, tmp_path):
    first = kind.from_pretrained(MODEL / name, local_files_only=True)
    first.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, local_files_only=True)
    prompts = [*all_prompts(), "fluent xylophone-of doom 3!", "Noto PIZZA", ""]
    assert first(prompts, **TOKENIZE).input_ids == again(prompts, **TOKENIZE).input_ids


@pytest.mark.parametrize(("name", "kind", "extra"), [("tokenizer", CLIPTokenizer, 2), ("tokenizer_2", T5Tokenizer, 1)])
def test_every_word_of_a_prompt_is_one_token(name, kind, extra):
    tokenizer = kind.from_pretrained(MODEL / name, local_files_only=True)
    for prompt in all_prompts():
        ids = tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + extra, prompt
        if name == "tokenizer_2":
            assert tokenizer.unk_token_id not in ids, prompt


def test_clip_pools_at_the_end_token(pipe):
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id


def test_files_are_small_and_hold_no_pickle():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < FOLDER_LIMIT_BYTES
    assert max(path.stat().st_size for path in files) < FILE_LIMIT_BYTES
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}


def test_weights_are_finite_half_precision(pipe):
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        for name, weight in part.state_dict().items():
            assert torch.isfinite(weight).all(), name
            if weight.is_floating_point():
                assert torch.equal(weight, weight.half().float()), name


def test_prompt_sets_share_no_prompt():
    sets = json.loads(PROMPTS.read_text(encoding="utf-8"))
    assert {name: len(prompts) for name, prompts in sets.items()} == {"calibration": 32, "held_out": 64, "showcase": 12}
    assert len(set(all_prompts())) == 108
    assert {prompt.split()[0] for prompt in all_prompts()} == {"fluent", "noto", "twemoji"}
