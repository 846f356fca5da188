"""IVON in TRL's trainers: SFT with all that the Trainer offers, DPO's reference model, and the rollouts of GRPO."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import IVONCallback, ivon_of, use_ivon
from ivon_kernels.integrations.trl import attach_rollouts
from ivon_kernels.noise import EVAL_STEP
from tests.support.helpers import assert_same, relative_error, sample_of, snapshot
from tests.support.tiny_llm import (
    IVON_OPTIONS,
    QUIET,
    llama,
    lora_config,
    lora_llama,
    means,
    same,
    saved_adapter,
    tokenizer,
    weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
    # PEFT and TRL use names that Transformers has replaced.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]
WORDS = ["hello", "world", "abc", "xyz", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module", autouse=True)
def _no_progress_bars() -> None:
    disable_progress_bars()


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.0,
        "bf16": False,
    }
    return {**QUIET, **defaults, **options}


# ---- SFT -------------------------------------------------------------------------------------------------------------


def sft(folder: Path, ivon: dict[str, Any] | None = None, **options: Any) -> SFTTrainer:
    """LoRA is added by the trainer itself, and trained under activation checkpointing, which is TRL's default."""
    data = Dataset.from_dict({"text": WORDS})
    trainer = SFTTrainer(
        model=llama(),
        args=SFTConfig(**arguments(folder, max_length=16, **options)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=lora_config(),
    )
    use_ivon(trainer, **(ivon or IVON_OPTIONS))
    return trainer


class SaveInside(TrainerCallback):
    """Saves in the middle of accumulation, and evaluates there."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.saved: list[bool] = []

    def on_substep_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        mean = means(ivon_of(self.trainer), self.trainer.model)
        assert not same(weights(self.trainer.model), mean)
        self.trainer.save_model(str(self.folder))
        self.saved.append(same(saved_adapter(self.folder), mean))
        self.trainer.evaluate()
        assert same(weights(self.trainer.model), mean)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_sft_resumes_saves_and_evaluates(tmp_path: Path, bf16: bool) -> None:
    """The interrupted run also saves and evaluates where that is hardest, which changes nothing."""
    options = {"bf16": bf16, "save_strategy": "steps", "save_steps": 2}
    whole = sft(tmp_path, **options)
    whole.train()
    resumed = sft(tmp_path, **options)
    inside = SaveInside(resumed, tmp_path / "inside")
    resumed.add_callback(inside)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert inside.saved == [True] * 2
    assert_same(snapshot(ivon_of(whole)), snapshot(ivon_of(resumed)))
    assert same(saved_adapter(tmp_path / "checkpoint-4"), means(ivon_of(whole), whole.model))


@pytest.mark.slow
def test_sft_learns(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {"seed": 0}, max_steps=80, learning_rate=2e-2, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


def test_sft_accumulates_and_clips(tmp_path: Path) -> None:
    """One batch of four in two halves gives the same momentum, and clipping bounds it."""
    momentum = {}
    for accumulation, clip in ((1, 0.0), (2, 0.0), (2, 0.01)):
        options = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = sft(tmp_path, {**IVON_OPTIONS, "beta1": 0.0}, max_steps=1, max_grad_norm=clip, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TrainingArguments.max_grad_norm")
            trainer.train()
        states = ivon_of(trainer).state.values()
        momentum[accumulation, clip] = torch.cat([state["momentum"].flatten() for state in states])
    assert momentum[2, 0.01].norm() == pytest.approx(0.01, rel=1e-3)
    assert momentum[2, 0.0].norm() > 0.02
    # Of 8 rows of a few tokens, behind a dozen sums of at most 32 products: fewer than 500 roundings of 2^-24.
    assert relative_error(momentum[2, 0.0], momentum[1, 0.0]) < 500 * 2**-24


# ---- DPO -------------------------------------------------------------------------------------------------------------


def pairs() -> Dataset:
    return Dataset.from_dict({"prompt": ["he", "wo"] * 4, "chosen": ["llo", "rld"] * 4, "rejected": ["xx", "yy"] * 4})


@pytest.mark.parametrize("adapter", ["made by the trainer", "passed"])
def test_dpo_compares_with_a_reference_that_is_never_sampled(tmp_path: Path, adapter: str) -> None:
    """The reference is the model without its adapter, or with a frozen copy of the adapter that was passed."""
    passed = adapter == "passed"
    args = arguments(tmp_path, max_length=16, max_steps=2)
    trainer = DPOTrainer(
        model=lora_llama() if passed else llama(),
        args=DPOConfig(**args),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=None if passed else lora_config(),
    )
    use_ivon(trainer, **IVON_OPTIONS)
    seen: dict[bool, list[tuple[dict[str, Any], Tensor]]] = {True: [], False: []}

    def record(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        own = {key: kwargs[key] for key in ("input_ids", "attention_mask")}
        seen[torch.is_grad_enabled()].append((own, output.last_hidden_state.detach().clone()))

    trainer.model.base_model.model.model.register_forward_hook(record, with_kwargs=True)
    trainer.train()
    pristine = (lora_llama().base_model.model if passed else llama()).model.eval()
    with torch.no_grad():
        for inputs, hidden in seen[False]:
            assert torch.equal(pristine(**inputs).last_hidden_state, hidden)
        policy = [torch.equal(pristine(**inputs).last_hidden_state, hidden) for inputs, hidden in seen[True]]
    assert len(seen[False]) == 4 and len(policy) >= 4 and not any(policy)
    trained = list(means(ivon_of(trainer), trainer.model))
    assert len(trained) == 4 and not any(".ref." in name for name in trained)


def test_dpo_resumes(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = DPOConfig(**arguments(tmp_path, max_length=16, save_strategy="steps", save_steps=2))
        trainer = DPOTrainer(
            model=llama(),
            args=args,
            train_dataset=pairs(),
            processing_class=tokenizer(),
            peft_config=lora_config(),
        )
        use_ivon(trainer, **IVON_OPTIONS)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(snapshot(ivon_of(trainer)))
        assert same(saved_adapter(tmp_path / "checkpoint-4"), means(ivon_of(trainer), trainer.model))
    assert_same(*runs)


def test_dpo_takes_the_optimizer_itself(tmp_path: Path) -> None:
    model = lora_llama()
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments(tmp_path, max_length=16, max_steps=2)),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[IVONCallback()],
    )
    trainer.train()
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


# ---- GRPO ------------------------------------------------------------------------------------------------------------


class Recorder:
    """What the weights held in each forward pass of a trainer: rollouts and their log-probabilities, or updates."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rollouts: list[tuple[int, str | int]] = []  # optimizer step, what the weights held
        self.updates: list[tuple[int, str | int]] = []
        self.last: tuple[Any, ...] = ()
        trainer.model.model.embed_tokens.register_forward_pre_hook(self.record)

    def record(self, module: Any, inputs: Any) -> None:
        grad, weight = torch.is_grad_enabled(), self.trainer.model.lm_head.weight
        step = int(self.trainer.state.global_step)
        if self.last != (step, grad, weight._version):
            self.last = (step, grad, weight._version)
            entry = (step, self.held())
            found = self.updates if grad else self.rollouts
            if entry not in found:
                found.append(entry)

    def held(self) -> str | int:
        """``"mean"``, the evaluation sample, or ``"own"`` for the training sample of the next step."""
        ivon = ivon_of(self.trainer)
        params = ivon.param_groups[0]["params"]
        if all(torch.equal(p, ivon.state[p]["mean"]) for p in params):
            return "mean"
        step = int(ivon.state[params[0]]["step"])
        for name, where in (("own", (step, 0)), *((k, (EVAL_STEP, k)) for k in range(8))):
            if all(
                torch.allclose(p.double(), s, rtol=0, atol=1e-5)
                for p, s in zip(params, sample_of(ivon, *where), strict=True)
            ):
                return name
        raise AssertionError("the weights hold neither the mean nor a known sample")


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Depends on the weights that generated: the rollouts are compared through what they lead to."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def grpo(folder: Path, rollouts: Any = None, trainer_class: Any = GRPOTrainer, **options: Any) -> Trainer:
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer_class]
    defaults = {"gradient_accumulation_steps": 1, "steps_per_generation": 2, "num_iterations": 1, "beta": 0.0}
    args = config(
        **arguments(folder, num_generations=2, max_completion_length=4, **{**defaults, **options}),
    )
    data = Dataset.from_dict({"prompt": ["he", "wo", "a", "b"]})
    trainer: Trainer = trainer_class(
        model=llama(),
        reward_funcs=reward,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )
    use_ivon(trainer, **IVON_OPTIONS)
    if rollouts is not None:
        attach_rollouts(trainer, rollouts)
    return trainer


