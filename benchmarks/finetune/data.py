"""From a task's files to training and test examples."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import BatchSampler

from benchmarks import UserError
from benchmarks.finetune import published
from benchmarks.finetune.tasks import LETTERS, PUBLISHED, Task

DATA = Path(__file__).resolve().parent.parent / "data"
# Shares of a bundled file, by position: the rows were shuffled once.
TRAIN_END, VALIDATION_END = 0.60, 0.75
# And of a published training split, where there are published ones.
PUBLISHED_TRAIN_END = 0.9
# Batches whose examples are sorted by length together, so that little is padded.
BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class Example:
    """One prompt that ends just before the label word, its class, and where people rated it their votes per class.

    The label of a training example that was rated is the opinion of one rater, drawn at random. With `answers` it ends
    just before the answer, and the classes are these.
    """

    prompt: str
    label: int
    votes: tuple[int, ...] | None = None
    answers: tuple[str, ...] = ()

    @property
    def words(self) -> int:
        """Of the prompt and all of the answers."""
        return len(" ".join((self.prompt, *self.answers)).split())


class Dataset(NamedTuple):
    """What one run trains on and what it is judged on."""

    train: list[Example]
    test: list[Example]


def load_dataset(
    task: Task,
    *,
    split: str,
    train_size: int | None = None,
    test_size: int | None = None,
    max_words: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Reads a task and draws the training examples; UserError if it has fewer than asked for, or cannot be had.

    The training examples are a random choice, and each rated one has the label that one random rater gave; both draws
    depend on `seed` alone. The test examples (those of `split`, "test" or "validation") do not depend on it; their
    label is the most frequent vote, and sentences where two classes tie for it are left out.
    """
    loaded = _load_hub(task, split) if task.hub else _load_bundled(task, split)
    train, test = ([e for e in part if max_words is None or e.words <= max_words] for part in loaded)
    limit = "" if max_words is None else f" of at most {max_words} words"
    for wanted, have, what in ((train_size or 1, len(train), "training"), (test_size or 1, len(test), split)):
        if wanted > have:
            raise UserError(f"Task {task.name} has {have} {what} examples{limit}, fewer than {wanted}.")
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train), generator=rng)[:train_size].tolist()
    return Dataset(_ask_one_rater([train[i] for i in chosen], rng), test[:test_size])


def _ask_one_rater(examples: list[Example], rng: torch.Generator) -> list[Example]:
    votes = [example.votes for example in examples if example.votes is not None]
    if not votes:
        return examples
    labels = torch.multinomial(torch.tensor(votes, dtype=torch.float64), 1, generator=rng)[:, 0].tolist()
    return [replace(example, label=label) for example, label in zip(examples, labels, strict=True)]


def _load_bundled(task: Task, split: str) -> Dataset:
    if task.published_splits:
        test = _bundled_rows(f"{task.name}_test")
        asked = {example.prompt for example in test}  # a few questions are in both published splits
        train = [example for example in _bundled_rows(f"{task.name}_train") if example.prompt not in asked]
        kept = int(len(train) * PUBLISHED_TRAIN_END)
        return Dataset(train[:kept], train[kept:] if split == "validation" else test)
    rows = _bundled_rows(task.name)
    first, second = int(len(rows) * TRAIN_END), int(len(rows) * VALIDATION_END)
    test = rows[first:second] if split == "validation" else rows[second:]
    return Dataset(rows[:first], [e for e in test if e.votes is None or e.votes.count(max(e.votes)) == 1])


def _bundled_rows(name: str) -> list[Example]:
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        examples = [example for line in lines if (example := _bundled_example(json.loads(line)))]
    return list({example.prompt: example for example in examples}.values())  # each prompt once


def _bundled_example(row: dict[str, Any]) -> Example | None:
    if "votes" in row:
        votes = tuple(row["votes"])
        return Example(f"{row['text']} Sentiment:", votes.index(max(votes)), votes)
    if "question" in row:
        question, answers = f"Question: {row['question']}\nAnswer:", tuple(row["choices"])
        return Example(question, row["label"], answers=answers) if len(answers) == len(LETTERS) else None
    return Example(_choice_prompt(row["input"], row["choices"]), row["answer"])


def _choice_prompt(question: str, choices: Sequence[str]) -> str:
    lines = [f"{letter.strip()}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def _load_hub(task: Task, split: str) -> Dataset:
    """The six tasks of the paper, which judges them on the published validation split.

    Hyperparameters are chosen on the last tenth of the published training split, and the rest of it is trained on then.
    """
    try:
        import datasets

        splits = datasets.load_dataset(*task.hub)
    except ImportError:
        raise UserError(f"Task {task.name} needs the package datasets: pip install datasets.") from None
    except Exception as error:  # datasets and its file systems raise many kinds; all mean the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Task {task.name} could not be loaded from the Hugging Face hub ({' '.join(task.hub)}), "
            f"which needs a network or a filled cache: {reason}"
        ) from error
    train, test = ([e for row in splits[name] if (e := hub_example(task, row))] for name in ("train", "validation"))
    kept = int(len(train) * PUBLISHED_TRAIN_END)
    return Dataset(train[:kept], train[kept:]) if split == "validation" else Dataset(train, test)


