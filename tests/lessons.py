"""The tests' side of `lesson_server.py`.

Ask for a notebook; get what it printed, what it used, and what went wrong.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 240  # what a lesson may take
TAIL = 4000  # characters that a message keeps of a long text
# What a kernel sets for itself and for the processes that a cell starts.
KERNEL = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


@dataclass
class Lesson:
    "What each cell printed, processor seconds, and a message to fail with if there is a problem."

    printed: list[str] = field(default_factory=list)
    cpu: float = 0.0
    import_cpu: float = 0.0  # of the server, if this lesson was its first
    problem: str = ""


@dataclass
class Spent:
    "Processor seconds of the server's imports, if it was started, and of the kernels it forked."

    import_cpu: float
    cpu: float = 0.0


class LessonServer:
    "Starts the program with the first notebook; one notebook at a time."

    def __init__(self):
        self.process = None
        self.errors = tempfile.TemporaryFile("w+")
        self.home = tempfile.TemporaryDirectory(prefix="lessons-")

    def run(self, notebook: Path, folder: Path, seconds: float = SECONDS) -> Lesson:
        """Execute a notebook from the repository's root, with the environment as it is now.

        `folder` takes the notes and the log of its process.
        """
        import_cpu = self.start() if self.process is None else 0.0
        if self.process.poll() is not None:
            raise self.ended()
        notes, log = Path(folder) / "notes.jsonl", Path(folder) / "log.txt"
        for file in (notes, log):
            file.write_text("")
        request = {
            "notebook": str(notebook),
            "notes": str(notes),
            "log": str(log),
            "seconds": seconds,
            "environment": {**os.environ, **KERNEL},
        }
        print(json.dumps(request), file=self.process.stdin, flush=True)
        reply = self.reply()
        told = [json.loads(line) for line in notes.read_text().splitlines()]
        return Lesson(
            printed=[note["printed"] for note in told if "printed" in note],
            cpu=reply["cpu"],
            import_cpu=import_cpu,
            problem=problem(
                Path(notebook).name, seconds, reply, told, log.read_text(errors="replace")
            ),
        )

    @contextmanager
    def forked_kernels(self) -> Iterator[Spent]:
        """Every kernel that Jupyter starts meanwhile in this process is forked by this server."""
        spent = Spent(self.start() if self.process is None else 0.0)
        home = Path(self.home.name)
        spec = home / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, str(ROOT / "tests" / "forked_kernel.py"), "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": "p", "language": "python"}))
        (home / "cpu").write_text("")
        changed = {
            "JUPYTER_PATH": str(home),
            "JUPYTER_PREFER_ENV_PATH": "0",  # or the environment's own kernel would be found first
            "MMEMO_LESSON_SERVER": str(home / "door"),
            "MMEMO_KERNEL_CPU": str(home / "cpu"),
        }
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield spent
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            spent.cpu = sum(map(float, (home / "cpu").read_text().split()))

    def start(self) -> float:
        "The processor seconds that its imports took."
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "lesson_server.py"), f"{self.home.name}/door"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **KERNEL},
        )
        return self.reply()["cpu"]

    def reply(self) -> dict:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise self.ended()

    def ended(self) -> RuntimeError:
        status = self.process.wait()
        self.errors.seek(0)
        return RuntimeError(
            f"the server of lessons ended with status {status}:\n{self.errors.read()[-TAIL:]}"
        )

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
        self.errors.close()
        self.home.cleanup()


def problem(name: str, seconds: float, reply: dict, told: list[dict], log: str) -> str:
    "Nothing if all went well; else how and where it ended, and all that helps to see why."
    last = told[-1] if told else {}
    if reply["timed_out"]:
        how = f"was stopped after {seconds:g} seconds"
    elif "error" in last:
        how = "failed"
    elif reply["status"] != 0 or "done" not in last:
        how = f"ended with status {reply['status']} and did not finish"
    else:
        return ""
    cells = [note for note in told if "source" in note]
    where = (
        f" in cell {cells[-1]['cell']}:\n\n{indented(cells[-1]['source'])}"
        if cells
        else " before its first cell"
    )
    message = f"{name} {how}{where}\n"
    texts = {
        "The error": last.get("error", ""),
        "What its cells had printed": "".join(note.get("printed", "") for note in told),
        "What its process wrote": re.sub("^Extension modules:.*", "", log, flags=re.M),
    }
    for title, text in texts.items():
        if text.strip():
            message += f"\n{title}:\n\n{indented(text.strip()[-TAIL:])}\n"
    return message


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
