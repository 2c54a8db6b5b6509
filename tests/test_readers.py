"""RAVDESS, MELD and the CMU tables, on tiny folders written by hand, and on the real ones where
they are.
"""

import warnings

import folders
import numpy as np
import pytest
import torch

from mmemo.core.batch import byte_tokens, spread_words, text_stream
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.data.cmu import read_cmu_table, read_mmmo, read_mosi
from mmemo.data.meld import read_meld
from mmemo.data.ravdess import (
    RAVDESS_DUPLICATE,
    RAVDESS_EMOTIONS,
    ravdess_name,
    read_ravdess,
    voice_statistics,
)
from mmemo.data.splits import check_split, leave_one_out_rows
from mmemo.data.standards import EMOTIONS
from mmemo.data.tables import (
    as_key,
    as_number,
    as_text,
    one_of,
    read_arrays,
    read_matrix,
    read_rows,
    read_sound,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*remarks on the data")


@pytest.fixture
def keep(tmp_path):
    return {"cache": tmp_path / "cache", "progress": False}


# words


def test_spread_and_tokens():
    spans = spread_words(["a", "bc", "ü"], 1, 2)
    assert spans.tolist() == [
        [1, pytest.approx(1.333)],
        [pytest.approx(1.333), pytest.approx(1.667)],
        [pytest.approx(1.667), 2],
    ]
    assert spread_words([], 0, 1).shape == (0, 2)
    ids, times = byte_tokens(["a", "ü"], spread_words(["a", "ü"], 0, 2))
    assert bytes(ids.astype(np.uint8)).decode() == "a ü " and times.tolist() == [
        0.5,
        0.5,
        1.5,
        1.5,
        1.5,
    ]
    stream = text_stream(
        lambda w, s: (list(range(len(w))), s.mean(1)),
        [["x"] * 3, []],
        [spread_words(["x"] * 3, 0, 3), spread_words([], 0, 0)],
    )
    assert (
        stream.x.tolist() == [[0, 1, 2], [0, 0, 0]]
        and stream.mask.sum().item() == 3
        and stream.t[0].tolist() == [0.5, 1.5, 2.5]
    )


# tables


def test_values_stay_what_they_are(tmp_path):
    (tmp_path / "a.csv").write_text(
        "\ufeffID, Text ,Score\n007,NA,1\n 010 ,None,2.0\n\n", encoding="utf-8"
    )
    rows = read_rows(
        tmp_path / "a.csv",
        {"Id": as_key, "text": as_text, "points|score": as_number(0, 9, whole=True), "sex": as_key},
        optional=("sex",),
    )
    assert rows == [
        {"line": 2, "Id": "007", "text": "NA", "points": 1},
        {"line": 3, "Id": "010", "text": "None", "points": 2},
    ]


def test_converters():
    assert one_of(("a", "b"))("b") == 1 and as_number(0, 5)(" 2.5 ") == 2.5
    for convert, value in (
        (as_number(), "inf"),
        (as_number(), "nan"),
        (as_number(), "1O"),
        (as_number(), "1_0"),
        (as_number(0, 24, whole=True), "2.5"),
        (as_number(0, 24), "25"),
        (one_of("ab"), "c"),
        (as_key, "../x"),
        (as_key, ""),
        (as_text, None),
        (as_text, "a\0b"),
    ):
        with pytest.raises((ValueError, TypeError)):
            convert(value)


def test_matrix_is_exact(tmp_path):
    """Every float32, written with nine digits, comes back as itself; nan and empty are NaN, spaces
    do not matter.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, (500, 7), dtype=np.uint32).view(np.float32)
    x[~np.isfinite(x)] = 0
    np.savetxt(tmp_path / "x.csv", x, fmt="%.9g", delimiter=",")
    assert np.array_equal(read_matrix(tmp_path / "x.csv", list("abcdefg")), x)
    (tmp_path / "y.csv").write_text("b, a, c\n1, 2, x\n, nan, y\n")
    assert np.array_equal(
        read_matrix(tmp_path / "y.csv", ["a", "b"], header=True),
        np.array([[2, 1], [np.nan, np.nan]], np.float32),
        equal_nan=True,
    )


def test_arrays_come_back(tmp_path):
    a, b, c = np.asfortranarray(np.arange(6).reshape(2, 3)), np.array(["x", "yz"]), np.float32(0.5)
    np.savez_compressed(tmp_path / "x.npz", a=a, b=b, c=c, empty=np.zeros((0, 3)))
    back = read_arrays(tmp_path / "x.npz")
    assert (
        np.array_equal(back["a"], a)
        and back["b"].tolist() == ["x", "yz"]
        and back["c"] == c
        and back["empty"].shape == (0, 3)
    )
    np.save(tmp_path / "y.npy", a)
    assert np.array_equal(read_arrays(tmp_path / "y.npy")["y"], a)


def test_sound_is_mixed_and_resampled(tmp_path):
    import soundfile

    tone = np.sin(2 * np.pi * 440 * np.arange(48000) / 48000).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone * 0], 1), 48000)
    sound, channels = read_sound(tmp_path / "a.wav")
    want = 0.25 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert (
        channels == 2 and sound.shape == (16000,) and np.abs(sound - want)[500:-500].max() < 0.002
    )


# MELD


def test_meld(tmp_path, keep):
    data = read_meld(folders.write_meld(tmp_path / "m", splits=("train", "dev")), **keep)
    assert len(data) == 6 and data.column("id").tolist()[:4] == [
        "train_dia0_utt0",
        "train_dia0_utt1",
        "train_dia2_utt0",
        "dev_dia0_utt0",
    ]
    # not missing values
    assert data.meta["text"][:2] == ["Oh, no. NA", "None"] and data.meta["speaker"][1] == "None"
    assert [data.classes["emotion"][e] for e in data.column("emotion")[:3]] == [
        "sadness",
        "neutral",
        "joy",
    ] and data.column("sentiment")[:3].tolist() == [0, 1, 2]
    assert data.column("seconds")[:3].tolist() == pytest.approx([2, 0.028, 1 / 3]) and data.meta[
        "flag"
    ][:3] == ["", "", "duration"]
    assert any("no test split" in line for line in data.report) and any(
        "train_dia2_utt0 lasts -1 s" in line for line in data.report
    )
    batch = data[[0]]
    assert (
        bytes(batch.streams["text"].x[0].to(torch.uint8).tolist()).decode() == "Oh, no. NA "
        and batch.meta["spans"][0][-1, 1] == 2
    )
    assert data.where(split="dev").column("session").tolist() == [
        "dev_dia0",
        "dev_dia0",
        "dev_dia2",
    ]


def test_meld_tokenizer_is_part_of_the_key(tmp_path, keep):
    folder = folders.write_meld(tmp_path / "m")
    ones = read_meld(folder, tokenizer=lambda w, s: (np.ones(len(w)), s.mean(1)), **keep)
    twos = read_meld(folder, tokenizer=lambda w, s: (np.ones(len(w)) * 2, s.mean(1)), **keep)
    assert (
        ones.folder != twos.folder
        and ones[[0]].streams["text"].x.unique().tolist() == [1]
        and twos[[0]].streams["text"].x.unique().tolist() == [2]
    )


def test_meld_known_clips_are_flagged(tmp_path, keep):
    row = folders.MELD_ROWS[0].copy()
    row[5:7] = "125", "3"
    assert read_meld(folders.write_meld(tmp_path, rows=[row], splits=("train",)), **keep).meta[
        "flag"
    ] == ["broken clip"]


# RAVDESS


def test_ravdess_names():
    said = ravdess_name("03-01-06-02-01-02-13")
    assert (
        RAVDESS_EMOTIONS[said["emotion"]],
        said["intensity"],
        said["speaker"],
        said["sex"],
        said["fold"],
    ) == ("fearful", 2, "13", "male", 1)


@pytest.mark.parametrize("audio", ["functionals", "lld"])
def test_ravdess_features(tmp_path, keep, audio):
    folder = folders.write_ravdess(tmp_path / "r")
    data, arrays = (
        read_ravdess(folder, audio=audio, **keep),
        np.load(folder / "ravdess_egemapsv02.npz"),
    )
    assert data.column("id").tolist() == [
        n for n in folders.RAVDESS_NAMES if n != RAVDESS_DUPLICATE
    ] and any(RAVDESS_DUPLICATE in r for r in data.report)
    batch = data[[2, 0]]  # rows 3 and 0 of the file: the duplicate is gone
    if audio == "functionals":
        assert (
            torch.equal(batch.streams["audio"].x[:, 0], torch.tensor(arrays["func"][[3, 0]]))
            and batch.streams["audio"].t[0, 0] == 1.75
        )
    else:
        assert torch.equal(
            batch.streams["audio"].x[0, :6], torch.tensor(arrays["lld"][12:18].astype(np.float32))
        ) and batch.streams["audio"].mask.sum(1).tolist() == [6, 3]
        assert batch.streams["audio"].t[0, 1] == pytest.approx(0.015)
    assert (
        batch.streams["video"].x[0, 0].tolist() == pytest.approx([0.3] * 35)
        and batch.targets["emotion"].tolist() == [4, 0]
        and batch.meta["speaker"] == ["24", "01"]
    )
    assert (
        data.column("fold").tolist() == [4, 1, 3, 0]
        and sum("stereo" in r for r in data.report) == 1
    )
    for _, train, test in leave_one_out_rows(data, by="fold"):
        check_split(data, train, test)


def spoken(steps: int = 40, seed: int = 0) -> np.ndarray:
    "Curves [T, 25] of somebody who speaks in the middle, with a voice in the first half of that."
    curves = np.random.default_rng(seed).normal(size=(steps, 25)) * 0.1 + 3
    curves[:, 10] = np.where(np.arange(steps) < steps // 2, 20 + np.arange(steps), 0)
    return curves


def test_voice_statistics_values():
    from scipy.stats import iqr, skew

    curves = spoken()
    told = voice_statistics(curves)
    values, slopes, (time, share) = (
        told[:175].reshape(7, 25),
        told[175:350].reshape(7, 25),
        told[350:],
    )
    assert (
        told.shape == (352,)
        and told.dtype == np.float32
        and time == pytest.approx(np.log(40))
        and share == 0.5
    )
    np.testing.assert_allclose(
        values[:, 3],
        [
            curves[:, 3].mean(),
            curves[:, 3].std(),
            *np.percentile(curves[:, 3], [5, 95]),
            iqr(curves[:, 3]),
            (np.linspace(-1, 1, 40) * (curves[:, 3] - curves[:, 3].mean())).mean(),
            skew(curves[:, 3]) * (1 / (1 + 1e-3 / curves[:, 3].std() ** 3)),
        ],
        rtol=1e-4,
        atol=1e-6,
    )
    # pitch: the voiced half alone
    assert values[0, 10] == pytest.approx(29.5) and values[3, 10] < 40
    # one a step, without the jump to silence
    assert slopes[0, 10] == pytest.approx(1) and slopes[1, 10] == pytest.approx(0, abs=1e-6)


def test_voice_statistics_know_neither_level_nor_silence_around():
    curves = spoken()
    louder = curves.copy()
    louder[:, [0, 5]] *= 7
    np.testing.assert_allclose(
        voice_statistics(louder), voice_statistics(curves), rtol=1e-4, atol=1e-5
    )
    still = np.zeros((30, 25))
    padded = [
        voice_statistics(np.concatenate([np.zeros((n, 25)), curves, np.zeros((n, 25))]))
        for n in (5, 30)
    ]
    assert (
        np.array_equal(*padded)
        and np.isfinite(voice_statistics(still)).all()
        and np.isfinite(voice_statistics(curves[:1])).all()
    )
    with pytest.raises(ShapeError, match=r"\[4, 24\].*25 curves"):
        voice_statistics(np.ones((4, 24)))


def test_ravdess_statistics(tmp_path, keep):
    folder = folders.write_ravdess(tmp_path / "r")
    x, arrays = (
        read_ravdess(folder, audio="statistics", **keep)[[2, 0]].streams["audio"].x,
        np.load(folder / "ravdess_egemapsv02.npz"),
    )
    assert x.shape == (2, 1, 440) and torch.equal(
        x[:, 0, :88], torch.tensor(arrays["func"][[3, 0]])
    )
    assert np.array_equal(
        x[0, 0, 88:].numpy(), voice_statistics(arrays["lld"][12:18])
    ) and np.array_equal(x[1, 0, 88:].numpy(), voice_statistics(arrays["lld"][:3]))


def test_ravdess_missing_face_is_a_mask(tmp_path, keep):
    folder = folders.write_ravdess(tmp_path / "r")
    lines = (folder / "ravdess_openface_au_means.csv").read_text().splitlines()
    (folder / "ravdess_openface_au_means.csv").write_text("\n".join(lines[:-1]))
    assert read_ravdess(folder, **keep).to_batch().streams["video"].mask.flatten().tolist() == [
        True,
        True,
        True,
        False,
    ]


def test_ravdess_clips(tmp_path, keep):
    folder = folders.write_clips(tmp_path / "clips")
    (folder / f"._{folders.RAVDESS_NAMES[0]}.wav").write_bytes(b"junk")
    folders.write_clips(folder, ["03-02-01-01-01-01-01", "02-01-01-01-01-01-01"])
    data = read_ravdess(folder, **keep)
    assert data.column("id").tolist() == sorted(
        n for n in folders.RAVDESS_NAMES if n != RAVDESS_DUPLICATE
    )
    assert sum("2 clips are not audio of speech" in r for r in data.report) == 1 and any(
        "has 2 channels: mixed" in r for r in data.report
    )
    s = data[[1, 2]].streams["audio"]  # the third is stereo: .1 and .05 of a sine mix to .075
    assert (
        s.x.ndim == 2
        and s.mask.sum(1).tolist() == [4100, 4300]
        and s.x[1].abs().max().item() == pytest.approx(0.075, abs=1e-3)
        and s.t[0, 0] == pytest.approx(0.5 / 16000)
    )
    with pytest.raises(ConfigError, match="functionals, statistics, lld, raw"):
        read_ravdess(folder, audio="mfcc", **keep)


# CMU tables


def test_cmu_table(tmp_path, keep):
    path = folders.write_table(tmp_path / "t.npz")
    data, arrays = read_cmu_table(path, low=1, high=5, **keep), np.load(path)
    batch = data.to_batch()
    assert (
        len(data) == 10
        and data.column("split").tolist() == ["train"] * 5 + ["valid"] * 2 + ["test"] * 3
    )
    assert batch.streams["audio"].mask[0].tolist() == [False, False, True, True] and torch.equal(
        batch.streams["audio"].x[1], torch.tensor(arrays["audio_train"][1])
    )
    assert batch.streams["text"].mask.sum(1).tolist() == [0] * 5 + [4] * 5 and torch.equal(
        batch.streams["text"].x[5], torch.tensor(arrays["text_valid_emb"][0])
    )
    assert any("text is not there for train" in r for r in data.report) and torch.equal(
        batch.targets["rating"][:5], torch.tensor(arrays["y_train"])
    )


def test_cmu_table_speakers_and_vectors(tmp_path, keep):
    "Ids as in MMSA name the video; a label may be a vector; -inf is a mask."
    x = np.load(folders.write_table(tmp_path / "a.npz"))["audio_train"]
    x[1, 2, 0] = -np.inf
    data = read_cmu_table(
        folders.write_table(
            tmp_path / "t.npz",
            y_train=np.ones((5, 3)),
            y_valid=np.ones((2, 3)),
            y_test=np.ones((3, 3)),
            audio_train=x,
            id_train=np.array([f"v{i // 2}$_${i}" for i in range(5)]),
        ),
        **keep,
    )
    assert data.column("speaker").tolist()[:5] == ["v0", "v0", "v1", "v1", "v2"] and data.targets[
        "rating"
    ].shape == (10, 3)
    assert data[[1]].streams["audio"].mask[0].tolist() == [True, True, False, True]


def test_cmu_table_clips_of_one_video_are_one_speakers(tmp_path, keep):
    "Ids as the CMU SDK writes them; an id of another form is its own video."
    data = read_cmu_table(
        folders.write_table(
            tmp_path / "t.npz",
            id_train=np.array(["v0[0]", "v0[1]", "v1[12]", "[2]x", "v0"]),
        ),
        **keep,
    )
    assert data.column("speaker").tolist()[:5] == ["v0", "v0", "v1", "[2]x", "v0"]


def test_mosi(tmp_path, keep):
    data = read_mosi(folders.write_mosi(tmp_path / "mosi"), **keep)
    assert (
        data.meta["text"] == ["GOOD FILM", "NA", "BAD", ""]
        and data.column("speaker").tolist() == ["-a", "-a", "b", "b"]
        and data.column("sentiment").tolist() == [0, 1, 1, 0]
    )
    assert "worthless" in data.report[0] and data[[1, 2]].streams["video"].x.shape == (2, 1, 100)


# the real ones


def test_real_meld(corpora_root, keep):
    if not (corpora_root / "meld").is_dir():
        pytest.skip("no meld folder among the real corpora")
    data = read_meld(corpora_root / "meld", **keep)

    def count(split):
        return np.bincount(data.where(split=split).column("emotion"), minlength=7).tolist()

    assert [len(data.where(split=s)) for s in ("train", "dev", "test")] == [
        9989,
        1109,
        2610,
    ] and len(data.report) == 3
    assert dict(zip(EMOTIONS, count("train"))) == dict(
        neutral=4710, joy=1743, surprise=1205, anger=1109, sadness=683, disgust=271, fear=268
    )
    assert (
        len(set(data.where(split="train").column("speaker"))) == 260
        and sum(f == "duration" for f in data.meta["flag"]) == 3
    )
    shutil_copy = keep["cache"].parent / "only"
    shutil_copy.mkdir()
    (shutil_copy / "meld.parquet").write_bytes(
        (corpora_root / "meld" / "meld.parquet").read_bytes()
    )
    other = read_meld(shutil_copy, **keep)
    assert (
        other.meta["id"] == data.meta["id"]
        and other.meta["text"] == data.meta["text"]
        and torch.equal(other.meta["seconds"], data.meta["seconds"])
    )


def test_real_ravdess(corpora_root, keep):
    if not (corpora_root / "ravdess").is_dir():
        pytest.skip("no ravdess folder among the real corpora")
    data = read_ravdess(corpora_root / "ravdess", **keep)
    assert len(data) == 1439 and np.bincount(data.column("emotion")).tolist() == [
        96,
        192,
        191,
        192,
        192,
        192,
        192,
        192,
    ]
    assert len(set(data.column("speaker"))) == 24 and [
        len(t) for *_, t in leave_one_out_rows(data, "fold")
    ] == [300, 299, 300, 300, 240]
    import csv

    with open(corpora_root / "ravdess" / "meta.csv") as file:
        fold = {r["name"]: int(r["fold5"]) for r in csv.DictReader(file)}
    assert [fold[i] for i in data.meta["id"]] == data.column("fold").tolist()


def test_real_mmmo_and_mosi(corpora_root, keep):
    if not (corpora_root / "mmmo").is_dir():
        pytest.skip("no mmmo folder among the real corpora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = read_mmmo(corpora_root / "mmmo", **keep)
        mosi = read_mosi(corpora_root / "mosi", **keep)
    batch = data.to_batch()
    assert (
        len(data) == 340
        and 0.9 < batch.streams["audio"].mask.float().mean() < 0.95
        and 100 < batch.streams["audio"].x[..., 0][batch.streams["audio"].mask].mean() < 220
    )
    assert [len(mosi.where(split=s)) for s in ("train", "test")] == [1447, 752] and len(
        set(mosi.column("speaker"))
    ) == 93
    check_split(mosi, *(np.flatnonzero(mosi.column("split") == s) for s in ("train", "test")))
