"""``sync=True``: noise of its own on every rank, one all-reduce, W times the samples. And one seed for all ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from ivon_kernels import IVON, NonFiniteGradientError, noise
from tests.support.helpers import OPTIONS, Equations, bowl, flat, parameters, relative_error, state
from tests.support.ranks import Ranks

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), (1,))
STEPS = 5
SEED = 11


class Bowl(nn.Module):
    """The loss of `helpers.bowl`, which is another function of the weights for other data."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)

    def forward(self, data: int) -> Tensor:
        return bowl(list(self.weights), data)


def datum(step: int, sample: int, rank: int) -> int:
    return 100 * step + 10 * sample + rank


def build(params: list[nn.Parameter], **options: Any) -> IVON:
    return IVON(params, seed=SEED, sync=True, **{**OPTIONS, **options})


def ending(optimizer: IVON) -> dict[str, Tensor]:
    params = optimizer.param_groups[0]["params"]
    return {"mean": flat(params), **{key: state(optimizer, key) for key in ("momentum", "hess")}}


def assert_equal(results: list[dict[str, Tensor]]) -> None:
    for result in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(result[key], value), f"the ranks differ in {key}"


# ---- the samples of all ranks are one average ------------------------------------------------------------------------


def trained(replicate: str, samples: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Plain, or under DDP's no_sync, or that with two backward passes per sample."""
    params = parameters(*SHAPES)
    model = Bowl(params) if replicate == "alone" else DDP(Bowl(params))
    optimizer = build(params, **options)
    rank = dist.get_rank()
    for step in range(STEPS):
        for sample in range(samples):
            optimizer.zero_grad()
            quiet = model.no_sync() if isinstance(model, DDP) else contextlib.nullcontext()
            with quiet, optimizer.sampled_params(train=True):
                for micro in range(2) if replicate == "accumulated" else [0]:
                    share = 0.5 if replicate == "accumulated" else 1.0
                    (share * model(datum(step, sample, rank) + micro * (replicate == "accumulated"))).backward()
        optimizer.step()
    return ending(optimizer)


def expected(world_size: int, samples: int, micros: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """One process with all the samples, in float64: `samples` of each replica's noise."""
    probe = build(parameters(*SHAPES), **options)
    group = probe.param_groups[0]
    equations = [Equations(p, group) for p in group["params"]]
    for step in range(STEPS):
        grads: list[list[Tensor]] = [[] for _ in equations]
        drawn: list[list[Tensor]] = [[] for _ in equations]
        for rank in range(world_size):
            for sample in range(samples):
                weights = []
                for index, e in enumerate(equations):
                    eps = noise.normals(
                        e.mean.numel(), seed=SEED, step=step, sample=sample, replica=rank, param=index
                    ).view(e.mean.shape)
                    drawn[index].append(eps)
                    weights.append((e.mean + e.sigma() * eps).requires_grad_())
                losses = [bowl(weights, datum(step, sample, rank) + micro) for micro in range(micros)]
                for own, grad in zip(grads, torch.autograd.grad(sum(losses) / micros, weights), strict=True):
                    own.append(grad)
        for e, own_grads, own_eps in zip(equations, grads, drawn, strict=True):
            e.update(own_grads, own_eps)
    return {key: flat([getattr(e, key) for e in equations]) for key in ("mean", "momentum", "hess")}


@pytest.mark.parametrize(
    ("world_size", "samples", "replicate", "options"),
    [
        (1, 1, "alone", {}),
        (2, 1, "alone", {}),
        (4, 1, "alone", {}),
        (2, 3, "alone", {}),
        (2, 1, "alone", {"hess_approx": "gradsq"}),
        (2, 1, "alone", {"backend": "reference"}),
        (2, 1, "under no_sync", {}),
        (2, 2, "accumulated", {}),
    ],
    ids=str,
)
def test_equals_the_samples_of_all_ranks_on_one_process(
    ranks: Ranks, world_size: int, samples: int, replicate: str, options: dict[str, Any]
) -> None:
    results = ranks.run(world_size, trained, replicate, samples, options)
    assert_equal(results)
    for key, value in expected(world_size, samples, 1 + (replicate == "accumulated"), options).items():
        # float32 against float64: some ten operations of 2^-24 = 6e-8 each step.
        assert relative_error(results[0][key], value) < 5e-6, key


def unequal_samples() -> dict[str, Tensor]:
    """Rank 1 draws one sample more."""
    params = parameters(*SHAPES)
    optimizer = build(params, hess_approx="gradsq", beta1=0.0)
    for _ in range(1 + dist.get_rank()):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            ((dist.get_rank() + 1.0) * params[0].sum()).backward()
    optimizer.step()
    return ending(optimizer)


def test_every_sample_counts_alike(ranks: Ranks) -> None:
    results = ranks.run(2, unequal_samples)
    assert_equal(results)
    torch.testing.assert_close(results[0]["momentum"][:12], torch.full((12,), (1 + 2 + 2) / 3))


CURVATURE = 4.0


def hessian(steps: int) -> Tensor:
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = IVON([weight], 1e-6, 100.0, hess_init=CURVATURE, beta2=0.98, weight_decay=1e-6, sync=True)
    for _ in range(steps):
        optimizer.train()
        (0.5 * CURVATURE * weight.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return state(optimizer, "hess")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_variance_of_the_hessian_falls_as_one_over_the_world_size(ranks: Ranks, world_size: int) -> None:
    """At the optimum an estimate is c eps^2 averaged over W ranks: mean c, variance 2 c^2 / W.

    After T steps the average with decay b has the variance v = 2 c^2 / W (1 - b) / (1 + b) (1 - b^2T) and, from the
    update's quadratic term, the bias (1 - b) (1 - b^T) c / W. Over n elements the mean is known to sqrt(v / n). The
    measured variance has the relative deviation sqrt((2 + k) / n), with the excess kurtosis k of a sum of eps^2 (12) in
    these proportions: 12 (1 - b^2)^2 / (1 - b^4) = 0.24; and the quadratic term changes it by order 1 - b.
    """
    beta2, steps = 0.98, 60
    estimates = ranks.run(world_size, hessian, steps)
    assert all(torch.equal(estimate, estimates[0]) for estimate in estimates)
    estimate = estimates[0].double()
    n = estimate.numel()
    variance = 2 * CURVATURE**2 / world_size * (1 - beta2) / (1 + beta2) * (1 - beta2 ** (2 * steps))
    bias = (1 - beta2) * (1 - beta2**steps) * CURVATURE / world_size
    assert abs(float(estimate.mean()) - CURVATURE - bias) < 5 * (variance / n) ** 0.5 + 0.1 * bias
    assert abs(float(estimate.var()) / variance - 1) < 5 * (2.24 / n) ** 0.5 + 2 * (1 - beta2)


# ---- a rank that cannot step -----------------------------------------------------------------------------------------


def with_a_nan(nonfinite: str, sample_in_step: bool) -> tuple[dict[str, Tensor], int, str]:
    params = parameters(*SHAPES)
    optimizer = build(params, nonfinite=nonfinite, sample_in_step=sample_in_step)
    refusal = ""
    for step in range(3):
        optimizer.zero_grad()
        optimizer.train()
        factor = float("nan") if step == 1 and dist.get_rank() == 1 else 1.0
        (factor * bowl(params, datum(step, 0, dist.get_rank()))).backward()
        try:
            optimizer.step()
        except NonFiniteGradientError as error:
            refusal = str(error)
    optimizer.eval()
    steps = torch.stack([optimizer.state[p]["step"] for p in params])
    return {**ending(optimizer), "step": steps}, optimizer.skipped_steps, refusal


@pytest.mark.parametrize("sample_in_step", [False, True])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_nan_on_one_rank_stops_all(ranks: Ranks, nonfinite: str, sample_in_step: bool) -> None:
    results = ranks.run(2, with_a_nan, nonfinite, sample_in_step)
    assert_equal([result for result, _, _ in results])
    assert results[0][0]["step"].tolist() == [2] * 3 and results[0][0]["hess"].isfinite().all()
    if nonfinite == "skip":
        assert [(skipped, refusal) for _, skipped, refusal in results] == [(1, "")] * 2
    else:
        assert [refusal.split(" holds")[0] for _, _, refusal in results] == [
            "the gradient of a parameter on another rank",
            "the gradient of param_groups[0]['params'][0] of shape (4, 3)",
        ]


def with_scaler(overflow_on: int, options: dict[str, Any], scaled: bool) -> tuple[dict[str, Tensor], float]:
    """Five steps; in the second one rank overflows, in the run without a scaler that step is left out."""
    params = parameters(*SHAPES)
    optimizer = build(params, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step in range(5):
        if step == 1 and not scaled:
            continue
        optimizer.zero_grad()
        optimizer.train()
        factor = float("inf") if step == 1 and dist.get_rank() == overflow_on else 1.0
        scaler.scale(factor * bowl(params, datum(step, 0, dist.get_rank()))).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.eval()
    return ending(optimizer), scaler.get_scale()


@pytest.mark.parametrize("approx", ["price", "gradsq"])
def test_scalers_of_different_scales(ranks: Ranks, approx: str) -> None:
    """An overflow is one rank's: the others skip the step too, but keep their scale. Powers of two round nothing."""
    options = {"hess_approx": approx}
    results, smooth = (ranks.run(2, with_scaler, 1, options, scaled) for scaled in (True, False))
    assert_equal([result for result, _ in results + smooth])
    assert [scale for _, scale in results] == [2.0**10, 2.0**9]


def averaged() -> list[str]:
    params = parameters(*SHAPES)
    replica = DDP(Bowl(params))
    optimizer = build(params)
    before, refusals = flat(params), []
    for _ in range(2):
        optimizer.train()
        replica(dist.get_rank()).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            refusals.append(str(error))
        assert torch.equal(flat(params), before), "the weights hold the sample"
    return refusals


@pytest.mark.parametrize("world_size", [2, 4])
def test_averaged_gradients_are_refused(ranks: Ranks, world_size: int) -> None:
    for refusals in ranks.run(world_size, averaged):
        assert len(refusals) == 2 and all("something averages them already" in refusal for refusal in refusals)


def added_later() -> dict[str, Tensor]:
    """Parameters in several arenas; the last one has a gradient on rank 1 only, and the third on none."""
    params = [*parameters(3, 4), *parameters(2, 2, dtype=torch.float64)]
    optimizer = build(params[:1], beta1=0.0)
    optimizer.add_param_group({"params": params[1:]})
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.sampled_params(train=True):
            used = params[:2] + params[3:] * (dist.get_rank() == 1)
            sum((dist.get_rank() + 1) * p.sum() for p in used).backward()
        optimizer.step()
    return {f"{i}.{key}": value for i, p in enumerate(params) for key, value in optimizer.state[p].items()}


def test_a_gradient_on_any_rank_trains_the_parameter_on_all(ranks: Ranks) -> None:
    results = ranks.run(2, added_later)
    assert_equal(results)
    assert [int(results[0][f"{i}.step"]) for i in range(4)] == [2, 2, 0, 2]
    assert [float(results[0][f"{i}.momentum"][0]) for i in range(4)] == [1.5, 1.5, 0.0, 1.0]


# ---- one seed --------------------------------------------------------------------------------------------------------


def first_sample(when: str, seeds: list[int | None], store: str) -> tuple[int, Tensor] | str:
    """Builds the optimizer on every rank, before or after the process group; its seed and sample, or its refusal."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(40 + rank)
    params = parameters(*SHAPES)
    if when == "before":
        dist.destroy_process_group()
    try:
        optimizer = IVON(params, 0.1, 10.0, seed=seeds[rank])
        if when == "before":
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
            optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does
        optimizer.train()
    except ValueError as error:
        assert torch.equal(flat(params), flat(parameters(*SHAPES)))
        return str(error)
    return optimizer.seed, flat(params)


@pytest.mark.parametrize("when", ["after", "before"])
def test_the_seed_of_rank_0_is_everybodys(ranks: Ranks, when: str, tmp_path: Any) -> None:
    (seed, sample), (other, same) = ranks.run(2, first_sample, when, [None, None], str(tmp_path / "store"))
    assert seed == other and torch.equal(sample, same)


@pytest.mark.parametrize("seeds", [[1, 2], [None, 2], [1, None]])
@pytest.mark.parametrize("when", ["after", "before"])
def test_different_seeds_are_refused(ranks: Ranks, when: str, seeds: list[int | None], tmp_path: Any) -> None:
    for refusal in ranks.run(2, first_sample, when, seeds, str(tmp_path / "store")):
        assert isinstance(refusal, str) and "the ranks have different seeds" in refusal


def resumed_from(checkpoints: list[dict[str, Any] | None]) -> str:
    optimizer = IVON(parameters(*SHAPES), 0.1, 10.0, seed=0)
    saved = checkpoints[dist.get_rank()]
    if saved is not None:
        optimizer.load_state_dict(saved)
    try:
        optimizer.train()
    except ValueError as error:
        return str(error)
    return ""


def saved(seed: int, steps: int) -> dict[str, Any]:
    params = parameters(*SHAPES)
    optimizer = IVON(params, 0.1, 10.0, seed=seed)
    for step in range(steps):
        optimizer.train()
        bowl(params, step).backward()
        optimizer.step()
    return optimizer.state_dict()


def test_different_checkpoints_are_refused(ranks: Ranks) -> None:
    assert ranks.run(2, resumed_from, [saved(5, 2), saved(5, 2)]) == ["", ""]
    for refusal in ranks.run(2, resumed_from, [saved(5, 2), saved(6, 2)]):
        assert "different seeds (5, 6)" in refusal
    for refusal in ranks.run(2, resumed_from, [saved(0, 2), None]):
        assert "different numbers of steps (2, 0)" in refusal
