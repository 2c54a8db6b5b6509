"""The walk: parameters, FLOPs, shapes, masks and reach against independent libraries; the model
and the random state untouched.
"""

import copy
import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field

import pytest
import torch
import torchinfo
import torchlens
import torchview
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmemo.core.batch import Batch, Stream, align, masked_mean
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.diagnostics.drawing import fold_rows, short_count
from mmemo.diagnostics.walk import Row, WalkRows, walk

B, T, V, L, F, H = 3, 61, 23, 7, 10, 16


@dataclass
class Fused:
    vector: torch.Tensor
    maps: dict = field(default_factory=dict)


@dataclass
class Output:
    predictions: dict
    embedding: torch.Tensor
    maps: dict


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = (
            nn.Embedding(50, H),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(H, 4, 2 * H, batch_first=True), 3),
        )

    def forward(self, s):
        return s.with_x(self.body(self.embed(s.x), src_key_padding_mask=~s.mask))


class Strided(nn.Module):
    "Halves the rate; mask and clock follow."

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Conv1d(F, H, 5, padding=2), nn.Conv1d(H, H, 3, stride=2, padding=2, dilation=2)]
        )

    def forward(self, s):
        h = s.x.mT
        for layer in self.layers:
            h = layer(h).relu()
        return Stream(h.mT, s.mask[:, ::2], s.t[:, ::2])


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(F - 1, H)

    def forward(self, s):
        return Stream(
            self.project(masked_mean(s.x, s.mask)).unsqueeze(1),
            s.mask.any(1, keepdim=True),
            masked_mean(s.t, s.mask)[:, None],
        )


class Concat(nn.Module):
    def __init__(self, M=3):
        super().__init__()
        self.mix = nn.Linear(M * H, H)

    def forward(self, streams):
        return Fused(self.mix(torch.cat([masked_mean(s.x, s.mask) for s in streams.values()], -1)))


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(H, 1)

    def forward(self, vector):
        return self.linear(vector).squeeze(-1)


class Model(nn.Module):
    def __init__(self, encoders, fusion, heads):
        super().__init__()
        self.encoders, self.fusion, self.heads = (
            nn.ModuleDict(encoders),
            fusion,
            nn.ModuleDict(heads),
        )

    def forward(self, batch):
        fused = self.fusion({k: e(batch.streams[k]) for k, e in self.encoders.items()})
        return Output(
            {k: head(fused.vector) for k, head in self.heads.items()}, fused.vector, fused.maps
        )


