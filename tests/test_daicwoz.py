"""The DAIC-WOZ reader: each known error of the corpus in a folder of a few seconds, written by
hand.
"""

import folders
import numpy as np
import pytest
import torch

from mmemo.core.errors import ConfigError, DataError
from mmemo.data.daicwoz import read_daicwoz
from mmemo.data.interviews import (
    PRESENCE_UNITS,
    group_answers,
    inside_turns,
    read_transcript,
    words_of,
)
from mmemo.data.standards import AUS, COVAREP, VOICED_ONLY

pytestmark = pytest.mark.filterwarnings("ignore:.*remarks on the data")


@pytest.fixture
def keep(tmp_path):
    return {"cache": tmp_path / "cache", "progress": False}


@pytest.fixture
def root(tmp_path):
    return folders.write_daic(tmp_path / "daic")


def test_a_session(root, keep):
    data = read_daicwoz(root, **keep)
    assert (
        data.meta["id"] == ["300", "302", "303"]
        and data.meta["split"] == ["train", "dev", "test"]
        and data.report == []
    )
    assert (
        data.column("phq8").tolist() == [2, 14, 5]
        and data.column("depressed").tolist() == [0, 1, 0]
        and data.meta["sex"] == ["female", "female", "male"]
    )
    batch = data[[0]]
    assert batch.meta["words"] == [
        ["i'm", "fine", "thank", "you", "los", "angeles", "[laughter]", "i", "think"]
    ]
    assert (
        batch.meta["spans"][0][0].tolist() == [0, 0.25]
        and batch.meta["start"].item() == 2.5
        and batch.meta["seconds"].item() == pytest.approx(5.1)
    )
    x, aus = folders.covarep(9, 300).astype(np.float32), batch.streams["video"].x[0]
    assert batch.streams["audio"].steps == 100 + 200 + 40  # the participant's turns, at 100 Hz
    other = [c for c in range(74) if c not in VOICED_ONLY]
    assert np.array_equal(batch.streams["audio"].x[0, :100, other], x[250:350][:, other])
    # true times, with a gap
    assert batch.streams["audio"].t[0, [0, 99, 100]].tolist() == pytest.approx(
        [0.005, 0.995, 2.505], abs=1e-4
    )
    assert aus.shape == (30 + 60 + 12, 14) and batch.streams["video"].t[
        0, 0
    ].item() == pytest.approx(1 / 60, abs=1e-4)


def test_unvoiced_columns_hold_the_participants_own_mean(root, keep):
    batch, x = read_daicwoz(root, **keep)[[0]], folders.covarep(9, 300)
    rows = np.r_[250:350, 500:700, 720:760]
    voiced = x[rows, 1] > 0
    got = batch.streams["audio"].x[0].numpy()
    assert np.allclose(
        got[~voiced][:, VOICED_ONLY], x[rows][voiced][:, VOICED_ONLY].mean(0), atol=1e-4
    ) and np.array_equal(got[voiced], x[rows][voiced].astype(np.float32))


def test_answers(root, keep):
    data = read_daicwoz(root, unit="answer", **keep)
    assert data.column("id").tolist()[:3] == ["300_000", "300_001", "302_000"] and data.column(
        "phq8"
    ).tolist() == [2, 2, 14, 14, 5, 5]
    assert (
        data.meta["words"][1][:2] == ["los", "angeles"]
        and data.column("start")[1] == 5
        and data[[1]].streams["audio"].steps == 240
    )
    assert data.column("speaker").tolist() == ["300"] * 2 + ["302"] * 2 + ["303"] * 2


def test_ellie_or_both(root, keep):
    both, ellie = (
        read_daicwoz(root, speakers="both", unit="answer", **keep),
        read_daicwoz(root, speakers="ellie", **keep),
    )
    assert both.meta["words"][1][:5] == ["where", "are", "you", "from", "los"] and ellie.meta[
        "words"
    ][0][-4:] == ["where", "are", "you", "from"]
    assert ellie[[0]].streams["audio"].steps == 150


