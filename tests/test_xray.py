"""X-rays and explained shares against known answers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from listeners import listeners
from torch import nn

from mmemo.core.errors import ConfigError
from mmemo.evaluation.intervals import Interval
from mmemo.evaluation.xray import best_prediction, explained_share, xray
from mmemo.models.base import predict
from mmemo.synthetic.factors import FACTORS, INFORMATION, LATENTS, bayes_prediction, ceiling
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import _scores

# the libraries warn of absent classes, on purpose here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
torch.set_num_threads(1)


# ---------------------------------------------------------------- X-ray


@pytest.mark.parametrize(
    "chosen",
    [
        dict(tone=1),
        dict(tone=0.5, contour=1, sarcasm=-0.25),
        dict(zip(FACTORS, np.linspace(0.1, 1, 8))),
    ],
)
def test_known_answer_xray(chosen):
    data = listeners()
    full = np.linalg.lstsq(
        np.c_[np.ones(800), data.meta["factors"]],
        bayes_prediction(data.meta["factors"], LATENTS).double().numpy(),
        rcond=None,
    )[0][1:]
    prediction = 3 + data.meta["factors"].double() @ torch.tensor(
        [chosen.get(k, 0.0) * w for k, w in zip(FACTORS, full)], dtype=torch.float64
    )
    for name, ray in xray(prediction, data).items():
        assert (
            ray.value == pytest.approx(chosen.get(name, 0), abs=1e-6) and ray.high - ray.low < 0.06
        )


def test_xray_of_bayes_is_one_for_what_it_hears_and_zero_elsewhere():
    data = listeners()
    for hears in INFORMATION.values():
        ray = xray(bayes_prediction(data.meta["factors"], hears), data)
        assert list(ray) == list(FACTORS)
        for k, i in ray.items():
            inside = k in hears or k == "sarcasm" and {"words", "contour"} <= set(hears)
            assert i.value == pytest.approx(float(inside), abs=0.02) and i.low <= i.value <= i.high


def test_xray_takes_a_module_a_dictionary_or_a_tensor_and_no_shift_matters():
    data = listeners(300)

    class Whisper(nn.Module):
        def forward(self, batch):
            return SimpleNamespace(
                predictions={"phq8": batch.meta["factors"] @ torch.arange(8.0) / 4},
                embedding=batch.meta["factors"],
                maps={},
            )

    model = Whisper()
    out = predict(model, data)
    assert xray(model, data) == xray(out, data) == xray(out["phq8"], data)
    moved = xray(out["phq8"] + 100, data)
    assert all(
        np.allclose(a, b, atol=1e-6) for a, b in zip(moved.values(), xray(model, data).values())
    )


def test_xray_intervals_hold_zero_for_deaf_factors_of_a_noisy_model():
    misses = 0
    for seed in range(20):
        data = listeners(600, seed=seed)
        g = torch.Generator().manual_seed(seed)
        ray = xray(
            9 + 1.5 * data.meta["factors"][:, 0] + 2 * torch.randn(600, generator=g),
            data,
            resamples=300,
        )
        misses += sum(not i.low <= 0 <= i.high for k, i in ray.items() if k != "tone") + (
            not ray["tone"].low <= 1 <= ray["tone"].high
        )
    assert misses / 160 < 0.14


def test_xray_does_not_confuse_factors_that_come_together():
    rng = np.random.default_rng(0)
    data = listeners(1200)
    f = data.meta["factors"]
    lean = torch.from_numpy(rng.random(1200) < 0.4)
    f[lean, :7] = torch.from_numpy(rng.choice([-1.0, 1.0], (1200, 1))).float()[lean]
    f[:, 7] = f[:, 2] * f[:, 4]
    ray = xray(1.5 * f[:, 1], data)
    assert ray["face"].value > 0.9 and all(
        abs(i.value) < 1e-6 for k, i in ray.items() if k != "face"
    )


def test_missing_modalities_lower_what_can_be_heard():
    data = listeners(1000).without("video")
    assert torch.equal(
        best_prediction(data, LATENTS),
        best_prediction(data, [k for k in LATENTS if k not in ("face", "onset")]),
    )
    ray = xray(best_prediction(data, LATENTS), data)
    assert (
        np.isnan(ray["face"]).all()
        and np.isnan(ray["onset"]).all()
        and ray["tone"].value == pytest.approx(1)
    )
    half = listeners(1000)
    half.streams["audio"].mask[:500] = False
    ray = xray(best_prediction(half, LATENTS), half)
    assert all(i.value == pytest.approx(1) for i in ray.values())


def test_best_prediction_knows_the_corpus_of_an_item():
    knobs = Knobs(corpora=2, prior=0.3)
    data = listeners(400, knobs=knobs, corpora=2)
    second = np.array([c == "corpus1" for c in data.meta["corpus"]])
    out = best_prediction(data, (), knobs)
    assert len(out.unique()) == 2 and out[second].mean() > out[~second].mean() + 2
    assert torch.equal(
        out[second], bayes_prediction(data.meta["factors"], (), knobs=knobs, corpus=1)[second]
    )


def test_explained_share_is_zero_at_the_constant_and_one_at_the_ceiling():
    data = listeners()
    f = data.meta["factors"]
    hears = INFORMATION["temporal"]
    const, best = bayes_prediction(f, ()), bayes_prediction(f, hears)
    assert explained_share(const, data, hears) == Interval(0, 0, 0) and explained_share(
        best, data, hears
    ) == pytest.approx((1, 1, 1))
    y, t = (const + best) / 2, data.targets["phq8"]

    def mse(v):
        return float(((v - t).double() ** 2).mean())

    share = explained_share(y, data, hears)
    assert (
        share.value == pytest.approx((mse(const) - mse(y)) / (mse(const) - mse(best)), abs=1e-6)
        and share.low < share.value < share.high
    )
    assert explained_share(bayes_prediction(f, LATENTS), data, hears).value > 1.1
    data.targets["phq8"][:10] = float("nan")
    assert np.isfinite(explained_share(y, data, hears)).all()


def test_the_real_static_model_is_predicted_and_xrayed():
    from torch import nn

    from mmemo.models.base import (
        ClassHead,
        ConcatFusion,
        Multimodal,
        Project,
        RegressionHead,
        static_front,
    )
    from mmemo.synthetic.known_answer import known_answer

    data, names = known_answer(130, items_per_speaker=10), ("audio", "video")
    torch.manual_seed(0)
    model = Multimodal(
        {
            n: nn.Sequential(static_front(data, n), Project(data.streams[n].x.shape[-1], 8))
            for n in names
        },
        ConcatFusion(dict.fromkeys(names, 8), 6),
        {"phq8": RegressionHead(6), "emotion": ClassHead(6, 7)},
    )
    model.train()
    out = predict(model, data, batch_size=50)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "phq8": (130,),
        "emotion": (130, 7),
        "embedding": (130, 6),
    }
    model.eval()
    # padding and batch size change nothing
    assert torch.allclose(out["phq8"], model(data).predictions["phq8"], atol=1e-4)
    assert (
        list(xray(model, data)) == list(FACTORS)
        and explained_share(model, data, INFORMATION["static"]).value < 0.9
    )


# ---------------------------------------------------------------- other weights


def weighted(knobs, n=100_000):
    "Items without signals, labelled as the corpus labels them, some without a modality."
    data, rng = listeners(n), np.random.default_rng(1)
    for stream in data.streams.values():
        stream.mask[torch.from_numpy(rng.random(n) < knobs.missing_modality)] = False
    latents = data.meta["factors"][:, :7].long().numpy()
    data.targets["phq8"] = torch.from_numpy(_scores(latents, knobs, rng))
    return data


@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(factor_weights=(3, 0.7, 2, 1, 0, 2.5, 0.4, 1.3)),
        Knobs(factor_weights=(0, 0, 0, 0, 0, 0, 0, 4), label_noise=2),
        Knobs(factor_weights=(6,) * 8, label_noise=0),
    ],
)
def test_best_predictions_reach_the_ceiling_of_any_weights(knobs):
    data = weighted(knobs)
    for hears in INFORMATION.values():
        error = (best_prediction(data, hears, knobs) - data.targets["phq8"]).double()
        rmse, best = error.square().mean().sqrt().item(), ceiling(hears, knobs=knobs)
        assert rmse == pytest.approx(best, rel=0.01, abs=1e-4)


def test_missing_modalities_and_weights_together():
    knobs = Knobs(factor_weights=(3, 0.7, 2, 1, 0, 2.5, 0.4, 1.3), missing_modality=0.1)
    data = weighted(knobs)
    some = torch.stack([s.mask.any(1) for s in data.streams.values()]).any(0)
    for hears in INFORMATION.values():
        error = (best_prediction(data, hears, knobs) - data.targets["phq8"])[some].double()
        rmse = error.square().mean().sqrt().item()
        # the items that lost all three, one in a thousand, are left out here
        assert rmse == pytest.approx(ceiling(hears, knobs=knobs), rel=0.01)


def test_xray_leaves_out_what_is_worth_nothing():
    knobs = Knobs(factor_weights=(3, 0, 2, 1, 0, 2.5, 0.4, 1.3))
    data = weighted(knobs, 4000)
    ray = xray(best_prediction(data, LATENTS, knobs), data, knobs, resamples=100)
    for name, weight in zip(FACTORS, knobs.factor_weights):
        if weight == 0:
            assert np.isnan(ray[name]).all()
        else:
            assert ray[name].value == pytest.approx(1)
    with pytest.raises(ConfigError, match="explains nothing"):
        explained_share(best_prediction(data, (), knobs), data, ["face"], knobs)
    share = explained_share(best_prediction(data, ["tone"], knobs), data, ["tone", "face"], knobs)
    assert share.value == pytest.approx(1, abs=1e-4)
