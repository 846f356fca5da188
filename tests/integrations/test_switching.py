"""Adapters that are switched, and modules that are unfrozen, in the middle of a step: sampled before they are used."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.tuner import Tuner
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from ivon_kernels import IVON
from ivon_kernels.integrations.lightning import IVONCallback
from ivon_kernels.integrations.transformers import IVONCallback as TrainerIVONCallback
from ivon_kernels.integrations.transformers import ivon_of, use_ivon
from ivon_kernels.integrations.unfrozen import _TakeIn, sample_unfrozen
from tests.support.helpers import OPTIONS
from tests.support.lightning_models import Regression, data, optimizer_of, trainer
from tests.support.tiny_llm import (
    IVON_OPTIONS,
    QUIET,
    arguments,
    llama,
    lora_config,
    lora_llama,
    means,
    same,
    sequences,
    tokenizer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:The '.*_dataloader' does not have many workers"),
]

ADAPTERS = ("default", "other")


def two_adapters(*, active: str | list[str] = "default") -> PeftModel:
    model = lora_llama()
    torch.manual_seed(4)
    model.add_adapter("other", lora_config())
    model.base_model.set_adapter(active)
    return model


class Switching(Trainer):
    """Uses the adapters by turns, one for each micro-batch."""

    turn = 0

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        model.set_adapter(ADAPTERS[self.turn % 2])
        self.turn += 1
        return super().compute_loss(model, inputs, **options)


class Both(Trainer):
    """Needs both adapters for one loss."""

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        losses = []
        for adapter in ADAPTERS:
            model.set_adapter(adapter)
            losses.append(super().compute_loss(model, inputs))
        model.base_model.set_adapter(list(ADAPTERS))  # backward reaches only what requires a gradient then
        return sum(losses)


class Inside(Switching):
    """Does not call the model itself, but what it wraps."""

    def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
        return super().compute_loss(model, inputs) if self.turn > 99 else self.inner_loss(model, inputs)

    def inner_loss(self, model: Any, inputs: Any) -> Tensor:
        model.set_adapter(ADAPTERS[self.turn % 2])
        self.turn += 1
        return model.base_model.model(**inputs).loss


def trained(kind: type[Trainer], folder: Path, *, active: str | list[str] = "default", **options: Any) -> Trainer:
    made = kind(two_adapters(active=active), arguments(folder, max_steps=4, **options), train_dataset=sequences())
    use_ivon(made, **IVON_OPTIONS)
    made.train()
    return made


def moved(model: nn.Module) -> dict[str, bool]:
    """Whether each matrix of an adapter has moved."""
    before = dict(two_adapters().named_parameters())
    return {name: not torch.equal(p, before[name]) for name, p in model.named_parameters() if "lora_" in name}


def by_hand(accumulation: int, *, active: str | list[str]) -> dict[str, Tensor]:
    """What `Switching` does, written out."""
    model = two_adapters(active=active).train()
    named = [(name, p) for name, p in model.named_parameters() if "lora_" in name]
    optimizer = IVON(named, **IVON_OPTIONS)
    tokens = torch.tensor([row["input_ids"] for row in sequences()]).view(-1, 2, 6)
    for turn in range(4 * accumulation):
        optimizer.train()
        model.set_adapter(ADAPTERS[turn % 2])
        optimizer.train()
        batch = tokens[turn % len(tokens)]
        count = torch.tensor(10 * accumulation)
        model(input_ids=batch, labels=batch, num_items_in_batch=count).loss.backward()
        if (turn + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            scale = 1 - (turn + 1) / (4 * accumulation)
            optimizer.param_groups[0]["lr"] = IVON_OPTIONS["lr"] * scale
    return means(optimizer, model)


@pytest.mark.parametrize("active", ["default", ["default", "other"]], ids=["one-frozen", "both-active"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_switching_in_the_loss_trains_both_adapters(tmp_path: Path, accumulation: int, active: str | list[str]) -> None:
    made = trained(Switching, tmp_path, active=active, gradient_accumulation_steps=accumulation)
    assert all(moved(made.model).values())
    assert same(means(ivon_of(made), made.model), by_hand(accumulation, active=active))


@pytest.mark.parametrize("kind", [Both, Inside])
def test_both_in_one_loss_and_a_loss_that_goes_around_the_wrapper(tmp_path: Path, kind: type[Trainer]) -> None:
    made = trained(kind, tmp_path, gradient_accumulation_steps=1)
    assert all(moved(made.model).values())


def test_an_optimizer_without_the_other_adapter_says_so(tmp_path: Path) -> None:
    model = two_adapters()
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    made = Switching(
        model,
        arguments(tmp_path, gradient_accumulation_steps=1),
        train_dataset=sequences(),
        optimizers=(optimizer, None),
        callbacks=[TrainerIVONCallback()],
    )
    # The second step has no gradient, and at the third the optimizer has nothing to train.
    with (
        pytest.warns(UserWarning, match=r"lora_A.other.weight has a gradient, but the optimizer does not have it"),
        pytest.raises(RuntimeError, match=r"none of the optimizer's 4 parameters requires a gradient"),
    ):
        made.train()


def test_trl_too(tmp_path: Path) -> None:
    class SwitchingSFT(SFTTrainer):
        turn = 0

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            model.set_adapter(ADAPTERS[self.turn % 2])
            self.turn += 1
            return super().compute_loss(model, inputs, *rest, **options)

    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=4, max_length=16, per_device_train_batch_size=2, max_grad_norm=0, **QUIET
    )
    rows = [{"prompt": "abc", "completion": "def"}] * 8
    from datasets import Dataset

    made = SwitchingSFT(two_adapters(), args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    use_ivon(made, **IVON_OPTIONS)
    made.train()
    assert all(moved(made.model).values())


# ---- the hook --------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def holds_the_mean(optimizer: IVON, module: nn.Module) -> bool:
    return all(torch.equal(p, optimizer.mean_of(p)) for p in module.parameters())


@pytest.fixture
def parts() -> tuple[Parts, IVON]:
    model = Parts()
    optimizer = IVON(model.parameters(), **OPTIONS)
    model.b.requires_grad_(False)
    sample_unfrozen(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("entrance", [lambda m: m, lambda m: m.b], ids=["model", "part"])
def test_what_was_unfrozen_is_sampled_by_the_forward_pass(parts: tuple[Parts, IVON], entrance: Any) -> None:
    model, optimizer = parts
    optimizer.train()
    held = [p.clone() for p in model.a.parameters()]
    model.b.requires_grad_(True)
    assert holds_the_mean(optimizer, model.b)
    entrance(model)(torch.ones(2, 3)).square().sum().backward()
    assert not holds_the_mean(optimizer, model.b)
    assert all(map(torch.equal, model.a.parameters(), held))
    before = [optimizer.mean_of(p).clone() for p in model.b.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, model.b.parameters(), before))


def test_other_passes_leave_the_weights_alone(parts: tuple[Parts, IVON]) -> None:
    model, optimizer = parts
    x = torch.ones(2, 3)
    model.b.requires_grad_(True)
    model(x)  # no sample is there
    assert not optimizer.holds_sample
    model.b.requires_grad_(False)
    optimizer.train()
    model.b.requires_grad_(True)
    with torch.no_grad():
        model(x)
    assert holds_the_mean(optimizer, model.b)
    with optimizer.sampled_params(sample=3):
        held = [p.clone() for p in model.parameters()]
        model(x)
        assert all(map(torch.equal, model.parameters(), held))


def test_a_copy_and_a_removed_hook_do_nothing(parts: tuple[Parts, IVON]) -> None:
    model, optimizer = parts
    twin = copy.deepcopy(model)
    optimizer.train()
    model.b.requires_grad_(True)
    twin(torch.ones(2, 3))
    assert holds_the_mean(optimizer, model.b)
    assert not sample_unfrozen(model, optimizer)._handles  # they are there already
    optimizer.discard_samples()
    other = Parts()
    second = IVON(other.parameters(), **OPTIONS)
    other.b.requires_grad_(False)
    sample_unfrozen(other, second).remove()
    second.train()
    other.b.requires_grad_(True)
    other(torch.ones(2, 3))
    assert holds_the_mean(second, other.b)


def test_few_modules_have_the_hook() -> None:
    config = LlamaConfig(**{**llama().config.to_dict(), "num_hidden_layers": 6})
    from peft import get_peft_model

    model = get_peft_model(LlamaForCausalLM(config), lora_config())
    sample_unfrozen(model, IVON([p for p in model.parameters() if p.requires_grad], **OPTIONS))
    hooked = [
        name for name, m in model.named_modules() if any(isinstance(h, _TakeIn) for h in m._forward_pre_hooks.values())
    ]
    assert len(hooked) < 7 and not any(name.endswith("layers.0") for name in hooked)


def test_what_is_refused() -> None:
    model = Parts()
    with pytest.raises(TypeError, match=r"sample_unfrozen needs an IVON optimizer, got SGD"):
        sample_unfrozen(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"no parameter of the model belongs to this optimizer"):
        sample_unfrozen(model, IVON(Parts().parameters(), **OPTIONS))


# ---- Lightning -------------------------------------------------------------------------------------------------------


class ByTurns(Regression):
    """Trains its two layers by turns."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net[0].requires_grad_(batch_idx % 2 == 0)
        self.net[2].requires_grad_(batch_idx % 2 == 1)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_trains_what_training_step_unfreezes(accumulate: int) -> None:
    module = ByTurns()
    before = [p.detach().clone() for p in module.parameters()]
    trainer(callbacks=[IVONCallback()], accumulate_grad_batches=accumulate).fit(module, data())
    assert not any(map(torch.equal, module.parameters(), before))


