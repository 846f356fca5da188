"""The whole finetuning step on a toy model: what is measured, what is checked before; and ``pytest benchmarks``."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.speed import model, model_optimizers, model_report
from benchmarks.speed.clock import DryClock
from benchmarks.speed.contenders import BASELINE, IVON_OPT
from benchmarks.speed.model_optimizers import FOREACH, Loop, Optimizer, Params, wrong
from benchmarks.speed.ours import ONE_LAUNCH, PLAIN, our_name
from ivon_kernels import IVON

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore::UserWarning:ivon"),  # from inside torch, on every construction
]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # its contenders take seconds for a step


def measured(**options: object) -> model.Found:
    settings = {"rounds": 2, "steps": 2, "enough_time": lambda: True, **options}
    return model.measure(model.TOY, DryClock(), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def problem() -> model.Problem:
    return model.Problem(model.TOY, CPU)


def test_every_optimizer_is_timed_whole_and_in_parts(tmp_path: Path) -> None:
    ticks: list[None] = []
    found = measured(tick=lambda: ticks.append(None))
    names = [BASELINE, our_name("cpu", PLAIN), our_name("cpu", ONE_LAUNCH), FOREACH, IVON_OPT]
    assert not found.skipped
    assert found.wrong == {}
    assert len(ticks) == 2 * len(names)
    assert [(m.contender, m.quantity) for m in found.measurements] == [(n, q) for n in names for q in model.QUANTITIES]
    of = {(m.contender, m.quantity): m for m in found.measurements}
    for m in found.measurements:
        assert m.error is None, m
        assert (m.part, m.workload, m.dtype, m.unit) == ("model", "toy finetuning step", "float32", "ms")
        assert m.ours is m.contender.startswith("ivon_kernels")
        assert len(m.rounds) == 2
        assert 0 < (m.p20 or 0) <= (m.p50 or 0) <= (m.p80 or 0)
        base = of[BASELINE, m.quantity]
        assert m.ratios == pytest.approx([own / other for own, other in zip(m.rounds, base.rounds, strict=True)])
    for name in names:
        whole, passes, part = (of[name, quantity].p20 or 0.0 for quantity in model.QUANTITIES)
        assert whole >= max(passes, part)
    share = model.shares(found.measurements)
    assert set(share) == set(names)
    assert all(0 < value < 1 for value in share.values())
    assert [row[0] for row in model_report.grid(found.measurements).rows] == names
    model_report.plot(tmp_path / "step.png", found.measurements)
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert model_report.grid([]).rows == []


def test_the_time_ends_the_rounds_after_the_first() -> None:
    found = measured(enough_time=lambda: False)
    assert {len(m.rounds) for m in found.measurements} == {1}


def test_every_optimizer_sees_the_same_batches_from_the_same_weights(problem: model.Problem) -> None:
    def losses() -> list[float]:
        problem.reset()
        return [float(problem.loss(number).detach()) for number in (0, 1, 0)]

    first = losses()
    assert first[0] == first[2] != first[1]
    for param in problem.params:
        param.data = param.data + 1.0  # elsewhere, as ivon-opt leaves them
    assert losses() == first


def test_the_given_gradients_are_of_all_adapters(problem: model.Problem) -> None:
    assert len(problem.gradients) == len(problem.params) == 8
    assert all(bool(gradient.any()) for gradient in problem.gradients)


def check(problem: model.Problem, optimizer: Optimizer) -> str | None:
    return wrong(optimizer, problem.params, problem.reset, problem.give_gradients)


def plain(make: Callable[[Params], torch.optim.Optimizer]) -> Callable[[Params], Loop]:
    def build(params: Params) -> Loop:
        optimizer = make(params)
        return Loop(lambda: None, lambda: optimizer.step() and None)

    return build


@pytest.mark.parametrize("mode", [PLAIN, ONE_LAUNCH])
def test_ours_must_equal_the_reference(problem: model.Problem, mode: str) -> None:
    def other_recipe(params: Params) -> Loop:
        optimizer = IVON.for_lora(params, num_data=20_000_000, seed=0, backend="cpu")
        return Loop(optimizer.train, lambda: optimizer.step() and None, optimizer.eval)

    assert check(problem, Optimizer("right", model_optimizers._ours("cpu", mode == ONE_LAUNCH), "cpu", mode)) is None
    assert check(problem, Optimizer("x", other_recipe, "cpu", mode)) == "differs from the reference; not timed"


def test_foreach_must_equal_fused_but_for_rounding(problem: model.Problem) -> None:
    def adamw(lr: float) -> Optimizer:
        return Optimizer(FOREACH, plain(lambda params: torch.optim.AdamW(params, lr=lr, foreach=True)))

    assert check(problem, adamw(1e-4)) is None
    assert check(problem, adamw(1.001e-4)) == "differs from fused AdamW; not timed"


def test_peers_must_move_the_weights_to_finite_values(problem: model.Problem) -> None:
    def sgd(lr: float) -> Optimizer:
        return Optimizer("peer", plain(lambda params: torch.optim.SGD(params, lr=lr)))

    assert check(problem, sgd(0.1)) is None
    assert check(problem, sgd(0.0)) == "two steps changed nothing; not timed"
    assert check(problem, sgd(math.inf)) == "the weights are not finite after two steps; not timed"


def test_one_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: Params) -> Loop:
        raise RuntimeError("no\nsuch thing")

    every = (
        Optimizer(BASELINE, broken),
        Optimizer("ours", broken, "cpu", PLAIN),
        Optimizer("absent", broken, package="no-such-package"),
        Optimizer("sound", model_optimizers._adamw(foreach=True)),
    )
    monkeypatch.setattr(model, "optimizers", lambda device: every)
    found = measured(rounds=1)
    errors = {m.contender: m.error for m in found.measurements}
    reason = "RuntimeError: no such thing"
    assert errors == {BASELINE: reason, "ours": reason, "absent": "no-such-package is not installed", "sound": None}
    assert found.wrong == {"ours": reason}
    assert [m.ratio for m in found.measurements] == [None] * 12
    assert [row[0] for row in model_report.grid(found.measurements).rows] == ["sound"]


def test_a_missing_model_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "version", lambda package: None)
    assert measured().skipped == "transformers is not installed"
    assert model.job_for(CPU).name == "smollm2-135m"
    assert model.job_for(torch.device("cuda")).name == "llama-2-7b"


# ---- pytest benchmarks -----------------------------------------------------------------------------------------------


def run_pytest(*options: str, before: str = "pass") -> tuple[int, str]:
    code = f"import sys, pytest; {before}; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "-p", "no:cacheprovider", "-q", *options]
    # As a user would call it, not as a part of a parallel run.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=alone)
    return result.returncode, result.stdout


def test_pytest_benchmarks_times_ours_and_the_peers() -> None:
    pytest.importorskip("pytest_benchmark.plugin")
    code, output = run_pytest("benchmarks", "-k", "smollm2 and AdamW")
    assert code == 0, output
    assert "benchmark 'SmolLM2-135M, LoRA r=8 on q, v, float32': 1 tests" in output
    assert "AdamW (fused)" in output


def test_pytest_benchmarks_without_the_plugin_says_so() -> None:
    hide = (
        "import importlib.util as u; found = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'pytest_benchmark' else found(name, *rest)"
    )
    code, output = run_pytest("benchmarks", before=hide)
    assert code == 4
    sentence = "ERROR: the benchmarks need the package pytest-benchmark; run: pip install pytest-benchmark"
    assert output.strip() == sentence


def test_pytest_benchmarks_side_by_side_is_refused() -> None:
    pytest.importorskip("pytest_benchmark.plugin")
    code, output = run_pytest("benchmarks", "-n", "2")
    assert code == 4
    assert "benchmarks that run side by side measure each other; leave out -n" in output
