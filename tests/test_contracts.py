"""What every piece promises, alone and together: each broken promise is named at the piece that
breaks it, and sound pieces keep all of them.
"""

import math

import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import ConfigError, some_names
from mmemo.diagnostics.checks import (
    Bench,
    Check,
    Checks,
    Untried,
    Wrong,
    as_batch,
    choose_items,
    pieces_alone,
)
from mmemo.diagnostics.contracts import (
    check_contracts,
    finite_weights,
    items_differ,
    items_stand_alone,
    maps_add_up,
    missing_is_finite,
    missing_stays_missing,
    padding_is_silent,
    stream_to_stream,
    vector_to_prediction,
)
from mmemo.models.audiovisual import LogMel, WaveCNN
from mmemo.models.base import ClassHead, ConcatFusion, Fused, Multimodal, Project, RegressionHead
from mmemo.models.fusion import FUSIONS, get_fusion
from mmemo.models.mult import CrossModalConfig, CrossModalTransformer, LastState
from mmemo.models.temporal import TCN, Resample

WIDTHS = {"text": 7, "audio": 4, "video": 5}


def items(B=12, seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(T, F):
        return Stream.of(
            torch.randn(B, T, F, generator=g),
            torch.arange(T) < torch.randint(2, T + 1, (B, 1), generator=g),
            rate=10,
        )

    return Batch(
        {"text": make(5, 7), "audio": make(9, 4), "video": make(6, 5)},
        {"y": torch.randn(B, generator=g) * 4 + 9, "mood": torch.arange(B) % 3},
    )


def network(name="concat", H=12, heads=None, fusion=None, **encoders):
    torch.manual_seed(1)
    made = {n: encoders.get(n, Project)(F, H) for n, F in WIDTHS.items()}
    return Multimodal(
        made,
        fusion or get_fusion(name, dict.fromkeys(WIDTHS, H), H),
        heads or {"y": RegressionHead(H, 9.0, 4.0), "mood": ClassHead(H, 3)},
    )


def wrongs(checks):
    return [(r.piece, r.what) for r in checks.failed]


# ------------------------------------------------------------------ the table
def test_the_table_has_a_tick_for_every_row_and_wraps_what_is_long():
    rows = [
        Check("fusion", "maps", True, "none"),
        Check("fusion", "padding", False, "word " * 40),
        Check("heads.y", "alive", None),
    ]
    checks = Checks(rows, "Net on 8 items")
    lines = str(checks).splitlines()
    assert (
        lines[0] == "Net on 8 items: 1 right · 1 wrong · 1 not tried"
        and lines[1].startswith("── fusion ─")
        and lines[2] == "✓ maps     none"
    )
    assert (
        lines[3].startswith("✗ padding  word")
        and lines[4].startswith(" " * 11 + "word")
        and lines[-1] == "– alive"
        and max(map(len, lines)) <= 110
    )
    assert (
        not checks.ok and checks.failed == [rows[1]] and len(checks) == 3 and list(checks) == rows
    )
    html = Checks([Check("encoders.text", "a < b", False, "<x>")], "t")._repr_html_()
    assert (
        "a &lt; b" in html
        and "&lt;x&gt;" in html
        and "✗" in html
        and "<x>" not in html
        and "nowrap" not in html
    )
    assert Checks([], "nothing").ok and str(Checks([], "nothing")) == "nothing: "


def test_the_bench_says_what_came_of_each_check():
    told = []
    bench = Bench(tell=told.append)

    def raises(error):
        def test():
            raise error

        return test

    assert (
        bench("p", "a", lambda n: n * 2, "x") is True
        and bench("p", "b", raises(Wrong("why"))) is False
    )
    assert (
        bench("p", "c", raises(Untried("no"))) is None
        and bench("p", "d", raises(KeyError("k"))) is False
        and bench("p", "e", raises(ConfigError("bad"))) is False
    )
    assert [(r.ok, r.found) for r in bench.rows] == [
        (True, "xx"),
        (False, "why"),
        (None, "no"),
        (False, "raises KeyError: 'k'"),
        (False, "bad"),
    ]
    assert len(told) == 5 and told[1] == "✗ p: b  why"
    late = Bench(seconds=-1.0)
    assert late("p", "a", str) is None and late.rows[0].found == "no time left"
    assert some_names(list("abcde")) == "a, b, c and 2 more" and some_names(["a"]) == "a"


# ------------------------------------------------------------------ sound pieces
@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_keeps_its_promises(name):
    model = network(name)
    model.heads.eval()
    checks = check_contracts(model, items())
    assert checks.ok, str(checks)
    assert {r.piece for r in checks} == {
        *(f"encoders.{n}" for n in WIDTHS),
        "fusion",
        "heads.y",
        "heads.mood",
        "together",
    }
    assert model.training and not model.heads.training


def test_temporal_encoders_and_the_transformer_keep_theirs():
    encoders = {
        "text": lambda F, H: LastState(F, 6, H),
        "audio": lambda F, H: TCN(F, H),
        "video": lambda F, H: nn.Sequential(TCN(F, H), Resample(4)),
    }
    assert (checks := check_contracts(network(**encoders), items())).ok, str(checks)
    transformer = Multimodal(
        {n: nn.Identity() for n in WIDTHS},
        CrossModalTransformer(WIDTHS, 8, CrossModalConfig(2, 1), maps=True),
        {"y": RegressionHead(48)},
    )
    assert (checks := check_contracts(transformer, items())).ok, str(checks)
    wave = Batch(
        {
            "audio": Stream.of(
                torch.randn(3, 4000),
                torch.arange(4000) < torch.tensor([[4000], [2500], [900]]),
                rate=16_000,
            )
        },
        {"y": torch.randn(3)},
    )
    deep = Multimodal(
        {"audio": nn.Sequential(LogMel(16), WaveCNN(16, (8, 12)))},
        ConcatFusion({"audio": 12}, 8),
        {"y": RegressionHead(8)},
    )
    assert (checks := check_contracts(deep, wave)).ok, str(checks)


def test_pieces_alone_are_models_that_share_their_modules():
    model, data = network("cross_attention"), items()
    pieces = pieces_alone(model, data)
    assert list(pieces) == [
        "encoders.text",
        "encoders.audio",
        "encoders.video",
        "fusion",
        "heads.y",
        "heads.mood",
    ]
    part, given = pieces["fusion"]
    model.eval()
    with torch.no_grad():
        whole = model(data)
        assert part.fusion is model.fusion and torch.equal(
            part.eval()(given).predictions["vector"], whole.embedding
        )
        head, vectors = pieces["heads.mood"]
        assert (
            torch.equal(head(vectors).predictions["mood"], whole.predictions["mood"])
            and vectors.targets is data.targets
        )
        one, stream = pieces["encoders.audio"]
        said = one(stream).predictions["vector"]
        own = model.encoders["audio"](data.streams["audio"])
        assert (
            said.shape == (12, 3 * 12 + 1)
            and torch.allclose(said[:, :12], masked_mean(own.x, own.mask))
            and torch.allclose(said[:, -1], masked_mean(own.t, own.mask))
        )
    assert pieces_alone(nn.Linear(2, 2), data) == {}


def test_eight_items_are_spread_over_the_labels_that_are_known():
    data = items(40)
    data.targets["y"][:3] = math.nan
    data.targets["mood"][5] = -100
    some = choose_items(network(), data)
    assert (
        len(some) == 8
        and torch.isfinite(some.targets["y"]).all()
        and (some.targets["mood"] >= 0).all()
    )
    assert (
        some.targets["y"].min() == data.targets["y"].nan_to_num(99)[6:].min()
        or some.targets["y"].min() <= data.targets["y"].nan_to_num(99).sort().values[2]
    )
    assert list(
        choose_items(
            Multimodal(
                {"audio": Project(4, 3)}, ConcatFusion({"audio": 3}, 3), {"y": RegressionHead(3)}
            ),
            data,
        ).streams
    ) == ["audio"]
    assert len(choose_items(network(), items(3))) == 3
    with pytest.raises(ConfigError, match="at least two items"):
        choose_items(network(), items(1))


# ------------------------------------------------------------------ encoders that break theirs
class Numbered(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return Stream(s.x, s.mask, torch.arange(s.steps).float().expand(len(s), -1) * 60)


class Backwards(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return Stream(s.x, s.mask, s.t.flip(1))


class Everyone(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return Stream(s.x, torch.ones_like(s.mask), s.t)


class Nobody(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return Stream(s.x, torch.zeros_like(s.mask), s.t)


class Bare(Project):
    def forward(self, stream):
        return super().forward(stream).x


class Flat(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return s.with_x(s.x.sum(-1))


class Poisoned(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return s.with_x(s.x.masked_fill(~s.mask.unsqueeze(-1), math.nan))


class Pooled(Project):
    "One step: the mean over padding too."

    def forward(self, stream):
        s = super().forward(stream.with_x(stream.x + 1))
        return Stream(
            s.x.mean(1, keepdim=True),
            s.mask.any(1, keepdim=True),
            masked_mean(s.t, s.mask).unsqueeze(1),
        )


class LiveNorm(Project):
    def __init__(self, F, H):
        super().__init__(F, H)
        self.norm = nn.BatchNorm1d(F, track_running_stats=False)

    def forward(self, stream):
        return super().forward(stream.with_x(self.norm(stream.x.mT).mT))


class Dropping(Project):
    def forward(self, stream):
        s = super().forward(stream)
        return s.with_x(nn.functional.dropout(s.x, 0.3))


ENCODERS = [
    (Numbered, "stream to stream", "keep|carry mask and clock"),
    (Backwards, "stream to stream", "decrease"),
    (Everyone, "stream to stream", "carry mask|go out with some"),
    (Nobody, "stream to stream", "go out with none"),
    (Bare, "stream to stream", "gives Tensor"),
    (Flat, "stream to stream", r"must be \[B, T, H\]"),
    (Poisoned, "stream to stream", "where steps are not real"),
    (Pooled, "padding", "real steps only"),
    (LiveNorm, "each item for itself", "in other company"),
    (Dropping, "each item for itself", "two passes in eval mode"),
]


@pytest.mark.parametrize("broken,what,why", ENCODERS, ids=lambda v: getattr(v, "__name__", None))
def test_a_broken_encoder_is_named(broken, what, why):
    import re

    first = check_contracts(network(audio=broken), items()).failed[0]
    assert (first.piece, first.what) == ("encoders.audio", what) and re.search(why, first.found), (
        first
    )


def test_missing_streams_stay_missing():
    s = items().streams["audio"]
    assert missing_stays_missing(Project(4, 3), s) == "finite, and stays missing"
    with pytest.raises(Wrong, match="mask must stay False"):
        missing_stays_missing(Everyone(4, 3), s)
    with pytest.raises(Wrong, match="not finite"):
        missing_stays_missing(Poisoned(4, 3), s)
    with pytest.raises(Wrong, match="2 items without a real step"):
        gone = Stream(s.x, s.mask & (torch.arange(12) > 1)[:, None], s.t)
        stream_to_stream(Everyone(4, 3), gone)


# ------------------------------------------------------------------ fusions that break theirs
class Careless(ConcatFusion):
    def forward(self, streams):
        return Fused(self.mix(torch.cat([s.x.mean(1) for s in streams.values()], -1)))


class OverItems(ConcatFusion):
    def forward(self, streams):
        x = torch.cat([masked_mean(s.x, s.mask) for s in streams.values()], -1)
        return Fused(self.mix(x * x.softmax(0) * len(x)))


class Divides(ConcatFusion):
    def forward(self, streams):
        return Fused(
            self.mix(
                torch.cat(
                    [
                        (s.x * s.mask.unsqueeze(-1)).sum(1) / s.mask.sum(1, keepdim=True)
                        for s in streams.values()
                    ],
                    -1,
                )
            )
        )


class Unpooled(ConcatFusion):
    def forward(self, streams):
        return Fused(streams["text"].x)


class Map(ConcatFusion):
    "With a map of its own making."

    make = staticmethod(lambda streams: None)

    def forward(self, streams):
        return Fused(super().forward(streams).vector, {"pool audio": self.make(streams)})


def mapped(make):
    return type("Mapped", (Map,), {"make": staticmethod(make)})


def real(s):
    return s.mask / s.mask.sum(1, keepdim=True).clamp(min=1)


FAULTS = [
    (Careless, "padding", "padding of"),
    (OverItems, "each item for itself", "in other company"),
    (Divides, "missing", "without text"),
    (Unpooled, "streams to vector", r"must be \[B=8, H\]"),
    (mapped(lambda s: torch.full(s["audio"].mask.shape, 1 / s["audio"].steps)), "maps", "not real"),
    (mapped(lambda s: real(s["audio"])[:4]), "maps", "first axis"),
    (mapped(lambda s: real(s["audio"])[:, :-1]), "maps", "last axis"),
    (mapped(lambda s: real(s["audio"]) * math.nan), "maps", "not finite"),
    (
        mapped(
            lambda s: (
                real(s["audio"]) * torch.where(torch.arange(len(s["audio"])) < 2, 1.5, 1)[:, None]
            )
        ),
        "maps",
        "sum to",
    ),
]


@pytest.mark.parametrize("broken,what,why", FAULTS)
def test_a_broken_fusion_is_named(broken, what, why):
    import re

    first = check_contracts(network(fusion=broken(dict.fromkeys(WIDTHS, 12), 12)), items()).failed[
        0
    ]
    assert (first.piece, first.what) == ("fusion", what) and re.search(why, first.found), first


def test_maps_that_are_right():
    data = items()
    streams = {n: Project(F, 12)(data.streams[n]) for n, F in WIDTHS.items()}
    for make in (
        lambda s: real(s["audio"]),
        lambda s: torch.rand(12, 3),
        lambda s: torch.zeros(12, 9),
    ):
        fusion = mapped(make)(dict.fromkeys(WIDTHS, 12), 12)
        if make(streams).shape[1] == 9:
            assert maps_add_up(fusion, streams) == "pool audio [12, 9]"
    assert maps_add_up(ConcatFusion(dict.fromkeys(WIDTHS, 12), 12), streams) == "none"


def test_weights_that_are_not_finite_are_named():
    model = network()
    with torch.no_grad():
        model.fusion.mix[0].weight[0, 0] = math.inf
    first = check_contracts(model, items()).failed[0]
    assert (first.piece, first.what) == ("fusion", "weights") and "mix.0.weight" in first.found
    norm = nn.BatchNorm1d(3)
    norm.running_var[1] = math.nan
    with pytest.raises(Wrong, match="running_var"):
        finite_weights(norm)
    assert finite_weights(nn.Linear(2, 3)) == "9 parameters, all finite"


# ------------------------------------------------------------------ heads that break theirs
def ending(*last):
    return nn.Sequential(nn.Linear(12, 1), *last, nn.Flatten(0))


@pytest.mark.parametrize(
    "task,head,why",
    [
        ("mood", ClassHead(12, 2), "run to 2; it needs at least 3"),
        ("mood", RegressionHead(12), "at least 3 classes"),
        ("y", nn.Linear(12, 1), "silently broadcast"),
        ("y", ending(nn.Sigmoid()), "never leaves 0 ... 1"),
        ("y", ending(nn.Hardtanh(-5, 5)), "never leaves -5 ... 5"),
        ("y", RegressionHead(11), "raises"),
        ("y", nn.Sequential(RegressionHead(12), nn.Threshold(1e9, math.nan)), "not finite"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_a_broken_head_is_named(task, head, why):
    first = check_contracts(network(heads={task: head}), items()).failed[0]
    assert (first.piece, first.what) == (
        f"heads.{task}",
        "vector to prediction",
    ) and why in first.found, first


def test_heads_that_are_right():
    for task, head in (
        ("y", ending(nn.Softplus())),
        ("y", RegressionHead(12)),
        ("mood", ClassHead(12, 3)),
        ("other", nn.Linear(12, 5)),
    ):
        part, data = pieces_alone(network(heads={task: head}).eval(), items())[f"heads.{task}"]
        with torch.no_grad():
            assert "[12, 12] → " in vector_to_prediction(task, part, data)


# ------------------------------------------------------------------ tests of all
def test_order_company_padding_and_absence_of_a_whole_model():
    data, model = items(), network().eval()
    with torch.no_grad():
        assert (
            items_stand_alone(model, data)
            and padding_is_silent(model, data)
            and missing_is_finite(model, data) == "finite without text, audio, video, all"
        )
        with pytest.raises(Wrong, match="padding of text.*padding of audio.*padding of video"):
            padding_is_silent(network(fusion=Careless(dict.fromkeys(WIDTHS, 12), 12)).eval(), data)


def test_padding_of_tokens_is_not_made_longer_than_the_model_takes():
    class Places(nn.Module):
        "Embeddings of tokens and of six places."

        def __init__(self):
            super().__init__()
            self.token, self.place = nn.Embedding(5, 4), nn.Embedding(6, 4)

        def forward(self, s):
            return s.with_x(
                (self.token(s.x) + self.place(torch.arange(s.steps))).masked_fill(
                    ~s.mask.unsqueeze(-1), 0
                )
            )

    ids = Stream.of(
        torch.randint(0, 5, (4, 6)), torch.arange(6) < torch.tensor([[6], [2], [4], [5]]), rate=2
    )
    model = Multimodal({"text": Places()}, ConcatFusion({"text": 4}, 4), {"y": RegressionHead(4)})
    assert (checks := check_contracts(model, Batch({"text": ids}, {"y": torch.randn(4)}))).ok, str(
        checks
    )


def test_alive():
    part, data = pieces_alone(network(), items())["encoders.audio"]
    with torch.no_grad():
        assert items_differ(part, data) == "12 of 12 outputs differ between items"
        nn.init.zeros_(part.encoders["audio"].linear.weight)
        with pytest.raises(Wrong, match="the same values"):
            items_differ(part, data)
        nn.init.zeros_(part.encoders["audio"].linear.bias)
        with pytest.raises(Wrong, match="zeros"):
            items_differ(part, data)
    with pytest.raises(Untried):
        items_differ(part, data.without("audio"))


def test_vectors_as_a_batch():
    made = as_batch(
        torch.randn(5, 3),
        Batch({"a": Stream.of(torch.randn(5, 2, 1), rate=1)}, {"y": torch.arange(5)}),
    )
    assert (
        made.streams["vector"].x.shape == (5, 1, 3)
        and made.streams["vector"].mask.all()
        and made.targets["y"].tolist() == list(range(5))
    )
