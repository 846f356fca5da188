"""Hyperparameters: what is refused, what groups override, schedulers, backends and diagnostics."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import ivon
import pytest
import torch
from torch import nn

from ivon_kernels import IVON, available_backends, noise
from tests.support.helpers import Equations, assert_same, bowl, flat, parameters, relative_error, snapshot, train

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 0.01, "seed": 3}

INTEGRATIONS = Path(__file__).parents[2] / "docs" / "integrations.md"


def fresh(backend: str | None = None, **options: Any) -> tuple[IVON, list[nn.Parameter]]:
    params = parameters((4, 3), 5)
    return IVON(params, backend=backend, **{**OPTIONS, **options}), params


def test_signature_and_defaults_are_ivon_opts() -> None:
    def of(cls: type) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(cls).parameters.values()
        return [(p.name, p.default, p.kind) for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert of(IVON) == of(ivon.IVON)
    for key, value in ivon.IVON(parameters(3), lr=0.1, ess=1.0).defaults.items():
        assert IVON(parameters(3), lr=0.1, ess=1.0).defaults[key] == value


NAN, INF = math.nan, math.inf
BAD: list[tuple[str, Any]] = [
    *(("lr", v) for v in (-1e-9, NAN, INF, "0.1", None)),
    *(("ess", v) for v in (0.0, -1.0, NAN, INF, None)),
    *(("hess_init", v) for v in (0.0, -1.0, NAN, INF)),
    *(("beta1", v) for v in (-0.1, 1.0, 1.5, NAN)),
    *(("beta2", v) for v in (-0.1, 1.0, 1.5, NAN)),
    *(("weight_decay", v) for v in (-1e-9, NAN, INF)),
    *(("clip_radius", v) for v in (0.0, -1.0, NAN)),
    *(("mc_samples", v) for v in (0, -1, 1.5, None, 2**16 + 1)),
    *(("hess_approx", v) for v in ("", "Price", "hutchinson", None)),
]
ONLY_OPTIMIZER: list[tuple[str, Any]] = [
    *(("seed", v) for v in (-1, 2**64, 1.5, "x")),
    ("backend", "cuda-please"),
    ("nonfinite", "warn"),
]


@pytest.mark.parametrize(("name", "value"), BAD + ONLY_OPTIMIZER)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        fresh(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in BAD if n != "mc_samples"])
def test_a_bad_value_in_a_group_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        IVON([{"params": parameters(3)}, {"params": parameters(4), name: value}], **OPTIONS)


@pytest.mark.parametrize("name", ["mc_samples", "sync"])
def test_optimizer_wide_values_in_a_group_are_refused(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        IVON([{"params": parameters(3)}, {"params": parameters(4), name: 3}], **OPTIONS)


@pytest.mark.parametrize("name", ["weight_deacy", "betas", "hess_int"])
def test_misspelt_overrides_are_refused(name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=name):
        IVON([{"params": parameters(3), name: 3}], **OPTIONS)


def test_labels_in_groups_are_kept() -> None:
    """Schedulers and users keep keys of their own in the groups."""
    assert IVON([{"params": parameters(3), "name": "head"}], **OPTIONS).param_groups[0]["name"] == "head"


@pytest.mark.parametrize(
    "value",
    [{"lr": 0.0}, {"weight_decay": 0.0}, {"beta1": 0.0}, {"beta2": 0.0}, {"clip_radius": INF}, {"seed": 2**64 - 1}],
)
def test_the_edges_are_accepted(backend: str, value: dict[str, Any]) -> None:
    optimizer, params = fresh(backend, **value)
    train(optimizer, params, 2)
    assert flat(params).isfinite().all()


def test_no_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        IVON([], **OPTIONS)


def test_lr_zero_moves_nothing(backend: str) -> None:
    optimizer, params = fresh(backend, lr=0.0)
    before = flat(params)
    train(optimizer, params, 3)
    assert torch.equal(flat(params), before)


# Every hyperparameter that a group may override, with a value that makes a difference.
OVERRIDES: dict[str, Any] = {
    "lr": 0.01, "ess": 7.0, "hess_init": 0.05, "beta1": 0.5, "beta2": 0.9, "weight_decay": 0.5, "clip_radius": 0.01,
    "hess_approx": "gradsq", "debias": False, "rescale_lr": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_group_overrides(backend: str, name: str) -> None:
    """The group behaves as an optimizer with that value, the other group as if nothing had happened."""
    value = OVERRIDES[name]
    params = parameters((4, 3), 5)
    optimizer = IVON([{"params": params[:1]}, {"params": params[1:], name: value}], backend=backend, **OPTIONS)
    plain, plain_params = fresh(backend)
    changed, changed_params = fresh(backend, **{name: value})
    for who, weights in ((optimizer, params), (plain, plain_params), (changed, changed_params)):
        train(who, weights, 4)
    got, without, everywhere = snapshot(optimizer), snapshot(plain), snapshot(changed)
    for key in got:
        assert torch.equal(got[key], (without if key.startswith("0.") else everywhere)[key]), key
    assert not torch.equal(got["1.mean"], without["1.mean"])


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_value_changed_between_steps_takes_effect(backend: str, name: str) -> None:
    """As schedulers and users do: ``optimizer.param_groups[0][name] = value``. hess_init then only rescales lr."""
    optimizer, params = fresh(backend)
    models = [Equations(p, optimizer.param_groups[0]) for p in params]
    for step in range(4):
        if step == 2:
            optimizer.param_groups[0][name] = OVERRIDES[name]
            for model in models:
                model.group[name] = OVERRIDES[name]
        eps = [noise.normals(p.numel(), seed=3, step=step, param=i).view(p.shape) for i, p in enumerate(params)]
        optimizer.train()
        for p, model, e in zip(params, models, eps, strict=True):
            torch.testing.assert_close(
                p.detach().double(), model.mean + model.sigma() * e.double(), rtol=1e-5, atol=1e-5
            )
        optimizer.zero_grad()
        bowl(params, step).backward()
        for p, model, e in zip(params, models, eps, strict=True):
            assert p.grad is not None
            model.update([p.grad], [e])
        optimizer.step()
    for p, model in zip(params, models, strict=True):
        for key in ("mean", "momentum", "hess"):
            assert relative_error(optimizer.state[p][key], getattr(model, key)) < 1e-4, key


def test_a_bad_value_set_later_is_refused(backend: str) -> None:
    optimizer, params = fresh(backend)
    optimizer.param_groups[0]["ess"] = -1.0
    before = flat(params)
    with pytest.raises(ValueError, match="ess"):
        train(optimizer, params, 1)
    assert torch.equal(flat(params), before)


def test_hyperparameters_as_tensors(backend: str) -> None:
    """torch's optimizers take a tensor lr; schedulers then write into it."""
    optimizer, params = fresh(backend, lr=torch.tensor(0.1))
    other, others = fresh(backend, lr=float(torch.tensor(0.1)))
    train(optimizer, params, 3)
    train(other, others, 3)
    assert torch.equal(flat(params), flat(others))


