"""What `fit` costs on each rung of the ladder: against a bare loop with the same modules, and
against the same model in Hugging Face Trainer.

The three take turns in one run, on the same batches in the same order, and must come to the same
losses (dropout and weight decay are off for that). A step is timed from one call of the objective
to the next: set-up, saving and validation, which come once, are not in it. `fit` and the Trainer
both run with their progress bars and logs on. Last line: {rung: {"vs_bare": ratio,
"vs_hf_trainer": ratio, "step_ms": of the bare loop}}, medians over rounds.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import statistics
import tempfile
import warnings
from time import perf_counter

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from mmemo.core.state import epoch_order
from mmemo.data.standards import split_of
from mmemo.experiments.ladder import RUNGS, ladder_views, prepare_view
from mmemo.models.text import TextEncoder
from mmemo.synthetic.known_answer import known_answer
from mmemo.training.loop import fit
from mmemo.training.plan import Plan, cut_updates
from mmemo.training.tracking import Tracking

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--rounds", type=int, default=7, help="alternations, after one to warm up")
parser.add_argument("--steps", type=int, default=20, help="updates of a round")
parser.add_argument("--rungs", default=",".join(RUNGS))
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)
logging.set_verbosity_error()
logging.disable_progress_bar()
warnings.simplefilter("ignore")


class Clock:
    "An objective that notes when it is called, and what it said."

    def __init__(self, inner):
        self.times, self.losses, self.inner = [], [], inner

    def __call__(self, output, batch):
        self.times.append(perf_counter())
        found = self.inner(output, batch)
        self.losses.append(found["loss"].detach())
        return found

    def step(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def bare(model, objective, data, plan) -> Clock:
    clock = Clock(objective)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=plan.lr, weight_decay=0.0, fused=True
    )
    model.train()
    for [rows] in cut_updates(epoch_order(len(data), plan.seed, 0), plan):
        batch = data[rows]
        clock(model(batch), batch)["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimiser.step()
        optimiser.zero_grad()
    return clock


def ours(model, objective, data, plan) -> Clock:
    clock = Clock(objective)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        fit(model, clock, data, None, plan, tracking=Tracking(folder))
    return clock


class WithLoss(nn.Module):
    "The model as the Trainer wants it: its forward returns the loss."

    def __init__(self, model, objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch):
        return {"loss": self.objective(self.model(batch), batch)["loss"]}


def trainer(model, objective, data, plan) -> Clock:
    clock = Clock(objective)
    batches = [rows for [rows] in cut_updates(epoch_order(len(data), plan.seed, 0), plan)]

    class InOrder(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                range(len(data)),
                batch_sampler=batches,
                collate_fn=lambda rows: {"batch": data[rows]},
            )

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        options = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=plan.batch_size,
            learning_rate=plan.lr,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=plan.clip,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            use_cpu=True,
            logging_steps=10,
            dataloader_pin_memory=False,
        )
        InOrder(WithLoss(model, clock), options, train_dataset=range(len(data))).train()
    return clock


def measure(rung, parts, text) -> dict[str, float]:
    torch.manual_seed(0)
    model, objective = rung.build(parts["train"], text, rung.width), rung.objective(parts["train"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plan = Plan(
        epochs=1, batch_size=rung.plan.batch_size, lr=1e-3, weight_decay=0.0, drop_last=True
    )
    rows = [i % len(parts["train"]) for i in range(plan.batch_size * args.steps)]
    data, start = parts["train"][rows], copy.deepcopy(model.state_dict())
    ways, times = (
        {"bare": bare, "fit": ours, "trainer": trainer},
        {"bare": [], "fit": [], "trainer": []},
    )
    for i in range(args.rounds + 1):
        clocks = {}
        for name in list(ways)[i % 3 :] + list(ways)[: i % 3]:
            model.load_state_dict(start)
            clocks[name] = ways[name](model, objective, data, plan)
        for name in ("fit", "trainer"):
            torch.testing.assert_close(
                torch.stack(clocks[name].losses),
                torch.stack(clocks["bare"].losses),
                rtol=1e-4,
                atol=1e-4,
                msg=lambda m, n=name, r=rung.name: f"{r}: {n} is not the bare loop: {m}",
            )
        if i:  # the first round warms up
            for name in ways:
                times[name].append(clocks[name].step())

    def ratio(other):
        return round(statistics.median(f / o for f, o in zip(times["fit"], times[other])), 4)

    found = {
        "vs_bare": ratio("bare"),
        "vs_hf_trainer": ratio("trainer"),
        "step_ms": round(statistics.median(times["bare"]) * 1e3, 2),
    }
    print(f"{rung.name:<11}", found, flush=True)
    return found


data = known_answer(2000, seed=0)
raw, text = {"train": split_of(data, "train")}, TextEncoder.pretrained("mmemo-tiny")
views = ladder_views(raw, text)
views["tuned"] = prepare_view(views["ids"], "tuned", text, ("text",))
views["sequence"] = prepare_view(views["sequence"], "sequence", text, ("text",))
print(
    json.dumps(
        {
            name: measure(RUNGS[name], views[RUNGS[name].view], text)
            for name in args.rungs.split(",")
        }
    )
)
