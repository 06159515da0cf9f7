"""The linear layer of packed weights and quantized activations as Triton kernels, on a GPU. Not yet measured on one.

Dimension letters as in `naive.py`: M tokens, N out features, K in features, G groups along K, P packed bytes along K, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit import gpu
from lowbit.formats import PACKED_BITS, packed_bytes

FP8_BITS = (2, 3, 4)  # of a weight, whose code - zero is exact in e4m3
FEW_TOKENS = 64  # up to here the packed bytes cost more than unpacking them once per tile of tokens
_LARGEST_BUCKET = 1 << 13


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A stored layer's tensors; `group_size` is K where a row has one scale. Made by `layer`, which checks them."""

    packed_NP: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None
    bits: int
    group_size: int
    groups: int
    k_in: int
    n_out: int


def layer(packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int, k_in: int) -> Layer:
    """The checked tensors; ValueError with both numbers where sizes do not agree: a kernel would read out of bounds."""
    if bits not in PACKED_BITS:
        raise ValueError(f"{bits}-bit codes cannot be packed; use one of {PACKED_BITS}")
    n_out, width = packed_NP.shape[0], group_size or k_in
    groups = -(-k_in // width)
    if packed_NP.dtype != torch.uint8 or packed_NP.shape[1] != packed_bytes(k_in, bits):
        raise ValueError(f"{packed_NP.shape[1]} packed bytes of {packed_NP.dtype} a row; {k_in} codes of {bits} bits need "
                         f"{packed_bytes(k_in, bits)} of torch.uint8")
    for name, tensor in (("scales", scale_NG), ("zero points", zero_NG)):
        if tensor is not None and tensor.shape != (n_out, groups):
            raise ValueError(f"{name} are {tuple(tensor.shape)}; {n_out} rows of {groups} groups need {(n_out, groups)}")
    return Layer(packed_NP=gpu.dense(packed_NP), scale_NG=gpu.dense(scale_NG), zero_NG=gpu.dense(zero_NG), bits=bits,
                 group_size=width, groups=groups, k_in=k_in, n_out=n_out)


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """What follows the product. Made by `epilogue`, which checks it; the order of fields is the kernels'."""

    bias_N: Tensor | None
    low_MR: Tensor | None
    up_NR: Tensor | None
    gelu_after: bool

    def constants(self) -> dict:
        """The kernels' compile-time arguments. WIDE: factors that are not of one 16-bit type meet in float32."""
        narrow = self.low_MR is not None and self.low_MR.dtype == self.up_NR.dtype != torch.float32
        return {"HAS_BIAS": self.bias_N is not None, "RANK": 0 if self.low_MR is None else self.low_MR.shape[1],
                "WIDE": not narrow or gpu.interpreted(), "GELU_AFTER": self.gelu_after}

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.bias_N, self.low_MR, self.up_NR


def epilogue(tokens: int, n_out: int, bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool) -> Epilogue:
    """The checked epilogue of a product with M tokens."""
    if bias_N is not None and bias_N.shape != (n_out,):
        raise ValueError(f"the bias is {tuple(bias_N.shape)}; {n_out} out features need {(n_out,)}")
    if low is None:
        return Epilogue(bias_N=gpu.dense(bias_N), low_MR=None, up_NR=None, gelu_after=gelu_after)
    low_MR = low.reshape(tokens, low.shape[-1])
    if up_NR.shape != (n_out, low_MR.shape[1]):
        raise ValueError(f"the branch leads up by {tuple(up_NR.shape)}; rank {low_MR.shape[1]} and {n_out} out features need "
                         f"{(n_out, low_MR.shape[1])}")
    return Epilogue(bias_N=gpu.dense(bias_N), low_MR=gpu.dense(low_MR), up_NR=gpu.dense(up_NR), gelu_after=gelu_after)


def why_not(q: Tensor, act_scale: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int, group_size: int,
            bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool, dtype: torch.dtype) -> str:
    """"" if `linear_wnan` can run with these arguments, else the reason in a few words."""
    if dtype not in gpu.FLOAT_TYPES:
        return f"{str(dtype).removeprefix('torch.')} output"
    return "no input features" if not q.shape[-1] else gpu.why_not(q)


@torch.no_grad()
def linear_wnan(q: Tensor, act_scale: Tensor, packed_NP: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bits: int,
                group_size: int, bias_N: Tensor | None, low: Tensor | None, up_NR: Tensor | None, gelu_after: bool,
                dtype: torch.dtype) -> Tensor:
    """Same as `naive.linear_wnan`: its integers exactly, its float parts up to the order of summation."""
    stored = layer(packed_NP, scale_NG, zero_NG, bits, group_size, q.shape[-1])
    q_MK = gpu.rows(q if q.dtype == torch.int8 or bits in FP8_BITS else q.to(torch.int8))
    tokens = q_MK.shape[0]
    after = epilogue(tokens, stored.n_out, bias_N, low, up_NR, gelu_after)
    act_scale_MG = gpu.dense(act_scale.reshape(tokens, act_scale.shape[-1]).float())
    if act_scale_MG.shape[1] not in (1, stored.groups):
        raise ValueError(f"{act_scale_MG.shape[1]} activation scales a token; the layer has {stored.groups} groups")
    y_MN = torch.empty(tokens, stored.n_out, dtype=dtype, device=q.device)
    if y_MN.numel():
        with gpu.device_of(q):
            run = multiply_few if fits_few(tokens, stored) else _multiply_many
            run(q_MK, act_scale_MG, stored, after, y_MN)
    return y_MN.view(*q.shape[:-1], stored.n_out)


def fits_few(tokens: int, stored: Layer) -> bool:
    """Whether the kernel that unpacks in place is the one to take: few tokens, and a layer that it can run."""
    whole_cells = stored.groups == 1 or stored.group_size % 8 == 0
    fits_int8 = stored.bits < 8 or stored.zero_NG is None
    return tokens <= FEW_TOKENS and whole_cells and fits_int8


def multiply_few(a_MK: Tensor, act_scale_MG: Tensor | None, stored: Layer, after: Epilogue, y_MN: Tensor) -> None:
    """Fill y_MN from int8, FP8 or float rows, unpacking the weights where they are used."""
    from lowbit.linear_wnan import triton_kernel

    tokens, n_out = y_MN.shape
    block_m = 16 if tokens <= 16 else 32
    block_n = 32 if n_out < 8192 else 64
    grid = (-(-n_out // block_n), -(-tokens // block_m))
    triton_kernel.multiply_few[grid](
        a_MK, stored.packed_NP, act_scale_MG, stored.scale_NG, stored.zero_NG, *after.tensors, y_MN, tokens, n_out, stored.k_in,
        stored.packed_NP.shape[1], stored.groups, stored.group_size, BITS=stored.bits,
        ACT_GROUPED=act_scale_MG is not None and act_scale_MG.shape[1] > 1, HAS_ZERO=stored.zero_NG is not None,
        WIDE_A=a_MK.dtype == torch.float32 or gpu.interpreted(), BLOCK_K=min(max(gpu.ceil_power(stored.group_size), 32), 128),
        BLOCK_M=block_m, BLOCK_N=block_n, **after.constants(), num_warps=4, num_stages=3)


def expand(stored: Layer, dtype: torch.dtype) -> Tensor:
    """The layer's weights (N, K rounded up to 16): code - zero for int8 (code - 128 where that would not fit) and FP8, else dequantized."""
    from lowbit.linear_wnan import triton_kernel

    stride, codes = -(-stored.k_in // 16) * 16, {2: 4, 3: 8, 4: 2, 6: 4, 8: 1}[stored.bits]
    w_NK = torch.empty(stored.n_out, stride, dtype=dtype, device=stored.packed_NP.device)
    block_n, block_k = 16, min(256, gpu.ceil_power(stride))
    scaled = dtype not in (torch.int8, torch.float8_e4m3fn)
    zero_NG = None if stored.bits == 8 and not scaled else stored.zero_NG
    triton_kernel.expand[(-(-stored.n_out // block_n), -(-stride // block_k))](
        stored.packed_NP, stored.scale_NG, zero_NG, w_NK, stored.n_out, stored.k_in, stored.packed_NP.shape[1], stored.groups, stride,
        stored.group_size, BITS=stored.bits, HAS_ZERO=zero_NG is not None, SCALED=scaled, BLOCK_N=block_n, CELLS=block_k // codes)
    return w_NK


def _multiply_many(q_MK: Tensor, act_scale_MG: Tensor, stored: Layer, after: Epilogue, y_MN: Tensor) -> None:
    """Fill y_MN by way of the layer unpacked into the type of q_MK, N x K bytes that live as long as this call."""
    from lowbit.linear_wnan import triton_kernel

    (tokens, n_out), one = y_MN.shape, stored.groups == 1
    w_NK, grouped = expand(stored, q_MK.dtype), act_scale_MG.shape[1] > 1
    sums_GM = _group_sums(q_MK, stored) if stored.bits == 8 and stored.zero_NG is not None else None
    block_k = min(max(gpu.ceil_power(stored.group_size), 32), 128)
    arguments = (q_MK, w_NK, _by_group(act_scale_MG), _by_group(stored.scale_NG), sums_GM,
                 None if sums_GM is None else _by_group(stored.zero_NG), *after.tensors, y_MN, tokens, n_out, stored.k_in,
                 w_NK.shape[1], stored.groups, stored.group_size, min(gpu.ceil_power(tokens), _LARGEST_BUCKET))
    constants = {"ONE": one, "ACT_GROUPED": grouped, "HAS_SUMS": sums_GM is not None, **after.constants()}

    def grid(meta):
        return (-(-tokens // meta["BLOCK_M"]) * -(-n_out // meta["BLOCK_N"]),)

    if one:
        triton_kernel.multiply_one[grid](*arguments, SINGLE=False, **constants)
    else:
        triton_kernel.multiply_grouped[grid](*arguments, SINGLE=stored.group_size <= block_k, BLOCK_K=block_k, **constants)


def _by_group(x: Tensor) -> Tensor:
    """(rows, G) as (G, rows) in memory."""
    return x if x.shape[1] == 1 else x.T.contiguous()


def _group_sums(q_MK: Tensor, stored: Layer) -> Tensor:
    """Sum of q over each group, int32 (G, M)."""
    from lowbit.linear_wnan import triton_kernel

    tokens = q_MK.shape[0]
    sums_GM = torch.empty(stored.groups, tokens, dtype=torch.int32, device=q_MK.device)
    triton_kernel.group_sums[(tokens, stored.groups)](q_MK, sums_GM, tokens, stored.k_in, stored.group_size,
                                                         BLOCK=min(gpu.ceil_power(stored.group_size), 1024))
    return sums_GM
