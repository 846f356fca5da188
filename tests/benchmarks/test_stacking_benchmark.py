"""The stacking benchmark on a tiny model: what it records, what it refuses, and that it notices wrong results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import UserError
from benchmarks.__main__ import app
from benchmarks.finetune.model import add_lora
from benchmarks.stacking import (
    MEAN,
    SEPARATE,
    STACKED,
    WAYS,
    Options,
    Setup,
    check,
    peaks_of,
    prepare,
    run,
    token_batch,
)
from tests.support.tiny_llm import llama, tokenizer

# A name that PEFT 0.21 uses and transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "samples": 3,
    "batches": (1, 2),
    "tokens": 5,
    "rank": 4,
    "rounds": 2,
    "threads": 1,
    "memory": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def setup() -> Setup:
    return prepare(add_lora(llama(), seed=0), 3)


def test_the_record(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Options(model=str(folder), **OPTIONS), tmp_path)
    record = json.loads((tmp_path / "stacking.json").read_text())
    for batch in (1, 2):
        rows = {row["name"]: row for row in record["rows"] if row["batch"] == batch}
        assert set(rows) == set(WAYS) and rows[SEPARATE]["ratio"] == 1.0
        assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows.values())
    stacked = {row["batch"]: row["ratio"] for row in record["rows"] if row["name"] == STACKED}
    bounds = [(target["bound"], target["measured"], target["met"]) for target in record["targets"]]
    assert bounds[0][:2] == (0.6, stacked[1]) and bounds[1][:2] == (1.0, max(stacked.values()))
    assert all(met == (measured <= bound) for bound, measured, met in bounds)
    weights = 4 * (16 + 16) + 4 * (16 + 8)  # q and v, rank 4
    base = llama()
    assert record["adapter_bytes"] == 4 * weights
    assert record["base_bytes"] == 4 * sum(param.numel() for param in base.parameters())
    assert bounds[2][1] == pytest.approx(100 * record["adapter_bytes"] / record["base_bytes"])
    assert record["difference_in_spreads"] < 1e-3 and record["environment"]["versions"]["torch"]
    assert (tmp_path / "stacking.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "3 samples, 5 tokens a sequence" in printed and "Targets" in printed


@pytest.mark.parametrize("way", WAYS)
def test_peak_memory(setup: Setup, way: str) -> None:
    peaks = peaks_of(way, setup.model.config, torch.float32, Options(model=None, **OPTIONS))
    assert len(peaks) == 2 and all(peak is None or peak >= 0 for peak in peaks)


def test_what_the_contenders_compute(setup: Setup) -> None:
    tokens = token_batch(setup, 2, 5)
    with torch.inference_mode():
        separate = setup.logits(SEPARATE, tokens, None)
        mean = setup.logits(MEAN, tokens, None)
        expected = setup.model(input_ids=tokens).logits[:, -1]
    assert separate.shape == (3, 2, 32) and mean.shape == (1, 2, 32)
    torch.testing.assert_close(mean[0], expected)
    assert check(setup, tokens) < 1e-3


def test_wrong_results_are_noticed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample 3 in the place of sample 2."""
    logits = Setup.logits

    def wrong(self: Setup, way: str, *rest: Any) -> Any:
        other = Setup(self.model, self.posterior, (0, 1, 3))
        return logits(other if way == SEPARATE else self, way, *rest)

    monkeypatch.setattr(Setup, "logits", wrong)
    with pytest.raises(UserError, match=r"stacked probabilities differ .* more than rounding in torch\.float32"):
        check(setup, token_batch(setup, 1, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,x"], "--batches must be whole numbers from 1 on, like 1,2,4,8; got '1,x'"),
        (["--batches", "0"], "--batches must be whole numbers from 1 on"),
        (["--rank", "0"], "--samples, --tokens, --rank, --rounds and --threads must be at least 1"),
        (["--device", "tpu"], "--device must be cpu or cuda, not 'tpu'"),
        (["--model", "/nowhere"], "Cannot read the model '/nowhere'"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["stacking", "--threads", "1", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("Error: ") and message in result.stderr
