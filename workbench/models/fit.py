"""Whether the parts of a pipeline belong together, family by family: widths and lengths that one part reads from another.

Each check gets the models by name, on any device, the meta device too, and the tokenizers; it raises BadInput with one line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from workbench.options import BadInput

SIDES = range(16, 8193)  # of an image in pixels
POSITIONS = 65_536  # of an axis whose rotary table is made in full


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


def zimage(models: Mapping, tokenizers: Mapping) -> None:
    """A ZImagePipeline: latents in patches of 2 x 2, a language model with a chat template for the text."""
    config, vae, text = models["transformer"].config, models["vae"].config, models["text_encoder"].config
    patches, axes = list(zip(config.all_patch_size, config.all_f_patch_size)), config.axes_dims
    for setting, found, needed, of in (
        ("in_channels is", config.in_channels, vae.latent_channels, "latent_channels of vae/config.json"),
        ("all_patch_size and all_f_patch_size are", patches, [(2, 1)], "the only ones of this family"),
        ("cap_feat_dim is", config.cap_feat_dim, text.hidden_size, "hidden_size of text_encoder"),
        ("siglip_feat_dim is", config.siglip_feat_dim, None, "ZImagePipeline reads no images"),
        ("axes_dims sum to", sum(axes), config.dim // config.n_heads, "dim / n_heads"),
    ):
        if found != needed:
            raise BadInput(f"transformer/config.json: {setting} {found}; {needed} is needed ({of})")
    if len(axes) != 3 or any(axis < 2 or axis % 2 for axis in axes):
        raise BadInput(f"transformer/config.json: axes_dims is {list(axes)}; three even numbers are needed")
    if any(not least <= length <= POSITIONS for length, least in zip(config.axes_lens, (34, 1, 1))):
        raise BadInput(f"transformer/config.json: axes_lens is {list(config.axes_lens)}; at least 34, 1 and 1 positions are needed, and at "
                       f"most {POSITIONS:,} are possible")
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(vae[name], int | float) or not math.isfinite(vae[name]) or (vae[name] == 0 and name == "scaling_factor"):
            raise BadInput(f"vae/config.json: {name} is {vae[name]}; a finite number is needed")
    vocabulary = len(tokenizers["tokenizer"])
    if vocabulary > text.vocab_size:
        raise BadInput(f"tokenizer has {vocabulary:,} tokens, text_encoder embeds {text.vocab_size:,}; they must be of one model")
    if not tokenizers["tokenizer"].chat_template:
        raise BadInput("tokenizer has no chat template, which this family writes prompts in; use the tokenizer of this model")


FITS = {"FluxPipeline": flux, "ZImagePipeline": zimage}
