"""The protocol that refuses, leave-one-out and own statistics; the measured mistakes are measured
again.
"""

import warnings

import numpy as np
import pytest
import torch
from people import people, rows

from mmemo.core.batch import masked_mean, masked_std
from mmemo.core.errors import ConfigError, DataError
from mmemo.data.cmu import read_mosi
from mmemo.data.ravdess import read_ravdess
from mmemo.data.splits import speaker_split
from mmemo.evaluation.protocols import (
    MEASURED_MISTAKES,
    Protocol,
    leave_one_session_out,
    leave_one_speaker_out,
    make_protocols,
    normalise_by_speaker,
    published_folds,
)


# ------------------------------------------------------------------ normalisation
def test_normalising_by_speaker_is_a_z_score_over_real_steps():
    data = people(offset=3.0)
    s = normalise_by_speaker(data, ["audio"]).streams["audio"]
    for k in range(6):
        mine = rows(data, f"s{k}")
        real, was = s.x[mine][s.mask[mine]], data.streams["audio"].x[mine][s.mask[mine]]
        assert torch.allclose(real, (was - was.mean(0)) / was.std(0, correction=0), atol=1e-5)
    assert (s.x[~s.mask] == 0).all() and torch.equal(s.mask, data.streams["audio"].mask)


def test_normalising_ignores_padding_and_other_speakers_and_constants():
    data = people()
    s = data.streams["audio"]
    x = s.x.clone()
    x[:, :, 1] = 7.0
    x[~s.mask] = 1e6
    found = normalise_by_speaker(data.replace(audio=s.with_x(x)), ["audio"]).streams["audio"].x
    assert (found[:, :, 1] == 0).all() and found.abs().max() < 100
    part = rows(data, "s1", "s4")
    assert torch.allclose(
        normalise_by_speaker(data[part], ["audio"]).streams["audio"].x,
        normalise_by_speaker(data, ["audio"])[part].streams["audio"].x,
        atol=1e-6,
    )
    with pytest.raises(ConfigError, match="no stream 'face'"):
        normalise_by_speaker(data, ["face"])
    with pytest.raises(ConfigError, match="no meta field 'who'"):
        normalise_by_speaker(data, ["audio"], by="who")


# ------------------------------------------------------------------ protocol
def test_protocol_keeps_an_honest_split():
    data = people()
    p = Protocol(
        data, rows(data, "s0", "s1", "s2"), rows(data, "s3"), rows(data, "s4", "s5"), name="mine"
    )
    assert [len(p[k]) for k in ("train", "valid", "test")] == [15, 5, 10] and set(
        p["test"].meta["speaker"]
    ) == {"s4", "s5"}
    assert str(
        p
    ) == "mine: train 15 items of 3, valid 5 items of 1, test 10 items of 2 speakers" and p.report(
        {"uar": 0.5}
    ) == {"uar": 0.5}
    mask = np.isin(data.meta["speaker"], ["s4", "s5"])
    assert len(Protocol(data, ~mask, [], mask)["test"]) == 10
    with pytest.raises(ConfigError, match="unknown part 'dev'"):
        p["dev"]


def test_protocol_refuses_a_speaker_on_both_sides():
    data, all_ = people(), list(range(30))
    with pytest.raises(
        DataError,
        match=(
            r"clips: speaker s0, s1, s2 and 3 more stand in train and in test; .*0\.89 instead of"
            r" 0\.69 \(RAVDESS"
        ),
    ):
        Protocol(data, all_[:20], [], all_[20:], name="clips")
    with pytest.raises(DataError, match="speaker s3 stands in train and in valid"):
        Protocol(
            data, rows(data, "s0", "s3"), rows(data, "s3")[:0] + rows(data, "s3"), rows(data, "s1")
        )
    with pytest.raises(DataError, match="session d0 stands in train and in test"):
        Protocol(data, rows(data, "s0"), [], rows(data, "s1"), apart=("speaker", "session"))
    # the partner may be there, unless sessions are to be kept apart
    Protocol(data, rows(data, "s0"), [], rows(data, "s1"))


def test_protocol_refuses_the_test_set_as_validation():
    data, test = people(), rows(people(), "s4")
    with pytest.raises(
        DataError,
        match=(
            r"the test set is used for validation \(5 items: speaker s4\); .*0\.71 instead of 0\.69"
        ),
    ):
        Protocol(data, rows(data, "s0"), test, test)
    with pytest.raises(
        DataError, match=r"speaker s4 stands in valid and in test; .*chosen on the test"
    ):
        Protocol(data, rows(data, "s0"), test[:2], test[2:])


