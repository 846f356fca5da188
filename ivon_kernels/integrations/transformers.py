"""IVON in the Trainer of Hugging Face Transformers, and in the trainers of TRL that are built on it.

One line after the trainer was made, whichever it is::

    trainer = SFTTrainer(model=model, args=args, train_dataset=data, peft_config=lora)
    use_ivon(trainer)  # at TrainingArguments.learning_rate, AdamW's; or use_ivon(trainer, lr=0.1, ess=len(data))
    trainer.train()

which is ``optimizer_cls_and_kwargs=(IVONFactory, {...}), callbacks=[IVONCallback()]`` for trainers that take these, and
what no callback can do. ``optimizers=(IVON(...), None)`` works too, with the callback for what the trainer alone gets
wrong.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ivon_kernels.extras import HF, needed_for
from ivon_kernels.integrations.hooks import find_ivon
from ivon_kernels.integrations.saving import checkpoint_folder, copy_posterior, save_posterior, save_with_posterior
from ivon_kernels.integrations.state_dict import save_mean
from ivon_kernels.integrations.unfrozen import sample_unfrozen
from ivon_kernels.integrations.voice import Voice, count_examples
from ivon_kernels.optimizer import IVON

with needed_for(__name__, HF):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

__all__ = ["IVONCallback", "IVONFactory", "ivon_of", "use_ivon"]

_OPTIMIZER_FILE = "optimizer.pt"
_FORWARDED = ("at_mean", "check", "diagnostics", "mean_of", "posterior", "sampled_params")
_LOOK_AGAIN = 100  # steps


def use_ivon(trainer: Trainer, **options: Any) -> None:
    """Let a trainer train with IVON: :class:`IVONFactory` makes its optimizer, :class:`IVONCallback` looks after it.

    Without options it is :meth:`IVON.for_lora` with what the trainer knows: AdamW's learning rate
    (``TrainingArguments.learning_rate``), the number of steps, of examples, and of times that each is seen.

    Besides, the callback comes before those that report, so that wandb, TensorBoard and others get its numbers, every
    save has the posterior beside it, and ``max_grad_norm`` becomes 0 where it was left at its default: clipping the
    gradients would widen the posterior.

    To be called before ``trainer.train()``. The factory runs when training starts, after the trainer has added adapters
    and moved the model, and again for every trial of a hyperparameter search.

    Args:
        trainer: A Trainer, or one of TRL's.
        **options: Arguments of :meth:`IVON.for_lora` that shall not be the trainer's, and further ones of
            :class:`IVON`. With ``lr`` and ``ess``, and none of the recipe's own, those of :class:`IVON` alone. A
            mistake in them is noticed here.

    Raises:
        ValueError: If the trainer has an optimizer already.
        TypeError: For an option that IVON does not have, or a missing one.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise ValueError(
            "the trainer has an optimizer already: pass it neither optimizers nor optimizer_cls_and_kwargs"
        )
    by_recipe = not _says_all(options)
    _check({"num_data": 1, **options} if by_recipe else options)
    factory = partial(_OfTrainer, weakref.ref(trainer)) if by_recipe else IVONFactory
    trainer.optimizer_cls_and_kwargs = (cast(Any, factory), options)  # annotated for optimizer classes only
    callback = cast(IVONCallback | None, trainer.pop_callback(IVONCallback)) or IVONCallback()
    trainer.callback_handler.callbacks.insert(0, callback)  # what it logs is for those after it
    callback.serve(trainer, translated=by_recipe)


def ivon_of(trainer: Trainer) -> IVON:
    """The optimizer of a trainer that trains or has trained, to predict with samples of the posterior for example.

    Raises:
        TypeError: If it is not IVON, or not there yet.
    """
    return _ivon(trainer.optimizer)


