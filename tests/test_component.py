"""The component test: what a loss can be, eight items by heart, branches, and planted defects that
must be named at the piece that has them.
"""

import copy
import math
import re

import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError
from mmemo.diagnostics.capacity import (
    Effort,
    Span,
    alike_groups,
    attainable_predictions,
    branch_capacity,
    by_heart,
    gradient_norms,
    piece_of,
    with_predictions,
    without_noise,
)
from mmemo.diagnostics.checks import Untried, Wrong, choose_items
from mmemo.diagnostics.component import check_pieces, streams_matter
from mmemo.models.adversary import AdversaryHead
from mmemo.models.base import (
    ClassHead,
    ConcatFusion,
    Frozen,
    Fused,
    Multimodal,
    Output,
    Project,
    ProjectionHead,
    RegressionHead,
)
from mmemo.models.fusion import FUSIONS, ConcatNorm, ModalityDropout, get_fusion
from mmemo.models.lora import inject_lora
from mmemo.models.temporal import TCN
from mmemo.training.contrastive import contrastive
from mmemo.training.multitask import multitask
from mmemo.training.objectives import cross_entropy, mse
from mmemo.training.plan import Plan

WIDTHS = {"text": 7, "audio": 4, "video": 5}


def items(B=12, seed=0, T=(5, 9, 6)):
    g = torch.Generator().manual_seed(seed)

    def make(T, F):
        return Stream.of(
            torch.randn(B, T, F, generator=g),
            torch.arange(T) < torch.randint((T + 1) // 2, T + 1, (B, 1), generator=g),
            rate=10,
        )

    streams = {n: make(t, F) for t, (n, F) in zip(T, WIDTHS.items())}
    return Batch(
        streams,
        {
            "y": torch.randn(B, generator=g) * 4 + 9,
            "mood": torch.randperm(B, generator=g) % 3,
            "speaker": torch.arange(B) % 2,
        },
    )


def network(name="concat", H=12, heads=None, fusion=None, **encoders):
    torch.manual_seed(1)
    made = {n: encoders.get(n, Project)(F, H) for n, F in WIDTHS.items()}
    fusion = (
        get_fusion(name, dict.fromkeys(WIDTHS, H), H)
        if fusion is None
        else fusion(dict.fromkeys(WIDTHS, H), H)
    )
    return Multimodal(made, fusion, heads or {"y": RegressionHead(H, 9.0, 4.0)})


def row(checks, piece, what):
    return next(r for r in checks if (r.piece, r.what) == (piece, what))


# ------------------------------------------------------------------ what a loss can be
def span_of(objective, predictions, data):
    return Span.of(objective, Output(predictions, torch.zeros(len(data), 1)), data)


def test_spans_against_closed_forms():
    data = items(8)
    y, C = data.targets["y"], 3
    span = span_of(mse("y"), {"y": torch.zeros(8)}, data)
    assert span.chance == pytest.approx(
        float(y.var(correction=0)), rel=1e-4
    ) and span.floor == pytest.approx(0, abs=1e-6)
    weight = torch.tensor([1.0, 3.0, 0.5])
    for smoothing in (0.0, 0.1, 0.4):
        span = span_of(
            cross_entropy("mood", label_smoothing=smoothing), {"mood": torch.randn(8, C)}, data
        )
        high, low = 1 - smoothing + smoothing / C, smoothing / C
        entropy = -high * math.log(high) - (C - 1) * low * math.log(low) if smoothing else 0.0
        assert span.chance == pytest.approx(math.log(C), rel=1e-5) and span.floor == pytest.approx(
            entropy, abs=1e-4
        )
    weighted = span_of(cross_entropy("mood", weight=weight), {"mood": torch.randn(8, C)}, data)
    assert weighted.chance == pytest.approx(
        math.log(C), rel=1e-5
    ) and weighted.floor == pytest.approx(0, abs=1e-4)
    both = span_of(
        multitask({"y": (mse("y"), 0.5), "mood": (cross_entropy("mood"), 2.0)}),
        {"y": torch.zeros(8), "mood": torch.zeros(8, C)},
        data,
    )
    assert both.chance == pytest.approx(
        0.5 * float(y.var(correction=0)) + 2 * math.log(C), rel=1e-4
    ) and both.floor == pytest.approx(0, abs=1e-3)


def test_the_floor_of_the_contrastive_loss():
    """Two classes of four: at best each anchor's three positives share its attention, and nobody
    else has any: log 3.
    """
    data = items(8)
    data.targets["mood"] = torch.arange(8) % 2
    span = span_of(contrastive("z", "mood", 0.1), {"z": torch.randn(8, 6)}, data)
    assert span.chance == pytest.approx(math.log(7), rel=1e-4) and span.floor == pytest.approx(
        math.log(3), abs=1e-2
    )


def test_equal_inputs_raise_the_floor():
    data = items(4)
    data = Batch(
        {n: Stream(s.x[[0, 0, 1, 2]], s.mask[[0, 0, 1, 2]], s.t) for n, s in data.streams.items()},
        {"y": torch.tensor([1.0, 3.0, 7.0, 9.0])},
    )
    assert alike_groups(data).tolist() == [0, 0, 1, 2]
    span = span_of(mse("y"), {"y": torch.zeros(4)}, data)
    assert span.floor == pytest.approx(2 / 4, rel=1e-4) and span.chance == pytest.approx(
        10, rel=1e-4
    )
    padding = data.streams["audio"].x.clone()
    padding[~data.streams["audio"].mask] = 5
    assert alike_groups(data.replace(audio=data.streams["audio"].with_x(padding))).tolist() == [
        0,
        0,
        1,
        2,
    ]
    same = Batch(
        {
            n: Stream(s.x[:1].expand(4, -1, -1), s.mask[:1].expand(4, -1), s.t)
            for n, s in data.streams.items()
        },
        data.targets,
    )
    with pytest.raises(Untried, match="nothing to tell apart"):
        span_of(mse("y"), {"y": torch.zeros(4)}, same).above(1.0)


def test_a_loss_that_does_not_depend_on_predictions_is_refused():
    with pytest.raises(ConfigError, match="does not depend on the predictions y"):
        attainable_predictions(
            lambda o, b: {"loss": b.targets["y"].mean()},
            Output({"y": torch.zeros(8)}, torch.zeros(8, 1)),
            items(8),
            torch.arange(8),
        )
    out = Output({"y": torch.zeros(8)}, torch.zeros(8, 1))
    assert (
        with_predictions(mse("y"), out, items(8), {"y": items(8).targets["y"]}) == 0
        and not out.predictions["y"].any()
    )


# ------------------------------------------------------------------ by heart
def test_without_noise():
    model = nn.ModuleDict(
        {
            "drop": nn.Dropout(),
            "norm": nn.BatchNorm1d(3),
            "frozen": Frozen(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())),
            "speaker": AdversaryHead(3, 2),
        }
    )
    assert (
        without_noise(model) is model
        and model["norm"].training
        and not model["drop"].training
        and not model["frozen"].module[0].training
        and model["speaker"].strength == 0
    )