def test_protocol_refuses_a_recording_on_both_sides():
    data = people(id=[f"r{i // 2}" for i in range(30)])  # neighbours (two speakers) are on one tape
    with pytest.raises(
        DataError,
        match=(
            r"id r0, r12, r3 and 2 more stand in train and in test; .*frames of a clip on both"
            r" sides"
        ),
    ):
        Protocol(data, rows(data, "s0"), [], rows(data, "s1"))
    with pytest.raises(ConfigError, match="no meta field 'tape'"):
        Protocol(data, rows(data, "s0"), [], rows(data, "s2"), apart=("tape",))


def test_protocol_refuses_features_that_know_the_labels():
    data = people()
    learnt = rows(data, "s0", "s1", "s2")
    with pytest.raises(
        DataError,
        match=(
            r"fitted on the labels of 5 items of valid \(speaker s2\); .*0\.98 instead of 0\.76"
            r" \(CMU-MOSI"
        ),
    ):
        Protocol(data, rows(data, "s0", "s1"), rows(data, "s2"), rows(data, "s5"), fitted=learnt)
    Protocol(data, learnt, rows(data, "s3"), rows(data, "s5"), fitted=learnt)


def test_protocol_refuses_statistics_of_test_speakers_unless_it_may_say_so():
    data = normalise_by_speaker(people(), ["audio"])
    split = rows(data, "s0", "s1"), rows(data, "s2"), rows(data, "s3")
    with pytest.raises(
        DataError,
        match=(
            r"statistics of each speaker, also of those in test \(speaker s3\); .*0\.84 instead of"
            r" 0\.69 .*transductive=True"
        ),
    ):
        Protocol(data, *split)
    p = Protocol(data, *split, transductive=True)
    assert "TRANSDUCTIVE" in str(p) and p.report({"uar": 0.5}) == {"uar (transductive)": 0.5}
    # neither pooling nor a choice of rows loses the mark
    assert "TRANSDUCTIVE" in str(p.pooled()) and "normalised" in data[split[2]].meta


def test_protocol_refuses_rows_that_are_not_there():
    data = people()
    with pytest.raises(DataError, match="no item is in test"):
        Protocol(data, [0], [], [])
    with pytest.raises(DataError, match="test names row 30; the data have rows 0 to 29"):
        Protocol(data, [0], [], [30])
    with pytest.raises(DataError, match="a row stands twice in train"):
        Protocol(data, [0, 0], [], [1])
    with pytest.raises(DataError, match="train is a mask of 3, the data have 30 items"):
        Protocol(data, np.ones(3, bool), [], [1])


def test_pooled_takes_its_statistics_from_training_people():
    data = people(offset=4.0)
    p = Protocol(data, rows(data, "s0", "s1", "s2"), rows(data, "s3"), rows(data, "s4", "s5"))
    x = data.streams["audio"]
    x.x[p.test] += 1000.0
    again = p.pooled()
    train = again["train"].streams["audio"].x
    x.x[p.test] -= 1000.0
    assert (
        torch.equal(train, p.pooled()["train"].streams["audio"].x)
        and train.shape == (15, 1, 4)
        and again["test"].streams["audio"].x.mean() > 5
    )


# ------------------------------------------------------------------ leave one out
@pytest.mark.parametrize(
    "make, by, n",
    [
        (leave_one_speaker_out, "speaker", 6),
        (leave_one_session_out, "session", 3),
        (published_folds, "fold", 3),
    ],
)
def test_everybody_is_tested_once_and_chosen_on_others(make, by, n):
    data = people()
    found = list(make(data, share=0.2))
    assert len(found) == n and sorted(np.concatenate([p.test for p in found])) == list(range(30))
    for p in found:
        assert (
            len(set(np.asarray(data.meta[by])[p.test].tolist())) == 1
            and len(p.valid)
            and by in p.name
        )
        assert sorted(np.concatenate([p.train, p.valid, p.test])) == list(range(30))
        for field in {"speaker", by}:
            assert (
                not set(np.asarray(data.meta[field])[p.valid].tolist())
                & set(np.asarray(data.meta[field])[p.test].tolist())
                or field == "fold"
            )
    again = list(make(data, share=0.2))
    assert all(np.array_equal(a.valid, b.valid) for a, b in zip(found, again))
    assert all(len(p.valid) == 0 and len(p.train) + len(p.test) == 30 for p in make(data, share=0))


def test_sessions_are_refused_where_a_speaker_is_in_two():
    # s0 turns up in the session of s4 and s5
    data = people()
    data.meta["session"][0] = "d2"
    with pytest.raises(DataError, match="speaker s0 stands in train and in test"):
        list(leave_one_session_out(data, share=0))
    with pytest.raises(ConfigError, match="no meta field 'tape'"):
        next(make_protocols(data, "speaker", inner="tape"))


def test_protocols_mark_transductive_data():
    data = normalise_by_speaker(people(), ["audio"])
    assert all("TRANSDUCTIVE" in str(p) for p in leave_one_speaker_out(data, transductive=True))
    with pytest.raises(DataError, match="statistics of each speaker"):
        next(leave_one_speaker_out(data))