class Finetuned(Regression):
    """Starts with the trainable parameters only, as Lightning's finetuning callbacks want it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.backbone = self.net[0]

    def at_mean(self) -> bool:
        return all(torch.equal(p, optimizer_of(self.trainer).mean_of(p)) for p in self.net[2].parameters())

    def configure_optimizers(self) -> Any:
        return IVON([p for p in self.parameters() if p.requires_grad], **self.options)


class StaysUnfrozen(BaseFinetuning):
    """Lightning itself freezes the backbone again when a run is resumed, and leaves it so, whatever the optimizer."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > 1:
            self.make_trainable(pl_module.backbone)


class Unfreeze(StaysUnfrozen):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.02)


class Backbone(StaysUnfrozen, BackboneFinetuning):
    pass


def backbone_finetuning() -> BaseFinetuning:
    return Backbone(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 1.0, backbone_initial_lr=0.02)


@pytest.mark.filterwarnings("ignore:.*weights_only")
@pytest.mark.parametrize("callback", [Unfreeze, backbone_finetuning], ids=["BaseFinetuning", "BackboneFinetuning"])
@pytest.mark.parametrize("stopped_at", [1, 2, 3], ids=["before", "after", "later"])
def test_unfreezing_resumes_where_it_was(tmp_path: Path, callback: Any, stopped_at: int) -> None:
    def fit(epochs: int, checkpoint: Path | None = None) -> Finetuned:
        module = Finetuned()
        made = trainer(max_epochs=epochs, callbacks=[callback(), IVONCallback()])
        made.fit(module, data(), ckpt_path=checkpoint, weights_only=False)
        made.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = fit(4)
    fit(stopped_at)
    resumed = fit(4, tmp_path / "last.ckpt")
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    lrs = [group["lr"] for group in optimizer_of(resumed.trainer).param_groups]
    assert lrs == [group["lr"] for group in optimizer_of(whole.trainer).param_groups] and lrs[1] == 0.02


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_lr_find(tmp_path: Path) -> None:
    class Tuned(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.05

        def configure_optimizers(self) -> Any:
            return IVON(self.parameters(), **{**self.options, "lr": self.lr})

    module = Tuned()
    before = [p.detach().clone() for p in module.parameters()]
    made = trainer(callbacks=[IVONCallback()], default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=True)
    finder = Tuner(made).lr_find(module, data(), num_training=8, early_stop_threshold=None, update_attr=True)
    assert finder is not None and len(finder.results["loss"]) == 8 and module.lr == (finder.suggestion() or 0.05)
    assert all(map(torch.equal, module.parameters(), before))
    made.fit(module, data())  # and trains from there
    assert not any(map(torch.equal, module.parameters(), before))
