"""A fingerprint of what mmemo computes: did a change that should move no number move one?

`python tests/fingerprints.py --record FILE.json` writes it down; `--compare FILE.json` computes it
again, prints each entry that differs (name, then, now) and exits with 1 where there is any. One
process, one thread, no GPU, no network. Bits can be compared only on one kind of CPU and with the
same versions: the entry `about` holds those, and by itself is no difference. A value is the
beginning of a SHA-256 over all bytes, and then a few numbers to be read.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import process_time
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "WORLD_SIZE": "1"}

import numpy as np
import torch
import transformers
from pyarrow.parquet import read_table
from safetensors.torch import load_file
from torch import Tensor, nn

# All that is taken from mmemo: rewrite these lines when its modules have moved.
import mmemo
from mmemo.core.batch import Stream
from mmemo.data.splits import speaker_folds, speaker_split
from mmemo.data.standards import split_of
from mmemo.evaluation.metrics import (
    class_metrics,
    compare,
    regression_metrics,
    reliability,
    score_intervals,
)
from mmemo.evaluation.xray import xray
from mmemo.experiments.build import walk_recipe
from mmemo.experiments.ladder import RUNGS, climb_rung, ladder_views, rung_view
from mmemo.experiments.recipe import Recipe, list_recipes, load_recipe, load_suite, merge_forms
from mmemo.experiments.run import train_recipe
from mmemo.models.attention import Clock, CrossAttention
from mmemo.models.base import predict
from mmemo.models.fusion import FUSIONS, get_fusion
from mmemo.models.lora import add_lora
from mmemo.models.temporal import TCN, Resample
from mmemo.models.text import TextEncoder
from mmemo.synthetic.factors import INFORMATION, ceiling
from mmemo.synthetic.knobs import Knobs
from mmemo.synthetic.known_answer import known_answer

Found = Iterator[tuple[str, str]]  # names and values of entries

# Left out of metrics.json: what a run says of its machine, time and place.
MACHINE = ("commit", "versions", "device", "threads", "wall_seconds", "peak_memory_gb")
KNOBS = dict(label_noise=2.0, class_noise=0.3, imbalance=0.5, evidence=2.0, difficulty=0.7)
KNOBS |= dict(speaker=0.5, confound=0.6, corpora=2, room=0.5, prior=0.3, missing_frames=0.3)
KNOBS |= dict(missing_modality=0.3, scale_spread=0.5, items_per_speaker=3)
# What no shipped recipe asks for: (recipe, experiment, what is merged into it at smoke).
TWO = {"items": 192, "knobs": {"items_per_speaker": 2, "corpora": 2}}
ALONE, LOST = {"modalities": True}, {"knobs": {"missing_modality": 0.3}}
SURE, SPLIT = {"difficulty": "confidence"}, {"protocol": "split"}
OTHERS = {
    "cross": ("text_only", "plain", {"corpus": TWO, "evaluation": {"protocol": "cross_corpus"}}),
    "transductive": ("multimodal_baseline", "plain", {"speakers": {"normalise": True}}),
    "confidence": ("multimodal_baseline", "curriculum", {"curriculum": SURE, "evaluation": SPLIT}),
    "thaw": ("multimodal_fer", None, {"thaw": {"stages": [["heads.*"], ["*"]], "at": [0, 1]}}),
    "alone": ("fine_tune", None, {"corpus": LOST, "evaluation": ALONE}),
    "lost": ("fine_tune", None, {"fusion": {"modality_dropout": 0.3}}),
}


def leaves(value: Any) -> Iterator[Any]:
    """Tensors and plain values inside of mappings (by key), sequences, dataclasses and modules."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        value = [part for key in sorted(value) for part in (key, value[key])]
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def told(*values: Any) -> str:
    """The SHA-256 (its beginning) of all bytes; mean and root mean square of the real numbers."""
    digest, reals = hashlib.sha256(), [torch.zeros(0, dtype=torch.float64)]
    for leaf in leaves(values):
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().contiguous()
            digest.update(f"{leaf.dtype} {list(leaf.shape)}".encode())
            digest.update(leaf.flatten().view(torch.uint8).numpy().tobytes())
            reals += [leaf.flatten().double()] if leaf.is_floating_point() else []
        else:
            digest.update(f"{leaf!r} ".encode())
            reals += [torch.tensor([leaf]).double()] if isinstance(leaf, float) else []
    x = torch.cat(reals)
    x = x[x.isfinite()]
    means = f" mean {x.mean():.9g} rms {x.square().mean().sqrt():.9g}" if len(x) else ""
    return digest.hexdigest()[:16] + means


