"""How much a study trains and judges, and what its record says of it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import UserError
from benchmarks.finetune.tasks import TASKS, Task, find_task

BUDGET = 4  # training runs on the validation split by which each method's hyperparameters are chosen, the same for all
DIAL_BUDGET = 4  # values that a dial without training may try, the same for all
SEARCH_SEED = 1000  # of the runs that choose hyperparameters; no seed of the study's own runs
_OPTIONAL = ("passes", "choice", "shares")
BUNDLED = tuple(name for name, task in TASKS.items() if not task.hub)
RECORDED = Path(__file__).parent.parent / "results" / "quality" / "hyperparameters.json"
"""What the committed study chose."""
MAIN = "vader_nyt"  # the domain of rated sentences that the default study trains on
CHOICE = "arc_easy"  # and the task of multiple choice that a study of several kinds chooses on


@dataclass(frozen=True)
class Size:
    """How much a study does for every task; None takes what the task's own recipe says."""

    steps: int | None
    train_size: int | None
    validation_size: int | None
    test_size: int | None
    shift_size: int | None  # examples of every domain that was not trained on
    samples: int  # that a prediction averages
    search_samples: int  # the same, where hyperparameters and dials are chosen
    seeds: int
    max_words: int | None = None
    batch_size: int | None = None
    passes: tuple[int, ...] = ()  # report averages of so many samples, each with and without a temperature
    choice: tuple[tuple[str, int], ...] = ()  # what tasks of multiple choice have instead, by name
    shares: bool = False  # whether a task takes the hyperparameters that were chosen on the first one of its kind

    def record(self) -> dict[str, Any]:
        """As JSON can hold it, without what the size does not use."""
        return {name: value for name, value in asdict(self).items() if value or name not in _OPTIONAL}


SIZES = {
    "quick": Size(6, 48, 16, 20, 4, samples=3, search_samples=2, seeds=1, max_words=10),
    "laptop": Size(None, 200, 150, 200, 60, samples=10, search_samples=4, seeds=3),
    "full": Size(300, 1500, 500, 1000, 500, samples=10, search_samples=10, seeds=5, max_words=60, batch_size=16),
    "long": Size(
        160,
        128,
        100,
        400,
        60,
        samples=10,
        search_samples=4,
        seeds=3,
        max_words=14,
        batch_size=8,
        passes=(1, 2, 4, 10),
        choice=(("steps", 100), ("train_size", 80), ("max_words", 32)),
        shares=True,
    ),
}
LONG = "long"
LONG_TASKS = ("vader_nyt", "arc_easy", "vader_movie")  # what a model of 135M learns: benchmarks/quality/README.md
LONG_METHODS = (
    *("adamw", "mc_dropout", "laplace_all", "laplace_last", "ensemble", "tfb", "blob", "swag"),
    *("ivon_for_lora", "ivon_for_lora_pairs", "ivon_for_lora_left_out", "ivon_for_lora_mean"),
    *("ivon_adamw_rate", "ivon_adamw_rate_mean", "ivon_tuned", "ivon_tuned_mean"),
)


# The bundled tasks as the study trains them, where its own sizes do not say otherwise.
STUDIED: dict[str, Any] = {
    "steps": 60,
    "batch_size": 8,
    "train_size": 200,
    "test_size": 120,
    "validation_size": 0,
    "adamw_lr": 4e-3,
    "ivon_lr": 1.5,
    "ess": 3.2e5,
    "hess_init": 0.04,
    "clip_radius": 1e-3,
    "beta2": 0.999,
}


