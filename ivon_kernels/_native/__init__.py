"""Finds the native libraries that were built with the package, and says why one is missing.

The build leaves `build_info.json` in this directory, and beside it each library that it could build. This holds for a
normal install (both lie in site-packages) and for an editable one (both lie in the checkout). Nothing here imports
torch or loads a library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["build_info", "find_library", "missing_reason"]

_DIRECTORY = Path(__file__).resolve().parent
_SUFFIXES = (".so", ".dylib")


def build_info() -> dict[str, Any]:
    """Returns what the build wrote about itself.

    Returns:
        `{"cpu": None or why it was not built, "cuda": likewise, "compiler": "GNU 12.2.0",
        "simd_levels": ["avx512", "avx2", "baseline"], "openmp": True}`, or an empty dictionary where nothing was built.
    """
    try:
        text = (_DIRECTORY / "build_info.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    info: dict[str, Any] = json.loads(text)
    return info


def find_library(name: str) -> Path | None:
    """Returns the path of the native library of a backend, for instance "cpu", or None where it was not built."""
    # An editable install without a compiler leaves the library of an earlier build in the checkout: build_info decides.
    if build_info().get(name, "never built") is not None:
        return None
    paths = (_DIRECTORY / f"libivon_{name}{suffix}" for suffix in _SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def missing_reason(name: str) -> str:
    """Returns why `find_library(name)` finds nothing, and what to do about it."""
    info = build_info()
    if not info:
        return (
            f"the package at {_DIRECTORY.parent} was not installed, so its native part was never built; "
            "run 'pip install -e .' in the checkout, or 'pip install .' and leave the checkout"
        )
    if name not in info:
        return f"this version has no native library for {name!r}"
    reason: str | None = info[name]
    return reason or f"libivon_{name} was built but is no longer in {_DIRECTORY}; install the package again"
