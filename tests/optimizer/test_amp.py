"""Mixed precision: GradScaler unscales through the optimizer, a skipped step changes nothing, autocast just works.

The Hessian is checked on a loss of known curvature under every precision, and low-precision weights follow updates far
below their resolution.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from tests.support.helpers import assert_same, bowl, flat, parameters, relative_error, slow_but, snapshot, train
from tests.support.known_curvature import NOISE_ONLY, expected_hessian, hessian_tolerance, initial_weights, quadratic

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "seed": 5}


def fresh(backend: str, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters((4, 3), (5,))
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def draw(optimizer: IVON, params: list[nn.Parameter], modes: bool, scaled: Any) -> None:
    if modes:
        optimizer.train()
        scaled(bowl(params, 0)).backward()
    else:
        with optimizer.sampled_params(train=True):
            scaled(bowl(params, 0)).backward()


modes_and_contexts = pytest.mark.parametrize("modes", [False, True], ids=["context", "modes"])
# Powers of two scale exactly, so that a scaled run must equal the unscaled one bit for bit.
SCALE = 2.0**16


@modes_and_contexts
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_scaled_training_equals_unscaled(
    backend: str, modes: bool, unscale_first: bool, samples: int, hess_approx: str
) -> None:
    expected, others = fresh(backend, mc_samples=samples, hess_approx=hess_approx)
    optimizer, params = fresh(backend, mc_samples=samples, hess_approx=hess_approx)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    for _ in range(5):
        for who, weights, scaled in ((expected, others, lambda x: x), (optimizer, params, scaler.scale)):
            who.zero_grad()
            for sample in range(samples):
                if modes and sample:
                    who.next_sample()
                draw(who, weights, modes, scaled)
        expected.step()
        if unscale_first and samples == 1:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, 1e9)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 4 * SCALE, "the scale grew on the way"
    assert_same(snapshot(expected), snapshot(optimizer))


@pytest.mark.on_triton
@modes_and_contexts
@pytest.mark.parametrize("samples", [1, 2])
def test_a_skipped_step_changes_nothing_and_redraws_nothing(backend: str, modes: bool, samples: int) -> None:
    expected, others = fresh(backend, mc_samples=samples)
    train(expected, others, 3, samples=samples, loss=lambda p, _: bowl(p, 0))
    optimizer, params = fresh(backend, mc_samples=samples)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    skipped: list[Tensor] = []
    for step in range(3):
        before = snapshot(optimizer)
        for factor in (float("inf"), 1.0):
            for sample in range(samples):
                if modes and sample:
                    optimizer.next_sample()
                optimizer.zero_grad()
                draw(optimizer, params, modes, lambda x, f=factor: scaler.scale(f * x))
                if factor != 1.0:
                    skipped.append(flat(params))
            scaler.step(optimizer)
            scaler.update()
            if factor != 1.0:
                optimizer.eval()
                assert_same(before, snapshot(optimizer))
        assert int(optimizer.state[params[0]]["step"]) == step + 1
    optimizer.eval()
    assert_same(snapshot(expected), snapshot(optimizer))


def test_the_scaler_sees_support(backend: str) -> None:
    optimizer, _ = fresh(backend)
    assert optimizer._step_supports_amp_scaling is True


@pytest.mark.on_triton
@pytest.mark.parametrize("found", [0.0, 1.0])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_found_inf_and_grad_scale_as_attributes(backend: str, found: float, scale: float | None) -> None:
    """What the scaler sets on the optimizer, set by hand, as fused optimizers take it."""
    expected, others = fresh(backend)
    if not found:
        train(expected, others, 1)
    optimizer, params = fresh(backend)
    optimizer.train()
    (bowl(params, 0) * (scale or 1.0)).backward()
    grads = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.found_inf = torch.tensor(found)
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
    optimizer.eval()
    assert_same(snapshot(expected), snapshot(optimizer))
    for p, g in zip(params, grads, strict=True):
        # Whether p.grad is unscaled in place is not promised; it must be one or the other.
        assert p.grad is not None and (torch.equal(p.grad, g) or torch.equal(p.grad, g / (scale or 1.0)))


@pytest.mark.on_triton
def test_found_inf_with_nan_gradients_is_no_error(backend: str) -> None:
    """The scaler already decided to skip: raising as well would end every mixed-precision run."""
    optimizer, params = fresh(backend)
    before = snapshot(optimizer)
    optimizer.train()
    bowl(params, 0).backward()
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.eval()
    assert_same(before, snapshot(optimizer))


def test_a_step_not_taken_at_all_redraws_nothing(backend: str) -> None:
    """After unscale_ found an inf, or through Accelerate, step() is never called."""
    expected, others = fresh(backend)
    train(expected, others, 1)
    optimizer, params = fresh(backend)
    optimizer.train()
    sample = flat(params)
    bowl(params, 9).backward()
    optimizer.zero_grad()
    optimizer.train()
    assert torch.equal(flat(params), sample)
    bowl(params, 0).backward()
    optimizer.step()
    assert_same(snapshot(expected), snapshot(optimizer))


@modes_and_contexts
@pytest.mark.slow
def test_autocast_bfloat16(backend: str, modes: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(256, 8)
    y = x @ torch.randn(8, 1)
    optimizer = IVON(model.parameters(), backend=backend, lr=0.3, ess=1e4, hess_init=0.1, seed=0)
    losses = []
    for _ in range(150):
        if modes:
            optimizer.train()
        with optimizer.sampled_params(train=True) if not modes else torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16):
                prediction = model(x)
                assert prediction.dtype == torch.bfloat16
                loss = nn.functional.mse_loss(prediction.float(), y)
            optimizer.zero_grad()
            loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_autocast_cache_does_not_hide_the_sample(backend: str) -> None:
    """Autocast caches casts of the weights; a sample written in place within one autocast region must still be seen."""
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = IVON([weight], backend=backend, **OPTIONS)
    with torch.autocast("cpu", torch.bfloat16), optimizer.sampled_params(train=True):
        product = torch.eye(8) @ weight
        product.float().sum().backward()
        assert relative_error(product.detach(), weight.detach()) < 0.01
    optimizer.step()


STEPS = 60


@modes_and_contexts
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "bfloat16 weights", "float16 weights"])
def test_the_hessian_is_right_in_every_precision(backend: str, modes: bool, precision: str) -> None:
    """Autocast, for float16 with a scale that overflows at first and again after it grew; and weights of 16 bits.

    The rounding of a weight or gradient, at most 2^-9 of it, is independent of the noise, so it adds to the estimate's
    variance alone, by less than 2^-17 of it.
    """
    name, _, weights = precision.partition(" ")
    dtype = getattr(torch, name)
    weight = nn.Parameter(initial_weights().to(dtype if weights else torch.float32))
    optimizer = IVON([weight], backend=backend, **NOISE_ONLY)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=20, enabled=precision == "float16")
    scales = []
    for _ in range(STEPS):
        if modes:
            optimizer.train()
        with optimizer.sampled_params(train=True) if not modes else torch.enable_grad():
            with torch.autocast("cpu", dtype, enabled=not weights):
                loss = quadratic(weight)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        optimizer.zero_grad()
    optimizer.eval()
    taken = int(optimizer.state[weight]["step"])
    if precision == "float16":
        changes = [b / a for a, b in pairwise(scales) if a != b]
        assert {0.5, 2.0} == set(changes) and optimizer.skipped_steps == STEPS - taken >= 2
    else:
        assert taken == STEPS
    hess = float(optimizer.state[weight]["hess"].mean())
    assert hess == pytest.approx(expected_hessian(taken), abs=hessian_tolerance())


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16, torch.float16], torch.bfloat16))
def test_updates_below_the_resolution_of_the_weights_add_up(backend: str, dtype: torch.dtype) -> None:
    """Steps of 1/32 of the distance between bfloat16 numbers (1/4 for float16), which a rounded weight would lose."""
    steps, move = 100, 2.0**-12
    low, high = (nn.Parameter(torch.full((64,), 1.0, dtype=kind)) for kind in (dtype, torch.float32))
    for weight in (low, high):
        # Momentum and curvature are constant, so every step moves the mean by lr * g / (h + d).
        optimizer = IVON([weight], lr=move, ess=1e12, beta2=1 - 1e-12, weight_decay=0.0, backend=backend, seed=0)
        for _ in range(steps):
            optimizer.train()
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
    assert torch.equal(low, high.to(dtype))
    # g / h differs from 1 by the estimate g^ eps sqrt(L h) times (1 - beta2): below 1e-5; then the rounding of the sum.
    resolution = torch.finfo(dtype).eps
    torch.testing.assert_close(low.float(), torch.full((64,), 1 + steps * move), rtol=0, atol=resolution / 2 + 1e-5)
    assert move <= resolution / 4 and float(low.detach().min()) > 1 + 2 * resolution


# ---- autocast keeps casts of weights for the length of a region, whatever is written into them -----------------------


def _outputs(optimizer: IVON, layer: nn.Linear, x: Tensor) -> list[Tensor]:
    """What one region's passes give: two MC samples, the mean after the step, an evaluation sample, the mean again."""
    seen = []
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            seen.append(layer(x))
            seen[-1].float().square().mean().backward()
    optimizer.step()
    seen.append(layer(x))
    with optimizer.sampled_params():
        seen.append(layer(x))
    seen.append(layer(x))
    optimizer.train()
    seen.append(layer(x))
    optimizer.eval()
    seen.append(layer(x))
    return [y.detach().float() for y in seen]


