"""Frames picked by the clock, known-answer items as raw media, MELD-style folders of clips with
everything that can be wrong with a clip.
"""

import os
import shutil
import signal
import warnings

import av
import numpy as np
import pytest
import soundfile
import torch
from children import clean_server
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate
from streams import padded

from mmemo.core.batch import Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.core.rows import spread_steps
from mmemo.data import clips
from mmemo.data.clips import read_clips, read_media
from mmemo.data.decoding import decode_clip
from mmemo.data.standards import SOUND_RATE
from mmemo.models.audiovisual import Frames
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import write_clip, write_meld
from mmemo.synthetic.media import render_kept, render_media
from mmemo.synthetic.render import render_audio, render_frames


def write(
    path,
    seconds=1.0,
    fps=10,
    size=(48, 64),
    video=True,
    audio=True,
    rate=44100,
    layout="stereo",
    options=None,
):
    """A small clip: frame k is grey 20 k (so that frames can be told apart), the sound a tone of
    440 Hz.
    """
    with av.open(str(path), "w", options=options or {}) as file:
        if video:
            v = file.add_stream("libx264", rate=fps, options={"crf": "1", "preset": "ultrafast"})
            v.height, v.width, v.pix_fmt, v.thread_count = *size, "yuv420p", 1
        if audio:
            a = file.add_stream("aac", rate=rate, layout=layout)
        if video:
            for k in range(round(seconds * fps)):
                file.mux(
                    v.encode(
                        av.VideoFrame.from_ndarray(
                            np.full((*size, 3), 20 * k % 250, np.uint8), "rgb24"
                        )
                    )
                )
            file.mux(v.encode(None))
        if audio:
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate).astype(
                np.float32
            )
            sound = av.AudioFrame.from_ndarray(
                np.stack([tone] * (2 if layout == "stereo" else 1)), "fltp", layout
            )
            sound.rate, sound.pts = rate, 0
            file.mux(a.encode(sound))
            file.mux(a.encode(None))
    return path


# ------------------------------------------------------------------ picking
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.integers(1, 40), steps=st.integers(1, 20))
def test_pick_by_hand(seed, T, steps):
    g = np.random.default_rng(seed)
    t, mask = np.cumsum(g.uniform(0.1, 1, T)).astype(np.float32), g.random(T) < 0.7
    found = spread_steps(torch.from_numpy(mask)[None], torch.from_numpy(t)[None], steps)[0].tolist()
    real = np.flatnonzero(mask)
    if not len(real):
        assert found == [0] * steps
        return
    low, high = t[real[0]], t[real[-1]]
    for k, chosen in enumerate(found):
        gap = np.abs(t[real] - (low + (high - low) * (k + 0.5) / steps))
        assert (
            mask[chosen]
            and abs(t[chosen] - (low + (high - low) * (k + 0.5) / steps)) <= gap.min() + 1e-5
        )
    assert found == sorted(found)


def test_frames_are_real_in_time_order_and_blind_to_padding():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(23) < torch.tensor([23, 5, 0]).unsqueeze(1)
    mask[0, 7:12] = False
    s = Stream(
        torch.randint(0, 256, (3, 23, 3, 8, 6), generator=g, dtype=torch.uint8),
        mask,
        (torch.arange(23) / 10).repeat(3, 1),
    )
    made = Frames(9, 8)(s)
    assert made.x.shape == (3, 9, 3, 8, 8) and made.x.dtype == torch.uint8
    assert made.mask.tolist() == [[True] * 9] * 2 + [[False] * 9] and made.x[2].eq(0).all()
    assert (
        (made.t.diff(dim=1) >= 0).all()
        and len(made.t[1].unique()) == 5
        and not set(made.t[0].tolist()) & set(s.t[0, 7:12].tolist())
    )
    for by, when in ((4, 0.0), (9, 50.0)):
        other = Frames(9, 8)(padded(s, by, 77, when))
        assert (
            torch.equal(made.x, other.x)
            and torch.equal(made.mask, other.mask)
            and torch.equal(made.t, other.t)
        )
    square = Stream(s.x[..., :6, :6], s.mask, s.t)
    chosen = Frames(9, 6)(square)
    # of the right size already: not a bit is changed
    assert torch.equal(chosen.x[0], square.x[0, spread_steps(s.mask, s.t, 9)[0]])
    with pytest.raises(ShapeError, match=r"frames are \[B, T, 3, H, W\]"):
        Frames()(Stream.of(torch.zeros(2, 3, 4), rate=1))
    with pytest.raises(ConfigError, match="steps=0"):
        Frames(0)


