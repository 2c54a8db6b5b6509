import errno
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import clean_server
from tiny import (
    MEMORY,
    Kill,
    Killed,
    assert_same_run,
    crashing,
    fit_in,
    items,
    run,
    same,
    tiny,
)
from torch import nn

import mmemo.training.checkpoint as checkpoint_module
from mmemo.core.errors import CheckpointError, ConfigError
from mmemo.core.state import epoch_order
from mmemo.training.checkpoint import list_checkpoints, newest_checkpoint, step_of
from mmemo.training.history import History
from mmemo.training.loop import Hooks, evaluate_loss, fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan, cut_updates
from mmemo.training.tracking import QUIET, Tracking

HERE = Path(__file__).parent
TRAIN, VALID = items(44), items(20, seed=1)
quiet = dict(progress=False, track=())


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def plain_run(plan, metrics=None, **hooks):
    model = tiny()
    return model, fit(
        model, mse("y"), TRAIN, VALID, plan, replace(QUIET, metrics=metrics), Hooks(**hooks)
    )


# --- the loop does what ten lines do


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_fit_is_the_bare_loop(kind):
    plan = Plan(epochs=3, batch_size=8, lr=1e-2, optimiser=kind, weight_decay=0, clip=0.5)
    a, b = tiny(dropout=0), tiny(dropout=0)
    history = fit(a, mse("y"), TRAIN, None, plan, tracking=QUIET)
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind]
    optimiser, losses = (
        make(
            b.parameters(),
            lr=1e-2,
            weight_decay=0,
            **({"momentum": 0.9} if kind == "sgd" else {"fused": True}),
        ),
        [],
    )
    for epoch in range(3):
        for [rows] in cut_updates(epoch_order(len(TRAIN), 0, epoch), plan):
            loss = mse("y")(b(TRAIN[rows]), TRAIN[rows])["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(b.parameters(), 0.5)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    assert [s["loss"] for s in history.steps] == losses and same(a, b) and history.best is None


def test_it_learns_and_leaves_the_world_as_it_was():
    model = tiny()
    model.drop.eval()
    before = torch.random.get_rng_state()
    history = fit(
        model,
        mse("y"),
        items(400),
        VALID,
        Plan(epochs=15, lr=1e-2, schedule="onecycle"),
        tracking=QUIET,
    )
    assert history.epochs[-1]["valid"]["loss"] < 0.3 * history.epochs[0]["valid"]["loss"]
    assert torch.equal(before, torch.random.get_rng_state())
    assert (
        model.training
        and not model.drop.training
        and all(p.grad is None for p in model.parameters())
    )


def test_a_run_depends_on_its_seed_and_nothing_else():
    runs = []
    for seed, outside in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(outside)
        runs.append(plain_run(Plan(epochs=2, batch_size=8, seed=seed))[1].steps)
    assert runs[0] == runs[1] != runs[2]


def test_frozen_parameters_and_groups():
    model = tiny()
    model.encoder.requires_grad_(False)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    fit(
        model,
        mse("y"),
        TRAIN,
        None,
        Plan(epochs=1, batch_size=8, lr={"head.*": 0.0, "*": 0.1}, weight_decay=0.5),
        tracking=QUIET,
    )
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }


def test_logged_rate_follows_the_schedule():
    _, history = plain_run(
        Plan(
            epochs=2, batch_size=8, lr={"head.*": 1.0, "*": 0.5}, schedule="warmup_linear", warmup=4
        )
    )
    assert [s["lr"] for s in history.steps] == pytest.approx(
        [0.25, 0.5, 0.75, 1] + [1 - i / 8 for i in range(8)]
    )


# --- stopping


def scripted(values):
    """A validation set whose loss in epoch i is values[i]: the items' targets say it, and the
    objective reads it off.
    """
    calls = iter(values)

    def objective(output, batch):
        loss = mse("y")(output, batch)["loss"]
        return {"loss": loss if torch.is_grad_enabled() else torch.tensor(next(calls))}

    return objective