def test_units(root, keep):
    assert read_daicwoz(root, aus="all", **keep)[[0]].streams["video"].x.shape[2] == 20
    some = read_daicwoz(root, aus=["AU12_r", "AU28_c"], **keep)[[0]].streams["video"].x
    assert torch.equal(
        some[..., 0], read_daicwoz(root, **keep)[[0]].streams["video"].x[..., AUS.index("AU12_r")]
    ) and set(some[..., 1].unique().tolist()) <= {0, 1}
    for bad in ({"aus": "each"}, {"aus": ["AU99_r"]}, {"unit": "word"}, {"speakers": "all"}):
        with pytest.raises(ConfigError, match="the choices are"):
            read_daicwoz(root, **bad, **keep)


def test_tokenizer_makes_the_text_stream(root, keep):
    data = read_daicwoz(root, tokenizer=lambda w, s: ([len(v) for v in w], s.mean(1)), **keep)
    assert list(data[[0]].streams) == ["text", "audio", "video"] and data[[0]].streams["text"].x[
        0, :4
    ].tolist() == [3, 4, 5, 3]
    assert data[[0]].streams["text"].t[0, 0].item() == pytest.approx(0.125)


# the known errors, one by one


def test_409_wrong_binary_label(tmp_path, keep):
    folders.write_labels(tmp_path, train=[("409", 0, 10)])
    folders.write_session(tmp_path, "409")
    data = read_daicwoz(tmp_path, **keep)
    assert (
        data.column("depressed").tolist() == [1]
        and "409: score 10 but binary label 0; 1 is used" in data.report
    )


@pytest.mark.parametrize(
    "person, shift", [("318", 34.319917), ("321", 3.8379167), ("341", 6.1892), ("362", 16.8582)]
)
def test_transcript_offsets(tmp_path, person, shift):
    folders.write_session(tmp_path, person)
    turns = read_transcript(tmp_path / f"{person}_P" / f"{person}_TRANSCRIPT.csv", person, [])
    assert turns[1]["start"] == pytest.approx(2.5 + shift) and turns[1]["stop"] == pytest.approx(
        3.5 + shift
    )


@pytest.mark.parametrize("person, low, high", [("373", 352, 428), ("444", 286, 387)])
def test_interruptions_are_masked(tmp_path, keep, person, low, high):
    folders.write_labels(tmp_path, train=[(person, 0, 3)])
    turns = [
        (1, 2, "Ellie", "hi i'm ellie"),
        (low - 2, low + 2, "Participant", "one two three four"),
        (high + 1, high + 2, "Participant", "five"),
    ]
    folders.write_session(tmp_path, person, turns, seconds=high + 3)
    batch = read_daicwoz(tmp_path, **keep)[[0]]
    assert batch.meta["words"] == [["one", "two", "five"]]
    for s in batch.streams.values():
        t = s.t[0] + low - 2
        assert (
            not s.mask[0][(t >= low) & (t <= low + 2)].any()
            and s.mask[0][(t < low - 0.05) | (t > high + 1)].all()
            and ((t > low) & (t < low + 2)).any()
        )


def test_headers_of_the_test_splits(root, keep):
    """`participant_ID` in lower case, PHQ_Score without the 8; a test person without a published
    score has NaN and -100.
    """
    folders.write_labels(root, unlabelled=["304"])
    folders.write_session(root, "304")
    data = read_daicwoz(root, **keep)
    assert (
        data.meta["id"][-2:] == ["303", "304"]
        and data.column("phq8")[2] == 5
        and np.isnan(data.column("phq8")[3])
        and data.column("depressed")[3] == -100
    )
    (root / "full_test_split.csv").unlink()
    assert np.isnan(read_daicwoz(root, **keep).column("phq8")[2:]).all()


def test_73_columns_are_refused_with_the_reason(root, keep):
    np.savetxt(
        root / "300_P" / "300_COVAREP.csv", folders.covarep(9)[:, :73], fmt="%.6f", delimiter=","
    )
    with pytest.raises(DataError, match="300_COVAREP.csv, line 1: 73 columns, expected 74.*creak"):
        read_daicwoz(root, **keep)
    assert COVAREP[10] == "creak"


