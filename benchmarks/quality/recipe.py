"""Which settings make IVON good? A search over all that matter, wider than what the methods of a study may try.

The settings are those that decide what IVON does, rather than its arguments, which do so only together:

- the step: ``lr * clip_radius``, how far one step can move a weight;
- sigma: ``1 / sqrt(ess * hess_init)``, the standard deviation that the noise starts with;
- the initial Hessian, which decides with `clip_radius` which gradients are clipped;
- beta2, how fast the Hessian learns.

Candidates fill this space evenly (a Sobol sequence). The best ones by the likelihood of averaged predictions on the
validation split are then run with other seeds, each with its Hessian frozen too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.bench import Bench, scores_of
from benchmarks.quality.cells import Cells, key_of
from benchmarks.quality.method import Hyper
from benchmarks.quality.methods._ivon import optimizer, posterior_of, predict_each, state_of
from benchmarks.quality.methods.ivon_frozen import FROZEN
from benchmarks.quality.settings import SEARCH_SEED
from benchmarks.quality.units import Unit

CLIP = 1e-3
DEFAULTS = {"beta2": 0.99999, "clip_radius": CLIP}
STEPS = (1e-4, 3e-3)
SIGMAS = (0.004, 0.08)
HESSIANS = (1e-4, 1.0)
BETA2 = (0.99999, 0.999, 0.99, 0.9)
SAMPLES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
TRIED, CONFIRMED = "tried", "confirmed"


def candidates(count: int) -> list[Hyper]:
    """The first points of a sequence that fills the space evenly; more of them keep those before."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(count).tolist()
    return [_hyper(*point) for point in points]


def _hyper(step: float, sigma: float, hess: float, beta2: float) -> Hyper:
    """Settings from a point of the unit cube; rounded to two digits, as people write them."""
    size, deviation, hess_init = (
        math.exp(math.log(low) + share * math.log(high / low))
        for share, (low, high) in ((step, STEPS), (sigma, SIGMAS), (hess, HESSIANS))
    )
    hess_init = _rounded(hess_init)
    return {
        "lr": _rounded(size / CLIP),
        "ess": _rounded(1.0 / (deviation**2 * hess_init)),
        "hess_init": hess_init,
        "beta2": BETA2[int(beta2 * len(BETA2))],
        "clip_radius": CLIP,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def frozen(hyper: Hyper) -> Hyper:
    """The same with a Hessian that never moves."""
    return {**hyper, "beta2": FROZEN}


class Recipe:
    """The search on one task."""

    def __init__(self, task: str, cells: Cells, bench: Bench, trials: Sequence[Hyper], seeds: int) -> None:
        """Plans it.

        Args:
            task: Its name.
            cells: Where finished trials are.
            bench: Of the task.
            trials: What is tried with one seed.
            seeds: How many other seeds the best ones are run with.
        """
        self.task, self.cells, self.trials = task, cells, list(trials)
        self._bench, self._seeds = bench, seeds

    def tries(self) -> list[Unit]:
        """The trials, one seed each."""
        return [self._unit(TRIED, hyper, SEARCH_SEED, self._bench.amounts.search_samples) for hyper in self.trials]

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
                    yield {**content, "hyper": {**DEFAULTS, **content["hyper"]}}

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
