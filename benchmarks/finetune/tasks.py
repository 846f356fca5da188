"""The tasks that ``python -m benchmarks finetune`` knows, each with the recipe it is trained by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import UserError

LETTERS = (" A", " B", " C", " D")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one finetuning; the schedule is linear to zero, without warmup, for both optimizers.

    `train_size` and `test_size` of None take all examples; those with prompts of more than `max_words` are left out of
    both; prompts of more than `max_tokens` lose their beginning.
    """

    steps: int
    batch_size: int
    train_size: int | None = None
    test_size: int | None = None
    max_words: int | None = None
    adamw_lr: float = 5e-5
    ivon_lr: float = 0.03
    ess: float = 1e6
    hess_init: float = 1e-3
    clip_radius: float = 1e-3
    beta2: float = 0.99999
    weight_decay: float = 0.0
    samples: int = 10
    max_tokens: int = 320


@dataclass(frozen=True)
class Task:
    """A classification task whose classes are read off the next-token logits of `label_words`.

    `hub` are the arguments of `datasets.load_dataset`; empty where the data is in `benchmarks/data`.
    """

    name: str
    label_words: tuple[str, ...]
    recipe: Recipe
    hub: tuple[str, ...] = ()


# How the numbers were found is told in benchmarks/finetune/README.md.
LAPTOP = Recipe(60, 8, 200, 120, 12, adamw_lr=4e-3, ivon_lr=1.5, ess=3.2e5, hess_init=0.04, beta2=0.999)
LAPTOP_CHOICE = replace(LAPTOP, max_words=60)
# The recipe of arXiv 2411.04421, with the values of its published scripts (mattyred/ivon-lora on GitHub).
PAPER = Recipe(10_000, 4, adamw_lr=5e-5, ivon_lr=0.03, ess=1e6, hess_init=1e-3)
PAPER_BINARY = replace(PAPER, ess=1e7, hess_init=3e-4)

_SENTIMENT = (" negative", " neutral", " positive")
_TRUTH = (" False", " True")
_TASKS = (
    *(Task(f"vader_{domain}", _SENTIMENT, LAPTOP) for domain in ("nyt", "movie", "amazon", "tweets")),
    Task("bigbench_social_iqa", LETTERS[:3], LAPTOP_CHOICE),
    Task("bigbench_wikihow_step", LETTERS, LAPTOP_CHOICE),
    Task("bigbench_strategyqa", LETTERS[:2], LAPTOP_CHOICE),
    Task("bigbench_logical_fallacy", LETTERS[:2], LAPTOP_CHOICE),
    Task("winogrande_s", LETTERS[:2], PAPER_BINARY, ("allenai/winogrande", "winogrande_s")),
    Task("winogrande_m", LETTERS[:2], replace(PAPER_BINARY, ess=1e8), ("allenai/winogrande", "winogrande_m")),
    Task("arc_challenge", LETTERS, PAPER, ("allenai/ai2_arc", "ARC-Challenge")),
    Task("arc_easy", LETTERS, PAPER, ("allenai/ai2_arc", "ARC-Easy")),
    Task("openbookqa", LETTERS, PAPER, ("allenai/openbookqa", "main")),
    Task("boolq", _TRUTH, PAPER_BINARY, ("google/boolq",)),
)
TASKS = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task called `name`, or UserError."""
    if name not in TASKS:
        raise UserError(f"Unknown task '{name}'; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]


def domains(task: Task) -> list[Task]:
    """The task itself, and where it is one of rated sentences, then the other domains of these."""
    rated = [other for other in _TASKS if other.name.startswith("vader_")]
    return [task, *(other for other in rated if other is not task)] if task in rated else [task]
