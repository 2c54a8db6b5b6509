"""Each check finds its error where it was planted, says where, and is silent on a sound model."""

import math

import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError
from mmemo.diagnostics.pitfalls import (
    hides_nan,
    lengthened,
    memory_growth,
    padding_matters,
    unmoved_parameters,
)
from mmemo.models.base import ConcatFusion, Fused, Multimodal, Project, RegressionHead
from mmemo.models.mult import CrossModalConfig, CrossModalTransformer
from mmemo.training.objectives import mse

WIDTHS = {"text": 7, "audio": 4}


def batch(B=6, seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(T, F):
        return Stream.of(
            torch.randn(B, T, F, generator=g),
            torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=g),
            rate=10,
        )

    return Batch({"text": make(5, 7), "audio": make(9, 4)}, {"y": torch.randn(B, generator=g)})


def network(fusion=None, dropout=0.1):
    torch.manual_seed(1)
    return Multimodal(
        {n: Project(F, 8) for n, F in WIDTHS.items()},
        fusion or ConcatFusion(dict.fromkeys(WIDTHS, 8), 8, dropout),
        {"y": RegressionHead(8)},
    )


class Careless(nn.Module):
    "Means over every step, the padding too."

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 8)

    def forward(self, streams):
        return Fused(self.mix(torch.cat([s.x.mean(1) for s in streams.values()], 1)))


class Partial(nn.Module):
    "One layer that nothing uses, one whose output is multiplied by 0."

    def __init__(self):
        super().__init__()
        self.mix, self.unused, self.silent = nn.Linear(16, 8), nn.Linear(3, 2), nn.Linear(16, 8)

    def forward(self, streams):
        z = torch.cat([masked_mean(s.x, s.mask) for s in streams.values()], 1)
        return Fused(self.mix(z) + 0 * self.silent(z))


# ------------------------------------------------------------------ every parameter moves
def test_a_sound_model_moves_everywhere_and_is_left_alone():
    model, data = network(), batch()
    before, noise = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    model.heads.eval()
    assert unmoved_parameters(model, mse("y"), data) == {}
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(noise, torch.get_rng_state()) and model.training and not model.heads.training


def test_parameters_that_get_no_gradient_are_named_with_their_reason():
    found = unmoved_parameters(network(Partial()), mse("y"), batch())
    assert found == {
        "fusion.unused.weight": "no gradient: the loss does not depend on it",
        "fusion.unused.bias": "no gradient: the loss does not depend on it",
        "fusion.silent.weight": "its gradient is 0",
        "fusion.silent.bias": "its gradient is 0",
    }


def test_parameters_that_an_optimiser_was_not_given_are_named():
    data = batch()

    def train(model):
        parameters = list(model.parameters())
        optimiser = torch.optim.SGD(parameters[:3] + parameters[5:], lr=0.1)
        mse("y")(model(data), data)["loss"].backward()
        optimiser.step()

    model = network()
    names = [n for n, _ in model.named_parameters()][3:5]
    assert unmoved_parameters(model, mse("y"), data, train) == dict.fromkeys(
        names, "it has a gradient, but nothing moves it"
    )


def test_frozen_parameters_are_not_complained_of():
    model = network()
    model.encoders["text"].requires_grad_(False)
    assert unmoved_parameters(model, mse("y"), batch()) == {}


# ------------------------------------------------------------------ padding
def test_longer_adds_steps_that_are_not_real():
    s = batch().streams["audio"]
    found = lengthened(s, 3, 1.0)
    assert (
        found.x.shape == (6, 12, 4)
        and torch.equal(found.mask.sum(1), s.mask.sum(1))
        and found.x[:, 9:].eq(1).all()
        and torch.equal(found.x[:, :9], s.x)
    )
    ids = Stream.of(torch.arange(6).view(2, 3), rate=1)
    assert lengthened(ids, 2, 1).x.dtype == ids.x.dtype


def test_padding_matters_where_means_ignore_the_mask():
    data = batch()
    careful, careless = padding_matters(network(), data), padding_matters(network(Careless()), data)
    assert (
        max(careful.values()) < 1e-5
        and min(careless.values()) > 0.01
        and set(careful) == set(WIDTHS)
    )
    model = network(Careless()).eval()
    want = (
        (
            model(data.replace(audio=lengthened(data.streams["audio"], 2, 0))).predictions["y"]
            - model(data).predictions["y"]
        )
        .abs()
        .max()
    )
    assert padding_matters(model, data, by=2)["audio"] >= want > 0 and not model.training


