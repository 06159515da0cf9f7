"""Every method by name. A method is one short file here: a composition of quant/ parts, nothing else.

A new file with a `METHOD` is all it takes: the registry, the shell, the app and the comparison find it by themselves.
"""

import importlib
import pkgutil

from workbench.methods.method import Method

__all__ = ["METHODS", "Method", "discover"]


def discover(path, package: str) -> dict[str, Method]:
    """The METHOD of every module in a folder, by `order`, then by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(path) if found.name != "method")
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    methods = sorted((module.METHOD for module in modules), key=lambda method: (method.order, method.name))
    if len({method.name for method in methods}) < len(methods):
        raise ValueError(f"two methods of {package} have one name: {', '.join(method.name for method in methods)}")
    return {method.name: method for method in methods}


METHODS: dict[str, Method] = discover(__path__, __name__)
