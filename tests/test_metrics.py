"""Metrics against scikit-learn and torchmetrics, intervals against explicit resamples."""

import ast
import time

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import torchmetrics.functional as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from listeners import Talker, listeners

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.evaluation.metrics import (
    Interval,
    bootstrap,
    class_metrics,
    compare,
    confusion,
    regression_metrics,
    reliability,
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
    sums = bootstrap(p, t, range(len(t)), resamples=2)  # the second road: sums
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
        sums = bootstrap(scores, target, range(len(target)), resamples=2)
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
    assert bootstrap(p, holes, speakers) == bootstrap(p[keep], t[keep], kept)
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
        assert bootstrap(p, t, range(len(t)), resamples=3)["ccc"].value == pytest.approx(want)


def test_resamples_with_constant_targets_have_ccc_zero_not_noise():
    p, t = np.array([0.1, 0.1, 0.1, 9.1]) + 0.2, np.array([0.1, 0.1, 0.1, 7.3]) + 0.2
    i = bootstrap(p, t, range(4), resamples=500)["ccc"]
    assert 0 <= i.low <= i.value <= i.high <= 1


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
            "label is -1",
            lambda: class_metrics(torch.tensor([-1, 0]), torch.tensor([0, 0])),
        ),
        (
            ShapeError,
            "at least 2 speakers",
            lambda: bootstrap(torch.randn(3), torch.randn(3), ["a"] * 3),
        ),
        (
            ShapeError,
            "2 speakers for 3 items",
            lambda: bootstrap(torch.randn(3), torch.randn(3), ["a", "b"]),
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


def test_bootstrap_equals_explicit_resamples_scored_by_the_libraries():
    rng, who, t, p, c, scores = grouped()
    names = np.unique(who)
    rows = {s: np.flatnonzero(who == s) for s in names}
    picks = [np.concatenate([rows[s] for s in rng.choice(names, len(names))]) for _ in range(1000)]

    def ccc(i):
        return (
            2
            * np.cov(p[i], t[i])[0, 1]
            / (np.var(p[i], ddof=1) + np.var(t[i], ddof=1) + (p[i].mean() - t[i].mean()) ** 2)
        )

    ours, classes = bootstrap(p, t, who, resamples=6000), bootstrap(scores, c, who, resamples=6000)
    for have, score in (
        (ours["rmse"], lambda i: sk.root_mean_squared_error(t[i], p[i])),
        (ours["mae"], lambda i: sk.mean_absolute_error(t[i], p[i])),
        (ours["ccc"], ccc),
        (classes["uar"], lambda i: sk.balanced_accuracy_score(c[i], scores[i].argmax(1))),
        (classes["macro_f1"], lambda i: sk.f1_score(c[i], scores[i].argmax(1), average="macro")),
    ):
        low, high = np.quantile([score(i) for i in picks], [0.025, 0.975])
        assert have.low == pytest.approx(
            low, abs=0.15 * (high - low)
        ) and have.high == pytest.approx(high, abs=0.15 * (high - low))


def test_one_resample_is_a_sum_over_drawn_speakers():
    from mmemo.evaluation.metrics import resample_speakers, sum_by_speaker

    sums = sum_by_speaker(np.c_[np.ones(6), [1, 10, 100, 1000, 1e4, 1e5]], list("abcabc"))
    assert np.array_equal(np.sort(sums[:, 1]), [1001, 10010, 100100])
    draws = resample_speakers(sums, 300, 0)
    assert (
        (draws[:, 0] == 6).all()
        and len({tuple(d) for d in draws}) == 10
        and np.allclose(draws[:, 1].mean(), sums[:, 1].sum(), rtol=0.1)
    )


def test_seed_order_of_items_and_names_of_speakers():
    rng, who, t, p, c, scores = grouped(1)
    order = rng.permutation(len(t))
    renamed = np.array([{s: f"z{9 - int(s[1:])}" for s in who}[s] for s in who])
    for a, b in ((p, t), (scores, c)):
        base = bootstrap(a, b, who, seed=3)
        assert base == bootstrap(a, b, who, seed=3) != bootstrap(a, b, who, seed=4)
        for again in (
            bootstrap(a[order], b[order], who[order], seed=3),
            bootstrap(a, b, renamed, seed=3),
        ):
            for k in base:
                assert np.allclose(base[k], again[k], atol=1e-12)
        narrow = bootstrap(a, b, who, seed=3, level=0.5)
        assert all(base[k].low <= narrow[k].low <= narrow[k].high <= base[k].high for k in base)


def test_coverage_by_speaker_and_the_false_promise_of_items():
    truth, hits = np.sqrt(1.64), {True: 0, False: 0}
    for seed in range(600):
        r = np.random.default_rng([seed, 5])
        who = np.repeat(np.arange(100), 8)
        error = 0.8 * r.standard_normal(100)[who] + r.standard_normal(800)
        for by in hits:
            i = bootstrap(
                error, 0 * error, who if by else np.arange(800), resamples=200, seed=seed
            )["rmse"]
            hits[by] += i.low <= truth <= i.high
    # of a nominal .95; sd of a share: .01
    assert hits[True] / 600 > 0.91 and hits[False] / 600 < 0.85


def test_2000_resamples_of_2000_items_take_about_a_second():
    rng = np.random.default_rng(0)
    t, c = rng.standard_normal(2000), rng.integers(7, size=2000)
    for a, b in ((t + 1, t), (rng.random((2000, 7)), c)):
        start = time.perf_counter()
        bootstrap(a, b, np.arange(2000))
        assert time.perf_counter() - start < 3


def test_interval_is_a_triple_that_formats_itself():
    import json

    i = Interval(0.5, 0.25, 0.75)
    assert (
        f"{i:.2f}" == "0.50 [0.25, 0.75]"
        and str(i) == "0.500 [0.250, 0.750]"
        and json.dumps(i) == "[0.5, 0.25, 0.75]"
    )


# ---------------------------------------------------------------- comparison


def test_compare_uses_the_same_resamples_for_all_three_intervals():
    rng, who, t, p, c, scores = grouped(2)
    q = p + rng.standard_normal(len(p))
    out = compare(p, q, t, who, "mae")
    assert out.difference.value == pytest.approx(
        regression_metrics(p, t)["mae"] - regression_metrics(q, t)["mae"]
    )
    assert out.a.value == pytest.approx(
        regression_metrics(p, t)["mae"]
    ) and out.difference.high - out.difference.low < (out.a.high - out.a.low) + (
        out.b.high - out.b.low
    )
    back = compare(q, p, t, who, "mae")
    assert (
        back.difference.value == pytest.approx(-out.difference.value)
        and back.a.value == out.b.value
    )
    other = compare(scores, c, c, who, "uar")  # scores against labels that are all right
    assert other.b == Interval(1, 1, 1) and other.difference.value < 0 and other.p < 0.02


def test_a_model_against_itself_has_no_difference():
    _, who, t, p, c, scores = grouped(3)
    for a, b, metric in ((p, t, "ccc"), (scores, c, "weighted_f1")):
        out = compare(a, a, b, who, metric)
        assert out.difference == Interval(0, 0, 0) and out.p == 1


def test_p_value_equals_full_enumeration_of_exchanges():
    import itertools

    rng, who, t, p, *_ = grouped(4, speakers=7)
    q = t + rng.standard_normal(len(t)) * 3.4

    def rmse(v):
        return np.sqrt(np.mean((v - t) ** 2))

    seen = abs(rmse(p) - rmse(q))
    hits = []
    for flips in itertools.product([False, True], repeat=7):
        swap = np.isin(who, [f"s{i}" for i in np.flatnonzero(flips)])
        hits.append(abs(rmse(np.where(swap, q, p)) - rmse(np.where(swap, p, q))) >= seen - 1e-12)
    assert compare(p, q, t, who, resamples=8000).p == pytest.approx(np.mean(hits), abs=0.02)


def test_p_value_is_honest_under_correlated_speakers():
    low = 0
    for seed in range(200):
        r = np.random.default_rng([seed, 9])
        who = np.repeat(np.arange(20), 10)
        t = r.standard_normal(200)
        p, q = (t + 0.8 * r.standard_normal(20)[who] + r.standard_normal(200) for _ in "ab")
        low += compare(p, q, t, who, resamples=200, seed=seed).p <= 0.1
    assert 6 <= low <= 34  # 20 expected, sd 4.2


# ---------------------------------------------------------------- the module


def test_module_imports_nothing_heavy_at_its_top():
    import mmemo.evaluation.metrics

    top = [
        n
        for n in ast.parse(open(mmemo.evaluation.metrics.__file__).read()).body
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names} | {
        n.module.split(".")[0] for n in top if isinstance(n, ast.ImportFrom)
    }
    assert names <= {
        "__future__",
        "collections",
        "typing",
        "numpy",
        "torch",
        "jaxtyping",
        "core",
        "models",
    }
