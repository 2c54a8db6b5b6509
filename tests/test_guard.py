"""The guard: which fault is named, what is left alone, what the model is afterwards, and the
report.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Answer, Tiny, items, tiny, watched
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import CheckpointError, ConfigError
from mmemo.core.state import seed_of
from mmemo.diagnostics.faults import Watch, is_bad, mend_values, odd_values
from mmemo.diagnostics.guard import Guard, draw_norms, layer_norms, replay_report
from mmemo.diagnostics.planted import FAULT_KINDS, plant_decoy, plant_fault
from mmemo.diagnostics.replay import Finding, find_cause, first_guilty
from mmemo.evaluation.metrics import regression_metrics
from mmemo.models.base import Multimodal, Project, RegressionHead, Standardize
from mmemo.models.fusion import ConcatNorm, get_fusion
from mmemo.models.temporal import TCN
from mmemo.training.history import History
from mmemo.training.loop import Hooks, evaluate_loss, fit
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET, BadStep, Tracking
from mmemo.training.update import NonFiniteError

TRAIN = items(44)
quiet = dict(progress=False, track=())


class Spread(nn.Module):
    "The root of 0 in feature 2 of item 1: fine forwards, infinite backwards."

    def forward(self, x):
        where = torch.zeros_like(x)
        where[1, 2] = 1
        return x + (x * (1 - where)).square().sqrt()


class Flat(nn.Module):
    "The identity, with an infinite gradient."

    class Slope(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, g: g * math.inf)

    def forward(self, x):
        return self.Slope.apply(x)


ERROR = mse("y")
TWO_EPOCHS = Plan(epochs=2, batch_size=8)


def step(model, batch, objective=ERROR, **options):
    return BadStep(
        model,
        objective,
        Plan(),
        [batch],
        [1.0],
        [list(range(100, 100 + len(batch)))],
        step=1,
        epoch=0,
        seed=3,
        **options,
    )


def stopped(model, data=TRAIN, objective=ERROR, plan=TWO_EPOCHS, guard=None):
    with pytest.raises(NonFiniteError) as caught:
        fit(model, objective, data, None, plan, tracking=QUIET, hooks=Hooks(guard=guard))
    return caught.value


def replaced(data, **targets):
    return Batch(data.streams, data.targets | targets, data.meta)


# --- fit: what is left behind


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_model_is_that_of_the_update_before(accumulate):
    """Weights, running statistics, the counter of batches; gradients are gone.

    The forward pass had written into all buffers by then.
    """
    kept, count, plan = {}, [0], Plan(epochs=2, batch_size=4, accumulate=accumulate)

    def look(entries):
        count[0] += 1
        # in the pass before the bad update's first
        if count[0] == 2 * accumulate:
            kept.update({k: v.clone() for k, v in model.state_dict().items()})
        return {"loss": entries["loss"] * (math.nan if count[0] == 3 * accumulate else 1)}

    model = tiny()
    error = stopped(model, objective=watched(look), plan=plan)
    assert error.finding is None and "at update 3" in str(error)
    found = model.state_dict()
    assert torch.equal(found["norm.running_mean"], kept["norm.running_mean"]) and int(
        found["norm.num_batches_tracked"]
    ) == 2 * accumulate == int(kept["norm.num_batches_tracked"])
    assert all(p.grad is None for p in model.parameters()) and not any(
        is_bad(v) for v in found.values()
    )


def test_a_guard_changes_nothing_in_a_sound_run():
    plan, runs = Plan(epochs=3, batch_size=8), []
    for guard in (None, Guard()):
        model = tiny()
        history = fit(model, mse("y"), TRAIN, None, plan, tracking=QUIET, hooks=Hooks(guard=guard))
        runs.append((history.steps, model.state_dict()))
    assert (
        runs[0][0] == runs[1][0]
        and all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values()))
        and guard.finding is None
    )


def test_fp16_puts_buffers_back_when_it_skips():
    """An overflow of the gradient alone: updates are skipped until the scale is below 1, then the
    guard is asked.
    """
    model = tiny(dropout=0.0)
    model.drop = Flat()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    error = stopped(model, plan=Plan(epochs=9, batch_size=8, precision="fp16"), guard=Guard())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), (
        "every update was skipped"
    )
    assert (
        error.finding.direction == "backward"
        and error.finding.name == "drop"
        and "at update 18" in str(error)
    )


def test_what_a_guard_is_given_and_says():
    seen = []
    model = tiny()
    model.encoder.weight.data[3, 2] = math.nan

    def guard(bad):
        seen.append(bad)
        return "ask the neighbour"

    error = stopped(model, plan=Plan(epochs=1, batch_size=8, accumulate=2, seed=5), guard=guard)
    bad = seen[0]
    assert (
        str(error).endswith("ask the neighbour")
        and error.finding == "ask the neighbour"
        and bad.seed == seed_of(5, 1, 0)
    )
    assert (
        [len(r) for r in bad.rows] == [8, 8]
        and bad.weights == [1.0, 1.0]
        and bad.counts == {"loss": 16.0}
        and torch.equal(bad.batches[1].targets["y"], TRAIN.targets["y"][bad.rows[1]])
    )
    assert bad.norms.shape == (1, len(bad.names)) == (1, 6)

    def broken(bad):
        raise RuntimeError("no time")

    assert "the guard itself failed: RuntimeError: no time" in str(stopped(model, guard=broken))


# --- find: who is named


def test_rows_parameters_buffers():
    x, y = TRAIN.streams["audio"].x.clone(), TRAIN.targets["y"].clone()
    x[7, 2, 3] = math.nan
    found = stopped(
        tiny(), TRAIN.replace(audio=TRAIN.streams["audio"].with_x(x)), guard=Guard()
    ).finding
    assert (found.kind, found.name, found.row) == ("input", "audio", 7) and str(
        found
    ) == "Cause: input audio, row 7 holds nan"
    y[5], y[6] = 1e30, math.nan  # NaN: unknown, and innocent
    found = stopped(
        tiny(),
        Batch(TRAIN.streams, {"y": y}, {"id": [f"item-{i}" for i in range(44)]}),
        guard=Guard(),
    ).finding
    assert str(found) == "Cause: target y, row 5 (item-5) holds 1e+30"
    model = tiny()
    model.norm.weight.data[2] = math.inf
    assert stopped(model, guard=Guard()).finding == Finding(
        "parameter", "norm.weight", note="holds inf"
    )
    model = Multimodal(
        {"audio": nn.Sequential(Standardize(torch.zeros(6), torch.ones(6)), Project(6, 4))},
        get_fusion("concat", {"audio": 4}, 4),
        {"y": RegressionHead(4)},
    )
    model.encoders["audio"][0].mean[1] = math.nan
    assert stopped(model, guard=Guard()).finding.name == "encoders.audio.0.mean"


def test_what_a_mask_hides_is_innocent():
    "NaN in the padding of row 2 and in a real step of row 4: only the second reaches the loss."
    s = TRAIN[:8].streams["audio"]
    x, mask = s.x.clone(), s.mask.clone()
    mask[2, 3:] = False
    x[2, 4, 1] = x[4, 0, 5] = math.nan
    found = find_cause(step(tiny(), TRAIN[:8].replace(audio=Stream(x, mask, s.t))))
    assert (found.kind, found.row) == ("input", 104)
    x[4, 0, 5] = 0.0
    assert find_cause(step(tiny(), TRAIN[:8].replace(audio=Stream(x, mask, s.t)))).kind == "nothing"


def test_operations_forward_backward_and_hidden():
    class Root(nn.Module):
        def forward(self, x):
            return x + torch.where(torch.arange(x.numel()).reshape(x.shape) == 35, -1.0, 1.0).sqrt()

    class Hidden(nn.Module):
        def forward(self, x):
            return torch.where(x > 100, x.sqrt(), x)

    class Masked(nn.Module):
        def forward(self, x):
            return x + x.masked_fill(x < math.inf, -math.inf).softmax(-1)

    for module, direction, operation, row in (
        (Root(), "forward", "sqrt", 102),
        (Spread(), "backward", "div", 101),
        (Hidden(), "forward", "sqrt", None),
        (Masked(), "forward", "_softmax", None),
        (Flat(), "backward", "mul", None),
    ):
        model = tiny(dropout=0.0)
        model.encoder = nn.Sequential(model.encoder, module)
        found = find_cause(step(model, TRAIN[:6]))
        assert (found.kind, found.name, found.direction, found.operation, found.row) == (
            "operation",
            "encoder.1",
            direction,
            operation,
            row,
        ), type(module)
        assert (
            "tests/test_guard.py" in found.line
            and f"{direction} pass of encoder.1: {operation}" in str(found)
        )

    def objective(output, batch):
        gap = output.predictions["y"] - output.predictions["y"].detach()
        return {"loss": gap.square().mean().sqrt()}

    found = find_cause(step(tiny(), TRAIN[:6], objective))
    assert (found.name, found.direction, found.operation) == (
        "objective",
        "backward",
        "div",
    ) and "gap.square().mean().sqrt()" in found.line


def test_overflow_is_told_from_bad_mathematics():
    class Big(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x + (
                torch.full_like(x, 300.0 if self.dtype == torch.float16 else 1e30).to(self.dtype)
                * (300.0 if self.dtype == torch.float16 else 1e30)
            )

    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        model = tiny()
        model.drop = Big(dtype)
        assert find_cause(step(model, TRAIN[:6])).overflow == str(dtype).removeprefix("torch.")

    class Log(nn.Module):
        def forward(self, x):
            return x + (x * 0).log()

    model = tiny()
    model.drop = Log()
    assert find_cause(step(model, TRAIN[:6])).overflow == ""


def test_the_norm_alone_and_nothing_at_all():
    def big(output, batch):
        return {"loss": output.predictions["y"].sum() * 1e25}

    found = find_cause(step(tiny(), TRAIN[:6], big))
    assert (
        found.kind == "norm"
        and found.name.startswith(("head", "norm", "encoder"))
        and "their norm is not" in str(found)
    )
    found = find_cause(step(tiny(), TRAIN[:6]))
    assert found.kind == "nothing" and "is sound" in str(found)


def test_dropout_is_the_same_when_done_again():
    "A fault that only some masks of dropout show: the noise is that of the update."

    class Picky(nn.Module):
        def forward(self, x):
            return x / (x[:, :3] != 0).any()

    plan, seen = Plan(epochs=40, batch_size=2, seed=1), 0
    for seed in range(3):
        model = tiny(dropout=0.6)
        model.drop = nn.Sequential(model.drop, Picky())
        try:
            fit(
                model,
                mse("y"),
                TRAIN,
                None,
                replace(plan, seed=seed),
                tracking=QUIET,
                hooks=Hooks(guard=(guard := Guard())),
            )
        except NonFiniteError:
            seen += guard.finding.name == "drop.1" and guard.finding.operation == "div"
    assert seen == 3


def test_accumulated_batches_and_the_right_row():
    x = TRAIN.streams["audio"].x.clone()
    x[31, 1, 1] = math.inf
    guard = Guard()
    stopped(
        tiny(),
        TRAIN.replace(audio=TRAIN.streams["audio"].with_x(x)),
        plan=Plan(epochs=1, batch_size=5, accumulate=4),
        guard=guard,
    )
    assert (
        guard.finding.row == 31
        and any(31 in rows for rows in guard.bad.rows)
        and len(guard.bad.rows) > 1
    )


def test_finding_leaves_no_trace():
    model = tiny()
    model.encoder.weight.data[0, 0] = math.nan
    model.norm.eval()
    noise = torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_cause(step(model, TRAIN[:6]))
    assert (
        all(
            torch.equal(v.nan_to_num(9), before[k].nan_to_num(9))
            for k, v in model.state_dict().items()
        )
        and not model.norm.training
        and torch.equal(noise, torch.get_rng_state())
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()) and all(
        p.grad is None for p in model.parameters()
    )


def test_checkpointed_parts_are_computed_twice_and_named_once():
    from torch.utils.checkpoint import checkpoint

    class Saved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model = tiny(dropout=0.0)
    model.encoder = nn.Sequential(model.encoder, Saved(Spread()))
    found = find_cause(step(model, TRAIN[:6]))
    assert (found.name, found.direction, found.operation) == ("encoder.1.inner", "backward", "div")


# --- planted faults


def net(seed=0):
    torch.manual_seed(seed)
    encoders = {
        "audio": nn.Sequential(
            Standardize(torch.zeros(6), torch.ones(6)), TCN(6, 8, dilations=(1,))
        ),
        "video": Project(3, 8),
    }
    return Multimodal(
        encoders,
        (
            ConcatNorm({"audio": 8, "video": 8}, 8, 0.1)
            if seed % 2
            else get_fusion("cross_attention", {"audio": 8, "video": 8}, 8, heads=2)
        ),
        {"y": RegressionHead(8)},
    )


DATA = TRAIN.replace(
    video=Stream.of(torch.randn(44, 7, 3, generator=torch.Generator().manual_seed(1)), rate=10.0)
)[:14]


@pytest.mark.filterwarnings("ignore:std", "ignore:the validation", "ignore:no epoch")
@pytest.mark.parametrize("kind", [kind for kind in FAULT_KINDS if kind != "two processes"])
def test_planted_faults_are_named(kind):
    for seed in range(12):
        decoy = plant_decoy(net(seed), DATA, seed)
        model, data, truth = plant_fault(decoy, DATA, kind, seed)
        train, valid = (DATA, data) if kind == "validation" else (data, None)
        epochs = 10 if kind == "fp16 gradient" else 1
        half = "fp16" if kind.startswith("fp16") else "fp32"
        plan, guard = Plan(epochs=epochs, batch_size=7, precision=half), Guard()
        try:
            fit(model, mse("y"), train, valid, plan, QUIET, Hooks(guard=guard))
        except NonFiniteError:
            assert valid is None
        if guard.finding:
            said = {k: getattr(guard.finding, k) for k in truth}
            assert said == truth, (seed, str(guard.finding))
            return
    pytest.fail("the fault never showed")


def test_a_decoy_is_no_fault_and_plants_are_repeatable():
    for seed in range(6):
        fit(
            plant_decoy(net(seed), DATA, seed),
            mse("y"),
            DATA,
            None,
            Plan(epochs=2, batch_size=7),
            tracking=QUIET,
            hooks=Hooks(guard=Guard()),
        )
    assert (
        plant_fault(net(), DATA, "overflow", 4)[2] == plant_fault(net(), DATA, "overflow", 4)[2]
        and len({plant_fault(net(), DATA, "overflow", s)[2]["name"] for s in range(9)}) > 3
    )
    with pytest.raises(ConfigError, match="no fault 'gremlin'; choose log of 0"):
        plant_fault(net(), DATA, "gremlin")
    with pytest.raises(ConfigError, match="no buffer of real numbers"):
        plant_fault(nn.Linear(2, 2), DATA, "buffer")


def test_odd_and_mend():
    t = torch.tensor([1.0, math.nan, 3.0, -math.inf, 1e20])
    assert (
        odd_values(t).tolist() == [False, True, False, True, True]
        and mend_values(t).tolist() == [1, 2, 3, 2, 2]
        and mend_values(torch.full((2,), math.nan)).tolist() == [1, 1]
    )
    assert mend_values(t, torch.tensor([0, 1, 0, 0, 0]).bool())[3] == -math.inf and odd_values(
        torch.tensor([6e4, math.inf]).half()
    ).tolist() == [False, True]


def test_infinities_on_purpose_are_not_made():
    x = torch.randn(3, 5, requires_grad=True)
    with Watch(nn.Identity()) as watch:
        loss = x.masked_fill(x > 0, -math.inf).softmax(-1).nan_to_num().square().sum()
        (torch.where(x > 0, x, math.inf).amin(-1).clamp(max=2).sum() + loss).backward()
    assert watch.ops and all(op.placed for op in watch.ops.values()) and watch.roots([loss]) == []


# --- data that are never the same twice


class Noisy:
    "A data set that draws noise for each row whenever it is asked."

    def __init__(self, data, generator=None):
        self.data, self.generator = data, generator

    def __len__(self):
        return len(self.data)

    def __getitem__(self, rows):
        batch = self.data[rows]
        s = batch.streams["audio"]
        noise = 0.01 * torch.randn(s.x.shape, generator=self.generator)
        return batch.replace(audio=s.with_x(s.x + noise))


class Unlucky(nn.Module):
    "The item that draws the largest number meets the logarithm of 0. Remembers who it was first."

    def __init__(self, generator=None):
        super().__init__()
        self.generator, self.first = generator, []

    def forward(self, x):
        drawn = torch.rand(len(x), generator=self.generator)
        self.first.append(int(drawn.argmax()))
        return x + torch.where(drawn == drawn.max(), 0.0, 1.0).log().unsqueeze(1)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("objective", ["mean", "function"])
def test_noise_of_the_data_does_not_move_that_of_the_model(accumulate, own, objective):
    "The item is named that was unlucky in the update itself; with a generator of its own, too."
    model = tiny()
    generator = torch.Generator().manual_seed(4) if own else None
    model.drop = Unlucky(generator)
    guard, plan = Guard(), Plan(epochs=1, batch_size=9, accumulate=accumulate)
    mean = mse("y")
    function = mean if objective == "mean" else lambda output, batch: mean(output, batch)
    stopped(model, Noisy(TRAIN), function, plan, guard)
    first = model.drop.first[0]
    assert guard.finding.name == "drop" and guard.finding.operation == "log"
    assert guard.finding.row == guard.bad.rows[0][first]


def test_the_batch_itself_is_replayed():
    "A value that is NaN only the first time that the data set is asked for it."

    class Once(Noisy):
        asked = 0

        def __getitem__(self, rows):
            batch = self.data[rows]
            self.asked += 1
            if self.asked == 2:
                batch.streams["audio"].x[3, 1, 1] = math.nan
            return batch

    data, guard = Once(TRAIN), Guard()
    stopped(tiny(), data, guard=guard)
    asked = data.asked
    assert (guard.finding.kind, guard.finding.row) == ("input", guard.bad.rows[0][3])
    assert str(find_cause(guard.bad)) == str(guard.finding) and data.asked == asked


def test_a_model_that_writes_into_its_batch_is_told():
    class Writes(Tiny):
        def forward(self, batch):
            batch.streams["audio"].x.mul_(math.nan)
            return super().forward(batch)

    found = stopped(Writes(), guard=Guard()).finding
    assert "the model writes into audio of its batch" in str(found)


def test_buffers_that_are_exchanged_are_put_back():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(16))

        def forward(self, x):
            self.mean = 0.9 * self.mean + x.detach().mean(0)
            return x + self.mean

    model, x = tiny(), TRAIN.streams["audio"].x.clone()
    model.drop, x[20, 1, 1] = Average(), math.nan
    found = stopped(
        model, TRAIN.replace(audio=TRAIN.streams["audio"].with_x(x)), guard=Guard()
    ).finding
    assert (found.kind, found.row) == ("input", 20) and torch.isfinite(model.drop.mean).all()


# --- values that nobody has registered


class Gain(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        value = self.value
        value = value["last"] if isinstance(value, dict) else value
        return x * torch.as_tensor(value, dtype=x.dtype).reshape(-1)[-1]


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1e30])
def test_an_attribute_is_named_and_no_overflow(odd):
    for value, name in (
        (odd, "drop.value"),
        (torch.tensor([1.0, odd]), "drop.value"),
        (np.array([1.0, odd]), "drop.value"),
        ({"last": torch.tensor(odd)}, "drop.value.last"),
    ):
        model = tiny()
        model.drop = Gain(value)
        found = stopped(model, guard=Guard()).finding
        assert (found.kind, found.name, found.overflow) == ("attribute", name, ""), str(found)
        assert f"holds {odd:.4g}" in str(found)
        assert str(model.drop.value) == str(value), "it is left as it was"


def test_weights_in_an_objective_are_named():
    weight = torch.tensor([1.0, math.nan, 1.0])
    y = torch.arange(44) % 3

    class Classes(Tiny):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, batch):
            s = batch.streams["audio"]
            return Answer({"c": self.head(self.encoder(s.x.mean(1)))})

    data = Batch(TRAIN.streams, {"c": y})
    found = stopped(Classes(), data, cross_entropy("c", weight=weight), guard=Guard()).finding
    assert found.kind == "attribute" and found.name.startswith("objective.") and not found.overflow
    assert found.name.endswith("weight")


def test_masked_values_in_attributes_are_no_suspects():
    class Masks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fill, self.hidden = -math.inf, torch.tensor([0.0, -math.inf, -math.inf])

        def forward(self, x):
            return x + x.masked_fill(x < math.inf, self.fill).softmax(-1)

    model = tiny()
    model.drop = Masks()
    found = stopped(model, guard=Guard()).finding
    assert (found.kind, found.name, found.operation) == ("operation", "drop", "_softmax")


@pytest.mark.parametrize("form", ["tensor", "list", "array"])
def test_a_meta_field_is_named_with_its_row(form):
    weights = torch.ones(44)
    weights[7] = math.nan
    field = {"tensor": weights, "list": weights.tolist(), "array": weights.numpy()}[form]
    data = Batch(TRAIN.streams, TRAIN.targets, {"weight": field, "take": list(range(44))})

    def objective(output, batch):
        error = output.predictions["y"] - batch.targets["y"]
        return {"loss": (error.square() * torch.as_tensor(batch.meta["weight"])).mean()}

    found = stopped(tiny(), data, objective, guard=Guard()).finding
    assert (found.kind, found.name, found.row, found.overflow) == ("meta", "weight", 7, "")


def test_what_is_found_and_not_made_is_no_overflow():
    "A value that came from nowhere the guard looks: said as it is."
    hidden = iter([torch.tensor(math.nan)] * 99)

    class Stranger(nn.Module):
        def forward(self, x):
            return x * next(hidden)

    model = tiny()
    model.drop = Stranger()
    found = stopped(model, guard=Guard()).finding
    assert found.name == "drop" and not found.overflow
    assert "is given NaN that was there before" in str(found)


# --- rows that are too large


class Plain(Tiny):
    "No norm, so that a large row stays large."

    def forward(self, batch):
        said = self.head(self.encoder(batch.streams["audio"].x.mean(1)))
        return Answer({"y": said[:, 0]})


@pytest.mark.parametrize("factor", [1e15, 1e18, 1e20, 1e30])
@pytest.mark.parametrize("size", [8, 2])
def test_a_row_that_is_far_too_large_is_named(factor, size):
    x = TRAIN.streams["audio"].x.clone()
    x[30] *= factor
    data = TRAIN.replace(audio=TRAIN.streams["audio"].with_x(x))
    error = stopped(Plain(), data, plan=Plan(epochs=1, batch_size=size), guard=Guard())
    assert (error.finding.kind, error.finding.name, error.finding.row) == ("input", "audio", 30)
    assert "first in " not in str(error) or "first in head" in str(error)


def test_a_norm_that_overflows_alone_names_the_largest_gradient():
    error = stopped(tiny(), objective=lambda o, b: {"loss": o.predictions["y"].sum() * 1e25})
    assert "though every gradient is finite (the largest is that of " in str(error)


def test_the_guilty_is_found_among_many_unknown_targets():
    "More suspects than could be tried one by one; labels that are no fractions."
    y = torch.full((200,), math.nan)
    y[:2], y[190] = torch.tensor([1.0, 0.0]), 1e30
    data = Batch(items(200).streams, {"y": y})
    found = stopped(tiny(), data, plan=Plan(epochs=1, batch_size=200), guard=Guard()).finding
    assert (found.kind, found.row) == ("target", 190)
    tried = []

    def bad(left):
        tried.append(left)
        return 77 in left

    assert first_guilty(list(range(100)), bad) == 77 and len(tried) < 10
    assert first_guilty([1, 2, 3], lambda left: len(left) > 1) == 1


# --- validation data


class Peak(nn.Module):
    "A statistic that training lets grow and only eval mode looks at."

    def __init__(self):
        super().__init__()
        self.register_buffer("peak", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.peak.add_(2e38)
            return x
        return x - self.peak


@pytest.mark.parametrize("guard", [None, Guard])
def test_a_validation_loss_that_is_nan_is_told(tmp_path, guard):
    model = tiny()
    model.drop = Peak()
    plan, hooks = Plan(epochs=6, batch_size=8, patience=2), Hooks(guard=guard and guard())
    tracking = Tracking(tmp_path / "run", progress=False, track=())
    with pytest.warns(UserWarning) as heard:
        history = fit(model, mse("y"), TRAIN, items(12, 1), plan, tracking, hooks)
    said = [str(warning.message) for warning in heard]
    assert len(history.epochs) == 2 and history.best is None
    assert history.notes == History.load(tmp_path / "run").notes and len(history.notes) == 2
    start = "the validation loss of epoch 0 is not finite, so this epoch cannot be the best one"
    cause = ". Cause: buffer drop.peak holds inf" if guard else ""
    assert said[0] == history.notes[0] == start + cause
    assert said[-1] == "no epoch had a finite validation loss: the weights are the last ones"


def test_a_bad_row_of_validation_data_is_named(tmp_path):
    valid, guard = items(30, 1), Guard(tmp_path / "nan")
    x = valid.streams["audio"].x
    x[17, 2, 4] = math.nan
    metrics = {"error": lambda p, t: regression_metrics(p["y"], t["y"])["mae"]}
    tracking, plan = replace(QUIET, metrics=metrics), Plan(epochs=2, batch_size=8)
    with pytest.warns(UserWarning, match="input audio, row 17 of the validation data holds nan"):
        history = fit(tiny(), mse("y"), TRAIN, valid, plan, tracking, Hooks(guard=guard))
    assert (guard.finding.part, guard.finding.row) == ("valid", 17) and len(history.epochs) == 2
    assert replay_report(tmp_path / "nan", tiny(seed=4), mse("y")) == guard.finding


def test_nan_does_not_hide_the_best_epoch():
    "Epochs with NaN come after good ones: the best one stays, and its weights come back."
    seen = []

    class Late(nn.Module):
        def forward(self, x):
            if self.training or len(seen) < 2:
                return x
            return x * math.nan

    def at_epoch(model, epoch):
        seen[:] = range(epoch)

    model = tiny()
    model.drop = Late()
    plan = Plan(epochs=9, batch_size=8, patience=3, lr=1e-2)
    with pytest.warns(UserWarning, match="of epoch 2 is not finite"):
        history = fit(model, mse("y"), TRAIN, items(12, 1), plan, QUIET, Hooks(at_epoch=at_epoch))
    assert history.best["epoch"] in (0, 1) and len(history.epochs) == history.best["epoch"] + 4
    seen.clear()
    loss = evaluate_loss(model, mse("y"), items(12, 1))["loss"]
    assert loss == pytest.approx(history.best["valid"]["loss"])


# --- two processes

JOB = """
import json, math, os, sys
sys.path[:0] = [{tests!r}]
import torch
from test_guard import *
torch.set_num_threads(1)
rank, said = int(os.environ["RANK"]), []
x, y = items(81).streams["audio"].x, items(81).targets["y"]
x[37, 2, 3], y[52] = math.nan, 1e30
one = items(81).replace(audio=items(81).streams["audio"].with_x(x))
other = Batch(items(81).streams, {{"y": y}})
mean = mse("y")
function = lambda output, batch: mean(output, batch)
broken = tiny(norm=False)
broken.head.weight.data[0, 3] = math.nan
cases = [(tiny(norm=False), one, mean, 37), (tiny(norm=False), other, mean, 52)]
cases += [(tiny(norm=False), one, function, 37), (tiny(norm=False), other, function, 52)]
cases += [(broken, items(81), mean, None)]
for accumulate in (1, 2):
    for i, (model, data, objective, row) in enumerate(cases):
        folder = {folder!r} + f"/nan-{{accumulate}}-{{i}}"
        plan, guard = Plan(epochs=1, batch_size=8, accumulate=accumulate), Guard(folder)
        error = stopped(model, data, objective, plan, guard)
        own = any(row in rows for rows in guard.bad.rows)
        again = replay_report(folder, tiny(norm=False), objective) if own else None
        same = again in (None, error.finding)
        said.append([str(error), guard.finding.process == rank, own, same])
