"""A collection of malformed inputs: each ends in one of the package's errors that names the place,
and leaves the cache as it was.
"""

import hashlib
import io
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import folders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from mmemo.core.errors import MmemoError
from mmemo.data.cmu import read_cmu_table, read_mosi
from mmemo.data.daicwoz import read_daicwoz
from mmemo.data.meld import read_meld
from mmemo.data.ravdess import read_ravdess
from mmemo.data.tables import read_arrays

CASES = {}


def case(says: str):
    """A function that puts a broken thing into a folder and returns a call that must fail with a
    message containing `says`.
    """

    def keep(make):
        assert make.__name__ not in CASES
        CASES[make.__name__] = (make, says)
        return make

    return keep


def edit(path: Path, old: str, new: str) -> None:
    before = path.read_text(encoding="utf-8")
    assert old in before, f"{old!r} is not in {path}"
    path.write_text(before.replace(old, new, 1), encoding="utf-8")


def npy(shape="(2,)", descr="'<f4'", payload=b"\0" * 8, version=b"\1\0") -> bytes:
    "The bytes of a .npy file with a header that claims what it likes."
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + payload


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


class Bomb:
    "Unpickling this would leave a file behind."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# csv: MELD


@case("train_sent_emo.csv is empty")
def empty_csv(root):
    folders.write_meld(root)
    (root / "train_sent_emo.csv").write_text("")
    return lambda **k: read_meld(root, **k)


@case("train_sent_emo.csv, line 1: no column Emotion")
def header_lacks_a_column(root):
    folders.write_meld(
        root, header=["Feeling" if h == "Emotion" else h for h in folders.MELD_HEADER]
    )
    return lambda **k: read_meld(root, **k)


@case("line 1: columns named twice: speaker")
def column_named_twice(root):
    folders.write_meld(
        root, header=["Speaker" if h == "Season" else h for h in folders.MELD_HEADER]
    )
    return lambda **k: read_meld(root, **k)


