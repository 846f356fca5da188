"""`benchmarks/gpu_check.sh` without a GPU: a dry run of every part, and what it says where one cannot run."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.speed.contender import BASELINE
from benchmarks.speed.measure import Session
from benchmarks.speed.record import Measurement

ROOT = Path(__file__).resolve().parents[2]


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


# Notes its arguments instead of starting what tests/benchmarks/test_speed_benchmark.py runs without a script around it:
# every such process would import torch. A test run that finds no marked test ends with 5.
INTERPRETER = """#!/bin/sh
printf '%s\\t' "$@" >>"$LINES"
echo >>"$LINES"
case "$2 $3" in
  pip*) exec "$REAL" "$@" ;;
  pytest*) exit 5 ;;
  "benchmarks speed") : >>"$RECORD" ;;
esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def some_measurement(part: str) -> Callable[[Session], None]:
    """In place of a part, as its own tests run it."""

    def run(running: Session) -> None:
        measured = Measurement(part, "w", "float32", BASELINE, False, "step", "ms", 1.0, 1.0, 1.0, [1.0])
        running.record.replace_part(part, [measured])

    return run


@pytest.mark.slow
def test_script_runs_every_part_and_reports_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    executable(tools / "ncu", '#!/bin/sh\necho "ncu $@"\n')
    executable(tools / "compute-sanitizer", '#!/bin/sh\necho "$@"\n[ "$2" = memcheck ] || exit 86\n')
    python = executable(tools / "python", INTERPRETER)
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "WHEELS": "/nonexistent", "PYTHON": str(python)}
    env |= {"REAL": sys.executable, "LINES": str(tmp_path / "lines"), "RECORD": str(out / "speed.json")}
    code, output = script(out, env=env)
    found = verdicts(output)
    assert found.pop("peers").startswith("failed: exit code")
    assert found.pop("racecheck") == "failed: exit code 86"  # as the tool ends when it finds something
    order = ["build", "cuda", "triton", "headline", "paths", "counters", "model", "memcheck", "tests", "steps", "host"]
    assert list(found) == order
    assert found.pop("tests") == found.pop("paths") == "skipped"
    assert set(found.values()) == {"passed"}, output
    assert code == 1
    assert f"--tool racecheck --error-exitcode 86 {python} -m benchmarks.speed.exercise cpu" in output
    assert (out / "check.log").read_text() == output

    lines = [line.split("\t")[1:-1] for line in (tmp_path / "lines").read_text().splitlines()]  # without -m
    exercise, pytest_run, benchmark = "benchmarks.speed.exercise", "pytest", "benchmarks"
    modules = ["pip", "pip", "ivon_kernels", exercise, exercise, benchmark, pytest_run, benchmark, pytest_run]
    assert [module for module, *_ in lines] == [*modules, *[benchmark] * 3]
    options = ["-m", "gpu", "-v", "-rf", "-W", "default", "-p", "no:cacheprovider"]
    assert lines[6] == lines[8] == [pytest_run, *options, "tests/kernels/test_noise.py"]
    assert lines[3] == lines[4] == [exercise, "cpu"]

    (out / "speed.json").unlink()
    monkeypatch.setattr("benchmarks.speed.run._PARTS", {p: some_measurement(p) for p in ("steps", "model", "host")})
    for _, *arguments in (line for line in lines if line[0] == benchmark):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    names = {path.name for path in out.iterdir()}
    assert names == {"check.log", "speed.json", "report.md"}  # and pictures, where times of some sizes are known
    record = json.loads((out / "speed.json").read_text())
    assert list(record["settings"]["parts"]) == ["steps", "model", "host"]  # merged into one record
    assert "Targets (the worst case of each): a dry run" in result.output


@pytest.mark.slow
def test_script_builds_with_cmake_where_pip_cannot(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake on the PATH")
    no_compilers = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc"}  # their trials take ten seconds
    code, output = script(tmp_path, "build", env={"PIP_CONSTRAINT": "/nonexistent/constraints", **no_compilers})
    assert code == 0, output
    assert "building with cmake" in output
    assert verdicts(output) == {"build": "passed"}


@pytest.mark.slow
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
