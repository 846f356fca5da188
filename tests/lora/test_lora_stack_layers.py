"""Samples stacked in every kind of module that a posterior may be about."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ivon_kernels import lora
from ivon_kernels.posterior import Posterior
from tests.support.stacked_models import ROUNDING, assert_as_good, check, exact, posterior_of, separate, stacked

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

pytestmark = [
    # What bitsandbytes says at every product of its 8-bit layers with float32.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
    # About merging, which is not tested here.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
]

SAMPLES = (0, 1, 5)
ROWS = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(4))
TOKENS = torch.randint(0, 12, (4, 3), generator=torch.Generator().manual_seed(4))
IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(4))


def run(model: nn.Module, inputs: Any) -> Tensor:
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    output = model(inputs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for layer in layers:
        for param in layer.parameters():
            nn.init.normal_(param, std=0.5)
    return nn.Sequential(*layers)


def adapted(base: nn.Module, targets: list[str] | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = ["0"] if targets is None else targets
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets, **options})
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    return model.eval()


def linears(**options: Any) -> PeftModel:
    return adapted(network(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 6)), ["0", "2"], **options)


def attention(layer: nn.Module) -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = layer

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return result

    return network(Block())


class Tied(nn.Module):
    """An embedding whose matrix is the output layer's too, and a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.ParameterDict({"a": nn.Parameter(torch.ones(()))})

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.embed(tokens)))
        return result


# Each has: the model, its inputs, and how many LoRA layers the kernel runs.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "two layers": (linears, ROWS, 2),
    "rank above the sizes": (lambda: linears(r=20, use_rslora=True), ROWS, 2),
    "matrix input": (linears, ROWS[:, 0], 2),
    "fan_in_fan_out": (lambda: adapted(network(Conv1D(9, 8)), fan_in_fan_out=True), ROWS, 1),
    "trained base bias": (lambda: linears(bias="lora_only"), ROWS, 2),
    "DoRA": (lambda: linears(use_dora=True), ROWS, 0),
    "DoRA with trained base bias": (lambda: linears(use_dora=True, bias="lora_only"), ROWS, 0),
    "lora_bias": (lambda: linears(lora_bias=True), ROWS, 0),
    "embedding": (lambda: adapted(network(nn.Embedding(12, 8), nn.Linear(8, 5)), ["0", "1"]), TOKENS, 1),
    "convolution": (lambda: adapted(network(nn.Conv2d(2, 4, 3))), IMAGES, 0),
    "parameter": (lambda: adapted(network(nn.Linear(8, 9)), [], target_parameters=["0.weight"]), ROWS, 0),
    "modules_to_save": (
        lambda: adapted(network(nn.Linear(8, 9), nn.Linear(9, 4)), modules_to_save=["1"]),
        ROWS,
        1,
    ),
    "attention": (
        lambda: adapted(attention(nn.MultiheadAttention(8, 2, batch_first=True)), ["attn"]),
        ROWS,
        0,
    ),
    "full model": (lambda: network(nn.Linear(8, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 4)), ROWS, 0),
    "tied weights": (lambda: network(Tied()), TOKENS, 0),
    "convolutions": (lambda: network(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), IMAGES, 0),
    "encoder layer": (
        lambda: network(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval(),
        ROWS,
        0,
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 9, bias=False))),
        ROWS,
        0,
    ),
    "frozen matrix": (lambda: frozen(linears(), "lora_A"), ROWS, 0),
    "frozen lora_bias": (lambda: frozen(linears(lora_bias=True), ".bias"), ROWS, 0),
    "frozen DoRA magnitude": (lambda: frozen(linears(use_dora=True), "lora_magnitude_vector"), ROWS, 0),
}


def frozen(model: PeftModel, part: str) -> PeftModel:
    """A part of the adapter is not in the posterior."""
    for name, param in model.named_parameters():
        if part in name:
            nn.init.normal_(param, std=0.5)
            param.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_module(name: str) -> None:
    build, inputs, fused = CASES[name]
    model = build()
    if name == "tied weights":
        del model[0].scale["a"]
    posterior = posterior_of(model)
    with lora.stack(model, posterior, 2) as stack:
        assert stack.fused == fused
        stack.remove()
    # PEFT's attention merges its adapter for every pass and takes it out again, which rounds the base's weights.
    check(model, posterior, run, inputs, SAMPLES, untouched=name != "attention")


