"""Races in global memory: cells that several blocks touch, in an order that nothing but luck decides.

Watched are the small allocations of a launch: counters, flags, step counts. A block's barriers order what its warps do,
and an atomic operation orders blocks: what a warp did, and what its block did before the last barrier, is over for
whoever has performed a later atomic operation, and for that one's block after its next barrier. Which of two
operations comes first is a matter of the run; whether anything makes it so is not, so a race is seen in every order of
blocks and warps. Fences are not asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx.text import PtxError

Array = NDArray[Any]
_WATCHED = 512  # bytes of the largest allocation that is watched
_CELL = 2  # bytes: no element is smaller
_NEVER, _SEVERAL = -1, -2


class Who(NamedTuple):
    """The threads of an access: arrays of the length of its addresses."""

    blocks: Array  # numbers within the grid
    warps: Array  # within the block
    epochs: Array  # barriers that the block has passed
    strong: bool = False  # volatile, or relaxed and the like: may meet an atomic operation, and orders nothing


class Order:
    """What every block has done to the watched cells, and what the others know of it.

    Args:
        begins, ends: Of the allocations.
        blocks: Of the launch.
    """

    def __init__(self, begins: Array, ends: Array, blocks: int) -> None:
        sizes = np.where(ends - begins <= _WATCHED, -(-(ends - begins) // _CELL), 0)
        self.watched = sizes > 0
        self._begins, self._first = begins, np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        cells = int(sizes.sum())
        # By cell and block: the epoch of its last plain read and write and of its last atomic operation, and the warp.
        self._epoch = np.full((3, cells, blocks), _NEVER)
        self._warp = np.full((3, cells, blocks), _NEVER)
        # By block: when its last atomic operation was, and by which warp in which epoch.
        self._when, self._by, self._in = (np.full(blocks, _NEVER) for _ in range(3))
        self._now = 0

    def access(self, spans: Array, addresses: Array, size: int, who: Who, kind: int) -> None:
        """Plain reads (0), plain writes (1) or atomic operations (2) of `size` bytes, each in the allocation `spans`.

        Raises:
            PtxError: If another warp touches one of the cells, and nothing says which of them is first.
        """
        here = np.flatnonzero(self.watched[spans])
        if not here.size:
            return
        orders = kind == 2
        if who.strong:
            kind = 2
        cell = self._first[spans[here]] + (addresses[here] - self._begins[spans[here]]) // _CELL
        rows = np.stack([cell, who.blocks[here], who.warps[here], who.epochs[here]], axis=1)
        for first, block, warp, epoch in np.unique(rows, axis=0).tolist():
            for at in range(first, first + -(-size // _CELL)):
                self._check(at, block, warp, epoch, kind)
                same = self._epoch[kind, at, block] == epoch and self._warp[kind, at, block] != warp
                self._epoch[kind, at, block], self._warp[kind, at, block] = epoch, _SEVERAL if same else warp
        if orders:
            for _, block, warp, epoch in rows.tolist():
                self._now += 1
                self._when[block], self._by[block], self._in[block] = self._now, warp, epoch

    def _check(self, cell: int, block: int, warp: int, epoch: int, kind: int) -> None:
        for other in ((1, 2), (0, 1, 2), (0, 1))[kind]:  # two reads never race, nor do two atomic operations
            epochs, warps = self._epoch[other, cell], self._warp[other, cell]
            touched = epochs != _NEVER
            known = (epochs < self._in) | ((epochs == self._in) & (warps == self._by))  # done before the block's atomic
            heard = warp == self._by[block] if epoch == self._in[block] else epoch > self._in[block]
            before = known & (self._when < self._when[block]) & bool(heard)
            before[block] = epochs[block] < epoch or warps[block] == warp
            if (touched & ~before).any():
                raise PtxError(
                    f"a race in global memory: block {block} and block {int(np.flatnonzero(touched & ~before)[0])} "
                    "touch a place, and nothing orders them"
                )