def hub_example(task: Task, row: dict[str, Any]) -> Example | None:
    """One row of a hub task as an example; None for the few ARC questions that do not have four choices."""
    found = _own_prompt(task, row)
    return replace(found, prompt=published.prompt(task.name, row)) if found and task.prompts == PUBLISHED else found


def _own_prompt(task: Task, row: dict[str, Any]) -> Example | None:
    if task.name == "boolq":
        return Example(f"{row['passage']}\nTrue or false: {row['question']}?\nAnswer:", int(row["answer"]))
    if task.name.startswith("winogrande"):
        prompt = _choice_prompt(f"What fits in the blank? {row['sentence']}", [row["option1"], row["option2"]])
        return Example(prompt, int(row["answer"]) - 1)
    question, choices = row["question_stem" if task.name == "openbookqa" else "question"], row["choices"]
    if len(choices["text"]) != len(LETTERS):
        return None
    return Example(_choice_prompt(question, choices["text"]), choices["label"].index(row["answerKey"]))


@dataclass(frozen=True)
class Batch:
    """Right-padded prompts.

    No attention mask is needed: attention is causal, and only the hidden state of each prompt's last token is read,
    which no padding precedes. Prompts with answers are packed, as `benchmarks.finetune.scorers` reads them.
    """

    input_ids: torch.Tensor  # int64 [batch, longest], with answers [batch, 2, longest]
    last: torch.Tensor  # int64 [batch]: where each prompt's last token is
    labels: torch.Tensor  # int64 [batch]
    index: list[int]  # which examples these are

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What a `Posterior` passes on to its score: all but the labels."""
        return {"input_ids": self.input_ids, "last": self.last}


class EncodedExamples:
    """Tokenized examples that come back as batches.

    `labels` are int64 `[examples]`; `votes` float64 `[examples, classes]`, None where people did not rate every one.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        tokenizer: Any,
        max_tokens: int,
        device: torch.device,
        *,
        keep_start: bool = False,
    ) -> None:
        """Prompts of more than `max_tokens` lose their beginning, or to `keep_start` their end."""
        prompts = map(torch.tensor, tokenizer([example.prompt for example in examples])["input_ids"])
        self.labels = torch.tensor([example.label for example in examples])
        votes = [example.votes for example in examples if example.votes is not None]
        self.votes = torch.tensor(votes, dtype=torch.float64) if len(votes) == len(examples) else None

        def kept(ids: torch.Tensor) -> torch.Tensor:
            return ids[:max_tokens] if keep_start else ids[-max_tokens:]

        self._tokens = [
            _packed(ids, example.answers, tokenizer, max_tokens) if example.answers else kept(ids)
            for ids, example in zip(prompts, examples, strict=True)
        ]
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        if any(example.answers for example in examples):
            self._padding = -1
        self._device = device

    def __len__(self) -> int:
        return len(self._tokens)

    def epochs(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Shuffled training batches without end; one shuffle per epoch, of examples and then of batches."""
        rng = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self), generator=rng).tolist()
            buckets = BatchSampler(order, batch_size * BATCHES_PER_BUCKET, drop_last=False)
            batches = [index for bucket in buckets for index in self._by_length(bucket, batch_size)]
            for i in torch.randperm(len(batches), generator=rng).tolist():
                yield self._batch(batches[i])

    def in_length_order(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, the short ones first."""
        return map(self._batch, self._by_length(range(len(self)), batch_size))

    def _by_length(self, index: Iterable[int], batch_size: int) -> Iterable[list[int]]:
        return BatchSampler(sorted(index, key=lambda i: self._tokens[i].shape[-1]), batch_size, drop_last=False)

    def _batch(self, index: list[int]) -> Batch:
        tokens = [self._tokens[i] for i in index]
        last = torch.tensor([t.shape[-1] - 1 for t in tokens])
        longest = int(last.max()) + 1
        padded = torch.stack([nn.functional.pad(t, (0, longest - t.shape[-1]), value=self._padding) for t in tokens])
        return Batch(padded.to(self._device), last.to(self._device), self.labels[index].to(self._device), index)


def _packed(question: torch.Tensor, answers: Sequence[str], tokenizer: Any, max_tokens: int) -> torch.Tensor:
    """The question's tokens and those of its answers, and which of these each belongs to: int64 `[2, tokens]`."""
    texts = [f" {answer}" for answer in answers]
    parts = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    room = max(max_tokens - sum(map(len, parts)), 1)
    parts.insert(0, question[-room:])
    return torch.stack([torch.cat(parts), torch.cat([torch.full_like(part, k) for k, part in enumerate(parts)])])
