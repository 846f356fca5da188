"""`IVON.for_lora`: the published recipe, and what it works out for other lengths and a given sigma."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.finetune.tasks import LAPTOP
from ivon_kernels import IVON
from tests.support.helpers import flat, parameters, train


def test_for_lora_is_the_published_recipe() -> None:
    optimizer = IVON.for_lora(parameters(3), 400, seed=1)
    group = optimizer.param_groups[0]
    expected = {
        "lr": 0.03,
        "hess_init": 1e-3,
        "clip_radius": 1e-3,
        "beta2": 0.99999,
        "rescale_lr": False,
        "debias": True,
    }
    assert {key: group[key] for key in expected} == expected
    assert group["ess"] >= 400 and group["hess_approx"] == "price" and optimizer.seed == 1


@pytest.mark.parametrize(("steps", "lr"), [(60, 1.5), (1000, 0.09), (5000, 0.03), (100_000, 0.03)])
def test_for_lora_lets_a_short_run_go_as_far(steps: int, lr: float) -> None:
    assert IVON.for_lora(parameters(3), 400, steps=steps).param_groups[0]["lr"] == pytest.approx(lr)
    wider = IVON.for_lora(parameters(3), 400, steps=steps, clip_radius=1e-4).param_groups[0]
    assert wider["lr"] == pytest.approx(max(0.03, 900 / steps))
    assert IVON.for_lora(parameters(3), 400, steps=steps, lr=0.2).param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("num_data", "given", "expected"),
    [
        (200, {"sigma": 0.0088, "steps": 60}, (1.5, 3.2e5, 0.04)),  # what the main job does
        (200, {"sigma": 0.06, "steps": 240}, (1.0, 6.9e3, 0.04)),
        (200, {"sigma": 0.06}, (0.03, 6.9e3, 0.04)),
        (10**6, {"sigma": 0.01}, (0.03, 1e6, 0.01)),  # ess = num_data: hess_init gives way
        (200, {"sigma": 0.01, "ess": 1e6}, (0.03, 1e6, 0.01)),
        (200, {"sigma": 0.01, "hess_init": 0.1}, (0.03, 1e5, 0.1)),
    ],
)
def test_for_lora_finds_what_gives_sigma(num_data: int, given: dict[str, Any], expected: tuple[float, ...]) -> None:
    optimizer = IVON.for_lora(parameters(3), num_data, weight_decay=0.0, **given)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["ess"], group["hess_init"]) == pytest.approx(expected, rel=0.01)
    assert group["beta2"] == 0.999
    assert optimizer.diagnostics()[0]["sigma"][0.5] == pytest.approx(given["sigma"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"sigma": math.nan}, "sigma must be positive"),
        ({"sigma": 0.1, "ess": 1e5, "hess_init": 0.1}, "two decide the third"),
        ({"sigma": 0.1, "hess_init": 1.0}, "ess 100, less than num_data .* make it 0.25 or less"),
    ],
)
def test_for_lora_refuses_a_sigma_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IVON.for_lora(parameters(3), 400, **given)


@pytest.mark.parametrize("steps", [0, -3, math.nan])
def test_for_lora_refuses_a_bad_number_of_steps(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        IVON.for_lora(parameters(3), 400, steps=steps)


def test_for_lora_takes_every_other_argument(backend: str) -> None:
    optimizer = IVON.for_lora(
        parameters(3),
        400,
        lr=0.1,
        ess=1e7,
        hess_init=3e-4,
        clip_radius=0.01,
        weight_decay=1e-6,
        mc_samples=2,
        backend=backend,
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["ess"], group["hess_init"], group["clip_radius"]) == (0.1, 1e7, 3e-4, 0.01)
    assert group["weight_decay"] == 1e-6
    with pytest.raises(TypeError):
        IVON.for_lora(parameters(3), 400, lr_rate=0.1)


@pytest.mark.parametrize("num_data", [0, -5, math.nan])
def test_for_lora_refuses_a_bad_data_count(num_data: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="num_data"):
        IVON.for_lora(parameters(3), num_data)


def test_for_lora_moves_a_weight_by_at_most_lr_times_clip(backend: str) -> None:
    params = parameters(64)
    optimizer = IVON.for_lora(params, 400, backend=backend, seed=0)
    before = flat(params)
    train(optimizer, params, 1)
    moved = (flat(params) - before).abs()
    assert 0 < float(moved.max()) <= 3e-5 + 2**-23 * float(before.abs().max())


def test_the_main_job_has_the_settings_of_for_lora() -> None:
    group = IVON.for_lora(parameters(3), LAPTOP.train_size or 0, steps=LAPTOP.steps, sigma=0.0088).param_groups[0]
    given = (LAPTOP.ivon_lr, LAPTOP.ess, LAPTOP.hess_init, LAPTOP.clip_radius, LAPTOP.beta2)
    found = tuple(group[name] for name in ("lr", "ess", "hess_init", "clip_radius", "beta2"))
    assert given == pytest.approx(found, rel=0.02)
