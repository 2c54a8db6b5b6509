import csv
import time

import numpy as np
import pytest
import soundfile
import torch

from mmemo.core.errors import ConfigError, DataError
from mmemo.data.standards import (
    AUS,
    COVAREP,
    EMOTIONS,
    SENTIMENTS,
    SOUND_RATE,
    VOICED_ONLY,
    fill_unvoiced,
)
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import (
    MELD_FILES,
    MELD_HEADER,
    write_clip,
    write_daicwoz,
    write_meld,
)
from mmemo.synthetic.render import face_landmarks, render_audio, render_frames, with_factors
from mmemo.synthetic.sessions import (
    INTERVIEW_START,
    NEEDED_SESSIONS,
    PLANTED_DEFECTS,
    PLANTED_OFFSETS,
    SESSIONS,
)

ITEMS = 16


def table(path, sep=","):
    "Rows of a text table as dicts, by the csv module alone."
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter=sep, skipinitialspace=sep == ","))


def covarep(folder, pid):
    return np.loadtxt(folder / f"{pid}_P/{pid}_COVAREP.csv", delimiter=",", dtype=np.float32)


def clnf(folder, pid, part):
    rows = table(folder / f"{pid}_P/{pid}_CLNF_{part}.txt")
    return {k: np.array([float(r[k]) for r in rows]) for k in rows[0]}


def transcript(folder, pid):
    return [
        (float(r["start_time"]), float(r["stop_time"]), r["speaker"], r["value"])
        for r in table(folder / f"{pid}_P/{pid}_TRANSCRIPT.csv", "\t")
    ]


def answer(folder, pid):
    """Words, spans, and the second at which the answer's clock begins: the participant's first
    row, which spans the answer.
    """
    rows = transcript(folder, pid)
    first, *said = [r for r in rows if r[2] == "Participant"]
    begin = first[0]
    assert (
        first[3] == "xxx"
        and begin == max(b for a, b, who, _ in rows if who == "Ellie")
        and first[1] >= max([r[1] for r in said], default=0)
    )
    return (
        [r[3] for r in said],
        np.array([[a - begin, b - begin] for a, b, *_ in said])
        .round(3)
        .astype(np.float32)
        .reshape(-1, 2),
        begin,
    )


@pytest.fixture(scope="module")
def data():
    return known_answer(ITEMS, seed=3, items_per_speaker=2, missing_modality=0.2)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("daicwoz")
    write_daicwoz(data, root)
    return root


