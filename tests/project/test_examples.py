"""Every script in examples runs, offline and on the CPU, says what it should, and fits on a page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# The script, what its last line is, and which share of the first number in it the second has to reach (at least) or to
# fall to (at most); None: the numbers do not matter.
EXPECTED: dict[str, tuple[str, float | None]] = {
    "accelerate_loop.py": (r"accuracy 0\.9\d\d", None),
    "active_learning.py": (r"accuracy with 100 labels, by chance and by doubt ([\d.]+) -> ([\d.]+)", 1.03),
    "amp_loop.py": (r"loss 0\.[0-4]\d\d at the mean, \d+ steps skipped", None),
    "ddp.py": (r"2 ranks, accuracy at the mean (0\.9\d|1\.00)", None),
    "find_wrong_labels.py": (r"20% flipped, by sensitivity: AUROC 0\.7[5-9]\d, precision 0\.(4[5-9]|5\d)", None),
    "fsdp.py": (r"2 ranks, loss on the first one's share 0\.0\d\d\d", None),
    "lightning_trainer.py": (r"accuracy 0\.9\d\d", None),
    "qlora.py": (r"loss [0-3]\.\d\d\d", None),
    "rl_loop.py": (r"reward ([\d.]+) -> ([\d.]+)", 2.0),
    "transformers_trainer.py": (r"loss ([\d.]+) -> ([\d.]+)", 0.7),
    "trl_grpo.py": (r"reward ([\d.]+) -> ([\d.]+)", 1.5),
    "trl_reward.py": (r"reward \(lower bound\): [\d.]+ \([\d.]+\), -[\d.]+ \(-[\d.]+\), \S+ \(\S+\)", None),
    "trl_sft.py": (r"a b c d with probability (0\.[5-9]\d|1\.00)", None),
}
ON_TWO_RANKS = ("ddp.py", "fsdp.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run_on_two_ranks(name: str, *arguments: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *TORCHRUN, str(EXAMPLES / name), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def run_here(name: str) -> str:
    """As ``python examples/NAME`` would, but for the imports, of which the frameworks' take five to ten seconds."""
    printed = io.StringIO()
    AcceleratorState._reset_state(reset_partial_state=True)  # one for each process, with the first one's precision
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the frameworks warn of each other, and stop nothing
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    return printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ON_TWO_RANKS:
        printed = run_on_two_ranks(name, *([str(tmp_path / "checkpoint")] if name == "fsdp.py" else []))
    else:
        printed = run_here(name)
    last = re.split(r"[\r\n]+", printed.strip())[-1]
    pattern, factor = EXPECTED[name]
    found = re.fullmatch(pattern, last)
    assert found, last
    if factor is not None:
        before, after = map(float, found.groups())
        assert after >= factor * before if factor > 1 else after <= factor * before, last


def test_every_example_is_in_the_table_and_short() -> None:
    scripts = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == EXPECTED.keys()
    assert {name: lines for name, lines in scripts.items() if lines > 40} == {}
