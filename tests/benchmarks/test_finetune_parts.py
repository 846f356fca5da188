"""The parts of the main job: data, batches, class logits, metrics, settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import UserError, tables
from benchmarks.environment import write_record
from benchmarks.finetune import data, model, published, report, train
from benchmarks.finetune.data import Example
from benchmarks.finetune.scorers import LabelScorer
from benchmarks.finetune.settings import resolve
from benchmarks.finetune.tasks import PAPER_TASKS, PUBLISHED, TASKS
from ivon_kernels.predict import metrics
from tests.support.finetune_model import save_tiny_model

BUNDLED_TASKS = [task for task in TASKS.values() if not task.hub]
HUB_TASKS = list(PAPER_TASKS.values())


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def load(name: str, **changes: Any) -> data.Dataset:
    return data.load_dataset(TASKS[name], **{"split": "test", **changes})


class WordTokenizer:
    """One token per word: its length."""

    pad_token_id = 0

    def __call__(self, prompts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in prompt.split()] for prompt in prompts]}


@pytest.mark.parametrize("task", BUNDLED_TASKS, ids=lambda task: task.name)
def test_bundled_tasks_have_disjoint_splits_and_labels_of_every_class(task: Any) -> None:
    test = load(task.name)
    validation = load(task.name, split="validation")
    prompts = [{e.prompt for e in part} for part in (test.train, validation.test, test.test)]
    for i, one in enumerate(prompts):
        for other in prompts[:i]:
            assert one.isdisjoint(other)
    classes = set(range(len(task.label_words)))
    for part in (test.train, test.test):
        assert {e.label for e in part} == classes
    recipe = task.recipe
    load(task.name, train_size=recipe.train_size, test_size=recipe.test_size, max_words=recipe.max_words)


def test_test_labels_are_the_single_most_frequent_vote() -> None:
    for example in load("vader_nyt").test:
        assert example.votes is not None
        assert [example.votes[example.label]] == [v for v in example.votes if v == max(example.votes)]


def test_training_labels_are_drawn_like_one_random_rater() -> None:
    train_set = load("vader_nyt").train
    shares = torch.tensor([e.votes for e in train_set], dtype=torch.float64)
    shares /= shares.sum(1, keepdim=True)
    drawn = torch.nn.functional.one_hot(torch.tensor([e.label for e in train_set]), 3)
    deviation = (drawn - shares).sum(0) / (shares * (1 - shares)).sum(0).sqrt()  # standard normal
    assert deviation.abs().max() < 4
    assert (drawn.argmax(1) != shares.argmax(1)).any()


def test_the_seed_decides_training_examples_and_leaves_the_test_alone() -> None:
    one, same, other = (load("vader_nyt", train_size=50, test_size=50, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.train != other.train
    assert one.test == other.test


def test_max_words_leaves_out_longer_prompts() -> None:
    shorter = load("vader_nyt", max_words=9)
    assert {len(e.prompt.split()) <= 9 for e in shorter.train + shorter.test} == {True}


@pytest.mark.parametrize("changes", [{"train_size": 10**6}, {"test_size": 10**6}, {"max_words": 1}])
def test_asking_for_more_examples_than_there_are_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="Task vader_nyt has"):
        load("vader_nyt", **changes)


HUB_ROWS = {
    "boolq": {"question": "is ice cold", "passage": "Ice is cold.", "answer": True},
    "winogrande": {"sentence": "The _ won.", "option1": "cat", "option2": "dog", "answer": "2"},
    "openbookqa": {"question_stem": "Q?", "choices": {"text": list("pqrs"), "label": list("ABCD")}, "answerKey": "B"},
    "arc": {"question": "Q?", "choices": {"text": list("pqrs"), "label": list("1234")}, "answerKey": "2"},
}


@pytest.mark.parametrize("task", HUB_TASKS, ids=lambda task: task.name)
def test_hub_tasks_become_examples(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = HUB_ROWS[task.name.split("_")[0]]
    asked = []

    def load_dataset(*name: str) -> dict[str, list[Any]]:
        asked.append(name)
        return {"train": [row, row], "validation": [row]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    loaded = data.load_dataset(replace(task, prompts="ours"), split="test")
    assert asked == [task.hub]
    assert (len(loaded.train), len(loaded.test)) == (2, 1)
    assert loaded.test[0].label == 1
    assert loaded.test[0].prompt.endswith("Answer:")
    if task.name != "boolq":
        assert "\nB. " in loaded.test[0].prompt


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("boolq", "Answer the question with only True or False: is ice cold Context: Ice is cold."),
        ("winogrande_s", f"{published._TASK} The _ won. Choices: A. cat. B dog. Answer:"),
        ("openbookqa", f"{published._TASK} Q? Choices: A. P. B. Q. C. R. D. S. Answer:"),
        ("arc_easy", f"{published._TASK} Q? Choices: A. P. B. Q. C. R. D. S. Answer:"),
    ],
)
def test_published_prompts(name: str, prompt: str) -> None:
    row = HUB_ROWS[name.split("_")[0]]
    ours, theirs = (data.hub_example(replace(PAPER_TASKS[name], prompts=p), row) for p in ("ours", PUBLISHED))
    assert ours is not None and theirs is not None
    assert theirs == replace(ours, prompt=prompt) and ours.prompt != prompt


def test_arc_questions_without_four_choices_are_left_out() -> None:
    row = {"question": "Q?", "choices": {"text": list("pqr"), "label": list("ABC")}, "answerKey": "B"}
    assert data.hub_example(PAPER_TASKS["arc_easy"], row) is None


@pytest.mark.parametrize(
    ("name", "train", "test"), [("arc_easy", 2241, 2365), ("arc_challenge", 1117, 1165), ("openbookqa", 4957, 500)]
)
def test_bundled_tasks_of_the_paper_keep_its_splits(name: str, train: int, test: int) -> None:
    """Of the files' questions with four choices a few are asked twice, or in both splits."""
    found, validation = load(name), load(name, split="validation").test
    distinct = len(found.train) + len(validation)
    assert 0.97 * train <= distinct <= train and test - 7 <= len(found.test) <= test
    assert len(found.train) == int(0.9 * distinct)
    assert {len(e.answers) for e in found.train + found.test} == {4}


