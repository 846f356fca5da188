"""Packages that only some functions need, and the extras that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["HF", "LIGHTNING", "REPORT", "needed_for"]

HF = "'ivon-kernels[hf]'"
"""Transformers, PEFT and Accelerate, as pip takes the extra."""
LIGHTNING = "'ivon-kernels[lightning]'"
"""Lightning."""
REPORT = "'ivon-kernels[report]'"
"""Scores, pictures and reports."""


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
        if error.name is None or error.name.partition(".")[0] == "ivon_kernels":  # nothing that pip could bring
            raise
        package = error.name.partition(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs {package}, which is not installed: pip install {install}", name=error.name
        ) from None
