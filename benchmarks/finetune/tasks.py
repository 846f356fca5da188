"""The tasks that ``python -m benchmarks finetune`` knows, each with the recipe it is trained by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks import UserError

PUBLISHED = "published"  # prompts
LETTERS = (" A", " B", " C", " D")


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one finetuning; the schedule is linear to zero, without warmup, for both optimizers.

    `train_size` and `test_size` of None take all examples; those with prompts of more than `max_words` are left out of
    both; prompts of more than `max_tokens` lose their beginning. IVON's own numbers of None are what `IVON.for_lora`
    makes of AdamW's learning rate, the steps and the examples. A temperature is fitted to `validation_size` examples of
    the validation split; 0 fits none.
    """

    steps: int
    batch_size: int
    train_size: int | None = None
    test_size: int | None = None
    validation_size: int = 0
    max_words: int | None = None
    adamw_lr: float = 5e-5
    ivon_lr: float | None = None
    ess: float | None = None
    hess_init: float | None = None
    clip_radius: float | None = None
    beta2: float | None = None
    weight_decay: float = 0.0
    samples: int = 10
    max_tokens: int = 320


@dataclass(frozen=True)
class Task:
    """A classification task whose classes are the next-token logits of `label_words`, or answers that an example has.

    `hub` are the arguments of `datasets.load_dataset`; empty where the data is in `benchmarks/data`: in one file that
    is split by position, or with `published_splits` in a file for training and one for the test.
    """

    name: str
    label_words: tuple[str, ...]
    recipe: Recipe
    hub: tuple[str, ...] = ()
    published_splits: bool = False
    prompts: str = "ours"  # of tasks from the hub; or those of the published scripts


# Every example is seen ten times. How the learning rate was found is told in benchmarks/finetune/README.md.
LAPTOP = Recipe(125, 8, 100, 200, 60, 12, adamw_lr=1e-3, samples=4)
LAPTOP_CHOICE = replace(LAPTOP, max_words=60)
# What `--quick` makes of it: about a minute, too short a run to judge by.
QUICK = {"steps": 16, "train_size": 32, "test_size": 60, "validation_size": 20, "samples": 4}
# The recipe of arXiv 2411.04421, with the values of its published scripts (mattyred/ivon-lora on GitHub).
PAPER = Recipe(10_000, 4, ivon_lr=0.03, ess=1e6, hess_init=1e-3, clip_radius=1e-3, beta2=0.99999)
PAPER_BINARY = replace(PAPER, ess=1e7, hess_init=3e-4)

_SENTIMENT = (" negative", " neutral", " positive")
_TRUTH = (" False", " True")
_SCIENCE = ("arc_easy", "arc_challenge", "openbookqa")
_TASKS = (
    *(Task(f"vader_{domain}", _SENTIMENT, LAPTOP) for domain in ("nyt", "movie", "amazon", "tweets")),
    Task("bigbench_social_iqa", LETTERS[:3], LAPTOP_CHOICE),
    Task("bigbench_wikihow_step", LETTERS, LAPTOP_CHOICE),
    Task("bigbench_strategyqa", LETTERS[:2], LAPTOP_CHOICE),
    Task("bigbench_logical_fallacy", LETTERS[:2], LAPTOP_CHOICE),
    *(Task(name, LETTERS, LAPTOP_CHOICE, published_splits=True) for name in _SCIENCE),
    Task("winogrande_s", LETTERS[:2], PAPER_BINARY, ("allenai/winogrande", "winogrande_s")),
    Task("winogrande_m", LETTERS[:2], replace(PAPER_BINARY, ess=1e8), ("allenai/winogrande", "winogrande_m")),
    Task("boolq", _TRUTH, PAPER_BINARY, ("google/boolq",)),
)
TASKS = {task.name: task for task in _TASKS}
# The paper judges on the published validation splits, which the bundled files of these do not have.
_FROM_HUB = (
    Task("arc_challenge", LETTERS, PAPER, ("allenai/ai2_arc", "ARC-Challenge")),
    Task("arc_easy", LETTERS, PAPER, ("allenai/ai2_arc", "ARC-Easy")),
    Task("openbookqa", LETTERS, PAPER, ("allenai/openbookqa", "main")),
)
PAPER_TASKS = {task.name: replace(task, prompts=PUBLISHED) for task in (*_TASKS, *_FROM_HUB) if task.hub}
"""The paper's six tasks, with its recipe, prompts and splits, from the hub."""
PAPER_MODEL = "meta-llama/Llama-2-7b-hf"  # in 8 bit
PAPER_SEEDS = (21, 42, 87)


def find_task(name: str, recipe: str | None = None) -> Task:
    """The task called `name`, or UserError; with the recipe "paper" as the paper trains and judges it."""
    if recipe not in (None, "paper"):
        raise UserError(f"Unknown recipe '{recipe}'; there is one, paper.")
    known, kind = (TASKS, "task") if recipe is None else (PAPER_TASKS, "task of the paper")
    if name not in known:
        raise UserError(f"Unknown {kind} '{name}'; the {kind.replace('task', 'tasks')} are {', '.join(known)}.")
    return known[name]


def domains(task: Task) -> list[Task]:
    """The task itself, and where it is one of rated sentences, then the other domains of these."""
    rated = [other for other in _TASKS if other.name.startswith("vader_")]
    return [task, *(other for other in rated if other is not task)] if task in rated else [task]
