"""The posterior's file: exact round trips beside every kind of saved weights, and one clear error for a bad one."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from ivon_kernels import IVON, __version__
from ivon_kernels.posterior import Posterior, PosteriorFileError
from ivon_kernels.posterior.file import FILE
from tests.support.elsewhere import digest_of_a_draw
from tests.support.ranks import Ranks
from tests.support.saved_posterior import assert_equal, save_lora, trained
from tests.support.tiny_llm import IVON_OPTIONS, llama, lora_llama, same, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # PEFT calls what transformers is renaming
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Posterior]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, save_lora(folder)


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_beside_an_adapter(tmp_path: Path, dtype: torch.dtype) -> None:
    model = lora_llama().to(dtype)
    _, posterior = trained(model)
    model.save_pretrained(tmp_path)
    posterior.save(tmp_path)
    loaded = Posterior.load(tmp_path)
    assert_equal(loaded, posterior)
    assert all(one.mean.dtype == torch.float32 for one in loaded.values())
    assert loaded.folder == posterior.folder == tmp_path
    other = PeftModel.from_pretrained(llama().to(dtype), tmp_path, autocast_adapter_dtype=False)
    for sample in (0, 9):
        with posterior.sampled(model, sample):
            expected = weights(model)
        with loaded.sampled(other, sample):
            assert same({name: p for name, p in other.state_dict().items() if "lora" in name}, expected)


def test_modules_to_save(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    model = get_peft_model(LlamaForSequenceClassification(llama().config), config)
    _, posterior = trained(model)
    assert any("score" in name for name in posterior)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(posterior)
    posterior.save(tmp_path)
    assert_equal(Posterior.load(tmp_path), posterior)


@pytest.mark.parametrize("shard_size", ["1GB", "4KB"])
def test_beside_a_whole_model(tmp_path: Path, shard_size: str) -> None:
    model = llama()
    _, posterior = trained(model)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("model*.safetensors"))) == (1 if shard_size == "1GB" else 3)
    posterior.save(tmp_path)
    loaded = Posterior.load(tmp_path)
    assert_equal(loaded, posterior)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with loaded.sampled(other, 2), posterior.sampled(model, 2):
        assert same(dict(other.named_parameters()), dict(model.named_parameters()))
    sampled = AutoModelForCausalLM.from_pretrained(loaded.sample_adapter(2, tmp_path / "sample"))
    with posterior.sampled(model, 2):
        assert same(dict(sampled.named_parameters()), dict(model.named_parameters()))


def test_every_file_of_the_weights_counts(tmp_path: Path) -> None:
    model = llama()
    _, posterior = trained(model)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    posterior.save(tmp_path)
    last = max(tmp_path.glob("model*.safetensors"))
    tensors = {name: value + 1 for name, value in load_file(last).items()}
    save_file(tensors, last, metadata={"format": "pt"})
    with pytest.raises(PosteriorFileError, match=rf"{last.name} in .*SHA-256 differs"):
        Posterior.load(tmp_path)
    last.unlink()
    with pytest.raises(PosteriorFileError, match=f"names {last.name}, which is not there"):
        Posterior.load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_of_ones_own(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    params = list(model.parameters())
    optimizer = IVON(params, **IVON_OPTIONS)
    with optimizer.sampled_params(train=True):
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    posterior = optimizer.posterior(model)
    posterior.save(tmp_path / "new" / "folder")
    loaded = Posterior.load(tmp_path / "new" / "folder")
    assert_equal(loaded, posterior)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    loaded.copy_mean_to(fresh)
    assert same(dict(fresh.named_parameters()), dict(model.named_parameters()))


def test_pruned_and_tempered(tmp_path: Path) -> None:
    model = lora_llama()
    _, posterior = trained(model)
    small = posterior.pruned(0.3).tempered(3.0)
    small.copy_mean_to(model)
    model.save_pretrained(tmp_path)
    small.save(tmp_path)
    assert_equal(Posterior.load(tmp_path), small)


def test_metadata(saved: tuple[Path, Posterior]) -> None:
    folder, posterior = saved
    with safe_open(folder / FILE, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        assert set(file.keys()) == {f"{kind}.{name}" for name in posterior for kind in ("mean", "hess")}
    assert metadata["seed"] == 3
    assert metadata["groups"] == [[100.0, 0.01], [1000000.1, 1e-7]]
    assert metadata["versions"]["ivon_kernels"] == __version__
    assert {"torch", "peft", "transformers"} < set(metadata["versions"])
    assert list(metadata["weights"]) == ["adapter_model.safetensors"]


def test_saving_again_replaces_the_file_in_one_piece(tmp_path: Path, saved: tuple[Path, Posterior]) -> None:
    shutil.copytree(saved[0], tmp_path / "again")
    posterior = Posterior.load(tmp_path / "again")
    before = (tmp_path / "again" / FILE).read_bytes()
    full = mock.patch("ivon_kernels.posterior.file.os.replace", side_effect=OSError("disk full"))
    with full, pytest.raises(OSError, match="disk full"):
        posterior.save(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == before
    posterior.save(tmp_path / "again")
    assert_equal(Posterior.load(tmp_path / "again"), posterior)
    assert not list((tmp_path / "again").glob(".ivon_*"))


@pytest.mark.slow
def test_samples_are_the_same_in_another_process(saved: tuple[Path, Posterior], ranks: Ranks) -> None:
    folder, posterior = saved
    found = {ranks.run(1, digest_of_a_draw, folder, *how)[0] for how in ((1, "reference"), (2, "cpu"))}
    found.add(digest_of_a_draw(folder, 1, "reference"))
    assert len(found) == 1
    assert all(w.equal(posterior.draw(11)[name]) for name, w in Posterior.load(folder).draw(11).items())


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_weights_that_are_not_the_mean_are_not_saved_with_it(tmp_path: Path) -> None:
    model = lora_llama()
    optimizer, posterior = trained(model)
    optimizer.train()
    model.save_pretrained(tmp_path)  # while a sample is in the weights
    with pytest.raises(ValueError, match="is not the mean of this posterior, which was therefore not saved"):
        posterior.save(tmp_path)
    assert not (tmp_path / FILE).exists()
    optimizer.eval()
    model.save_pretrained(tmp_path)
    posterior.save(tmp_path)


def test_impossible_values_are_not_saved(tmp_path: Path, saved: tuple[Path, Posterior]) -> None:
    posterior = Posterior.load(saved[0])
    name = next(iter(posterior))
    posterior[name].mean[0, 0] = torch.nan
    with pytest.raises(ValueError, match="has a mean that is not finite"):
        posterior.save(tmp_path)


def _another_adapter(folder: Path) -> None:
    lora_llama().save_pretrained(folder)


def _tensors(change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with safe_open(folder / FILE, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(folder / FILE)
        change(tensors, metadata)
        save_file(tensors, folder / FILE, metadata=metadata)

    return apply


def _drop(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors[max(tensors)]


def _add(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["mean.other"] = torch.ones(2)


def _double(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = max(tensors)
    tensors[name] = tensors[name].double()


def _integers(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].int()


def _nan(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[max(tensors)][0, 0] = torch.nan


def _negative(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[min(tensors)][0, 0] = -1.0


def _other_value(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[min(tensors)][0, 0] += 1.0


def _metadata(key: str, value: object) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata[key] = value if isinstance(value, str) else json.dumps(value)

    return _tensors(change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_another_adapter, r"adapter_model.safetensors in .* is not the one that .* \(its SHA-256 differs\)"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors, which"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), "adapter_model.* not a whole"),
        (_tensors(_drop), "tensor 'mean.*' is missing"),
        (_tensors(_add), "tensor 'mean.other' is unknown"),
        (_tensors(_double), "differ in shape or dtype"),
        (_tensors(_integers), "has dtype I32"),
        (_tensors(_nan), "a mean that is not finite"),
        (_tensors(_negative), "a precision hess"),
        (_tensors(_other_value), "it is not what was written"),
        (lambda folder: save_file({"x": torch.ones(1)}, folder / FILE), "is not a file of ivon_kernels"),
        (_metadata("format", "ivon_posterior 2"), "its 'format' is no JSON"),
        (_metadata("format", json.dumps("ivon_posterior 2")), "has format 'ivon_posterior 2', this version"),
        (_metadata("seed", -1), "seed -1 is outside"),
        (_metadata("seed", 2**64), "is outside"),
        (_metadata("seed", True), "its 'seed' is no int"),
        (_metadata("seed", 4), "it is not what was written"),
        (_metadata("groups", [[0.0, 0.0]]), "is no pair of ess and weight decay"),
        (_metadata("groups", "[[NaN, 0.0]]"), "is no pair of ess and weight decay"),
        (_metadata("groups", [[10**400, 0.0]]), "is no pair of ess and weight decay"),
        (_metadata("groups", []), "is no noise index and group"),
        (_metadata("groups", "[" * 100_000), "its 'groups' is no JSON"),
        (_metadata("parameters", {}), "is unknown"),
        (_metadata("parameters", []), "its 'parameters' is no dict"),
        (_metadata("weights", {"../../etc/passwd": "0"}), "are not file names with hashes"),
        (lambda folder: (folder / FILE).write_bytes(b""), "is not a whole safetensors file"),
        (
            lambda folder: (folder / FILE).write_bytes(struct.pack("<Q", 2**63) + b"{}"),
            "is not a whole safetensors file",
        ),
    ],
)
def test_a_bad_file_is_one_clear_error(
    tmp_path: Path, saved: tuple[Path, Posterior], damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(saved[0], folder)
    damage(folder)
    with pytest.raises(PosteriorFileError, match=message):
        Posterior.load(folder)


@pytest.mark.parametrize("entry", [[0, 2], [2**24, 0], [-1, 0], [0], "x", [0.5, 0], [True, 0]])
def test_bad_places(tmp_path: Path, saved: tuple[Path, Posterior], entry: object) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(saved[0], folder)
    names = list(saved[1])
    _metadata("parameters", {name: [i, 0] for i, name in enumerate(names)} | {names[1]: entry})(folder)
    with pytest.raises(PosteriorFileError, match="is no noise index and group of"):
        Posterior.load(folder)
    _metadata("parameters", {name: [1, 0] for name in names})(folder)
    with pytest.raises(PosteriorFileError, match="two tensors have the noise index 1"):
        Posterior.load(folder)


def test_weights_of_another_shape_with_the_same_bytes(tmp_path: Path) -> None:
    save_lora(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name].flatten()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PosteriorFileError, match="its SHA-256 differs"):
        Posterior.load(tmp_path)


def test_weights_that_came_later_are_compared(tmp_path: Path) -> None:
    model = lora_llama()
    _, posterior = trained(model)
    posterior.save(tmp_path)
    assert_equal(Posterior.load(tmp_path), posterior)
    model.save_pretrained(tmp_path)
    assert_equal(Posterior.load(tmp_path), posterior)
    lora_llama().save_pretrained(tmp_path)
    with pytest.raises(PosteriorFileError, match="is not the mean of the posterior beside it"):
        Posterior.load(tmp_path)


def test_no_posterior_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no ivon_posterior.safetensors in .*: save it with"):
        Posterior.load(tmp_path)


@given(data=st.data())
def test_any_damage_is_noticed_or_without_effect(saved: tuple[Path, Posterior], data: st.DataObject) -> None:
    """Cut off, overwritten, filled with anything: the same posterior or one error, nothing in between."""
    source, posterior = saved
    folder = source.parent / "fuzzed"
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "adapter_model.safetensors", folder)
    content = bytearray((source / FILE).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["cut", "overwrite", "insert", "delete"]))
        at = data.draw(st.one_of(st.integers(0, 16), st.integers(0, header), st.integers(0, len(content))))
        piece = data.draw(
            st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from([b"null", b"-1", b'"', b"}", b"[["]))
        )
        if kind == "cut":
            del content[max(at, 1) :]
        elif kind == "overwrite":
            content[at : at + len(piece)] = piece
        elif kind == "insert":
            content[at:at] = piece
        else:
            del content[at : at + len(piece)]
    (folder / FILE).write_bytes(bytes(content))
    try:
        loaded = Posterior.load(folder)
    except PosteriorFileError:
        return
    assert_equal(loaded, posterior)
