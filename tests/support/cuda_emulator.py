"""The CUDA backend's emulator, and pairs of equal training states for the backend and the reference."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ivon_kernels import backends
from ivon_kernels.backends.base import Draw
from ivon_kernels.backends.cuda import CudaBackend
from ivon_kernels.backends.reference import ReferenceBackend
from ivon_kernels.backends.state import NOTHING_BAD
from ivon_kernels.backends.triton import TritonBackend
from ivon_kernels.backends.triton_launch import interpreted
from tests.support.kept import digest, kept
from tests.support.kernel_state import GROUP, KernelState

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "launch.cu"
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra")
# Ends the process at an access that is not aligned as a GPU needs it, and at an overflow.
TRAPS = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
GROUPS = (GROUP, {**GROUP, "lr": 0.03, "beta1": 0.5, "clip_radius": 0.02}, {**GROUP, "ess": 3.0, "debias": False})
DRAW = Draw(seed=2**64 - 3, sample=0, replica=3)


@functools.cache
def emulator() -> CudaBackend:
    """The backend on a library in which loops stand for blocks and threads."""
    backend = CudaBackend(str(_library()))
    assert backend.unavailable() is None
    return backend


@contextlib.contextmanager
def emulated(backend: str) -> Iterator[None]:
    """If `backend` is ``cuda`` that is the emulator within the block; skips the test if no compiler makes it."""
    if backend != "cuda":
        yield
        return
    if COMPILER is None:
        pytest.skip("no C++ compiler was found, which makes the emulator of backend cuda")
    with backends.override("cuda", emulator()):
        yield


def _library() -> Path:
    """Compiles it, once for each state of the sources."""
    command = [str(COMPILER), *FLAGS, *TRAPS, "-DIVON_EMULATE", "-shared", "-fPIC"]

    def make(path: Path) -> None:
        whole = [*command, "-x", "c++", str(SOURCE), "-o", str(path)]
        result = subprocess.run(whole, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and not result.stderr, result.stderr

    name = digest(command, SOURCE.parents[1].rglob("*.[hc]*"))
    return kept(f"libivon_cuda_emulated-{name}.so", make)


def backend_on(where: str) -> CudaBackend:
    """The emulator, or the backend itself on a GPU where there is one."""
    backend = emulator() if where == "emulator" else CudaBackend()
    if reason := backend.unavailable():
        pytest.skip(f"the cuda backend: {reason}")
    return backend


OFFSETS = {"unaligned": 1, "aligned to 8 bytes": 2}  # elements, of float32


def shifted(values: Tensor, offset: int) -> Tensor:
    """A contiguous copy that starts some elements after an aligned address."""
    return torch.empty(values.numel() + offset, dtype=values.dtype)[offset:].view(values.shape).copy_(values)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy with the same values and other strides or alignment."""
    if layout == "transposed":
        return values.movedim(0, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 0)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "every other":
        return torch.empty(*values.shape, 2, dtype=values.dtype)[..., 0].copy_(values)
    if layout in OFFSETS:
        return shifted(values, OFFSETS[layout])
    return values.clone()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides and offset, in memory of its own."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = int(tensor.storage_offset()) + (last + 1 if tensor.numel() else 0)
    flat = torch.empty(count, dtype=tensor.dtype, device=device)
    return flat.as_strided(tensor.shape, tensor.stride(), int(tensor.storage_offset())).copy_(tensor)


def device_of(backend: Any) -> torch.device:
    """A GPU for what runs on one: the cuda backend itself, and triton where it is not interpreted."""
    on_gpu = isinstance(backend, TritonBackend) and not interpreted()
    on_gpu |= isinstance(backend, CudaBackend) and not backend.emulated
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


class Side(KernelState):
    """Parameters with state and everything that an optimizer keeps around them, in some known middle of training."""

    def __init__(
        self,
        backend: Any,
        weights: Sequence[Tensor],
        groups: Sequence[dict[str, Any]] = (GROUP,),
        indices: Sequence[int] | None = None,
        steps: int = 2,
        arenas: int = 1,
    ) -> None:
        count = len(weights)
        super().__init__(
            backend,
            [moved(w, device_of(backend)) for w in weights],
            groups,
            group_of=[i % len(groups) for i in range(count)],
            indices=range(count) if indices is None else indices,
            arenas=arenas,
        )
        generator = torch.Generator().manual_seed(1)
        for arena in self.arenas:
            for flat in (arena.mean, arena.momentum, arena.hess, *arena.clear_sums()):
                flat.fill_(7.0)  # the padding must stay as it is
        for slot, w in zip(self.slots, weights, strict=True):
            slot.arena.steps[slot.position] = steps + slot.position % 3
            slot.summed = True
            slot.mean.copy_(w.float())
            slot.momentum.copy_(torch.randn(w.shape, generator=generator) * 0.1)
            slot.hess.copy_(torch.rand(w.shape, generator=generator) + 0.1)
            for total in slot.sums or ():
                total.zero_()
            slot.summed = False

    def set_grads(self, grads: Sequence[Tensor | None]) -> None:
        super().set_grads([None if grad is None else moved(grad, self.device) for grad in grads])

    def set_summed(self, summed: Sequence[bool]) -> None:
        for slot, flag in zip(self.slots, summed, strict=True):
            slot.summed = flag
        self.list.summed = any(summed)

    def everything(self) -> list[Tensor]:
        """All that an operation may write, the padding between tensors included."""
        flats = [[a.mean, a.momentum, a.hess, a.grad_sum, a.second_sum] for a in self.arenas]
        numbers = [flat for part in flats for flat in part if flat is not None]
        return [t.cpu() for t in (*self.params, *numbers, *(arena.steps for arena in self.arenas))]


def assert_same(reference: Side, device: Side) -> None:
    for a, b in zip(reference.everything(), device.everything(), strict=True):
        assert torch.equal(a, b)
    assert device.flags.block.tolist() == [NOTHING_BAD, 0, 0, 0, 0, 0, 0, 0]


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def grads_like(weights: Sequence[Tensor], dtype: torch.dtype | None = None, seed: int = 9) -> list[Tensor]:
    return [randn(*w.shape, dtype=dtype or w.dtype, seed=seed + i) for i, w in enumerate(weights)]


def both(cuda: CudaBackend, weights: Sequence[Tensor], **options: Any) -> tuple[Side, Side]:
    return Side(ReferenceBackend(), weights, **options), Side(cuda, weights, **options)


def train(
    sides: tuple[Side, Side],
    grads: Sequence[Tensor | None],
    *,
    draw: Draw = DRAW,
    adopt: bool = False,
    draw_next: bool = False,
) -> None:
    """Sample, restore, sample again, step; compare after each."""
    for operation in ("sample", "restore", "sample", "step"):
        for side in sides:
            if operation == "sample":
                side.backend.sample(side.list, draw, True)
            elif operation == "restore":
                side.backend.restore(side.list)
            else:
                side.set_grads(grads)
                if adopt:
                    side.backend.restore(side.list)
                    side.params[0].view(-1)[::2] += 1.0
                side.backend.step(side.list, draw, adopt, draw_next)
        assert_same(*sides)