# ------------------------------------------------------------------ known-answer items as raw media
@pytest.fixture(scope="module")
def data():
    return known_answer(6, seed=5, missing_modality=0.25, missing_frames=0.1)


def test_rendered_media_are_those_of_the_renderer(data):
    made = render_media(data, frames=5, size=40)
    assert (
        list(made.streams) == ["text", "audio", "video"]
        and made.targets is data.targets
        and made.streams["text"] is data.streams["text"]
    )
    video, audio = made.streams["video"], made.streams["audio"]
    assert video.x.shape == (6, 5, 3, 40, 40) and video.x.dtype == torch.uint8
    # some are missing, so that this tests something
    assert (
        not data.streams["video"].mask.any(1).all() and not data.streams["audio"].mask.any(1).all()
    )
    for i, item in enumerate(data):
        assert video.mask[i].tolist() == [bool(item.streams["video"].mask.any())] * 5
        if video.mask[i].any():
            rows = (video.t[i] * 30).long()
            assert item.streams["video"].mask[0, rows].all() and torch.equal(
                video.x[i], render_frames(item, 40)[rows]
            )
        wave = render_audio(item)
        real = audio.mask[i, : len(wave)]
        assert (
            torch.equal(real[80::160][: item.streams["audio"].steps], item.streams["audio"].mask[0])
            and not audio.mask[i, len(wave) :].any()
        )
        assert torch.allclose(audio.x[i, : len(wave)][real], wave[real])


