"""Predictions are averages over samples, whatever the batches, the stacking and the process."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ivon_kernels import IVON, lora
from ivon_kernels.posterior import (
    Gaussians,
    Posterior,
    Prediction,
    generate,
    generate_averaged,
    next_token,
    predict,
    sweep_temperature,
)
from ivon_kernels.predict import batches, prediction
from tests.support.elsewhere import drawn_and_predicted
from tests.support.posterior_models import ROUNDING, Trained, features, tokens, train, trained_classifier, trained_llama
from tests.support.ranks import Ranks
from tests.support.tiny_llm import llama, same, weights

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SCORE = next_token([4, 5, 9])


@pytest.fixture(scope="module")
def llm() -> Trained:
    return trained_llama()


@pytest.fixture(scope="module")
def mlp() -> Trained:
    return trained_classifier()


@pytest.fixture
def passes(llm: Trained) -> Iterator[list[int]]:
    """How many rows went through the model, pass by pass."""
    seen: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["input_ids"]))

    handle = llm.model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    handle.remove()


def by_hand(trained: Trained, inputs: Tensor, samples: list[int], logits: Callable[[Tensor], Tensor]) -> Tensor:
    """float64 ``[S, N, C]``, by the optimizer's own samples."""
    result = []
    for sample in samples:
        with trained.optimizer.sampled_params(sample=sample), torch.no_grad():
            result.append(logits(inputs).double().softmax(1))
    return torch.stack(result)


def assert_same_prediction(actual: Prediction, expected: Prediction, atol: float = ROUNDING) -> None:
    for name in ("probabilities", "entropy", "expected_entropy", "mutual_information"):
        # An entropy changes by log p + 1 times as much as a probability.
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=0, atol=20 * atol)
    torch.testing.assert_close(actual.probabilities, expected.probabilities, rtol=0, atol=atol)
    assert (actual.labels is None) == (expected.labels is None)
    assert actual.labels is None or expected.labels is None or torch.equal(actual.labels, expected.labels)


def test_a_language_models_prediction_is_the_average_by_hand(llm: Trained) -> None:
    ids = tokens(3, 5)
    found = predict(llm.posterior, llm.model, ids_of(ids), samples=[2, 0, 7], score=SCORE, stacked=False)
    p = by_hand(llm, ids, [2, 0, 7], lambda x: llm.model(input_ids=x).logits[:, -1, [4, 5, 9]])
    torch.testing.assert_close(found.probabilities, p.mean(0), rtol=0, atol=ROUNDING)
    entropies = -(p * p.log()).sum(2)
    torch.testing.assert_close(found.expected_entropy, entropies.mean(0), rtol=0, atol=20 * ROUNDING)
    total = -(p.mean(0) * p.mean(0).log()).sum(1)
    torch.testing.assert_close(found.entropy, total, rtol=0, atol=20 * ROUNDING)
    torch.testing.assert_close(found.mutual_information, total - entropies.mean(0), rtol=0, atol=40 * ROUNDING)
    assert found.mutual_information.max() > 0.01  # the samples do differ


def ids_of(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids}


def test_a_classifiers_prediction_has_the_bits_of_the_average_by_hand(mlp: Trained) -> None:
    x, y = features(6)
    found = mlp.posterior.predict(mlp.model, (x, y), samples=4, keep_samples=True)
    p = by_hand(mlp, x, [0, 1, 2, 3], mlp.model)
    assert found.sample_probabilities is not None and torch.equal(found.sample_probabilities, p)
    torch.testing.assert_close(found.probabilities, p.mean(0), rtol=0, atol=1e-15)
    assert found.labels is not None and torch.equal(found.labels, y)
    assert torch.equal(found.predicted, p.mean(0).argmax(1)) and torch.equal(
        found.confidence, found.probabilities.amax(1)
    )
    assert len(found) == 6 and found.probabilities.dtype == torch.float64


def test_no_samples_is_the_mean_of_the_posterior(mlp: Trained) -> None:
    x, _ = features(6)
    with torch.no_grad():
        at_mean = mlp.model(x).double().softmax(1)
    found = predict(mlp.posterior, mlp.model, x, samples=0, keep_samples=True)
    assert torch.equal(found.probabilities, at_mean) and not found.mutual_information.any()
    assert found.sample_probabilities is not None and found.sample_probabilities.shape == (1, 6, 3)
    pruned = predict(mlp.posterior.pruned(1.0), mlp.model, x, samples=0)
    assert torch.equal(pruned.probabilities, torch.full((6, 3), 1 / 3, dtype=torch.float64))  # all weights are 0


