"""Tiny folders laid out as the real corpora, written by hand: a few items, a few seconds."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from mmemo.data.interviews import PRESENCE_UNITS
from mmemo.data.ravdess import OPENFACE_UNITS, RAVDESS_EMOTIONS
from mmemo.data.standards import AUS

TRAIN = (
    "Participant_ID,PHQ8_Binary,PHQ8_Score,Gender,PHQ8_NoInterest,PHQ8_Depressed,PHQ8_Sleep,"
    "PHQ8_Tired,PHQ8_Appetite,PHQ8_Failure,PHQ8_Concentrating,PHQ8_Moving"
)
TURNS = [
    (1.0, 2.0, "Ellie", "hi i'm ellie thanks for coming in today"),
    (2.5, 3.5, "Participant", "i'm fine thank you"),
    (4.0, 4.5, "Ellie", "where are you from"),
    (5.0, 7.0, "Participant", "los angeles <ang> xxx [laughter]"),
    (7.2, 7.6, "Participant", "scrubbed_entry i think"),
]


def covarep(seconds: float, seed: int = 0) -> np.ndarray:
    """COVAREP-like rows [T, 74] with voiced and unvoiced frames; each value can be written with
    six decimals and read back.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(round(seconds * 100), 74)).round(6)
    x[:, 1] = np.arange(len(x)) % 3 > 0
    x[:, 0] = 150 + x[:, 0]
    return x


def write_session(
    root,
    person: str,
    turns=TURNS,
    seconds: float = 9,
    x: np.ndarray | None = None,
    success=lambda t: np.ones(len(t)),
):
    "One session folder."
    folder = Path(root) / f"{person}_P"
    folder.mkdir(parents=True, exist_ok=True)
    x = covarep(seconds, int(person)) if x is None else x
    np.savetxt(folder / f"{person}_COVAREP.csv", x, fmt="%.6f", delimiter=",")
    T = round(seconds * 30)
    t, aus = np.arange(T) / 30, np.random.default_rng(int(person)).uniform(0, 5, (T, 14)).round(4)
    present = (np.arange(T * 6).reshape(T, 6) % 2).astype(float)
    rows = np.column_stack([np.arange(T) + 1, t, np.full(T, 0.9), success(t), aus, present])
    with open(folder / f"{person}_CLNF_AUs.txt", "w") as file:
        file.write(
            "frame, timestamp, confidence, success, " + ", ".join(AUS + PRESENCE_UNITS) + "\n"
        )
        for row in rows:
            file.write(", ".join(f"{v:.6g}" for v in row) + "\n")
    with open(folder / f"{person}_TRANSCRIPT.csv", "w", encoding="utf-8") as file:
        file.write("start_time\tstop_time\tspeaker\tvalue\n")
        for start, stop, speaker, value in turns:
            file.write(f"{start:.3f}\t{stop:.3f}\t{speaker}\t{value}\n")


def write_labels(
    root, train=(("300", 0, 2),), dev=(("302", 1, 14),), test=(("303", 0, 5),), unlabelled=()
):
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for split, people in (("train", train), ("dev", dev)):
        lines = [f"{p},{binary},{score},1,0,0,0,0,0,0,0,0" for p, binary, score in people]
        (root / f"{split}_split_Depression_AVEC2017.csv").write_text(
            "\n".join([TRAIN, *lines]) + "\n"
        )
    (root / "test_split_Depression_AVEC2017.csv").write_text(
        "\n".join(
            [
                "participant_ID,Gender",
                *(f"{p},0" for p, *_ in test),
                *(f"{p},0" for p in unlabelled),
            ]
        )
        + "\n"
    )
    (root / "full_test_split.csv").write_text(
        "\n".join(
            ["Participant_ID,PHQ_Binary,PHQ_Score,Gender", *(f"{p},{b},{s},0" for p, b, s in test)]
        )
        + "\n"
    )


def write_daic(root, **labels) -> Path:
    "Three complete sessions: 300 train, 302 dev, 303 test."
    write_labels(root, **labels)
    for person in ("300", "302", "303"):
        write_session(root, person)
    return Path(root)