class IVONFactory:
    """What Trainer takes as ``optimizer_cls_and_kwargs=(IVONFactory, {"lr": 0.1, "ess": len(data)})``.

    Gives IVON all trainable parameters of the model in one group, by name, with those of PEFT adapters that are not
    active now (frozen ones are left alone until something unfreezes them, ``set_adapter`` in the loss say), and makes
    ``state_dict()`` of the model hold the mean (:func:`ivon_kernels.integrations.state_dict.save_mean`). Trainer's own
    two groups, with
    ``TrainingArguments.weight_decay`` and with 0, are not used: weight decay is the prior's precision here, so it
    applies to every weight.
    """

    def __call__(self, model: nn.Module, args: TrainingArguments | None = None, /, **options: Any) -> IVON:
        """Make the optimizer of a model.

        Args:
            model: The model, on its device and with its adapters.
            args: Not used; Axolotl's trainers pass them to every factory.
            **options: Arguments of :class:`IVON`; with ``num_data`` or another of the recipe's, those of
                :meth:`IVON.for_lora`.

        Raises:
            ValueError: If the model has no trainable parameter.
            TypeError: For an option that IVON does not have, or a missing one.
        """
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError("no parameter of the model is trainable: add an adapter, or set requires_grad")
        waiting = _of_adapters(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad or p in waiting]
        optimizer: IVON = _constructor(options)(named, **options)
        save_mean(model, optimizer)
        return optimizer


def _of_adapters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of PEFT's adapters, also those that are not active, where IVON can train them."""
    found: set[nn.Parameter] = set()
    for layer in model.modules():
        for name in getattr(layer, "adapter_layer_names", ()):  # of PEFT's layers: each a dict by adapter
            adapters = getattr(layer, name, None)
            if isinstance(adapters, nn.ModuleDict | nn.ParameterDict):
                found.update(param for param in adapters.parameters() if param.is_floating_point())
    return found


_RECIPES_OWN = ("num_data", "learning_rate", "steps", "epochs", "sigma", "recipe")


def _says_all(options: dict[str, Any]) -> bool:
    """Whether the options are for :class:`IVON` itself, and leave nothing to the recipe."""
    return {"lr", "ess"} <= options.keys() and options.keys().isdisjoint(_RECIPES_OWN)


def _constructor(options: dict[str, Any]) -> Callable[..., IVON]:
    return IVON if options.keys().isdisjoint(_RECIPES_OWN) else IVON.for_lora


def _check(options: dict[str, Any]) -> None:
    """Refuse what the constructor would refuse when training starts."""
    own = inspect.signature(_constructor(options))
    unknown = options.keys() - own.parameters.keys() - inspect.signature(IVON).parameters.keys()
    if unknown:
        raise TypeError(f"IVON has no option {', '.join(sorted(unknown))}")
    own.bind([], **options)


class _OfTrainer(IVONFactory):
    """:meth:`IVON.for_lora` with what a trainer knows about the run, where the options do not say otherwise."""

    def __init__(self, trainer: Callable[[], Trainer | None]) -> None:
        self._trainer = trainer  # a weak reference: the trainer keeps the factory

    def __call__(self, model: nn.Module, args: TrainingArguments | None = None, /, **options: Any) -> IVON:
        """As that of :class:`IVONFactory`."""
        trainer = self._trainer()
        known: dict[str, Any] = {} if trainer is None else _known(trainer, options.get("num_data"))
        if options.get("recipe") is not None or options.get("lr") is not None:
            known.pop("learning_rate", None)
        return super().__call__(model, **{**known, **options})


def _known(trainer: Trainer, num_data: Any) -> dict[str, Any]:
    """What a trainer knows about its run, as arguments of :meth:`IVON.for_lora`; `num_data` is the user's, or None."""
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * max(1, args.world_size)
    if num_data is None:
        try:
            num_data = len(cast(Any, trainer.train_dataset))
        except TypeError:  # a stream, of which every example is seen once
            num_data = 0
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(num_data / batch))
    seen = steps * batch
    return {
        "learning_rate": args.learning_rate,
        "steps": max(1, steps),
        "num_data": max(1, num_data or seen),
        "epochs": seen / num_data if num_data and seen else 1.0,
    }


