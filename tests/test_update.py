"""One update: gradients of several batches are those of one, clipping bounds the step, and a value
that is not finite stops before it.
"""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import MEMORY, items, tiny

from mmemo.core.errors import ConfigError
from mmemo.training.history import History
from mmemo.training.loop import fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET, Tracking
from mmemo.training.update import NonFiniteError, Trainer

TRAIN, VALID = items(44), items(20, seed=1)
quiet = dict(progress=False, track=())


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_accumulation_is_the_large_batch():
    "44 items: the last update of 16 is one batch of 8 and one of 4."
    a, b = tiny(dropout=0, norm=False), tiny(dropout=0, norm=False)
    one = fit(a, mse("y"), TRAIN, VALID, Plan(epochs=2, batch_size=16), tracking=QUIET)
    two = fit(b, mse("y"), TRAIN, VALID, Plan(epochs=2, batch_size=8, accumulate=2), tracking=QUIET)
    assert len(one.steps) == len(two.steps) == 6 and [s["items"] for s in two.steps[:3]] == [
        16,
        16,
        12,
    ]
    for key in ("loss", "norm"):
        assert [s[key] for s in one.steps] == pytest.approx([s[key] for s in two.steps], rel=1e-5)
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(a.parameters(), b.parameters()))


def test_clip_bounds_the_step():
    for clip in (1e-3, None):
        model = tiny(norm=False)
        start = [p.detach().clone() for p in model.parameters()]
        history = fit(
            model,
            mse("y"),
            items(8),
            None,
            Plan(
                epochs=1,
                batch_size=8,
                lr=1.0,
                optimiser="sgd",
                momentum=0.0,
                weight_decay=0,
                clip=clip,
            ),
            tracking=QUIET,
        )
        moved = math.sqrt(
            sum(float((p.detach() - q).square().sum()) for p, q in zip(model.parameters(), start))
        )
        assert (
            moved == pytest.approx(clip or history.steps[0]["norm"], rel=1e-3)
            and history.steps[0]["norm"] > 1e-2
        )


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_before_the_step(tmp_path, where):
    class Root(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, g: g * math.inf)

    count, kept = [0], {}

    def objective(output, batch):
        count[0] += 1
        loss = mse("y")(output, batch)["loss"]
        if count[0] == 5:
            kept.update({k: v.clone() for k, v in model.named_parameters()})
            loss = loss * math.nan if where == "loss" else Root.apply(loss)
        return {"loss": loss}

    model = tiny()
    what = (
        "the loss is nan"
        if where == "loss"
        else "the gradient norm is (nan|inf), first in encoder.weight"
    )
    with pytest.raises(NonFiniteError, match=rf"{what}.* at update 5 \(epoch 0\), rows \d+"):
        fit(
            model,
            objective,
            TRAIN,
            VALID,
            Plan(epochs=2, batch_size=8),
            tracking=Tracking(tmp_path, **quiet),
        )
    assert (
        all(torch.equal(p, kept[k]) for k, p in model.named_parameters())
        and len(History.load(tmp_path).steps) == 4
    )


def test_the_memory_of_squared_gradients_reaches_the_optimiser():
    for kind in ("adamw", "adam"):
        assert Trainer(
            tiny(), mse("y"), Plan(optimiser=kind, beta2=0.98), 8
        ).optimiser.param_groups[0]["betas"] == (0.9, 0.98)
    with pytest.raises(ConfigError, match="beta2=1.0 cannot be: choose a number from 0 to below 1"):
        Plan(beta2=1.0)
