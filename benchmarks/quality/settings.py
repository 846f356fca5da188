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
BUNDLED = tuple(name for name, task in TASKS.items() if not task.hub)
RECORDED = Path(__file__).parent.parent / "results" / "quality" / "hyperparameters.json"
"""What the committed study chose."""
MAIN = "vader_nyt"  # the domain of rated sentences that the default study trains on


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


SIZES = {
    "quick": Size(6, 48, 16, 20, 4, samples=3, search_samples=2, seeds=1, max_words=10),
    "laptop": Size(None, 200, 150, 200, 60, samples=10, search_samples=4, seeds=3),
    "full": Size(300, 1500, 500, 1000, 500, samples=10, search_samples=10, seeds=5, max_words=60, batch_size=16),
}


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
        amounts = {key: common.get(key) if value is None else value for key, value in asdict(self.amounts).items()}
        paths = {"out": self.out.name, "hyperparameters": None if self.hyperparameters is None else "file"}
        return {**asdict(self), **paths, "amounts": amounts}

    def identity(self) -> dict[str, Any]:
        """What has to be equal for finished cells to count: tasks, methods and seeds may be added."""
        amounts = {key: value for key, value in asdict(self.amounts).items() if key != "seeds"}
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
    tasks: str,
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
    if quick and size not in (None, "quick"):
        raise UserError("--quick is --size quick: give one of the two.")
    size = size or ("quick" if quick else "laptop")
    if size not in SIZES:
        raise UserError(f"Unknown size '{size}'; choose one of {', '.join(SIZES)}.")
    names = BUNDLED if tasks == "all" else _listed(tasks)
    for name in names:
        find_task(name)
    if not names:
        raise UserError("--tasks names no task.")
    count = SIZES[size].seeds if seeds is None else seeds
    if not 1 <= count < SEARCH_SEED:
        raise UserError(f"--seeds must be between 1 and {SEARCH_SEED - 1}, not {count}.")
    for option, value in (("--threads", threads), ("--steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}.")
    searching = (size != "quick" and hyperparameters is None) if search is None else search
    if searching and hyperparameters is not None:
        raise UserError("--search chooses what --hyperparameters would give: use one of the two.")
    if not searching and hyperparameters is None and RECORDED.exists():
        hyperparameters = RECORDED
    amounts = replace(SIZES[size], seeds=count, steps=SIZES[size].steps if steps is None else steps)
    chosen = (size, amounts, names, _listed(methods), tuple(range(count)), searching, hyperparameters)
    return Settings(*chosen, threads=threads, out=out or Path("results") / f"quality-{size}", **more)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def sized(task: Task, amounts: Size) -> Task:
    """The task with a recipe of this size."""
    names = ("steps", "batch_size", "train_size", "test_size", "max_words", "samples")
    changes = {name: value for name in names if (value := getattr(amounts, name)) is not None}
    own = {} if task.hub else STUDIED
    return replace(task, recipe=replace(task.recipe, **{**own, **changes}))
