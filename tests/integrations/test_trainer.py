"""Training with IVON in the Trainer of Transformers: the ways to ask for it, accumulation, clipping, AMP, advice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, get_linear_schedule_with_warmup

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import IVONCallback, IVONFactory, ivon_of, use_ivon
from tests.support.helpers import snapshot
from tests.support.tiny_llm import (
    IVON_OPTIONS,
    arguments,
    llama,
    lora_llama,
    make_trainer,
    means,
    same,
    sequences,
    weights,
)

# PEFT asks a property that Transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore::ivon_kernels.training.advice.IVONWarning"
    ),  # runs of a few steps: see test_voice
]


def trained_means(trainer: Trainer) -> dict[str, Tensor]:
    trainer.train()
    return means(ivon_of(trainer), trainer.model)


def plain_loop(steps: int, accumulation: int, clip: float = 0.0, **options: Any) -> dict[str, Tensor]:
    """What the Trainer of `arguments` does, written out."""
    model = lora_llama().train()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = IVON(named, **{**IVON_OPTIONS, **options})
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    tokens = torch.tensor([row["input_ids"] for row in sequences()]).view(-1, 2, 6)
    for step in range(steps):
        micro_batches = [tokens[(step * accumulation + i) % len(tokens)] for i in range(accumulation)]
        for batch in micro_batches:
            optimizer.train()
            count = sum(int(b[:, 1:].numel()) for b in micro_batches)
            model(input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(count)).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return means(optimizer, model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_equals_the_plain_loop(tmp_path: Path, accumulation: int) -> None:
    steps = 12 // 2 // accumulation
    trained = trained_means(make_trainer(tmp_path, max_steps=steps, gradient_accumulation_steps=accumulation))
    expected = plain_loop(steps, accumulation)
    assert trained.keys() == expected.keys()
    for name, mean in trained.items():
        torch.testing.assert_close(mean, expected[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:TrainingArguments.max_grad_norm:UserWarning")
def test_trainers_clipping_takes_effect(tmp_path: Path) -> None:
    trained = trained_means(make_trainer(tmp_path, max_steps=3, max_grad_norm=0.01))
    expected = plain_loop(3, 2, clip=0.01)
    unclipped = plain_loop(3, 2)
    assert same(trained, expected) and not same(trained, unclipped)


def test_the_optimizer_itself_can_be_passed(tmp_path: Path) -> None:
    model = lora_llama()
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=sequences(), optimizers=(optimizer, None))
    by_factory = trained_means(make_trainer(tmp_path))
    assert same(trained_means(trainer), by_factory)


def test_the_class_can_be_passed(tmp_path: Path) -> None:
    """Then TrainingArguments say the weight decay. LoRA has neither biases nor norms, so the second group is empty."""
    decay = IVON_OPTIONS["weight_decay"]
    trainer = Trainer(
        lora_llama(),
        arguments(tmp_path, weight_decay=decay),
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(IVON, dict(IVON_OPTIONS)),
        callbacks=[IVONCallback()],
    )
    trained = trained_means(trainer)
    assert [len(group["params"]) for group in ivon_of(trainer).param_groups] == [4, 0]
    assert same(trained, trained_means(make_trainer(tmp_path)))


def test_the_factory_can_be_passed(tmp_path: Path) -> None:
    trainer = Trainer(
        llama(),  # all of it: norms too
        arguments(tmp_path, max_steps=2),
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(IVONFactory, dict(IVON_OPTIONS)),
        callbacks=[IVONCallback],
    )
    trainer.train()
    (group,) = ivon_of(trainer).param_groups
    assert len(group["params"]) == len(list(trainer.model.parameters()))
    assert group["weight_decay"] == IVON_OPTIONS["weight_decay"]
    assert any("norm" in name for name in group["param_names"])


def test_model_init_gets_an_optimizer_for_every_model(tmp_path: Path) -> None:
    """As hyperparameter searches do it: the model and the optimizer are made anew whenever train() is called."""
    trainer = Trainer(
        None, arguments(tmp_path, max_steps=2), train_dataset=sequences(), model_init=lambda: lora_llama()
    )
    use_ivon(trainer, **IVON_OPTIONS)
    first = trained_means(trainer)
    model, optimizer = trainer.model, ivon_of(trainer)
    second = trained_means(trainer)
    assert same(first, second) and trainer.model is not model and ivon_of(trainer) is not optimizer
    ivon_of(trainer).train()
    assert same({name: trainer.model.state_dict()[name] for name in second}, second)


def test_sample_in_step_gives_the_same_training_and_ends_at_the_mean(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ivon={"sample_in_step": True})
    trained = trained_means(trainer)
    assert same(weights(trainer.model), trained)
    assert same(trained, trained_means(make_trainer(tmp_path)))


# ---- mixed precision -------------------------------------------------------------------------------------------------


def test_bf16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    before = weights(lora_llama())
    trainer = make_trainer(tmp_path, bf16=True, max_steps=2)
    seen = []
    trainer.model.base_model.model.lm_head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    after = trained_means(trainer)
    assert set(seen) == {torch.bfloat16}
    assert all(value.dtype is torch.float32 and not torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_parameters_of_low_precision_move(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    before = weights(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=4)
    trainer.train()
    optimizer = ivon_of(trainer)
    assert all(state["mean"].dtype is torch.float32 for state in optimizer.state.values())
    after = weights(model)
    assert same(after, means(optimizer, model))
    moved = [float((after[name] != before[name]).float().mean()) for name in before if "norm" not in name]
    assert min(moved) > 0.5


class WithScaler(Trainer):
    """Accelerate refuses fp16 on a CPU; this is what it sets up on a GPU: autocast, and torch's scaler for the CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36, backoff_factor=2.0**-12)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


