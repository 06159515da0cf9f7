"""A lean forward of FluxTransformer2DModel for sampling: the same sums as diffusers' own, with fewer passes over memory.

What depends on the prompt and the noise level alone (text projection, every block's modulation) is computed once for all
steps of a batch; norms, rotations and GELU run fused; the single blocks keep one joined sequence. It
serves the float and the quantized model alike, because it calls whatever modules stand in the layers' places, and it is
equal to diffusers' forward up to rounding. It carries no gradient.

Dimension letters: B samples, S tokens (text, then image), D channels, H heads, C channels of a head, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lowbit import ops
from torch import Tensor, nn

from workbench.types import Conditioning

EPS = 1e-6  # of every norm in Flux
SHARED_BYTES = 512 << 20  # modulation of all steps above this is computed step by step


@dataclass(frozen=True)
class _Shared:
    """What the steps of one batch share. modulation: per norm, (T B, parts D)."""

    steps: range
    text_BSD: Tensor
    modulation: dict[nn.Module, Tensor]
    cos_SC: Tensor
    sin_SC: Tensor


class FastForward:
    """The lean forward for one batch of prompts and one schedule. `modulation_input(steps)` gives what the modulation linears read at
    those steps, (T, B, D)."""

    def __init__(self, model: nn.Module, conditioning: Conditioning, steps: int, modulation_input: Callable[[range], Tensor]):
        self._model, self._conditioning, self._steps, self._modulation_input = model, conditioning, steps, modulation_input
        self._shared: _Shared | None = None

    @torch.no_grad()
    def output(self, latent_BSD: Tensor, step: int) -> Tensor:
        """The transformer's output for `latent_BSD` (B, image tokens, channels)."""
        model, shared, samples = self._model, self._of_steps(step, latent_BSD), len(latent_BSD)
        rows = slice((step - shared.steps.start) * samples, (step + 1 - shared.steps.start) * samples)
        parts = {norm: made[rows] for norm, made in shared.modulation.items()}
        image_BSD, text_BSD = model.x_embedder(latent_BSD), shared.text_BSD
        for block in model.transformer_blocks:
            text_BSD, image_BSD = _double_block(block, text_BSD, image_BSD, parts, shared)
        joined_BSD = torch.cat([text_BSD, image_BSD], 1)
        for block in model.single_transformer_blocks:
            joined_BSD = _single_block(block, joined_BSD, parts[block.norm], shared)
        scale_BD, shift_BD = parts[model.norm_out].chunk(2, 1)
        return model.proj_out(ops.modulate(joined_BSD[:, text_BSD.shape[1]:], shift_BD, scale_BD, EPS))

    def _of_steps(self, step: int, latent_BSD: Tensor) -> _Shared:
        """Of all steps, where their modulation fits in memory; else of this one."""
        if self._shared is not None and step in self._shared.steps:
            return self._shared
        norms, conditioning = _norms(self._model), self._conditioning
        row_bytes = sum(norm.linear.out_features for norm in norms) * latent_BSD.element_size()
        seen = _hooked([norm.linear for norm in norms])  # whoever looks at a step's modulation wants that step's alone
        fits = not seen and self._steps * len(latent_BSD) * row_bytes <= SHARED_BYTES
        steps = range(self._steps) if fits else range(step, step + 1)
        active = self._modulation_input(steps).flatten(0, 1)
        cos_SC, sin_SC = self._model.pos_embed(torch.cat((conditioning.shared["txt_ids"], conditioning.shared["img_ids"])))
        self._shared = _Shared(
            steps=steps, text_BSD=self._model.context_embedder(conditioning.per_sample["encoder_hidden_states"].to(latent_BSD.dtype)),
            modulation={norm: norm.linear(active) for norm in norms}, cos_SC=cos_SC, sin_SC=sin_SC)
        return self._shared


def _norms(model: nn.Module) -> list[nn.Module]:
    """Every norm that is modulated, in the order of execution."""
    return [*(norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)),
            *(block.norm for block in model.single_transformer_blocks), model.norm_out]


def _double_block(block, text_BSD: Tensor, image_BSD: Tensor, parts: dict, shared: _Shared) -> tuple[Tensor, Tensor]:
    image = parts[block.norm1].chunk(6, 1)  # shift, scale, gate of attention; shift, scale, gate of the MLP
    text = parts[block.norm1_context].chunk(6, 1)
    attn = block.attn
    normed_image, normed_text = ops.modulate(image_BSD, *image[:2], EPS), ops.modulate(text_BSD, *text[:2], EPS)
    of_image = _together((attn.to_q, attn.to_k, attn.to_v), normed_image)
    of_text = _together((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), normed_text)
    norms = (attn.norm_added_q.weight, attn.norm_q.weight), (attn.norm_added_k.weight, attn.norm_k.weight)
    attended_text, attended_image = ops.attention(*zip(of_text, of_image), *norms, shared.cos_SC, shared.sin_SC, EPS)
    image_BSD = _gated(attn.to_out[0], (attended_image,), image_BSD, image[2])
    text_BSD = _gated(attn.to_add_out, (attended_text,), text_BSD, text[2])
    image_BSD = _feed_forward(block.ff, image_BSD, image[3:])
    return _feed_forward(block.ff_context, text_BSD, text[3:]), image_BSD


