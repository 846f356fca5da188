"""The tool that executes PTX (tests/support/ptx): known values, and what it must refuse."""

from __future__ import annotations

import ctypes
import ctypes.util
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.ptx.arithmetic import fused
from tests.support.ptx.machine import program
from tests.support.ptx.memory import Global, Span, span_of
from tests.support.ptx.text import PtxError

HEAD = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 first, .param .u64 second)
.reqntid %d
{
    .reg .pred %%p<9>; .reg .b16 %%h<9>; .reg .b32 %%r<33>; .reg .f32 %%f<9>; .reg .b64 %%d<9>; .reg .f64 %%g<9>;
    .shared .align 16 .b8 tile[1024];
    ld.param.u64 %%d1, [first];
    ld.param.u64 %%d2, [second];
    mov.u32 %%r0, %%tid.x;
"""
# Thread t has its four bytes of `first` in %r1, and of `second` in %r2.
LOADED = """
    mul.wide.u32 %d3, %r0, 4;
    add.s64 %d1, %d1, %d3;
    add.s64 %d2, %d2, %d3;
    ld.global.b32 %r1, [%d1];
    ld.global.b32 %r2, [%d2];
"""
STORED = "st.global.b32 [%d1], %r3;"


def run(
    body: str, first: Tensor, second: Tensor, *, threads: int = 64, grid: int = 1, spans: list[Span] | None = None,
    seed: int | None = None,
) -> None:  # fmt: skip
    """Execute a kernel of two tensors."""
    memory = Global([span_of(first, "first"), span_of(second, "second")] if spans is None else spans)
    code = program(HEAD % threads + body + "\nret;\n}\n", "kernel")
    code.run(grid, struct.pack("<2q", first.data_ptr(), second.data_ptr()), memory, seed=seed)


def numbers(seed: int, dtype: torch.dtype = torch.int32, count: int = 64) -> Tensor:
    """Any bits; of floats, numbers of every size."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        scale = torch.randint(-20, 20, (count,), generator=generator)
        return torch.randn(count, generator=generator) * torch.exp2(scale.float())
    values = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    return values.to(torch.int32)


def signed(value: int) -> int:
    value &= 2**32 - 1
    return value - 2**32 if value >> 31 else value


def unsigned(value: int) -> int:
    return value & (2**32 - 1)


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32 %r3, %r1, %r2": lambda a, b: a + b,
    "sub.u32 %r3, %r1, %r2": lambda a, b: a - b,
    "mul.lo.s32 %r3, %r1, %r2": lambda a, b: a * b,
    "mul.hi.u32 %r3, %r1, %r2": lambda a, b: unsigned(a) * unsigned(b) >> 32,
    "mul.hi.s32 %r3, %r1, %r2": lambda a, b: a * b >> 32,
    "mad.lo.s32 %r3, %r1, %r2, 7": lambda a, b: a * b + 7,
    "mul.wide.u32 %d4, %r1, %r2; shr.u64 %d4, %d4, 16; cvt.u32.u64 %r3, %d4": lambda a, b: (
        unsigned(a) * unsigned(b) >> 16
    ),
    "div.u32 %r3, %r1, %r2": lambda a, b: unsigned(a) // unsigned(b),
    "div.s32 %r3, %r1, 7": lambda a, b: abs(a) // 7 * (1 if a >= 0 else -1),
    "rem.s32 %r3, %r1, 7": lambda a, b: abs(a) % 7 * (1 if a >= 0 else -1),
    "shr.s32 %r3, %r1, 5": lambda a, b: a >> 5,
    "shr.s32 %r3, %r1, 40": lambda a, b: a >> 31,
    "shl.b32 %r3, %r1, 32": lambda a, b: 0,
    "shl.b32 %r3, %r1, 3": lambda a, b: a << 3,
    "bfe.s32 %r3, %r1, 5, 25": lambda a, b: signed(a << 2) >> 7,
    "bfe.u32 %r3, %r1, 28, 9": lambda a, b: unsigned(a) >> 28,
    "bfi.b32 %r3, %r1, %r2, 4, 8": lambda a, b: b & ~0xFF0 | (a & 0xFF) << 4,
    "prmt.b32 %r3, %r1, %r2, 0x5410": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r3, %r1, %r2, 0x7632": lambda a, b: unsigned(a) >> 16 | unsigned(b) >> 16 << 16,
    "lop3.b32 %r3, %r1, %r2, -1, 0x28": lambda a, b: a ^ b,
    "shf.l.wrap.b32 %r3, %r1, %r2, 8": lambda a, b: b << 8 | unsigned(a) >> 24,
    "min.s32 %r3, %r1, %r2": min,
    "max.u32 %r3, %r1, %r2": lambda a, b: max(unsigned(a), unsigned(b)),
    "popc.b32 %r3, %r1": lambda a, b: unsigned(a).bit_count(),
    "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r3, 1, 2, %p1": lambda a, b: 1 if unsigned(a) < unsigned(b) else 2,
    "setp.lt.s32 %p1, %r1, %r2; mov.b32 %r3, 5; @!%p1 add.s32 %r3, %r3, 1": lambda a, b: 5 if a < b else 6,
    "cvt.s64.s32 %d4, %r1; min.s64 %d4, %d4, -3; cvt.u32.u64 %r3, %d4": lambda a, b: min(a, -3),
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r3, %h1": lambda a, b: a & 0xFFFF,
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r3, {%h2, %h1}": lambda a, b: unsigned(a) >> 16 | (a & 0xFFFF) << 16,
}


