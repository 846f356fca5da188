"""`IVON.check()`: a sentence, with numbers and remedy, for each mistake; none for a run that is well."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivon_kernels import IVON
from ivon_kernels.training.advice import Advice, IVONWarning, told_another_size, warn_once
from tests.support.helpers import parameters

PUBLISHED: dict[str, Any] = {
    "ess": 1e7,
    "hess_init": 1e-3,
    "clip_radius": 1e-3,
    "weight_decay": 1e-6,
    "rescale_lr": False,
}
"""Of the recipe for LoRA, but for the learning rate: sigma 0.01, and every step is of lr * 1e-3."""


def network() -> nn.Sequential:
    """Weights of about 0.06."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(400, 64, generator=generator)
    return inputs, inputs[:, :10].argmax(-1)


def learn(optimizer: IVON, model: nn.Module, steps: int) -> None:
    inputs, labels = data()
    for step in range(steps):
        batch = torch.arange(32 * step, 32 * step + 32) % 400
        optimizer.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()


def said_of(
    steps: int, *, quiet: bool = True, whole: int | None = None, num_data: int | None = None, **options: Any
) -> list[str]:
    """What is said after some steps of a run."""
    model = network()
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", IVONWarning)
        optimizer = IVON(model.named_parameters(), seed=1, **options)
    learn(optimizer, model, steps)
    return optimizer.check(steps=whole, num_data=num_data)


def only(sentences: list[str]) -> str:
    (sentence,) = sentences
    return sentence


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "ess": 400.0},
        {"lr": 1.0, **PUBLISHED},
        {"lr": 1.0, "ess": 6.9e3, "hess_init": 0.04, "beta2": 0.999, "clip_radius": 1e-3, "rescale_lr": False},
    ],
    ids=["defaults", "published", "wide"],
)
def test_a_good_run_gets_no_sentence(options: dict[str, Any]) -> None:
    assert said_of(10, whole=100, num_data=400, **options) == []
    assert said_of(100, whole=100, num_data=400, **options) == []


def test_adamws_settings() -> None:
    """``lr=1e-3, ess=1`` is said when the optimizer is built."""
    with pytest.warns(
        IVONWarning, match=r"sigma is 1, \d\d times the size of the weights \(0.0\d+\).* raise ess from 1"
    ):
        IVON(network().parameters(), lr=1e-3, ess=1.0)
    assert "raise ess from 1 to about" in only(said_of(10, whole=100, lr=1e-3, ess=1.0))


