"""ivon_posterior.safetensors: what is in it, and everything that may be wrong with one.

Tensors ``mean.NAME`` and ``hess.NAME`` for every weight tensor, float32 or float64, where NAME is PEFT's key of an
adapter's weight, or the parameter's name in the model. Metadata, each a JSON text:

    format          "ivon_posterior 1"
    seed            of the noise
    groups          [[ess, weight_decay], ...]
    parameters      {NAME: [noise index, group], ...}
    adapter         [name or null, {NAME: scaling of its layer, ...}] where it was trained; older files lack it
    aliases         {further name of a tied weight: NAME, ...}; older files lack it
    weights         file name -> SHA-256 of what is in the weights saved beside it; {} without any
    versions        of ivon_kernels, torch and, if they were in use, peft and transformers
    sha256          of all of the above and of the tensors
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ivon_kernels._version import __version__
from ivon_kernels.gaussians.adapters import Origin
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.gaussians import Gaussians

__all__ = ["FILE", "PosteriorFileError", "load", "save", "save_sample", "save_with_mean"]

FILE = "ivon_posterior.safetensors"
_FORMAT = "ivon_posterior 1"
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
_INDEX = "model.safetensors.index.json"  # of a model in several files
_COMPANIONS = ("*.json", "*.md", "*.txt", "*.model", "*.jinja")  # configuration and tokenizer
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


class PosteriorFileError(ValueError):
    """A file of a posterior is damaged, incomplete, or does not belong to the weights beside it."""


def save(posterior: Gaussians, folder: Path) -> None:
    """See :meth:`ivon_kernels.posterior.Posterior.save`."""
    groups = list(dict.fromkeys((gaussian.ess, gaussian.weight_decay) for gaussian in posterior.values()))
    tensors: dict[str, Tensor] = {}
    for name, gaussian in posterior.items():
        if reason := _wrong_values(gaussian):
            raise ValueError(f"this posterior cannot be saved: {name} has {reason}")
        # safetensors writes memory as it lies, and refuses strided tensors.
        tensors[f"mean.{name}"] = gaussian.mean.cpu().contiguous()
        tensors[f"hess.{name}"] = gaussian.hess.cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    origin = posterior.origin
    if problem := _first_problem(posterior, origin, folder):
        raise ValueError(f"{problem.what} this posterior, which was therefore not saved: {problem.advice}")
    metadata = {
        "format": _FORMAT,
        "seed": posterior.seed,
        "groups": groups,
        "parameters": {
            name: [gaussian.index, groups.index((gaussian.ess, gaussian.weight_decay))]
            for name, gaussian in posterior.items()
        },
        "adapter": [origin.adapter, dict(origin.scaling)],
        "aliases": dict(origin.aliases),
        "weights": _hashes(folder),
        "versions": _versions(),
    }
    # The metadata of safetensors are strings; everything else has to be a text.
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts["sha256"] = json.dumps(_sha256(sorted(texts.items()), sorted(tensors.items())))
    write(folder / FILE, tensors, texts)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one piece: it replaces an older one only when it is complete."""
    # In the same folder: os.replace is in one piece within a file system only.
    with tempfile.TemporaryDirectory(prefix=".ivon_", dir=path.parent) as parts:
        part = Path(parts) / path.name
        save_file(tensors, part, metadata=metadata)
        os.replace(part, path)