@pytest.mark.parametrize("code", INTEGERS)
def test_integers(code: str) -> None:
    first, second = numbers(1), numbers(2)
    expected = [signed(INTEGERS[code](a, b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    run(f"{LOADED}{code};{STORED}", first, second)
    assert first.tolist() == expected


FLOATS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul.rn.f32 %r3, %r1, %r2": torch.mul,
    "div.rn.f32 %r3, %r1, %r2": torch.div,
    "abs.f32 %r3, %r1; sqrt.rn.f32 %r3, %r3": lambda a, b: a.abs().double().sqrt().float(),
    "sub.rn.f32 %r3, %r1, 0f3F000000": lambda a, b: a - 0.5,
    "fma.rn.f32 %r3, %r1, %r2, %r1": lambda a, b: (a.double() * b.double() + a.double()).float(),
    "setp.gt.f32 %p1, %r1, %r2; selp.f32 %r3, %r1, %r2, %p1": torch.maximum,
    "cvt.rn.bf16.f32 %h1, %r1; cvt.f32.bf16 %r3, %h1": lambda a, b: a.bfloat16().float(),
    "cvt.rn.f16.f32 %h1, %r1; cvt.f32.f16 %r3, %h1": lambda a, b: a.half().float(),
    "cvt.rn.bf16x2.f32 %r4, %r1, %r2; and.b32 %r3, %r4, 0xffff0000": lambda a, b: a.bfloat16().float(),
    "cvt.rni.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r3, %r4": lambda a, b: a.round(),
    "cvt.rzi.f32.f32 %r3, %r1": lambda a, b: a.trunc(),
    "cvt.f64.f32 %g1, %r1; mul.rn.f64 %g1, %g1, 0d3FD5555555555555; cvt.rn.f32.f64 %r3, %g1": lambda a, b: (
        a.double() / 3
    ).float(),
}


@pytest.mark.parametrize("code", FLOATS)
def test_floats(code: str) -> None:
    first, second = numbers(1, torch.float32), numbers(2, torch.float32)
    expected = FLOATS[code](first, second)
    run(f"{LOADED}{code};{STORED}", first, second)
    assert torch.equal(first, expected)


def test_subnormal_numbers_are_flushed_where_the_code_says_so() -> None:
    tiny = torch.full((64,), 1e-39)
    for code, expected in (("mul", tiny), ("mul.ftz", torch.zeros(64))):
        first = tiny.clone()
        run(f"{LOADED}{code}.f32 %r3, %r1, %r2;{STORED}", first, torch.ones(64))
        assert torch.equal(first, expected)


def test_fused_multiply_add_is_rounded_once() -> None:
    """Against the C library: operands whose sum is next to a tie, where rounding twice goes wrong."""
    library = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    library.argtypes, library.restype = [ctypes.c_float] * 3, ctypes.c_float
    random = np.random.default_rng(0)
    a, b = ((1 + random.integers(0, 2**23, 4000) * 2.0**-23).astype(np.float32) for _ in range(2))
    c = (random.choice([1, -1], 4000) * np.exp2(random.integers(-60, 60, 4000))).astype(np.float32)
    a[:9] = b[:9] = np.float32(1 + 2.0**-12)  # the product is a tie
    c[:9] = np.float32(2.0**-60)
    expected = np.array([library(*map(float, row)) for row in zip(a, b, c, strict=True)], dtype=np.float32)
    assert np.array_equal(fused(a, b, c), expected)
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert not np.array_equal(twice, expected)


LOOP = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
again:
    setp.ge.u32 %p1, %r4, %r0;
    @%p1 bra done;
    and.b32 %r5, %r4, 1;
    setp.eq.u32 %p2, %r5, 0;
    @%p2 bra even;
    add.u32 %r3, %r3, 100;
    bra.uni next;
even:
    add.u32 %r3, %r3, 1;
next:
    add.u32 %r4, %r4, 1;
    bra.uni again;
done:
"""


@pytest.mark.parametrize("seed", [None, 1])
def test_threads_part_and_meet_again(seed: int | None) -> None:
    first = numbers(1)
    run(LOADED + LOOP + STORED, first, numbers(2), seed=seed)
    assert first.tolist() == [(t + 1) // 2 + t // 2 * 100 for t in range(64)]


BARRIER = "bar.sync 0;"
THROUGH_SHARED = """
    mov.b32 %r6, tile;
    shl.b32 %r7, %r0, 2;
    add.s32 %r8, %r6, %r7;
    st.shared.b32 [%r8], %r1;
    {barrier}
    xor.b32 %r9, %r7, 252;
    add.s32 %r9, %r6, %r9;
    ld.shared.b32 %r3, [%r9];
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_shared_memory(seed: int | None) -> None:
    first = numbers(1)
    expected = first.flip(0)
    run(LOADED + THROUGH_SHARED.format(barrier=BARRIER) + STORED, first, numbers(2), seed=seed)
    assert torch.equal(first, expected)


LAST_BLOCK = """
    setp.ne.u32 %p1, %r0, 0;
    mov.u32 %r4, %nctaid.x;
    sub.u32 %r4, %r4, 1;
    mov.u32 %r5, %ctaid.x;
    mov.u32 %r6, 0;
    @!%p1 atom.global.gpu.acq_rel.add.u32 %r6, [%d1], 1;
    @%p1 bra done;
    mul.wide.u32 %d3, %r6, 4;
    add.s64 %d4, %d2, %d3;
    st.global.u32 [%d4], %r5;
    setp.ne.u32 %p2, %r6, %r4;
    @%p2 bra done;
    st.global.u32 [%d1], 1000;
done:
"""


def test_blocks_come_in_every_order() -> None:
    orders = set()
    for seed in (None, 1, 2):
        count, order = torch.zeros(1, dtype=torch.int32), torch.full((9,), -1, dtype=torch.int32)
        run(LAST_BLOCK, count, order, grid=9, seed=seed)
        assert count.item() == 1000 and sorted(order.tolist()) == list(range(9))
        orders.add(tuple(order.tolist()))
    assert len(orders) == 3


COUNTED = """
    ld.global.b32 %r7, [%d2];
    setp.ne.u32 %p1, %r0, 0;
    mov.u32 %r4, %nctaid.x;
    sub.u32 %r4, %r4, 1;
    mov.u32 %r6, 0;
    {barrier}
    @!%p1 atom.global.gpu.acq_rel.add.u32 %r6, [%d1], 1;
    @%p1 bra done;
    setp.ne.u32 %p2, %r6, %r4;
    @%p2 bra done;
    st.global.u32 [%d2], 1000;
done:
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_races_in_global_memory(seed: int | None) -> None:
    """What all threads of all blocks read may be written by the last block once each has said that it is done."""
    count, word = torch.zeros(2, 1, dtype=torch.int32)
    run(COUNTED.format(barrier="bar.sync 0;"), count, word, grid=9, seed=seed)
    assert word.item() == 1000
    # One that is volatile may be old, which is known to whoever writes it so.
    peeked = "ld.volatile.global.b32 %r7, [%d1]; atom.global.gpu.acq_rel.add.u32 %r6, [%d1], 1;"
    run(peeked, torch.zeros(1, dtype=torch.int32), word, grid=9, seed=seed)
    wrong = {
        "a block is counted before its second warp has read": COUNTED.format(barrier=""),
        "all write, in any order": "st.global.u32 [%d2], 1000;",
        "a counter that is read besides": "ld.global.b32 %r7, [%d1]; atom.global.gpu.acq_rel.add.u32 %r6, [%d1], 1;",
    }
    for body in wrong.values():
        with pytest.raises(PtxError, match="a race in global memory"):
            run(body, torch.zeros(1, dtype=torch.int32), word, grid=9, seed=seed)


def test_matrix_products() -> None:
    """``ldmatrix`` brings a matrix to the places where ``mma`` wants it, `second` is stored as its transpose."""
    left, right = (torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)).bfloat16() for rows in (16, 8))
    given, product = torch.cat((left, right)), torch.zeros(16, 8)
    rows = "".join(
        f"add.s64 %d6, %d5, {row * 32 + 4 * column}; ld.global.b32 %r3, [%d6]; st.shared.b32 [%r8+{row * 32}], %r3;"
        for row in range(24)
        for column in (0,)
    )
    body = f"""
        mov.b32 %r6, tile;
        and.b32 %r7, %r0, 7; shl.b32 %r7, %r7, 2; add.s32 %r8, %r6, %r7; cvt.u64.u32 %d3, %r7; add.s64 %d5, %d1, %d3;
        {rows}
        bar.sync 0;
        and.b32 %r10, %r0, 15; shl.b32 %r10, %r10, 5; shr.u32 %r11, %r0, 4; shl.b32 %r11, %r11, 4;
        add.s32 %r10, %r10, %r11; add.s32 %r10, %r10, %r6;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r12, %r13, %r14, %r15}}, [%r10];
        and.b32 %r10, %r0, 7; shl.b32 %r10, %r10, 5; bfe.u32 %r11, %r0, 3, 1; shl.b32 %r11, %r11, 4;
        add.s32 %r10, %r10, %r11; add.s32 %r10, %r10, %r6;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r16, %r17}}, [%r10+512];
        mov.b32 %r20, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r20, %r21, %r22, %r23}}, {{%r12, %r13, %r14, %r15}},
            {{%r16, %r17}}, {{%r20, %r20, %r20, %r20}};
        shl.b32 %r24, %r0, 3; cvt.u64.u32 %d3, %r24; add.s64 %d4, %d2, %d3;
        st.global.v2.b32 [%d4], {{%r20, %r21}};
        st.global.v2.b32 [%d4+256], {{%r22, %r23}};
    """
    run(body, given, product, threads=32)
    assert torch.allclose(product, left.float() @ right.float().T, rtol=0, atol=1e-5)


WRONG: dict[str, tuple[str, str]] = {
    "an opcode that is not known": ("dp4a.u32.u32 %r3, %r1, %r2, %r1;", "unknown instruction: dp4a"),
    "a modifier that is not known": ("add.sat.magic.s32 %r3, %r1, %r2;", "unknown instruction: add.sat.magic"),
    "a rounding that is not known": ("add.rz.f32 %r3, %r1, %r2;", "unknown rounding"),
    "beyond the end": ("ld.global.b32 %r3, [%d1+4];", "outside of every allocation"),
    "before the begin": ("st.global.b32 [%d1+-8], %r1;", "outside of every allocation"),
    "across two tensors": ("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%d1];", "past a boundary"),
    "off its alignment": ("ld.global.b64 %d4, [%d1];", "past a boundary"),
    "a write to what is read only": ("st.global.b32 [%d2], %r1;", "read only"),
    "global memory that nobody wrote": ("ld.global.b32 %r3, [%d1];", "nobody wrote"),
    "shared memory that nobody wrote": ("ld.shared.b32 %r3, [tile+16];", "nobody wrote"),
    "beyond shared memory": ("st.shared.b32 [tile+1024], %r1;", "of shared memory"),
    "a store of a register without a value": ("st.global.b32 [%d2], %r30;", "r30 has no value"),
    "a store of what is computed from one": (
        "add.s32 %r3, %r1, %r30; sub.s32 %r4, %r3, %r30; st.global.b32 [%d2], %r4;",
        "r4 has no value",
    ),
    "an address without a value": ("add.s64 %d4, %d1, %d8; ld.global.b32 %r3, [%d4];", "d4 has no value"),
    "a branch by what has no value": ("setp.eq.u32 %p1, %r30, 3; @%p1 bra end; mov.u32 %r3, 1; end:", "no value"),
    "a predicate without a value": ("setp.eq.u32 %p1, %r30, 3; @%p1 mov.u32 %r3, 1;", "p1 has no value"),
    "a vote of what has no value": ("vote.sync.any.pred %p2, %p1, -1;", "p1 has no value"),
    "a register with a value for some": (
        "setp.eq.u32 %p1, %r0, 3; @%p1 mov.u32 %r30, 1; mov.u32 %r3, %r30; st.global.b32 [%d2], %r3;",
        "r3 has no value",
    ),
    "an exchange that brings no value": (
        "setp.eq.u32 %p1, %r0, 3; @!%p1 mov.u32 %r30, 1; shfl.sync.bfly.b32 %r3, %r30, 1, 31, -1;"
        "setp.eq.u32 %p2, %r0, 2; @%p2 st.global.b32 [%d2], %r3;",
        "r3 has no value",
    ),
    "a race of a read": (THROUGH_SHARED.format(barrier=""), "a race|nobody wrote"),
    "a race of writes": ("st.shared.b32 [tile], %r1;", "a race"),
    "a barrier that some do not reach": ("setp.lt.u32 %p1, %r0, 40; @%p1 bra end; bar.sync 0; end: bar.sync 0;", ""),
    "a shuffle that misses a thread": (
        "setp.eq.u32 %p1, %r0, 3; @%p1 bra end; shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1; end:",
        "missing",
    ),
    "a division by zero": ("div.u32 %r3, %r1, 0;", "division by zero"),
    "another barrier": ("bar.sync 1, 32;", "unknown barrier"),
    "a copy that nobody waits for": (
        "shl.b32 %r8, %r0, 2; mov.b32 %r6, tile; add.s32 %r8, %r8, %r6;"
        "cp.async.ca.shared.global [%r8], [%d1], 0x4; ld.shared.b32 %r3, [%r8];",
        "nobody wrote",
    ),
}


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("name", WRONG)
def test_errors(name: str, seed: int | None) -> None:
    body, message = WRONG[name]
    first, second = numbers(1), numbers(2)
    spans = None
    load = LOADED
    if "read only" in name:
        spans = [span_of(first, "first"), span_of(second, "second", read_only=True)]
    if "global memory" in name:
        spans = [span_of(first, "first", written=False), span_of(second, "second")]
        load = LOADED.replace("ld.global.b32 %r1, [%d1]", "mov.b32 %r1, 0")
    if message:
        with pytest.raises(PtxError, match=message):
            run(load + body, first, second, spans=spans, seed=seed)
    else:  # threads that wait at two places of one barrier are no error; that some are gone is none
        run(load + body, first, second)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_comparisons_of_two_halves(kind: str, dtype: torch.dtype) -> None:
    """As Triton 3.4 and 3.5 look for edited weights."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.5, float("nan"), float("inf")]).to(dtype)
    pairs = torch.cartesian_prod(values, values)[torch.arange(64) % 36]
    first, second = pairs[:, 0].repeat_interleave(2)[:128], pairs[:, 1].repeat_interleave(2).roll(1)[:128]
    expected = (first != second).view(64, 2).int() @ torch.tensor([1, 2], dtype=torch.int32)
    result = first.contiguous().view(torch.int32).clone()
    body = (
        f"setp.neu.{kind} %p1|%p2, %r1, %r2; selp.b32 %r3, 1, 0, %p1; selp.b32 %r4, 2, 0, %p2; add.u32 %r3, %r3, %r4;"
    )
    run(LOADED + body + STORED, result, second.contiguous().view(torch.int32))
    assert result.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", [None, 1])