def test_the_method_is_the_function_which_takes_any_gaussians(llm: Trained) -> None:
    assert Posterior.predict is predict
    assert Posterior.generate is generate and Posterior.generate_averaged is generate_averaged
    batch = ids_of(tokens(2, 4))
    gaussians = Gaussians(llm.posterior, llm.posterior.seed)
    for stacked in (True, False):
        expected = llm.posterior.predict(llm.model, batch, samples=2, score=SCORE, stacked=stacked)
        found = predict(gaussians.tempered(1.0), llm.model, batch, samples=2, score=SCORE, stacked=stacked)
        assert torch.equal(found.probabilities, expected.probabilities)


# ---- stacking -------------------------------------------------------------------------------------------------------


def test_stacked_samples_give_the_numbers_of_separate_passes(llm: Trained, passes: list[int]) -> None:
    batch = {"input_ids": tokens(3, 5), "labels": torch.tensor([1, 0, 2])}
    separate = predict(llm.posterior, llm.model, batch, samples=5, score=SCORE, stacked=False)
    assert passes == [3] * 5
    passes.clear()
    assert_same_prediction(predict(llm.posterior, llm.model, batch, samples=5, score=SCORE), separate)
    assert passes == [15]  # a LoRA model is stacked without being asked
    passes.clear()
    bounded = predict(llm.posterior, llm.model, batch, samples=5, score=SCORE, max_rows=9, keep_samples=True)
    assert_same_prediction(bounded, separate)
    assert passes == [6, 9]  # two samples, then three
    assert bounded.sample_probabilities is not None
    torch.testing.assert_close(bounded.sample_probabilities.mean(0), bounded.probabilities, rtol=0, atol=1e-15)
    passes.clear()
    assert_same_prediction(predict(llm.posterior, llm.model, batch, samples=5, score=SCORE, max_rows=2), separate)
    assert passes == [2] * 5 + [1, 2, 2]  # two rows, sample by sample; then the third one, with up to two samples


