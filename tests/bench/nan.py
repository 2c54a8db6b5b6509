"""Does the guard name what made an update bad, does it keep quiet while nothing is wrong, and what
does it cost?

Faults of every kind are planted at random places of many architectures, half of them beside a
decoy (a NaN that is made and hidden at once) and beside unknown labels; `fit` meets them with a
`Guard`. A finding counts as right only if everything that is known of the fault is said: which
row, tensor or module, forward or backward, which operation. Some faults lie in the validation data,
some in a data set that draws noise, and some are met by two processes (under torchrun), both of
which must say the same. Faults that do not show (a clamp, a step that is not real) are drawn anew.
Then 1,000 healthy updates without an alarm, and the time of
an update: with the guard, and with nothing kept for it at all (no copies of buffers, no norms),
alternated.

Last line: {"planted": n, "named": n, "overhead": ratio}; `overhead` is the median ratio of CPU
time a step, the worse of two models.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import nn
from transformers.utils import logging

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError
from mmemo.diagnostics.guard import Guard
from mmemo.diagnostics.planted import FAULT_KINDS, RUN_KINDS, plant_decoy, plant_fault
from mmemo.diagnostics.replay import Finding, find_cause
from mmemo.models.audiovisual import R3D, WaveCNN
from mmemo.models.base import ClassHead, Frozen, Multimodal, Project, RegressionHead, Standardize
from mmemo.models.fusion import FUSIONS, ConcatNorm, get_fusion
from mmemo.models.mult import CrossModalConfig, CrossModalTransformer, LastState
from mmemo.models.normalized import NormalizedProject
from mmemo.models.temporal import TCN
from mmemo.models.text import TextEncoder
from mmemo.training import passes
from mmemo.training.loop import Hooks, fit
from mmemo.training.multitask import multitask
from mmemo.training.objectives import cross_entropy, mse, rmse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET
from mmemo.training.update import NonFiniteError, Trainer, _Buffers

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--faults", type=int, default=400)
parser.add_argument("--healthy", type=int, default=1000, help="updates without a fault")
parser.add_argument("--rounds", type=int, default=20, help="alternations of the timing")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--pair", type=Path, help="for torchrun: where each process writes its results")
args = parser.parse_args()
torch.set_num_threads(args.threads)
warnings.simplefilter("ignore")
logging.disable_progress_bar()
ITEMS, SIZE, H = 14, 7, 12


def corpus(items: int = ITEMS, seed: int = 0) -> Batch:
    "Three streams of features with gaps and missing modalities, frames, token ids, two targets."
    g = torch.Generator().manual_seed(seed)

    def stream(T, *tail, rate=10.0, ids=0):
        x = (
            torch.randint(5, ids, (items, T), generator=g)
            if ids
            else torch.randn(items, T, *tail, generator=g)
        )
        mask = torch.arange(T) < torch.randint(T // 2, T + 1, (items, 1), generator=g)
        return Stream.of(x, mask, rate=rate)

    streams = {
        "text": stream(9, 8),
        "audio": stream(17, 5),
        "video": stream(11, 6),
        "frames": stream(8, 3, 16, 16),
        "ids": stream(10, ids=140),
    }
    streams["video"].mask[3] = False
    y = streams["audio"].x.mean((1, 2)) * 5 + torch.randn(items, generator=g)
    return Batch(
        streams,
        {"y": y, "c": torch.randint(3, (items,), generator=g)},
        {"id": [f"item-{i}" for i in range(items)]},
    )


DATA = corpus()
F = {n: DATA.streams[n].x.shape[-1] for n in ("text", "audio", "video")}


def HEADS(width):
    return {"y": RegressionHead(width), "c": ClassHead(width, 3)}


BOTH = multitask({"y": (mse("y"), 1.0), "c": (cross_entropy("c", label_smoothing=0.1), 0.5)})


def scaled(n):
    return Standardize(DATA.streams[n].x.mean((0, 1)), DATA.streams[n].x.std((0, 1)) + 0.1)


widths = dict.fromkeys(F, H)


def zoo() -> dict:
    "{architecture: (model, streams that it reads, objective)}"
    made = {}
    for name in FUSIONS:
        made[f"fusion {name}"] = Multimodal(
            {
                n: NormalizedProject(f, H) if i % 2 else Project(f, H)
                for i, (n, f) in enumerate(F.items())
            },
            get_fusion(name, widths, H),
            HEADS(H),
        )
    made["TCN, cross attention"] = Multimodal(
        {n: nn.Sequential(scaled(n), TCN(f, H, dilations=(1, 2))) for n, f in F.items()},
        get_fusion("cross_attention", widths, H),
        HEADS(H),
    )
    mult = CrossModalTransformer(F, 8, CrossModalConfig(2, 2))
    made["cross-modal transformer"] = Multimodal(
        {n: nn.Identity() for n in F}, mult, HEADS(mult.out_width)
    )
    made["LSTM"] = Multimodal(
        {n: LastState(f, 10, H) for n, f in F.items()},
        get_fusion("normalized_concat", widths, H),
        HEADS(H),
    )
    made["1-D CNN, BatchNorm"] = Multimodal(
        {n: WaveCNN(f, (8, H)) for n, f in F.items()}, ConcatNorm(widths, H), HEADS(H)
    )
    made["frozen 1-D CNN, TCN"] = Multimodal(
        {
            n: nn.Sequential(
                scaled(n),
                Frozen(WaveCNN(f, (8, H))) if n == "audio" else TCN(f, H, dilations=(1, 2)),
            )
            for n, f in F.items()
        },
        get_fusion("gated", widths, H),
        HEADS(H),
    )
    made["BERT, TCN"] = Multimodal(
        {
            "ids": nn.Sequential(TextEncoder.pretrained("mmemo-tiny"), Project(192, H)),
            "audio": TCN(5, H, dilations=(1, 2)),
        },
        get_fusion("gated", {"ids": H, "audio": H}, H),
        HEADS(H),
    )
    made["r3d_18"] = Multimodal(
        {"frames": R3D(), "audio": Project(5, H)},
        get_fusion("concat", {"frames": 512, "audio": H}, H),
        HEADS(H),
    )
    return {
        name: (model, tuple(model.encoders), rmse("y") if name == "fusion concat" else BOTH)
        for name, model in made.items()
    }


def recipes() -> dict:
    "Models of the package's own recipes at smoke scale: {recipe: (model, data, objective)}"
    from mmemo.experiments.build import build_model, recipe_objective
    from mmemo.experiments.recipe import load_recipe
    from mmemo.experiments.sources import recipe_data

    made = {}
    for name in ("fine_tune_v1", "configurable_multimodal", "emotion2vec_text"):
        recipe = load_recipe(name, "smoke")
        parts = recipe_data(recipe)
        made[f"recipe {name}"] = (
            build_model(recipe, parts["train"]),
            parts["train"][list(range(ITEMS))],
            recipe_objective(recipe, parts["train"]),
        )
    return made


def unlabelled(data: Batch) -> Batch:
    "The same data, with two targets that are not known."
    if "y" not in data.targets:
        return data
    y = data.targets["y"].clone().index_fill_(0, torch.tensor([2, 9]), torch.nan)
    return Batch(data.streams, data.targets | {"y": y}, data.meta)


def mistakes(found: Finding, expect: dict) -> list[str]:
    "What a finding says that it must not say."
    wrong = [
        f"{k} {getattr(found, k)!r}, not {v!r}" for k, v in expect.items() if getattr(found, k) != v
    ]
    if found.kind == "operation" and not found.line:
        wrong.append("no source line")
    if found.kind != "operation" and found.overflow:
        wrong.append("an overflow")
    return wrong


def seek(
    name: str, model: nn.Module, data: Batch, objective, kind: str, seed: int
) -> tuple[str, str] | None:
    """One planted fault, met by `fit`: what was wrong with the finding ('' for nothing) and the
    finding; None where the fault did not show.
    """
    torch.manual_seed(seed)
    if seed % 2:
        model, data = plant_decoy(model, data, seed), unlabelled(data)
    faulty, spoilt, expect = plant_fault(model, data, kind, seed)
    train, valid = (data, spoilt) if kind == "validation" else (spoilt, None)
    plan = Plan(
        epochs=13 if kind == "fp16 gradient" else 1,
        batch_size=SIZE,
        seed=seed,
        precision="fp16" if kind.startswith("fp16") else "fp32",
        lr=1e-5,
        accumulate=1 if kind == "drawn data" else 1 + seed % 3 // 2,
        patience=1 if valid else None,
    )
    before, guard = {k: v.clone() for k, v in faulty.state_dict().items()}, Guard()
    wrong = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            history = fit(faulty, objective, train, valid, plan, QUIET, Hooks(guard=guard))
            told = [str(warning.message) for warning in heard]
            if any(epoch["valid"]["loss"] is None for epoch in history.epochs if valid):
                if history.best or not history.notes or history.notes[0] not in told:
                    wrong.append("the validation loss is NaN and nobody says so")
        except NonFiniteError:
            if valid:
                return None
    if guard.finding is None:
        return ("; ".join(wrong), "") if wrong else None
    found = guard.finding
    wrong += mistakes(found, expect)
    if str(find_cause(guard.bad)) != str(found):
        wrong.append("another finding when asked again")
    after = faulty.state_dict()
    if guard.bad.step == 1 and not valid:
        if not all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in after.items()):
            wrong.append("the model was changed")
    return "; ".join(wrong), str(found)


def everything() -> dict:
    "{architecture or recipe: (model, data, objective)}"
    made = {}
    for name, (model, streams, objective) in zoo().items():
        data = Batch({n: DATA.streams[n] for n in streams}, DATA.targets, DATA.meta)
        made[name] = (model, data, objective)
    return made | recipes()


def planted() -> tuple[int, int]:
    choice = everything()
    order = [FAULT_KINDS[i % len(FAULT_KINDS)] for i in range(args.faults)]
    names, done, kinds, seed = list(choice), Counter(), Counter(), args.seed * 100_000
    start = perf_counter()
    for kind in (kind for kind in order if kind != "two processes"):
        result = None
        # until one of this kind shows
        while result is None:
            seed += 1
            name = names[seed * 7 % len(names)]
            if name == "r3d_18" and done[name] >= 12:
                continue
            with contextlib.suppress(ConfigError):
                result = seek(name, *choice[name], kind, seed)
        done[name] += 1
        kinds[kind, not result[0]] += 1
        if result[0]:
            print(
                f"WRONG ({name}, {kind}, seed {seed}): {result[0]}\n      {result[1]}", flush=True
            )
    for name, wrong, said in met_by_two(order.count("two processes")):
        done[name] += 1
        kinds["two processes", not wrong] += 1
        if wrong:
            print(f"WRONG ({name}, two processes): {wrong}\n      {said}", flush=True)
    right = sum(n for (_, fine), n in kinds.items() if fine)
    print(f"\n{'fault':<24}{'planted':>8}{'named':>7}")
    for kind in FAULT_KINDS:
        print(f"{kind:<24}{kinds[kind, True] + kinds[kind, False]:>8}{kinds[kind, True]:>7}")
    print(
        f"\nin {len(done)} architectures: {', '.join(f'{n} {c}' for n, c in done.items())};"
        f" {perf_counter() - start:.0f} s"
    )
    return sum(done.values()), right


def met_by_two(faults: int) -> list[tuple[str, str, str]]:
    "Faults that two processes meet: of each the architecture, what was wrong, and the finding."
    if not faults:
        return []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with tempfile.TemporaryDirectory() as folder:
        given = ["--pair", folder, "--faults", str(faults), "--seed", str(args.seed)]
        subprocess.run([*launch, __file__, *given], check=True, capture_output=True, timeout=3600)
        said = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in (0, 1)]
    # both must be right
    return [(one[0], one[1] or other[1], one[2]) for one, other in zip(*said, strict=True)]


def fits_two(model: nn.Module, data: Batch) -> bool:
    "Is every parameter used, as the averaging of gradients between processes wants it?"
    probe = copy.deepcopy(model)
    BOTH(probe(data), data)["loss"].backward()
    return all(p.grad is not None for p in probe.parameters() if p.requires_grad)


def pair() -> None:
    "One of two processes: meets the faults of `met_by_two` and writes what was wrong."
    rank, results, seed = int(os.environ["RANK"]), [], args.seed * 100_000
    choice = everything()
    names = [name for name in choice if name in zoo() and fits_two(*choice[name][:2])]
    while len(results) < args.faults:
        seed += 1
        name = names[seed * 7 % len(names)]
        model, data, _ = choice[name]
        torch.manual_seed(seed)
        if seed % 2:
            model, data = plant_decoy(model, data, seed), unlabelled(data)
        faulty, data, expect = plant_fault(model, data, "two processes", seed)
        # a mean over items, and a function of which nobody can know that it is one
        objective = BOTH if seed % 4 < 2 else lambda output, batch: BOTH(output, batch)
        plan = Plan(epochs=1, batch_size=SIZE, seed=seed, lr=1e-5, accumulate=1 + seed % 3 // 2)
        guard = Guard()
        with contextlib.suppress(NonFiniteError):
            fit(faulty, objective, data, None, plan, QUIET, Hooks(guard=guard))
        if guard.finding is None:
            continue
        own = any(expect["row"] in rows for rows in guard.bad.rows)
        wrong = mistakes(guard.finding, expect | {"process": rank if own else 1 - rank})
        results.append((name, "; ".join(wrong), str(guard.finding)))
    (args.pair / f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)


def healthy() -> int:
    """Updates without a fault, with dropout, BatchNorm, gaps, missing modalities and labels,
    decoys: how many of them were there? An alarm ends the program.
    """
    steps, zoos = 0, [(n, *v) for n, v in zoo().items() if n not in ("r3d_18",)]
    while steps < args.healthy:
        name, model, streams, objective = zoos[steps % len(zoos)]
        data = corpus(56, steps)
        data = Batch(
            {n: data.streams[n] for n in streams},
            data.targets
            | {"y": data.targets["y"].index_fill(0, torch.arange(0, 56, 5), torch.nan)},
            data.meta,
        )
        history = fit(
            plant_decoy(model, data, steps),
            objective,
            data,
            data[:12],
            Plan(
                epochs=8, batch_size=SIZE, lr=1e-3, precision="bf16" if steps % 5 == 0 else "fp32"
            ),
            QUIET,
            Hooks(guard=(guard := Guard())),
        )
        assert guard.finding is None and not history.notes, (name, guard.finding)
        steps += len(history.steps)
    return steps


class Clock:
    "An objective that notes the process time when it is called."

    def __init__(self, inner):
        self.times, self.inner = [], inner

    def __call__(self, output, batch):
        self.times.append(process_time())
        return self.inner(output, batch)

    def step(self) -> float:
        return statistics.median(b - a for a, b in zip(self.times, self.times[1:]))


@contextlib.contextmanager
def nothing_kept():
    """`fit` as it would be without anything that the guard needs: no copies of buffers and no
    norms of earlier updates.
    """
    watch, count = Trainer.watch, passes.count_writes

    def blind(self):
        self.buffers = _Buffers(nn.Module())
        self.norms = type("Nowhere", (), {"append": lambda self, value: None})()

    Trainer.watch, passes.count_writes = blind, lambda batch: {}
    try:
        yield
    finally:
        Trainer.watch, passes.count_writes = watch, count


class Voice(nn.Module):
    "Convolutions with BatchNorm, or a TCN, over 40 steps of sound: about 10 ms a step."

    def __init__(self, norm: bool):
        super().__init__()
        self.net, self.norm, self.head = (
            (WaveCNN(74, (96, 96)) if norm else TCN(74, 48)),
            nn.BatchNorm1d(96 if norm else 48),
            nn.Linear(96 if norm else 48, 1),
        )

    def forward(self, batch):
        s = self.net(batch.streams["audio"])
        return type(
            "Out", (), {"predictions": {"y": self.head(self.norm(masked_mean(s.x, s.mask)))[:, 0]}}
        )()


def others() -> None:
    """What two known tools say of the same faults, and what each costs in every update that it
    watches (CPU time, medians of alternated updates).
    """
    from transformers.debug_utils import DebugUnderflowOverflow

    model, streams, objective = zoo()["fusion cross_attention"]
    data = Batch({n: DATA.streams[n] for n in streams}, DATA.targets, DATA.meta)

    def anomaly(net, batch):
        with torch.autograd.detect_anomaly():
            objective(net(batch), batch)["loss"].backward()

    def hooks(net, batch):
        DebugUnderflowOverflow(net)
        objective(net(batch), batch)["loss"].backward()

    tools, score, trials = (
        {"torch.autograd.detect_anomaly": anomaly, "transformers' DebugUnderflowOverflow": hooks},
        Counter(),
        0,
    )
    for kind in (kind for kind in FAULT_KINDS if kind not in RUN_KINDS):
        for seed in range(2):
            torch.manual_seed(seed)
            try:
                faulty, batch, truth = plant_fault(model, data, kind, seed + 50)
            except ConfigError:
                continue
            guard = Guard()
            try:
                fit(
                    copy.deepcopy(faulty),
                    objective,
                    batch,
                    None,
                    Plan(epochs=1, batch_size=ITEMS),
                    QUIET,
                    Hooks(guard=guard),
                )
            except NonFiniteError:
                trials += 1
            if guard.finding is None:
                continue
            score["find"] += all(
                getattr(guard.finding, k) == v for k, v in truth.items() if k != "overflow"
            )
            for tool, run in tools.items():
                with contextlib.redirect_stdout(io.StringIO()) as said:
                    try:
                        run(copy.deepcopy(faulty).train(), batch)
                    except (RuntimeError, ValueError) as error:
                        score[tool] += truth["name"] in f"{said.getvalue()[-1500:]} {error}"
    cost = {tool: [] for tool in (None, *tools)}
    watched = copy.deepcopy(model)
    DebugUnderflowOverflow(watched)
    for _i in range(11):
        for tool in cost:
            start = process_time()
            with (
                (
                    torch.autograd.detect_anomaly()
                    if tool and "anomaly" in tool
                    else contextlib.nullcontext()
                ),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                net = watched if tool and "Debug" in tool else model
                objective(net(data), data)["loss"].backward()
            cost[tool].append(process_time() - start)
    title = f"on {trials} faults of one architecture"
    print(f"\n{title:<40}{'names the place':>16}{'x a step':>10}")
    bare = statistics.median(cost[None])
    for tool in tools:
        slower = statistics.median(cost[tool]) / bare
        print(f"{tool:<40}{score[tool]:>16}{slower:>10.2f}")
    print(f"{'Guard':<40}{score['find']:>16}{'(below)':>10}")


def overhead() -> float:
    g = torch.Generator().manual_seed(0)
    data = Batch(
        {"audio": Stream.of(torch.randn(32 * 16, 40, 74, generator=g), rate=100)},
        {"y": torch.randn(32 * 16, generator=g)},
    )
    worst = 0.0
    for norm in (True, False):
        times = {"without": [], "with": []}
        for i in range(args.rounds + 1):
            for kind in ("without", "with") if i % 2 else ("with", "without"):
                torch.manual_seed(0)
                model, clock = Voice(norm), Clock(mse("y"))
                with nothing_kept() if kind == "without" else contextlib.nullcontext():
                    fit(
                        model,
                        clock,
                        data,
                        None,
                        Plan(epochs=2, batch_size=32),
                        QUIET,
                        Hooks(guard=Guard() if kind == "with" else None),
                    )
                if i:
                    times[kind].append(clock.step())
        ratio = statistics.median(b / a for a, b in zip(*times.values()))
        print(
            f"{'convolutions with BatchNorm' if norm else 'TCN'}:"
            f" {statistics.median(times['without']) * 1e3:.2f} ms of CPU time a step, with the"
            f" guard {statistics.median(times['with']) * 1e3:.2f} ms: x {ratio:.4f}"
        )
        worst = max(worst, ratio)
    return worst


if __name__ == "__main__":
    if args.pair:
        pair()
    count, right = planted()
    print(f"{healthy()} healthy updates, no alarm", flush=True)
    others()
    print(json.dumps({"planted": count, "named": right, "overhead": round(overhead(), 4)}))
