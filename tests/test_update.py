"""One update: gradients of several batches are those of one, clipping bounds the step, and a value
that is not finite stops before it.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import wholes
from safetensors import safe_open
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


def is_the_whole(record, weights, whole, goal):
    "Equal to one large batch, in one process, within 1e-6 (of the size of what is compared)."
    for key in ("loss", "norm"):
        assert record[key] == pytest.approx(whole[key], rel=1e-6, abs=1e-6), key
    for key, value in whole.get("parts", {}).items():
        assert record["parts"][key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    for key, value in goal.items():
        assert torch.allclose(weights[key], value, rtol=0, atol=1e-6), key


@pytest.mark.parametrize("name", wholes.OBJECTIVES)
def test_an_update_in_parts_is_that_of_the_large_batch(name):
    "Labels are missing, classes are weighted, parts are unequal."
    whole, model = wholes.update(name, [wholes.ITEMS])
    for cut in wholes.CUTS.values():
        record, other = wholes.update(name, cut)
        is_the_whole(record, other.state_dict(), whole, model.state_dict())


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    "What two and three processes made of it."
    folder = tmp_path_factory.mktemp("several")
    done = subprocess.run(
        [sys.executable, wholes.__file__, str(folder)],
        cwd=Path(wholes.__file__).parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_an_update_in_several_processes_is_that_of_the_large_batch(several, processes):
    "The last batch has fewer rows than there are processes."
    with safe_open(several / f"{processes}.safetensors", "pt") as file:
        records = json.loads(file.metadata()["records"])
        found = {name: file.get_tensor(name) for name in file.keys()}
    for name in wholes.SHARED:
        whole, model = wholes.update(name, [wholes.ITEMS])
        for parts in wholes.SHARED_CUTS:
            own = {key: found[f"{name}/{parts}/{key}"] for key in model.state_dict()}
            is_the_whole(records[f"{name}/{parts}"], own, whole, model.state_dict())


def test_an_objective_of_joined_batches_says_what_it_cannot_see():
    for ask in (lambda o, b: {"loss": b.streams["audio"]}, lambda o, b: {"loss": o.maps["text"]}):
        with pytest.raises(ConfigError, match="it can see predictions, embeddings, targets"):
            wholes.update("mse", [12, 11], ask)


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
