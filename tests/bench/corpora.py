"""Does the ladder hold on corpora that nobody tuned on?

Six rungs climb the default corpus with ten seeds, five other corpora of the same size (other seeds,
some with other knobs) and one with strong nuisance, and are measured by their share of what can be
explained on each corpus' own test items. The settings of the rungs were chosen on validation items
of corpora 101 and 102, which are none of these (but for the LoRA rung's four epochs: three were too
few for two seeds of the default corpus). Beside the nuisance stands ridge regression on the same
pooled features. A climb that is complete is read and not repeated, while rungs and corpus are what
they were.

Last line: {"default": {rung: [share of each seed]}, "others": {corpus: {rung: share}}, "nuisance":
{rung or "ridge": share of everything}}.
"""

import argparse
import json
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge
from transformers.utils import logging

from mmemo.core.files import write_whole
from mmemo.core.identity import fingerprint_object
from mmemo.data.standards import split_of
from mmemo.evaluation.classical import Classical, fit_chosen
from mmemo.evaluation.xray import explained_share
from mmemo.experiments.ladder import RUNGS, climb_rung, ladder_views, rung_view
from mmemo.models.base import predict
from mmemo.models.text import TextEncoder
from mmemo.synthetic.factors import INFORMATION
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import known_answer

# {name: (seed of the corpus, what is turned)}
CORPORA = {
    "default": (0, {}),
    "seed 77": (77, {}),
    "seed 78": (78, {}),
    "weak evidence": (79, {"evidence": 0.8}),
    "noisy labels": (80, {"label_noise": 2.0}),
    "hard items": (81, {"difficulty": 0.5}),
    "nuisance": (82, {"speaker": 0.5, "missing_modality": 0.1, "label_noise": 2.0}),
}


def ridge_share(pooled, knobs: Knobs) -> float:
    "The share of everything that ridge regression explains, its strength chosen on validation."
    x = {k: np.concatenate([s.x[:, 0] for s in b.streams.values()], 1) for k, b in pooled.items()}
    ridge = Classical(Ridge(), {"alpha": np.logspace(1, 6, 6)})
    seen = torch.cat([pooled[k].targets["phq8"] for k in ("train", "valid")])
    split = np.split(np.arange(len(seen)), [len(pooled["train"])])
    both = np.concatenate([x["train"], x["valid"]])
    best = fit_chosen(ridge, both, seen, [split], "rmse").model
    said = torch.tensor(best.predict(x["test"])).float()
    return explained_share(said, pooled["test"], INFORMATION["attention"], knobs).value


def climb(corpus: str, seed: int, items: int, out: Path) -> Path:
    "One seed of the six rungs on a corpus; where its shares are."
    what = fingerprint_object([RUNGS, CORPORA[corpus]], "the climb")
    path = out / f"{corpus}-{items}-{seed}-{what[:8]}.json"
    if path.exists():
        return path
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    at, turned = CORPORA[corpus]
    knobs, text = Knobs(**turned), TextEncoder.pretrained("mmemo-tiny")
    data = known_answer(items, seed=at, knobs=knobs)
    views = ladder_views({k: split_of(data, k) for k in ("train", "valid", "test")}, text)
    del data
    found, lora = {"ridge": [None, ridge_share(views["pooled"], knobs)]}, None
    for name, rung in RUNGS.items():
        parts = rung_view(rung, views, lora)
        model, _ = climb_rung(rung, parts, text, seed)
        lora = model if name == "lora" else lora
        said, test = predict(model, parts["test"])["phq8"], parts["test"]
        # of what the rung can hear, and of everything
        found[name] = [
            explained_share(said, test, hears, knobs).value
            for hears in (rung.hears, INFORMATION["attention"])
        ]
    write_whole(path, json.dumps(found).encode())
    return path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=8000, help="of a corpus")
    parser.add_argument("--seeds", type=int, default=10, help="of training, on the default corpus")
    parser.add_argument("--corpora", nargs="*", choices=CORPORA, default=list(CORPORA))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("_runs/corpora"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: {} for name in args.corpora}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        running = {
            pool.submit(climb, name, seed, args.items, args.out): (name, seed)
            for name in args.corpora
            for seed in range(args.seeds if name == "default" else 1)
        }
        for done in as_completed(running):
            name, seed = running[done]
            found[name][seed] = json.loads(done.result().read_text())
            shares = "  ".join(f"{k} {v[0]:.3f}" for k, v in found[name][seed].items() if v[0])
            print(f"{name}, seed {seed}: {shares}", flush=True)
    said = {"default": {}, "others": {}, "nuisance": {}}
    for name, seeds in found.items():
        runs = [seeds[seed] for seed in sorted(seeds)]
        if name == "default":
            said[name] = {rung: [round(run[rung][0], 4) for run in runs] for rung in RUNGS}
        elif name == "nuisance":
            said[name] = {k: round(v[1], 4) for k, v in runs[0].items()}
        else:
            said["others"][name] = {rung: round(runs[0][rung][0], 4) for rung in RUNGS}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
