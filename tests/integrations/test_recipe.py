"""`use_ivon(trainer)` without a word more: it knows AdamW's learning rate, the steps, the examples and the epochs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer

from ivon_kernels import IVON
from ivon_kernels.integrations.transformers import ivon_of, use_ivon
from tests.support.tiny_llm import IVON_OPTIONS, arguments, llama, lora_llama, sequences

# PEFT asks transformers by a name that transformers is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # of runs of a few steps
]
NAMES = ("lr", "ess", "hess_init", "clip_radius", "beta2")
RATE = 2e-3


def trained(folder: Path, data: Any = None, given: dict[str, Any] | None = None, **options: Any) -> IVON:
    """The optimizer of a Trainer of `lora_llama` after training; `given` are the options of `use_ivon`."""
    args = arguments(folder, **{"max_steps": 1, "learning_rate": RATE, **options})
    trainer = Trainer(lora_llama(), args, train_dataset=sequences() if data is None else data)
    use_ivon(trainer, **(given or {}))
    trainer.train()
    return ivon_of(trainer)


def settings(optimizer: IVON) -> list[tuple[float, ...]]:
    """Of each parameter group; `lr` before the schedule."""
    groups = optimizer.param_groups
    return [tuple(group.get(f"initial_{name}", group[name]) for name in NAMES) for group in groups]


def expected(**given: Any) -> list[tuple[float, ...]]:
    return settings(IVON.for_lora(lora_llama(), **given))


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Sequences that nobody has counted."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sequences(100))


def test_the_trainer_knows_everything(tmp_path: Path) -> None:
    found = trained(tmp_path, max_steps=-1, num_train_epochs=3)  # of 12 examples in steps of 4
    assert settings(found) == expected(num_data=12, learning_rate=RATE, steps=9, epochs=3)


def test_steps_count_the_epochs(tmp_path: Path) -> None:
    found = trained(tmp_path, max_steps=6)
    assert settings(found) == expected(num_data=12, learning_rate=RATE, steps=6, epochs=2)


def test_a_stream_is_seen_once(tmp_path: Path) -> None:
    found = trained(tmp_path, Stream(), max_steps=2)
    assert settings(found) == expected(num_data=8, learning_rate=RATE, steps=2, epochs=1)


def test_what_is_said_goes_first(tmp_path: Path) -> None:
    found = trained(tmp_path, given={"num_data": 80_000, "learning_rate": 1e-3, "steps": 50, "seed": 7})
    assert settings(found) == expected(num_data=80_000, learning_rate=1e-3, steps=50, epochs=4 / 80_000)
    assert found.seed == 7
    found = trained(tmp_path, given={"sigma": 0.01})
    assert settings(found) == expected(num_data=12, learning_rate=RATE, steps=1, epochs=1 / 3, sigma=0.01)
    found = trained(tmp_path, given={"lr": 3.0})
    assert settings(found) == expected(num_data=12, lr=3.0, steps=1, epochs=1 / 3)
    found = trained(tmp_path, given={"recipe": "paper", "ess": 1e7})
    assert settings(found) == expected(num_data=12, recipe="paper", ess=1e7)


def test_ivons_own_settings_leave_nothing_to_the_recipe(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TrainingArguments.learning_rate")
        found = trained(tmp_path, given=dict(IVON_OPTIONS))
    assert {name: found.defaults[name] for name in IVON_OPTIONS} == IVON_OPTIONS


def test_a_new_head_is_a_group_of_its_own(tmp_path: Path) -> None:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    trainer = Trainer(get_peft_model(llama(), lora), arguments(tmp_path, max_steps=1), train_dataset=sequences())
    use_ivon(trainer)
    trainer.train()
    factors, beside = ivon_of(trainer).param_groups
    assert all("lora_" in name for name in factors["param_names"])
    assert all("lm_head" in name for name in beside["param_names"]) and beside["param_names"]


@pytest.mark.slow
def test_it_learns_as_adamw_does(tmp_path: Path) -> None:
    """Counting by heart, 16 sequences: IVON's loss falls by at least two thirds of what AdamW's falls."""
    rows = [[3 + (start + i) % 8 for i in range(8)] for start in range(8)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    lora = LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear")
    options: dict[str, Any] = {"max_steps": 120, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}

    def fall(*, ivon: bool) -> float:
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora)
        args = arguments(tmp_path, learning_rate=1e-2, **options)
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        if ivon:
            use_ivon(trainer)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return float(before - trainer.evaluate()["eval_loss"])

    assert fall(ivon=True) > 2 / 3 * fall(ivon=False) > 0.3