@pytest.fixture(scope="module")
def meld(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("meld")
    return root, write_meld(data, root, clips=False)


# ---- DAIC-WOZ: what goes in comes out


def test_every_number_comes_back_bit_by_bit(data, folder):
    lost = {name: 0 for name in data.streams}
    for i, pid in enumerate(SESSIONS[:ITEMS]):
        item = data[i]
        words, spans, begin = answer(folder, pid)
        audio, video, text = (item.streams[k] for k in ("audio", "video", "text"))
        T, V = (round(item.meta["seconds"].item() * r) for r in (100, 30))
        x = covarep(folder, pid)
        assert not x[: int(begin * 100)].any()
        x = x[int(begin * 100) :]
        assert begin == INTERVIEW_START and len(x) == T and x.shape[1] == 74
        assert (
            np.array_equal(x[: audio.steps], audio.x[0].numpy())
            and np.array_equal(x.any(1)[: audio.steps], audio.mask[0].numpy())
            and not x[audio.steps :].any()
        )
        aus = clnf(folder, pid, "AUs")
        seen = (aus["success"] == 1)[int(begin * 30) :]
        values = np.stack([aus[c] for c in AUS], 1).astype(np.float32)[int(begin * 30) :]
        assert len(seen) == V and not aus["success"][: int(begin * 30)].any()
        assert (
            np.array_equal(values[: video.steps], video.x[0].numpy())
            and np.array_equal(seen[: video.steps], video.mask[0].numpy())
            and not seen[video.steps :].any()
        )
        t = aus["timestamp"][int(begin * 30) :] - begin + 1 / 60
        assert np.allclose(t[: video.steps], video.t[0], atol=2e-6) and np.array_equal(
            aus["frame"], np.arange(len(aus["frame"])) + 1
        )
        if text.mask.any():
            assert words == item.meta["words"][0] and np.array_equal(
                spans, item.meta["spans"][0].numpy()
            )
        else:
            assert words == []
        for name, s in item.streams.items():
            lost[name] += not s.mask.any()
    assert all(lost.values())  # the corpus of this test does have missing modalities


def test_repairing_unvoiced_columns_changes_nothing(data, folder):
    for i in (0, 5):
        audio, x = (
            data[i].streams["audio"],
            torch.from_numpy(covarep(folder, SESSIONS[i]))[None, INTERVIEW_START * 100 :][
                :, : data[i].streams["audio"].steps
            ],
        )
        assert torch.equal(
            fill_unvoiced(x, x[..., 1] > 0, x.any(-1)).masked_fill(~x.any(-1, keepdim=True), 0),
            audio.x,
        )


def test_labels_and_splits(data, folder):
    split = {
        "train": "train_split_Depression_AVEC2017.csv",
        "valid": "dev_split_Depression_AVEC2017.csv",
        "test": "full_test_split.csv",
    }
    where = dict(zip(SESSIONS, range(ITEMS)))
    seen = []
    for name, file in split.items():
        for row in table(folder / file):
            i = where[int(row["Participant_ID"])]
            score = int(data.targets["phq8"][i])
            p = "PHQ8" if name != "test" else "PHQ"
            seen.append(i)
            assert (
                data.meta["split"][i] == name
                and int(row[f"{p}_Score"]) == score
                and int(row[f"{p}_Binary"]) == (score >= 10)
                and row["Gender"] in "01"
            )
            if name != "test":
                items = [
                    int(v)
                    for k, v in row.items()
                    if k.startswith("PHQ8_") and k not in ("PHQ8_Binary", "PHQ8_Score")
                ]
                assert len(items) == 8 and sum(items) == score and set(items) <= {0, 1, 2, 3}
    assert sorted(seen) == list(range(ITEMS)) and all(data.meta["split"].count(s) for s in split)
    test = table(folder / "test_split_Depression_AVEC2017.csv")
    assert list(test[0]) == ["participant_ID", "Gender"] and len(test) == data.meta["split"].count(
        "test"
    )
    assert (
        open(folder / split["train"]).readline().strip()
        == "Participant_ID,PHQ8_Binary,PHQ8_Score,Gender,PHQ8_NoInterest,PHQ8_Depressed,"
        "PHQ8_Sleep,PHQ8_Tired,PHQ8_Appetite,PHQ8_Failure,PHQ8_Concentrating,PHQ8_Moving"
    )


def test_files_and_columns_of_a_session(data, folder):
    pid = SESSIONS[1]
    names = {p.name for p in (folder / f"{pid}_P").iterdir()}
    assert names == {
        f"{pid}_{s}"
        for s in (
            "AUDIO.wav",
            "TRANSCRIPT.csv",
            "COVAREP.csv",
            "FORMANT.csv",
            "CLNF_AUs.txt",
            "CLNF_features.txt",
            "CLNF_features3D.txt",
            "CLNF_gaze.txt",
            "CLNF_pose.txt",
            "CLNF_hog.bin",
        )
    }
    columns = {
        part: open(folder / f"{pid}_P/{pid}_CLNF_{part}.txt").readline().rstrip("\n").split(",")
        for part in ("AUs", "features", "features3D", "gaze", "pose")
    }
    assert {k: len(v) for k, v in columns.items()} == {
        "AUs": 24,
        "features": 140,
        "features3D": 208,
        "gaze": 16,
        "pose": 10,
    }
    assert (
        all(c[:4] == ["frame", " timestamp", " confidence", " success"] for c in columns.values())
        and columns["AUs"][4] == " AU01_r"
        and columns["AUs"][-1] == " AU45_c"
    )
    formant = np.loadtxt(folder / f"{pid}_P/{pid}_FORMANT.csv", delimiter=",")
    assert formant.shape == (len(covarep(folder, pid)), 5)
    assert (
        open(folder / f"{pid}_P/{pid}_TRANSCRIPT.csv").readline()
        == "start_time\tstop_time\tspeaker\tvalue\n"
    )
    assert SESSIONS[0] == 300 and SESSIONS[-1] == 492 and len(SESSIONS) == 189


def test_wav_is_the_rendered_voice_after_two_silent_seconds(data, folder):
    wave, rate = soundfile.read(folder / "300_P/300_AUDIO.wav", dtype="float32")
    voice = render_audio(data[0]).numpy()
    assert (
        rate == 16000
        and wave.ndim == 1
        and not wave[: INTERVIEW_START * rate].any()
        and np.abs(wave[INTERVIEW_START * rate :] - voice).max() <= 1 / 32768
    )


def test_landmarks_agree_with_the_action_units(data, folder):
    i = next(i for i in range(ITEMS) if data[i].streams["video"].mask.any())
    pid = SESSIONS[i]
    points, seen, blink = face_landmarks(data[i])
    s = slice(INTERVIEW_START * 30, None)
    flat, deep, pose, aus = (
        clnf(folder, pid, k) for k in ("features", "features3D", "pose", "AUs")
    )
    XY = np.stack([[deep[f"{c}{k}"][s] for k in range(68)] for c in "XYZ"])[..., seen]
    assert np.allclose(XY[0], points[seen, :, 0].T, atol=1e-3) and np.allclose(
        XY[1], points[seen, :, 1].T, atol=1e-3
    )
    assert np.allclose(
        [flat[f"x{k}"][s][seen] for k in range(68)], 320 + 500 * XY[0] / XY[2], atol=0.01
    ) and np.allclose(
        [flat[f"y{k}"][s][seen] for k in range(68)], 240 + 500 * XY[1] / XY[2], atol=0.01
    )
    assert (
        np.array_equal(aus["AU12_c"][s], aus["AU12_r"][s] >= 1)
        and np.array_equal(aus["AU45_c"][s], blink & seen)
        and (pose["Z"][s][seen] == 600).all()
    )


def test_hog_has_its_layout(data, folder):
    raw = np.fromfile(folder / "300_P/300_CLNF_hog.bin", np.int32).reshape(-1, 4 + 4464)
    valid = raw[:, 3].view(np.float32)
    hog = raw[:, 4:].view(np.float32)
    seen = clnf(folder, 300, "AUs")["success"]
    assert (
        (raw[:, :3] == [12, 12, 31]).all()
        and np.array_equal(valid, seen)
        and np.isfinite(hog).all()
        and not hog[valid == 0].any()
        and (hog[valid == 1].std(1) > 0.01).all()
    )


def test_ellie_writes_queries_after_363(data, tmp_path):
    write_daicwoz(data[[0, 1]], tmp_path, sessions=[363, 364], hog=False)
    assert (
        transcript(tmp_path, 363)[0][3] == "hi i'm ellie thanks for coming in today"
        and transcript(tmp_path, 364)[0][3] == "intro (hi i'm ellie thanks for coming in today)"
    )


# ---- DAIC-WOZ: what can go wrong on purpose


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    data = known_answer(20, seed=4, items_per_speaker=2)
    root = tmp_path_factory.mktemp("broken")
    where = write_daicwoz(data, root, defects=PLANTED_DEFECTS, hog=False)
    return data, root, {pid: i for i, pid in enumerate(where.values())}


def test_defects_are_all_described_and_sessions_found(broken):
    data, root, where = broken
    assert (
        {pid for pids in NEEDED_SESSIONS.values() for pid in pids} <= set(where)
        and len(where) == 20
        and all(": " in text for text in PLANTED_DEFECTS.values())
    )


def test_binary_contradicts_the_score_at_409_only(broken):
    data, root, where = broken
    rows = [
        r
        for f in root.glob("*_split_Depression_AVEC2017.csv")
        for r in table(f)
        if "PHQ8_Score" in r
    ]
    rows += [
        {
            "Participant_ID": r["Participant_ID"],
            "PHQ8_Score": r["PHQ_Score"],
            "PHQ8_Binary": r["PHQ_Binary"],
        }
        for r in table(root / "full_test_split.csv")
    ]
    assert [
        int(r["Participant_ID"])
        for r in rows
        if int(r["PHQ8_Binary"]) != (int(r["PHQ8_Score"]) >= 10)
    ] == [409]
    assert (
        all(
            int(r["PHQ8_Score"]) == data.targets["phq8"][where[int(r["Participant_ID"])]]
            for r in rows
        )
        and len(rows) == 20
    )


@pytest.mark.parametrize("pid", PLANTED_OFFSETS)
def test_adding_the_known_offset_puts_a_transcript_right(broken, pid):
    data, root, where = broken
    rows = transcript(root, pid)
    begin = next(a for a, b, who, v in rows if v == "xxx") + PLANTED_OFFSETS[pid]
    x = covarep(root, pid)
    first = np.flatnonzero(x.any(1))[0] / 100
    # after the talk with staff, <sync> and xxx
    said = [(a, b) for a, b, who, v in rows if who == "Participant"][3:]
    assert (
        min(a for a, *_ in rows) >= 0
        and abs(begin - round(begin)) < 2e-3
        and round(begin) <= first < round(begin) + 0.5
    )
    assert np.allclose(
        np.array(said) + PLANTED_OFFSETS[pid] - begin, data.meta["spans"][where[pid]], atol=2e-3
    )


def test_every_other_defect(broken):
    data, root, where = broken
    last = max(where)
    for pid, (a, b) in {373: (395, 428), 444: (286, 387)}.items():
        assert sum(a < r[0] < b and r[2] == "Participant" for r in transcript(root, pid)) == 2
    for pid in where:
        if pid == last:
            assert not (root / f"{pid}_P").exists()
            continue
        rows = transcript(root, pid)
        spoken = {r[2] for r in rows[2:]}
        assert [r[3] for r in rows][:2] == ["is it on now", "<sync>"] and ("Ellie" in spoken) == (
            pid not in (451, 458, 480)
        )
        assert (root / f"{pid}_P/._{pid}_TRANSCRIPT.csv").read_bytes()[:4] == b"\0\5\26\7"
        scrubbed = [r for r in rows if r[3] == "scrubbed_entry"]
        assert len(scrubbed) == 1
        a, b, shift = *scrubbed[0][:2], PLANTED_OFFSETS.get(pid, 0)
        x = covarep(root, pid)
        assert not x[int((a + shift) * 100) + 1 : int((b + shift) * 100)].any()
        wave = soundfile.read(root / f"{pid}_P/{pid}_AUDIO.wav")[0]
        assert (
            not wave[
                int((a + shift) * SOUND_RATE) + 160 : int((b + shift) * SOUND_RATE) - 160
            ].any()
            and wave.any()
        )
        assert x.shape[1] == (73 if pid == min(where) else 74)
        video = clnf(root, pid, "AUs")
        assert (video["AU12_r"][video["success"] == 0] > 0).mean() > 0.9
        assert len(video["frame"]) == round(len(x) * 0.3) - (30 if pid == 402 else 0)


def test_unvoiced_garbage_is_mended_by_the_shared_function(data, tmp_path):
    i = next(i for i in range(ITEMS) if data[i].streams["audio"].mask.any())
    write_daicwoz(data[[i]], tmp_path, defects=["unvoiced_garbage"], hog=False)
    x = torch.from_numpy(covarep(tmp_path, 300))[None, INTERVIEW_START * 100 :]
    audio = data[i].streams["audio"]
    x = x[:, : audio.steps]
    mask = x.any(-1)
    voiced = x[..., 1] > 0
    assert x[~voiced & mask][:, VOICED_ONLY].abs().median() > 100
    assert torch.equal(mask, audio.mask) and torch.equal(
        fill_unvoiced(x, voiced, mask).masked_fill(~mask[..., None], 0), audio.x
    )


def test_creak_is_the_column_that_goes(data, tmp_path):
    i = next(i for i in range(ITEMS) if data[i].streams["audio"].mask.any())
    write_daicwoz(data[[i]], tmp_path, defects=["no_creak"], hog=False)
    x = covarep(tmp_path, 300)[INTERVIEW_START * 100 :]
    assert np.array_equal(
        x[: data[i].streams["audio"].steps],
        np.delete(data[i].streams["audio"].x[0].numpy(), COVAREP.index("creak"), 1),
    )


def test_what_cannot_be_written_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="typo.*wrong_binary"):
        write_daicwoz(data, tmp_path, defects=["typo"])
    with pytest.raises(ConfigError, match="409.*at least 1 items"):
        write_daicwoz(data, tmp_path, defects=["wrong_binary"], sessions=range(500, 500 + ITEMS))
    with pytest.raises(ConfigError, match="16 items need 16 different sessions, 3"):
        write_daicwoz(data, tmp_path, sessions=[300, 301, 302])
    bad = data[[0]]
    bad.targets["phq8"][0] = torch.nan
    bad.targets["emotion"][0] = -100
    with pytest.raises(DataError, match="item00000: phq8 is nan"):
        write_daicwoz(bad, tmp_path)
    with pytest.raises(DataError, match="item00000: MELD needs"):
        write_meld(bad, tmp_path)
    bad = data[[0]]
    del bad.meta["spans"]
    for write in (write_daicwoz, write_meld):
        with pytest.raises(DataError, match=r"lack \['spans'\]"):
            write(bad, tmp_path)


