"""Every save of a Trainer has the posterior beside it, and a new process predicts with what was saved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ivon_kernels import IVON
from ivon_kernels.integrations import saving
from ivon_kernels.integrations.transformers import IVONCallback, ivon_of, use_ivon
from ivon_kernels.posterior import Posterior, next_token
from ivon_kernels.posterior.file import FILE
from tests.support.tiny_llm import IVON_OPTIONS, arguments, llama, lora_llama, make_trainer, sequences

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
]
ROOT = Path(__file__).parents[2]


def same(left: Posterior, right: Posterior) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name].mean, right[name].mean) and torch.equal(left[name].hess, right[name].hess)
        for name in left
    )


def now(trainer: Trainer) -> Posterior:
    return ivon_of(trainer).posterior(trainer.model)


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in sequences(4)])}


@pytest.mark.parametrize("kind", ["adapter", "whole", "bfloat16"])
def test_a_saved_model_has_its_posterior(tmp_path: Path, kind: str) -> None:
    model: nn.Module = lora_llama() if kind == "adapter" else llama()
    trainer = make_trainer(tmp_path / "run", model=model.to(torch.bfloat16) if kind == "bfloat16" else model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert same(Posterior.load(tmp_path / "saved"), now(trainer))
    trainer.save_model()
    assert same(Posterior.load(tmp_path / "run"), now(trainer))


def test_a_module_that_is_no_model_of_transformers(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(6), "labels": i % 3} for i in range(12)]
    trainer = Trainer(Net(), arguments(tmp_path), train_dataset=data)
    use_ivon(trainer, **IVON_OPTIONS)
    trainer.train()
    trainer.save_model()
    assert same(Posterior.load(tmp_path), now(trainer))


@pytest.mark.slow
def test_a_new_process_predicts_with_the_saved_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    expected = now(trainer).predict(trainer.model.eval(), inputs(), score=next_token(), samples=3).probabilities
    program = f"""
import torch
from peft import PeftModel
from ivon_kernels.posterior import Posterior, next_token
from tests.integrations.test_saved_with_posterior import inputs
from tests.support.tiny_llm import llama
model = PeftModel.from_pretrained(llama(), {str(tmp_path / "saved")!r}).eval()
prediction = Posterior.load({str(tmp_path / "saved")!r}).predict(model, inputs(), score=next_token(), samples=3)
torch.save(prediction.probabilities, {str(tmp_path / "probabilities.pt")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "probabilities.pt"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("way", ["use_ivon", "callback"])
def test_checkpoints_have_theirs(tmp_path: Path, way: str) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    if way == "use_ivon":
        trainer = make_trainer(tmp_path, **options)
    else:
        model = lora_llama()
        optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
        trainer = Trainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=sequences(),
            optimizers=(optimizer, None),
            callbacks=[IVONCallback()],
        )
    trainer.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        saved = Posterior.load(folder)
        model = PeftModel.from_pretrained(llama(), folder)
        assert same(saved, Posterior.from_checkpoint(folder / "optimizer.pt", model))
    assert same(Posterior.load(tmp_path / "checkpoint-4"), now(trainer))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_the_best_model_is_saved_with_its_own(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first one is the "best"
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    trainer.save_model(str(tmp_path / "saved"))
    assert same(Posterior.load(tmp_path / "saved"), Posterior.load(best))


class Hub:
    """Takes the place of huggingface_hub's API, and keeps what is uploaded."""

    def __init__(self, uploads: Path) -> None:
        self.uploads = uploads
        self.count = 0

    def upload_folder(self, folder_path: str, **options: Any) -> Any:
        self.count += 1
        shutil.copytree(folder_path, self.uploads / str(self.count), ignore=shutil.ignore_patterns("checkpoint-*"))
        return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    def create_repo(self, name: str, **options: Any) -> Any:
        return type("Repo", (), {"repo_id": f"somebody/{name}"})()


def test_pushes_take_it_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of ``push_to_hub()``, and those of checkpoints, which the Trainer copies file by file."""
    hub = Hub(tmp_path)
    module = sys.modules[Trainer.__module__]
    monkeypatch.setattr(module, "hf_api", lambda *args, **options: hub)
    monkeypatch.setattr(
        Trainer, "init_hf_repo", lambda self, **options: vars(self).update(hub_model_id="a/run", push_in_progress=None)
    )
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **options: None)
    trainer = make_trainer(
        tmp_path / "run", push_to_hub=True, hub_always_push=True, save_strategy="steps", save_steps=2, max_steps=4
    )
    trainer.train()
    assert hub.count == 2
    for number, step in ((1, 2), (2, 4)):
        pushed = Posterior.load(tmp_path / str(number))  # refuses one that is not of the adapter beside it
        assert same(pushed, Posterior.load(tmp_path / "run" / f"checkpoint-{step}"))
    trainer.push_to_hub()
    assert hub.count == 3 and same(Posterior.load(tmp_path / "3"), now(trainer))


def test_a_posterior_that_cannot_be_written_breaks_no_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Posterior, "save", fail)
    with pytest.warns(UserWarning, match=r"the posterior was not saved beside the model in .*saved: no space left"):
        trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


def test_only_the_rank_that_saves_writes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "saved" / FILE).unlink()
    saving.save_posterior(ivon_of(trainer), trainer.model, tmp_path / "saved", writes=False)
    assert not (tmp_path / "saved" / FILE).exists()
    saving.save_posterior(ivon_of(trainer), trainer.model, tmp_path / "saved", writes=True)
    assert (tmp_path / "saved" / FILE).exists()


def test_it_can_be_left_out(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    callback = IVONCallback(save_posterior=False)
    trainer = Trainer(lora_llama(), arguments(tmp_path, **options), train_dataset=sequences(), callbacks=[callback])
    use_ivon(trainer, **IVON_OPTIONS)
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.rglob(FILE))


def test_before_training_there_is_none(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.save_model()
    assert not (tmp_path / FILE).exists()