def ragged(T):
    return torch.arange(T) < torch.tensor([[T], [T // 2], [T // 3]])


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    return Batch(
        {
            "text": Stream.of(torch.randint(50, (B, L), generator=g), ragged(L), rate=2.5),
            "audio": Stream.of(torch.randn(B, T, F, generator=g), ragged(T), rate=100),
            "video": Stream.of(torch.randn(B, V, F - 1, generator=g), ragged(V), rate=30),
        }
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model(
        dict(text=Tokens(), audio=Strided(), video=Pooled()),
        Concat(),
        dict(phq8=Squeezed(), emotion=nn.Linear(H, 5)),
    )


def by_name(w):
    return {(r.lane, r.name): r for r in w.rows}


def params(net):
    return sum(p.numel() for p in net.parameters())


def flops(net, *args, **kwargs):
    "The totals of torch's counter, with attention in its plain form."
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(*args, **kwargs)
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_columns_add_up_to_the_totals(model, batch, depth):
    w = walk(model, batch, depth)
    assert w.params == params(model) == sum(r.params for r in w.rows)
    assert (
        w.flops
        == sum(r.flops for r in w.rows)
        == flops(copy.deepcopy(model).to("meta"), batch.to("meta"))
    )
    assert w.memory == sum(r.memory for r in w.rows) > 0


def test_stages_of_a_multimodal_model(model, batch):
    model.encoders.text.requires_grad_(False)
    w = walk(model, batch)
    row = by_name(w)
    assert list(dict.fromkeys(r.lane for r in w.rows)) == [
        "text",
        "audio",
        "video",
        "fusion",
        "heads",
    ]
    assert row["text", "input"].cells()[:3] == ("input", "Stream", f"B={B} L={L}")
    assert (
        row["text", "embed"].cells()[2] == f"B={B} L={L} H={H}"
        and row["text", "body"].frames == math.inf
    )
    assert row["audio", "input"].cells()[2] == f"B={B} T={T} F={F}" and row[
        "audio", "input"
    ].seconds == pytest.approx(0.01)
    assert (row["audio", "layers.0"].frames, row["audio", "layers.1"].frames) == (5, 9) and row[
        "audio", "output"
    ].seconds == pytest.approx(0.09)
    assert row["audio", "output"].shape == (B, 31, H) and row["audio", "output"].axes == (
        "B",
        "T",
        "H",
    )
    assert (
        row["video", "output"].cells()[2] == f"B={B} T=1 H={H}"
        and row["video", "output"].frames == math.inf
    )
    assert (
        row["fusion", "mix"].cells()[2] == f"B={B} H={H}"
        and row["fusion", "mix"].params == 3 * H * H + H
    )
    assert (
        row["heads", "phq8 output"].shape == (B,)
        and row["heads", "emotion"].cells()[2] == f"B={B} C=5"
    )
    assert sum(r.trainable for r in w.rows if r.lane == "text") == 0 and w.trainable == params(
        model
    ) - params(model.encoders.text)
    assert row["audio", "layers.1"].flops == 2 * B * 31 * H * H * 3


def test_coverage_is_that_of_the_real_masks(model, batch):
    row = by_name(walk(model, batch))
    for name in batch.streams:
        assert row[name, "input"].real == pytest.approx(
            float(batch.streams[name].mask.float().mean())
        )
    assert (
        row["audio", "output"].real
        == pytest.approx(float(batch.streams["audio"].mask[:, ::2].float().mean()))
        and row["video", "output"].real == 1
    )
    row = by_name(walk(model, batch.without("video")))
    assert row["video", "input"].real == row["video", "output"].real == 0


def test_one_encoder_and_one_fusion(model, batch):
    w = walk(model.encoders.audio, batch.streams["audio"])
    assert (
        w.rows[-1].shape == (B, 31, H)
        and w.rows[-1].frames == 9
        and w.params == params(model.encoders.audio)
    )
    encoded = {k: e(batch.streams[k]) for k, e in model.encoders.items()}
    w = walk(model.fusion, encoded)
    assert {r.lane for r in w.rows} == {"text", "audio", "video", "fusion"} and w.params == params(
        model.fusion
    )


def test_device_cpu_gives_the_same_walk(model, batch):
    meta, cpu = walk(model, batch, 2), walk(model, batch, 2, device="cpu")

    def same(w):
        return [
            (r.lane, r.name, r.shape, r.axes, r.real, r.frames, r.params, r.flops) for r in w.rows
        ]

    assert same(meta) == same(cpu)


NETS = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(F, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5)),
        (B, T, F),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv1d(F, 8, 5, 2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Conv1d(8, 4, 3, dilation=2, groups=2),
        ),
        (B, F, T),
    ),
    "video": (
        lambda: nn.Sequential(
            nn.Conv3d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Flatten(),
            nn.Linear(4 * 3 * 7 * 8, 6),
        ),
        (B, 3, 6, 14, 16),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(F, 6, 4, 2), nn.Tanh()), (B, F, T)),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 3, 20, batch_first=True), 2),
        (B, T, 12),
    ),
    "recurrent": (lambda: nn.GRU(F, 6, 2, batch_first=True, bidirectional=True), (B, T, F)),
}


@pytest.mark.parametrize("name", NETS)
def test_totals_equal_flop_counter_torchinfo_and_torchlens(name):
    make, shape = NETS[name]
    net, x = make(), torch.randn(shape)
    w = walk(net, x, depth=3)
    assert (
        w.flops
        == sum(r.flops for r in w.rows)
        == flops(copy.deepcopy(net).to("meta"), x.to("meta"))
        > 0
    )
    assert (
        w.params
        == sum(r.params for r in w.rows)
        == params(net)
        == torchinfo.summary(net, input_data=x, verbose=0).total_params
        == torchlens.trace(net.eval(), x).num_params
    )
    assert (
        next(r for r in reversed(w.rows) if r.lane == "model").shape
        == (lambda y: y[0] if isinstance(y, tuple) else y)(net(x)).shape
    )