class IVONCallback(TrainerCallback):
    """Looks after IVON where Trainer alone would not, however it got the optimizer.

    - Every save writes the mean, whenever it happens.
    - What ``compute_loss`` unfreezes, by switching adapters say, is sampled before it is used, and so trained.
    - The weights hold the mean when training ends, also with ``sample_in_step=True``.
    - ``load_best_model_at_end`` takes momentum and Hessian back to the best checkpoint too.
    - A step that the GradScaler skipped does not advance the learning rate's schedule.
    - A warning, once, for TrainingArguments that override IVON's settings, are ignored, or spoil its Hessian estimate,
      and for gradients of parameters that the optimizer does not have.
    - A line at the start says what was chosen, and :meth:`IVON.check` is asked after ten steps and at the end; a loss
      that has fallen off is said. Each once.
    - ``ivon/sigma``, ``ivon/snr``, ``ivon/clipped`` and ``ivon/hess`` (:meth:`IVON.glance`) are logged beside the loss.
      Callbacks that come before this one do not see them: ``use_ivon`` puts it first.
    - Every save has the posterior beside it; without ``use_ivon`` checkpoints only.

    Args:
        save_posterior: Whether saves have it. It takes 8 bytes a weight, which is much for a network trained whole; the
            optimizer's state in a checkpoint holds it too (``Posterior.from_checkpoint``).
    """

    def __init__(self, save_posterior: bool = True) -> None:
        self._save_posterior = save_posterior
        self._trainer: Trainer | None = None
        self._translated = False
        self._notes: list[str] = []
        self._said: set[str] = set()  # in all runs
        self._voice: Voice | None = None
        self._first_step = 0
        self._strangers = _Strangers()
        self._skipped_steps = 0

    def serve(self, trainer: Trainer, *, translated: bool) -> None:
        """Do what needs the trainer itself: see :func:`use_ivon`.

        Args:
            trainer: The trainer.
            translated: Whether its learning rate is AdamW's, which the recipe makes IVON's of.
        """
        self._trainer, self._translated = trainer, translated
        args = trainer.args
        if args.max_grad_norm == _default(args, "max_grad_norm") and args.max_grad_norm:
            self._notes = [f"max_grad_norm 0 instead of the default {args.max_grad_norm:g}"]
            args.max_grad_norm = 0.0
        if self._save_posterior:
            save_with_posterior(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Check the settings, install the hooks, and say what was chosen.

        Raises:
            TypeError: If the Trainer's optimizer is not IVON.
        """
        ivon = _ivon(context["optimizer"])
        save_mean(context["model"], ivon)
        sample_unfrozen(context["model"], ivon)
        self._skipped_steps = ivon.skipped_steps
        for advice in (*_advice_on_clipping(args), *_advice_on_overrides(args, ivon, self._translated)):
            self._warn(advice)
        _forward(context["optimizer"], ivon)
        self._first_step = state.global_step
        self._voice = Voice(
            ivon,
            steps=state.max_steps or None,
            num_data=count_examples(context.get("train_dataloader")),
            speaks=state.is_world_process_zero,
            said=self._said,
        )
        self._voice.begin(told=self._told(), notes=self._notes)

    def _told(self) -> float | None:
        """The number of examples that ``use_ivon`` was given."""
        asked = None if self._trainer is None else self._trainer.optimizer_cls_and_kwargs
        return None if asked is None else asked[1].get("num_data")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Look at the run early."""
        if self._voice is not None:
            self._voice.step(state.global_step - self._first_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **context: Any,
    ) -> None:
        """Add the posterior's numbers to a log of training, for the callbacks after this one and for the history."""
        if self._voice is None or logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        numbers = self._voice.numbers()
        logs.update(numbers)
        if state.log_history:  # which got a copy before
            state.log_history[-1].update(numbers)
        self._voice.hear(float(logs["loss"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any) -> None:
        """Write the posterior into a checkpoint, where ``use_ivon`` has not seen to every save."""
        folder = checkpoint_folder(args, state.global_step)
        if self._save_posterior and self._trainer is None and folder.is_dir():
            save_posterior(_ivon(context["optimizer"]), context["model"], folder, writes=args.should_save)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Let a checkpoint that is pushed take its posterior along."""
        if self._save_posterior:
            copy_posterior(args, state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Say that a gradient goes to nobody, as that of an adapter that the optimizer was not given."""
        name = self._strangers.with_gradient(context["model"], _ivon(context["optimizer"]))
        if name is not None:
            self._warn(
                f"{name} has a gradient, but the optimizer does not have it, so it is not trained: freeze it, or "
                "give the optimizer all that is to be trained (optimizer.add_param_group)"
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Tell Accelerate of a step that the GradScaler skipped; it saw ``step()`` being called."""
        optimizer = context["optimizer"]
        if not isinstance(optimizer, AcceleratedOptimizer) or optimizer.scaler is None:
            return
        skipped_steps = _ivon(optimizer).skipped_steps
        if skipped_steps > self._skipped_steps:
            optimizer._is_overflow = True
        self._skipped_steps = skipped_steps

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Take momentum and Hessian back to the best checkpoint, whose weights Trainer has loaded."""
        ivon = _ivon(context["optimizer"])
        ivon.eval()
        if self._voice is not None:
            self._voice.end(state.global_step - self._first_step)
            self._voice = None
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        best = Path(state.best_model_checkpoint)
        # The last step was the best one, and its momentum and Hessian are still here.
        if best.name == f"checkpoint-{state.global_step}":
            return
        saved = best / _OPTIMIZER_FILE
        if saved.is_file():
            ivon.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
            return
        self._warn(
            f"{best} has no {_OPTIMIZER_FILE} (save_only_model=True, or a sharded one): the weights are the best "
            "model's, but momentum and Hessian, and so the width of the posterior, are the last step's"
        )

    def _warn(self, advice: str) -> None:
        if advice not in self._said:
            self._said.add(advice)
            warnings.warn(advice, stacklevel=3)


class _Strangers:
    """The parameters of a model that the optimizer does not have, looked up again when its groups change.

    And after a hundred steps, since a model may get new parameters: walking it takes as long as a step of LoRA.
    """

    def __init__(self) -> None:
        self._known: tuple[Any, ...] = ()
        self._params: list[tuple[str, nn.Parameter]] = []
        self._steps = 0

    def with_gradient(self, model: nn.Module, ivon: IVON) -> str | None:
        """The name of one that has a gradient."""
        groups = ivon.param_groups
        now = (id(model), *((id(group["params"]), len(group["params"])) for group in groups))
        self._steps += 1
        if now != self._known or self._steps >= _LOOK_AGAIN:
            own = {id(param) for group in groups for param in group["params"]}
            self._params = [(name, param) for name, param in model.named_parameters() if id(param) not in own]
            self._known, self._steps = now, 0
        return next((name for name, param in self._params if param.grad is not None), None)


def _forward(optimizer: object, ivon: IVON) -> None:
    """Let ``trainer.optimizer``, Accelerate's wrapper, answer with what is asked of a posterior's optimizer."""
    if optimizer is not ivon:
        for name in _FORWARDED:
            setattr(optimizer, name, getattr(ivon, name))


def _ivon(optimizer: object) -> IVON:
    ivon = find_ivon(optimizer)
    if ivon is None:
        found = getattr(optimizer, "optimizer", optimizer)
        raise TypeError(
            f"the Trainer's optimizer is {type(found).__name__}, not IVON: call use_ivon(trainer, ...) before train(), "
            "or pass optimizer_cls_and_kwargs=(IVONFactory, {...})"
        )
    return ivon


def _advice_on_clipping(args: TrainingArguments) -> list[str]:
    if args.max_grad_norm is None or args.max_grad_norm <= 0:
        return []
    return [
        f"TrainingArguments.max_grad_norm={args.max_grad_norm} scales gradients down before IVON reads its Hessian "
        "estimate from them, which widens the posterior: pass max_grad_norm=0 and bound the step by IVON's clip_radius"
    ]


def _advice_on_overrides(args: TrainingArguments, ivon: IVON, translated: bool) -> list[str]:
    """Where the learning rate, the weight decay or the samples of a step are not what the user may believe."""
    advice = []
    defaults = ivon.defaults
    groups = [group for group in ivon.param_groups if group["params"]]
    lr = float(groups[0].get("initial_lr", groups[0]["lr"]))
    if not translated and args.learning_rate not in (_default(args, "learning_rate"), lr):
        advice.append(f"TrainingArguments.learning_rate={args.learning_rate} is not used: IVON has lr={lr}")
    decays = [float(group["weight_decay"]) for group in ivon.param_groups]
    by_trainer = decays == [args.weight_decay, 0.0]  # the groups that Trainer makes for an optimizer class
    if by_trainer and any(group["weight_decay"] != defaults["weight_decay"] for group in groups):
        advice.append(
            f"TrainingArguments.weight_decay={args.weight_decay} overrides IVON's weight_decay="
            f"{defaults['weight_decay']}, and biases and norms get 0: pass optimizer_cls_and_kwargs=(IVONFactory, "
            "{...}) to keep IVON's"
        )
    elif not by_trainer and args.weight_decay not in (_default(args, "weight_decay"), *decays):
        advice.append(
            f"TrainingArguments.weight_decay={args.weight_decay} is not used: IVON has weight_decay={decays[0]}"
        )
    if defaults["mc_samples"] > 1:
        advice.append(f"mc_samples={defaults['mc_samples']} has no effect: Trainer takes each step with one sample")
    return advice


def _default(args: TrainingArguments, name: str) -> Any:
    """The value that a field of these TrainingArguments has unless it is given; TRL's differ."""
    return type(args).__dataclass_fields__[name].default
