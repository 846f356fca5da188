"""Class logits are read off the right tokens, whatever the padding and the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, PreTrainedTokenizerFast

from ivon_kernels.posterior import choices, class_logits, encode_choices, next_token, predict
from tests.support.posterior_models import ROUNDING, Trained, tokens, train, trained_llama
from tests.support.tiny_llm import llama, tokenizer

# PEFT reads what transformers is renaming.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LOGIT_ROUNDING = 2 * ROUNDING  # a probability changes by at most half as much as its logit
PROMPTS = ["abcd", "e", "fgh"]


@pytest.fixture(scope="module")
def llm() -> Trained:
    return trained_llama()


def gpt2() -> GPT2LMHeadModel:
    """A model with absolute positions, which padding on the left shifts."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64, initializer_range=0.3)
    return GPT2LMHeadModel(config).eval()


class Plain(nn.Module):
    """A language model of somebody's own: it takes nothing but tokens and mask, and returns the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def padded(side: str) -> dict[str, Tensor]:
    return dict(tokenizer()(PROMPTS, padding=True, padding_side=side, return_tensors="pt", return_token_type_ids=False))


def one_by_one(model: nn.Module, texts: list[str]) -> list[Tensor]:
    """Logits of every position of each text, without padding: ``[T, V]``."""
    ids = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        outputs = [model(input_ids=row) for row in ids]
    return [getattr(output, "logits", output)[0] for output in outputs]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [llama, gpt2, Plain])
def test_padding_does_not_change_the_next_token(make: Any, side: str) -> None:
    model = make().eval()
    expected = torch.stack([logits[-1] for logits in one_by_one(model, PROMPTS)])
    with torch.no_grad():
        whole, some = next_token()(model, padded(side)), next_token([7, 3])(model, padded(side))
    torch.testing.assert_close(whole, expected, rtol=0, atol=LOGIT_ROUNDING)
    torch.testing.assert_close(some, expected[:, [7, 3]], rtol=0, atol=LOGIT_ROUNDING)


def test_without_a_mask_the_last_token_counts(llm: Trained) -> None:
    ids = tokens(3, 5)
    with torch.no_grad():
        found, expected = next_token()(llm.model, {"input_ids": ids}), llm.model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGIT_ROUNDING)


@pytest.mark.parametrize(("side", "positions"), [("left", 1), ("right", 3)])
def test_logits_are_computed_where_prompts_end(llm: Trained, side: str, positions: int) -> None:
    shapes: list[torch.Size] = []
    head = llm.model.get_base_model().lm_head
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    with torch.no_grad():
        next_token([3, 4])(llm.model, padded(side))
    handle.remove()
    assert shapes == [torch.Size([3, positions, 32])]  # of four


@pytest.mark.parametrize("side", ["left", "right"])
def test_stacked_prompts_of_different_lengths(llm: Trained, side: str) -> None:
    options: dict[str, Any] = {"samples": 3, "score": next_token([3, 4, 5])}
    separate = predict(llm.posterior, llm.model, padded(side), stacked=False, **options)
    stacked = predict(llm.posterior, llm.model, padded(side), stacked=True, **options)
    torch.testing.assert_close(stacked.probabilities, separate.probabilities, rtol=0, atol=ROUNDING)
    alone = [
        predict(llm.posterior, llm.model, dict(tokenizer()([prompt], return_tensors="pt")), **options)
        for prompt in PROMPTS
    ]
    expected = torch.cat([each.probabilities for each in alone])
    torch.testing.assert_close(stacked.probabilities, expected, rtol=0, atol=ROUNDING)


def test_a_classification_model_of_transformers() -> None:
    torch.manual_seed(1)
    config = llama().config
    config.num_labels = 3
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")  # its head is trained as a whole
    model: Any = get_peft_model(LlamaForSequenceClassification(config), lora)
    batch = {**padded("right"), "labels": torch.tensor([0, 2, 1])}
    trained = train(model, batch)
    assert any("score" in name for name in trained.posterior)
    expected = []
    for sample in range(3):
        with trained.optimizer.sampled_params(sample=sample), torch.no_grad():
            expected.append(model(**padded("right")).logits.double().softmax(1))
    for stacked in (None, False):
        found = predict(trained.posterior, model, batch, samples=3, stacked=stacked)
        torch.testing.assert_close(found.probabilities, torch.stack(expected).mean(0), rtol=0, atol=ROUNDING)
        assert found.labels is not None and found.labels.tolist() == [0, 2, 1]


# ---- answers of several tokens --------------------------------------------------------------------------------------

ANSWERS = [["xy", "z"], ["a", "bcd", "ef"], ["gg", "h"]]


def likelihoods(model: nn.Module, normalize: bool) -> Tensor:
    """Log-likelihood of each of `ANSWERS`, token by token."""
    result = torch.full((3, 3), -math.inf)
    for i, (prompt, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        for j, answer in enumerate(answers):
            (logits,) = one_by_one(model, [prompt + answer])
            log_p = logits.log_softmax(1)
            ids = tokenizer()(prompt + answer)["input_ids"]
            each = [log_p[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
            result[i, j] = sum(each) / (len(each) if normalize else 1)
    return result


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2, Plain])
def test_answers_have_their_log_likelihood(make: Any, normalize: bool) -> None:
    model = make().eval()
    batch = encode_choices(tokenizer(), PROMPTS, ANSWERS)
    with torch.no_grad():
        found = choices(normalize=normalize)(model, batch)
    torch.testing.assert_close(found, likelihoods(model, normalize), rtol=0, atol=3 * LOGIT_ROUNDING)  # of three tokens


def test_answers_may_be_padded_on_the_left() -> None:
    model = gpt2()
    batch = encode_choices(tokenizer(), PROMPTS, ANSWERS)
    for name, value in batch.items():  # move every sequence to the end
        for i, j in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
            shift = int((batch["attention_mask"][i, j] == 0).sum()) if name != "attention_mask" else 0
            value[i, j] = value[i, j].roll(shift)
    batch["attention_mask"] = batch["attention_mask"].flip(2)
    with torch.no_grad():
        found = choices()(model, batch)
    torch.testing.assert_close(found, likelihoods(model, False), rtol=0, atol=3 * LOGIT_ROUNDING)


def test_predicting_the_answer(llm: Trained) -> None:
    batch = encode_choices(tokenizer(), PROMPTS, ANSWERS, labels=[0, 2, 1])
    found = predict(llm.posterior, llm.model, batch, samples=3, score=choices(), stacked=True)
    expected = []
    for sample in range(3):
        with llm.optimizer.sampled_params(sample=sample):
            expected.append(likelihoods(llm.model, False).double().softmax(1))
    # A likelihood is of at most three tokens.
    torch.testing.assert_close(found.probabilities, torch.stack(expected).mean(0), rtol=0, atol=3 * ROUNDING)
    assert found.probabilities[0, 2] == found.probabilities[2, 2] == 0  # they have two answers
    assert found.labels is not None and found.labels.tolist() == [0, 2, 1] and not found.entropy.isnan().any()


def test_encoded_choices() -> None:
    batch = encode_choices(tokenizer(), ["ab", "c"], ["d", "ef"])
    a, b, c, d, e, f = range(3, 9)
    assert batch["input_ids"].tolist() == [[[a, b, d, 0], [a, b, e, f]], [[c, d, 0, 0], [c, e, f, 0]]]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] > 0).long())
    assert batch["answer_mask"].long().tolist() == [[[0, 0, 1, 0], [0, 0, 1, 1]], [[0, 1, 0, 0], [0, 1, 1, 0]]]
    assert "labels" not in batch


def test_answers_that_merge_with_the_prompt() -> None:
    words = {"a": 0, "b": 1, "c": 2, "ab": 3}
    merging = Tokenizer(models.BPE(words, [("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=merging)
    batch = encode_choices(fast, ["ca"], ["b", "c"])
    assert batch["input_ids"].tolist() == [[[2, 3, 0], [2, 0, 2]]]  # no padding token: 0
    assert batch["answer_mask"].long().tolist() == [[[0, 1, 0], [0, 1, 1]]]  # both from behind the c


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_language_model_without_a_score_is_told_what_to_use(llm: Trained) -> None:
    with pytest.raises(ValueError, match=r"score=next_token\(\.\.\.\) or score=choices"):
        predict(llm.posterior, llm.model, {"input_ids": tokens(2, 4)}, samples=1)


def test_the_output_must_have_logits() -> None:
    with pytest.raises(ValueError, match="returned tuple without logits"):
        class_logits(nn.LSTM(4, 2), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"\[4\], not \[rows, classes\]: give"):
        class_logits(nn.Identity(), torch.zeros(4))


@pytest.mark.parametrize("wrong", [[3], [3, 3], [-1, 3], []])
def test_choices_must_be_different_tokens(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="at least two different token ids"):
        next_token(wrong)


@pytest.mark.parametrize(
    ("score", "batch", "reason"),
    [
        (next_token([3, 99]), {"input_ids": tokens(1, 3)}, "token 99 is outside .* of 32"),
        (next_token(), tokens(1, 3), "got input_ids in a Tensor"),
        (
            next_token(),
            {"input_ids": tokens(1, 3), "attention_mask": torch.ones(1, 1, 3, 3)},
            r"\[1, 3\], got \[1, 1, 3, 3\]",
        ),
        (next_token(), {"input_ids": tokens(1, 3)[0]}, r"\[rows, T\], got input_ids of shape \[3\]"),
        (choices(), {"input_ids": tokens(1, 3)}, r"\[rows, C, T\], got input_ids of shape \[1, 3\]"),
        (choices(), {"input_ids": tokens(2, 3)[None]}, "needs answer_mask"),
        (choices(), {"input_ids": tokens(2, 3)[None], "answer_mask": torch.ones(1, 2, 3)}, "needs a prompt token"),
        (choices(), {"input_ids": tokens(2, 3)[None], "answer_mask": torch.zeros(1, 2, 3)}, "a token in some answer"),
    ],
)
def test_batches_that_do_not_fit(llm: Trained, score: Any, batch: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason), torch.no_grad():
        score(llm.model, batch)


@pytest.mark.parametrize(
    ("prompts", "answers", "reason"),
    [
        (["a"], ["b"], "at least two answers"),
        (["a", "b"], [["c", "d"]], "at least two answers for each"),
        ([], [], "at least two answers"),
        ("ab", ["c", "d"], "a list of prompts"),
        (["a"], ["", "b"], "the answer '' adds no token to the prompt 'a'"),
        ([""], ["b", "c"], "leaves nothing in common with the prompt ''"),
    ],
)
def test_choices_that_cannot_be_encoded(prompts: Any, answers: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode_choices(tokenizer(), prompts, answers)
