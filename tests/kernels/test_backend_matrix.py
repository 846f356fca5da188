"""Training on every backend has the bits of the reference on the CPU: dtypes, strides, tails, groups, samples."""

from __future__ import annotations

import itertools

import pytest

from tests.support.matrix import (
    CPU,
    DTYPES,
    EMULATED,
    GPU_TARGETS,
    INTERPRETED,
    LAYOUTS,
    OTHER_PTX,
    PTX,
    SAMPLES,
    VARIANTS,
    Case,
    Target,
    assert_has_the_bits_of_the_reference,
)

PRODUCT = [Case(*values) for values in itertools.product(DTYPES, LAYOUTS, SAMPLES, VARIANTS)]

# For daily work, and for PTX, which takes a hundred times longer: every value of every axis, each dtype in
# every layout, each variant with one sample and with several (kernels of their own), several samples in memory order
# and in another.
COVERING = [
    Case("float32", "contiguous", 3, "one pass"),
    Case("float32", "channels_last", 3, "gradsq"),
    Case("float32", "strided", 1, "plain"),
    Case("bfloat16", "contiguous", 3, "plain"),
    Case("bfloat16", "channels_last", 1, "no debias"),
    Case("bfloat16", "strided", 1, "one pass"),
    Case("float16", "contiguous", 1, "plain"),
    Case("float16", "channels_last", 3, "clipped"),
    Case("float16", "strided", 1, "gradsq"),
    Case("mixed", "contiguous", 1, "clipped"),
    Case("mixed", "channels_last", 3, "no debias"),
    Case("mixed", "strided", 1, "clipped"),
]

MATRIX = [
    *((target, case) for case in PRODUCT for target in (CPU, EMULATED)),  # in a row: they share the reference's run
    *((INTERPRETED, case) for case in COVERING[::4]),  # the PTX takes half of its time, and is what a GPU runs
    *((target, case) for case in COVERING for target in PTX),
    *((target, case) for case in COVERING[::5] for target in OTHER_PTX),
    *((target, case) for target in GPU_TARGETS for case in PRODUCT),
]


def _param(target: Target, case: Case) -> object:
    marks = [pytest.mark.gpu] if target in GPU_TARGETS else []
    if case not in COVERING or target.gpu:  # PTX has to be compiled where it is not kept
        marks.append(pytest.mark.slow)
    return pytest.param(target, case, marks=marks, id=f"{target}-{case}")


@pytest.mark.parametrize(("target", "case"), [_param(*entry) for entry in MATRIX])
def test_training_has_the_bits_of_the_reference(target: Target, case: Case) -> None:
    with target.in_use():
        assert_has_the_bits_of_the_reference(target, case)


def test_the_covering_cases_cover() -> None:
    """Every value of every axis, every dtype in every layout, every variant with one sample and with several."""
    assert {(case.dtype, case.layout) for case in COVERING} == set(itertools.product(DTYPES, LAYOUTS))
    assert {(case.variant, case.samples) for case in COVERING} == set(itertools.product(VARIANTS, SAMPLES))