def test_writing_is_fast(data, tmp_path):
    start = time.process_time()
    write_daicwoz(data, tmp_path, hog=False)
    assert (time.process_time() - start) / ITEMS < 0.5


def test_the_packages_reader_returns_the_corpus(data, tmp_path):
    from mmemo.data.daicwoz import read_daicwoz

    write_daicwoz(
        data,
        tmp_path / "raw",
        hog=False,
        defects=[
            "unvoiced_garbage",
            "macos_junk",
            "sync_markers",
            "no_ellie",
            "transcript_offset",
            "failed_frames",
            "wrong_binary",
        ],
    )
    with pytest.warns(UserWarning, match="remarks"):
        corpus = read_daicwoz(tmp_path / "raw", cache=tmp_path / "cache", progress=False)
    back = corpus[list(range(len(corpus)))]
    where = {
        str(pid): i
        for i, pid in enumerate(
            sorted([318, 321, 341, 362, 409, 451, 458, 480, *SESSIONS[: ITEMS - 8]])
        )
    }
    assert sorted(back.meta["id"]) == sorted(where)
    for k, i in ((k, where[name]) for k, name in enumerate(back.meta["id"])):
        mine, theirs = data[[i]], back[[k]]
        for name in ("audio", "video"):
            a, b = mine.streams[name], theirs.streams[name]
            T = min(a.steps, b.steps)
            assert (
                torch.equal(a.x[:, :T], b.x[:, :T])
                and torch.equal(a.mask[:, :T], b.mask[:, :T])
                and not a.mask[:, T:].any()
                and not b.mask[:, T:].any()
            )
            # a camera's stamp may mark the start of its frame
            if a.mask.any():
                assert torch.allclose(a.t[a.mask], b.t[b.mask], atol=0.018)
        if mine.streams["text"].mask.any():
            assert theirs.meta["words"] == mine.meta["words"] and torch.allclose(
                theirs.meta["spans"][0], mine.meta["spans"][0], atol=2.5e-3
            )
        assert (
            theirs.targets["phq8"] == mine.targets["phq8"]
            and abs(theirs.meta["seconds"] - mine.meta["seconds"]) < 2.5e-3
        )
        assert {"dev": "valid"}.get(theirs.meta["split"][0], theirs.meta["split"][0]) == mine.meta[
            "split"
        ][0]