def test_rendered_corpus_is_cached_and_the_same(data, tmp_path):
    made = render_kept(data, 4, 24, cache=tmp_path, progress=False, chunk=4)
    want = render_media(data, 4, 24)
    whole = made.to_batch()
    assert whole.streams["video"].x.dtype == torch.uint8
    for name, s in want.streams.items():
        got = whole.streams[name]
        n = got.steps
        assert (
            torch.equal(got.mask, s.mask[:, :n])
            and torch.equal(
                got.x,
                s.x[:, :n].where(
                    s.mask[:, :n].reshape(*s.mask[:, :n].shape, *[1] * (s.x.ndim - 2)), got.x
                ),
            )
            and not s.mask[:, n:].any()
        )
    assert (
        torch.equal(whole.targets["phq8"], data.targets["phq8"])
        and whole.meta["id"] == data.meta["id"]
    )
    folders = sorted(tmp_path.iterdir())
    render_kept(data, 4, 24, cache=tmp_path, progress=False)
    assert sorted(tmp_path.iterdir()) == folders
    render_kept(data[:3], 4, 24, cache=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------ one clip
def test_a_clip_is_decoded_by_its_clock(tmp_path):
    clip = decode_clip(write(tmp_path / "a.mp4"), frames=5, size=32)
    assert (
        clip.complaints == ()
        and clip.frames.shape == (5, 3, 32, 32)
        and clip.frames.dtype == np.uint8
    )
    assert np.allclose(clip.times, [0.1, 0.3, 0.4, 0.6, 0.8], atol=0.051) and np.allclose(
        clip.frames.mean((1, 2, 3)), clip.times * 200, atol=6
    )
    assert clip.sound.dtype == np.float32 and abs(len(clip.sound) - SOUND_RATE) < 0.1 * SOUND_RATE
    heard = np.abs(np.fft.rfft(clip.sound[2000:14000]))
    assert (
        abs(heard.argmax() * SOUND_RATE / 12000 - 440) < 3
        and abs(np.abs(clip.sound[2000:14000]).max() - 0.5) < 0.05
    )


def test_a_clip_of_the_look_alike_comes_back(tmp_path):
    item = known_answer(1, seed=3)
    write_clip(item, tmp_path / "x")
    clip, wave = decode_clip(tmp_path / "x.mp4"), render_audio(item).numpy()
    n = min(len(wave), len(clip.sound))
    # within a millisecond: the codec's delay is cut off
    assert abs(correlate(clip.sound[:n], wave[:n], method="fft").argmax() - (n - 1)) <= 16
    assert np.corrcoef(clip.sound[:n], wave[:n])[0, 1] > 0.9
    want = render_frames(item)[np.round(clip.times * 30).astype(int)].float()
    assert (torch.from_numpy(clip.frames).float() - want).abs().mean() < 6


def broken(tmp_path, kind):
    good = write(
        tmp_path / "good.mp4",
        seconds=3,
        options={"movflags": "faststart"} if kind == "torn behind its index" else None,
    )
    bad, raw = tmp_path / "bad.mp4", good.read_bytes()
    if kind == "empty":
        bad.write_bytes(b"")
    if kind == "no video at all":
        bad.write_bytes(b"This is a text, and no clip. " * 50)
    if kind == "torn":
        bad.write_bytes(raw[: len(raw) // 2])
    if kind == "torn behind its index":
        bad.write_bytes(raw[: len(raw) // 2])
    if kind == "silent":
        write(bad, audio=False)
    if kind == "blind":
        write(bad, video=False)
    if kind == "folder":
        bad.mkdir()
    if kind == "overwritten":
        at = raw.index(b"mdat") + 200
        bad.write_bytes(
            raw[:at]
            + bytes(np.random.default_rng(0).integers(0, 256, len(raw) // 2, np.uint8))
            + raw[at + len(raw) // 2 :]
        )
    return decode_clip(bad, frames=4, size=16)


@pytest.mark.parametrize(
    "kind, video, audio, says",
    [
        ("missing", False, False, "there is no such file"),
        ("folder", False, False, "there is no such file"),
        ("empty", False, False, "the file is empty"),
        ("no video at all", False, False, "video cannot be read: Invalid data"),
        ("torn", False, False, "video cannot be read"),
        ("silent", True, False, "no audio stream"),
        ("blind", False, True, "no video stream"),
    ],
)
def test_what_can_be_wrong_with_a_clip(tmp_path, kind, video, audio, says):
    clip = broken(tmp_path, kind)
    assert (clip.frames is not None, clip.sound is not None) == (video, audio)
    assert any(says in c for c in clip.complaints), clip.complaints
    assert not any(str(tmp_path) in c for c in clip.complaints)


@pytest.mark.parametrize("kind", ["torn behind its index", "overwritten"])
def test_a_clip_that_breaks_off_is_read_as_far_as_it_goes_and_says_so(tmp_path, kind):
    clip = broken(tmp_path, kind)
    assert clip.complaints and (clip.frames is None or clip.frames.shape == (4, 3, 16, 16))
    if kind == "torn behind its index":
        assert clip.frames is not None and clip.times.max() < 2.5


def test_a_clip_that_never_ends_is_cut(tmp_path):
    clip = decode_clip(write(tmp_path / "a.mp4", seconds=4), frames=3, limit=2)
    assert (
        clip.times.max() < 2
        and len(clip.sound) <= 2.1 * SOUND_RATE
        and "video lasts 4 s: cut at 2" in clip.complaints
    )


# ------------------------------------------------------------------ a folder
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eight look-alike utterances; five of their clips are spoilt."
    root = tmp_path_factory.mktemp("meld")
    data = known_answer(8, seed=3, items_per_speaker=1)
    paths = write_meld(data, root)
    # in the order of the tables
    data, paths = data[[data.meta["id"].index(i) for i in paths]], list(paths.values())
    (root / f"{paths[0]}.mp4").unlink()
    (root / f"{paths[1]}.mp4").write_bytes(b"")
    whole = (root / f"{paths[2]}.mp4").read_bytes()
    (root / f"{paths[2]}.mp4").write_bytes(whole[: len(whole) // 2])
    write(root / f"{paths[3]}.mp4", audio=False)
    write(root / f"{paths[4]}.mp4", video=False)
    (root / "train_splits" / "._dia0_utt0.mp4").write_bytes(b"Mac OS X")
    return root, data, paths


def read(root, cache, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_clips(root, cache=cache, progress=False, frames=6, size=32, **options)


def test_a_folder_of_clips_is_read_and_its_faults_are_reported(folder, tmp_path):
    root, data, paths = folder
    made = read(root, tmp_path)
    split = {
        "train_splits": "train",
        "dev_splits_complete": "dev",
        "output_repeated_splits_test": "test",
    }
    names = ["_".join([split[p.split("/")[0]], p.split("/")[1]]) for p in paths]
    assert sorted(made.meta["id"]) == sorted(names[3:])
    for name, says in zip(
        names,
        (
            "there is no such file: left out",
            "the file is empty: left out",
            "left out",
            "no audio stream: kept, its audio is missing",
            "no video stream: kept, its video is missing",
        ),
    ):
        assert [
            line for line in made.report if line.startswith(f"{name}: ") and line.endswith(says)
        ], (name, made.report)
    assert (
        not [line for line in made.report if str(root) in line]
        and len([line for line in made.report if "dia" in line]) == 5
    )
    batch = made.to_batch()
    at = {i: k for k, i in enumerate(batch.meta["id"])}
    heard, seen = batch.streams["audio"].mask.any(1), batch.streams["video"].mask.any(1)
    assert (
        not heard[at[names[3]]]
        and seen[at[names[3]]]
        and heard[at[names[4]]]
        and not seen[at[names[4]]]
        and heard.sum() == seen.sum() == 4
    )
    assert (
        batch.streams["video"].x.shape[1:] == (6, 3, 32, 32)
        and batch.streams["video"].x.dtype == torch.uint8
        and batch.streams["text"].mask.any(1).all()
    )
    for i in range(5, 8):
        row, wave = at[names[i]], render_audio(data[i]).numpy()
        n = min(len(wave), int(batch.streams["audio"].mask[row].sum()))
        assert np.corrcoef(batch.streams["audio"].x[row, :n], wave[:n])[0, 1] > 0.9
        assert (
            batch.targets["emotion"][row] == data.targets["emotion"][i]
            and batch.meta["speaker"][row] == data.meta["speaker"][i]
        )
        assert batch.meta["words"][row] == data.meta["words"][i]


def test_threads_do_not_change_what_is_read_and_a_cache_is_found_again(folder, tmp_path):
    root = folder[0]
    one, four = read(root, tmp_path / "a", workers=1), read(root, tmp_path / "b", workers=4)
    a, b = one.to_batch(), four.to_batch()
    assert one.report == four.report and all(
        torch.equal(getattr(a.streams[n], k), getattr(b.streams[n], k))
        for n in a.streams
        for k in ("x", "mask", "t")
    )
    assert (
        read(root, tmp_path / "a").folder == one.folder
        and len(list((tmp_path / "a").glob("clips-*"))) == 1
    )


def test_a_changed_clip_is_read_anew(folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(folder[0], root)
    before = read(root, tmp_path / "cache")
    write(root / f"{folder[2][0]}.mp4")
    after = read(root, tmp_path / "cache")
    assert after.folder != before.folder and len(after) == len(before) + 1


def test_a_folder_without_clips_says_so(tmp_path):
    write_meld(known_answer(3, seed=1), tmp_path, clips=False)
    with pytest.raises(
        DataError,
        match="holds none of the 3 clips that its tables name, such as train_splits/dia0_utt0.mp4",
    ):
        read(tmp_path, tmp_path / "cache")


def test_clips_train_a_model(folder, tmp_path):
    """From files to a trained step: frames and sound of a folder through the encoders of the media
    lesson.
    """
    from torch import nn

    from mmemo.models.audiovisual import R3D, LogMel, WaveCNN
    from mmemo.models.base import ClassHead, Frozen, Multimodal, Project
    from mmemo.models.fusion import ConcatNorm
    from mmemo.training.loop import fit
    from mmemo.training.objectives import cross_entropy
    from mmemo.training.plan import Plan
    from mmemo.training.tracking import QUIET

    corpus = read(folder[0], tmp_path)
    encoders = {
        "audio": nn.Sequential(LogMel(), Frozen(WaveCNN()), Project(128, 16)),
        "video": nn.Sequential(Frozen(R3D()), Project(512, 16)),
    }
    model = Multimodal(
        encoders, ConcatNorm({"audio": 16, "video": 16}, 8), {"emotion": ClassHead(8, 7)}
    )
    history = fit(
        model, cross_entropy("emotion"), corpus, None, Plan(epochs=1, batch_size=3), tracking=QUIET
    )
    assert len(history.steps) == 2 and all(np.isfinite(s["loss"]) for s in history.steps)


# ------------------------------------------------------------------ any sound and film
def voice(seconds=1.0, rate=SOUND_RATE, hz=440.0, channels=1):
    tone = 0.25 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.stack([tone * 2 * (k + 1) / (channels + 1) for k in range(channels)], 1).astype(
        np.float32
    )


def media(files, cache, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_media(files, cache=cache, progress=False, **{"frames": 4, "size": 16} | options)


@pytest.mark.parametrize(
    "rate, channels, ending",
    [
        (16_000, 1, "wav"),
        (48_000, 2, "wav"),
        (44_100, 1, "flac"),
        (44_100, 2, "ogg"),
        (8_000, 1, "wav"),
        (96_000, 3, "wav"),
        (22_050, 1, "mp3"),
    ],
)
def test_any_rate_and_any_number_of_channels_is_the_same_sound(tmp_path, rate, channels, ending):
    """A tone of every format, against scipy's resampler; what is above half the new rate is gone
    and not folded back.
    """
    path = tmp_path / f"a.{ending}"
    soundfile.write(
        path,
        voice(1, rate, channels=channels)
        + (voice(1, rate, 10_000, channels) if rate > 20_000 and ending == "wav" else 0),
        rate,
    )
    clip = decode_clip(path, kinds=("audio",))
    assert clip.complaints == () and clip.frames is None and clip.sound.dtype == np.float32
    assert abs(len(clip.sound) - SOUND_RATE) <= (
        1200 if ending == "mp3" else 4 if rate != SOUND_RATE else 0
    )
    middle = clip.sound[3000:13000]
    power = np.abs(np.fft.rfft(middle * np.hanning(len(middle)))) ** 2
    hz = np.fft.rfftfreq(len(middle), 1 / SOUND_RATE)
    assert (
        abs(hz[power.argmax()] - 440) < 2
        and power[abs(hz - 440) > 20].max() < 1e-4 * power.max()
        and abs(np.abs(middle).max() - 0.25) < 0.01
    )


def test_resampling_is_that_of_scipy(tmp_path):
    from scipy.signal import resample_poly

    # most of it is low: the filters differ near the edge only
    wave = np.random.default_rng(0).standard_normal(48_000).cumsum() / 300
    soundfile.write(tmp_path / "a.wav", wave.astype(np.float32), 48_000, subtype="FLOAT")
    made, want = decode_clip(tmp_path / "a.wav").sound, resample_poly(wave, 1, 3)
    assert len(made) == len(want) and np.corrcoef(made[200:-200], want[200:-200])[0, 1] > 0.9999


def spoil(folder, kind):
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.write_bytes(b"")
    if kind == "text":
        path.write_text("This is a letter, and no sound at all.\n" * 99)
    if kind == "header":
        soundfile.write(path, voice(), SOUND_RATE)
        path.write_bytes(path.read_bytes()[:44])
    if kind == "torn":
        path = path.with_suffix(".flac")
        soundfile.write(
            path, np.random.default_rng(0).standard_normal(5 * SOUND_RATE) * 0.1, SOUND_RATE
        )
        path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    if kind == "nan":
        x = voice()[:, 0]
        x[100:150] = np.nan
        x[9000] = np.inf
        soundfile.write(path, x, SOUND_RATE, subtype="FLOAT")
    if kind == "nan48":
        x = voice(rate=48_000, channels=2)
        x[3000:3030, 1] = -np.inf
        soundfile.write(path, x, 48_000, subtype="DOUBLE")
    if kind == "all nan":
        soundfile.write(path, np.full(1000, np.nan), SOUND_RATE, subtype="FLOAT")
    if kind == "silent":
        soundfile.write(path, np.zeros(SOUND_RATE), SOUND_RATE)
    if kind == "one":
        soundfile.write(path, voice()[:1] + 0.1, SOUND_RATE)
    if kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "kind, says, read",
    [
        ("missing", "there is no such file", 0),
        ("folder", "there is no such file", 0),
        ("empty", "the file is empty", 0),
        ("text", "", 0),
        ("header", "audio", 0),
        ("torn", "audio", None),
        ("nan", "51 samples of the sound are not finite", SOUND_RATE),
        ("nan48", "30 samples of the sound are not finite", SOUND_RATE),
        ("all nan", "1000 samples of the sound are not finite", 0),
        ("silent", "the sound is silent from end to end", SOUND_RATE),
        ("one", None, 1),
    ],
)
def test_what_can_be_wrong_with_a_recording(tmp_path, kind, says, read):
    clip = decode_clip(spoil(tmp_path, kind), kinds=("audio",))
    if says is None:
        assert clip.complaints == ()
    else:
        assert (
            len(clip.complaints) >= 1
            and any(says in c for c in clip.complaints)
            and not any(str(tmp_path) in c for c in clip.complaints)
        ), clip.complaints
    if read == 0:
        assert clip.sound is None
        return
    if kind == "torn":
        assert 1 * SOUND_RATE < len(clip.sound) < 4 * SOUND_RATE and np.isfinite(clip.sound).all()
        return
    assert len(clip.sound) == read
    gone = np.flatnonzero(np.isnan(clip.sound))
    want = {"nan": [*range(100, 150), 9000], "nan48": list(range(1000, 1010))}.get(kind, [])
    assert gone.tolist() == want and np.isfinite(np.delete(clip.sound, gone)).all()
    # nothing of the infinite reached its neighbours
    if kind == "nan48":
        assert np.abs(np.delete(clip.sound, gone)).max() < 1


def test_a_folder_of_everything_becomes_a_corpus_and_a_report(tmp_path):
    source = tmp_path / "files"
    (source / "deep").mkdir(parents=True)
    for kind in ("empty", "text", "nan", "silent", "torn", "all nan"):
        spoil(source, kind)
    soundfile.write(source / "deep" / "good.WAV", voice(0.5, 8000), 8000)
    write(source / "film.mp4")
    write(source / "mute.mov", audio=False)
    (source / "notes.txt").write_text("none of these")
    (source / "._good.wav").write_bytes(b"Mac OS X")
    made = media(
        source,
        tmp_path / "cache",
        targets={"emotion": {"film": 3, "nan": 1}, "score": {"film": 2.5, "silent": 7}},
        meta={"speaker": {"film": "ann", "mute": "bob"}},
    )
    batch = made.to_batch()
    assert batch.meta["id"] == ["deep/good", "film", "mute", "nan", "silent", "torn"]
    heard, seen = (batch.streams[n].mask.any(1).tolist() for n in ("audio", "video"))
    assert heard == [True, True, False, True, True, True] and seen == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert batch.targets["emotion"].tolist() == [-100, 3, -100, 1, -100, -100] and batch.targets[
        "score"
    ].nan_to_num(-1).tolist() == [-1, 2.5, -1, -1, 7, -1]
    assert batch.meta["speaker"] == [None, "ann", "bob", None, None, None] and torch.allclose(
        batch.meta["seconds"][[0, 3, 4]], torch.tensor([0.5, 1, 1]), atol=1e-3
    )
    assert (~batch.streams["audio"].mask[3, :SOUND_RATE]).sum() == 51 and batch.streams[
        "audio"
    ].x.isfinite().all()
    lines = {line.split(": ")[0]: line for line in made.report}
    assert (
        sorted(lines) == ["all nan", "empty", "mute", "nan", "silent", "text", "torn"]
        and len(made.report) == 7
    )
    assert all(lines[n].endswith("left out") for n in ("all nan", "empty", "text")) and lines[
        "mute"
    ].endswith("no audio stream: kept, its audio is missing")


def test_sound_files_alone_have_no_pictures_and_ids_are_the_callers(tmp_path):
    paths = {f"x/{k}": tmp_path / f"{k}.wav" for k in range(3)}
    for k, path in enumerate(paths.values()):
        soundfile.write(path, voice(0.1 * (k + 1)), SOUND_RATE)
    made = media(paths, tmp_path / "cache")
    assert (
        list(made.to_batch().streams) == ["audio"]
        and made.meta["id"] == ["x/0", "x/1", "x/2"]
        and made.to_batch().streams["audio"].mask.sum(1).tolist() == [1600, 3200, 4800]
    )
    assert media(paths, tmp_path / "cache").folder == made.folder
    soundfile.write(paths["x/1"], voice(0.7), SOUND_RATE)
    assert media(paths, tmp_path / "cache").folder != made.folder
    write(tmp_path / "0.mp4")
    assert sorted(media(tmp_path, tmp_path / "cache").meta["id"]) == ["0.mp4", "0.wav", "1", "2"]


def test_an_album_cover_is_no_film(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        a, v = (
            file.add_stream("aac", rate=SOUND_RATE, layout="mono"),
            file.add_stream("png", rate=1),
        )
        v.width = v.height = 8
        v.pix_fmt = "rgb24"
        v.disposition = av.stream.Disposition.attached_pic
        sound = av.AudioFrame.from_ndarray(voice().T.copy(), "fltp", "mono")
        sound.rate, sound.pts = SOUND_RATE, 0
        file.mux(a.encode(sound))
        file.mux(a.encode(None))
        file.mux(v.encode(av.VideoFrame.from_ndarray(np.zeros((8, 8, 3), np.uint8), "rgb24")))
        file.mux(v.encode(None))
    clip = decode_clip(tmp_path / "a.mp4", 2, 8)
    assert (
        clip.frames is None
        and clip.complaints == ("no video stream",)
        and len(clip.sound) > 0.9 * SOUND_RATE
    )


def test_nothing_to_read_is_one_clear_error(tmp_path):
    with pytest.raises(
        DataError, match="holds no sound or video files; their endings would be .*.wav"
    ):
        media(tmp_path, tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        media(tmp_path / "none", tmp_path)
    with pytest.raises(DataError, match="the mapping is empty"):
        media({}, tmp_path)
    with pytest.raises(
        DataError, match="media: no items were found; first remark: a: the file is empty: left out"
    ):
        media({"a": spoil(tmp_path, "empty"), "b": tmp_path / "none.wav"}, tmp_path / "cache")


def read_until_killed(source, cache, workers, log, die_at):
    "Chunks of four; the clip that is the `die_at`-th to be decoded takes the process with it."
    plain = clips.decode_clip

    def decode_clip(path, *how):
        with open(log, "a") as file:
            file.write(f"{path.stem}\n")
        if len(log.read_text().split()) >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path, *how)

    # a process of its own, which nobody else uses
    clips.CLIP_CHUNK, clips.decode_clip = 4, decode_clip
    media(source, cache, workers=workers)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_reading_goes_on_where_it_was(tmp_path, monkeypatch, workers):
    """SIGKILL in the middle of a chunk, twice: finished chunks are not decoded again, and the
    corpus is that of a reading nobody disturbed.
    """
    source, log = tmp_path / "files", tmp_path / "log"
    source.mkdir()
    for k in range(18):
        soundfile.write(source / f"{k:02}.wav", voice(0.02 * (k + 1)), SOUND_RATE)
    # the chunk 8..11 has nothing at all
    for k in (3, 8, 9, 10, 11, 15):
        (source / f"{k:02}.wav").write_bytes(b"")
    monkeypatch.setattr(clips, "CLIP_CHUNK", 4)
    whole = media(source, tmp_path / "undisturbed")
    context = clean_server(monkeypatch, "test_clips")

    def killed(die_at):
        log.write_text("")
        child = context.Process(
            target=read_until_killed, args=(source, tmp_path / "cache", workers, log, die_at)
        )
        child.start()
        child.join(60)
        return child.exitcode, {int(name) for name in log.read_text().split()}

    code, decoded = killed(7)
    assert code == -signal.SIGKILL and set(range(4)) <= decoded <= set(range(8))
    code, decoded = killed(10)
    assert (
        code == -signal.SIGKILL
        and decoded >= set(range(4, 12))
        and not decoded & set(range(4))
        and not list((tmp_path / "cache").glob("media-*"))
    )
    code, decoded = killed(999)
    assert code == 0 and decoded == set(range(12, 18)) and not list((tmp_path / "cache").glob(".*"))
    assert killed(999) == (0, set())
    resumed = media(source, tmp_path / "cache")
    assert (
        resumed.report == whole.report
        and len(whole.report) == 6
        and resumed.meta["id"]
        == whole.meta["id"]
        == [f"{k:02}" for k in range(18) if k not in (3, 8, 9, 10, 11, 15)]
    )
    assert (resumed.folder / "data.arrow").read_bytes() == (
        whole.folder / "data.arrow"
    ).read_bytes()


def test_a_chunk_that_was_torn_is_read_again(tmp_path, monkeypatch):
    "Half a chunk, as a full disk or a dying one leaves it, is noticed by its size."
    monkeypatch.setattr(clips, "CLIP_CHUNK", 2)
    paths = {f"{k}": tmp_path / f"{k}.wav" for k in range(5)}
    for path in paths.values():
        soundfile.write(path, voice(0.05), SOUND_RATE)
    want, plain, counted = media(paths, tmp_path / "a").to_batch(), clips.decode_clip, []

    def once(path, *how):
        counted.append(path.stem)
        if len(counted) == 5:
            raise KeyboardInterrupt
        return plain(path, *how)

    monkeypatch.setattr(clips, "decode_clip", once)
    with pytest.raises(KeyboardInterrupt):
        media(paths, tmp_path / "b", workers=1)
    [chunks] = (tmp_path / "b").glob(".*.chunks")
    (chunks / "1.arrow").write_bytes((chunks / "1.arrow").read_bytes()[:-9])
    counted.append("-")
    assert torch.equal(
        media(paths, tmp_path / "b", workers=1).to_batch().streams["audio"].x,
        want.streams["audio"].x,
    ) and counted[6:] == ["2", "3", "4"]


def test_ravdess_itself(corpora_root, tmp_path):
    folder = corpora_root / "ravdess" / "flac16k"
    if not folder.is_dir():
        pytest.skip("RAVDESS is not there")
    paths = {p.stem: p for p in sorted(folder.glob("*.flac"))[::71][:20]}
    made = media(
        paths,
        tmp_path,
        targets={"emotion": {name: int(name.split("-")[2]) - 1 for name in paths}},
        meta={"speaker": {name: name.split("-")[-1] for name in paths}},
    )
    batch = made.to_batch()
    assert (
        made.report == []
        and len(batch) == 20
        and batch.targets["emotion"].max() < 8
        and len(set(batch.meta["speaker"])) > 1
    )
    for i, name in enumerate(batch.meta["id"]):
        want = soundfile.read(paths[name], dtype="float32")[0]
        assert np.array_equal(batch.streams["audio"].x[i, : len(want)].numpy(), want) and int(
            batch.streams["audio"].mask[i].sum()
        ) == len(want)
