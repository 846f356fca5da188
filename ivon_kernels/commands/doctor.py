"""``ivon-kernels backends`` and ``ivon-kernels doctor``: which backends work here, and whether they are right.

The table says why a backend is missing. The doctor takes two steps with each backend on each device and compares the
bits of the weights with the reference's.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
import typer
from torch import Tensor, nn

from ivon_kernels import available_backends
from ivon_kernels._native import build_info
from ivon_kernels._version import __version__
from ivon_kernels.backends import addresses, choose, cpu
from ivon_kernels.commands.console import show, table
from ivon_kernels.extras import HF, LIGHTNING, REPORT
from ivon_kernels.optimizer import IVON

__all__ = ["backends", "doctor", "table_unless_invoked"]

_EXTRAS = {
    HF: ("transformers", "peft", "accelerate"),
    LIGHTNING: ("lightning",),
    REPORT: ("matplotlib", "scikit-learn", "torchmetrics"),
}
_DTYPES = (torch.float32, torch.bfloat16)


def table_unless_invoked(context: typer.Context) -> None:
    """What no command does: the table of backends."""
    if context.invoked_subcommand is None:
        backends()


def backends() -> None:
    """Which backends work on this machine, and why the others do not."""
    missing = available_backends()
    rows = [(name, "no" if reason else "yes", reason or _about(name)) for name, reason in missing.items()]
    slower = addresses.unavailable()
    show(
        f"ivon_kernels {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.platform()}\n",
        table(("backend", "available", ""), rows),
        f"\ngradients' addresses are read in {'Python: ' + slower if slower else 'C'}",
    )


def doctor() -> None:
    """Check this installation: backends, further packages, and two steps with each backend, compared bit by bit.

    Exit code 1 if a backend is wrong.
    """
    backends()
    show("", table(("extra", "packages", ""), [(extra, *_packages(names, extra)) for extra, names in _EXTRAS.items()]))
    checks = list(_checks())
    if not checks:
        show("\nThe reference, plain PyTorch, is the only backend here.")
        return
    rows = [
        (check.backend, str(check.device), str(check.dtype).removeprefix("torch."), check.problem or "ok")
        for check in checks
    ]
    show("", table(("backend", "device", "weights", "two steps"), rows))
    if wrong := sum(check.problem is not None for check in checks):
        show(f"\n{wrong} of {len(checks)} checks failed.")
        raise typer.Exit(1)
    show("\nEvery backend that is available has the bits of the reference.")


def _about(name: str) -> str:
    """What is worth knowing of a backend that is available."""
    if name == "reference":
        return "plain PyTorch, on any device"
    if name == "cpu":
        info = build_info()
        threads = f"{torch.get_num_threads()} threads" if info["openmp"] else "1 thread (built without OpenMP)"
        return f"SIMD {cpu.simd_level()} (built: {', '.join(info['simd_levels'])}); {threads}; {info['compiler']}"
    return ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))) or "no GPU"


def _packages(names: tuple[str, ...], extra: str) -> tuple[str, str]:
    """Which of an extra's packages are here, and how to get those that are not."""
    found = {name: _version(name) for name in names}
    missing = [name for name, number in found.items() if number is None]
    here = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    return here or "none", f"without {', '.join(missing)}: pip install {extra}" if missing else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


class _Check(NamedTuple):
    backend: str
    device: torch.device
    dtype: torch.dtype
    problem: str | None


def _checks() -> Iterator[_Check]:
    expected = {dtype: _stepped("reference", torch.device("cpu"), dtype) for dtype in _DTYPES}
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for name, missing in available_backends().items():
        others = devices[1:] if name == "reference" else devices  # it is what the CPU's backends are compared with
        for device in others if missing is None else ():
            for dtype in _DTYPES:
                if not _takes(name, device, dtype):
                    continue
                try:
                    same = torch.equal(_stepped(name, device, dtype), expected[dtype])
                except Exception as error:  # whatever a driver or a compiler says: it is what this command is for
                    yield _Check(name, device, dtype, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())}")
                else:
                    yield _Check(name, device, dtype, None if same else "WRONG: not the reference's bits")


def _takes(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a backend takes such weights."""
    try:
        choose(name, device, dtype)
    except ValueError:
        return False
    return True


def _stepped(backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights after two steps down a bowl, on the CPU. Its gradient, the weights themselves, is exact everywhere."""
    start = torch.linspace(-1, 1, 1001, dtype=torch.float64, device="cpu").to(device, dtype)
    weights = nn.Parameter(start)
    optimizer = IVON([weights], lr=0.1, ess=100.0, weight_decay=0.01, beta2=0.9, seed=1, backend=backend)
    for _ in range(2):
        optimizer.train()
        weights.grad = weights.detach().clone()
        optimizer.step()
    return weights.detach().cpu()
