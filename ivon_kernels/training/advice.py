"""What is wrong with a run, in sentences: settings that cannot work, and training that changes nothing.

Every sentence says what is wrong, the numbers, and the remedy. The limits are wide: a run without a sentence may still
be a poor one, but one with a sentence is not what its user wants. They come from these:

- Networks train with steps of 0.1% to 5% of their weights' size (AdamW's, at most about its learning rate: 3e-3 on
  weights of 0.06, 1e-4 to 1e-3 on LoRA's A of 0.024), and break from there on. SmolLM2 with LoRA stands steps of 4.2%
  and falls to the majority class with 5.4% (docs/recipe.md).
- LoRA's samples are good with a sigma of 1 to 4 times the size of A (benchmarks/quality), because B is small; the
  samples of other networks are noise before sigma reaches their weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ivon_kernels.backends.state import ParamState
from ivon_kernels.hyperparameters import first_sigma, highest_lr, lr_factor
from ivon_kernels.training import diagnostics
from ivon_kernels.training.diagnostics import Elements

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Advice", "Beginning", "IVONWarning", "advise", "advise_at_once", "told_another_size", "warn_once"]

WIDE, WIDE_ADAPTER = 2.0, 8.0  # sigma, in sizes of the weights
NARROW = 0.01
FELL = 3.0  # how many times smaller sigma is than at the beginning
SHORT, SHORT_ADAPTER = 0.02, 0.25  # how far a run has to be able to go, in sizes of the weights
UNMOVED, UNMOVED_SURELY = 0.01, 0.001
LONG_STEP, LONG_STEP_ADAPTER, GOOD_STEP = 0.1, 0.054, 0.03
STOOD_STILL, STILL_STEPS, COULD_MOVE = 1e-3, 100, 0.05  # of the Hessian, over its initial value
BINDS, ON_ALL, TIMES = 0.1, 0.95, 10.0  # a clip radius that is not that of a recipe, where it binds, and by how much
WRONG_SIZE = 10.0
_REMEMBERED = 2**12  # elements of each group
_SUMMARIZED = 2**16

_Groups = Sequence[dict[str, Any]]


class IVONWarning(UserWarning):
    """Advice on a run with IVON."""


class Advice(str):
    """A sentence.

    Attributes:
        about: What it is about: the same for the same thing said again with other numbers.
    """

    about: str

    def __new__(cls, text: str, about: str = "") -> Self:
        self = super().__new__(cls, text)
        self.about = about
        return self


def warn_once(said: set[str], sentences: Iterable[Advice], *, stacklevel: int = 1) -> None:
    """Warn of what was not said before, and remember it.

    Args:
        said: What it was about.
        sentences: What there is to say.
        stacklevel: As for ``warnings.warn``; 1 is whoever calls this.
    """
    for sentence in sentences:
        if sentence.about not in said:
            said.add(sentence.about)
            warnings.warn(sentence, IVONWarning, stacklevel=stacklevel + 1)


class Beginning:
    """Where each group's mean was when the optimizer was built or loaded: 4,096 of its elements, on the CPU.

    Only the difference tells what training did: momentum and learning rate are those of the last step.
    """

    def __init__(self) -> None:
        self._places: dict[int, tuple[list[int], int, Tensor]] = {}

    def remember(self, groups: _Groups, states: Sequence[ParamState]) -> None:
        """Note where the groups are now."""
        self._places = {
            number: (_sizes(own), _steps(own), _look(groups, own).mean)
            for number, _, own in _each_group(groups, states)
        }

    def moved(self, number: int, groups: _Groups, states: Sequence[ParamState]) -> tuple[float, int] | None:
        """How far a group's elements have gone since, as a root mean square, and in how many steps.

        None where that is not known: the group has other parameters now.
        """
        sizes, steps, before = self._places.get(number, ([], 0, None))
        taken = _steps(states) - steps
        if before is None or sizes != _sizes(states) or taken <= 0:
            return None
        return math.sqrt(float((_look(groups, states).mean - before).square().mean())), taken


def _sizes(states: Sequence[ParamState]) -> list[int]:
    return [state.param.numel() for state in states]


def _steps(states: Sequence[ParamState]) -> int:
    return max(int(arena.steps.max()) for arena in {state.arena for state in states})


class _Facts(NamedTuple):
    """What the sentences about one parameter group are made of."""

    number: int
    which: str  # group, where there are several
    group: Mapping[str, Any]
    adapter: bool
    sigma: float  # median
    weights: float  # root mean square; nan where all are 0
    taken: int = 0  # steps
    summary: Mapping[str, Any] = {}
    moved: tuple[float, int] | None = None  # root mean square, and in how many steps
    steps: int | None = None  # of the whole run
    num_data: float | None = None

    @property
    def lr(self) -> float:
        """What a direction is multiplied by at the schedule's height: torch's schedules note what they start from."""
        return self.height * lr_factor(self.group)

    @property
    def height(self) -> float:
        """The same as the user sets it."""
        return highest_lr(self.group)

    @property
    def first_sigma(self) -> float:
        """Of every weight, before the first step."""
        return first_sigma(self.group)

    @property
    def hess_init(self) -> float:
        """The initial Hessian."""
        return float(self.group["hess_init"])

    def say(self, about: str, text: str) -> Advice:
        """A sentence about this group."""
        return Advice(f"{text}{self.which}", about=f"{about} {self.number}")


def _look(groups: _Groups, states: Sequence[ParamState]) -> Elements:
    return diagnostics.elements(groups, states, _REMEMBERED)


def _each_group(groups: _Groups, states: Sequence[ParamState]) -> Iterator[tuple[int, str, list[ParamState]]]:
    """The groups that have elements: number, how a sentence ends, states."""
    for number in range(len(groups)):
        own = [state for state in states if state.group == number and state.param.numel()]
        if own:
            yield number, f" (parameter group {number})" if len(groups) > 1 else "", own


def advise_at_once(groups: _Groups, states: Sequence[ParamState]) -> Iterator[Advice]:
    """What is certain before the first step: noise that drowns the weights."""
    for number, which, own in _each_group(groups, states):
        found = _look(groups, own)
        sigma, weights = float(found.sigma.median()), diagnostics.root_mean_square(found)
        facts = _Facts(number, which, groups[number], adapter=_is_adapter(own), sigma=sigma, weights=weights)
        # Only what no kind of network bears: a warning here is seen by all.
        if sigma > WIDE_ADAPTER * weights and (said := _wide(facts)):
            yield said


def advise(
    groups: _Groups,
    states: Sequence[ParamState],
    beginning: Beginning,
    *,
    steps: int | None = None,
    num_data: float | None = None,
) -> Iterator[Advice]:
    """All there is to say; see :meth:`ivon_kernels.IVON.check`."""
    for number, which, own in _each_group(groups, states):
        group, summary = groups[number], diagnostics.summarize(groups, own, _SUMMARIZED)
        told = group.get("num_data")
        if told is not None and num_data is not None and (said := told_another_size(told, num_data)):
            yield said
        facts = _Facts(
            number,
            which,
            group,
            adapter=_is_adapter(own),
            sigma=summary["sigma"][0.5],
            weights=summary["weights"],
            taken=summary["steps"],
            summary=summary,
            moved=beginning.moved(number, groups, own),
            steps=steps,
            num_data=told if num_data is None else num_data,
        )
        yield from (said for rule in _RULES if (said := rule(facts)))


def _is_adapter(states: Sequence[ParamState]) -> bool:
    """Whether these are LoRA's pairs of matrices: by PEFT's names, or by one small rank that all of them share."""
    if any("lora_" in state.name for state in states):
        return True
    shapes = [tuple(state.param.shape) for state in states]
    if not all(len(shape) == 2 and max(shape) >= 4 * min(shape) for shape in shapes):
        return False
    down = sum(shape[0] < shape[1] for shape in shapes)
    return len({min(shape) for shape in shapes}) == 1 and 2 * down == len(shapes)


def told_another_size(told: float, found: float) -> Advice | None:
    """Where an optimizer was made for a number of examples that is far from that of the training set."""
    if 1 / WRONG_SIZE < float(told) / max(float(found), 1.0) < WRONG_SIZE:
        return None
    return Advice(
        f"IVON was made for num_data={float(told):g}, but there are {float(found):g} training examples: ess, and with "
        f"it sigma, is for another posterior; pass num_data={float(found):g}",
        about="num_data",
    )


# ---- the rules: each looks at the facts of one group -----------------------------------------------------------------


def _wide(facts: _Facts) -> Advice | None:
    """Samples are noise."""
    if not facts.sigma > (WIDE_ADAPTER if facts.adapter else WIDE) * facts.weights:
        return None
    good = facts.weights if facts.adapter else facts.weights / 4
    ess = float(facts.group["ess"])
    return facts.say(
        "sigma",
        f"sigma is {facts.sigma:.2g}, {facts.sigma / facts.weights:.2g} times the size of the weights "
        f"({facts.weights:.2g}), so that samples of them are noise: sigma = 1 / sqrt(ess * (hess + weight_decay)), so "
        f"raise ess from {ess:g} to about {ess * (facts.sigma / good) ** 2:.1g} (it is the number of training examples "
        "or more)",
    )


def _narrow(facts: _Facts) -> Advice | None:
    """Samples are the mean."""
    if not facts.sigma < NARROW * facts.weights or facts.first_sigma > FELL * facts.sigma:
        return None
    ess = float(facts.group["ess"])
    data = "" if facts.num_data is None else f"; the number of training examples is {facts.num_data:g}"
    return facts.say(
        "sigma",
        f"sigma is {facts.sigma:.2g}, {facts.sigma / facts.weights:.2g} of the size of the weights "
        f"({facts.weights:.2g}), so that its samples agree with the mean: for samples that disagree lower ess from "
        f"{ess:g} to about {ess * (facts.sigma / (0.1 * facts.weights)) ** 2:.1g}, or hess_init{data}",
    )


def _fell(facts: _Facts) -> Advice | None:
    """The trap in which a run overfits as without noise."""
    if not facts.taken or facts.first_sigma < FELL * facts.sigma:
        return None
    growth = facts.summary["hess_over_init"][0.5]
    hess = facts.hess_init * growth
    return facts.say(
        "sigma fell",
        f"sigma fell from {facts.first_sigma:.2g} to {facts.sigma:.2g}, because the Hessian grew {growth:.2g} times: "
        "the noise vanishes, and the run overfits as one without it. Begin with the Hessian where it ends and the same "
        f"sigma, hess_init={hess:.1g} and ess={facts.first_sigma**-2 / hess:.1g}, or let it move less, with beta2 "
        f"nearer to 1 than {float(facts.group['beta2']):g}",
    )


def _movement(facts: _Facts) -> Advice | None:
    """The run ends where it began."""
    if not facts.weights > 0 or not facts.height:  # with a learning rate of 0 nobody wants any
        return None
    return _short(facts) or _unmoved(facts)


def _short(facts: _Facts) -> Advice | None:
    """What a clipped run of this length cannot exceed."""
    step = facts.lr * float(facts.group["clip_radius"])
    wanted = (SHORT_ADAPTER if facts.adapter else SHORT) * facts.weights
    if facts.steps is None or not step * facts.steps < wanted:
        return None
    reach = step * facts.steps
    return facts.say(
        "movement",
        f"{_steps_in_words(facts.steps)} can move a weight by at most {reach:.2g} (each by lr * clip_radius = "
        f"{step:.2g}), which is {reach / facts.weights:.1%} of the weights' size ({facts.weights:.2g}): "
        f"{_faster(facts, step, 4 * wanted)}",
    )


def _unmoved(facts: _Facts) -> Advice | None:
    """What a run has done, or would do if it went on in this way."""
    if facts.moved is None:
        return None
    moved, taken = facts.moved
    going, of = moved, ""
    if facts.steps is not None and facts.steps > facts.taken:
        now = max(float(facts.group["lr"]), 1e-30)
        going *= facts.steps / taken * facts.height / now  # a warm-up is on its way
        of = f" of {facts.steps}"
    size = going / facts.weights
    if not (size < UNMOVED_SURELY or (size < UNMOVED and going < facts.sigma)):
        return None
    step = facts.lr * facts.summary["step"]
    clip = float(facts.group["clip_radius"])
    unbound = math.isfinite(clip) and not facts.summary["clipped"]
    none = f" (clip_radius {clip:g} binds on none)" if unbound else ""
    return facts.say(
        "movement",
        f"{_steps_in_words(taken, of)} moved the mean by {moved:.2g}, {moved / facts.weights:.2g} of the weights' "
        f"size ({facts.weights:.2g}), while sigma is {facts.sigma:.2g}: hardly anything was learned; a step moves a "
        f"weight by about {step:.2g}{none}: {_faster(facts, step, 0.1 * facts.weights)}",
    )


def _steps_in_words(steps: int, of: str = "") -> str:
    return f"{steps} step{'s' if steps > 1 else ''}{of}"


def _faster(facts: _Facts, step: float, wanted: float) -> str:
    """How a run comes to go as far as `wanted`: steps of at most 3% of the weights, and as many as that takes."""
    steps = facts.steps or facts.taken
    if step <= 0.0:
        return "its gradients are 0: see whether the loss depends on these parameters"
    longer = min(GOOD_STEP * facts.weights, max(step, wanted / steps))
    remedies = []
    if longer > 1.5 * step:
        remedies.append(f"raise {_rate(facts, longer / step)}")
    if wanted > 1.5 * longer * steps:
        remedies.append(f"train for about {float(f'{wanted / longer:.1g}'):g} steps")
    return " and ".join(remedies) or f"raise {_rate(facts, 2.0)}, or train for longer"


def _rate(facts: _Facts, factor: float) -> str:
    """Another learning rate, also for who gave AdamW's (`learning_rate`) to be translated."""
    return (
        f"lr from {facts.height:g} to about {facts.height * factor:.1g} (or the learning_rate that it was made from, "
        f"{factor:.1g} times)"
    )