@dataclass(frozen=True)
class Settings:
    """Everything that a study needs to know."""

    size: str
    amounts: Size
    tasks: tuple[str, ...]
    methods: tuple[str, ...]  # empty for all
    seeds: tuple[int, ...]
    search: bool  # whether hyperparameters are chosen anew; otherwise they come from `hyperparameters`
    hyperparameters: Path | None
    model: str | None
    load_in_8bit: bool
    device: str
    threads: int | None
    out: Path

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them; the amounts with what the recipes say where all tasks agree."""
        first, *others = [asdict(sized(find_task(name), self.amounts).recipe) for name in self.tasks]
        common = {key: value for key, value in first.items() if all(other[key] == value for other in others)}
        amounts = {key: common.get(key) if value is None else value for key, value in self.amounts.record().items()}
        paths = {"out": self.out.name, "hyperparameters": None if self.hyperparameters is None else "file"}
        return {**asdict(self), **paths, "amounts": amounts}

    def identity(self) -> dict[str, Any]:
        """What has to be equal for finished cells to count: tasks, methods and seeds may be added."""
        amounts = {key: value for key, value in self.amounts.record().items() if key != "seeds"}
        same = {"model": self.model, "load_in_8bit": self.load_in_8bit, "search": self.search}
        return {"amounts": amounts, **same, "hyperparameters": self.given()}

    def given(self) -> dict[str, dict[str, dict[str, float]]]:
        """Hyperparameters by task and method, as a study wrote them; none without a file."""
        if self.hyperparameters is None:
            return {}
        try:
            content = json.loads(self.hyperparameters.read_text(encoding="utf-8"))
            return {
                task: {name: {key: float(value) for key, value in hyper.items()} for name, hyper in methods.items()}
                for task, methods in content.items()
            }
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"Cannot read the hyperparameters in {self.hyperparameters}: {error}") from error


def resolve(
    *,
    size: str | None,
    tasks: str | None,
    seeds: int | None,
    steps: int | None,
    threads: int | None,
    out: Path | None,
    quick: bool = False,
    methods: str = "",
    search: bool | None = None,
    hyperparameters: Path | None = None,
    **more: Any,
) -> Settings:
    """The user's options, checked; `more` are settings as they are."""
    if quick and size not in (None, "quick", LONG):
        raise UserError("--quick is --size quick: give one of the two.")
    size = size or ("quick" if quick else "laptop")
    if size not in SIZES:
        raise UserError(f"Unknown size '{size}'; choose one of {', '.join(SIZES)}.")
    small, full = SIZES["quick"], SIZES[size]
    if quick and size == LONG:  # the same methods and rows, at the smallest size
        full = replace(small, passes=full.passes, choice=(("max_words", 32),), shares=True)
    names = BUNDLED if tasks == "all" else _listed(tasks or ",".join(LONG_TASKS if size == LONG else (MAIN,)))
    for name in names:
        find_task(name)
    if not names:
        raise UserError("--tasks names no task.")
    count = full.seeds if seeds is None else seeds
    if not 1 <= count < SEARCH_SEED:
        raise UserError(f"--seeds must be between 1 and {SEARCH_SEED - 1}, not {count}.")
    for option, value in (("--threads", threads), ("--steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}.")
    searching = (not quick and size != "quick" and hyperparameters is None) if search is None else search
    if searching and hyperparameters is not None:
        raise UserError("--search chooses what --hyperparameters would give: use one of the two.")
    if not searching and hyperparameters is None and RECORDED.exists() and size != LONG:
        hyperparameters = RECORDED
    amounts = replace(full, seeds=count)
    if steps is not None:
        amounts = replace(amounts, steps=steps, choice=tuple(item for item in full.choice if item[0] != "steps"))
    wanted = _listed(methods) or (LONG_METHODS if size == LONG else ())
    chosen = (size, amounts, names, wanted, tuple(range(count)), searching, hyperparameters)
    return Settings(*chosen, threads=threads, out=out or Path("results") / f"quality-{size}", **more)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def sized(task: Task, amounts: Size) -> Task:
    """The task with a recipe of this size."""
    names = ("steps", "batch_size", "train_size", "test_size", "max_words", "samples")
    changes = {name: value for name in names if (value := getattr(amounts, name)) is not None}
    own = {} if task.hub else STUDIED
    kind = {} if kind_of(task.name) == MAIN else dict(amounts.choice)
    return replace(task, recipe=replace(task.recipe, **{**own, **changes, **kind}))


def kind_of(task: str) -> str:
    """The task on which hyperparameters are chosen for all of its kind, where a size shares them."""
    return MAIN if task.startswith("vader_") else CHOICE
