"""The project as `pip install` leaves it: a wheel that holds all that is opened, and a copy that works far from the repository."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import workbench
from workbench import cli, options, resources

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_SHIPPED = ("assets/build/", "assets/screenshot.png")  # how the assets were made, and a picture for the README
LEFT_OUT = shutil.ignore_patterns("__pycache__", "cache", ".venv", "*.egg-info")


def run(*command, cwd, **environment):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment},
                          check=False)
    assert done.returncode == 0, done.stderr[-2000:] or done.stdout[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because building leaves folders behind. Without setuptools here, pip fetches it."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("workbench", "kernels", "assets"):
        shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tree / name)
    here = ["--no-build-isolation"] if find_spec("setuptools") else []
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *here, "--wheel-dir", out, ".", cwd=tree)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder to import from; the packages it needs are those of the running environment."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel, cwd=folder)
    return folder


def in_the_wheel(path: Path) -> str:
    """Where a file of the repository is in the wheel."""
    name = path.relative_to(ROOT).as_posix()
    return name if name.startswith("workbench/") else f"workbench/shipped/{name}"


@pytest.mark.slow
def test_the_wheel_holds_every_file_that_is_opened(wheel):
    found = set(zipfile.ZipFile(wheel).namelist())
    files = [path for folder in ("workbench", "kernels", "assets") for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {in_the_wheel(path) for path in files if "__pycache__" not in path.parts
              and not path.relative_to(ROOT).as_posix().startswith(NOT_SHIPPED)}
    assert {"workbench/py.typed", "workbench/shipped/kernels/lowbit/amx.h", "workbench/ui/static/plot.js"} <= wanted
    assert sorted(wanted - found) == []
    info = {name for name in found if ".dist-info/" in name}
    assert sorted(found - wanted - info) == [], "a wheel of this project brings one package, and nothing of its tests"
    assert any(name.endswith("licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_an_installed_copy_works_in_another_folder(installed, tmp_path):
    """Ten seconds: the console script lists the models, the embedded one draws a step, and kernels and tables are its own."""
    script = installed / "bin" / "adatsq"
    found = json.loads(run(script, "models", "--json", "-", cwd=tmp_path, PYTHONPATH=str(installed)))
    assert [model["name"] for model in found["models"]] == ["emoji-flux"]
    code = ("import json, workbench, lowbit.build\n"
            "from workbench import examples, judge, options, pipeline\n"
            "from workbench.ui import widget\n"
            "bundle = pipeline.load('emoji-flux', 'cpu')\n"
            "made = pipeline.draw(bundle, bundle.prompts('showcase')[:1], 0, 1)\n"
            "print(json.dumps({'where': [workbench.__file__, lowbit.__file__], 'shape': made.images[0].shape,\n"
            "  'judge': judge.of(bundle) is not None, 'example': examples.load(bundle.name, bundle.model_hash) is not None,\n"
            "  'targets': options.MEASURED_TARGETS, 'styles': (widget.STATIC / 'workbench.css').is_file(),\n"
            "  'kernels': lowbit.build.result().reason}))")
    told = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()[-1])
    assert all(Path(place).is_relative_to(installed) for place in told["where"]), told["where"]
    assert told["shape"] == [128, 128, 3] and told["judge"] and told["example"] and told["styles"]
    assert told["targets"] == list(options.MEASURED_TARGETS)
    assert "No such file" not in told["kernels"], told["kernels"]


def test_the_version_is_written_once():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert f'__version__ = "{workbench.__version__}"' in (ROOT / "workbench" / "__init__.py").read_text(encoding="utf-8")


def test_folders_beside_the_package_are_found_in_both_layouts(tmp_path, monkeypatch):
    assert resources.resource_folder("assets") == ROOT / "assets" and resources.resource_folder("kernels") == ROOT / "kernels"
    shipped = tmp_path / "workbench" / "shipped"
    shipped.mkdir(parents=True)
    (tmp_path / "assets").mkdir()  # of somebody else, in the same site-packages
    monkeypatch.setattr(resources, "SHIPPED", shipped)
    assert resources.resource_folder("assets") == shipped / "assets"


def ranges(lines) -> dict[str, str]:
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {each.name: str(each.specifier) for each in found}


def test_requirements_and_project_name_the_same_packages_and_ranges():
    extras = PROJECT["optional-dependencies"]
    of_project = ranges(PROJECT["dependencies"]) | ranges(extras["app"]) | ranges(extras["compare"])
    own = of_project.pop(PROJECT["name"])
    assert own == "" and extras["app"][0] == f"{PROJECT['name']}[compare]", "what the app needs includes what a comparison needs"
    assert of_project == ranges((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    assert ranges(extras["ray"]) == {"ray": ">=2.60"}


@pytest.mark.parametrize("verb", [("compare", "emoji-flux"), ("serve",)])
def test_a_verb_whose_extra_is_not_installed_says_so_at_once(verb, capsys, monkeypatch):
    package, extra = cli.EXTRAS[verb[0]]
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else find_spec(name))
    assert cli.main(list(verb)) == 2
    assert capsys.readouterr().err == (f"error: {package} is not installed, which {verb[0]} needs; "
                                       f"pip install 'adatsq-workbench[{extra}]'\n")