# --- schedulers ------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=10, cycle_momentum=False),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
def test_schedulers(backend: str, name: str) -> None:
    """A scheduled run equals one whose lr is set by hand to the scheduler's values."""
    optimizer, params = fresh(backend)
    scheduler = SCHEDULERS[name](optimizer)
    other, others = fresh(backend)
    rates = set()
    for step in range(6):
        rates.add(optimizer.param_groups[0]["lr"])
        other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        train(optimizer, params, 1, start=step)
        train(other, others, 1, start=step)
        scheduler.step()
    assert len(rates) > 1
    assert_same(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.2),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_a_cycled_momentum_is_refused_by_torch_and_the_remedy_is_documented(make: Any) -> None:
    """They look for "momentum" or "betas" among the defaults, which IVON lacks: torch's error names the option."""
    optimizer, params = fresh()
    with pytest.raises(ValueError, match="cycle_momentum") as refused:
        make(optimizer)
    (row,) = (line for line in INTEGRATIONS.read_text().splitlines() if str(refused.value) in line)
    assert "`cycle_momentum=False`" in row
    train(optimizer, params, 1)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_default_seed_is_drawn_from_torchs_and_training_leaves_the_global_rng_alone() -> None:
    seeds = []
    for _ in range(2):
        torch.manual_seed(1234)
        optimizer, params = fresh(seed=None)
        rng = torch.get_rng_state()
        train(optimizer, params, 2)
        assert torch.equal(torch.get_rng_state(), rng)
        seeds.append((optimizer.seed, fresh(seed=None)[0].seed))
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 2


@pytest.mark.on_triton
def test_the_seed_decides_the_trajectory(backend: str) -> None:
    results = []
    for seed in (1, 1, 2, 2**63 + 1, 1 + 2**32):
        optimizer, params = fresh(backend, seed=seed)
        train(optimizer, params, 2)
        results.append(flat(params))
    assert torch.equal(results[0], results[1])
    assert len({tuple(r.tolist()) for r in results}) == 4


