"""The adversary: its reversed gradient, its ramp, its targets, and that fooled is not gone."""

import numpy as np
import pytest
import torch
from people import people, rows
from torch import nn

from mmemo.core.batch import Batch
from mmemo.core.errors import ConfigError, DataError
from mmemo.evaluation.speakers import speaker_probe
from mmemo.models.adversary import AdversaryHead, ramp_strength, reverse_gradient, speaker_targets
from mmemo.models.base import RegressionHead, static_model
from mmemo.training.loop import Hooks, fit
from mmemo.training.multitask import multitask
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET


# ------------------------------------------------------------------ adversary
def test_reversal_is_the_identity_forwards_and_minus_strength_backwards():
    x = torch.randn(3, 5, 2, dtype=torch.double, requires_grad=True)
    y = reverse_gradient(x, 0.7)
    assert torch.equal(x, y)
    weight = torch.randn_like(x)
    (y * weight).sum().backward()
    assert torch.allclose(x.grad, -0.7 * weight)


def adversarial(strength, S=4, W=8, seed=0, hidden=64):
    torch.manual_seed(seed)
    data = people(S=S)
    return data, static_model(
        data, {"phq8": RegressionHead(W), "speaker": AdversaryHead(W, S, strength, hidden)}, W
    )


@pytest.mark.parametrize("hidden", [64, 0])
def test_adversary_learns_forwards_and_teaches_the_opposite_below(hidden):
    data, model = adversarial(0.5, hidden=hidden)
    labels = speaker_targets(data.meta["speaker"], range(len(data)))
    model.eval()
    out = model(data)
    loss = nn.functional.cross_entropy(out.predictions["speaker"], labels)
    vector = out.embedding.detach().requires_grad_()
    plain = nn.functional.cross_entropy(model.heads["speaker"].net(vector), labels)
    (want,) = torch.autograd.grad(plain, vector)
    want_head = torch.autograd.grad(
        nn.functional.cross_entropy(model.heads["speaker"].net(vector), labels),
        model.heads["speaker"].parameters(),
    )
    out.embedding.retain_grad()
    loss.backward()
    assert torch.allclose(out.embedding.grad, -0.5 * want, atol=1e-7)
    assert all(
        torch.allclose(p.grad, w, atol=1e-7) and w.abs().sum() > 0
        for p, w in zip(model.heads["speaker"].parameters(), want_head)
    )
    assert all(
        p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.startswith("encoders")
    )
    assert model.heads["phq8"].linear.weight.grad is None


def test_an_adversary_of_strength_0_only_listens():
    data, model = adversarial(0.0)
    cross_entropy("speaker")(
        model(data), Batch(data.streams, {"speaker": torch.arange(len(data)) % 4})
    )["loss"].backward()
    assert all(
        p.grad is None or not p.grad.any()
        for n, p in model.named_parameters()
        if not n.startswith("heads")
    )
    assert all(p.grad.any() for p in model.heads["speaker"].parameters())


def test_ramp_is_that_of_the_paper_and_finds_its_head():
    _, model = adversarial(9.0)
    at = ramp_strength(11, top=2.0)
    seen = []
    for epoch in range(11):
        at(model, epoch)
        seen.append(model.heads["speaker"].strength)
    assert (
        seen[0] == 0
        and seen[5] == pytest.approx(2 * (2 / (1 + np.exp(-5)) - 1))
        and seen == sorted(seen)
        and seen[-1] == pytest.approx(2, abs=1e-3)
    )
    ramp_strength(1, 2.0)(model, 0)
    assert model.heads["speaker"].strength == pytest.approx(2, abs=1e-3)
    for task in ("phq8", "room"):
        with pytest.raises(
            ConfigError,
            match=f"head '{task}' is no AdversaryHead; the model has heads phq8, speaker",
        ):
            ramp_strength(3, task=task)(model, 0)
    for make in (lambda: ramp_strength(3, -1.0), lambda: AdversaryHead(4, 3, float("inf"))):
        with pytest.raises(ConfigError, match="strength .* cannot be"):
            make()
    with pytest.raises(ConfigError, match="speakers=1"):
        AdversaryHead(4, 1)


def test_speaker_targets_number_the_training_speakers_only():
    data = people()
    target = speaker_targets(data.meta["speaker"], rows(data, "s4", "s1"))
    assert (
        target.dtype == torch.long
        and set(target[rows(data, "s1")].tolist()) == {0}
        and set(target[rows(data, "s4")].tolist()) == {1}
    )
    assert (target[rows(data, "s0", "s2", "s3", "s5")] == -100).all()
    with pytest.raises(DataError, match="no training row"):
        speaker_targets(data.meta["speaker"], [])


def test_an_adversary_is_fooled_sooner_than_a_fresh_probe():
    data = people(S=4, each=60, T=1, offset=1.0, seed=1)
    who = speaker_targets(data.meta["speaker"], range(len(data)))
    x = data.streams["audio"].x[:, 0, 0]
    # a label that is the same for all speakers
    data.targets["speaker"], data.targets["phq8"] = (
        who,
        x - torch.stack([x[who == k].mean() for k in range(4)])[who],
    )
    found = {}
    for top in (0.0, 0.1):
        torch.manual_seed(1)
        model = static_model(
            data, {"phq8": RegressionHead(16), "speaker": AdversaryHead(16, 4)}, 16, dropout=0.0
        )
        history = fit(
            model,
            multitask({"phq8": (mse("phq8"), 1.0), "speaker": (cross_entropy("speaker"), 1.0)}),
            Batch(data.streams, data.targets),
            None,
            Plan(epochs=15, batch_size=32, lr=3e-3),
            tracking=QUIET,
            hooks=Hooks(at_epoch=ramp_strength(15, top)),
        )
        found[top] = (
            speaker_probe(model, data).accuracy.value,
            history.epochs[-1]["train"]["speaker accuracy"],
        )
    (loud, heard), (still, fooled) = found[0.0], found[0.1]
    assert fooled < heard - 0.15  # what the adversary itself says: the speaker is gone
    assert still > fooled + 0.15 and still > loud - 0.15  # what a probe says that never took part
