"""Classical baselines: their inputs, their choice, and what nobody may look at."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_predict

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.evaluation.classical import (
    Classical,
    cut_inputs,
    fit_chosen,
    inner_folds,
    linear_classes,
    linear_numbers,
    nested_answers,
    on_cut_inputs,
    pooled_features,
    support_vectors,
    word_counts,
)


@pytest.fixture(scope="module")
def people():
    "Features, labels and people: three classes, 12 people with 20 items each."
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    who = np.repeat(np.arange(12), 20)
    shift = rng.standard_normal((12, 8))
    x = rng.standard_normal((3, 8))[y] + shift[who] + 1.5 * rng.standard_normal((240, 8))
    return x, y, who


def small():
    return Classical(on_cut_inputs(LogisticRegression(max_iter=500)), {"model__C": (0.01, 0.1, 1)})


def test_features_are_mean_and_spread_of_the_real_steps():
    x = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [5.0], [5.0]], [[7.0], [7.0], [7.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    once = torch.tensor([[[4.0, 6.0]], [[8.0, 2.0]], [[0.0, 1.0]]])
    batch = Batch({"a": Stream.of(x, mask, rate=1), "b": Stream.of(once, rate=1)})
    found = pooled_features(batch)
    assert found.shape == (3, 4)
    # the spread of nothing but equal values is a small number, not zero
    assert np.allclose(found[:2], [[2, 1, 4, 6], [5, 0, 8, 2]], atol=2e-3)
    assert np.isnan(found[2, :2]).all() and found[2, 2:].tolist() == [0, 1]
    words = Batch({"text": Stream.of(torch.ones(2, 3, dtype=torch.long), rate=1)})
    with pytest.raises(ShapeError, match="text"):
        pooled_features(words)


def test_inputs_are_cut_by_the_statistics_of_those_who_teach():
    x = np.array([[0.0, np.nan], [2.0, 4.0], [4.0, 4.0], [2.0, np.nan]])
    front = cut_inputs(1.0).fit(x)
    assert np.allclose(front.transform([[2.0, np.nan], [1e9, 4.0], [-1e9, 4.0]])[:, 0], [0, 1, -1])
    # a column that nobody has stays, as nothing
    assert cut_inputs().fit_transform(np.full((3, 1), np.nan)).tolist() == [[0]] * 3


def test_a_choice_on_a_development_split_is_scikit_learns(people):
    x, y, who = people
    teach, watch = np.flatnonzero(who < 8), np.flatnonzero((who >= 8) & (who < 10))
    chosen = fit_chosen(small(), x, y, [(teach, watch)])
    scores = {}
    for C in (0.01, 0.1, 1):
        model = on_cut_inputs(LogisticRegression(C=C, max_iter=500)).fit(x[teach], y[teach])
        scores[C] = model.score(x[watch], y[watch])
    assert chosen.settings["C"] == max(scores, key=scores.get) and chosen.tried == 3
    assert chosen.score == pytest.approx(max(scores.values()))
    again = on_cut_inputs(LogisticRegression(C=chosen.settings["C"], max_iter=500))
    rest = x[who >= 10]
    assert (chosen.model.predict(rest) == again.fit(x[teach], y[teach]).predict(rest)).all()


def test_nested_answers_are_scikit_learns(people):
    x, y, who = people
    folds = list(GroupKFold(4).split(x, y, who))
    said, chosen = nested_answers(small(), x, y, folds, who)
    expected = np.zeros_like(y)
    for train, test in folds:
        inner = list(GroupKFold(4).split(x[train], y[train], who[train]))
        search = GridSearchCV(small().model, small().grid, cv=inner, scoring="accuracy")
        expected[test] = search.fit(x[train], y[train]).predict(x[test])
    assert (said == expected).all() and len(chosen) == 4
    plain = cross_val_predict(small().model, x, y, groups=who, cv=GroupKFold(4))
    assert abs((said == y).mean() - (plain == y).mean()) < 0.15


def test_who_is_tested_has_no_say(people):
    x, y, who = people
    ((train, test),) = list(GroupKFold(4).split(x, y, who))[:1]
    said, chosen = nested_answers(small(), x, y, [(train, test)], who)
    other, labels = x.copy(), y.copy()
    other[test] *= 100
    labels[test] = 0
    again, rechosen = nested_answers(small(), other, labels, [(train, test)], who)
    assert chosen[0].settings == rechosen[0].settings and chosen[0].score == rechosen[0].score
    weights = [one[0].model.named_steps["model"].coef_ for one in (chosen, rechosen)]
    assert np.array_equal(*weights)
    assert (np.delete(said, test) == -1).all() and (said[test] >= 0).all() and len(again) == 240


def test_unknown_labels_neither_teach_nor_watch(people):
    x, y, who = people
    some = y.copy()
    some[::3] = -100
    splits = inner_folds(np.arange(240), who)
    chosen = fit_chosen(small(), x, some, splits)
    known = np.flatnonzero(some >= 0)
    pairs = [tuple(rows[some[rows] >= 0] for rows in pair) for pair in splits]
    search = GridSearchCV(small().model, small().grid, cv=pairs, scoring="accuracy").fit(x, y)
    assert chosen.settings["C"] == search.best_params_["model__C"]
    model = on_cut_inputs(LogisticRegression(C=chosen.settings["C"], max_iter=500))
    assert (chosen.model.predict(x) == model.fit(x[known], y[known]).predict(x)).all()
    with pytest.raises(DataError, match="known labels"):
        fit_chosen(small(), x, np.full(240, -100), splits)


def test_numbers_are_chosen_by_the_smallest_error(people):
    x, y, who = people
    number = x @ np.arange(8) + np.random.default_rng(1).standard_normal(240)
    number[5] = np.nan
    chosen = fit_chosen(linear_numbers(), x, number, inner_folds(np.arange(240), who), "rmse")
    assert chosen.settings["alpha"] < 10 and 0.5 < chosen.score < 1.5
    said, _ = nested_answers(
        linear_numbers(), x, number, [(np.arange(120), np.arange(120, 200))], who, "mae"
    )
    assert np.isnan(said[:120]).all() and np.isfinite(said[120:200]).all()


def test_people_are_on_one_side(people):
    _, _, who = people
    pairs = inner_folds(np.flatnonzero(who > 3), torch.tensor(who), 3)
    assert len(pairs) == 3
    for teach, watch in pairs:
        assert not set(who[teach]) & set(who[watch]) and set(who[[*teach, *watch]]) == set(
            range(4, 12)
        )
    with pytest.raises(DataError, match="at least 2 groups"):
        inner_folds(np.flatnonzero(who == 3), who)


def test_words_are_counted():
    happy = ["what a lovely day", "how lovely this is", "a lovely lovely cake"] * 6
    sad = ["what a dreadful day", "how dreadful this is", "a dreadful cake"] * 6
    y = np.array([1] * 18 + [0] * 18)
    rows = np.arange(36)
    chosen = fit_chosen(word_counts(), happy + sad, y, [(rows[::2], rows[1::2])], "weighted_f1")
    assert chosen.score == 1 and chosen.model.predict(["lovely", "so dreadful"]).tolist() == [1, 0]


def test_a_wrong_metric_is_named(people):
    x, y, who = people
    with pytest.raises(ConfigError, match="metric"):
        fit_chosen(small(), x, y, inner_folds(np.arange(240), who), "acuracy")
    assert set(support_vectors().grid) <= set(support_vectors().model.get_params())
    assert set(linear_classes().grid) <= set(linear_classes().model.get_params())


def test_a_solver_that_does_not_converge_is_judged_in_silence():
    "Strong settings of a grid may need more iterations than a choice is worth."
    x, y = np.random.default_rng(0).normal(size=(80, 6)), np.arange(80) % 2
    candidate = linear_classes()
    candidate.model.set_params(model__max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_chosen(candidate, x, y, inner_folds(range(80), np.arange(80) // 10))
    assert found.tried == len(candidate.grid["model__C"]) * 2
