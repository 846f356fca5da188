"""``python -m ivon_kernels``: the table, or one sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ivon_kernels import available_backends
from ivon_kernels.__main__ import main


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["--json", "1"]], ids=" ".join)
def test_what_it_does_not_know_ends_in_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("Error: python -m ivon_kernels: ") and any(word in said.err for word in arguments)
    assert said.err.count("\n") == 1


def test_the_table_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr()
    assert said.err == "" and all(f"\n{name} " in said.out for name in available_backends())


@pytest.mark.slow
def test_the_command_itself() -> None:
    wrong = subprocess.run([sys.executable, "-m", "ivon_kernels", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    right = subprocess.run([sys.executable, "-m", "ivon_kernels"], capture_output=True, text=True)
    assert right.returncode == 0 and "reference" in right.stdout


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "which backends work" in (text := capsys.readouterr().out)
    assert "demo" in text