def test_attention_flops_are_those_of_the_formula():
    mha, q, k = (
        nn.MultiheadAttention(12, 3, batch_first=True),
        torch.randn(B, 5, 12),
        torch.randn(B, T, 12),
    )
    w = walk(mha, (q, k, k), depth=0)
    assert w.flops == 2 * (B * 5 * 12 * 12 * 2 + B * T * 12 * 12 * 2 + 2 * B * 5 * T * 12)

    class Attention(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    w = walk(Attention(), dict(q=q, k=k))
    assert w.flops == 4 * B * 5 * T * 12 and w.rows[-1].frames == math.inf


def test_shapes_equal_those_of_torchview():
    net = NETS["convolutions"][0]()
    graph = torchview.draw_graph(
        net, input_data=torch.randn(B, F, T), depth=3, save_graph=False, device="cpu", mode="eval"
    )
    theirs = [
        tuple(node.output_shape[0])
        for edge in graph.edge_list
        for node in edge[1:]
        if type(node).__name__ == "ModuleNode"
    ]
    assert [
        r.shape
        for r in walk(net, torch.randn(B, F, T), time=2).rows
        if r.lane == "model" and r.kind != "Tensor"
    ] == theirs


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
        min_size=1,
        max_size=4,
    )
)
def test_reach_equals_torchlens_on_random_convolutions(layers):
    net = nn.Sequential(*(nn.Conv1d(5, 5, k, s, p, d) for k, s, d, p in layers))
    x = torch.randn(2, 5, 97)
    try:
        net(x)
    except RuntimeError:
        return
    mine = [r for r in walk(net, x, time=2).rows if r.kind == "Conv1d"]
    trace = torchlens.trace(net, x)
    theirs = [trace[label].receptive_field.axes[2] for label in trace.layers_with_params]
    theirs = [
        int(a.size) if a.kind == "windowed" else 1 if a.kind == "pointwise" else None
        for a in theirs
    ]
    unfolded = [r.frames for r in mine for _ in range(r.repeats)]
    assert unfolded == theirs


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig())


def test_bert_base_at_full_size(bert):
    ids, mask = torch.randint(30522, (B, 37)), ragged(37).long()
    w = walk(bert, dict(input_ids=ids, attention_mask=mask), depth=2)
    assert w.params == w.trainable == 109_482_240 == sum(r.params for r in w.rows)
    assert w.flops == sum(r.flops for r in w.rows) == flops(bert, input_ids=ids.to("meta"))
    layers = next(r for r in w.rows if r.repeats == 12)
    assert (
        layers.name == "encoder.layer.0…11"
        and layers.params == 12 * 7_087_872
        and layers.cells()[2] == f"B={B} L=37 H=768"
        and layers.frames == math.inf
    )
    per_token = 2 * (4 * 768 * 768 + 2 * 768 * 3072) + 4 * 37 * 768
    assert layers.flops == 12 * B * 37 * per_token
    assert layers.real == pytest.approx(float(mask.float().mean()))
    assert (
        max(
            map(
                len,
                repr(walk(bert, dict(input_ids=ids, attention_mask=mask), depth=5)).splitlines(),
            )
        )
        <= 120
    )


def test_nothing_is_left_behind(model, batch):
    model.train()
    model.encoders.video.eval()
    model.encoders.audio.register_buffer("seen", torch.zeros(3))
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    before, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    for device in ("meta", "cpu"):
        walk(model, batch, 2, device)
    assert [m.training for m in model.modules()] == modes and all(
        not m._forward_hooks and not m._forward_pre_hooks for m in model.modules()
    )
    assert all(
        torch.equal(v, state[k]) and not v.is_meta for k, v in model.state_dict().items()
    ) and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.mha.get_fastpath_enabled() == fast and all(
        not hasattr(s.x, "_sees") for s in batch.streams.values()
    )


