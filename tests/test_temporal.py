"""Uniform sampling, masked dilated convolutions and their receptive field."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import streams
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.diagnostics.walk import walk
from mmemo.models.base import ConcatFusion, Multimodal, RegressionHead, precompute
from mmemo.models.temporal import (
    TCN,
    Resample,
    TCNBlock,
    TimeConv,
    draw_receptive_field,
    output_taps,
    receptive_field,
)

padded, learned = partial(streams.padded, fill=99.0), partial(streams.learned, scale=0.4)


def stream(B=4, T=23, features=5, seed=0, lost=0.3):
    "Items of different lengths with lost frames; the values under mask False are not zero."
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(T // 2, T + 1, (B, 1), generator=g)
    mask = (torch.arange(T) < length) & (torch.rand(B, T, generator=g) >= lost)
    return Stream(
        torch.randn(B, T, features, generator=g), mask, (torch.arange(T) / 10 + 0.05).repeat(B, 1)
    )


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.mask, b.mask) and torch.equal(a.t, b.t)


# ------------------------------------------------------------------ uniform sampling
def by_hand(x, mask, t, steps):
    """Resample in numpy, one item, for rising times; and for each window whether two frames are
    equally near, so that either may be taken.
    """
    real = np.flatnonzero(mask)
    frames = np.arange(real[-1] + 1)
    low, high = t[real[0]], t[real[-1]]
    middle = low + (high - low) * (np.arange(steps) + 0.5) / steps
    home = np.abs(t[frames][:, None] - middle[None]).argmin(1)
    out, ok, tie = np.zeros((steps, x.shape[1])), np.zeros(steps, bool), np.zeros(steps, bool)
    for k in range(steps):
        inside = frames[home == k]
        if not len(inside):
            gap = np.abs(t[frames] - middle[k])
            inside, tie[k] = (
                frames[[gap.argmin()]],
                len(gap) > 1 and np.diff(np.sort(gap)[:2])[0] < 1e-5,
            )
        inside = inside[mask[inside]]
        if len(inside):
            out[k], ok[k] = x[inside].mean(0), True
    return out, ok, middle, tie


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(1, 60), T=st.integers(2, 40))
def test_resample_is_window_means_by_hand(seed, steps, T):
    g = torch.Generator().manual_seed(seed)
    s = stream(3, T, 4, seed)
    # an uneven clock: no frame on a border
    s = Stream(s.x, s.mask, torch.rand(3, T, generator=g).add(0.1).cumsum(1))
    made = Resample(steps)(s)
    assert made.x.shape == (3, steps, 4)
    for i in range(3):
        if not s.mask[i].any():
            assert not made.mask[i].any() and made.x[i].eq(0).all()
            continue
        x, ok, middle, tie = by_hand(
            s.x[i].double().numpy(), s.mask[i].numpy(), s.t[i].double().numpy(), steps
        )
        assert np.array_equal(made.mask[i].numpy()[~tie], ok[~tie])
        assert np.allclose(made.x[i].numpy()[~tie], x[~tie], atol=1e-5) and np.allclose(
            made.t[i].numpy(), middle, atol=1e-4
        )


def test_resample_of_a_whole_stream_is_adaptive_pooling():
    "Oracle: torch's pooling, where the windows hold equal numbers of frames."
    x = torch.randn(2, 60, 3)
    made = Resample(12)(Stream.of(x, rate=100))
    assert (
        torch.allclose(made.x[:, 1:-1], F.adaptive_avg_pool1d(x.mT, 12).mT[:, 1:-1], atol=1e-5)
        and made.mask.all()
    )


def test_resample_ignores_padding_and_lost_values():
    s, sample = stream(), Resample(9)
    assert same(sample(s), sample(padded(s, 14)))
    assert same(sample(s), sample(Stream(torch.where(s.mask[..., None], s.x, 1e9), s.mask, s.t)))


def test_resample_stretches_lost_frames_missing_items_and_single_frames():
    s = Stream.of(
        torch.tensor(
            [
                [[1.0], [2], [4]],
                [[3.0], [torch.nan], [5]],
                [[7.0], [torch.nan], [torch.nan]],
                [[torch.nan]] * 3,
            ]
        ),
        rate=1,
    )
    made = Resample(6)(s)
    assert made.x[..., 0].tolist() == [[1, 1, 2, 2, 2, 4], [3, 3, 0, 0, 0, 5], [7] * 6, [0] * 6]
    assert made.mask.tolist() == [
        [True] * 6,
        [True, True, False, False, False, True],
        [True] * 6,
        [False] * 6,
    ]
    assert torch.isfinite(made.t).all()


def test_resample_takes_any_trailing_axes_and_refuses_no_step():
    assert Resample(4)(Stream.of(torch.randn(2, 9), rate=5)).x.shape == (2, 4)
    assert Resample(4)(Stream.of(torch.randn(2, 9, 3, 5), rate=5)).x.shape == (2, 4, 3, 5)
    with pytest.raises(ConfigError, match="steps=0"):
        Resample(0)


def test_resample_once_for_many_items():
    s = stream(10, 40, 3)
    data = precompute(Resample(7), Batch({"audio": s}), "audio", batch_size=3)
    assert same(data.streams["audio"], Resample(7)(s))


# ------------------------------------------------------------------ the convolution
@pytest.mark.parametrize(
    "kernel, dilation, causal",
    [
        (1, 1, False),
        (3, 1, False),
        (3, 4, False),
        (5, 2, False),
        (2, 3, True),
        (3, 2, True),
        (1, 1, True),
    ],
)
def test_convolution_is_torchs(kernel, dilation, causal):
    mine, x = TimeConv(5, 7, kernel, dilation, causal), torch.randn(3, 19, 5)
    theirs = nn.Conv1d(5, 7, kernel, dilation=dilation)
    theirs.load_state_dict(mine.state_dict())
    reach = (kernel - 1) * dilation
    want = theirs(F.pad(x.mT, (reach, 0) if causal else (reach // 2, reach // 2))).mT
    assert torch.allclose(mine(x), want, atol=1e-5)
    for p, q in zip(
        torch.autograd.grad(mine(x).square().sum(), list(mine.parameters())),
        torch.autograd.grad(want.square().sum(), list(theirs.parameters())),
    ):
        assert torch.allclose(p, q, rtol=1e-4, atol=1e-4)


class Chain(nn.Module):
    "The block written with torch's own layers, for streams without a gap."

    def __init__(self, block, dilation):
        super().__init__()
        width, features, kernel = block.into.weight.shape
        self.first, self.second, self.skip = (
            nn.Conv1d(features, width, kernel, padding="same", dilation=dilation),
            nn.Conv1d(width, width, kernel, padding="same", dilation=dilation),
            nn.Conv1d(features, width, 1),
        )
        self.norm = nn.LayerNorm(width)
        for mine, theirs in (
            (self.first, block.into),
            (self.second, block.out),
            (self.skip, block.shortcut),
            (self.norm, block.between[0]),
        ):
            mine.load_state_dict(theirs.state_dict())

    def forward(self, x):
        return (self.second(self.norm(self.first(x.mT).mT).relu().mT) + self.skip(x.mT)).mT


@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 4), (5, 3)])
def test_unmasked_block_is_torchs_chain(kernel, dilation):
    block, s = learned(TCNBlock(5, 11, kernel, dilation)), Stream.of(torch.randn(3, 19, 5), rate=10)
    assert torch.allclose(block(s).x, Chain(block, dilation)(s.x), atol=1e-5)


def test_new_block_is_its_shortcut():
    s = Stream.of(torch.randn(2, 9, 5), rate=10)
    block = TCNBlock(5, 8).eval()
    assert torch.equal(block(s).x, block.shortcut(s.x)) and torch.equal(
        TCNBlock(5, 5).eval()(s).x, s.x
    )


# ------------------------------------------------------------------ masks
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", [7, 16, 32])
def test_padding_never_changes_a_bit(causal, width):
    for seed in range(12):
        B, T, features, more = (
            int(n)
            for n in torch.randint(2, 40, (4,), generator=torch.Generator().manual_seed(seed))
        )
        s, net = (
            stream(B, T, features, seed),
            learned(TCN(features, width, dilations=(1, 2, 4), causal=causal)),
        )
        assert torch.equal(net(s).x, net(padded(s, more)).x[:, :T])


def test_padding_of_a_single_item_changes_no_more_than_rounding():
    s, net = stream(1, 17, 6), learned(TCN(6, 16))
    assert torch.allclose(net(s).x, net(padded(s, 9)).x[:, :17], rtol=1e-5, atol=1e-5)


def test_values_that_are_not_real_never_matter():
    s, net = stream(), learned(TCN(5, 16))
    out, other = net(s), net(Stream(torch.where(s.mask[..., None], s.x, 1e6), s.mask, s.t))
    assert (
        torch.equal(out.x, other.x)
        and out.x[~s.mask].eq(0).all()
        and out.x[s.mask].ne(0).any(-1).all()
    )
    x = s.x.clone().requires_grad_()
    net(s.with_x(x)).x.square().sum().backward()
    assert x.grad[~s.mask].eq(0).all() and x.grad[s.mask].ne(0).any(-1).all()


def test_missing_modality_and_order_of_items():
    s, net = stream(5), learned(TCN(5, 16))
    gone = Stream(s.x, s.mask & (torch.arange(5) != 2).unsqueeze(1), s.t)
    out, full = net(gone), net(s)
    assert out.x[2].eq(0).all() and torch.equal(out.x[[0, 1, 3, 4]], full.x[[0, 1, 3, 4]])
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(net(Stream(s.x[order], s.mask[order], s.t[order])).x, full.x[order])


def test_inside_a_model_padding_changes_nothing_and_gradients_reach_everything():
    s, y = stream(6, 21, 5), torch.randn(6)
    model = Multimodal(
        {"audio": TCN(5, 8, dropout=0.0)},
        ConcatFusion({"audio": 8}, 9),
        {"phq8": RegressionHead(9)},
    )
    for _ in range(2):  # after the first step the second convolutions are no longer zero
        loss = (model(Batch({"audio": s})).predictions["phq8"] - y).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            [p.sub_(0.05 * g) for p, g in zip(model.parameters(), grads)]
    assert all(g.abs().sum() > 0 for g in grads)
    model.eval()
    a, b = (model(Batch({"audio": v})).predictions["phq8"] for v in (s, padded(s, 8)))
    assert torch.allclose(a, b, atol=1e-6)


# ------------------------------------------------------------------ the receptive field
def seen(kernel, dilations, causal):
    "Offsets of the input steps to which an output step in the middle has a gradient."
    T = 2 * receptive_field(kernel, dilations) + 1
    # many items, as a ReLU may hide a step of one of them
    x = torch.randn(16, T, 2, requires_grad=True)
    out = learned(TCN(2, 8, kernel, dilations, causal))(Stream.of(x.detach(), rate=10).with_x(x))
    out.x[:, T // 2].sum().backward()
    return (x.grad.abs().sum((0, 2)).nonzero().flatten() - T // 2).tolist()


CASES = [
    (3, (1, 2, 4), False),
    (3, (1, 2, 4), True),
    (3, (1, 9), False),
    (5, (1, 3), False),
    (2, (1, 2), True),
    (4, (2,), True),
    (1, (1,), False),
    (1, (1, 1), True),
]


@pytest.mark.parametrize("kernel, dilations, causal", CASES)
def test_formula_taps_gradient_and_tracker_agree(kernel, dilations, causal):
    field, layers = (
        receptive_field(kernel, dilations),
        output_taps(kernel, dilations, causal=causal),
    )
    assert len(layers) == 2 * len(dilations) + 1 and layers[0] == [0]
    assert layers[-1] == seen(kernel, dilations, causal)
    assert layers[-1][-1] - layers[-1][0] + 1 == field and (layers[-1][-1] == 0) == (
        causal or kernel == 1
    )
    if kernel > 1:  # a single tap carries two zeros, which the tracker counts as seen
        clip = Stream.of(torch.randn(2, 4 * field, 2), rate=10)
        row = walk(TCN(2, 4, kernel, dilations, causal), clip, depth=0).rows[-1]
        assert row.frames == field == TCN(
            2, 4, kernel, dilations, causal
        ).receptive_field and row.seconds == pytest.approx(field / 10, rel=1e-3)


def test_receptive_field_of_known_networks():
    assert (
        receptive_field() == 29
        and receptive_field(3, (1, 2, 4, 8, 16)) == 125
        and receptive_field(5, (1,), 1) == 5
    )


def test_causal_network_never_looks_ahead():
    net, x = (
        learned(TCN(3, 8, dilations=(1, 2, 4), causal=True)),
        torch.randn(2, 40, 3, requires_grad=True),
    )
    out = net(Stream.of(x.detach(), rate=10).with_x(x)).x
    for t in (0, 7, 25):
        (grad,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        assert grad[:, t + 1 :].eq(0).all() and grad[:, t].ne(0).any()


def test_true_size_on_meta():
    s = Stream(
        torch.zeros(3, 100, 74),
        torch.ones(3, 100, dtype=torch.bool),
        torch.arange(100.0).repeat(3, 1),
    )
    with torch.device("meta"):
        net = TCN(74, 512)
    last = walk(net, s, depth=0, device="meta").rows[-1]
    assert (
        last.shape == (3, 100, 512)
        and last.frames == 29
        and last.params == sum(p.numel() for p in net.parameters())
    )


def test_moves_are_invisible_to_a_mean_away_from_the_ends():
    "A pattern in the middle moved by some steps gives the same mean; near an end it does not."
    net = learned(TCN(3, 8, dilations=(1, 2)))

    def mean(at):
        x = torch.zeros(1, 80, 3)
        x[0, at : at + 5] = torch.arange(15.0).reshape(5, 3)
        return net(Stream.of(x, rate=10)).x.mean(1)

    assert torch.allclose(mean(30), mean(41), atol=1e-5) and not torch.allclose(
        mean(30), mean(0), atol=1e-3
    )


def test_picture_of_the_field():
    ax = draw_receptive_field(3, (1, 2), rate=10)
    assert "13 steps" in ax.get_title() and "1.3 s" in ax.get_title()
    assert list(ax.lines[-1].get_xdata()) == output_taps(3, (1, 2))[-1] and len(ax.lines) == 5
    assert [len(c.get_segments()) for c in ax.collections] == [
        3 * len(layer) for layer in output_taps(3, (1, 2))[:-1]
    ]
    other = draw_receptive_field(3, (1, 2), causal=True, ax=plt.subplots()[1])
    assert (
        max(max(line.get_xdata()) for line in other.lines) == 0
        and other.get_title() == "one output step sees 13 steps"
    )
    plt.close("all")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TCNBlock(3, 4, kernel=4), "kernel=4: a centred convolution needs an odd kernel"),
        (lambda: TCN(3, 4, dilations=()), "at least one block"),
        (lambda: TCN(3, 4, dilations=(1, 0)), "dilation=0"),
        (lambda: TimeConv(3, 4, 0, causal=True), "kernel=0"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
