"""The posterior beside every saved model of a Trainer."""

from __future__ import annotations

import functools
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ivon_kernels.integrations.hooks import find_ivon
from ivon_kernels.optimizer import IVON
from ivon_kernels.posterior.file import FILE
from ivon_kernels.sharding import as_dtensor

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

__all__ = ["copy_posterior", "save_posterior", "save_with_posterior"]


def save_with_posterior(trainer: Trainer) -> None:
    """Let ``save_model()``, and so checkpoints and ``push_to_hub()``, write the posterior beside what they save.

    A trainer has no event between a save and the upload that may follow it, so this wraps its method; a push calls it
    too, before it uploads the folder.
    """
    save = trainer.save_model
    if hasattr(save, "_saves_posterior"):
        return

    @functools.wraps(save)
    def save_model(output_dir: str | None = None, *args: Any, **options: Any) -> None:
        save(output_dir, *args, **options)
        ivon, model, folder = find_ivon(trainer.optimizer), trainer.model, output_dir or trainer.args.output_dir
        if ivon is not None and model is not None and folder is not None:  # there is none before training
            save_posterior(ivon, model, folder, writes=trainer.args.should_save)

    save_model._saves_posterior = True  # type: ignore[attr-defined]
    trainer.save_model = save_model  # type: ignore[method-assign]


def save_posterior(ivon: IVON, model: nn.Module, folder: str | Path, *, writes: bool) -> None:
    """Write the posterior beside a saved model; where that fails, warn: a save must not be lost for it.

    Args:
        ivon: The optimizer.
        model: What it trains.
        folder: Where the model was saved.
        writes: Whether this rank does. All ranks have to call this, because shards are gathered.
    """
    sharded = any(as_dtensor(param) is not None for group in ivon.param_groups for param in group["params"])
    if not (writes or sharded):
        return
    try:
        posterior = ivon.posterior(model)
        if writes:
            posterior.save(folder)
    except Exception as error:  # whatever it was: the model itself is saved
        warnings.warn(f"the posterior was not saved beside the model in {folder}: {error}", stacklevel=3)


def copy_posterior(args: TrainingArguments, step: int) -> None:
    """Before a checkpoint is pushed: to the folder that the trainer uploads, where it copies what it knows only."""
    saved = checkpoint_folder(args, step) / FILE
    if args.should_save and saved.is_file():
        shutil.copyfile(saved, saved.parent.parent / FILE)


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """Where a Trainer keeps the checkpoint of a step."""
    return Path(args.output_dir or ".") / f"checkpoint-{step}"
