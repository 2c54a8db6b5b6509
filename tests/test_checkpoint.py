import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import MEMORY, Killed, crashing, items, tiny
from torch import nn

import mmemo.training.checkpoint as module
from mmemo.core.errors import CheckpointError
from mmemo.training.checkpoint import (
    list_checkpoints,
    load_weights,
    newest_checkpoint,
    optimiser_tensors,
    prune_checkpoints,
    read_checkpoint,
    restore_optimiser,
    save_checkpoint,
)

TENSORS = {
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
    "optimiser": {"a/exp_avg": torch.randn(2, 3, dtype=torch.bfloat16)},
}


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[p].keys() == b[p].keys() and all(torch.equal(a[p][k], b[p][k]) for k in a[p]) for p in a
    )


def test_what_is_saved_comes_back(tmp_path):
    state = {"step": 7, "loss": 0.1 + 0.2, "nested": {"x": [1, None, "ü"]}}
    path = save_checkpoint(tmp_path, 7, TENSORS, state)
    found = read_checkpoint(path)
    assert (
        equal(found.tensors, TENSORS)
        and found.state == state
        and [p.name for p in tmp_path.iterdir()] == ["step-00000007"]
    )
    assert newest_checkpoint(tmp_path / "nothing here") is None


def test_tied_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    path = save_checkpoint(tmp_path, 1, {"weights": model.state_dict()}, {})
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other[1].weight = other[0].weight
    load_weights(other, path)
    assert torch.equal(other[1].weight, model[0].weight) and torch.equal(
        other[1].bias, model[1].bias
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(nn.Linear(3, 3), path)


FILES = ("manifest.json", "state.json", "weights.safetensors", "optimiser.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", ["truncate", "empty", "flip first", "flip middle", "flip last", "delete"]
)
def test_any_damage_is_refused_by_name_and_the_one_before_is_used(tmp_path, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, TENSORS, {"step": step})
    file = tmp_path / "step-00000002" / name
    data = bytearray(file.read_bytes())
    if damage.startswith("flip"):
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[damage[5:]]] ^= 1
    file.write_bytes(data[: {"truncate": len(data) - 1, "empty": 0}.get(damage, len(data))])
    if damage == "delete":
        file.unlink()
    with pytest.raises(CheckpointError, match=f"step-00000002/{name}"):
        read_checkpoint(tmp_path / "step-00000002")
    with pytest.warns(
        UserWarning, match=f"refused: .*step-00000002/{name}.*going on from step-00000001"
    ):
        found = newest_checkpoint(tmp_path)
    assert found.state == {"step": 1} and equal(found.tensors, TENSORS)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        newest_checkpoint(tmp_path)


@given(st.data())
def test_no_flipped_bit_of_a_manifest_passes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("flip")
    file = save_checkpoint(folder, 1, {"weights": {"a": torch.zeros(2)}}, {}) / "manifest.json"
    text = bytearray(file.read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(text)
    with pytest.raises(CheckpointError, match="manifest.json"):
        read_checkpoint(folder / "step-00000001")


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    "The crash is raised before the n-th operation, for every n, also while a step is saved anew."
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    rmtree = shutil.rmtree
    for again in (False, True):
        for crash_at in range(1, 40):
            folder = tmp_path / f"{again}-{crash_at}"
            save_checkpoint(folder, 1, TENSORS, {"step": 1})
            if again:
                save_checkpoint(folder, 2, TENSORS, {"step": 2})
            counted = crashing(crash_at)
            with monkeypatch.context() as patch:
                for name, operation in real.items():
                    patch.setattr(os, name, counted(operation))
                patch.setattr(shutil, "rmtree", counted(rmtree))
                try:
                    save_checkpoint(folder, 2, TENSORS, {"step": 2})
                    prune_checkpoints(folder, {2})
                except Killed:
                    pass
                else:
                    break
            # no warning: nothing half-written stands under a checkpoint's name
            found = newest_checkpoint(folder)
            assert found.state["step"] in (1, 2) and equal(found.tensors, TENSORS)
            save_checkpoint(folder, 3, TENSORS, {"step": 3})
            prune_checkpoints(folder, {3})
            assert [p.name for p in folder.iterdir()] == ["step-00000003"]
        assert 8 <= crash_at < 39


def mounted(folder, size):
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")


@pytest.mark.parametrize("room", [0, 4, 8, 40, 80, 100])
def test_a_full_disk_leaves_the_previous_loadable(tmp_path, room):
    "A disk of 256 kB, filled up to `room` kB; a checkpoint needs about 90."
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted(disk, "256k")
    big = {"weights": {"a": torch.randn(10_000)}, "optimiser": {"a/exp_avg": torch.randn(10_000)}}
    try:
        save_checkpoint(disk, 1, big, {"step": 1})
        with open(disk / "filler", "wb", buffering=0) as filler:
            free = shutil.disk_usage(disk).free - room * 1024
            filler.write(b"x" * max(free, 0))
        try:
            save_checkpoint(disk, 2, big, {"step": 2})
        except CheckpointError as error:
            assert "No space left" in str(error) and "step-00000002" in str(error) and room < 100
        else:
            assert room == 100
        assert newest_checkpoint(disk).state["step"] == (2 if room == 100 else 1) and equal(
            newest_checkpoint(disk).tensors, big
        )
        assert not list(disk.glob(".step-*"))
    finally:
        subprocess.run(["umount", str(disk)])


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4, 5])
def test_no_space_at_any_write(tmp_path, monkeypatch, fail_at):
    save_checkpoint(tmp_path, 1, TENSORS, {"step": 1})
    write, count = module.write_through, [0]

    def full(path, data):
        count[0] += 1
        if count[0] == fail_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(module, "write_through", full)
    if fail_at <= 4:
        with pytest.raises(
            CheckpointError, match="No space left on device; earlier checkpoints are untouched"
        ):
            save_checkpoint(tmp_path, 2, TENSORS, {})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"] and newest_checkpoint(
        tmp_path
    ).state == {"step": 1}


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_an_optimiser_comes_back(kind):
    make = {
        "adamw": lambda p: torch.optim.AdamW(p, fused=True),
        "adam": torch.optim.Adam,
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    }[kind]

    def step(model, optimiser):
        model(items(4)).predictions["y"].square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    a = tiny(dropout=0)
    a.head.bias.requires_grad_(False)
    names, one = [n for n, _ in a.named_parameters()], make(a.parameters())
    for _ in range(3):
        step(a, one)
    b = tiny(dropout=0, seed=1)
    b.head.bias.requires_grad_(False)
    b.load_state_dict(a.state_dict())
    two = make(b.parameters())
    restore_optimiser(two, names, {k: v.clone() for k, v in optimiser_tensors(one, names).items()})
    for _ in range(3):
        step(a, one)
        step(b, two)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