def test_a_prediction_that_becomes_nan_moves_infinitely():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 8)

        def forward(self, streams):
            return Fused(
                self.mix(torch.cat([s.x.mean(1) for s in streams.values()], 1))
                / (0.0 if streams["audio"].steps > 9 else 1.0)
                * 0
            )

    found = padding_matters(network(Odd()), batch())
    assert found["audio"] == math.inf and found["text"] == 0
    with pytest.raises(ConfigError, match="by=0 cannot be"):
        padding_matters(network(), batch(), 0)


# ------------------------------------------------------------------ memory
def loop(keep, dropout=0.1):
    model, data, kept = network(dropout=dropout), batch(), []
    optimiser = torch.optim.Adam(model.parameters())

    def step():
        output = model(data).predictions["y"]
        (output - data.targets["y"]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        keep(kept, output)

    return step


def test_memory_of_a_sound_loop_is_flat():
    assert memory_growth(loop(lambda kept, output: kept.append(float(output.mean().detach())))) == (
        0,
        0,
    )


def test_memory_grows_by_what_is_kept():
    assert memory_growth(loop(lambda kept, output: kept.append(output.detach())), steps=5) == (
        6 * 4,
        0,
    )
    held = []
    x = torch.randn(10, 10, requires_grad=True)
    # exp is held for a backward pass that never comes, and the sum
    assert memory_growth(lambda: held.append((x.exp() * 2).sum())) == (10 * 10 * 4 + 4, 3)


def test_an_output_that_is_kept_keeps_the_graph_behind_it():
    "After the backward pass no tensor but the output is left; the nodes are."
    growth = memory_growth(loop(lambda kept, output: kept.append(output)))
    assert growth.bytes == 6 * 4 and growth.nodes > 10


def test_growth_needs_two_steps():
    with pytest.raises(ConfigError, match="steps=1"):
        memory_growth(lambda: None, 1)


# ------------------------------------------------------------------ NaN
def test_which_metrics_hide_nan():
    predictions, targets = {"y": torch.randn(20)}, {"y": torch.randn(20)}

    def sign(p, t):
        return ((p["y"] > 0) == (t["y"] > 0)).float().mean()

    def mended(p, t):
        return (p["y"].nan_to_num() - t["y"]).abs().mean()

    def plain(p, t):
        return (p["y"] - t["y"]).abs().mean()

    def strict(p, t):
        if not p["y"].isfinite().all():
            raise ValueError("NaN")
        return 0.0

    assert hides_nan(sign, predictions, targets) == pytest.approx(
        float((targets["y"] <= 0).float().mean())
    )
    assert hides_nan(mended, predictions, targets) == pytest.approx(
        float(targets["y"].abs().mean())
    )
    assert (
        hides_nan(plain, predictions, targets) is None
        and hides_nan(strict, predictions, targets) is None
    )


# ------------------------------------------------------------------ all together
def wrong_with(model, data, metrics=None):
    "What the four checks find: names of parameters, streams and metrics, and memory that grows."
    found = {f"parameter {n}" for n in unmoved_parameters(model, mse("y"), data)}
    spread = float(model.eval()(data).predictions["y"].detach().std())
    moved = padding_matters(model, data)
    found |= {f"stream {n}" for n, gap in moved.items() if gap > 1e-3 * spread + 1e-6}
    model.train()

    def step():
        mse("y")(model(data), data)["loss"].backward()
        model.zero_grad()

    if any(memory_growth(step)):
        found.add("memory")
    predictions = model.eval()(data).predictions
    for name, metric in (metrics or {}).items():
        if hides_nan(metric, predictions, data.targets) is not None:
            found.add(f"metric {name}")
    return found


def test_all_checks_of_sound_and_broken_models():
    data = batch()
    metrics = {
        "sign": lambda p, t: ((p["y"] > 0) == (t["y"] > 0)).float().mean(),
        "mae": lambda p, t: (p["y"] - t["y"]).abs().mean(),
    }
    assert wrong_with(network(), data) == set()
    torch.manual_seed(0)
    transformer = Multimodal(
        {n: nn.Identity() for n in WIDTHS},
        CrossModalTransformer(WIDTHS, 8, CrossModalConfig(2, 1)),
        {"y": RegressionHead(16)},
    )
    assert wrong_with(transformer, data) == set()
    found = wrong_with(network(Careless()), data, metrics)
    assert found == {"stream text", "stream audio", "metric sign"}
    assert "parameter fusion.unused.bias" in wrong_with(network(Partial()), data)


def test_a_model_that_collects_grows():
    class Collects(ConcatFusion):
        def __init__(self):
            super().__init__(dict.fromkeys(WIDTHS, 8), 8)
            self.seen = []

        def forward(self, streams):
            fused = super().forward(streams)
            self.seen.append(fused.vector)
            return fused

    assert "memory" in wrong_with(network(Collects()), batch())
