"""A whole LoRA training step of a Llama-2-7B-shaped model: what the optimizer costs where it is used."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import version
from benchmarks.gpu.clock import CpuClock
from benchmarks.gpu.contenders import BASELINE, IVON_OPT, our_backends, our_name
from benchmarks.gpu.measure import timing
from ivon_kernels import IVON, available_backends

# The published recipe (IVON.for_lora), in ivon-opt's terms.
_IVON_OPT_ARGS = {
    "lr": 0.03,
    "ess": 1e7,
    "hess_init": 1e-3,
    "weight_decay": 1e-6,
    "clip_radius": 1e-3,
    "rescale_lr": False,
}
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """The model and the batch."""

    config: dict[str, int]
    batch: int
    tokens: int
    dtype: torch.dtype
    rank: int = 8


LLAMA_2_7B = Shape(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    batch=4,
    tokens=320,
    dtype=torch.bfloat16,
)
TOY = Shape(
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
    batch=2,
    tokens=8,
    dtype=torch.float32,
    rank=2,
)


class Problem:
    """The model with LoRA on q and v, one batch, and its trainable parameters."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        import peft
        import transformers

        torch.manual_seed(0)
        options: dict[str, Any] = {**shape.config, "use_cache": False}
        config = transformers.LlamaConfig(**options)
        with torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is renaming
            base = transformers.AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
            lora = peft.LoraConfig(r=shape.rank, lora_alpha=16, target_modules=["q_proj", "v_proj"])
            self.model: Any = peft.get_peft_model(base, lora)
        self.model.train()
        size = (shape.batch, shape.tokens)
        self.tokens = torch.randint(shape.config["vocab_size"], size, device=device)
        self.params = [param for param in self.model.parameters() if param.requires_grad]
        self.elements = sum(param.numel() for param in self.params)
        self._home = [param.data for param in self.params]
        self._start = [param.data.clone() for param in self.params]
        self.checkpointing = False

    def loss(self) -> Tensor:
        """The loss of the batch."""
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        return loss

    def use_checkpointing(self) -> None:
        """Spend time to save activations, for GPUs on which they do not fit."""
        self.model.enable_input_require_grads()
        self.model.gradient_checkpointing_enable()
        self.checkpointing = True

    def reset(self) -> None:
        """Parameters as at the start, in the memory of the start (ivon-opt puts them elsewhere), no gradients."""
        for param, home, start in zip(self.params, self._home, self._start, strict=True):
            param.data = home
            home.copy_(start)
            param.grad = None


def _adamw(problem: Problem) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(problem.params, lr=1e-4, fused=True)

    def step() -> None:
        problem.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(backend: str, one_launch: bool) -> Callable[[Problem], Callable[[], None]]:
    def build(problem: Problem) -> Callable[[], None]:
        optimizer = IVON.for_lora(
            problem.params, num_data=10_000, seed=0, backend=backend, sample_in_step=one_launch, mc_samples=1
        )

        def step() -> None:
            optimizer.train()
            problem.loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def _ivon_opt(problem: Problem) -> Callable[[], None]:
    import ivon

    optimizer = ivon.IVON(problem.params, **_IVON_OPT_ARGS)

    def step() -> None:
        with optimizer.sampled_params(train=True):
            problem.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclass
class _Trainer:
    name: str
    build: Callable[[Problem], Callable[[], None]]
    backend: str | None = None
    mode: str | None = None
    error: str | None = None
    times: list[list[float]] = field(default_factory=list)
    peak: int = 0


def _trainers(device: torch.device) -> list[_Trainer]:
    result = [_Trainer(BASELINE, _adamw)]
    for backend in our_backends(device):
        reason = available_backends().get(backend, f"this version has no backend {backend!r}")
        for mode in ("plain", "one launch"):
            build = _ours(backend, mode == "one launch")
            result.append(_Trainer(our_name(backend, mode), build, backend, mode, reason))
    missing = None if version("ivon-opt") else "ivon-opt is not installed"
    return [*result, _Trainer(IVON_OPT, _ivon_opt, error=missing)]


def _turn(trainer: _Trainer, problem: Problem, clock: CpuClock, steps: int) -> None:
    problem.reset()
    clock.release()
    step = trainer.build(problem)
    for _ in range(clock.warm_up):
        step()

    def finished() -> None:
        step()
        clock.synchronize()

    clock.synchronize()
    clock.reset_peak()
    times = [clock.host_ms(finished) for _ in range(steps)]
    trainer.peak = max(trainer.peak, clock.peak())
    trainer.times.append(times)


def _fit(problem: Problem) -> None:
    """One forward and backward pass; with checkpointing if the memory does not suffice without."""
    try:
        problem.loss().backward()
    except torch.OutOfMemoryError:
        problem.reset()
        torch.cuda.empty_cache()
        problem.use_checkpointing()
        problem.loss().backward()


def measure(
    shape: Shape, clock: CpuClock, *, rounds: int, steps: int, enough_time: Callable[[], bool]
) -> dict[str, Any]:
    """Times the training step and takes its peak memory with each optimizer in turn, round after round.

    Returns:
        The record: `rows` with name, backend, mode, milliseconds, ratio to fused AdamW (median over the rounds),
        peak bytes and what they exceed AdamW's by per LoRA element; or `skipped` with the reason.
    """
    for package in ("transformers", "peft"):
        if version(package) is None:
            return {"skipped": f"{package} is not installed"}
    problem = Problem(shape, clock.device)
    _fit(problem)
    trainers = _trainers(clock.device)
    done = 0
    while done < rounds and (not done or enough_time()):
        for trainer in trainers:
            if trainer.error is None:
                try:
                    _turn(trainer, problem, clock, steps)
                except Exception as error:
                    trainer.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                gc.collect()
        done += 1
    return {
        "shape": {**shape.config, "batch": shape.batch, "tokens": shape.tokens, "dtype": str(shape.dtype)},
        "lora": {"rank": shape.rank, "elements": problem.elements, "tensors": len(problem.params)},
        "lora_dtype": str(problem.params[0].dtype),
        "checkpointing": problem.checkpointing,
        "rounds": done,
        "rows": [_row(trainer, trainers[0], problem.elements) for trainer in trainers],
    }


def _row(trainer: _Trainer, baseline: _Trainer, elements: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": trainer.name, "backend": trainer.backend, "mode": trainer.mode}
    if trainer.error is not None or not trainer.times:
        return {**row, "error": trainer.error}
    based = baseline.error is None
    time = timing(trainer.name, trainer.times, baseline.times if based else None)
    return {
        **row,
        "ms": {"p20": time.p20, "p50": time.p50, "p80": time.p80, "min": min(map(statistics.median, trainer.times))},
        "ratio": time.ratio,
        "peak_bytes": trainer.peak,
        "extra_bytes_per_element": (trainer.peak - baseline.peak) / elements if based else None,
        "error": None,
    }
