"""The ceilings: against brute force, against sampled corpora, and the laws that any ceiling must
obey.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmemo.core.errors import ConfigError
from mmemo.data.standards import EMOTIONS, SENTIMENTS
from mmemo.synthetic.factors import (
    BASE_SCORE,
    FACTORS,
    INFORMATION,
    LATENTS,
    NEEDS,
    STATES,
    bayes_prediction,
    ceiling,
    class_of_state,
    points_before_noise,
    with_sarcasm,
)
from mmemo.synthetic.knobs import FACTOR_WEIGHT, Knobs
from mmemo.synthetic.known_answer import known_answer


def brute_force_rmse(hears, noise=1.0, draws=400_000, seed=0):
    """The error of the best constant in each group of states that sound the same, by sampling: no
    code shared with `ceiling`.
    """
    rng = np.random.default_rng(seed)
    f = rng.choice([-1, 1], (draws, 7))
    total = f.sum(1) + f[:, 2] * f[:, 4]
    y = np.clip(
        np.round(BASE_SCORE + FACTOR_WEIGHT * total + noise * rng.standard_normal(draws)), 0, 24
    )
    group = (
        sum(((f[:, LATENTS.index(k)] > 0) << i) for i, k in enumerate(hears))
        if hears
        else np.zeros(draws, int)
    )
    mean = np.bincount(group, y) / np.bincount(group)
    return math.sqrt(((y - mean[group]) ** 2).mean())


@pytest.mark.parametrize("hears", [*INFORMATION.values(), ("words", "contour"), ("emphasis",)])
@pytest.mark.parametrize("noise", [1.0, 4.0])
def test_ceiling_is_the_sampled_error_of_the_best_guess(hears, noise):
    assert ceiling(hears, knobs=Knobs(label_noise=noise)) == pytest.approx(
        brute_force_rmse(hears, noise), rel=6e-3
    )


def test_more_information_never_hurts():
    for task, better in (("phq8", -1), ("emotion", 1), ("sentiment", 1)):
        for k in range(7):
            for hears in itertools.combinations(LATENTS, k):
                more = [*hears, next(f for f in LATENTS if f not in hears)]
                assert better * (ceiling(more, task) - ceiling(hears, task)) >= -1e-12


@pytest.mark.parametrize("task", ["phq8", "emotion", "sentiment"])
@pytest.mark.parametrize("knobs", [Knobs(), Knobs(class_noise=0.3, imbalance=0, label_noise=2)])
def test_the_best_guess_reaches_the_ceiling_on_a_corpus(task, knobs):
    n = 20_000
    rng = np.random.default_rng(1)
    factors = torch.from_numpy(with_sarcasm(rng.choice([-1, 1], (n, 7)))).float()
    data = known_answer(1024, 5, knobs)  # real labels of a corpus ...
    f, y = data.meta["factors"], data.targets[task]
    for hears in INFORMATION.values():
        guess = bayes_prediction(f, hears, task, knobs)
        got = (
            (guess - y).square().mean().sqrt().item()
            if task == "phq8"
            else (guess.argmax(1) == y).float().mean().item()
        )
        assert got == pytest.approx(
            ceiling(hears, task, knobs), abs=0.3 if task == "phq8" else 0.06
        )
        if task != "phq8":  # ... and the expected score over many states, without label noise
            assert bayes_prediction(factors, hears, task, knobs).amax(
                1
            ).mean().item() == pytest.approx(ceiling(hears, task, knobs), abs=0.012)


def test_hearing_nothing_is_the_majority_and_hearing_all_is_the_noise():
    assert ceiling((), "emotion") == pytest.approx(class_of_state(1.0)[0].tolist().count(0) / 128)
    assert ceiling(LATENTS, "emotion") == 1.0 and ceiling(LATENTS, "sentiment") == 1.0
    assert ceiling(LATENTS, knobs=Knobs(label_noise=0)) == pytest.approx(0, abs=1e-6)


def test_classes_have_melds_proportions_and_can_be_made_equal():
    emotion, sentiment = class_of_state(1.0)
    meld = np.array([4710, 1743, 1205, 1109, 683, 271, 268]) / 9989
    assert np.abs(np.bincount(emotion, minlength=7) / 128 - meld).max() < 1 / 128
    assert (
        np.abs(
            np.bincount(sentiment, minlength=3) / 128 - np.array([2945, 4710, 2334]) / 9989
        ).max()
        < 1 / 128
    )
    assert set(np.bincount(class_of_state(0.0)[0], minlength=7)) <= {18, 19}
    assert len(EMOTIONS) == 7 and len(SENTIMENTS) == 3
    assert all(s == 1 for e, s in zip(emotion, sentiment) if e == 0)  # neutral is neutral in both


def test_every_factor_matters_for_the_classes():
    for task in ("emotion", "sentiment"):
        for factor in LATENTS:
            assert ceiling(LATENTS, task) > ceiling([f for f in LATENTS if f != factor], task)


def test_a_missing_modality_takes_its_factors_away():
    half = Knobs(missing_modality=0.5)
    p = [
        ({"text"}, 1 / 6),
        ({"audio"}, 1 / 6),
        ({"video"}, 1 / 6),
        ({"text", "audio"}, 1 / 8),
        ({"text", "video"}, 1 / 8),
        ({"audio", "video"}, 1 / 8),
        ({"text", "audio", "video"}, 1 / 8),
    ]
    want = sum(
        share * ceiling([f for f in LATENTS if NEEDS[f] <= present]) ** 2 for present, share in p
    )
    assert ceiling(LATENTS, knobs=half) == pytest.approx(math.sqrt(want))


def test_a_prior_moves_the_corpora_apart():
    lean = Knobs(corpora=3, prior=0.3)
    assert ceiling((), knobs=lean) < ceiling(())  # who knows the corpus knows something already
    data = known_answer(1536, 2, lean, items_per_speaker=5)
    share = {
        c: (
            (data.meta["factors"][[i for i, x in enumerate(data.meta["corpus"]) if x == c], 0] > 0)
            .float()
            .mean()
            .item()
        )
        for c in sorted(set(data.meta["corpus"]))
    }
    assert [round(v, 1) for v in share.values()] == [0.2, 0.5, 0.8]


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: ceiling(["smell"]), "smell"),
        (lambda: ceiling((), "age"), "age"),
        (lambda: Knobs(evidence=-1), "evidence"),
        (lambda: Knobs(corpora=0), "corpora"),
        (lambda: Knobs(factor_weights=(1.5,) * 7), "eight numbers between 0 and 6"),
        (lambda: Knobs(factor_weights=(1.5,) * 7 + (6.1,)), "eight numbers between 0 and 6"),
        (lambda: Knobs(factor_weights=(1.5,) * 7 + (math.nan,)), "eight numbers"),
        (lambda: known_answer(4, factor_weights=(True,) * 8), "eight numbers"),
        (lambda: Knobs(missing_frames=1.5), "between 0 and 1"),
        (lambda: known_answer(0), "n=0"),
        (lambda: known_answer(4, smell=1), "smell"),
        (lambda: known_answer(4, factors=torch.zeros(4, 7)), r"\[4, 7\]"),
    ],
)
def test_impossible_questions_are_named(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


def test_a_prior_of_certainty_leaves_only_the_noise():
    """At prior = 0.5 every coin of a corpus is certain: whoever knows the corpus needs to hear
    nothing.
    """
    sure = Knobs(corpora=2, prior=0.5)
    assert ceiling((), knobs=sure) == pytest.approx(ceiling(LATENTS, knobs=sure)) and np.isfinite(
        ceiling((), knobs=sure)
    )
    assert torch.isfinite(bayes_prediction(torch.ones(1, 7), LATENTS, knobs=sure, corpus=0)).all()


def test_factors_may_come_from_a_generator():
    gone = Knobs(missing_modality=0.2)
    assert ceiling((f for f in LATENTS), knobs=gone) == ceiling(LATENTS, knobs=gone)


def only(**weights):
    "Knobs without label noise whose other factors are worth nothing."
    return Knobs(label_noise=0, factor_weights=[weights.get(f, 0.0) for f in FACTORS])


def test_ceilings_with_weights_by_hand():
    # labels are 6 or 12, and only the tone decides
    tone = only(tone=3)
    assert ceiling((), knobs=tone) == pytest.approx(3)
    assert ceiling(["tone"], knobs=tone) == pytest.approx(0, abs=1e-6)
    assert ceiling([f for f in LATENTS if f != "tone"], knobs=tone) == pytest.approx(3)
    # the voice is missing in 1/6 + 1/6 + 1/8 of the items
    gone = replace(tone, missing_modality=0.5)
    assert ceiling(["tone"], knobs=gone) == pytest.approx(3 * math.sqrt(11 / 24))
    # sarcasm alone needs words and contour together
    sarcasm = only(sarcasm=2)
    for hears, best in ((["words"], 2), (["contour"], 2), (["words", "contour"], 0)):
        assert ceiling(hears, knobs=sarcasm) == pytest.approx(best, abs=1e-6)
    # 9 + 6 + 6 = 21 fits, 9 - 6 - 6 = -3 is clipped to 0: values 0, 9, 9, 21
    pair = only(tone=6, face=6)
    assert ceiling((), knobs=pair) == pytest.approx(math.sqrt((81 + 441 + 81) / 4 - 9.75**2))
    assert ceiling(["tone"], knobs=pair) == pytest.approx(math.sqrt((4.5**2 + 6**2) / 2))


def test_labels_follow_the_weights_and_the_signals_do_not():
    weights = (0.5, 3.0, 0.0, 2.0, 1.0, 0.3, 4.0, 6.0)
    plain = known_answer(300, 3, label_noise=0)
    turned = known_answer(300, 3, label_noise=0, factor_weights=weights)
    points = 9 + turned.meta["factors"].double() @ torch.tensor(weights).double()
    # halves are rounded as floating point has them
    sure = ((points % 1) - 0.5).abs() > 1e-6
    assert torch.equal(turned.targets["phq8"][sure], points.round().clip(0, 24).float()[sure])
    assert sure.float().mean() > 0.5
    for name, stream in plain.streams.items():
        assert torch.equal(stream.x, turned.streams[name].x)
    for task in ("emotion", "sentiment"):
        assert torch.equal(plain.targets[task], turned.targets[task])


def test_a_list_of_weights_is_the_same_knobs_as_a_tuple():
    listed = Knobs(factor_weights=[1, 2, 3, 4, 5, 6, 0, 1])
    assert listed == Knobs(factor_weights=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 1.0))
    assert hash(listed) and Knobs().factor_weights == (FACTOR_WEIGHT,) * 8
    total = with_sarcasm(STATES).sum(1)
    assert (points_before_noise(STATES, Knobs()) == BASE_SCORE + FACTOR_WEIGHT * total).all()
