"""What a user could pick instead: one table."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import equations
from benchmarks.speed.contender import (
    BASELINE,
    FOREACH,
    IVON_OPT,
    Build,
    Contender,
    Parameters,
    Recipe,
    Step,
    checkpoints,
    nothing,
)


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
    """A class with AdamW's arguments, imported when it is needed: a broken peer is a row with its reason."""

    def build(params: Parameters, recipe: Recipe) -> Step:
        module, name = place.split(":")
        optimizer = getattr(import_module(module), name)(params, **recipe.adamw, **options)
        prepare(optimizer)
        return Step(optimizer.step, optimizer=optimizer)

    return build


def keep_gradients(params: Parameters) -> Callable[[], None]:
    """Gives the parameters the gradients that they have now, for optimizers that take them away."""
    grads = [param.grad for param in params]

    def put() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    return put


def _heavyball(compiled: bool) -> Build:
    def build(params: Parameters, recipe: Recipe) -> Step:
        heavyball: Any = import_module("heavyball")
        if not compiled:
            heavyball.utils.compile_mode = None
        optimizer = heavyball.AdamW(params, **recipe.adamw)
        return Step(optimizer.step, begin=keep_gradients(params), optimizer=optimizer)

    return build


def _ivon_opt(samples: int = 1, evaluation: bool = False) -> Build:
    """The original implementation, used as its documentation shows."""

    def build(params: Parameters, recipe: Recipe) -> Step:
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

        return Step(evaluate if evaluation else finish, nothing if evaluation else begin, optimizer=optimizer)

    return build


def peers(device: torch.device) -> list[Contender]:
    """All of them. On the CPU HeavyBall compiles for more than a minute for 128 tensors, so it runs uncompiled there.

    Args:
        device: Some have other kernels, or another name, on a GPU.
    """
    gpu = device.type == "cuda"
    fused = adamw("torch.optim:AdamW", fused=True)
    loop = adamw("torch.optim:AdamW", foreach=False, fused=False)
    schedule_free = adamw("schedulefree:AdamWScheduleFree", prepare=lambda optimizer: optimizer.train())
    moments, eight_bits, unchecked = ("adamw",), ("adamw, 8-bit moments",), ("sample, no check for edits",)
    four = (*unchecked * 4, "clear sums", *("accumulate",) * 3, "step", "read sums")
    exact: dict[str, Any] = {"like_adamw": rounding}
    near: dict[str, Any] = {"like_adamw": similar}
    ivon: dict[str, Any] = {"package": "ivon-opt", "bytes_needed": 80}
    once: dict[str, Any] = {**ivon, "quantity": "evaluation sample"}
    heavyball = f"HeavyBall AdamW{'' if gpu else ' (not compiled)'}"
    optimi = adamw("optimi:AdamW", triton=gpu)
    compiled: dict[str, Any] = {"compiles": not gpu, "most_elements": 5_000_000}
    bitsandbytes, torchao = adamw("bitsandbytes.optim:AdamW8bit"), adamw("torchao.optim:AdamW8bit")
    return [
        Contender(BASELINE, fused, moments, **exact),
        Contender(FOREACH, adamw("torch.optim:AdamW", foreach=True), moments, **exact),
        Contender("AdamW (loop)", loop, moments, **exact),
        *checkpoints(BASELINE, fused),
        # Tensors below 4096 elements keep 32 bits, as torchao's.
        Contender("bitsandbytes AdamW8bit", bitsandbytes, eight_bits, package="bitsandbytes", **near),
        # Its epsilon is in another place.
        Contender(heavyball, _heavyball(gpu), moments, package="heavyball", compiles=gpu, **near),
        Contender(IVON_OPT, _ivon_opt(), (*unchecked, "step"), **ivon),
        Contender(f"{IVON_OPT}, 4 samples", _ivon_opt(4), four, **ivon),
        Contender(IVON_OPT, _ivon_opt(evaluation=True), (*unchecked, "restore"), **once),
        *checkpoints(IVON_OPT, _ivon_opt(), **ivon),
        Contender(f"optimi AdamW{' (triton)' * gpu}", optimi, ("adamw", "kahan"), package="torch-optimi", **exact),
        Contender("IVON equations, torch.compile", equations.build, (*unchecked, "step"), **compiled),
        # It interpolates weights: its update is not AdamW's.
        Contender("schedule-free AdamW", schedule_free, moments, package="schedulefree"),
        Contender("torchao AdamW8bit", torchao, eight_bits, package="torchao", compiles=True, **near),
    ]
