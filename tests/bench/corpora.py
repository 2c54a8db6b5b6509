"""Does the ladder hold on corpora that nobody tuned on, and how much does each rung need?

Six rungs climb the default corpus with ten seeds, five other corpora of the same size (other seeds,
other weights of the factors), one with strong nuisance, with and without subtracting each person's
mean, and the default corpus with 1,000 to 16,000 items. A rung is measured by its share of what can
be explained, on each corpus' own test items. Its settings were chosen on corpora 101 to 103, which
are none of these (but for the LoRA rung's four epochs: three were too few for two seeds of the
default corpus). Beside the nuisance stands ridge regression on the same features, its strength
chosen on validation items. A climb that was stopped goes on; one that is complete is kept in --out
and is not repeated, while the code of the package is what it was.

Last line: {"default": {rung: [share of each seed]}, "others": {corpus: {rung: share}}, "nuisance":
{treatment: {model: share of everything}}, "items": {items: {rung: share}}}.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import Ridge
from transformers.utils import logging

from mmemo.core.files import fingerprint_files, write_whole
from mmemo.data.standards import split_of
from mmemo.evaluation.classical import Classical, fit_chosen
from mmemo.evaluation.protocols import normalise_by_speaker
from mmemo.evaluation.xray import explained_share
from mmemo.experiments.climb import Climb, ClimbOptions
from mmemo.experiments.ladder import RUNGS, ladder_views
from mmemo.models.text import TextEncoder
from mmemo.synthetic.factors import INFORMATION
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import known_answer

PACKAGE = Path(__file__).resolve().parents[2] / "mmemo"
ITEMS, CURVE = 8000, (1000, 2000, 4000, 16000)
# points of tone, face, words, negation, contour, onset, emphasis, sarcasm
WEIGHTS = {
    "voice counts": (2.5, 0.8, 1.2, 1.2, 2.2, 0.8, 1.5, 1.5),
    "face counts": (0.8, 2.5, 1.2, 1.2, 0.8, 2.2, 1.2, 1.2),
    "words count": (0.8, 0.8, 2.4, 2.2, 0.8, 0.8, 1.5, 1.8),
}
OTHERS = {
    "seed 77": (77, {}),
    "seed 78": (78, {}),
    **{name: (79 + i, {"factor_weights": w}) for i, (name, w) in enumerate(WEIGHTS.items())},
}
NUISANCE = (82, {"speaker": 0.5, "missing_modality": 0.1, "label_noise": 2.0})
TREATMENTS = ("as it is", "minus the person's mean")
EVERYTHING = INFORMATION["attention"]


def ridge_shares(views, knobs: Knobs) -> dict[str, float]:
    "What ridge regression explains of everything, from means and from whole sequences."

    def features(key, view):
        text = views["pooled"][key].streams["text"].x[:, 0]
        rest = [views[view][key].streams[n].x.flatten(1) for n in ("audio", "video")]
        return torch.cat([text, *rest], 1).numpy()

    test, found = views["pooled"]["test"], {}
    seen = torch.cat([views["pooled"][key].targets["phq8"] for key in ("train", "valid")])
    split = np.split(np.arange(len(seen)), [len(views["pooled"]["train"])])
    ridge = Classical(Ridge(solver="cholesky"), {"alpha": np.logspace(1, 6, 6)})
    for name, view in (("ridge on means", "pooled"), ("ridge on sequences", "sequence")):
        x = np.concatenate([features("train", view), features("valid", view)])
        best = fit_chosen(ridge, x, seen, [split], "rmse").model
        said = torch.tensor(best.predict(features("test", view))).float()
        found[name] = explained_share(said, test, EVERYTHING, knobs).value
    return found


def measure(out: Path, what: dict, seeds: int = 1) -> dict:
    """The shares of all rungs on a corpus {seed, knobs, items, treatment}: {model: {"own": [of each
    seed], "all": [...]}}.
    """
    code = fingerprint_files(PACKAGE, sorted(PACKAGE.rglob("*.py")))
    path = out / f"{'-'.join(map(str, (what['seed'], what['items'], what['treatment'])))}.json"
    about = json.loads(json.dumps({"what": what, "seeds": seeds, "code": code}))
    if path.exists() and (kept := json.loads(path.read_text()))["about"] == about:
        return kept["shares"]
    knobs, text = Knobs(**what["knobs"]), TextEncoder.pretrained("mmemo-tiny")
    climb = Climb(path.with_suffix(""), what, range(seeds), ClimbOptions())
    data = known_answer(what["items"], seed=what["seed"], knobs=knobs)
    if what["treatment"] != TREATMENTS[0]:
        data = normalise_by_speaker(data, ("audio", "video"))
    views = ladder_views({k: split_of(data, k) for k in ("train", "valid", "test")}, text)
    del data
    for name, parts in views.items():
        climb.add_view(name, parts)
    ridge = ridge_shares(views, knobs).items()
    shares, test = {name: {"all": [share]} for name, share in ridge}, views["pooled"]["test"]
    for name, rung in RUNGS.items():
        said = climb.said(name)
        shares[name] = {
            kind: [explained_share(one, test, hears, knobs).value for one in said]
            for kind, hears in (("own", rung.hears), ("all", EVERYTHING))
        }
    write_whole(path, json.dumps({"about": about, "shares": shares}).encode())
    climb.close(forget=True)
    return shares


def rounded(shares: dict, kind: str) -> dict:
    "The first seed's share of each model."
    return {name: round(found[kind][0], 4) for name, found in shares.items() if kind in found}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("default", "others", "nuisance", "items")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--seeds", type=int, default=10, help="of training, on the default corpus")
    parser.add_argument("--items", type=int, default=ITEMS, help="of a corpus")
    parser.add_argument("--out", type=Path, default=Path("_runs/corpora"))
    parser.add_argument("--keep", type=Path, help="a file that takes the last line, indented")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    said = {part: {} for part in parts}

    def corpus(seed, knobs, items=args.items, treatment=TREATMENTS[0]):
        return dict(seed=seed, knobs=knobs, items=items, treatment=treatment)

    def show(label, found):
        print(f"{label:<34}", "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)

    if "default" in args.parts:
        shares = measure(args.out, corpus(0, {}), args.seeds)
        for rung in RUNGS:
            said["default"][rung] = [round(share, 4) for share in shares[rung]["own"]]
            show(rung, {"lowest": min(said["default"][rung]), "each": said["default"][rung]})
    for name, (seed, knobs) in OTHERS.items() if "others" in args.parts else ():
        said["others"][name] = rounded(measure(args.out, corpus(seed, knobs)), "own")
        show(name, said["others"][name])
    for treatment in TREATMENTS if "nuisance" in args.parts else ():
        found = measure(args.out, corpus(*NUISANCE, treatment=treatment))
        said["nuisance"][treatment] = rounded(found, "all")
        show(f"nuisance, {treatment}", said["nuisance"][treatment])
    for items in CURVE if "items" in args.parts else ():
        said["items"][items] = rounded(measure(args.out, corpus(0, {}, items)), "own")
        show(f"{items:,} items", said["items"][items])
    if args.keep:
        command = "python tests/bench/corpora.py --keep " + args.keep.as_posix()
        kept = {"command": command, **said}
        write_whole(args.keep, (json.dumps(kept, indent=1) + "\n").encode())
    print(json.dumps(said))


if __name__ == "__main__":
    main()
