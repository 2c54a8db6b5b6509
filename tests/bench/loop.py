"""What `fit` costs over the bare loop: same model, same data, same order, the two alternated in
one run.

Last line: {"added_us_per_step": median over rounds of fit - bare, "ratio_10ms": median of fit /
bare, the larger of two models whose step takes 10 ms or more}, and the same from the process's own
CPU time, which other work on the machine disturbs less. `fit` runs with everything on: log,
TensorBoard, progress bar, check for non-finite values. Both do the same mathematics (fused AdamW,
gradient clipped at norm 1): their losses are compared bit for bit. A step is timed from one call
of the objective to the next, so that set-up, saving and validation, which come once, are not in
it. `--no-clip` takes the clipping out of both.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import tempfile
from time import perf_counter, process_time

import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.state import epoch_order
from mmemo.training.loop import fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan, cut_updates
from mmemo.training.tracking import Tracking

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rounds", type=int, default=40, help="alternations of the small model")
parser.add_argument("--steps", type=int, default=120, help="updates of a round of the small model")
parser.add_argument("--no-clip", action="store_true")
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)


class Answer:
    def __init__(self, predictions):
        self.predictions = predictions


class Net(nn.Module):
    "Mean-pooled audio and video, projected, joined, one head: the smallest member of the family."

    def __init__(self, width: int):
        super().__init__()
        self.audio, self.video = (
            nn.Sequential(nn.Linear(F, width), nn.LayerNorm(width)) for F in (74, 14)
        )
        self.head = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )

    def forward(self, batch: Batch) -> Answer:
        pooled = [
            project(masked_mean(s.x, s.mask))
            for project, s in (
                (self.audio, batch.streams["audio"]),
                (self.video, batch.streams["video"]),
            )
        ]
        return Answer({"phq8": self.head(torch.cat(pooled, 1))[:, 0]})


def corpus(items: int) -> Batch:
    g = torch.Generator().manual_seed(0)

    def make(T, F, rate):
        return Stream.of(torch.randn(items, T, F, generator=g), rate=rate)

    return Batch(
        {"audio": make(40, 74, 100), "video": make(12, 14, 30)},
        {"phq8": torch.randn(items, generator=g)},
    )


class Temporal(nn.Module):
    "Convolutions over the audio frames: much arithmetic, few parameters."

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv1d(74, width, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(width, width, 3, padding=2, dilation=2),
            nn.GELU(),
        )
        self.head = nn.Linear(width, 1)

    def forward(self, batch: Batch) -> Answer:
        s = batch.streams["audio"]
        return Answer({"phq8": self.head(masked_mean(self.convs(s.x.mT).mT, s.mask))[:, 0]})


class Clock:
    "An objective that notes when it is called, and what it said."

    def __init__(self):
        self.wall, self.cpu, self.losses, self.inner = [], [], [], mse("phq8")

    def __call__(self, output, batch):
        self.wall.append(perf_counter())
        self.cpu.append(process_time())
        found = self.inner(output, batch)
        self.losses.append(found["loss"].detach())
        return found

    def step(self) -> tuple[float, float]:
        return tuple((t[-1] - t[0]) / (len(t) - 1) for t in (self.wall, self.cpu))


def bare(model, data, plan) -> Clock:
    clock, optimiser = (
        Clock(),
        torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=0.0, fused=True),
    )
    for [rows] in cut_updates(epoch_order(len(data), plan.seed, 0), plan):
        batch = data[rows]
        loss = clock(model(batch), batch)["loss"]
        loss.backward()
        if plan.clip:
            nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimiser.step()
        optimiser.zero_grad()
    return clock


def ours(model, data, plan) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        fit(model, clock, data, None, plan, tracking=Tracking(folder))
    return clock


def compare(
    model: nn.Module, batch_size: int, steps: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    data, start = corpus(batch_size * steps), copy.deepcopy(model.state_dict())
    plan = Plan(epochs=1, batch_size=batch_size, weight_decay=0, clip=None if args.no_clip else 1.0)
    times = {kind: {"bare": [], "fit": []} for kind in ("wall", "cpu")}
    for i in range(rounds + 1):
        clocks = {}
        for name in ("bare", "fit") if i % 2 else ("fit", "bare"):
            model.load_state_dict(start)
            clocks[name] = (bare if name == "bare" else ours)(model, data, plan)
            if i:  # the first round warms up
                for kind, value in zip(times, clocks[name].step()):
                    times[kind][name].append(value)
        assert torch.equal(torch.stack(clocks["bare"].losses), torch.stack(clocks["fit"].losses)), (
            "the two loops did not do the same"
        )
    return times


def added(times) -> float:
    return statistics.median((b - a) * 1e6 for a, b in zip(times["bare"], times["fit"]))


def ratio(times) -> float:
    return statistics.median(b / a for a, b in zip(times["bare"], times["fit"]))


def show(name, times) -> None:
    print(
        f"{name}: bare {statistics.median(times['wall']['bare']) * 1e3:.2f} ms a step, fit"
        f" {statistics.median(times['wall']['fit']) * 1e3:.2f} ms; CPU time"
        f" {statistics.median(times['cpu']['bare']) * 1e3:.2f} and"
        f" {statistics.median(times['cpu']['fit']) * 1e3:.2f} ms"
    )


torch.manual_seed(0)
small = compare(Net(32), 8, args.steps, args.rounds)
show("small", small)
large = {
    "wide": compare(Net(1100), 64, 30, max(5, args.rounds // 4)),
    "temporal": compare(Temporal(256), 32, 30, max(5, args.rounds // 4)),
}
for name, times in large.items():
    show(name, times)
print(
    json.dumps(
        {
            "added_us_per_step": round(added(small["wall"]), 1),
            "ratio_10ms": round(max(ratio(t["wall"]) for t in large.values()), 4),
            "added_cpu_us_per_step": round(added(small["cpu"]), 1),
            "ratio_10ms_cpu": round(max(ratio(t["cpu"]) for t in large.values()), 4),
        }
    )
)
