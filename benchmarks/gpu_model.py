"""A full-size Flux transformer of random weights on one GPU: milliseconds per step and peak memory, float and quantized.

The model is made layer by layer, on the device: a plan's layer is packed as soon as it is made, so the float model and a
quantized one are never in memory together.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from packed import Choice, PackedLinear
from torch import Tensor, nn

# The published configuration of FLUX.1-dev
FLUX_DEV = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}
TINY = FLUX_DEV | {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 4,
                   "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (8, 12, 12)}
IMAGE_TOKENS, TEXT_TOKENS = 4096, 512  # 1024 x 1024
WARM_UP_STEPS, TIMED_STEPS = 3, 10


def everywhere(choice: Choice) -> Callable[[str], Choice]:
    """A plan that gives every layer of the blocks one choice."""
    return lambda name: choice


def mixed(name: str) -> Choice:
    """8 bits in the first and last blocks, 6-bit weights in the layers that lead back to the stream, 4 bits elsewhere."""
    if name.startswith(("transformer_blocks.0.", "transformer_blocks.1.", "single_transformer_blocks.37.")):
        return Choice(8, 8)
    return Choice(6, 8) if name.endswith(("ff.net.2", "proj_out")) else Choice(4, 4, 128)


PLANS: dict[str, Callable[[str], Choice] | None] = {
    "bf16": None, "w8a8": everywhere(Choice(8, 8)), "w4a8": everywhere(Choice(4, 8)), "w4a8-g128": everywhere(Choice(4, 8, 128)),
    "mixed": mixed}


def choice_of(name: str, plan: Callable[[str], Choice] | None) -> Choice | None:
    """How the linear of that name is stored; None: float. Adaptive-norm linears are weight-only, embedders and head stay float."""
    if plan is None or not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return None
    if ".norm" in name:
        return Choice(8 if plan(name).weight_bits == 8 else 4, 16, 64)
    return plan(name)


@torch.no_grad()
def build(config: dict, plan: Callable[[str], Choice] | None, device: torch.device) -> nn.Module:
    """FluxTransformer2DModel with normal weights, scaled to keep activations finite; linears packed as the plan says."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                spread, centre = (parameter.shape[1] ** -0.5, 0) if parameter.dim() > 1 else (0.02, int("norm" in name and key == "weight"))
                made = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16).mul_(spread).add_(centre)
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
        choice = choice_of(name, plan) if isinstance(module, nn.Linear) else None
        if choice is not None:
            replace(model, name, module, choice)
    return model.eval()


def replace(model: nn.Module, name: str, linear: nn.Linear, choice: Choice) -> None:
    """Put the packed layer in the linear's place; where a GELU follows, it takes that over."""
    parent = model.get_submodule(name.rpartition(".")[0])
    fused = name.endswith(("net.0.proj", "proj_mlp"))
    packed = PackedLinear(linear.weight, linear.bias, choice, gelu_after=fused)
    setattr(parent, name.rpartition(".")[2], packed)
    if name.endswith("proj_mlp"):
        parent.act_mlp = nn.Identity()
    elif fused:  # net.0 is the projection with its GELU
        model.get_submodule(name.removesuffix(".0.proj"))[0] = packed


def inputs(config: dict, tokens: tuple[int, int], device: torch.device) -> dict:
    """One step's arguments for one image."""
    image, text = tokens
    side = int(image**0.5)
    like = {"device": device, "dtype": torch.bfloat16}
    grid = torch.stack(torch.meshgrid(torch.zeros(1), *2 * [torch.arange(side).float()], indexing="ij"), -1).view(-1, 3)
    return {"hidden_states": torch.randn(1, image, config["in_channels"], **like), "img_ids": grid.to(device),
            "encoder_hidden_states": torch.randn(1, text, config["joint_attention_dim"], **like),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"], **like), "txt_ids": torch.zeros(text, 3, device=device),
            "timestep": torch.tensor([0.5], **like), "guidance": torch.tensor([3.5], **like), "return_dict": False}


@torch.no_grad()
def steps_ms(model: nn.Module, arguments: dict, device: torch.device, timed: int) -> tuple[list[float], Tensor]:
    """(milliseconds of each timed step, the output)."""
    found = []
    for step in range(WARM_UP_STEPS + timed if device.type == "cuda" else timed):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        (output,) = model(**arguments)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if device.type != "cuda" or step >= WARM_UP_STEPS:
            found.append(1000 * (time.perf_counter() - started))
    return found, output


@torch.no_grad()
def graph_ms(model: nn.Module, arguments: dict, timed: int) -> float | str:
    """Median milliseconds of the step replayed as a CUDA graph, without Python's launches; or why it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            model(**arguments)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    found = []
    for _ in range(timed):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - started))
    return statistics.median(found)


def measure(plan_name: str, device: torch.device, *, dry_run: bool) -> tuple[dict, Tensor]:
    """(a row of figures, the output). "peak_bytes" is of the plain steps; "packed_bytes" is the packed layers' part of "resident_bytes"."""
    config, tokens = (TINY, (16, 8)) if dry_run else (FLUX_DEV, (IMAGE_TOKENS, TEXT_TOKENS))
    model = build(config, PLANS[plan_name], device)
    arguments = inputs(config, tokens, device)
    if device.type == "cuda":
        steps_ms(model, arguments, device, 0)  # compiles and tunes, which takes scratch memory
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    each, output = steps_ms(model, arguments, device, 1 if dry_run else TIMED_STEPS)
    row = {"plan": plan_name, "step_ms": statistics.median(each), "step_ms_all": each, "peak_bytes": None, "graph_ms": None}
    if device.type == "cuda":
        row |= {"peak_bytes": torch.cuda.max_memory_allocated(), "graph_ms": graph_ms(model, arguments, TIMED_STEPS)}
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    stored = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    row |= {"resident_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored), "packed_layers": len(packed),
            "packed_bytes": sum(module.weight_bytes for module in packed), "finite": bool(torch.isfinite(output).all())}
    return row, output.float().cpu()