@pytest.mark.parametrize("in_folder", [True, False])
def test_early_stopping_ends_with_the_best_weights(tmp_path, in_folder):
    plan = Plan(epochs=9, batch_size=22, patience=2, lr=0.05)
    valid, kept = items(4), {}

    def metric(predictions, targets):
        kept[len(kept)] = {k: v.clone() for k, v in model.state_dict().items()}
        return 0.0

    model = tiny()
    history = fit(
        model,
        scripted([5.0, 3.0, 4.0, math.nan, 1.0]),
        TRAIN,
        valid,
        plan,
        tracking=Tracking(tmp_path if in_folder else None, metrics={"none": metric}, **quiet),
    )
    assert (
        len(history.epochs) == 4
        and history.best["epoch"] == 1
        and history.epochs[3]["valid"]["loss"] is None
    )
    assert all(torch.equal(v, kept[1][k]) for k, v in model.state_dict().items())
    if in_folder:
        other = tiny(seed=3)
        # over: nothing is trained, the best comes back
        again = fit(other, scripted([]), TRAIN, valid, plan, tracking=Tracking(tmp_path, **quiet))
        assert same(model, other) and again.epochs == history.epochs


def test_monitor_a_metric_to_maximise():
    scores = iter([0.1, 0.5, 0.3, 0.2, 0.9])
    _, history = plain_run(
        Plan(epochs=9, batch_size=22, patience=2, monitor="score", direction="max"),
        metrics={"score": lambda p, t: next(scores)},
    )
    assert [e["valid"]["score"] for e in history.epochs] == [0.1, 0.5, 0.3, 0.2] and history.best[
        "epoch"
    ] == 1


# --- resume

MATRIX = {
    "plain": {},
    "accumulate 2": dict(accumulate=2),
    "accumulate 3": dict(accumulate=3),
    "workers": dict(workers=2, accumulate=2),
    "plateau": dict(schedule="plateau", plateau_patience=1, plateau_factor=0.5, lr=0.3),
    "onecycle": dict(schedule="onecycle", lr=0.02),
    "bf16": dict(precision="bf16"),
    "fp16": dict(precision="fp16"),
    "sgd": dict(optimiser="sgd", schedule="cosine"),
    "stopping": dict(patience=1, lr=0.3, epochs=8),
}


@pytest.mark.parametrize("name", MATRIX)
def test_killed_anywhere_and_resumed_it_is_the_same_run(tmp_path, name):
    plan = Plan(**{"epochs": 4, "batch_size": 8, "checkpoint_steps": 2, "lr": 0.01} | MATRIX[name])
    whole = plain_run(plan)
    calls = sum(len(cut_updates(range(44), plan)) for _ in range(4)) * plan.accumulate
    for at in {1, 7, 13, calls // 2, calls - 3} if not plan.workers else {9, 15}:
        folder = tmp_path / str(at)
        try:
            fit_in(folder, tiny(), plan, Kill(at))
        except Killed:
            pass
        model = tiny(seed=9)
        # killed before the first save: from the start
        if not list_checkpoints(folder / "checkpoints"):
            model = tiny()
        assert_same_run(
            whole,
            fit_in(folder, model, plan),
        )
        assert_same_run(whole, (model, History.load(folder)))


def test_killed_again_and_again(tmp_path):
    plan, runs = Plan(epochs=3, batch_size=8, checkpoint_steps=1, schedule="onecycle"), 0
    whole = plain_run(plan)
    while runs < 30:
        model, runs = tiny(), runs + 1
        try:
            history = fit(model, Kill(4), TRAIN, VALID, plan, tracking=Tracking(tmp_path, **quiet))
        except Killed:
            continue
        break
    assert_same_run(whole, (model, history))
    assert runs > 4
    assert len(history.runs) == runs and [s["step"] for s in history.steps] == list(range(1, 19))


def test_killed_inside_a_save(tmp_path, monkeypatch):
    "At every file operation of the third save."
    plan = Plan(epochs=2, batch_size=8, checkpoint_steps=2)
    whole, real, reached = plain_run(plan), os.fsync, False
    for at in range(8, 21):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module.os, "fsync", crashing(at)(real))
            try:
                fit_in(tmp_path / str(at), tiny(), plan)
            except Killed:
                reached = True
        model = tiny(seed=9)
        assert_same_run(
            whole,
            fit_in(tmp_path / str(at), model, plan),
        )
    assert reached


