"""``predict`` gives the same with ``stacked`` None, True and False; or True refuses by name, None goes one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional

from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior, Prediction, next_token
from ivon_kernels.predict.scoring import Score
from tests.support.adapted_llama import BATCH, trained

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
    "ignore:.*tie_word_embeddings=True.*:UserWarning",
)
SCORE = next_token([3, 5, 7])
ROUNDING = 1e-6  # of probabilities: logits below 10 in size, of sums that are computed in another order


def predicted(model: nn.Module, posterior: Posterior, score: Score = SCORE, **options: Any) -> Prediction:
    return posterior.predict(model, BATCH, samples=4, score=score, keep_samples=True, **options)


def assert_same(model: nn.Module, posterior: Posterior, score: Score = SCORE, *, refused: str | None = None) -> None:
    """`refused`: what ``stacked=True`` says."""
    separate = predicted(model, posterior, score, stacked=False).sample_probabilities
    assert separate is not None
    assert separate.std(0).max() > 1e-5  # the samples differ
    held = [p.detach().clone() for p in model.parameters()]
    default = predicted(model, posterior, score).sample_probabilities
    torch.testing.assert_close(default, separate, rtol=0, atol=ROUNDING)
    if refused is None:
        torch.testing.assert_close(
            predicted(model, posterior, score, stacked=True).sample_probabilities, separate, rtol=0, atol=ROUNDING
        )
    else:
        with pytest.raises(lora.CannotStackError, match=refused):
            predicted(model, posterior, score, stacked=True)
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(p.equal(old) for p, old in zip(model.parameters(), held, strict=True))


def lora_config(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        lora_config("q_proj", trainable_token_indices=[3, 5]),
        lora_config("q_proj", "lm_head"),
        lora_config("q_proj", "embed_tokens"),
        lora_config("v_proj", use_dora=True),
    ],
    ids=["tokens", "lm_head", "embedding", "dora"],
)
def test_adapters_on_and_around_tied_weights(config: LoraConfig, tied: bool) -> None:
    model, optimizer = trained(config, tied=tied)
    assert_same(model, optimizer.posterior(model))


def test_logits_of_a_slice_in_the_middle() -> None:
    """A slice of the hidden states is not contiguous, and there is a LoRA layer behind it."""
    model, optimizer = trained(lora_config("lm_head"))

    def score(model: Any, batch: Any) -> Tensor:
        base = model.get_base_model()
        hidden = base.model(**batch).last_hidden_state
        logits: Tensor = base.lm_head(hidden[:, 2:4])[:, -1]
        return logits

    assert_same(model, optimizer.posterior(model), score)


def test_a_score_that_reads_a_weight_itself() -> None:
    model, optimizer = trained(lora_config("q_proj", modules_to_save=["lm_head"]))

    def score(model: Any, batch: Any) -> Tensor:
        base = model.get_base_model()
        hidden = base.model(**batch).last_hidden_state[:, -1]
        return functional.linear(hidden, base.lm_head.modules_to_save["default"].weight)

    assert_same(model, optimizer.posterior(model), score, refused=r"'base_model.model.lm_head.weight' is read outside")


def test_a_hook_further_out_that_makes_weights() -> None:
    """Before the decoder layer runs, it would make weights of the model's own values, which are no sample's."""
    model, optimizer = trained(lora_config("q_proj"))
    attention: Any = model.get_base_model().model.layers[0].self_attn

    def add(*_: Any) -> None:
        attention.o_proj.bias = nn.Parameter(attention.q_proj.lora_B["default"].weight.sum(1).detach() * 3)

    model.get_base_model().model.layers[0].register_forward_pre_hook(add)
    posterior = optimizer.posterior(model)
    with posterior.sampled(model, 0):
        model(**BATCH)  # the bias is there
    separate = predicted(model, posterior, stacked=False)
    default = predicted(model, posterior)
    assert torch.equal(default.probabilities, separate.probabilities)
    with pytest.raises(
        lora.CannotStackError, match=r"q_proj.lora_B.weight' is read outside .* hook that makes weights"
    ):
        predicted(model, posterior, stacked=True)


@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
@pytest.mark.parametrize("made", ["pruned", "weight_norm"])
def test_matrices_of_an_adapter_that_are_made_by_hooks(where: str, made: str) -> None:
    model, _ = trained(lora_config("q_proj"), steps=0)
    layer = getattr(model.get_base_model().model.layers[0].self_attn.q_proj, where)["default"]
    with pytest.warns(FutureWarning) if made == "weight_norm" else pytest.MonkeyPatch.context():
        if made == "weight_norm":
            torch.nn.utils.weight_norm(layer)
        else:
            torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], lr=0.01, ess=100.0, seed=1)
    assert_same(model, optimizer.posterior(model))


def kwargs_hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return (args[0] * 2, *args[1:]), kwargs


NORMS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda module: torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5),
    "parametrized": torch.nn.utils.parametrizations.weight_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
    "input hook": lambda module: module.register_forward_pre_hook(lambda _, args: args[0] * 2),
    "keyword hook": lambda module: module.register_forward_pre_hook(kwargs_hook, with_kwargs=True),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_weights_that_are_made_before_a_pass(norm: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    NORMS[norm](net[0])
    rows = torch.randn(8, 4)
    posterior = IVON(net.parameters(), lr=0.1, ess=100.0, seed=1).posterior(net)
    each = []
    with torch.no_grad():
        for sample in range(3):
            with posterior.sampled(net, sample):
                each.append(net(rows))
        hooks = list(net[0]._forward_pre_hooks.values())
        with lora.stack(net, posterior, 3) as stack:
            together = stack.split(net(stack.repeat(rows)))
    torch.testing.assert_close(together, torch.stack(each), rtol=0, atol=1e-6)
    assert list(net[0]._forward_pre_hooks.values()) == hooks


def test_generation_goes_one_by_one() -> None:
    model, optimizer = trained(lora_config("q_proj"))
    attention: Any = model.get_base_model().model.layers[0].self_attn
    weight = attention.q_proj.lora_B["default"].weight
    attention.register_forward_pre_hook(lambda *_: weight.sum().item() and None)
    posterior = optimizer.posterior(model)
    prompts = BATCH["input_ids"][:2]
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = posterior.generate(model, prompts, samples=2, options=options, stacked=False)
    assert torch.equal(posterior.generate(model, prompts, samples=2, options=options), expected)
    with pytest.raises(lora.CannotStackError, match=r"lora_B\.weight"):
        posterior.generate(model, prompts, samples=2, options=options, stacked=True)
    averaged = posterior.generate_averaged(model, prompts, samples=2, max_new_tokens=3, stacked=False)
    default = posterior.generate_averaged(model, prompts, samples=2, max_new_tokens=3)
    assert torch.equal(default.sequences, averaged.sequences)
    assert torch.equal(default.mutual_information, averaged.mutual_information)


def test_saves_while_samples_are_stacked() -> None:
    model, optimizer = trained(lora_config("q_proj"))
    held = {name: value.clone() for name, value in model.state_dict().items()}
    with lora.stack(model, optimizer.posterior(model), 2):
        assert isinstance(model, PeftModel)
        assert all(value.equal(held[name]) for name, value in model.state_dict().items())
        assert "Linear" in repr(model)
