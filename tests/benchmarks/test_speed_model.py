"""The whole finetuning step on a toy model: what is measured, what is checked before; and ``pytest benchmarks``."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import model, peers
from benchmarks.speed.clock import DryClock
from benchmarks.speed.contender import BASELINE, FOREACH, IVON_OPT, LORA, Build, Contender, Parameters, Recipe, Step
from benchmarks.speed.measure import Session
from benchmarks.speed.peers import ONE_LAUNCH, PLAIN, adamw, our_name, rounding
from benchmarks.speed.report import model_table
from benchmarks.speed.verify import Verifier
from ivon_kernels import IVON
from tests.support.speed import session

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore::UserWarning:ivon"),  # from inside torch, on every construction
]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # its contenders take seconds for a step


def measured(rounds: int = 2, seconds: float = 600.0) -> Session:
    running = session(DryClock(), seconds=seconds)
    model.measure(running, model.TOY, rounds, steps=2)
    return running


@pytest.fixture(scope="module")
def problem() -> model.Problem:
    return model.Problem(model.TOY, CPU)


def test_every_optimizer_is_timed_whole_and_in_parts() -> None:
    running = measured()
    found = running.record
    names = [BASELINE, our_name("cpu", PLAIN), our_name("cpu", ONE_LAUNCH), FOREACH, IVON_OPT]
    assert not found.left_out
    assert running.wrong == {}
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
    table = model_table(found.measured())
    assert list(table.optimizer.unique()) == names
    shares = table[table.quantity == model.OPTIMIZER].share
    assert len(shares) == len(names) and all(0 < float(share.rstrip("%")) < 100 for share in shares)


def test_the_time_ends_the_rounds_after_the_first() -> None:
    found = measured(seconds=0.0).record
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


def check(problem: model.Problem, build: Build, **fields: Any) -> str | None:
    verifier = Verifier(problem.tensors(), torch.float32, CPU, problem.elements, LORA)
    return verifier.check(Contender("it", build, **fields))


def of(make: Callable[[Parameters], torch.optim.Optimizer]) -> Build:
    return lambda params, recipe: Step(make(params).step)


@pytest.mark.parametrize("mode", [PLAIN, ONE_LAUNCH])
def test_ours_must_equal_the_reference(problem: model.Problem, mode: str) -> None:
    def other_recipe(params: Parameters, recipe: Recipe) -> Step:
        optimizer = IVON.for_lora(params, num_data=20_000_000, seed=0, backend="cpu")
        return Step(optimizer.step, begin=optimizer.train, optimizer=optimizer)

    right = peers.ivon("cpu", mode)
    assert check(problem, right, backend="cpu", expected=PLAIN) is None
    wrong = check(problem, other_recipe, backend="cpu", expected=PLAIN)
    assert wrong == "differs from the reference; not timed"


def test_the_recipe_is_the_published_one(problem: model.Problem) -> None:
    plain, published = (
        IVON(problem.params, **LORA.ivon, seed=0).defaults,
        IVON.for_lora(problem.params, num_data=10_000, recipe="paper", seed=0).defaults,
    )
    assert plain == published


def test_foreach_must_equal_fused_but_for_rounding(problem: model.Problem) -> None:
    def foreach(lr: float) -> Build:
        return of(lambda params: torch.optim.AdamW(params, lr=lr, weight_decay=0.01, foreach=True))

    assert check(problem, foreach(1e-4), like_adamw=rounding) is None
    assert "as far from those of torch's AdamW" in str(check(problem, foreach(1.001e-4), like_adamw=rounding))
    assert check(problem, adamw("torch.optim:AdamW", fused=True), like_adamw=rounding) is None


def test_peers_must_move_the_weights_to_finite_values(problem: model.Problem) -> None:
    def sgd(lr: float) -> Build:
        return of(lambda params: torch.optim.SGD(params, lr=lr))

    assert check(problem, sgd(0.1)) is None
    assert check(problem, sgd(0.0)) == "step 1 changed no weight; not timed"
    assert check(problem, sgd(math.inf)) == "step 1 left weights that are not finite; not timed"


def test_one_that_fails_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(params: Parameters, recipe: Recipe) -> Step:
        raise RuntimeError("no\nsuch thing")

    every = (
        Contender(BASELINE, broken),
        Contender("ours", broken, backend="cpu", expected=PLAIN),
        Contender("absent", broken, package="no-such-package"),
        Contender("sound", adamw("torch.optim:AdamW", foreach=True)),
    )
    monkeypatch.setattr(model, "contenders", lambda device: every)
    running = measured(rounds=1)
    found = running.record
    errors = {m.contender: m.error for m in found.measurements}
    reason = "RuntimeError: no such thing"
    assert errors == {BASELINE: reason, "ours": reason, "absent": "no-such-package is not installed", "sound": None}
    assert running.wrong == {"ours": reason}
    assert [m.ratio for m in found.measurements] == [None] * 12
    assert set(model_table(found.measured()).optimizer) == {"sound"}


def test_a_missing_model_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "version", lambda package: None)
    (skipped,) = measured().record.left_out
    assert skipped == {"part": "model", "what": "a whole finetuning step", "why": "transformers is not installed"}
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


@pytest.mark.slow
def test_pytest_benchmarks_times_ours_and_the_peers() -> None:
    pytest.importorskip("pytest_benchmark.plugin")
    code, output = run_pytest("benchmarks", "-k", "smollm2 and AdamW")
    assert code == 0, output
    assert "benchmark 'SmolLM2-135M, LoRA r=8 on q, v, float32': 1 tests" in output
    assert "AdamW (fused)" in output


@pytest.mark.slow
def test_pytest_benchmarks_without_the_plugin_says_so() -> None:
    hide = (
        "import importlib.util as u; found = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'pytest_benchmark' else found(name, *rest)"
    )
    code, output = run_pytest("benchmarks", before=hide)
    assert code == 4
    sentence = "ERROR: the benchmarks need the package pytest-benchmark; run: pip install pytest-benchmark"
    assert output.strip() == sentence


@pytest.mark.slow
def test_pytest_benchmarks_side_by_side_is_refused() -> None:
    pytest.importorskip("pytest_benchmark.plugin")
    code, output = run_pytest("benchmarks", "-n", "2")
    assert code == 4
    assert "benchmarks that run side by side measure each other; leave out -n" in output