def test_a_sampler_of_growing_epochs_resumes_too(tmp_path):
    def curriculum(epoch):
        return epoch_order(44, 5, epoch)[: 12 + 10 * epoch]

    plan = Plan(epochs=4, batch_size=8, checkpoint_steps=1, schedule="onecycle")
    whole = plain_run(plan, sampler=curriculum)
    assert [sum(s["items"] for s in whole[1].steps if s["epoch"] == e) for e in range(4)] == [
        12,
        22,
        32,
        42,
    ]
    with pytest.raises(Killed):
        fit_in(tmp_path, tiny(), plan, Kill(7), sampler=curriculum)
    model = tiny(seed=9)
    assert_same_run(
        whole,
        fit_in(tmp_path, model, plan, sampler=curriculum),
    )


def test_what_is_set_before_each_epoch_is_set_after_a_crash_too(tmp_path):
    def harder(model, epoch):
        model.drop.p = 0.1 + 0.2 * epoch

    plan = Plan(epochs=3, batch_size=8, checkpoint_steps=1)
    whole = plain_run(plan, at_epoch=harder)
    assert not same(whole[0], plain_run(plan)[0])
    with pytest.raises(Killed):
        fit_in(tmp_path, tiny(), plan, Kill(14), at_epoch=harder)
    model = tiny(seed=9)
    assert_same_run(
        whole,
        fit_in(tmp_path, model, plan, at_epoch=harder),
    )


class Noisy:
    """A data set with noise of its own: a function of (epoch, item), and draws from the global
    generators.
    """

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self):
        return 44

    def __getitem__(self, rows):
        batch, s = TRAIN[rows], TRAIN[rows].streams["audio"]
        noise = torch.stack(
            [
                torch.randn(
                    s.x.shape[1:], generator=torch.Generator().manual_seed(1000 * self.epoch + r)
                )
                for r in rows
            ]
        )
        return batch.replace(
            audio=s.with_x(s.x + 0.1 * noise + (0.1 * torch.randn(()) if self.world else 0))
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_noise_of_the_data_is_resumed(tmp_path, workers):
    data = Noisy()
    data.world = not workers
    plan = Plan(epochs=3, batch_size=8, checkpoint_steps=1, workers=workers)
    one = tiny()
    whole = fit(one, mse("y"), data, VALID, plan, tracking=QUIET)
    with pytest.raises(Killed):
        fit(tiny(), Kill(9), data, VALID, plan, tracking=Tracking(tmp_path, **quiet))
    model = tiny(seed=9)
    assert_same_run(
        (one, whole),
        (model, fit(model, mse("y"), data, VALID, plan, tracking=Tracking(tmp_path, **quiet))),
    )


def test_resume_refuses_another_plan_and_tells_of_another_machine(tmp_path):
    plan = Plan(epochs=1, batch_size=8)
    fit_in(tmp_path, tiny(), plan)
    for other, name in (
        (Plan(epochs=1, batch_size=8, lr=1e-4), "lr"),
        (Plan(epochs=1, batch_size=4), "batch_size"),
    ):
        with pytest.raises(ConfigError, match=f"another plan: {name} "):
            fit(tiny(), mse("y"), TRAIN, VALID, other, tracking=Tracking(tmp_path, **quiet))
    with pytest.raises(ConfigError, match="items"):
        fit(tiny(), mse("y"), VALID, VALID, plan, tracking=Tracking(tmp_path, **quiet))
    with pytest.raises(CheckpointError, match="does not fit"):
        fit(nn.Linear(1, 1), mse("y"), TRAIN, VALID, plan, tracking=Tracking(tmp_path, **quiet))
    assert (
        len(
            fit(
                tiny(),
                mse("y"),
                TRAIN,
                VALID,
                Plan(epochs=3, batch_size=8, keep=1),
                tracking=Tracking(tmp_path, **quiet),
            ).epochs
        )
        == 3
    )
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="threads 1 is now 2"):
            fit(
                tiny(),
                mse("y"),
                TRAIN,
                VALID,
                Plan(epochs=4, batch_size=8),
                tracking=Tracking(tmp_path, **quiet),
            )
    finally:
        torch.set_num_threads(1)
    anew = fit(
        tiny(),
        mse("y"),
        TRAIN,
        VALID,
        Plan(epochs=1, batch_size=4),
        tracking=Tracking(tmp_path, resume=False, **quiet),
    )
    assert (
        len(anew.steps) == 11
        and len(History.load(tmp_path).steps) == 11
        and [step_of(p) for p in list_checkpoints(tmp_path / "checkpoints")] == [11]
    )


