"""A whole LoRA finetuning step: what the optimizer costs where it is used.

The optimizers take turns of a few steps on one model, round after round, each from the same weights and on the same
batches, so that a drift of the machine meets all of them. A step is timed as a whole, and apart as forward and backward
pass, and optimizer: sampling, step, restore and `zero_grad`.

Before that every optimizer of ours must give the reference backend's weights bit for bit on the model's own gradients,
foreach AdamW those of fused AdamW but for rounding, and the others finite weights that changed.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import version
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contenders import BASELINE
from benchmarks.speed.model_optimizers import Optimizer, optimizers, wrong
from benchmarks.speed.record import Measurement
from benchmarks.speed.timing import quantiles, ratios

PART = "model"  # of the suite
WHOLE, PASSES, OPTIMIZER = "whole step", "forward and backward", "optimizer"
QUANTITIES = (WHOLE, PASSES, OPTIMIZER)


@dataclass(frozen=True)
class Job:
    """A model to finetune and the size of a batch; the tokens are random, as the cost does not depend on them."""

    name: str
    title: str
    build: Callable[[torch.device], Any]  # the model with LoRA
    batch: int
    tokens: int
    warm_up: int  # whole steps at the beginning of a turn that are not counted


def _random_llama(dtype: torch.dtype, rank: int, **config: int) -> Callable[[torch.device], Any]:
    """A Llama with random weights and LoRA on q and v."""

    def build(device: torch.device) -> Any:
        import peft
        import transformers

        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is renaming
            base = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**config, use_cache=False),  # type: ignore[arg-type]
                dtype=dtype,
            )
            lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            return peft.get_peft_model(base, lora)

    return build


def _smollm2(device: torch.device) -> Any:
    """SmolLM2-135M-Instruct with its weights, and the main job's LoRA r=8 on q and v."""
    from benchmarks.finetune.model import add_lora, load_model

    model, _ = load_model(None, device=device, in_8bit=False)
    return add_lora(model, seed=0)


