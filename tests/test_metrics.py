"""Metrics against scikit-learn and torchmetrics; intervals against textbooks and by simulation."""

import ast
import importlib.util
import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from listeners import Talker, listeners
from scipy import stats

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.evaluation.intervals import (
    Interval,
    holm,
    pseudo_values,
    resample_speakers,
    sum_by_speaker,
    two_way,
)
from mmemo.evaluation.metrics import (
    _verdict,
    class_metrics,
    compare,
    confusion,
    regression_metrics,
    reliability,
    score_intervals,
)
from mmemo.evaluation.xray import best_prediction, explained_share, xray
from mmemo.models.base import predict, probabilities

# the libraries warn of absent classes, on purpose here
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
torch.set_num_threads(1)


# ---------------------------------------------------------------- predict


def test_predict_visits_every_item_once_in_order_without_dropout_or_gradients():
    data = Batch({"audio": Stream.of(torch.randn(11, 3, 2), rate=10)})
    model = Talker().train()
    model.frozen.eval()
    out = predict(model, data, batch_size=4)
    assert {k: tuple(v.shape) for k, v in out.items()} == {
        "phq8": (11,),
        "emotion": (11, 3),
        "embedding": (11, 5),
    }
    assert [s[0] for s in model.seen] == [4, 4, 3] and not any(t or g for _, t, g in model.seen)
    h = model.frozen(model.body(data.streams["audio"].x.mean(1)))
    assert torch.allclose(out["embedding"], h, atol=1e-6) and torch.allclose(
        out["phq8"], h[:, 0], atol=1e-6
    )
    assert not out["phq8"].requires_grad and out["phq8"].dtype == torch.float32


def test_predict_gives_every_module_its_own_mode_back_also_after_an_error():
    data, model = Batch({"audio": Stream.of(torch.randn(3, 2, 2), rate=1)}), Talker().train()
    model.frozen.eval()
    predict(model, data)
    assert model.training and model.drop.training and not model.frozen.training
    with pytest.raises(KeyError):
        predict(model, Batch({"video": Stream.of(torch.randn(3, 2, 2), rate=1)}))
    assert model.training and model.drop.training and not model.frozen.training


def test_predict_works_on_any_data_set_that_answers_rows_and_refuses_an_empty_one():
    whole = Batch({"audio": Stream.of(torch.randn(7, 2, 2), rate=1)})

    class Rows:
        def __len__(self):
            return 7

        def __getitem__(self, rows):
            assert isinstance(rows, list)
            return whole[rows]

    model = Talker().eval()
    assert torch.equal(predict(model, Rows(), 3)["phq8"], predict(model, whole, 3)["phq8"])
    with pytest.raises(ShapeError, match="no items"):
        predict(model, [])


# ---------------------------------------------------------------- metrics against libraries

