"""The Triton twin of csrc/philox.h, csrc/ivon_math.h and csrc/rows.h: the same operations in the same order.

Everything is individually rounded: ``sqrt_rn`` and ``div_rn`` are the IEEE ones, and the launcher forbids contraction
(``enable_fp_fusion=False``). A tensor is ``[blocks, 4]``: one row is the four elements of one Philox block, and one
thread holds all of it, so that the four normals of a block never change threads.
"""

# Triton has no types, and compiles these functions from their text.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_ROUNDS = tl.constexpr(10)

_SQRT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
_SIGN = tl.constexpr(-(2**31))

# Struct GroupRow: its float32, float64 and int64 parts.
ROW_BYTES = tl.constexpr(96)
_DOUBLES = tl.constexpr(56)
_LONGS = tl.constexpr(80)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32-10 on uint32 words, scalars or tensors; a product's two halves come from one widening multiply."""
    for _ in tl.static_range(_ROUNDS):
        p0 = c0.to(tl.uint64) * _M0
        p1 = c2.to(tl.uint64) * _M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 = key0 + _W0
        key1 = key1 + _W1
    return c0, c1, c2, c3


@triton.jit
def box_muller(radius_word, angle_word):
    """Two independent standard normals from two uint32 words; csrc/ivon_math.h explains the steps."""
    u = ((radius_word >> 8) | 1).to(tl.int32, bitcast=True).to(tl.float32)
    x = u.to(tl.int32, bitcast=True) - (_SQRT_HALF + (24 << 23))
    e = (x >> 23).to(tl.float32)
    f = ((x & 0x007FFFFF) + _SQRT_HALF).to(tl.float32, bitcast=True) - 1.0
    f2 = f * f
    even = f2 * -0.17444715 + -0.29904532
    odd = f2 * 0.2873369 + 0.33124787
    even = even * f2 + -0.39913666
    odd = odd * f2 + 0.5000415
    even = even * f2 + -0.66668373
    odd = odd * f2 + 0.99999976
    even = even * f2 + -2.0
    q = odd * f + even
    r = tl.sqrt_rn(e * -1.3862944 + q * f)

    angle = angle_word.to(tl.int32, bitcast=True)
    t = (((angle << 2) >> 7) | 1).to(tl.float32) * 2.9802322387695312e-08  # 2^-25
    t2 = t * t
    sine = t2 * -0.0032542306 + 0.05634243
    sine = sine * t2 + -0.45676515
    sine = (sine * t2 + 1.1107208) * t
    cosine = t2 * -0.014430884 + 0.17932132
    cosine = cosine * t2 + -0.8723555
    cosine = cosine * t2 + 0.70710677
    z0 = (r * (cosine - sine)).to(tl.int32, bitcast=True) ^ (angle & _SIGN)
    z1 = (r * (cosine + sine)).to(tl.int32, bitcast=True) ^ ((angle << 1) & _SIGN)
    return z0.to(tl.float32, bitcast=True), z1.to(tl.float32, bitcast=True)


@triton.jit
def _words(c0, c1, seed, step, sample_replica):
    return philox(
        c0, c1, step.to(tl.uint32), sample_replica.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    )


@triton.jit
def _quads(c0, c1, seed, step, sample_replica):
    """The normals of blocks, given by the first two words of their counters: ``[lanes, 4]``."""
    w0, w1, w2, w3 = _words(c0, c1, seed, step, sample_replica)
    signs = (sample_replica >> 32).to(tl.uint32)
    z0, z1 = box_muller(w0, w1 ^ signs)
    z2, z3 = box_muller(w2, w3 ^ signs)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (c0.shape[0], 4))


@triton.jit
def normals(begin, lane, seed, index, step, sample_replica):
    """Elements ``begin + 4 lane .. begin + 4 lane + 3`` of a stream, ``[lanes, 4]``.

    All arguments but `lane` are int64 scalars. `begin` is a multiple of 4 times the number of lanes, a power of two:
    adding `lane` to the low word of the block number carries nothing.
    """
    block = begin // 4
    c0 = block.to(tl.uint32) + lane.to(tl.uint32)
    c1 = ((block >> 32) | (index << 8)).to(tl.uint32)
    return _quads(c0, c1, seed, step, sample_replica)


@triton.jit
def normals_of_blocks(block, seed, index, step, sample_replica):
    """The four elements of each of the Philox blocks `block` (int64 ``[lanes]``), ``[lanes, 4]``."""
    return _quads(block.to(tl.uint32), ((block >> 32) | (index << 8)).to(tl.uint32), seed, step, sample_replica)


