"""What every test shares.

Types and shapes of the package are checked at run time, each process has one thread,
real corpora are looked for, notebooks have a server, and the report says what it all took.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
# librosa compiles functions into a folder; two processes that do so at once break it for good.
# Workers inherit the first process' choice: it is overruled.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ["NUMBA_CACHE_DIR"] = str(ROOT / "_data" / "numba" / WORKER)

from jaxtyping import install_import_hook

install_import_hook("mmemo", "typecheck.checked")

import matplotlib
import pytest
import torch
from lessons import LessonServer
from timing import Timing

matplotlib.use("Agg")
torch.set_num_threads(1)


def pytest_addoption(parser):
    about = "write what the tests took into tests/durations.json (for a run of all of them)"
    parser.addoption("--record-durations", action="store_true", help=about)


def pytest_configure(config):
    config.pluginmanager.register(Timing(record=config.getoption("record_durations")))


def real_data() -> Path | None:
    """The folder of real corpora: MMEMO_DATA, or shared/data beside the checkout; None if none."""
    for folder in (os.environ.get("MMEMO_DATA"), ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


@pytest.fixture
def corpora_root() -> Path:
    if (folder := real_data()) is None:
        pytest.skip("no real corpora: set MMEMO_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def lesson_server(pytestconfig):
    """Executes notebooks in plain Python: no type is checked there, as none is for a reader."""
    server = LessonServer()
    # Its seconds would count to the last test if it were closed there.
    pytestconfig.add_cleanup(server.close)
    return server


@pytest.fixture
def run_lesson(lesson_server, record_property):
    """Execute a notebook, and tell the report what that took."""

    def run(*args, **options):
        lesson = lesson_server.run(*args, **options)
        record_property("lesson_cpu", lesson.cpu)
        if lesson.import_cpu:
            record_property("server_cpu", lesson.import_cpu)
        return lesson

    return run


@pytest.fixture
def forked_kernels(lesson_server, record_property):
    """Kernels are forked from a process that has imported everything; else they are as always."""
    with lesson_server.forked_kernels() as spent:
        yield
    if spent.import_cpu:
        record_property("server_cpu", spent.import_cpu)
    record_property("lesson_cpu", spent.cpu)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
