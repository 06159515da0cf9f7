"""Imports go down only: every module's imports are read from its source and held against one list of ranks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module may import strictly lower ranks and its own package.
RANKS = (
    ("resources", "csvtable"),
    ("options", "memory"),
    ("folders", "weightformats"),
    ("modelfiles",),
    ("plans",),
    ("types",),
    ("lowbit", "runs", "metrics", "prompts", "flags", "tuning", "modelcard", "judge", "lpips", "model_info"),
    ("models", "checkpoints"),
    ("replay",),
    ("quant", "terminal"),
    ("methods", "roofline"),
    ("sensitivity", "costs", "latency", "generate", "rollout", "search", "inspection"),
    ("exported",),
    ("export", "bench", "examples"),
    ("baselines",),
    ("stored",),
    ("pipeline",),
    ("contest",),
    ("jobs", "zerogpu"),
    ("commands",),
    ("commands_judging",),
    ("cli", "ui"),
    ("__main__", "app"),
)
RANK_OF = {part: rank for rank, parts in enumerate(RANKS) for part in parts}


def part_of(path: Path) -> str:
    """The part of the project a file belongs to: workbench/quant/grids.py -> quant, kernels/lowbit/ops.py -> lowbit."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "lowbit"
    return relative.stem if len(relative.parts) == 1 else Path(relative.parts[1]).stem


def imported(source: str, package: str = "workbench") -> set[str]:
    """Full names of everything a source imports, at any depth; relative imports count from `package`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def parts_used(names: set[str]) -> set[str]:
    """The project's parts among imported names."""
    used = {name.split(".")[1] for name in names if name.startswith("workbench.")}
    return used | {"lowbit" for name in names if name.split(".")[0] == "lowbit"}


def faults(part: str, names: set[str]) -> list[str]:
    """What a module of `part` imports and may not."""
    found = []
    for used in sorted(parts_used(names) - {part}):
        if used not in RANK_OF:
            found.append(f"{used} has no rank")
        elif RANK_OF[used] >= RANK_OF[part]:
            found.append(f"{used} is not below {part}")
        elif part == "search" and used not in ("options", "plans", "types"):
            found.append(f"search may import options, plans and types, not {used}")
    if part == "lowbit" and any(name.split(".")[0] == "workbench" for name in names):
        found.append("kernels stand alone and may not import workbench")
    if part not in ("ui", "app") and any(name.split(".")[0] == "gradio" for name in names):
        found.append("gradio belongs to ui and app.py")
    return found


def sources() -> list[Path]:
    files = [*ROOT.glob("workbench/**/*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("app.py")]
    return [path for path in files if path != ROOT / "workbench" / "__init__.py"]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    assert part_of(path) in RANK_OF, f"{path} belongs to no rank; add it to RANKS"
    assert faults(part_of(path), imported(path.read_text(encoding="utf-8"), package)) == []


def test_the_package_itself_imports_no_stage_eagerly():
    tree = ast.parse((ROOT / "workbench" / "__init__.py").read_text(encoding="utf-8"))
    eager = ast.Module(body=[node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], type_ignores=[])
    names = imported(ast.unparse(eager))
    assert not {name.split(".")[0] for name in names} & {"torch", "diffusers", "transformers", "gradio", "workbench"}


@pytest.mark.parametrize("part, source", [
    ("search", "from workbench.quant import grids"),
    ("search", "from workbench.runs import Run"),
    ("types", "def later():\n    from workbench import pipeline"),
    ("replay", "from workbench.quant.quantize import build"),
    ("lowbit", "import workbench"),
    ("lowbit", "from workbench.options import BadInput"),
    ("pipeline", "import gradio as gr"),
    ("pipeline", "from gradio import Blocks"),
    ("quant", "from ..pipeline import load"),
    ("plans", "from . import types"),
    ("cli", "from workbench.ui import page"),
])
def test_the_check_finds_a_forbidden_import(part, source):
    assert faults(part, imported(source, "workbench.quant" if "from .." in source else "workbench"))


@pytest.mark.parametrize("part, source", [
    ("search", "from workbench.plans import BitPlan\nfrom workbench.search import pareto"),
    ("quant", "import lowbit.ops\nfrom workbench.quant import grids"),
    ("ui", "import gradio as gr\nfrom workbench import pipeline"),
])
def test_the_check_accepts_what_is_allowed(part, source):
    assert faults(part, imported(source)) == []
