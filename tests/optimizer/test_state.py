"""State: float32, complete, exact. A resumed run equals an uninterrupted one bit for bit, however it was saved."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from ivon_kernels import IVON
from tests.support.helpers import (
    OPTIONS,
    assert_same,
    bowl,
    flat,
    parameters,
    put,
    slow_but,
    snapshot,
    state,
    through_file,
    train,
    two_groups,
)

pytestmark = pytest.mark.usefixtures("known_normals")

STATE = {"step", "mean", "momentum", "hess"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


WAYS: dict[str, Callable[[Any], Any]] = {
    "the dict itself": lambda saved: saved,
    "weights_only file": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", slow_but(WAYS, "the dict itself", "weights_only file"))
@pytest.mark.parametrize("weights_first", [True, False])
def test_resume_is_exact(backend: str, way: str, dtype: torch.dtype, weights_first: bool) -> None:
    optimizer, params = two_groups(backend, dtype, mc_samples=2)
    train(optimizer, params, 7, samples=2)
    # Everything that the saved state must bring along is different in the one that loads.
    other, others = two_groups(backend, dtype, seed=99, mc_samples=2, weight_decay=0.5, ess=1.0)
    train(other, others, 2, samples=2)
    if weights_first:
        put(others, params)
    other.load_state_dict(WAYS[way](optimizer.state_dict()))
    if not weights_first:
        put(others, params)
    assert_same(snapshot(optimizer), snapshot(other))
    assert other.seed == optimizer.seed
    for who, weights in ((optimizer, params), (other, others)):
        train(who, weights, 5, samples=2, start=7)
    assert_same(snapshot(optimizer), snapshot(other))


def test_the_dict_is_not_a_moving_target_after_load(backend: str) -> None:
    """Loading copies: training on must not change the dict that was loaded, nor the optimizer that it came from."""
    optimizer, params = two_groups(backend)
    train(optimizer, params, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    other, others = two_groups(backend, seed=9)
    other.load_state_dict(saved)
    train(other, others, 3)
    torch.testing.assert_close(saved["state"], kept["state"], rtol=0, atol=0)
    assert saved["param_groups"] == kept["param_groups"]


@pytest.mark.on_triton
@pytest.mark.parametrize("moment", ["mean", "sample", "half a step"])
def test_saving_inside_a_sample_saves_the_mean(backend: str, moment: str) -> None:
    """Saved at any moment, the state holds the mean; the unfinished step is drawn again."""
    optimizer, params = two_groups(backend)
    train(optimizer, params, 3)
    weights = copy.deepcopy(params)
    if moment != "mean":
        optimizer.train()
    if moment == "half a step":
        bowl(params, 50).backward()
    saved = through_file(optimizer.state_dict())
    optimizer.discard_samples()
    optimizer.zero_grad()
    train(optimizer, params, 2, start=3)
    other, others = two_groups(backend, seed=9)
    put(others, weights)
    other.load_state_dict(saved)
    train(other, others, 2, start=3)
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.on_triton
def test_loading_inside_a_sample_leaves_the_mean(backend: str) -> None:
    optimizer, params = two_groups(backend)
    train(optimizer, params, 3)
    saved, weights = through_file(optimizer.state_dict()), flat(params)
    optimizer.train()
    bowl(params, 50).backward()
    optimizer.load_state_dict(saved)
    assert torch.equal(flat(params), weights)
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_float32_and_never_cast_down(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = two_groups(backend, dtype)
    with torch.no_grad():
        for p in params:
            optimizer.state[p]["hess"].fill_(1.001)  # 1.0 in bfloat16
    other, others = two_groups(backend, dtype)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for who, weights in ((optimizer, params), (other, others)):
        for p in weights:
            assert set(who.state[p]) == STATE
            assert who.state[p]["step"].dtype == torch.int64 and who.state[p]["step"].dim() == 0
            for key in STATE - {"step"}:
                assert who.state[p][key].dtype == torch.float32 and who.state[p][key].shape == p.shape
            assert torch.equal(who.state[p]["hess"], torch.full(p.shape, 1.001))


def test_small_steps_of_bfloat16_weights_accumulate(backend: str) -> None:
    """The mean has more bits than the weight: neither a step nor a resume rounds it to bfloat16."""
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = IVON([p], 1e-3, 1e4, beta1=0.0, weight_decay=0.0, rescale_lr=False, backend=backend, seed=0)
    for i in range(10):
        optimizer.train()
        p.grad = torch.ones_like(p)  # the noise is small, so that hess stays at 1 and each step is lr
        optimizer.step()
        other = IVON([p], 1e-3, 1e4, beta1=0.0, weight_decay=0.0, rescale_lr=False, backend=backend, seed=1)
        other.load_state_dict(through_file(optimizer.state_dict()))
        optimizer = other
        torch.testing.assert_close(optimizer.state[p]["mean"], torch.full((64,), 1 - 1e-3 * (i + 1)), rtol=1e-4, atol=0)
    assert torch.equal(p, optimizer.state[p]["mean"].bfloat16())


def test_float64_parameters_have_float64_state() -> None:
    optimizer, params = two_groups("reference", torch.float64)
    train(optimizer, params, 3)
    other, others = two_groups("reference", torch.float64, seed=9)
    put(others, params)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert all(other.state[p][key].dtype == torch.float64 for p in others for key in STATE - {"step"})
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize(("source", "target"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_state_moves_between_parameter_dtypes_unchanged(backend: str, source: torch.dtype, target: torch.dtype) -> None:
    optimizer, params = two_groups(backend, source)
    train(optimizer, params, 3)
    other, others = two_groups(backend, target)
    other.load_state_dict(optimizer.state_dict())
    for key in ("momentum", "hess"):
        assert torch.equal(state(other, key), state(optimizer, key))
    train(other, others, 2)


# --- copies of the optimizer itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inside", [False, True])
def test_a_copy_continues_exactly_and_alone(
    backend: str, duplicate: Callable[[IVON], IVON], dtype: torch.dtype, inside: bool
) -> None:
    optimizer, params = two_groups(backend, dtype)
    train(optimizer, params, 4)
    with optimizer.sampled_params():
        pass  # one evaluation sample on: the copy's counter must be, too
    if inside:
        optimizer.train()
    other = duplicate(optimizer)
    others = [p for group in other.param_groups for p in group["params"]]
    assert torch.equal(flat(others), flat(params)) and not {p.data_ptr() for p in params} & {
        p.data_ptr() for p in others
    }
    before = snapshot(optimizer)
    other.eval()
    other.discard_samples()
    train(other, others, 3, start=4)
    assert_same(before, snapshot(optimizer))
    optimizer.discard_samples()
    train(optimizer, params, 3, start=4)
    assert_same(snapshot(optimizer), snapshot(other))
    with optimizer.sampled_params(), other.sampled_params():
        assert torch.equal(flat(params), flat(others))


@pytest.mark.on_triton
def test_deepcopy_of_model_and_optimizer_together_keeps_them_together(backend: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = IVON(model.parameters(), backend=backend, seed=0, **OPTIONS)
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    train(twin["optimizer"], list(twin["model"].parameters()), 2)
    train(optimizer, list(model.parameters()), 2)
    assert torch.equal(twin["model"].weight, model.weight)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4, dtype=dtype)
        self.second = nn.Linear(4, 2, dtype=dtype)


def fresh_model(backend: str, dtype: torch.dtype, seed: int) -> tuple[Small, IVON, list[nn.Parameter]]:
    model = Small(dtype, seed)
    return model, IVON(model.parameters(), backend=backend, seed=seed, **OPTIONS), list(model.parameters())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("trained_before", [0, 2])
def test_get_and_set_optimizer_state_dict(backend: str, dtype: torch.dtype, trained_before: int) -> None:
    model, optimizer, params = fresh_model(backend, dtype, 1)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert_same(before, snapshot(optimizer))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}

    other_model, other, others = fresh_model(backend, dtype, 2)
    train(other, others, trained_before)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    assert_same(before, snapshot(other))
    train(optimizer, params, 3, start=3)
    train(other, others, 3, start=3)
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_distributed_checkpoint_on_disk(backend: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer, params = fresh_model(backend, dtype, 1)
    train(optimizer, params, 3)
    content = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(content, checkpoint_id=tmp_path, no_dist=True)

    other_model, other, others = fresh_model(backend, dtype, 2)
    target = {"model": other_model.state_dict(), "optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    other_model.load_state_dict(target["model"])
    set_optimizer_state_dict(other_model, other, target["optimizer"])
    assert_same(snapshot(optimizer), snapshot(other))
    assert other.seed == optimizer.seed
    train(optimizer, params, 3, start=3)
    train(other, others, 3, start=3)
    assert_same(snapshot(optimizer), snapshot(other))


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_saved_state_is_no_larger_than_it_must_be(backend: str) -> None:
    params = parameters((64, 64), 64)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    train(optimizer, params, 1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    assert buffer.tell() < 3 * 4 * (64 * 64 + 64) + 20_000


def test_parameters_do_not_share_storage(backend: str) -> None:
    params = parameters((64, 64), 3)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    train(optimizer, params, 1)
    buffer = io.BytesIO()
    torch.save({"head": params[1]}, buffer)
    assert buffer.tell() < 3000


def _tensor_count(saved: dict[str, Any]) -> int:
    return sum(isinstance(v, Tensor) for entry in saved["state"].values() for v in entry.values())


def test_state_exists_before_the_first_step(backend: str) -> None:
    """torch.distributed.checkpoint makes steps of its own where there is none."""
    optimizer, params = two_groups(backend)
    assert _tensor_count(optimizer.state_dict()) == 4 * len(params)
    assert all(isinstance(key, Tensor) for key in optimizer.state)