def test_values_that_nobody_uses_need_not_be_there(seed: int | None) -> None:
    """A sum over the first four of 64 threads, as compilers write it: the others add what they never loaded."""
    first, second = numbers(4, count=4), numbers(1, count=1)
    run(
        """
        setp.lt.u32 %p1, %r0, 4; shl.b32 %r2, %r0, 2; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d1, %d3;
        @%p1 ld.global.b32 %r1, [%d4];
        shfl.sync.bfly.b32 %r3, %r1, 2, 31, -1; add.s32 %r3, %r3, %r1;
        shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1; add.s32 %r4, %r4, %r3;
        setp.eq.u32 %p2, %r0, 0; @%p2 st.global.b32 [%d2], %r4;
        """,
        first,
        second,
        seed=seed,
    )
    assert second.item() == signed(int(first.sum()))


def test_threads_that_never_come() -> None:
    """One waits for the others, who wait for it to go on: told instead of waited for."""
    body = "setp.eq.u32 %p1, %r0, 3; @%p1 bra end; bar.sync 0; end: vote.sync.any.pred %p2, %p1, -1;"
    with pytest.raises(PtxError, match="missing"):
        run(LOADED + body, numbers(1), numbers(2))


def test_where_it_happened_is_told() -> None:
    with pytest.raises(PtxError, match=r"kernel: .* nearest is first, 256 bytes.* in: ld\.global\.b32 %r3, \[%d1\+4\]"):
        run(LOADED + "ld.global.b32 %r3, [%d1+4];", numbers(1), torch.zeros(64, dtype=torch.int32)[:0].new_zeros(64))
