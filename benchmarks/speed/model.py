"""The part `model`: a whole LoRA finetuning step, what the optimizer costs where it is used.

The optimizers take turns of a few steps on one model, round after round, each from the same weights and on the same
batches. A step is timed as a whole, and apart as forward and backward pass, and optimizer: sampling, step, restore and
`zero_grad`. Before that every optimizer is verified on the model's own tensors and gradients.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import version
from benchmarks.memory import PeakMemory
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import BASELINE, FOREACH, IVON_OPT, LORA, STEP, Contender
from benchmarks.speed.measure import Row, Session, measurements, take_turns
from benchmarks.speed.peers import ONE_LAUNCH, PLAIN, lineup
from benchmarks.speed.verify import Verifier, wrong
from benchmarks.speed.workloads import Workload

PART = "model"
WHOLE, PASSES, OPTIMIZER = "whole step", "forward and backward", "optimizer"
QUANTITIES = (WHOLE, PASSES, OPTIMIZER)


class Job(NamedTuple):
    """A model to finetune and the size of a batch; the tokens are random, as the cost does not depend on them."""

    name: str
    build: Callable[[torch.device], Any]  # the model with LoRA
    batch: int
    tokens: int
    warm_up: int  # whole steps at the beginning of a turn that are not counted


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _random_llama(dtype: torch.dtype, rank: int, sizes: tuple[int, ...], device: torch.device) -> Any:
    """A Llama with random weights and LoRA on q and v."""
    import peft
    import transformers

    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is renaming
        named: dict[str, Any] = dict(zip(_SIZES, sizes, strict=True))
        config = transformers.LlamaConfig(use_cache=False, **named)
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(base, lora)


def _smollm2(device: torch.device) -> Any:
    """SmolLM2-135M-Instruct with its weights, and the main job's LoRA r=8 on q and v."""
    from benchmarks.finetune.model import add_lora, load_model

    model, _ = load_model(None, device=device, in_8bit=False)
    return add_lora(model, seed=0)


_LLAMA = partial(_random_llama, torch.bfloat16, 8, (32000, 4096, 11008, 32, 32))
LLAMA_2_7B = Job("llama-2-7b", _LLAMA, 4, 320, warm_up=3)
# No warm-up on a processor: a pass takes a second, whatever is in its caches.
SMOLLM2 = Job("smollm2-135m", _smollm2, 8, 24, warm_up=0)
TOY = Job("toy", partial(_random_llama, torch.float32, 2, (64, 16, 32, 2, 2)), 2, 8, warm_up=1)


def job_for(device: torch.device) -> Job:
    """What a device has the time and the memory for."""
    return SMOLLM2 if device.type == "cpu" else LLAMA_2_7B


def contenders(device: torch.device) -> list[Contender]:
    """The optimizers; the first one is the baseline of the ratios."""
    modes, others = tuple(f", {mode}" for mode in (PLAIN, ONE_LAUNCH)), (BASELINE, FOREACH, IVON_OPT)
    steps = [c for c in lineup(device) if c.quantity == STEP]
    return [c for c in steps if (c.name.endswith(modes) if c.ours else c.name in others)]


class Problem:
    """A job's model in training mode, its trainable parameters, and batches by number."""

    def __init__(self, job: Job, device: torch.device) -> None:
        torch.manual_seed(0)
        self.job, self.device = job, device
        self.model: Any = job.build(device)
        self.model.train()
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.elements = sum(param.numel() for param in self.params)
        self.dtype = str(self.params[0].dtype).removeprefix("torch.")
        self._home = [param.data for param in self.params]
        self._start = [param.data.clone() for param in self.params]
        self.gradients: list[Tensor] = self._fit()

    def loss(self, number: int) -> Tensor:
        """The loss of a batch; number and batch, and the dropout, are the same for every optimizer."""
        torch.manual_seed(number)
        size = (self.job.batch, self.job.tokens)
        tokens = torch.randint(self.model.config.vocab_size, size, device=self.device)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def reset(self) -> None:
        """Parameters as at the start, in the memory of the start (ivon-opt puts them elsewhere), no gradients."""
        for param, home, start in zip(self.params, self._home, self._start, strict=True):
            param.data = home
            home.copy_(start)
            param.grad = None

    def give_gradients(self) -> None:
        """The first batch's gradients, in tensors of their own, as a backward pass would leave them."""
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient.clone()

    def tensors(self) -> Workload:
        """Weights and gradients for the verification."""
        shapes = tuple(tuple(param.shape) for param in self.params)
        return Workload(self.job.name, "", shapes, tuple(zip(self._start, self.gradients, strict=True)))

    def _fit(self) -> list[Tensor]:
        """The first batch's gradients; with checkpointing if the memory does not suffice without.

        LoRA's B is zero at the start, which leaves A without a gradient: it is moved off zero for this.
        """
        for param in self.params:
            param.data.add_(1e-3)
        try:
            self.loss(0).backward()
        except torch.OutOfMemoryError:
            self.model.zero_grad()
            torch.cuda.empty_cache()
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()
            self.loss(0).backward()
        gradients = [param.grad.clone() for param in self.params if param.grad is not None]
        self.reset()
        return gradients


