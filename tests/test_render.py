import time

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.core.batch import Stream
from mmemo.core.errors import ConfigError
from mmemo.data.standards import AUS, SOUND_RATE
from mmemo.synthetic.factors import LATENTS
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import CUE_WORDS, known_answer
from mmemo.synthetic.render import (
    draw_item,
    face_landmarks,
    mark_cue,
    mouth_at,
    render_audio,
    render_frames,
    rows_of,
    show_switchboard,
    smooth_columns,
    voice_columns,
    with_factors,
)

WHOLE = Knobs(missing_frames=0.0)


def pitch(item, method=librosa.yin):
    """Pitch at 100 Hz where the item speaks, and the times: an oracle that knows nothing of the
    renderer.
    """
    wave = render_audio(item).numpy()
    f = method(wave, fmin=60, fmax=400, sr=SOUND_RATE, frame_length=1024, hop_length=160)
    t = np.arange(len(f)) / 100
    inside = mouth_at(item, t)[0] > 0.8
    return t[inside], f[inside]


def loudness(item):
    wave = render_audio(item).numpy()
    return np.array(
        [
            10 * np.log10(np.mean(wave[int(a * SOUND_RATE) : int(b * SOUND_RATE)] ** 2) + 1e-9)
            for a, b in item.meta["spans"][0].tolist()
        ]
    )


def with_unit(item, name, value):
    x = torch.zeros_like(item.streams["video"].x)
    x[..., AUS.index(name)] = value
    return item.replace(
        video=Stream(x, torch.ones(x.shape[:2], dtype=torch.bool), item.streams["video"].t)
    )


# ---- forced factors


def test_one_coin_changes_nothing_else():
    a, b = with_factors(4, contour=1), with_factors(4, contour=-1)
    same = [
        i
        for i in range(74)
        if torch.equal(a.streams["audio"].x[..., i], b.streams["audio"].x[..., i])
    ]
    assert 0 not in same and len(same) == 73
    assert torch.equal(a.streams["video"].x, b.streams["video"].x) and mark_cue(a) == mark_cue(b)
    assert (a.meta["factors"] != b.meta["factors"])[0].tolist() == [
        n in ("contour", "sarcasm") for n in (*LATENTS, "sarcasm")
    ]


def test_unknown_factor_is_named():
    with pytest.raises(ConfigError, match=r"\['mood'\].*tone, face"):
        with_factors(0, mood=1)


def test_transcript_marks_the_cue():
    item = with_factors(9)
    assert [w for w in mark_cue(item).split() if w.startswith("**")] == [
        f"**{item.meta['words'][0][item.meta['cue'][0]]}**"
    ]
    assert item.meta["words"][0][item.meta["cue"][0]] in CUE_WORDS


# ---- columns


def test_rows_of_keeps_gaps_at_the_end():
    item = with_factors(2)
    audio = item.streams["audio"]
    mask = audio.mask.clone()
    mask[0, -30:] = False
    cut = item.replace(audio=Stream(audio.x.masked_fill(~mask[..., None], 0), mask, audio.t))[[0]]
    x, real = rows_of(cut, "audio", 100)
    assert (
        cut.streams["audio"].steps < audio.steps
        and x.shape == (audio.steps, 74)
        and not x[~real].any()
        and not real[-30:].any()
    )
    assert np.array_equal(x[real], audio.x[0, mask[0]].numpy())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(3, 40),
    st.integers(1, 6).map(lambda k: 2 * k + 1),
    st.floats(-5, 5),
    st.integers(0, 2**16),
)
def test_smoothing_keeps_a_straight_line_inside_and_ignores_gaps(T, frames, slope, seed):
    x = slope * np.arange(T)[:, None]
    keep = np.random.default_rng(seed).random(T) < 0.7
    keep[[0, -1]] = True
    spoiled = np.where(keep[:, None], x, 1e6)
    half = frames // 2
    out = smooth_columns(spoiled, keep, frames)
    assert out.shape == x.shape and np.allclose(out[half : T - half], x[half : T - half], atol=1e-8)
    assert (smooth_columns(x, np.zeros(T, bool), frames, 7.0) == 7).all()


# ---- the voice


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pitch_rises_and_falls_with_the_contour(seed):
    slope = {c: np.polyfit(*pitch(with_factors(seed, WHOLE, contour=c)), 1)[0] for c in (1, -1)}
    assert slope[1] > 10 and slope[-1] < -10  # Hz a second


def test_pitch_is_the_smoothed_column():
    item = with_factors(3, WHOLE)
    t, f = pitch(item)
    want = np.interp(
        t, (np.arange(len(voice_columns(item)["F0"])) + 0.5) / 100, voice_columns(item)["F0"]
    )
    assert np.median(np.abs(f / want - 1)) < 0.01


def test_the_cue_word_is_loud_or_hushed_with_the_emphasis():
    right = 0
    for seed in range(1, 9):
        for sign in (1, -1):
            item = with_factors(seed, WHOLE, emphasis=sign)
            level = loudness(item)
            right += (level[item.meta["cue"][0]] > np.median(level)) == (sign > 0)
    assert right >= 15  # of 16


def test_tone_is_the_level_of_the_first_harmonic():
    tilt = {}
    for tone in (1, -1):
        item = with_factors(3, WHOLE, tone=tone)
        power = np.abs(np.fft.rfft(render_audio(item).numpy())) ** 2
        f = np.fft.rfftfreq(int(item.meta["seconds"][0] * SOUND_RATE + 0.5), 1 / SOUND_RATE)
        tilt[tone] = 10 * np.log10(power[f < 260].sum() / power[(f > 300) & (f < 1000)].sum())
    assert tilt[1] > tilt[-1] + 2  # dB