@pytest.mark.parametrize(
    ("trainer_class", "rollouts", "generated", "updated"),
    [
        (GRPOTrainer, None, ["own", "own"], ["own"] * 4),
        (GRPOTrainer, "mean", ["mean", "mean"], ["own"] * 4),
        (GRPOTrainer, "sample", [0, 2], [0, 0, 2, 2]),
        (GRPOTrainer, 5, [5, 5], [5] * 4),
        (RLOOTrainer, "sample", [0, 2], [0, 0, 2, 2]),
    ],
)
def test_rollouts_and_the_updates_on_them(
    tmp_path: Path, trainer_class: Any, rollouts: Any, generated: list[Any], updated: list[Any]
) -> None:
    """Rollouts serve two steps each."""
    trainer = grpo(tmp_path, rollouts, trainer_class)
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.rollouts == list(zip([0, 2], generated, strict=True))
    assert recorder.updates == list(enumerate(updated))
    assert same(weights(trainer.model), means(ivon_of(trainer), trainer.model))


@pytest.mark.parametrize("rollouts", ["mean", "sample"])
def test_rollouts_reused_over_iterations_with_accumulation(tmp_path: Path, rollouts: str) -> None:
    """Four micro-batches per generation, two steps of two; a generation for each half of a step is possible too."""
    trainer = grpo(tmp_path, rollouts, gradient_accumulation_steps=2, num_iterations=2)
    recorder = Recorder(trainer)
    trainer.train()
    own = rollouts == "mean"
    assert recorder.rollouts == [(0, "mean" if own else 0), (2, "mean" if own else 2)]
    assert recorder.updates == [(step, "own" if own else step // 2 * 2) for step in range(4)]
    trainer = grpo(tmp_path, rollouts, gradient_accumulation_steps=4, max_steps=2)
    recorder = Recorder(trainer)
    trainer.train()
    assert recorder.rollouts == [(step, "mean" if own else step) for step in range(2)]
    assert recorder.updates == [(step, "own" if own else step) for step in range(2)]


@pytest.mark.slow
def test_grpo_evaluates_at_the_mean_and_resumes(tmp_path: Path) -> None:
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        trainer = grpo(tmp_path, "sample", per_device_eval_batch_size=2, **options)
        recorder = Recorder(trainer)
        trainer.train(resume_from_checkpoint=resume)
        runs.append(snapshot(ivon_of(trainer)))
        assert [entry for entry in recorder.rollouts if entry[1] == "mean"] == [(step, "mean") for step in (2, 4)][
            bool(resume) :
        ]
    assert_same(*runs)


def test_bad_choices_of_rollouts_are_refused(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, gradient_accumulation_steps=2, steps_per_generation=3)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 has to divide, or be a multiple of, the 3"):
        attach_rollouts(trainer, "sample")
    for choice in ("means", -1, 2**16, True, None):
        with pytest.raises(ValueError, match="rollouts must be 'mean', 'sample' or a sample"):
            attach_rollouts(trainer, choice)
    with pytest.raises(TypeError, match="Trainer generates no rollouts"):
        attach_rollouts(sft(tmp_path), "mean")


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """Accelerate keeps a state that all trainers share; the next test begins with its own."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()
