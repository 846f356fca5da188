"""The Triton kernels' PTX in the place of a GPU: the backend itself, with its tables and launches, on the CPU."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ivon_kernels.backends import Draw, Guard, Launch, triton
from ivon_kernels.backends.addresses import DTYPES
from ivon_kernels.backends.triton import TritonBackend
from ivon_kernels.backends.triton_launch import OPTIONS, Mirror
from ivon_kernels.lora import triton as lora
from ivon_kernels.lora.factor import Factor
from tests.support.kept import digest, kept
from tests.support.ptx.machine import program
from tests.support.ptx.memory import Global, Span, allocated, span_of

ROOT = Path(__file__).parents[3]
_DTYPES = ("float32", "bfloat16", "float16")
_SCRATCH = bytes(16)  # two pointers that Triton adds to every kernel's arguments


class _Compiler:
    """A process that compiles what the sources in a folder say, started when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, job: dict[str, Any]) -> str:
        """The answer, JSON."""
        if self._process is None:
            cache = tempfile.TemporaryDirectory()
            atexit.register(self._end, cache)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ptx.triton_compiler"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache.name},
                cwd=self._root,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the compiler ended at {job}"
        return answer

    def _end(self, cache: tempfile.TemporaryDirectory[str]) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        cache.cleanup()


_compiler = functools.cache(_Compiler)


class Device(NamedTuple):
    """What stands for a GPU.

    Attributes:
        gpu: Whose code it runs.
        seed: Of the order of warps and blocks; None: all in step.
        root: The folder whose sources are compiled.
        fusion: Whether products and sums are contracted.
        specialized: Whether these sources' kernels depend on the first launch's arguments.
    """

    gpu: str = "sm_90"
    seed: int | None = None
    root: Path = ROOT
    fusion: bool = False
    specialized: bool = False
    edit: Callable[[str], str] | None = None
    """What is done to the PTX."""

    def compiled(self, kernel: Any, flags: Sequence[object], arguments: Sequence[int]) -> tuple[str, int]:
        """PTX and bytes of shared memory."""
        import triton.language as tl

        names = {getattr(tl, name): name for name in _DTYPES}
        job: dict[str, Any] = {
            "module": kernel.fn.__module__,
            "kernel": kernel.fn.__name__,
            "gpu": self.gpu,
            "flags": [names[flag] if isinstance(flag, tl.dtype) else flag for flag in flags],
            "options": {**OPTIONS, "enable_fp_fusion": self.fusion},
        }
        classes = [(value == 1, value % 16 == 0) for value in arguments] if self.specialized else []
        sources = [*(self.root / "ivon_kernels").rglob("*triton*.py"), Path(__file__).with_name("triton_compiler.py")]
        name = digest((job, classes, importlib.metadata.version("triton")), sources)

        def write(path: Path) -> None:
            path.write_text(_compiler(self.root)({**job, "arguments": list(arguments)}))

        ptx, shared = json.loads(kept(f"ptx-{kernel.fn.__name__}-{name}.json", write).read_text())
        return ptx if self.edit is None else self.edit(ptx), shared


class Kernels:
    """Takes the place of the class ``Kernel`` of ivon_kernels/backends/triton_launch.py.

    Args:
        device: Runs them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.spans: Callable[[], list[Span]] = list
        """What the next launch may touch."""

    def __call__(self, kernel: Any, device: torch.device, flags: tuple[object, ...]) -> _Kernel:
        return _Kernel(self, self._device, kernel, flags)


class _Kernel:
    """One variant, compiled at its first launch and never again."""

    def __init__(self, kernels: Kernels, device: Device, kernel: Any, flags: tuple[object, ...]) -> None:
        self._kernels, self._device, self._kernel, self._flags = kernels, device, kernel, flags
        self._compiled: tuple[str, int] | None = None
        self._launches = 0

    def launch(self, programs: int, args: Sequence[int]) -> None:
        if self._compiled is None:
            self._compiled = self._device.compiled(self._kernel, self._flags, args)
        ptx, shared = self._compiled
        self._launches += 1
        seed = self._device.seed
        program(ptx, self._kernel.fn.__name__).run(
            programs,
            struct.pack(f"<{len(args)}q", *args) + _SCRATCH,
            Global(self._kernels.spans()),
            shared=shared,
            seed=None if seed is None else seed + self._launches,
        )


class PtxTritonBackend(TritonBackend):
    """Backend triton, with its kernels' PTX executed on tensors of the CPU."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if device.type == "cpu" and dtype in DTYPES else f"not {dtype} on {device}"

    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        self._allow(launch)
        super().sample(launch, draw, adopt)

    def restore(self, launch: Launch) -> None:
        self._allow(launch)
        super().restore(launch)

    def check(self, launch: Launch) -> None:
        self._allow(launch)
        super().check(launch)

    def accumulate(self, launch: Launch, draw: Draw) -> None:
        self._allow(launch)
        super().accumulate(launch, draw)

    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard = Guard()) -> None:  # noqa: B008
        self._allow(launch, guard)
        super().step(launch, draw, adopt, draw_next, guard)

    def _allow(self, launch: Launch, guard: Guard = Guard()) -> None:  # noqa: B008
        self._kernels.spans = lambda: [*spans_of(launch, guard), *_tables(launch.cache)]


