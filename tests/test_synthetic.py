"""The corpus proves its own claims: each factor is heard in its place, and nowhere else."""

import collections

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from mmemo.core.batch import masked_mean
from mmemo.data.standards import AUS, COVAREP, VOICED_ONLY, fill_unvoiced, split_of
from mmemo.synthetic.factors import FACTORS
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import (
    BAD_WORDS,
    CUE_WORDS,
    GOOD_WORDS,
    TOKEN_IDS,
    VOCABULARY,
    WORD_SPACING,
    known_answer,
    write_answer,
)
from mmemo.synthetic.signals import COVAREP_SD

N = 2560


@pytest.fixture(scope="module")
def data():
    return known_answer(N, seed=11)


def factor(data, name):
    return data.meta["factors"][:, FACTORS.index(name)]


def same_distribution(values: np.ndarray, groups: np.ndarray, columns) -> None:
    "Kolmogorov-Smirnov on every column between the two groups, Bonferroni-corrected at 0.001."
    for j, name in enumerate(columns):
        p = ks_2samp(values[groups > 0, j], values[groups < 0, j]).pvalue
        assert p > 1e-3 / len(columns), f"{name} differs between the two states (p = {p:.1e})"


def pooled(data, name):
    s = data.streams[name]
    return masked_mean(s.x, s.mask).numpy()


def bag(data):
    counts = torch.zeros(len(data), len(VOCABULARY))
    s = data.streams["text"]
    return counts.scatter_add_(1, s.x, s.mask.float()).numpy()


# ------------------------------------------------------------------ heard in its place
def test_an_ear_in_the_right_place_hears_every_factor(data):
    audio, video, seconds = (
        data.streams["audio"],
        data.streams["video"],
        data.meta["seconds"][:, None],
    )
    mean = {"audio": masked_mean(audio.x, audio.mask), "video": masked_mean(video.x, video.mask)}

    def centred(v):
        return v - v.mean()

    cue = torch.tensor([s[c].mean().item() for s, c in zip(data.meta["spans"], data.meta["cue"])])[
        :, None
    ]
    burst = audio.x[..., COVAREP.index("MCEP_0")] - mean["audio"][:, COVAREP.index("MCEP_0"), None]
    pitch = audio.x[..., 0] - mean["audio"][:, :1]
    brow = video.x[..., AUS.index("AU04_r")]
    heard = {
        "tone": centred(mean["audio"][:, COVAREP.index("H1H2")]),
        "face": -centred(mean["video"][:, AUS.index("AU12_r")]),
        "contour": masked_mean(pitch * (2 * audio.t / seconds - 1), audio.mask),
        "onset": masked_mean(torch.where(video.t / seconds < 0.5, brow, -brow), video.mask),
        "emphasis": masked_mean(
            burst * torch.exp(-0.5 * ((audio.t - cue) / 0.04) ** 2), audio.mask
        ),
        "negation": torch.tensor(
            [
                sum(
                    (1 if (w[i - 1] == "not") == (a in GOOD_WORDS) else -1)
                    for i, a in enumerate(w)
                    if a in GOOD_WORDS + BAD_WORDS
                )
                for w in data.meta["words"]
            ]
        ),
    }
    for name, evidence in heard.items():
        right = ((evidence > 0) == (factor(data, name) > 0)).float().mean().item()
        assert right > 0.995, f"{name} is heard right in only {right:.1%} of the items"


# ------------------------------------------------------------------ and nowhere else
@pytest.mark.parametrize("name", ["words", "negation", "contour", "onset", "emphasis", "sarcasm"])
def test_pooled_audio_and_video_are_deaf(data, name):
    same_distribution(
        np.c_[pooled(data, "audio"), pooled(data, "video")],
        factor(data, name).numpy(),
        COVAREP + AUS,
    )


@pytest.mark.parametrize(
    "name", ["tone", "face", "negation", "contour", "onset", "emphasis", "sarcasm"]
)
def test_a_bag_of_words_is_deaf(data, name):
    counts = bag(data)
    used = counts.std(0) > 0
    same_distribution(counts[:, used], factor(data, name).numpy(), np.array(VOCABULARY)[used])


@pytest.mark.parametrize("name", ["negation", "contour", "onset", "emphasis", "sarcasm"])
def test_no_classifier_finds_it_in_everything_pooled_together(data, name):
    from sklearn.ensemble import HistGradientBoostingClassifier

    x, y = (
        np.c_[pooled(data, "audio"), pooled(data, "video"), bag(data)],
        factor(data, name).numpy(),
    )
    right = (
        HistGradientBoostingClassifier(max_iter=60, random_state=0)
        .fit(x[:1500], y[:1500])
        .score(x[1500:], y[1500:])
    )
    assert abs(right - 0.5) < 4 * 0.5 / np.sqrt(N - 1500)


