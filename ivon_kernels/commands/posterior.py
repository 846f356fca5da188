"""``ivon-kernels posterior``: saved posteriors, looked at, sampled, exported, merged and tempered without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from ivon_kernels.commands.console import show, table
from ivon_kernels.noise import antithetic
from ivon_kernels.posterior import Gaussian, Posterior
from ivon_kernels.posterior import merge as merged

__all__ = ["app"]

app = typer.Typer(help="Saved posteriors: look at one, write samples, export, merge, temper.")

Saved = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of weights with an ivon_posterior.safetensors beside them.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for weights and posterior, without a posterior so far.")]


@app.command()
def info(
    folder: Saved,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also a row for each weight tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """Sizes, sigma and settings of a posterior, after a check that file and weights are whole and belong together."""
    posterior = Posterior.load(folder)
    described = {name: _described(gaussian) for name, gaussian in posterior.items()}
    if as_json:
        whole = {"folder": str(folder), "adapter": posterior.origin.adapter, "seed": posterior.seed}
        show(json.dumps({**whole, "weights": posterior.numel, "tensors": described}, indent=2))
        return
    show(table(("", ""), [("folder", str(folder)), *posterior.facts().items()]))
    if tensors:
        rows = [
            (
                name,
                "x".join(map(str, each["shape"])),
                *(_number(each[key]) for key in ("sigma", "snr", "kl")),
            )
            for name, each in described.items()
        ]
        show("", table(("tensor", "shape", "sigma", "|mean| / sigma", "KL, nats"), rows))


@app.command()
def sample(
    folder: Saved,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="Number of the first one.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to; FOLDER itself if not given.")] = None,
) -> None:
    """Write samples as ordinary folders of weights, sample_0 and so on, for what knows nothing of posteriors."""
    posterior = Posterior.load(folder)
    for number in range(first, first + count):
        show(str(posterior.sample_adapter(number, None if out is None else out / f"sample_{number}")))


@app.command()
def export(
    folder: Saved,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the adapters and ivon_samples.json.")],
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="How many samples, beside the mean.")] = 8,
    pairs: Annotated[bool, typer.Option("--pairs", help="Half of them are mirror images of the others.")] = False,
) -> None:
    """Write the mean and samples as PEFT adapters with a manifest, for a server that holds several adapters."""
    numbers = antithetic(count) if pairs and count else count
    show(str(Posterior.load(folder).export(out, numbers)))


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Posteriors of the same weight tensors.")],
    out: Out,
    weight: Annotated[
        list[float] | None, typer.Option("--weight", "-w", help="Of each folder, in their order; 1 if not given.")
    ] = None,
) -> None:
    """Merge posteriors to one, each weight by how sure each of them is of it. Configuration is the first one's."""
    posteriors = [Posterior.load(folder) for folder in folders]
    merged(posteriors, weight).save_with_mean(out, source=folders[0])
    show(str(out))


@app.command()
def temper(
    folder: Saved,
    temperature: Annotated[float, typer.Argument(help="Every variance is divided by it: above 1 is colder.")],
    out: Out,
) -> None:
    """Make a posterior colder or warmer: ess times the temperature."""
    Posterior.load(folder).tempered(temperature).save_with_mean(out, source=folder)
    show(str(out))


def _described(gaussian: Gaussian) -> dict[str, Any]:
    """What JSON and tables have of one weight tensor; medians, and None for what is infinite."""
    return {
        "shape": list(gaussian.mean.shape),
        "sigma": _median(gaussian.sigma),
        "snr": _median(gaussian.snr),
        "kl": _finite(gaussian.kl),
        "ess": gaussian.ess,
        "weight_decay": gaussian.weight_decay,
    }


def _median(values: Tensor) -> float | None:
    return _finite(torch.median(values).item()) if values.numel() else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
