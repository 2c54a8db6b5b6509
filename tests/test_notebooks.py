"""Every notebook runs from top to bottom at smoke scale, its exercises can be solved, and a run
without a training step fails.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import CellTimeoutError

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
RUNS = sorted((ROOT / "nbs" / "runs").glob("*.ipynb"))


def execute(notebook, into: Path, **parameters):
    "Run a notebook as papermill users do, from the repository's root."

    def run():
        return papermill.execute_notebook(
            str(notebook),
            str(into),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            execution_timeout=240,
            extra_arguments=["--log-level=ERROR"],
        )

    try:
        return run()
    # seen once: the kernel was idle, and its client waited for a message that had got lost
    except CellTimeoutError:
        return run()


def printed(nb) -> str:
    return "\n".join(
        "".join(o.get("text", "")) for c in nb.cells if c.cell_type == "code" for o in c.outputs
    )


def exercises(nb) -> set[str]:
    "Names of the functions and classes that a learner is to write."
    cells = [
        c.source
        for c in nb.cells
        if c.cell_type == "code"
        and "raise NotImplementedError" in c.source
        and not c.source.startswith("#|")
    ]
    return {
        node.name
        for source in cells
        for node in ast.parse(source).body
        if "NotImplementedError" in ast.unparse(node)
    }


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_runs_and_its_exercises_can_be_solved(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMEMO_DATA", str(tmp_path / "nothing"))
    nb, solutions = nbformat.read(path, 4), ROOT / "tests" / "solutions" / f"{path.stem}.py"
    has_exercises = bool(exercises(nb))
    assert has_exercises == solutions.is_file(), (
        f"{path.name}: exercises and tests/solutions/{path.stem}.py must come together"
    )
    if has_exercises:
        at = max(
            i
            for i, c in enumerate(nb.cells)
            if c.cell_type == "code" and "raise NotImplementedError" in c.source
        )
        nb.cells.insert(at + 1, nbformat.v4.new_code_cell(solutions.read_text()))
    nbformat.write(nb, source := tmp_path / path.name)
    parameters = {"scale": "smoke"} if papermill.inspect_notebook(str(path)) else {}
    text = printed(execute(source, tmp_path / f"run-{path.name}", **parameters))
    assert "to be done" not in text
    assert exercises(nbformat.read(path, 4)) == set(re.findall(r"^(\w+): right$", text, re.M))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_notebook_takes_its_parameters_and_leaves_its_numbers(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMEMO_DATA", str(tmp_path / "nothing"))
    known = papermill.inspect_notebook(str(path))
    assert {"scale", "seed", "out"} <= set(known), f"{path.name}: the parameters cell is lost"
    nb = execute(path, tmp_path / path.name, scale="smoke", seed=3, out=str(tmp_path / "out"))
    assert nb.metadata.papermill.parameters.seed == 3
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert numbers["seed"] == 3 and numbers["scale"] == "smoke" and numbers["steps"] > 0


def test_the_full_ladder_runs_with_its_sizes_cut(tmp_path):
    """The path of `make full`: words are tokenised for the weights asked for, every rung has one
    width; only the sizes and weights are small.
    """
    execute(
        ROOT / "nbs" / "runs" / "ladder.ipynb",
        tmp_path / "ladder.ipynb",
        scale="full",
        cut=True,
        seed=1,
        out=str(tmp_path / "out"),
    )
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        numbers["scale"] == "full"
        and numbers["cut"] is True
        and len(numbers["rungs"]) == 6
        and len(numbers["promises"]) > 15
    )
    assert all(r["seeds"] == 2 and r["rmse"] > 0 for r in numbers["rungs"])
