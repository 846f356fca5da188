"""IVON as a `torch.optim.Optimizer`: sampling, two ways to train with the same numbers, and the step."""

from __future__ import annotations

import difflib
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT

from ivon_kernels import checkpoint
from ivon_kernels.hyperparameters import OPTIMIZER_KEYS, advice_on_decay
from ivon_kernels.noise import MAX_SAMPLES, whole_number
from ivon_kernels.training import advice, diagnostics, pickling, replicas
from ivon_kernels.training.hooked import hooked
from ivon_kernels.training.modes import Modes
from ivon_kernels.training.parameters import Parameters
from ivon_kernels.training.recipe import SETTINGS, Wanted, arrange
from ivon_kernels.training.samples import Closure, NonFinite, Samples
from ivon_kernels.training.snapshot import snapshot
from ivon_kernels.training.update import UNSCALED, Scaling, Update
from ivon_kernels.training.wrapped import forward_public_names
from ivon_kernels.weights import EDITED, Selection, Weights

if TYPE_CHECKING:
    from ivon_kernels.posterior import Posterior

__all__ = ["IVON"]

_OWNER = "another IVON optimizer: give every parameter to one optimizer, or call the other's eval() first"

# Under torch.compile the public methods are graph breaks, as those of torch's own optimizers: there is nothing to trace
# in one call of a compiled kernel, and a count or an address that changed must not recompile anything.