def test_hub_tasks_without_network_end_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*name: str) -> None:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^Task boolq could not be loaded .* needs a network .*: no route to host$"):
        load("boolq")


def test_hub_tasks_choose_on_the_end_of_their_training_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"q{i}", "passage": "p", "answer": True} for i in range(20)]
    monkeypatch.setattr("datasets.load_dataset", lambda *name: {"train": rows, "validation": rows[:1]})
    found = load("boolq", split="validation")
    assert (len(found.train), len(found.test)) == (18, 2)
    assert {e.prompt for e in found.train}.isdisjoint(e.prompt for e in found.test)


def of(examples: list[Example], max_tokens: int = 320) -> data.EncodedExamples:
    return data.EncodedExamples(examples, WordTokenizer(), max_tokens, torch.device("cpu"))


def encoded(lengths: list[int]) -> data.EncodedExamples:
    return of([Example(" ".join(["x" * (i + 1)] * n), i % 3) for i, n in enumerate(lengths)])


def test_an_epoch_holds_every_example_once_and_the_seed_decides_its_order() -> None:
    examples = encoded([1 + i % 7 for i in range(50)])

    def first_epochs(seed: int) -> list[list[int]]:
        batches = examples.epochs(8, seed)
        return [next(batches).index for _ in range(14)]

    once = first_epochs(3)
    for epoch in (once[:7], once[7:]):
        assert sorted(i for index in epoch for i in index) == list(range(50))
    assert first_epochs(3) == once
    assert first_epochs(4) != once


def test_batches_are_padded_on_the_right_and_know_the_last_token() -> None:
    for batch in encoded([3, 1, 4, 1, 5, 2]).in_length_order(4):
        for row, last, label, i in zip(batch.input_ids, batch.last, batch.labels, batch.index, strict=True):
            assert row[: last + 1].tolist() == [i + 1] * [3, 1, 4, 1, 5, 2][i]
            assert not row[last + 1 :].any()
            assert label == i % 3


def test_overlong_prompts_lose_their_beginning() -> None:
    examples = of([Example("a bb ccc dddd", 0)], max_tokens=2)
    assert next(examples.in_length_order(1)).input_ids.tolist() == [[3, 4]]


def test_published_prompts_lose_their_end() -> None:
    examples = [Example("a bb ccc dddd", 0)]
    found = data.EncodedExamples(examples, WordTokenizer(), 2, torch.device("cpu"), keep_start=True)
    assert next(found.in_length_order(1)).input_ids.tolist() == [[1, 2]]