# integers in tenths: many ties
numbers = st.lists(st.tuples(st.integers(0, 24), st.integers(-40, 300)), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(numbers)
def test_regression_metrics_equal_the_libraries(pairs):
    t, p = np.array(pairs, float).T
    p = p / 10
    out = regression_metrics(p, t)
    assert out["rmse"] == pytest.approx(np.sqrt(np.mean((p - t) ** 2)), abs=1e-9) and out[
        "mae"
    ] == pytest.approx(np.mean(np.abs(p - t)), abs=1e-9)
    # Lin 1989, by numpy alone
    below = np.var(p, ddof=1) + np.var(t, ddof=1) + (p.mean() - t.mean()) ** 2
    want = 2 * np.cov(p, t)[0, 1] / below if np.ptp(p) and np.ptp(t) else 0.0
    assert out["ccc"] == pytest.approx(want, abs=1e-6)
    sums = score_intervals(p, t, range(len(t)))  # the second road: sums
    for name, value in out.items():
        assert sums[name].value == pytest.approx(value, abs=1e-6)


@st.composite
def classified(draw):
    C = draw(st.integers(2, 7))
    n = draw(st.integers(1, 40))
    label = st.lists(st.integers(0, C - 1), min_size=n, max_size=n)
    return C, np.array(draw(label)), np.array(draw(label)), draw(st.integers(0, 9999))


@settings(max_examples=60, deadline=None)
@given(classified())
def test_class_metrics_equal_the_libraries_with_absent_classes_and_ties(case):
    C, target, said, seed = case
    scores = np.random.default_rng(seed).random((len(target), C))
    scores[np.arange(len(said)), said] += 1
    out = class_metrics(scores, target)
    T, S = torch.from_numpy(target), torch.from_numpy(scores)
    args = dict(task="multiclass", num_classes=C)
    assert out["accuracy"] == pytest.approx(float(tm.accuracy(S, T, **args)), abs=1e-6)
    assert out["uar"] == pytest.approx(sk.balanced_accuracy_score(target, said), abs=1e-9)
    assert out["macro_f1"] == pytest.approx(
        float(tm.f1_score(S, T, average="macro", **args)), abs=1e-6
    )
    assert out["weighted_f1"] == pytest.approx(
        float(tm.f1_score(S, T, average="weighted", **args)), abs=1e-6
    )
    assert out["weighted_precision"] == pytest.approx(
        float(tm.precision(S, T, average="weighted", **args)), abs=1e-6
    )
    assert np.array_equal(confusion(scores, target), tm.confusion_matrix(S, T, **args).numpy())
    labels = class_metrics(said, target)  # labels say the same, without ECE
    assert "ece" not in labels and all(labels[k] == pytest.approx(out[k]) for k in labels)
    if len(target) > 1:
        sums = score_intervals(scores, target, range(len(target)))
        for name in sums:
            assert sums[name].value == pytest.approx(out[name], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(2, 7), st.integers(0, 999))
def test_calibration_by_hand(n, C, seed):
    rng = np.random.default_rng(seed)
    logits, target = 3 * rng.standard_normal((n, C)), rng.integers(C, size=n)
    p = torch.from_numpy(logits).softmax(1).numpy()
    sure, right, bins = p.max(1), p.argmax(1) == target, np.minimum((p.max(1) * 15).astype(int), 14)
    want = sum(
        abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in set(bins)
    )
    assert (
        class_metrics(logits, target)["ece"]
        == pytest.approx(want, abs=1e-5)
        == class_metrics(p, target)["ece"]
    )
    s, r, count = reliability(logits, target, bins=15)
    assert (np.abs(s - r) * count).sum() / count.sum() == pytest.approx(
        want, abs=1e-9
    ) and count.sum() == n
    true, said = sk_curve(right, sure)
    assert np.allclose(r, true) and np.allclose(s, said)


def sk_curve(right, sure):
    from sklearn.calibration import calibration_curve

    return calibration_curve(right, sure, n_bins=15)


def test_probabilities_stay_and_logits_go_through_a_softmax():
    p = torch.tensor([[0.2, 0.8], [1.0, 0.0]])
    assert (
        np.allclose(probabilities(p), p)
        and np.allclose(probabilities(p * 5), (p * 5).softmax(1))
        and np.isfinite(probabilities([[1e4, -1e4]])).all()
    )


# ---------------------------------------------------------------- edges


def test_the_lazy_model_wins_nothing():
    target = torch.tensor([0] * 90 + [1] * 7 + [2] * 3)
    out = class_metrics(torch.zeros(100, dtype=torch.long), target)
    assert (
        out["accuracy"] == 0.9
        and out["uar"] == pytest.approx(1 / 3)
        and out["macro_f1"] == pytest.approx(2 * 0.9 / 1.9 / 3)
    )
    assert regression_metrics(torch.full((100,), 0.13), target)["ccc"] == 0


def test_unknown_targets_do_not_count():
    p, t = torch.randn(9), torch.randn(9)
    holes = t.clone()
    holes[[2, 5]] = float("nan")
    keep = ~holes.isnan()
    assert regression_metrics(p, holes) == regression_metrics(p[keep], t[keep])
    speakers = list("aabbccdda")
    kept = [s for s, k in zip(speakers, keep) if k]
    assert score_intervals(p, holes, speakers) == score_intervals(p[keep], t[keep], kept)
    # a NaN where nothing is known does no harm
    wild = p.clone()
    wild[2] = float("nan")
    assert regression_metrics(wild, holes) == regression_metrics(p, holes)
    s, c = torch.randn(9, 4), torch.tensor([0, 1, -100, 3, 3, -100, 1, 0, 2])
    keep = c >= 0
    assert class_metrics(s, c) == class_metrics(s[keep], c[keep]) and np.array_equal(
        confusion(s, c), confusion(s[keep], c[keep])
    )
    assert confusion([0, 1], [1, 1], classes=4).shape == (4, 4)


@pytest.mark.parametrize(
    "p, t, want",
    [
        ([3, 3, 3], [1, 2, 3], 0),
        ([1, 2, 3], [2, 2, 2], 0),
        ([2, 2], [2, 2], 0),
        ([5], [1], 0),
        ([1, 2, 3], [1, 2, 3], 1),
    ],
)
def test_ccc_of_constants_is_zero_on_both_roads(p, t, want):
    p, t = np.array(p, float) + 0.1, np.array(t, float) + 0.1
    assert regression_metrics(p, t)["ccc"] == pytest.approx(want)
    if len(t) > 1:
        assert score_intervals(p, t, range(len(t)))["ccc"].value == pytest.approx(want)


def test_people_left_over_with_constant_targets_have_ccc_zero_not_noise():
    p, t = np.array([0.1, 0.1, 0.1, 9.1]) + 0.2, np.array([0.1, 0.1, 0.1, 7.3]) + 0.2
    i = score_intervals(p, t, range(4))["ccc"]
    assert -1 <= i.low <= i.value <= i.high <= 1


@pytest.mark.parametrize(
    "error, message, call",
    [
        (
            ShapeError,
            "3 predictions for 2 targets",
            lambda: regression_metrics(torch.zeros(3), torch.zeros(2)),
        ),
        (
            ShapeError,
            r"prediction \[2, 2\]",
            lambda: regression_metrics(torch.zeros(2, 2), torch.zeros(2)),
        ),
        (
            ShapeError,
            "none of the 2 items",
            lambda: regression_metrics(torch.zeros(2), torch.full((2,), torch.nan)),
        ),
        (
            ShapeError,
            "none of the 2 items",
            lambda: class_metrics(torch.zeros(2, 3), torch.tensor([-100, -100])),
        ),
        (
            ShapeError,
            "none of the 0 items",
            lambda: class_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        ),
        (
            ShapeError,
            "class 3.*C=3",
            lambda: class_metrics(torch.zeros(2, 3), torch.tensor([0, 3])),
        ),
        (
            DataError,
            "item 1 is nan",
            lambda: regression_metrics(torch.tensor([0.0, torch.nan]), torch.zeros(2)),
        ),
        (
            DataError,
            "item 0 is",
            lambda: class_metrics(
                torch.tensor([[0.0, torch.inf]]), torch.zeros(1, dtype=torch.long)
            ),
        ),
        (
            DataError,
            "prediction of item 0 is -1; a class label",
            lambda: class_metrics(torch.tensor([-1, 0]), torch.tensor([0, 0])),
        ),
        (
            ShapeError,
            "at least 2 speakers",
            lambda: score_intervals(torch.randn(3), torch.randn(3), ["a"] * 3),
        ),
        (
            ShapeError,
            "2 speakers for 3 items",
            lambda: score_intervals(torch.randn(3), torch.randn(3), ["a", "b"]),
        ),
        (
            ConfigError,
            "unknown metric 'auc'.*rmse",
            lambda: compare(torch.randn(3), torch.randn(3), torch.randn(3), list("abc"), "auc"),
        ),
        (ConfigError, "unknown factors", lambda: best_prediction(listeners(40), ["smell"])),
        (
            ConfigError,
            "only the known-answer corpus",
            lambda: xray(torch.zeros(2), Batch({"audio": Stream.of(torch.zeros(2, 1, 1), rate=1)})),
        ),
        (ConfigError, "no ceiling", lambda: explained_share(torch.zeros(80), listeners(80), ())),
        (ShapeError, "tell the eight factors apart", lambda: xray(torch.zeros(6), listeners(6, 2))),
        (ShapeError, "3 predictions for 80", lambda: xray(torch.zeros(3), listeners(80))),
    ],
)
def test_errors_say_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---------------------------------------------------------------- intervals


def grouped(seed=0, speakers=9, n=120):
    rng = np.random.default_rng(seed)
    who = np.array([f"s{i}" for i in rng.integers(speakers, size=n)])
    t = rng.integers(0, 25, n).astype(float)
    return rng, who, t, t + rng.standard_normal(n) * 3, rng.integers(5, size=n), rng.random((n, 5))


def jackknife(score, who):
    "Pseudo-values by leaving people out, one by one, in the order of names."
    names = np.unique(who)
    whole = score(np.ones(len(who), bool))
    left_out = np.array([score(who != name) for name in names])
    return whole, len(names) * whole - (len(names) - 1) * left_out


def test_intervals_equal_people_left_out_and_scored_by_the_libraries():
    rng, who, t, p, c, scores = grouped()

    def ccc(k):
        spread = np.var(p[k], ddof=1) + np.var(t[k], ddof=1) + (p[k].mean() - t[k].mean()) ** 2
        return 2 * np.cov(p[k], t[k])[0, 1] / spread

    ours = score_intervals(p, t, who) | score_intervals(scores, c, who)
    for name, score in (
        ("rmse", lambda k: sk.root_mean_squared_error(t[k], p[k])),
        ("mae", lambda k: sk.mean_absolute_error(t[k], p[k])),
        ("ccc", ccc),
        ("uar", lambda k: sk.balanced_accuracy_score(c[k], scores[k].argmax(1))),
        ("macro_f1", lambda k: sk.f1_score(c[k], scores[k].argmax(1), average="macro")),
    ):
        whole, each = jackknife(score, who)
        reach = stats.t.ppf(0.975, 8) * np.sqrt(each.var(ddof=1) / 9)
        value, low, high = ours[name]
        assert value == pytest.approx(whole)
        # at most one end lies farther out, where people are skewed
        assert low <= whole - reach + 1e-9 and high >= whole + reach - 1e-9
        assert min(whole - reach - low, high - whole - reach) == pytest.approx(0, abs=1e-9)


def hall(t, skew):
    "Student's t of a mean, corrected for its skew (Hall 1992)."
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def test_a_difference_of_means_is_the_paired_t_test_of_people():
    rng = np.random.default_rng(3)
    who = np.repeat(np.arange(12), 5)
    t = rng.standard_normal(60)
    p, q = (t + rng.standard_normal(60) for _ in "ab")
    found = compare(p, q, t, who, "mae", level=0.9)
    by_person = [abs(x - t).reshape(12, 5).mean(1) for x in (p, q)]
    test = stats.ttest_rel(*by_person)
    low, high = test.confidence_interval(0.9)
    skew = stats.skew(by_person[0] - by_person[1]) * np.sqrt(11 / 12) ** 3 / np.sqrt(12)
    moved = hall(test.statistic, skew) * np.sign(test.statistic)
    assert found.p == pytest.approx(max(test.pvalue, 2 * stats.t.sf(moved, 11)))
    value, lower, upper = found.difference
    assert value == pytest.approx(np.mean(by_person[0] - by_person[1]))
    assert lower <= low + 1e-9 and upper >= high - 1e-9
    # only the end where a skewed person may be missing lies farther out
    assert min(low - lower, upper - high) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seeds, people", [(2, 7), (3, 5), (5, 24)])
def test_two_way_equals_an_analysis_of_variance_by_least_squares(seeds, people):
    rng = np.random.default_rng(seeds)
    table = (
        rng.standard_normal((seeds, 1))
        + 2 * rng.gamma(2, size=(1, people))
        + rng.standard_normal((seeds, people))
    )
    s, p = (np.eye(n)[i.ravel()] for n, i in zip(table.shape, np.indices(table.shape)))

    def left(*columns):
        x, y = np.hstack([np.ones((table.size, 1)), *columns]), table.ravel()
        return ((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2).sum()

    rest = left(s, p) / ((seeds - 1) * (people - 1))
    by_seed = (left(p) - left(s, p)) / (seeds - 1)
    by_person = (left(s) - left(s, p)) / (people - 1)
    variance = max(by_seed + by_person - rest, by_seed, by_person)
    share = max(by_seed - rest / 4, 0) / variance
    spread = two_way(table)
    assert spread.error == pytest.approx(np.sqrt(variance / table.size))
    assert spread.freedom == pytest.approx(1 / (share / (seeds - 1) + (1 - share) / (people - 1)))
    # many tables at once, and their p-values, are the same as one by one
    many = np.stack([table, -table, 0 * table])
    p_values = two_way(many).p_of(many.mean((1, 2)))
    t = table.mean() / spread.error
    test = 2 * stats.t.sf(min(abs(t), hall(t, spread.skew) * np.sign(t)), spread.freedom)
    assert p_values == pytest.approx([min(test, 1)] * 2 + [1])
    # p and interval agree: at the level of p one end is zero
    if test < 1:
        ends = spread.around(table.mean(), 1 - test)
        assert min(abs(ends.low), abs(ends.high)) == pytest.approx(0, abs=1e-6)


def test_skew_moves_one_end_outwards_as_halls_transformation_says():
    people = np.random.default_rng(2).gamma(1, size=(1, 15)) ** 2
    spread, value = two_way(people), people.mean()
    reach = stats.t.ppf(0.975, 14)
    found = spread.around(value)
    assert found.low == pytest.approx(value - reach * spread.error)
    assert found.high > value + 1.2 * reach * spread.error
    skew = stats.skew(people[0]) * np.sqrt(14 / 15) ** 3 / np.sqrt(15)
    assert hall((value - found.high) / spread.error, skew) == pytest.approx(-reach)
    mirrored = two_way(-people).around(-value)
    assert mirrored == pytest.approx((-value, -found.high, -found.low))


def test_sums_by_speaker_and_resamples_of_them():
    sums = sum_by_speaker(np.c_[np.ones(6), [1, 10, 100, 1000, 1e4, 1e5]], list("abcabc"))
    assert np.array_equal(np.sort(sums[:, 1]), [1001, 10010, 100100])
    draws = resample_speakers(sums, 300, 0)
    assert (
        (draws[:, 0] == 6).all()
        and len({tuple(d) for d in draws}) == 10
        and np.allclose(draws[:, 1].mean(), sums[:, 1].sum(), rtol=0.1)
    )


def test_resampled_intervals_are_widened_for_few_people():
    draws = stats.norm.ppf((np.arange(20000) + 0.5) / 20000)
    for count in (10, 60):
        wide = np.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1)
        found = Interval.of(0.0, np.append(draws, np.nan), count)
        assert found == pytest.approx((0, -wide, wide), rel=0.02)


def test_order_of_items_and_names_of_speakers_change_nothing():
    rng, who, t, p, c, scores = grouped(1)
    order = rng.permutation(len(t))
    renamed = np.array([{s: f"z{9 - int(s[1:])}" for s in who}[s] for s in who])
    for a, b in ((p, t), (scores, c)):
        base = score_intervals([a, a[::-1]], b, who)
        assert base == score_intervals([a, a[::-1]], b, who)
        for again in (
            score_intervals([a[order], a[::-1][order]], b[order], who[order]),
            score_intervals([a, a[::-1]], b, renamed),
        ):
            for k in base:
                assert np.allclose(base[k], again[k], atol=1e-12)
        narrow = score_intervals([a, a[::-1]], b, who, level=0.5)
        assert all(base[k].low <= narrow[k].low <= narrow[k].high <= base[k].high for k in base)


def test_several_seeds_are_a_mean_and_their_spread_counts():
    rng, who, t, p, *_ = grouped(5)
    lucky = t + 0.3 * (p - t)
    one, two = score_intervals(p, t, who)["rmse"], score_intervals([p, lucky], t, who)["rmse"]
    assert two.value == pytest.approx((one.value + regression_metrics(lucky, t)["rmse"]) / 2)
    assert two.high - two.low > 3 * (one.high - one.low)
    # the same run three times is no news: neither more people nor other seeds
    thrice = score_intervals([p, p, p], t, who)["rmse"]
    assert thrice.low <= one.low + 1e-9 and thrice.high >= one.high - 1e-9
    with pytest.raises(ShapeError, match="3 and 2 seeds"):
        compare([p, p, p], [p, p], t, who)


def test_coverage_by_speaker_and_the_false_promise_of_items():
    truth, hits = np.sqrt(1.64), {True: 0, False: 0}
    for seed in range(400):
        r = np.random.default_rng([seed, 5])
        who = np.repeat(np.arange(30), 8)
        error = 0.8 * r.standard_normal(30)[who] + r.standard_normal(240)
        for by in hits:
            i = score_intervals(error, 0 * error, who if by else np.arange(240))["rmse"]
            hits[by] += i.low <= truth <= i.high
    # of a nominal .95; sd of a share: .011
    assert hits[True] / 400 > 0.92 and hits[False] / 400 < 0.85


def test_intervals_of_2000_people_take_no_time():
    rng = np.random.default_rng(0)
    t, c = rng.standard_normal(2000), rng.integers(7, size=2000)
    for a, b in ((t + 1, t), (rng.random((2000, 7)), c)):
        start = time.perf_counter()
        score_intervals([a] * 3, b, np.arange(2000))
        assert time.perf_counter() - start < 3


def test_interval_is_a_triple_that_formats_itself():
    import json

    i = Interval(0.5, 0.25, 0.75)
    assert (
        f"{i:.2f}" == "0.50 [0.25, 0.75]"
        and str(i) == "0.500 [0.250, 0.750]"
        and json.dumps(i) == "[0.5, 0.25, 0.75]"
        and i.within(0.3, 1) == (0.5, 0.3, 0.75)
    )


# ---------------------------------------------------------------- comparison


def test_compare_gives_the_scores_and_their_difference():
    rng, who, t, p, c, scores = grouped(2)
    q = p + rng.standard_normal(len(p))
    out = compare([p, q], [q, t], t, who, "mae")
    mae = [regression_metrics(x, t)["mae"] for x in (p, q)]
    assert out.a == score_intervals([p, q], t, who)["mae"]
    assert out.b == score_intervals([q, t], t, who)["mae"]
    assert out.difference.value == pytest.approx(mae[0] / 2)
    assert (out.seeds, out.people) == (2, 9) and out == compare([p, q], [q, t], t, who, "mae")
    back = compare([q, t], [p, q], t, who, "mae")
    assert np.allclose(back.difference, -np.array(out.difference)[[0, 2, 1]])
    assert back.p == pytest.approx(out.p)
    # a rule without seeds is given once; labels may stand against scores
    other = compare([scores, scores[::-1]], c, c, who, "uar")
    assert other.b == Interval(1, 1, 1) and other.verdict.startswith("b is better")
    assert other == compare([scores, scores[::-1]], [c, c], c, who, "uar")


def test_a_model_against_itself_has_no_difference():
    _, who, t, p, c, scores = grouped(3)
    for a, b, metric in ((p, t, "ccc"), (scores, c, "weighted_f1")):
        for said in (a, [a, a[::-1]]):
            out = compare(said, said, b, who, metric)
            assert out.difference == Interval(0, 0, 0) and out.p == 1
            assert out.verdict.startswith("not shown")


def test_one_seed_says_that_it_knows_nothing_of_others():
    _, who, t, p, *_ = grouped(3)
    one, two = compare(p, t, t, who), compare([p, p - 1], t, t, who)
    assert "one seed" in one.verdict and "not other seeds" in one.about
    assert "one seed" not in two.verdict and "other seeds (9 people, 2 seeds)" in two.about


@pytest.mark.parametrize(
    "metric, low, high, smallest, says",
    [
        ("uar", 0.02, 0.06, 0, "a is better"),
        ("uar", -0.06, -0.02, 0, "b is better"),
        ("rmse", 0.02, 0.06, 0, "b is better"),
        ("mae", -0.06, -0.02, 0.02, "a is better by 0.02 or more"),
        ("ccc", 0.02, 0.06, 0.03, "a is better, perhaps by less than 0.03"),
        ("ccc", 0.02, 0.06, 0.07, "a is better, by less than 0.07"),
        ("uar", -0.02, 0.06, 0.03, "not shown"),
        ("uar", -0.02, 0.06, 0.07, "no difference of 0.07 or more"),
        ("uar", -0.02, 0.06, 0, "not shown"),
    ],
)
def test_verdict_respects_the_smallest_difference_worth_having(metric, low, high, smallest, says):
    assert _verdict(metric, Interval((low + high) / 2, low, high), smallest) == says


# ---------------------------------------------------------------- promises, by simulation


@pytest.fixture(scope="module")
def null():
    path = Path(__file__).parent / "bench" / "null.py"
    spec = importlib.util.spec_from_file_location("null", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seeds, people, spread", [(1, 10, 0.0), (3, 24, 1.5), (5, 10, 1.5)])
def test_equal_models_are_rarely_called_different(null, seeds, people, spread):
    rates = null.cell_rates(np.random.default_rng(people), 800, seeds, people, spread, True)
    # nominal .05, of 800 studies: sd .008
    assert max(rates.values()) < 0.075 and set(rates) == {"rmse", "ccc", "uar", "weighted_f1"}


def test_stacked_seeds_would_be_called_different_and_real_differences_are(null):
    rng = np.random.default_rng(1)
    sums = null.sums_by_person(*null.class_study(rng, 300, 3, 24, 3.0, False))
    stacked = sums.sum(2, keepdims=True)  # as if three seeds were one run with more answers
    assert np.mean(null.p_values(stacked, "uar") <= 0.05) > 0.15
    assert np.mean(null.p_values(sums, "uar") <= 0.05) < 0.08
    assert null.cell_rates(rng, 200, 5, 24, 0.75, False, gain=0.06)["uar"] > 0.7


@pytest.mark.parametrize("seeds, people", [(1, 10), (3, 24)])
def test_intervals_of_scores_hold_the_truth(null, seeds, people):
    held = null.coverage(np.random.default_rng(0), 200, seeds, people, True)
    # at least .93 is promised, of 200 studies: sd .018
    assert min(held.values()) > 0.9


def closed_testing(p):
    "Holm's adjusted values by brute force: the largest Bonferroni p of every family around each."
    found = np.zeros(len(p))
    for size in range(1, len(p) + 1):
        for family in itertools.combinations(range(len(p)), size):
            bound = min(1, size * min(p[i] for i in family))
            for i in family:
                found[i] = max(found[i], bound)
    return found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_equals_closed_testing_by_brute_force(p):
    assert holm(p) == pytest.approx(closed_testing(p))


def test_holm_refuses_what_is_no_probability():
    assert holm([]).shape == (0,) and holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    for bad in ([0.5, float("nan")], [1.2], [-0.1]):
        with pytest.raises(DataError, match="between 0 and 1"):
            holm(bad)


def test_pseudo_values_of_a_mean_are_the_peoples_own():
    sums = np.array([[90.0, 10], [40, 10], [160, 10]])
    whole, each = pseudo_values(sums, lambda s: s[..., 0] / s[..., 1])
    assert whole == pytest.approx(290 / 30) and each == pytest.approx([9, 4, 16])


# ---------------------------------------------------------------- the module


def test_module_imports_nothing_heavy_at_its_top():
    from mmemo.evaluation import intervals, metrics

    top = [
        n
        for module in (intervals, metrics)
        for n in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names} | {
        n.module.split(".")[0] for n in top if isinstance(n, ast.ImportFrom)
    }
    assert names <= {
        "__future__",
        "collections",
        "intervals",
        "math",
        "typing",
        "numpy",
        "torch",
        "jaxtyping",
        "core",
        "models",
    }


# --- the kind of a label is declared, not guessed from its type


def test_whole_numbers_that_are_compared_with_numbers_are_numbers():
    "A PHQ-8 stored as integers: 1.9 for 1 is an error of .9, not a right answer."
    said, target, people = np.array([1.9, 2.9, 3.9]), np.array([1, 2, 3]), ["a", "b", "c"]
    assert score_intervals(said, target, people)["rmse"].value == pytest.approx(0.9)
    found = compare(said, said + 1, target, people, "rmse")
    assert found.difference.value == pytest.approx(-1.0)
    whole = score_intervals(said.astype(int), target, people, numbers=True)
    assert whole["mae"].value == 0 and "uar" in score_intervals(said.astype(int), target, people)
    with pytest.raises(DataError, match="prediction of item 0 is 1.9; a class label is a whole"):
        class_metrics(said, target)


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64", "float32", "float64"])
def test_labels_of_any_type_are_taken(kind):
    scores, labels = np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 1])
    wanted = class_metrics(scores, labels)
    assert class_metrics(scores, labels.astype(kind)) == wanted
    people = ["a", "a", "b", "b"]
    found = score_intervals(scores, labels.astype(kind), people)
    assert found["accuracy"] == score_intervals(scores, labels, people)["accuracy"]


