"""The methods, one file each: every module of this folder with a subclass of Method is one."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from benchmarks import UserError
from benchmarks.quality.method import Method


def all_methods() -> dict[str, Method]:
    """The methods by name, each after its base.

    Raises:
        UserError: A file has no method or several, or a base is missing.
    """
    found: dict[str, Method] = {}
    for info in iter_modules(__path__):
        if info.name.startswith("_"):
            continue
        module = import_module(f"{__name__}.{info.name}")
        classes = [
            value
            for value in vars(module).values()
            if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
        ]
        if len(classes) != 1:
            raise UserError(f"benchmarks/quality/methods/{info.name}.py must hold one Method, it holds {len(classes)}.")
        found[info.name] = classes[0]()
    for name, method in found.items():
        if method.base is not None and (method.base not in found or found[method.base].base is not None):
            raise UserError(f"The method {name} has the base {method.base}, which is no method that trains.")
    return dict(sorted(found.items(), key=lambda item: item[1].base is not None))
