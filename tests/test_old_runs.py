"""Runs that version 0.1 left behind are still read, measured and continued.

`runs_of_0.1/finished` is `fine_tune_v1` at smoke scale without its text; `stopped` is the same run,
interrupted in its third epoch, with its best and its last checkpoint.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmemo.experiments.run import evaluate_run, load_run, train_recipe
from mmemo.experiments.run_folder import read_run
from mmemo.training.history import History

HERE = Path(__file__).parent / "runs_of_0.1"


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    "A copy of the runs, to work on."
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(HERE, tmp_path / "runs"))


def test_an_old_run_is_measured_again_with_the_same_result(old):
    then = json.loads((old / "finished" / "metrics.json").read_text())
    load_run(old / "finished")
    now = evaluate_run(old / "finished")
    assert now["phq8"]["rmse"].value == pytest.approx(then["phq8"]["rmse"][0], rel=1e-12)
    assert {factor: share.value for factor, share in now["xray"].items()} == {
        factor: share[0] for factor, share in then["xray"].items()
    }


def test_an_old_run_that_was_stopped_goes_on_where_it_was(old):
    recipe, facts = read_run(old / "stopped")
    told = "mmemo 0.1.0 is now"
    with pytest.warns(UserWarning, match=told):
        histories, _ = train_recipe(
            recipe, old / "stopped", seed=facts["seed"], progress=False, track=()
        )
    then, now = History.load(old / "finished" / "training"), histories["split"]
    assert [run["step"] for run in now.runs] == [0, 40]
    # 0.1 wrote the mean of the batches' validation losses, which is not that of all items
    assert now.steps == then.steps
    assert [epoch["train"] for epoch in now.epochs] == [epoch["train"] for epoch in then.epochs]
    whole, ended = (load_file(old / name / "model.safetensors") for name in ("finished", "stopped"))
    assert whole.keys() <= ended.keys()
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