def test_labels_that_are_not_known_do_not_count_whatever_says_so():
    scores, labels = np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, -100, 1])
    coded = np.array([0, 1, np.nan, 1])
    assert class_metrics(scores, coded) == class_metrics(scores, labels)
    people = ["a", "a", "b", "b"]
    assert score_intervals(scores, coded, people) == score_intervals(scores, labels, people)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, -1], "target of item 2 is -1"),
        ([0.0, 0.5, 1.0], "target of item 1 is 0.5"),
        ([0, 1, 7], "a target is class 7, the scores have C=3"),
        (["a", "b", "c"], "the target is of type <U1"),
        ([None, 1, 2], "the target is of type object"),
    ],
)
def test_what_cannot_be_a_label_is_one_error(labels, said):
    with pytest.raises((DataError, ShapeError), match=said):
        class_metrics(np.eye(3), np.array(labels))


@pytest.mark.parametrize("measure", [regression_metrics, class_metrics])
def test_a_column_is_not_compared_with_a_row(measure):
    for said, target in ((np.ones((4, 1)), np.ones(4)), (np.ones(4), np.ones((4, 1)))):
        if measure is class_metrics and said.ndim == 2:
            continue  # the scores of one class
        with pytest.raises(ShapeError, match=r"a target is \[N\]"):
            measure(said, target)
