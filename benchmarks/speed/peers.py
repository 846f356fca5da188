"""Who takes part: what a user could pick instead, one table, and every backend of ours in every mode.

A new peer is a new row of :func:`peers`: tables, plots, record and report show what is in it. A peer that is missing,
broken or wrong is a row with its reason. What is not torch's is imported when it is built.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.contender import (
    BASELINE,
    FOREACH,
    IVON_OPT,
    STEP,
    Build,
    Contender,
    Parameters,
    Recipe,
    Step,
    checkpoints,
)
from ivon_kernels import IVON, available_backends, noise
from ivon_kernels.backends.reference import draw_weights, update
from ivon_kernels.hyperparameters import StepScalars, group_scalars

PLAIN, ONE_LAUNCH, CONTEXT, FOUR = "sample + step", "step with next sample", "context + step", "4 samples + step"
SAMPLE, UPDATE, RESTORE, EVALUATION = "sample", "update", "restore", "evaluation sample"
_EVALUATED = 7  # the number of the evaluation sample


def keep_gradients(params: Parameters) -> Callable[[], None]:
    """Gives the parameters the gradients that they have now, for optimizers that take them away."""
    grads = [param.grad for param in params]

    def put() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    return put


# ---- the peers -------------------------------------------------------------------------------------------------------


def rounding(actual: Tensor, expected: Tensor, recipe: Recipe) -> float:
    """The largest distance from AdamW's weights in units of what the same update in another order may give.

    In each of two steps the weight and its update are rounded, in 16 bits the moments too, and the bias correction
    1 - 0.999**t cancels, which makes more of an update's rounding. Eight roundings of the weight, or of ten updates
    where those are more, have held for every implementation.
    """
    most = 8 * torch.finfo(actual.dtype).eps * expected.abs().double().clamp_min(10 * recipe.adamw["lr"])
    return float(((actual.double() - expected.double()).abs() / most).max())


def similar(actual: Tensor, expected: Tensor, recipe: Recipe) -> float:
    """The mean distance in units of what it may be: 5% of a step's update, beside rounding.

    For moments of 8 bits, and for another place of epsilon: both are far off where a gradient is tiny, and only there.
    """
    most = 0.05 * float(recipe.adamw["lr"]) + torch.finfo(actual.dtype).eps
    return float((actual.double() - expected.double()).abs().mean()) / most


def adamw(place: str, prepare: Callable[[Any], object] = lambda optimizer: None, **options: Any) -> Build:
    """A class with AdamW's arguments, by its module and name."""

    def build(params: Parameters, recipe: Recipe) -> Step:
        module, name = place.split(":")
        optimizer = getattr(import_module(module), name)(params, **recipe.adamw, **options)
        prepare(optimizer)
        return Step(optimizer.step, optimizer=optimizer)

    return build


def _heavyball(compiled: bool, params: Parameters, recipe: Recipe) -> Step:
    heavyball: Any = import_module("heavyball")
    if not compiled:
        heavyball.utils.compile_mode = None
    optimizer = heavyball.AdamW(params, **recipe.adamw)
    return Step(optimizer.step, begin=keep_gradients(params), optimizer=optimizer)


def _ivon_opt(params: Parameters, recipe: Recipe, samples: int = 1, evaluation: bool = False) -> Step:
    """The original implementation, used as its documentation shows."""
    import ivon

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="ivon")  # about torch, on every construction
        optimizer = ivon.IVON(params, **recipe.ivon, mc_samples=samples)
    put_back, block = keep_gradients(params), ExitStack()

    def begin() -> None:
        for number in range(samples):
            if number:
                block.close()
            block.enter_context(optimizer.sampled_params(train=True))
            put_back()

    def finish() -> None:
        block.close()
        optimizer.step()

    def evaluate() -> None:
        with optimizer.sampled_params():
            pass

    return Step(evaluate, optimizer=optimizer) if evaluation else Step(finish, begin, optimizer=optimizer)