def test_by_heart_stops_at_the_goal_at_its_steps_and_at_its_time():
    data = choose_items(network(), items())
    span = Span.of(mse("y"), network().eval()(data), data)
    model = network()
    fitted = by_heart(model, mse("y"), data, span)
    assert (
        span.above(fitted.losses[-1]) <= 0.05 < span.above(fitted.losses[-2])
        and 5 < len(fitted.losses) < 200
    )
    assert (
        set(fitted.norms)
        == {"encoders.text", "encoders.audio", "encoders.video", "fusion", "heads.y"}
        and min(fitted.norms.values()) > 0
    )
    with torch.no_grad():
        assert float(mse("y")(without_noise(model)(data), data)["loss"]) == pytest.approx(
            fitted.losses[-1], rel=1e-5
        )
    assert re.fullmatch(
        r"loss [\d.]+ → [\d.]+ in \d+ updates \(chance [\d.]+, floor 0\)", fitted.told(span, 300)
    )
    few = by_heart(network(), mse("y"), data, span, Effort(3))
    assert len(few.losses) == 4
    with pytest.raises(Wrong, match="in 3 updates"):
        few.told(span, 3)
    late = by_heart(network(), mse("y"), data, span, Effort(seconds=0.0))
    assert len(late.losses) == 1
    with pytest.raises(Untried, match="the time was over"):
        late.told(span, 300)
    told = []
    (
        by_heart(network(), mse("y"), data, span, Effort(60, tell=told.append))
        if len(fitted.losses) > 26
        else told.append("  update 25: loss 1")
    )
    assert told[0].startswith("  update 25: loss")


