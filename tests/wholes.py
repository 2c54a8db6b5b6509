"""One update, cut in every way, also over several processes: what `test_update` compares.

`python tests/wholes.py FOLDER` does it in two and in three processes.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys

import torch
from safetensors.torch import save_file
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.models.base import ClassHead, ConcatFusion, MeanPool, Multimodal, Project, RegressionHead
from mmemo.training.contrastive import contrastive
from mmemo.training.curriculum import scaled_cross_entropy
from mmemo.training.multitask import multitask
from mmemo.training.objectives import ccc, cross_entropy, mse, rmse
from mmemo.training.plan import Plan
from mmemo.training.update import Trainer

ITEMS, WEIGHT = 23, torch.tensor([0.3, 1.0, 4.0])
# sizes of the batches of an update; the last ones leave a process of several without a row
CUTS = {1: [23], 2: [12, 11], 3: [9, 9, 5], 5: [5, 5, 5, 5, 3], 8: [3] * 7 + [2]}


def plain(output, batch: Batch) -> dict:
    "A function of a user: mean and spread of the errors; nobody can know what it divides by."
    error = (output.predictions["y"] - batch.targets["y"]).nan_to_num().abs()
    return {"loss": error.mean() + error.std(), "largest": error.max().detach()}


# heads, and what is made small
OBJECTIVES = {
    "mse": ("y", mse("y")),
    "rmse": ("y", rmse("y")),
    "ccc": ("y", ccc("y")),
    "cross-entropy": ("c", cross_entropy("c")),
    "class weights": ("c", cross_entropy("c", weight=WEIGHT)),
    "smoothing and weights": ("c", cross_entropy("c", weight=WEIGHT, label_smoothing=0.2)),
    "scaled": ("c", scaled_cross_entropy("c", "d", 1.0, weight=WEIGHT)),
    "contrastive": ("z", contrastive("z", "c")),
    "several means": (
        "yc",
        multitask({"y": (mse("y"), 0.5), "c": (cross_entropy("c", weight=WEIGHT), 1.0)}),
    ),
    "means and others": (
        "ycz",
        multitask(
            {
                "y": (rmse("y"), 0.5),
                "c": (cross_entropy("c"), 1.0),
                "z": (contrastive("z", "c"), 0.3),
            }
        ),
    ),
    "a plain function": ("y", plain),
}
# what several processes are tried with: a mean, one with weights, two means, and what is no mean
SHARED = ("mse", "class weights", "several means", "means and others", "a plain function")
SHARED_CUTS = (1, 3, 8)


def data() -> Batch:
    "Items of which many are not labelled; the first batches of some cuts know nobody."
    g = torch.Generator().manual_seed(0)
    y, c = torch.randn(ITEMS, generator=g), torch.randint(3, (ITEMS,), generator=g)
    y[:9], y[15] = torch.nan, torch.nan
    c[3:6], c[12] = -100, -100
    x = torch.randn(ITEMS, 4, 5, generator=g)
    return Batch(
        {"audio": Stream.of(x, rate=10)}, {"y": y, "c": c, "d": torch.rand(ITEMS, generator=g)}
    )


def network(names: str) -> Multimodal:
    "A small model with those heads that an objective looks at; DDP wants a gradient for each."
    torch.manual_seed(1)
    heads = {"y": RegressionHead(6), "c": ClassHead(6, 3), "z": nn.Linear(6, 4)}
    heads = {name: head for name, head in heads.items() if name in names}
    encoder = nn.Sequential(MeanPool(), Project(5, 6))
    return Multimodal({"audio": encoder}, ConcatFusion({"audio": 6}, 6, 0.0), heads)


def update(name: str, cut: list[int], objective=None) -> tuple[dict, nn.Module]:
    "The record of one update in batches of these sizes, and the model after it."
    heads, usual = OBJECTIVES[name]
    model, items, pieces, start = network(heads), data(), [], 0
    for size in cut:
        pieces.append(range(start, start + size))
        start += size
    plan = Plan(optimiser="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, clip=None)
    run = Trainer(model, objective or usual, plan, len(items))
    mine = iter([items[list(run.share(piece)[0])] for piece in pieces])
    return run.update(pieces, mine, 1.0, {"step": 1, "epoch": 0}), model


def one_of_several(rank: int, processes: int, port: int, path: str) -> None:
    "What torchrun would start; the first process writes all records and weights."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    records, weights = {}, {}
    for name in SHARED:
        for parts in SHARED_CUTS:
            record, model = update(name, CUTS[parts])
            records[f"{name}/{parts}"] = record
            for key, value in model.state_dict().items():
                weights[f"{name}/{parts}/{key}"] = value.clone()
    if rank == 0:
        save_file(weights, path, {"records": json.dumps(records)})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def several(folder: str) -> None:
    """Two processes, then three, forked from this one, which has imported everything and has no
    threads; each group writes `folder/PROCESSES.safetensors`.
    """
    torch.set_num_threads(1)
    # DDP imports it when it is made, which takes longer than all the rest
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    for processes in (2, 3):
        port, path = free_port(), f"{folder}/{processes}.safetensors"
        started = [
            context.Process(target=one_of_several, args=(rank, processes, port, path))
            for rank in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            sys.exit(f"{processes} processes: {[process.exitcode for process in started]}")


if __name__ == "__main__":
    several(sys.argv[1])
