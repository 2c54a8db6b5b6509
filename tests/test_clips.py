"""Frames picked by the clock, known-answer items as raw media, MELD-style folders of clips with everything that can be wrong with a clip."""
import shutil
import warnings

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.signal import correlate
from streams import padded

from mmemo.batch import ConfigError, DataError, ShapeError, Stream
from mmemo.clips import RATE, Frames, decode_clip, pick, read_clips, render_media, rendered
from mmemo.lookalike import write_clip, write_meld
from mmemo.render import render_audio, render_frames
from mmemo.synthetic import known_answer


def write(path, seconds=1.0, fps=10, size=(48, 64), video=True, audio=True, rate=44100, layout="stereo", options=None):
    "A small clip: frame k is grey 20 k (so that frames can be told apart), the sound a tone of 440 Hz."
    with av.open(str(path), "w", options=options or {}) as file:
        if video:
            v = file.add_stream("libx264", rate=fps, options={"crf": "1", "preset": "ultrafast"}); v.height, v.width, v.pix_fmt, v.thread_count = *size, "yuv420p", 1
        if audio: a = file.add_stream("aac", rate=rate, layout=layout)
        if video:
            for k in range(round(seconds * fps)): file.mux(v.encode(av.VideoFrame.from_ndarray(np.full((*size, 3), 20 * k % 250, np.uint8), "rgb24")))
            file.mux(v.encode(None))
        if audio:
            tone = .5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(np.stack([tone] * (2 if layout == "stereo" else 1)), "fltp", layout); sound.rate, sound.pts = rate, 0
            file.mux(a.encode(sound)); file.mux(a.encode(None))
    return path


# ------------------------------------------------------------------ picking
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.integers(1, 40), steps=st.integers(1, 20))
def test_pick_by_hand(seed, T, steps):
    g = np.random.default_rng(seed)
    t, mask = np.cumsum(g.uniform(.1, 1, T)).astype(np.float32), g.random(T) < .7
    found = pick(torch.from_numpy(mask)[None], torch.from_numpy(t)[None], steps)[0].tolist()
    real = np.flatnonzero(mask)
    if not len(real): assert found == [0] * steps; return
    low, high = t[real[0]], t[real[-1]]
    for k, chosen in enumerate(found):
        gap = np.abs(t[real] - (low + (high - low) * (k + .5) / steps))
        assert mask[chosen] and abs(t[chosen] - (low + (high - low) * (k + .5) / steps)) <= gap.min() + 1e-5
    assert found == sorted(found)


def test_frames_are_real_in_time_order_and_blind_to_padding():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(23) < torch.tensor([23, 5, 0]).unsqueeze(1)
    mask[0, 7:12] = False
    s = Stream(torch.randint(0, 256, (3, 23, 3, 8, 6), generator=g, dtype=torch.uint8), mask, (torch.arange(23) / 10).repeat(3, 1))
    made = Frames(9, 8)(s)
    assert made.x.shape == (3, 9, 3, 8, 8) and made.x.dtype == torch.uint8
    assert made.mask.tolist() == [[True] * 9] * 2 + [[False] * 9] and made.x[2].eq(0).all()
    assert (made.t.diff(dim=1) >= 0).all() and len(made.t[1].unique()) == 5 and not set(made.t[0].tolist()) & set(s.t[0, 7:12].tolist())
    for by, when in ((4, 0.), (9, 50.)):
        other = Frames(9, 8)(padded(s, by, 77, when))
        assert torch.equal(made.x, other.x) and torch.equal(made.mask, other.mask) and torch.equal(made.t, other.t)
    square = Stream(s.x[..., :6, :6], s.mask, s.t)
    chosen = Frames(9, 6)(square)
    assert torch.equal(chosen.x[0], square.x[0, pick(s.mask, s.t, 9)[0]])                     # of the right size already: not a bit is changed
    with pytest.raises(ShapeError, match=r"frames are \[B, T, 3, H, W\]"): Frames()(Stream.of(torch.zeros(2, 3, 4), rate=1))
    with pytest.raises(ConfigError, match="steps=0"): Frames(0)


# ------------------------------------------------------------------ known-answer items as raw media
@pytest.fixture(scope="module")
def data(): return known_answer(6, seed=5, missing_modality=.25, missing_frames=.1)


def test_rendered_media_are_those_of_the_renderer(data):
    made = render_media(data, frames=5, size=40)
    assert list(made.streams) == ["text", "audio", "video"] and made.targets is data.targets and made.streams["text"] is data.streams["text"]
    video, audio = made.streams["video"], made.streams["audio"]
    assert video.x.shape == (6, 5, 3, 40, 40) and video.x.dtype == torch.uint8
    assert not data.streams["video"].mask.any(1).all() and not data.streams["audio"].mask.any(1).all()       # some are missing, so that this tests something
    for i, item in enumerate(data):
        assert video.mask[i].tolist() == [bool(item.streams["video"].mask.any())] * 5
        if video.mask[i].any():
            rows = (video.t[i] * 30).long()
            assert item.streams["video"].mask[0, rows].all() and torch.equal(video.x[i], render_frames(item, 40)[rows])
        wave = render_audio(item)
        real = audio.mask[i, :len(wave)]
        assert torch.equal(real[80::160][:item.streams["audio"].steps], item.streams["audio"].mask[0]) and not audio.mask[i, len(wave):].any()
        assert torch.allclose(audio.x[i, :len(wave)][real], wave[real])


