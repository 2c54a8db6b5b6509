"""The program that executes lessons: it imports what they import, once, and forks for each.

A kernel of its own costs a lesson five to fifteen seconds of imports. A fork of a process that has
imported already costs less than one. The program is a plain Python, without pytest and without
the type checks of the tests, as a kernel is. `lessons.LessonServer` starts it and talks to it: a
line of JSON for each notebook, and a line back when its process has ended. The process leaves
notes: what it began, what it printed, and what stopped it. A kernel, for papermill, is asked for
by `forked_kernel.py` through the socket that is named on the command line.
"""

import atexit
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

# What lessons import, and what these packages import when something of theirs is first used.
# A lesson may import more; it then pays for that itself.
HEAVY = """
    torch torch.utils.tensorboard torchvision.transforms.v2 torchmetrics accelerate peft datasets
    transformers.models.auto.modeling_auto transformers.models.bert.modeling_bert
    numpy pandas pyarrow.parquet scipy.signal scipy.stats librosa.core librosa.filters soundfile av
    sklearn.linear_model sklearn.metrics sklearn.model_selection sklearn.pipeline
    sklearn.preprocessing sklearn.svm einops._torch_specific
    matplotlib.pyplot matplotlib_inline.backend_inline seaborn PIL.JpegImagePlugin
    IPython.core.magics ipywidgets nbdev.showdoc requests rich.progress rich.table typer sqlite3
""".split()


def serve():
    "Import, tell the processor seconds that took, and execute a notebook for each line read."
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints must not look like a reply
    sys.path[0] = ""  # the working folder, as in a kernel
    import_everything()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime}), file=replies, flush=True)
    door = socket.socket(socket.AF_UNIX)
    door.bind(sys.argv[1])
    door.listen()
    kernels: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([sys.stdin, door], [], [], 0.1)
        if sys.stdin in ready:
            if not (line := sys.stdin.readline()):
                return
            print(json.dumps(execute_in_a_child(json.loads(line))), file=replies, flush=True)
        if door in ready:
            asked, _ = door.accept()
            kernels[fork_a_kernel(asked)] = asked
        for kernel in list(kernels):
            ended, status, used = os.wait4(kernel, os.WNOHANG)
            if ended:
                tell_the_end(kernels.pop(kernel), status, used)


def import_everything():
    "Nothing is computed here: a library that has started threads does not survive a fork."
    for name in HEAVY:
        importlib.import_module(name)
    package = importlib.import_module("mmemo")
    for module in pkgutil.walk_packages(package.__path__, "mmemo."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)
    lesson_shell()
    if threads := other_threads():
        raise RuntimeError(
            f"a process with threads must not be forked; is OMP_NUM_THREADS 1? They are {threads}"
        )
    gc.freeze()  # children need not look through what is here already


def other_threads() -> list[str]:
    "Names of threads beside the first, where Linux tells; jemalloc, with pyarrow, minds forks."
    tasks = sorted(Path("/proc/self/task").glob("*/comm"), key=lambda file: int(file.parent.name))
    return [name for file in tasks[1:] if (name := file.read_text().strip()) != "jemalloc_bg_thd"]


def lesson_shell() -> type:
    """IPython that captures what cells show.

    Cells are files to a traceback, as in a kernel, and every traceback that is shown is kept.
    """
    from execnb.shell import CaptureShell
    from ipykernel.compiler import XCachingCompiler
    from IPython.core.history import HistoryManager
    from traitlets import Type

    class LessonShell(CaptureShell):
        compiler_class = Type(XCachingCompiler)

        def init_history(self):
            self.shown_tracebacks = []
            self.history_manager = HistoryManager(shell=self, parent=self, hist_file=":memory:")
            self.configurables.append(self.history_manager)

        def _showtraceback(self, etype, evalue, stb):
            self.shown_tracebacks.append("\n".join(stb))

    return LessonShell


def fork_a_kernel(asked: socket.socket) -> int:
    "A kernel for the connection file that somebody asks with; its process."
    request = json.loads(asked.makefile().readline())
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nowhere, stream)
        sys.stdin = open(0)
        os.environ.clear()
        os.environ.update(request["environment"])
        from ipykernel.kernelapp import IPKernelApp
        from matplotlib_inline.backend_inline import _enable_matplotlib_integration

        kernel = IPKernelApp.instance()
        kernel.initialize(["-f", request["connection_file"], "--log-level=ERROR"])
        # what the import of pyplot does where there is a kernel already
        _enable_matplotlib_integration()
        kernel.start()
        atexit._run_exitfuncs()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def tell_the_end(asked: socket.socket, status: int, used) -> None:
    "Tell who asked for a kernel how it ended and what it used; he may be gone."
    ended = {"status": os.waitstatus_to_exitcode(status), "cpu": used.ru_utime + used.ru_stime}
    try:
        asked.sendall(json.dumps(ended).encode() + b"\n")
    except OSError:
        pass
    asked.close()


def execute_in_a_child(request: dict) -> dict:
    """Fork for a notebook and wait; tell how the child ended and what it used.

    A child that takes too long is stopped, and so is what it has left running.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_child(request)
    timed_out = False
    try:
        ended, status, used = os.wait4(child, os.WNOHANG)
        while not ended:
            time.sleep(0.02)
            if not timed_out and time.monotonic() - start > request["seconds"]:
                timed_out = True
                os.kill(child, signal.SIGUSR1)  # it writes where it is
                time.sleep(0.5)
                os.killpg(child, signal.SIGKILL)
            ended, status, used = os.wait4(child, os.WNOHANG)
    finally:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return {
        "status": os.waitstatus_to_exitcode(status),
        "timed_out": timed_out,
        "cpu": used.ru_utime + used.ru_stime,
    }


def be_the_child(request: dict):
    "Execute the notebook in a process group of its own, and end without returning."
    status = 1
    try:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin = open(0)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1)
        os.environ.clear()
        os.environ.update(request["environment"])
        with open(request["notes"], "w") as notes:
            execute(request["notebook"], notes)
        atexit._run_exitfuncs()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def execute(notebook: str, notes):
    "One cell after the other, up to the first that fails."
    from execnb.nbio import read_nb
    from fastcore.ansi import strip_ansi

    def note(**what):
        print(json.dumps(what), file=notes, flush=True)

    shell = lesson_shell()(mpl_format="png")
    for number, cell in enumerate(read_nb(notebook).cells):
        if cell.cell_type != "code":
            continue
        note(cell=number, source=cell.source)
        # The shell drops what a cell has printed if the cell ends in a semicolon.
        outputs = shell.run(
            cell.source + "\n#" if cell.source.rstrip().endswith(";") else cell.source
        )
        note(printed="".join("".join(output.get("text", "")) for output in outputs))
        raised = [
            "".join(output["traceback"]) for output in outputs if output["output_type"] == "error"
        ]
        if (
            failed := raised or shell.shown_tracebacks
        ):  # a widget shows what its function raised, and goes on
            return note(error=strip_ansi("\n".join(failed)))
    note(done=True)


if __name__ == "__main__":
    serve()
