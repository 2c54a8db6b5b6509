"""Damage that is reproducible, nested and follows its law; the ceiling under it; curves and their
picture.
"""

import math

import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.evaluation.metrics import regression_metrics, score_intervals
from mmemo.evaluation.robustness import (
    DAMAGE_KINDS,
    Point,
    draw_robustness,
    feature_spreads,
    measure_robustness,
    with_noise,
    without_frames,
    without_modality,
)
from mmemo.evaluation.xray import best_prediction
from mmemo.models.base import ConcatFusion, Multimodal, RegressionHead, predict
from mmemo.synthetic.factors import LATENTS, _presence, ceiling
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import known_answer

SHARES = (0.0, 0.1, 0.35, 0.7, 1.0)
NAMES = ("text", "audio", "video")


def batch(N=40, seed=0, names=NAMES):
    g = torch.Generator().manual_seed(seed)
    streams = {
        n: Stream.of(
            torch.randn(N, T, F, generator=g) + 3,
            torch.arange(T) < torch.randint(1, T + 1, (N, 1), generator=g),
            rate=5,
        )
        for n, T, F in zip(NAMES, (4, 9, 6), (3, 5, 2))
        if n in names
    }
    return Batch(
        streams, {"y": torch.randn(N, generator=g)}, {"speaker": [f"s{i % 8}" for i in range(N)]}
    )


def here(data):
    return torch.stack([s.mask.any(1) for s in data.streams.values()], 1)


def equal(a, b):
    return all(
        torch.equal(a.streams[n].x, b.streams[n].x)
        and torch.equal(a.streams[n].mask, b.streams[n].mask)
        for n in a.streams
    )


# ------------------------------------------------------------------ the three kinds
@pytest.mark.parametrize("kind", DAMAGE_KINDS)
def test_pure_reproducible_and_nothing_at_zero(kind):
    data, damage = batch(), DAMAGE_KINDS[kind]
    untouched = {n: s.x.clone() for n, s in data.streams.items()}
    assert (
        equal(damage(data, 0.0, 3), data)
        and equal(damage(data, 0.4, 3), damage(data, 0.4, 3))
        and not equal(damage(data, 0.4, 3), damage(data, 0.4, 4))
    )
    assert all(torch.equal(data.streams[n].x, x) for n, x in untouched.items())
    noise = torch.get_rng_state()
    damage(data, 0.4, 3)
    assert torch.equal(noise, torch.get_rng_state())
    for n, s in damage(data, 0.4, 3).streams.items():
        assert (
            s.x[~s.mask].eq(0).all()
            and torch.equal(s.t, data.streams[n].t)
            and not (s.mask & ~data.streams[n].mask).any()
        )


@pytest.mark.parametrize(
    "damage",
    [without_modality, without_frames, lambda d, s, seed: without_frames(d, s, seed, run=3)],
)
def test_what_is_lost_stays_lost(damage):
    data = batch()
    steps = [damage(data, share, 1) for share in SHARES]
    for less, more in zip(steps, steps[1:]):
        assert all(not (more.streams[n].mask & ~less.streams[n].mask).any() for n in NAMES)
    assert sum(int(s.mask.sum()) for s in steps[1].streams.values()) > sum(
        int(s.mask.sum()) for s in steps[3].streams.values()
    )


@pytest.mark.parametrize("p", [0.2, 0.6])
def test_missing_modalities_follow_the_corpus(p):
    "Each set of present modalities is as frequent as the exact ceiling takes it to be."
    data = Batch({n: Stream.of(torch.ones(20_000, 1, 1), rate=1) for n in NAMES})
    found = here(without_modality(data, p, 5))
    assert found.any(1).all()
    for names, share in _presence(p).items():
        assert (
            abs((found == torch.tensor([n in names for n in NAMES])).all(1).float().mean() - share)
            < 0.012
        )


