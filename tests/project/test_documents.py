"""The blocks of Python in README and docs run, page by page and in order; so do both sides of each diff.

A page leaves open what its reader has: a model, data, a trainer; `PAGES` says what stands for it. The two scripts of
docs/posterior.md run in processes of their own, in test_posterior_example.py.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer
from trl import SFTConfig, SFTTrainer

from ivon_kernels import IVON, lora
from ivon_kernels.integrations.transformers import use_ivon
from ivon_kernels.posterior import report_labels
from tests.support import tiny_llm
from tests.support.posterior_models import features, tokens, train

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(<!-- example: \S+ -->\n)?^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Names = dict[str, Any]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ivon_kernels.training.advice.IVONWarning"),  # runs of a few steps
    # PEFT and TRL use names that Transformers has replaced.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


def loop() -> Names:
    """Of somebody who trains in a loop."""
    torch.manual_seed(0)
    inputs, targets = features(32)
    data = list(zip(inputs, targets, strict=True))
    return {
        "torch": torch,
        "IVON": IVON,
        "model": nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        "data": data,
        "train_set": data,
        "loader": DataLoader(data, batch_size=8),
        "inputs": inputs,
        "targets": targets,
        "batch": inputs,
        "loss_fn": nn.CrossEntropyLoss(),
    }


def loop_with_posterior() -> Names:
    """Who has saved a posterior before."""
    names = loop()
    IVON(names["model"].parameters(), lr=0.1, ess=10.0).posterior(names["model"]).save("adapter")
    return {**names, "batches": [names["inputs"]]}


def loop_and_trainer() -> Names:
    """Of somebody who has both, and the Trainer of Transformers."""
    trainer = Trainer(tiny_llm.lora_llama(), tiny_llm.arguments("runs"), train_dataset=tiny_llm.sequences())
    return {**loop(), "trainer": trainer, "use_ivon": use_ivon}


class SFT(SFTTrainer):
    """With the tokenizer, which TRL's own would look for where the model comes from."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(processing_class=tiny_llm.tokenizer(), **arguments)


def sft() -> Names:
    """Of somebody who finetunes a language model with TRL, and makes rollouts with it."""
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, **tiny_llm.QUIET}
    model = tiny_llm.lora_llama()
    return {
        "SFTTrainer": SFT,
        "PeftModel": PeftModel,
        "model": tiny_llm.llama(),
        "base": tiny_llm.llama(),
        "args": SFTConfig("runs", **options),
        "data": Dataset.from_dict({"text": ["hello", "world", "abc", "xyz"]}),
        "lora": tiny_llm.lora_config(),
        "inputs": {"input_ids": tokens(2, 5)},
        "answers": [3, 4],
        "optimizer": IVON([p for p in model.parameters() if p.requires_grad], **tiny_llm.IVON_OPTIONS),
        "k": 3,
        "generate": lambda _: tokens(2, 5),
        "loss": lambda _, rollouts: model(input_ids=rollouts, labels=rollouts).loss,
    }


def prediction() -> Names:
    """Of somebody with a classifier, its posterior, and a validation split."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForSequenceClassification(LlamaConfig(vocab_size=32, num_labels=3, pad_token_id=0, **sizes))
    model = get_peft_model(llama, LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    batch = {"input_ids": tokens(6, 5), "labels": torch.arange(6) % 3}
    return {
        "torch": torch,
        "lora": lora,
        "model": model,
        "posterior": train(model, batch).posterior,
        "training_loader": [batch],
        "texts": [f"sentence {i}" for i in range(6)],
        "report_labels": report_labels,
        "validation_loader": [batch],
        "loader": [batch],
        "batch": {"input_ids": batch["input_ids"]},
    }


PAGES: dict[tuple[str, str], Callable[[], Names]] = {
    ("docs/abstaining.md", "python"): prediction,
    ("README.md", "python"): loop_with_posterior,
    ("README.md", "diff"): sft,
    ("docs/ideas.md", "python"): dict,
    ("docs/integrations/transformers.md", "python"): sft,
    ("docs/migrating.md", "diff"): loop,
    ("docs/posterior.md", "python"): prediction,
    ("docs/recipe.md", "python"): loop_and_trainer,
    ("docs/start.md", "python"): dict,
    ("docs/usage.md", "python"): loop,
    ("docs/wrong-labels.md", "python"): prediction,
}
# Pages that need a server, a benchmark's data, or a library that is not here, and the tests of what they call.
ELSEWHERE = {
    "docs/evaluation-harness.md": "tests/integrations/test_harness.py",
    "docs/serving.md": "tests/integrations/test_serving.py",
    "docs/trainers.md": "tests/integrations/test_by_name.py",
}


def blocks(page: str, kind: str) -> list[str]:
    """The code of a page, without the scripts that are run elsewhere."""
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [code for script, language, code in found if language == kind and not script]


def side(diff: str, sign: str) -> str:
    """The lines that stand on one side of a diff."""
    return "".join(f"{line[1:]}\n" for line in diff.splitlines() if line[:1] in ("", " ", sign))


def run(code: str, names: Names) -> str:
    """What it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "page", "exec"), names)
    return printed.getvalue()


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")


def test_every_page_with_code_is_in_the_table() -> None:
    pages = ["README.md", *(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md"))]
    found = {(page, kind) for page in pages for kind in ("python", "diff") if blocks(page, kind)}
    assert {(page, kind) for page, kind in found if page not in ELSEWHERE} == PAGES.keys()
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


@pytest.mark.parametrize("page", [page for page, kind in PAGES if kind == "python"])
def test_the_page_runs(page: str) -> None:
    names = PAGES[page, "python"]()
    for code in blocks(page, "python"):
        run(code, names)


@pytest.mark.parametrize("page", [page for page, kind in PAGES if kind == "diff"])
@pytest.mark.parametrize("sign", ["-", "+"])
def test_both_sides_of_a_diff_run(page: str, sign: str) -> None:
    for diff in blocks(page, "diff"):
        run(side(diff, sign), PAGES[page, "diff"]())


def test_the_start_prints_what_it_says() -> None:
    names: Names = {}
    printed = "".join(run(code, names) for code in blocks("docs/start.md", "python"))
    shown = re.search(r"```text\n(.*?)```", (ROOT / "docs/start.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", printed) == number.sub("#", f"[]\n{shown[1]}")
    right, doubtful = names["right"], names["doubtful"]
    assert right.double().mean() > 0.93 and right[doubtful].double().mean() < 0.85


def test_the_sigmas_of_the_ideas_are_those_of_the_curvature() -> None:
    names: Names = {}
    for code in blocks("docs/ideas.md", "python"):
        run(code, names)
    values = names["bumps"](names["x"])
    curvature = (values**2).sum(0) / names["noise"] ** 2 + 1  # of the log-likelihood, and of the prior N(0, 1)
    torch.testing.assert_close(names["posterior"].sigma["weight"][0], curvature.rsqrt(), rtol=0.2, atol=0)
