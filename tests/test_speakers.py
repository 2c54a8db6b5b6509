"""The speaker probe, the protocol that refuses, leave-one-out, the adversary and the cross-corpus
matrix; the measured mistakes are measured again.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean, masked_std
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
from mmemo.evaluation.speakers import CrossCorpus, cross_corpus, draw_cross_corpus, speaker_probe
from mmemo.models.adversary import AdversaryHead, ramp_strength, reverse_gradient, speaker_targets
from mmemo.models.base import RegressionHead, static_model
from mmemo.training.loop import fit
from mmemo.training.multitask import multitask
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan


def people(S=6, each=5, T=3, F=4, offset=0.0, seed=0, **meta):
    """S speakers in turn; session of two speakers, fold of three; each with an `offset` of their
    own on every feature.
    """
    g = torch.Generator().manual_seed(seed)
    n = S * each
    who = torch.arange(n) % S
    x = torch.randn(n, T, F, generator=g) + offset * torch.randn(S, F, generator=g)[who].unsqueeze(
        1
    )
    mask = torch.rand(n, T, generator=g) < 0.8
    mask[:, 0] = True
    return Batch(
        {"audio": Stream(x.masked_fill(~mask.unsqueeze(-1), 0), mask, torch.zeros(n, T))},
        {"phq8": torch.randn(n, generator=g)},
        {
            "id": [f"i{i}" for i in range(n)],
            "speaker": [f"s{w}" for w in who.tolist()],
            "session": [f"d{w // 2}" for w in who.tolist()],
            "fold": who % 3,
            "corpus": ["one"] * n,
            **meta,
        },
    )


def rows(data, *names):
    return [i for i, s in enumerate(data.meta["speaker"]) if s in names]


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
            progress=False,
            at_epoch=ramp_strength(15, top),
        )
        found[top] = (
            speaker_probe(model, data).accuracy.value,
            history.epochs[-1]["train"]["speaker accuracy"],
        )
    (loud, heard), (still, fooled) = found[0.0], found[0.1]
    assert fooled < heard - 0.15  # what the adversary itself says: the speaker is gone
    assert still > fooled + 0.15 and still > loud - 0.15  # what a probe says that never took part


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


# ------------------------------------------------------------------ the measured mistakes, measured again
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
