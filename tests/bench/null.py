"""How often are two equally good models called different?

Simulated studies: people (normal or skewed) and seeds are random, the true difference is zero, and
`two_way` with the scores of the package judges them, as `compare` does (a few studies of each cell
go through `compare` itself and must agree). The cells: people x seeds x spread of the seeds (in
points, hundredths of the score) x metric. With one seed the comparison promises something about
people only, so its rate with seeds that differ is shown, but is not part of the worst.

    python tests/bench/null.py [--repeats 1000]

prints a table (false positives in %, of nominal 5), how often single scores' intervals hold the
truth, how often a real difference of 6 points is found, and in its last line one JSON object:
the worst rate for each number of people, and the worst of all.
"""

import argparse
import json
import math
from itertools import product

import numpy as np

from mmemo.evaluation.intervals import pseudo_values, two_way
from mmemo.evaluation.metrics import _classes, _moments, _regression, compare, score_intervals

PEOPLE, SEEDS, SPREADS = (10, 24, 60), (1, 3, 5), (0.0, 0.75, 1.5)
METRICS = {"rmse": _regression, "ccc": _regression, "uar": _classes, "weighted_f1": _classes}
CHECKED = 2  # studies of a cell that go through `compare` itself


def person_effects(rng, skewed, shape):
    "Mean 0 and spread 1: normal, or with a skewness of 1.4."
    return (rng.gamma(2, size=shape) - 2) / math.sqrt(2) if skewed else rng.normal(size=shape)


def class_study(rng, repeats, seeds, people, spread, skewed, gain=0.0):
    """Labels [R, P, N] of four classes and what two models say, [2, R, S, P, N]; `gain` is the
    share that the first has right more often.

    24 people have 60 answers each, as in RAVDESS, others 24.
    """
    answers = 60 if people == 24 else 24
    truth = rng.choice(4, p=(0.4, 0.3, 0.2, 0.1), size=(repeats, people, answers))
    easy = 0.55 + rng.uniform(-0.15, 0.15, (repeats, 1, people, 1))
    suits = 0.05 * person_effects(rng, skewed, (repeats, 1, people, 1))
    said = []
    for shift in (suits + gain, 0):
        luck = spread / 100 * rng.normal(size=(repeats, seeds, 1, 1))
        right = rng.random((repeats, seeds, people, answers)) < easy + shift + luck
        other = (truth[:, None] + rng.integers(1, 4, right.shape)) % 4
        said.append(np.where(right, truth[:, None], other))
    return truth, np.stack(said)


def number_study(rng, repeats, seeds, people, spread, skewed, gain=0.0):
    """Numbers [R, P, N] and what two models say, [2, R, S, P, N], with an RMSE of about 4; that of
    the first is smaller by the share 2 `gain`.
    """
    shape = (repeats, seeds, people, 10)
    truth = 5 * rng.normal(size=(repeats, people, 1)) + 2 * rng.normal(size=(repeats, people, 10))
    shared = 2 * rng.normal(size=(repeats, 1, people, 10))
    hard = np.sqrt(rng.uniform(0.5, 1.5, (repeats, 1, people, 1)))
    suits = 0.2 * person_effects(rng, skewed, (repeats, 1, people, 1))
    said = []
    for size in (np.sqrt(np.maximum(1 + suits, 0.02)) * (1 - 2 * gain), 1):
        luck = 1 + spread / 100 * rng.normal(size=(repeats, seeds, 1, 1))
        error = (shared + math.sqrt(12) * rng.normal(size=shape)) * size * hard * luck
        said.append(truth[:, None] + error)
    return truth, np.stack(said)


def sums_by_person(truth, said):
    "The sums [2, R, S, P, K] that the package's metrics are made of."
    truth = np.broadcast_to(truth[:, None], said.shape)
    if said.dtype.kind == "f":
        return _moments(said.ravel(), truth.ravel()).reshape(*said.shape, -1).sum(-2)
    people = math.prod(said.shape[:-1])
    cell = 16 * np.arange(people)[:, None] + (4 * truth + said).reshape(people, -1)
    return np.bincount(cell.ravel(), minlength=16 * people).reshape(*said.shape[:-1], 16)


def p_values(sums, metric):
    "The p-value [R] of each study."
    values, effects = pseudo_values(sums.astype(float), lambda s: METRICS[metric](s)[metric])
    return two_way(effects[0] - effects[1]).p_of((values[0] - values[1]).mean(-1))


