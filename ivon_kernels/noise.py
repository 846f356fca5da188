"""The one noise specification: counter-based standard normals with the same bits everywhere.

A normal depends on nothing but ``(seed, step, sample, replica, param, element)``. Elements ``4 b .. 4 b + 3`` come
from one Philox4x32-10 block (Salmon et al., SC 2011) with

    key     = (seed mod 2^32, seed div 2^32)
    counter = (b mod 2^32, (b div 2^32) + 2^8 param, step, sample mod 2^16 + 2^16 replica)

whose words ``(w0, w1)`` give elements 0 and 1 and ``(w2, w3)`` elements 2 and 3 by the Box-Muller transform in
:func:`box_muller`. Sample ``MIRROR + k`` is minus sample k: the signs, which are the top two bits of w1 and w3, are
turned over. Only individually rounded IEEE-754 float32 operations are used (no fused multiply-add; square roots through
float64, because ``torch.sqrt`` is not always correctly rounded in float32), so that this module, the C++ code at any
SIMD width and the GPU kernels agree bit for bit. ``csrc/philox.h`` and ``csrc/ivon_math.h`` are the compiled twin.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor

__all__ = [
    "EVAL_STEP",
    "MAX_SAMPLES",
    "MIRROR",
    "SIGNS",
    "Shard",
    "antithetic",
    "box_muller",
    "check_sample",
    "in_pairs",
    "normals",
    "normals_at",
    "philox4x32",
    "whole_number",
]

EVAL_STEP = 2**32 - 1
"""The step reserved for evaluation samples; training steps count from 0 and stay below it."""

MAX_SAMPLES = 2**16
"""How many samples a step may have, and how many evaluation samples there are, each with its mirror image."""

MIRROR = MAX_SAMPLES
"""Sample ``MIRROR + k`` has minus the noise of sample k, for k below `MAX_SAMPLES`."""

_LIMITS = {"seed": 2**64, "step": 2**32, "sample": 2 * MIRROR, "replica": 2**16, "param": 2**24}
_MAX_ELEMENTS = 2**42
_CHUNK = 2**20  # elements drawn at a time: bounds the int64 temporaries to some tens of MB

_MASK32 = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
SIGNS = 0xC0000000  # the bits of an angle's word that are the signs of its two normals

# Minimax polynomials, lowest degree first, error below 6e-8: -2 ln(1 + f) / f in f; sin(pi t / 2) / (t sqrt 2) and
# cos(pi t / 2) / sqrt 2 in t^2.
_LOG = (-2.0, 0.99999976, -0.66668373, 0.5000415, -0.39913666, 0.33124787, -0.29904532, 0.2873369, -0.17444715)
_SIN = (1.1107208, -0.45676515, 0.05634243, -0.0032542306)
_COS = (0.70710677, -0.8723555, 0.17932132, -0.014430884)


def whole_number(value: SupportsIndex, name: str, least: int, end: int) -> int:
    """A setting that counts something, as a Python int: NumPy's integers and tensors of one are taken too.

    Raises:
        ValueError: If it is not a whole number in ``[least, end)``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number < end:
        raise ValueError(f"{name} must be a whole number in [{least}, {end}), got {value!r}")
    return number


def check_sample(sample: SupportsIndex) -> int:
    """The number of a sample.

    Raises:
        ValueError: If it is not a whole number in ``[0, 65536)``, or such a number plus :data:`MIRROR`.
    """
    return whole_number(sample, "sample", 0, 2 * MIRROR)


