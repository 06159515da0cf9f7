"""AdaTSQ Workbench: see, search and prove mixed-precision quantization of diffusion transformers.

    from workbench import load, profile, search, quantize, compare, export, load_quantized

These names arrive on first use, so that `import workbench` stays fast: a page can be served before torch is loaded.
"""

import importlib
import importlib.util
import sys
from types import ModuleType

__version__ = "0.1.0"
_VERBS = ("load", "profile", "search", "quantize", "compare", "export", "load_quantized")
_STAGES = ("search", "export")  # verbs that are also the name of a module here
__all__ = ["compare", "export", "load", "load_quantized", "profile", "quantize", "search"]


def _verb(name: str):
    return getattr(importlib.import_module("workbench.pipeline"), name)


class _Stage(ModuleType):
    """A stage's module, which can also be called as the verb of its name."""

    def __call__(self, *args, **kwargs):
        return _verb(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    """Importing `workbench.search` binds the module over the verb `search`; this keeps both meanings."""

    def __setattr__(self, name, value):
        if name in _STAGES and isinstance(value, ModuleType):
            value.__class__ = _Stage
        super().__setattr__(name, value)


def __getattr__(name: str):
    if name in _STAGES:
        return importlib.import_module(f"workbench.{name}")
    if name in _VERBS:
        return _verb(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register_lowbit() -> None:
    """Load kernels/lowbit under the name `lowbit`. By path, because a top-level package called `kernels` would
    shadow the Hugging Face library of that name."""
    if "lowbit" in sys.modules:
        return
    from workbench.resources import resource_folder

    folder = resource_folder("kernels") / "lowbit"
    spec = importlib.util.spec_from_file_location("lowbit", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])
    module = sys.modules["lowbit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


sys.modules[__name__].__class__ = _Package
_register_lowbit()
