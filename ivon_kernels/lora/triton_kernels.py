"""The Triton kernels of several LoRA samples in one pass: ``h = x A_s^T``, then ``out += scaling h B_s^T``.

A program computes one tile of one sample's product. It loads tiles of a factor's mean and 1/sigma, draws the noise of
that tile and multiplies: the sampled matrices are in registers and shared memory only. Rows of x, h and out are
sample-major. As in backends/triton_kernels.py all run-time arguments are int64, addresses too: no number of samples or
tokens and no seed compiles anything again. With ``ALIGNED`` all tensors lie on 16-byte boundaries and 16 bytes divide
their rows.
"""

# Triton has no types, and compiles these functions from their text.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from ivon_kernels.backends.triton_launch import interpreted, launched
from ivon_kernels.backends.triton_math import normals_at, normals_of_blocks
from ivon_kernels.backends.triton_memory import aligned, at, rounded, widened

_INTERPRETED = tl.constexpr(interpreted())
_SMALLEST_INNER = tl.constexpr(16)  # of a matrix product, on every GPU and in every supported version of Triton


@triton.jit
def base(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of a tensor as a pointer, with what is known of it."""
    if ALIGNED:  # noqa: SIM108
        pointer = aligned(address, 0, DTYPE)
    else:
        pointer = at(address, DTYPE)
    return pointer


@triton.jit
def length(value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The length of a row, as a product that shows what divides it: a hint would end with this function."""
    if ALIGNED:
        vector: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        value = value // vector * vector
    return value


@triton.jit
def divided(number, count):
    """Quotient and remainder, int64, of a program's number; the division is of 32 bits: one of 64 is a subroutine."""
    quotient = number.to(tl.uint32) // count.to(tl.uint32)
    return quotient.to(tl.int64), (number.to(tl.uint32) - quotient * count.to(tl.uint32)).to(tl.int64)


@triton.jit
def sampled(
    mean,
    inv_sigma,
    row,
    column,
    rows,
    columns,
    seed,
    index,
    step,
    sample,
    DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Elements ``[row .. row + ROWS, column .. column + COLUMNS]`` of a sampled matrix, in DTYPE; 0 outside of it.

    With QUADS the matrix lies on a 16-byte boundary and 4 divides its columns: a thread draws whole Philox blocks.
    """
    if QUADS:
        lane = tl.arange(0, ROWS * COLUMNS // 4)
        i = row + lane // (COLUMNS // 4)
        j = column // 4 + lane % (COLUMNS // 4)
        block = i * (columns // 4) + j
        four = tl.arange(0, 4)[None, :]
        offset = (block * 4)[:, None] + four
        mask = ((i < rows) & (j < columns // 4))[:, None] & (four >= 0)
        eps = normals_of_blocks(block, seed, index, step, sample)
    else:
        i = row + tl.arange(0, ROWS)[:, None]
        j = column + tl.arange(0, COLUMNS)[None, :]
        offset = i * columns + j
        mask = (i < rows) & (j < columns)
        eps = normals_at(offset, seed, index, step, sample)
    m = tl.load(base(mean, tl.float32, QUADS) + offset, mask=mask, other=0.0)
    p = tl.load(base(inv_sigma, tl.float32, QUADS) + offset, mask=mask, other=float("inf"))
    return rounded(tl.reshape(m + tl.div_rn(eps, p), (ROWS, COLUMNS)), DTYPE)


@triton.jit
def converted(value, DTYPE: tl.constexpr):
    """An operand of a product that is taken in DTYPE, 16-bit values of which the interpreter does not multiply."""
    if _INTERPRETED:
        result = widened(rounded(widened(value), DTYPE))
    elif value.dtype == DTYPE:
        result = value
    else:
        result = rounded(widened(value), DTYPE)
    return result


@triton.jit
def interleaved(value):
    """A matrix with a column of zeros after each of its columns."""
    return tl.reshape(tl.join(value, tl.zeros_like(value)), (value.shape[0], 2 * value.shape[1]))


@launched
def down_kernel(
    x: tl.int64,
    mean: tl.int64,
    inv_sigma: tl.int64,
    h: tl.int64,
    tokens: tl.int64,
    samples: tl.int64,
    splits: tl.int64,
    tiles: tl.int64,
    columns: tl.int64,
    rank: tl.int64,
    first: tl.int64,
    distance: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    index: tl.int64,
    X_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Products ``h[split, s, token] = x[s, token] A_s^T`` over the split's `tiles` tiles of columns, in float32.

    Sample s has the number ``first + s distance``.
    """
    number, token = divided(tl.program_id(0), (tokens + TOKENS - 1) // TOKENS)
    number, s = divided(number, samples)
    number, split = divided(number, splits)
    token, r = token * TOKENS, number * RANK
    columns = length(columns, X_DTYPE, ALIGNED)
    begin = split * tiles * COLUMNS
    t = tl.arange(0, TOKENS)[:, None]
    exists = t < tokens - token
    rows_of_x = base(x, X_DTYPE, ALIGNED) + (s * tokens + token) * columns
    inside = t * columns.to(tl.int32)
    product = tl.zeros((TOKENS, RANK), tl.float32)
    for column in tl.range(begin, tl.minimum(begin + tiles * COLUMNS, columns), COLUMNS, num_stages=2):
        k = tl.arange(0, COLUMNS)[None, :]
        inputs = tl.load(rows_of_x + column + (inside + k), mask=exists & (k < columns - column), other=0.0)
        weights = sampled(
            mean,
            inv_sigma,
            r,
            column,
            rank,
            columns,
            seed,
            index,
            step,
            first + s * distance,
            DTYPE,
            ALIGNED,
            RANK,
            COLUMNS,
        )
        product = tl.dot(
            converted(inputs, DOT_DTYPE), tl.trans(converted(weights, DOT_DTYPE)), product, input_precision="ieee"
        )
    n = tl.arange(0, RANK)[None, :]
    to = at(h, tl.float32) + ((split * samples + s) * tokens + token) * rank + r
    tl.store(to + (t * rank.to(tl.int32) + n), product, mask=exists & (n < rank - r))


@launched
def up_kernel(
    h: tl.int64,
    mean: tl.int64,
    inv_sigma: tl.int64,
    out: tl.int64,
    tokens: tl.int64,
    samples: tl.int64,
    splits: tl.int64,
    rows: tl.int64,
    rank: tl.int64,
    first: tl.int64,
    distance: tl.int64,
    seed: tl.int64,
    step: tl.int64,
    index: tl.int64,
    scaling: tl.int64,
    OUT_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums ``out[s, token] += scaling h[s, token] B_s^T``, where h is the sum of its splits; rounded once.

    `scaling` has the bits of a float32.
    """
    number, i = divided(tl.program_id(0), (rows + ROWS - 1) // ROWS)
    number, s = divided(number, samples)
    i, token = i * ROWS, number * TOKENS
    rows, rank = length(rows, OUT_DTYPE, ALIGNED), length(rank, tl.float32, QUADS)
    t = tl.arange(0, TOKENS)[:, None]
    exists = t < tokens - token
    product = tl.zeros((TOKENS, ROWS), tl.float32)
    for r in range(0, rank, RANK):
        n = tl.arange(0, RANK)[None, :]
        inside = t * rank.to(tl.int32) + n
        inner = tl.zeros((TOKENS, RANK), tl.float32)
        for split in range(0, splits):  # noqa: PIE808  (the interpreter takes two ends)
            part = base(h, tl.float32, QUADS) + ((split * samples + s) * tokens + token) * rank + r
            inner += tl.load(part + inside, mask=exists & (n < rank - r), other=0.0)
        weights = sampled(
            mean, inv_sigma, i, r, rows, rank, seed, index, step, first + s * distance, DTYPE, QUADS, ROWS, RANK
        )
        inner, weights = converted(inner, DOT_DTYPE), converted(weights, DOT_DTYPE)
        if RANK < _SMALLEST_INNER:
            inner, weights = interleaved(inner), interleaved(weights)
        product = tl.dot(inner, tl.trans(weights), product, input_precision="ieee")
    column = tl.arange(0, ROWS)[None, :]
    to = base(out, OUT_DTYPE, ALIGNED) + (s * tokens + token) * rows + i + (t * rows.to(tl.int32) + column)
    mask = exists & (column < rows - i)
    scale = scaling.to(tl.int32).to(tl.float32, bitcast=True)
    result = widened(tl.load(to, mask=mask, other=0.0)) + product * scale
    tl.store(to, rounded(result, OUT_DTYPE), mask=mask)