def test_perfect_predictions_score_perfectly() -> None:
    unanimous = [(9, 0, 0), (0, 9, 0), (0, 0, 9)]
    examples = of([Example("", i % 3, unanimous[i % 3]) for i in range(30)])
    probabilities = torch.full((30, 3), 1e-9, dtype=torch.float64)
    probabilities[torch.arange(30), torch.arange(30) % 3] = 1 - 2e-9
    scores = metrics.evaluate(probabilities, examples.labels, examples.votes)
    assert scores.accuracy == 1
    for value in (scores.nll, scores.ece, scores.brier, scores.vote_kl):
        assert value == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_scores_of_one_confident_guess(classes: int) -> None:
    """70% for class 0 everywhere, right for half of the examples: every score is a line of arithmetic."""
    other = 0.3 / (classes - 1)
    examples = of([Example("", i % 2) for i in range(20)])
    probabilities = torch.tensor([[0.7] + [other] * (classes - 1)] * 20, dtype=torch.float64)
    scores = metrics.evaluate(probabilities, examples.labels, examples.votes)
    assert scores.accuracy == pytest.approx(0.5)
    assert scores.nll == pytest.approx(-(math.log(0.7) + math.log(other)) / 2)
    assert scores.ece == pytest.approx(0.2)
    rest = (classes - 2) * other**2
    assert scores.brier == pytest.approx((0.09 + other**2 + rest + 0.49 + (1 - other) ** 2 + rest) / 2)
    assert scores.vote_kl is None


def test_tables_leave_out_what_no_row_has() -> None:
    scores = {"accuracy": 0.5, "nll": 0.6996, "auroc_errors": None, "vote_kl": None}
    rows = [{"name": "a", "scores": scores}, {"name": "b", "scores": {**scores, "auroc_errors": 0.25}}]
    heads = {"nll": "NLL", "auroc_errors": "AUROC", "vote_kl": "raters"}
    found = report.table(rows, heads)
    assert found.to_dict("index") == {"a": {"NLL": "0.700", "AUROC": "-"}, "b": {"NLL": "0.700", "AUROC": "0.250"}}
    assert report.standard_error(rows, 100) == 0.05
    assert tables.markdown(found.reset_index()).splitlines()[2].split() == ["|", "a", "|", "0.700", "|", "-", "|"]


def test_a_record_has_a_line_for_each_row_and_no_nan(tmp_path: Path) -> None:
    write_record(tmp_path / "a.json", {"n": 1, "none": [], "rows": [{"x": 0.1}, {"x": None}]}, ["torch"])
    text = (tmp_path / "a.json").read_text()
    assert text.startswith('{\n"n": 1,\n"none": [],\n"rows": [\n{"x": 0.1},\n{"x": null}\n],\n"environment": {')
    assert json.loads(text)["environment"]["versions"] == {"torch": torch.__version__}
    wrong = metrics.evaluate(torch.tensor([[0.5, 0.5]]), torch.tensor([1]))
    assert report.scores_record(wrong)["auroc_errors"] is None
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "b.json", {"n": math.nan}, [])


