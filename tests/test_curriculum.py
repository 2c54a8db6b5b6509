"""Difficulty scores, pacing, the curriculum as a sampler (resumed and on two processes), the
scaled loss, dropout after the curriculum.
"""

import json
import math
import os
import socket
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from children import clean_server
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from tiny import MEMORY, items, same, tiny
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, DataError, ShapeError
from mmemo.core.state import epoch_order
from mmemo.training.curriculum import (
    PACINGS,
    Curriculum,
    cross_fit,
    difficulty_by_class,
    difficulty_by_confidence,
    difficulty_by_label,
    dropout_after,
    pace_at,
    rank_shares,
    scaled_cross_entropy,
)
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET, Tracking

quiet = dict(progress=False, track=())


def batch_of(**targets):
    n = len(next(iter(targets.values())))
    return Batch({"audio": Stream.of(torch.zeros(n, 1, 1), rate=1)}, targets)


def said(**predictions):
    return SimpleNamespace(predictions=predictions)


# ------------------------------------------------------------------ difficulty
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30))
def test_ranks_are_scipys(values):
    found = rank_shares(torch.tensor(values, dtype=torch.float64))
    assert found.tolist() == pytest.approx(
        ((rankdata(values) - 1) / (len(values) - 1)).tolist(), abs=1e-6
    )
    assert found.mean().item() == pytest.approx(0.5) and 0 <= found.min() and found.max() <= 1


def test_unknown_values_rank_last_and_one_item_in_the_middle():
    assert rank_shares(torch.tensor([math.nan, 2.0, -1.0, math.nan])).tolist() == pytest.approx(
        [5 / 6, 1 / 3, 0, 5 / 6]
    )
    assert (
        rank_shares(torch.tensor([7.0])).tolist() == [0.5] and len(rank_shares(torch.zeros(0))) == 0
    )


def test_by_label_is_the_distance_to_the_centre_of_the_class():
    labels = torch.tensor([0, 1, 0, 0, 1, -100, 1])
    values = torch.tensor([1.0, 10, 2, 9, 14, 3, math.nan])
    # centres 4 and 12: distances 3, 2, 2, 5, 2, unknown, unknown
    assert torch.equal(
        difficulty_by_label(values, labels),
        rank_shares(torch.tensor([3.0, 2, 2, 5, 2, math.nan, math.nan])),
    )
    wide = torch.randn(9, 3)
    kinds = torch.tensor([0, 2, 1, 0, 2, 1, 1, 0, 2])
    centres = torch.randn(4, 3)
    want = torch.stack([torch.linalg.vector_norm(wide[i] - centres[kinds[i]]) for i in range(9)])
    assert torch.equal(difficulty_by_label(wide, kinds, centres).argsort(), want.argsort())
    means = torch.stack([wide[kinds == c].mean(0) for c in range(3)])
    assert torch.allclose(difficulty_by_label(wide, kinds), difficulty_by_label(wide, kinds, means))
    mixed = torch.randperm(9)
    assert torch.allclose(
        difficulty_by_label(wide[mixed], kinds[mixed]), difficulty_by_label(wide, kinds)[mixed]
    )


def test_by_class_rare_is_hard():
    labels = torch.tensor([3, 0, 0, 3, 3, 1, -100])
    assert torch.equal(
        difficulty_by_class(labels), rank_shares(torch.tensor([-3.0, -2, -2, -3, -3, -1, math.nan]))
    )


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_by_confidence_is_the_probability_of_the_right_class(form):
    logits = 3 * torch.randn(11, 4)
    labels = torch.randint(0, 4, (11,))
    p = logits.softmax(1)
    found = difficulty_by_confidence(logits if form == "logits" else p, labels)
    assert (
        torch.equal(found.argsort(), (-p[torch.arange(11), labels]).argsort())
        and found.min() == 0
        and found.max() == 1
    )
    labels[4] = -100
    assert difficulty_by_confidence(logits, labels)[4] == 1