def test_the_last_modality_stays_and_others_may_all_go():
    assert here(without_modality(batch(), 1.0, 0)).sum(1).eq(1).all()
    assert here(without_modality(batch(names=("audio",)), 1.0, 0)).all()
    assert here(without_modality(batch(), 1.0, 0, ("audio", "video"))).float().mean(0).tolist() == [
        1.0,
        0.0,
        0.0,
    ]
    assert torch.equal(
        here(without_modality(batch(), 0.5, 0, "audio"))[:, [0, 2]],
        torch.ones(40, 2, dtype=torch.bool),
    )
    some = batch()
    some = some.replace(
        text=Stream(
            some.streams["text"].x,
            some.streams["text"].mask & (torch.arange(40) > 9)[:, None],
            some.streams["text"].t,
        )
    )
    found = here(without_modality(some, 1.0, 0))
    assert found.sum(1).eq(1).all() and not found[:10, 0].any()


def test_one_stream_is_damaged_alike_whichever_others_there_are():
    for damage in (without_frames, with_noise):
        assert equal(
            Batch({"audio": damage(batch(), 0.5, 2).streams["audio"]}),
            Batch({"audio": damage(batch(), 0.5, 2, ["audio"]).streams["audio"]}),
        )
    assert equal(
        Batch({"text": with_noise(batch(), 0.5, 2, ["audio"]).streams["text"]}),
        Batch({"text": batch().streams["text"]}),
    )


def test_frames_are_lost_at_the_share_and_in_runs():
    data = Batch({"audio": Stream.of(torch.ones(500, 60, 1), rate=10)})
    assert abs(without_frames(data, 0.3, 1).streams["audio"].mask.float().mean() - 0.7) < 0.01
    runs = without_frames(data, 0.3, 1, run=7).streams["audio"].mask
    assert (
        all((block == block[:, :1]).all() for block in runs.split(7, 1))
        and abs(runs.float().mean() - 0.7) < 0.03
    )
    assert not without_frames(data, 1.0, 1).streams["audio"].mask.any()


def test_noise_is_so_many_spreads_and_the_same_but_louder():
    data = batch(N=3000)
    data = data.replace(
        audio=data.streams["audio"].with_x(
            data.streams["audio"].x * torch.tensor([1.0, 10, 100, 0.1, 0])
        )
    )
    unit, real = feature_spreads(data), data.streams["audio"].mask
    one, two = (
        with_noise(data, sd, 7, spread=unit).streams["audio"].x[real]
        - data.streams["audio"].x[real]
        for sd in (1.0, 2.0)
    )
    assert (
        torch.allclose(one.std(0)[:4], unit["audio"][:4], rtol=0.03)
        and one[:, 4].eq(0).all()
        and torch.allclose(two, 2 * one, rtol=1e-2, atol=1e-4)
    )
    assert math.isclose(
        (with_noise(data, 0.5, 7).streams["text"].x - data.streams["text"].x)[
            data.streams["text"].mask
        ]
        .std()
        .item(),
        0.5,
        rel_tol=0.03,
    )


def test_token_ids_get_no_noise():
    data = Batch(
        {
            "text": Stream.of(torch.ones(3, 4, dtype=torch.long), rate=1),
            "audio": Stream.of(torch.ones(3, 4, 2), rate=1),
        }
    )
    assert torch.equal(with_noise(data, 1.0).streams["text"].x, data.streams["text"].x) and set(
        feature_spreads(data)
    ) == {"audio"}
    with pytest.raises(ConfigError, match="text holds token ids"):
        with_noise(data, 1.0, names=["text"])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: without_modality(d, 1.2), "share=1.2 cannot be"),
        (lambda d: without_frames(d, -0.1), "share=-0.1"),
        (lambda d: with_noise(d, -1.0), "sd=-1"),
        (lambda d: without_frames(d, 0.1, run=0), "run=0"),
        (
            lambda d: without_modality(d, 0.1, names=["face"]),
            "no stream named .*face.*this batch has text",
        ),
        (lambda d: with_noise(d, math.nan), "sd=nan"),
    ],
)
def test_damage_that_cannot_be(call, words):
    with pytest.raises(ConfigError, match=words):
        call(batch())


def test_the_exact_ceiling_holds_for_the_damage():
    "The best prediction on damaged items has the error that `ceiling` computes for the knob."
    data = known_answer(3000, seed=2, knobs=Knobs(items_per_speaker=5))
    for p in (0.3, 0.8):
        hurt = without_modality(data, p, 4)
        got = regression_metrics(best_prediction(hurt, LATENTS), data.targets["phq8"])["rmse"]
        assert abs(got - ceiling(LATENTS, knobs=Knobs(missing_modality=p))) < 0.08