@triton.jit
def normals_at(element, seed, index, step, sample_replica):
    """The elements `element` (int64) of a stream, a Philox block for each."""
    block = element >> 2
    c1 = ((block >> 32) | (index << 8)).to(tl.uint32)
    w0, w1, w2, w3 = _words(block.to(tl.uint32), c1, seed, step, sample_replica)
    second = (element & 2) != 0
    signs = (sample_replica >> 32).to(tl.uint32)
    z0, z1 = box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1) ^ signs)
    return tl.where((element & 1) != 0, z1, z0)


@triton.jit
def power(base, exponent):
    """``base ** exponent`` by squaring, float64: multiplications alone, nothing that could be contracted."""
    result = base * 0.0 + 1.0
    while exponent != 0:
        if exponent & 1 != 0:
            result = result * base
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _scalar(row, NUMBER: tl.constexpr):
    return tl.load(row.to(tl.pointer_type(tl.float32)) + NUMBER)


@triton.jit
def precision_scalars(row):
    """The scalars of a draw: ess and weight_decay."""
    return _scalar(row, 0), _scalar(row, 1)


@triton.jit
def is_gradsq(row):
    """Whether the group's Hessian statistic is ``g * g`` instead of ``g * eps``."""
    return _scalar(row, 12) != 0.0


@triton.jit
def update_scalars(row, step, amp_scale):
    """The scalars that only the update needs, in the order of StepScalars from beta1 on, after `step` finished updates.

    Args:
        row: Address of a struct GroupRow.
        step: int64.
        amp_scale: Address of the GradScaler's scale, or 0.
    """
    doubles = (row + _DOUBLES).to(tl.pointer_type(tl.float64))
    longs = (row + _LONGS).to(tl.pointer_type(tl.int64))
    inv_debias = _scalar(row, 5)
    if step + 1 < tl.load(longs):
        inv_debias = (1.0 / (1.0 - power(tl.load(doubles), step + 1))).to(tl.float32)
    lr = _scalar(row, 6)
    lr_on_device = tl.load(longs + 1)
    if lr_on_device != 0:
        lr = (tl.load(lr_on_device.to(tl.pointer_type(tl.float64))) * tl.load(doubles + 1)).to(tl.float32)
    grad_scale = _scalar(row, 10)
    second_scale = _scalar(row, 11)
    if amp_scale != 0:
        scale = tl.load(amp_scale.to(tl.pointer_type(tl.float32))).to(tl.float64)
        samples = tl.load(doubles + 2)
        grad_scale = (1.0 / (scale * samples)).to(tl.float32)
        square = scale
        if is_gradsq(row):
            square = scale * scale
        second_scale = (1.0 / (square * samples)).to(tl.float32)
    return (
        _scalar(row, 2),
        _scalar(row, 3),
        _scalar(row, 4),
        inv_debias,
        lr,
        _scalar(row, 7),
        _scalar(row, 8),
        _scalar(row, 9),
        grad_scale,
        second_scale,
    )


@triton.jit
def draw(mean, hess, eps, ess, weight_decay):
    """Theta = mean + sigma eps."""
    return mean + tl.div_rn(eps, tl.sqrt_rn((hess + weight_decay) * ess))


@triton.jit
def update(grad, second, mean, momentum, hess, ess, weight_decay, gradsq, k):
    """One element of the update; `grad` and `second` are sums over the MC samples, `k` comes from update_scalars."""
    beta1, one_minus_beta1, one_minus_beta2, inv_debias, lr, clip, floor, ceiling, grad_scale, second_scale = k
    grad = grad * grad_scale
    second = second * second_scale
    precision = hess + weight_decay
    if gradsq:  # noqa: SIM108
        hess_estimate = second * ess
    else:
        hess_estimate = second * tl.sqrt_rn(precision * ess)
    momentum = momentum * beta1 + grad * one_minus_beta1
    delta = (hess_estimate - hess) * one_minus_beta2
    hess = hess + (delta + (delta * 0.5) * tl.div_rn(delta, precision))
    hess = tl.where(hess < floor, floor, hess)  # NaN stays NaN: nothing is hidden
    hess = tl.where(hess > ceiling, ceiling, hess)
    direction = tl.div_rn(momentum * inv_debias + mean * weight_decay, hess + weight_decay)
    direction = tl.where(direction > clip, clip, direction)
    direction = tl.where(direction < -clip, -clip, direction)
    mean = mean - direction * lr
    return mean, momentum, hess
