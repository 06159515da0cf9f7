"""`import workbench` is light, makes `lowbit` importable, and offers the verbs by name."""

import subprocess
import sys

import pytest

import workbench


def run(code: str, root) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_and_the_kernels_does_not_load_torch(root):
    assert run("import workbench, lowbit, sys; print('torch' in sys.modules, lowbit.__name__)", root) == "False lowbit"


@pytest.mark.parametrize("first", ["", "import workbench.search, workbench.export;", "import workbench.pipeline;"])
def test_verbs_are_the_pipelines_also_where_a_module_has_their_name(root, first):
    code = f"""{first}
from workbench import load, profile, search, quantize, compare, export, load_quantized
import workbench.pipeline as pipeline
import workbench.search.pareto as pareto
from workbench.export import write
assert load is pipeline.load and load_quantized is pipeline.load_quantized
calls = []
pipeline.search = lambda *a, **k: calls.append((a, k)) or "searched"
pipeline.export = lambda *a, **k: "exported"
assert search(1, budget=2) == "searched" and calls == [((1,), dict(budget=2))]
assert export(1) == "exported" and export.write is write and search.pareto is pareto
print("ok")"""
    assert run(code, root) == "ok"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        workbench.nothing  # noqa: B018
