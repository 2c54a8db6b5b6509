"""The memory of an update: what `predicted_memory` says without computing it against what the
allocator saw.

A text encoder of 12 layers with random weights, tuned in full, by LoRA, or frozen (head only);
plain, accumulated over four passes, checkpointed, in bfloat16, and all three together. Predicted:
forward and backward on fake tensors. Measured on the CPU: torch's own record of every allocation
(torch.profiler); on a GPU: the allocator's peak. Seconds: of the processor, an update; on a GPU of
its clock. Last line: {"device", "settings": {setting: {"predicted", "measured", "ratio",
"seconds"}}, "worst": the ratio farthest from 1}, in bytes.
"""

import argparse
import json
import math
import warnings

import torch
from torch import nn
from transformers import BertConfig, BertModel

from mmemo.core.batch import Batch, Stream
from mmemo.models.base import ConcatFusion, Multimodal, Project, RegressionHead
from mmemo.models.lora import add_lora
from mmemo.models.text import TextEncoder
from mmemo.training.finetune import checkpoint_gradients
from mmemo.training.memory import measured_memory, predicted_memory
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan

CUDA = torch.cuda.is_available()
parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--width", type=int, default=768 if CUDA else 256)
parser.add_argument("--items", type=int, default=64 if CUDA else 16)
parser.add_argument("--length", type=int, default=256 if CUDA else 64)
parser.add_argument("--updates", type=int, default=5 if CUDA else 2)
args = parser.parse_args()
torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)

WAYS = ("full", "lora", "frozen")
EXTRAS = {
    "plain": {},
    "accumulate 4": dict(accumulate=4),
    "checkpointing": {},
    "bf16": dict(precision="bf16"),
    "all three": dict(accumulate=4, precision="bf16"),
}


def model(way: str) -> Multimodal:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        intermediate_size=4 * args.width,
        vocab_size=8000,
    )
    encoder = TextEncoder(BertModel(config, add_pooling_layer=False))
    if way == "lora":
        encoder = add_lora(encoder)
    if way == "frozen":
        encoder.requires_grad_(False)
    return Multimodal(
        {"text": nn.Sequential(encoder, Project(encoder.width, 64))},
        ConcatFusion({"text": 64}, 64),
        {"y": RegressionHead(64)},
    ).to("cuda" if CUDA else "cpu")


def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(args.length) < torch.randint(
        args.length // 2, args.length + 1, (args.items, 1), generator=g
    )
    mask[::4] = True
    made = Batch(
        {
            "text": Stream(
                torch.randint(0, 8000, mask.shape, generator=g), mask, torch.zeros(mask.shape)
            )
        },
        {"y": torch.randn(args.items, generator=g)},
    )
    return made.to("cuda") if CUDA else made


device = torch.cuda.get_device_name() if CUDA else "cpu"
data, found = batch(), {}
print(
    f"{args.layers} layers of width {args.width}, {args.items} items of {args.length} tokens,"
    f" {device}; MiB\n"
)
print(
    f"{'':22}{'weights':>8}{'grads':>8}{'moments':>8}{'activ.':>8} |"
    f" {'predicted':>9}{'measured':>9}{'ratio':>8}{'seconds':>9}"
)
for way in WAYS:
    for extra, options in EXTRAS.items():
        net, plan = (
            model(way),
            Plan(batch_size=args.items // options.get("accumulate", 1), **options),
        )
        if extra in ("checkpointing", "all three"):
            checkpoint_gradients(net)
        guess, cost = (
            predicted_memory(net, mse("y"), data, plan),
            measured_memory(net, mse("y"), data, plan, args.updates),
        )
        ratio = guess.total / cost.bytes
        found[f"{way}, {extra}"] = {
            "predicted": guess.total,
            "measured": cost.bytes,
            "ratio": round(ratio, 4),
            "seconds": round(cost.seconds, 3),
        }
        numbers = "".join(f"{part / 2**20:8.1f}" for part in guess)
        print(
            f"{way + ', ' + extra:22}{numbers} |"
            f" {guess.total / 2**20:9.1f}{cost.bytes / 2**20:9.1f}{ratio:8.4f}{cost.seconds:9.3f}",
            flush=True,
        )
print(
    json.dumps(
        {
            "device": device,
            "settings": found,
            "worst": max((s["ratio"] for s in found.values()), key=lambda r: abs(math.log(r))),
        }
    )
)