# ----------------------------------------------------- the measured mistakes, measured again
def svm(x, y, parts):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    return float(
        np.mean(
            [
                make_pipeline(StandardScaler(), SVC(C=10)).fit(x[a], y[a]).score(x[b], y[b])
                for a, b in parts
            ]
        )
    )


def by_value(v):
    return [(np.flatnonzero(v != k), np.flatnonzero(v == k)) for k in np.unique(v)]


@pytest.fixture
def ravdess(corpora_root, tmp_path, monkeypatch):
    if not (corpora_root / "ravdess").is_dir():
        pytest.skip(f"no ravdess/ in {corpora_root}")
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path))
    warnings.filterwarnings("ignore", message=".*remarks on the data")
    return corpora_root / "ravdess"


def features(data):
    return np.concatenate([data.streams[n].x[:, 0].numpy() for n in ("audio", "video")], 1)


def test_speakers_and_statistics_inflate_as_measured(ravdess):
    data = read_ravdess(ravdess, progress=False).to_batch()
    x, y, n = features(data), data.targets["emotion"].numpy(), len(data)
    honest = svm(x, y, [(p.train, p.test) for p in published_folds(data, share=0)])
    clips = svm(x, y, by_value(np.random.default_rng(0).permutation(n) % 5))
    own = normalise_by_speaker(data, ["audio", "video"])
    stats = svm(
        features(own),
        y,
        [(p.train, p.test) for p in published_folds(own, share=0, transductive=True)],
    )
    for kind, claimed in (("speaker", clips), ("statistics", stats)):
        assert claimed == pytest.approx(
            MEASURED_MISTAKES[kind].claimed, abs=0.02
        ) and honest == pytest.approx(MEASURED_MISTAKES[kind].honest, abs=0.02)


def test_choosing_on_the_test_inflates_as_measured(ravdess):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    data = read_ravdess(ravdess, progress=False).to_batch()
    x, y, found = features(data), data.targets["emotion"].numpy(), []
    for p in published_folds(data):
        models = [
            make_pipeline(StandardScaler(), SVC(C=C, gamma=g)).fit(x[p.train], y[p.train])
            for C in (3, 10, 30)
            for g in (5e-4, 1e-3, 2e-3, 4e-3)
        ]
        look, test = ([m.score(x[r], y[r]) for m in models] for r in (p.valid, p.test))
        found.append((max(test), test[int(np.argmax(look))]))
    assert np.mean(found, 0) == pytest.approx(
        [MEASURED_MISTAKES["validation"].claimed, MEASURED_MISTAKES["validation"].honest], abs=0.02
    )


def test_recordings_inflate_as_measured(ravdess):
    data = read_ravdess(ravdess, audio="lld", video=False, progress=False).to_batch()
    s = data.streams["audio"]
    tenth = torch.arange(s.steps) // 10 % 2
    x = np.concatenate(
        [
            torch.cat([masked_mean(s.x, m), masked_std(s.x, m)], 1).numpy()
            for m in (s.mask & (tenth == 0), s.mask & (tenth == 1))
        ]
    )
    y, rng, n = np.tile(data.targets["emotion"].numpy(), 2), np.random.default_rng(0), len(data)
    halves, clips = rng.permutation(2 * n) % 5, np.tile(rng.permutation(n) % 5, 2)
    assert svm(x, y, by_value(halves)[:3]) == pytest.approx(
        MEASURED_MISTAKES["recording"].claimed, abs=0.02
    )
    assert svm(x, y, by_value(clips)[:3]) == pytest.approx(
        MEASURED_MISTAKES["recording"].honest, abs=0.02
    )


def test_features_that_know_the_labels_inflate_as_measured(corpora_root, tmp_path, monkeypatch):
    if not (corpora_root / "mosi").is_dir():
        pytest.skip(f"no mosi/ in {corpora_root}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path))
    warnings.filterwarnings("ignore", message=".*remarks on the data")
    data = read_mosi(corpora_root / "mosi", progress=False).to_batch()
    x, y, split = (
        data.streams["text"].x[:, 0].numpy(),
        data.targets["sentiment"].numpy(),
        np.asarray(data.meta["split"]),
    )

    def score(a, b):
        return (
            make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
            .fit(x[a], y[a])
            .score(x[b], y[b])
        )

    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    inner = [speaker_split(data[train], (0.8, 0.2), seed=s) for s in range(3)]
    assert np.mean([score(train[a], train[b]) for a, b in inner]) == pytest.approx(
        MEASURED_MISTAKES["labels"].claimed, abs=0.02
    )
    assert score(train, test) == pytest.approx(MEASURED_MISTAKES["labels"].honest, abs=0.02)
    with pytest.raises(DataError, match="fitted on the labels"):
        Protocol(data, train[inner[0][0]], train[inner[0][1]], test, fitted=train)
