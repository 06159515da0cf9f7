"""Where the folders beside the package are: `assets` (models, prompts, judges, tables) and `kernels` (the sources of `lowbit`).

In the repository they lie next to `workbench/`; `setup.py` puts them inside the installed package, as `workbench/shipped/`.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = PACKAGE / "shipped"  # there only in an installed copy


def resource_folder(name: str) -> Path:
    """`assets` or `kernels`, of an installed copy or of the repository."""
    return (SHIPPED if SHIPPED.is_dir() else PACKAGE.parent) / name