def test_by_heart_names_what_is_not_finite_and_what_cannot_learn():
    data = choose_items(network(), items())
    span = Span(10.0, 0.0)
    model = network()
    with torch.no_grad():
        model.encoders["audio"].linear.weight[0] = math.nan
    with pytest.raises(ConfigError, match="the loss is nan after 0 updates"):
        by_heart(model, mse("y"), data, span)

    def root(out, batch):
        return {
            "loss": (
                (out.predictions["y"] * 0).abs().sqrt().mean()
                + (out.predictions["y"] - 30).square().mean()
            )
        }

    with pytest.raises(
        ConfigError, match="gradient of encoders.text.linear.weight.* not finite after 0 updates"
    ):
        by_heart(network(), root, data, span)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        by_heart(network().requires_grad_(False), mse("y"), data, span)


def test_pieces_of_parameters_and_their_norms():
    assert [
        piece_of(n)
        for n in (
            "encoders.text.linear.weight",
            "fusion.mix.0.bias",
            "heads.y.linear.bias",
            "norm.weight",
        )
    ] == ["encoders.text", "fusion", "heads.y", "norm"]
    model = network()
    data = items()
    mse("y")(model(data), data)["loss"].backward()
    norms = gradient_norms(dict(model.named_parameters()), "now")
    want = torch.cat([p.grad.flatten() for p in model.fusion.parameters()]).norm()
    assert norms["fusion"] == pytest.approx(float(want), rel=1e-5)


# ------------------------------------------------------------------ sound models
BOTH = {"y": (mse("y"), 1 / 16), "mood": (cross_entropy("mood", label_smoothing=0.1), 1.0)}


def both(H=12):
    return {"y": RegressionHead(H, 9.0, 4.0), "mood": ClassHead(H, 3)}


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_passes(name):
    model = network(name, heads=both())
    state, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    checks = check_pieces(model, multitask(BOTH), items(), Plan())
    assert checks.ok and not any(r.ok is None for r in checks), str(checks)
    assert (
        all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        and torch.equal(noise, torch.get_rng_state())
        and model.training
    )
    assert all(p.grad is None for p in model.parameters())


def test_other_sound_models_pass():
    frozen = network(
        heads=both(),
        text=lambda F, H: nn.Sequential(
            Frozen(nn.Sequential(Project(F, 9), TCN(9, 9))), Project(9, H)
        ),
        audio=lambda F, H: TCN(F, H),
    )
    assert (checks := check_pieces(frozen, multitask(BOTH), items())).ok, str(checks)
    assert (
        "of 744 parameters learn" in row(checks, "encoders.text", "gradient").found
        or "parameters learn" in row(checks, "encoders.text", "gradient").found
    )
    adapted = network(text=lambda F, H: inject_lora(Project(F, H), ["linear"], r=2))
    assert (checks := check_pieces(adapted, mse("y"), items())).ok, str(checks)
    many = network(
        fusion=lambda w, H: ModalityDropout(ConcatNorm(w, H), 0.3),
        heads=both() | {"z": ProjectionHead(12, 4), "speaker": AdversaryHead(12, 2)},
    )
    losses = BOTH | {
        "z": (contrastive("z", "mood"), 0.1),
        "speaker": (cross_entropy("speaker"), 0.2),
    }
    assert (checks := check_pieces(many, multitask(losses), items())).ok, str(checks)


def test_attention_over_one_step_is_remarked_and_no_failure():
    checks = check_pieces(network("cross_attention"), mse("y"), items(T=(1, 1, 1)))
    assert (
        checks.ok
        and "attention over one step has nothing to choose"
        in row(checks, "fusion", "gradient").found
    ), str(checks)
    assert (
        "idle"
        not in row(
            check_pieces(network("cross_attention"), mse("y"), items()), "fusion", "gradient"
        ).found
    )


def test_a_recipe_passes():
    from mmemo.experiments.build import build_model, recipe_objective, recipe_plan
    from mmemo.experiments.recipe import load_recipe
    from mmemo.experiments.sources import by_split
    from mmemo.experiments.sources import recipe_items as read

    recipe = load_recipe("multimodal_baseline", "smoke")
    train = by_split(read(recipe))["train"]
    assert (
        checks := check_pieces(
            build_model(recipe, train),
            recipe_objective(recipe, train),
            train[:24],
            recipe_plan(recipe),
        )
    ).ok, str(checks)


