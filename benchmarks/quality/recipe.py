"""Which settings make IVON good? A search over all that matter, wider than what the methods of a study may try.

The settings are those that decide what IVON does, rather than its arguments, which do so only together:

- the step: ``lr * clip_radius``, how far one step can move a weight;
- sigma: ``1 / sqrt(ess * hess_init)``, the standard deviation that the noise starts with;
- the initial Hessian, which decides with `clip_radius` which gradients are clipped;
- beta2, how fast the Hessian learns.

Candidates fill this space evenly (a Sobol sequence); more of them then lie around the best ones, by the likelihood of
averaged predictions on the validation split. The best of all are run with other seeds, each with its Hessian frozen
too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import UserError
from benchmarks.quality.bench import Bench, scores_of
from benchmarks.quality.cells import Cells, key_of
from benchmarks.quality.method import Hyper
from benchmarks.quality.methods._ivon import optimizer, posterior_of, predict_each, state_of
from benchmarks.quality.methods.ivon_frozen import FROZEN
from benchmarks.quality.settings import SEARCH_SEED
from benchmarks.quality.units import Unit

CLIP = 1e-3
STEPS = (1e-4, 3e-3)
SIGMAS = (0.004, 0.08)
HESSIANS = (1e-4, 1.0)
NEAR = (2.0, 3.0, 4.0)
"""Factors on step, sigma and Hessian, up and down, around a setting that was good."""
BETA2 = (0.99999, 0.999, 0.99, 0.9)
SAMPLES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
TRIED, CONFIRMED = "tried", "confirmed"


@dataclass(frozen=True)
class Plan:
    """How many settings a search tries, and how many it runs again.

    Raises:
        UserError: There is nothing to try, or a number is negative.
    """

    trials: int
    """Tried all over the space."""
    refine: int
    """Tried around the best of these."""
    best: int
    """Of all, run again with other seeds."""
    given: tuple[str, ...] = ()
    """Tried instead of a search, with as many samples as the confirmations have; see `parse`."""

    def __post_init__(self) -> None:
        if self.given:
            if self.best < 0:
                raise UserError(f"--best must be at least 0, not {self.best}.")
        elif min(self.trials, self.best) < 1 or self.refine < 0:
            raise UserError("--trials and --best must be at least 1, and --refine at least 0.")

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"best": self.best} | (
            {"given": list(self.given)} if self.given else {"trials": self.trials, "refine": self.refine}
        )


def parse(text: str) -> Hyper:
    """Settings from ``STEP,SIGMA,HESS_INIT,BETA2``, as in ``1e-3,0.06,0.04,0.999``.

    Raises:
        UserError: It is not four numbers in their ranges.
    """
    try:
        step, sigma, hess_init, beta2 = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--try takes four numbers, STEP,SIGMA,HESS_INIT,BETA2 (1e-3,0.06,0.04,0.999), not '{text}'."
        ) from None
    if not (min(step, sigma, hess_init) > 0.0 and 0.0 <= beta2 < 1.0 and max(step, sigma, hess_init) < math.inf):
        raise UserError(
            f"--try: step, sigma and hess_init must be positive and finite, and beta2 in [0, 1), not '{text}'."
        )
    return _hyper(step, sigma, hess_init, beta2)


def candidates(count: int) -> list[Hyper]:
    """The first points of a sequence that fills the space evenly; more of them keep those before."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(count).tolist()
    return [_from_shares(*point) for point in points]


def around(centers: Sequence[Hyper], count: int) -> list[Hyper]:
    """Points in boxes around the centers: step, sigma and Hessian within `NEAR`, beta2 at most one value off."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=1).draw(count).tolist()
    found = []
    for number, (*shares, rank) in enumerate(points):
        center = centers[number % len(centers)]
        step, sigma, hess = (factor ** (2 * share - 1) for share, factor in zip(shares, NEAR, strict=True))
        near = BETA2.index(center["beta2"]) + math.floor(3 * rank) - 1
        beta2 = BETA2[min(max(near, 0), len(BETA2) - 1)]
        deviation = sigma / math.sqrt(center["ess"] * center["hess_init"])
        found.append(_hyper(step * center["lr"] * CLIP, deviation, hess * center["hess_init"], beta2))
    return found


def _from_shares(step: float, sigma: float, hess: float, beta2: float) -> Hyper:
    """Settings from a point of the unit cube."""
    size, deviation, hess_init = (
        math.exp(math.log(low) + share * math.log(high / low))
        for share, (low, high) in ((step, STEPS), (sigma, SIGMAS), (hess, HESSIANS))
    )
    return _hyper(size, deviation, hess_init, BETA2[int(beta2 * len(BETA2))])


def _hyper(step: float, sigma: float, hess_init: float, beta2: float) -> Hyper:
    """IVON's arguments, rounded to two digits, as people write them."""
    hess_init = _rounded(hess_init)
    ess = _rounded(1.0 / (sigma**2 * hess_init))
    return {"lr": _rounded(step / CLIP), "ess": ess, "hess_init": hess_init, "beta2": beta2, "clip_radius": CLIP}


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def frozen(hyper: Hyper) -> Hyper:
    """The same with a Hessian that never moves."""
    return {**hyper, "beta2": FROZEN}


