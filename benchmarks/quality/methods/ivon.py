"""IVON's ways to train and to predict: one table of variants, which share what they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetune.data import EncodedExamples
from benchmarks.quality.method import Hyper, Job, Method, State
from benchmarks.quality.methods.adamw import TEMPERATURE, TemperatureScaling
from ivon_kernels import IVON
from ivon_kernels.gaussians.gaussian import Gaussian
from ivon_kernels.gaussians.names import weight_names
from ivon_kernels.noise import in_pairs
from ivon_kernels.posterior import Posterior

STACKED_BATCH = 12  # examples of a forward pass that several samples share
ESS = "ess"  # in the state, where the optimizer worked it out; no weight has this name
FROZEN = 1 - 2**-40  # beta2: what a step adds to the Hessian is below its rounding error


def optimizer(job: Job, hyper: Hyper) -> IVON:
    """IVON of the job's parameters, with the paper's switches for LoRA; `hyper` may name any other setting."""
    settings: dict[str, Any] = {"clip_radius": 1e-3, "beta2": 0.99999, "weight_decay": 0.0, "rescale_lr": False}
    return IVON(job.parameters, seed=job.seed, **{**settings, **hyper})


def state_of(posterior: Posterior) -> State:
    """The precision of every weight over the ess: one extra number each. The mean is the adapter's weight."""
    return {name: gaussian.hess + gaussian.weight_decay for name, gaussian in posterior.items()}


def posterior_of(job: Job, state: State, hyper: Hyper) -> Posterior:
    """The posterior around the weights that the model holds."""
    known, order = weight_names(job.model), {param: index for index, param in enumerate(job.parameters)}
    gaussians = {}
    ess = state[ESS].item() if ESS in state else hyper["ess"]
    for name, precision in state.items():
        if name != ESS:
            mean = known[name].detach().float().clone()
            gaussians[name] = Gaussian(mean, precision.to(mean.device), order[known[name]], ess, 0.0)
    return Posterior(gaussians, job.seed)


def predict_each(job: Job, posterior: Posterior, examples: EncodedExamples, samples: int | Sequence[int]) -> Tensor:
    """Class probabilities under every sample, or at the mean for 0: float64 ``[samples, examples, classes]``."""
    index: list[int] = []

    def inputs() -> Iterator[dict[str, Tensor]]:
        for batch in job.batches(examples, STACKED_BATCH):
            index.extend(batch.index)
            yield batch.inputs

    found = posterior.predict(
        job.model, inputs(), samples=samples, score=job.scorer.score, keep_samples=True, progress=False, advise=False
    ).sample_probabilities
    assert found is not None
    job.passes += (len(found) - 1) * len(index)  # one for each is counted already
    return found[:, torch.tensor(index).argsort()]


class Ivon(Method):
    """Finetuning with IVON, the rate falling linearly to zero; one pass at the mean costs what AdamW's costs."""

    def train(self, job: Job, hyper: Hyper) -> State:
        found = optimizer(job, hyper)
        job.finetune(found)
        return state_of(found.posterior(job.model))


class Samples(Ivon):
    """Averaged over the job's samples of the posterior, several in a pass, at the dial's temperature if it has one."""

    sampling = True

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        posterior = posterior_of(job, state, hyper).tempered(hyper.get("temperature", 1.0))
        return predict_each(job, posterior, examples, job.samples)


class Pairs(Samples):
    """As many samples, each followed by its mirror image: any even number of the first ones is made of pairs."""

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        numbers = [in_pairs(position) for position in range(job.samples)]
        return predict_each(job, posterior_of(job, state, hyper), examples, numbers)


class ForLora(Samples):
    """Trained with what :meth:`IVON.for_lora` makes of the model, the number of examples, the steps, and `hyper`."""

    def train(self, job: Job, hyper: Hyper) -> State:
        found = self.optimizer(job, hyper)
        job.finetune(found, after_step=self.watch(job, found))
        return {**state_of(found.posterior(job.model)), ESS: torch.tensor([found.param_groups[0]["ess"]])}

    def optimizer(self, job: Job, hyper: Hyper) -> IVON:
        """What trains the job's model."""
        wanted: dict[str, Any] = dict(hyper)
        return IVON.for_lora(job.model, len(job.training_set), steps=job.steps, seed=job.seed, **wanted)

    def watch(self, job: Job, found: IVON) -> Callable[[int], None]:
        """What is called after every step, with the number of steps done: some ways to train change things then."""
        return lambda step: None


class LeftOut(Samples):
    """Temperatures are those of the training examples, each as if it had been left out: no validation split is used."""

    scaled = True

    def calibration(self, job: Job, state: State, hyper: Hyper, validation: EncodedExamples) -> tuple[Tensor, Tensor]:
        batches = job.batches(job.training_set, STACKED_BATCH)
        inputs = ({**batch.inputs, "labels": batch.labels} for batch in batches)
        found = posterior_of(job, state, hyper).leave_one_out(
            job.model, inputs, samples=job.samples, score=job.scorer.score, keep_samples=True, progress=False
        )
        assert found.sample_probabilities is not None and found.labels is not None
        return found.sample_probabilities, found.labels


class AtRate(ForLora):
    """Trained with what :meth:`IVON.for_lora` makes of the learning rate that was chosen for AdamW."""

    def optimizer(self, job: Job, hyper: Hyper) -> IVON:
        return super().optimizer(job, {"learning_rate": hyper["lr"]})


class Frozen(Samples):
    """The Hessian stays what it starts as."""

    def train(self, job: Job, hyper: Hyper) -> State:
        return super().train(job, {**hyper, "beta2": FROZEN})


