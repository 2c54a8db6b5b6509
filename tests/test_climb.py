"""Trainings side by side, kept as they end: the same models as one after another, and none lost."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from children import clean_server

from mmemo.core.errors import ConfigError
from mmemo.data.standards import split_of
from mmemo.experiments import climb as module
from mmemo.experiments.climb import Climb, ClimbOptions, load_view, save_view
from mmemo.experiments.ladder import RUNGS, climb_rung, ladder_views, rung_view
from mmemo.models.base import predict
from mmemo.models.text import TextEncoder
from mmemo.synthetic.known_answer import known_answer

OPTIONS = ClimbOptions(width=8, changes={"epochs": 1})


@pytest.fixture(scope="module")
def views():
    data, text = known_answer(160, seed=2), TextEncoder.pretrained("mmemo-tiny")
    return ladder_views({k: split_of(data, k) for k in ("train", "valid", "test")}, text, 12)


def begin(folder, views, jobs=1, seeds=(0,), about=("a", 1), options=OPTIONS):
    found = Climb(folder, dict([about]), seeds, options, jobs)
    for name in ("pooled", "ids", "sequence"):
        found.add_view(name, views[name])
    return found


def test_a_view_comes_back_as_it_was(tmp_path, views):
    for name, parts in views.items():
        save_view(tmp_path / "views" / f"{name}.safetensors", parts)
        again = load_view(tmp_path / "views" / f"{name}.safetensors")
        assert again.keys() == parts.keys()
        for part, batch in parts.items():
            for stream, kept in batch.streams.items():
                for piece in ("x", "mask", "t"):
                    found = getattr(again[part].streams[stream], piece)
                    assert torch.equal(found, getattr(kept, piece))
            assert list(again[part].streams) == list(batch.streams)
            assert again[part].targets.keys() == batch.targets.keys()
            for task, labels in batch.targets.items():
                assert torch.equal(again[part].targets[task], labels)
    assert [p.name for p in (tmp_path / "views").iterdir() if p.suffix != ".safetensors"] == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_it_trains_what_climb_rung_trains(tmp_path, views, jobs):
    found = begin(tmp_path / "climb", views, jobs)
    with torch.random.fork_rng():
        lora = None
        for name, rung in RUNGS.items():
            parts = rung_view(rung, views, lora)
            text = TextEncoder.pretrained("mmemo-tiny")
            model, history = climb_rung(rung, parts, text, 0, 8, epochs=1)
            lora = model if name == "lora" else lora
            [said] = found.said(name)
            torch.testing.assert_close(said, predict(model, parts["test"])["phq8"])
            assert len(found.histories(name)[0].steps) == len(history.steps)
            # what is put together again says the same
            again = found.model(name, 0)
            for key, value in found.view(name, 0)["test"].streams.items():
                torch.testing.assert_close(value.x, parts["test"].streams[key].x)
            torch.testing.assert_close(predict(again, parts["test"])["phq8"], said)
    state = found.state()
    assert (state["done"], state["total"], state["doing"], state["left"]) == (6, 6, "", 0)
    found.close(forget=True)
    assert not (tmp_path / "climb").exists()


def test_a_climb_that_was_stopped_goes_on(tmp_path, views, monkeypatch):
    whole = begin(tmp_path / "whole", views)
    want = {name: whole.said(name)[0] for name in RUNGS}
    real, calls = module.train_one, []

    def stopping(folder, name, seed, options):
        calls.append(name)
        if name == "temporal":
            raise KeyboardInterrupt
        real(folder, name, seed, options)

    monkeypatch.setattr(module, "train_one", stopping)
    first = begin(tmp_path / "climb", views)
    for name in ("static", "lora", "normalized"):
        first.said(name)
    with pytest.raises(KeyboardInterrupt):
        first.said("temporal")
    monkeypatch.setattr(module, "train_one", lambda *a: calls.append(a[1]) or real(*a))
    calls.clear()
    again = begin(tmp_path / "climb", views)
    assert {rung for rung, _ in again.kept} == {"static", "lora", "normalized"}
    assert all(torch.equal(again.said(name)[0], want[name]) for name in RUNGS)
    assert calls == ["temporal", "attention", "multitask"]


@pytest.mark.parametrize("change", ["about", "options", "code", "damaged"])
def test_another_climb_does_not_go_on(tmp_path, views, monkeypatch, change):
    begin(tmp_path / "climb", views).said("static")
    about, options = ("a", 1), OPTIONS
    if change == "about":
        about = ("a", 2)
    if change == "options":
        options = ClimbOptions(width=8, changes={"epochs": 2})
    if change == "code":
        monkeypatch.setattr(module, "fingerprint_files", lambda *a: "other")
    if change == "damaged":
        (tmp_path / "climb" / "climb.json").write_text("[")
    assert begin(tmp_path / "climb", views, about=about, options=options).kept == set()
    kept = json.loads((tmp_path / "climb" / "climb.json").read_text())
    assert kept.keys() == {"about", "code"}


def test_the_texts_of_a_seed_go_when_it_has_reached_the_top(tmp_path, views):
    found = begin(tmp_path / "climb", views, seeds=(0, 1))
    for name in RUNGS:
        found.said(name)
    assert [p.name for p in (tmp_path / "climb" / "views").glob("sequence-*")] == [
        "sequence-texts-1.safetensors"
    ]


def test_what_went_wrong_in_a_process_is_said(tmp_path, views):
    broken = copy.copy(views)
    train = broken["pooled"]["train"]
    broken["pooled"] = broken["pooled"] | {"train": train.replace(**{}), "valid": train[[]]}
    found = begin(tmp_path / "climb", broken, jobs=2)
    with pytest.raises(Exception, match="."):
        found.said("static")
    found.close()


def test_it_says_what_it_waits_for(tmp_path):
    with pytest.raises(ConfigError, match="waits for views that nobody gave.*ids.*sequence"):
        Climb(tmp_path / "climb", {}, options=OPTIONS, jobs=1).said("attention")
    with pytest.raises(ConfigError, match="jobs=0"):
        Climb(tmp_path / "climb", {}, jobs=0)


def killed_parent(folder):
    "A process with processes of its own, which is killed."
    import os
    import signal

    Climb(folder, {}, jobs=2).pool.submit(int).result()
    os.kill(os.getpid(), signal.SIGKILL)


def test_processes_end_with_the_one_above_them(tmp_path, monkeypatch):
    import time

    import psutil

    context = clean_server(monkeypatch, "test_climb")
    parent = context.Process(target=killed_parent, args=(tmp_path / "climb",))
    parent.start()
    below, begun = [], time.time()
    while parent.is_alive() and time.time() - begun < 120:
        with pytest.raises(psutil.NoSuchProcess) if not parent.is_alive() else nullcontext():
            below = psutil.Process(parent.pid).children(recursive=True) or below
        time.sleep(0.05)
    parent.join(10)
    assert below
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
