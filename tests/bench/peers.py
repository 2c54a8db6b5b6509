"""mmemo beside MMSA 2.2.1: the same architectures, sizes, data, losses, rates and numbers of
updates, trained by each package's own means.

    python tests/bench/peers.py [--models ...] [--reps 2] [--epochs N] [--quick]

Some ten minutes on one core.

Data: generated, in the shape of CMU-MOSI: 1284 / 229 / 686 items, up to 50 steps of 768 text, 5
audio and 20 video features, lengths 8 to 50, each step carrying a trace of the label. Models, with
MMSA's sizes for MOSI: pooled (a small network on means), low_rank (LSTM over text, networks over
means, rank 3), tensor (the same with the outer product, 9 million weights), transformer (MulT: six
cross-modal and three self-attention transformers of four layers, width 50, ten heads, an update
every eighth batch).

A cell is one model in one package in a fresh process of one thread, with a seed of its run; the
packages alternate. An epoch is training and validation; its cost is the processor time of the
process (user and system), the first epoch is dropped, the smallest and the median are reported.
Memory is the largest resident size. Import is what the package's modules add to torch (either
package loads more when it first trains). The error is the mean absolute error on the validation
items at the best epoch, the mean over runs; a guess that knows nothing has 1.5.

MMSA lives in an environment of its own with our version of torch, made on first use (it needs a
package index) under _runs/peers. It does not run as it is where there is no CUDA:
torch.cuda.set_device is made to do nothing, ReduceLROnPlateau loses an argument that torch no
longer has, and its endless loop is left after the wanted number of validations. It computes every
padded step; ours skips what no item of a batch needs, and sorts the items of an update by length,
which changes no update. Ours: the tensor's sides are 52, 52, 52 where MMSA's are 33, 129, 33 (the
same number of entries), and the low-rank product has 16 outputs, not 1; nothing of the tensor is
dropped; the transformer drops 0.2 of the attention everywhere (0.3, 0.2 and 0 there) and its
windows reach beyond the ends (50 steps, 46 there). `fit` keeps freed memory by itself; no malloc
variable is set on either side. Last line: {model: {"throughput_ratio", "memory_ratio",
"error_ours", "error_peer"}}
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS, STEPS, ITEMS, WIDTHS = (
    ("train", "valid", "test"),
    50,
    (1284, 229, 686),
    {"text": 768, "audio": 5, "video": 20},
)
# pooled goes by another model's name: theirs are a closed list
THEIRS = {"pooled": "lf_dnn", "low_rank": "lmf", "tensor": "tfn", "transformer": "mult"}
EPOCHS = {"pooled": 20, "low_rank": 8, "tensor": 5, "transformer": 6}
ITEMS_A_BATCH = {"pooled": 32, "low_rank": 64, "tensor": 32, "transformer": 16}


def spent() -> float:
    return time.process_time()


def largest() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------ data and environment, made once
def data(folder: Path) -> None:
    """The three parts, for us as safetensors, for MMSA in the layout it reads; `pooled` holds
    means over the real steps.
    """
    import pickle

    import numpy as np
    from safetensors.numpy import save_file

    random, traces = np.random.default_rng(0), {}
    for name, F in WIDTHS.items():
        w = random.normal(size=F)
        traces[name] = (0.05 * w / np.linalg.norm(w) * F**0.5).astype("f4")
    parts, means = {}, {}
    for part, n in zip(PARTS, ITEMS):
        y, lengths = random.uniform(-3, 3, n).astype("f4"), random.integers(8, STEPS + 1, n)
        real = np.arange(STEPS) < lengths[:, None]
        x = {
            m: (
                (random.standard_normal((n, STEPS, F), dtype="f4") + y[:, None, None] * traces[m])
                * real[..., None]
            )
            for m, F in WIDTHS.items()
        }
        flat = {m: (v.sum(1) / lengths[:, None]).astype("f4")[:, None] for m, v in x.items()}
        for name, streams, every, T in (("steps", x, parts, STEPS), ("means", flat, means, 1)):
            save_file(
                {
                    **{k: np.ascontiguousarray(v) for k, v in streams.items()},
                    "y": y,
                    "length": np.minimum(lengths, T),
                },
                folder / f"{name}-{part}.safetensors",
            )
            every[part] = {
                "raw_text": [""] * n,
                "id": [f"{i}$_${i}" for i in range(n)],
                "text": streams["text"],
                "audio": streams["audio"],
                "vision": streams["video"],
                "text_bert": np.zeros((n, 3, T), "f4"),
                "audio_lengths": [T] * n,
                "vision_lengths": [T] * n,
                "annotations": [""] * n,
                "classification_labels": np.sign(y) + 1,
                "regression_labels": y,
            }
    for name, every in (("steps", parts), ("means", means)):
        with open(folder / f"{name}.pkl", "wb") as file:
            pickle.dump(every, file)
    (folder / "data.ready").touch()


def environment(folder: Path) -> Path:
    "The peer's interpreter."
    from importlib.metadata import version

    python = folder / "env" / "bin" / "python"
    if not (python.exists() and (folder / "env.ready").exists()):
        print("making an environment for MMSA 2.2.1 ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "env"], check=True)
        uv, wanted = (
            Path(sys.executable).with_name("uv"),
            ["MMSA==2.2.1", f"torch=={version('torch').split('+')[0]}"],
        )
        install = (
            [uv, "pip", "install", "-q", "--python", python]
            if uv.exists()
            else [python, "-m", "pip", "install", "-q"]
        )
        subprocess.run([*install, *wanted], check=True)
        (folder / "env.ready").touch()
    return python


# ------------------------------------------------------------------ the peer's side of a cell
def theirs(model: str, folder: Path, epochs: int, marks: list, seed: int) -> dict:
    import torch
    from torch.optim import lr_scheduler

    torch.cuda.set_device = lambda *_: None
    plateau = lr_scheduler.ReduceLROnPlateau.__init__
    lr_scheduler.ReduceLROnPlateau.__init__ = lambda self, *a, verbose=None, **k: plateau(
        self, *a, **k
    )
    start = spent()
    import MMSA
    from MMSA.trains.ATIO import ATIO

    imported, found, trainer = spent() - start, {"errors": []}, ATIO.getTrain

    class Enough(BaseException):
        pass

    def watched(self, args):
        inner = trainer(self, args)
        test, train = inner.do_test, inner.do_train

        def do_test(*a, **k):
            scores = test(*a, **k)
            if k.get("mode") == "VAL":
                found["errors"].append(float(scores["MAE"]))
                marks.append(spent())
                if len(found["errors"]) == epochs:
                    raise Enough
            return scores

        def do_train(net, *a, **k):
            found["parameters"] = sum(p.numel() for p in net.parameters() if p.requires_grad)
            marks.append(spent())
            return train(net, *a, **k)

        inner.do_test, inner.do_train = do_test, do_train
        return inner

    ATIO.getTrain, options = watched, {"early_stop": 10**6}
    if model == "pooled":

        class Core(torch.nn.Module):
            def __init__(self, args):
                super().__init__()
                self.net = late_fusion(args.feature_dims)

            def forward(self, text, audio, video):
                return {"M": self.net((text, audio, video))}

        sys.modules["MMSA.models.AMIO"].LF_DNN = Core
        options |= {
            "need_normalized": False,
            "batch_size": ITEMS_A_BATCH[model],
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
        }
    with tempfile.TemporaryDirectory() as out:
        try:
            MMSA.MMSA_run(
                THEIRS[model],
                "mosi",
                seeds=[seed],
                gpu_ids=[],
                num_workers=0,
                verbose_level=0,
                config=options,
                custom_feature=str(folder / ("means.pkl" if model == "pooled" else "steps.pkl")),
                model_save_dir=out,
                res_save_dir=out,
                log_dir=out,
            )
        except Enough:
            pass
    return found | {"import": imported}


def late_fusion(widths):
    """The pooled model as plain torch: for each modality the mean over time, LayerNorm, a linear
    layer, ReLU, dropout; side by side; one number.
    """
    from torch import cat, nn

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.head = (
                nn.ModuleList(
                    nn.Sequential(nn.LayerNorm(F), nn.Linear(F, 128), nn.ReLU(), nn.Dropout(0.3))
                    for F in widths
                ),
                nn.Linear(3 * 128, 1),
            )

        def forward(self, streams):
            return self.head(cat([part(x.mean(1)) for part, x in zip(self.parts, streams)], 1))

    return Late()


# ------------------------------------------------------------------ our side
def ours(model: str, folder: Path, epochs: int, marks: list, seed: int) -> dict:
    start = spent()
    import torch
    from torch import nn

    from mmemo.core.batch import Batch, Stream
    from mmemo.models.base import Fused, MeanPool, Multimodal, RegressionHead
    from mmemo.models.mult import CrossModalConfig, CrossModalTransformer, LastState
    from mmemo.models.products import LowRankFusion, TensorFusion
    from mmemo.models.stacked import Dropout
    from mmemo.training.loop import Hooks, fit
    from mmemo.training.plan import Plan, alike_lengths
    from mmemo.training.tracking import QUIET

    imported = spent() - start
    from safetensors.torch import load_file

    def read(part: str) -> Batch:
        raw = load_file(folder / f"{'means' if model == 'pooled' else 'steps'}-{part}.safetensors")
        clock = torch.arange(raw["text"].shape[1])
        streams = {
            m: Stream(
                raw[m], clock < raw["length"][:, None], clock.float().expand(len(raw["y"]), -1)
            )
            for m in WIDTHS
        }
        # as MMSA does on reading
        if model in ("low_rank", "tensor"):
            streams |= {m: MeanPool()(streams[m]) for m in ("audio", "video")}
        return Batch(streams, {"y": raw["y"]})

    class Steps(nn.Sequential):
        "Layers over the values of every step."

        def forward(self, stream):
            return stream.with_x(super().forward(stream.x))

    class Rows(Steps):
        "Layers over the items of a stream of one step."

        def forward(self, stream):
            return stream.with_x(nn.Sequential.forward(self, stream.x.squeeze(1)).unsqueeze(1))

    class Beside(nn.Module):
        def forward(self, streams):
            return Fused(torch.cat([s.x[:, 0] for s in streams.values()], 1))

    def subnet(F, H, p):
        return Rows(
            nn.BatchNorm1d(F),
            Dropout(p),
            nn.Linear(F, H),
            nn.ReLU(),
            nn.Linear(H, H),
            nn.ReLU(),
            nn.Linear(H, H),
            nn.ReLU(),
        )

    torch.manual_seed(seed)
    plan = {
        "optimiser": "adam",
        "lr": 1e-3,
        "weight_decay": 0.0,
        "batch_size": ITEMS_A_BATCH[model],
        "epochs": epochs,
        "patience": 10**6,
        "clip": None,
        "seed": seed,
    }
    if model == "pooled":
        encoders = {
            m: Rows(nn.LayerNorm(F), nn.Linear(F, 128), nn.ReLU(), Dropout(0.3))
            for m, F in WIDTHS.items()
        }
        fusion, width = Beside(), 3 * 128
    elif model == "low_rank":
        encoders = {
            "text": LastState(768, 128, 64),
            "audio": subnet(5, 16, 0.3),
            "video": subnet(20, 128, 0.3),
        }
        fusion, width = (
            LowRankFusion(
                {"text": 64, "audio": 16, "video": 128}, 16, dropout=0.0, size=64, rank=3
            ),
            16,
        )
        plan["weight_decay"] = 0.005
    elif model == "tensor":
        encoders = {
            "text": LastState(768, 128, 32),
            "audio": subnet(5, 32, 0.3),
            "video": subnet(20, 128, 0.3),
        }
        fusion, width = (
            TensorFusion({"text": 32, "audio": 32, "video": 128}, 64, dropout=0.0, size=51),
            64,
        )
    else:
        encoders = {"text": Dropout(0.5), "audio": nn.Identity(), "video": nn.Identity()}
        fusion = CrossModalTransformer(
            WIDTHS,
            50,
            CrossModalConfig(10, 4, 5, dropout=0.2, attention_dropout=0.2, output_dropout=0.5),
        )
        width, plan = (
            fusion.out_width,
            plan | {"lr": 2e-3, "accumulate": 8, "drop_last": True, "clip": 1.0},
        )
    net = Multimodal(encoders, fusion, {"y": RegressionHead(width)})
    train, valid, _test = (read(part) for part in PARTS)
    plan = Plan(**plan)
    sampler = (
        alike_lengths(train.streams["text"].mask.sum(1), plan) if plan.accumulate > 1 else None
    )

    def loss(output, batch):
        return {"loss": (output.predictions["y"] - batch.targets["y"]).abs().mean()}

    history = fit(
        net,
        loss,
        train,
        valid,
        plan,
        tracking=QUIET,
        hooks=Hooks(sampler=sampler, at_epoch=lambda *_: marks.append(spent())),
    )
    marks.append(spent())
    return {
        "errors": [e["valid"]["loss"] for e in history.epochs],
        "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad),
        "import": imported,
    }


# ------------------------------------------------------------------ the run
def cell(side: str, model: str, folder: Path, epochs: int, seed: int) -> dict:
    import torch

    torch.set_num_threads(1)
    marks = []
    found = (ours if side == "ours" else theirs)(model, folder, epochs, marks, seed)
    return found | {"epochs": [b - a for a, b in zip(marks, marks[1:])], "memory": largest()}


def main(args) -> dict:
    folder = ROOT / "_runs" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {"ours": sys.executable, "MMSA": environment(folder)}
    if not (folder / "data.ready").exists():
        # a process of its own: a child begins with its parent's largest size
        subprocess.run([sys.executable, __file__, "--cell", "data"], check=True)
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
    }
    cells: dict = {}
    for rep in range(args.reps):
        for model in args.models:
            for side in ("ours", "MMSA") if rep % 2 == 0 else ("MMSA", "ours"):
                command = [
                    pythons[side],
                    __file__,
                    "--cell",
                    side,
                    "--models",
                    model,
                    "--epochs",
                    str(args.epochs or EPOCHS[model]),
                    "--seed",
                    str(1111 + rep),
                ]
                done = subprocess.run(
                    [str(c) for c in command],
                    env=os.environ | quiet,
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    raise SystemExit(f"{side}, {model}: {done.stderr[-2000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                cells.setdefault((model, side), []).append(found)
                print(
                    f"run {rep + 1} {model:11} {side:4}  processor seconds an epoch, first"
                    f" {found['epochs'][0]:.3f}, then {min(found['epochs'][1:]):.3f} to"
                    f" {max(found['epochs'][1:]):.3f}  {found['memory']:.0f} MB  validation error"
                    f" {min(found['errors']):.3f}",
                    flush=True,
                )
    print(
        f"\n{'':17}{'weights':>9}  {'items/s':>8}  {'median':>8}  {'memory':>8}  {'import':>7} "
        f" {'error':>6}     items: of training, a second of processor time; an epoch's validation"
        " is in it"
    )
    results = {}
    for model in args.models:
        row = {}
        for side in pythons:
            runs = cells[model, side]
            epochs = [s for r in runs for s in r["epochs"][1:]]
            row[side] = {
                "speed": ITEMS[0] / min(epochs),
                "median": ITEMS[0] / statistics.median(epochs),
                "memory": max(r["memory"] for r in runs),
                "import": min(r["import"] for r in runs),
                "error": statistics.mean(min(r["errors"]) for r in runs),
                "weights": runs[0]["parameters"],
            }
            r = row[side]
            print(
                f"{model:11} {side:5}{r['weights']:9}  {r['speed']:8.0f}  {r['median']:8.0f} "
                f" {r['memory']:5.0f} MB  {r['import']:5.1f} s  {r['error']:6.3f}"
            )
        a, b = row["ours"], row["MMSA"]
        results[model] = {
            "throughput_ratio": round(a["speed"] / b["speed"], 2),
            "memory_ratio": round(a["memory"] / b["memory"], 2),
            "error_ours": round(a["error"], 3),
            "error_peer": round(b["error"], 3),
        }
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(THEIRS), choices=list(THEIRS))
    parser.add_argument("--reps", type=int, default=2)
    parser.add_argument("--epochs", type=int, help=f"instead of {EPOCHS}")
    parser.add_argument(
        "--quick", action="store_true", help="one run of two epochs, without the transformer"
    )
    parser.add_argument("--seed", type=int, default=1111, help=argparse.SUPPRESS)
    parser.add_argument("--cell", choices=["ours", "MMSA", "data"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell == "data":
        data(ROOT / "_runs" / "peers")
    elif args.cell:
        print(
            json.dumps(
                cell(args.cell, args.models[0], ROOT / "_runs" / "peers", args.epochs, args.seed)
            )
        )
    else:
        if args.quick:
            args.reps, args.epochs, args.models = (
                1,
                2,
                [m for m in args.models if m != "transformer"] or args.models,
            )
        print(json.dumps(main(args)))
