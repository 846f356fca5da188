"""Several LoRA samples in one pass by Triton, on GPUs of NVIDIA, AMD and Intel: two launches, nothing waits.

See triton_kernels.py for the kernels and docs/gpu-kernels.md for why they are two.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ivon_kernels.backends.triton import TritonBackend, noise_of, signed
from ivon_kernels.backends.triton_launch import Kernel, interpreted
from ivon_kernels.lora.factor import Factor
from ivon_kernels.noise import EVAL_STEP

_PROGRAMS = 512  # of a launch, where there is work for them: a few for each multiprocessor of the largest GPUs
_MAX_SPLITS = 16  # of the columns of A among programs: the second kernel adds up as many products
_MOST = 2**25  # elements of a row: offsets within a block of 64 tokens are int32
_VECTOR = 16  # bytes
_BACKEND = TritonBackend()


def unsupported(out: Tensor, x: Tensor, a: Factor, b: Factor) -> str | None:
    """Why the kernels do not take these, or None."""
    reason = _BACKEND.unavailable()
    for device, dtype in ((x.device, x.dtype), (out.device, out.dtype), (x.device, a.dtype), (x.device, b.dtype)):
        reason = reason or _BACKEND.unsupported(device, dtype)
    longest = max(x.shape[1], out.shape[1], a.mean.shape[0])
    if reason is None and longest >= _MOST:
        reason = f"it takes fewer than {_MOST} features and ranks, not {longest}"
    return reason


def lora_samples_(
    out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]
) -> None:
    """``out[s] += scaling (x[s] A_s^T) B_s^T``, with the noise of sample number ``samples[s]``.

    Products are of float32 values and summed in float32. Where x and the weights have one 16-bit dtype, they are of
    values of that dtype, on tensor cores, and x A_s^T is rounded to it in between, as in PEFT. `out` is rounded once.

    Args:
        out: ``[S * tokens, d_out]``, float32, bfloat16 or float16, contiguous, sample-major.
        x: ``[S * tokens, d_in]``, likewise.
        a: The posterior of A, ``[r, d_in]``.
        b: The posterior of B, ``[d_out, r]``.
        scaling: Taken in float32.
        seed: Below 2^64.
        samples: S numbers. Evenly spaced ones share their launches.
    """
    if 0 in (out.numel(), x.numel(), a.mean.numel()):
        return
    tokens = x.shape[0] // len(samples)
    for begin, numbers in _evenly_spaced([noise_of(sample) for sample in samples]):
        rows = slice(begin * tokens, (begin + len(numbers)) * tokens)
        _launch(out[rows], x[rows], a, b, scaling, seed, numbers)


def _evenly_spaced(samples: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Cuts `samples` into runs of even distance; yields where each begins, and its numbers.

    Two numbers then describe a run, and no table of samples has to reach the device before a launch.
    """
    begin = 0
    while begin < len(samples):
        end = min(begin + 2, len(samples))
        while end < len(samples) and samples[end] - samples[end - 1] == samples[begin + 1] - samples[begin]:
            end += 1
        yield begin, samples[begin:end]
        begin = end


def _launch(out: Tensor, x: Tensor, a: Factor, b: Factor, scaling: float, seed: int, samples: Sequence[int]) -> None:
    """Both kernels, for evenly spaced samples."""
    (rank, d_in), d_out, count = a.mean.shape, b.mean.shape[0], len(samples)
    tokens = x.shape[0] // count
    distance = samples[1] - samples[0] if count > 1 else 0
    draw = (samples[0], distance, signed(seed), EVAL_STEP)

    dtype = x.dtype if x.dtype == a.dtype else torch.float32  # of the products
    tiles = _tiles(tokens, rank, dtype)
    token_blocks, rank_blocks, column_tiles = -(-tokens // tiles.tokens), -(-rank // tiles.rank), -(-d_in // tiles.down)
    splits = min(column_tiles, _MAX_SPLITS, max(1, _PROGRAMS // (token_blocks * rank_blocks * count)))
    tiles_each = -(-column_tiles // splits)
    splits = -(-column_tiles // tiles_each)
    h = torch.empty(splits * count * tokens * rank, dtype=torch.float32, device=x.device)
    flags: tuple[bool | int, ...] = (_aligned(d_in, x, a.mean, a.inv_sigma), tiles.tokens, tiles.rank, tiles.down)
    _kernel("down", x.device, (x.dtype, a.dtype, dtype), flags).launch(
        token_blocks * count * splits * rank_blocks,
        (*_addresses(x, a, h), tokens, count, splits, tiles_each, d_in, rank, *draw, a.index),
    )

    dtype = dtype if a.dtype == b.dtype else torch.float32
    tiles = _tiles(tokens, rank, dtype)
    flags = (_aligned(rank, b.mean, b.inv_sigma), _aligned(d_out, out), tiles.tokens, tiles.rank, tiles.up)
    _kernel("up", x.device, (out.dtype, b.dtype, dtype), flags).launch(
        -(-d_out // tiles.up) * count * token_blocks,
        (*_addresses(h, b, out), tokens, count, splits, d_out, rank, *draw, b.index, _bits(scaling)),
    )


@functools.cache
def _kernel(name: str, device: torch.device, dtypes: tuple[torch.dtype, ...], flags: tuple[bool | int, ...]) -> Kernel:
    """One variant of a kernel. Importing Triton takes a while: not before it is needed."""
    import triton.language as tl

    from ivon_kernels.lora import triton_kernels

    names = [getattr(tl, str(dtype).removeprefix("torch.")) for dtype in dtypes]
    return Kernel(getattr(triton_kernels, f"{name}_kernel"), device, (*names, *flags))


class _Tiles(NamedTuple):
    """How much a program takes at a time."""

    tokens: int
    rank: int
    down: int  # columns of A and x
    up: int  # rows of B, columns of out


def _tiles(tokens: int, rank: int, dtype: torch.dtype) -> _Tiles:
    """Tiles for products in `dtype`: as many tokens to each drawn weight as registers hold.

    Chosen by the machine code (tests/lora/test_lora_triton_compile.py): no spills but of a few words with float32 x.
    """
    block = 16 if tokens <= 16 else 64
    sizes = (32, 16) if dtype == torch.float32 else (64, 32, 16)
    ranks = _least_rank() if rank <= 8 else min(sizes, key=lambda size: -(-rank // size) * size)
    if interpreted():
        return _Tiles(16, ranks, 32, 16)
    if dtype == torch.float32:
        return _Tiles(block, ranks, {8: 64, 16: 32, 32: 16}[ranks], 32 if ranks == 32 else 64)
    return _Tiles(block, ranks, 64 if ranks <= 16 else 32, 32 if ranks == 64 else 64)


@functools.cache
def _least_rank() -> int:
    """The narrowest product: Triton 3.4 refuses one of 8 columns."""
    import triton

    return 16 if triton.__version__.startswith("3.4.") else 8


def _addresses(source: Tensor, factor: Factor, target: Tensor) -> tuple[int, int, int, int]:
    return source.data_ptr(), factor.mean.data_ptr(), factor.inv_sigma.data_ptr(), target.data_ptr()


def _aligned(length: int, *tensors: Tensor) -> bool:
    """Whether all rows, of `length` elements, are whole vectors on 16-byte boundaries."""
    return all(length * t.element_size() % _VECTOR == t.data_ptr() % _VECTOR == 0 for t in tensors)


def _bits(value: float) -> int:
    """Of the float32, as a signed number."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])