def load(folder: Path, device: torch.device | str) -> tuple[dict[str, Gaussian], int, Origin]:
    """See :meth:`ivon_kernels.posterior.Posterior.load`. Returns the Gaussians, the seed and their origin."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {FILE} in {folder}: save it with optimizer.posterior(model).save(folder)")
    try:
        gaussians, seed, origin, weights = _read(path)
    except (SafetensorError, OSError) as error:
        raise PosteriorFileError(f"{path} is not a whole safetensors file: {error}") from error
    if weights:
        now = _hashes(folder)
        for name, sha256 in weights.items():
            if name not in now:
                raise PosteriorFileError(f"{folder} has no {name}, which this posterior was saved with")
            if now[name] != sha256:
                raise PosteriorFileError(
                    f"{name} in {folder} is not the one that this posterior was saved with (its SHA-256 differs): "
                    "take both files from the same save"
                )
    elif problem := _first_problem(gaussians, origin, folder):
        raise PosteriorFileError(f"{problem.what} the posterior beside it: {problem.advice}")
    moved = {
        name: replace(gaussian, mean=gaussian.mean.to(device), hess=gaussian.hess.to(device))
        for name, gaussian in gaussians.items()
    }
    return moved, seed, origin


def save_sample(posterior: Gaussians, sample: int, source: Path | None, target: str | Path | None) -> Path:
    """See :meth:`ivon_kernels.posterior.Posterior.sample_adapter`; `source` is the posterior's own folder."""
    if source is None:
        raise ValueError("this posterior has no folder yet: save it beside its adapter first, posterior.save(folder)")
    folder = source / f"sample_{sample}" if target is None else Path(target)
    if (folder / FILE).exists():
        raise ValueError(f"{folder} holds a posterior and its mean: write the sample into another folder")
    write_weights(posterior.draw(sample), posterior.origin, source, folder)
    return folder


def save_with_mean(posterior: Gaussians, source: Path | None, target: Path) -> None:
    """See :meth:`ivon_kernels.posterior.Posterior.save_with_mean`; `source` is where weights were saved."""
    if source is None:
        raise ValueError("this posterior has no folder yet: say whose weights its mean shall replace (source=...)")
    if (target / FILE).exists():
        raise ValueError(f"{target} holds a posterior already: write this one into another folder")
    write_weights(posterior.mean, posterior.origin, source, target)
    save(posterior, target)


def write_weights(weights: Mapping[str, Tensor], origin: Origin, source: Path, target: Path) -> None:
    """Write the saved weights of `source` to `target`, those by these names replaced, in the dtypes that they have."""
    files = weight_files(source)
    if not files:
        raise PosteriorFileError(f"there are no saved weights in {source}: none of {', '.join((*_WEIGHTS, _INDEX))}")
    contents = {path: _tensors(path) for path in files}
    there = {origin.aliases.get(name, name) for tensors, _ in contents.values() for name in tensors}
    if missing := [name for name in weights if name not in there]:
        raise PosteriorFileError(f"the weights in {source} lack {missing[0]!r}, which this posterior is about")
    target.mkdir(parents=True, exist_ok=True)
    for path, (tensors, metadata) in contents.items():
        replaced = dict(tensors)
        for name, old in tensors.items():  # a tied weight has several names, and may be in a file under each
            if (own := origin.aliases.get(name, name)) in weights:
                if old.shape != weights[own].shape:
                    shapes = f"{tuple(old.shape)} in {source} and {tuple(weights[own].shape)} in this posterior"
                    raise PosteriorFileError(f"{name} has the shape {shapes}: they belong to different models")
                replaced[name] = weights[own].to("cpu", old.dtype, copy=True)
        write(target / path.name, replaced, metadata)
    for pattern in _COMPANIONS:
        for companion in source.glob(pattern):
            shutil.copy(companion, target / companion.name)


# ---- reading ---------------------------------------------------------------------------------------------------------
#
# By hand: msgspec has no bounds beyond 2^63, which a seed needs; pydantic reads 1e400 as inf. To import them takes 0.1
# and 0.45 s, and their errors would still have to be turned into ones that say what is wrong with the file.


