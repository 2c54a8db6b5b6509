"""Processor time of commands that should answer at once: user and system time of the child process,
the least of several runs.

Last line: {"help": seconds, "list": ..., "show": ..., "typo": ..., "python_startup": ...}; what
was typed is above it. `python_startup` is an interpreter that does nothing.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rounds", type=int, default=5)
rounds = parser.parse_args().rounds

# what is typed, and the exit code that it must have
commands = {
    "help": (["-m", "mmemo", "--help"], 0),
    "list": (["-m", "mmemo", "list"], 0),
    "show": (["-m", "mmemo", "show", "fine_tune"], 0),
    "typo": (["-m", "mmemo", "train", "fine_tune", "--sclae", "smoke"], 2),
    "python_startup": (["-c", "pass"], 0),
}
# as on a user's machine: modules are compiled once and kept
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def used() -> float:
    "Processor seconds of all child processes so far."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


seconds = {name: [] for name in commands}
for _ in range(rounds + 1):
    for name, (words, code) in commands.items():
        before = used()
        done = subprocess.run([sys.executable, *words], capture_output=True, env=environment)
        seconds[name].append(used() - before)
        assert done.returncode == code, done.stderr.decode()

# the first round fills the disk cache
least = {name: round(min(found[1:]), 3) for name, found in seconds.items()}
for name, (words, _) in commands.items():
    print(f"{least[name]:.3f} s  python {' '.join(words)}")
print(json.dumps(least))
