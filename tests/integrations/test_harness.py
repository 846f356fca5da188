"""The model ivon of lm-evaluation-harness on local tasks: the averages of the posterior, and their calibration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from ivon_kernels.integrations.harness import IVONLM, calibration
from ivon_kernels.posterior import Posterior, evaluate
from tests.support.posterior_models import ROUNDING, trained_llama
from tests.support.tiny_llm import llama, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.slow,
]

QUESTIONS = [
    {"question": "abc", "choices": ["d", "ef", "ghi"], "answer": 0},
    {"question": "bcd", "choices": ["e", "xyz", "a"], "answer": 1},
    {"question": "fghi", "choices": ["j", "kk", "b"], "answer": 2},
    {"question": "k", "choices": ["l", "m", "no"], "answer": 0},
]
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}, {metric: brier_score}]
"""


class Saved(NamedTuple):
    base: Path
    adapter: Path
    posterior: Posterior


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    trained = trained_llama()
    trained.model.save_pretrained(folder / "adapter")
    trained.posterior.save(folder / "adapter")
    return Saved(folder / "base", folder / "adapter", trained.posterior)


def model(saved: Saved, **options: Any) -> IVONLM:
    return IVONLM(str(saved.base), str(saved.adapter), device="cpu", dtype="float32", **options)


def by_hand(saved: Saved, context: str, continuation: str, numbers: list[int]) -> tuple[float, bool]:
    """The average over samples of the likelihood of the continuation, one sample and one sequence at a time."""
    trained = trained_llama()
    ids = torch.tensor([tokenizer()(context + continuation).input_ids])
    start = len(tokenizer()(context).input_ids)
    likelihoods, tokens = [], []
    for number in numbers:
        with trained.posterior.sampled(trained.model, sample=number), torch.no_grad():
            p = trained.model(input_ids=ids).logits[0, start - 1 : -1].double().softmax(-1)
        likelihoods.append(p.gather(1, ids[0, start:, None]).prod())
        tokens.append(p)
    greedy = torch.stack(tokens).mean(0).argmax(-1).equal(ids[0, start:])
    return torch.stack(likelihoods).mean().log().item(), greedy


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"batch_size": 5, "max_rows": 5}], ids=["stacked", "apart"])
def test_likelihoods_are_averages_over_the_samples(saved: Saved, options: dict[str, Any]) -> None:
    pairs = [("abc", "d"), ("abc", "defgh"), ("k", "lmn"), ("abcdefgh", "i"), ("zy", "x")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = model(saved, samples=4, **options).loglikelihood(requests, disable_tqdm=True)
    expected = [by_hand(saved, *pair, [0, 1, 2, 3]) for pair in pairs]
    # The relative error of a probability of n tokens is n times that of one, some 2e-5 here: ROUNDING is half of 4e-5.
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=5 * 2 * ROUNDING)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    at_mean, _ = zip(*model(saved, samples=0).loglikelihood(requests, disable_tqdm=True), strict=True)
    assert max(abs(a - b) for a, (b, _) in zip(at_mean, expected, strict=True)) > 1e-2  # the average is another number


def test_long_contexts_and_whole_texts(saved: Saved) -> None:
    lm = model(saved, samples=2, max_length=6)
    (cut,) = lm.loglikelihood([Instance("loglikelihood", {}, ("abcdefghi", "jk"), 0)], disable_tqdm=True)
    (kept,) = lm.loglikelihood([Instance("loglikelihood", {}, ("efghi", "jk"), 0)], disable_tqdm=True)
    assert cut == kept  # 7 tokens, the last of which is not read
    (whole,) = model(saved, samples=2).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("bcd",), 0)])
    (pair,) = model(saved, samples=2).loglikelihood([Instance("loglikelihood", {}, ("", "bcd"), 0)], disable_tqdm=True)
    assert whole == pytest.approx(pair[0], abs=3 * 2 * ROUNDING)


def test_a_task_of_the_harness_with_its_calibration(saved: Saved, tmp_path: Path) -> None:
    data = tmp_path / "letters.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "letters.yaml").write_text(TASK.replace("FILE", str(data)))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = f"pretrained={saved.base},posterior={saved.adapter},samples=3,dtype=float32"
    results = lm_eval.simple_evaluate(
        "ivon", arguments, tasks=["letters"], batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=0
    )
    assert results is not None
    likelihoods = [[by_hand(saved, q["question"], c, [0, 1, 2])[0] for c in q["choices"]] for q in QUESTIONS]
    probabilities = torch.tensor(likelihoods, dtype=torch.float64).softmax(1)
    expected = evaluate(probabilities, torch.tensor([q["answer"] for q in QUESTIONS]))
    scores = calibration(results)["letters"]
    assert vars(scores) == pytest.approx(vars(expected), abs=1e-3)
    reported = results["results"]["letters"]
    assert reported["acc,none"] == scores.accuracy
    assert reported["brier_score,none"] == pytest.approx(scores.brier, abs=1e-9)
    with pytest.raises(ValueError, match="log_samples=True"):
        calibration({"samples": None})


def test_targets_in_words_and_tasks_without_one_answer() -> None:
    def sample(target: Any, *likelihoods: float) -> dict[str, Any]:
        choices = [("question", f" {letter}") for letter in "abc"[: len(likelihoods)]]
        return {"target": target, "arguments": choices, "filtered_resps": [(value, False) for value in likelihoods]}

    third = math.log(1 / 3)
    samples = [sample("b", third, third, third), sample(0, math.log(0.9), math.log(0.1)), sample([0, 1], 0.0, 0.0)]
    configs = {"words": {"output_type": "multiple_choice"}, "text": {"output_type": "generate_until"}}
    found = calibration({"samples": {"words": samples, "text": [{}]}, "configs": configs})
    assert found.keys() == {"words"}
    assert found["words"].nll == pytest.approx((math.log(3) - math.log(0.9)) / 2)


def test_refusals(saved: Saved) -> None:
    with pytest.raises(ValueError, match="batch_size must be a number"):
        model(saved, batch_size="auto")
    with pytest.raises(ValueError, match=r"from posterior=\.\.\."):
        model(saved, peft="elsewhere")
