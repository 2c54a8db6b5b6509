"""The container's clock: where a film begins, what is lost in it, how it is held, how long.

And files that are unlike others.
"""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from mmemo.core.errors import CheckpointError, ConfigError, DataError
from mmemo.core.files import fingerprint_files, plain_file
from mmemo.data.clips import read_media
from mmemo.data.decoding import decode_clip
from mmemo.data.features import read_features
from mmemo.data.interviews import read_action_units
from mmemo.data.ravdess import read_ravdess
from mmemo.data.standards import SOUND_RATE
from mmemo.data.tables import as_text, mend_letters, read_arrays, read_matrix, read_rows, read_sound
from mmemo.experiments.reading import read_yaml
from mmemo.training.checkpoint import read_checkpoint

SIZE = (48, 64)
# ending: (codec of the pictures, of the sound, Hz, time base)
FORMATS = {
    "mkv": ("mpeg4", "pcm_s16le", 16_000, Fraction(1, 1000)),
    "mp4": ("mpeg4", "aac", 16_000, Fraction(1, 1000)),
    "ts": ("mpeg2video", "mp2", 16_000, Fraction(1, 25)),
    "webm": ("libvpx", "libopus", 48_000, Fraction(1, 1000)),
    "flv": ("flv1", "aac", 16_000, Fraction(1, 1000)),
}


