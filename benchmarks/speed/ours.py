"""This project's contenders: every backend of the device in every mode, and the parts of a step one by one."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.speed.contenders import IVON_ARGS, Contender, Parameters, Step, checkpoints
from ivon_kernels import IVON, available_backends

PLAIN, ONE_LAUNCH, CONTEXT, FOUR = "sample + step", "step with next sample", "context + step", "4 samples + step"
SAMPLE, UPDATE, RESTORE, EVALUATION = "sample", "update", "restore", "evaluation sample"
_EVALUATED = 7  # the number of the evaluation sample
Build = Callable[[Parameters], Step]


def our_name(backend: str, mode: str) -> str:
    """The name of one of our contenders."""
    return f"ivon_kernels {backend}, {mode}"


def our_backends(device: torch.device) -> tuple[str, ...]:
    """The backends to compare: the GPU's, or those that take CPU tensors."""
    if device.type != "cpu":
        return ("triton", "cuda")
    return ("cpu", "triton") if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu",)


def main_backend(device: torch.device) -> str:
    """The backend that `backend=None` takes: its parts are measured one by one."""
    if device.type == "cpu":
        return "cpu"
    return "triton" if available_backends()["cuda"] else "cuda"


def _optimizer(params: Parameters, backend: str, one_launch: bool = False) -> IVON:
    return IVON(params, **IVON_ARGS, seed=0, backend=backend, sample_in_step=one_launch)


def plain(backend: str, one_launch: bool = False) -> Build:
    """``train()`` and ``step()``: with `one_launch` the step draws the next sample, and ``train()`` is free."""

    def build(params: Parameters) -> Step:
        optimizer = _optimizer(params, backend, one_launch)

        def step() -> None:
            optimizer.train()
            optimizer.step()

        return Step(step, optimizer=optimizer)

    return build


def _context(backend: str) -> Build:
    def build(params: Parameters) -> Step:
        optimizer = _optimizer(params, backend)

        def step() -> None:
            with optimizer.sampled_params(train=True):
                pass
            optimizer.step()

        return Step(step, optimizer=optimizer)

    return build


def _four(backend: str) -> Build:
    """Four Monte-Carlo samples, each with the same gradient."""

    def build(params: Parameters) -> Step:
        optimizer = _optimizer(params, backend)
        grads = [param.grad for param in params]

        def step() -> None:
            for _ in range(4):
                optimizer.next_sample()  # takes the gradients of the one before away
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
            optimizer.step()

        return Step(step, optimizer=optimizer)

    return build


def _call(backend: str, run: str, before: str) -> Build:
    """One of the optimizer's methods, after another one that is not timed."""

    def build(params: Parameters) -> Step:
        optimizer = _optimizer(params, backend)
        return Step(getattr(optimizer, run), before=getattr(optimizer, before), optimizer=optimizer)

    return build


def _sample(backend: str) -> Build:
    return _call(backend, "train", before="discard_samples")


def _evaluation(backend: str) -> Build:
    """An evaluation sample that is put into the weights and taken out again."""

    def build(params: Parameters) -> Step:
        optimizer = _optimizer(params, backend)

        def step() -> None:
            with optimizer.sampled_params(sample=_EVALUATED):
                pass

        def held() -> list[Tensor]:
            with optimizer.sampled_params(sample=_EVALUATED):
                return [param.detach().clone() for param in params]

        return Step(step, optimizer=optimizer, tensors=held)

    return build


# What the reference backend does for a contender with this `expected`: its bits are the contender's.
REFERENCES: dict[str, Build] = {
    "step": plain("reference"),
    "four": _four("reference"),
    "sample": _sample("reference"),
    "evaluation": _evaluation("reference"),
}


def _operations(backend: str, mode: str) -> tuple[str, ...]:
    """What the mode moves. The cpu backend keeps the noise of a training sample, the GPU's draw it again."""
    write, read = (("write noise",), ("read noise",)) if backend == "cpu" else ((), ())
    sample, step = ("sample", *write), ("check", *read, "step")
    return {
        PLAIN: (*sample, *step),
        CONTEXT: (*sample, "restore", *step),
        ONE_LAUNCH: ("check", *read, "step and next sample", *write),
        FOUR: (*sample * 4, "clear sums", *("check", *read, "accumulate") * 3, *step, "read sums"),
        SAMPLE: sample,
        UPDATE: step,
        RESTORE: ("restore",),
        EVALUATION: ("sample", "restore"),
    }[mode]


def contenders(device: torch.device) -> list[Contender]:
    """Every backend's step in every mode, and the main backend's parts."""
    found = []
    for backend in our_backends(device):
        builds = {PLAIN: plain(backend), ONE_LAUNCH: plain(backend, one_launch=True), FOUR: _four(backend)}
        if backend == main_backend(device):
            builds[CONTEXT] = _context(backend)
        found += [
            Contender(
                our_name(backend, mode),
                build,
                _operations(backend, mode),
                backend=backend,
                expected="four" if mode == FOUR else "step",
            )
            for mode, build in builds.items()
        ]
    main = main_backend(device)
    parts: dict[str, tuple[Build, str]] = {
        SAMPLE: (_sample(main), "sample"),
        UPDATE: (_call(main, "step", before="train"), "step"),
        RESTORE: (_call(main, "eval", before="train"), "sample"),
        EVALUATION: (_evaluation(main), "evaluation"),
    }
    name = our_name(main, PLAIN)
    for quantity, (build, expected) in parts.items():
        operations = _operations(main, quantity)
        found.append(Contender(name, build, operations, quantity=quantity, backend=main, expected=expected))

    def make(params: Parameters) -> tuple[IVON, Step]:
        step = plain(main)(params)
        return step.optimizer, step

    return found + checkpoints(name, make, backend=main)
