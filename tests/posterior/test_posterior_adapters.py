"""What others see of a saved posterior: ordinary adapters, the hub, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from peft import PeftModel
from safetensors.torch import load_file

from ivon_kernels.posterior import Posterior, PosteriorFileError
from ivon_kernels.posterior.file import FILE
from tests.support.saved_posterior import assert_equal, save_lora, trained
from tests.support.tiny_llm import llama, lora_llama, same

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Posterior]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, save_lora(folder)


def test_a_sample_as_an_ordinary_adapter(tmp_path: Path, saved: tuple[Path, Posterior]) -> None:
    folder, posterior = saved
    where = Posterior.load(folder).sample_adapter(6, tmp_path / "sample 6")
    assert where == tmp_path / "sample 6"
    assert {path.name for path in where.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    model = PeftModel.from_pretrained(llama(), where)
    assert same(load_file(where / "adapter_model.safetensors"), posterior.draw(6))
    with posterior.sampled(PeftModel.from_pretrained(llama(), folder), 6):
        pass
    held = {name: p.detach() for name, p in posterior.parameters_of(model).items()}
    assert same(held, posterior.draw(6))


def test_samples_go_beside_the_posterior(tmp_path: Path) -> None:
    model = lora_llama()
    _, posterior = trained(model)
    model.save_pretrained(tmp_path)
    posterior.save(tmp_path)
    assert posterior.sample_adapter(12) == tmp_path / "sample_12"
    assert same(load_file(tmp_path / "sample_12" / "adapter_model.safetensors"), posterior.draw(12))


def test_what_sample_adapter_refuses(tmp_path: Path, saved: tuple[Path, Posterior]) -> None:
    folder, posterior = saved
    with pytest.raises(ValueError, match="holds a posterior and its mean: write the sample into another folder"):
        posterior.sample_adapter(0, folder)
    with pytest.raises(ValueError, match="has no folder yet: save it beside its adapter first"):
        Posterior(posterior, 0).sample_adapter(0, tmp_path)
    alone = Posterior(posterior, 0)
    alone.save(tmp_path / "alone")
    with pytest.raises(PosteriorFileError, match="there are no saved weights in"):
        alone.sample_adapter(0, tmp_path / "sample")
    with pytest.raises(ValueError, match="sample must be a whole number"):
        posterior.sample_adapter(-1, tmp_path)


def test_the_adapter_itself_is_what_it_was(tmp_path: Path, saved: tuple[Path, Posterior]) -> None:
    folder, posterior = saved
    model = PeftModel.from_pretrained(llama(), folder)
    assert same({name: p.detach() for name, p in posterior.parameters_of(model).items()}, posterior.mean)


@pytest.fixture
def hub() -> Iterator[mock.Mock]:
    """The hub's client, as transformers and huggingface_hub call it."""
    api = mock.Mock()
    with (
        mock.patch("transformers.utils.hub.hf_api", return_value=api),
        mock.patch("transformers.utils.hub.create_and_tag_model_card"),
        mock.patch("huggingface_hub.HfApi", return_value=api),
    ):
        yield api


def test_pushing_and_pulling(saved: tuple[Path, Posterior], hub: mock.Mock) -> None:
    folder, posterior = saved
    PeftModel.from_pretrained(llama(), folder).push_to_hub("me/adapter")
    files = {operation.path_in_repo for operation in hub.create_commit.call_args.kwargs["operations"]}
    assert {"adapter_model.safetensors", "adapter_config.json"} < files
    posterior.push_to_hub("me/adapter")
    assert hub.upload_file.call_args.kwargs["path_or_fileobj"] == folder / FILE
    assert hub.upload_file.call_args.kwargs["repo_id"] == "me/adapter"
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(folder)) as download:
        assert_equal(Posterior.load("me/adapter", revision="main"), posterior)
    download.assert_called_once()
    with pytest.raises(ValueError, match="is in no folder yet"):
        Posterior(posterior, 0).push_to_hub("me/adapter")


def test_a_folder_that_is_called_like_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    posterior = save_lora(Path("me/adapter"))
    with mock.patch("huggingface_hub.snapshot_download", side_effect=AssertionError("it is here")):
        assert_equal(Posterior.load("me/adapter"), posterior)


def test_weights_outside_of_the_adapter_are_not_forgotten(tmp_path: Path) -> None:
    model = lora_llama()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    _, posterior = trained(model)
    model.save_pretrained(tmp_path)  # PEFT leaves the norm out
    posterior.save(tmp_path)
    assert_equal(Posterior.load(tmp_path), posterior)
    message = r"lack 'base_model.model.model.norm.weight', which this posterior is about"
    with pytest.raises(PosteriorFileError, match=message):
        posterior.sample_adapter(0)


def test_copies(saved: tuple[Path, Posterior]) -> None:
    folder, posterior = saved
    model = PeftModel.from_pretrained(llama(), folder)
    with posterior.sampled(model, 1):
        pass
    for twin in (copy.deepcopy(posterior), pickle.loads(pickle.dumps(posterior))):
        assert_equal(twin, posterior)
        with twin.sampled(model, 1):
            pass
        wrong = twin.sampled(model, 1, backend="nonsense")
        with pytest.raises(ValueError, match="there is no backend 'nonsense'"), wrong:
            pass
