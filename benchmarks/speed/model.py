"""The part `model`: a whole LoRA finetuning step, what the optimizer costs where it is used.

The optimizers take turns of a few steps on one model, round after round, each from the same weights and on the same
batches. A step is timed as a whole, and apart as forward and backward pass, and optimizer: sampling, step, restore and
`zero_grad`. Before that every optimizer is verified on the model's own tensors and gradients.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import UserError
from benchmarks.environment import version
from benchmarks.memory import PeakMemory
from benchmarks.speed.clock import CpuClock
from benchmarks.speed.contender import BASELINE, FOREACH, IVON_OPT, LORA, STEP, Contender
from benchmarks.speed.measure import Found, Row, measurements, take_turns
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


def _random_llama(dtype: torch.dtype, rank: int, vocabulary: int, **sizes: int) -> Callable[[torch.device], Any]:
    """A Llama with random weights and LoRA on q and v."""

    def build(device: torch.device) -> Any:
        import peft
        import transformers

        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is renaming
            heads = sizes["num_attention_heads"]
            config: Any = transformers.LlamaConfig(
                vocab_size=vocabulary, num_key_value_heads=heads, use_cache=False, **sizes
            )
            base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            lora = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            return peft.get_peft_model(base, lora)

    return build


def _smollm2(device: torch.device) -> Any:
    """SmolLM2-135M-Instruct with its weights, and the main job's LoRA r=8 on q and v."""
    from benchmarks.finetune.model import add_lora, load_model

    model, _ = load_model(None, device=device, in_8bit=False)
    return add_lora(model, seed=0)


_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_2_7B = Job("llama-2-7b", _random_llama(torch.bfloat16, 8, 32000, **_LLAMA), 4, 320, warm_up=3)
# No warm-up on a processor: a pass takes a second, whatever is in its caches.
SMOLLM2 = Job("smollm2-135m", _smollm2, 8, 24, warm_up=0)
TOY = Job("toy", _random_llama(torch.float32, 2, 64, **_TINY), 2, 8, warm_up=1)


def job_for(device: torch.device) -> Job:
    """What a device has the time and the memory for."""
    return SMOLLM2 if device.type == "cpu" else LLAMA_2_7B


def contenders(device: torch.device) -> Sequence[Contender]:
    """The optimizers; the first one is the baseline of the ratios."""

    def chosen(contender: Contender) -> bool:
        mode = contender.name.partition(", ")[2]
        return mode in (PLAIN, ONE_LAUNCH) if contender.ours else contender.name in (BASELINE, FOREACH, IVON_OPT)

    return [contender for contender in lineup(device) if contender.quantity == STEP and chosen(contender)]


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
    optimizer = contender.build(problem.params, LORA)
    optimizer.begin()  # state is made in the first step, which needs no passes
    problem.give_gradients()
    optimizer.finish()
    optimizer.optimizer.zero_grad()

    def step(number: int) -> tuple[float, float, float]:
        clock.synchronize()
        begin, marks = time.perf_counter(), [clock.mark()]
        optimizer.begin()
        marks.append(clock.mark())
        problem.loss(number).backward()
        marks.append(clock.mark())
        optimizer.finish()
        optimizer.optimizer.zero_grad()
        marks.append(clock.mark())
        clock.synchronize()
        whole = (time.perf_counter() - begin) * 1e3
        before, passes, after = map(clock.span_ms, marks, marks[1:])
        return whole, passes, before + after

    for _ in range(problem.job.warm_up):
        step(numbers[0])
    with PeakMemory(clock.device) as peak:
        times = [step(number) for number in numbers]
    row.peaks.append(peak.highest or 0)
    return {quantity: list(values) for quantity, values in zip(QUANTITIES, zip(*times, strict=True), strict=True)}


def measure(
    job: Job,
    clock: CpuClock,
    *,
    rounds: int,
    steps: int,
    enough_time: Callable[[], bool],
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Verifies the optimizers, then times the whole step with each in turn, round after round.

    Args:
        job: Model and batch.
        clock: The device's.
        rounds: Turns of each optimizer, if the time allows; at least one.
        steps: Counted steps of a turn.
        enough_time: Asked before every round but the first.
        tick: Called `rounds` times for each optimizer.

    Returns:
        A measurement of each of :data:`QUANTITIES` for each optimizer, or why there is none.
    """
    for package in ("transformers", "peft"):
        if version(package) is None:
            return Found([], {}, skipped=f"{package} is not installed")
    try:
        problem = Problem(job, clock.device)
    except UserError as error:
        return Found([], {}, skipped=str(error))
    verifier = Verifier(problem.tensors(), problem.params[0].dtype, clock.device, problem.elements, LORA)
    chosen = contenders(clock.device)
    rows = verifier.rows(chosen, Contender.missing)
    del verifier
    gc.collect()

    def turn(number: int, done: int) -> dict[str, list[float]]:
        numbers = range(done * steps, (done + 1) * steps)
        return _turn(chosen[number], rows[number], problem, clock, numbers)

    def after() -> None:
        gc.collect()
        tick()

    def further(row: Row, quantity: str, median: float | None) -> dict[str, Any]:
        """The peak, the model included, is the whole step's."""
        known = row.peaks and quantity == WHOLE
        return {"peak_bytes_per_element": max(row.peaks) / problem.elements if known else None}

    take_turns(rows, turn, rounds, enough_time=enough_time, after=after)
    for row in rows:
        row.quantities = QUANTITIES
    place = (PART, f"{job.name} finetuning step", problem.dtype)
    return Found(measurements(place, rows, further=further), wrong(chosen, rows))
