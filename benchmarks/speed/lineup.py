"""Who takes part: every backend of ours in every mode, the parts of its step one by one, and the peers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.speed.contender import STEP, Build, Contender, Parameters, Recipe, Step, checkpoints
from benchmarks.speed.peers import keep_gradients, peers
from ivon_kernels import IVON, available_backends

PLAIN, ONE_LAUNCH, CONTEXT, FOUR = "sample + step", "step with next sample", "context + step", "4 samples + step"
SAMPLE, UPDATE, RESTORE, EVALUATION = "sample", "update", "restore", "evaluation sample"
_EVALUATED = 7  # the number of the evaluation sample


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


# ---- what ours do: a function of the optimizer and its parameters gives the step -------------------------------------

Steps = Callable[[IVON, Parameters], Step]


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
    return lambda optimizer, params: Step(
        getattr(optimizer, run), before=getattr(optimizer, before), optimizer=optimizer
    )


def _evaluation(optimizer: IVON, params: Parameters) -> Step:
    """An evaluation sample that is put into the weights and taken out again."""

    def weights(read: bool) -> list[Tensor]:
        with optimizer.sampled_params(sample=_EVALUATED):
            return [param.detach().clone() for param in params] if read else []

    return Step(lambda: weights(False), optimizer=optimizer, tensors=lambda: weights(True))


STEPS: dict[str, Steps] = {
    PLAIN: _plain,
    ONE_LAUNCH: _plain,
    FOUR: _four,
    CONTEXT: _context,
    SAMPLE: _method("train", before="discard_samples"),
    UPDATE: _method("step", before="train"),
    RESTORE: _method("eval", before="train"),
    EVALUATION: _evaluation,
}
# The mode in which the reference backend has the same bits.
SAME = {ONE_LAUNCH: PLAIN, CONTEXT: PLAIN, UPDATE: PLAIN, RESTORE: SAMPLE}


def ivon(backend: str, mode: str = PLAIN, steps: Steps | None = None) -> Build:
    """A backend's optimizer, and the step of a mode or the one that `steps` makes of it."""

    def build(params: Parameters, recipe: Recipe) -> Step:
        optimizer = IVON(params, **recipe.ivon, seed=0, backend=backend, sample_in_step=mode == ONE_LAUNCH)
        return (steps or STEPS[mode])(optimizer, params)

    return build


# ---- all together ----------------------------------------------------------------------------------------------------


def _operations(backend: str) -> dict[str, tuple[str, ...]]:
    """What each mode moves. The cpu backend keeps the noise of a training sample, the GPU's draw it again."""
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
    }


def _backend(backend: str, main: bool) -> list[Contender]:
    """A backend's step in every mode; of the main one also what its step is made of, and its checkpoints."""
    operations = _operations(backend)
    found = []
    for mode in (PLAIN, ONE_LAUNCH, FOUR, *((CONTEXT, SAMPLE, UPDATE, RESTORE, EVALUATION) if main else ())):
        part = mode in (SAMPLE, UPDATE, RESTORE, EVALUATION)
        name, quantity = (our_name(backend, PLAIN), mode) if part else (our_name(backend, mode), STEP)
        same = SAME.get(mode, mode)
        found.append(Contender(name, ivon(backend, mode), operations[mode], quantity, backend=backend, expected=same))
    return found + (checkpoints(our_name(backend, PLAIN), ivon(backend), backend=backend) if main else [])


def lineup(device: torch.device) -> Sequence[Contender]:
    """Everything that is measured on the device; the first one is the baseline of the ratios."""
    others = peers(device)
    ours = [c for backend in our_backends(device) for c in _backend(backend, backend == main_backend(device))]
    eager = Contender(  # it takes seconds for a step of a few million elements on a CPU
        "ivon_kernels reference, eager",
        ivon("reference"),
        ("sample", "check", "step"),
        turns=1,
        most_elements=5_000_000,
        bytes_needed=250,
    )
    return (others[0], *ours, eager, *others[1:])
