"""``ivon-kernels convert``: from a checkpoint of IVON or ivon-opt to a posterior beside the weights."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from ivon_kernels.commands.console import show
from ivon_kernels.extras import HF, needed_for
from ivon_kernels.posterior import Posterior

__all__ = ["convert"]

_OPTIMIZER_FILE = "optimizer.pt"  # of a Trainer's checkpoint
_POSTERIOR_FILE = "ivon_posterior.safetensors"
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Folder of a Trainer's checkpoint, or an optimizer's state dict by torch.save."),
    ],
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of the saved adapter or model; the checkpoint's own if not given.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model of the adapter; the one that its configuration names if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, for ivon-opt, which saves none.")] = 0,
) -> None:
    """Write the posterior of a checkpoint, of IVON or ivon-opt 0.1.3, beside the weights that it was saved with."""
    file = checkpoint / _OPTIMIZER_FILE if checkpoint.is_dir() else checkpoint
    folder = file.parent if folder is None else folder
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    if (folder / _POSTERIOR_FILE).exists():
        raise ValueError(f"{folder} holds a posterior already; remove its {_POSTERIOR_FILE} first")
    model = _model(folder, base)
    try:
        posterior = Posterior.from_checkpoint(file, model, seed=seed)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a state dict that torch.load reads without running code: {why}") from error
    posterior.save(folder)
    show(f"{folder / _POSTERIOR_FILE}: {posterior!r}")


def _model(folder: Path, base: str | None) -> nn.Module:
    """The saved adapter on its base model, or the saved model."""
    with needed_for("convert", HF):
        import peft
        import transformers
    if (folder / "adapter_config.json").is_file():
        config = peft.PeftConfig.from_pretrained(str(folder))
        name = base or config.base_model_name_or_path
        if not name:
            raise ValueError(f"the adapter in {folder} does not say what its base model is: --base NAME")
        model: nn.Module = peft.PeftModel.from_pretrained(_loaded(transformers, name, config.task_type), str(folder))
        return model
    if (folder / "config.json").is_file():
        return _loaded(transformers, str(folder), None)
    raise ValueError(f"there is neither an adapter_config.json nor a config.json in {folder}")


def _loaded(transformers: Any, name: str, task: str | None) -> nn.Module:
    """A model by its name and an adapter's task, or, without one, of the class that its configuration names."""
    if task is not None and task not in _TASKS:
        raise ValueError(f"the adapter's task is {task!r}, not one of {', '.join(_TASKS)}")
    kind = _TASKS.get(str(task)) or next(iter(transformers.AutoConfig.from_pretrained(name).architectures or ()), "")
    if not hasattr(transformers, kind):
        raise ValueError(f"transformers has no {kind or 'class of model'!r}, which {name} is said to be")
    model: nn.Module = getattr(transformers, kind).from_pretrained(name, dtype="auto")
    return model
