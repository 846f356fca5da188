"""The main job's differences to AdamW: the scores that the tables print, paired intervals, and an honest sentence."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from benchmarks.finetune import compare
from ivon_kernels.predict import metrics

LABELS = torch.randint(3, (400,), generator=torch.Generator().manual_seed(0))


def predictions(signal: float, sharpness: float, seed: int) -> Tensor:
    """Softmax of noise plus a share of the right answer."""
    noise = torch.randn(400, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (sharpness * (noise + signal * torch.nn.functional.one_hot(LABELS, 3))).softmax(1)


SURE, SOBER = predictions(1.0, 6.0, 1), predictions(1.0, 1.0, 1)


def test_differences_are_those_of_the_scores() -> None:
    found = compare.differences({"AdamW": SURE, "IVON": SOBER}, "AdamW", LABELS)["IVON"]
    one, other = metrics.evaluate(SURE, LABELS), metrics.evaluate(SOBER, LABELS)
    for key, difference in found.items():
        # The scores bin float32 confidences.
        assert difference.value == pytest.approx(getattr(other, key) - getattr(one, key), abs=4 * 2**-24), key
        assert difference.low <= difference.value <= difference.high


def test_the_interval_covers_what_it_says() -> None:
    """Of 200 differences of two equals, paired, about 95% of the intervals hold zero (10 to 20 would be 5 to 10%)."""
    missed = 0
    for seed in range(200):
        labels = torch.randint(2, (60,), generator=torch.Generator().manual_seed(seed))
        one, other = (
            torch.rand(60, 2, generator=torch.Generator().manual_seed(1000 * k + seed), dtype=torch.float64) + 0.1
            for k in (1, 2)
        )
        rows = {"a": one / one.sum(1, keepdim=True), "b": other / other.sum(1, keepdim=True)}
        missed += compare.differences(rows, "a", labels, scores=("nll",))["b"]["nll"].decided
    assert 2 <= missed <= 24  # binomial, p = 0.05: outside once in a thousand


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((SURE, SOBER), "better in NLL .* and ECE .*, no difference seen in accuracy"),
        ((SOBER, SURE), "worse in NLL .* and ECE .*, no difference seen in accuracy"),
        ((SURE, predictions(4.0, 6.0, 1)), "better in accuracy .* and NLL .* and ECE"),
        ((SOBER, SOBER), "no difference seen in accuracy and NLL and ECE"),
    ],
)
def test_the_sentence_goes_whichever_way_it_went(rows: tuple[Tensor, Tensor], words: str) -> None:
    found = compare.differences(dict(zip(("AdamW", "IVON"), rows, strict=True)), "AdamW", LABELS)
    said = compare.conclusion(found, "AdamW", len(LABELS))
    assert re.search(f"on the same 400 examples .95% intervals.: IVON: {words}", said), said
    (row,) = compare.table(found).to_numpy().tolist()
    assert [cell.endswith("*") for cell in row] == [each.decided for each in found["IVON"].values()]
