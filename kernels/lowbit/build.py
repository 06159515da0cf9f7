"""Compile the C kernels for this CPU, once, and load them.

A plain C ABI read through ctypes compiles in about three seconds; torch's C++ headers alone take a minute. The library is
compiled for one instruction set, the best that this CPU has and the compiler knows, and kept in the user's cache under a
hash of the sources, the compiler and the flags, so that nothing stale is ever loaded. It brings no OpenMP runtime of its
own: it runs on the threads of the one torch has loaded, because two pools that spin on the same cores slow each other down.

`LOWBIT_ISA` (amx, avx512, avxvnni, avx2, portable) chooses a lesser instruction set, `LOWBIT_CACHE` the folder, and
`LOWBIT_KERNELS=off` does without.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from lowbit import abi

FOLDER = Path(__file__).resolve().parent
SOURCES = ("scratch.c", "unpack.c", "epilogue.c", "hadamard/cpu.c", "act_quant/cpu.c", "linear_wnan/cpu.c", "linear_wna16/cpu.c",
           "modulate/cpu.c", "attention/cpu.c")
HEADERS = ("lowbit.h", "amx.h", "linear_wnan/block.h", "linear_wnan/block_amx.h", "attention/bf16.h")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall",
         "-Wno-unknown-pragmas", "-Wno-unused")
COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Isa:
    """An instruction set: what the CPU must list, what the compiler is told, and its name on the screen."""

    name: str
    label: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni")
_AMX = ("amx_tile", "amx_int8", "amx_bf16")
_AVX512_FLAGS = (*("-m" + name.replace("_", "") for name in _AVX512), "-mprefer-vector-width=512")
_EXTRA = {"avx512vbmi": "-mavx512vbmi", "avx512_bf16": "-mavx512bf16"}  # used with AVX-512 where the CPU has them
ISAS = (
    Isa("amx", "int8 AMX", frozenset((*_AVX512, *_AMX)), (*_AVX512_FLAGS, *("-m" + name.replace("_", "-") for name in _AMX))),
    Isa("avx512", "int8 AVX-512 VNNI", frozenset(_AVX512), _AVX512_FLAGS),
    Isa("avxvnni", "int8 AVX-VNNI", frozenset((*_AVX2, "avx_vnni")), tuple("-m" + name for name in (*_AVX2, "avxvnni"))),
    Isa("avx2", "int8 AVX2", frozenset(_AVX2), tuple("-m" + name for name in _AVX2)),
    Isa("portable", "int8 portable C", frozenset(), ()),
)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this CPU says it can do; empty where nothing says so (then the portable code is compiled). AMX's registers are asked for, which
    its kernels need, and left out where Linux refuses them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    listed = frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))
    return listed if "amx_tile" in listed and _allowed_tiles() else listed - {"amx_tile"}


def _allowed_tiles() -> bool:
    """Linux gives a process AMX's registers when it asks, once: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    arch_prctl, require, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, require, tile_data) == 0


def instruction_sets() -> list[Isa]:
    """Those this CPU has, best first, or the one `LOWBIT_ISA` names; raises ValueError for a name that is none or that it has not."""
    able = [isa for isa in ISAS if isa.needs <= cpu_flags()]
    wanted = os.environ.get("LOWBIT_ISA", "")
    chosen = [isa for isa in able if wanted in ("", isa.name)]
    if not chosen:
        raise ValueError(f"LOWBIT_ISA={wanted}: this CPU runs {', '.join(isa.name for isa in able)}")
    return chosen


@dataclass(frozen=True, eq=False)
class Built:
    """The loaded library, or None and the reason. Equal to itself alone, so that what was found out about one is not told of another."""

    library: abi.Library | None
    isa: Isa
    reason: str


class _Build:
    """Compiles in a thread of its own; `result` waits for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._built: Built | None = None

    def start(self) -> None:
        """Begin, unless that has happened."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="lowbit build", daemon=True)
                self._thread.start()

    def result(self) -> Built:
        if self._built is None:
            self.start()
            self._thread.join()
        return self._built

    def _run(self) -> None:
        try:
            self._built = _load()
        except Exception as error:  # whatever went wrong, the emulated path works and the screen says why
            self._built = Built(None, ISAS[-1], f"the kernels did not build: {str(error).strip().splitlines()[-1][:200]}")


_build = _Build()
start, result = _build.start, _build.result


def _load() -> Built:
    if os.environ.get("LOWBIT_KERNELS", "") == "off":
        return Built(None, ISAS[-1], "kernels are switched off (LOWBIT_KERNELS)")
    sets, compiler, failures = instruction_sets(), _compiler(), []
    if compiler is None:
        return Built(None, sets[0], "no C compiler (gcc, clang or cc) was found")
    runtime = _openmp_runtime()
    if runtime:
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    for isa in sets:  # a compiler may be older than the CPU
        try:
            return Built(abi.Library(str(compile_library(isa, compiler, openmp=bool(runtime)))), isa, isa.label)
        except RuntimeError as error:
            failures.append(error)
    raise failures[-1]  # of the plainest set: nothing to do with the CPU


def _compiler() -> str | None:
    named = os.environ.get("CC", "").split()[:1]
    return next((found for name in (*named, "gcc", "clang", "cc") if (found := shutil.which(name))), None)


def _openmp_runtime() -> str | None:
    """The GNU OpenMP library torch has loaded into this process. Other runtimes do not take gcc's calls: one thread then."""
    import torch  # noqa: F401  (loads it)

    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((path for line in lines if (path := line.split(maxsplit=5)[-1]) and "libgomp" in Path(path).name), None)


def extra_flags(isa: Isa) -> tuple[str, ...]:
    return tuple(flag for name, flag in _EXTRA.items() if "avx512_vnni" in isa.needs and name in cpu_flags())


def compile_library(isa: Isa, compiler: str, *, openmp: bool, extra: tuple[str, ...] = ()) -> Path:
    """Path of the compiled library, from the cache where it is there. Raises RuntimeError with the compiler's last words."""
    flags = (*FLAGS, *isa.flags, *extra_flags(isa), *(("-fopenmp",) if openmp else ()), *extra)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout.splitlines()[:1]
    digest = hashlib.sha256(repr((flags, version, platform.machine())).encode())
    for name in (*HEADERS, *SOURCES):
        digest.update((FOLDER / name).read_bytes())
    folder = cache_folder()
    target = folder / f"lowbit-{isa.name}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [Path(scratch) / f"{number}.o" for number in range(len(SOURCES))]
        compiling = [subprocess.Popen([compiler, *flags, "-c", str(FOLDER / source), "-o", str(out)], stderr=subprocess.PIPE, text=True)
                     for source, out in zip(SOURCES, objects)]
        failures = [words for job in compiling if (words := job.communicate(timeout=COMPILE_SECONDS)[1]) and job.returncode]
        if failures:
            raise RuntimeError(failures[0])
        part = Path(scratch) / target.name
        linking = subprocess.run([compiler, "-shared", *map(str, objects), *extra, "-lm", "-o", str(part)], capture_output=True, text=True,
                                 timeout=COMPILE_SECONDS)
        if linking.returncode:
            raise RuntimeError(linking.stderr)
        part.replace(target)
    return target


def cache_folder() -> Path:
    """Where compiled kernels and measured tables are kept."""
    if "LOWBIT_CACHE" in os.environ:
        return Path(os.environ["LOWBIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "adatsq-workbench"
