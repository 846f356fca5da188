"""Posteriors on the Hugging Face hub, beside the adapters that are there."""

from __future__ import annotations

import re
from pathlib import Path

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.posterior.file import FILE

__all__ = ["push", "snapshot"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def snapshot(source: str | Path, revision: str | None) -> Path:
    """The folder itself, or the local copy of a repository on the hub: posterior, weights and configuration."""
    if Path(source).is_dir() or not _REPOSITORY.fullmatch(str(source)):
        return Path(source)
    with needed_for("Posterior.load() of a repository", HF):
        from huggingface_hub import snapshot_download

    # Nothing that could be a pickle: weights, configuration and posterior are safetensors and JSON.
    return Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def push(folder: Path | None, repo_id: str, message: str) -> str:
    """See :meth:`ivon_kernels.posterior.Posterior.push_to_hub`."""
    if folder is None or not (folder / FILE).is_file():
        raise ValueError("this posterior is in no folder yet: save it beside its adapter first, posterior.save(folder)")
    with needed_for("push_to_hub()", HF):
        from huggingface_hub import HfApi

    commit = HfApi().upload_file(
        path_or_fileobj=folder / FILE, path_in_repo=FILE, repo_id=repo_id, commit_message=message
    )
    return str(commit)