def test_the_bag_of_words_is_identical_under_negation():
    """Not only in distribution: with the same random draws, the two answers hold the same words
    apart from which adjectives were drawn.
    """
    kinds = []
    for negation in (1, -1):
        answers = [write_answer(1, negation, np.random.default_rng(i))[0] for i in range(500)]
        kinds.append(
            [
                collections.Counter(
                    "good" if w in GOOD_WORDS else "bad" if w in BAD_WORDS else w for w in a
                )
                for a in answers
            ]
        )
    assert kinds[0] == kinds[1]


def test_the_ramp_is_antisymmetric_and_the_bumps_are_mirror_images():
    f = torch.ones(2, 7)
    f[1, 4] = f[1, 5] = -1
    up, down = (known_answer(1, 3, factors=f[[i]], missing_frames=0.0) for i in (0, 1))
    frames = int(up.meta["seconds"][0] * 100)
    voiced = up.streams["audio"].x[0, :frames, 1] > 0
    ramp = (up.streams["audio"].x - down.streams["audio"].x)[0, :frames, 0]
    t = up.streams["audio"].t[0, :frames] / up.meta["seconds"][0] * 2 - 1
    slope = ramp[voiced] / t[voiced]
    assert slope.std() / slope.mean() < 0.05 and slope.mean() > 0
    steady = known_answer(1, 3, factors=f[[0]], missing_frames=0.0, evidence=0.0)
    bump = [
        (d.streams["video"].x - steady.streams["video"].x)[0, :, AUS.index("AU04_r")]
        for d in (up, down)
    ]
    half = len(bump[0]) // 2
    assert (
        bump[0][:half].sum() > bump[0][half:].sum() and bump[1][:half].sum() < bump[1][half:].sum()
    )


def test_the_bursts_cancel_and_the_cue_is_any_of_them(data):
    f = torch.ones(1, 7)
    loud, none = (known_answer(1, 8, factors=f, missing_frames=0.0, evidence=e) for e in (0.6, 0.0))
    bursts = (loud.streams["audio"].x - none.streams["audio"].x)[0, :, COVAREP.index("MCEP_0")]
    assert abs(bursts.sum()) < 1e-2 * bursts.abs().sum()
    rank = []
    for i in range(2000):
        words, at, which = write_answer(1, 1, np.random.default_rng(i))
        rank.append(which)
        assert (
            words[at[which]] in CUE_WORDS
            and np.diff(at).min() >= WORD_SPACING
            and 2 <= at[0]
            and at[-1] <= len(words) - 3
        )
        assert sum(w in CUE_WORDS for w in words) == 1
    assert np.bincount(rank).min() > 400


def test_sound_alone_does_not_know_which_burst_counts(data):
    "From the four burst signs in their order, and nothing else, the emphasis cannot be told."
    order = collections.defaultdict(list)
    audio = data.streams["audio"]
    mean = masked_mean(audio.x, audio.mask)[:, 11]
    for i in range(1000):
        _, at, _ = write_answer(
            *[int(factor(data, k)[i]) for k in ("words", "negation")],
            np.random.default_rng([11, 2, i]),
        )
        middle = data.meta["spans"][i][at].mean(-1)
        near = torch.exp(-0.5 * ((audio.t[i] - middle[:, None]) / 0.04) ** 2)
        order[
            tuple(((near * (audio.x[i, :, 11] - mean[i]) * audio.mask[i]).sum(1) > 0).tolist())
        ].append(factor(data, "emphasis")[i].item())
    for signs, emphasis in order.items():
        if len(emphasis) > 50:
            assert abs(np.mean(emphasis)) < 4 / np.sqrt(len(emphasis)), signs


# ------------------------------------------------------------------ the corpus as a data set
def test_an_item_is_the_same_in_any_corpus_of_its_seed():
    small, large = known_answer(70, 4), known_answer(600, 4)
    for name in small.streams:
        a, b = small.streams[name], large[list(range(70))].streams[name]
        assert torch.equal(a.x, b.x) and torch.equal(a.mask, b.mask) and torch.equal(a.t, b.t)
    assert small.meta["words"] == large.meta["words"][:70] and torch.equal(
        small.targets["phq8"], large.targets["phq8"][:70]
    )
    assert not torch.equal(small.targets["phq8"], known_answer(70, 5).targets["phq8"])


