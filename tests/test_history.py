"""The log, cut at its mark, and the history that is read from it."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import MEMORY

from mmemo.core.errors import CheckpointError
from mmemo.core.files import canonical_json
from mmemo.training.history import History, Log, read_log


@pytest.fixture
def tmp_path():
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def test_a_log_is_cut_at_its_mark_and_a_changed_one_refused(tmp_path):
    path, log = tmp_path / "log.jsonl", Log(tmp_path / "log.jsonl")
    log.write({"n": 1, "x": 0.1})
    mark = log.mark
    log.write({"n": 2})
    log.close()
    again = Log(path, mark)
    again.write({"n": 3})
    again.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 3]
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
    with pytest.raises(CheckpointError, match="does not begin with"):
        read_log(path, mark)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_log(path, mark)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_the_log_bit_for_bit(x):
    assert json.loads(canonical_json(x)) == x


def test_best_and_stale_of_a_history():
    def run(direction, values):
        h = History("m", direction)
        for i, v in enumerate(values):
            h.add(
                {
                    "type": "epoch",
                    "epoch": i,
                    "step": 10 * i,
                    "train": {"loss": 1.0},
                    "lr": 0.1,
                    "valid": {"m": v},
                }
            )
        return h

    assert (
        run("min", [3, 1, None, 2, 1]).best["epoch"] == 1
        and run("max", [3, 1, 4, None]).best["epoch"] == 2
    )
    assert (
        run("min", [3, 1, None, 2]).stale == 2
        and run("min", [None, None]).best is None
        and run("min", [None, None]).stale == 2
    )
    assert list(run("max", [3, 4]).table()["best"]) == ["", "*"]
