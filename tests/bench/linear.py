"""Does a shipped recipe lose to the linear model on its own inputs?

Every recipe, and every experiment of a suite, is trained and held against the linear model on the
very inputs that it is given (`mmemo evaluate RUN --linear`): by UAR of classes or RMSE of numbers,
people paired, intervals counting people. Runs that are complete are read and not repeated.

Last line: {"runs": {"RECIPE/EXPERIMENT TASK": [run, linear, low, high]}, "lost": [those that are
worse]}; low and high are the ends of the difference, the run's minus the linear model's.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch

from mmemo.evaluation.metrics import LESS_IS_BETTER
from mmemo.experiments.recipe import list_recipes, load_recipe, load_suite
from mmemo.experiments.run import evaluate_run, train_recipe
from mmemo.experiments.terminal import quiet_loading

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("recipes", nargs="*", help="some recipes or suites [default: all]")
parser.add_argument("--experiments", nargs="*", help="some experiments of suites [default: all]")
parser.add_argument("--scale", default="laptop")
parser.add_argument("--data", default="known-answer")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--protocol", help="another protocol than the recipe's")
parser.add_argument("--out", type=Path, default=Path("_runs/linear"))
args = parser.parse_args()
torch.set_num_threads(1)
warnings.simplefilter("ignore")
quiet_loading()


def experiments(name: str) -> list[str | None]:
    "The experiments of a suite that are wanted; [None] for a recipe, which is its own only one."
    there = list(load_suite(name).experiments)
    if there == [name]:
        return [None]
    return [one for one in there if not args.experiments or one in args.experiments]


runs, lost = {}, []
for name in args.recipes or list_recipes():
    for experiment in experiments(name):
        called = f"{name}/{experiment}" if experiment else name
        folder = args.out / Path(args.data).name / args.scale / called / f"seed-{args.seed}"
        recipe = load_recipe(name, args.scale, experiment)
        if not (folder / "metrics.json").exists():
            train_recipe(recipe, folder, args.data, args.seed, track=())
        for task, found in evaluate_run(folder, linear=True)["against_linear"].items():
            _, low, high = found["difference"]
            runs[f"{called} {task}"] = [found["run"][0], found["linear"][0], low, high]
            worse = low > 0 if found["metric"] in LESS_IS_BETTER else high < 0
            lost += [f"{called} {task}"] * worse
            values = f"run {found['run'][0]:.3f}, linear model {found['linear'][0]:.3f}"
            ends = f"difference {found['difference'][0]:+.3f} [{low:+.3f}, {high:+.3f}]"
            print(f"{called:40} {task} {found['metric']}: {values}, {ends}", flush=True)
print(json.dumps({"runs": runs, "lost": lost}))