def _turn(contender: Contender, row: Row, problem: Problem, clock: CpuClock, numbers: range) -> dict[str, list[float]]:
    """A new optimizer from the start, and its steps on these batches."""
    problem.reset()
    clock.release()
    step = contender.build(problem.params, LORA)

    def finish() -> None:
        step.finish()
        step.optimizer.zero_grad()

    step.begin()  # state is made in the first step, which needs no passes
    problem.give_gradients()
    finish()

    def train(number: int) -> tuple[float, float, float]:
        clock.synchronize()
        begin, marks = time.perf_counter(), [clock.mark()]
        for part in (step.begin, lambda: problem.loss(number).backward(), finish):
            part()
            marks.append(clock.mark())
        clock.synchronize()
        whole = (time.perf_counter() - begin) * 1e3
        before, passes, after = map(clock.span_ms, marks, marks[1:])
        return whole, passes, before + after

    for _ in range(problem.job.warm_up):
        train(numbers[0])
    with PeakMemory(clock.device) as peak:
        times = [train(number) for number in numbers]
    row.peaks.append(peak.highest or 0)
    return {quantity: list(values) for quantity, values in zip(QUANTITIES, zip(*times, strict=True), strict=True)}


def run(session: Session) -> None:
    """A whole finetuning step: of SmolLM2 on a processor, of a Llama-2-7B on a GPU."""
    options, dry_run, on_cpu = session.options, session.record.dry_run, session.clock.kind == "cpu"
    job = TOY if dry_run else job_for(session.clock.device)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    count = 2 if dry_run or (on_cpu and options.quick) else 3 if on_cpu else 10
    with session.console.status("Whole finetuning step"):
        measure(session, job, rounds, count)


def measure(session: Session, job: Job, rounds: int, steps: int) -> None:
    """Verifies the optimizers, then times each of :data:`QUANTITIES` with each in turn, `steps` times in each round."""
    clock, record = session.clock, session.record
    try:
        if missing := [package for package in ("transformers", "peft") if version(package) is None]:
            raise UserError(f"{missing[0]} is not installed")
        problem = Problem(job, clock.device)
    except UserError as error:
        record.replace_part(PART, [], [("a whole finetuning step", str(error))])
        return
    verifier = Verifier(problem.tensors(), problem.params[0].dtype, clock.device, problem.elements, LORA)
    chosen = contenders(clock.device)
    rows = verifier.rows(chosen, Contender.missing)
    del verifier
    gc.collect()

    def turn(number: int, done: int) -> dict[str, list[float]]:
        return _turn(chosen[number], rows[number], problem, clock, range(done * steps, (done + 1) * steps))

    def further(number: int, quantity: str, median: float | None) -> dict[str, Any]:
        """The peak, the model included, is the whole step's."""
        peaks = rows[number].peaks if quantity == WHOLE else ()
        return {"peak_bytes_per_element": max(peaks) / problem.elements if peaks else None}

    take_turns(rows, turn, rounds, enough_time=session.budget.left, after=gc.collect)
    session.wrong |= wrong(chosen, rows)
    for row in rows:
        row.quantities = QUANTITIES
    place = (PART, f"{job.name} finetuning step", problem.dtype)
    record.replace_part(PART, measurements(place, rows, further=further))
