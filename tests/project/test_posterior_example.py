"""The example of docs/posterior.md runs as it stands: train, save, load in a new process, predict."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
pytestmark = pytest.mark.slow


def examples() -> dict[str, str]:
    text = (ROOT / "docs" / "posterior.md").read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- example: (\w+\.py) -->\n```python\n(.*?)```", text, flags=re.DOTALL))


def save_model(folder: Path, code: str) -> None:
    """A tiny Llama with a token for every word of the example, where transformers looks for the one on the hub."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known = dict.fromkeys(word for word, _ in words.pre_tokenize_str(code.replace('"', " ")))
    known |= dict.fromkeys(f"Ġ{word.strip('Ġ')}" for word in list(known))
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *known, "Review"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = words
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of predict.py in a new process; train.py runs here, where what it imports is known already."""
    folder = tmp_path_factory.mktemp("example")
    code = examples()
    save_model(folder / NAME, "\n".join(code.values()))
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers is renaming
        patch.chdir(folder)
        runpy.run_path("train.py", run_name="__main__")
    assert (folder / "sentiment" / "ivon_posterior.safetensors").is_file()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "predict.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_it_prints_what_the_document_says(printed: str) -> None:
    shown = re.search(
        r"```text\n(positive .*?)```", (ROOT / "docs" / "posterior.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert shown is not None
    number = re.compile(r"\d+\.\d+")
    assert number.sub("#", printed) == number.sub("#", shown[1])


def test_the_numbers_are_probabilities_and_entropies(printed: str) -> None:
    rows = [[float(number) for number in line.split()[:3]] for line in printed.splitlines()[1:]]
    assert len(rows) == 4
    for positive, total, doubt in rows:
        p = torch.tensor([positive, 1 - positive])
        assert total == pytest.approx(float(torch.special.entr(p).sum()), abs=0.03)  # positive has two digits
        assert 0 <= doubt <= total + 0.005
    assert any(doubt > 0 for _, _, doubt in rows)