alone = Guard() if rank == 0 else None
said.append(str(stopped(tiny(norm=False), one, guard=alone, plan=Plan(epochs=1, batch_size=8))))
with open({folder!r} + f"/{{rank}}.json", "w") as file:
    json.dump(said, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
os._exit(0)
"""


def test_two_processes_name_the_row_of_either(tmp_path):
    """Every process says the same, for a loss that is a mean and for one of which nobody knows; the
    report is that of the process whose share holds the row.
    """
    script = tmp_path / "job.py"
    script.write_text(JOB.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    rows = ["input audio, row 37, in process", "target y, row 52, in process"] * 2
    names = [*rows, "parameter head.weight holds nan"] * 2
    for name, one, other in zip(names, first, second):
        assert name in one[0] and one[0] == other[0]
        assert one[3] and other[3], "the report finds the same again"
        if "row" in name:
            assert one[1] == one[2] != other[1] == other[2], one[0]
    owners = {said[0].split("in process ")[1][0] for said in first[:4]}
    assert owners <= {"0", "1"}
    # only the first process has a guard
    assert "in the share of another process" in first[-1] or "row 37" in first[-1]
    assert "Cause" not in second[-1]


# --- the report


@pytest.fixture
def reported(tmp_path):
    model = tiny()
    model.drop = nn.Sequential(model.drop, Flat())
    data = Batch(
        TRAIN.streams,
        TRAIN.targets,
        {
            "id": [f"item-{i}" for i in range(44)],
            "score": torch.arange(44.0),
            "path": [Path("x")] * 44,
        },
    )
    error = stopped(model, data, guard=(guard := Guard(tmp_path / "nan")))
    return tmp_path / "nan", guard, error


def test_a_report_finds_the_same_again(reported):
    folder, guard, error = reported
    assert sorted(p.name for p in folder.iterdir()) == ["norms-00000001.png", "step-00000001"]
    assert {p.suffix for p in (folder / "step-00000001").iterdir()} == {".json", ".safetensors"}
    other = tiny(seed=8)
    other.drop = nn.Sequential(other.drop, Flat())
    assert (
        replay_report(folder, other, mse("y")) == guard.finding == error.finding
        and json.loads((folder / "step-00000001" / "state.json").read_text())["finding"]["name"]
        == "drop.1"
    )
    script = (
        "import sys, torch; sys.path[:0] = ['tests']\nfrom test_guard import *\nm ="
        " tiny(seed=5); m.drop = nn.Sequential(m.drop, Flat());"
        f" print(replay_report({str(folder)!r}, m, mse('y')))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert out.stdout.strip() == str(error.finding), out.stderr[-800:]


def test_a_damaged_report_and_another_model_are_refused(reported):
    folder, guard, _ = reported
    with pytest.raises(CheckpointError, match="does not fit this model"):
        replay_report(folder, nn.Linear(2, 2), mse("y"))
    file = folder / "step-00000001" / "batches.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(CheckpointError, match="batches.safetensors is damaged"):
        replay_report(folder, tiny(), mse("y"))


def test_a_full_disk_does_not_hide_the_finding(tmp_path):
    (tmp_path / "file").write_text("")
    model = tiny()
    model.drop = Flat()
    error = stopped(model, guard=Guard(tmp_path / "file" / "nan"))
    assert error.finding.name == "drop" and "(no report: " in str(error)


def test_norms_of_layers_and_their_picture():
    names, norms = (
        ["a.0.weight", "a.0.bias", "a.1.weight", "scale"],
        torch.tensor([[3.0, 4, 1, 2], [6, 8, 0, math.nan]]),
    )
    layers, values = layer_norms(names, norms)
    assert (
        layers == ["a.0", "a.1", "scale"]
        and values[:, 0].tolist() == [5, 10]
        and torch.equal(values[0, 1:], torch.tensor([1.0, 2]))
    )
    ax = draw_norms(names, norms, 17, Finding("operation", "a.0", direction="forward"))
    ax.figure.canvas.draw()
    shown = ax.get_images()[0].get_array()
    assert (
        shown.shape == (3, 2)
        and bool(shown.mask[2, 1])
        and not shown.mask[0].any()
        and [t.get_fontweight() for t in ax.get_yticklabels()] == ["bold", "normal", "normal"]
    )
    many = [f"net.{i}.{part}.weight" for i in range(60) for part in ("q", "k")]
    assert len(draw_norms(many, torch.rand(5, 120) + 1, 5).get_yticklabels()) <= 60