def test_voice_is_silent_between_words_and_in_gaps_and_fits_a_wav():
    item = with_factors(5)
    wave = render_audio(item)
    t = (torch.arange(len(wave)) + 0.5) / SOUND_RATE
    _, mask = rows_of(item, "audio", 100)
    assert (
        wave.dtype == torch.float32
        and len(wave) == round(item.meta["seconds"].item() * SOUND_RATE)
        and wave.abs().max() < 1
        and wave.std() > 0.05
    )
    spoken = (
        (t[:, None] > item.meta["spans"][0][:, 0]) & (t[:, None] < item.meta["spans"][0][:, 1])
    ).any(1)
    assert (
        not wave[~spoken].any()
        and not wave[~torch.from_numpy(np.repeat(mask, 160))].any()
        and (~mask).any()
    )
    assert torch.equal(wave, render_audio(item))


def test_media_of_missing_modalities():
    item = with_factors(1)
    assert not render_audio(item.without("audio")).any()
    assert (render_frames(item.without("video")) == 128).all()


# ---- the face


def test_corners_follow_the_smile_in_landmarks_and_pixels():
    heights = []
    for value in (0.0, 1.0, 3.0):
        item = with_unit(with_factors(3), "AU12_r", value)
        p, seen, _ = face_landmarks(item)
        frame = render_frames(item)[3].float()
        lips = (
            (frame[0] - frame[1] > 60)
            & (frame[0] > 120)
            & (torch.arange(112)[:, None] > 70)
            & (torch.arange(112)[:, None] < 98)
        )
        y, x = torch.nonzero(lips, as_tuple=True)
        outer = (x <= x.min() + 2) | (x >= x.max() - 2)
        middle = (x - 56).abs() <= 2
        heights.append(
            (
                (p[3, 51, 1] - p[3, [48, 54], 1].mean()),
                float(y[middle].float().mean() - y[outer].float().mean()),
            )
        )
    mm, pixels = np.array(heights).T
    assert seen.all() and (np.diff(mm) > 3).all() and (np.diff(pixels) > 1).all()


def test_smile_of_the_corpus_is_in_the_landmarks():
    def gap(item):
        return (lambda p, seen, _: (p[seen, 51, 1] - p[seen][:, [48, 54], 1].mean(1)).mean())(
            *face_landmarks(item)
        )

    # face = +1 takes the smile away
    assert all(gap(with_factors(s, face=-1)) > gap(with_factors(s, face=1)) + 1 for s in range(5))


def brows(frames):
    patch = frames[:, :, 34:46, 28:84].float().mean(1)
    dark = patch < patch.flatten(1).median(1).values[:, None, None] - 60
    return (dark * torch.arange(34.0, 46.0)[None, :, None]).sum((1, 2)) / dark.sum((1, 2))


@pytest.mark.parametrize("seed", [3, 7])
def test_onset_is_visible_in_the_frames(seed):
    early, late = (brows(render_frames(with_factors(seed, WHOLE, onset=sign))) for sign in (1, -1))
    n = len(early) // 4
    assert (
        early[n - 8 : n + 8].nanmean() > late[n - 8 : n + 8].nanmean() + 0.3
        and late[3 * n - 8 : 3 * n + 8].nanmean() > early[3 * n - 8 : 3 * n + 8].nanmean() + 0.3
    )


def test_frames_shape_rate_grey_cards_and_looks():
    item = with_factors(3)
    frames = render_frames(item)
    _, seen = rows_of(item, "video", 30)
    assert frames.dtype == torch.uint8 and frames.shape == (len(seen), 3, 112, 112)
    assert np.array_equal(~(frames == 128).flatten(1).all(1).numpy(), seen) and not seen.all()
    slow = render_frames(item, size=64, fps=10)
    assert slow.shape == (round(len(seen) / 3), 3, 64, 64)
    data = known_answer(60)
    faces = [next(f for f in render_frames(data[i]) if (f != 128).any()) for i in (0, 20, 40)]
    assert not torch.equal(faces[0], faces[1]) and not torch.equal(faces[1], faces[2])


def test_rendering_is_fast():
    items = [with_factors(s, WHOLE) for s in range(3)]
    start = time.process_time()
    frames = sum(len(render_frames(i)) for i in items)
    assert frames / (time.process_time() - start) > 150
    start = time.process_time()
    seconds = sum(len(render_audio(i)) for i in items) / SOUND_RATE
    assert seconds / (time.process_time() - start) > 10


# ---- the pictures


def test_switchboard_turns_the_item():
    import matplotlib

    matplotlib.use("agg")
    board = show_switchboard(5)
    switches, _ = board.children
    assert [s.tooltip for s in switches.children] == list(
        LATENTS
    ) and board.model_id == "switchboard5"
    # an error in the callback would come out here
    switches.children[LATENTS.index("negation")].value = False
    assert [s.description for s in switches.children][3:5] == ["negation -1", "contour +1"]


def test_draw_item_shows_every_stream():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    item = with_factors(3)
    fig = draw_item(item)
    assert [a.get_ylabel() for a in fig.axes] == [
        "words",
        "F0",
        "H1H2",
        "MCEP_0",
        "AU12_r",
        "AU04_r",
        "face",
    ]
    assert [t.get_text() for t in fig.axes[0].texts] == item.meta["words"][0] and len(
        fig.axes[6].images
    ) == 12
    plt.close(fig)
