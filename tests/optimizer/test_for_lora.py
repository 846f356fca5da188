"""`IVON.for_lora`: AdamW's learning rate translated, the noise that goes with a run, and the published recipe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from ivon_kernels import IVON
from tests.support.helpers import flat, parameters, train

SIZE = 0.02  # root mean square of the factors that do not start at zero


class Adapted(nn.Module):
    """A layer with LoRA's factors, named as PEFT names them, a norm beside them, and frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.base = nn.Linear(64, 64).requires_grad_(False)
        factor = torch.randn(8, 64, generator=generator)
        self.lora_A = nn.ParameterDict({"default": nn.Parameter(factor * SIZE / factor.square().mean().sqrt())})
        self.lora_B = nn.ParameterDict({"default": nn.Parameter(torch.zeros(64, 8))})
        self.norm = nn.LayerNorm(64)


def sigma(group: dict[str, Any]) -> float:
    return float((group["ess"] * group["hess_init"]) ** -0.5)


def step(group: dict[str, Any]) -> float:
    """How far one step takes a weight."""
    return float(group["lr"] * group["clip_radius"])


def test_adamws_learning_rate_decides_the_step() -> None:
    model = Adapted()
    for rate in (1e-4, 1e-3):
        factors, beside = IVON.for_lora(model, 200, learning_rate=rate, steps=500).param_groups
        assert step(factors) == pytest.approx(0.5 * rate) == step(beside)
    (whole,) = IVON.for_lora(parameters(3), 200).param_groups
    assert step(whole) == pytest.approx(0.5e-3)  # torch's default for AdamW


def test_a_step_stays_below_the_size_of_the_weights() -> None:
    factors, beside = IVON.for_lora(Adapted(), 200, learning_rate=0.1, steps=500).param_groups
    assert step(factors) == pytest.approx(0.04 * SIZE)
    assert step(beside) == pytest.approx(0.04)  # of a norm's ones
    (whole,) = IVON.for_lora(parameters(3), 200, learning_rate=0.1, steps=500).param_groups
    assert step(whole) == pytest.approx(0.05)


def test_what_is_trained_beside_lora_is_a_group_of_its_own() -> None:
    model = Adapted()
    factors, beside = IVON.for_lora(model, 200, learning_rate=1e-3, steps=1000, epochs=10).param_groups
    assert set(factors["params"]) == {model.lora_A["default"], model.lora_B["default"]}
    assert set(beside["params"]) == {model.norm.weight, model.norm.bias}
    assert beside["param_names"] == ["norm.weight", "norm.bias"]
    assert sigma(beside) == pytest.approx(0.1)  # a tenth of the norm's ones
    assert sigma(factors) == pytest.approx(2 * SIZE)


def test_sigma_grows_with_the_epochs_and_shrinks_with_the_data() -> None:
    model = Adapted()

    def found(**given: Any) -> float:
        return sigma(IVON.for_lora(model, **{"num_data": 200, "learning_rate": 1e-3, **given}).param_groups[0])

    assert found() == found(epochs=0.5) == pytest.approx(0.2 * SIZE)
    assert found(epochs=4) == pytest.approx(0.8 * SIZE)
    assert found(epochs=10) == found(epochs=100) == pytest.approx(2 * SIZE)
    assert found(epochs=4, num_data=800) == pytest.approx(0.4 * SIZE)
    assert found(epochs=10, num_data=10) == pytest.approx(2 * SIZE)
    assert found(steps=100) == found(epochs=4)  # in batches of 8
    assert found(steps=100, num_data=8) > found(steps=100, num_data=200) > found(steps=100, num_data=80_000)


def test_large_factors_of_small_models_get_less_noise_for_their_size() -> None:
    """What the noise adds to the frozen weights is a product of both factors."""
    with torch.no_grad():
        (model := Adapted()).lora_A["default"].mul_(0.1 / SIZE)
    factors, _ = IVON.for_lora(model, 200, learning_rate=1e-2, steps=500, epochs=10).param_groups
    assert sigma(factors) == pytest.approx(0.31 * math.sqrt(0.1))


def test_a_short_run_gets_no_more_noise_than_it_can_learn_against() -> None:
    (short,) = IVON.for_lora(Adapted().lora_A.parameters(), 8, learning_rate=1e-3, steps=15, epochs=30).param_groups
    assert sigma(short) == pytest.approx(1.5 * 0.5e-3 * 15 / 2)


def test_the_factors_of_unnamed_parameters_are_known_by_a_zero_matrix() -> None:
    model = Adapted()
    factors = [*model.lora_A.parameters(), *model.lora_B.parameters()]
    (lora,) = IVON.for_lora(factors, 200, learning_rate=0.1, steps=500, epochs=10).param_groups
    assert (step(lora), sigma(lora)) == pytest.approx((0.04 * SIZE, 2 * SIZE))
    (whole,) = IVON.for_lora(nn.Linear(64, 64), 200, learning_rate=0.1, steps=500, epochs=10).param_groups
    assert (step(whole), sigma(whole)) == pytest.approx((0.05, 1 / math.sqrt(3 * 64)), rel=0.1)


