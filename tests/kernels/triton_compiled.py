"""Every Triton kernel compiled for a GPU that need not be there: `test_triton.py` runs this file in a process of its own.

The interpreter checks what a kernel computes, not that it compiles. Here the callers run as they would on the GPU, with a driver that
names the target and a launch that stops after the compilation. Arguments: the compute capability, such as 90, and, for every tuned
configuration instead of the first, `all`. Prints, as JSON, what each kernel's machine code takes.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import torch
import triton
from lowbit.act_quant.triton import act_quant
from lowbit.formats import pack
from lowbit.hadamard.triton import block_hadamard
from lowbit.linear_wna16.triton import linear_wna16
from lowbit.linear_wnan import triton_kernel
from lowbit.linear_wnan.triton import linear_wnan
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY, EVERY_CONFIGURATION = int(sys.argv[1]), sys.argv[2:] == ["all"]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
compiled: dict[str, list] = {}


class NoDriver:
    """What Triton asks its driver before a launch. Every configuration of a tuned kernel counts as equally fast."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        return lambda launch, quantiles: (launch(), [1.0] * len(quantiles))[1]


def compile_only(run):
    def stop_before_launch(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found = compiled.setdefault(self.fn.__name__, [])
        if kernel not in found:
            found.append(kernel)
        return kernel
    return stop_before_launch


def layer(bits, group_size, symmetric, n_out, k_in):
    shape = (n_out, -(-k_in // (group_size or k_in)))
    return (pack(torch.zeros(n_out, k_in, dtype=torch.uint8), bits), torch.ones(shape).half(),
            None if symmetric else torch.zeros(shape, dtype=torch.uint8), bits, group_size)


def compile_everything() -> None:
    """The shapes decide only alignment, register use and which kernel is taken; so they are as wide as a model's and short."""
    for dtype in (torch.bfloat16, torch.float32):
        block_hadamard(torch.ones(1, 3072, dtype=dtype), 256, torch.ones(3072))
    for k_in, block, group_size, factor in ((12288, 256, 64, True), (96, 32, 0, False), (3072, 1, 0, True), (1, 1, 0, False)):
        act_quant(torch.ones(1, k_in, dtype=torch.bfloat16), torch.ones(k_in) if factor else None, block, 8, group_size)
        act_quant(torch.ones(1, k_in, dtype=torch.bfloat16), torch.ones(k_in) if factor else None, block, 4, group_size, 0.9, True)
    for tokens, bits, group_size, symmetric, k_in, rank in (
            (1, 8, 0, True, 256, 0), (1, 4, 64, True, 256, 32), (40, 3, 32, False, 256, 0), (40, 6, 128, True, 256, 17),
            (80, 8, 0, True, 256, 32), (80, 4, 128, True, 256, 0), (80, 3, 32, False, 256, 0), (80, 8, 64, False, 250, 0),
            (80, 2, 256, True, 512, 0), (80, 4, 0, True, 1, 0)):
        stored = layer(bits, group_size, symmetric, 128, k_in)
        scales = torch.ones(tokens, stored[1].shape[1] if bits == 3 else 1)
        low, up_NR = (torch.ones(n, rank, dtype=torch.bfloat16) if rank else None for n in (tokens, 128))
        linear_wnan(torch.ones(tokens, k_in, dtype=torch.int8), scales, *stored, torch.ones(128), low, up_NR, rank > 0, torch.bfloat16)
        linear_wna16(torch.ones(tokens, k_in, dtype=torch.bfloat16), *stored, None, None, None, False)
        if CAPABILITY >= 89 and bits <= 4 and rank == 0:
            linear_wnan(torch.ones(tokens, k_in, dtype=torch.float8_e4m3fn), scales, *stored, None, None, None, False, torch.bfloat16)
    if CAPABILITY >= 89:
        act_quant(torch.ones(1, 3072, dtype=torch.bfloat16), torch.ones(3072), 256, 4, 64, 1.0, True, True)
    linear_wna16(torch.ones(1, 256), *layer(4, 64, True, 128, 256), None, None, None, False)


def resources(kernel) -> dict:
    """The kernel's matrix instructions and what a thread and a program occupy."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    matrix = set(re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\S*", kernel.asm["ptx"]))
    return {"instructions": sorted(matrix), "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
            "registers": int(re.search(r"REG:(\d+)", usage)[1]), "shared_bytes": kernel.metadata.shared,
            "warps": kernel.metadata.num_warps}


if __name__ == "__main__":
    driver.set_active(NoDriver())
    JITFunction.run = compile_only(JITFunction.run)
    if not EVERY_CONFIGURATION:
        for kernel in (triton_kernel.multiply_one, triton_kernel.multiply_grouped):
            del kernel.configs[1:]
    compile_everything()
    print(json.dumps({name: [resources(kernel) for kernel in kernels] for name, kernels in compiled.items()}, indent=1))
