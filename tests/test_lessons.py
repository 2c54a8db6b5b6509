"""The server of lessons: a notebook finds what a kernel gives it, and its failures are told."""

import os
import time

import nbformat
import pytest


@pytest.fixture
def lesson(tmp_path, run_lesson):
    """Execute cells as a notebook."""

    def run(*sources, **options):
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources]
        )
        nb.cells.insert(0, nbformat.v4.new_markdown_cell("# A title"))
        nbformat.write(nb, tmp_path / "some.ipynb")
        return run_lesson(tmp_path / "some.ipynb", tmp_path, **options)

    return run


def gone(pid: int) -> bool:
    "Whether a process ends soon."
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_cells_share_names_and_what_each_has_printed_is_kept(lesson, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", "here")
    done = lesson(
        "import os, sys\nprint(1)\nprint(2, file=sys.stderr)\n3",
        "print(os.environ['MMEMO_CACHE'], 'pytest' in sys.modules, os.path.isdir('nbs'));",
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nprint(plt.get_backend())",
        "from ipywidgets import interact\n_ = interact(lambda a: print('a is', a), a=(1, 3))",
        "from IPython.display import HTML\ndisplay(HTML('<b>x</b>'))\nprint('shown')",
    )
    assert done.problem == ""
    assert done.printed[:2] == ["1\n2\n", "here False True\n"]
    assert "inline" in done.printed[2] and "a is 2" in done.printed[3]
    assert done.printed[4] == "shown\n"
    assert 0 < done.cpu < 10


def test_a_lesson_is_alone_and_can_start_threads_and_processes(lesson):
    processes = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import math, subprocess, sys
with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    print(list(pool.map(math.sqrt, [4, 9])))
print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout)
"""
    threads = """
import torch
torch.set_num_threads(2)
x = torch.randn(300, 300)
print((x @ x).isfinite().all().item(), torch.get_num_threads())
loader = torch.utils.data.DataLoader(list(range(4)), batch_size=2, num_workers=2)
print([batch.tolist() for batch in loader])
"""
    done = lesson(processes, threads)
    assert done.problem == ""
    assert done.printed == ["[2.0, 3.0]\n42\n\n", "True 2\n[[0, 1], [2, 3]]\n"]
    assert lesson("print('processes' in dir(), 'pool' in dir())").printed == ["False False\n"]


FAILURES = {
    "an exception": (
        "def f():\n    raise ValueError('no such thing')\nf()",
        "ValueError: no such thing",
    ),
    "a line that is no Python": ("x = = 1", "SyntaxError"),
    "an exit": ("import sys\nsys.exit(0)", "SystemExit"),
    "a sudden end": ("import os\nos._exit(0)", "ended with status 0 and did not finish"),
    "a crash": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault"),
    "a widget": (
        "from ipywidgets import interact\n_ = interact(lambda a: 1 / 0, a=(1, 3))",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_names_its_cell_and_its_reason(lesson, what):
    source, reason = FAILURES[what]
    failed = lesson("print('so far')", source, "print('too far')")
    assert failed.problem.startswith("some.ipynb ") and "in cell 2:" in failed.problem
    assert all("    " + line in failed.problem for line in source.splitlines())
    assert (
        reason in failed.problem and "so far" in failed.problem and "too far" not in failed.problem
    )


def test_what_takes_too_long_is_stopped_with_all_it_started(lesson, tmp_path):
    pid = tmp_path / "pid"
    sleeper = f"""
import pathlib, subprocess
sleeping = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(pid)!r}).write_text(str(sleeping.pid))
"""
    late = lesson(sleeper, "import time\ntime.sleep(60)", seconds=3)
    assert late.problem.startswith("some.ipynb was stopped after 3 seconds in cell 2:")
    assert "line 2 in <module>" in late.problem, "where it was"
    assert gone(int(pid.read_text()))
    left = lesson(sleeper)
    assert left.problem == "" and gone(int(pid.read_text()))