class IVON(Optimizer):
    """Improved Variational Online Newton (Shen et al., ICML 2024, arXiv 2402.17641).

    Trains a Gaussian with mean ``m`` and standard deviation ``sigma = 1 / sqrt(ess (h + weight_decay))`` over every
    weight, at about the cost of Adam. The forward pass runs at weights sampled from it, in one of two ways::

        with optimizer.sampled_params(train=True):  # as in ivon-opt
            loss_fn(model(x), y).backward()
        optimizer.step()

        optimizer.train()                            # or as in an AdamW loop, plus this line
        loss_fn(model(x), y).backward()
        optimizer.step()

    Both give the same trajectory. After :meth:`step` (and at any time after :meth:`eval`) the weights hold the mean.
    Several ``sampled_params(train=True)`` blocks before one step are several Monte-Carlo samples, which it averages.

    State: ``optimizer.state[p]`` holds ``mean``, ``momentum`` and ``hess`` in float32 (float64 for float64 parameters),
    shaped like ``p``, and the int64 ``step``. Noise depends on ``seed``, step, sample and element alone.

    Args:
        params: Parameters, parameter groups or named parameters, as for every torch optimizer: float32, bfloat16,
            float16 or float64, dense. Frozen ones are left alone.
        lr: Learning rate ``a`` of the mean.
        ess: Effective sample size lambda: for a loss averaged over N examples, N gives the Bayes posterior, more a
            colder one.
        hess_init: Initial Hessian estimate ``h``.
        beta1: Decay of the gradient momentum. It is no "momentum" that a schedule could cycle:
            ``OneCycleLR(..., cycle_momentum=False)``.
        beta2: Decay of the Hessian estimate.
        weight_decay: ``d``, the prior precision divided by ess.
        mc_samples: Samples that ``step(closure)`` draws. Loops decide themselves how many blocks they run.
        hess_approx: ``"price"`` (reparameterization: ``g eps / sigma``) or ``"gradsq"`` (``ess g^2``).
        clip_radius: Bound on each element of the preconditioned direction, before the learning rate.
        sync: Draw independent noise on every rank of the default process group and all-reduce the samples at the step
            (do not average the gradients elsewhere then: under DistributedDataParallel use ``no_sync``). The default,
            equal noise on every rank, suits DistributedDataParallel.
        debias: Divide the momentum by ``1 - beta1^t``.
        rescale_lr: Multiply ``lr`` by ``hess_init + weight_decay``.
        seed: 64-bit seed of the noise. None draws one from torch's global generator, as a DataLoader does: after
            ``torch.manual_seed`` a run repeats itself, and several optimizers have independent noise. Nothing else
            ever advances that generator. The ranks of a process group take rank 0's; different ones that were given
            are refused, at the latest at the first training sample.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; None takes the fastest for each parameter.
        nonfinite: What a gradient with inf or nan does at the step: ``"raise"`` :class:`NonFiniteGradientError`, or
            ``"skip"`` the step and count it in :attr:`skipped_steps`. Either way the state is unchanged. On a GPU the
            device skips the step and the host learns of it without waiting, so the error may come a few steps later,
            from the next :meth:`step` after. ``"ignore"`` saves reading the gradients twice: such a gradient then
            spoils the weights, as with torch's own optimizers (a GradScaler's overflow check still counts).
        sample_in_step: In train mode, let :meth:`step` write the next sample into the weights in the same pass.
            Call :meth:`eval` before reading or saving the weights, or read them in an :meth:`at_mean` block.
        antithetic: Draw the samples of a step in pairs of opposite noise: sample 2 k + 1 is minus sample 2 k, and what
            is linear in the noise cancels in their average. With one sample per step it changes nothing.
        capturable: Let a CUDA graph capture the training step: ``lr`` becomes a float64 tensor on the device, which
            schedulers of torch fill in place, and every replay draws fresh noise. Needs ``"triton"`` or ``"cuda"``, and
            a warm-up step before the capture. Capture again after loading a state dict, and after moving or freezing
            parameters: the graph holds the addresses of before.

    Parameter groups may override every hyperparameter but `mc_samples`, `sync`, `seed` and `capturable`.

    Raises:
        ValueError, TypeError: For a hyperparameter or parameter that cannot be used, saying which and why.
        RuntimeError: If a backend asked for by name is missing.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: Literal["price", "gradsq"] = "price",
        clip_radius: float = math.inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
        *,
        seed: int | None = None,
        backend: str | None = None,
        nonfinite: Literal["raise", "skip", "ignore"] = "raise",
        sample_in_step: bool = False,
        capturable: bool = False,
        antithetic: bool = False,
    ) -> None:
        mc_samples = whole_number(mc_samples, "mc_samples", 1, MAX_SAMPLES + 1)
        seed = None if seed is None else whole_number(seed, "seed", 0, 2**64)
        _check_nonfinite(nonfinite)
        self.sample_in_step = sample_in_step
        self._loading: dict[str, Any] | None = None  # the state dict that load_state_dict is taking over
        self.advised: set[str] = set()  # what check() would say and a warning has said
        self._build(backend, capturable, nonfinite, seed_given=seed is not None, antithetic=antithetic)
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "hess_approx": hess_approx,
            "clip_radius": clip_radius,
            "debias": debias,
            "rescale_lr": rescale_lr,
            "mc_samples": mc_samples,
            "sync": sync,
            "capturable": capturable,
            "seed": replicas.agree_on_seed(_drawn_seed() if seed is None else seed, seed is not None, 0),
        }
        super().__init__(params, defaults)
        if said := advice_on_decay(self.param_groups, weight_decay):
            warnings.warn(said, stacklevel=2)
        advice.warn_once(self.advised, advice.advise_at_once(self.param_groups, self._parameters.ordered), stacklevel=2)
        self._beginning.remember(self.param_groups, self._parameters.ordered)

    def _build(
        self, backend: str | None, capturable: bool, nonfinite: NonFinite, *, seed_given: bool, antithetic: bool
    ) -> None:
        """Make the parts. None of them refers to the optimizer, which would keep device memory until a collection."""
        self._beginning = advice.Beginning()
        self._parameters = Parameters(backend, capturable)
        self._weights = Weights(_OWNER)
        self._samples = Samples(self._parameters, self._weights, nonfinite, seed_given, antithetic)
        self._modes, self._update = Modes(self._samples), Update(self._samples)
        self._weights.let_go_by(self._samples.restore)
        # An optimizer that is dropped in the middle of a step must not leave its sample to who comes next.
        weakref.finalize(self, _bring_back, self._samples).atexit = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward_public_names(cls, IVON)

    @classmethod
    def for_lora(
        cls,
        params: ParamsT | nn.Module,
        num_data: int,
        *,
        learning_rate: float | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        sigma: float | None = None,
        recipe: Literal["paper"] | None = None,
        lr: float | None = None,
        ess: float | None = None,
        hess_init: float | None = None,
        weight_decay: float = 0.0,
        clip_radius: float | None = None,
        beta1: float = 0.9,
        beta2: float | None = None,
        **options: Any,
    ) -> IVON:
        """IVON for who knows the learning rate that AdamW would be given, or with the recipe published for LoRA.

        A step moves a weight by ``lr * clip_radius``, which is half of AdamW's learning rate, and of LoRA's weights by
        at most 0.04 of their size. Sigma follows from the epochs, the size of the weights and how far they can go in
        the run (docs/recipe.md). What is trained beside LoRA's factors, a new head say, is a parameter group of its own
        where names tell them apart. The schedule is yours: linear to zero is what the recipe was measured with.

        Args:
            params: A model, whose trainable parameters are taken, or parameters as for :class:`IVON`.
            num_data: Training examples. The posterior is never warmer than Bayes': ``ess >= num_data``.
            learning_rate: AdamW's for this run, or up to four times of it where it is well below 1e-3
                (docs/recipe.md); None is 1e-3, torch's default.
            steps: Optimizer steps of the whole run.
            epochs: How often each example is seen; None is ``8 * steps / num_data``, of batches of 8.
            sigma: Standard deviation that the noise of LoRA's weights starts with, ``1 / sqrt(ess * hess_init)``. None
                is 0.2 of the size of the weights for each of up to ten epochs, and beyond 200 examples goes as one
                over the root of their number; it is no more than the run can learn against.
            recipe: ``"paper"`` is the recipe of arXiv 2411.04421, made for 10,000 steps and a linear schedule to zero:
                lr 0.03, clip_radius 1e-3, beta2 0.99999, and by `ess` one of its three pairs: ess 1e6 with hess_init
                1e-3 (the default; tasks with four answers), ess 1e7 or 1e8 with 3e-4 (two answers).
            lr: IVON's own learning rate, instead of AdamW's.
            ess: None takes what gives sigma.
            hess_init: None takes 0.04, or less where `ess` would be below `num_data`.
            weight_decay: ``d``.
            clip_radius: None takes 1e-4, so low that it binds on nearly every weight.
            beta1: Decay of the gradient momentum.
            beta2: None takes 0.999, or nearer to 1 where sigma is small: the Hessian moves within a short run, but is
                not driven by its noise.
            **options: Further arguments of :class:`IVON`; the learning rate is not rescaled unless asked for.

        Raises:
            ValueError: If a number is out of range, or two of them contradict each other.
            TypeError: For an option that IVON does not have.
        """
        wanted = Wanted(num_data, learning_rate, steps, epochs, sigma, recipe, lr, ess, hess_init, clip_radius, beta2)
        groups = arrange(params, wanted)
        first = {name: groups[0][name] for name in SETTINGS}
        options = {"rescale_lr": False, **options, **first}
        return cls(groups, beta1=beta1, weight_decay=weight_decay, **options)

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As in every torch optimizer. Groups and parameters may be changed, replaced, added and taken out."""
        return self._parameters.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._parameters.take_groups(groups)

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in every torch optimizer. What is written into it is taken over when the optimizer is next used."""
        return self._parameters.table.entries

    @state.setter
    def state(self, state: Mapping[Tensor, Any]) -> None:
        self._parameters.table.take(state)

    @property
    def seed(self) -> int:
        """Seed of the noise; it travels in the parameter groups of a state dict."""
        return self._parameters.seed

    @property
    def sync(self) -> bool:
        """Whether every rank draws noise of its own."""
        return self._parameters.sync

    @property
    def backends(self) -> dict[str, str]:
        """The backend that runs each kind of parameter, e.g. ``{"cpu/float32": "cpu"}``."""
        return self._parameters.backends

    @property
    def nonfinite(self) -> NonFinite:
        """What a gradient with inf or nan does at the step; may be changed at any time."""
        return self._samples.nonfinite

    @nonfinite.setter
    def nonfinite(self, value: NonFinite) -> None:
        self._samples.choose(_check_nonfinite(value))

    @property
    def skipped_steps(self) -> int:
        """Steps not taken, because of a GradScaler or with ``nonfinite="skip"``. Waits for devices that count them."""
        return self._update.skipped + sum(flags.skipped() for flags in self._parameters.flags.values())

    @property
    def holds_sample(self) -> bool:
        """Whether the weights hold a sample now, and not the mean."""
        return self._weights.held is not None

    @property
    def holds_training_sample(self) -> bool:
        """Whether the weights hold the sample of the coming step, and not an evaluation sample or the mean."""
        return self._modes.holds_training_sample

    def mean_of(self, param: Tensor) -> Tensor:
        """The mean of a parameter, in its dtype and placement, also while the weights hold a sample.

        Returns:
            The parameter itself (detached) where it holds the mean, else a copy: the same one until the weights change.

        Raises:
            ValueError: If the optimizer does not have the parameter.
        """
        state = self._parameters.states.get(param)
        if state is not None:
            return self._weights.mean_of(state)
        if not self._parameters.has(param):
            raise ValueError(f"the optimizer has no such parameter of shape {tuple(param.shape)}")
        return param.detach()

    def posterior(self, model: nn.Module, adapter: str | None = None) -> Posterior:
        """The trained posterior by the names that the weights are saved by: to save, sample, predict, prune, temper.

        A copy: further training does not change it. It is about every parameter that was trained, also while a sample
        is in the weights. Of sharded parameters it holds all elements, so all ranks have to call this.

        Args:
            model: The model that is trained, perhaps wrapped by DistributedDataParallel or torch.compile.
            adapter: Which of its PEFT adapters; None for the active one.

        Raises:
            ValueError: If a trained parameter is not in the model.
        """
        from ivon_kernels.posterior import Posterior  # takes longer to import than the rest, and not everybody needs it

        self._samples.adopt_edits()
        return Posterior.of_snapshot(snapshot(self.param_groups, self.state, self.seed), model, adapter)

    def diagnostics(self) -> list[dict[str, Any]]:
        """Whether training changes anything, one dict per parameter group.

        Returns:
            For each group ``elements``, ``steps``, and, as ``{quantile: value}`` over its elements, ``sigma``
            (posterior standard deviation), ``snr`` (``|mean| / sigma``), ``hess_over_init`` (1: the Hessian has not
            moved) and ``direction`` (the size of the last update before clip radius and learning rate); ``clipped`` is
            the share of elements whose last direction the clip radius binds, ``step`` the root mean square of the
            clipped directions, ``weights`` that of the mean, of tensors that are not all zero.
        """
        self._samples.adopt_edits()
        states = self._parameters.ordered
        return [
            diagnostics.summarize(self.param_groups, [state for state in states if state.group == number])
            for number in range(len(self.param_groups))
        ]

    def glance(self) -> dict[str, float]:
        """The posterior in four numbers over all groups, for a log: at a hundredth of the cost of `diagnostics`.

        Returns:
            ``sigma``, ``snr`` (``|mean| / sigma``) and ``hess`` (over `hess_init`), all in the median, and ``clipped``,
            the share of elements whose last direction the clip radius binds; of about 16,000 elements at regular
            distances. Nothing where there are no parameters. Of sharded parameters, those of this rank.
        """
        return diagnostics.glance(self.param_groups, self._parameters.ordered)

    def check(self, *, steps: int | None = None, num_data: int | None = None) -> list[str]:
        """What is wrong with this run, one sentence each: what, the numbers, and the remedy.

        Noise that drowns the weights or is too small to matter, a sigma that fell, steps that lead nowhere or too far,
        a clip radius that binds on all, a Hessian that stands still, an `ess` below the number of examples. To be
        called after some ten steps, and at the end; the callbacks for Transformers, TRL and Lightning do that.

        Args:
            steps: Optimizer steps of the whole run, with which the first steps tell where it will end.
            num_data: Training examples; None takes ``num_data`` of the parameter groups, if they have it.

        Returns:
            The sentences; none where all is well.
        """
        self._samples.adopt_edits()
        found = advice.advise(
            self.param_groups, self._parameters.ordered, self._beginning, steps=steps, num_data=num_data
        )
        return list(found)

    # ---- samples -----------------------------------------------------------------------------------------------------

    @contextmanager
    def sampled_params(self, train: bool = False, *, sample: int | None = None) -> Iterator[None]:
        """Hold a sample in the weights for the length of a block; the mean is back after it, whatever happens.

        With ``train=True`` this is the next Monte-Carlo sample of the coming :meth:`step`; a block that raises does not
        count. Otherwise it is an evaluation sample, which never disturbs training: it may be drawn in train mode too,
        and the training sample is back afterwards.

        Args:
            train: Whether the block's gradients go into the next step.
            sample: Evaluation sample to replay (numbers: :func:`ivon_kernels.noise.check_sample`): the same noise at
                any time and on any device. None takes the next one of a counter that starts at 0; with ``train=True``,
                fresh noise. With ``train=True`` and a number, the step trains under the sample that, say, rollouts were
                generated with.

        Raises:
            ValueError: If `sample` is out of range.
            RuntimeError: If ``train=True`` and a sample is in the weights already; after the block, if somebody else
                wrote into the weights during it.
        """
        if train:
            drawn = self._modes.enter_training(sample)
            try:
                yield
            except BaseException:
                self._modes.leave_training(drawn, failed=True)
                raise
            self._modes.leave_training(drawn)
        else:
            outer = self._modes.enter_evaluation(sample)
            try:
                yield
            finally:
                self._modes.leave_evaluation(outer)

    @_disable_dynamo
    def train(self, sample: int | None = None) -> None:
        """Put the sample of the coming step into the weights; free if it is there already.

        Parameters that were unfrozen since it was drawn become a part of it.

        Args:
            sample: Take the noise of this evaluation sample instead of fresh noise: the step trains
                under the sample that ``sampled_params(sample=...)`` held, while rollouts were generated, say.

        Raises:
            ValueError: If `sample` is out of range.
            RuntimeError: Inside a block that holds an evaluation sample, or if another sample was drawn for this step.
        """
        self._modes.train(sample)

    @_disable_dynamo
    def eval(self) -> None:
        """Restore the mean; :meth:`train` puts the same sample back if the step has not been taken.

        Raises:
            RuntimeError: With the mean restored, if somebody else wrote into the weights while they held the sample.
        """
        self._modes.eval()

    @contextmanager
    def at_mean(self) -> Iterator[None]:
        """Hold the mean in the weights for the length of a block; what they held before is back after it.

        For averages of the weights (EMA, SWA), and whatever else reads them while they may hold a sample. Losses that
        are computed in the block are none of the step's.

        Raises:
            RuntimeError: If somebody else wrote into the weights while they held the sample; after the block, if there
                is a gradient that was computed in it.
        """
        outer = self._modes.enter_mean()
        try:
            yield
        finally:
            self._modes.leave_mean(outer)

    @_disable_dynamo
    def take_in_unfrozen(self) -> None:
        """Let a training sample that is in the weights be of what was unfrozen since, too; free if nothing was.

        As :meth:`train` called again, for hooks that do not know whether a step is under way.
        """
        self._modes.take_in_unfrozen()

    @_disable_dynamo
    def next_sample(self) -> None:
        """Finish this Monte-Carlo sample of the coming step and put the next one into the weights (train mode).

        The parameters' gradients go into the average, and ``p.grad`` is None afterwards.

        Raises:
            RuntimeError: Inside a block that holds an evaluation sample.
        """
        self._modes.next_sample()

    @_disable_dynamo
    def discard_samples(self) -> None:
        """Forget the unfinished step and restore the mean; the next sample is the first one of this step again."""
        self._samples.discard()

    # ---- the step ----------------------------------------------------------------------------------------------------

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in every torch optimizer; the gradient of a finished `sampled_params` block still counts."""
        if not set_to_none and not self.holds_sample:
            self._samples.fold()
        super().zero_grad(set_to_none)

    @hooked
    @_disable_dynamo
    def step(self, closure: Closure | None = None) -> Any:
        """Update the posterior from the gradients of the samples drawn since the last step; the weights get the mean.

        Parameters without a gradient are left as they were. A GradScaler's scale and overflow flag are honoured.

        Args:
            closure: Clears the gradients, computes the loss, calls backward and returns the loss. It is called under
                each of `mc_samples` samples (train mode's current one first). One that computes no gradient adds no
                sample to those drawn before.

        Returns:
            The closure's loss, averaged over the samples, or None.

        Raises:
            RuntimeError: If no sample was drawn since the last step, or the closure's own sample would get gradients
                that were computed before it.
            NonFiniteGradientError: For inf or nan in a gradient, with ``nonfinite="raise"``; the samples are discarded.
                Under a GradScaler such steps are skipped instead.
        """
        self._modes.require_no_evaluation("step()")
        samples, weights = self._samples, self._weights
        self._update.raise_reported()
        if weights.edited:
            samples.discard()
            raise RuntimeError(EDITED)
        draw_next = self.sample_in_step and self._modes.training and weights.held is not None and samples.replay is None
        loss = None if closure is None else samples.run(closure, self.param_groups[0]["mc_samples"])
        # A GradScaler leaves both on the optimizer for the length of the call.
        found_inf = getattr(self, "found_inf", None)
        scaling = UNSCALED if found_inf is None else Scaling(found_inf, getattr(self, "grad_scale", None))
        self._update.take(scaling, draw_next=draw_next, may_be_empty=closure is not None)
        return loss

    # ---- groups and state --------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in every torch optimizer.

        Raises:
            ValueError, TypeError: If a parameter or hyperparameter cannot be used; the group is not added then.
        """
        for key in OPTIMIZER_KEYS:
            if param_group.get(key, self.defaults[key]) != self.defaults[key]:
                raise ValueError(f"{key} belongs to the whole optimizer; a parameter group cannot override it")
        for key in set(param_group) - set(self.defaults):
            if close := difflib.get_close_matches(key, self.defaults, n=1, cutoff=0.75):
                raise ValueError(f"a parameter group has {key!r}, which IVON does not know: did you mean {close[0]!r}?")
        super().add_param_group(param_group)
        # Here and not in __init__: torch's constructor makes the groups and calls this for each of them.
        self._parameters.bind(self.defaults)
        try:
            self._parameters.check_last_group()
        except (ValueError, TypeError, RuntimeError):
            self.param_groups.pop()
            raise
        self._parameters.add_groups()

    def state_dict(self) -> dict[str, Any]:
        """As in every torch optimizer. `mean` is the mean also while a sample is in the weights.

        A step that is under way (samples drawn, :meth:`step` not yet called) is not part of it.
        """
        self._samples.adopt_edits()
        packed = super().state_dict()
        # Plain ones, which torch.load takes with weights_only=True.
        packed["state"] = {key: dict(entry) for key, entry in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where the state dict was taken: state, counters, seed and hyperparameters; never cast down.

        The weights are set to the saved mean. Where both sides have names (``named_parameters()``), state goes by name,
        else by position. What groups have besides IVON's hyperparameters (a scheduler's ``initial_lr``,
        say) stays where the state dict does not have it. State dicts of ivon-opt 0.1.3 are taken too (load the weights
        first).

        Raises:
            ValueError: If it does not fit; nothing is changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"load_state_dict takes a state dict, not a {type(state_dict).__name__}")
        self._samples.follow()
        loaded: dict[str, Any] = {}

        def capture(_: Optimizer, candidate: dict[str, Any]) -> dict[str, Any]:
            candidate = checkpoint.fitted(candidate, self.param_groups, self._parameters.names())
            loaded.update(candidate)
            return candidate

        # torch casts float state to the parameter's dtype, whatever a subclass overrides below it: an fp32 hess of
        # 1.001 on a bf16 parameter would come back as 1.0. `capture`, the last hook to run, keeps the original for
        # __setstate__, which torch calls before the post hooks.
        hook = self.register_load_state_dict_pre_hook(capture)
        self._loading = loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    @torch.no_grad()
    def _finish_loading(self, loaded: dict[str, Any]) -> None:
        """Take over the state dict as it was before torch cast it, and put its mean into the weights."""
        parameters, samples = self._parameters, self._samples
        saved = checkpoint.by_parameter(loaded, self.param_groups)
        samples.note_seed(samples.seed_given or self.seed != self.defaults["seed"])
        for group in self.param_groups:
            # How the optimizer runs is not what it has learned: it stays as it was built.
            if not parameters.capturable and group.get("capturable"):
                group["lr"] = float(group["lr"])
            group["capturable"] = parameters.capturable
        parameters.hold_lr()
        parameters.load(saved)
        parameters.scalars.update(self.param_groups)
        states = [parameters.states[param] for param in saved]
        self._weights.restore(Selection(states, parameters.scalars, parameters.backend))
        self._beginning.remember(self.param_groups, parameters.ordered)

    def __getstate__(self) -> dict[str, Any]:
        self._samples.follow()
        own = {key: getattr(self, key) for key in _OWN}
        return {
            **super().__getstate__(),
            "_own": own,
            "_parts": pickling.pack(self._samples, self._modes, self._update),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        own, parts, groups = state.pop("_own", None), state.pop("_parts", None), state.pop("param_groups")
        entries = state.pop("state")
        if parts is None:  # torch's load_state_dict
            assert self._loading is not None
            super().__setstate__(state)
            self._samples.discard()  # a sample must not be left where the state dict says nothing of the mean
            self.param_groups = groups
            self._finish_loading(self._loading)
            return
        self.__dict__.update(own)
        self._loading = None
        capturable = state["defaults"]["capturable"]
        self._build(
            parts.backend, capturable, parts.nonfinite, seed_given=parts.seed_given, antithetic=parts.antithetic
        )
        super().__setstate__(state)
        self.param_groups = groups
        self._parameters.bind(self.defaults)
        pickling.unpack(parts, entries, self._samples, self._modes, self._update)


def _bring_back(samples: Samples) -> None:
    """Leave the mean in the weights of an optimizer that is gone."""
    with torch.no_grad():
        samples.restore()


def _drawn_seed() -> int:
    """Another one at each call, and the same ones again after ``torch.manual_seed``, as for a DataLoader's workers."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


_OWN = ("advised", "sample_in_step")  # attributes that copies have too


def _check_nonfinite(value: NonFinite) -> NonFinite:
    if value not in ("raise", "skip", "ignore"):
        raise ValueError(f"nonfinite must be 'raise', 'skip' or 'ignore', got {value!r}")
    return value