def test_bad_difficulties_are_named():
    labels, unknown = torch.tensor([0, 1, 2]), torch.full((3,), -100)
    with pytest.raises(DataError, match="none of the 3 items has both"):
        difficulty_by_label(torch.ones(3), unknown)
    with pytest.raises(DataError, match="label is 2; there are centres for 2"):
        difficulty_by_label(torch.ones(3), labels, torch.ones(2))
    with pytest.raises(DataError, match="none of the 3 labels"):
        difficulty_by_class(unknown)
    with pytest.raises(ShapeError, match="4 rows of scores for 3 labels"):
        difficulty_by_confidence(torch.ones(4, 3), labels)
    with pytest.raises(DataError, match="label is 2; the scores are of 2"):
        difficulty_by_confidence(torch.ones(3, 2), labels)
    with pytest.raises(DataError, match="scores of item 1 are not finite"):
        difficulty_by_confidence(torch.tensor([[0.0, 1], [math.nan, 1], [0, 1]]), labels % 2)


class Remembers(nn.Module):
    """Says of every item which rows it was trained on: a 1 in each of their columns; every item
    knows its own number.
    """

    def __init__(self, rows, n):
        super().__init__()
        self.seen = torch.zeros(n)
        self.seen[rows] = 1

    def forward(self, batch):
        row = batch.streams["audio"].x[:, 0, 0].long()
        return SimpleNamespace(
            predictions={"y": torch.stack([row.float(), self.seen[row]], 1)},
            embedding=torch.zeros(len(batch), 1),
            maps={},
        )


@pytest.mark.parametrize("by", [None, [f"speaker{i % 5}" for i in range(23)]])
def test_cross_fit_scores_every_item_by_a_model_that_has_not_seen_it(by):
    data, trained = Batch({"audio": Stream.of(torch.arange(23.0).reshape(23, 1, 1), rate=1)}), []

    def train(rows):
        trained.append(rows)
        return Remembers(rows, 23)

    found = cross_fit(train, data, "y", folds=3, by=by, seed=4)
    # in the order of the data, and nobody was seen
    assert found[:, 0].tolist() == list(range(23)) and found[:, 1].eq(0).all()
    assert len(trained) == 3 and Counter(sum(trained, [])) == Counter({i: 2 for i in range(23)})
    if by:
        assert all(
            {by[i] for i in rows}.isdisjoint({by[i] for i in set(range(23)) - set(rows)})
            for rows in trained
        )
    with pytest.raises(ConfigError, match="choose 2 to"):
        cross_fit(train, data, "y", folds=1, by=by)
    with pytest.raises(ShapeError, match="2 groups for 23 items"):
        cross_fit(train, data, "y", by=["a", "b"])


# ------------------------------------------------------------------ pacing
@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PACINGS), st.integers(1, 40), st.floats(0.01, 1))
def test_pace_starts_rises_and_ends(kind, epochs, start):
    shares = [pace_at(e, epochs, kind, start) for e in range(epochs + 3)]
    assert (
        shares[epochs - 1 :] == [1.0] * 4
        and all(a <= b + 1e-12 for a, b in zip(shares, shares[1:]))
        and max(shares) == 1
    )
    if epochs > 2:
        assert shares[0] == pytest.approx(start)


