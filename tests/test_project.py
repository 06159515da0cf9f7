"""What the project promises about itself: the Space's front matter, the requirements, the commands, and the limits on size."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gradio
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [*ROOT.glob("workbench/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "app.py"]
MAX_LINES, MAX_FUNCTION_LINES = 350, 50


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {each.name: each for each in found}


def test_the_front_matter_is_what_a_space_needs():
    matter = yaml.safe_load(README.split("---\n")[1])
    assert (matter["sdk"], matter["python_version"], matter["license"], matter["suggested_hardware"]) == (
        "gradio", "3.12", "apache-2.0", "cpu-basic")
    assert (ROOT / matter["app_file"]).is_file()
    assert len(matter["short_description"]) <= 60 and matter["tags"]
    assert matter["sdk_version"] in requirements("requirements.txt")["gradio"].specifier
    assert Version(matter["sdk_version"]).release[:2] == Version(gradio.__version__).release[:2], "tested with another version"


@pytest.mark.parametrize("torch", ["2.8.0", "2.9.1", "2.11.0", "2.13.0"])
def test_any_torch_of_a_space_fits(torch):
    assert torch in requirements("requirements.txt")["torch"].specifier


@pytest.mark.slow
def test_the_requirements_resolve_as_a_space_installs_them(tmp_path):
    """Python 3.12 and the newest torch of a Space with ZeroGPU; downloads metadata, so it needs the package index."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--python-version", "3.12"]
    asked = ["--only-binary=:all:", "--target", str(tmp_path), "-r", str(ROOT / "requirements.txt"), "torch<2.12"]
    done = subprocess.run([*pip, *asked], capture_output=True, text=True)
    if "No matching distribution found for torch" in done.stderr or "NewConnectionError" in done.stderr:
        pytest.skip("no package index is reachable")
    assert done.returncode == 0, done.stderr[-500:]


def test_only_the_cpu_file_pins_and_it_fits_the_ranges():
    ranges = requirements("requirements.txt")
    assert not [name for name, each in ranges.items() if "==" in str(each.specifier)]
    (torch,) = requirements("requirements-cpu.txt").values()
    version = str(torch.specifier).removeprefix("==")
    assert torch.name == "torch" and version in ranges["torch"].specifier


def test_everything_imported_is_required():
    known = {"triton": "torch",  # comes with its CUDA builds
             "spaces": "gradio",  # is there on a ZeroGPU Space and is not needed elsewhere
             "PIL": "pillow", "annotated_types": "pydantic", "huggingface_hub": "diffusers"}
    required = set(requirements("requirements.txt"))
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in (n.split(".")[0] for n in names):
                ours = name in ("workbench", "lowbit", "__future__") or name in __import__("sys").stdlib_module_names
                assert ours or known.get(name, name) in required, f"{path.name} imports {name}"


def test_everything_required_is_imported():
    """`accelerate` is what diffusers and transformers place weights with; plotly's script is served from its package's folder."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    unused = [name for name in requirements("requirements.txt")
              if not re.search(rf"^ *(import|from) {dict(pillow='PIL').get(name, name)}\b", text, re.MULTILINE)]
    assert set(unused) <= {"accelerate", "plotly"} and 'find_spec("plotly")' in text


def command(kind: str) -> str:
    return re.search(rf"<!-- {kind} -->\n```bash\n(.+)\n```", README)[1]


def test_each_command_is_one_line_that_sets_up_its_own_environment():
    for kind in ("app", "tests"):
        assert command(kind).startswith("python3 -m venv .venv && .venv/bin/pip install -r requirements-cpu.txt")
    assert command("app").endswith("app.py")
    assert "ruff check" in command("tests") and command("tests").endswith("pytest")
    for name in re.findall(r"-r (\S+)", command("app") + " " + command("tests")):
        assert (ROOT / name).is_file()


def test_the_readme_shows_every_verb():
    from workbench.cli import VERBS

    assert set(re.findall(r"^python -m workbench (\w+)", README, re.MULTILINE)) == set(VERBS)


CALLED_BY_LIBRARIES = {"persistent_id", "persistent_load", "reducer_override", "log_message"}  # of pickle and http.server
OFFERED = {"evaluate_plan", "rows_at"}  # to whoever uses the package; a name comes here only when it is meant for them


def test_nothing_is_kept_for_tests_alone():
    """Every function and class is named somewhere else in the project, its tests apart."""
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *ROOT.glob("benchmarks/*.py"), *ROOT.glob("assets/build/*.py"))]
    uses = Counter(word for text in texts for word in re.findall(r"\w+", text))
    defined = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.decorator_list]
    once = {node.name for node in defined if uses[node.name] == 1 and not node.name.startswith("__")}
    assert once - CALLED_BY_LIBRARIES - OFFERED == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