def _read(path: Path) -> tuple[dict[str, Gaussian], int, Origin, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        fields = _Fields(path, metadata)
        groups = [_group(path, entry) for entry in fields.get("groups", list)]
        parameters = fields.get("parameters", dict)
        seed = fields.get("seed", int)
        if not 0 <= seed < 2**64:
            raise PosteriorFileError(f"{path} is damaged: seed {seed} is outside [0, 2^64)")
        weights = fields.get("weights", dict)
        # A name with folders in it would be read, and hashed, from anywhere.
        if not all(isinstance(value, str) and Path(name).name == name for name, value in weights.items()):
            raise PosteriorFileError(f"{path} is damaged: its 'weights' are not file names with hashes")
        expected = {f"{kind}.{name}" for name in parameters for kind in ("mean", "hess")}
        there = set(file.keys())
        if expected != there:
            key = min(expected ^ there)
            raise PosteriorFileError(
                f"{path} is damaged: tensor {key!r} is {'missing' if key in expected else 'unknown'}"
            )
        gaussians: dict[str, Gaussian] = {}
        indices: set[int] = set()
        for name, entry in parameters.items():
            index, group = _place(path, name, entry, len(groups))
            if index in indices:
                raise PosteriorFileError(f"{path} is damaged: two tensors have the noise index {index}")
            indices.add(index)
            mean, hess = (_tensor(path, file, f"{kind}.{name}") for kind in ("mean", "hess"))
            if mean.shape != hess.shape or mean.dtype != hess.dtype:
                raise PosteriorFileError(f"{path} is damaged: mean and hess of {name} differ in shape or dtype")
            gaussians[name] = Gaussian(mean, hess, index, *groups[group])
            if reason := _wrong_values(gaussians[name]):
                raise PosteriorFileError(f"{path} is damaged: {name} has {reason}")
    texts = sorted(item for item in metadata.items() if item[0] != "sha256")
    tensors = {f"{kind}.{name}": getattr(g, kind) for name, g in gaussians.items() for kind in ("mean", "hess")}
    if fields.get("sha256", str) != _sha256(texts, sorted(tensors.items())):
        raise PosteriorFileError(f"{path} is damaged: it is not what was written (its SHA-256 differs)")
    return gaussians, seed, _origin(path, fields, gaussians), weights


class _Fields:
    """The metadata, field by field."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path, self._metadata = path, metadata
        form = self.get("format", str)
        if form != _FORMAT:
            raise PosteriorFileError(f"{path} has format {form!r}, this version of ivon_kernels reads {_FORMAT!r}")

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        if default is not None and key not in self._metadata:
            return default
        if key not in self._metadata:
            raise PosteriorFileError(f"{self._path} is not a file of ivon_kernels: its metadata lack {key!r}")
        try:
            value = json.loads(self._metadata[key])
        except (ValueError, RecursionError) as error:
            raise PosteriorFileError(f"{self._path} is damaged: its {key!r} is no JSON ({error})") from error
        if type(value) is not kind:  # not isinstance: true is an int there
            raise PosteriorFileError(f"{self._path} is damaged: its {key!r} is no {kind.__name__}")
        return value


def _group(path: Path, entry: object) -> tuple[float, float]:
    if isinstance(entry, list) and len(entry) == 2 and all(type(value) in (int, float) for value in entry):
        ess, weight_decay = entry  # json also reads NaN, Infinity and whole numbers that no float holds
        if 0 < ess <= sys.float_info.max and 0 <= weight_decay <= sys.float_info.max:
            return float(ess), float(weight_decay)
    raise PosteriorFileError(f"{path} is damaged: {entry!r:.60} is no pair of ess and weight decay")


def _origin(path: Path, fields: _Fields, names: Iterable[str]) -> Origin:
    known = set(names)
    adapter, aliases = fields.get("adapter", list, [None, {}]), fields.get("aliases", dict, {})
    name, scaling = adapter if len(adapter) == 2 else (0, 0)
    if not (
        (name is None or isinstance(name, str))
        and isinstance(scaling, dict)
        and known.issuperset(scaling)
        and all(type(value) in (int, float) and abs(value) <= sys.float_info.max for value in scaling.values())
    ):
        raise PosteriorFileError(f"{path} is damaged: its 'adapter' is no name with the scaling of its weights")
    if not all(isinstance(own, str) and own in known and alias not in known for alias, own in aliases.items()):
        raise PosteriorFileError(f"{path} is damaged: its 'aliases' are not names of its weights")
    return Origin(name, scaling, aliases)


def _place(path: Path, name: str, entry: object, groups: int) -> tuple[int, int]:
    if isinstance(entry, list) and len(entry) == 2 and all(type(value) is int for value in entry):
        index, group = entry
        if 0 <= index < 2**24 and 0 <= group < groups:
            return index, group
    raise PosteriorFileError(f"{path} is damaged: {entry!r:.60} is no noise index and group of {name}")


def _tensor(path: Path, file: Any, key: str) -> Tensor:
    kind = file.get_slice(key).get_dtype()  # from the header, before memory is taken for it
    if kind not in _DTYPES:
        raise PosteriorFileError(f"{path} is damaged: {key} has dtype {kind}, not one of {', '.join(_DTYPES)}")
    tensor: Tensor = file.get_tensor(key)
    return tensor


def _wrong_values(gaussian: Gaussian) -> str | None:
    """What cannot be: a mean that is not finite, a precision that is not positive."""
    if not bool(torch.isfinite(gaussian.mean).all()):
        return "a mean that is not finite"
    if not bool((gaussian.hess + gaussian.weight_decay > 0).all()):
        return "a precision hess + weight_decay that is not positive"
    if not (math.isfinite(gaussian.ess) and gaussian.ess > 0):
        return f"ess {gaussian.ess}"
    return None


# ---- the weights beside it -------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the saved weights of an adapter or a model; none if there are no weights.

    Raises:
        PosteriorFileError: If a model in several files has an index that cannot be read.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
    index = folder / _INDEX
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [folder / Path(name).name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PosteriorFileError(f"{index} cannot be read: {error}") from error
    if missing := [path for path in paths if not path.is_file()]:
        raise PosteriorFileError(f"{index} names {missing[0].name}, which is not there")
    return paths


def _each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weights file in the order of their names, one in memory at a time.

    Raises:
        PosteriorFileError: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):  # one order, whoever wrote the file: they are hashed in it
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise PosteriorFileError(f"{path} is not a whole safetensors file: {error}") from error


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = dict(_each_tensor(path))
    with safe_open(path, framework="pt") as file:
        return tensors, file.metadata() or {}


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weights file's tensors: names, dtypes, shapes and bytes, so that metadata may change."""
    return {path.name: _sha256((), _each_tensor(path)) for path in weight_files(folder)}


def _sha256(texts: Iterable[tuple[str, str]], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of texts, and of tensors with their names, dtypes and shapes, in this order."""
    sha256 = hashlib.sha256(json.dumps(list(texts)).encode())
    for name, tensor in tensors:
        sha256.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        # As bytes, because numpy has no bfloat16; flattened first, because a scalar has no view of another size.
        sha256.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


class _Problem(NamedTuple):
    what: str  # of saved weights, up to "... this posterior"
    advice: str


def _first_problem(gaussians: Mapping[str, Gaussian], origin: Origin, folder: Path) -> _Problem | None:
    """What is wrong with the saved weights, in words: the first that is not the mean, rounded to its dtype."""
    files, there = weight_files(folder), set()
    for path in files:
        for name, tensor in _each_tensor(path):
            own = origin.aliases.get(name, name)
            there.add(own)
            if own not in gaussians:
                continue
            mean = gaussians[own].mean
            if mean.shape != tensor.shape:
                return _Problem(
                    f"{name} in {folder} has the shape {tuple(tensor.shape)}, and {tuple(mean.shape)} in",
                    "PiSSA, OLoRA and CorDA adapters get twice the rank when they are converted, and a converted "
                    "adapter cannot carry a posterior; save it without path_initial_model_for_weight_conversion",
                )
            if not torch.equal(mean.cpu().to(tensor.dtype), tensor):
                return _Problem(
                    f"{name} in {folder} is not the mean of",
                    "save the weights again at the mean (model.save_pretrained after optimizer.eval()), then the "
                    "posterior",
                )
    # What PEFT has no key for is known by its name in the model, where PEFT keeps it by the adapter's name.
    own_weights = [n for n in gaussians if n in origin.scaling or (origin.adapter or "") in n.split(".")]
    if there and (missing := [name for name in own_weights if name not in there]):
        instead = ", ".join(sorted(there - gaussians.keys())[:3]) or "nothing"
        return _Problem(
            f"{files[0].name} in {folder} lacks the adapter's weight {missing[0]!r} of",
            f"PEFT saves something else that is computed from it ({instead}), which cannot carry a posterior; use this "
            "one in the model that was trained",
        )
    return None


def _versions() -> dict[str, str]:
    versions = {"ivon_kernels": __version__, "torch": torch.__version__}
    for package in ("peft", "transformers"):
        if package in sys.modules:
            versions[package] = str(sys.modules[package].__version__)
    return versions
