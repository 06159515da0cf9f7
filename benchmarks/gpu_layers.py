"""Rates of single linear layers on a GPU, at the shapes of real models, beside torch's and torchao's.

Dimension letters: M tokens, N out features, K in features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from packed import Choice, PackedLinear, operations
from torch import Tensor, nn

CHOICES = (Choice(8, 8), Choice(4, 8), Choice(4, 8, 128), Choice(4, 8, 64), Choice(3, 8, 128), Choice(4, 16, 64),
           *(Choice(4, 4, group_size, fp8) for group_size in (0, 128, 64) for fp8 in (False, True)))
DRY_CHOICES = (Choice(8, 8), Choice(4, 8, 64), Choice(4, 16, 64), Choice(4, 4, 64, True))  # the interpreter takes long


@dataclass(frozen=True)
class Shape:
    """A layer of a model. `compiled_peer`: torchao is compiled here too, which takes tens of seconds."""

    model: str
    layer: str
    m: int
    n: int
    k: int
    compiled_peer: bool = False


SHAPES = (  # 1024 x 1024: 4096 image tokens and the text; Wan: 81 frames at 832 x 480
    Shape("flux", "attention", 4608, 3072, 3072, True), Shape("flux", "feed-forward up", 4608, 12288, 3072, True),
    Shape("flux", "feed-forward down", 4608, 3072, 12288), Shape("flux", "single out", 4608, 3072, 15360),
    Shape("flux", "text up", 512, 12288, 3072), Shape("flux", "modulation", 1, 18432, 3072),
    Shape("z-image", "attention", 4352, 3840, 3840), Shape("z-image", "feed-forward up", 4352, 10240, 3840),
    Shape("z-image", "feed-forward down", 4352, 3840, 10240),
    Shape("wan-1.3b", "attention", 32760, 1536, 1536), Shape("wan-1.3b", "feed-forward up", 32760, 8960, 1536),
    Shape("wan-1.3b", "feed-forward down", 32760, 1536, 8960))
TINY = (Shape("tiny", "many tokens", 66, 40, 64, True), Shape("tiny", "few tokens", 3, 40, 128))


def median_us(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, in microseconds; on a CPU (dry run) of one call."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return 1000 * do_bench(call, warmup=15, rep=60, return_mode="median")
    started = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - started)


def measure(shape: Shape, device: torch.device) -> Iterator[dict]:
    """One row per way to run the layer: the shape's fields, "way", "us", "tflops" and "speedup" over bf16, or "skipped" with the reason."""
    generator = torch.Generator(device).manual_seed(0)
    x_MK = torch.randn(shape.m, shape.k, generator=generator, device=device).bfloat16()
    w_NK = (torch.randn(shape.n, shape.k, generator=generator, device=device) / shape.k**0.5).bfloat16()
    float_us = median_us(lambda: nn.functional.linear(x_MK, w_NK), device)

    def row(way: str, us: float, **more) -> dict:
        return {**vars(shape), "way": way, "us": us, "tflops": 2e-6 * shape.m * shape.n * shape.k / us, "speedup": float_us / us, **more}

    yield row("torch bf16", float_us)
    for way, make in (ours(x_MK, w_NK) | baselines(x_MK, w_NK, shape)).items():
        try:
            call, check = make()
            yield row(way, median_us(call, device), **check)
        except Exception as error:  # a way that fails is a result, and must not stop the others
            yield {**vars(shape), "way": way, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def ours(x_MK: Tensor, w_NK: Tensor) -> dict[str, Callable]:
    """Ways to run this project's kernels: each makes (call, {"relative_error"})."""
    def linear(choice: Choice):
        layer = PackedLinear(w_NK, None, choice)
        if choice.act_bits == 16:
            return lambda: layer(x_MK), {"relative_error": distance(layer(x_MK), nn.functional.linear(x_MK, w_NK))}
        run, _ = operations(x_MK)

        def call():  # not layer(): it would remember the quantized input
            q, scale = layer.activations(x_MK)
            return run.linear_wnan(q, scale, layer.packed_NP, layer.scale_NG, None, choice.weight_bits, choice.group_size, None, None,
                                   None, False, x_MK.dtype)
        return call, {"relative_error": distance(call(), nn.functional.linear(x_MK, w_NK))}

    def activations():
        layer = PackedLinear(w_NK[:1], None, Choice(8, 8))
        return lambda: layer.activations(x_MK), {}

    choices = CHOICES if x_MK.is_cuda else DRY_CHOICES
    return {"rotate + quantize input": activations, **{f"lowbit {choice}": lambda choice=choice: linear(choice) for choice in choices}}


def distance(y: Tensor, expected: Tensor) -> float:
    """|y - expected| / |expected|: the quantization's error, about 2^-b of it; near 1 or NaN if a kernel is wrong."""
    return float((y.float() - expected.float()).norm() / expected.float().norm())


def baselines(x_MK: Tensor, w_NK: Tensor, shape: Shape) -> dict[str, Callable]:
    """Other ways: products alone of torch, and torchao's whole layer."""
    def int8_product():
        a, b = torch.randint(-127, 128, x_MK.shape, dtype=torch.int8, device=x_MK.device), w_NK.mul(100).to(torch.int8)
        return lambda: torch._int_mm(a, b.T), {}

    def fp8_product():
        a, b, one = x_MK.to(torch.float8_e4m3fn), w_NK.to(torch.float8_e4m3fn), torch.ones((), device=x_MK.device)
        return lambda: torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16), {}

    def torchao(compiled: bool):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = nn.Sequential(nn.Linear(shape.k, shape.n, bias=False, device=x_MK.device, dtype=x_MK.dtype))
        layer[0].weight = nn.Parameter(w_NK, requires_grad=False)
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        run = torch.compile(layer) if compiled and x_MK.is_cuda else layer
        with torch.no_grad():
            error = distance(run(x_MK), nn.functional.linear(x_MK, w_NK))
        return torch.no_grad()(lambda: run(x_MK)), {"relative_error": error}

    ways = {"torch int8 product alone": int8_product, "torch fp8 product alone": fp8_product, "torchao int8": lambda: torchao(False)}
    return ways | ({"torchao int8, compiled": lambda: torchao(True)} if shape.compiled_peer else {})
