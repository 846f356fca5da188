"""`benchmarks/gpu_check.sh` without a GPU: a dry run of every part, and what it says where one cannot run."""

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

import pytest

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


@pytest.mark.slow
def test_script_runs_every_part_and_reports_one_that_fails(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$@"\n[ "$2" = memcheck ] || exit 86\n')
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IXUSR)
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "WHEELS": "/nonexistent"}
    code, output = script(tmp_path / "out", env=env)
    found = verdicts(output)
    assert found.pop("peers").startswith("failed: exit code")
    assert found.pop("racecheck") == "failed: exit code 86"  # as the tool ends when it finds something
    assert found.pop("tests") in ("passed", "skipped")  # skipped: no test in the dry run's file is marked
    assert found == dict.fromkeys(("build", "exercise", "memcheck", "steps", "model", "host"), "passed"), output
    assert code == 1
    assert f"--tool racecheck --error-exitcode 86 {sys.executable} -m benchmarks.speed.exercise cpu" in output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.log", "speed.json", "report.md", "speed.png", "roofline.png"}
    record = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert list(record["settings"]["parts"]) == ["steps", "model", "host"]  # merged into one record
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