def test_rendered_corpus_is_cached_and_the_same(data, tmp_path):
    made = rendered(data, 4, 24, cache=tmp_path, progress=False, chunk=4)
    want = render_media(data, 4, 24)
    whole = made.to_batch()
    assert whole.streams["video"].x.dtype == torch.uint8
    for name, s in want.streams.items():
        got = whole.streams[name]
        n = got.steps
        assert torch.equal(got.mask, s.mask[:, :n]) and torch.equal(got.x, s.x[:, :n].where(s.mask[:, :n].reshape(*s.mask[:, :n].shape, *[1] * (s.x.ndim - 2)), got.x)) and not s.mask[:, n:].any()
    assert torch.equal(whole.targets["phq8"], data.targets["phq8"]) and whole.meta["id"] == data.meta["id"]
    folders = sorted(tmp_path.iterdir())
    rendered(data, 4, 24, cache=tmp_path, progress=False)
    assert sorted(tmp_path.iterdir()) == folders
    rendered(data[:3], 4, 24, cache=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------ one clip
def test_a_clip_is_decoded_by_its_clock(tmp_path):
    clip = decode_clip(write(tmp_path / "a.mp4"), frames=5, size=32)
    assert clip.complaints == () and clip.frames.shape == (5, 3, 32, 32) and clip.frames.dtype == np.uint8
    assert np.allclose(clip.times, [.1, .3, .4, .6, .8], atol=.051) and np.allclose(clip.frames.mean((1, 2, 3)), clip.times * 200, atol=6)
    assert clip.sound.dtype == np.float32 and abs(len(clip.sound) - RATE) < .1 * RATE
    heard = np.abs(np.fft.rfft(clip.sound[2000:14000]))
    assert abs(heard.argmax() * RATE / 12000 - 440) < 3 and abs(np.abs(clip.sound[2000:14000]).max() - .5) < .05


def test_a_clip_of_the_look_alike_comes_back(tmp_path):
    item = known_answer(1, seed=3)
    write_clip(item, tmp_path / "x")
    clip, wave = decode_clip(tmp_path / "x.mp4"), render_audio(item).numpy()
    n = min(len(wave), len(clip.sound))
    assert abs(correlate(clip.sound[:n], wave[:n], method="fft").argmax() - (n - 1)) <= 16                  # within a millisecond: the codec's delay is cut off
    assert np.corrcoef(clip.sound[:n], wave[:n])[0, 1] > .9
    want = render_frames(item)[np.round(clip.times * 30).astype(int)].float()
    assert (torch.from_numpy(clip.frames).float() - want).abs().mean() < 6


def broken(tmp_path, kind):
    good = write(tmp_path / "good.mp4", seconds=3, options={"movflags": "faststart"} if kind == "torn behind its index" else None)
    bad, raw = tmp_path / "bad.mp4", good.read_bytes()
    if kind == "empty": bad.write_bytes(b"")
    if kind == "no video at all": bad.write_bytes(b"This is a text, and no clip. " * 50)
    if kind == "torn": bad.write_bytes(raw[:len(raw) // 2])
    if kind == "torn behind its index": bad.write_bytes(raw[:len(raw) // 2])
    if kind == "silent": write(bad, audio=False)
    if kind == "blind": write(bad, video=False)
    if kind == "folder": bad.mkdir()
    if kind == "overwritten":
        at = raw.index(b"mdat") + 200
        bad.write_bytes(raw[:at] + bytes(np.random.default_rng(0).integers(0, 256, len(raw) // 2, np.uint8)) + raw[at + len(raw) // 2:])
    return decode_clip(bad, frames=4, size=16)


@pytest.mark.parametrize("kind, video, audio, says", [
    ("missing", False, False, "there is no such file"), ("folder", False, False, "there is no such file"), ("empty", False, False, "the file is empty"),
    ("no video at all", False, False, "video cannot be read: Invalid data"), ("torn", False, False, "video cannot be read"),
    ("silent", True, False, "no audio stream"), ("blind", False, True, "no video stream")])
def test_what_can_be_wrong_with_a_clip(tmp_path, kind, video, audio, says):
    clip = broken(tmp_path, kind)
    assert (clip.frames is not None, clip.sound is not None) == (video, audio)
    assert any(says in c for c in clip.complaints), clip.complaints
    assert not any(str(tmp_path) in c for c in clip.complaints)


@pytest.mark.parametrize("kind", ["torn behind its index", "overwritten"])
def test_a_clip_that_breaks_off_is_read_as_far_as_it_goes_and_says_so(tmp_path, kind):
    clip = broken(tmp_path, kind)
    assert clip.complaints and (clip.frames is None or clip.frames.shape == (4, 3, 16, 16))
    if kind == "torn behind its index": assert clip.frames is not None and clip.times.max() < 2.5


def test_a_clip_that_never_ends_is_cut(tmp_path):
    clip = decode_clip(write(tmp_path / "a.mp4", seconds=4), frames=3, limit=2)
    assert clip.times.max() < 2 and len(clip.sound) <= 2.1 * RATE and "video lasts 4 s: cut at 2" in clip.complaints


# ------------------------------------------------------------------ a folder
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Eight look-alike utterances; five of their clips are spoilt."
    root = tmp_path_factory.mktemp("meld")
    data = known_answer(8, seed=3, items_per_speaker=1)
    paths = write_meld(data, root)
    data, paths = data[[data.meta["id"].index(i) for i in paths]], list(paths.values())                # in the order of the tables
    (root / f"{paths[0]}.mp4").unlink()
    (root / f"{paths[1]}.mp4").write_bytes(b"")
    whole = (root / f"{paths[2]}.mp4").read_bytes()
    (root / f"{paths[2]}.mp4").write_bytes(whole[:len(whole) // 2])
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
    split = {"train_splits": "train", "dev_splits_complete": "dev", "output_repeated_splits_test": "test"}
    names = ["_".join([split[p.split("/")[0]], p.split("/")[1]]) for p in paths]
    assert sorted(made.meta["id"]) == sorted(names[3:])
    for name, says in zip(names, ("there is no such file: left out", "the file is empty: left out", "left out", "no audio stream: kept, its audio is missing",
                                  "no video stream: kept, its video is missing")):
        assert [line for line in made.report if line.startswith(f"{name}: ") and line.endswith(says)], (name, made.report)
    assert not [line for line in made.report if str(root) in line] and len([line for line in made.report if "dia" in line]) == 5
    batch = made.to_batch()
    at = {i: k for k, i in enumerate(batch.meta["id"])}
    heard, seen = batch.streams["audio"].mask.any(1), batch.streams["video"].mask.any(1)
    assert not heard[at[names[3]]] and seen[at[names[3]]] and heard[at[names[4]]] and not seen[at[names[4]]] and heard.sum() == seen.sum() == 4
    assert batch.streams["video"].x.shape[1:] == (6, 3, 32, 32) and batch.streams["video"].x.dtype == torch.uint8 and batch.streams["text"].mask.any(1).all()
    for i in range(5, 8):
        row, wave = at[names[i]], render_audio(data[i]).numpy()
        n = min(len(wave), int(batch.streams["audio"].mask[row].sum()))
        assert np.corrcoef(batch.streams["audio"].x[row, :n], wave[:n])[0, 1] > .9
        assert batch.targets["emotion"][row] == data.targets["emotion"][i] and batch.meta["speaker"][row] == data.meta["speaker"][i]
        assert batch.meta["words"][row] == data.meta["words"][i]


def test_threads_do_not_change_what_is_read_and_a_cache_is_found_again(folder, tmp_path):
    root = folder[0]
    one, four = read(root, tmp_path / "a", workers=1), read(root, tmp_path / "b", workers=4)
    a, b = one.to_batch(), four.to_batch()
    assert one.report == four.report and all(torch.equal(getattr(a.streams[n], k), getattr(b.streams[n], k)) for n in a.streams for k in ("x", "mask", "t"))
    assert read(root, tmp_path / "a").folder == one.folder and len(list((tmp_path / "a").glob("clips-*"))) == 1


def test_a_changed_clip_is_read_anew(folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(folder[0], root)
    before = read(root, tmp_path / "cache")
    write(root / f"{folder[2][0]}.mp4")
    after = read(root, tmp_path / "cache")
    assert after.folder != before.folder and len(after) == len(before) + 1


def test_a_folder_without_clips_says_so(tmp_path):
    write_meld(known_answer(3, seed=1), tmp_path, clips=False)
    with pytest.raises(DataError, match="holds none of the 3 clips that its tables name, such as train_splits/dia0_utt0.mp4"): read(tmp_path, tmp_path / "cache")


def test_clips_train_a_model(folder, tmp_path):
    "From files to a trained step: frames and sound of a folder through the encoders of the media lesson."
    from torch import nn
    from mmemo.media import R3D, ConcatNorm, LogMel, WaveCNN
    from mmemo.model import ClassHead, Frozen, Multimodal, Project
    from mmemo.plan import Plan
    from mmemo.train import cross_entropy, fit
    corpus = read(folder[0], tmp_path)
    encoders = {"audio": nn.Sequential(LogMel(), Frozen(WaveCNN()), Project(128, 16)), "video": nn.Sequential(Frozen(R3D()), Project(512, 16))}
    model = Multimodal(encoders, ConcatNorm({"audio": 16, "video": 16}, 8), {"emotion": ClassHead(8, 7)})
    history = fit(model, cross_entropy("emotion"), corpus, None, Plan(epochs=1, batch_size=3), progress=False)
    assert len(history.steps) == 2 and all(np.isfinite(s["loss"]) for s in history.steps)