class SoftCap(nn.Linear):
    """An output layer that is more than its matrix."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(input))


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
def test_class_logits_are_the_models_own_and_padding_does_not_matter(
    tiny_model: Path, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = model.load_model(str(tiny_model), device=torch.device("cpu"), in_8bit=False)
    head: Any = base.get_output_embeddings()  # type: ignore[operator]
    if capped:
        head.__class__ = SoftCap
    words = TASKS["vader_nyt"].label_words
    scorer = LabelScorer(model.add_lora(base, seed=0), tokenizer, words, "Sentiment:")
    label_ids = tokenizer("negative neutral positive")["input_ids"]
    assert scorer.label_ids == label_ids
    prompts = ["a bad day Sentiment:", "it was good Sentiment:", "the Sentiment:"]
    examples = data.EncodedExamples([Example(p, 0) for p in prompts], tokenizer, 320, torch.device("cpu"))
    (batch,) = examples.in_length_order(8)
    scorer.model.eval()
    together = scorer(batch)
    for logits, i in zip(together, batch.index, strict=True):
        ids = tokenizer(prompts[i], return_tensors="pt")["input_ids"]
        torch.testing.assert_close(logits, base(input_ids=ids).logits[0, -1, label_ids])


def test_label_words_that_share_a_token_are_refused(tiny_model: Path) -> None:
    base, tokenizer = model.load_model(str(tiny_model), device=torch.device("cpu"), in_8bit=False)
    adapted = model.add_lora(base, seed=0)
    with pytest.raises(UserError, match="same first token"):
        LabelScorer(adapted, tokenizer, (" good", " good"), "Sentiment:")


def test_lora_starts_from_the_seed(tiny_model: Path) -> None:
    def start(seed: int) -> dict[str, torch.Tensor]:
        base, _ = model.load_model(str(tiny_model), device=torch.device("cpu"), in_8bit=False)
        adapted = model.add_lora(base, seed=seed)
        return {n: p.detach() for n, p in adapted.named_parameters() if p.requires_grad}

    one, same, other = start(1), start(1), start(2)
    assert one.keys() == same.keys()
    assert {name.split(".")[-4] for name in one} == {"q_proj", "v_proj"}
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def settings(**changes: Any) -> Any:
    options = {"task": "vader_nyt", "optimizer": "both", "split": "test", "device": "cpu", "out": Path()}
    return resolve(**{**options, **changes})[1]


def test_lr_is_that_of_the_chosen_optimizer() -> None:
    recipe = TASKS["vader_nyt"].recipe
    both, adamw, ivon = (settings(optimizer=name, lr=0.25) for name in ("both", "adamw", "ivon"))
    assert (both.adamw_lr, both.ivon_lr) == (recipe.adamw_lr, 0.25)
    assert (adamw.adamw_lr, ivon.ivon_lr) == (0.25, 0.25)
    assert settings(adamw_lr=0.125).adamw_lr == 0.125


@pytest.mark.parametrize(
    ("task", "ess", "hess_init"),
    [
        ("winogrande_s", 1e7, 3e-4),
        ("winogrande_m", 1e8, 3e-4),
        ("arc_challenge", 1e6, 1e-3),
        ("arc_easy", 1e6, 1e-3),
        ("openbookqa", 1e6, 1e-3),
        ("boolq", 1e7, 3e-4),
    ],
)
def test_the_papers_tasks_take_the_papers_recipe(task: str, ess: float, hess_init: float) -> None:
    found = settings(task=task, recipe="paper")
    assert (found.ess, found.hess_init, found.ivon_lr) == (ess, hess_init, 0.03)
    assert (found.steps, found.batch_size, found.clip_radius, found.beta2) == (10_000, 4, 1e-3, 0.99999)
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = train.make_optimizer("ivon", [parameter], found, 100)
    assert optimizer.param_groups[0]["rescale_lr"] is False


def test_the_papers_recipe_is_one_flag() -> None:
    found = settings(task="arc_easy", recipe="paper", model=None, load_in_8bit=False)
    assert (found.model, found.load_in_8bit, found.seed) == ("meta-llama/Llama-2-7b-hf", True, 21)
    assert (found.prompts, found.recipe, found.adamw_lr, found.weight_decay) == (PUBLISHED, "paper", 5e-5, 0.0)
    other = settings(task="boolq", recipe="paper", model="mine", load_in_8bit=False, seed=87, prompts="ours")
    assert (other.model, other.load_in_8bit, other.seed, other.prompts) == ("mine", False, 87, "ours")
    assert other.record()["prompts"] == "ours"
    for wrong, message in (
        ({"recipe": "papers"}, "Unknown recipe 'papers'"),
        ({"recipe": "paper", "task": "vader_nyt"}, "Unknown task of the paper 'vader_nyt'"),
        ({"prompts": "published"}, "--prompts is for the paper's tasks"),
        ({"recipe": "paper", "task": "boolq", "prompts": "mine"}, "Unknown prompts 'mine'"),
    ):
        with pytest.raises(UserError, match=message):
            settings(**wrong)


class OneWeight(nn.Module):
    """Class logits that are the parameter itself."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("name", ["adamw", "ivon"])
def test_the_schedule_is_linear_to_zero_and_batches_come_as_given(name: str) -> None:
    chosen = replace(settings(), steps=4)
    tiny = OneWeight()
    optimizer = train.make_optimizer(name, train.trainable(tiny), chosen, 20)
    seen: list[list[int]] = []
    rates: list[float] = []

    def loss(batch: data.Batch) -> torch.Tensor:
        seen.append(batch.index)
        rates.append(optimizer.param_groups[0]["lr"])
        return train.cross_entropy(lambda batch: tiny.logits.expand(len(batch.labels), 3), batch)

    training = train.train(
        optimizer,
        tiny,
        loss,
        encoded([2] * 20).epochs(4, 0),
        steps=4,
        seed=0,
        guard=train.InterruptGuard(),
        on_step=lambda loss: None,
    )
    given = encoded([2] * 20).epochs(4, 0)
    assert seen == [next(given).index for _ in range(4)]
    start = chosen.adamw_lr if name == "adamw" else 0.5 * chosen.adamw_lr / 1e-4
    assert rates == pytest.approx([start * share for share in (1, 0.75, 0.5, 0.25)])
    assert training.steps == len(training.optimizer_seconds) == 4
    assert 0 < training.optimizer_ms < 1e3 * training.seconds