def test_pace_values():
    assert [pace_at(e, 5, "linear", 0.2) for e in range(5)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1]
    )
    # its square is a line
    assert [pace_at(e, 5, "sqrt", 0.6) ** 2 for e in range(5)] == pytest.approx(
        [0.36, 0.52, 0.68, 0.84, 1]
    )
    assert [pace_at(e, 8, "log", 0.1) for e in range(8)] == pytest.approx(
        [0.1 + 0.9 * math.log(1 + e) / math.log(8) for e in range(8)]
    )
    assert [pace_at(e, 6, "step", 0.5) for e in range(7)] == [0.5, 0.5, 0.75, 0.75, 1, 1, 1] and [
        pace_at(e, 2, "step") for e in (0, 1)
    ] == [0.3, 1]
    for bad, words in (
        (dict(kind="exp"), "linear, sqrt, log, step"),
        (dict(epochs=0), "at least one"),
        (dict(start=0.0), "above 0"),
        (dict(start=1.2), "up to 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            pace_at(0, **{"epochs": 5, **bad})


# ------------------------------------------------------------------ the sampler
N = 53
HARD = torch.rand(N, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pacing", PACINGS)
def test_an_epoch_is_the_easiest_share_in_random_order(pacing):
    sampler = Curriculum(HARD, 6, pacing, 0.3, seed=2)
    for epoch in range(8):
        rows = sampler(epoch)
        n = math.ceil(pace_at(epoch, 6, pacing, 0.3) * N)
        assert (
            set(rows) == set(HARD.argsort()[:n].tolist())
            and len(rows) == n
            and rows == sampler(epoch)
        )
    assert sampler(0) != sorted(sampler(0)) and sampler(6) != sampler(7)
    assert sampler(7) == epoch_order(N, 2, 7)  # afterwards fit's own order
    assert Curriculum(HARD, 6, pacing, 0.3, seed=3)(0) != sampler(0)


def test_balance_keeps_the_shares_of_the_classes():
    # whole classes are easy
    labels = torch.tensor([0] * 30 + [1] * 15 + [4] * 7 + [-100])
    difficulty = labels / 100 + HARD / 1000
    sizes = torch.tensor([30, 15, 7])
    for epoch in range(5):
        rows = torch.tensor(Curriculum(difficulty, 5, "linear", 0.2, balance=labels)(epoch))
        kinds = labels[rows]
        share = pace_at(epoch, 5, "linear", 0.2)
        found = torch.stack([(kinds == c).sum() for c in (0, 1, 4)])
        assert (
            torch.equal(found, torch.ceil(share * sizes - 1e-6).long())
            and (kinds == -100).sum() == 1
        )
        for c in (0, 1, 4):
            assert (
                difficulty[rows[kinds == c]].max()
                <= difficulty[labels == c].sort().values[found[[0, 1, 4].index(c)] - 1]
            )
    # without it: one class
    assert set(labels[Curriculum(difficulty, 5, "linear", 0.2)(0)].tolist()) <= {0, -100}


def test_ties_do_not_keep_the_order_of_the_file():
    first = [Curriculum(torch.zeros(N), 5, start=0.5, seed=s).chosen(0) for s in range(3)]
    assert (
        all(len(rows) == 27 for rows in first)
        and first[0] != first[1] != set(range(27)) != first[0]
    )
    sampler = Curriculum((torch.arange(N) % 3).float(), 9)
    assert all(sampler.chosen(e) <= sampler.chosen(e + 1) for e in range(9))  # once in, always in


def test_a_filled_epoch_has_the_rows_of_a_full_one():
    sampler, bare = (
        Curriculum(HARD, 5, "linear", 0.3, seed=1, fill=True),
        Curriculum(HARD, 5, "linear", 0.3, seed=1),
    )
    for epoch in range(6):
        rows, count = sampler(epoch), Counter(sampler(epoch))
        assert (
            len(rows) == N
            and set(rows) == set(bare(epoch))
            and max(count.values()) - min(count.values()) <= 1
        )
        assert rows[: len(bare(epoch))] == bare(epoch)
    assert sampler(0)[16:32] != sampler(0)[:16]


def test_a_curriculum_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="empty"):
        Curriculum(torch.zeros(0))
    with pytest.raises(DataError, match="difficulty of item 1 is not a finite"):
        Curriculum(torch.tensor([0.0, math.nan]))
    with pytest.raises(ShapeError, match="3 difficulties, 2 labels"):
        Curriculum(torch.zeros(3), balance=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="pacing 'cubic'"):
        Curriculum(HARD, pacing="cubic")


# ------------------------------------------------------------------ resumed, and on two processes
TRAIN, VALID, DIFFICULTY = (
    items(80),
    items(24, seed=1),
    torch.rand(80, generator=torch.Generator().manual_seed(3)),
)


class Killed(BaseException):
    "A process that ends here."


def run(folder=None, kill=None, seed=0, fill=False, **plan):
    """One run with a curriculum and a dropout that changes after it; ends at call `kill` of the
    objective.
    """
    left, inner = [math.inf if kill is None else kill], mse("y")

    def objective(output, batch):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return inner(output, batch)

    model = tiny(seed=seed, norm=plan.pop("norm", True))
    low, high = plan.pop("dropout", (0.1, 0.6))
    sampler = Curriculum(DIFFICULTY, 3, "linear", 0.2, seed=5, fill=fill)
    return model, fit(
        model,
        objective,
        TRAIN,
        VALID,
        Plan(**{"epochs": 5, "batch_size": 8, "checkpoint_steps": 1, **plan}),
        tracking=Tracking(folder, **quiet),
        hooks=Hooks(sampler=sampler, at_epoch=dropout_after(3, low, high)),
    )


@pytest.mark.parametrize("kill", [1, 4, 11, 20, 40])
def test_killed_and_resumed_it_is_the_same_run(kill):
    whole = run(schedule="onecycle")
    assert [sum(s["items"] for s in whole[1].steps if s["epoch"] == e) for e in range(5)] == [
        16,
        48,
        80,
        80,
        80,
    ]
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        with pytest.raises(Killed):
            run(folder, kill=kill, schedule="onecycle")
        again = run(folder, seed=0 if kill == 1 else 9, schedule="onecycle")
        assert (
            again[1].steps == whole[1].steps
            and again[1].epochs == whole[1].epochs
            and same(whole[0], again[0])
        )


def plan_of(fill):
    return dict(
        norm=False,
        dropout=(0.0, 0.0),
        lr=1e-2,
        schedule="onecycle",
        batch_size=7,
        checkpoint_steps=None,
        fill=fill,
    )


def process(rank, port, out):
    "One of two processes, as torchrun would start them; the first writes what it saw."
    torch.set_num_threads(1)
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    found = [run(**plan_of(fill))[1] for fill in (False, True)]
    about = [
        {
            "processes": h.runs[0]["about"]["processes"],
            "items": [s["items"] for s in h.steps],
            "losses": [s["loss"] for s in h.steps],
        }
        for h in found
    ]
    if rank == 0:
        Path(out).write_text(json.dumps(about))
    torch.distributed.destroy_process_group()


def test_two_processes_see_the_rows_of_one(tmp_path, monkeypatch):
    """Batches of 7 rows are split 4 and 3; the last one of an epoch is shorter.

    Children of a clean server, which imports once for both.
    """
    context = clean_server(monkeypatch, "test_curriculum")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        context.Process(target=process, args=(rank, port, tmp_path / "two.json")) for rank in (0, 1)
    ]
    for p in pair:
        p.start()
    for p in pair:
        p.join(60)
    for p in pair:
        p.kill()
    assert [p.exitcode for p in pair] == [0, 0]
    for fill, two in zip(
        (False, True), json.loads((tmp_path / "two.json").read_text()), strict=True
    ):
        one = run(**plan_of(fill))[1]
        assert two["processes"] == 2 and two["items"] == [s["items"] for s in one.steps]
        assert two["losses"] == pytest.approx([s["loss"] for s in one.steps], rel=1e-5)


# ------------------------------------------------------------------ the scaled loss
OPTIONS = [
    {},
    {"weight": torch.tensor([1.0, 2.0, 0.5])},
    {"label_smoothing": 0.1},
    {"weight": torch.tensor([1.0, 2.0, 0.5]), "label_smoothing": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_without_strength_it_is_the_cross_entropy(options):
    logits = torch.randn(6, 3)
    batch = batch_of(e=torch.tensor([0, 2, -100, 1, 1, 2]), difficulty=torch.rand(6))
    found, want = (
        f(said(e=logits), batch)
        for f in (scaled_cross_entropy("e", strength=0, **options), cross_entropy("e", **options))
    )
    assert (
        torch.equal(found["loss"], want["loss"])
        and torch.equal(found["plain"], want["loss"])
        and torch.equal(found["accuracy"], want["accuracy"])
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strength", [2 / 3, -2.0])
def test_hard_items_count_more_and_parts_add_up(options, strength):
    logits, y, d = (
        torch.randn(6, 3),
        torch.tensor([0, 2, -100, 1, 1, 2]),
        torch.tensor([0.1, 0.9, 0.2, 1.0, math.nan, 0.0]),
    )
    scale = 1 + strength * (torch.tensor([0.1, 0.9, 0.2, 1.0, 0.5, 0.0]) - 0.5)
    weight = options.get("weight", torch.ones(3))[y.clamp(min=0)] * (y >= 0)
    each = nn.functional.cross_entropy(logits, y, reduction="none", **options)

    def ask(rows):
        return scaled_cross_entropy("e", strength=strength, **options)(
            said(e=logits[rows]), batch_of(e=y[rows], difficulty=d[rows])
        )

    everyone = list(range(6))
    assert ask(everyone)["loss"].item() == pytest.approx(
        ((each * scale).sum() / weight.sum()).item(), rel=1e-5
    )
    parts = [[0, 3], [1, 2], [4, 5]]
    total = sum(ask(rows)["loss"] * weight[rows].sum() for rows in parts) / weight.sum()
    assert ask(everyone)["loss"].item() == pytest.approx(total.item(), rel=1e-5)


def test_the_usual_form_in_its_proportions():
    "loss x (1 + d) is 3/2 of ours."
    logits, y, d = torch.randn(8, 3), torch.randint(0, 3, (8,)), rank_shares(torch.rand(8))
    usual = (nn.functional.cross_entropy(logits, y, reduction="none") * (1 + d)).mean()
    assert scaled_cross_entropy("e", "d")(said(e=logits), batch_of(e=y, d=d))[
        "loss"
    ].item() == pytest.approx(usual.item() / 1.5, rel=1e-5)


def test_nobody_known_costs_nothing_and_mistakes_are_named():
    logits = torch.randn(3, 4, requires_grad=True)
    batch = batch_of(e=torch.full((3,), -100), difficulty=torch.rand(3))
    loss = scaled_cross_entropy("e")(said(e=logits), batch)["loss"]
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()
    with pytest.raises(ConfigError, match="no target 'hardness'; there are e, difficulty"):
        scaled_cross_entropy("e", "hardness")(said(e=logits), batch)
    with pytest.raises(ConfigError, match="strength=3"):
        scaled_cross_entropy("e", strength=3)


# ------------------------------------------------------------------ dropout
def test_dropout_changes_after_the_curriculum_where_it_is_meant_to():
    model = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)),
            "head": nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 1)),
        }
    )

    def rates():
        return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    step = dropout_after(3)
    # also backwards: it keeps no state
    for epoch in (0, 2, 3, 7, 1):
        step(model, epoch)
        assert rates() == [0.1 if epoch < 3 else 0.6] * 2
    dropout_after(3, 0.0, 0.5, where="head.*")(model, 5)
    assert rates() == [0.1, 0.5]
    with pytest.raises(ConfigError, match="name like 'body"):
        dropout_after(where="body*")(model, 0)
    with pytest.raises(ConfigError, match="low=0.1, high=1.0"):
        dropout_after(high=1.0)


def test_dropout_of_a_run(monkeypatch):
    seen = []

    def objective(output, batch):
        if torch.is_grad_enabled():
            seen.append(model.drop.p)
        return mse("y")(output, batch)

    model = tiny()
    fit(
        model,
        objective,
        items(16),
        None,
        Plan(epochs=4, batch_size=8),
        tracking=QUIET,
        hooks=Hooks(at_epoch=dropout_after(2)),
    )
    assert seen == [0.1] * 4 + [0.6] * 4
