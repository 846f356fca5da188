"""The command ``python -m benchmarks readme``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations


def readme() -> None:
    """Write the tables of README.md and of other documents from the committed records."""
    from benchmarks.readme.figures import write

    write()