class Watch(TrainerCallback):
    """The learning rate and what the step changed, after each call of ``optimizer.step()``."""

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.states: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.lrs.append(context["lr_scheduler"].get_last_lr()[0])

    def on_step_end(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        self.states.append(snapshot(context["optimizer"].optimizer))


@pytest.fixture
def accelerate_forgets() -> Iterator[None]:
    """`WithScaler` writes into the state that all Accelerators share."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("accelerate_forgets")
@pytest.mark.parametrize("clip", [0.0, 1e6], ids=["", "clipped"])
def test_steps_that_the_scaler_skips_leave_no_trace(tmp_path: Path, clip: float) -> None:
    """A scale of 2^36 overflows until it was lowered often enough; the schedule of the learning rate waits."""
    watch = Watch()
    args = arguments(tmp_path, max_steps=6, max_grad_norm=clip)
    trainer = WithScaler(lora_llama(), args, train_dataset=sequences() * 2, callbacks=[watch])
    use_ivon(trainer, **IVON_OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the advice on clipping, tested below
        trainer.train()
    optimizer = ivon_of(trainer)
    skipped = optimizer.skipped_steps
    assert 1 <= skipped <= 4
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (36 - 12 * skipped)
    first = watch.states[0]
    assert all(torch.equal(first[key], value) for state in watch.states[:skipped] for key, value in state.items())
    assert {int(state["step"]) for state in optimizer.state.values()} == {6 - skipped}
    assert len(set(watch.lrs[: skipped + 1])) == 1 and len(set(watch.lrs[skipped:])) == 6 - skipped


# ---- advice and refusals ---------------------------------------------------------------------------------------------


def advice(trainer: Trainer) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "IVON" in str(w.message) or "mc_samples" in str(w.message)]


def test_clipping_is_warned_of_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, max_grad_norm=0.5)
    (said,) = advice(trainer)
    assert "max_grad_norm=0.5" in said and "max_grad_norm=0" in said and "clip_radius" in said
    assert advice(trainer) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"learning_rate": 0.1, "weight_decay": 0.01}, []),
        ({"learning_rate": 3e-4}, ["learning_rate=0.0003 is not used: IVON has lr=0.1"]),
        ({"weight_decay": 0.5}, ["weight_decay=0.5 is not used: IVON has weight_decay=0.01"]),
    ],
    ids=["defaults", "equal", "learning rate", "weight decay"],
)
@pytest.mark.parametrize("way", ["factory", "instance"])
def test_ignored_settings_are_warned_of(
    tmp_path: Path, way: str, settings: dict[str, float], expected: list[str]
) -> None:
    if way == "factory":
        trainer = make_trainer(tmp_path, max_steps=1, **settings)
    else:
        model = lora_llama()
        optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
        args = arguments(tmp_path, max_steps=1, **settings)
        trainer = Trainer(
            model, args, train_dataset=sequences(), optimizers=(optimizer, None), callbacks=[IVONCallback()]
        )
    assert advice(trainer) == [f"TrainingArguments.{said}" for said in expected]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_overridden_weight_decay_is_warned_of(tmp_path: Path, decay: float) -> None:
    """Trainer's groups give TrainingArguments.weight_decay to matrices, and 0 to norms and biases."""
    model = llama() if decay else lora_llama()
    args = arguments(tmp_path, max_steps=1, weight_decay=decay)
    cls_and_options = (IVON, dict(IVON_OPTIONS))
    trainer = Trainer(
        model,
        args,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=cls_and_options,
        callbacks=[IVONCallback()],
    )
    (said,) = advice(trainer)
    assert (
        f"TrainingArguments.weight_decay={decay} overrides IVON's weight_decay=0.01" in said and "IVONFactory" in said
    )


def test_mc_samples_are_warned_of(tmp_path: Path) -> None:
    (said,) = advice(make_trainer(tmp_path, max_steps=1, ivon={"mc_samples": 4}))
    assert "mc_samples=4 has no effect" in said


def test_mistakes_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(lora_llama(), arguments(tmp_path), train_dataset=sequences())
    with pytest.raises(TypeError, match="IVON has no option clip_raduis"):
        use_ivon(trainer, lr=0.1, ess=1.0, clip_raduis=1.0)
    with pytest.raises(TypeError, match="IVON has no option clip_raduis"):
        use_ivon(trainer, num_data=10, clip_raduis=1.0)
    use_ivon(trainer, num_data=10)
    with pytest.raises(ValueError, match="has an optimizer already"):
        use_ivon(trainer, num_data=10)


def test_other_optimizers_and_frozen_models_are_refused(tmp_path: Path) -> None:
    trainer = Trainer(lora_llama(), arguments(tmp_path), train_dataset=sequences(), callbacks=[IVONCallback()])
    with pytest.raises(TypeError, match=r"the Trainer's optimizer is AdamW, not IVON: call use_ivon"):
        trainer.train()
    frozen: nn.Module = llama().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trainable"):
        make_trainer(tmp_path, model=frozen).train()
    other = IVON(llama().parameters(), **IVON_OPTIONS)
    trainer = Trainer(
        llama(), arguments(tmp_path), train_dataset=sequences(), optimizers=(other, None), callbacks=[IVONCallback()]
    )
    with pytest.raises(ValueError, match="no parameter of the model belongs to this optimizer"):
        trainer.train()