def test_weights_are_cast_anew_in_an_autocast_region() -> None:
    """One region around everything equals one without the cache."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))

    def run(cache: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(16, 3)
        optimizer = IVON(layer.parameters(), lr=0.1, ess=50.0, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
            return _outputs(optimizer, layer, x)

    seen = run(True)
    for got, expected in zip(seen, run(False), strict=True):
        assert torch.equal(got, expected)
    first, second, mean, evaluated, again, trained, last = seen
    assert torch.equal(mean, again) and torch.equal(mean, last)
    assert all(not torch.equal(a, b) for a, b in ((first, second), (second, mean), (mean, evaluated), (mean, trained)))


def test_loaded_weights_are_cast_anew_in_an_autocast_region() -> None:
    layer, x = nn.Linear(16, 3), torch.randn(8, 16)
    optimizer = IVON(layer.parameters(), lr=0.1, ess=50.0, seed=1)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x)
        optimizer.train()
        layer(x).float().square().mean().backward()
        optimizer.step()
        assert not torch.equal(layer(x), before)
        optimizer.load_state_dict(saved)
        assert torch.equal(layer(x), before)


def test_a_posteriors_samples_are_cast_anew_in_an_autocast_region() -> None:
    net, x = nn.Linear(16, 3), torch.randn(8, 16)
    posterior = IVON(net.parameters(), lr=0.1, ess=50.0, seed=1).posterior(net)

    def entropy() -> Tensor:
        return posterior.predict(net, x, samples=4, score=lambda model, batch: model(batch)).mutual_information

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        expected = entropy()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x)
        assert torch.equal(entropy(), expected) and bool((expected > 0).all())