def test_a_damaged_newest_checkpoint_costs_a_few_updates_only(tmp_path):
    plan = Plan(epochs=3, batch_size=8)
    whole = plain_run(plan)
    fit_in(tmp_path, tiny(), plan)
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    (last / "weights.safetensors").write_bytes(b"torn")
    model = tiny(seed=9)
    with pytest.warns(
        UserWarning, match=f"{last.name}/weights.safetensors is torn.*going on from step-00000012"
    ):
        assert_same_run(
            whole,
            fit_in(tmp_path, model, plan),
        )
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="log.jsonl"):
        fit_in(tmp_path, tiny(), plan)


def test_which_checkpoints_stay(tmp_path):
    def run(name, values, **plan):
        fit(
            tiny(),
            scripted(values),
            TRAIN,
            items(4),
            Plan(batch_size=22, **plan),
            tracking=Tracking(tmp_path / name, **quiet),
        )
        return [step_of(p) for p in list_checkpoints(tmp_path / name / "checkpoints")]

    # the best, and the two newest
    assert run("best", [3.0, 1.0, 2.0, 2.0, 2.0, 2.0], epochs=6) == [4, 10, 12]
    assert run("every", [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], epochs=7, save_every=3, keep=None) == [
        2,
        6,
        12,
        14,
    ]
    # 2 was the best when 6 was saved
    assert run("moved", [3.0, 4.0, 4.0, 2.0], epochs=4, keep=2) == [2, 6, 8]
    assert run("falling", [5.0, 4.0, 3.0, 2.0], epochs=4, keep=1) == [8]
    assert run(
        "each third",
        [2.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0],
        epochs=8,
        keep=1,
        keep_every=3,
        save_every=9,
    ) == [4, 6, 12, 16]


def test_disk_full_in_the_middle_of_a_run(tmp_path, monkeypatch):
    plan, real, count = Plan(epochs=3, batch_size=8), checkpoint_module.write_through, [0]
    whole = plain_run(plan)

    def full(path, data):
        count[0] += 1
        if count[0] == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_through", full)
        with pytest.raises(
            CheckpointError, match="step-00000012 could not be written: No space left"
        ):
            fit_in(tmp_path, tiny(), plan)
    assert newest_checkpoint(tmp_path / "checkpoints").state["step"] == 6
    model = tiny(seed=9)
    assert_same_run(
        whole,
        fit_in(tmp_path, model, plan),
    )


# --- real kills and real processes


