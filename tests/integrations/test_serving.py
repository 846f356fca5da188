"""Samples exported as adapters, served, and averaged over by the client: the numbers of the posterior itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from ivon_kernels.integrations import serving as client_module
from ivon_kernels.integrations.serving import SampleClient, ServerError
from ivon_kernels.noise import antithetic
from ivon_kernels.posterior import Posterior, choices, encode_choices
from tests.support.completions_server import serving
from tests.support.posterior_models import ROUNDING, trained_llama
from tests.support.tiny_llm import llama, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT

NUMBERS = antithetic(3)


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Posterior, Path]:
    trained = trained_llama()
    trained.model.save_pretrained(tmp_path / "adapter")
    posterior = trained.posterior
    posterior.save(tmp_path / "adapter")
    assert posterior.export(tmp_path / "served", samples=NUMBERS) == tmp_path / "served" / "ivon_samples.json"
    return posterior, tmp_path / "served"


def names(folder: Path) -> list[str]:
    return [adapter["name"] for adapter in json.loads((folder / "ivon_samples.json").read_text())["adapters"]]


def test_an_export_is_ordinary_adapters_and_a_manifest(exported: tuple[Posterior, Path]) -> None:
    posterior, folder = exported
    manifest = json.loads((folder / "ivon_samples.json").read_text())
    assert manifest["seed"] == posterior.seed
    assert [adapter["sample"] for adapter in manifest["adapters"]] == [None, *NUMBERS]
    for adapter in manifest["adapters"]:
        assert adapter["base_model_name"] == manifest["base_model_name"]
        held = load_file(folder / adapter["path"] / "adapter_model.safetensors")
        expected = posterior.mean if adapter["sample"] is None else posterior.draw(adapter["sample"])
        assert held.keys() == expected.keys()
        assert all(held[name].equal(expected[name]) for name in held)
        assert not (folder / adapter["path"] / "ivon_posterior.safetensors").exists()


def test_the_client_has_the_posteriors_prediction(exported: tuple[Posterior, Path], tmp_path: Path) -> None:
    posterior, folder = exported
    batch = encode_choices(tokenizer(), ["abc", "ad"], [["e", "fgh"], ["b", "c", "dd"]], labels=[0, 2])
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    with serving(folder, names(folder), key="secret") as url:
        client = SampleClient.of_export(url, folder, key="secret")
        assert client.models == tuple(f"sample_{number}" for number in NUMBERS)
        for normalize in (False, True):
            found = client.predict(batch, normalize=normalize)
            score = choices(normalize=normalize)
            expected = posterior.predict(model, batch, samples=NUMBERS, score=score, keep_samples=True)
            assert found.sample_probabilities is not None and expected.sample_probabilities is not None
            torch.testing.assert_close(found.sample_probabilities, expected.sample_probabilities, rtol=0, atol=ROUNDING)
            assert found.labels is not None and found.labels.tolist() == [0, 2]
            assert found.probabilities[0, 2] == 0  # there is no third answer
        assert found.mutual_information.max() > 1e-3  # the samples are not one and the same


def test_log_probabilities_of_any_sequence(exported: tuple[Posterior, Path]) -> None:
    _, folder = exported
    with serving(folder, names(folder)) as url:
        ((one, other),) = SampleClient(url, ["mean"]).log_probabilities([[3, 4, 5], [6, 7]])
    assert (len(one), len(other)) == (3, 2)
    assert math.isnan(one[0]) and math.isnan(other[0])
    model = PeftModel.from_pretrained(llama(), folder / "mean").eval()
    expected = model(input_ids=torch.tensor([[3, 4, 5]])).logits[0].log_softmax(-1)
    assert one[1:] == pytest.approx([expected[0, 4].item(), expected[1, 5].item()], abs=ROUNDING)


def test_what_a_server_refuses_is_said(exported: tuple[Posterior, Path]) -> None:
    _, folder = exported
    with serving(folder, ["mean"], key="secret") as url:
        with pytest.raises(ServerError, match=r"refused 'sample_9': HTTP 404.*no model sample_9"):
            SampleClient(url, ["sample_9"], key="secret").log_probabilities([[3, 4]])
        with pytest.raises(ServerError, match="HTTP 401"):
            SampleClient(url, ["mean"]).log_probabilities([[3, 4]])


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"choices": [{"index": 0, "logprobs": None}]},
        {"choices": [{"index": 0, "logprobs": {"token_logprobs": [-1.0]}}]},
    ],
)
def test_answers_without_log_probabilities(answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module.SampleClient, "_post", lambda *_: answer)
    with pytest.raises(ServerError, match="log-probabilities of"):
        SampleClient("http://nowhere/v1", ["mean"]).log_probabilities([[3, 4, 5]])


def test_refusals(tmp_path: Path) -> None:
    trained = trained_llama()
    trained.model.save_pretrained(tmp_path)
    posterior = trained.posterior
    with pytest.raises(ValueError, match="no folder yet"):
        posterior.export(tmp_path / "other")
    manifest = posterior.tempered(2.0).export(tmp_path / "other", samples=0, source=tmp_path)
    assert names(manifest.parent) == ["mean"]
    assert SampleClient.of_export("http://nowhere/v1", manifest.parent).models == ("mean",)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="no PEFT adapter"):
        posterior.export(tmp_path / "other", source=tmp_path)
    with pytest.raises(ValueError, match="models must be names"):
        SampleClient("http://nowhere/v1", "mean")
    with pytest.raises(ValueError, match="must begin with http"):
        SampleClient("file:///etc", ["mean"])