# --- backends --------------------------------------------------------------------------------------------------------


def test_available_backends() -> None:
    found = available_backends()
    assert found["reference"] is None and "cpu" in found
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


@pytest.mark.on_triton
def test_backends_names_what_runs(backend: str) -> None:
    params = parameters(3) + parameters(3, dtype=torch.bfloat16)
    optimizer = IVON(params, backend=backend, **OPTIONS)
    assert optimizer.backends == {"cpu/float32": backend, "cpu/bfloat16": backend}


def test_the_default_is_the_fastest_that_supports_the_parameters() -> None:
    params = parameters(3) + parameters(3, dtype=torch.float64)
    fastest = "reference" if available_backends()["cpu"] else "cpu"
    assert IVON(params, **OPTIONS).backends == {"cpu/float32": fastest, "cpu/float64": "reference"}


def test_a_named_backend_never_falls_back() -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError), match=r"float64|not available"):
        IVON(parameters(3, dtype=torch.float64), backend="cpu", **OPTIONS)
    with pytest.raises(ValueError, match="reference"):
        IVON(parameters(3), backend="no such backend", **OPTIONS)


# --- diagnostics -----------------------------------------------------------------------------------------------------


def test_diagnostics_equal_a_direct_computation(backend: str) -> None:
    params = parameters((40, 30), 50)
    groups = [{"params": params[:1]}, {"params": params[1:], "ess": 7.0, "hess_init": 0.2, "clip_radius": 0.1}]
    optimizer = IVON(groups, backend=backend, **OPTIONS)
    train(optimizer, params, 5)
    found = optimizer.diagnostics()
    assert len(found) == 2
    for report, group, p in zip(found, optimizer.param_groups, params, strict=True):
        s = {key: value.double().flatten() for key, value in optimizer.state[p].items()}
        sigma = (group["ess"] * (s["hess"] + group["weight_decay"])).rsqrt()
        quantities = {"sigma": sigma, "snr": s["mean"].abs() / sigma, "hess_over_init": s["hess"] / group["hess_init"]}
        for key, values in quantities.items():
            assert {0.05, 0.5, 0.95} <= set(report[key])
            for level, value in report[key].items():
                assert math.isclose(value, float(torch.quantile(values, level)), rel_tol=1e-5), (key, level)
        momentum = s["momentum"] / (1 - group["beta1"] ** 5)
        direction = (momentum + group["weight_decay"] * s["mean"]) / (s["hess"] + group["weight_decay"])
        share = float((direction.abs() >= group["clip_radius"]).double().mean())
        assert math.isclose(report["clipped"], share, abs_tol=1e-3) and (share > 0) == (group["clip_radius"] < 1)
        assert report["elements"] == p.numel() and report["steps"] == 5


@pytest.mark.on_triton
def test_diagnostics_change_nothing_and_need_no_step(backend: str) -> None:
    optimizer, params = fresh(backend)
    before = snapshot(optimizer)
    first = optimizer.diagnostics()
    assert all(math.isclose(v, 1.0, rel_tol=1e-6) for v in first[0]["hess_over_init"].values())
    optimizer.train()
    sample = flat(params)
    optimizer.diagnostics()
    assert torch.equal(flat(params), sample)
    optimizer.eval()
    assert_same(before, snapshot(optimizer))


def test_diagnostics_with_empty_and_frozen_groups(backend: str) -> None:
    params = parameters(4, 5)
    params[1].requires_grad_(False)
    optimizer = IVON([{"params": params[:1]}, {"params": []}, {"params": params[1:]}], backend=backend, **OPTIONS)
    assert len(optimizer.diagnostics()) == 3


# --- names -----------------------------------------------------------------------------------------------------------


def test_named_parameters(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = IVON(model.named_parameters(), backend=backend, **OPTIONS)
    other_model = nn.Linear(3, 2)
    other_model.load_state_dict(model.state_dict())
    other = IVON(other_model.parameters(), backend=backend, **OPTIONS)
    train(optimizer, list(model.parameters()), 2)
    train(other, list(other_model.parameters()), 2)
    assert_same(snapshot(other), snapshot(optimizer))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_repr_tells_the_hyperparameters(backend: str) -> None:
    optimizer, _ = fresh(backend)
    text = repr(optimizer)
    assert text.startswith("IVON (") and "ess: 100.0" in text and len(text) < 2000