def test_sigkill(tmp_path, monkeypatch):
    """Children of a clean server that has only imported; the killed ones are slowed, so that the
    kill finds them at work.
    """
    plan = dict(epochs=4, batch_size=8, checkpoint_steps=1, schedule="onecycle", patience=3)
    context = clean_server(monkeypatch)

    def start(name, out=None, slow=0.0):
        process = context.Process(target=run, args=(tmp_path / name, dict(plan), out, slow))
        process.start()
        return process

    def finish(name):
        process = start(name, tmp_path / f"{name}.json")
        process.join()
        return process.exitcode, json.loads((tmp_path / f"{name}.json").read_text())

    whole = finish("whole")
    for i, lines in enumerate((4, 17, 31)):  # of the log
        process, log = start(str(i), slow=0.02), tmp_path / str(i) / "log.jsonl"
        while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.002)
        process.kill()
        process.join()
        assert process.exitcode == -9 and finish(str(i)) == whole


def test_two_processes_give_the_losses_of_one(tmp_path):
    """80 items in batches of 7: the last has 3 rows, so the parts are uneven; 60 updates of one
    batch and 30 of two.
    """
    plans = [
        dict(
            epochs=5,
            batch_size=7,
            dropout=0.0,
            norm=False,
            lr=1e-2,
            schedule="onecycle",
            accumulate=n,
        )
        for n in (1, 2)
    ]
    for i, plan in enumerate(plans):
        run(tmp_path / f"one-{i}", dict(plan), tmp_path / f"one-{i}.json")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "tiny.py"),
            str(tmp_path / "two"),
            json.dumps(plans),
        ],
        cwd=HERE.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for i in range(2):
        one, two = (json.loads((tmp_path / f"{n}-{i}.json").read_text()) for n in ("one", "two"))
        assert (
            History.load(tmp_path / f"two-{i}").runs[0]["about"]["processes"] == 2
            and len(one["losses"]) == (60, 30)[i]
        )
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert [e["valid"]["loss"] for e in two["epochs"]] == pytest.approx(
            [e["valid"]["loss"] for e in one["epochs"]], rel=1e-5
        )


# --- non-finite values


# --- objectives and evaluation


def test_evaluate_weighs_by_items_and_touches_nothing():
    model, data = tiny(), items(23)
    model.norm.eval()
    before = torch.random.get_rng_state()
    found = evaluate_loss(
        model,
        mse("y"),
        data,
        batch_size=10,
        metrics={"n": lambda p, t: float(len(p["y"]) + len(t["y"]))},
    )
    assert (
        found["n"] == 46
        and model.training
        and not model.norm.training
        and torch.equal(before, torch.random.get_rng_state())
    )
    model.eval()
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(mse("y")(model(data), data)["loss"]), rel=1e-6)


def test_what_cannot_be_is_said_at_once():
    class Empty:
        def __len__(self):
            return 0

    with pytest.raises(ConfigError, match="no update: 0 items"):
        fit(tiny(), mse("y"), Empty(), tracking=QUIET)
    with pytest.raises(ConfigError, match="no update"):
        fit(tiny(), mse("y"), TRAIN, plan=Plan(batch_size=50, drop_last=True), tracking=QUIET)
    for plan in (Plan(patience=1), Plan(schedule="plateau"), Plan(monitor="f1", direction="max")):
        with pytest.raises(ConfigError, match="give valid"):
            fit(tiny(), mse("y"), TRAIN, plan=plan, tracking=QUIET)
    with pytest.raises(ConfigError, match="monitor 'f1' is not among.*loss"):
        fit(
            tiny(),
            mse("y"),
            TRAIN,
            VALID,
            Plan(monitor="f1", direction="max", batch_size=22),
            tracking=QUIET,
        )


def test_tensorboard_and_progress(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(
        tiny(), mse("y"), TRAIN, VALID, Plan(epochs=2, batch_size=8), tracking=Tracking(tmp_path)
    )
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [e.value for e in board.Scalars("valid/loss")] == pytest.approx(
        [e["valid"]["loss"] for e in history.epochs]
    )
    assert "12/12" in capsys.readouterr().err
    figure = history.plot()[0].figure
    figure.canvas.draw()
