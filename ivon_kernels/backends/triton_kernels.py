"""The Triton kernels: one program per chunk of a tensor, one launch for all tensors of a bucket.

All run-time arguments are int64 (addresses too) and none is specialized: one compilation is right for every value.
Flags that change the code are constexpr. Tensors are found through tables in device memory:

    table   int64 [slots, COLUMNS]: addresses and numbers of a slot that stay as they are from step to step
    grads   int64 [slots]: addresses of the gradients, 0 for none
    sums    int64 [slots, 2]: addresses of grad_sum and second_sum, 0 where they are not in use
    chunks  int64 [programs]: slot << 32 | chunk; a chunk is `passes` times BLOCK elements
    rows    struct GroupRow per parameter group
"""

# Triton has no types, and compiles these functions from their text.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from ivon_kernels.backends.triton_launch import launched
from ivon_kernels.backends.triton_math import (
    ROW_BYTES,
    draw,
    is_gradsq,
    normals,
    normals_at,
    normals_of_blocks,
    precision_scalars,
    update,
    update_scalars,
)
from ivon_kernels.backends.triton_memory import (
    COLUMNS,
    GROUP,
    HESS,
    INDEX,
    LAYOUT,
    MEAN,
    MOMENTUM,
    NUMEL,
    PARAM,
    STEP,
    adopted,
    aligned,
    at,
    count_if,
    either,
    elements,
    existing,
    gradient,
    program,
    rounded,
    unsharded,
    weights_at,
)

FINAL = tl.constexpr(1)  # flags of the step
REPORT = tl.constexpr(2)
NOTHING_BAD = tl.constexpr(2**62)  # in the control block: see ivon_kernels/backends/device.py
_MEMBERS = tl.constexpr(128)  # counters advanced at a time
_WHOLE = tl.constexpr(0)  # of SHARD, see ivon_kernels/backends/triton.py
_ALIGNED = tl.constexpr(1)


@triton.jit
def noise(row, begin, lane, element, seed, index, step, sample_replica, SHARD: tl.constexpr):
    """The normals of a block of a chunk, ``[lanes, 4]``."""
    if SHARD == _WHOLE:
        z = normals(begin, lane, seed, index, step, sample_replica)
    elif SHARD == _ALIGNED:
        z = normals_of_blocks(unsharded(row, begin, 4 * lane) >> 2, seed, index, step, sample_replica)
    else:
        z = normals_at(unsharded(row, begin, element), seed, index, step, sample_replica)
    return z