class Recipe:
    """The search on one task."""

    def __init__(self, task: str, cells: Cells, bench: Bench, seeds: int) -> None:
        """Plans it.

        Args:
            task: Its name.
            cells: Where finished trials are.
            bench: Of the task.
            seeds: How many other seeds the best ones are run with.
        """
        self.task, self.cells = task, cells
        self.trials: list[Hyper] = []
        self._bench, self._seeds = bench, seeds

    def tries(self, trials: Sequence[Hyper], samples: int | None = None) -> list[Unit]:
        """More trials, one seed each; with as many samples as the size's searches have, or with so many."""
        self.trials += [hyper for hyper in trials if hyper not in self.trials]
        samples = self._bench.amounts.search_samples if samples is None else samples
        return [self._unit(TRIED, hyper, SEARCH_SEED, samples) for hyper in trials]

    def confirmations(self, chosen: Sequence[Hyper]) -> list[Unit]:
        """Settings that were chosen, with other seeds and more samples."""
        seeds = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + self._seeds)
        return [self._unit(CONFIRMED, hyper, seed, max(SAMPLES)) for seed in seeds for hyper in chosen]

    def _unit(self, kind: str, hyper: Hyper, seed: int, samples: int) -> Unit:
        cell = (kind, self.task, key_of(hyper), str(seed))
        return Unit(cell, (), f"seed {seed}: {key_of(hyper)}", lambda: self._run(kind, hyper, seed, samples))

    def _run(self, kind: str, hyper: Hyper, seed: int, samples: int) -> dict[str, Any]:
        begin = time.perf_counter()
        job = self._bench.job(seed, samples)
        job.restart()
        found = optimizer(job, hyper)
        job.finetune(found)
        state = state_of(found.posterior(job.model))
        diagnostics = found.diagnostics()[0]
        posterior = posterior_of(job, state, hyper)
        validation = self._bench.validation
        each = predict_each(job, posterior, validation.encoded, samples)
        temperatures = TEMPERATURES if kind == CONFIRMED else ()
        tempered = {
            f"{value:g}": self._scores(
                predict_each(job, posterior.tempered(value), validation.encoded, self._bench.amounts.search_samples)
            )
            for value in temperatures
        }
        return {
            "hyper": dict(hyper),
            "seed": seed,
            "mean": self._scores(predict_each(job, posterior, validation.encoded, 0)),
            "samples": {str(count): self._scores(each[:count]) for count in _counts(samples)},
            "temperatures": tempered,
            "clipped": diagnostics["clipped"],
            "hess_over_init": {f"{level:g}": value for level, value in diagnostics["hess_over_init"].items()},
            "seconds": time.perf_counter() - begin,
            "error": None,
        }

    def _scores(self, each: Tensor) -> dict[str, float | None]:
        return scores_of(each.mean(0), self._bench.validation.labels, None)

    # ---- what was found ----------------------------------------------------------------------------------------------

    def found(self, kind: str, hypers: Sequence[Hyper]) -> Iterator[dict[str, Any]]:
        """The finished runs of these settings that did not fail."""
        seeds = [SEARCH_SEED] if kind == TRIED else range(SEARCH_SEED + 1, SEARCH_SEED + 1 + self._seeds)
        for hyper in hypers:
            for seed in seeds:
                content = self.cells.read(kind, self.task, key_of(hyper), str(seed))
                if content is not None and content["error"] is None:
                    yield content

    def best(self, count: int) -> list[Hyper]:
        """The settings with the best likelihood of averaged predictions, of those tried."""
        runs = sorted(self.found(TRIED, self.trials), key=averaged_nll)
        return [run["hyper"] for run in runs[:count]]


def averaged_nll(run: dict[str, Any]) -> float:
    """Negative log-likelihood of the predictions that average all samples of a run."""
    scores = run["samples"]
    return float(scores[max(scores, key=int)]["nll"])


def _counts(samples: int) -> list[int]:
    return sorted({count for count in SAMPLES if count <= samples} | {samples})
