"""What an object is, in a few facts: on one line, and as a table for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

__all__ = ["as_html", "as_line"]


def as_line(kind: str, facts: Mapping[str, str]) -> str:
    """``Kind(name value, name value)``, for ``__repr__``."""
    return f"{kind}({', '.join(f'{name} {value}' for name, value in facts.items())})"


def as_html(kind: str, facts: Mapping[str, str]) -> str:
    """A table with a row for each fact, for ``_repr_html_``."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    return f"<table><caption>{escape(kind)}</caption>{rows}</table>"