def test_one_stack_serves_all_batches(llm: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    stack = lora.stack
    monkeypatch.setattr(lora, "stack", lambda *args, **options: made.append(args) or stack(*args, **options))
    batches = [ids_of(tokens(2, 5, seed)) for seed in range(4)]
    predict(llm.posterior, llm.model, batches, samples=3, score=SCORE)
    assert len(made) == 1


def test_a_whole_model_is_stacked_when_asked(mlp: Trained) -> None:
    x, _ = features(6)
    stacked = predict(mlp.posterior, mlp.model, x, samples=3, stacked=True)
    assert_same_prediction(stacked, predict(mlp.posterior, mlp.model, x, samples=3))


class Recurrent(nn.Module):
    """A module whose state has the batch in the second dimension, which cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.rnn, self.out = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.proj(x)[:, None])
        return self.out(hidden[:, 0])


def test_a_lora_model_that_cannot_be_stacked_takes_separate_passes() -> None:
    model: Any = get_peft_model(Recurrent(), LoraConfig(r=2, target_modules=["proj"], modules_to_save=["rnn"]))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = IVON(params, lr=0.1, ess=50.0, hess_init=0.5, seed=1)
    trained = Trained(model.eval(), optimizer, optimizer.posterior(model))
    x, _ = features(5)
    p = by_hand(trained, x, [0, 1, 2], model)
    found = predict(trained.posterior, model, [x, x], samples=3)
    torch.testing.assert_close(found.probabilities, p.mean(0).repeat(2, 1), rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="cannot stack"):
        predict(trained.posterior, model, x, samples=3, stacked=True)


# ---- batches --------------------------------------------------------------------------------------------------------


def dict_loader(x: Tensor, y: Tensor, size: int) -> DataLoader[Any]:
    return DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x, y: dict_loader(x, y, 3),
        lambda x, y: DataLoader(TensorDataset(x, y), batch_size=2),
        lambda x, y: iter([(x[:1], y[:1]), {"x": x[1:], "labels": y[1:].int()}]),
        lambda x, y: {"x": x, "labels": y},
        lambda x, y: [[x[:4], y[:4]], [x[4:], y[4:]]],
    ],
    ids=["dicts", "pairs", "generator", "one dict", "lists"],
)
def test_a_stream_of_batches_predicts_as_one_batch(mlp: Trained, inputs: Callable[[Tensor, Tensor], Any]) -> None:
    x, y = features(7)
    expected = predict(mlp.posterior, mlp.model, (x, y), samples=3, keep_samples=True)
    for max_rows in (128, 2):
        found = predict(mlp.posterior, mlp.model, inputs(x, y), samples=3, max_rows=max_rows, keep_samples=True)
        assert_same_prediction(found, expected)
        torch.testing.assert_close(found.sample_probabilities, expected.sample_probabilities, rtol=0, atol=ROUNDING)


def test_progress_counts_batches(
    mlp: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "tqdm", partial(batches.tqdm, mininterval=0))
    x, y = features(7)
    loader = dict_loader(x, y, 2)
    predict(mlp.posterior, mlp.model, loader, samples=1, progress=True)
    assert "4/4" in capsys.readouterr().err
    predict(mlp.posterior, mlp.model, (batch for batch in loader), samples=1, progress=True)
    assert "4batch" in capsys.readouterr().err
    predict(mlp.posterior, mlp.model, loader, samples=1)
    assert capsys.readouterr() == ("", "")  # no terminal


@pytest.mark.parametrize(
    ("inputs", "options", "error", "reason"),
    [
        (3, {}, TypeError, "iterable of batches"),
        ("text", {}, TypeError, "iterable of batches"),
        (TensorDataset(torch.zeros(2, 4)), {}, TypeError, "such as a DataLoader"),
        (["text"], {}, TypeError, "a batch must be a tensor"),
        ([[torch.zeros(1, 4)] * 3], {}, TypeError, "got a list of 3"),
        ({"text": ["a"]}, {}, ValueError, "no tensors with rows: a dict of text: list"),
        ([], {}, ValueError, "no batches"),
        ((torch.zeros(2, 4), torch.zeros(2)), {}, ValueError, "one class number"),
        (
            (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long)),
            {},
            ValueError,
            r"2 rows, got torch.int64 of shape \[3\]",
        ),
        ([(torch.zeros(1, 4), torch.tensor([1])), torch.zeros(1, 4)], {}, ValueError, "some batches have labels"),
        (torch.full((1, 4), math.nan), {}, ValueError, "nan"),
        (torch.zeros(2, 4), {"samples": True}, TypeError, "how many"),
        (torch.zeros(2, 4), {"samples": -1}, ValueError, "from 0"),
        (torch.zeros(2, 4), {"samples": [1, 1]}, ValueError, "different numbers"),
        (torch.zeros(2, 4), {"samples": []}, ValueError, "different numbers"),
        (torch.zeros(2, 4), {"samples": [131072]}, ValueError, "different numbers"),
        (torch.zeros(2, 4), {"max_rows": 0}, ValueError, "max_rows"),
        (torch.zeros(2, 4), {"score": lambda model, x: model(x)[:, :1]}, ValueError, "at least two classes"),
        (torch.zeros(2, 4), {"score": lambda model, x: model(x)[:1]}, ValueError, "1 rows for a batch of 2"),
        (torch.zeros(2, 4), {"score": lambda model, x: None}, ValueError, "got NoneType"),
        ((torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)), {"max_rows": 1}, None, ""),
        ({"x": torch.zeros(3, 4), "scale": torch.tensor(1.0)}, {"max_rows": 2}, ValueError, "cannot be cut"),
    ],
)
def test_refusals(mlp: Trained, inputs: Any, options: Any, error: type[Exception] | None, reason: str) -> None:
    if error is None:
        predict(mlp.posterior, mlp.model, inputs, **options)
        return
    with pytest.raises(error, match=reason):
        predict(mlp.posterior, mlp.model, inputs, **{"samples": 2, **options})


def test_batches_of_different_classes_are_refused(mlp: Trained) -> None:
    x, _ = features(3)
    score = lambda model, x: model(x)[:, : 1 + len(x)]  # noqa: E731
    with pytest.raises(ValueError, match=r"numbers of classes, \[2, 3\]"):
        predict(mlp.posterior, mlp.model, [x[:1], x[1:]], samples=2, score=score)


# ---- what is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("fail", [None, 0, 2])
def test_modes_and_weights_are_as_before_also_after_an_error(llm: Trained, stacked: bool, fail: int | None) -> None:
    model = llm.model
    model.train()
    frozen = model.get_base_model().model.norm
    frozen.eval()
    modes = [module.training for module in model.modules()]
    before, forwards = weights(model), [vars(module).get("forward") for module in model.modules()]
    calls = 0

    def score(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        if calls == fail:
            raise KeyError("stop")
        calls += 1
        return SCORE(model, batch)

    batches = [ids_of(tokens(2, 4))] * 3
    error = None
    try:
        predict(llm.posterior, model, batches, samples=2, score=score, stacked=stacked)
    except KeyError as caught:
        error = caught  # keeps its traceback, and with it the frames that were left
    assert (error is not None) == (fail is not None)
    assert same(weights(model), before)
    assert [module.training for module in model.modules()] == modes
    assert [vars(module).get("forward") for module in model.modules()] == forwards
    frozen.train()
    model.eval()


def test_training_goes_on_after_a_prediction(llm: Trained) -> None:
    trained = trained_llama()
    predict(trained.posterior, trained.model, ids_of(tokens(2, 4)), samples=2, score=SCORE)
    trained.model.train()
    ids = tokens(2, 6)
    again = train(trained.model, {"input_ids": ids, "labels": ids})
    assert not same(dict(again.posterior.mean), dict(trained.posterior.mean))


# ---- the parts of the uncertainty -----------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**31), st.floats(0.01, 300.0))
def test_the_parts_of_the_entropy_add_up(samples: int, rows: int, classes: int, seed: int, scale: float) -> None:
    logits = torch.randn(samples, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = Prediction.from_samples((scale * logits).softmax(2))  # at 300 many probabilities are 0
    assert found.sample_probabilities is not None and not found.entropy.isnan().any()
    torch.testing.assert_close(
        found.entropy, found.expected_entropy + found.mutual_information, rtol=0, atol=4 * 2**-52 * classes
    )
    assert found.entropy.min() >= 0 and found.entropy.max() <= math.log(classes) + 1e-14
    assert found.mutual_information.min() >= 0 and found.mutual_information.max() <= math.log(samples) + 1e-14
    assert (found.expected_entropy <= found.entropy + 1e-14).all()  # entropy is concave
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(rows, dtype=torch.float64), rtol=0, atol=1e-14)


def test_known_entropies() -> None:
    sure = torch.eye(3, dtype=torch.float64)[:, None]  # three samples, each sure of another class
    found = Prediction.from_samples(sure, torch.tensor([1]), keep_samples=False)
    assert found.expected_entropy.item() == 0 and found.sample_probabilities is None
    assert found.mutual_information.item() == pytest.approx(math.log(3), abs=1e-15)
    unsure = torch.full((4, 1, 3), 1 / 3)  # four that agree that nobody knows
    found = Prediction.from_samples(unsure)
    assert found.entropy.item() == pytest.approx(math.log(3), abs=1e-7) and found.mutual_information.item() < 1e-15
    logits = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Prediction.from_samples(logits.softmax(1).expand(3, 200, 5))  # half of the differences round below 0
    assert found.mutual_information.min() >= 0 and found.mutual_information.max() < 1e-14


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_said", False)


@pytest.mark.usefixtures("unsaid")
def test_samples_that_agree_are_spoken_of_once(mlp: Trained) -> None:
    x, _ = features(40)
    cold = mlp.posterior.tempered(1e6)
    found = predict(cold, mlp.model, x[:20], samples=3, advise=False)
    entropy, disagreement = found.entropy.mean(), found.mutual_information.mean()
    assert 0 < disagreement < 0.01 * entropy
    sentence = f"3 samples agree to {disagreement:.2g} of {entropy:.2g} nats: one pass at the mean (samples=0)"
    with pytest.warns(UserWarning, match=re.escape(sentence)) as said:
        predict(cold, mlp.model, x[:20], samples=3)
    assert [warning.filename for warning in said] == [__file__]
    predict(cold, mlp.model, x, samples=3)  # not again: the tests make errors of warnings


@pytest.mark.usefixtures("unsaid")
def test_nothing_is_said_of_samples_that_disagree_nor_of_few_examples_or_one_sample(mlp: Trained) -> None:
    x, y = features(40)
    found = predict(mlp.posterior, mlp.model, x, samples=3)
    assert found.mutual_information.mean() > 0.01 * found.entropy.mean()
    cold = mlp.posterior.tempered(1e6)
    predict(cold, mlp.model, x[:19], samples=3)
    predict(cold, mlp.model, x, samples=1)
    predict(cold, mlp.model, x, samples=0)
    sweep_temperature(mlp.posterior, mlp.model, (x, y), temperatures=[1e6], samples=3)
    with pytest.warns(UserWarning, match="3 samples agree"):  # none of these was the one time
        predict(cold, mlp.model, x, samples=3)


# ---- elsewhere ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_process_with_other_threads_predicts_the_same(llm: Trained, tmp_path: Path, ranks: Ranks) -> None:
    llm.model.save_pretrained(tmp_path)
    llm.posterior.save(tmp_path)
    ((drawn, elsewhere),) = ranks.run(1, drawn_and_predicted, tmp_path)
    assert same(drawn, llm.posterior.draw(3))
    expected = predict(llm.posterior, llm.model, ids_of(tokens(3, 5)), samples=4, score=SCORE).probabilities
    for found in elsewhere:
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    here = predict(Posterior.load(tmp_path), loaded, ids_of(tokens(3, 5)), samples=4, score=SCORE)
    assert torch.equal(here.probabilities, expected)  # the same call: the same bits