MELD_HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,"
    "Season,Episode,StartTime,EndTime"
).split(",")
MELD_ROWS = [
    [
        "1",
        "Oh, no. NA",
        "Ross",
        "sadness",
        "negative",
        "0",
        "0",
        "1",
        "1",
        "00:00:01,000",
        "00:00:03,000",
    ],
    ["2", "None", "None", "neutral", "neutral", "0", "1", "1", "1", "0:00:04,000", "0:00:04,28"],
    ["3", "Hey!", "Joey", "joy", "positive", "2", "0", "1", "1", "00:10:01,000", "00:10:00,000"],
]


def write_meld(root, rows=MELD_ROWS, header=MELD_HEADER, splits=("train", "dev", "test")) -> Path:
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for split in splits:
        with open(root / f"{split}_sent_emo.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    return root


RAVDESS_NAMES = [
    "03-01-01-01-01-01-01",
    "03-01-03-01-02-01-07",
    "03-01-03-01-02-02-07",
    "03-01-05-02-02-02-24",
    "03-01-08-01-01-01-02",
]


def write_ravdess(root, names=RAVDESS_NAMES, **changes) -> Path:
    "eGeMAPS file, action units and meta.csv; `changes` replace arrays of the npz."
    root, N = Path(root), len(names)
    root.mkdir(parents=True, exist_ok=True)
    rng, lengths = np.random.default_rng(0), np.arange(N) + 3
    arrays = dict(
        name=np.array(names),
        func=rng.normal(size=(N, 88)).astype(np.float32),
        lld=rng.normal(size=(lengths.sum(), 25)).astype(np.float16),
        lld_len=lengths,
    )
    np.savez(root / "ravdess_egemapsv02.npz", **{**arrays, **changes})
    with open(root / "ravdess_openface_au_means.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*OPENFACE_UNITS, "audio_name"])
        for i, name in enumerate(names):
            writer.writerow([*([round(0.1 * (i % 10), 1)] * 35), name])
    with open(root / "meta.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "emotion", "orig_channels", "duration_s"])
        for i, name in enumerate(names):
            writer.writerow([name, RAVDESS_EMOTIONS[int(name[6:8]) - 1], 1 + i % 2, 3.5])
    return root


def write_clips(root, names=RAVDESS_NAMES, rate: int = 16000) -> Path:
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        tone = 0.1 * np.sin(2 * np.pi * 200 * np.arange(rate // 4 + 100 * i) / rate)
        soundfile.write(
            root / f"{name}.{'wav' if i % 2 else 'flac'}",
            np.stack([tone, 0.5 * tone], 1) if i == 3 else tone,
            rate,
        )
    return root


def write_table(path, **changes) -> Path:
    """A CMU-style npz: 5, 2 and 3 items of 4 steps, zero-padded; `changes` replace arrays (None
    removes one).
    """
    rng, arrays = np.random.default_rng(0), {}
    for split, N in (("train", 5), ("valid", 2), ("test", 3)):
        for name, F in (("audio", 6), ("video", 3)):
            arrays[f"{name}_{split}"] = rng.normal(size=(N, 4, F)).astype(np.float32)
            arrays[f"{name}_{split}"][0, :2] = 0
        if split != "train":
            arrays[f"text_{split}_emb"] = rng.normal(size=(N, 4, 7)).astype(np.float32)
        arrays[f"y_{split}"] = np.linspace(1, 5, N).astype(np.float32)
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return Path(path)


def write_mosi(root, **changes) -> Path:
    root, N = Path(root), 4
    root.mkdir(parents=True, exist_ok=True)
    rng, ids = np.random.default_rng(0), ["-a_1", "-a_2", "b_1", "b_2"]
    arrays = dict(
        utt_id=np.array(ids),
        video=np.array(["-a", "-a", "b", "b"]),
        seg=np.array([1, 2, 1, 2]),
        split=np.array(["train"] * 2 + ["test"] * 2),
        label=np.array([0, 1, 1, 0], np.int8),
        text=rng.normal(size=(N, 100)).astype("f4"),
        audio=rng.normal(size=(N, 73)).astype("f4"),
        visual=rng.normal(size=(N, 100)).astype("f4"),
    )
    np.savez(root / "mosi_features.npz", **{**arrays, **changes})
    pq.write_table(
        pa.table({"utt_id": ids, "text": ["GOOD FILM", "NA", "BAD", ""]}),
        root / "mosi_meta.parquet",
    )
    return root
