"""The memory that PTX reaches: allocations of this process, a launch's parameters, the shared memory of its blocks.

Global memory is the process's own, at its own addresses. Every access is checked: it must lie within one allocation
that the launch was given, be aligned, and read nothing that nobody wrote. Shared memory is watched for races: between
two barriers no byte is written by one warp and touched by another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.support.ptx.order import Order, Who
from tests.support.ptx.text import PtxError

Array = NDArray[np.generic]
Lanes = NDArray[np.int64]
_LOWEST = 4096  # no allocation lies on the first page


class _Process:
    """This process's memory as an array, for NumPy; only what is known to be allocated may be touched."""

    def __init__(self, size: int) -> None:
        self.__array_interface__ = {
            "shape": (2**47 // size,),
            "typestr": f"<u{size}" if size > 1 else "|u1",
            "data": (_LOWEST, False),
            "version": 3,
        }


_PROCESS = {size: np.asarray(_Process(size)) for size in (1, 2, 4, 8)}


class Span(NamedTuple):
    """Bytes that a launch may touch.

    Attributes:
        written: Whether they have content from before the launch; if not, reads before writes are errors.
        read_only: Whether stores are errors.
    """

    begin: int
    size: int
    name: str
    written: bool = True
    read_only: bool = False


def span_of(tensor: Tensor, name: str, *, written: bool = True, read_only: bool = False) -> Span:
    """From a tensor's first element to its last."""
    last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = (last + 1) * tensor.element_size() if tensor.numel() else 0
    return Span(tensor.data_ptr(), size, name, written, read_only)


class Global:
    """The allocations of a launch.

    Args:
        spans: May overlap; an access must lie within one of them. Where they touch they stay apart.
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = sorted({span for span in spans if span.size}, key=lambda span: (span.begin, -span.size))
        kept: list[Span] = []
        for span in self.spans:  # what lies within another is there already
            if not kept or span.begin + span.size > kept[-1].begin + kept[-1].size:
                kept.append(span)
        self.spans = kept
        self._begins = np.array([span.begin for span in kept], dtype=np.int64)
        self._ends = np.array([span.begin + span.size for span in kept], dtype=np.int64)
        self._written = {i: np.zeros(span.size, dtype=bool) for i, span in enumerate(kept) if not span.written}
        self._read_only = np.array([span.read_only for span in kept], dtype=bool)
        self._order: Order | None = None

    def watch(self, blocks: int) -> None:
        """Look for races among so many blocks from now on."""
        self._order = Order(self._begins, self._ends, blocks)

    def find(self, addresses: Lanes, size: int) -> Lanes:
        """The number of the span of each access of `size` bytes.

        Raises:
            PtxError: If one is in none, or is not aligned.
        """
        if (addresses & (size - 1)).any():
            worst = int(addresses[(addresses & (size - 1)) != 0][0])
            raise PtxError(
                f"an access of {size} bytes at {worst:#x}, {worst % size} past a boundary{self._near(worst)}"
            )
        found = self._begins.searchsorted(addresses, "right") - 1
        good = (found >= 0) & (addresses + size <= self._ends[found] if self._ends.size else False)
        if not good.all():
            worst = int(addresses[~good][0])
            raise PtxError(f"{size} bytes at {worst:#x} are outside of every allocation{self._near(worst)}")
        return found

    def load(self, addresses: Lanes, size: int, count: int, who: Who) -> list[Array]:
        """`count` neighbouring values of `size` bytes from each address."""
        found = self.find(addresses, size * count)
        if self._order is not None:
            self._order.access(found, addresses, size * count, who, 0)
        for number, written in self._written.items():
            places = self._places(number, addresses[found == number], size * count)
            if not written[places].all():
                first = int(places[~written[places]][0])
                raise PtxError(f"a read of {self.spans[number].name} at byte {first}, which nobody wrote")
        index = (addresses - _LOWEST) // size
        return [_PROCESS[size][index + i] for i in range(count)]

    def store(self, addresses: Lanes, values: list[Array], who: Who) -> None:
        """Neighbouring values at each address."""
        size = values[0].itemsize
        self._mark(addresses, size * len(values), who, 1)
        index = (addresses - _LOWEST) // size
        for i, value in enumerate(values):
            _PROCESS[size][index + i] = value.view(f"u{size}")

    def cell(self, address: int, dtype: np.dtype[np.generic], who: Who) -> Array:
        """One value in place, for an atomic operation."""
        self._mark(np.array([address]), dtype.itemsize, who, 2)
        at = (address - _LOWEST) // dtype.itemsize
        return _PROCESS[dtype.itemsize][at : at + 1].view(dtype)

    def _mark(self, addresses: Lanes, size: int, who: Who, kind: int) -> None:
        found = self.find(addresses, size)
        if self._order is not None:
            self._order.access(found, addresses, size, who, kind)
        if self._read_only[found].any():
            raise PtxError(f"a store to {self.spans[int(found[self._read_only[found]][0])].name}, which is read only")
        for number, written in self._written.items():
            written[self._places(number, addresses[found == number], size)] = True

    def _places(self, number: int, addresses: Lanes, size: int) -> Lanes:
        """The bytes of accesses within a span."""
        places: Lanes = (addresses - self._begins[number])[:, None] + np.arange(size)
        return places

    def _near(self, address: int) -> str:
        """For a message."""
        if not self.spans:
            return ""
        span = min(self.spans, key=lambda s: max(s.begin - address, address - s.begin - s.size, 0))
        return f"; the nearest is {span.name}, {span.size} bytes, of which it is {address - span.begin} past the begin"


class Parameters:
    """A launch's arguments as the kernel sees them."""

    def __init__(self, content: bytes) -> None:
        self._size = len(content)
        self._content = np.frombuffer(content + bytes(-len(content) % 16), dtype=np.uint8)

    def load(self, offsets: Lanes, size: int, count: int) -> list[Array]:
        if (offsets < 0).any() or (offsets + size * count > self._size).any() or (offsets % (size * count)).any():
            raise PtxError(f"{size * count} bytes at {offsets} of {self._size} bytes of parameters")
        values = self._content.view(f"u{size}")
        return [values[offsets // size + i] for i in range(count)]


_NOBODY, _SEVERAL = -1, -2


class Shared:
    """The shared memory of some blocks.

    Args:
        blocks: How many.
        size: Bytes of each.
    """

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self._row = -(-max(size, 1) // 1024) * 1024  # as swizzled tiles need it
        self.content = np.zeros(blocks * self._row, dtype=np.uint8)
        self._written = np.zeros(blocks * self._row, dtype=bool)
        self._writer = np.full(blocks * self._row, _NOBODY, dtype=np.int16)
        self._reader = np.full(blocks * self._row, _NOBODY, dtype=np.int16)

    def load(self, blocks: Lanes, warps: Lanes, addresses: Lanes, size: int, count: int) -> list[Array]:
        """As of global memory; `warps` are the numbers of the lanes' warps within their blocks."""
        at = self._at(blocks, addresses, size * count)
        self.read(at, warps, size * count)
        index = at // size
        return [self.content.view(f"u{size}")[index + i] for i in range(count)]

    def store(self, blocks: Lanes, warps: Lanes, addresses: Lanes, values: list[Array]) -> Lanes:
        """Returns where the values are in `content`."""
        size = values[0].itemsize
        at = self._at(blocks, addresses, size * len(values))
        content = np.stack([value.view(f"u{size}") for value in values], axis=1).view(np.uint8)
        self.write(at, warps, content)
        return at

    def forget(self, at: Lanes, size: int) -> None:
        """The content is not there yet: reading it is an error."""
        self._written[at[:, None] + np.arange(size)] = False

    def barrier(self, blocks: Lanes) -> None:
        """All threads of these blocks have met: what they did before is over."""
        for rows in (self._writer, self._reader):
            rows.reshape(-1, self._row)[blocks] = _NOBODY

    def read(self, at: Lanes, warps: Lanes, size: int) -> None:
        """Note reads of `size` bytes."""
        places = at[:, None] + np.arange(size)
        if not self._written[places].all():
            raise PtxError(
                f"a read of shared memory at {self._first(places, ~self._written[places])} that nobody wrote"
            )
        writers = self._writer[places]
        raced = (writers != _NOBODY) & (writers != warps[:, None])
        if raced.any():
            raise PtxError(
                f"a race: shared memory at {self._first(places, raced)} is read while another warp writes it"
            )
        self._reader[places] = np.where(
            (self._reader[places] == _NOBODY) | (self._reader[places] == warps[:, None]), warps[:, None], _SEVERAL
        )
        # Lanes of several warps may have read one place in this very instruction.
        self._reader[places] = np.where(self._reader[places] == warps[:, None], self._reader[places], _SEVERAL)

    def write(self, at: Lanes, warps: Lanes, content: Array | None, size: int = 0) -> None:
        """Write bytes ``[lanes, size]``; None: note that `size` bytes, which are there already, have been written.

        Warps that hold the same values may all write them.
        """
        places = at[:, None] + np.arange(size if content is None else content.shape[1])
        content = self.content[places] if content is None else content
        same = self._written[places] & (self.content[places] == content)
        writers, readers = self._writer[places], self._reader[places]
        raced = (writers != _NOBODY) & (writers != warps[:, None]) & ~same
        raced |= (readers != _NOBODY) & (readers != warps[:, None]) & ~same
        self.content[places] = content
        raced |= self.content[places] != content  # by another lane of this very instruction
        if raced.any():
            raise PtxError(f"a race: shared memory at {self._first(places, raced)} is written and used by another warp")
        self._writer[places] = np.where((writers == _NOBODY) | (writers == warps[:, None]), warps[:, None], _SEVERAL)
        self._writer[places] = np.where(self._writer[places] == warps[:, None], self._writer[places], _SEVERAL)
        self._written[places] = True

    def _at(self, blocks: Lanes, addresses: Lanes, size: int) -> Lanes:
        if (addresses < 0).any() or (addresses + size > self.size).any():
            raise PtxError(f"{size} bytes at {addresses.max()} of {self.size} bytes of shared memory")
        if (addresses & (size - 1)).any():
            raise PtxError(f"an access of {size} bytes to shared memory that is not aligned")
        return blocks * self._row + addresses

    def _first(self, places: Lanes, bad: NDArray[np.bool_]) -> int:
        return int(places[bad][0]) % self._row


def allocated(*tensors: tuple[str, Tensor | None]) -> list[Span]:
    """Spans of named tensors, None for one that is missing."""
    return [span_of(tensor, name) for name, tensor in tensors if tensor is not None]


def host_span(content: memoryview | bytearray, name: str) -> Span:
    """Of memory that Python holds."""
    view = torch.frombuffer(content, dtype=torch.uint8)
    return span_of(view, name)
