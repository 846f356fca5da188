"""Several posterior samples of a language model in one forward pass, and undone again."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutputWithPast

from ivon_kernels import IVON, available_backends, lora
from ivon_kernels.lora import op
from ivon_kernels.posterior import Posterior
from tests.support.stacked_models import ROUNDING, assert_as_good, check, exact, posterior_of, separate, stacked
from tests.support.tiny_llm import IVON_OPTIONS, lora_llama, weights

# A name that PEFT 0.21 uses and transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(5))
SAMPLES = (0, 1, 5)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def fresh(dtype: torch.dtype = torch.float32) -> tuple[PeftModel, Posterior]:
    model = lora_llama().to(dtype).eval()
    return model, posterior_of(model)


@pytest.fixture(scope="module")
def pair() -> tuple[PeftModel, Posterior]:
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        return fresh()


@pytest.fixture
def llama(pair: tuple[PeftModel, Posterior]) -> Iterator[PeftModel]:
    """The model; after the test nothing is stacked in it."""
    before = {name: value.clone() for name, value in pair[0].state_dict().items()}
    yield pair[0]
    assert all(torch.equal(value, before[name]) for name, value in pair[0].state_dict().items())
    for module in pair[0].modules():
        assert "forward" not in vars(module)


@pytest.fixture
def posterior(pair: tuple[PeftModel, Posterior]) -> Posterior:
    return pair[1]


# ---- the same numbers as separate passes -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stacked_samples_are_separate_passes(backend: str | None, dtype: torch.dtype) -> None:
    model, posterior = fresh(dtype)
    check(model, posterior, logits, IDS, SAMPLES, backend=backend)


def test_half_precision_base_with_float32_adapter() -> None:
    """What PEFT makes of a bfloat16 model."""
    model, _ = fresh(torch.bfloat16)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data = param.data.float()
    check(model, posterior_of(model), logits, IDS, SAMPLES)


def test_samples_are_those_of_the_optimizer() -> None:
    model = lora_llama()
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **IVON_OPTIONS)
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    posterior = optimizer.posterior(model)
    apart = []
    for sample in SAMPLES:
        with torch.no_grad(), optimizer.sampled_params(sample=sample):
            apart.append(logits(model, IDS))
    found = stacked(model, posterior, SAMPLES, logits, IDS)
    assert_as_good(found, torch.stack(apart), exact(model, posterior, SAMPLES, logits, IDS))


def test_numbers_of_samples_in_any_order(llama: PeftModel, posterior: Posterior) -> None:
    found = check(llama, posterior, logits, IDS, (131071, 2, 2))
    # Not bit for bit: where a row is in a product may decide how it is rounded.
    torch.testing.assert_close(found[1], found[2], rtol=0, atol=ROUNDING)
    assert not torch.allclose(found[0], found[1], rtol=0.01, atol=0.01)


def test_a_number_of_samples_counts_from_0(llama: PeftModel, posterior: Posterior) -> None:
    with lora.stack(llama, posterior, 3) as stack, torch.no_grad():
        assert stack.samples == (0, 1, 2) and stack.fused == 2
        found = stack.split(logits(llama, stack.repeat(IDS)))
    torch.testing.assert_close(found, separate(llama, posterior, (0, 1, 2), logits, IDS), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("other", ["tempered", "pruned"])
def test_posteriors_that_the_weights_do_not_hold(llama: PeftModel, posterior: Posterior, other: str) -> None:
    changed = posterior.tempered(4.0) if other == "tempered" else posterior.pruned(0.5)
    found = check(llama, changed, logits, IDS, SAMPLES)
    assert not torch.allclose(found, stacked(llama, posterior, SAMPLES, logits, IDS), rtol=0.01, atol=0.01)


def test_other_samples_in_the_same_stack(llama: PeftModel, posterior: Posterior) -> None:
    with torch.no_grad(), lora.stack(llama, posterior, 2) as stack:
        stack.select((4, 0, 9))
        assert stack.samples == (4, 0, 9)
        found = stack.split(logits(llama, stack.repeat(IDS)))
        with pytest.raises(ValueError, match="samples=0: give how many"):
            stack.select(0)
    assert torch.equal(found, stacked(llama, posterior, (4, 0, 9), logits, IDS))


def test_generate(llama: PeftModel, posterior: Posterior) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(model: nn.Module, inputs: Any) -> Tensor:
        tokens: Tensor = model.generate(**inputs, **options)
        return tokens

    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    found = stacked(llama, posterior, SAMPLES, generate, inputs)
    assert found.shape == (3, 2, 11)
    assert torch.equal(found, separate(llama, posterior, SAMPLES, generate, inputs))
    assert not torch.equal(found[0], found[1])


def test_a_padded_batch_keeps_its_rows_together(llama: PeftModel, posterior: Posterior) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0

    def run(model: nn.Module, inputs: Any) -> Tensor:
        result: Tensor = model(**inputs).logits[:, -1]
        return result

    check(llama, posterior, run, {"input_ids": IDS, "attention_mask": mask}, SAMPLES)


# ---- repeat and split ------------------------------------------------------------------------------------------------


def test_repeat_and_split_keep_structures(llama: PeftModel, posterior: Posterior) -> None:
    with lora.stack(llama, posterior, 2) as stack:
        rows = torch.arange(6).view(3, 2)
        assert torch.equal(stack.repeat(rows), torch.cat([rows, rows]))
        assert torch.equal(stack.split(stack.repeat(rows)), torch.stack([rows, rows]))
        scalar = torch.tensor(1.5)
        batch = BatchEncoding({"input_ids": rows, "more": [rows, (scalar, "text", None)]})
        repeated = stack.repeat(batch)
        assert isinstance(repeated, BatchEncoding) and batch["input_ids"].shape == (3, 2)
        assert repeated["input_ids"].shape == repeated["more"][0].shape == (6, 2)
        assert repeated["more"][1] == (scalar, "text", None)
        output = stack.split(CausalLMOutputWithPast(loss=scalar, logits=torch.ones(6, 4)))
        assert output.logits.shape == output["logits"].shape == (2, 3, 4) and output.loss is scalar
        with pytest.raises(ValueError, match=r"\(5, 2\) cannot be split: the first dimension is no multiple of 2"):
            stack.split(torch.ones(5, 2))
        stack.remove()


# ---- what it leaves behind, and what it costs ------------------------------------------------------------------------


def test_undone_after_an_error(llama: PeftModel, posterior: Posterior) -> None:
    with torch.no_grad():
        before = logits(llama, IDS)
        with pytest.raises(ZeroDivisionError), lora.stack(llama, posterior, 2):
            _ = 1 / 0
        assert torch.equal(logits(llama, IDS), before)


def test_weights_and_their_versions_stay(llama: PeftModel, posterior: Posterior) -> None:
    held, versions = weights(llama), [p._version for p in llama.parameters()]
    with torch.no_grad(), lora.stack(llama, posterior, 2) as stack:
        logits(llama, stack.repeat(IDS))
        assert all(torch.equal(value, held[name]) for name, value in weights(llama).items())
    assert [p._version for p in llama.parameters()] == versions


def test_memory_is_one_number_for_each_weight(llama: PeftModel, posterior: Posterior) -> None:
    with lora.stack(llama, posterior, 100) as stack:
        assert stack.nbytes == 4 * posterior.numel
        stack.remove()
        assert stack.nbytes == 0
        stack.remove()
        with pytest.raises(RuntimeError, match="this stack was removed"):
            stack.__enter__()


def test_other_forwards_come_back() -> None:
    model, posterior = fresh()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    original = layer.forward

    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = original(*args, **kwargs) + 1.0
        return result

    vars(layer)["forward"] = hooked
    apart = separate(model, posterior, SAMPLES, logits, IDS)
    found = stacked(model, posterior, SAMPLES, logits, IDS)
    torch.testing.assert_close(found, apart, rtol=0, atol=ROUNDING)
    assert layer.forward is hooked


def test_a_hook_on_the_base_layer_sees_what_it_returned(llama: PeftModel, posterior: Posterior) -> None:
    base = llama.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    seen: list[Tensor] = []
    with base.register_forward_hook(lambda _, args, output: seen.extend((args[0], output))):
        stacked(llama, posterior, SAMPLES, logits, IDS)
    torch.testing.assert_close(seen[1], nn.functional.linear(seen[0], base.weight), rtol=0, atol=0)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_stacking_twice(llama: PeftModel, posterior: Posterior) -> None:
    stack = lora.stack(llama, posterior, 2)
    with pytest.raises(RuntimeError, match=r"samples are stacked in this model already: call remove\(\)"):
        lora.stack(llama, posterior, 2)
    stack.remove()


def test_models_that_run_something_else_than_their_modules(llama: PeftModel, posterior: Posterior) -> None:
    with pytest.raises(ValueError, match=r"DataParallel makes copies .* model\.module"):
        lora.stack(nn.DataParallel(llama), posterior, 2)
    with pytest.raises(ValueError, match=r"the model is compiled"):
        lora.stack(torch.compile(llama, backend="eager"), posterior, 2)
    model, _ = fresh()
    model.get_base_model().compile(backend="eager")
    with pytest.raises(ValueError, match=r"the model is compiled"):
        lora.stack(model, posterior, 2)


def test_a_batch_that_was_not_repeated(llama: PeftModel, posterior: Posterior) -> None:
    message = r"q_proj has a batch of 2, which cannot be divided among 3 samples: .* stack\.repeat\(\)"
    with torch.no_grad(), pytest.raises(ValueError, match=message), lora.stack(llama, posterior, 3):
        logits(llama, IDS)


def test_gradients(llama: PeftModel, posterior: Posterior) -> None:
    with lora.stack(llama, posterior, 2) as stack:
        with pytest.raises(RuntimeError, match=r"no gradient goes through them: .* torch\.inference_mode\(\)"):
            logits(llama, stack.repeat(IDS))
        with torch.inference_mode():
            assert logits(llama, stack.repeat(IDS)).shape == (4, 6, 32)


def test_gradients_of_the_base() -> None:
    model, posterior = fresh()
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" not in name)
    with (
        pytest.raises(RuntimeError, match="no gradient goes through them"),
        lora.stack(model, posterior, 2) as stack,
    ):
        model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(stack.repeat(torch.ones(2, 16)))


def test_adapter_names() -> None:
    model, posterior = fresh()  # PEFT leaves its hooks in a model whose pass with adapter_names failed
    message = "adapter_names cannot be used while samples are stacked"
    with torch.no_grad(), pytest.raises(ValueError, match=message), lora.stack(model, posterior, 2) as stack:
        model(input_ids=stack.repeat(IDS), adapter_names=["default"] * 4)


def test_merged_adapters() -> None:
    model, posterior = fresh()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"q_proj: an adapter is merged .* call unmerge_adapter\(\)"):
        lora.stack(model, posterior, 2)
    model.unmerge_adapter()
    with torch.no_grad(), lora.stack(model, posterior, 2) as stack:
        model.merge_adapter()
        with pytest.raises(RuntimeError, match=r"q_proj: an adapter is merged .* call unmerge_adapter\(\)"):
            logits(model, stack.repeat(IDS))
        model.unmerge_adapter()
        logits(model, stack.repeat(IDS))


def test_copies_and_pickles(llama: PeftModel, posterior: Posterior) -> None:
    stack = lora.stack(llama, posterior, 2)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match=r"cannot be copied or pickled: call stack\.remove\(\)"):
            copied(llama)
    stack.remove()
    copy.deepcopy(llama)


@pytest.mark.parametrize("samples", [0, -1, [], [1, -1], [131072]])
def test_samples_that_do_not_exist(llama: PeftModel, posterior: Posterior, samples: Any) -> None:
    with pytest.raises(ValueError, match=r"give how many, at least 1, or numbers in 0 \.\. 131071"):
        lora.stack(llama, posterior, samples)


def test_backends_that_do_not_exist(llama: PeftModel, posterior: Posterior) -> None:
    with pytest.raises(ValueError, match="there is no backend 'cuda'; choose one of cpu, triton, reference"):
        lora.stack(llama, posterior, 2, backend="cuda")


def test_a_posterior_of_another_model(llama: PeftModel, posterior: Posterior) -> None:
    with pytest.raises(ValueError, match="one of 4 weight tensors of this posterior that it lacks"):
        lora.stack(llama.get_base_model().lm_head, posterior, 2)


def test_a_module_that_was_not_called(llama: PeftModel, posterior: Posterior) -> None:
    with (
        pytest.warns(UserWarning, match=r"1 of 2 modules .* were not called .*v_proj\): their samples had no effect"),
        torch.no_grad(),
        lora.stack(llama, posterior, 2),
    ):
        llama.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")(torch.ones(2, 16))


# ---- the operation by itself -----------------------------------------------------------------------------------------


def factor(rows: int, columns: int, index: int, dtype: torch.dtype = torch.float32) -> lora.Factor:
    generator = torch.Generator().manual_seed(index)
    mean = torch.randn(rows, columns, generator=generator)
    return lora.Factor(mean, torch.rand(rows, columns, generator=generator) * 9 + 1, index, dtype)


def test_the_operation_adds_to_out_by_sample() -> None:
    a, b, x = factor(2, 5, 1), factor(3, 2, 4), torch.randn(8, 5)
    out = torch.ones(8, 3)
    assert lora.lora_samples_(out, x, a, b, scaling=0.5, seed=9, samples=(3, 8), backend="reference") is out
    for half, sample in ((slice(4), 3), (slice(4, 8), 8)):
        inner = x[half].double() @ lora.reference.sampled_weight(a, 9, sample).double().T
        expected = 1 + 0.5 * inner @ lora.reference.sampled_weight(b, 9, sample).double().T
        torch.testing.assert_close(out[half].double(), expected, rtol=1e-5, atol=1e-5)
    empty = torch.ones(0, 3)
    assert lora.lora_samples_(empty, x[:0], a, b, scaling=1.0, seed=9, samples=(3, 8)) is empty


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_elements_without_noise_are_the_mean(backend: str) -> None:
    mean, rest = torch.randn(2, 5), factor(3, 2, 4)
    a = lora.Factor(mean, torch.full_like(mean, math.inf), 1, torch.float32)
    b = lora.Factor(rest.mean, torch.full_like(rest.mean, math.inf), 4, torch.float32)
    x, out = torch.randn(4, 5), torch.zeros(4, 3)
    lora.lora_samples_(out, x, a, b, scaling=2.0, seed=9, samples=(0, 1), backend=backend)
    torch.testing.assert_close(out, 2 * x @ mean.T @ rest.mean.T, rtol=1e-5, atol=1e-5)


def test_the_compiled_backend_is_the_first_choice() -> None:
    expected = "reference" if available_backends()["cpu"] else "cpu"
    chosen = op._choose(None, torch.ones(4, 3), torch.ones(4, 5), factor(2, 5, 1), factor(3, 2, 2))
    assert getattr(chosen, "__name__", "") == f"ivon_kernels.lora.{expected}"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"x": torch.ones(5)}, "must be matrices"),
    "x": ({"x": torch.ones(4, 6)}, "shapes do not fit together"),
    "rank": ({"b": factor(3, 4, 1)}, "shapes do not fit together"),
    "rows": ({"samples": (0, 1, 2)}, "4 rows cannot be divided among 3 samples"),
    "none": ({"samples": ()}, "cannot be divided among 0 samples"),
    "sample": ({"samples": (0, 131072)}, r"sample must be a whole number in \[0, 131072\), got 131072"),
    "seed": ({"seed": -1}, r"seed=-1 is outside"),
    "out dtype": ({"out": torch.ones(4, 3, dtype=torch.float64)}, r"out is torch\.float64"),
    "a dtype": ({"a": factor(2, 5, 1, torch.int8)}, r"a is torch\.int8"),
    "mean dtype": ({"a": factor(2, 5, 1)._replace(mean=torch.ones(2, 5).double())}, "a: mean and inv_sigma must be"),
    "inv_sigma": ({"b": factor(3, 2, 1)._replace(inv_sigma=torch.ones(2, 3))}, r"b: inv_sigma \(2, 3\) must have"),
    "strides": ({"x": torch.ones(5, 4).T}, "must be contiguous"),
    "device": ({"x": torch.ones(4, 5, device="meta")}, "on different devices"),
    "backend": ({"backend": "cuda"}, "there is no backend 'cuda'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_operation_refuses(name: str) -> None:
    changed, message = REFUSED[name]
    arguments = {"out": torch.ones(4, 3), "x": torch.ones(4, 5), "a": factor(2, 5, 1), "b": factor(3, 2, 2)}
    options = {"scaling": 1.0, "seed": 0, "samples": (0, 1)}
    with pytest.raises(ValueError, match=message):
        lora.lora_samples_(**{**arguments, **options, **changed})