def _long_steps(facts: _Facts) -> Advice | None:
    """The run diverges."""
    if not facts.taken:
        return None
    step = facts.lr * facts.summary["step"]
    if not step > (LONG_STEP_ADAPTER if facts.adapter else LONG_STEP) * facts.weights:
        return None
    return facts.say(
        "step",
        f"a step moves a weight by about {step:.2g}, {step / facts.weights:.0%} of the weights' size "
        f"({facts.weights:.2g}), and training breaks off somewhere above 5%: lower "
        f"{_rate(facts, GOOD_STEP * facts.weights / step)}",
    )


def _clip(facts: _Facts) -> Advice | None:
    """Every step is one of sign descent, where the user has not chosen that with a small radius."""
    clip = float(facts.group["clip_radius"])
    if not facts.taken or not BINDS <= clip < math.inf or facts.summary["clipped"] < ON_ALL:
        return None
    times = facts.summary["direction"][0.5] / clip
    if times < TIMES:
        return None
    return facts.say(
        "clip",
        f"clip_radius={clip:g} binds on {facts.summary['clipped']:.0%} of the weights, whose directions are "
        f"{times:.2g} times as long in the median: every step is lr * clip_radius, whatever the gradient. "
        f"The Hessian is far below the gradients: raise hess_init from {facts.hess_init:g} to about "
        f"{facts.hess_init * times:.1g}",
    )


