"""The supervised contrastive loss, its objective and its head."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.losses import SupConLoss

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.models.base import ProjectionHead
from mmemo.training.contrastive import contrastive, supervised_contrastive


def batch_of(**targets):
    n = len(next(iter(targets.values())))
    return Batch({"audio": Stream.of(torch.zeros(n, 1, 1), rate=1)}, targets)


def said(**predictions):
    return SimpleNamespace(predictions=predictions)


def naive(z, labels, temperature):
    "Equation 2 of the paper, item by item."
    z, terms = z.double() / z.double().norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        if labels[i] == -100:
            continue
        others = [a for a in range(len(z)) if a != i and labels[a] != -100]
        mates = [a for a in others if labels[a] == labels[i]]
        if mates:
            terms.append(
                -sum(
                    torch.log(
                        torch.exp(z[i] @ z[p] / temperature)
                        / sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
                    )
                    for p in mates
                )
                / len(mates)
            )
    return sum(terms) / len(terms)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_loss_and_gradient_are_those_of_pytorch_metric_learning(seed, temperature):
    g = torch.Generator().manual_seed(seed)
    B, H = 9 + 3 * seed, 5 + seed
    a = torch.randn(B, H, generator=g).mul(3).requires_grad_()
    b = a.detach().clone().requires_grad_()
    # a class of one: an anchor without a positive
    labels = torch.randint(0, 4, (B,), generator=g)
    labels[0] = 9
    ours, theirs = (
        supervised_contrastive(a, labels, temperature),
        SupConLoss(temperature=temperature)(b, labels),
    )
    ours.backward()
    theirs.backward()
    assert torch.allclose(ours, theirs, rtol=1e-5) and torch.allclose(a.grad, b.grad, atol=1e-6)
    assert torch.allclose(ours.double(), naive(a.detach(), labels, temperature), rtol=1e-5)


def test_unknown_labels_take_no_part():
    z, labels = torch.randn(8, 6), torch.tensor([0, -100, 1, 0, 1, -100, -100, 0])
    known = labels != -100
    a = z.clone().requires_grad_()
    loss = supervised_contrastive(a, labels)
    loss.backward()
    b = z[known].clone().requires_grad_()
    want = supervised_contrastive(b, labels[known])
    want.backward()
    assert (
        torch.allclose(loss, want)
        and a.grad[~known].eq(0).all()
        and torch.allclose(a.grad[known], b.grad, atol=1e-6)
    )
    z[~known] = torch.randn(3, 6) * 1e15
    assert torch.equal(supervised_contrastive(z, labels), loss.detach())
    assert torch.allclose(want.double(), naive(z, labels, 0.1), rtol=1e-5)


@pytest.mark.parametrize(
    "labels", [[0], [-100], [0, 1], [-100, 0], [-100, -100, -100], [0, 1, 2, 3], []]
)
def test_nothing_to_compare_costs_exactly_nothing(labels):
    z = torch.randn(len(labels), 4, requires_grad=True)
    loss = supervised_contrastive(z, torch.tensor(labels, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0 and loss.ndim == 0 and z.grad.eq(0).all()


@pytest.mark.parametrize(
    "z, labels",
    [
        (torch.ones(2, 3), [1, 1]),
        (torch.ones(6, 3), [1] * 6),
        (torch.ones(6, 3), [0, 1, 0, 1, 2, 2]),
        (torch.zeros(4, 3), [0, 0, 1, 1]),
        (torch.eye(4), [0, 0, 0, 0]),
        (torch.eye(4) * 1e-20, [0, 0, 1, 1]),
        (torch.tensor([[1.0, 0], [-1, 0], [0, 0]]), [0, 0, 0]),
        (torch.full((4, 3), 1e15), [0, 1, 1, 0]),
    ],
)
def test_hard_batches_are_finite(z, labels):
    for temperature in (1e-3, 0.1):
        z = z.detach().clone().requires_grad_()
        loss = supervised_contrastive(z, torch.tensor(labels), temperature)
        loss.backward()
        assert torch.isfinite(loss) and loss >= -1e-6 and torch.isfinite(z.grad).all()


def test_values_that_can_be_said_by_hand():
    # all alike: log of the others
    assert math.isclose(
        supervised_contrastive(torch.ones(6, 3), torch.tensor([0, 1, 0, 1, 2, 2])).item(),
        math.log(5),
        rel_tol=1e-6,
    )
    # one choice, no doubt
    assert supervised_contrastive(torch.randn(2, 3), torch.tensor([4, 4])).abs() < 1e-6
    apart = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert math.isclose(
        supervised_contrastive(apart, torch.tensor([0, 0, 1, 1]), 1.0).item(),
        math.log(1 + 2 * math.exp(-2)),
        rel_tol=1e-5,
    )


def test_a_vector_of_zeros_gets_no_gradient_and_nan_is_seen():
    z = torch.randn(5, 3)
    z[2] = 0
    z.requires_grad_()
    supervised_contrastive(z, torch.tensor([0, 0, 0, 1, 1])).backward()
    assert z.grad[2].eq(0).all() and z.grad[[0, 1, 3, 4]].abs().sum(1).gt(0).all()
    bad = torch.randn(4, 3)
    bad[1, 0] = math.nan
    assert supervised_contrastive(bad, torch.tensor([0, 0, 1, 1])).isnan()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(0, 99))
def test_order_names_and_lengths_do_not_matter(B, seed):
    g = torch.Generator().manual_seed(seed)
    z, labels, rows = (
        torch.randn(B, 4, generator=g),
        torch.randint(0, 3, (B,), generator=g),
        torch.randperm(B, generator=g),
    )
    loss = supervised_contrastive(z, labels)
    assert torch.allclose(supervised_contrastive(z[rows], labels[rows]), loss, atol=1e-5)
    assert torch.allclose(supervised_contrastive(z, 7 - labels), loss, atol=1e-5)
    assert torch.allclose(
        supervised_contrastive(z * (0.1 + torch.rand(B, 1, generator=g) * 9), labels),
        loss,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_computes_in_float32_also_under_autocast(dtype):
    z, labels = torch.randn(10, 8).to(dtype), torch.arange(10) % 3
    want = supervised_contrastive(z.float(), labels)
    assert want.dtype == torch.float32 and torch.equal(supervised_contrastive(z, labels), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(supervised_contrastive(z, labels), want)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_cannot_be_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature="):
        supervised_contrastive(torch.randn(2, 3), torch.tensor([0, 0]), temperature)


def test_objective_is_the_loss_of_its_head_and_says_who_had_a_positive():
    z, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, -100, 2, 2])
    found = contrastive("near", "sentiment", 0.2)(said(near=z), batch_of(sentiment=labels))
    assert torch.equal(found["loss"], supervised_contrastive(z, labels, 0.2)) and math.isclose(
        found["anchors"], 4 / 6, rel_tol=1e-6
    )
    with pytest.raises(ConfigError, match="no head 'contrast'; there are near"):
        contrastive()(said(near=z), batch_of(emotion=labels))
    with pytest.raises(ConfigError, match="no target 'emotion'; there are sentiment"):
        contrastive("near")(said(near=z), batch_of(sentiment=labels))


def test_head_is_linear_relu_linear():
    head, x = ProjectionHead(5, 3), torch.randn(7, 5)
    first, _, last = head.layers
    assert head(x).shape == (7, 3) and ProjectionHead(5)(x).shape == (7, 128)
    assert torch.allclose(
        head(x),
        (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias,
        atol=1e-6,
    )
