"""The speed benchmark: its record, what it refuses to time, what it is made of. Tiny sizes, on the processor."""

from __future__ import annotations

import functools
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import UserError
from benchmarks.__main__ import app
from benchmarks.speed import contender, exercise, host, peers, steps, verify, workloads
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import STEP, Build, Contender, Parameters, Recipe, Step
from benchmarks.speed.measure import Budget, timing
from benchmarks.speed.record import Measurement, Record, read
from benchmarks.speed.report import write
from ivon_kernels import noise
from tests.support import cuda_emulator
from tests.support.speed import session

CPU = torch.device("cpu")
LAYER, FLAT = workloads.DRY_WORKLOADS
OURS = "ivon_kernels cpu, sample + step"


def broken(params: Parameters, recipe: Recipe) -> Step:
    raise OSError("its library is broken")


@pytest.fixture(autouse=True)
def _quick_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(gc, "unfreeze", lambda: None)  # what the tests' process has imported stays frozen: conftest.py


@pytest.fixture
def few_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "DRY_WORKLOADS", (LAYER,))
    monkeypatch.setattr(steps, "DTYPES", {"bfloat16": torch.bfloat16})


def call(out: Path, *options: str) -> tuple[int, str]:
    given = ["speed", "--dry-run", "--threads=1", "--rounds=1", "--turn-ms=1", f"--out={out}", *options]
    result = CliRunner().invoke(app, given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def rows(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    record = json.loads((out / "speed.json").read_text())
    return {(row["contender"], row["quantity"]): row for row in record["measurements"]}


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_command_measures_checks_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of everything; peers that are new rows of the table; and what ran before is kept."""
    known = peers.peers
    more = [Contender("broken", broken), Contender("absent", broken, package="no-such-distribution")]
    monkeypatch.setattr(peers, "peers", lambda device: [*known(device), *more])
    monkeypatch.setattr(steps, "DRY_WORKLOADS", (LAYER,))
    code, output = call(tmp_path, "--parts=steps,model", "--rounds=2")
    assert code == 0, output
    record = json.loads((tmp_path / "speed.json").read_text())
    assert record["schema"] == 1 and record["settings"]["dry_run"] is True
    assert record["environment"]["versions"]["ivon-opt"] and record["copy_gbps"]["cpu"] > 0
    keys = [(m["workload"], m["dtype"], m["contender"], m["quantity"]) for m in record["measurements"]]
    assert len(keys) == len(set(keys))
    found = rows(tmp_path)
    assert "its library is broken" in found["broken", "step"]["error"]
    assert found["absent", "step"]["error"] == "no-such-distribution is not installed"
    for quantity in ("step", "kernel", "host", *ours_parts()):
        row = found[OURS, quantity]
        assert "error" not in row and 0 < row["p20"] <= row["p50"] <= row["p80"], row
        assert row["ours"] and len(row["rounds"]) == len(row["ratios"]) == 2
        assert row["baseline"] == (
            "AdamW (fused)" if quantity in ("step", "kernel", "host", "save", "load") else "AdamW (fused), step"
        )
    assert found[OURS, "kernel"]["bytes_per_element"] == 50 and "bytes_per_element" not in found[OURS, "step"]
    assert found["AdamW (fused)", "step"]["ratio"] == 1
    assert found["ivon-opt 0.1.3", "step"]["p50"] > 0 and found["optimi AdamW", "step"]["p50"] > 0
    assert found["ivon_kernels reference, eager", "step"]["rounds"][1:] == []  # one turn is enough of it
    assert found[OURS, "whole step"]["ratio"] > 0 and "error" not in found["ivon-opt 0.1.3", "whole step"]
    text = (tmp_path / "report.md").read_text()
    for shown in ("![time of one", "its library is broken", "| AdamW (fused) ", "## Targets", "figures mean nothing"):
        assert shown in text
    assert (tmp_path / "speed.png").stat().st_size > 10_000 and (tmp_path / "roofline.png").stat().st_size > 10_000
    before = read(tmp_path / "speed.json")
    code, output = call(tmp_path, "--parts=")
    after = read(tmp_path / "speed.json")
    assert after.measurements == before.measurements and "Targets" in output


def ours_parts() -> tuple[str, ...]:
    return (peers.SAMPLE, peers.UPDATE, peers.RESTORE, peers.EVALUATION, contender.SAVE, contender.LOAD)


@pytest.mark.usefixtures("few_and_quick")
def test_wrong_results_are_not_timed_and_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.torch, "equal", lambda *_: False)
    code, output = call(tmp_path, "--parts=steps")
    assert code == 1 and "WRONG: dry-lora, bfloat16, ivon_kernels cpu, sample + step" in output
    found = rows(tmp_path)
    assert "p50" not in found[OURS, "step"] and "differs from the reference" in found[OURS, "step"]["error"]
    assert "not the optimizer's state" in found[OURS, "save"]["error"]
    assert found["AdamW (fused)", "step"]["p50"] > 0


def test_command_refuses_with_one_sentence(tmp_path: Path) -> None:
    for options in (["--parts=kernel"], ["--rounds=0"], ["--device=tpu"]):
        code, output = call(tmp_path, *options)
        assert code == 2 and output.startswith("Error: ") and output.count("\n") == 1
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["speed", "--device=cuda", f"--out={tmp_path}"])
        assert result.exit_code == 2 and "there is no CUDA device" in result.output


def test_a_part_replaces_what_it_had_measured(tmp_path: Path) -> None:
    def one(part: str, contender: str) -> Measurement:
        return Measurement(part, "w", "float32", contender, False, "step", "ms", 1.0, 1.0, 1.0, [1.0])

    record = Record(device={}, settings={"dry_run": False, "parts": {}})
    record.replace_part("steps", [one("steps", "a"), one("steps", "b")], [("flat-1B", "too large")])
    record.replace_part("host", [one("host", "h")])
    record.replace_part("steps", [one("steps", "c")])
    assert [m.contender for m in record.measurements] == ["h", "c"] and record.left_out == []
    record.write(tmp_path)
    path = tmp_path / "speed.json"
    assert read(path) == replace(record, path=path)
    path.write_text('{"schema": 0}')
    with pytest.raises(UserError, match="has schema 0"):
        read(path)


def test_a_report_of_little(tmp_path: Path) -> None:
    record = Record(device={"kind": "cpu", "name": "x"}, settings={"dry_run": False, "parts": {}})
    record.environment = {"versions": {}, "python": "3"}
    write(tmp_path, record)
    assert "![" not in (tmp_path / "report.md").read_text()


# ---- right or not ----------------------------------------------------------------------------------------------------


def ours() -> list[Contender]:
    return [c for c in peers.lineup(CPU) if c.ours]


def moves(amounts: list[float]) -> Build:
    def build(params: Parameters, recipe: Recipe) -> Step:
        left = iter(amounts)

        def step() -> None:
            amount = next(left)
            for param in params:
                param.data += amount

        return Step(step)

    return build


def adamw(**options: Any) -> Build:
    return lambda params, recipe: Step(torch.optim.AdamW(params, **{**recipe.adamw, **options}).step)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (moves([0.1, 0.0]), "step 2 changed no weight"),
        (moves([float("inf"), 0.1]), "step 1 left weights that are not finite"),
        (moves([0.1, 0.1]), "from those of torch's AdamW"),
        (adamw(weight_decay=0.02), "from those of torch's AdamW"),
        (adamw(), None),
    ],
)
def test_peers_that_do_not_train_are_not_timed(build: Build, why: str | None) -> None:
    peer = Contender("peer", build, like_adamw=peers.rounding)
    found = verify.Verifier(LAYER, torch.float32, CPU, 100).check(peer)
    assert found is None if why is None else why in str(found)


def test_a_checkpoint_that_loses_state_is_not_timed() -> None:
    class Forgetful(torch.optim.AdamW):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            next(iter(self.state.values()))["exp_avg"].zero_()

    def build(params: Parameters, recipe: Recipe) -> Step:
        optimizer = Forgetful(params, **recipe.adamw)
        return Step(optimizer.step, optimizer=optimizer)

    save, load = contender.checkpoints("forgetful", build)
    verifier = verify.Verifier(LAYER, torch.float32, CPU, 100)
    assert verifier.check(save) is None
    assert "what was loaded is not the optimizer's state" in str(verifier.check(load))


def test_some_of_many_tensors_are_compared() -> None:
    """The others are frozen for the reference only, which leaves the noise of those compared as it is."""
    many = workloads.Workload("many", "", ((3, 5),) * 10)
    verifier = verify.Verifier(many, torch.float32, CPU, 45)
    assert verifier._kept == [0, 4, 9]
    found = {c.name + c.quantity: verifier.check(c) for c in ours()}
    assert set(found.values()) == {None} and len(found) == 10


def test_refusals_of_the_flat_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat tensor's last elements are checked against the public noise."""
    monkeypatch.setattr(verify, "PREFIX", 100)
    verifier = verify.Verifier(FLAT, torch.float32, CPU, 100)
    plain = ours()[0]
    assert verifier.check(plain) is None
    other = noise.normals

    def shifted(numel: int, **given: Any) -> torch.Tensor:
        return other(numel, **{**given, "step": given["step"] + 1})

    monkeypatch.setattr(verify.noise, "normals", shifted)
    assert "the last elements" in str(verifier.check(plain))


def test_the_interpreted_triton_backend_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    triton = next(c for c in ours() if c.backend == "triton")
    if reason := triton.missing():
        pytest.skip(reason)
    assert verify.Verifier(FLAT, torch.float32, CPU, 100).check(triton) is None


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_workloads_are_those_of_the_issue() -> None:
    sizes = {w.name: (len(w.shapes), w.elements) for w in workloads.WORKLOADS}
    assert sizes == {
        "llama-2-7b-r8-qv": (128, 4_194_304),
        "llama-2-7b-r16-all": (448, 39_976_960),
        "smollm2-135m-r8-qv": (120, 460_800),
        "128-tiny": (128, 131_072),
        "450-tiny": (450, 460_800),
        **{f"flat-{name}": (1, n) for name, n in (("1M", 10**6), ("10M", 10**7), ("100M", 10**8), ("1B", 10**9))},
    }
    assert set(workloads.QUICK) < set(sizes)
    quick = session(CpuClock(), max_elements=5 * 10**6, quick=True)
    kept = [w.name for w in workloads.WORKLOADS if not steps.left_out(quick, w)]
    assert kept == ["llama-2-7b-r8-qv", "smollm2-135m-r8-qv", "450-tiny", "flat-1M"]


def test_workloads_by_name() -> None:
    some = session(CpuClock(), workloads="450-tiny, flat-1M")
    assert [w.name for w in workloads.WORKLOADS if not steps.left_out(some, w)] == ["450-tiny", "flat-1M"]
    with pytest.raises(UserError, match=r"^there is no workload flat-2M; choose from llama-2-7b-r8-qv, "):
        steps.left_out(session(CpuClock(), workloads="flat-2M"), FLAT)


def test_parameters_repeat_a_pattern_and_are_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "_PATTERN", 64)
    first, again = (FLAT.parameters(torch.bfloat16)[0] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first[:67], first[64:]) and first.grad is not None
    assert first.dtype == first.grad.dtype == torch.bfloat16 and 0 < float(first.grad.abs().max()) <= 0.01
    one, other = workloads.Workload("two", "", ((8,), (8,))).parameters()
    assert not torch.equal(one, other)


def test_bytes_per_element() -> None:
    def counts(device: str) -> dict[str, tuple[int | None, int | None]]:
        steps = [c for c in peers.lineup(torch.device(device)) if c.quantity == STEP]
        return {c.name: (c.bytes_per_element(torch.float32), c.bytes_per_element(torch.bfloat16)) for c in steps}

    gpu, cpu = counts("cuda"), counts("cpu")
    expected = {
        "AdamW (fused)": (28, 14),
        "optimi AdamW (triton)": (28, 18),
        "ivon_kernels triton, sample + step": (52, 42),
        "ivon_kernels cuda, step with next sample": (36, 30),
        "IVON equations, torch.compile": (44, 38),
        "ivon-opt 0.1.3": (44, 38),
        "bitsandbytes AdamW8bit": (16, 10),
    }
    assert {name: gpu[name] for name in expected} == expected
    assert cpu[OURS] == (60, 50)  # the noise is written and read once
    assert contender.bytes_per_element(("step",), torch.float32) == 32  # the issue's figure


def test_compiled_reference_draws_the_specified_noise() -> None:
    mean = torch.zeros(4099)
    assert torch.equal(peers.equation_normals(mean, torch.tensor(7)), noise.normals(4099, seed=0, step=7))


def test_exercise_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main("cpu") == 0
    assert exercise.main("nothing") == 77
    assert "no backend 'nothing'" in capsys.readouterr().out


@pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="needs a C++ compiler")
def test_host_rows_have_quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TINY", host.TINY[:1])
    monkeypatch.setattr(
        host, "_emulator", lambda optimization: (None, cuda_emulator.emulator())
    )  # compiled for other tests too
    found = host.measure(rounds=2, repeats=2, optimization="-O0")
    assert {m.workload for m in found} == {"128-tiny"}
    for m in found:
        assert m.error is None and m.p50 and len(m.rounds) == 2