def test_scrubbed_rows_are_masked(root, keep):
    x = folders.covarep(9, 300)
    x[520:540] = 0
    folders.write_session(root, "300", x=x)
    mask = read_daicwoz(root, **keep)[[0]].streams["audio"].mask[0]
    assert not mask[120:140].any() and mask[:120].all() and mask[140:].all()


def test_frames_without_a_face_are_masked(root, keep):
    folders.write_session(root, "300", success=lambda t: (t > 6).astype(int))
    s = read_daicwoz(root, **keep)[[0]].streams["video"]
    assert torch.equal(s.mask[0], s.t[0] - 1 / 60 + 2.5 > 6.001)


def test_missing_sessions_and_files_are_reported(root, keep):
    folders.write_labels(root, train=[("300", 0, 2), ("301", 0, 2), ("305", 0, 2), ("306", 0, 1)])
    (root / "305_P.zip").write_bytes(b"PK")
    folders.write_session(root, "999")
    folders.write_session(root, "306")
    (root / "306_P" / "306_TRANSCRIPT.csv").unlink()
    (root / "302_P" / "302_CLNF_AUs.txt").unlink()
    (root / "303_P" / "303_COVAREP.csv").unlink()
    data = read_daicwoz(root, **keep)
    assert data.meta["id"] == ["300", "302", "303"]
    for remark in (
        "2 labelled sessions have no folder: 301, 305 (305 only as zip",
        "1 session folders have no label and are left out: 999",
        "306: no transcript file",
        "302: no video file",
        "303: no audio file",
    ):
        assert any(remark in line for line in data.report), remark
    batch = data.to_batch()
    assert batch.streams["video"].mask.any(1).tolist() == [True, False, True] and batch.streams[
        "audio"
    ].mask.any(1).tolist() == [True, True, False]


def test_macos_junk(root, keep):
    (root / "._300_P").mkdir()
    (root / "._train_split_Depression_AVEC2017.csv").write_bytes(b"\0\5\x16\7")
    (root / "300_P" / "._300_COVAREP.csv").write_bytes(b"\0\5")
    assert len(read_daicwoz(root, **keep)) == 3


@pytest.mark.parametrize(
    "opening, kept",
    [
        (
            [
                (0.1, 0.2, "Participant", "is this on"),
                (0.3, 0.4, "Ellie", "<synch>"),
                (0.5, 0.6, "Participant", "hello"),
                (1, 2, "Ellie", "hi i'm ellie"),
            ],
            2,
        ),
        (
            [
                (0.1, 0.2, "Participant", "is this on"),
                (0.3, 0.4, "Participant", "[syncing]"),
                (0.5, 0.6, "Ellie", "so where are you from"),
            ],
            2,
        ),
        (
            [
                (0.1, 0.2, "Participant", "is this on"),
                (1, 2, "Ellie", "IntroV4Confirmation (hi i'm ellie thanks for coming)"),
            ],
            2,
        ),
        ([(0.1, 0.2, "Participant", "is this on"), (1, 2, "Ellie", "how are you")], 2),
    ],
)
def test_talk_before_the_interview_is_dropped(tmp_path, opening, kept):
    folders.write_session(tmp_path, "300", [*opening, (3, 4, "Participant", "well")])
    turns = read_transcript(tmp_path / "300_P" / "300_TRANSCRIPT.csv", "300", [])
    assert len(turns) == kept and turns[0]["speaker"] == "Ellie" and turns[-1]["words"] == ["well"]


def test_sessions_without_ellie(tmp_path, keep):
    "451, 458, 480: the answers are parted by pauses."
    folders.write_labels(tmp_path, train=[("451", 0, 2)])
    folders.write_session(
        tmp_path,
        "451",
        [
            (0.1, 0.3, "Participant", "<sync>"),
            (0.5, 1, "Participant", "a"),
            (1.5, 2, "Participant", "b"),
            (6, 7, "Participant", "c"),
        ],
    )
    data = read_daicwoz(tmp_path, unit="answer", **keep)
    assert data.meta["words"] == [["a", "b"], ["c"]] and any(
        "Ellie's turns are not in the transcript" in r for r in data.report
    )