# ---- MELD


def test_meld_tables(data, meld):
    root, where = meld

    def clock(s):
        return sum(float(p) * k for p, k in zip(s.replace(",", ".").split(":"), (3600, 60, 1)))

    of = {clip: i for i, clip in enumerate(where.values())}
    assert len(of) == ITEMS and list(where) != sorted(where.values())
    ids = {item: i for i, item in enumerate(data.meta["id"])}
    for split, (file, clips) in MELD_FILES.items():
        rows = table(root / file)
        assert (
            list(rows[0]) == MELD_HEADER
            and [int(r["Sr No."]) for r in rows] == list(range(1, len(rows) + 1))
            and (root / clips).is_dir()
        )
        assert rows[0]["Dialogue_ID"] == rows[0]["Utterance_ID"] == "0" and len(rows) == data.meta[
            "split"
        ].count(split)
        for r in rows:
            i = ids[
                next(
                    k
                    for k, v in where.items()
                    if v == f"{clips}/dia{r['Dialogue_ID']}_utt{r['Utterance_ID']}"
                )
            ]
            assert (
                r["Utterance"].split() == data.meta["words"][i]
                and r["Speaker"] == data.meta["speaker"][i]
                and data.meta["split"][i] == split
            )
            assert (EMOTIONS.index(r["Emotion"]), SENTIMENTS.index(r["Sentiment"])) == (
                int(data.targets["emotion"][i]),
                int(data.targets["sentiment"][i]),
            )
            assert (
                len(r["StartTime"]) == 12
                and abs(clock(r["EndTime"]) - clock(r["StartTime"]) - data.meta["seconds"][i])
                < 2e-3
            )


