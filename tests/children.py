"""Child processes for tests: those of a server that has only imported, never forks of a test's
own process. A test's process has threads (BLAS, decoders, data loaders), and a fork of it may
wait for ever for a lock that one of them held.
"""

import multiprocessing
from pathlib import Path

# what a child would else spend its first seconds on
PRELOAD = ["tiny", "accelerate", "torch._dynamo"]


def clean_server(monkeypatch, *modules: str):
    "The context to start children from; the server has imported `modules`, files of this folder."
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # it does not get sys.path
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *modules])
    return context