def test_402_video_cut_short(tmp_path, keep):
    folders.write_labels(tmp_path, train=[("402", 0, 2)])
    folders.write_session(
        tmp_path,
        "402",
        [
            (1, 2, "Ellie", "hi i'm ellie"),
            (3, 4, "Participant", "a"),
            (4.5, 5, "Ellie", "and"),
            (100, 101, "Participant", "b"),
        ],
        seconds=102,
    )
    path = tmp_path / "402_P" / "402_CLNF_AUs.txt"
    path.write_text("\n".join(path.read_text().splitlines()[:301]))
    data = read_daicwoz(tmp_path, unit="answer", **keep)
    assert (
        data.to_batch().streams["video"].mask.any(1).tolist() == [True, False]
        and data.to_batch().streams["audio"].mask.any(1).all()
    )
    assert any(line.startswith("402: the video ends 91 s before") for line in data.report)


@pytest.mark.parametrize(
    "value, speaker, words",
    [
        ("yeah3 (yeah)", "Ellie", ["yeah"]),
        (
            "how_doingV (so how are you doing (today))",
            "Ellie",
            ["so", "how", "are", "you", "doing", "(today)"],
        ),
        ("so how are you", "Ellie", ["so", "how", "are", "you"]),
        ("well (um) yes", "Participant", ["well", "(um)", "yes"]),
        (
            "people <peop> are <laughter> OK [sigh]",
            "Participant",
            ["people", "are", "[laughter]", "ok", "[sigh]"],
        ),
        ("xxx my name is scrubbed_entry", "Participant", ["my", "name", "is"]),
        ("  ", "Participant", []),
        ("<clears throat> hm", "Participant", ["[clears_throat]", "hm"]),
    ],
)
def test_words(value, speaker, words):
    assert words_of(value, speaker) == words


def test_a_turn_that_stops_before_it_starts_is_left_out(root, keep):
    folders.write_session(root, "300", [*folders.TURNS, (9, 8.5, "Participant", "oops")])
    data = read_daicwoz(root, **keep)
    assert "oops" not in data.meta["words"][0] and any(
        "line 7: stops before it starts" in r for r in data.report
    )


def test_silent_participant_is_reported(root, keep):
    folders.write_session(root, "300", folders.TURNS[:1])
    data = read_daicwoz(root, **keep)
    assert (
        data.meta["id"] == ["302", "303"]
        and "300: nothing is said by participant, left out" in data.report
    )


def test_inside_and_answers():
    turns = [
        dict(start=a, stop=b, speaker=s)
        for a, b, s in (
            (0, 1, "Ellie"),
            (0.5, 2, "Participant"),
            (3, 4, "Participant"),
            (4, 5, "Ellie"),
            (5, 6, "Participant"),
        )
    ]
    assert inside_turns(torch.tensor([0.0, 0.99, 1.5, 2.5, 3.0, 5.99, 6.1]), turns).tolist() == [
        True,
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    assert [len(g) for g in group_answers(turns)] == [3, 2] and group_answers([]) == []


def test_reopening_parses_nothing(root, keep, monkeypatch):
    import mmemo.data.interviews

    first = read_daicwoz(root, **keep)
    for name in ("read_rows", "read_matrix"):
        monkeypatch.setattr(
            mmemo.data.interviews, name, lambda *a, **k: pytest.fail("a file was parsed")
        )
    assert read_daicwoz(root, **keep).folder == first.folder


def test_a_changed_transcript_is_a_new_corpus(root, keep):
    first = read_daicwoz(root, **keep)
    path = root / "300_P" / "300_TRANSCRIPT.csv"
    path.write_text(path.read_text().replace("thank you", "thank god"))
    second = read_daicwoz(root, **keep)
    assert (
        second.folder != first.folder
        and "god" in second.meta["words"][0]
        and PRESENCE_UNITS[0] == "AU04_c"
    )
