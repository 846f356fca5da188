"""How the Triton kernels reach memory: the tables, alignment, strides and dtypes.

Buckets are split by ``AWKWARD``. A bucket without it has contiguous parameters on 16-byte boundaries and numbers of
elements that 4 divides: everything is moved 16 bytes (float32) or 8 bytes (16-bit types) at a time, and none of the
index arithmetic of strides costs registers or instructions there. Gradients move from step to step, so that their
alignment is looked at by the kernel: the host need not know it.
"""

# Triton has no types, and compiles these functions from their text.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from ivon_kernels.backends.triton_launch import interpreted

# Columns of the table of slots.
COLUMNS = tl.constexpr(16)
PARAM = tl.constexpr(0)
MEAN = tl.constexpr(1)
MOMENTUM = tl.constexpr(2)
HESS = tl.constexpr(3)
NUMEL = tl.constexpr(4)
INDEX = tl.constexpr(5)
GROUP = tl.constexpr(6)
STEP = tl.constexpr(7)
LAYOUT = tl.constexpr(8)
START = tl.constexpr(9)
RUN = tl.constexpr(10)
PITCH = tl.constexpr(11)

# Struct IvonLayout.
_PARAM_STRIDES = tl.constexpr(26)
_GRAD_STRIDES = tl.constexpr(51)
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def at(address, DTYPE: tl.constexpr):
    """The address as a pointer."""
    return address.to(tl.pointer_type(DTYPE))


@triton.jit
def aligned(address, begin, DTYPE: tl.constexpr):
    """Pointer to element `begin` of a tensor on a 16-byte boundary.

    The hint is lost unless it follows the cast; in Triton 3.6 also where the cast is another function's.
    """
    size: tl.constexpr = DTYPE.primitive_bitwidth // 8
    return tl.multiple_of((address + begin * size).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def element_offsets(layout, index, STRIDES: tl.constexpr):
    """Where the elements `index` (int64, row-major) of a strided tensor are, in elements."""
    offset = index
    if layout != 0:
        row = at(layout, tl.int64)
        dim = tl.load(row)
        offset = index * 0
        while dim > 0:
            size = tl.load(row + dim)
            offset += (index % size) * tl.load(row + STRIDES + dim - 1)
            index = index // size
            dim -= 1
    return offset


@triton.jit
def unsharded(row, begin, offset):
    """Indices (int64) in the unsharded tensor of a shard's elements ``begin + offset``; `offset`: int32, at least 0."""
    run = tl.load(row + RUN)
    gap = tl.load(row + PITCH) - run
    if (begin | run) >> 32 == 0:  # noqa: SIM108  (64-bit division costs several times as much)
        gaps_before = (begin.to(tl.uint32) // run.to(tl.uint32)).to(tl.int64)
    else:
        gaps_before = begin // run
    left = tl.minimum(run - (begin - gaps_before * run), 2**30).to(tl.uint32)  # elements before the next gap
    position = offset.to(tl.uint32)
    gaps = tl.where(position < left, 0, 1 + (position - left) // tl.minimum(run, 2**30).to(tl.uint32))
    return tl.load(row + START) + begin + gaps_before * gap + position.to(tl.int64) + gaps.to(tl.int64) * gap


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """Float32 to the parameter's dtype, to nearest even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # there the conversion cuts off, and flushes subnormals
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def widened(value):
    """Any dtype to float32."""
    if _INTERPRETED and value.dtype == tl.bfloat16:
        result = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float32)
    return result


@triton.jit
def either(a, b):
    """Bitwise or, for a reduction."""
    return a | b


@triton.jit
def program(table, chunks, passes, BLOCK: tl.constexpr):
    """The program's slot, its row of the table, where its elements begin and how many blocks of them there are."""
    entry = tl.load(at(chunks, tl.int64) + tl.program_id(0))
    slot = entry >> 32
    row = at(table, tl.int64) + slot * COLUMNS
    begin = (entry & 0xFFFFFFFF) * passes * BLOCK
    blocks = tl.minimum((tl.load(row + NUMEL) - begin + BLOCK - 1) // BLOCK, passes)
    return slot, row, begin, blocks


@triton.jit
def elements(BLOCK: tl.constexpr):
    """Numbers of the Philox blocks and of the elements in a block of a chunk."""
    lane = tl.arange(0, BLOCK // 4)
    return lane, lane[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def existing(numel, begin, lane, element, AWKWARD: tl.constexpr):
    """Which elements exist. Where 4 divides their number, the four of a thread exist or do not together."""
    left = tl.maximum(tl.minimum(numel - begin, 2**30), 0).to(tl.int32)
    if AWKWARD:  # noqa: SIM108
        mask = element < left
    else:
        mask = (lane * 4 < left)[:, None] & (element >= 0)
    return mask


@triton.jit
def count_if(address, numel):
    """The number of elements of a tensor that may be missing (address 0)."""
    count = numel
    if address == 0:
        count = numel * 0
    return count


@triton.jit
def weights_at(param, layout, begin, element, DTYPE: tl.constexpr, AWKWARD: tl.constexpr):
    """Pointers to the parameter's elements."""
    if AWKWARD:
        pointers = at(param, DTYPE) + element_offsets(layout, begin + element.to(tl.int64), _PARAM_STRIDES)
    else:
        pointers = aligned(param, begin, DTYPE) + element
    return pointers


@triton.jit
def gradient(grad, numel, layout, begin, lane, element, DTYPE: tl.constexpr, AWKWARD: tl.constexpr):
    """The gradient in float32; 0 for none."""
    mask = existing(count_if(grad, numel), begin, lane, element, AWKWARD)
    if AWKWARD:
        offsets = element_offsets(layout, begin + element.to(tl.int64), _GRAD_STRIDES)
        value = tl.load(at(grad, DTYPE) + offsets, mask=mask, other=0.0)
    else:
        if grad % 16 == 0:
            value = tl.load(aligned(grad, begin, DTYPE) + element, mask=mask, other=0.0)
        else:
            value = tl.load(at(grad, DTYPE) + begin + element, mask=mask, other=0.0)
    return widened(value)


@triton.jit
def adopted(mean, weights, mask, DTYPE: tl.constexpr):
    """The weights hold the mean; where they differ from it, somebody edited them: that is the new mean."""
    value = widened(tl.load(weights, mask=mask, other=0.0))
    return tl.where(widened(rounded(mean, DTYPE)) != value, value, mean)