def test_frozen_weights_do_not_count() -> None:
    model = Adapted()
    packed = nn.Parameter(torch.ones(64, 64, dtype=torch.uint8), requires_grad=False)  # as QLoRA's base
    factors = [*model.lora_A.parameters(), *model.lora_B.parameters()]
    expected = IVON.for_lora(factors, 200, steps=500, epochs=10).param_groups[0]
    found = IVON.for_lora([packed, *model.base.parameters(), *factors], 200, steps=500, epochs=10).param_groups[0]
    assert (step(found), sigma(found)) == (step(expected), sigma(expected))


def test_groups_that_were_made_already_keep_what_they_say() -> None:
    model = Adapted()
    groups = [
        {"params": list(model.lora_A.named_parameters(prefix="lora_A")), "lr": 0.3},
        {"params": list(model.norm.named_parameters()), "weight_decay": 0.1},
    ]
    first, second = IVON.for_lora(groups, 200, learning_rate=1e-3, steps=500).param_groups
    assert (first["lr"], second["weight_decay"]) == (0.3, 0.1)
    assert step(second) == pytest.approx(0.5e-3)
    assert groups[0].keys() == {"params", "lr"}


@pytest.mark.parametrize(
    ("num_data", "given", "expected"),
    [
        (200, {"sigma": 0.06}, (1 / (0.06**2 * 0.04), 0.04)),
        (10**6, {"sigma": 0.01}, (1e6, 0.01)),  # ess = num_data: hess_init gives way
        (200, {"sigma": 0.01, "ess": 1e6}, (1e6, 0.01)),
        (200, {"sigma": 0.01, "hess_init": 0.1}, (1e5, 0.1)),
    ],
)
def test_a_given_sigma_is_what_the_noise_starts_with(
    num_data: int, given: dict[str, Any], expected: tuple[float, ...]
) -> None:
    optimizer = IVON.for_lora(parameters(3), num_data, steps=60, **given)
    group = optimizer.param_groups[0]
    assert (group["ess"], group["hess_init"]) == pytest.approx(expected, rel=0.01)
    assert optimizer.diagnostics()[0]["sigma"][0.5] == pytest.approx(given["sigma"])


@pytest.mark.parametrize("wide", [0.003, 0.01, 0.03, 0.06])
def test_noise_alone_does_not_drive_the_hessian(wide: float) -> None:
    """With gradients of pure noise, of up to hess_init, the stationary estimate is at most 1.15 hess_init^2 / hess."""
    group = IVON.for_lora(parameters(3), 200, sigma=wide).param_groups[0]
    driven = 0.5 * (1 - group["beta2"]) * group["ess"] * group["hess_init"] ** 2  # times 1 / hess
    assert driven <= 0.1501 * group["hess_init"]


@pytest.mark.parametrize(("ess", "hess_init"), [(None, 1e-3), (1e6, 1e-3), (1e7, 3e-4), (1e8, 3e-4)])
def test_the_published_recipe(ess: float | None, hess_init: float) -> None:
    optimizer = IVON.for_lora(Adapted(), 400, recipe="paper", ess=ess, steps=10_000, seed=1)
    for group in optimizer.param_groups:
        expected = {
            "lr": 0.03,
            "ess": ess or 1e6,
            "hess_init": hess_init,
            "clip_radius": 1e-3,
            "beta2": 0.99999,
            "weight_decay": 0.0,
            "rescale_lr": False,
            "debias": True,
            "hess_approx": "price",
        }
        assert {key: group[key] for key in expected} == expected
    assert optimizer.seed == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": math.nan}, "sigma must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"sigma": 0.1, "ess": 1e5, "hess_init": 0.1}, "two decide the third"),
        ({"sigma": 0.1, "hess_init": 1.0}, "ess 100, less than num_data .* make it 0.25 or less"),
        ({"lr": 1.0, "learning_rate": 1e-3}, "say the same thing twice"),
        ({"recipe": "paper", "sigma": 0.1}, "has its own lr, ess and hess_init"),
        ({"recipe": "papers"}, "recipe must be 'paper' or None"),
        *(({"steps": steps}, "steps must be at least 1") for steps in (0, -3, math.nan)),
        *(({"num_data": count}, "num_data must be at least 1") for count in (0, -5, math.nan)),
    ],
    ids=str,
)
def test_for_lora_refuses_what_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON.for_lora(parameters(3), **{"num_data": 400, **given})


def test_for_lora_takes_every_other_argument(backend: str) -> None:
    given = {"lr": 0.1, "ess": 1e7, "hess_init": 3e-4, "clip_radius": 0.01, "beta2": 0.9, "weight_decay": 1e-6}
    optimizer = IVON.for_lora(parameters(3), 400, mc_samples=2, backend=backend, **given)
    assert {name: optimizer.param_groups[0][name] for name in given} == given
    with pytest.raises(TypeError):
        IVON.for_lora(parameters(3), 400, lr_rate=0.1)


def test_for_lora_moves_a_weight_by_at_most_a_step(backend: str) -> None:
    params = parameters(64)
    optimizer = IVON.for_lora(params, 400, backend=backend, seed=0)
    before = flat(params)
    train(optimizer, params, 1)
    moved = (flat(params) - before).abs()
    assert 0 < float(moved.max()) <= 0.5e-3 + 2**-23 * float(before.abs().max())
