"""The weighted objective of several tasks, class weights, the supervised contrastive loss, its
head and the linear probe.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError
from mmemo.evaluation.metrics import linear_probe
from mmemo.models.base import ClassHead, ProjectionHead, RegressionHead, static_model
from mmemo.training.contrastive import contrastive
from mmemo.training.loop import fit
from mmemo.training.multitask import class_weights, multitask
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET


def batch_of(**targets):
    n = len(next(iter(targets.values())))
    return Batch({"audio": Stream.of(torch.zeros(n, 1, 1), rate=1)}, targets)


def said(**predictions):
    return SimpleNamespace(predictions=predictions)


# ------------------------------------------------------------------ class weights
def test_weights_are_those_of_scikit_learn():
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0, 2, 1, 0, 0, 3, 2, 0, 1])
    want = compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    assert (
        np.allclose(class_weights(labels, 4), want)
        and class_weights(labels, 4).dtype == torch.float32
    )
    assert torch.equal(
        class_weights(torch.cat([labels, torch.full((5,), -100)]), 4), class_weights(labels, 4)
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_every_class_that_is_there_gets_the_same_total(values):
    labels = torch.tensor(values)
    weight = class_weights(labels, 5)
    total = torch.zeros(5).index_add(0, labels, weight[labels])
    assert (
        torch.allclose(total[labels.unique()], torch.tensor(len(values) / 5))
        and weight[[c for c in range(5) if c not in values]].eq(0).all()
    )


def test_bad_labels_are_named():
    with pytest.raises(DataError, match="none of the 3 labels is known"):
        class_weights(torch.full((3,), -100), 4)
    with pytest.raises(DataError, match="none of the 0"):
        class_weights(torch.zeros(0, dtype=torch.long), 4)
    with pytest.raises(DataError, match="labels run from 1 to 4; with 4 classes they are 0 to 3"):
        class_weights(torch.tensor([1, 4]), 4)
    with pytest.raises(DataError, match="labels run from -1"):
        class_weights(torch.tensor([-1, 2]), 4)


def test_an_absent_class_keeps_the_loss_finite():
    logits = torch.randn(6, 5, requires_grad=True)
    labels = torch.tensor([0, 0, 3, 1, 1, 1])
    loss = cross_entropy("e", weight=class_weights(labels, 5), label_smoothing=0.1)(
        said(e=logits), batch_of(e=labels)
    )["loss"]
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------ supervised contrastive loss


# ------------------------------------------------------------------ its objective and head


# ------------------------------------------------------------------ several tasks
def parts():
    return {
        "phq8": (mse("phq8"), 0.5),
        "emotion": (cross_entropy("emotion"), 2.0),
        "contrast": (contrastive(labels="emotion"), 0.1),
    }


def test_sum_and_entries_by_hand():
    said_all = said(
        phq8=torch.randn(6, requires_grad=True),
        emotion=torch.randn(6, 3, requires_grad=True),
        contrast=torch.randn(6, 4, requires_grad=True),
    )
    data = batch_of(
        phq8=torch.tensor([1.0, 5, math.nan, 3, 2, 9]), emotion=torch.tensor([0, 1, 2, 0, -100, 1])
    )
    found = multitask(parts())(said_all, data)
    losses = {name: part(said_all, data)["loss"] for name, (part, _) in parts().items()}
    assert torch.allclose(
        found["loss"], 0.5 * losses["phq8"] + 2 * losses["emotion"] + 0.1 * losses["contrast"]
    )
    assert {"loss", "phq8", "emotion", "emotion accuracy", "contrast", "contrast anchors"} == set(
        found
    )
    assert (
        all(
            torch.equal(found[n], losses[n].detach()) and not found[n].requires_grad for n in losses
        )
        and found["loss"].requires_grad
    )
    assert torch.equal(
        found["emotion accuracy"], cross_entropy("emotion")(said_all, data)["accuracy"]
    )


@pytest.mark.parametrize("silent", ["phq8", "emotion", "both"])
def test_a_task_without_a_label_costs_exactly_nothing(silent):
    heads = dict(
        phq8=torch.randn(4, requires_grad=True),
        emotion=torch.randn(4, 3, requires_grad=True),
        contrast=torch.randn(4, 5, requires_grad=True),
    )
    data = batch_of(
        phq8=torch.full((4,), math.nan) if silent != "emotion" else torch.randn(4),
        emotion=torch.full((4,), -100) if silent != "phq8" else torch.tensor([0, 0, 1, 1]),
    )
    found = multitask(parts())(said(**heads), data)
    found["loss"].backward()
    gone = {"phq8": ["phq8"], "emotion": ["emotion", "contrast"], "both": list(heads)}[silent]
    assert torch.isfinite(found["loss"]) and all(
        found[n] == 0 and heads[n].grad.eq(0).all() for n in gone
    )
    assert all(heads[n].grad.abs().sum() > 0 for n in heads if n not in gone)


def test_a_weight_of_nothing_only_watches():
    heads = dict(
        phq8=torch.randn(4, requires_grad=True), emotion=torch.randn(4, 3, requires_grad=True)
    )
    data = batch_of(phq8=torch.randn(4), emotion=torch.tensor([0, 1, 2, 0]))
    found = multitask({"phq8": (mse("phq8"), 1.0), "emotion": (cross_entropy("emotion"), 0.0)})(
        said(**heads), data
    )
    found["loss"].backward()
    assert (
        torch.equal(found["loss"].detach(), found["phq8"])
        and found["emotion"] > 0
        and heads["emotion"].grad.eq(0).all()
    )


def test_bad_parts_are_named():
    with pytest.raises(ConfigError, match="at least one part"):
        multitask({})
    with pytest.raises(ConfigError, match="cannot be called 'loss'"):
        multitask({"loss": (mse("y"), 1.0)})
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"weight of part 'y' is {weight}"):
            multitask({"y": (mse("y"), weight)})


def made(n=60):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 5, generator=g)
    y = 2 * x[:, 0, 0]
    y[::3] = math.nan
    return Batch(
        {"audio": Stream.of(x, rate=1), "video": Stream.of(x[..., :3] * 2, rate=1)},
        {"phq8": y, "emotion": (x[:, 0, 1] > 0).long()},
    )


def test_gradients_reach_every_trainable_parameter_and_no_frozen_one():
    data = made()
    model = static_model(
        data,
        {"phq8": RegressionHead(8), "emotion": ClassHead(8, 2), "contrast": ProjectionHead(8, 6)},
        8,
        0.0,
    )
    model.encoders["video"].requires_grad_(False)
    multitask(parts())(model(data), data)["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) if name.startswith("encoders.video") else p.grad.abs().sum() > 0, (
            name
        )


def test_fit_learns_all_tasks_and_logs_each():
    data = made()
    torch.manual_seed(1)
    model = static_model(
        data,
        {
            "phq8": RegressionHead(16),
            "emotion": ClassHead(16, 2),
            "contrast": ProjectionHead(16, 6),
        },
        16,
        0.0,
    )
    plan = Plan(
        epochs=12, lr=1e-2, batch_size=16, schedule="onecycle", monitor="phq8", direction="min"
    )
    history = fit(model, multitask(parts()), data, data, plan, tracking=QUIET)
    first, last = history.epochs[0]["valid"], history.epochs[-1]["valid"]
    assert (
        last["phq8"] < 0.2 * first["phq8"]
        and last["emotion accuracy"] > 0.9
        and last["contrast"] < first["contrast"]
        and last["contrast anchors"] > 0.9
    )


# ------------------------------------------------------------------ the probe
def test_probe_reads_what_is_linear_and_not_what_is_not():
    x, test = torch.randn(300, 6), torch.randn(200, 6)
    found = linear_probe(x * 50 + 9, (x[:, 2] > 0).long(), test * 50 + 9, (test[:, 2] > 0).long())
    assert found["accuracy"] > 0.95 and found["uar"] > 0.95
    assert (
        abs(
            linear_probe(
                x, (x[:, 2] * x[:, 0] > 0).long(), test, (test[:, 2] * test[:, 0] > 0).long()
            )["accuracy"]
            - 0.5
        )
        < 0.15
    )


def test_probe_is_logistic_regression_on_known_labels():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score

    x, test = torch.randn(90, 4), torch.randn(50, 4)
    y, t = (x @ torch.randn(4, 3)).argmax(1), torch.randint(0, 3, (50,))
    hidden, asked = y.clone(), t.clone()
    hidden[::7] = -100
    asked[::5] = -100
    keep, m = hidden != -100, (x[hidden != -100].mean(0), x[hidden != -100].std(0, correction=0))
    plain = LogisticRegression(max_iter=1000).fit(
        ((x[keep] - m[0]) / m[1]).numpy(), y[keep].numpy()
    )
    label = plain.predict(((test - m[0]) / m[1]).numpy())
    want = recall_score(t[asked != -100], label[(asked != -100).numpy()], average="macro")
    assert math.isclose(linear_probe(x, hidden, test, asked)["uar"], want, abs_tol=0.03)


def test_probe_names_what_is_missing():
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError, match="at least two classes"):
        linear_probe(x, torch.tensor([1, 1, -100, 1]), x, y)
    with pytest.raises(DataError, match="none of the 4 test labels"):
        linear_probe(x, y, x, torch.full((4,), -100))
