"""``ivon-kernels demo``: the demo's options, and how its result is printed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ivon_kernels.commands.console import show

__all__ = ["demo"]


def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Runs.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each.")] = 600,
    picture: Annotated[Path, typer.Option(help="Where to write it.")] = Path("ivon-demo.png"),
) -> None:
    """AdamW against IVON on handwritten digits with wrong labels: a table, a picture, a sentence; half a minute."""
    from ivon_kernels import demo as digits  # what the table of backends does not need

    start = time.perf_counter()
    result = digits.run(seeds, steps)
    show(
        f"{digits.EXAMPLES} handwritten digits to learn from, {digits.WRONG:.0%} of them with a wrong label; {steps} "
        f"steps, {seeds} {'runs' if seeds > 1 else 'run'}, {time.perf_counter() - start:.0f} s.\n"
        f"AdamW's learning rate, its best of {len(digits.RATES)} on {digits.VALIDATION} other digits: "
        f"{', '.join(f'{rate:g}' for rate in result.rates)}. IVON took it over.\n"
        f"Scaled: with a temperature, from these other digits too.\n",
        *result.table(),
        f"\n{result.conclusion()}\n",
    )
    try:
        result.draw(picture)
    except ModuleNotFoundError as error:
        show(f"No picture: {error}")
    else:
        show(f"Confidence against accuracy, all runs together: {picture}")
