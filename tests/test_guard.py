"""The guard: which fault is named, what is left alone, what the model is afterwards, and the
report.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import items, tiny, watched
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import CheckpointError, ConfigError
from mmemo.core.state import seed_of
from mmemo.diagnostics.faults import Watch, is_bad, mend_values, odd_values
from mmemo.diagnostics.guard import Guard, draw_norms, layer_norms, replay_report
from mmemo.diagnostics.planted import FAULT_KINDS, plant_decoy, plant_fault
from mmemo.diagnostics.replay import Finding, find_cause
from mmemo.models.base import Multimodal, Project, RegressionHead, Standardize
from mmemo.models.fusion import ConcatNorm, get_fusion
from mmemo.models.temporal import TCN
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET, BadStep
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


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_planted_faults_are_named(kind):
    for seed in range(12):
        model, data, truth = plant_fault(plant_decoy(net(seed), DATA, seed), DATA, kind, seed)
        guard, half = Guard(), kind.startswith("fp16")
        try:
            fit(
                model,
                mse("y"),
                data,
                None,
                Plan(
                    epochs=10 if kind == "fp16 gradient" else 1,
                    batch_size=7,
                    precision="fp16" if half else "fp32",
                ),
                tracking=QUIET,
                hooks=Hooks(guard=guard),
            )
        except NonFiniteError:
            assert {k: getattr(guard.finding, k) for k in truth} == truth, (
                seed,
                str(guard.finding),
            )
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
