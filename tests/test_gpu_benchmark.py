"""The GPU benchmark without a GPU: script and command as dry runs, byte counts, and the logic of the targets."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.gpu import compiled, contenders, exercise, host, traffic, verify, workloads
from benchmarks.gpu.dispatch import dispatch_table
from benchmarks.gpu.measure import Comparison, Row, timing
from benchmarks.gpu.run import comparison_from
from benchmarks.gpu.targets import host_targets, model_targets, step_targets, target
from benchmarks.speed.measure import Timing
from ivon_kernels import noise

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


# ---- the script ------------------------------------------------------------------------------------------------------


def script(out: Path, *parts: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")
    result = subprocess.run(
        ["benchmarks/gpu_check.sh", "--dry-run", str(out), *parts],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return result.returncode, result.stdout


def verdicts(output: str) -> dict[str, str]:
    lines = [line for line in output.partition("== summary\n")[2].splitlines() if " s  " in line]
    return {line.split()[0]: line.partition(" s  ")[2] for line in lines}


@pytest.mark.slow
def test_script_runs_every_part_and_reports_one_that_fails(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$@"\nshift 4\nexec "$@"\n')
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "WHEELS": "/nonexistent"}
    code, output = script(tmp_path / "out", env=env)
    found = verdicts(output)
    assert found.pop("peers").startswith("failed: exit code")
    assert found.pop("tests") in ("passed", "skipped")  # skipped: no test in the dry run's file is marked
    assert found == dict.fromkeys(
        ("build", "exercise", "memcheck", "racecheck", "kernels", "model", "host"), "passed"
    ), output
    assert code == 1  # for the peers
    assert "--tool racecheck --error-exitcode 86" in output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.log", "kernels.json", "kernels.png", "model.json", "host.json", "targets.json"}
    assert len(names) <= 8
    assert (tmp_path / "out" / "check.log").read_text() == output
    assert "Targets (the worst case of each): a dry run" in output[-10_000:]


def test_script_builds_with_cmake_where_pip_cannot(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the PATH")
    code, output = script(tmp_path, "build", env={"PIP_CONSTRAINT": "/nonexistent/constraints"})
    assert code == 0, output
    assert "building with cmake" in output
    assert verdicts(output) == {"build": "passed"}


def test_script_installs_wheels_that_were_carried(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_peer.py", "")
        info = "some_peer-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-peer\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    code, output = script(tmp_path / "out", "peers", env={"WHEELS": str(wheels)})
    assert code == 0, output
    assert verdicts(output) == {"peers": "passed"}


def test_script_says_what_could_not_run_and_how_it_is_called(tmp_path: Path) -> None:
    code, output = script(tmp_path, "peers")
    assert code == 0
    assert "no folder of wheels was given" in output
    assert verdicts(output) == {"peers": "skipped"}
    usage = subprocess.run([ROOT / "benchmarks/gpu_check.sh", "--fast"], capture_output=True, text=True)
    assert usage.returncode == 2
    assert usage.stderr.startswith("usage: ")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("benchmarks.gpu.run.DRY_WORKLOADS", workloads.DRY_WORKLOADS[1:])
    monkeypatch.setattr("benchmarks.gpu.run.DTYPES", {"bfloat16": torch.bfloat16})


def call(out: Path, *options: str) -> tuple[int, str]:
    given = ["gpu", "--dry-run", "--rounds=1", "--turn-ms=1", f"--out={out}", *options]
    result = CliRunner().invoke(app, given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


@pytest.mark.usefixtures("few_and_quick")
def test_command_measures_checks_and_records(tmp_path: Path) -> None:
    code, output = call(tmp_path, "--parts=kernels")
    assert code == 0, output
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["dry_run"] is True
    assert record["environment"]["versions"]["torch"]
    (comparison,) = record["comparisons"]
    rows = {row["name"]: row for row in comparison["rows"]}
    ours = rows["ivon_kernels cpu, sample + step"]
    assert ours["error"] is None
    assert ours["bytes_per_element"] == 42
    for kind in ("kernel", "wall", "host"):
        assert 0 < ours[kind]["p20"] <= ours[kind]["p50"] <= ours[kind]["p80"]
        assert rows["AdamW (fused)"][kind]["ratio"] == 1
    assert [row["backend"] for row in record["dispatch"]] == ["cpu", "cpu"]
    assert comparison_from(comparison).rows[0].kernel == Timing(**rows["AdamW (fused)"]["kernel"])
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert "Faster backend" in output


@pytest.mark.usefixtures("few_and_quick")
def test_wrong_results_are_not_timed_and_fail_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.torch, "equal", lambda *_: False)
    code, output = call(tmp_path, "--parts=kernels")
    assert code == 1
    record = json.loads((tmp_path / "kernels.json").read_text())
    rows = {row["name"]: row for row in record["comparisons"][0]["rows"]}
    assert rows["ivon_kernels cpu, sample + step"]["kernel"] is None
    assert rows["AdamW (fused)"]["kernel"] is not None
    assert "differs from the reference" in output
    assert len(record["wrong"]) == 2


@pytest.mark.usefixtures("few_and_quick")
def test_a_missing_peer_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.contenders.version", lambda package: None)
    monkeypatch.setattr("benchmarks.gpu.model.version", lambda package: None)
    code, output = call(tmp_path, "--parts=kernels,model")
    assert code == 0
    assert "ivon-opt is not installed" in output
    assert json.loads((tmp_path / "model.json").read_text())["skipped"] == "transformers is not installed"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.usefixtures("few_and_quick")
def test_training_step_of_a_toy_model(tmp_path: Path) -> None:
    code, output = call(tmp_path, "--parts=model")
    assert code == 0, output
    record = json.loads((tmp_path / "model.json").read_text())
    assert record["lora"] == {"rank": 2, "elements": 256, "tensors": 8}
    rows = {row["name"]: row for row in record["rows"]}
    for name in ("AdamW (fused)", "ivon_kernels cpu, sample + step", "ivon-opt 0.1.3"):
        assert rows[name]["error"] is None, rows[name]
        assert rows[name]["ratio"] > 0
    assert {t.name: t.measured for t in model_targets(record)}["7B LoRA training step: IVON / fused AdamW"] is not None


def test_command_refuses_with_one_sentence(tmp_path: Path) -> None:
    assert call(tmp_path, "--parts=kernel")[0] == 2
    if not torch.cuda.is_available():
        result = CliRunner().invoke(app, ["gpu", f"--out={tmp_path}"])
        assert result.exit_code == 2
        assert "there is no CUDA device" in result.output


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_workloads_are_those_of_the_issue() -> None:
    sizes = {w.name: (len(w.shapes), w.elements) for w in workloads.WORKLOADS}
    assert sizes == {
        "lora-r8-qv": (128, 4_194_304),
        "lora-r16-qv": (128, 8_388_608),
        "lora-r16-all": (448, 39_976_960),
        "flat-400000000": (1, 400_000_000),
        "flat-1000000000": (1, 1_000_000_000),
        "128-tiny": (128, 131_072),
        "450-tiny": (450, 460_800),
    }


def test_bytes_per_element() -> None:
    counts = {
        c.name: (c.bytes_per_element(torch.float32), c.bytes_per_element(torch.bfloat16))
        for c in contenders.contenders(torch.device("cuda"))
    }
    assert counts == {
        "AdamW (fused)": (28, 14),
        "AdamW (foreach)": (28, 14),
        "optimi AdamW (triton)": (28, 18),
        "ivon_kernels triton, sample + step": (52, 42),
        "ivon_kernels triton, step with next sample": (36, 30),
        "ivon_kernels cuda, sample + step": (52, 42),
        "ivon_kernels cuda, step with next sample": (36, 30),
        "IVON equations, torch.compile": (44, 38),
        "ivon-opt 0.1.3": (44, 38),
    }
    assert traffic.bytes_per_element(("step",), torch.float32) == 32  # the issue's figure


def test_compiled_reference_draws_the_specified_noise() -> None:
    mean = torch.zeros(4099)
    drawn = compiled.normals(mean, torch.tensor(7))
    assert torch.equal(drawn, noise.normals(4099, seed=0, step=7))


def test_exercise_equals_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main("cpu") == 0
    assert exercise.main("nothing") == 77
    assert "no backend 'nothing'" in capsys.readouterr().out


def test_host_rows_have_quantiles_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "TINY", host.TINY[:1])
    rows = host.measure(repeats=2)["rows"]
    assert {row["tensors"] for row in rows} == {128}
    for row in rows:
        assert row["error"] is None or "no C++ compiler" in row["error"]
        assert row["error"] or row["fresh"]["both"]["p50"] > 0


# ---- targets ---------------------------------------------------------------------------------------------------------


def times(ms: float, ratio: float | None) -> Timing:
    return Timing("", ms, ms, ms, ratio)


def comparison(
    workload: str, tensors: int, elements: int, *rows: tuple[str, str | None, str | None, float]
) -> Comparison:
    """Rows: name, backend, mode, and milliseconds of a step; the first row is the baseline of the ratios."""
    base = rows[0][3]
    made = []
    for name, backend, mode, ms in rows:
        t = times(ms, ms / base)
        bandwidth = 36 * elements / ms / 1e6
        made.append(Row(name, backend, mode, 36, t, t, t, bandwidth, bandwidth / 3000, 20.0))
    return Comparison(workload, workload, "float32", tensors, elements, 3000.0, 3, made)


def by_name(comparisons: list[Comparison]) -> dict[str, Any]:
    return {t.name: t for t in step_targets(comparisons)}


def test_target_takes_the_worst_case_and_says_by_how_much() -> None:
    low = target("at most", 1.2, [("a", 1.0), ("b", 1.5)])
    assert (low.measured, low.where, low.met) == (1.5, "b", False)
    assert low.margin == pytest.approx(-0.25)
    high = target("at least", 0.88, [("a", 0.95), ("b", 0.90)], at_least=True)
    assert (high.measured, high.where, high.met) == (0.90, "b", True)
    nothing = target("not measured", 1.0, [])
    assert nothing.measured is None
    assert not nothing.met
    assert nothing.record()["margin"] is None


def test_step_targets_take_the_faster_backend() -> None:
    small = comparison(
        "lora-r8-qv",
        128,
        4_194_304,
        ("AdamW (fused)", None, None, 0.1),
        ("t", "triton", "plain", 0.09),
        ("c", "cuda", "plain", 0.08),
        ("ivon-opt 0.1.3", None, None, 2.0),
    )
    found = by_name([small])
    assert found["LoRA: wall time sample + step / fused AdamW"].measured == pytest.approx(0.8)
    assert found["LoRA: wall time sample + step / fused AdamW"].where == "lora-r8-qv, float32, cuda"
    assert found["128 tensors: wall time sample + step / fused AdamW"].met
    assert found["4.2M: wall time ivon-opt / sample + step"].measured == pytest.approx(25.0)
    assert found["40M and above: bandwidth / copy, one launch"].measured is None


def test_one_launch_is_held_against_adamw_and_against_its_bytes() -> None:
    huge = comparison(
        "flat-400000000",
        1,
        400_000_000,
        ("AdamW (fused)", None, None, 4.0),
        ("c", "cuda", "one launch", 4.8),
    )
    found = by_name([huge])
    ours = "one launch / fused AdamW, float32, 400M and 1B"
    assert found[f"{ours}: kernel time"].measured == pytest.approx(1.2)
    # 28 bytes * 400M / 3000 GB/s = 3.733 ms
    assert found[f"{ours}: its bytes at the copy's speed"].measured == pytest.approx(4.8 / 3.7333, rel=1e-3)
    # 36 bytes * 400M / 4.8 ms = 3000 GB/s
    assert found["40M and above: bandwidth / copy, one launch"].measured == pytest.approx(1.0)


def test_rows_that_failed_do_not_count() -> None:
    failed = Row("c", "cuda", "plain", 52, error="no device")
    missing = Comparison("lora-r8-qv", "", "float32", 128, 4_194_304, 3000.0, 1, [failed])
    assert all(t.measured is None for t in step_targets([missing]))
    assert [row["backend"] for row in dispatch_table([missing])] == [None, None]


def test_model_and_host_targets() -> None:
    def row(backend: str, ratio: float, extra: float) -> dict[str, Any]:
        return {"name": backend, "mode": "plain", "error": None, "ratio": ratio, "extra_bytes_per_element": extra}

    time, memory = model_targets({"rows": [row("triton", 1.02, 4.0), row("cuda", 1.005, 5.0)]})
    assert (time.measured, time.met, memory.measured, memory.met) == (1.005, True, 5.0, True)
    assert [t.measured for t in model_targets({"skipped": "peft is not installed"})] == [None, None]
    times = {"same": {"both": {"p50": 27.0}}, "fresh": {"both": {"p50": 33.0}}}
    row_of_step = {"name": "cuda", "share": "step", "error": None, "tensors": 128, **times}
    found = {t.name: t for t in host_targets({"rows": [row_of_step]})}
    assert len(found) == 8  # path or whole step, 128 or 450 tensors, gradients that are the same or fresh
    same, fresh = (found[f"128 tensors: microseconds of the host, train() + step(), {s} gradients"] for s in times)
    assert (same.measured, same.met, fresh.measured, fresh.met) == (27.0, True, 33.0, False)
    assert fresh.margin == pytest.approx(-0.1)
    assert [t.measured for t in found.values()].count(None) == 6


def test_ratio_is_taken_round_by_round() -> None:
    drift = timing("x", [[2.0] * 3, [20.0] * 3], [[1.0] * 3, [10.0] * 3])
    assert drift.ratio == 2.0
    assert timing("x", [[2.0] * 3], None).ratio is None


def test_dispatch_names_the_faster_backend() -> None:
    rows = (("t", "triton", "plain", 0.09), ("c", "cuda", "plain", 0.06))
    table = dispatch_table([comparison("128-tiny", 128, 131_072, *rows)])
    assert table[0]["backend"] == "cuda"
    assert table[0]["margin"] == pytest.approx(1.5)
    assert table[1]["backend"] is None


def test_refusals_of_the_flat_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat tensor's last elements are checked against the public noise."""
    monkeypatch.setattr(verify, "PREFIX", 100)
    reference = verify.Reference(workloads.DRY_WORKLOADS[1], torch.float32, CPU)
    ours = contenders.contenders(CPU)[1]
    assert reference.check(ours) is None
    other = noise.normals

    def shifted(numel: int, **given: Any) -> torch.Tensor:
        return other(numel, **{**given, "step": given["step"] + 1})

    monkeypatch.setattr(verify.noise, "normals", shifted)
    assert "the last elements" in str(reference.check(ours))