def test_what_is_said_at_construction_is_not_said_again() -> None:
    with pytest.warns(IVONWarning):
        optimizer = IVON(network().parameters(), lr=1e-3, ess=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (sentence,) = optimizer.check()
        warn_once(optimizer.advised, [sentence])  # type: ignore[list-item]
        copied = copy.deepcopy(optimizer)
        assert copied.advised == optimizer.advised


def test_sigma_of_loras_matrices_may_be_larger_than_they_are() -> None:
    """B is zero at first, so the size is A's; without PEFT's names they are known by their rank."""
    a, b = nn.Parameter(torch.randn(4, 64) * 0.02), nn.Parameter(torch.zeros(64, 4))
    settings: dict[str, Any] = {"lr": 1.0, "hess_init": 0.04, "weight_decay": 0.0}
    for params in ([a, b], [("layer.lora_A.weight", a), ("layer.lora_B.weight", b)]):
        assert IVON(params, ess=1 / (0.06**2 * 0.04), **settings).check() == []
        with pytest.warns(IVONWarning, match="times the size of the weights"):
            IVON(params, ess=1 / (0.3**2 * 0.04), **settings)
    whole = IVON([nn.Parameter(torch.randn(30, 64) * 0.02)], ess=1 / (0.06**2 * 0.04), **settings)
    assert "sigma is 0.06, 3 times" in only(whole.check())


def test_noise_that_is_too_small_to_matter() -> None:
    """As with a hundred times too many examples, or more."""
    sentence = only(said_of(10, lr=0.1, ess=4e6, num_data=400))
    assert "sigma is 0.0005" in sentence and "agree with the mean" in sentence and "lower ess from 4e+06" in sentence
    assert "examples is 400" in sentence


def test_ess_below_the_number_of_examples() -> None:
    sentence = only(said_of(10, lr=0.1, ess=400.0, num_data=60_000))
    assert "ess=400 is less than the 60000 training examples" in sentence and "ess=60000 or more" in sentence
    model = network()
    optimizer = IVON(model.parameters(), lr=0.1, ess=400.0)
    optimizer.param_groups[0]["num_data"] = 60_000
    assert "ess=60000 or more" in only(optimizer.check())


def test_another_number_of_examples() -> None:
    assert told_another_size(400, 400) is None and told_another_size(400, 800) is None
    sentence = told_another_size(40_000, 400)
    assert sentence == (
        "IVON was made for num_data=40000, but there are 400 training examples: ess, and with it sigma, is for another "
        "posterior; pass num_data=400"
    )
    optimizer = IVON(network().parameters(), lr=0.1, ess=40_000.0)
    optimizer.param_groups[0]["num_data"] = 40_000
    assert only(optimizer.check(num_data=400)) == sentence


def test_three_steps() -> None:
    before = only(said_of(0, whole=3, lr=0.03, **PUBLISHED))
    assert before.startswith(
        "3 steps can move a weight by at most 9e-05 (each by lr * clip_radius = 3e-05), which is 0."
    )
    assert "raise lr from 0.03 to about" in before
    after = only(said_of(3, lr=0.03, **PUBLISHED))
    assert after.startswith("3 steps moved the mean by ") and "raise lr from 0.03 to about" in after


def test_three_steps_of_a_good_size_are_too_few() -> None:
    a, b = nn.Parameter(torch.randn(4, 64) * 0.02), nn.Parameter(torch.zeros(64, 4))
    optimizer = IVON([a, b], lr=0.7, **PUBLISHED)
    assert "at most 0.0021" in only(optimizer.check(steps=3)) and "train for about" in only(optimizer.check(steps=3))
    assert optimizer.check(steps=300) == []


@pytest.mark.parametrize("clipped", [False, True])
def test_lr_a_thousand_times_too_small(clipped: bool) -> None:
    options: dict[str, Any] = {"lr": 1e-3, **PUBLISHED} if clipped else {"lr": 1e-4, "ess": 400.0}
    early, late = only(said_of(10, whole=60, **options)), only(said_of(60, whole=60, **options))
    for sentence in (early, late):
        wanted = float(sentence.split("to about ")[1].split()[0].rstrip(","))
        assert f"raise lr from {options['lr']:g}" in sentence and 50 <= wanted / options["lr"] <= 3000
    assert clipped or early.startswith("10 steps of 60 moved the mean by ")


def test_a_learning_rate_of_zero_is_meant() -> None:
    assert said_of(10, whole=60, lr=0.0, ess=400.0) == []


def test_gradients_that_are_zero() -> None:
    params = parameters(50)
    optimizer = IVON(params, lr=0.1, ess=400.0, weight_decay=0.0)
    for _ in range(3):
        optimizer.train()
        params[0].grad = torch.zeros(50)
        optimizer.step()
    assert "its gradients are 0: see whether the loss depends on these" in only(optimizer.check())


def test_a_clip_radius_that_binds_on_none_is_named() -> None:
    sentence = only(said_of(60, lr=1e-4, ess=400.0, clip_radius=10.0))
    assert "(clip_radius 10 binds on none)" in sentence


def test_a_warm_up_is_not_taken_for_the_whole_run() -> None:
    """After ten steps of a warm-up of 500 the mean has gone a thousandth of its way."""
    model = network()
    optimizer = IVON(model.parameters(), lr=0.3, ess=400.0, seed=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 500))
    for _ in range(10):
        learn(optimizer, model, 1)
        schedule.step()
    assert optimizer.check(steps=1000) == [] and optimizer.check() != []


def test_steps_that_are_too_long() -> None:
    sentence = only(said_of(10, lr=50.0, **PUBLISHED))
    assert "a step moves a weight by about 0.0" in sentence and "lower lr from 50 to about" in sentence


def test_sigma_that_fell() -> None:
    options = {**PUBLISHED, "lr": 1.0, "ess": 1e7, "hess_init": 1e-4, "beta2": 0.9}
    sentence = only(said_of(30, **options))
    assert "sigma fell from 0.031 to " in sentence and "the Hessian grew" in sentence
    words = sentence.replace(",", " ").split()
    hess, ess = (float(next(w for w in words if w.startswith(key)).split("=")[1]) for key in ("hess_init", "ess"))
    assert math.isclose(1 / math.sqrt(hess * ess), 0.031, rel_tol=0.5)  # both are rounded to one digit


def test_a_clip_radius_that_binds_on_all() -> None:
    options = {**PUBLISHED, "lr": 1e-3, "ess": 1e9, "hess_init": 1e-7, "clip_radius": 1.0, "weight_decay": 0.0}
    fell, sentence = said_of(10, **options)
    assert fell.startswith("sigma fell")
    assert "clip_radius=1 binds on 9" in sentence and "raise hess_init from 1e-07 to about" in sentence


