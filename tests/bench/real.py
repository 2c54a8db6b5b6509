"""The static rung on real corpora: RAVDESS on its actor folds, MELD's text on its test split.

Needs MMEMO_DATA (folders ravdess/ and meld/).

Last line: {"ravdess": {"accuracy", "sd", "audio", "video"}, "meld": {"weighted_f1", "sd",
"weights", ...}}
"""

import argparse
import json
import os
from pathlib import Path

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument(
    "--weights",
    nargs="+",
    default=["mmemo-tiny", "all-minilm-l6-v2"],
    help="text encoders for MELD; the last one is the headline",
)
options = parser.parse_args()
home = Path(
    os.environ.get("MMEMO_DATA")
    or parser.error("set MMEMO_DATA to the folder that holds ravdess/ and meld/")
)

from mmemo.experiments.baselines import meld_static, ravdess_static  # noqa: E402 - the usage first

seeds = range(options.seeds)
ravdess = ravdess_static(home / "ravdess", seeds)
print(json.dumps(ravdess["scores"], indent=1))
scores = ravdess["scores"]
result = {
    "ravdess": {
        "accuracy": scores["static, audio + video"][0],
        "sd": scores["static, audio + video"][1],
        "audio": scores["static, audio"][0],
        "video": scores["static, video"][0],
        "svm": scores["SVM, audio + video"][0],
    }
}
meld = meld_static(home / "meld", seeds, weights=options.weights)["scores"]
print(json.dumps(meld, indent=1))
f1, sd = meld[f"static, frozen {options.weights[-1]}"]
result["meld"] = {
    "weighted_f1": f1,
    "sd": sd,
    "weights": options.weights[-1],
    "tfidf": meld["TF-IDF"][0],
    "each": {w: meld[f"static, frozen {w}"] for w in options.weights},
}
print(json.dumps(result))
