"""The Triton backend: one launch for all tensors of a bucket, on GPUs of NVIDIA, AMD and Intel.

A bucket is what one compiled kernel takes: tensors of one parameter dtype and one gradient dtype, in any arenas,
aligned or not (see triton_memory.py), whole tensors or shards of one kind. Nothing here waits for the device.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ivon_kernels.backends.addresses import DTYPES
from ivon_kernels.backends.base import Draw, Guard, Launch
from ivon_kernels.backends.device import DeviceBackend
from ivon_kernels.backends.state import Arena, ParamState
from ivon_kernels.backends.triton_launch import Kernel, Mirror, installed, interpreted, is_capturing
from ivon_kernels.noise import MIRROR, SIGNS

_DTYPE_NAMES = ("float32", "bfloat16", "float16")
_BLOCK = 1024  # elements at a time: 8 a thread ...
_AWKWARD_BLOCK = 512  # ... or 4, where index arithmetic needs the registers
_INTERPRETED_BLOCK = 128
_PROGRAMS = 2048  # enough for the largest GPUs; beyond, programs take several blocks
_MAX_PASSES = 8
_FINAL, _REPORT = 1, 2
_COLUMNS = 16
_WHOLE, _ALIGNED, _ANY = range(3)  # where a bucket's elements are in the unsharded tensors
_UNGUARDED = Guard()


@functools.cache
def _kernel(operation: str, device: torch.device, flags: tuple[object, ...]) -> Kernel:
    """One variant of a kernel, for all optimizers. Importing Triton takes a while: not before it is needed."""
    from ivon_kernels.backends import triton_kernels

    return Kernel(getattr(triton_kernels, f"{operation}_kernel"), device, flags)


class _Key(NamedTuple):
    """What the parameters of one bucket have in common."""

    dtype: int
    grad_dtype: int
    awkward: bool
    shard: int


def _shard_kind(state: ParamState) -> int:
    shard, numel = state.placement, state.param.numel()
    if numel == 0 or (shard.start == 0 and shard.run >= numel):
        return _WHOLE
    return _ALIGNED if shard.aligned else _ANY


class _Bucket:
    """The parameters of one compiled kernel: what they have in common, and which program takes which elements."""

    def __init__(self, key: _Key, members: list[int], numels: list[int], device: torch.device) -> None:
        import triton.language as tl

        self.dtype = getattr(tl, _DTYPE_NAMES[key.dtype])
        self.grad_dtype = getattr(tl, _DTYPE_NAMES[key.grad_dtype])
        self.awkward, self.shard = key.awkward, key.shard
        small = self.awkward or self.shard == _ANY
        self.block = _INTERPRETED_BLOCK if interpreted() else _AWKWARD_BLOCK if small else _BLOCK
        self.members = array("q", members)
        blocks = sum(-(-numels[slot] // self.block) for slot in members)
        self.passes = 1
        while self.passes < _MAX_PASSES and blocks > 2 * self.passes * _PROGRAMS:
            self.passes *= 2
        size = self.block * self.passes
        self.chunks = array("q")
        for slot in members:  # an empty tensor has a program, too: every launch has a last one
            self.chunks.extend(range(slot << 32, (slot << 32) + max(1, -(-numels[slot] // size))))
        self._members = Mirror(device, lambda: self.members)
        self._chunks = Mirror(device, lambda: self.chunks)
        self._kernels: dict[tuple[object, ...], Kernel] = {}
        self._device = device

    def tables(self, capturing: bool) -> tuple[int, int]:
        """Of the chunks and of the members."""
        return self._chunks.address(0, capturing), self._members.address(0, capturing)

    def kernel(self, operation: str, sums: bool, draw_next: bool) -> Kernel:
        """The kernel of an operation."""
        found = self._kernels.get((operation, sums, draw_next))
        if found is None:
            flags = {
                "sample": (self.dtype, self.awkward, self.shard),
                "restore": (self.dtype, self.awkward),
                "check": (self.grad_dtype, self.awkward),
                "accumulate": (self.grad_dtype, self.awkward, self.shard),
                "step": (self.dtype, self.grad_dtype, sums, draw_next, self.awkward, self.shard),
            }[operation]
            found = _kernel(operation, self._device, (*flags, self.block))
            self._kernels[operation, sums, draw_next] = found
        return found


class _Plan:
    """What the backend derives from a launch: its buckets, and tables on the device."""

    def __init__(self, launch: Launch) -> None:
        assert launch.addresses is not None
        self.states = launch.states
        self.addresses = launch.addresses
        self.scalars = launch.scalars
        self.arenas: list[Arena] = list(dict.fromkeys(state.arena for state in self.states))
        flags = self.arenas[0].flags
        assert flags is not None
        self.device = self.arenas[0].mean.device
        self.control, self.mailbox = flags.block.data_ptr(), flags.mailbox.data_ptr()
        self._capturing = False
        self._summed: list[bool] = []
        self._bases: list[tuple[int, int]] = []
        self._table = Mirror(self.device, self._static_rows)
        self._layouts = Mirror(self.device, self._layout_rows)
        self._grads = Mirror(self.device, lambda: self.addresses.grads)
        self._sums = Mirror(self.device, self._sum_rows)
        self._rows = Mirror(self.device, lambda: self.scalars.data)
        self.numels = [state.param.numel() for state in self.states]
        self.shards = [_shard_kind(state) for state in self.states]
        self.dtypes = [DTYPES[state.param.dtype] for state in self.states]
        self.grad_dtypes = list(self.dtypes)
        self._dtypes_seen = b""
        self._grads_version = -1
        self._version = (-1, -1)
        self.buckets: list[_Bucket] = []

    def refresh(self, *, grads: bool) -> None:
        """Follow the addresses."""
        addresses = self.addresses
        if grads and addresses.grads_version != self._grads_version:
            self._grads_version = addresses.grads_version
            if (dtypes := addresses.grad_dtypes.tobytes()) != self._dtypes_seen:
                self._dtypes_seen = dtypes
                # A gradient that is None goes where the last one was: the smallest number of launches.
                known = zip(addresses.grads, addresses.grad_dtypes, self.grad_dtypes, strict=True)
                new = [dtype if address else old for address, dtype, old in known]
                if new != self.grad_dtypes:
                    self.grad_dtypes, self._version = new, (-1, -1)
        version = (addresses.params_version, addresses.layouts_version)
        if version != self._version:
            self._version = version
            self._make_buckets()
        self._capturing = is_capturing(self.device)

    def _make_buckets(self) -> None:
        addresses = self.addresses
        members: dict[_Key, list[int]] = {}
        for slot, numel in enumerate(self.numels):
            awkward = bool(addresses.layouts[slot]) or addresses.params[slot] % 16 != 0 or numel % 4 != 0
            key = _Key(self.dtypes[slot], self.grad_dtypes[slot], awkward, self.shards[slot])
            members.setdefault(key, []).append(slot)
        self.buckets = [_Bucket(key, part, self.numels, self.device) for key, part in members.items()]

    def launch(
        self, operation: str, tail: Sequence[int], *, sums: bool = False, draw_next: bool = False, last: int = 0
    ) -> None:
        """Launch an operation on every bucket.

        Args:
            tail: The arguments that follow table, chunks and passes.
            sums, draw_next: Variants of the step.
            last: Flags of the step's last launch.
        """
        table, capturing = self._table.address(self._version, self._capturing), self._capturing
        for bucket in self.buckets:
            chunks, members = bucket.tables(capturing)
            args = (table, chunks, bucket.passes, *tail)
            if operation == "step":
                flags = last if bucket is self.buckets[-1] else 0
                args = (*args, flags, members, len(bucket.members))
            bucket.kernel(operation, sums, draw_next).launch(len(bucket.chunks), args)

    def rows_address(self) -> int:
        """Of the table of groups."""
        return self._rows.address(self.scalars.version, self._capturing)

    def grads_address(self) -> int:
        """Of the table of gradients."""
        return self._grads.address(self.addresses.grads_version, self._capturing)

    def sums_address(self) -> int:
        """Of the table of sums, with 0 for a slot that has none in this step."""
        self._summed = [state.summed for state in self.states]
        self._bases = [
            (0, 0)
            if arena.grad_sum is None or arena.second_sum is None
            else (arena.grad_sum.data_ptr(), arena.second_sum.data_ptr())
            for arena in self.arenas
        ]
        return self._sums.address((self._summed, self._bases), self._capturing)

    def _layout_rows(self) -> array[int]:
        rows = array("q")
        for row in self.addresses.layout_rows:
            rows.extend(row or ())
        return rows

    def _static_rows(self) -> array[int]:
        states, addresses = self.states, self.addresses
        layouts = [0] * len(states)
        strided = [(slot, row) for slot, row in enumerate(addresses.layout_rows) if row is not None]
        if strided:
            first, width = self._layouts.address(self._version, self._capturing), 8 * len(strided[0][1])
            for number, (slot, _) in enumerate(strided):
                layouts[slot] = first + number * width
        columns = (
            addresses.params,
            [state.mean.data_ptr() for state in states],
            [state.momentum.data_ptr() for state in states],
            [state.hess.data_ptr() for state in states],
            self.numels,
            [state.index for state in states],
            [state.group for state in states],
            [state.arena.steps.data_ptr() + 8 * state.position for state in states],
            layouts,
            *zip(*(state.placement for state in states), strict=True),
        )
        table = array("q", bytes(8 * _COLUMNS * len(states)))
        for number, column in enumerate(columns):
            table[number::_COLUMNS] = array("q", column)
        return table

    def _sum_rows(self) -> array[int]:
        of_arena = dict(zip(self.arenas, self._bases, strict=True))
        table = array("q", bytes(16 * len(self.states)))
        for number, state in enumerate(self.states):
            if self._summed[number]:
                offset = 4 * state.arena.offsets[state.position]
                first, second = of_arena[state.arena]
                table[2 * number], table[2 * number + 1] = first + offset, second + offset
        return table


def signed(seed: int) -> int:
    """The int64 with the bits of a whole number below 2^64."""
    return seed - (1 << 64) if seed >> 63 else seed


def noise_of(sample: int, replica: int = 0) -> int:
    """Which noise of a step, as the kernels take it: csrc/philox.h has the same."""
    signs = SIGNS if sample >= MIRROR else 0
    return signed(signs << 32 | sample % MIRROR | replica << 16)


def _noise(draw: Draw) -> tuple[int, int, int]:
    """A draw as the kernels take it: seed, step or -1, sample and replica."""
    return signed(draw.seed), -1 if draw.step is None else draw.step, noise_of(draw.sample, draw.replica)


class TritonBackend(DeviceBackend):
    """Triton kernels for float32, bfloat16 and float16 parameters and gradients; ``TRITON_INTERPRET=1``: on the CPU."""

    name = "triton"

    def unavailable(self) -> str | None:
        if not installed():
            return "triton is not installed (pip install triton)"
        if not interpreted() and not torch.cuda.is_available() and not torch.xpu.is_available():
            return "torch sees no GPU (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if interpreted():
            if device.type != "cpu":
                return f"under TRITON_INTERPRET=1 it takes tensors on the CPU, not on {device}"
        elif device.type not in ("cuda", "xpu"):
            return f"it takes tensors on a GPU, not on {device}"
        elif device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it takes NVIDIA GPUs of compute capability 8.0 and later"
        if dtype not in DTYPES:
            return f"it takes {', '.join(map(str, DTYPES))}, not {dtype}"
        return None

    def sample(self, launch: Launch, draw: Draw, adopt: bool) -> None:
        plan = _plan(launch, grads=False)
        plan.launch("sample", (plan.rows_address(), *_noise(draw), int(adopt)))

    def restore(self, launch: Launch) -> None:
        _plan(launch, grads=False).launch("restore", ())

    def check(self, launch: Launch) -> None:
        plan = _plan(launch, grads=True)
        plan.launch("check", (plan.grads_address(), plan.control))

    def accumulate(self, launch: Launch, draw: Draw) -> None:
        plan = _plan(launch, grads=True)
        plan.launch("accumulate", (plan.grads_address(), plan.sums_address(), plan.rows_address(), *_noise(draw)))

    def step(self, launch: Launch, draw: Draw, adopt: bool, draw_next: bool, guard: Guard = _UNGUARDED) -> None:
        plan = _plan(launch, grads=True)
        sums = plan.sums_address() if launch.summed else 0
        tail = (
            plan.grads_address(),
            sums,
            plan.rows_address(),
            *_noise(draw),
            plan.control,
            plan.mailbox,
            0 if guard.found_inf is None else guard.found_inf.data_ptr(),
            0 if guard.grad_scale is None else guard.grad_scale.data_ptr(),
            int(adopt),
        )
        last = (_FINAL if guard.final else 0) | (_REPORT if guard.report else 0)
        plan.launch("step", tail, sums=sums != 0, draw_next=draw_next, last=last)


def _plan(launch: Launch, *, grads: bool) -> _Plan:
    """What is kept of the launch, up to date."""
    plan: _Plan = launch.cache or launch.derive(_Plan)
    plan.refresh(grads=grads)
    return plan
