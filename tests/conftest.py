"""What every test shares: types and shapes of the package are checked at run time, one thread a
process, and where real corpora lie.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
# librosa compiles functions into a folder; two processes that do so at once break it for good. Workers inherit the first process' choice: it is overruled.
os.environ["NUMBA_CACHE_DIR"] = str(
    ROOT / "_data" / "numba" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
)

from jaxtyping import install_import_hook

install_import_hook("mmemo", "typecheck.checked")

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)


def real_data() -> Path | None:
    """The folder of real corpora: MMEMO_DATA, or shared/data beside the checkout; None where there
    is none.
    """
    for folder in (os.environ.get("MMEMO_DATA"), ROOT.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    return None


@pytest.fixture
def corpora_root() -> Path:
    if (folder := real_data()) is None:
        pytest.skip("no real corpora: set MMEMO_DATA to the folder that holds them")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
