"""A Triton kernel of the noise alone, for tests that look at its values and at its code."""

from __future__ import annotations

import triton
import triton.language as tl

from ivon_kernels.backends.triton_math import normals


@triton.jit
def normals_kernel(
    out: tl.int64,
    begin: tl.int64,
    seed: tl.int64,
    index: tl.int64,
    step: tl.int64,
    sample_replica: tl.int64,
    BLOCK: tl.constexpr,
):
    """BLOCK normals from element `begin` on, to the address `out`."""
    lane = tl.arange(0, BLOCK // 4)
    to = tl.multiple_of(out.to(tl.pointer_type(tl.float32)), 16) + lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(to, normals(begin, lane, seed, index, step, sample_replica))


@triton.jit
def division_kernel(values: tl.int64, ROOTS: tl.constexpr, QUOTIENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Two times ROOTS square roots and QUOTIENTS divisions a thread: what these are made of."""
    at = values.to(tl.pointer_type(tl.float32)) + tl.arange(0, 256)
    for i in tl.static_range(ROOTS):
        tl.store(at + 256 * i, tl.sqrt_rn(tl.load(at + 256 * i)))
    for i in tl.static_range(QUOTIENTS):
        tl.store(at - 256 * i, tl.div_rn(tl.load(at - 256 * i), tl.load(at - 256 * i - 1)))