@launched
def sample_kernel(
    table: tl.int64,
    chunks: tl.int64,
    passes: tl.int64,
    rows: tl.int64,
    seed: tl.int64,
    step_override: tl.int64,
    sample_replica: tl.int64,
    adopt: tl.int64,
    DTYPE: tl.constexpr,
    AWKWARD: tl.constexpr,
    SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights <- mean + sigma eps."""
    _, row, begin, blocks = program(table, chunks, passes, BLOCK)
    numel = tl.load(row + NUMEL)
    ess, weight_decay = precision_scalars(rows + tl.load(row + GROUP) * ROW_BYTES)
    index = tl.load(row + INDEX)
    step = step_override
    if step_override < 0:
        step = tl.load(at(tl.load(row + STEP), tl.int64))
    param, layout = tl.load(row + PARAM), tl.load(row + LAYOUT)
    mean_address, hess_address = tl.load(row + MEAN), tl.load(row + HESS)
    lane, element = elements(BLOCK)
    for _ in range(blocks):
        mask = existing(numel, begin, lane, element, AWKWARD)
        weights = weights_at(param, layout, begin, element, DTYPE, AWKWARD)
        means = aligned(mean_address, begin, tl.float32) + element
        mean = tl.load(means, mask=mask, other=0.0)
        hess = tl.load(aligned(hess_address, begin, tl.float32) + element, mask=mask, other=1.0)
        if adopt != 0:
            mean = adopted(mean, weights, mask, DTYPE)
            tl.store(means, mean, mask=mask)
        eps = noise(row, begin, lane, element, seed, index, step, sample_replica, SHARD)
        tl.store(weights, rounded(draw(mean, hess, eps, ess, weight_decay), DTYPE), mask=mask)
        begin += BLOCK


@launched
def restore_kernel(
    table: tl.int64,
    chunks: tl.int64,
    passes: tl.int64,
    DTYPE: tl.constexpr,
    AWKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights <- mean."""
    _, row, begin, blocks = program(table, chunks, passes, BLOCK)
    numel = tl.load(row + NUMEL)
    param, layout, mean_address = tl.load(row + PARAM), tl.load(row + LAYOUT), tl.load(row + MEAN)
    lane, element = elements(BLOCK)
    for _ in range(blocks):
        mask = existing(numel, begin, lane, element, AWKWARD)
        mean = tl.load(aligned(mean_address, begin, tl.float32) + element, mask=mask, other=0.0)
        tl.store(weights_at(param, layout, begin, element, DTYPE, AWKWARD), rounded(mean, DTYPE), mask=mask)
        begin += BLOCK


@launched
def check_kernel(
    table: tl.int64,
    chunks: tl.int64,
    passes: tl.int64,
    grads: tl.int64,
    control: tl.int64,
    DTYPE: tl.constexpr,
    AWKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Note the smallest parameter index whose gradient holds inf or nan."""
    slot, row, begin, blocks = program(table, chunks, passes, BLOCK)
    numel = tl.load(row + NUMEL)
    grad, layout = tl.load(at(grads, tl.int64) + slot), tl.load(row + LAYOUT)
    lane, element = elements(BLOCK)
    found = tl.full((BLOCK // 4, 4), 0, tl.int32)
    for _ in range(blocks):
        bits = gradient(grad, numel, layout, begin, lane, element, DTYPE, AWKWARD).to(tl.int32, bitcast=True)
        found = found | ((bits & 0x7F800000) == 0x7F800000).to(tl.int32)
        begin += BLOCK
    if tl.reduce(tl.reduce(found, 1, either), 0, either) != 0:
        tl.atomic_min(at(control, tl.int64), tl.load(row + INDEX))


@launched
def accumulate_kernel(
    table: tl.int64,
    chunks: tl.int64,
    passes: tl.int64,
    grads: tl.int64,
    sums: tl.int64,
    rows: tl.int64,
    seed: tl.int64,
    step_override: tl.int64,
    sample_replica: tl.int64,
    DTYPE: tl.constexpr,
    AWKWARD: tl.constexpr,
    SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the finished sample's gradient to grad_sum and second_sum."""
    slot, row, begin, blocks = program(table, chunks, passes, BLOCK)
    numel = tl.load(row + NUMEL)
    gradsq = is_gradsq(rows + tl.load(row + GROUP) * ROW_BYTES)
    index = tl.load(row + INDEX)
    step = step_override
    if step_override < 0:
        step = tl.load(at(tl.load(row + STEP), tl.int64))
    grad_address = tl.load(at(grads, tl.int64) + slot)
    pair = at(sums, tl.int64) + slot * 2
    grad_sum_address, second_sum_address = tl.load(pair), tl.load(pair + 1)
    layout = tl.load(row + LAYOUT)
    lane, element = elements(BLOCK)
    for _ in range(blocks):
        mask = existing(numel, begin, lane, element, AWKWARD)
        grad_sums = aligned(grad_sum_address, begin, tl.float32) + element
        second_sums = aligned(second_sum_address, begin, tl.float32) + element
        grad = gradient(grad_address, numel, layout, begin, lane, element, DTYPE, AWKWARD)
        grad_sum = tl.load(grad_sums, mask=mask, other=0.0)
        second_sum = tl.load(second_sums, mask=mask, other=0.0)
        factor = grad
        if not gradsq:
            factor = noise(row, begin, lane, element, seed, index, step, sample_replica, SHARD)
        tl.store(grad_sums, grad_sum + grad, mask=mask)
        tl.store(second_sums, second_sum + grad * factor, mask=mask)
        begin += BLOCK


@triton.jit
def _finish(table, members, member_count, control, mailbox, skip, flags):
    """What the last program of a launch does: count the step, or the skipped step; tell the host if asked to.

    The barrier lets all threads finish their reads first; the atomic is a release and an acquire on the device.
    """
    block = at(control, tl.int64)
    tl.debug_barrier()
    if tl.atomic_add(block + 1, 1) == tl.num_programs(0) - 1:
        if not skip:
            for start in range(0, member_count, _MEMBERS):
                number = start + tl.arange(0, _MEMBERS)
                mask = number < member_count
                slot = tl.load(at(members, tl.int64) + number, mask=mask, other=0)
                step = tl.load(at(table, tl.int64) + slot * COLUMNS + STEP, mask=mask, other=0)
                counter = at(step, tl.int64)
                tl.store(counter, tl.load(counter, mask=mask, other=0) + 1, mask=mask)
        if flags & FINAL != 0:
            if skip:
                if flags & REPORT != 0:
                    letter = at(mailbox, tl.int64)
                    tl.store(letter + 1, tl.load(block))
                    # The host reads the count first, the parameter after it: they must arrive in the other order.
                    tl.atomic_add(block + 1, 0, sem="release", scope="sys")
                    tl.store(letter, tl.load(letter) + 1)
                else:
                    tl.store(block + 2, tl.load(block + 2) + 1)
            tl.store(block, NOTHING_BAD)
        tl.store(block + 1, 0)


@launched
def step_kernel(
    table: tl.int64,
    chunks: tl.int64,
    passes: tl.int64,
    grads: tl.int64,
    sums: tl.int64,
    rows: tl.int64,
    seed: tl.int64,
    step_override: tl.int64,
    sample_replica: tl.int64,
    control: tl.int64,
    mailbox: tl.int64,
    found_inf: tl.int64,
    amp_scale: tl.int64,
    adopt: tl.int64,
    flags: tl.int64,
    members: tl.int64,
    member_count: tl.int64,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    SUMS: tl.constexpr,
    DRAW_NEXT: tl.constexpr,
    AWKWARD: tl.constexpr,
    SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The update; weights <- new mean, or the next step's first sample with DRAW_NEXT."""
    slot, row, begin, blocks = program(table, chunks, passes, BLOCK)
    skip = tl.load(at(control, tl.int64)) != NOTHING_BAD
    if found_inf != 0:
        skip = skip | (tl.load(at(found_inf, tl.float32)) != 0.0)
    numel = tl.load(row + NUMEL)
    group = rows + tl.load(row + GROUP) * ROW_BYTES
    index = tl.load(row + INDEX)
    finished = tl.load(at(tl.load(row + STEP), tl.int64))
    step = finished
    if step_override >= 0:
        step = step_override
    ess, weight_decay = precision_scalars(group)
    gradsq = is_gradsq(group)
    k = update_scalars(group, finished, amp_scale)
    grad_address = tl.load(at(grads, tl.int64) + slot)
    next_step = finished + 1
    written = numel  # elements of the weights
    if skip:
        next_step = finished
        if adopt != 0 and not DRAW_NEXT:
            written = numel * 0
    lane, element = elements(BLOCK)
    for _ in range(blocks):
        # Pointers are read in every pass: they are in the cache, and AMD's scalar registers do not hold them all.
        param, layout = tl.load(row + PARAM), tl.load(row + LAYOUT)
        mask = existing(numel, begin, lane, element, AWKWARD)
        weights = weights_at(param, layout, begin, element, DTYPE, AWKWARD)
        means = aligned(tl.load(row + MEAN), begin, tl.float32) + element
        hesses = aligned(tl.load(row + HESS), begin, tl.float32) + element
        mean = tl.load(means, mask=mask, other=0.0)
        hess = tl.load(hesses, mask=mask, other=1.0)
        if not skip:
            momenta = aligned(tl.load(row + MOMENTUM), begin, tl.float32) + element
            momentum = tl.load(momenta, mask=mask, other=0.0)
            grad = gradient(grad_address, numel, layout, begin, lane, element, GRAD_DTYPE, AWKWARD)
            if adopt != 0:
                mean = adopted(mean, weights, mask, DTYPE)
            factor = grad
            if not gradsq:
                factor = noise(row, begin, lane, element, seed, index, step, sample_replica, SHARD)
            second = grad * factor
            if SUMS:
                pair = at(sums, tl.int64) + slot * 2
                grad_sum_address, second_sum_address = tl.load(pair), tl.load(pair + 1)
                used = existing(count_if(grad_sum_address, numel), begin, lane, element, AWKWARD)
                # -0 + x is x for every x: without sums nothing is added.
                grad = tl.load(aligned(grad_sum_address, begin, tl.float32) + element, mask=used, other=-0.0) + grad
                second = (
                    tl.load(aligned(second_sum_address, begin, tl.float32) + element, mask=used, other=-0.0) + second
                )
            mean, momentum, hess = update(grad, second, mean, momentum, hess, ess, weight_decay, gradsq, k)
            tl.store(means, mean, mask=mask)
            tl.store(momenta, momentum, mask=mask)
            tl.store(hesses, hess, mask=mask)
        value = mean
        if DRAW_NEXT:
            eps = noise(row, begin, lane, element, seed, index, next_step, sample_replica & 0xFFFF0000, SHARD)
            value = draw(mean, hess, eps, ess, weight_decay)
        tl.store(weights, rounded(value, DTYPE), mask=existing(written, begin, lane, element, AWKWARD))
        begin += BLOCK
    _finish(table, members, member_count, control, mailbox, skip, flags)
