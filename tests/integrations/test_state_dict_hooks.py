"""``save_mean``: a model's ``state_dict()`` holds the mean at any moment, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from ivon_kernels import IVON
from ivon_kernels.integrations.state_dict import find_ivon, save_mean
from ivon_kernels.training.advice import IVONWarning
from tests.support.helpers import OPTIONS


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, a frozen layer between, and a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, dtype=dtype)
        self.body = nn.Sequential(nn.Linear(4, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype))
        self.frozen = nn.Linear(4, 4, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(4, 6, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.frozen(self.body(self.embedding(tokens))))


def build(model: nn.Module, **options: Any) -> IVON:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return IVON(trainable, **{**OPTIONS, "seed": 3, **options})


def backward(model: nn.Module) -> None:
    model(torch.arange(5)).float().square().mean().backward()


def copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def differs(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return any(not torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_state_dict_holds_the_mean_while_the_weights_hold_a_sample(dtype: torch.dtype) -> None:
    model = Tied(dtype)
    optimizer = build(model)
    save_mean(model, optimizer)
    mean = copied(model.state_dict())
    optimizer.train()
    sample = copied(dict(model.named_parameters()))
    versions = [p._version for p in model.parameters()]
    assert differs(sample, mean)
    assert_equal(copied(model.state_dict()), mean)
    assert_equal(copied(dict(model.named_parameters())), sample)  # and they still do
    assert [p._version for p in model.parameters()] == versions
    backward(model)  # the graph of a forward pass before a save is valid after it
    optimizer.step()
    assert differs(copied(model.state_dict()), mean)


def test_a_save_between_forward_and_backward_changes_no_number() -> None:
    trajectories = []
    for saves in (False, True):
        torch.manual_seed(0)
        model = Tied()
        optimizer = build(model)
        save_mean(model, optimizer)
        for _ in range(3):
            optimizer.train()
            loss = model(torch.arange(5)).square().mean()
            if saves:
                model.state_dict()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trajectories.append(copied(model.state_dict()))
    assert_equal(*trajectories)


def test_evaluation_samples_are_not_saved_either() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    mean = copied(model.state_dict())
    with optimizer.sampled_params(sample=3):
        assert_equal(copied(model.state_dict()), mean)


def test_a_submodule_saves_the_mean_too() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    mean = copied(model.body.state_dict())
    optimizer.train()
    assert differs(copied(dict(model.body.named_parameters())), mean)
    assert_equal(copied(model.body.state_dict()), mean)
    assert_equal(copied(model.body.state_dict(prefix="x.")), {f"x.{name}": value for name, value in mean.items()})


def test_tied_weights_are_one_tensor_under_both_names() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    optimizer.train()
    saved = model.state_dict()
    assert saved["embedding.weight"].data_ptr() == saved["head.weight"].data_ptr()
    assert saved["embedding.weight"].data_ptr() != model.embedding.weight.data_ptr()


def test_keep_vars_returns_the_parameters_themselves() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    optimizer.train()
    assert model.state_dict(keep_vars=True)["head.weight"] is model.head.weight


def test_at_the_mean_state_dict_is_what_it_always_was() -> None:
    model = Tied()
    save_mean(model, build(model))
    assert model.state_dict()["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_removing_the_handle_saves_the_weights_again() -> None:
    model = Tied()
    optimizer = build(model)
    handle = save_mean(model, optimizer)
    save_mean(model, optimizer).remove()  # the second call had nothing to install, so it takes nothing away
    mean = copied(model.state_dict())
    optimizer.train()
    assert_equal(copied(model.state_dict()), mean)
    handle.remove()
    handle.remove()
    assert differs(copied(model.state_dict()), mean)
    assert not any(module._state_dict_hooks or module._load_state_dict_pre_hooks for module in model.modules())


def test_the_model_does_not_keep_the_optimizer_alive() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert model.state_dict()["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_two_optimizers_on_parts_of_one_model() -> None:
    model = Tied()
    one, other = build(model.embedding), build(model.body, seed=4)
    save_mean(model, one)
    save_mean(model, other)
    mean = copied(model.state_dict())
    one.train()
    assert_equal(copied(model.state_dict()), mean)
    other.train()
    assert_equal(copied(model.state_dict()), mean)


def through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_file], ids=["deepcopy", "torch.save"])
def test_a_copy_of_the_model_is_its_own(duplicate: Any) -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    twin = duplicate(model)
    optimizer.train()
    with torch.no_grad():
        for p in twin.parameters():
            p.fill_(2.0)
    assert all((twin.state_dict()[name] == 2).all() for name, _ in twin.named_parameters())
    twin.load_state_dict(model.state_dict())
    assert optimizer.holds_sample  # loading the copy is no reason to restore the original
    own = build(twin)
    save_mean(twin, own)
    mean = copied(twin.state_dict())
    own.train()
    assert differs(copied(dict(twin.named_parameters())), mean)
    assert_equal(copied(twin.state_dict()), mean)


def test_weights_loaded_while_a_sample_is_held_are_the_new_mean() -> None:
    model, other = Tied(), Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    optimizer.train()
    model.load_state_dict(other.state_dict())
    assert_equal(copied(model.state_dict()), copied(other.state_dict()))
    optimizer.train()
    optimizer.eval()
    assert_equal(copied(model.state_dict()), copied(other.state_dict()))


def lora_model(**config: Any) -> PeftModel:
    config = {"r": 2, "target_modules": ["0"], "init_lora_weights": False, **config}
    return get_peft_model(Tied(), LoraConfig(**config))


def test_peft_adapters_are_saved_at_the_mean(tmp_path: Path) -> None:
    model = lora_model(modules_to_save=["head"], target_modules=["body.0"])
    optimizer = build(model)
    save_mean(model, optimizer)
    mean = copied(get_peft_model_state_dict(model))
    assert any("lora_A" in name for name in mean) and "base_model.model.head.weight" in mean
    optimizer.train()
    assert_equal(copied(get_peft_model_state_dict(model)), mean)
    model.save_pretrained(tmp_path)
    assert_equal(load_file(tmp_path / "adapter_model.safetensors"), mean)


def test_accelerate_saves_the_mean(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh())
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, build(model))
    save_mean(prepared, optimizer)
    mean = copied(model.state_dict())
    optimizer.train()
    assert find_ivon(optimizer).holds_sample
    accelerator.save_state(str(tmp_path))
    assert_equal(load_file(tmp_path / "model.safetensors"), mean)
    assert_equal(copied(accelerator.get_state_dict(prepared)), mean)


def test_distributed_checkpoint_reads_the_mean() -> None:
    model = Tied()
    optimizer = build(model)
    save_mean(model, optimizer)
    mean = copied(get_model_state_dict(model))
    optimizer.train()
    assert_equal(copied(get_model_state_dict(model)), mean)


def test_model_eval_alone_is_warned_of_once_where_the_sample_is_in_the_weights() -> None:
    model = Tied()
    optimizer = build(model, sample_in_step=True)
    save_mean(model, optimizer)
    optimizer.train()
    backward(model)
    optimizer.step()  # leaves the next sample there
    model.eval()
    model(torch.arange(5))  # with gradients: dropout and BatchNorm may be switched off in training
    with torch.no_grad():
        with optimizer.sampled_params():  # an evaluation sample is meant
            model(torch.arange(5))
        with pytest.warns(IVONWarning, match=r"call optimizer.eval\(\) beside model.eval\(\)"):
            model(torch.arange(5))
        model(torch.arange(5))  # and not again
        optimizer.eval()
        optimizer.advised.clear()
        model(torch.arange(5))
        model.train()
        optimizer.train()
        model(torch.arange(5))  # a generation in train mode is the user's own choice


def test_the_wrong_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="needs an IVON optimizer, got SGD"):
        save_mean(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="no parameter of the model belongs to this optimizer"):
        save_mean(model, build(nn.Linear(2, 2)))
