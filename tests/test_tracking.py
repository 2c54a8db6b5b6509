"""Who watches a run: trackers see what the log has, a resumed run is the same run, and nothing
leaves the machine unasked.
"""

import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tiny import MEMORY, items, tiny

from mmemo.core.errors import ConfigError
from mmemo.training.history import History, read_log
from mmemo.training.loop import fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import Report, Tracking, check_track, open_trackers

TRAIN, VALID = items(44), items(20, seed=1)
wandb_wanted = pytest.mark.skipif(
    not __import__("importlib").util.find_spec("wandb"),
    reason="wandb is an optional extra: pip install 'mmemo[wandb]'",
)


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def without_settings(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)


class Notes:
    "A tracker that remembers."

    name = "notes"

    def __init__(self, fails_at=None):
        self.seen, self.finished, self.fails_at = [], 0, fails_at

    def log(self, values, step=None):
        if len(self.seen) == self.fails_at:
            raise OSError("no space left on device")
        self.seen.append((step, values))

    def finish(self):
        self.finished += 1


def step(n, **more):
    return {"type": "step", "step": n, "epoch": 0, "loss": 1.0 / n, "norm": 2.0, "lr": 0.1} | more


def epoch(n):
    return {
        "type": "epoch",
        "epoch": 0,
        "step": n,
        "train": {"loss": 0.5},
        "valid": {"loss": 0.25, "score": None},
    }


# ------------------------------------------------------------------ what is shown
def test_everybody_gets_what_they_want(tmp_path, monkeypatch):
    import mmemo.training.tracking as module

    clock = iter(range(10**6))
    monkeypatch.setattr(module, "monotonic", lambda: 0.03 * next(clock))
    notes, history = Notes(), History()
    with Report.open(history, Tracking(tmp_path, progress=False, track=[notes])) as report:
        for n in range(1, 21):
            report.add(step(n, parts={"accuracy": 0.5, "none": None}))
        report.add(epoch(20))
        mark = report.log.mark
    assert (
        len(history.steps) == 20
        and read_log(tmp_path / "log.jsonl", mark).count(b"\n") == 21
        and notes.finished == 1
    )
    shown = [s for s, _ in notes.seen]
    # every 0.1 s, and every epoch
    assert shown[-1] == 20 and shown == sorted(shown) and 4 <= len(shown) <= 7
    assert notes.seen[0][1] == {
        "update/loss": 1 / shown[0],
        "update/norm": 2.0,
        "update/lr": 0.1,
        "update/accuracy": 0.5,
    }
    assert notes.seen[-1][1] == {"train/loss": 0.5, "valid/loss": 0.25}


def test_a_tracker_that_fails_is_left_out_and_the_rest_go_on(tmp_path):
    good, bad = Notes(), Notes(fails_at=1)
    with Report.open(History(), Tracking(tmp_path, progress=False, track=[bad, good])) as report:
        report.add(epoch(1))
        with pytest.warns(
            UserWarning, match="tracker notes failed at update 2.*no space left on device"
        ):
            report.add(epoch(2))
        report.add(epoch(3))
    assert (
        [s for s, _ in good.seen] == [1, 2, 3]
        and [s for s, _ in bad.seen] == [1]
        and (good.finished, bad.finished) == (1, 0)
    )


