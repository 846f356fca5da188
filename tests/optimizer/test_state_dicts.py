"""State dicts of ivon-opt are taken; dicts that do not fit are refused, and change nothing."""

from __future__ import annotations

import copy
from typing import Any

import ivon
import pytest
import torch
from torch import nn

from ivon_kernels import IVON
from tests.support.helpers import (
    OPTIONS,
    assert_same,
    bowl,
    fed_with_our_normals,
    flat,
    parameters,
    put,
    relative_error,
    snapshot,
    state,
    through_file,
    train,
    two_groups,
)


def ivon_opt_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "beta1": 0.8, "hess_init": 0.2}]


def test_an_ivon_opt_dict_loads(backend: str) -> None:
    theirs = parameters((4, 3), 5, 1)
    source = ivon.IVON(ivon_opt_groups(theirs), **{**OPTIONS, "ess": 50.0})
    with fed_with_our_normals(5, [[12], [5, 1]]):
        train(source, theirs, 4)
    optimizer, params = two_groups(backend)
    put(params, theirs)
    with pytest.warns(UserWarning, match="step count"):
        optimizer.load_state_dict(through_file(source.state_dict()))
    for key in ("momentum", "hess"):
        assert torch.equal(state(optimizer, key), state(source, key))
    assert [g["ess"] for g in optimizer.param_groups] == [50.0, 50.0]
    assert torch.equal(torch.cat([optimizer.state[p]["mean"].flatten() for p in params]), flat(theirs))
    train(optimizer, params, 2, start=4)
    assert flat(params).isfinite().all()


def test_an_ivon_opt_dict_loads_over_a_trained_optimizer(backend: str) -> None:
    """What the optimizer knew before leaves no trace; what ivon-opt does not save (seed, step) is documented."""
    theirs = parameters((4, 3), 5, 1)
    source = ivon.IVON(ivon_opt_groups(theirs), **OPTIONS)
    train(source, theirs, 4)
    results = []
    for trained in (0, 3):
        optimizer, params = two_groups(backend)
        train(optimizer, params, trained)
        put(params, theirs)
        with pytest.warns(UserWarning, match="step count"):
            optimizer.load_state_dict(source.state_dict())
        results.append(torch.cat([state(optimizer, "momentum"), state(optimizer, "hess"), state(optimizer, "mean")]))
    assert torch.equal(*results)


def test_an_ivon_opt_run_continues_with_its_step_count(backend: str) -> None:
    """Given the count that ivon-opt does not save, our next steps are those that ivon-opt would have taken."""
    theirs = parameters((4, 3), 5, 1)
    source = ivon.IVON(ivon_opt_groups(theirs), **OPTIONS)
    optimizer, params = two_groups(backend)
    with fed_with_our_normals(5, [[12], [5, 1]]):
        train(source, theirs, 4)
        saved = copy.deepcopy(source.state_dict())
        saved["state"]["current_step"] = source.current_step
        put(params, theirs)
        optimizer.load_state_dict(saved)
        train(source, theirs, 3, start=4)
    train(optimizer, params, 3, start=4)
    assert relative_error(flat(params), flat(theirs)) < 1e-5


def test_an_ivon_opt_dict_with_an_unfinished_step_is_refused(backend: str) -> None:
    theirs = parameters((4, 3), 5, 1)
    source = ivon.IVON(ivon_opt_groups(theirs), **OPTIONS, mc_samples=2)
    with source.sampled_params(train=True):
        bowl(theirs, 0).backward()
    optimizer, _ = two_groups(backend)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="between"):
        optimizer.load_state_dict(source.state_dict())
    assert_same(before, snapshot(optimizer))


# --- wrong dicts -----------------------------------------------------------------------------------------------------


def broken(saved: dict[str, Any], how: str) -> dict[str, Any]:
    saved = copy.deepcopy(saved)
    first = saved["state"][0]
    if how == "missing key":
        del first["hess"]
    elif how == "wrong shape":
        first["hess"] = first["hess"][:-1]
    elif how == "transposed shape":
        first["momentum"] = first["momentum"].t()
    elif how == "group missing":
        saved["param_groups"].pop()
    elif how == "group size":
        saved["param_groups"][0]["params"].append(99)
    elif how == "hyperparameter missing":
        del saved["param_groups"][1]["ess"]
    elif how == "bad hyperparameter":
        saved["param_groups"][1]["ess"] = -1.0
    elif how == "no groups":
        del saved["param_groups"]
    elif how == "negative step":
        first["step"] = torch.tensor(-1)
    elif how == "not a tensor":
        first["hess"] = "hess"
    elif how == "another optimizer":
        p = parameters((4, 3), 5, 1)
        adam = torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}])
        bowl(p, 0).backward()
        adam.step()
        saved = adam.state_dict()
    return saved


WRONG = [
    "missing key", "wrong shape", "transposed shape", "group missing", "group size",
    "hyperparameter missing", "bad hyperparameter", "no groups", "negative step", "not a tensor", "another optimizer",
]  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_dict_raises_and_changes_nothing(backend: str, how: str) -> None:
    source, weights = two_groups(backend, seed=9)
    train(source, weights, 2)
    optimizer, params = two_groups(backend)
    train(optimizer, params, 2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)) as caught:
        optimizer.load_state_dict(broken(source.state_dict(), how))
    assert len(str(caught.value)) > 15, "the error says something"
    assert_same(before, snapshot(optimizer))
    assert optimizer.state_dict()["param_groups"] == groups and optimizer.seed == 5
    train(optimizer, params, 1)


def test_a_parameter_that_was_frozen_at_the_save_starts_two_groups(backend: str) -> None:
    """Gradual unfreezing: a parameter without saved state gets the initial one, and its own value stays."""
    frozen = parameters((4, 3), 5, 1)
    frozen[1].requires_grad_(False)
    source = IVON(frozen, backend=backend, seed=5, **OPTIONS)
    train(source, [frozen[0], frozen[2]], 3)
    saved = through_file(source.state_dict())
    assert set(saved["state"]) == {0, 2}
    params = parameters((4, 3), 5, 1)
    other = IVON(params, backend=backend, seed=9, **OPTIONS)
    put(params, frozen)
    other.load_state_dict(saved)
    assert int(other.state[params[1]]["step"]) == 0 and int(other.state[params[0]]["step"]) == 3
    assert torch.equal(other.state[params[1]]["mean"], frozen[1])
    train(other, params, 1)


def test_an_ivon_opt_dict_of_another_model_raises(backend: str) -> None:
    optimizer, _ = two_groups(backend)
    before = snapshot(optimizer)
    others = parameters((4, 4), 5, 1)
    with pytest.raises(ValueError, match="elements"):
        optimizer.load_state_dict(ivon.IVON(ivon_opt_groups(others), **OPTIONS).state_dict())
    assert_same(before, snapshot(optimizer))