def test_clip_holds_the_film_and_the_sound(tmp_path):
    import av

    item = with_factors(3)
    write_clip(item, tmp_path / "dia0_utt0")
    frames, voice = render_frames(item), render_audio(item).numpy()
    with av.open(str(tmp_path / "dia0_utt0.mp4")) as clip:
        film = np.stack([f.to_ndarray(format="rgb24") for f in clip.decode(video=0)])
        assert clip.streams.video[0].average_rate == 30
    with av.open(str(tmp_path / "dia0_utt0.mp4")) as clip:
        sound = np.concatenate([f.to_ndarray()[0] for f in clip.decode(audio=0)])
    assert (
        film.shape == (len(frames), 112, 112, 3)
        and np.abs(film.astype(int) - frames.permute(0, 2, 3, 1).numpy()).mean() < 6
    )
    assert (
        abs(len(sound) - len(voice)) < 2100
        and np.corrcoef(sound[: len(voice)], voice[: len(sound)])[0, 1] > 0.9
    )
    wave, rate = soundfile.read(tmp_path / "dia0_utt0.wav", dtype="float32")
    assert rate == SOUND_RATE and np.abs(wave - voice).max() <= 1 / 32768


def test_a_session_with_a_known_defect_is_used_only_with_it(tmp_path):
    """A reader mends sessions by their number: 318 gets 34 seconds added, whether or not it needs
    them.
    """
    data = known_answer(24, seed=2)
    plain, shifted = (
        set(write_daicwoz(data, tmp_path / name, defects, hog=False).values())
        for name, defects in (("a", ()), ("b", ("transcript_offset",)))
    )
    assert len(plain) == len(shifted) == 24 and not plain & {
        i for own in NEEDED_SESSIONS.values() for i in own
    }
    assert shifted & {i for own in NEEDED_SESSIONS.values() for i in own} == set(
        NEEDED_SESSIONS["transcript_offset"]
    )
