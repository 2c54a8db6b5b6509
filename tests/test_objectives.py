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
from mmemo.evaluation.metrics import regression_metrics
from mmemo.training.objectives import ccc, cross_entropy, entropy, mse


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
