"""Building the kernels, doing without them, and what is refused before a pointer is taken."""

import shutil
from pathlib import Path

import pytest
import torch
from lowbit import build, cpu, ops

from tests.kernels.layers import codes_of, ends, layer, signed


def emptied(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


def switched_off(monkeypatch, tmp_path):
    emptied(monkeypatch, tmp_path)
    monkeypatch.setenv("LOWBIT_KERNELS", "off")


def without_compiler(monkeypatch, tmp_path):
    emptied(monkeypatch, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def broken_source(monkeypatch, tmp_path):
    emptied(monkeypatch, tmp_path)
    copy = tmp_path / "lowbit"
    shutil.copytree(build.FOLDER, copy)
    (copy / "unpack.c").write_text("this is no C;\n")
    monkeypatch.setenv("LOWBIT_ISA", "portable")
    monkeypatch.setattr(build, "FOLDER", Path(copy))


@pytest.mark.parametrize(("spoil", "reason"), [(switched_off, "switched off"), (without_compiler, "no C compiler"),
                                               (broken_source, "did not build")])
def test_without_kernels_the_reference_runs_and_the_reason_is_told(spoil, reason, monkeypatch, tmp_path, use_built):
    if spoil is broken_source and build._compiler() is None:
        pytest.skip("no C compiler")
    spoil(monkeypatch, tmp_path)
    built = build._Build().result()
    assert built.library is None and reason in built.reason
    use_built(built)
    assert ops.backend() == ops.Backend("emulated", built.reason)
    q, scale = ops.act_quant(signed(3, 64, 0), None, 64, 4, 0)
    assert ops.linear_wnan(q, scale, *layer(4, 32, True, 5, 64, 0), None, None, None, False, torch.float32).shape == (3, 5)


def test_an_instruction_set_that_is_none_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("LOWBIT_ISA", "abacus")
    with pytest.raises(ValueError, match=r"LOWBIT_ISA=abacus: this CPU runs .*portable"):
        build.instruction_sets()


def test_a_compiler_older_than_the_cpu_builds_for_a_lesser_instruction_set(compiler, monkeypatch, tmp_path):
    emptied(monkeypatch, tmp_path)
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    unknown = build.Isa("later", "int8 later", frozenset(), ("-mno-compiler-knows-this",))
    monkeypatch.setattr(build, "ISAS", (unknown, build.ISAS[-1]))
    built = build._Build().result()
    assert (built.library is not None, built.reason) == (True, "int8 portable C")


@pytest.mark.parametrize(("position", "damage"), [
    (2, lambda t: t[:, :-1]), (2, lambda t: t[:-1]), (2, lambda t: t.int()), (3, lambda t: t[:, :1]), (3, lambda t: t.float()),
    (4, lambda t: t[:, :1]), (4, lambda t: t.int()), (7, lambda t: t[:-1]), (8, lambda t: t[:-1]), (9, lambda t: t[:, :-1]),
    (1, lambda t: t[:-1]), (1, lambda t: t.double()), (0, lambda t: t.int())])
def test_tensors_that_do_not_fit_are_refused_before_the_library_is_called(position, damage, monkeypatch):
    monkeypatch.setattr(cpu, "call", lambda *_: pytest.fail("the kernel was called"))
    arguments = [codes_of(4, 96, 8, 0), torch.ones(4, 1), *layer(4, 32, False, 7, 96, 0), *ends(4, 7, 3, torch.float32, 0)]
    arguments += [False, torch.float32]
    arguments[position] = damage(arguments[position])
    with pytest.raises(ValueError):
        cpu.linear_wnan(*arguments)