def equation_normals(like: Tensor, count: Tensor) -> Tensor:
    """:func:`ivon_kernels.noise.normals` of a step, an int64 on the device: a number would compile every step anew."""
    block = torch.arange((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    zeros = torch.zeros_like(block)
    words = noise.philox4x32(torch.stack((block, zeros, zeros + count, zeros), dim=-1), (0, 0)).unbind(-1)
    return torch.stack((*noise.box_muller(*words[:2]), *noise.box_muller(*words[2:])), dim=-1).flatten()[: like.numel()]


def _equation_sample(param: Tensor, mean: Tensor, hess: Tensor, count: Tensor, k: StepScalars) -> None:
    param.copy_(draw_weights(mean, hess, equation_normals(mean, count), k))


def _equation_update(param: Tensor, grad: Tensor, state: Sequence[Tensor], count: Tensor, k: StepScalars) -> None:
    mean, momentum, hess = state
    g = grad.to(mean.dtype)
    new = update(g, g * equation_normals(mean, count), mean, momentum, hess, k)
    for old, value in zip((*state, param), (*new, new[0]), strict=True):
        old.copy_(value)


@cache
def _compiled() -> tuple[Callable[..., None], ...]:
    functions = (_equation_sample, _equation_update)
    return tuple(torch.compile(function, dynamic=True) for function in functions)  # once for all sizes


def _equations(params: Parameters, recipe: Recipe) -> Step:
    """IVON without a kernel: what torch.compile makes of the functions of `backends/reference.py`.

    They run over one flat tensor, which takes the parameters' memory. That flatters them: one tensor instead of
    hundreds, no bookkeeping, no check for edits or for inf and nan, no bias correction. The bits are not ours: the
    compiler contracts and approximates.
    """
    sample, update_ = _compiled()
    k = group_scalars(IVON([torch.nn.Parameter(torch.zeros(1))], **recipe.ivon).defaults, 1.0, 1)
    flat = torch.cat([param.detach().flatten() for param in params])
    grad = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    for param in params:  # the flat copies replace them
        param.data, param.grad = param.data.new_empty(0), None
    mean = flat.to(torch.float32, copy=True)
    state = (mean, torch.zeros_like(mean), torch.full_like(mean, recipe.ivon["hess_init"]))
    count = torch.zeros((), dtype=torch.int64, device=mean.device)

    @torch.no_grad()
    def step() -> None:
        sample(flat, mean, state[2], count, k)
        update_(flat, grad, state, count, k)
        count.add_(1)

    return Step(step, tensors=lambda: [flat])


def peers(device: torch.device) -> list[Contender]:
    """All of them; some have other kernels, or another name, on a GPU."""
    gpu = device.type == "cuda"
    fused = adamw("torch.optim:AdamW", fused=True)
    schedule_free = adamw("schedulefree:AdamWScheduleFree", prepare=lambda optimizer: optimizer.train())
    moments, eight_bits, unchecked = ("adamw",), ("adamw, 8-bit moments",), ("sample, no check for edits",)
    four = (*unchecked * 4, "clear sums", *("accumulate",) * 3, "step", "read sums")
    exact: dict[str, Any] = {"like_adamw": rounding}
    near: dict[str, Any] = {"like_adamw": similar}
    ivon: dict[str, Any] = {"package": "ivon-opt", "bytes_needed": 80}
    compiled: dict[str, Any] = {"compiles": not gpu, "most_elements": 5_000_000}
    # On the CPU it compiles for more than a minute for 128 tensors.
    heavyball = f"HeavyBall AdamW{'' if gpu else ' (not compiled)'}"
    optimi = adamw("optimi:AdamW", triton=gpu)
    bitsandbytes, torchao = adamw("bitsandbytes.optim:AdamW8bit"), adamw("torchao.optim:AdamW8bit")
    return [
        Contender(BASELINE, fused, moments, **exact),
        Contender(FOREACH, adamw("torch.optim:AdamW", foreach=True), moments, **exact),
        Contender("AdamW (loop)", adamw("torch.optim:AdamW", foreach=False, fused=False), moments, **exact),
        *checkpoints(BASELINE, fused),
        # Tensors below 4096 elements keep 32 bits, as torchao's.
        Contender("bitsandbytes AdamW8bit", bitsandbytes, eight_bits, package="bitsandbytes", **near),
        # Its epsilon is in another place.
        Contender(heavyball, partial(_heavyball, gpu), moments, package="heavyball", compiles=gpu, **near),
        Contender(IVON_OPT, _ivon_opt, (*unchecked, "step"), **ivon),
        Contender(f"{IVON_OPT}, 4 samples", partial(_ivon_opt, samples=4), four, **ivon),
        Contender(IVON_OPT, partial(_ivon_opt, evaluation=True), (*unchecked, "restore"), EVALUATION, **ivon),
        *checkpoints(IVON_OPT, _ivon_opt, **ivon),
        Contender(f"optimi AdamW{' (triton)' * gpu}", optimi, ("adamw", "kahan"), package="torch-optimi", **exact),
        Contender("IVON equations, torch.compile", _equations, (*unchecked, "step"), **compiled),
        # It interpolates weights: its update is not AdamW's.
        Contender("schedule-free AdamW", schedule_free, moments, package="schedulefree"),
        Contender("torchao AdamW8bit", torchao, eight_bits, package="torchao", compiles=True, **near),
    ]


# ---- ours ------------------------------------------------------------------------------------------------------------

Steps = Callable[[IVON, Parameters], Step]


class Mode(NamedTuple):
    """A way to use the optimizer: its step, what it moves, and the mode in which the reference has the same bits."""

    steps: Steps
    operations: tuple[str, ...]
    expected: str


def _plain(optimizer: IVON, params: Parameters) -> Step:
    """``train()`` and ``step()``; with `sample_in_step` the step draws the next sample, and ``train()`` is free."""
    return Step(optimizer.step, begin=optimizer.train, optimizer=optimizer)


def _context(optimizer: IVON, params: Parameters) -> Step:
    def begin() -> None:
        with optimizer.sampled_params(train=True):
            pass

    return Step(optimizer.step, begin=begin, optimizer=optimizer)


def _four(optimizer: IVON, params: Parameters) -> Step:
    """Four Monte-Carlo samples, each with the same gradient."""
    put_back = keep_gradients(params)

    def begin() -> None:
        for _ in range(4):
            optimizer.next_sample()  # takes the gradients of the one before away
            put_back()

    return Step(optimizer.step, begin=begin, optimizer=optimizer)


def _method(run: str, before: str) -> Steps:
    """One of the optimizer's methods, after another one that is not timed."""
    return lambda optimizer, _: Step(getattr(optimizer, run), before=getattr(optimizer, before), optimizer=optimizer)


def _evaluation(optimizer: IVON, params: Parameters) -> Step:
    """An evaluation sample that is put into the weights and taken out again."""

    def weights(read: bool) -> list[Tensor]:
        with optimizer.sampled_params(sample=_EVALUATED):
            return [param.detach().clone() for param in params] if read else []

    return Step(lambda: weights(False), optimizer=optimizer, tensors=lambda: weights(True))


_SAMPLE, _STEP = ("sample", "write noise"), ("check", "read noise", "step")
_FOUR = (*_SAMPLE * 4, "clear sums", *("check", "read noise", "accumulate") * 3, *_STEP, "read sums")
MODES = {
    PLAIN: Mode(_plain, (*_SAMPLE, *_STEP), PLAIN),
    ONE_LAUNCH: Mode(_plain, ("check", "read noise", "step and next sample", "write noise"), PLAIN),
    FOUR: Mode(_four, _FOUR, FOUR),
    CONTEXT: Mode(_context, (*_SAMPLE, "restore", *_STEP), PLAIN),
    SAMPLE: Mode(_method("train", before="discard_samples"), _SAMPLE, SAMPLE),
    UPDATE: Mode(_method("step", before="train"), _STEP, PLAIN),
    RESTORE: Mode(_method("eval", before="train"), ("restore",), SAMPLE),
    EVALUATION: Mode(_evaluation, ("sample", "restore"), EVALUATION),
}


def our_name(backend: str, mode: str) -> str:
    """The name of one of our contenders."""
    return f"ivon_kernels {backend}, {mode}"


def ivon(backend: str, mode: str = PLAIN, steps: Steps | None = None) -> Build:
    """A backend's optimizer, and the step of a mode or the one that `steps` makes of it."""

    def build(params: Parameters, recipe: Recipe) -> Step:
        optimizer = IVON(params, **recipe.ivon, seed=0, backend=backend, sample_in_step=mode == ONE_LAUNCH)
        return (steps or MODES[mode].steps)(optimizer, params)

    return build


def _backend(backend: str, main: bool) -> list[Contender]:
    """A backend's step in every mode; of the main one also what its step is made of, and its checkpoints."""
    found = []
    for mode, (_, operations, expected) in list(MODES.items())[: None if main else 3]:
        part = mode in (SAMPLE, UPDATE, RESTORE, EVALUATION)
        name, quantity = (our_name(backend, PLAIN), mode) if part else (our_name(backend, mode), STEP)
        # The cpu backend keeps the noise of a training sample, the GPU's draw it again.
        moved = tuple(name for name in operations if backend == "cpu" or not name.endswith(" noise"))
        found.append(Contender(name, ivon(backend, mode), moved, quantity, backend=backend, expected=expected))
    return found + (checkpoints(our_name(backend, PLAIN), ivon(backend), backend=backend) if main else [])


def lineup(device: torch.device) -> Sequence[Contender]:
    """Everything that is measured on the device; the first one is the baseline of the ratios."""
    others = peers(device)
    if device.type == "cpu":
        backends, main = ("cpu", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu",), "cpu"
    else:
        backends, main = ("triton", "cuda"), "triton" if available_backends()["cuda"] else "cuda"  # of `backend=None`
    ours = [contender for backend in backends for contender in _backend(backend, backend == main)]
    if device.type == "cpu":
        # It takes seconds for a step of a few million elements; on a GPU (1 s) that was the others' time.
        slow: dict[str, Any] = {"turns": 1, "most_elements": 5_000_000, "bytes_needed": 250}
        ours.append(Contender("ivon_kernels reference, eager", ivon("reference"), ("sample", "check", "step"), **slow))
    return (others[0], *ours, *others[1:])