def antithetic(count: SupportsIndex) -> list[int]:
    """Numbers of samples in pairs of opposite noise, for whatever takes `samples`: ``predict(samples=antithetic(4))``.

    What is linear in the noise cancels in the average of such a pair, so that few samples come closer to the average of
    many (antithetic variates: Hammersley and Morton, 1956).

    Args:
        count: How many samples, at least 1; the last of an odd number has no partner.

    Returns:
        ``[0, 1, .., MIRROR, MIRROR + 1, ..]``: sample ``MIRROR + k`` is the partner of sample k.

    Raises:
        ValueError: If `count` is not a whole number in ``[1, 131072]``.
    """
    number = whole_number(count, "count", 1, 2 * MAX_SAMPLES + 1)
    return [*range((number + 1) // 2), *range(MIRROR, MIRROR + number // 2)]


def in_pairs(position: int) -> int:
    """Number of the sample at a position, counted from 0, where each is followed by its mirror image."""
    return position // 2 + position % 2 * MIRROR


class Shard(NamedTuple):
    """Where a local shard's elements are in the unsharded tensor.

    Local element ``i`` (row-major) has the index ``start + (i // run) * pitch + i % run``.
    """

    start: int
    run: int  # elements that are neighbours in both; >= 1
    pitch: int  # from the beginning of one run to that of the next, in the unsharded tensor; >= run

    @property
    def aligned(self) -> bool:
        """Whether elements ``4 i .. 4 i + 3`` are from one block of the noise."""
        return self.start % 4 == self.run % 4 == self.pitch % 4 == 0


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``word * factor``; the int64 product wraps, its bits are the unsigned ones."""
    product = word * factor
    return (product >> 32) & _MASK32, product & _MASK32


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: ten rounds over 128-bit counters.

    Args:
        counter: int64 ``[..., 4]``, each word in ``[0, 2^32)``.
        key: two words in ``[0, 2^32)``.

    Returns:
        int64 ``[..., 4]``, each word in ``[0, 2^32)``.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _W0) & _MASK32, (key1 + _W1) & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The polynomial with separate multiplications and additions, highest degree first."""
    value = x * coefficients[-1] + coefficients[-2]
    for coefficient in coefficients[-3::-1]:
        value = value * x + coefficient
    return value


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root, on every device."""
    return x.double().sqrt().to(x.dtype)


def _signed(word: Tensor) -> Tensor:
    """Words in ``[0, 2^32)`` as the int32 with the same bits."""
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two independent uniform 32-bit words.

    The radius comes from ``u = (2 (w >> 9) + 1) 2^-24``, exact and in (0, 1), as ``sqrt(-2 ln u)``. The angle lies in
    the first quadrant, ``(pi/2) (t + 1/2)`` with ``t`` in (-1/2, 1/2) from the low 30 bits of its word, so that its
    cosine and sine are the difference and the sum of two short polynomials; the word's top two bits are the signs.
    ``|z| <= sqrt(48 ln 2) = 5.77``, never inf or nan.

    Args:
        radius_word: int64, each in ``[0, 2^32)``.
        angle_word: int64 of the same shape, each in ``[0, 2^32)``.

    Returns:
        Two float32 tensors of the words' shape.
    """
    u = ((radius_word >> 8) | 1).to(torch.float32)  # u 2^24
    x = u.view(torch.int32) - (0x3F3504F3 + (24 << 23))  # sqrt(1/2) 2^24
    exponent = (x >> 23).to(torch.float32)
    f = ((x & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    f2 = f * f
    q = _horner(f2, _LOG[1::2]) * f + _horner(f2, _LOG[0::2])  # even and odd parts: a shorter chain of operations
    r = sqrt(exponent * -1.3862944 + q * f)

    angle = _signed(angle_word)
    t = (((angle << 2) >> 7) | 1).to(torch.float32) * 2.0**-25
    t2 = t * t
    sine, cosine = _horner(t2, _SIN) * t, _horner(t2, _COS)
    sign = -(2**31)
    z0 = (r * (cosine - sine)).view(torch.int32) ^ (angle & sign)
    z1 = (r * (cosine + sine)).view(torch.int32) ^ ((angle << 1) & sign)
    return z0.view(torch.float32), z1.view(torch.float32)


def _check(numel: int, start: int, **words: int) -> None:
    for name, value in words.items():
        if not 0 <= value < _LIMITS[name]:
            raise ValueError(f"{name}={value} is outside [0, 2^{_LIMITS[name].bit_length() - 1})")
    if numel < 0 or start < 0 or start + numel > _MAX_ELEMENTS:
        raise ValueError(f"elements {start} .. {start} + {numel} are outside [0, 2^42)")


def _draw(block: Tensor, seed: int, step: int, sample: int, replica: int, param: int) -> Tensor:
    """The four normals of each block, ``[blocks, 4]``."""
    counter = torch.stack(
        (
            block & _MASK32,
            (block >> 32) | (param << 8),
            torch.full_like(block, step),
            torch.full_like(block, sample % MIRROR | (replica << 16)),
        ),
        dim=-1,
    )
    w0, w1, w2, w3 = philox4x32(counter, (seed & _MASK32, seed >> 32)).unbind(-1)
    signs = SIGNS if sample >= MIRROR else 0
    return torch.stack((*box_muller(w0, w1 ^ signs), *box_muller(w2, w3 ^ signs)), dim=-1)


def normals(
    numel: int,
    *,
    seed: int,
    step: int,
    sample: int = 0,
    replica: int = 0,
    param: int = 0,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw elements ``start .. start + numel`` of one stream of standard normals.

    Args:
        numel: How many elements.
        seed: 64-bit seed.
        step: Optimizer step in ``[0, 2^32)``; the last value is :data:`EVAL_STEP`.
        sample: Monte-Carlo sample within the step, in ``[0, 2^16)``; plus :data:`MIRROR` for minus its normals.
        replica: Data-parallel replica with noise of its own, in ``[0, 2^16)``.
        param: Parameter index, in ``[0, 2^24)``.
        start: First element, in the unsharded tensor's row-major order; ``start + numel <= 2^42``.
        device: Where to draw; the bits do not depend on it.

    Returns:
        float32 ``[numel]``. ``normals(n, start=s)`` equals ``normals(s + n)[s:]`` bit for bit.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(numel, start, seed=seed, step=step, sample=sample, replica=replica, param=param)
    out = torch.empty(numel, dtype=torch.float32, device=device)
    for begin in range(0, numel, _CHUNK):
        end = min(begin + _CHUNK, numel)
        first, last = (start + begin) // 4, (start + end + 3) // 4
        block = torch.arange(first, last, dtype=torch.int64, device=device)
        skip = start + begin - 4 * first
        z = _draw(block, seed, step, sample, replica, param).flatten()
        out[begin:end] = z[skip : skip + end - begin]
    return out


def normals_at(elements: Tensor, *, seed: int, step: int, sample: int = 0, replica: int = 0, param: int = 0) -> Tensor:
    """Draw any elements of a stream: ``normals_at(torch.arange(s, s + n))`` equals ``normals(n, start=s)``.

    Args:
        elements: int64 ``[n]``, indices in the unsharded tensor's row-major order, each in ``[0, 2^42)``.
        seed: As in :func:`normals`, and so `step`, `sample`, `replica` and `param`.

    Returns:
        float32 ``[n]`` on the device of `elements`.

    Raises:
        ValueError: If an argument is out of range.
    """
    least, most = (0, -1) if elements.numel() == 0 else (int(x) for x in elements.aminmax())
    _check(most + 1 - least, least, seed=seed, step=step, sample=sample, replica=replica, param=param)
    out = torch.empty(elements.shape, dtype=torch.float32, device=elements.device)
    for begin in range(0, elements.numel(), _CHUNK // 4):
        part = elements[begin : begin + _CHUNK // 4]
        z = _draw(part // 4, seed, step, sample, replica, param)
        out[begin : begin + _CHUNK // 4] = z.gather(-1, (part % 4).unsqueeze(-1)).squeeze(-1)
    return out
