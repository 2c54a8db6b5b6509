"""LayerNorm in encoder and fusion, the RMSE objective, condition numbers, and stability over
seeds.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import learned, padded
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.evaluation.seeds import Stability, less_spread, measure_stability
from mmemo.models.base import Multimodal, RegressionHead
from mmemo.models.normalized import (
    NormalizedConcat,
    NormalizedProject,
    condition_number,
    normalized_model,
)
from mmemo.training.history import History
from mmemo.training.loop import fit
from mmemo.training.objectives import rmse
from mmemo.training.plan import Plan
from mmemo.training.tracking import Tracking

WIDTHS = {"text": 6, "audio": 4, "video": 3}


def streams(B=5, seed=0, widths=WIDTHS):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for T, (name, F) in zip((7, 9, 8), widths.items()):
        lengths = torch.randint(1, T + 1, (B, 1), generator=g)
        made[name] = Stream.of(
            torch.randn(B, T, F, generator=g), torch.arange(T) < lengths, rate=10
        )
    return made


# ------------------------------------------------------------------ encoder and fusion
def by_hand(x, norm):
    x = x.detach().numpy().astype(np.float64)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    return z * norm.weight.detach().numpy() + norm.bias.detach().numpy()


def test_encoder_is_linear_norm_relu_at_every_real_step():
    s, encode = streams()["audio"], learned(NormalizedProject(4, 11))
    linear, norm = encode.layers[0], encode.layers[1]
    out, want = encode(s), np.maximum(by_hand(linear(s.x), norm), 0)
    assert out.x.shape == (5, 9, 11) and torch.equal(out.mask, s.mask) and torch.equal(out.t, s.t)
    assert (
        np.allclose(out.x[s.mask].detach(), want[s.mask.numpy()], atol=1e-5)
        and out.x[~s.mask].eq(0).all()
    )


def test_fusion_by_hand():
    given_streams, fusion = streams(), learned(NormalizedConcat(WIDTHS, 10))
    side = np.concatenate(
        [by_hand(masked_mean(s.x, s.mask), fusion.norms[n]) for n, s in given_streams.items()], 1
    )
    for linear, norm in ((fusion.mix[0], fusion.mix[1]), (fusion.mix[4], fusion.mix[5])):
        side = np.maximum(by_hand(linear(torch.from_numpy(side).float()), norm), 0)
    fused = fusion(given_streams)
    assert (
        fused.vector.shape == (5, 10)
        and fused.maps == {}
        and np.allclose(fused.vector.detach(), side, atol=1e-5)
    )


def test_padding_never_changes_a_value():
    given_streams, fusion, encode = (
        streams(),
        learned(NormalizedConcat(WIDTHS, 10)),
        learned(NormalizedProject(4, 11)),
    )
    longer = {n: padded(s, by) for by, (n, s) in enumerate(given_streams.items(), 2)}
    assert torch.allclose(fusion(given_streams).vector, fusion(longer).vector, atol=1e-6)
    garbage = {n: padded(s, by, 1e30) for by, (n, s) in enumerate(given_streams.items(), 2)}
    # what stands in the padding is never looked at
    assert torch.equal(fusion(longer).vector, fusion(garbage).vector)
    assert torch.equal(encode(longer["audio"]).x[:, :9], encode(given_streams["audio"]).x)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_missing_modality_is_silent_whatever_the_bias_has_learned(name):
    data, fusion = Batch(streams()), learned(NormalizedConcat(WIDTHS, 10))
    gone = data.without(name).streams
    assert fusion.norms[name].bias.abs().min() > 0 and fusion.summary(name, gone[name]).eq(0).all()
    before = fusion(gone).vector
    with torch.no_grad():
        fusion.norms[name].bias += 5
        fusion.norms[name].weight *= -3
    assert torch.equal(fusion(gone).vector, before) and not torch.allclose(
        fusion(data.streams).vector, before
    )
    noisy = {**gone, name: Stream(torch.randn_like(gone[name].x), gone[name].mask, gone[name].t)}
    assert torch.equal(fusion(noisy).vector, before)


def test_one_item_without_a_modality_leaves_the_others_alone_and_gradients_finite():
    data, fusion = streams(), learned(NormalizedConcat(WIDTHS, 10))
    alone = data["video"].mask.clone()
    alone[2] = False
    part = {**data, "video": Stream(data["video"].x, alone, data["video"].t)}
    a, b = fusion(data).vector, fusion(part).vector
    keep = torch.arange(5) != 2
    assert torch.equal(a[keep], b[keep]) and not torch.equal(a[2], b[2])
    nothing = {n: Stream(s.x, torch.zeros_like(s.mask), s.t) for n, s in data.items()}
    fusion(nothing).vector.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters() if p.grad is not None)


def test_order_of_the_batch_is_of_no_account():
    data, fusion, rows = (
        Batch(streams()),
        learned(NormalizedConcat(WIDTHS, 10)),
        torch.tensor([3, 0, 4, 2, 1]),
    )
    assert torch.allclose(
        fusion(data[rows].streams).vector, fusion(data.streams).vector[rows], atol=1e-6
    )


def test_a_louder_recording_is_the_same_to_the_fusion():
    data, fusion = streams(), learned(NormalizedConcat(WIDTHS, 10))
    louder = {**data, "audio": data["audio"].with_x(data["audio"].x * 1000)}
    assert torch.allclose(
        fusion.summary("audio", louder["audio"]), fusion.summary("audio", data["audio"]), atol=1e-3
    )


def test_constant_rows_and_single_features_give_the_bias():
    fusion = learned(NormalizedConcat({"audio": 4, "video": 1}, 6))
    flat = Stream.of(torch.full((2, 3, 4), 7.0), rate=1)
    assert torch.allclose(
        fusion.summary("audio", flat), fusion.norms["audio"].bias.expand(2, 4), atol=1e-4
    )
    single = Stream.of(torch.randn(2, 3, 1) * 100, rate=1)
    assert torch.allclose(fusion.summary("video", single), fusion.norms["video"].bias.expand(2, 1))


def test_the_wrong_width_is_named():
    with pytest.raises(ShapeError, match="audio: axis H is 9, the fusion was built for 4"):
        NormalizedConcat(WIDTHS, 10)(
            {**streams(), "audio": Stream.of(torch.zeros(5, 2, 9), rate=1)}
        )


def test_model_gradients_reach_every_trainable_parameter_and_no_frozen_one():
    data = Batch(
        {n: Stream.of(torch.randn(12, 1, F), rate=1) for n, F in WIDTHS.items()},
        {"y": torch.randn(12)},
    )
    model = normalized_model(data, {"y": RegressionHead(10)}, width=10, dropout=0.0)
    assert isinstance(model, Multimodal) and list(model.encoders) == list(WIDTHS)
    model.encoders["text"].requires_grad_(False)
    rmse("y")(model(data), data)["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) if name.startswith("encoders.text") else p.grad.abs().sum() > 0, (
            name
        )


def test_dropout_acts_in_training_only():
    data, fusion = streams(), NormalizedConcat(WIDTHS, 10, 0.5)
    assert not torch.equal(fusion(data).vector, fusion(data).vector)
    fusion.eval()
    assert torch.equal(fusion(data).vector, fusion(data).vector)


# ------------------------------------------------------------------ rmse
def batch_of(target):
    return Batch({"audio": Stream.of(torch.zeros(len(target), 1, 1), rate=1)}, {"y": target})


def said(prediction):
    return SimpleNamespace(predictions={"y": prediction})


def test_rmse_is_the_root_over_known_targets():
    from sklearn.metrics import root_mean_squared_error

    target = torch.tensor([1.0, torch.nan, 4.0, -2.0])
    prediction = torch.tensor([0.5, 9.0, 5.0, 1.0], requires_grad=True)
    found = rmse("y")(said(prediction), batch_of(target))
    keep = ~target.isnan()
    want = root_mean_squared_error(target[keep].numpy(), prediction[keep].detach().numpy())
    assert math.isclose(found["loss"].item(), want, rel_tol=1e-6) and math.isclose(
        found["mse"].item(), want**2, rel_tol=1e-6
    )
    found["loss"].backward()
    assert prediction.grad[1] == 0
    # the gradient of MSE over twice the RMSE
    assert torch.allclose(
        prediction.grad[keep], (prediction - target)[keep].detach() / (3 * want), atol=1e-6
    )


def test_rmse_at_zero_error_costs_the_root_of_eps_and_pulls_nowhere():
    p = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = rmse("y")(said(p), batch_of(p.detach().clone()))["loss"]
    loss.backward()
    assert math.isclose(loss.item(), 1e-4, rel_tol=1e-5) and p.grad.eq(0).all()
    naive = torch.tensor([2.0], requires_grad=True)
    ((naive - 2).square().mean().sqrt() + 1e-8).backward()
    assert naive.grad.isnan().all()  # what it is there to avoid


def test_rmse_of_nobody_is_exactly_nothing():
    p = torch.randn(3, requires_grad=True)
    found = rmse("y")(said(p), batch_of(torch.full((3,), torch.nan)))
    found["loss"].backward()
    assert found["loss"].item() == 0.0 and p.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmse_computes_in_float32(dtype):
    p = torch.zeros(4, dtype=dtype, requires_grad=True)
    loss = rmse("y")(said(p), batch_of(torch.zeros(4)))["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss > 0 and p.grad.eq(0).all()
    far = torch.full((4,), 1000.0, dtype=dtype)  # its square is infinite in fp16
    assert math.isclose(
        rmse("y")(said(far), batch_of(torch.zeros(4)))["loss"].item(), 1000.0, rel_tol=1e-2
    )


@pytest.mark.parametrize("eps", [0.0, -1e-8, 1e-50, math.nan])
def test_an_eps_that_is_no_help_is_refused(eps):
    with pytest.raises(ConfigError, match="eps="):
        rmse("y", eps)


def test_fit_trains_and_watches_the_mse(tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 1, 4, generator=g)
    data = Batch(
        {"audio": Stream.of(x, rate=1), "video": Stream.of(x[..., :3] * 2, rate=1)},
        {"y": x[:, 0, 0] * 2},
    )
    model = normalized_model(data, {"y": RegressionHead(8)}, width=8, dropout=0.0)
    plan = Plan(epochs=6, lr=1e-2, batch_size=16, patience=3, monitor="mse", direction="min")
    history = fit(
        model,
        rmse("y"),
        data,
        data,
        plan,
        tracking=Tracking(tmp_path / "run", progress=False, track=()),
    )
    assert history.best["valid"]["mse"] < 0.5 * history.epochs[0]["train"]["mse"]
    with torch.no_grad():
        assert math.isclose(
            rmse("y")(model.eval()(data), data)["mse"].item(),
            history.best["valid"]["mse"],
            rel_tol=1e-4,
        )
    assert f"step-{history.best['step']:08d}" in [
        p.name for p in (tmp_path / "run" / "checkpoints").iterdir()
    ]


# ------------------------------------------------------------------ condition number
def test_condition_number_against_numpy():
    x = torch.randn(40, 6) * torch.tensor([1, 10, 0.1, 3, 2, 5.0]) + 4
    rows = np.concatenate([x.double().numpy(), np.ones((40, 1))], 1)
    assert math.isclose(condition_number(x), np.linalg.cond(rows.T @ rows), rel_tol=1e-6)
    assert math.isclose(
        condition_number(torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])), 4.0, rel_tol=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 7), st.integers(0, 9))
def test_directions_without_variation_do_not_count(F, seed):
    x = torch.randn(50, F, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)  # so that a constant column only strengthens the bias
    plain = condition_number(x)
    assert math.isclose(
        condition_number(torch.cat([x, torch.zeros(50, 1)], 1)), plain, rel_tol=1e-4
    )
    doubled = condition_number(torch.cat([x, x[:, :1]], 1))
    assert 0.4 * plain < doubled < 4 * plain + 4
    # its rows sum to zero: one direction is empty
    assert condition_number(nn.functional.layer_norm(x, (F,))) < 1e6 or F == 2


def test_tiny_columns_are_seen_and_bad_input_is_not():
    x = torch.randn(200, 5) * torch.tensor([50, 1, 1, 1, 3e-5])
    assert condition_number(x) > 1e11
    for bad in (torch.zeros(0, 3), torch.tensor([[1.0, torch.nan]])):
        with pytest.raises(ShapeError, match="finite"):
            condition_number(bad)


# ------------------------------------------------------------------ stability
def run(*values, monitor="loss", direction="min"):
    history = History(monitor, direction)
    for e, v in enumerate(values):
        history.add({"type": "epoch", "epoch": e, "step": e + 1, "valid": {monitor: v}})
    return history


def test_stability_by_hand():
    runs = [run(3, 2, 2.5), run(4, 1.5, 1.0), run(3, 2.2, 2.1), None, run(5.0, 4.97, None)]
    s = measure_stability(runs, threshold=2.0, constant=5.0)
    scores = [2, 1, 2.1, 5, 4.97]
    assert isinstance(s, Stability) and s.runs == 5
    assert math.isclose(s.mean, np.mean(scores)) and math.isclose(
        s.spread.value, np.std(scores, ddof=1)
    )
    # NaN; 4.97 is within 1 % of the constant
    assert np.allclose(s.diverged, (0.4, 0.11762, 0.76928), atol=1e-4) and s.reached == 2 / 5
    assert s.epochs == (math.inf, 2.0, math.inf)
    assert math.isclose(
        measure_stability(runs, 2.0, 5.0, last=True).mean, np.mean([2.5, 1, 2.1, 5, 5])
    )
    fast = measure_stability(runs[:3], threshold=2.3, constant=5.0)
    assert fast.epochs.value == 2 and fast.reached == 1 and fast.diverged.value == 0


def test_larger_may_be_better():
    up = [
        run(*v, monitor="f1", direction="max")
        for v in ((0.1, 0.5, 0.4), (0.2, 0.3, 0.6), (0.1, 0.1005, 0.1))
    ]
    s = measure_stability(up, threshold=0.45, constant=0.1)
    assert (
        math.isclose(s.mean, (0.5 + 0.6 + 0.1005) / 3)
        and s.diverged.value == 1 / 3
        and s.reached == 2 / 3
        and s.epochs.value == 3
    )
    assert math.isclose(
        measure_stability([*up, None], 0.45, 0.1).mean, (0.5 + 0.6 + 0.1005 + 0.1) / 4
    )


def test_intervals_hold_what_they_should():
    from scipy.stats import f as law

    rng, hits, n = np.random.default_rng(0), 0, 5
    for _ in range(300):
        s = measure_stability([run(v) for v in 3 + 0.1 * rng.standard_normal(n)], 3.0, 9.0)
        hits += s.spread.low < 0.1 < s.spread.high
    assert 0.91 < hits / 300 < 0.985
    a, b = (
        measure_stability([run(v) for v in 3 + sd * rng.standard_normal(7)], 3.0, 9.0)
        for sd in (0.2, 0.05)
    )
    gain = less_spread(a, b)
    ratio = b.spread.value / a.spread.value
    assert math.isclose(gain.value, 1 - ratio) and gain.low < gain.value < gain.high < 1
    assert math.isclose(
        law.cdf((ratio / (1 - gain.low)) ** 2, 6, 6), 0.025, rel_tol=1e-6
    ) and math.isclose(law.sf((ratio / (1 - gain.high)) ** 2, 6, 6), 0.025, rel_tol=1e-6)


def test_less_spread_of_no_spread_is_not_a_number():
    same = measure_stability([run(2.0), run(2.0)], 1.0, 5.0)
    assert math.isnan(less_spread(same, same).value)


def test_stability_says_what_it_wants():
    with pytest.raises(ConfigError, match="at least two"):
        measure_stability([run(1.0)], 1.0, 2.0)
    with pytest.raises(ConfigError, match="valid"):
        measure_stability([run(1.0), History()], 1.0, 2.0)
    with pytest.raises(ConfigError, match="different"):
        measure_stability([run(1.0), run(1.0, monitor="mse")], 1.0, 2.0)


def test_runs_that_all_failed():
    s = measure_stability([None, None, None], 1.0, 2.0)
    assert s.diverged.value == 1 and s.spread.value == 0 and s.mean == 2.0 and s.reached == 0
