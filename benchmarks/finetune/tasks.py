"""The tasks that ``python -m benchmarks finetune`` knows, each with the recipe it is trained by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks import UserError

LETTERS = (" A", " B", " C", " D")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one finetuning; the schedule is linear to zero, without warmup, for both optimizers."""

    steps: int
    batch_size: int
    train_size: int | None
    """How many training examples are used; None takes all."""
    test_size: int | None
    max_words: int | None
    """Examples with longer prompts are left out, in training and in the test; None keeps all."""
    adamw_lr: float
    ivon_lr: float
    ess: float
    hess_init: float
    clip_radius: float = 1e-3
    beta2: float = 0.99999
    weight_decay: float = 0.0
    samples: int = 10
    max_tokens: int = 320
    """Longer prompts lose their beginning."""


@dataclass(frozen=True)
class Task:
    """A classification task whose classes are read off the next-token logits of `label_words`."""

    name: str
    label_words: tuple[str, ...]
    recipe: Recipe
    hub: tuple[str, ...] = field(default=())
    """Arguments of `datasets.load_dataset`; empty for the tasks whose data is in `benchmarks/data`."""


# How the numbers were found is told in benchmarks/finetune/README.md.
LAPTOP = Recipe(
    steps=60,
    batch_size=8,
    train_size=200,
    test_size=120,
    max_words=12,
    adamw_lr=4e-3,
    ivon_lr=1.5,
    ess=3.2e5,
    hess_init=0.04,
    beta2=0.999,
)
LAPTOP_CHOICE = replace(LAPTOP, max_words=60)


def _paper(ess: float, hess_init: float) -> Recipe:
    """The recipe of arXiv 2411.04421, with the values of its published scripts (mattyred/ivon-lora on GitHub)."""
    return Recipe(
        steps=10_000,
        batch_size=4,
        train_size=None,
        test_size=None,
        max_words=None,
        adamw_lr=5e-5,
        ivon_lr=0.03,
        ess=ess,
        hess_init=hess_init,
    )


_SENTIMENT = (" negative", " neutral", " positive")
_TRUTH = (" False", " True")

TASKS = {
    task.name: task
    for task in (
        Task("vader_nyt", _SENTIMENT, LAPTOP),
        Task("vader_movie", _SENTIMENT, LAPTOP),
        Task("vader_amazon", _SENTIMENT, LAPTOP),
        Task("vader_tweets", _SENTIMENT, LAPTOP),
        Task("bigbench_social_iqa", LETTERS[:3], LAPTOP_CHOICE),
        Task("bigbench_wikihow_step", LETTERS, LAPTOP_CHOICE),
        Task("bigbench_strategyqa", LETTERS[:2], LAPTOP_CHOICE),
        Task("bigbench_logical_fallacy", LETTERS[:2], LAPTOP_CHOICE),
        Task("winogrande_s", LETTERS[:2], _paper(1e7, 3e-4), ("allenai/winogrande", "winogrande_s")),
        Task("winogrande_m", LETTERS[:2], _paper(1e8, 3e-4), ("allenai/winogrande", "winogrande_m")),
        Task("arc_challenge", LETTERS, _paper(1e6, 1e-3), ("allenai/ai2_arc", "ARC-Challenge")),
        Task("arc_easy", LETTERS, _paper(1e6, 1e-3), ("allenai/ai2_arc", "ARC-Easy")),
        Task("openbookqa", LETTERS, _paper(1e6, 1e-3), ("allenai/openbookqa", "main")),
        Task("boolq", _TRUTH, _paper(1e7, 3e-4), ("google/boolq",)),
    )
}


def find_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"Unknown task '{name}'; the tasks are {', '.join(TASKS)}.")
    return TASKS[name]