def _still(facts: _Facts) -> Advice | None:
    """A fact."""
    beta2 = float(facts.group["beta2"])
    if facts.taken < STILL_STEPS or 1 - beta2**facts.taken < COULD_MOVE:
        return None
    if any(abs(ratio - 1) > STOOD_STILL for ratio in facts.summary["hess_over_init"].values()):
        return None
    return facts.say(
        "hess",
        f"the Hessian is where it began (hess_init={facts.hess_init:g}) after {facts.taken} steps, though "
        f"beta2={beta2:g} lets it move, so that every weight has the same sigma: see whether the loss depends "
        "on these parameters",
    )


def _warm(facts: _Facts) -> Advice | None:
    """Warmer than Bayes' posterior."""
    ess = float(facts.group["ess"])
    if facts.num_data is None or ess >= facts.num_data * (1 - 1e-6):
        return None
    return facts.say(
        "ess",
        f"ess={ess:g} is less than the {facts.num_data:g} training examples, so that the posterior is warmer than "
        f"Bayes' and sigma {math.sqrt(facts.num_data / ess):.2g} times as wide: ess={facts.num_data:g} or more",
    )


_RULES: tuple[Callable[[_Facts], Advice | None], ...] = (
    _wide,
    _narrow,
    _fell,
    _movement,
    _long_steps,
    _clip,
    _still,
    _warm,
)
