"""``ivon-kernels``, and ``python -m ivon_kernels``: the table, the doctor, help, or one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ivon_kernels import available_backends
from ivon_kernels.backends import override
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.commands import doctor
from ivon_kernels.commands.app import main

ROOT = Path(__file__).parents[2]


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command ends in."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["--json", "1"]], ids=" ".join)
def test_what_it_does_not_know_ends_in_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(*arguments, capsys=capsys)
    assert error.startswith("Error: ivon-kernels: ") and any(word in error for word in arguments)


def test_a_group_without_a_command_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused("posterior", capsys=capsys) == "Error: ivon-kernels posterior: Missing command.\n"


@pytest.mark.parametrize("arguments", [[], ["backends"]], ids=["nothing", "backends"])
def test_the_table_names_every_backend(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    said = capsys.readouterr()
    assert said.err == "" and all(f"\n{name} " in said.out for name in available_backends())


def test_the_table_is_not_wrapped_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with override("far", Unavailable()):
        main([])
    assert re.search(rf"^far +no +{Unavailable.why}", capsys.readouterr().out, re.MULTILINE)


class Unavailable(ReferenceBackend):
    why = "it is " + "far " * 80 + "away"

    def unavailable(self) -> str | None:
        return self.why


@pytest.mark.slow
def test_the_command_itself() -> None:
    wrong = subprocess.run([sys.executable, "-m", "ivon_kernels", "nonsense"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("Error: python -m ivon_kernels: ")
    right = subprocess.run([sys.executable, "-m", "ivon_kernels"], capture_output=True, text=True)
    assert right.returncode == 0 and "reference" in right.stdout


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--help", "-h"):
        main([option])
        text = capsys.readouterr().out
        assert "which backends work" in text.lower()
        assert all(name in text for name in ("backends", "doctor", "demo", "convert", "posterior"))


def test_the_console_script_is_this_command() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nivon-kernels = "{main.__module__}:{main.__name__}"\n' in text


# ---- doctor ----------------------------------------------------------------------------------------------------------


def test_a_healthy_installation(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    said = capsys.readouterr()
    assert said.err == "" and said.out.startswith("ivon_kernels ")
    if available_backends()["cpu"] is None:
        assert re.search(r"^cpu +cpu +bfloat16 +ok", said.out, re.MULTILINE)
        assert said.out.endswith("\nEvery backend that is available has the bits of the reference.\n")
    assert re.search(r"^'ivon-kernels\[hf\]' +transformers [\d.]+, peft [\d.]+, accelerate [\d.]+ *$", said.out, re.M)


def test_a_wrong_backend_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    true = doctor._stepped

    def off_by_a_bit(backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        weights = true("reference", device, dtype)
        if backend == "odd":
            weights[-1] = torch.nextafter(weights[-1], weights[-1] + 1)
        return weights

    monkeypatch.setattr(doctor, "_stepped", off_by_a_bit)
    only(monkeypatch, "odd")
    failed = doctor_fails(capsys)
    assert re.search(r"^odd +cpu +float32 +WRONG: not the reference's bits", failed, re.MULTILINE)
    assert failed.endswith("\n2 of 2 checks failed.\n")


def test_a_backend_that_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(ReferenceBackend):
        def step(self, *arguments: object, **options: object) -> None:
            raise RuntimeError("the driver\nis gone")

    only(monkeypatch, "broken")
    with override("broken", Broken()):
        failed = doctor_fails(capsys)
    assert re.search(r"^broken +cpu +float32 +FAILED: RuntimeError: the driver is gone", failed, re.MULTILINE)


def test_the_reference_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch)
    main(["doctor"])
    assert "the only backend here." in capsys.readouterr().out


def test_missing_packages_and_their_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("lightning", "peft") else true(name))
    only(monkeypatch)
    main(["doctor"])
    said = capsys.readouterr().out
    assert re.search(r"^'ivon-kernels\[hf\]' .*accelerate.* without peft: pip install 'ivon-kernels\[hf\]'", said, re.M)
    assert re.search(r"^'ivon-kernels\[lightning\]' +none +without lightning: pip install", said, re.M)


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The reference and these are the backends that the doctor sees; they take what it takes."""
    monkeypatch.setattr(doctor, "available_backends", lambda: dict.fromkeys((*names, "reference")))
    monkeypatch.setattr(doctor, "_takes", lambda name, device, dtype: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def doctor_fails(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.err == ""
    return said.out