def test_parameters_that_are_shared_count_once(batch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(F, F, bias=False), nn.Linear(F, F)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    w = walk(Tied(), torch.randn(B, T, F))
    assert w.params == F * F + F == sum(r.params for r in w.rows) and [
        r.params for r in w.rows if r.lane == "model"
    ] == [0, 100, 0, 10]
    assert (
        w.rows[2].tied
        and "shared" in repr(w)
        and torchinfo.summary(Tied(), input_data=torch.randn(B, T, F), verbose=0).total_params
        != w.params
    )
    shared = Strided()
    w = walk(
        Model(dict(audio=shared, video=shared), Concat(2), dict(phq8=Squeezed())),
        Batch(dict(audio=batch.streams["audio"], video=batch.streams["audio"])),
        0,
    )
    assert w.params == sum(r.params for r in w.rows) and [r.lane for r in w.rows][:4] == [
        "audio",
        "audio",
        "video",
        "video",
    ]


def test_data_dependent_forwards(batch):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(F, 3)

        def forward(self, s):
            return s.with_x(self.a(s.x)) if s.x.sum() > -1e9 else s

    class OnMasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(F, 3)

        def forward(self, s):
            if not s.mask.any() or bool((s.t < 0).any()):
                return s
            return s[[0, 2]].with_x(self.a(s[[0, 2]].x))

    with pytest.raises(ConfigError, match="Branch.*device='cpu'"):
        walk(Branch(), batch.streams["audio"])
    assert walk(Branch(), batch.streams["audio"], device="cpu").rows[-1].shape == (B, T, 3)
    # the masks are real even on meta
    assert walk(OnMasks(), batch.streams["audio"]).rows[-1].shape == (2, T, 3)

    class Aligned(nn.Module):
        def forward(self, streams):
            return align(streams["audio"], streams["video"])

    assert walk(Aligned(), {k: batch.streams[k] for k in ("audio", "video")}).rows[1].shape == (
        B,
        V,
        F,
    )


def test_errors_name_the_stage(model, batch):
    model.encoders.audio.layers[1] = nn.Conv1d(H + 1, H, 3)
    with pytest.raises(
        ShapeError, match=r"encoders.audio.layers.1 \(Conv1d, given \[3, 16, 61\]\)"
    ):
        walk(model, batch)
    with pytest.raises(ShapeError, match="'text'"):
        walk(model, Batch({"audio": batch.streams["audio"]}))
    with pytest.raises(ConfigError, match="lazy"):
        walk(nn.Sequential(nn.LazyLinear(4)), torch.randn(B, F))
    with pytest.raises(ConfigError, match="cannot be saved.*svg"):
        walk(nn.Linear(F, 2), torch.randn(B, F)).save("walk.png")


def test_text_html_and_drawing(model, batch, tmp_path):
    model.encoders.text.requires_grad_(False)
    w = walk(model, batch)
    assert (
        max(map(len, str(w).splitlines())) <= 120
        and f"{w.params:,} parameters" in str(w)
        and "T=61" in str(w)
        and "9 · 0.09 s" in str(w)
    )
    root = ET.fromstring(w.svg())
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert (
        root.get("width") == "900"
        and f"B={B} T={T} F={F}" in texts
        and any("frozen" in t for t in texts)
        and 'fill="url(#frozen)"' in w.svg()
    )
    assert all(
        float(r.get("x", 0)) >= 0
        and float(r.get("x", 0)) + float(r.get("width").rstrip("%")) <= 900
        for r in root.iter("{http://www.w3.org/2000/svg}rect")
    )
    ET.fromstring(w._repr_html_())
    for name in ("a.svg", "a.html", "a.txt"):
        assert w.save(tmp_path / name).read_text().strip()
    assert w.save(tmp_path / "b.svg").read_text() == (tmp_path / "a.svg").read_text()


def test_names_of_generated_classes_are_escaped():
    net = type("A<b>&c", (nn.Linear,), {})(F, 2)
    w = walk(net, torch.randn(B, T, F))
    ET.fromstring(w.svg())
    ET.fromstring(w._repr_html_())


def test_fold_takes_equal_siblings_only():
    def row(name, **k):
        return Row("model", name, "Linear", (2, 3), ("B", "H"), params=5, **k)

    folded = fold_rows(
        [
            row("a"),
            row("layer.0.x"),
            row("layer.0.y"),
            row("layer.1.x"),
            row("layer.1.y"),
            row("layer.2.x", flops=1),
            row("layer.3.x", flops=1),
        ],
        WalkRows.SAME + WalkRows.SUMS,
        WalkRows.SUMS,
    )
    assert [(r.name, r.repeats, r.params) for r in folded] == [
        ("a", 1, 5),
        ("layer.0…1.x", 2, 10),
        ("layer.0…1.y", 2, 10),
        ("layer.2…3.x", 2, 10),
    ]


def test_numbers_in_short():
    assert [short_count(n) for n in (0, 7, 9_999, 12_345, 999_600, 109_482_240, 25.3e9)] == [
        "",
        "7",
        "9,999",
        "12.3k",
        "1M",
        "109M",
        "25.3G",
    ]