@case("train_sent_emo.csv, line 3, column Emotion: 'joyy' is not one of neutral, joy")
def label_typo(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", "None,neutral", "None,joyy")
    return lambda **k: read_meld(root, **k)


@case("line 4: train_dia0_utt0 stands in line 2 too")
def duplicate_key(root):
    folders.write_meld(root, rows=[*folders.MELD_ROWS[:2], folders.MELD_ROWS[0]])
    return lambda **k: read_meld(root, **k)


@case("line 4: 4 values, the header has 11")
def truncated_row(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", ",positive,2,0", "\r\n")
    return lambda **k: read_meld(root, **k)


@case("train_sent_emo.csv, line 4: broken csv")
def open_quote(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", "Hey!", '"Hey!')
    return lambda **k: read_meld(root, **k)


@case("is not UTF-8 text")
def wrong_encoding(root):
    folders.write_meld(root)
    (root / "dev_sent_emo.csv").write_bytes(
        (root / "dev_sent_emo.csv").read_bytes().replace(b"Hey!", b"Hey\x92s")
    )
    return lambda **k: read_meld(root, **k)


@case("column EndTime: '25 o clock' is not a time as H:MM:SS,mmm")
def wrong_time(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", "00:00:03,000", "25 o clock")
    return lambda **k: read_meld(root, **k)


@case("column Utterance_ID: '1O' is not a whole number")
def letter_for_a_digit(root):
    folders.write_meld(root, rows=[[*folders.MELD_ROWS[0][:6], "1O", *folders.MELD_ROWS[0][7:]]])
    return lambda **k: read_meld(root, **k)


@case("column Utterance: 'Hey\\x00!' is not text")
def nul_byte(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", "Hey!", "Hey\0!")
    return lambda **k: read_meld(root, **k)


@case("broken csv: field larger than field limit")
def endless_field(root):
    folders.write_meld(root)
    edit(root / "train_sent_emo.csv", "Hey!", "x" * 200_000)
    return lambda **k: read_meld(root, **k)


@case("meld.parquet cannot be read: No such file")
def no_files_at_all(root):
    return lambda **k: read_meld(root, **k)


@case("cannot be read: Is a directory")
def folder_in_place_of_a_file(root):
    (root / "train_sent_emo.csv").mkdir(parents=True)
    return lambda **k: read_meld(root, **k)


# parquet


@case("meld.parquet is not a readable parquet file")
def parquet_of_noise(root):
    (root / "meld.parquet").write_bytes(b"PAR1" + os.urandom(300) + b"PAR1")
    return lambda **k: read_meld(root, **k)


@case("is not a readable parquet file")
def truncated_parquet(root):
    good = folders.write_mosi(root) / "mosi_meta.parquet"
    good.write_bytes(good.read_bytes()[:-40])
    return lambda **k: read_mosi(root, **k)


@case("mosi_meta.parquet, line 2, column text: 'None' is not text")
def missing_text_in_parquet(root):
    folders.write_mosi(root)
    pq.write_table(
        pa.table({"utt_id": ["a", "b"], "text": ["x", None]}), root / "mosi_meta.parquet"
    )
    return lambda **k: read_mosi(root, **k)


@case("mosi_meta.parquet, line 1: no column text")
def parquet_lacks_a_column(root):
    folders.write_mosi(root)
    pq.write_table(pa.table({"utt_id": ["a"]}), root / "mosi_meta.parquet")
    return lambda **k: read_mosi(root, **k)


@case("would unpack to")
def parquet_bomb(root, monkeypatch):
    folders.write_mosi(root)
    pq.write_table(
        pa.table({"utt_id": ["a"] * 9999, "text": ["x" * 999] * 9999}), root / "mosi_meta.parquet"
    )
    monkeypatch.setattr("mmemo.data.tables.MAX_BYTES", 1 << 20)
    monkeypatch.setattr(
        "mmemo.data.cmu.read_arrays", lambda path: {k: v for k, v in np.load(path).items()}
    )
    return lambda **k: read_mosi(root, **k)


# npz and npy


@case("ravdess_egemapsv02.npz is not a readable npz file")
def npz_of_noise(root):
    folders.write_ravdess(root)
    (root / "ravdess_egemapsv02.npz").write_bytes(os.urandom(999))
    return lambda **k: read_ravdess(root, **k)


@case("is not a readable npz file, or is truncated")
def truncated_npz(root):
    path = folders.write_ravdess(root) / "ravdess_egemapsv02.npz"
    path.write_bytes(path.read_bytes()[:-500])
    return lambda **k: read_ravdess(root, **k)


@case("t.npz is not a readable npz file, or is truncated: Bad CRC-32")
def flipped_bit_in_npz(root):
    path = folders.write_table(root / "t.npz")
    data = bytearray(path.read_bytes())
    data[300] ^= 4
    path.write_bytes(data)
    return lambda **k: read_cmu_table(path, **k)


@case(
    "array audio_train: the header claims shape [200000000000] float32 = 800,000,000,000 bytes, the"
    " file has 8"
)
def header_of_800_gigabytes(root):
    path = npz(root / "t.npz", audio_train=npy("(200000000000,)"))
    return lambda **k: read_cmu_table(path, **k)


@case("header claims shape [-2]")
def negative_shape(root):
    path = npz(root / "t.npz", audio_train=npy("(-2,)"))
    return lambda **k: read_cmu_table(path, **k)


@case("dtype object needs a pickle")
def objects_in_npz(root):
    path = folders.write_table(root / "t.npz", audio_train=np.array([{}, []], dtype=object))
    return lambda **k: read_cmu_table(path, **k)


@case("broken header")
def header_is_a_program(root):
    path = npz(root / "t.npz", audio_train=npy("__import__('os').mkdir('ran')"))
    return lambda **k: read_cmu_table(path, **k)


@case("broken header")
def not_an_npy_in_the_npz(root):
    path = npz(root / "t.npz", audio_train=b"hello")
    return lambda **k: read_cmu_table(path, **k)


@case("would unpack to")
def zip_bomb(root, monkeypatch):
    path = npz(root / "t.npz", audio_train=npy("(9999999,)", payload=bytes(4 * 9999999)))
    assert path.stat().st_size < 60_000
    monkeypatch.setattr("mmemo.data.tables.MAX_BYTES", 1 << 20)
    return lambda **k: read_cmu_table(path, **k)


@case("unknown array vision_train")
def unknown_array(root):
    path = folders.write_table(root / "t.npz", vision_train=np.zeros((5, 4, 2)))
    return lambda **k: read_cmu_table(path, **k)


@case("audio_train has 4 items, y_train has 5")
def items_disagree(root):
    path = folders.write_table(root / "t.npz", audio_train=np.zeros((4, 4, 6)))
    return lambda **k: read_cmu_table(path, **k)


@case("audio arrays must be numbers [N, T, F] with one T and F")
def features_disagree(root):
    path = folders.write_table(root / "t.npz", audio_test=np.zeros((3, 4, 7)))
    return lambda **k: read_cmu_table(path, **k)


@case("y_valid, row 1: inf is not a number from")
def infinite_label(root):
    path = folders.write_table(root / "t.npz", y_valid=np.array([1, np.inf]))
    return lambda **k: read_cmu_table(path, **k)


@case("y_test, row 0: 6.0 is not a number from 1 to 5")
def rating_of_six(root):
    path = folders.write_table(root / "t.npz", y_test=np.array([6.0, 1, 2]))
    return lambda **k: read_cmu_table(path, low=1, high=5, **k)


@case("y_train, row 0: a is not a number")
def labels_of_letters(root):
    path = folders.write_table(root / "t.npz", y_train=np.array(list("abcde")))
    return lambda **k: read_cmu_table(path, **k)


@case("no items were found")
def no_labels(root):
    path = folders.write_table(root / "t.npz", y_train=None, y_valid=None, y_test=None)
    return lambda **k: read_cmu_table(path, **k)


@case("id v1 occurs twice")
def ids_twice(root):
    path = folders.write_table(root / "t.npz", id_train=np.array(["v0", "v1", "v1", "v2", "v3"]))
    return lambda **k: read_cmu_table(path, **k)


@case("array lld: shape [25, 25], expected [30, 25], the sum of lld_len")
def lld_lengths_disagree(root):
    folders.write_ravdess(root, lld_len=np.full(5, 6))
    return lambda **k: read_ravdess(root, audio="lld", **k)


@case("label, row 2: 7 is neither 0 nor 1")
def label_of_seven(root):
    folders.write_mosi(root, label=np.array([0, 1, 7, 0]))
    return lambda **k: read_mosi(root, **k)


@case("array visual: shape [4, 99], expected [4, 100]")
def wrong_width(root):
    folders.write_mosi(root, visual=np.zeros((4, 99)))
    return lambda **k: read_mosi(root, **k)


@case("the header claims shape [9] float32 = 36 bytes, the file has 8")
def short_npy(root):
    (root / "x.npy").write_bytes(npy("(9,)"))
    return lambda **k: read_arrays(root / "x.npy")


# pickles


@case("aligned_50.pkl is a pickle")
def pickle_bomb(root):
    (root / "aligned_50.pkl").write_bytes(pickle.dumps({"train": Bomb(root / "ran")}))
    return lambda **k: read_cmu_table(root / "aligned_50.pkl", **k)


@case("is a pickle: opening it would run any program")
def pickle_named_npz(root):
    (root / "t.npz").write_bytes(pickle.dumps(Bomb(root / "ran")))
    return lambda **k: read_cmu_table(root / "t.npz", **k)


@case("needs a pickle")
def pickle_inside_npz(root):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(root / "ran")], dtype=object), allow_pickle=True)
    path = npz(root / "t.npz", audio_train=buffer.getvalue())
    return lambda **k: read_cmu_table(path, **k)


@case("np.savez the arrays under the names that read_cmu_table knows: audio_train")
def torch_file(root):
    torch.save({"train": torch.zeros(2)}, root / "data.pt")
    return lambda **k: read_cmu_table(root / "data.pt", **k)


# sound and RAVDESS


@case("is not readable sound")
def wav_of_noise(root):
    folders.write_clips(root)
    (root / f"{folders.RAVDESS_NAMES[1]}.wav").write_bytes(os.urandom(400))
    return lambda **k: read_ravdess(root, **k)


@case("is not readable sound")
def truncated_flac(root):
    path = folders.write_clips(root) / f"{folders.RAVDESS_NAMES[0]}.flac"
    path.write_bytes(path.read_bytes()[:200])
    return lambda **k: read_ravdess(root, **k)


@case("holds no samples")
def empty_wav(root):
    folders.write_clips(root)
    soundfile.write(root / f"{folders.RAVDESS_NAMES[1]}.wav", np.zeros(0), 16000)
    return lambda **k: read_ravdess(root, **k)


@case("sample 7 is not a finite number")
def nan_in_wav(root):
    x = np.zeros(99, np.float32)
    x[7] = np.nan
    folders.write_clips(root)
    soundfile.write(root / f"{folders.RAVDESS_NAMES[1]}.wav", x, 16000, subtype="FLOAT")
    return lambda **k: read_ravdess(root, **k)


@case("'03-01-09-01-01-01-01' is not a RAVDESS name")
def emotion_nine(root):
    folders.write_clips(root, ["03-01-09-01-01-01-01"])
    return lambda **k: read_ravdess(root, **k)


@case("'angry_03' is not a RAVDESS name")
def foreign_clip(root):
    folders.write_clips(root, ["angry_03"])
    return lambda **k: read_ravdess(root, **k)


@case("holds no .flac or .wav clips")
def no_clips(root):
    return lambda **k: read_ravdess(root, **k)


@case("meta.csv, line 2: 03-01-01-01-01-01-01 is called calm, its name says neutral")
def label_against_name(root):
    folders.write_ravdess(root)
    edit(root / "meta.csv", "neutral", "calm")
    return lambda **k: read_ravdess(root, **k)


@case(
    "ravdess_openface_au_means.csv, line 3, column AU01_r: '5.5' is not a finite number from 0 to 5"
)
def action_unit_too_strong(root):
    folders.write_ravdess(root)
    edit(root / "ravdess_openface_au_means.csv", "\n0.1,", "\n5.5,")
    return lambda **k: read_ravdess(root, **k)


@case("array name: 03-01-01-01-01-01-01 occurs twice")
def clip_twice(root):
    folders.write_ravdess(root, ["03-01-01-01-01-01-01"] * 2)
    return lambda **k: read_ravdess(root, **k)


# DAIC-WOZ


@case(
    "train_split_Depression_AVEC2017.csv, line 2, column PHQ8_Score: '25' is not a whole number"
    " from 0 to 24"
)
def score_of_25(root):
    folders.write_daic(root, train=[("300", 1, 25)])
    return lambda **k: read_daicwoz(root, **k)


@case("line 3: participant 300 stands in the train split already")
def participant_twice(root):
    folders.write_daic(root, dev=[("302", 1, 14), ("300", 0, 1)])
    return lambda **k: read_daicwoz(root, **k)


@case("column Participant_ID: '../../etc' is not an identifier")
def path_in_an_id(root):
    folders.write_daic(root, train=[("../../etc", 0, 1)])
    return lambda **k: read_daicwoz(root, **k)


@case("holds none of the label files of DAIC-WOZ")
def no_label_files(root):
    folders.write_session(root, "300")
    return lambda **k: read_daicwoz(root, **k)


@case("300_COVAREP.csv, line 900: 11 values, expected 74: a truncated or broken row")
def truncated_covarep(root):
    path = folders.write_daic(root) / "300_P" / "300_COVAREP.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], ",".join(lines[-1].split(",")[:11])]))
    return lambda **k: read_daicwoz(root, **k)


@case("300_COVAREP.csv, line 5, column 3: '#DIV/0!' is not a number")
def word_in_covarep(root):
    path = folders.write_daic(root) / "300_P" / "300_COVAREP.csv"
    lines = [line.split(",") for line in path.read_text().splitlines()]
    lines[4][2] = "#DIV/0!"
    path.write_text("\n".join(map(",".join, lines)))
    return lambda **k: read_daicwoz(root, **k)


@case("300_COVAREP.csv, line 1: 1 columns, expected 74")
def empty_covarep(root):
    folders.write_daic(root)
    (root / "300_P" / "300_COVAREP.csv").write_text("")
    return lambda **k: read_daicwoz(root, **k)


@case("line 1, column 2: VUV is")
def covarep_out_of_order(root):
    folders.write_daic(root)
    folders.write_session(root, "300", x=np.roll(folders.covarep(9), 3, axis=1))
    return lambda **k: read_daicwoz(root, **k)


@case("300_COVAREP.csv cannot be read")
def covarep_is_binary(root):
    folders.write_daic(root)
    (root / "300_P" / "300_COVAREP.csv").write_bytes(b"\xff\xfe\x00" * 400)
    return lambda **k: read_daicwoz(root, **k)


@case("300_CLNF_AUs.txt, line 1: no column success")
def action_units_without_success(root):
    folders.write_daic(root)
    edit(root / "300_P" / "300_CLNF_AUs.txt", " success", " worked")
    return lambda **k: read_daicwoz(root, **k)


@case("300_CLNF_AUs.txt, line 1: columns named twice: AU02_r")
def action_unit_twice(root):
    folders.write_daic(root)
    edit(root / "300_P" / "300_CLNF_AUs.txt", " AU01_r", " AU02_r")
    return lambda **k: read_daicwoz(root, **k)


@case("lies before the one above it")
def time_runs_back(root):
    folders.write_daic(root)
    edit(root / "300_P" / "300_CLNF_AUs.txt", "\n9, 0.266667,", "\n9, 0.1,")
    return lambda **k: read_daicwoz(root, **k)


@case("is not a readable csv of numbers")
def action_units_header_only(root):
    path = folders.write_daic(root) / "300_P" / "300_CLNF_AUs.txt"
    path.write_text(path.read_text().splitlines()[0])
    return lambda **k: read_daicwoz(root, **k)


@case("300_TRANSCRIPT.csv, line 3, column speaker: 'Bob' is not one of Ellie, Participant")
def third_speaker(root):
    folders.write_daic(root)
    edit(root / "300_P" / "300_TRANSCRIPT.csv", "Participant\ti'm", "Bob\ti'm")
    return lambda **k: read_daicwoz(root, **k)


@case("300_TRANSCRIPT.csv, line 2, column start_time: 'inf' is not a finite number of at least 0")
def infinite_time(root):
    folders.write_daic(root)
    edit(root / "300_P" / "300_TRANSCRIPT.csv", "1.000", "inf")
    return lambda **k: read_daicwoz(root, **k)


@case("300_TRANSCRIPT.csv, line 6: 2 values, the header has 4")
def truncated_transcript(root):
    path = folders.write_daic(root) / "300_P" / "300_TRANSCRIPT.csv"
    path.write_text(path.read_text()[: -len("Participant\tscrubbed_entry i think\n") - 1])
    return lambda **k: read_daicwoz(root, **k)


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, monkeypatch):
    make, says = CASES[name]
    cache = tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = read_meld(folders.write_meld(tmp_path / "good"), cache=cache, progress=False)
        before = snapshot(cache)
        root = tmp_path / "bad"
        root.mkdir()
        call = make(root, monkeypatch) if "monkeypatch" in make.__code__.co_varnames else make(root)
        with pytest.raises(MmemoError) as caught:
            call(cache=cache, progress=False)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert snapshot(cache) == before and sorted(p.name for p in cache.iterdir()) == [
        good.folder.name
    ]
    assert not (root / "ran").exists() and not Path("ran").exists()


def test_there_are_many():
    assert len(CASES) >= 40
