"""Addresses of parameters and gradients: read in C and in Python, with the same result."""

from __future__ import annotations

import ctypes
import operator
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import _native
from ivon_kernels.backends import addresses as pointers
from ivon_kernels.backends.addresses import IRREGULAR, LAYOUT_WIDTH, MAX_DIMS, MISSING, Addresses

CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=["c", "python"])
def use_c(request: pytest.FixtureRequest) -> bool:
    if request.param == "c" and pointers.unavailable() is not None:
        pytest.skip(f"C: {pointers.unavailable()}")
    return bool(request.param == "c")


def parameters() -> list[Tensor]:
    """Contiguous, 0-dimensional, empty, channels_last, transposed, sliced, with size-1 dimensions; three dtypes."""
    return [
        nn.Parameter(torch.randn(5, 3)),
        nn.Parameter(torch.randn(())),
        nn.Parameter(torch.randn(0, 4)),
        nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=CHANNELS_LAST)),
        nn.Parameter(torch.randn(3, 7).t()),
        nn.Parameter(torch.randn(6, 8)[:, ::2]),
        nn.Parameter(torch.randn(6, 1, 1, dtype=torch.float16)),
        torch.randn(2, 2).requires_grad_(),
    ]


def backward(params: list[Tensor]) -> None:
    for param in params:
        param.grad = None
    torch.stack([param.float().square().sum() for param in params if param.requires_grad]).sum().backward()


def versions(p: Addresses) -> tuple[int, int, int]:
    return p.params_version, p.grads_version, p.layouts_version


