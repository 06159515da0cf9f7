"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on odd sizes and buffers of exactly their size."""

import subprocess
from pathlib import Path

import workbench  # noqa: F401  (registers lowbit)

# isort: split
import pytest
from lowbit import build

DRIVER = Path(__file__).with_name("sanitized.c")
ABLE = [isa.name for isa in build.ISAS if isa.needs <= build.cpu_flags()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
def test_nothing_is_read_or_written_beside_its_buffer(name, address_sanitizer, tmp_path):
    isa = next(isa for isa in build.ISAS if isa.name == name)
    sources = [str(build.FOLDER / source) for source in build.SOURCES]
    flags = ["-O1", "-g", "-std=gnu11", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    command = [address_sanitizer, *flags, *isa.flags, *build.extra_flags(isa), f"-I{build.FOLDER}", str(DRIVER), *sources, "-lm",
               "-o", str(tmp_path / "driver")]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([str(tmp_path / "driver")], capture_output=True, text=True, timeout=300, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert (ran.returncode, ran.stdout.strip()) == (0, "clean"), ran.stderr[-2000:]