def film(path, times, tone=None, start=0.0, lost=(0, 0), picture=None):
    """A small film: grey pictures at `times`, and where it is given a sound of `tone` seconds,
    silent in the first of them. All time stamps begin at `start`; the sound from `lost[0]` on comes
    `lost[1]` seconds later.
    """
    codec, sound_codec, rate, base = FORMATS[path.suffix[1:]]
    with av.open(str(path), "w") as file:
        v = file.add_stream(codec, rate=25)
        v.height, v.width, v.pix_fmt, v.codec_context.time_base = *SIZE, "yuv420p", base
        if tone is not None:
            a = file.add_stream(sound_codec, rate=rate, layout="mono")
        for k, time in enumerate(times):
            grey = np.full((*SIZE, 3), 4 * k % 255, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(grey, "rgb24")
            frame.pts, frame.time_base = round((time + start) / base), base
            file.mux(v.encode(frame))
        file.mux(v.encode(None))
        if tone is not None:
            t = np.arange(round(tone * rate)) / rate
            wave = (16_000 * np.sin(2 * np.pi * 440 * t) * (t >= 1)).astype(np.int16)
            for k in range(0, len(wave), 960):
                frame = av.AudioFrame.from_ndarray(wave[None, k : k + 960], "s16", "mono")
                frame.rate, frame.time_base = rate, Fraction(1, rate)
                late = lost[1] if k / rate >= lost[0] else 0
                frame.pts = k + round((start + late) * rate)
                file.mux(a.encode(frame))
            file.mux(a.encode(None))
    return path


def onset(sound):
    return np.flatnonzero(np.abs(np.nan_to_num(sound)) > 0.1)[0] / SOUND_RATE


def even(seconds, fps=25):
    return [k / fps for k in range(round(seconds * fps))]


# ------------------------------------------------------------------ where a film begins
@pytest.mark.parametrize("start", [0, 5, 700])
@pytest.mark.parametrize("ending", FORMATS)
def test_a_film_begins_at_0_wherever_its_time_stamps_begin(tmp_path, ending, start):
    clip = decode_clip(film(tmp_path / f"a.{ending}", even(3), 3, start), frames=3, size=8)
    assert clip.complaints == ()
    assert np.allclose(clip.times, [0.5, 1.5, 2.5], atol=0.1)
    assert abs(onset(clip.sound) - 1) < 0.1
    assert abs(clip.seconds - 3) < 0.15


def test_sound_alone_stands_on_the_clock_of_its_film(tmp_path):
    "The pictures begin at 5 s and the sound 2 s later: so it does where only the sound is read."
    path = film(tmp_path / "a.mkv", even(6), 3, 5, lost=(0, 2))
    for kinds in (("audio",), ("video", "audio")):
        sound = decode_clip(path, 2, 8, kinds=kinds).sound
        assert abs(onset(sound) - 3) < 0.05 and abs(len(sound) / SOUND_RATE - 5) < 0.05


def test_a_film_that_begins_behind_the_limit_is_read_and_cut_at_its_own_limit(tmp_path):
    path = film(tmp_path / "a.mkv", even(4), 4, start=90)
    clip = decode_clip(path, 4, 8, limit=60)
    assert clip.complaints == () and abs(clip.seconds - 4) < 0.1
    clip = decode_clip(path, 4, 8, limit=2)
    assert "video lasts 4 s: cut at 2" in clip.complaints and clip.seconds <= 2.1
    assert clip.times.max() < 2


def test_a_stream_that_begins_behind_the_limit_says_so(tmp_path):
    clip = decode_clip(film(tmp_path / "a.mkv", even(4), 2, lost=(0, 3)), 4, 8, limit=2)
    assert clip.sound is None and clip.frames is not None
    assert "audio begins after 2 s" in clip.complaints


# ------------------------------------------------------------------ how long it lasts
@pytest.mark.parametrize("frames", [1, 4, 16, 200])
@pytest.mark.parametrize("fps", [5, 25])
def test_a_silent_film_lasts_until_its_last_picture_ends(tmp_path, frames, fps):
    path = film(tmp_path / "a.mp4", even(4, fps))
    assert decode_clip(path, frames, 8).seconds == pytest.approx(4, abs=0.21 if fps == 5 else 0.05)
    made = read_media({"a": path}, cache=tmp_path / "c", progress=False, frames=frames, size=8)
    assert made.column("seconds")[0] == pytest.approx(4, abs=0.21 if fps == 5 else 0.05)


def test_a_film_of_variable_rate_is_read_by_its_clock(tmp_path):
    times = even(1) + [1 + 0.4 * k for k in range(10)]
    clip = decode_clip(film(tmp_path / "a.mp4", times, start=3), frames=5, size=8)
    assert np.allclose(clip.times, [0.5, 1.4, 2.4, 3.4, 4.4], atol=0.21)
    assert clip.times[-1] < clip.seconds < 5.1


# ------------------------------------------------------------------ gaps
@pytest.mark.parametrize("at, length", [(0.5, 3), (0.5, 0.12), (1.5, 1)])
def test_a_gap_in_the_sound_stays_a_gap(tmp_path, at, length):
    path = film(tmp_path / "a.mkv", even(3 + length), 3, start=2, lost=(at, length))
    clip = decode_clip(path, 4, 8)
    lost = np.isnan(clip.sound)
    assert abs(onset(clip.sound) - (1 + length if at < 1 else 1)) < 0.02
    assert abs(lost.sum() / SOUND_RATE - length) < 0.01
    assert abs(lost.argmax() / SOUND_RATE - at) < 0.1
    assert abs(len(clip.sound) / SOUND_RATE - 3 - length) < 0.01
    assert clip.complaints == (f"{length:.1f} s of the sound are lost in gaps",)
    # in a corpus: mask False, value 0
    made = read_media({"a": path}, cache=tmp_path / "c", progress=False, frames=4, size=8)
    heard = made.to_batch().streams["audio"]
    assert torch.equal(heard.mask[0], torch.from_numpy(~lost)) and heard.x.isfinite().all()


def test_uneven_time_stamps_are_no_gaps(tmp_path):
    "Matroska rounds to milliseconds: frames of 7.8125 ms never begin where the last one ended."
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        a = file.add_stream("pcm_s16le", rate=SOUND_RATE, layout="mono")
        for k in range(400):
            frame = av.AudioFrame.from_ndarray(np.full((1, 125), 5000, np.int16), "s16", "mono")
            frame.rate, frame.pts, frame.time_base = SOUND_RATE, 125 * k, Fraction(1, SOUND_RATE)
            file.mux(a.encode(frame))
        file.mux(a.encode(None))
    clip = decode_clip(path, kinds=("audio",))
    assert clip.complaints == () and len(clip.sound) == 400 * 125 and np.isfinite(clip.sound).all()


# ------------------------------------------------------------------ how it is held
ONE = 1 << 16
# (a, b, c, d) of the display matrix, and how NumPy does the same
TURNS = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "a quarter to the right": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "a half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "a quarter to the left": ((0, -1, 1, 0), lambda x: np.rot90(x, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "mirrored along the diagonal": ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_a_film_is_seen_as_players_show_it(tmp_path, turn):
    # four quarters of four greys
    stored = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 24, 0), 32, 1)
    path = film(tmp_path / "a.mp4", even(0.4), picture=np.stack([stored] * 3, 2))
    (a, b, c, d), turned = TURNS[turn]
    raw = bytearray(path.read_bytes())
    at = raw.find(b"tkhd")
    at += 8 + (32 if raw[at + 4] else 20) + 16
    matrix = (a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    raw[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(raw)
    want = turned(np.repeat(np.array([[0, 80], [160, 240]])[..., None], 3, 2))[..., 0]
    seen = decode_clip(path, 1, 8).frames[0].mean(0)
    found = np.array([[seen[:3, :3].mean(), seen[:3, 5:].mean()], [seen[5:, :3].mean(), 0]])
    found[1, 1] = seen[5:, 5:].mean()
    assert np.abs(found - want).max() < 20, found


# ------------------------------------------------------------------ files that are unlike others
@pytest.mark.parametrize("channels", [1, 2, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("ending, rate", [("wav", 16_000), ("wav", 48_000), ("ogg", 44_100)])
def test_any_number_of_channels_is_their_mean(tmp_path, channels, ending, rate):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    if (ending, channels) == ("ogg", 6):
        pytest.skip("Vorbis takes one of six channels for a subwoofer's")
    share = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    soundfile.write(tmp_path / f"a.{ending}", tone[:, None] * share, rate)
    clip = decode_clip(tmp_path / f"a.{ending}", kinds=("audio",))
    assert clip.complaints == () and abs(len(clip.sound) - SOUND_RATE) < 300
    assert abs(np.abs(clip.sound[4000:12000]).max() - 0.5) < 0.02


@pytest.mark.parametrize("bad", [100, 5000])
def test_many_channels_with_a_sample_that_is_not_finite(tmp_path, bad):
    wave = np.full((SOUND_RATE, 9), 0.25, np.float32)
    wave[bad, 8] = np.nan
    soundfile.write(tmp_path / "a.wav", wave, SOUND_RATE, subtype="FLOAT")
    sound = decode_clip(tmp_path / "a.wav", kinds=("audio",)).sound
    assert np.flatnonzero(np.isnan(sound)).tolist() == [bad]
    assert np.allclose(np.delete(sound, bad), 0.25)


def wav(path, rate, seconds=1000):
    data = np.full(seconds, 3000, "<i2").tobytes()
    form = struct.pack("<IHHIIHH", 16, 1, 1, rate, rate * 2 & 0xFFFFFFFF, 2, 16)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form
    path.write_bytes(head + b"data" + struct.pack("<I", len(data)) + data)
    return path


@pytest.mark.parametrize("rate", [1, 20, 999, 2_000_000, 4_000_000_000])
def test_a_rate_that_no_recording_has_is_a_broken_header(tmp_path, rate):
    path = wav(tmp_path / "a.wav", rate)
    with pytest.raises(DataError, match="a.wav"):
        read_sound(path)
    clip = decode_clip(path, kinds=("audio",))
    assert clip.sound is None and clip.complaints


@pytest.mark.parametrize("rate", [1000, 8000, 192_000, 1_000_000])
def test_a_rate_that_a_recording_may_have_is_read(tmp_path, rate):
    path = wav(tmp_path / "a.wav", rate, rate)
    assert abs(len(read_sound(path)[0]) - SOUND_RATE) <= 16
    assert abs(len(decode_clip(path, kinds=("audio",)).sound) - SOUND_RATE) <= 16


def test_a_name_with_a_colon_is_a_file_and_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["12:30.wav", "data:x.wav", "http:/127.0.0.1:9/a.wav", "concat:b.wav", "a|b%03d.wav"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.full(1600, 0.1), SOUND_RATE)
        assert decode_clip(name, kinds=("audio",)).complaints == ()
    made = read_media(".", cache=tmp_path / "c", progress=False)
    assert len(made) == len(names) and not made.report


@pytest.mark.parametrize("ending", [".WAV", ".Wav", ".FLAC"])
def test_ravdess_clips_of_any_ending(tmp_path, ending):
    (tmp_path / "r").mkdir()
    for name in ("03-01-01-01-01-01-01.wav", f"03-01-05-01-01-01-01{ending}"):
        soundfile.write(
            tmp_path / "r" / name, np.full(800, 0.1), 16000, format=name[-4:].strip(".")
        )
    assert len(read_ravdess(tmp_path / "r", cache=tmp_path / "c", progress=False)) == 2


# ------------------------------------------------------------------ tables
@pytest.mark.parametrize("bad", [[0], [5], [3, 4, 5], [9], [0, 9]])
@pytest.mark.parametrize("word", ["nan", ""])
def test_a_timestamp_that_is_no_number_costs_its_frame_only(tmp_path, bad, word):
    rows = [["timestamp", "success", "AU01_r"]]
    rows += [["" if k in bad else str(k / 30), "1", "2.5"] for k in range(10)]
    for k in bad:
        rows[k + 1][0] = word
    path = tmp_path / "300_CLNF_AUs.txt"
    path.write_text("\n".join(",".join(row) for row in rows))
    report = []
    values, mask, t = read_action_units(path, ["AU01_r"], report)
    assert (~mask).nonzero().flatten().tolist() == bad and values.eq(2.5).all()
    known = [k for k in range(10) if k not in bad]
    assert torch.allclose(t[known], (torch.tensor(known) + 0.5) / 30, atol=1e-5)
    assert t.isfinite().all() and (t.diff() >= 0).all()
    assert report == [
        f"300_CLNF_AUs.txt: {len(bad)} of 10 timestamps are not numbers; these frames are not real"
    ]


def test_no_timestamp_at_all_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("timestamp,success,AU01_r\nnan,1,2\nnan,1,2\n")
    with pytest.raises(DataError, match="no timestamp is a number"):
        read_action_units(tmp_path / "a.txt", ["AU01_r"])


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("I\x92m", "I’m"),
        ("\x93so\x94 \x97 well\x85", "“so” — well…"),
        ("caf\xe9 I’m", "café I’m"),
        # without a letter in Windows-1252
        ("a\x81b", "ab"),
    ],
)
def test_letters_that_became_control_characters(wrong, right):
    assert mend_letters(wrong) == right


SPECIAL = {
    "rows": ("a.csv", lambda p: read_rows(p, {"id": as_text}), DataError),
    "rows of parquet": ("a.parquet", lambda p: read_rows(p, {"id": as_text}), DataError),
    "matrix": ("a.csv", lambda p: read_matrix(p, ["id"]), DataError),
    "arrays": ("a.npz", read_arrays, DataError),
    "array": ("a.npy", read_arrays, DataError),
    "sound": ("a.wav", read_sound, DataError),
    "features": ("a.safetensors", read_features, DataError),
    "recipe": ("a.yaml", read_yaml, ConfigError),
    "checkpoint": ("manifest.json", lambda p: read_checkpoint(p.parent), CheckpointError),
    "fingerprint": ("a.csv", lambda p: fingerprint_files(p.parent, [p]), DataError),
}


@pytest.mark.parametrize("device", ["pipe", "zero"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(tmp_path, kind, device):
    name, read, error = SPECIAL[kind]
    path = tmp_path / name
    if device == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(error, match="pipe or a device"):
        read(path)
    assert decode_clip(path).complaints == ("there is no such file",)


def test_a_link_to_a_file_is_plain(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert plain_file(tmp_path / "b").read_text() == "x"