def test_speakers_never_cross_splits_and_nothing_is_nan(data):
    people = {
        name: set(split_of(data, name).meta["speaker"]) for name in ("train", "valid", "test")
    }
    assert (
        not people["train"] & people["valid"]
        and not people["train"] & people["test"]
        and not people["valid"] & people["test"]
    )
    sizes = [len(split_of(data, name)) / N for name in people]
    assert sizes == pytest.approx([5 / 8, 1 / 8, 2 / 8], abs=0.02)
    for s in data.streams.values():
        assert torch.isfinite(s.x).all() and s.x[~s.mask].eq(0).all()
    assert (
        data.targets["phq8"].min() >= 0
        and data.targets["phq8"].max() <= 24
        and data.targets["phq8"].frac().eq(0).all()
    )


def test_columns_have_the_real_spreads(data):
    real = data.streams["audio"].x[data.streams["audio"].mask].double()
    plain = [i for i in range(74) if i not in (0, 1, 4, 11) and i not in VOICED_ONLY]
    np.testing.assert_allclose(real.std(0).numpy()[plain], COVAREP_SD[plain], rtol=0.03)
    assert set(real[:, 1].unique().tolist()) == {0.0, 1.0}
    flat = known_answer(200, 1, scale_spread=0.0).streams["audio"]
    assert np.ptp(flat.x[flat.mask].std(0).numpy()[plain]) < 0.2


def test_text_is_exactly_what_the_vocabulary_says(data):
    s = data.streams["text"]
    for i in range(20):
        ids = s.x[i][s.mask[i]].tolist()
        assert ids == [
            TOKEN_IDS["[CLS]"],
            *(TOKEN_IDS[w] for w in data.meta["words"][i]),
            TOKEN_IDS["[SEP]"],
        ]
        assert torch.allclose(s.t[i][s.mask[i]][1:-1], data.meta["spans"][i].mean(1))
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_knobs_do_what_they_say():
    lost = known_answer(256, 1, missing_frames=0.3)
    inside = lost.streams["audio"].t < lost.meta["seconds"][:, None]
    assert 1 - lost.streams["audio"].mask[inside].float().mean() == pytest.approx(0.3, abs=0.02)
    gone = known_answer(1024, 1, missing_modality=0.4)
    there = torch.stack([s.mask.any(1) for s in gone.streams.values()], 1)
    assert there.any(1).all() and there.float().mean().item() == pytest.approx(
        1 - 0.4 + 0.4**3 / 3, abs=0.04
    )
    noisy = known_answer(512, 1, class_noise=0.5)
    clean = known_answer(512, 1)
    assert (noisy.targets["emotion"] != clean.targets["emotion"]).float().mean() > 0.25
    one, two = known_answer(512, 1, corpora=2, room=1.0), clean
    assert set(one.meta["corpus"]) == {"corpus0", "corpus1"}
    far = [i for i, c in enumerate(one.meta["corpus"]) if c == "corpus1"]
    assert (
        one[far].streams["audio"].x[..., 12].std()
        > 1.3 * two[far].streams["audio"].x[..., 12].std()
    )


def test_the_confound_lives_in_training_speakers_only():
    data = known_answer(3000, 2, Knobs(confound=1.0, missing_frames=0.0))
    for name, low, high in (("train", 0.9, 1.0), ("test", -0.6, 0.6)):
        part = split_of(data, name)
        people = np.array(part.meta["speaker"])
        voice = pooled(part, "audio")[:, COVAREP.index("MCEP_1")]

        phq8 = part.targets["phq8"].numpy()
        own = [people == p for p in sorted(set(people))]
        means = [[values[rows].mean() for rows in own] for values in (voice, phq8)]
        assert low <= np.corrcoef(*means)[0, 1] <= high


def test_unvoiced_columns_are_the_voiced_mean_and_filling_twice_changes_nothing():
    x, voiced = torch.randn(3, 7, 74), torch.rand(3, 7) > 0.4
    voiced[1] = False
    once = fill_unvoiced(x, voiced)
    for i in (0, 2):
        for c in VOICED_ONLY:
            assert torch.allclose(
                once[i, ~voiced[i], c],
                x[i, voiced[i], c].mean().expand((~voiced[i]).sum()),
                atol=1e-6,
            )
    assert once[1, :, list(VOICED_ONLY)].eq(0).all()
    keep = [c for c in range(74) if c not in VOICED_ONLY]
    assert torch.equal(once[..., keep], x[..., keep]) and torch.equal(
        fill_unvoiced(once, voiced), once
    )