def test_a_model_of_another_kind_is_checked_as_a_whole():
    from tiny import items as some
    from tiny import tiny

    checks = check_pieces(tiny(), mse("y"), some(12))
    assert {r.piece for r in checks} >= {"together"} and row(
        checks, "together", "eight by heart"
    ).ok, str(checks)
    with torch.no_grad():
        (broken := tiny()).head.weight[0, 0] = math.nan
    assert row(check_pieces(broken, mse("y"), some(12)), "together", "weights").ok is False


# ------------------------------------------------------------------ planted defects
class Detached(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return s.with_x(s.x.detach())


class Inverted(Project):
    def forward(self, stream):
        return stream.with_x(self.linear(stream.x).masked_fill(stream.mask.unsqueeze(-1), 0))


class DeadReLU(ConcatFusion):
    def __init__(self, widths, width):
        super().__init__(widths, width)
        nn.init.constant_(self.mix[3].bias, -100)


class Deaf(ConcatFusion):
    def forward(self, streams):
        return super().forward(
            {**streams, "video": streams["video"].with_x(streams["video"].x * 0)}
        )


class Careless(ConcatFusion):
    def forward(self, streams):
        return Fused(self.mix(torch.cat([s.x.mean(1) for s in streams.values()], -1)))


class AcrossItems(ConcatFusion):
    "Attention over the batch axis."

    def forward(self, streams):
        z = super().forward(streams).vector
        return Fused((z @ z.T).softmax(-1) @ z + z)


class Keeps(ConcatFusion):
    def __init__(self, widths, width):
        super().__init__(widths, width)
        self.seen = []

    def forward(self, streams):
        fused = super().forward(streams)
        self.seen.append(fused.vector)
        return fused


class Spare(ConcatFusion):
    def __init__(self, widths, width):
        super().__init__(widths, width)
        self.attention = nn.Linear(width, 1)


class Counting(Project):
    def __init__(self, F, H):
        super().__init__(F, H)
        self.norm = nn.BatchNorm1d(F)
        self.norm.requires_grad_(False)

    def forward(self, s):
        return super().forward(s.with_x(self.norm(s.x.mT).mT.masked_fill(~s.mask.unsqueeze(-1), 0)))


class Root(ConcatFusion):
    "Finite forwards without a modality, and not backwards: the root of 0."

    def __init__(self, widths, width):
        super().__init__(widths, width)
        self.own = nn.Linear(width, width, bias=False)

    def forward(self, streams):
        means = [self.own(masked_mean(s.x, s.mask)) for s in streams.values()]
        return Fused(
            super().forward(streams).vector
            + sum(m.square().sum(-1, keepdim=True).sqrt() for m in means)
        )


class Shares(ClassHead):
    def forward(self, vector):
        return super().forward(vector).softmax(-1)


class Blind(RegressionHead):
    def forward(self, vector):
        return super().forward(vector * 0)


def poisoned(model):
    with torch.no_grad():
        model.encoders["audio"].linear.weight[1, 2] = math.nan
    return model


def still(model, part):
    model.get_submodule(part).requires_grad_(False)
    return model


def stale(model):
    model.encoders["text"] = Frozen(model.encoders["text"])
    for p in model.encoders["text"].parameters():
        p.grad = torch.ones_like(p)
    return model


MOOD = cross_entropy("mood")
DEFECTS = {  # name: (model, objective, plan, piece, check, words)
    "detached encoder": (
        lambda: network(audio=Detached),
        None,
        None,
        "encoders.audio",
        "gradient",
        "nothing in it learns.*detach",
    ),
    "inverted mask": (
        lambda: network(audio=Inverted),
        None,
        None,
        "encoders.audio",
        "alive",
        "zeros",
    ),
    "padding in the pooling": (
        lambda: network(fusion=Careless),
        None,
        None,
        "fusion",
        "padding",
        "real steps only",
    ),
    "encoder frozen by accident": (
        lambda: still(network(), "encoders.video"),
        None,
        None,
        "encoders.video",
        "gradient",
        "frozen, and nothing says",
    ),
    "fusion frozen by accident": (
        lambda: still(network(), "fusion.mix.0"),
        None,
        None,
        "fusion",
        "gradient",
        "fusion.mix.0.weight.*frozen, and nothing says",
    ),
    "frozen with a gradient": (
        lambda: stale(network()),
        None,
        None,
        "encoders.text",
        "gradient",
        "with a gradient from before",
    ),
    "frozen BatchNorm that counts": (
        lambda: network(text=Counting),
        None,
        None,
        "together",
        "frozen stays",
        "running_mean.*moves",
    ),
    "head of the wrong width": (
        lambda: network(heads={"y": RegressionHead(10)}),
        None,
        None,
        "heads.y",
        "vector to prediction",
        "raises RuntimeError",
    ),
    "too few classes": (
        lambda: network(heads={"mood": ClassHead(12, 2)}),
        MOOD,
        None,
        "heads.mood",
        "vector to prediction",
        "at least 3",
    ),
    "softmax before cross-entropy": (
        lambda: network(heads={"mood": Shares(12, 3)}),
        MOOD,
        None,
        "heads.mood",
        "logits",
        "without softmax",
    ),
    "head behind a sigmoid": (
        lambda: network(heads={"y": nn.Sequential(nn.Linear(12, 1), nn.Sigmoid(), nn.Flatten(0))}),
        None,
        None,
        "heads.y",
        "vector to prediction",
        "never leaves 0",
    ),
    "head that hears nothing": (
        lambda: network(heads={"y": Blind(12, 9.0, 4.0)}),
        None,
        None,
        "heads.y",
        "alive",
        "the same values",
    ),
    "NaN weights": (
        lambda: poisoned(network()),
        None,
        None,
        "encoders.audio",
        "weights",
        "linear.weight",
    ),
    "dead ReLU": (lambda: network(fusion=DeadReLU), None, None, "fusion", "alive", "zeros"),
    "items mixed": (
        lambda: network(fusion=AcrossItems),
        None,
        None,
        "fusion",
        "each item for itself",
        "axis B",
    ),
    "modality ignored": (
        lambda: network(fusion=Deaf),
        None,
        None,
        "fusion",
        "hears video",
        "every stream",
    ),
    "layer that nothing uses": (
        lambda: network(fusion=Spare),
        None,
        None,
        "fusion",
        "gradient",
        "fusion.attention.weight.*no gradient",
    ),
    "outputs kept": (
        lambda: network(fusion=Keeps),
        None,
        None,
        "together",
        "memory",
        "nodes of the graph",
    ),
    "NaN gradient without a modality": (
        lambda: network(fusion=Root),
        None,
        None,
        "together",
        "gradients",
        "where .* is missing",
    ),
    "mean forgotten": (
        lambda: network(heads={"y": RegressionHead(12)}),
        None,
        None,
        "together",
        "start",
        "the labels' mean",
    ),
    "loss of nothing": (
        network,
        lambda out, batch: {"loss": out.predictions["y"].mean() * 0 + 1},
        None,
        "together",
        "eight by heart",
        "nothing to tell apart|cannot",
    ),
    "rate of 0": (
        network,
        None,
        Plan(lr={"encoders.text.*": 0, "*": 1e-3}),
        "together",
        "rates",
        "encoders.text.linear.weight.*rate of 0",
    ),
    "pattern that fits nothing": (
        network,
        None,
        Plan(lr={"encoder.text.*": 1e-4, "*": 1e-3}),
        "together",
        "rates",
        "matches no parameter",
    ),
    "parameter without a rate": (
        network,
        None,
        Plan(lr={"encoders.*": 1e-4}),
        "together",
        "rates",
        "no pattern matches",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_and_named(name):
    make, objective, plan, piece, what, words = DEFECTS[name]
    checks = check_pieces(make(), objective or mse("y"), items(), plan, effort=Effort(50))
    found = row(checks, piece, what)
    if name == "loss of nothing":
        assert found.ok is None and re.search(words, found.found), str(checks)
    else:
        assert found.ok is False and re.search(words, found.found), str(checks)
    sound = {"encoders.text", "encoders.audio", "encoders.video", "fusion"} - {
        piece,
        "encoders.video" if name == "modality ignored" else "",
        "encoders.text" if "counts" in name else "",
    }
    # and nobody else is blamed
    if piece.startswith("encoders."):
        assert not [r for r in checks.failed if r.piece in sound], str(checks)


def test_shuffled_labels_pass_and_nobody_says_otherwise():
    data = items()
    other = Batch(data.streams, {k: v.roll(1) for k, v in data.targets.items()})
    assert check_pieces(network(), mse("y"), other).ok


def test_what_is_idle_on_purpose_can_be_said():
    assert check_pieces(
        still(network(), "encoders.video"), mse("y"), items(), idle=["encoders.video.*"]
    ).ok
    assert check_pieces(network(fusion=Spare), mse("y"), items(), idle=["fusion.attention.*"]).ok


def test_time_is_kept_and_what_was_not_tried_is_said():
    told = []
    checks = check_pieces(
        network(), mse("y"), items(), Plan(), effort=Effort(seconds=0.0, tell=told.append)
    )
    assert (
        checks.ok
        and all(r.ok is None and r.found == "no time left" for r in checks)
        and len(told) == len(checks)
    )

    class Slow(ConcatFusion):
        def forward(self, streams):
            import time

            if self.mix[0].weight.requires_grad and torch.is_grad_enabled():
                time.sleep(0.1)
            return super().forward(streams)

    checks = check_pieces(network(fusion=Slow), mse("y"), items(), effort=Effort(seconds=2.0))
    assert (
        checks.ok
        and "time was over" in row(checks, "together", "eight by heart").found
        and row(checks, "together", "memory").ok is None
    ), str(checks)
    with pytest.raises(ConfigError, match="at least two items"):
        check_pieces(network(), mse("y"), items(1))


def test_a_model_that_does_not_run_says_so_at_its_piece():
    checks = check_pieces(
        network(H=12, fusion=lambda w, H: ConcatFusion(dict.fromkeys(WIDTHS, H + 1), H)),
        mse("y"),
        items(),
    )
    assert (
        row(checks, "fusion", "streams to vector").ok is False
        and row(checks, "together", "runs").ok is False
        and "encoders.text" not in {r.piece for r in checks.failed}
    )


# ------------------------------------------------------------------ branches
def test_branches_of_a_sound_model_all_learn():
    model = network("gated", heads=both())
    rows = branch_capacity(model, multitask(BOTH), items())
    assert rows.ok and [r.what for r in rows] == [
        "text only",
        "audio only",
        "video only",
        "fusion only",
        "classifier only",
    ], str(rows)
    assert all(
        r.norm > 0 and r.span.above(r.losses[-1]) <= 0.05 and r.losses[0] > r.losses[-1]
        for r in rows
    )


@pytest.mark.parametrize(
    "make,bad",
    [
        (lambda: network(audio=Detached), ["audio only"]),
        (lambda: network(audio=Inverted), ["audio only"]),
        (lambda: poisoned(network()), ["audio only"]),
        (
            lambda: network(fusion=DeadReLU),
            ["text only", "audio only", "video only", "fusion only"],
        ),
        (
            lambda: network(heads={"y": Blind(12, 9.0, 4.0)}),
            ["text only", "audio only", "video only", "fusion only", "classifier only"],
        ),
        (lambda: network(fusion=Deaf), ["video only"]),
    ],
    ids=["detached", "inverted", "poisoned", "dead", "blind", "deaf"],
)
def test_broken_branches_fail_alone(make, bad):
    rows = branch_capacity(make(), mse("y"), items(), Effort(90))
    assert [r.what for r in rows.failed] == bad, str(rows)


def test_the_innermost_branch_is_blamed():
    assert (
        "fusion cannot alone"
        in row(
            check_pieces(network(fusion=DeadReLU), mse("y"), items(), effort=Effort(60)),
            "together",
            "eight by heart",
        ).found
    )


def test_branches_of_frozen_encoders_and_of_time():
    rows = branch_capacity(network(text=lambda F, H: Frozen(Project(F, H))), mse("y"), items())
    assert rows.ok and rows.rows[0].norm is None and rows.rows[0].found.endswith("frozen"), str(
        rows
    )
    assert all(
        r.ok is None for r in branch_capacity(network(), mse("y"), items(), Effort(seconds=0.0))
    )


def test_hearing():
    data = items()
    streams = {n: Project(F, 12)(data.streams[n]) for n, F in WIDTHS.items()}
    deaf = Deaf(dict.fromkeys(WIDTHS, 12), 12).eval()
    with torch.no_grad():
        assert streams_matter(deaf, streams, "audio").startswith("other values move")
        with pytest.raises(Wrong, match="video"):
            streams_matter(deaf, streams, "video")
    with pytest.raises(Untried, match="no item has audio"):
        streams_matter(deaf, Batch(streams).without("audio").streams, "audio")