def listed(found: Mapping[str, Any]) -> str:
    """The SHA-256 of some metrics with their intervals, and then their values."""
    values = {k: v[0] if isinstance(v, list | tuple) else v for k, v in found.items()}
    numbers = [f"{k} {v:.9g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    return " ".join([told(found).split()[0], *numbers])


def corpus() -> Found:
    """The known-answer corpus: as it is, all knobs turned, each by itself, and forced factors."""
    yield "knobs", str(sorted(f.name for f in dataclasses.fields(Knobs)))
    coins = torch.tensor([[1.0, -1, 1, 1, -1, -1, 1]] * 3)
    made = {"plain": (40, 0, {}), "all": (300, 5, KNOBS), "forced": (3, 1, {"factors": coins})}
    made |= {knob: (24, 1, {knob: turned}) for knob, turned in KNOBS.items()}
    for name, (n, seed, knobs) in made.items():
        batch = known_answer(n, seed, **knobs)
        parts = batch.streams | {"targets": batch.targets, "meta": batch.meta}
        yield from ((f"{name}/{part}", told(value)) for part, value in parts.items())


def in_groups(records: list[dict]) -> dict[str, dict]:
    """The records of metrics.json that are no top-level numbers, in the groups that they were
    recorded in: of a part of the modalities, of folds, of own and other corpora, of their pairs."""
    groups: dict[str, dict] = {}
    for r in records:
        part, name = ("xray", r["factor"]) if "factor" in r else (r["task"], r["metric"])
        interval = [r["value"], r["low"], r["high"]]
        if "subset" in r:
            groups.setdefault(f"{part}, {r['subset']}", {})[name] = interval
        elif "across" in r:
            groups.setdefault(f"{part} {'across' if r['across'] else 'within'}", {})[name] = (
                interval
            )
        elif "test" in r:
            pairs = groups.setdefault("matrix", {}).setdefault(r["fold"], {})
            pairs.setdefault(r["test"], {}).setdefault(part, {})[name] = interval
        elif "fold" in r:
            folds = groups.setdefault("folds", {}).setdefault(r["fold"], {})
            folds.setdefault(part, {})[name] = r["value"]
    return groups


def trained(recipe: Recipe) -> Found:
    """What a run leaves behind: metrics.json, every step and epoch, predictions and weights."""
    with tempfile.TemporaryDirectory() as name:
        histories = train_recipe(recipe, folder := Path(name), track=())[0].values()
        metrics = json.loads((folder / "metrics.json").read_text())
        facts = {k: v for k, v in metrics.items() if k not in MACHINE}
        measured = {k: facts.pop(k) for k in list(facts) if isinstance(facts[k], dict)}
        measured |= in_groups(facts.pop("measured"))
        yield "/facts", listed(facts | measured.pop("items") | {"notes": len(facts["notes"])})
        for part, found in measured.items():  # folds and the matrix are long: a sum is enough
            yield f"/{part}", told(found) if part in ("folds", "matrix") else listed(found)
        losses = [s["loss"] for h in histories for s in h.steps]
        yield "/losses", f"{told(losses)} first {losses[0]:.9g} last {losses[-1]:.9g}"
        yield "/history", told([[h.steps, h.epochs] for h in histories])
        yield "/run.json", told(json.loads((folder / "run.json").read_text()))
        yield "/predictions", told(read_table(folder / "predictions.parquet").to_pydict())
        weights = [load_file(path) for path in sorted(folder.rglob("model.safetensors"))]
        yield "/weights", told([[w[key] for key in sorted(w)] for w in weights])
        yield "/keys", told([sorted(w) for w in weights])


def runs() -> Found:
    """Every recipe: its text at all scales, its walks, and what it is trained to at smoke."""
    for recipe in list_recipes():
        for experiment in load_suite(recipe).experiments:
            name = recipe if recipe == experiment else f"{recipe}-{experiment}"
            made = {s: load_recipe(recipe, s, experiment) for s in ("smoke", "laptop", "full")}
            yield f"{name}/text", told([r.model_dump() for r in made.values()])
            for scale in ("smoke", "full"):
                walk = walk_recipe(made[scale])
                sizes = f"{walk.params} parameters, {walk.trainable} learn, {walk.flops} FLOPs"
                table = told(repr(walk), walk.rows).split()[0]
                yield f"{name}/walk {scale}", f"{table} {len(walk.rows)} rows, {sizes}"
            yield from ((name + key, value) for key, value in trained(made["smoke"]))
    for name, (recipe, experiment, changes) in OTHERS.items():
        form = merge_forms(load_recipe(recipe, "smoke", experiment).model_dump(), changes)
        yield from ((name + key, value) for key, value in trained(Recipe.model_validate(form)))


def ladder() -> Found:
    """The six rungs as nbs/runs/ladder.ipynb trains them at smoke, its first seed."""
    answers, text = known_answer(640, seed=0), TextEncoder.pretrained("mmemo-tiny")
    raw = {name: split_of(answers, name) for name in ("train", "valid", "test")}
    views, models = ladder_views(raw, text, 25), {}
    for name, rung in RUNGS.items():
        parts = rung_view(rung, views, models.get("lora"))
        yield f"{name}/view", told([part.streams for part in parts.values()])
        model, history = climb_rung(rung, parts, text, 0, 16, epochs=1)
        models[name] = model
        yield f"{name}/losses", told([s["loss"] for s in history.steps])
        yield f"{name}/history", told(history.steps, history.epochs)
        yield f"{name}/weights", told(model)
        said = predict(model, parts["test"])
        yield from ((f"{name}/said {task}", told(x)) for task, x in said.items())
        yield f"{name}/xray", listed(xray(said["phq8"], parts["test"]))


def modules() -> Found:
    """Fusions and encoders on a ragged batch whose last items lack modalities, the last one all.

    Each as it begins; then, its weights stirred: its output, and its gradients in training."""
    torch.manual_seed(0)
    given, widths = {}, {"text": 12, "audio": 10, "video": 7}
    for (name, width), steps, lacks in zip(widths.items(), (9, 20, 15), (1, 3, 2), strict=True):
        mask, t = torch.rand(6, steps) > 0.2, torch.rand(6, steps).cumsum(1)
        mask[-lacks:] = False
        given[name] = Stream(torch.randn(6, steps, width), mask, t)
    text, audio, ids = given["text"], given["audio"], known_answer(6, 0).streams["text"]
    eight = [s.with_x(s.x[..., :8]) for s in (text, audio)]
    made = {f"fusion {n}": (lambda n=n: get_fusion(n, widths, 8), given) for n in FUSIONS}
    made["text"] = (lambda: TextEncoder.pretrained("mmemo-tiny"), ids)
    made["text lora"] = (lambda: add_lora(TextEncoder.pretrained("mmemo-tiny"), 2, 4, 0.1), ids)
    made["tcn"] = (lambda: TCN(10, 8), audio)
    made["tcn causal"] = (lambda: TCN(10, 8, 5, (1, 3), causal=True), audio)
    made["attention"] = (lambda: CrossAttention(8, 2), *eight)
    made["attention clock"] = (lambda: CrossAttention(8, 2, 0.1, Clock(2)), *eight)
    for name, (make, *streams) in made.items():
        torch.manual_seed(0)
        module = make()
        yield f"{name}/initial", told(module)
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
            yield f"{name}/output", told(module.eval()(*streams))
        noisy = module.train()(*streams)
        sum(x.square().sum() for x in leaves(noisy) if getattr(x, "grad_fn", None)).backward()
        yield f"{name}/training", told(noisy, [p.grad for p in module.parameters()])
    yield from ((f"resample {steps}", told(Resample(steps)(audio))) for steps in (4, 20, 50))


def measures() -> Found:
    """Ceilings, metrics with their intervals, comparisons, calibration, and splits by speaker."""
    for hears, factors in INFORMATION.items():
        for name, knobs in (("plain", Knobs()), ("all knobs", Knobs(**KNOBS))):
            tasks = ("phq8", "emotion", "sentiment")
            yield f"ceiling {hears}, {name}", listed({t: ceiling(factors, t, knobs) for t in tasks})
    rng = np.random.default_rng(0)
    label, who = rng.integers(5, size=80), [f"s{i}" for i in rng.integers(13, size=80)]
    a, b = (torch.from_numpy(rng.normal(size=(80, 5)) + 2 * np.eye(5)[label]) for _ in range(2))
    points = torch.from_numpy(rng.normal(size=80)) + a[:, 0]
    label[::9], points[::7] = -100, torch.nan
    yield "class", listed(class_metrics(a, label))
    yield "regression", listed(regression_metrics(a[:, 0], points))
    yield "intervals class", listed(score_intervals([a, b], label, who))
    yield "intervals regression", listed(score_intervals(a[:, 0], points, who))
    yield "compare class", listed(compare([a, b], [b, -a], label, who, "uar")._asdict())
    yield "compare regression", listed(compare(a[:, 0], b[:, 0], points, who)._asdict())
    yield "reliability", told(reliability(a, label))
    data = known_answer(90, 2, items_per_speaker=7)
    yield "speaker_split", told(speaker_split(data, seed=1))
    yield "folds", told(list(speaker_folds(data, 4, seed=1)))


def fingerprint() -> dict[str, str]:
    """All entries {name: value}."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    found = {"about": f"{cpu}, python {platform.python_version()}, {versions}"}
    for part in (corpus, modules, measures, ladder, runs):
        began, entries = process_time(), list(part())
        found |= {f"{part.__name__}/{name}": value for name, value in entries}
        seconds = process_time() - began
        print(f"{part.__name__}: {len(entries)} entries, {seconds:.0f} s of CPU", file=sys.stderr)
        if len(dict(entries)) < len(entries):
            raise SystemExit(f"{part.__name__}: two entries have one name")
    return found


def main() -> int:
    """Record, or compare and say what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", type=Path, metavar="FILE.json")
    what.add_argument("--compare", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    then = json.loads(given.compare.read_text()) if given.compare else {}
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(f"mmemo is {Path(mmemo.__file__).parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["MMEMO_CACHE"] = cache
        now = fingerprint()
    if given.record:
        given.record.write_text(json.dumps(now, indent=0) + "\n")
        print(f"{len(now)} entries recorded in {given.record}")
        return 0
    differ = [k for k in then | now if then.get(k, "absent") != now.get(k, "absent")]
    for name in differ:
        print(f"{name}\n  then {then.get(name, 'absent')}\n  now  {now.get(name, 'absent')}")
    print(f"{len(then | now) - len(differ)} of {len(then | now)} entries are bit-equal")
    return 1 if set(differ) - {"about"} else 0


if __name__ == "__main__":
    sys.exit(main())