def test_a_hessian_that_stands_still() -> None:
    """Where its statistic is what it began with. One that had no time to move is none."""
    params = parameters(50)

    def run(beta2: float, steps: int) -> list[str]:
        params[0].data.normal_(std=0.3)
        optimizer = IVON(params, lr=0.05, ess=1e4, beta2=beta2, weight_decay=0.0, hess_approx="gradsq")
        for _ in range(steps):
            optimizer.train()
            params[0].grad = torch.full((50,), 0.01)  # ess g^2 = 1
            optimizer.step()
        return optimizer.check()

    sentence = only(run(0.99, 120))
    assert "the Hessian is where it began (hess_init=1) after 120 steps, though beta2=0.99 lets it move" in sentence
    assert run(0.99999, 120) == [] and run(0.99, 20) == []


def test_groups_are_named() -> None:
    params = parameters(40, 50)
    optimizer = IVON([{"params": params[:1]}, {"params": params[1:], "ess": 60.0}], lr=0.1, ess=100.0)
    optimizer.param_groups[1]["num_data"] = 1000
    assert only(optimizer.check()).endswith("ess=1000 or more (parameter group 1)")
    assert only(optimizer.check()).about == "ess 1"  # type: ignore[attr-defined]


def test_nothing_is_known_of_nothing() -> None:
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    assert IVON([frozen], lr=0.1, ess=10.0).check(steps=5, num_data=100) == []
    zeros = IVON([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(0))], lr=0.1, ess=10.0)
    assert zeros.check(steps=5, num_data=5) == [] and zeros.glance()["snr"] == 0.0
    assert IVON([frozen], lr=0.1, ess=10.0).glance() == {}


def test_a_loaded_state_is_a_new_beginning() -> None:
    """What was trained before is none of this run, and Accelerate loads a state dict into every optimizer."""
    model = network()
    optimizer = IVON(model.parameters(), lr=0.3, ess=400.0, seed=1)
    learn(optimizer, model, 20)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.check() == []
    optimizer.param_groups[0]["lr"] = 1e-5
    learn(optimizer, model, 5)
    assert only(optimizer.check()).startswith("5 steps moved the mean by")


def test_looking_changes_nothing() -> None:
    model = network()
    optimizer = IVON(model.parameters(), lr=0.3, ess=400.0, seed=1)
    learn(optimizer, model, 2)
    optimizer.train()
    before = [p.clone() for p in model.parameters()]
    optimizer.check(steps=100, num_data=400)
    optimizer.glance()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_glance_is_of_the_medians() -> None:
    model = network()
    optimizer = IVON(model.parameters(), lr=0.3, ess=400.0, seed=1)
    learn(optimizer, model, 20)
    glance, (summary,) = optimizer.glance(), optimizer.diagnostics()
    for key, name in {"sigma": "sigma", "snr": "snr", "hess": "hess_over_init"}.items():
        assert glance[key] == pytest.approx(summary[name][0.5], rel=1e-3)  # of 9,610 elements: the lower of two
    assert glance["clipped"] == summary["clipped"]


def test_a_subsample_is_of_all_rows_and_columns() -> None:
    from ivon_kernels.training.diagnostics import elements

    params = parameters((64, 96), 50, (32, 128))
    optimizer = IVON(params, lr=0.1, ess=100.0)
    states = optimizer._parameters.ordered
    everything = torch.cat([p.detach().flatten() for p in params]).double()
    assert torch.equal(elements(optimizer.param_groups, states).mean, everything)
    some = elements(optimizer.param_groups, states, 1000)
    assert 900 < some.mean.numel() < 1100 and set(some.owner.tolist()) == {0, 1, 2}
    columns = {int((params[0].detach() == value).nonzero()[0, 1]) for value in some.mean[some.owner == 0]}
    assert len(columns) == 96


def test_forgotten_train_and_eval() -> None:
    """Without ``train()`` no step; ``model.eval()`` alone is enough: the weights hold the mean after a step."""
    model = network()
    optimizer = IVON(model.parameters(), lr=0.3, ess=400.0, seed=1)
    learn(optimizer, model, 1)
    model(data()[0]).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"step\(\) without a sample: .* call optimizer.train\(\) before the forward"
    ):
        optimizer.step()
    optimizer.zero_grad()
    learn(optimizer, model, 1)
    model.eval()
    assert not optimizer.holds_sample
    assert all(torch.equal(p, optimizer.mean_of(p)) for p in model.parameters())


def test_advice_can_be_pickled() -> None:
    advice = Advice("a sentence", about="a thing")
    assert pickle.loads(pickle.dumps(advice)) == advice and pickle.loads(pickle.dumps(advice)).about == "a thing"