def test_what_cannot_be_tracked_is_said_before_anything_is_touched(tmp_path, monkeypatch):
    fit(
        tiny(),
        mse("y"),
        TRAIN,
        None,
        Plan(epochs=1, batch_size=22),
        tracking=Tracking(tmp_path, progress=False, track=()),
    )
    before = (tmp_path / "log.jsonl").read_bytes()
    for track, message in (
        (["mlflow"], "no tracker 'mlflow'; choose tensorboard, wandb"),
        ("wandb", "no tracker 'w'"),
        ([3], "tracker 3 has no log"),
        (["wandb"], r"pip install 'mmemo\[wandb\]'"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=message):
            fit(
                tiny(),
                mse("y"),
                TRAIN,
                None,
                Plan(),
                tracking=Tracking(tmp_path, resume=False, progress=False, track=track),
            )
        monkeypatch.undo()
    assert (tmp_path / "log.jsonl").read_bytes() == before and not (tmp_path / "tb").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(ConfigError, match=r"give Tracking\(folder\)"):
        check_track(["wandb"], None)
    assert open_trackers(["tensorboard"], None, 0, {}) == []  # no folder, no files


# ------------------------------------------------------------------ TensorBoard
def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tb"))
    found.Reload()
    return found


def test_tensorboard_shows_each_update_once_however_often_it_was_run(tmp_path):
    for start, stop in ((0, 9), (5, 12)):
        with Report.open(
            History(), Tracking(tmp_path / str(start), progress=False), step=start
        ) as report:
            pass
        tracking = Tracking(tmp_path / "run", progress=False)
        with Report.open(
            History(), tracking, step=start, about={"plan": {"lr": {"head.*": 0.1}}}
        ) as report:
            for n in range(start + 1, stop + 1):
                report.shown = 0.0
                report.add(step(n, loss=float(start)))
    found = board(tmp_path / "run")
    assert [(e.step, e.value) for e in found.Scalars("update/loss")] == [
        (n, 0.0) for n in range(1, 6)
    ] + [(n, 5.0) for n in range(6, 13)]
    [about] = found.Tensors("about/text_summary")
    assert '"head.*": 0.1' in about.tensor_proto.string_val[0].decode()


def test_fit_tells_the_trackers_its_plan_and_its_numbers(tmp_path):
    notes = Notes()
    history = fit(
        tiny(),
        mse("y"),
        TRAIN,
        VALID,
        Plan(epochs=2, batch_size=8, lr=0.01),
        tracking=Tracking(tmp_path, progress=False, track=["tensorboard", notes]),
    )
    assert [v["valid/loss"] for _, v in notes.seen if "valid/loss" in v] == [
        e["valid"]["loss"] for e in history.epochs
    ] and notes.finished == 1
    about = board(tmp_path).Tensors("about/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(about.removeprefix("```json").removesuffix("```"))["plan"]["lr"] == 0.01
    lone = Notes()
    fit(
        tiny(),
        mse("y"),
        TRAIN,
        None,
        Plan(epochs=1, batch_size=8),
        tracking=Tracking(progress=False, track=["tensorboard", lone]),
    )
    assert lone.seen and lone.finished == 1  # a tracker of one's own needs no folder


# ------------------------------------------------------------------ W&B
def scan(path: Path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format (blocks of 32
    KiB; checksum, length, type, data).
    """
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def records(folder):
    """What the W&B files of a run's folder hold: [(run id, config, [history], exit code)] of each
    start.
    """
    from wandb.proto import wandb_internal_pb2 as pb

    found = []
    for path in sorted(
        folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns
    ):
        name, config, history, code = None, {}, [], None
        for data in scan(path):
            record = pb.Record.FromString(data)
            if record.HasField("run"):
                name = record.run.run_id
                changes = record.run.config
            if record.HasField("config"):
                changes = record.config
            if record.HasField("run") or record.HasField("config"):
                config |= {
                    u.key or "/".join(u.nested_key): json.loads(u.value_json)
                    for u in changes.update
                }
            if record.HasField("history"):
                history.append(
                    {
                        i.key or "/".join(i.nested_key): json.loads(i.value_json)
                        for i in record.history.item
                    }
                )
            if record.HasField("exit"):
                code = record.exit.exit_code
        found.append((name, config, history, code))
    return found


@wandb_wanted
def test_wandb_offline_is_one_run_however_often_it_is_started(tmp_path):
    """In a process of its own, as W&B leaves a service behind; without a network setting nothing
    is sent.
    """
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import items, tiny
from mmemo.training.loop import fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import Tracking
class Killed(BaseException): pass
def until(n, inner=mse("y")):
    def objective(output, batch):
        nonlocal n
        n -= 1
        if n < 0: raise Killed
        return inner(output, batch)
    return objective
plan = Plan(epochs=2, batch_size=8, lr=.01, checkpoint_steps=1)
tracking = Tracking({str(tmp_path)!r}, progress=False, track=["wandb"])
try: fit(tiny(), until(9), items(44), items(20, seed=1), plan, tracking)
except Killed: print("killed")
fit(tiny(), mse("y"), items(44), items(20, seed=1), plan, tracking)
import os; print(os.environ["WANDB_ERROR_REPORTING"])
"""
    with socket.create_server(("127.0.0.1", 0)) as door:  # the only way out
        door.setblocking(False)
        way = dict.fromkeys(
            ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
            f"http://127.0.0.1:{door.getsockname()[1]}",
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | way | {"HOME": str(tmp_path)},
            timeout=120,
        )
        # nobody knocked
        with pytest.raises(BlockingIOError):
            door.accept()
    assert (
        done.returncode == 0
        and done.stdout.split() == ["killed", "false"]
        and "wandb" not in done.stderr
    ), done.stderr[-2000:]
    first, second = records(tmp_path)
    assert first[0] == second[0] == (tmp_path / "wandb" / "id.txt").read_text() and (
        first[3],
        second[3],
    ) == (1, 0)
    assert first[1]["plan"]["lr"] == 0.01 and "seed" in first[1]
    shown = {
        h["_step"]: h["valid/loss"]
        for _, _, history, _ in (first, second)
        for h in history
        if "valid/loss" in h
    }
    assert shown == {e["step"]: e["valid"]["loss"] for e in History.load(tmp_path).epochs}
    assert not [
        p
        for p in tmp_path.rglob("*")
        if "wandb" in p.name
        and tmp_path / "wandb" not in (p, *p.parents)
        and ".config" not in str(p)
        and ".cache" not in str(p)
    ]
    fit(
        tiny(),
        mse("y"),
        TRAIN,
        None,
        Plan(epochs=1, batch_size=22),
        tracking=Tracking(tmp_path, resume=False, progress=False, track=()),
    )
    assert not (tmp_path / "wandb").exists()  # another run, another id


@wandb_wanted
@pytest.mark.parametrize(
    "settings, mode",
    [
        ({}, "offline"),
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_API_KEY": "x"}, None),
        ({"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, None),
    ],
)
def test_the_users_settings_decide_what_is_sent(tmp_path, monkeypatch, settings, mode):
    import accelerate.tracking

    given = {}

    class Fake(Notes):
        def __init__(self, project, **options):
            super().__init__()
            given.update(options, project=project)

        def start(self):
            pass

        def store_init_configuration(self, values):
            given["about"] = values

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Fake)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with Report.open(
        History(), Tracking(tmp_path, progress=False, track=["wandb"]), about={"lr": math.pi}
    ):
        pass
    assert (
        given["mode"] == mode
        and given["settings"].silent == (mode == "offline")
        and given["settings"].console == "off"
    )
    assert (
        given["project"] == "mmemo"
        and given["about"] == {"lr": math.pi}
        and given["resume"] == "allow"
        and len(given["id"]) == 8
    )
