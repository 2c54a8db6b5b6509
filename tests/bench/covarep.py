"""Seconds to read one COVAREP file of 90,000 x 74 as float32: mmemo against pandas.read_csv with
defaults, alternated in one run, medians.

"speedup" compares the first reading, which parses the file; "cached" the reading of the same
values from a corpus that was cached before.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mmemo.core.batch import Batch, Stream
from mmemo.data.corpus import cached
from mmemo.data.interviews import read_covarep


def timed(call) -> tuple[float, object]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows",
        type=int,
        default=90_000,
        help="rows of 10 ms (default: %(default)s, a quarter of an hour)",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="readings of each kind (default: %(default)s)"
    )
    args = parser.parse_args()
    x = np.random.default_rng(0).normal(size=(args.rows, 74)).astype(np.float32)
    x[:, 1] = x[:, 1] > 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "300_COVAREP.csv"
        np.savetxt(path, x, fmt="%.9g", delimiter=",")
        values, mask, t = read_covarep(path)
        assert np.array_equal(values.numpy(), x), "not the values that were written"
        corpus = cached(
            "bench",
            lambda report: [
                Batch({"audio": Stream(values[None], mask[None], t[None])}, {}, {"id": ["300"]})
            ],
            folder,
            [path],
            cache=folder,
            progress=False,
        )
        times = {"mmemo": [], "pandas": [], "cached": []}
        for _ in range(args.repeats):
            times["pandas"].append(timed(lambda: pd.read_csv(path))[0])
            times["mmemo"].append(timed(lambda: read_covarep(path))[0])
            seconds, batch = timed(lambda: corpus[[0]])
            times["cached"].append(seconds)
        assert torch.equal(batch.streams["audio"].x[0], values)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(
        json.dumps(
            {
                "speedup": round(middle["pandas"] / middle["mmemo"], 2),
                "cached": round(middle["pandas"] / middle["cached"], 1),
                "seconds": {name: round(s, 4) for name, s in middle.items()},
                "pandas": pd.__version__,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
