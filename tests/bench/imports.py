"""What `import mmemo` adds to `import torch`, and what every module of the package adds: fresh
processes, in turn, medians.

Last line: {"added_ms": import mmemo over import torch, "all_modules_ms": every module of the
lessons over import torch}
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rounds", type=int, default=9)
rounds = parser.parse_args().rounds

modules = [
    p.stem
    for p in sorted((Path(__file__).parents[2] / "mmemo").glob("*.py"))
    if p.stem not in ("__init__", "_modidx", "cli")
]
what = {"mmemo": "import mmemo", "all": "; ".join(f"import mmemo.{m}" for m in modules)}
times = {name: [] for name in what}
for _ in range(rounds + 1):  # the first round warms the disk cache
    for name, code in what.items():
        script = (
            f"import torch, time; start = time.perf_counter(); {code}; print(time.perf_counter() -"
            " start)"
        )
        times[name].append(
            float(
                subprocess.run(
                    [sys.executable, "-c", script], capture_output=True, text=True, check=True
                ).stdout
            )
        )
median = {name: round(1e3 * statistics.median(t[1:]), 2) for name, t in times.items()}
print(
    f"import mmemo adds {median['mmemo']} ms to import torch; all of {', '.join(modules)} add"
    f" {median['all']} ms"
)
print(json.dumps({"added_ms": median["mmemo"], "all_modules_ms": median["all"]}))