def offsets(sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Where the elements are, in row-major order."""
    where = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(sizes, strides, strict=True):
        where = where.unsqueeze(-1) + torch.arange(size) * stride
    return where.flatten()


def check(p: Addresses, params: list[Tensor], grads: list[Tensor | None]) -> None:
    """The arrays say where parameters and gradients are."""
    codes = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
    assert list(p.params) == [param.data_ptr() for param in params]
    expected = [(0, 0) if grad is None else (grad.data_ptr(), codes[grad.dtype]) for grad in grads]
    assert list(zip(p.grads, p.grad_dtypes, strict=True)) == expected
    for param, grad, address, row in zip(params, grads, p.layouts, p.layout_rows, strict=True):
        if row is None:
            assert address == 0 and param.is_contiguous() and (grad is None or grad.is_contiguous())
            continue
        assert list((ctypes.c_int64 * LAYOUT_WIDTH).from_address(address)) == list(row)
        sizes, param_strides, grad_strides = (row[at : at + row[0]] for at in range(1, LAYOUT_WIDTH, MAX_DIMS))
        assert torch.equal(offsets(sizes, param_strides), offsets(param.shape, param.stride()))
        if grad is not None:
            assert torch.equal(offsets(sizes, grad_strides), offsets(grad.shape, grad.stride()))


def test_addresses_in_steady_state(use_c: bool) -> None:
    params = parameters()
    p = Addresses(params, use_c)
    assert p.count == len(params) and p.uses_c == use_c and not p.moved()
    for _ in range(3):
        backward(params)
        assert p.read_grads() == 0
        check(p, params, [param.grad for param in params])
    before = versions(p)
    assert p.read_grads() == 0 and not p.moved()
    p.record()
    p.set_grads([param.grad for param in params])
    assert versions(p) == before
    assert before[2] == 1  # the gradients' strides were foreseen


def test_layout_merges_dimensions(use_c: bool) -> None:
    p = Addresses([nn.Parameter(torch.randn(4, 3, 2, 5).to(memory_format=CHANNELS_LAST))], use_c)
    row = p.layout_rows[0]
    assert row is not None and row[0] == 3
    assert [list(row[begin : begin + 3]) for begin in (1, 1 + MAX_DIMS)] == [[4, 3, 10], [30, 1, 3]]


def test_too_many_strided_dimensions_are_refused(use_c: bool) -> None:
    many = torch.empty(40).as_strided([2] * (MAX_DIMS + 1), [0, 3] * 13)
    with pytest.raises(ValueError, match="26 strided dimensions"):
        Addresses([many], use_c)


def replace_data(param: Tensor) -> None:
    param.data = param.data.clone()


def restride(param: Tensor) -> None:
    param.data = param.data.as_strided((5, 3), (1, 5))


def reshape(param: Tensor) -> None:
    param.data = param.data.view(3, 5)


def change_dtype(param: Tensor) -> None:
    param.data = param.data.view(torch.float16)[:, :3]


def to_meta(param: Tensor) -> None:
    torch.utils.swap_tensors(param, nn.Parameter(torch.empty(5, 3, device="meta")))


class Special(nn.Parameter):
    pass


def change_type(param: Tensor) -> None:
    param.__class__ = Special


freeze = operator.methodcaller("requires_grad_", False)


@pytest.mark.parametrize("edit", [replace_data, restride, reshape, change_dtype, freeze, to_meta, change_type])
def test_moved(use_c: bool, edit: Callable[[Tensor], None]) -> None:
    params: list[Tensor] = [nn.Parameter(torch.randn(shape)) for shape in ((2,), (5, 3), (2,))]
    p = Addresses(params, use_c)
    old = params[1].data
    edit(params[1])
    assert p.moved() and p.moved()
    assert p.moved(trained=False) == (edit is not freeze)
    del old
    if edit is to_meta:
        return
    before = p.params_version
    p.record()
    assert not p.moved() and (p.params_version != before) == (edit is replace_data)
    check(p, params, [None] * 3)
    if edit is not change_dtype:
        backward(params)
        assert p.read_grads() == (MISSING if edit is freeze else 0)
        check(p, params, [param.grad for param in params])


def test_strides_that_mean_nothing_do_not_count(use_c: bool) -> None:
    param = nn.Parameter(torch.randn(4, 1))
    single = nn.Parameter(torch.randn(1, 1))
    p = Addresses([param, single], use_c)
    param.data = param.data.as_strided((4, 1), (1, 9))
    single.data = single.data.as_strided((1, 1), (7, 5))
    assert not p.moved() and not p.moved()
    param.grad = torch.randn(4).as_strided((4, 1), (1, 3))
    single.grad = torch.randn(1).as_strided((1, 1), (2, 3))
    assert p.read_grads() == 0
    p.set_grads([param.grad, single.grad])
    assert p.read_grads() == 0 and list(p.layouts) == [0, 0]


def test_missing_gradients(use_c: bool) -> None:
    params = parameters()
    p = Addresses(params, use_c)
    assert p.read_grads() == MISSING and p.grads_version == 0
    backward(params)
    params[3].grad = None
    assert p.read_grads() == MISSING
    check(p, params, [param.grad for param in params])
    before = versions(p)
    assert p.read_grads() == MISSING and versions(p) == before
    params[0].grad = None
    assert p.read_grads() == MISSING and p.grads_version != before[1]
    p.set_grads([param.grad for param in params])
    check(p, params, [param.grad for param in params])


def test_gradient_of_another_dtype(use_c: bool) -> None:
    """Torch refuses it as `grad`, but MC samples and tensors swapped in place may have it."""
    param = nn.Parameter(torch.randn(4))
    p = Addresses([param], use_c)
    grad = torch.randn(4).bfloat16()
    p.set_grads([grad])
    check(p, [param], [grad])
    param.grad = torch.randn(4)
    param.grad.data = grad
    before = p.grads_version
    assert p.read_grads() == 0 and p.grads_version == before
    check(p, [param], [grad])


def grad_strided() -> Tensor:
    return torch.randn(3, 4).t()


def grad_expanded() -> Tensor:
    return torch.randn(3).expand(4, 3)


def grad_sliced() -> Tensor:
    return torch.randn(4, 6)[:, ::2]


@pytest.mark.parametrize("make", [grad_strided, grad_expanded, grad_sliced])
def test_other_strides_are_irregular_until_recorded(use_c: bool, make: Callable[[], Tensor]) -> None:
    params: list[Tensor] = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2))]
    p = Addresses(params, use_c)
    params[1].grad = torch.randn(2)
    for step in range(3):
        params[0].grad = make()
        before = versions(p)
        flags = p.read_grads()
        assert flags == (0 if step else IRREGULAR)
        if flags:
            p.set_grads([param.grad for param in params])
            assert p.layouts_version == before[2] + 1 and p.grads_version != before[1]
        check(p, params, [param.grad for param in params])
    params[0].grad = None  # what was recorded outlives a missing gradient
    assert p.read_grads() == MISSING
    params[0].grad = make()
    assert p.read_grads() == 0
    params[0].grad = torch.randn(4, 3)
    assert p.read_grads() == IRREGULAR
    p.set_grads([param.grad for param in params])
    assert p.read_grads() == 0 and list(p.layouts) == [0, 0]


class Wrapped(Tensor):
    pass


def odd(kind: str) -> Tensor:
    if kind == "sparse":
        return torch.sparse_coo_tensor(torch.tensor([[0], [1]]), torch.ones(1), (4, 3), check_invariants=True)
    if kind == "negative":
        return torch.randn(4, 3, dtype=torch.complex64).conj().imag
    if kind == "subclass":
        return torch.randn(4, 3).as_subclass(Wrapped)
    grad = torch.randn(4, 3)
    others = {"float64": grad.double(), "meta": grad.to("meta"), "shape": torch.randn(3, 4), "int": grad.int()}
    return others[kind]


@pytest.mark.parametrize("kind", ["sparse", "negative", "subclass", "float64", "shape", "int"])
def test_irregular_gradients(use_c: bool, kind: str) -> None:
    params: list[Tensor] = [nn.Parameter(torch.randn(shape)) for shape in ((2,), (4, 3), (2,))]
    p = Addresses(params, use_c)
    grads: list[Tensor | None] = [torch.randn(2), odd(kind), None]
    params[0].grad = grads[0]
    params[1].grad = torch.zeros(4, 3)
    if kind in ("sparse", "negative", "subclass"):
        params[1].grad = grads[1]
    else:
        params[1].grad.data = odd(kind)  # what torch refuses as `grad`
    before = p.grads_version
    assert p.read_grads() == IRREGULAR  # ctypes.PyDLL raises an exception that is left pending
    assert p.grads_version != before
    if kind == "subclass":
        p.set_grads(grads)
        check(p, params, grads)
    elif kind != "negative":
        with pytest.raises((TypeError, ValueError), match=r"a gradient has (layout|dtype|shape)"):
            p.set_grads(grads)
    params[1].grad = torch.randn(4, 3)
    p.set_grads([param.grad for param in params])
    assert p.read_grads() == MISSING


@pytest.mark.parametrize("shape", [(), (1, 1), (3,)])
def test_negative_gradients_are_resolved(use_c: bool, shape: tuple[int, ...]) -> None:
    param = nn.Parameter(torch.randn(shape))
    p = Addresses([param], use_c)
    param.grad = torch.randn(shape, dtype=torch.complex64).conj().imag
    for _ in range(2):
        assert p.read_grads() == IRREGULAR
        p.set_grads([param.grad])
        held = (ctypes.c_float * param.numel()).from_address(p.grads[0])
        assert list(held) == param.grad.flatten().tolist()


def test_gradients_that_do_not_fit_are_refused(use_c: bool) -> None:
    none = Addresses([], use_c)
    none.set_grads([])
    assert none.read_grads() == 0 and not none.moved()
    p = Addresses([nn.Parameter(torch.randn(4, 3))], use_c)
    with pytest.raises(ValueError, match="on meta, its parameter"):
        p.set_grads([odd("meta")])
    with pytest.raises(ValueError, match="zip"):
        p.set_grads([])


def test_under_a_default_device(use_c: bool) -> None:
    params = parameters()
    with torch.device("cpu"):
        p = Addresses(params, use_c)
        backward(params)
        assert p.read_grads() == 0 and not p.moved()
        check(p, params, [param.grad for param in params])
        replace_data(params[0])
        assert p.moved()


class OwnGrad(nn.Parameter):
    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return super().grad


def test_a_parameter_with_its_own_grad_is_read_in_python() -> None:
    param = OwnGrad(torch.randn(3))
    param.square().sum().backward()
    p = Addresses([param])
    assert not p.uses_c
    assert p.read_grads() == 0
    check(p, [param], [param.grad])


def test_no_leaks(use_c: bool) -> None:
    params = parameters()
    backward(params)
    sparse = nn.Parameter(torch.randn(4, 3))
    sparse.grad = odd("sparse")
    watched: list[object] = [*params, *[param.grad for param in params], sparse, sparse.grad, Tensor, True, None]
    p, irregular = Addresses(params, use_c), Addresses([sparse], use_c)

    before = list(map(sys.getrefcount, watched))
    for _ in range(1000):
        p.read_grads()
        p.moved()
    for _ in range(10):
        irregular.read_grads()
        irregular.moved()
    p.record()
    after = list(map(sys.getrefcount, watched))
    # The interpreter itself moves the counts of None, True and types a little.
    assert all(abs(a - b) < 100 for a, b in zip(after, before, strict=True))
    assert after[:-3] == before[:-3]


@pytest.mark.skipif(pointers.unavailable() is not None, reason=f"C: {pointers.unavailable()}")
def test_both_paths_agree_on_random_edits() -> None:
    random = torch.Generator().manual_seed(1)

    def choose(count: int) -> int:
        return int(torch.randint(count, (), generator=random))

    makers = [grad_strided, grad_expanded, grad_sliced, lambda: odd("negative"), lambda: odd("sparse")]
    params: list[Tensor] = [nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
    both = Addresses(params, True), Addresses(params, False)
    for _ in range(300):
        param, event = params[choose(4)], choose(8)
        if event == 0:
            param.data = [torch.randn(4, 3), torch.randn(3, 4).t(), torch.randn(4, 6)[:, :3]][choose(3)]
        else:
            param.grad = [None, makers[choose(len(makers))](), torch.randn(4, 3)][min(event - 1, 2)]
        before = [versions(p) for p in both]
        moved = [p.moved() for p in both]
        assert moved[0] == moved[1]
        flags = []
        for p in both:
            if moved[0]:
                p.record()
            flags.append(p.read_grads())
        assert flags[0] == flags[1]
        if flags[0] == IRREGULAR:
            for other in params:
                if other.grad is not None and (other.grad.is_sparse or other.grad.is_neg()):
                    other.grad = None
            for p in both:
                p.set_grads([other.grad for other in params])
        changed = [[a != b for a, b in zip(versions(p), old, strict=True)] for p, old in zip(both, before, strict=True)]
        assert changed[0] == changed[1]
        assert both[0].layout_rows == both[1].layout_rows
        for p in both:
            check(p, params, [other.grad for other in params])


def test_reasons_for_the_python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    built = pointers.unavailable() is None
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__dlpack_c_exchange_api__", object(), raising=False)
        pointers._load.cache_clear()
        assert not built or "not a DLPack exchange API" in str(pointers.unavailable())
        patch.setattr(_native, "find_library", lambda name: None)
        patch.setattr(_native, "missing_reason", lambda name: f"no {name}")
        pointers._load.cache_clear()
        assert pointers.unavailable() == "no host"
        assert not Addresses([nn.Parameter(torch.randn(2))]).uses_c
        patch.delattr(Tensor, "__dlpack_c_exchange_api__")
        pointers._load.cache_clear()
        assert "torch 2.11" in str(pointers.unavailable())
    pointers._load.cache_clear()
