"""The methods: every module of this folder names its own in a table, ``METHODS``. A new file with one joins."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from benchmarks import UserError
from benchmarks.quality.method import Method


def all_methods() -> dict[str, Method]:
    """The methods by name, each after its base."""
    found: dict[str, Method] = {}
    for info in iter_modules(__path__):
        table = getattr(import_module(f"{__name__}.{info.name}"), "METHODS", ())
        if not table:
            raise UserError(f"benchmarks/quality/methods/{info.name}.py must name its methods in METHODS.")
        for method in table:
            if method.name in found:
                raise UserError(f"Two methods have the name {method.name}.")
            found[method.name] = method
    for method in found.values():
        if method.base is not None and (method.base not in found or found[method.base].base is not None):
            raise UserError(f"The method {method.name} has the base {method.base}, which is no method that trains.")
        if method.like is not None and method.like not in found:
            raise UserError(f"The method {method.name} is to be trained like {method.like}, which is no method.")
    return dict(sorted(found.items(), key=lambda item: (item[1].base is not None, item[0])))