class ScaledSamples(TemperatureScaling):
    """Samples are averaged first, and then one number divides the logs of the average."""

    sampling = True

    def logs(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        return predict_each(job, posterior_of(job, state, hyper), examples, job.samples).mean(0).log()


class Pruned(Method):
    """At a mean in which the given fraction of the weights, those with the smallest ``|mean| / sigma``, is 0."""

    def each(self, job: Job, state: State, hyper: Hyper, examples: EncodedExamples) -> Tensor:
        return predict_each(job, posterior_of(job, state, hyper).pruned(hyper["pruned"]), examples, 0)


# The clip binds, so that a step is at most lr times its radius of 1e-3; the rest is as published.
_PUBLISHED = tuple({"lr": lr, "ess": 1e6, "hess_init": 1e-3} for lr in (1.0, 2.0, 4.0, 0.5))
# From `python -m benchmarks recipe` on the validation split of vader_nyt: 45 trials instead of the four that every
# method may have. The first has almost no noise and a small initial Hessian, which grows to each weight's scale of
# gradients, as in Adam. The second has a large one, which bounds fewer steps, and wants warmer samples.
_ADAPTIVE = {"lr": 1.8, "ess": 3.2e8, "hess_init": 2.2e-4, "beta2": 0.999}
_WARM = {"lr": 1.5, "ess": 3.2e5, "hess_init": 0.04, "beta2": 0.999}
# From eight runs of 240 steps on the same split, in which AdamW becomes overconfident: noise as large as what the
# weights move by (sigma 0.06), so that the mean has to lie in a wide valley. Too much noise for 60 steps.
_LONG = {"lr": 1.0, "ess": 6.9e3, "hess_init": 0.04, "beta2": 0.999}
# Around the rule of `for_lora`, which is the first: less and more noise for its step, and larger and smaller steps.
_RULED = (
    {"learning_rate": 1e-3},
    {"learning_rate": 1e-3, "sigma": 0.03},
    {"learning_rate": 2e-3, "sigma": 0.05},
    {"learning_rate": 5e-4, "sigma": 0.03},
)
_TEMPERATURES = tuple({"temperature": value} for value in (1.0, 0.3, 0.1, 3.0))
_SHARES = tuple({"pruned": share} for share in (0.1, 0.3, 0.5, 0.7))
_PAPER = "Cong et al. 2024, arXiv 2411.04421"
_TEMPERED = "ivon_kernels.posterior.Posterior.tempered"
_SCALED = "Rahaman and Thiery, NeurIPS 2021, arXiv 2007.08792 (pool, then calibrate)"
_AT_RATE = "docs/recipe.md: at the learning rate that AdamW has"
_FOR_LORA, _TUNED = "docs/recipe.md: nothing is chosen", "docs/recipe.md: learning rate and sigma chosen of four"
_PAIRS = "antithetic variates: Hammersley and Morton 1956; ivon_kernels.noise.antithetic"
_LEFT_OUT = "Nickl et al., NeurIPS 2023, arXiv 2310.19273; docs/wrong-labels.md"
_RECIPE, _EPOCHS = "benchmarks/results/recipe", "benchmarks/quality/README.md"

METHODS = (
    Ivon("ivon", "IVON, mean", f"{_PAPER}; Shen et al., ICML 2024, arXiv 2402.17641", candidates=_PUBLISHED),
    Samples("ivon_samples", "IVON, samples", f"{_PAPER}, section 3", base="ivon"),
    Samples("ivon_tempered", "IVON, tempered samples", _TEMPERED, base="ivon", dials=_TEMPERATURES),
    ScaledSamples("ivon_samples_scaled", "IVON, scaled samples", _SCALED, base="ivon"),
    Pruned("ivon_pruned", "IVON, pruned mean", "arXiv 2506.14280", base="ivon", dials=_SHARES),
    Frozen(
        "ivon_frozen",
        "IVON, Hessian frozen, samples",
        "beta2 so close to 1 that the Hessian is never updated",
        ablation=True,
        candidates=_PUBLISHED,
    ),
    Ivon("ivon_adaptive", "IVON, recipe: mean", _RECIPE, candidates=(_ADAPTIVE,)),
    Samples("ivon_warm", "IVON, recipe: tempered samples", _RECIPE, candidates=(_WARM,), dials=_TEMPERATURES),
    Ivon("ivon_long", "IVON, many epochs: mean", _EPOCHS, candidates=(_LONG,)),
    Samples("ivon_long_samples", "IVON, many epochs: samples", f"{_PAPER}, section 3", base="ivon_long"),
    Samples(
        "ivon_long_tempered", "IVON, many epochs: tempered samples", _TEMPERED, base="ivon_long", dials=_TEMPERATURES
    ),
    ForLora("ivon_for_lora", "IVON for_lora, samples", _FOR_LORA),
    Pairs("ivon_for_lora_pairs", "IVON for_lora, pairs of samples", _PAIRS, base="ivon_for_lora"),
    LeftOut("ivon_for_lora_left_out", "IVON for_lora, scaled by examples left out", _LEFT_OUT, base="ivon_for_lora"),
    Ivon("ivon_for_lora_mean", "IVON for_lora, mean", _FOR_LORA, base="ivon_for_lora"),
    AtRate("ivon_adamw_rate", "IVON for_lora, AdamW's rate, samples", _AT_RATE, like="adamw"),
    Ivon("ivon_adamw_rate_mean", "IVON for_lora, AdamW's rate, mean", _AT_RATE, base="ivon_adamw_rate"),
    ForLora("ivon_tuned", "IVON tuned, samples", _TUNED, candidates=_RULED),
    Ivon("ivon_tuned_mean", "IVON tuned, mean", _TUNED, base="ivon_tuned"),
    TemperatureScaling("ivon_long_scaled", "IVON, many epochs: scaled mean", TEMPERATURE, base="ivon_long"),
)
