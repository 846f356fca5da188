"""Packages that only some functions need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["REPORT", "needed_for"]

REPORT = "'ivon-kernels[report]'"
"""The extra of scores, pictures and reports, as pip takes it."""


@contextmanager
def needed_for(what: str, install: str) -> Iterator[None]:
    """Around imports: a package that is missing ends in one sentence.

    Args:
        what: Who needs it.
        install: What pip should install.

    Raises:
        ModuleNotFoundError: Saying so.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {error.name}, which is not installed: pip install {install}", name=error.name
        ) from None
