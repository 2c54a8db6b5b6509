"""Every notebook runs from top to bottom at smoke scale, and its exercises can be solved.

Lessons are executed in processes forked from one that has imported already (`lesson_server.py`).
A few of them and all notebooks of runs are executed by papermill in a kernel, as a reader does;
a run without a training step fails.
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
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
RUNS = [p for p in NOTEBOOKS if p.parent.name == "runs"]
LESSONS = [p for p in NOTEBOOKS if p not in RUNS]
LESSON_CPU = 20  # processor seconds that a lesson may take at smoke scale, imports aside
CELL_SECONDS = 240  # what a cell may take in a kernel
# Lessons that a kernel executes, too: a light one, one with a widget, one that starts processes.
IN_A_KERNEL = ["factors", "lora", "23_mult"]


def execute(notebook, into: Path, **parameters):
    """Run a notebook as papermill users do, from the repository's root.

    A cell may take `CELL_SECONDS`. It gets less at first: now and then a kernel is idle while its
    client waits for a message that has got lost, and then all is done again.
    """

    def run(seconds):
        return papermill.execute_notebook(
            str(notebook),
            str(into),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
            execution_timeout=seconds,
            extra_arguments=["--log-level=ERROR"],
        )

    try:
        return run(CELL_SECONDS // 4)
    except CellTimeoutError:
        return run(CELL_SECONDS)


def printed(nb) -> str:
    return "\n".join(
        "".join(o.get("text", "")) for c in nb.cells if c.cell_type == "code" for o in c.outputs
    )


def is_exercise(cell) -> bool:
    return (
        cell.cell_type == "code"
        and "raise NotImplementedError" in cell.source
        and not cell.source.startswith("#|")
    )


def exercises(nb) -> set[str]:
    "Names of the functions and classes that a learner is to write."
    nodes = [node for cell in nb.cells if is_exercise(cell) for node in ast.parse(cell.source).body]
    return {node.name for node in nodes if "NotImplementedError" in ast.unparse(node)}


def solved(path: Path):
    "The lesson with the solutions of its exercises in a cell after the last of them."
    nb = nbformat.read(path, 4)
    solutions = ROOT / "tests" / "solutions" / f"{path.stem}.py"
    has_exercises = bool(exercises(nb))
    together = f"{path.name}: exercises and tests/solutions/{path.stem}.py must come together"
    assert has_exercises == solutions.is_file(), together
    if has_exercises:
        last = max(i for i, cell in enumerate(nb.cells) if is_exercise(cell))
        nb.cells.insert(last + 1, nbformat.v4.new_code_cell(solutions.read_text()))
    return nb


def check_printed(path: Path, text: str):
    "Every exercise was found to be right, and none is left."
    wanted = exercises(nbformat.read(path, 4))
    right = set(re.findall(r"^(\w+): right$", text, re.M))
    assert "to be done" not in text, f"{path.stem}: an exercise is left to be done"
    assert wanted == right, f"{path.stem}: its exercises are {wanted}, and {right} were right"


@pytest.fixture(autouse=True)
def folders_of_its_own(tmp_path, monkeypatch):
    "What a notebook caches lands in a folder of its test, and no real corpora are there."
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MMEMO_DATA", str(tmp_path / "nothing"))


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_runs_and_its_exercises_can_be_solved(path, tmp_path, run_lesson):
    nb = solved(path)
    tagged = [i for i, cell in enumerate(nb.cells) if "parameters" in cell.metadata.get("tags", [])]
    if tagged:
        nb.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell('# Parameters\nscale = "smoke"\n'))
    nbformat.write(nb, source := tmp_path / path.name)
    lesson = run_lesson(source, tmp_path)
    if lesson.problem:
        pytest.fail(lesson.problem, pytrace=False)
    check_printed(path, "\n".join(lesson.printed))
    took = f"{path.stem} took {lesson.cpu:.1f} s of processor time at smoke scale"
    assert lesson.cpu < LESSON_CPU, f"{took}; a lesson may take {LESSON_CPU}"


@pytest.mark.parametrize("word", IN_A_KERNEL)
def test_a_kernel_executes_a_lesson_with_the_same_result(word, tmp_path, forked_kernels):
    found = [path for path in LESSONS if word in path.stem]
    assert len(found) == 1, f"{word!r} is in the names of {len(found)} lessons: mend IN_A_KERNEL"
    path = found[0]
    nbformat.write(solved(path), source := tmp_path / path.name)
    parameters = {"scale": "smoke"} if papermill.inspect_notebook(str(path)) else {}
    check_printed(path, printed(execute(source, tmp_path / f"run-{path.name}", **parameters)))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_notebook_takes_its_parameters_and_leaves_its_numbers(path, tmp_path, forked_kernels):
    known = papermill.inspect_notebook(str(path))
    assert {"scale", "seed", "out"} <= set(known), f"{path.name}: the parameters cell is lost"
    nb = execute(path, tmp_path / path.name, scale="smoke", seed=3, out=str(tmp_path / "out"))
    assert nb.metadata.papermill.parameters.seed == 3
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert numbers["seed"] == 3 and numbers["scale"] == "smoke" and numbers["steps"] > 0


def test_the_full_ladder_runs_with_its_sizes_cut(tmp_path, forked_kernels):
    """The path of `make full`; only the sizes and weights are small.

    Words are tokenised for the weights asked for, and every rung has one width.
    """
    ladder, out = ROOT / "nbs" / "runs" / "ladder.ipynb", tmp_path / "out"
    execute(ladder, tmp_path / "ladder.ipynb", scale="full", cut=True, seed=1, out=str(out))
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["scale"] == "full" and numbers["cut"] is True
    assert len(numbers["rungs"]) == 6 and len(numbers["promises"]) > 15
    assert all(r["seeds"] == 2 and r["rmse"] > 0 for r in numbers["rungs"])