def as_compare_does(truth, said, metric):
    "The p-value of one study by `compare`: labels [P, N], answers [2, S, P, N]."
    people, answers = truth.shape
    a, b = ([one.ravel() for one in model] for model in said)
    return compare(a, b, truth.ravel(), np.repeat(np.arange(people), answers), metric).p


def cell_rates(rng, repeats, seeds, people, spread, skewed, gain=0.0):
    "{metric: share of studies that call the models different}."
    found = {}
    for study, metrics in ((number_study, ("rmse", "ccc")), (class_study, ("uar", "weighted_f1"))):
        parts = {metric: [] for metric in metrics}
        for start in range(0, repeats, 200):
            count = min(200, repeats - start)
            truth, said = study(rng, count, seeds, people, spread, skewed, gain)
            sums = sums_by_person(truth, said)
            for metric in metrics:
                p = p_values(sums, metric)
                parts[metric].append(p <= 0.05)
                for i in range(CHECKED if start == 0 else 0):
                    other = as_compare_does(truth[i], said[:, i], metric)
                    assert math.isclose(p[i], other, abs_tol=1e-6), (metric, p[i], other)
        found |= {metric: float(np.mean(np.concatenate(rates))) for metric, rates in parts.items()}
    return found


def coverage(rng, repeats, seeds, people, skewed):
    "{metric: how often the interval of one model's score holds the truth}, seeds of 1.5 points."
    spread = 1.5 if seeds > 1 else 0.0
    found = {}
    for study, metrics in ((number_study, ("rmse", "ccc")), (class_study, ("uar", "weighted_f1"))):
        # the spread of seeds moves no mean
        many = sums_by_person(*study(np.random.default_rng(0), 40, 1, 1000, 0.0, skewed))
        truth = METRICS[metrics[0]](many[0].sum((0, 2)))
        labels, said = study(rng, repeats, seeds, people, spread, skewed)
        held = {metric: [] for metric in metrics}
        for label, answers in zip(labels, said[0]):
            who = np.repeat(np.arange(people), label.shape[1])
            got = score_intervals([one.ravel() for one in answers], label.ravel(), who)
            for metric in metrics:
                held[metric].append(got[metric].low <= truth[metric].mean() <= got[metric].high)
        found |= {metric: float(np.mean(hits)) for metric, hits in held.items()}
    return found


def told(rates):
    return "  ".join(f"{metric} {100 * rate:5.1f}" for metric, rate in rates.items())


def main(repeats: int):
    rng = np.random.default_rng(0)
    worst = dict.fromkeys(PEOPLE, 0.0)
    print("called different, % (no difference is there; nominal 5)")
    for people, seeds, spread, skewed in product(PEOPLE, SEEDS, SPREADS, (False, True)):
        # the same work for each cell, so few seeds are measured more exactly
        rates = cell_rates(rng, repeats * 5 // seeds, seeds, people, spread, skewed)
        promised = seeds > 1 or spread == 0
        if promised:
            worst[people] = max(worst[people], *rates.values())
        kind = "skewed" if skewed else "normal"
        note = "" if promised else "   (one seed promises nothing about seeds)"
        print(f"{people:>3} people {seeds} seeds {spread:4.2f} {kind}  {told(rates)}{note}")
    print("\na difference of 6 points is found, % (RMSE: 12 % of it; seeds spread 0.75 points)")
    for people, seeds in product(PEOPLE, SEEDS):
        rates = cell_rates(rng, repeats // 2, seeds, people, 0.75, False, gain=0.06)
        print(f"{people:>3} people {seeds} seeds  {told(rates)}")
    print("\nintervals of one score hold the truth, % (nominal 95)")
    for people, seeds, skewed in product(PEOPLE, SEEDS, (False, True)):
        kind = "skewed" if skewed else "normal"
        rates = coverage(rng, repeats // 2, seeds, people, skewed)
        print(f"{people:>3} people {seeds} seeds {kind}  {told(rates)}")
    print(json.dumps({"people": worst, "worst": max(worst.values())}))


if __name__ == "__main__":
    given = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given.add_argument("--repeats", type=int, default=1000, help="studies of a cell with 5 seeds")
    main(given.parse_args().repeats)
