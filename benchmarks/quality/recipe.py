"""Which settings make IVON good? A search over all that matter, wider than what the methods of a study may try.

The settings are those that decide what IVON does, rather than its arguments, which do so only together:

- the step: ``lr * clip_radius``, how far one step can move a weight;
- sigma: ``1 / sqrt(ess * hess_init)``, the standard deviation that the noise starts with;
- the initial Hessian, which decides with `clip_radius` which gradients are clipped;
- beta2, how fast the Hessian learns.

Optuna proposes them: points that fill this space evenly (a Sobol sequence), then more where the best ones are (a
tree-structured Parzen estimator), by the likelihood of averaged predictions on the validation split. The best of all
are run with other seeds, each with its Hessian frozen too.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from torch import Tensor

from benchmarks import UserError
from benchmarks.finetune.tasks import find_task
from benchmarks.quality import recipe_report
from benchmarks.quality.bench import Content, Tensors, scores_of
from benchmarks.quality.method import Hyper
from benchmarks.quality.methods.ivon import FROZEN, optimizer, posterior_of, predict_each, state_of
from benchmarks.quality.settings import SEARCH_SEED, STUDIED, Settings
from benchmarks.quality.workshop import Workshop, key_of

RECORD, JOURNAL = "recipe.json", "optuna.log"
CLIP = 1e-3
BETA2 = (0.99999, 0.999, 0.99, 0.9)
SPACE: dict[str, BaseDistribution] = {
    "step": FloatDistribution(1e-4, 3e-3, log=True),
    "sigma": FloatDistribution(0.004, 0.08, log=True),
    "hess_init": FloatDistribution(1e-4, 1.0, log=True),
    "beta2": CategoricalDistribution(BETA2),
}
SAMPLES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.1, 0.3, 1.0, 3.0, 10.0)
TRIED, CONFIRMED = "tried", "confirmed"
EVERYWHERE, NEAR = "everywhere", "near the best"


@dataclass(frozen=True)
class Plan:
    """How many settings a search tries all over the space and around the best of these, and how many it runs again.

    Settings that are `given`, each as `parse` reads it, are tried instead, with as many samples as the confirmations.
    """

    trials: int
    refine: int
    best: int
    given: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.given and self.best < 0:
            raise UserError(f"--best must be at least 0, not {self.best}.")
        if not self.given and (min(self.trials, self.best) < 1 or self.refine < 0):
            raise UserError("--trials and --best must be at least 1, and --refine at least 0.")

    def record(self) -> Content:
        """As JSON can hold it, without what it does not use."""
        unused = ("trials", "refine") if self.given else ("given",)
        return {name: value for name, value in asdict(self).items() if name not in unused}


def parse(text: str) -> Hyper:
    """Settings from ``STEP,SIGMA,HESS_INIT,BETA2``, as in ``1e-3,0.06,0.04,0.999``."""
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
    return hyper_of(step, sigma, hess_init, beta2)


def hyper_of(step: float, sigma: float, hess_init: float, beta2: float) -> Hyper:
    """IVON's arguments, rounded to two digits, as people write them."""
    hess_init = _rounded(hess_init)
    ess = _rounded(1.0 / (sigma**2 * hess_init))
    return {"lr": _rounded(step / CLIP), "ess": ess, "hess_init": hess_init, "beta2": beta2, "clip_radius": CLIP}


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")


def of_main_job(task: str) -> Hyper:
    """What the search started from on the task: what the main job used before `IVON.for_lora` had a rule."""
    recipe = find_task(task).recipe
    names = {"lr": "ivon_lr", "ess": "ess", "hess_init": "hess_init", "beta2": "beta2", "clip_radius": "clip_radius"}
    return {name: getattr(recipe, field) or STUDIED[field] for name, field in names.items()}


class Proposals:
    """What optuna proposes for one task; a journal in a folder keeps it for later and for other processes.

    All of a stage is drawn at once, from what is known before it: which process runs what does not matter.
    """

    def __init__(self, folder: Path, task: str, lock: FileLock) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._lock = lock
        with lock:
            storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
            self._study = optuna.create_study(storage=storage, study_name=task, load_if_exists=True)

    def draw(self, stage: str, count: int) -> list[Hyper]:
        """The first settings of a stage; more of them keep those before."""
        sampler: BaseSampler = TPESampler(n_startup_trials=1, seed=1)
        if stage == EVERYWHERE:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # since optuna 3
                sampler = QMCSampler(scramble=True, seed=0, independent_sampler=RandomSampler(seed=0))
        with self._lock:
            self._study.sampler = sampler
            for _ in range(count - len(self._of(stage))):
                self._study.ask(SPACE).set_user_attr("stage", stage)
            return [hyper_of(**trial.params) for trial in self._of(stage)[:count]]

    def tell(self, runs: Sequence[Content]) -> None:
        """What settings were worth; of a trial that is told already nothing changes."""
        worth = {key_of(run["hyper"]): averaged_nll(run) for run in runs}
        with self._lock:
            for trial in self._study.get_trials(deepcopy=False):
                value = worth.get(key_of(hyper_of(**trial.params)))
                if value is not None:
                    self._study.tell(trial.number, value, skip_if_finished=True)

    def _of(self, stage: str) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self._study.get_trials(deepcopy=False) if trial.user_attrs.get("stage") == stage]