def test_float64() -> None:
    model = linears().double()
    posterior = posterior_of(model)
    found = stacked(model, posterior, SAMPLES, run, ROWS)
    torch.testing.assert_close(found, separate(model, posterior, SAMPLES, run, ROWS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("build", [linears, lambda: network(nn.Linear(8, 9))], ids=["fused", "by sample"])
def test_inference_mode(build: Callable[[], nn.Module]) -> None:
    """Whatever of it is outside."""
    model = build()
    posterior = posterior_of(model)
    expected = separate(model, posterior, (0, 1), run, ROWS)
    with torch.inference_mode():
        stack = lora.stack(model, posterior, 2)
        inside = stack.split(run(model, stack.repeat(ROWS)))
    with torch.no_grad():
        outside = stack.split(run(model, stack.repeat(ROWS)))
    stack.remove()
    with lora.stack(model, posterior, 2) as other, torch.inference_mode():
        again = other.split(run(model, other.repeat(ROWS)))
    for found in (inside, outside, again):
        torch.testing.assert_close(found.clone(), expected, rtol=0, atol=ROUNDING)


def test_scaling_of_zero() -> None:
    model = linears()
    posterior = posterior_of(model)
    model.base_model.model[0].set_scale("default", 0.0)
    check(model, posterior, run, ROWS, SAMPLES)


# ---- what PEFT's forward does besides --------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["plain", "dora"])
@pytest.mark.parametrize("adapter", ["default", "second"])
def test_several_active_adapters(adapter: str, other: str) -> None:
    """The posterior is about one of them."""
    model = linears()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "2"], use_dora=other == "dora"))
    model.base_model.set_adapter(["default", "second"])
    for param in model.parameters():
        if param.requires_grad:
            nn.init.normal_(param, std=0.5)
    posterior = posterior_of(model, adapter=adapter)
    posterior = Posterior({name: g for name, g in posterior.items() if "lora_" in name}, 3)
    found = check(model, posterior, run, ROWS, SAMPLES, adapter=adapter)
    model.set_adapter(adapter)
    alone = stacked(model, posterior, SAMPLES, run, ROWS, adapter=adapter)
    assert not torch.allclose(found, alone, rtol=0.01, atol=0.01)


def test_another_active_adapter() -> None:
    model = linears()
    posterior = posterior_of(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"'default', .* is not active .* samples would have no effect"):
        stacked(model, posterior, SAMPLES, run, ROWS, adapter="default")


def test_hooks_on_the_matrices_run() -> None:
    """The layer then runs sample by sample."""
    model = linears()
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda module, args, output: output * 3)
    posterior = posterior_of(model)
    with lora.stack(model, posterior, 2) as stack:
        assert stack.fused == 1
        stack.remove()
    check(model, posterior, run, ROWS, SAMPLES)


def test_disabled_adapters() -> None:
    model = linears()
    posterior = posterior_of(model)
    with torch.no_grad(), model.disable_adapter():
        base = run(model, ROWS)
    with torch.no_grad(), lora.stack(model, posterior, 2) as stack:
        with model.disable_adapter():
            found = stack.split(run(model, stack.repeat(ROWS)))
        again = stack.split(run(model, stack.repeat(ROWS)))
    torch.testing.assert_close(found, base.expand(2, *base.shape), rtol=0, atol=ROUNDING)
    assert not torch.allclose(again, found, rtol=0.01, atol=0.01)


def test_dropout_masks_of_their_own() -> None:
    model = adapted(network(nn.Linear(8, 9)), lora_dropout=0.5).train()
    posterior = posterior_of(model)
    inputs = ROWS.repeat(3, 1, 1)
    torch.manual_seed(7)
    found = stacked(model, posterior, SAMPLES, run, ROWS)
    torch.manual_seed(7)
    dropped = nn.functional.dropout(inputs, 0.5).view(3, 4, 3, 8)
    layer: Any = model.base_model.model[0]
    for k, sample in enumerate(SAMPLES):
        a, b = (weight for _, weight in sorted(posterior.draw(sample).items()))
        low_rank = dropped[k] @ a.T @ b.T * layer.scaling["default"]
        with torch.no_grad():
            expected = layer.base_layer(ROWS) + low_rank
        torch.testing.assert_close(found[k], expected, rtol=0, atol=ROUNDING)