def test_host_rows_without_a_compiler_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TINY", host.TINY[:1])
    monkeypatch.setattr(host.shutil, "which", lambda name: None)
    host._emulator.cache_clear()
    errors = {m.contender: m.error for m in host.measure(rounds=1, repeats=2, optimization="-O0")}
    assert "no C++ compiler" in str(errors[host.PATH]) and list(errors.values()).count(None) == 2


def test_ratio_is_taken_round_by_round() -> None:
    assert timing([[2.0] * 3, [20.0] * 3], [[1.0] * 3, [10.0] * 3]).ratio == 2.0
    assert timing([[2.0]], None).ratio is None


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_a_contender_that_does_not_fit_or_takes_too_long_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CpuClock()
    monkeypatch.setattr(clock, "copy_bytes", 2**20)
    monkeypatch.setattr(clock, "free_bytes", lambda: 384 * 100)
    some = (
        Contender("AdamW (fused)", adamw(), ("adamw",)),
        Contender("large", adamw(), bytes_needed=101),
        Contender("slow", adamw(), most_elements=383),
    )
    running = session(clock, rounds=3)
    (fused, large, slow), _ = steps.compare(running, some, LAYER, "float32", Budget(0.0))
    assert len(fused.rounds) == 1  # the time was up, but a round is finished
    assert fused.bytes_per_element == 28 and fused.gbps and fused.copy_share
    assert "GiB of memory" in str(large.error) and "takes too long" in str(slow.error)
    assert running.wrong == {}


def test_a_step_is_prepared_before_it_is_timed() -> None:
    calls: list[str] = []
    step = Step(*(functools.partial(calls.append, name) for name in ("finish", "begin", "before")))
    CpuClock().wall_ms(step, 2)
    step()
    assert calls == ["before", "begin", "finish"] * 3
