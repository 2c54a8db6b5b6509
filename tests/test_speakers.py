"""The speaker probe and the cross-corpus matrix."""

import numpy as np
import pytest
import torch
from people import people

from mmemo.core.batch import Batch
from mmemo.core.errors import ConfigError, DataError
from mmemo.evaluation.protocols import (
    normalise_by_speaker,
)
from mmemo.evaluation.speakers import CrossCorpus, cross_corpus, draw_cross_corpus, speaker_probe
from mmemo.models.base import RegressionHead, static_model


# ------------------------------------------------------------------ probe
def test_probe_agrees_with_scikit_learn_and_knows_its_chance():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = people(S=4, each=5, offset=1.5)
    x = data.streams["audio"].x[:, 0]
    found = speaker_probe(x, data, folds=5, C=1.0, seed=3)
    rng, y, fold = np.random.default_rng(3), np.arange(20) % 4, np.zeros(20, int)
    for k in range(4):
        fold[y == k] = rng.permutation(5) % 5
    want = cross_val_score(
        make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000)),
        x.numpy(),
        y,
        cv=PredefinedSplit(fold),
    ).mean()
    assert (
        found.accuracy.value == pytest.approx(want) and found.chance == 0.25 and found.speakers == 4
    )
    assert found.accuracy.low < found.accuracy.value < found.accuracy.high


def test_probe_hears_offsets_and_nothing_else():
    loud, silent = (
        speaker_probe(d.streams["audio"].x[:, 0], d)
        for d in (people(each=20, offset=5.0), people(each=20, offset=0.0))
    )
    assert loud.accuracy.low > 0.8 and silent.accuracy.low < silent.chance < silent.accuracy.high


def test_probe_interval_is_that_of_scipy():
    from scipy.stats import binomtest

    data = people(each=7, offset=1.0)
    found = speaker_probe(data.streams["audio"].x[:, 0], data)
    want = binomtest(round(found.accuracy.value * 42), 42).proportion_ci(method="wilson")
    assert (found.accuracy.low, found.accuracy.high) == pytest.approx(
        (want.low, want.high), abs=1e-4
    )


def test_probe_takes_a_model_and_leaves_lone_items_out():
    data = people(S=3, each=4)
    model = static_model(data, {"phq8": RegressionHead(8)}, 8)
    whole = speaker_probe(model, data)
    assert whole.speakers == 3
    lone = [0, 1, 3, 4, 6]  # two speakers twice or more, nobody else
    assert speaker_probe(model, data[lone + [2]]).speakers == 2
    with pytest.raises(DataError, match="1 of the speakers have two items"):
        speaker_probe(model, data[[0, 3, 1]])
    with pytest.raises(ConfigError, match="no meta field 'who'"):
        speaker_probe(model, data, by="who")
    with pytest.raises(ConfigError, match="folds=1"):
        speaker_probe(model, data, folds=1)
    with pytest.raises(DataError, match="3 embeddings for 12 items"):
        speaker_probe(torch.zeros(3, 2), data)


# ------------------------------------------------------------------ across corpora
def known(corpus, n=80, shift=0.0):
    data = people(S=8, each=n // 8, T=1, seed=len(corpus))
    x = data.streams["audio"].x
    data.targets["phq8"] = x[:, 0, 0] + shift
    return Batch(
        data.streams,
        data.targets,
        {
            **data.meta,
            "speaker": [f"{corpus}-{s}" for s in data.meta["speaker"]],
            "id": [f"{corpus}-{i}" for i in data.meta["id"]],
        },
    )


def test_cross_corpus_trains_on_rows_and_tests_on_columns():
    parts, seen = (
        {"a": known("a"), "bb": known("bb", shift=3.0), "ccc": known("ccc", shift=-1.0)},
        [],
    )

    def learn(train, seed):
        mean = train.targets["phq8"].mean()
        seen.append(
            (
                seed,
                {s.split("-")[0] for s in train.meta["speaker"]},
                set(train.meta["speaker"]),
                len(train),
            )
        )

        def score(test):
            assert not seen[-1][2] & set(test.meta["speaker"])
            return float((test.targets["phq8"].mean() - mean).abs())

        return score

    found = cross_corpus(parts, learn, seeds=(0, 1), items=40)
    assert (
        found.names == ("a", "bb", "ccc")
        and found.scores.shape == (2, 3, 3)
        and [s[0] for s in seen] == [0, 0, 0, 1, 1, 1]
    )
    assert [s[1] for s in seen[:3]] == [{"a"}, {"bb"}, {"ccc"}] and all(s[3] == 40 for s in seen)
    want = np.abs(np.subtract.outer([0, 3, -1], [0, 3, -1]))
    assert np.allclose(found.scores.mean(0), want, atol=0.6)
    again = cross_corpus(parts, learn, seeds=(0, 1), items=40)
    assert np.array_equal(found.scores, again.scores)
    with pytest.raises(DataError, match="speaker a-s0, a-s1, a-s2 and 5 more in a and in twin"):
        cross_corpus({"a": parts["a"], "twin": parts["a"]}, learn)
    own = {name: normalise_by_speaker(data, ["audio"], by="corpus") for name, data in parts.items()}
    with pytest.raises(DataError, match="statistics of each corpus"):
        cross_corpus(own, learn)
    assert (
        not found.transductive
        and cross_corpus(own, learn, seeds=(0,), transductive=True).transductive
    )


def test_matrix_is_drawn_with_its_ceilings():
    import matplotlib.pyplot as plt

    found, ceilings = (
        CrossCorpus(("x", "y"), np.array([[[1.0, 2], [3, 1]], [[1.2, 2], [3, 1]]])),
        CrossCorpus(("x", "y"), np.full((2, 2, 2), 0.5)),
    )
    ax = draw_cross_corpus(found, ceilings)
    text = [t.get_text() for t in ax.texts]
    assert (
        text[0] == "1.10 ± 0.14"
        and text.count("ceiling 0.50") == 4
        and [t.get_text() for t in ax.get_yticklabels()] == ["x", "y"]
    )
    assert (
        ax.get_xlabel() == "tested on"
        and "transductive" in draw_cross_corpus(found._replace(transductive=True)).get_xlabel()
    )
    assert len(draw_cross_corpus(CrossCorpus(("x", "y"), found.scores[:1])).texts) == 4
    plt.close("all")