def _feed_forward(ff, x_BSD: Tensor, parts) -> Tensor:
    shift_BD, scale_BD, gate_BD = parts
    hidden = _together((ff.net[0].proj,), ops.modulate(x_BSD, shift_BD, scale_BD, EPS), gelu_last=True)
    return _gated(ff.net[2], hidden, x_BSD, gate_BD)


def _single_block(block, x_BSD: Tensor, parts: Tensor, shared: _Shared) -> Tensor:
    shift_BD, scale_BD, gate_BD = parts.chunk(3, 1)
    attn, normed = block.attn, ops.modulate(x_BSD, shift_BD, scale_BD, EPS)
    query, key, value, hidden = _together((attn.to_q, attn.to_k, attn.to_v, block.proj_mlp), normed, gelu_last=True)
    [attended] = ops.attention((query,), (key,), (value,), (attn.norm_q.weight,), (attn.norm_k.weight,), shared.cos_SC, shared.sin_SC, EPS)
    return _gated(block.proj_out, (attended, hidden), x_BSD, gate_BD)


def _together(layers: tuple[nn.Module, ...], x: Tensor, *, gelu_last: bool = False) -> list[Tensor]:
    """Outputs of layers that read one tensor, in one pass where they allow it. GELU is the tanh form. Hooks see every layer."""
    if not _hooked(layers):
        if all(_is_plain(layer) and (layer.bias is None) == (layers[0].bias is None) for layer in layers):
            return _float_together(layers, x, gelu_last)
        fused_linears = getattr(layers[0], "run_fused", None)
        made = None if fused_linears is None else fused_linears(layers[1:], (x,), gelu_last=gelu_last)
        if made is not None:
            return made
    made = [layer(x) for layer in (layers[:-1] if gelu_last else layers)]
    if not gelu_last:
        return made
    fused = getattr(layers[-1], "gelu", None)
    return [*made, F.gelu(layers[-1](x), approximate="tanh") if fused is None else fused(x)]


def _gated(layer: nn.Module, parts: Sequence[Tensor], residual_BSD: Tensor, gate_BD: Tensor) -> Tensor:
    """residual + gate layer(parts side by side)."""
    fused_linears = None if _hooked((layer,)) else getattr(layer, "run_fused", None)
    made = None if fused_linears is None else fused_linears((), parts, residual=residual_BSD, gate_BN=gate_BD)
    if made is not None:
        return made[0]
    return torch.addcmul(residual_BSD, gate_BD[:, None], layer(parts[0] if len(parts) == 1 else torch.cat(tuple(parts), 2)))


def _hooked(layers: Sequence[nn.Module]) -> bool:
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    """A float layer as torch has it; other libraries put tensors of their own into the same class."""
    return type(layer) is nn.Linear and type(layer.weight.data) is Tensor


def _float_together(layers: tuple[nn.Linear, ...], x: Tensor, gelu_last: bool) -> list[Tensor]:
    fused = _fused(layers) if len(layers) > 1 else None
    if fused is None:
        made = [layer(x) for layer in layers]
    else:
        made = list(F.linear(x, *fused).split([layer.out_features for layer in layers], -1))
    if gelu_last:
        made[-1] = F.gelu(made[-1], approximate="tanh")
    return made


def join(model: nn.Module) -> None:
    """Put the weights of layers that read one tensor one below the other: their parameters become the rows, so that nothing is held
    twice. To be done before a model is shared: no other thread may be reading the weights. All trees of the model share the result."""
    for block in model.transformer_blocks:
        attn = block.attn
        _fuse((attn.to_q, attn.to_k, attn.to_v))
        _fuse((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
    for block in model.single_transformer_blocks:
        _fuse((block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp))


def _fuse(layers: tuple[nn.Linear, ...]) -> None:
    if not all(_is_plain(layer) and (layer.bias is None) == (layers[0].bias is None) for layer in layers):
        return
    whole = [None if parts[0] is None else torch.cat([part.data for part in parts])
             for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers])]
    first = 0
    for layer in layers:
        last = first + layer.out_features
        layer.weight.data = whole[0][first:last]
        if whole[1] is not None:
            layer.bias.data = whole[1][first:last]
        first = last
    layers[0].weight.joined_rows = tuple(whole), [part.data_ptr() for part in _parameters(layers)]


def _fused(layers: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of joined layers; None where they are not, or no longer."""
    kept = getattr(layers[0].weight, "joined_rows", None)
    if kept is None or len(kept[1]) != len(_parameters(layers)):
        return None
    return kept[0] if all(part.data_ptr() == at for part, at in zip(_parameters(layers), kept[1])) else None


def _parameters(layers: tuple[nn.Linear, ...]) -> list[Tensor]:
    return [part for layer in layers for part in (layer.weight, layer.bias) if part is not None]
