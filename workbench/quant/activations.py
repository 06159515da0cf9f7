"""Activation quantizers: what shares a scale, on which grid, and the numbers that come out.

Dimension letters: M tokens, K features, J features of one group.

    symmetric    s = c max|x| / (2^(b-1) - 1),        q = clamp(round(x / s)) in [-(2^(b-1) - 1), 2^(b-1) - 1]  (mid-tread)
    mid_rise     s = c max|x| / 2^b,                  q = clamp(2 floor(x / 2s) + 1), odd, in [-(2^b - 1), 2^b - 1]
                 through 7 bits, with 0.9 c at 3 (8 bits are the symmetric grid)
    asymmetric   s = c (max - min) / (2^b - 1),       q = clamp(round(x / s) + z) in [0, 2^b - 1],  z = round(-c min / s)

A grid with a level at zero and as many on either side has an odd number of levels: of the 2^b codes one is lost, at 3 bits an
eighth. Nothing is special about zero once an input is rotated, so this project's own methods round to odd multiples of half a
step instead: at 3 bits the error of a Gaussian falls by 3.6 dB for the same bits, 3.1 by the levels and the rest by the 0.9
(mid-rise and mid-tread quantizers: Gersho and Gray, "Vector Quantization and Signal Compression", 1992, section 5.3). Rivals
keep the grids that they were published with.

`max` and `min` (with 0 between them) are taken over a token, over a group of one token's features, both dynamic, or over
everything the calibration trace held (static, one range for all steps). c is the clip ratio. Grids without a zero point, per
token, are those that kernels run; they go through `lowbit.ops`.
"""

from __future__ import annotations

import torch
from lowbit import ops
from lowbit.act_quant.naive import grid_of
from lowbit.tensor_cache import LastInputCache
from pydantic import Field, model_validator
from torch import Tensor

from workbench.options import GROUP_SIZES, Frozen, QuantConfig

_last = LastInputCache()


class ActFormat(Frozen):
    """How a layer's input is quantized; its bits come from the plan."""

    scale: str = Field(default="token", pattern="^(token|group|tensor)$")
    group_size: int | None = None
    grid: str = Field(default="symmetric", pattern="^(symmetric|mid_rise|asymmetric)$")
    clip: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _had_two_grids_once(cls, values):
        """Layers exported before grids had names say whether theirs is symmetric."""
        if isinstance(values, dict) and isinstance(values.get("symmetric"), bool) and "grid" not in values:
            values = {**values, "grid": "symmetric" if values["symmetric"] else "asymmetric"}
            del values["symmetric"]
        return values

    @model_validator(mode="after")
    def _group_is_known(self):
        if (self.scale == "group") != (self.group_size is not None):
            raise ValueError("a group size belongs to the scale 'group' and to no other")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size {self.group_size} is not supported; use one of {GROUP_SIZES}")
        return self

    @property
    def is_plain(self) -> bool:
        """Per token, without a zero point: what every kernel can run, with the arguments `kernel_grid`."""
        return self.scale == "token" and self.grid != "asymmetric"

    @property
    def kernel_grid(self) -> tuple[float, bool]:
        """(clip ratio, whether mid-rise), the last arguments of `lowbit.ops`."""
        return self.clip, self.grid == "mid_rise"

    def describe(self) -> str:
        """For people, as part of a sentence."""
        shared = {"token": "per-token", "group": f"per-{self.group_size}-group", "tensor": "static per-tensor"}[self.scale]
        clipped = "" if self.clip == 1.0 else f" clipped at {self.clip:g}"
        return f"{self.grid.replace('_', '-')} {shared} activations{clipped}"


PLAIN = ActFormat()  # mid-tread, whole range


def format_of(quant: QuantConfig, group_size: int | None) -> ActFormat:
    """The quantizer of a layer whose weight has that group size; a whole row as group is a token."""
    grouped = quant.act_scale == "group" and group_size is not None
    scale = "token" if quant.act_scale == "group" and not grouped else quant.act_scale
    return ActFormat(scale=scale, group_size=group_size if grouped else None, grid=quant.act_grid, clip=quant.act_clip)


def fake_quantize(x: Tensor, bits: int, act_format: ActFormat = PLAIN, range_2: Tensor | None = None) -> Tensor:
    """What the quantized activation stands for, in x's own type; 16 bits return x itself. Never change it in place:
    layers that read one tensor share the result. `range_2`: smallest and largest value of a static quantizer."""
    if bits == 16 or act_format.is_plain:
        return ops.fake_quantize(x, bits, *act_format.kernel_grid)
    key = (bits, act_format, None if range_2 is None else tuple(range_2.tolist()))
    return _last.get(x, key, lambda: _values(x, bits, act_format, range_2))


def quantize(x: Tensor, bits: int, act_format: ActFormat, range_2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, zero): x ~ (codes - zero) * scale. Groups get an axis of their own, the last one padded with zeros."""
    wide = _grouped(x.float(), act_format.group_size) if act_format.scale == "group" else x.float()
    if act_format.scale == "tensor":
        if range_2 is None:
            raise ValueError("a static quantizer needs the range of the calibration trace")
        low, high = range_2.to(wide).clamp(max=0)[0], range_2.to(wide).clamp(min=0)[1]
    else:
        low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    if act_format.grid != "asymmetric":
        grid = grid_of(bits, *act_format.kernel_grid)
        exact = grid.share * torch.maximum(high, -low) / grid.divisor
        scale = _usable(exact)
        q = (wide / (2 * scale)).floor_().mul_(2).add_(1) if grid.mid_rise else (wide / scale).round_()
        stored = torch.where(exact == scale, scale, 0.0) if grid.mid_rise else scale  # no odd code is zero
        return q.clamp_(-grid.top, grid.top), stored, torch.zeros_like(scale)
    scale = _usable(act_format.clip * (high - low) / (2**bits - 1))
    zero = (-act_format.clip * low / scale).round()
    return (wide / scale).round_().add_(zero).clamp_(0, 2**bits - 1), scale, zero


def _values(x: Tensor, bits: int, act_format: ActFormat, range_2: Tensor | None) -> Tensor:
    with torch.no_grad():
        codes, scale, zero = quantize(x, bits, act_format, range_2)
        return codes.sub_(zero).mul_(scale).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].to(x.dtype)


def _grouped(x: Tensor, group_size: int) -> Tensor:
    """(..., K) to (..., G, J)."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group_size)).unflatten(-1, (-1, group_size))


def _usable(scale: Tensor) -> Tensor:
    """A scale that can divide: what is all zero (or subnormal) stays zero under any."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
