"""Objectives: the values of torch, scipy and the package's own metrics, and no NaN where no target
is known.
"""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import Answer
from torch import nn
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.evaluation.metrics import regression_metrics
from mmemo.training.objectives import ccc, cross_entropy, entropy, mse, rmse


def value_and_slope(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    y.backward()
    return y.item(), x.grad


def said(predictions, targets):
    N = len(next(iter(targets.values())))
    return SimpleNamespace(predictions=predictions), Batch(
        {"audio": Stream.of(torch.zeros(N, 1, 1), rate=1)}, targets
    )


def told(target):
    return said({}, {"y": target})[1]


def loss(objective, prediction, target):
    return objective(*said({"y": prediction}, {"y": target}))["loss"]


def is_nan(x):
    return bool(torch.as_tensor(x).isnan().any())


def test_mse_ignores_unknown_targets():
    prediction = torch.tensor([1.0, 2, 5], requires_grad=True)

    def batch(y):
        return Batch({"audio": Stream.of(torch.zeros(3, 1, 1), rate=1)}, {"y": torch.tensor(y)})

    assert mse("y")(Answer({"y": prediction}), batch([0.0, math.nan, 3.0]))[
        "loss"
    ].item() == pytest.approx((1 + 4) / 2)
    loss = mse("y")(Answer({"y": prediction}), batch([math.nan] * 3))["loss"]
    loss.backward()
    assert loss == 0 and torch.equal(prediction.grad, torch.zeros(3))


@pytest.mark.parametrize(
    "options", [{}, {"weight": torch.tensor([1.0, 2.0, 0.5])}, {"label_smoothing": 0.1}]
)
def test_cross_entropy_is_torchs_and_survives_no_targets(options):
    logits = torch.randn(5, 3, requires_grad=True)

    def batch(y):
        return Batch({"audio": Stream.of(torch.zeros(5, 1, 1), rate=1)}, {"y": torch.tensor(y)})

    found = cross_entropy("y", **options)(Answer({"y": logits}), batch([0, 2, -100, 1, 1]))
    want = nn.functional.cross_entropy(logits, torch.tensor([0, 2, -100, 1, 1]), **options)
    assert found["loss"].item() == pytest.approx(want.item(), rel=1e-6)
    loss = cross_entropy("y", **options)(Answer({"y": logits}), batch([-100] * 5))["loss"]
    loss.backward()
    assert loss == 0 and torch.equal(logits.grad, torch.zeros(5, 3))


def test_ccc():
    def against(target, x):
        return loss(ccc("y"), x, target)

    one, some = torch.ones(4), torch.tensor([1.0, 2, 4, 3])
    for p, t, want in (
        (one, one, 1.0),
        (one, 2 * one, 1.0),
        (one, some, 1.0),
        (some, some, 0.0),
        (-some, some, None),
        (1 + 1e-9 * some, some, 1.0),
    ):
        value, slope = value_and_slope(partial(against, t), p)
        assert (
            slope.isfinite().all()
            and slope.abs().max() < 2
            and (want is None or value == pytest.approx(want, abs=1e-5))
        )
    for known in (0, 1):
        target = torch.where(torch.arange(4) < known, some, math.nan)
        value, slope = value_and_slope(partial(against, target), some)
        assert value == 0 and not slope.any()
    target = torch.cat([some, torch.tensor([math.nan])])
    value, slope = value_and_slope(
        lambda x: loss(ccc("y"), x, target), torch.tensor([2.0, 2, 3, 3, 1e30])
    )
    assert (
        value == pytest.approx(loss(ccc("y"), torch.tensor([2.0, 2, 3, 3]), some).item(), rel=1e-6)
        and slope[4] == 0
    )
    assert is_nan(loss(ccc("y"), torch.tensor([2.0, math.nan, 3, 3]), some)), (
        "a prediction that is NaN is seen"
    )
    half = loss(ccc("y"), (300 * some).half(), 300 * some)
    assert half.dtype == torch.float32 and half.isfinite()


def test_ccc_is_the_metric():
    p, t = torch.randn(23), torch.randn(23) * 3 + 1
    found = ccc("y")(*said({"y": p}, {"y": t}))
    assert found["ccc"].item() == pytest.approx(
        regression_metrics(p, t)["ccc"], rel=1e-5
    ) and found["loss"].item() == pytest.approx(1 - found["ccc"].item(), rel=1e-6)
    slope, step = value_and_slope(lambda x: loss(ccc("y"), x, t), p)[1], 1e-2
    for i in range(3):
        nudge = step * F.one_hot(torch.tensor(i), 23)
        assert float(loss(ccc("y"), p + nudge, t) - loss(ccc("y"), p - nudge, t)) / (
            2 * step
        ) == pytest.approx(slope[i].item(), abs=2e-4)


def test_entropy():
    from scipy.stats import entropy as scipys

    p = torch.softmax(torch.randn(5, 7), -1)
    assert np.allclose(entropy(p).numpy(), scipys(p.numpy(), axis=-1), atol=1e-6)
    value, slope = value_and_slope(
        lambda x: entropy(x).sum(), torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    )
    assert value == pytest.approx(math.log(2)) and slope.isfinite().all()


# --- shapes and kinds of what is compared


@pytest.mark.parametrize("make", [mse, rmse, ccc])
@pytest.mark.parametrize(("said", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (3,))])
def test_nothing_is_broadcast(make, said, target):
    "A column against a row would be a table, and its mean a number that means nothing."
    with pytest.raises(ShapeError, match=r"\[B\]"):
        make("y")(Answer({"y": torch.zeros(said)}), told(torch.zeros(target)))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_class_labels_of_any_type_are_taken(kind):
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    wanted = cross_entropy("y")(Answer({"y": logits}), told(labels))
    found = cross_entropy("y")(Answer({"y": logits}), told(labels.to(kind)))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_label_that_is_nan_is_not_known():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 1, 1])
    coded = labels.float().masked_fill(labels < 0, torch.nan)
    wanted = cross_entropy("y")(Answer({"y": logits}), told(labels))["loss"]
    assert torch.equal(cross_entropy("y")(Answer({"y": logits}), told(coded))["loss"], wanted)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, -1], "item 2 is -1; there are 3 classes: a label is 0 to 2, or -100"),
        ([0, 3, 1], "item 1 is 3; there are 3 classes"),
        ([0.5, 1.0, 2.0], "item 0 is 0.5; there are 3 classes"),
        ([0.0, torch.inf, 2.0], "item 1 is inf; there are 3 classes"),
    ],
)
def test_what_cannot_be_a_label_is_one_error(labels, said):
    with pytest.raises(DataError, match=said):
        cross_entropy("y")(Answer({"y": torch.zeros(3, 3)}), told(torch.tensor(labels)))


def test_what_is_not_there_is_named_with_what_is():
    for make in (mse, cross_entropy):
        with pytest.raises(ConfigError, match="no target 'phq8'; there are y"):
            make("phq8")(Answer({"phq8": torch.zeros(2)}), told(torch.zeros(2)))
        with pytest.raises(ConfigError, match="no head 'y'; there are z"):
            make("y")(Answer({"z": torch.zeros(2)}), told(torch.zeros(2)))
