"""Whether the parts of a pipeline belong together, family by family: widths and lengths that one part reads from another.

Each check gets the models by name, on any device, the meta device too, and the tokenizers; it raises BadInput with one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from workbench.options import BadInput

SIDES = range(16, 8193)  # of an image in pixels


def flux(models: Mapping, tokenizers: Mapping) -> None:
    """A FluxPipeline: latents of 2 x 2 patches, CLIP for the pooled text, T5 for its tokens."""
    config, vae = models["transformer"].config, models["vae"].config
    clip, t5 = models["text_encoder"].config, models["text_encoder_2"].config
    axes = config.axes_dims_rope
    for setting, found, needed, of in (
        ("in_channels is", config.in_channels, 4 * vae.latent_channels, "4 x latent_channels of vae/config.json"),
        ("out_channels is", config.out_channels or config.in_channels, config.in_channels, "in_channels"),
        ("patch_size is", config.patch_size, 1, "the only one of this family"),
        ("pooled_projection_dim is", config.pooled_projection_dim, clip.hidden_size, "hidden_size of text_encoder"),
        ("joint_attention_dim is", config.joint_attention_dim, t5.d_model, "d_model of text_encoder_2"),
        ("axes_dims_rope sum to", sum(axes), config.attention_head_dim, "attention_head_dim"),
    ):
        if found != needed:
            raise BadInput(f"transformer/config.json: {setting} {found}; {needed} is needed ({of})")
    if len(axes) != 3 or any(axis < 2 or axis % 2 for axis in axes):
        raise BadInput(f"transformer/config.json: axes_dims_rope is {list(axes)}; three even numbers are needed")
    if vae.sample_size not in SIDES:
        raise BadInput(f"vae/config.json: sample_size is {vae.sample_size}; {SIDES.start} to {SIDES.stop - 1} pixels are possible")
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(vae[name], int | float) or not math.isfinite(vae[name]) or (vae[name] == 0 and name == "scaling_factor"):
            raise BadInput(f"vae/config.json: {name} is {vae[name]}; a finite number is needed")
    for part, text in (("", clip), ("_2", t5)):
        vocabulary = len(tokenizers[f"tokenizer{part}"])
        if vocabulary > text.vocab_size:
            raise BadInput(f"tokenizer{part} has {vocabulary:,} tokens, text_encoder{part} embeds {text.vocab_size:,}; "
                           "they must be of one model")
    limit = tokenizers["tokenizer"].model_max_length
    if limit > clip.max_position_embeddings:
        raise BadInput(f"tokenizer/tokenizer_config.json: model_max_length is {limit}; "
                       f"text_encoder has {clip.max_position_embeddings} positions")
    end = tokenizers["tokenizer"].eos_token_id
    if clip.eos_token_id not in (2, end):  # 2: checkpoints before transformers 4.31, read at the largest id
        raise BadInput(f"text_encoder/config.json: eos_token_id is {clip.eos_token_id}; the tokenizer ends a text with {end}")


FITS = {"FluxPipeline": flux}
