"""What goes into the wheel: the package, and inside it, as `workbench/shipped/`, the kernels' sources and the assets that it opens.

Everything else is in `pyproject.toml`. The repository keeps both beside the package (`workbench/resources.py` finds them in either place).
"""

from setuptools import find_packages, setup

ASSETS, LOWBIT = "workbench.shipped.assets", "workbench.shipped.kernels.lowbit"
OPENED = ("LICENSES.md", *(f"{folder}/**/*" for folder in ("examples", "judges", "latency", "models", "prompts")))
kernels = [LOWBIT, *(f"{LOWBIT}.{name}" for name in find_packages("kernels/lowbit"))]

setup(
    packages=[*find_packages(include=["workbench", "workbench.*"]), ASSETS, *kernels],
    package_dir={ASSETS: "assets", LOWBIT: "kernels/lowbit"},
    package_data={"workbench": ["py.typed"], "workbench.ui": ["static/**/*"], ASSETS: list(OPENED),
                  **{name: ["*.c", "*.h", "*.md"] for name in kernels}},
    include_package_data=False,
)
