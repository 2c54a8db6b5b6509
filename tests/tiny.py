"""A small net with dropout and BatchNorm, a small data set, and one run of `fit`, to be killed or
to be run by torchrun.
"""

import faulthandler
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.training.finetune import Thaw
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import MeanObjective, mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import Tracking

# a folder where fsync costs nothing
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Answer:
    def __init__(self, predictions):
        self.predictions = predictions


class Tiny(nn.Module):
    def __init__(self, dropout: float = 0.2, norm: bool = True):
        super().__init__()
        self.encoder, self.norm = nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(16, 1)

    def forward(self, batch: Batch) -> Answer:
        s = batch.streams["audio"]
        return Answer(
            {
                "y": self.head(
                    self.drop(self.norm(torch.relu(self.encoder(masked_mean(s.x, s.mask)))))
                )[:, 0]
            }
        )


def tiny(seed: int = 0, **options) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(**options)


def items(n: int, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, 6, generator=g)
    y = x.mean(1) @ torch.tensor([1.0, -2, 3, 0, 0, 1]) + 0.1 * torch.randn(n, generator=g)
    return Batch({"audio": Stream.of(x, rate=100)}, {"y": y})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


class Killed(BaseException):
    "A process that ends here: nothing of fit may catch it and tidy up."


def crashing(at: int):
    "A wrapper of operations that all count together; the `at`-th call ends the process instead."
    count = [0]

    def counted(operation):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                raise Killed
            return operation(*args, **kwargs)

        return run

    return counted


def watched(look) -> MeanObjective:
    "The squared error of `y`, whose entries go through `look(entries)` each time they are made."
    inner = mse("y")

    def entries(output, batch, counts):
        return look(inner.entries(output, batch, counts))

    return MeanObjective(inner.counts, entries)


def Kill(at: int) -> MeanObjective:
    "An objective that ends the process at its n-th call."
    left = [at]

    def look(entries):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return entries

    return watched(look)


def fit_in(folder, model, plan, objective=None, **hooks):
    """A quiet run in a folder, which goes on where an earlier one was: the model and its history.

    The items are those that most tests learn from and watch; `hooks` are those of `Hooks`.
    """
    data, tracking = (items(44), items(20, seed=1)), Tracking(folder, progress=False, track=())
    return model, fit(model, objective or mse("y"), *data, plan, tracking, Hooks(**hooks))


def assert_same_run(a, b):
    (one, first), (two, second) = a, b
    assert first.steps == second.steps and first.epochs == second.epochs and same(one, two)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(
        b"".join(v.numpy().tobytes() for v in model.state_dict().values())
    ).hexdigest()


def run(folder, plan: dict, out=None, slow: float = 0.0) -> None:
    """One run of `fit`, as a process of its own may do it; `slow` makes each update sleep, so that
    a kill can hit it.
    """
    torch.set_num_threads(1)
    model = tiny(dropout=plan.pop("dropout", 0.2), norm=plan.pop("norm", True))

    def look(entries):
        if slow:
            time.sleep(slow)
        return entries

    thaw = Thaw(plan.pop("thaw")) if "thaw" in plan else None
    history = fit(
        model,
        watched(look),
        items(80),
        items(24, seed=1),
        Plan(**plan),
        tracking=Tracking(folder, progress=False, track=()),
        hooks=Hooks(at_epoch=thaw),
    )
    if out and int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(
            json.dumps(
                {
                    "weights": digest(model),
                    "losses": [s["loss"] for s in history.steps],
                    "epochs": history.epochs,
                }
            )
        )


if __name__ == "__main__":  # under torchrun: FOLDER and a list of plans
    faulthandler.enable()
    for i, plan in enumerate(json.loads(sys.argv[2])):
        run(f"{sys.argv[1]}-{i}", plan, f"{sys.argv[1]}-{i}.json")
    # nobody leaves while another still talks to him
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # under load a thread of gloo may still be there, and the interpreter's end would abort
    os._exit(0)