def spans_of(launch: Launch, guard: Guard) -> list[Span]:
    """What the operations of every backend may touch: each tensor for itself, nothing between them."""
    spans = []
    for state in launch.states:
        spans.append(span_of(state.param.detach(), f"the weights of {state.name}"))
        spans += [span_of(getattr(state, key), f"{key} of {state.name}") for key in ("mean", "momentum", "hess")]
        for i, total in enumerate(state.sums or ()):
            spans.append(span_of(total, f"sum {i} of {state.name}"))
        for grad in {id(g): g for g in (state.grad, state.parameter.grad) if g is not None}.values():
            spans.append(span_of(grad, f"the gradient of {state.name}", read_only=True))
    for arena in dict.fromkeys(state.arena for state in launch.states):
        assert arena.flags is not None
        spans += allocated(("steps", arena.steps), ("flags", arena.flags.block), ("mailbox", arena.flags.mailbox))
    return spans + allocated(("found_inf", guard.found_inf), ("grad_scale", guard.grad_scale))


def _tables(plan: Any) -> list[Span]:
    """The tables of the Triton backend's plan."""
    mirrors = {name: mirror for name, mirror in vars(plan).items() if isinstance(mirror, Mirror)}
    for i, bucket in enumerate(plan.buckets):
        mirrors |= {f"{name} of bucket {i}": m for name, m in vars(bucket).items() if isinstance(m, Mirror)}
    tables = {name: mirror._table for name, mirror in mirrors.items()}
    return [span_of(table, name, read_only=True) for name, table in tables.items() if table is not None]


@contextlib.contextmanager
def ptx_triton(device: Device = Device()) -> Iterator[PtxTritonBackend]:  # noqa: B008
    """Within the block the Triton backend's and LoRA's kernels are PTX that `device` runs."""
    kernels = Kernels(device)
    with _replaced((triton, "Kernel", kernels), (triton, "interpreted", lambda: False)):
        triton._kernel.cache_clear()
        try:
            yield PtxTritonBackend(kernels)
        finally:
            triton._kernel.cache_clear()


class PtxLora:
    """``lora_samples_`` of the Triton kernels, run by a device."""

    def __init__(self, device: Device = Device()) -> None:  # noqa: B008
        self._kernels = Kernels(device)
        self._made: list[Tensor] = []
        self.cached = functools.cache(lora._kernel.__wrapped__)

    def __call__(
        self, out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]
    ) -> None:
        given = [(name, t, True) for name, t in (("x", x), ("a", a.mean), ("a's precision", a.inv_sigma))]
        given += [("b", b.mean, True), ("b's precision", b.inv_sigma, True), ("out", out, False)]
        spans = [span_of(tensor, name, read_only=read_only) for name, tensor, read_only in given]
        made: list[Span] = []
        self._kernels.spans = lambda: [*spans, *made]

        def empty(*sizes: Any, **options: Any) -> Tensor:
            """What the kernels share: nobody has written it."""
            tensor = torch.empty(*sizes, **options)
            self._made.append(tensor)
            made.append(span_of(tensor, "h"))
            return tensor

        namespace = _Torch(empty)
        with _replaced(
            (lora, "Kernel", self._kernels),
            (lora, "interpreted", lambda: False),
            (lora, "_kernel", self.cached),
            (lora, "torch", namespace),
        ):
            lora.lora_samples_(out, x, a, b, scaling, seed, samples)
        self._made.clear()


class _Torch:
    """PyTorch with another ``empty``."""

    def __init__(self, empty: Callable[..., Tensor]) -> None:
        self.empty = empty

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def _replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(places, before, strict=True):
            setattr(owner, name, value)
