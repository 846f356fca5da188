"""Merged, disabled and inactive adapters, and adapters of another scaling: samples never go in without an effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ivon_kernels import IVON, lora
from ivon_kernels.posterior import Posterior, PosteriorFileError, merge, next_token
from tests.support.adapted_llama import BATCH, trained
from tests.support.tiny_llm import llama

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)
SCORE = next_token([3, 5, 7])


def config(alpha: int = 4, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=2,
        lora_alpha=alpha,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        **options,
    )


def block(
    enter: Callable[[PeftModel, Posterior], AbstractContextManager[Any]],
) -> Callable[[PeftModel, Posterior], Any]:
    def use(model: PeftModel, posterior: Posterior) -> None:
        with enter(model, posterior):
            pass

    return use


USES: dict[str, Callable[[PeftModel, Posterior], Any]] = {
    "sampled": block(lambda m, p: p.sampled(m, 0)),
    "at_mean": block(lambda m, p: p.at_mean(m)),
    "stack": block(lambda m, p: lora.stack(m, p, 2)),
    "predict": lambda m, p: p.predict(m, BATCH, samples=2, score=SCORE),
    "predict one by one": lambda m, p: p.predict(m, BATCH, samples=2, score=SCORE, stacked=False),
    "predict at the mean": lambda m, p: p.predict(m, BATCH, samples=0, score=SCORE),
    "generate": lambda m, p: p.generate(m, BATCH, samples=2, options={"max_new_tokens": 1}),
    "generate_averaged": lambda m, p: p.generate_averaged(m, BATCH, samples=2, max_new_tokens=1),
}


@pytest.fixture(scope="module")
def lora_model() -> tuple[PeftModel, Posterior]:
    model, optimizer = trained(config())
    model.add_adapter("other", config(alpha=64))
    model.set_adapter("default")
    return model, optimizer.posterior(model)


@pytest.mark.parametrize("use", USES)
def test_merged(lora_model: tuple[PeftModel, Posterior], use: str) -> None:
    model, posterior = lora_model
    model.merge_adapter()
    try:
        with pytest.raises(RuntimeError, match=r"q_proj: an adapter is merged .*unmerge_adapter\(\)"):
            USES[use](model, posterior)
        with pytest.raises(RuntimeError, match="an adapter is merged"):
            posterior.copy_mean_to(model)
    finally:
        model.unmerge_adapter()
    USES[use](model, posterior)


@pytest.mark.parametrize("use", USES)
def test_disabled(lora_model: tuple[PeftModel, Posterior], use: str) -> None:
    model, posterior = lora_model
    with (
        model.disable_adapter(),
        pytest.raises(RuntimeError, match=r"adapter 'default', .* is disabled in .*q_proj"),
    ):
        USES[use](model, posterior)
    USES[use](model, posterior)


@pytest.mark.parametrize("use", USES)
def test_inactive(lora_model: tuple[PeftModel, Posterior], use: str) -> None:
    """The posterior knows its own adapter, and is not put into the one that is active instead."""
    model, posterior = lora_model
    model.set_adapter("other")
    try:
        with pytest.raises(RuntimeError, match=r"'default', .* is not active .*\['other'\].*set_adapter\('default'\)"):
            USES[use](model, posterior)
        with pytest.raises(ValueError, match=r"adapter 'other' is scaled by 32 at .*q_proj.*by 2"):
            posterior.predict(model, BATCH, samples=2, score=SCORE, adapter="other")
    finally:
        model.set_adapter("default")


def test_the_optimizer_knows_whose_its_parameters_are() -> None:
    model, optimizer = trained(config())
    names = list(optimizer.posterior(model))
    model.add_adapter("other", config())
    model.set_adapter("other")
    posterior = optimizer.posterior(model)
    assert (list(posterior), posterior.origin.adapter) == (names, "default")


def test_some_layers_only() -> None:
    """One merged layer of several, and one disabled one."""
    model, optimizer = trained(config())
    posterior = optimizer.posterior(model)
    layer: Any = model.get_base_model().model.layers[0].self_attn.v_proj
    layer.merge()
    with pytest.raises(RuntimeError, match="v_proj: an adapter is merged"), posterior.sampled(model, 0):
        pass
    layer.unmerge()
    layer.enable_adapters(False)
    with pytest.raises(RuntimeError, match=r"is disabled in .*v_proj"), posterior.sampled(model, 0):
        pass


def test_disabled_modules_to_save_and_prompts() -> None:
    for options in (
        config(modules_to_save=["lm_head"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        model, optimizer = trained(options)
        posterior = optimizer.posterior(model)
        with posterior.sampled(model, 0):
            pass
        disabled = pytest.raises(RuntimeError, match="is disabled")
        with model.disable_adapter(), disabled, posterior.sampled(model, 0):
            pass


def test_another_prompt_is_active() -> None:
    options = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model, optimizer = trained(options)
    posterior = optimizer.posterior(model)
    model.add_adapter("other", options)
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"'default', .* is not active"), posterior.sampled(model, 0):
        pass
    model.set_adapter("default")
    with posterior.sampled(model, 0):
        pass


def test_the_file_keeps_name_and_scaling(tmp_path: Path) -> None:
    model, optimizer = trained(config(alpha=6, use_rslora=True))
    model.save_pretrained(tmp_path)
    optimizer.posterior(model).save(tmp_path)
    posterior = Posterior.load(tmp_path)
    assert posterior.origin == optimizer.posterior(model).origin
    assert posterior.origin.adapter == "default"
    assert set(posterior.origin.scaling.values()) == {6 / 2**0.5}
    for other in (posterior.tempered(2.0), posterior.pruned(0.5), merge([posterior, posterior])):
        assert other.origin == posterior.origin
    # Under another name it is the same adapter.
    loaded = PeftModel.from_pretrained(llama(), tmp_path, adapter_name="mine").eval()
    with posterior.sampled(loaded, 0):
        pass
    # The weights would be the same, and mean something else.
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 12}))
    wrong = PeftModel.from_pretrained(llama(), tmp_path).eval()
    for use in USES.values():
        with pytest.raises(ValueError, match=r"adapter 'default' is scaled by 8.48\d* at .*by 4.24\d*: load it"):
            use(wrong, posterior)


def test_files_from_before(tmp_path: Path) -> None:
    """A posterior that knows nothing of its adapter goes into the active one."""
    model, optimizer = trained(config())
    alone = Posterior(optimizer.posterior(model), 1)
    model.save_pretrained(tmp_path)
    alone.save(tmp_path)
    loaded = Posterior.load(tmp_path)
    assert loaded.origin.adapter is None
    model.add_adapter("other", config(alpha=64))
    model.set_adapter("other")
    with loaded.sampled(model, 0):
        pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter", "[]"),
        ("adapter", '["default", {"nobody": 1.0}]'),
        ("adapter", "[3, {}]"),
        ("adapter", '["default", [1]]'),
        ("adapter", "7"),
        ("aliases", '{"a": "nobody"}'),
        ("aliases", "[1]"),
        ("aliases", '{"a": [1]}'),
    ],
)
def test_damaged_files(tmp_path: Path, key: str, value: str) -> None:
    model, optimizer = trained(config(), steps=0)
    optimizer.posterior(model).save(tmp_path)
    path = tmp_path / "ivon_posterior.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, key: value})
    with pytest.raises(PosteriorFileError, match="is damaged"):
        Posterior.load(tmp_path)


def test_adapters_of_transformers_itself() -> None:
    """Without a PeftModel around it."""
    base = llama()
    base.add_adapter(config())
    posterior = IVON([p for p in base.parameters() if p.requires_grad], lr=0.1, ess=100.0).posterior(base)
    with posterior.sampled(base, 0):
        pass
    base.disable_adapters()
    with pytest.raises(RuntimeError, match="is disabled"), posterior.sampled(base, 0):
        pass