class Recipe(Workshop):
    """The search on one task, the first of the settings."""

    def search(self, plan: Plan) -> tuple[bool, list[Content]]:
        """Tries settings, one seed each: whether Ctrl-C left it all, and the runs that did not fail."""
        task = self.settings.tasks[0]
        hypers = [of_main_job(task), *map(parse, plan.given)]
        if plan.given:
            return self.runs(TRIED, hypers, max(SAMPLES))
        proposals = Proposals(self.settings.out, task, self.cells.lock("proposals"))
        finished, found = True, list[Content]()
        for stage, count in ((EVERYWHERE, plan.trials), (NEAR, plan.refine)):
            if finished:
                hypers += [hyper for hyper in proposals.draw(stage, count) if hyper not in hypers]
                finished, found = self.runs(TRIED, hypers, self.settings.amounts.search_samples)
                proposals.tell(found)
        return finished, found

    def runs(self, kind: str, hypers: Sequence[Hyper], samples: int) -> tuple[bool, list[Content]]:
        """Runs settings, those to confirm with other seeds: whether Ctrl-C left it all, and what did not fail."""
        others = range(SEARCH_SEED + 1, SEARCH_SEED + 1 + len(self.settings.seeds))
        names, parts = [], []
        for seed in [SEARCH_SEED] if kind == TRIED else others:
            for hyper in hypers:
                name, run = key_of(hyper), partial(self._run, hyper, seed, samples, kind == CONFIRMED)
                names.append((kind, self.settings.tasks[0], name, str(seed)))
                parts.append(partial(self.cell, names[-1], f"seed {seed}: {name}", run))
        finished = self.do(parts)
        cells = [self.cells.read(*each) for each in names]
        return finished, [cell for cell in cells if cell is not None and cell["error"] is None]

    def _run(self, hyper: Hyper, seed: int, samples: int, confirming: bool) -> tuple[Content, Tensors]:
        begin, few = time.perf_counter(), self.settings.amounts.search_samples
        bench = self.bench(self.settings.tasks[0])
        examples, job = bench.validation.examples, bench.job(seed, samples)
        job.restart()
        found = optimizer(job, hyper)
        job.finetune(found)
        diagnostics: dict[str, Any] = found.diagnostics()[0]
        posterior = posterior_of(job, state_of(found.posterior(job.model)), hyper)

        def scores(each: Tensor) -> Content:
            return scores_of(bench.validation, each.mean(0))

        each = predict_each(job, posterior, examples, samples)
        counts = sorted({count for count in SAMPLES if count <= samples} | {samples})
        content = {
            "hyper": dict(hyper),
            "seed": seed,
            "mean": scores(predict_each(job, posterior, examples, 0)),
            "samples": {str(count): scores(each[:count]) for count in counts},
            "temperatures": {
                f"{value:g}": scores(predict_each(job, posterior.tempered(value), examples, few))
                for value in (TEMPERATURES if confirming else ())
            },
            "clipped": diagnostics["clipped"],
            "hess_over_init": {f"{level:g}": value for level, value in diagnostics["hess_over_init"].items()},
            "seconds": time.perf_counter() - begin,
        }
        return content, {}


def averaged_nll(run: Content) -> float:
    """Negative log-likelihood of the predictions that average all samples of a run."""
    return float(recipe_report.averaged(run)["nll"])


def run(settings: Settings, plan: Plan, console: Console) -> bool:
    """Tries, confirms and reports; False when Ctrl-C cut it short."""
    recipe = Recipe(settings, console)
    with recipe.progress:
        finished, tried = recipe.search(plan)
        chosen = [run["hyper"] for run in sorted(tried, key=averaged_nll)[: plan.best]]
        confirmed: list[Content] = []
        if finished:
            frozen = [{**hyper, "beta2": FROZEN} for hyper in chosen]
            finished, confirmed = recipe.runs(CONFIRMED, [*chosen, *frozen], max(SAMPLES))
    record = recipe.write(RECORD, finished, {"tried": tried, "confirmed": confirmed}, **plan.record())
    recipe_report.print_tables(console, record)
    recipe_report.write_report(record, settings.out)
    console.print(f"Record and report: {settings.out / RECORD}, {settings.out / recipe_report.PAGE}", soft_wrap=True)
    return finished
