"""What `import mmemo` adds to `import torch`, and what every module of the package adds: processor
time in fresh processes, in turn, medians.

Last line: {"added_ms": import mmemo over import torch, "all_modules_ms": every module of the
package over import torch}
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rounds", type=int, default=9)
rounds = parser.parse_args().rounds

ROOT = Path(__file__).resolve().parents[2]
paths = [p.relative_to(ROOT) for p in sorted((ROOT / "mmemo").rglob("*.py"))]
modules = [".".join(p.with_suffix("").parts) for p in paths if not p.stem.startswith("_")]
what = {"mmemo": "import mmemo", "all": "; ".join(f"import {name}" for name in modules)}
# as on a user's machine: modules are compiled once and kept
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
environment = {**os.environ, "PYTHONPATH": str(ROOT)}


def milliseconds(code: str) -> float:
    "Processor time of `code` in a new process that has imported torch."
    script = f"import time, torch; start = time.process_time(); {code}; "
    script += "print(1e3 * (time.process_time() - start))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


times = {name: [] for name in what}
for _ in range(rounds + 1):
    for name, code in what.items():
        times[name].append(milliseconds(code))

# the first round fills the disk cache
median = {name: round(statistics.median(found[1:]), 2) for name, found in times.items()}
print(f"import mmemo adds {median['mmemo']} ms to import torch")
print(f"all {len(modules)} modules add {median['all']} ms")
print(json.dumps({"added_ms": median["mmemo"], "all_modules_ms": median["all"]}))