def test_input_by_keyword() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x=x)  # PEFT's layers call it x
            return result

    model = adapted(network(Block()), ["inner"])
    check(model, posterior_of(model), run, ROWS, SAMPLES)


def test_a_module_that_returns_its_weights() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(x.shape)

    model = network(Bias())
    check(model, posterior_of(model), run, ROWS, SAMPLES)


def test_autocast() -> None:
    """Rounded as the base's products are; the adapter's part stays float32 in the kernels."""
    model = linears()
    posterior = posterior_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stacked(model, posterior, SAMPLES, run, ROWS)
        apart = separate(model, posterior, SAMPLES, run, ROWS)
    assert found.dtype == torch.bfloat16
    assert_as_good(found, apart, exact(model, posterior, SAMPLES, run, ROWS))


# ---- quantized bases -------------------------------------------------------------------------------------------------


def quantized(bits: int, dtype: torch.dtype) -> PeftModel:
    """Two LoRA layers on a base of 8 or 4 bits."""
    layers = []
    plain = network(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False))
    for linear in plain:
        sizes = (linear.in_features, linear.out_features)
        layer: Any
        if bits == 8:
            layer = bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        else:
            layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype)
        layer.load_state_dict(linear.state_dict())
        layers.append(layer.to("cpu"))
    base: Any = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    setattr(base, f"is_loaded_in_{bits}bit", True)
    return adapted(base, ["0", "2"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bases(bits: int, dtype: torch.dtype) -> None:
    model = quantized(bits, dtype)
    posterior = posterior_of(model)
    inputs = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(4)).to(dtype)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = model(x)
        return result

    apart = separate(model, posterior, SAMPLES, forward, inputs)
    for backend in (None, "reference"):
        with torch.no_grad(), lora.stack(model, posterior, SAMPLES, backend=backend) as stack:
            assert stack.fused == 2
            found = stack.split(forward(model, stack.repeat(inputs)))
        assert found.dtype == apart.dtype == dtype
        # Rounding the first layer's output may move a value to the next of 127 levels in the second one's quantization.
        tolerance = 4 * torch.finfo(dtype).eps + (1 / 127 if bits == 8 else 0.0)
        scale = float(apart.abs().max())
        assert float((found - apart).abs().max()) <= tolerance * scale
        assert float((apart[0] - apart[1]).abs().max()) > 10 * tolerance * scale


# ---- what cannot be stacked ------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_the_first_dimension() -> None:
    for module in (nn.LSTM(8, 4), nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)):
        model = network(module)
        with pytest.raises(ValueError, match=r"^0 \(.*the batch in the second dimension"):
            lora.stack(model, posterior_of(model), 2)


def test_a_weight_without_a_module() -> None:
    class Loose(nn.ParameterDict):
        pass

    model = Loose({"a": nn.Parameter(torch.ones(2))})
    with pytest.raises(ValueError, match=r"'a' is in no module with a forward\(\): cannot stack"):
        lora.stack(model, posterior_of(model), 2)


def test_a_module_that_returns_no_batch() -> None:
    class Total(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    model = network(Total(8, 2))
    with (
        pytest.raises(ValueError, match=r"0 \(Total\) returned \(\) for a batch of 4: the first dimension is not"),
        torch.no_grad(),
        lora.stack(model, posterior_of(model), 2) as stack,
    ):
        model(stack.repeat(ROWS))


def test_a_broadcast_batch() -> None:
    """Position embeddings, for example, when nobody gave position_ids."""
    model = network(nn.Embedding(12, 8))
    message = r"0 has a batch of 1, which cannot be divided among 2 samples: .*position_ids"
    with torch.no_grad(), pytest.raises(ValueError, match=message), lora.stack(model, posterior_of(model), 2):
        model(torch.arange(3)[None])


def test_memory_of_modules_that_run_by_sample() -> None:
    model = network(nn.Linear(8, 9))
    with lora.stack(model, posterior_of(model), 100) as stack:
        assert stack.nbytes == 3 * 4 * (8 * 9 + 9)
        stack.remove()


def test_a_failing_module_gets_its_weights_back() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError(math.pi)

    model = network(Failing(8, 2))
    held = dict(model.named_parameters())
    with torch.no_grad(), pytest.raises(ArithmeticError), lora.stack(model, posterior_of(model), 2) as stack:
        model(stack.repeat(ROWS))
    assert all(param is held[name] for name, param in model.named_parameters())