# ------------------------------------------------------------------ curves
class Sum(nn.Module):
    "A model that adds up everything it is given."

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, batch):
        from mmemo.models.base import Output

        total = sum(s.x.sum((1, 2)) for s in batch.streams.values()) + self.shift
        return Output({"y": total}, total[:, None])


def test_a_point_is_the_score_on_the_damaged_items():
    data = batch()
    points = measure_robustness(
        {"sum": Sum(), "pair": [Sum(1.0), Sum(-1.0)]}, data, "mae", (0.0, 0.5), seed=3
    )
    assert [(p.kind, p.share, p.model) for p in points[:4]] == [
        ("missing modalities", 0.0, "sum"),
        ("missing modalities", 0.0, "pair"),
        ("missing modalities", 0.5, "sum"),
        ("missing modalities", 0.5, "pair"),
    ]
    assert len(points) == 3 * 2 * 2
    hurt = without_frames(data, 0.5, 3)
    at = next(p for p in points if (p.kind, p.share, p.model) == ("missing frames", 0.5, "sum"))
    assert (
        at.score
        == score_intervals(predict(Sum(), hurt)["y"], data.targets["y"], data.meta["speaker"])[
            "mae"
        ]
    )
    pair = next(p for p in points if (p.kind, p.share, p.model) == ("missing frames", 0.5, "pair"))
    each = [
        float((predict(Sum(k), hurt)["y"] - data.targets["y"]).abs().mean()) for k in (1.0, -1.0)
    ]
    assert (
        math.isclose(pair.score.value, sum(each) / 2, rel_tol=1e-5)
        and pair.score.low < pair.score.value < pair.score.high
    )


def test_shares_and_kinds_of_ones_own_and_errors():
    data, own = (
        batch(),
        {
            "no voice": lambda d, share, seed: without_modality(d, share, seed, ["audio"]),
            "noise": with_noise,
        },
    )
    points = measure_robustness(
        {"sum": Sum()}, data, "rmse", {"no voice": (1.0,), "noise": (0.0, 2.0)}, own
    )
    assert [(p.kind, p.share) for p in points] == [
        ("no voice", 1.0),
        ("noise", 0.0),
        ("noise", 2.0),
    ]
    with pytest.raises(ConfigError, match="unknown metric 'uar'"):
        measure_robustness({"sum": Sum()}, data, "uar", (0.0,))
    with pytest.raises(ConfigError, match="task='z'"):
        measure_robustness({"sum": Sum()}, data, "mae", (0.0,), task="z")
    with pytest.raises(ConfigError, match="no shares for .*missing frames"):
        measure_robustness({"sum": Sum()}, data, "mae", {"noise": (1.0,)})


def test_a_real_model_survives_every_damage():
    torch.manual_seed(0)
    data = batch()
    model = Multimodal(
        {n: nn.Identity() for n in NAMES},
        ConcatFusion({"text": 3, "audio": 5, "video": 2}, 4),
        {"y": RegressionHead(4)},
    )
    points = measure_robustness({"concat": model}, data, "ccc", SHARES)
    assert all(math.isfinite(v) for p in points for v in p.score)


def test_the_picture_shows_every_line_band_and_ceiling():
    points = [
        Point(
            kind,
            share,
            m,
            score_intervals(torch.randn(40) + share, torch.randn(40), [i % 8 for i in range(40)])[
                "rmse"
            ],
        )
        for kind in ("missing modalities", "noise")
        for share in (0.0, 1.0)
        for m in ("a", "b")
    ]
    axes = draw_robustness(points, {"noise": {0.0: 0.5, 1.0: 0.7}}, "RMSE")
    assert (
        [len(ax.lines) for ax in axes] == [2, 3]
        and axes[1].lines[2].get_linestyle() == "--"
        and axes[0].get_ylabel() == "RMSE"
    )
    for ax, kind in zip(axes, ("missing modalities", "noise")):
        for line, m in zip(ax.lines, "ab"):
            assert list(line.get_ydata()) == [
                p.score.value for p in points if p.kind == kind and p.model == m
            ]
        assert len(ax.collections) == 2
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw_robustness([])
