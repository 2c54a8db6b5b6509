"""The static rung on real corpora: RAVDESS on its actor folds, MELD's text on its test split. Needs MMEMO_DATA (folders ravdess/ and meld/).

Last line: {"ravdess": {"accuracy", "sd", "audio", "video"}, "meld": {"weighted_f1", "sd", "weights", ...}}
"""
import argparse
import json
import os
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--weights", nargs="+", default=["mmemo-tiny", "all-minilm-l6-v2"], help="text encoders for MELD; the last one is reported first")
options = parser.parse_args()
home = Path(os.environ.get("MMEMO_DATA") or parser.error("set MMEMO_DATA to the folder that holds ravdess/ and meld/"))

from mmemo.real import meld_static, ravdess_static

seeds = range(options.seeds)
ravdess = ravdess_static(home / "ravdess", seeds)
print(json.dumps(ravdess["scores"], indent=1))
scores = ravdess["scores"]
result = {"ravdess": {"accuracy": scores["static, audio + video"][0], "sd": scores["static, audio + video"][1], "audio": scores["static, audio"][0],
                      "video": scores["static, video"][0], "svm": scores["SVM, audio + video"][0]}}
for weights in options.weights:
    meld = meld_static(home / "meld", seeds, weights=weights)
    print(json.dumps(meld["scores"], indent=1))
    f1, sd = meld["scores"][f"static, frozen {weights}"]
    result["meld"] = {"weighted_f1": f1, "sd": sd, "weights": weights, "tfidf": meld["scores"]["TF-IDF"][0], **{k: v for k, v in result.get("meld", {}).items() if k.startswith("with ")},
                      f"with {weights}": f1}
print(json.dumps({k: {n: round(v, 4) if isinstance(v, float) else v for n, v in part.items()} for k, part in result.items()}))