LLAMA_2_7B = Job(
    "llama-2-7b",
    "Llama-2-7B, random bfloat16 weights, LoRA r=8 on q, v",
    _random_llama(
        torch.bfloat16,
        rank=8,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    batch=4,
    tokens=320,
    warm_up=3,
)
# No warm-up on a processor: a pass takes a second, whatever is in its caches.
SMOLLM2 = Job("smollm2-135m", "SmolLM2-135M, LoRA r=8 on q, v", _smollm2, batch=8, tokens=24, warm_up=0)
TOY = Job(
    "toy",
    "a tiny Llama, LoRA r=2 on q, v",
    _random_llama(
        torch.float32,
        rank=2,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    ),
    batch=2,
    tokens=8,
    warm_up=1,
)


def job_for(device: torch.device) -> Job:
    """What a device has the time and the memory for."""
    return SMOLLM2 if device.type == "cpu" else LLAMA_2_7B


class Problem:
    """A job's model in training mode, its trainable parameters, and batches by number."""

    def __init__(self, job: Job, device: torch.device) -> None:
        torch.manual_seed(0)
        self.job = job
        self.model: Any = job.build(device)
        self.model.train()
        self.device = device
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.elements = sum(param.numel() for param in self.params)
        self.dtype = str(self.params[0].dtype).removeprefix("torch.")
        self.checkpointing = False
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

    def _fit(self) -> list[Tensor]:
        """The first batch's gradients; with checkpointing if the memory does not suffice without.

        LoRA's B is zero at the start, which leaves A without a gradient: it is moved off zero for this.
        """
        for param in self.params:
            param.data.add_(1e-3)
        try:
            self.loss(0).backward()
        except torch.OutOfMemoryError:
            for param in self.params:
                param.grad = None
            torch.cuda.empty_cache()
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable()
            self.checkpointing = True
            self.loss(0).backward()
        gradients = [param.grad.clone() for param in self.params if param.grad is not None]
        self.reset()
        return gradients


class Marks:
    """Moments within a step: of the device's work on a GPU, whose host runs ahead, else of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type != "cpu"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Remember this moment."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter() * 1e3)

    def spans(self) -> list[float]:
        """Milliseconds between the moments; the device must have finished."""
        events = [begin.elapsed_time(end) for begin, end in zip(self._events, self._events[1:], strict=False)]
        return events or [end - begin for begin, end in zip(self._times, self._times[1:], strict=False)]


@dataclass
class _Entry:
    """An optimizer's figures so far."""

    optimizer: Optimizer
    error: str | None
    times: dict[str, list[list[float]]] = field(default_factory=lambda: {name: [] for name in QUANTITIES})
    peak: int = 0


def _turn(entry: _Entry, problem: Problem, clock: CpuClock, numbers: Sequence[int]) -> None:
    """A new optimizer from the start, and its steps on these batches."""
    problem.reset()
    clock.release()
    loop = entry.optimizer.build(problem.params)
    loop.begin()  # state is made in the first step, which needs no passes
    problem.give_gradients()
    loop.finish()
    turn: dict[str, list[float]] = {name: [] for name in QUANTITIES}

    def step(number: int) -> None:
        marks = Marks(clock.device)
        clock.synchronize()
        begin = time.perf_counter()
        marks.mark()
        loop.begin()
        marks.mark()
        problem.loss(number).backward()
        marks.mark()
        loop.finish()
        marks.mark()
        clock.synchronize()
        turn[WHOLE].append((time.perf_counter() - begin) * 1e3)
        before, passes, after = marks.spans()
        turn[PASSES].append(passes)
        turn[OPTIMIZER].append(before + after)

    for _ in range(problem.job.warm_up):
        step(numbers[0])
    for times in turn.values():
        times.clear()
    clock.reset_peak()
    for number in numbers:
        step(number)
    entry.peak = max(entry.peak, clock.peak_since(0) or 0)
    for name, times in turn.items():
        entry.times[name].append(times)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Found:
    """What was measured: for each optimizer one measurement of each of :data:`QUANTITIES`, or why nothing was."""

    measurements: list[Measurement]
    skipped: str = ""
    setting: dict[str, Any] = field(default_factory=dict)  # batch, sizes, and whether checkpointing was needed

    @property
    def wrong(self) -> dict[str, str]:
        """What of ours failed or was not right, with the reason."""
        return {m.contender: m.error for m in self.measurements if m.ours and m.error and m.quantity == WHOLE}


def measure(
    job: Job,
    clock: CpuClock,
    *,
    rounds: int,
    steps: int,
    enough_time: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Checks the optimizers, then times the whole step with each in turn, round after round.

    Args:
        job: Model and batch.
        clock: The device's.
        rounds: Turns of each optimizer, if the time allows; at least one.
        steps: Counted steps of a turn.
        enough_time: Asked before every round but the first.
        tick: Called `rounds` times for each optimizer, if all rounds are run.
    """
    for package in ("transformers", "peft"):
        if version(package) is None:
            return Found([], f"{package} is not installed")
    try:
        problem = Problem(job, clock.device)
    except UserError as error:
        return Found([], str(error))
    entries = [_Entry(o, o.missing()) for o in optimizers(clock.device)]
    _check(entries, problem)
    done = 0
    while done < rounds and (not done or enough_time()):
        numbers = range(done * steps, (done + 1) * steps)
        for entry in entries:
            if entry.error is None:
                try:
                    _turn(entry, problem, clock, numbers)
                except Exception as error:  # a row of the table, not the end of the suite
                    entry.error = _reason(error)
            gc.collect()
            tick()
        done += 1
    setting = {
        "title": job.title,
        "batch": job.batch,
        "tokens": job.tokens,
        "lora_elements": problem.elements,
        "lora_tensors": len(problem.params),
        "checkpointing": problem.checkpointing,
    }
    measured = [_measurement(entry, entries[0], problem, name) for entry in entries for name in QUANTITIES]
    return Found(measured, setting=setting)


def _check(entries: Sequence[_Entry], problem: Problem) -> None:
    """Takes those that are wrong out of the measurement."""
    for entry in entries:
        if entry.error is None:
            try:
                entry.error = wrong(entry.optimizer, problem.params, problem.reset, problem.give_gradients)
            except Exception as error:  # a row of the table, not the end of the suite
                entry.error = _reason(error)
    problem.reset()


def _measurement(entry: _Entry, baseline: _Entry, problem: Problem, quantity: str) -> Measurement:
    """One quantity; the peak of memory (the model's included, per LoRA element) is the whole step's."""
    optimizer = entry.optimizer
    what = (PART, f"{problem.job.name} finetuning step", problem.dtype, optimizer.name, optimizer.ours, quantity, "ms")
    if entry.error is not None:
        return Measurement(*what, error=entry.error)
    times = entry.times[quantity]
    over = None if baseline.error else ratios(times, baseline.times[quantity])
    return Measurement(
        *what,
        *quantiles([value for turn in times for value in turn]),
        rounds=[statistics.median(turn) for turn in times],
        baseline=BASELINE,
        ratios=over,
        ratio=statistics.median(over) if over else None,
        peak_bytes_per_element=entry.peak / problem.elements if entry.peak and quantity == WHOLE else None,
    )


def shares(measurements: Sequence[Measurement]) -> dict[str, float]:
    """The optimizer's share of the step, for each contender: of the medians of the optimizer and of both parts."""
    medians = {(m.contender, m.quantity): m.p50 for m in measurements if m.error is None and m.p50 is not None}
    return {
        name: part / (part + medians[name, PASSES])
        for (name, quantity), part in medians.items()
        if quantity == OPTIMIZER
    }
