"The reach of a tensor: by following operations, against gradients and against torchlens."

import math
import random

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mmemo.diagnostics.reach import (
    REACH_EVERYTHING,
    Reach,
    Tracker,
    find_axis,
    follow_axes,
    join_reach,
    shadow_copy,
    without_traces,
)

B, T, FEATURES = 2, 61, 5


def positive(net):
    "All weights positive, so that no influence cancels."
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.rand_like(p) + 0.1)
    return net


def track(function, x, axis=1, device="meta"):
    x = x.to(device)
    with torch.inference_mode(), Tracker() as tracker:
        y = function(tracker.watch(x, "x", axis))
    assert y.device.type == device
    return tracker.sees(y).get("x"), y


def influence(function, x, step, axis=1, out_axis=1):
    "First and last time step of `x` with an influence on step `step` of the output, by gradient."
    x = x.clone().requires_grad_()
    function(x).select(out_axis, step).sum().backward()
    touched = x.grad.abs().transpose(0, axis).flatten(1).sum(1).nonzero().flatten()
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


layer = st.tuples(
    st.sampled_from(["conv", "max", "avg", "residual", "chomp", "branches", "slice", "delta"]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
)


class Causal(nn.Module):
    "Pads on both sides and cuts the future off, as a TCN does."

    def __init__(self, k, d):
        super().__init__()
        self.conv, self.cut = (
            nn.Conv1d(FEATURES, FEATURES, k, padding=(k - 1) * d, dilation=d),
            (k - 1) * d,
        )

    def forward(self, x):
        return self.conv(x)[:, :, : -self.cut] if self.cut else self.conv(x)


class Residual(nn.Module):
    def __init__(self, k, d):
        super().__init__()
        self.conv, self.skip = (
            nn.Conv1d(FEATURES, FEATURES, 2 * k - 1, padding="same", dilation=d),
            nn.Conv1d(FEATURES, FEATURES, 1),
        )

    def forward(self, x):
        return F.softplus(self.conv(x)) + self.skip(x)


class Branches(nn.Module):
    def __init__(self, k, d):
        super().__init__()
        self.a, self.b = (
            nn.Conv1d(FEATURES, 2, 2 * k - 1, padding="same"),
            nn.Conv1d(FEATURES, FEATURES - 2, 3, padding="same", dilation=d),
        )

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


class Do(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def build(kind, k, s, d, p):
    if kind == "conv":
        return nn.Conv1d(FEATURES, FEATURES, k, s, p, d)
    if kind == "max":
        return nn.MaxPool1d(k, s, min(p, k // 2), d)
    if kind == "avg":
        return nn.AvgPool1d(k, s, min(p, k // 2))
    if kind == "slice":
        return Do(lambda x: x[:, :, p::s])
    if kind == "delta":
        return Do(lambda x: x[:, :, 1:] + x[:, :, :-1])
    return {"chomp": Causal, "residual": Residual, "branches": Branches}[kind](k, d)


@settings(max_examples=40, deadline=None)
@given(st.lists(layer, min_size=1, max_size=4))
def test_reach_of_random_stacks_is_that_of_the_gradient(layers):
    net, steps = nn.Sequential(*(build(*given) for given in layers)), 901

    # a maximum hides all but one of its window
    def visible(kind, *sizes):
        return Average(*sizes) if kind == "max" else build(kind, *sizes)

    smooth = positive(nn.Sequential(*(visible(*given) for given in layers)))
    x = torch.rand(1, FEATURES, steps)
    reach, y = track(net, x, 2)
    for step in (0, y.shape[-1] // 2, y.shape[-1] - 1):
        first, last = (
            reach.first + reach.stride * step,
            reach.first + reach.stride * step + reach.size - 1,
        )
        got = influence(smooth, x, step, 2, 2)
        # sees padding alone
        if got is None:
            continue
        assert max(first, 0) <= got[0] <= got[1] <= min(last, steps - 1)
        # away from all padding: exactly
        if first > 150 and last < steps - 150:
            assert got == (first, last)


class Average(nn.Module):
    "The mean over the windows that a max pool looks at, dilation included."

    def __init__(self, k, s, d, p):
        super().__init__()
        self.o = dict(stride=s, padding=min(p, k // 2), dilation=d, groups=FEATURES)
        self.k = k

    def forward(self, x):
        return F.conv1d(x, torch.ones(FEATURES, 1, self.k), **self.o)


def test_the_layers_of_a_transformer_see_everything_and_keep_their_axis():
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(FEATURES - 1, 2, 11, batch_first=True, dropout=0), 2
    ).eval()
    reach, y = track(net.to("meta"), torch.rand(B, T, FEATURES - 1))
    assert math.isinf(reach.size) and find_axis(y.shape, reach.place) == (1, 1, 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(1),
        lambda x: x.cumsum(1),
        lambda x: x.softmax(1),
        lambda x: x.flip(1),
        lambda x: x.mT @ x,
        lambda x: x.flatten(1) @ x.new_ones(T * FEATURES, 3),
        lambda x: x.sum(),
        lambda x: nn.GroupNorm(1, FEATURES, device=x.device)(x.mT),
        lambda x: torch.fft.rfft(x, dim=1).abs(),
        lambda x: F.interpolate(x.mT, 2 * T),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: F.adaptive_avg_pool1d(x.mT, 7),
        lambda x: x.std(1),
    ],
)
def test_what_mixes_time_sees_everything(function):
    assert math.isinf(track(function, torch.rand(B, T, FEATURES))[0].size)


@pytest.mark.parametrize(
    "function,frames",
    [
        (lambda x: nn.Linear(FEATURES, 3, device=x.device)(x), 1),
        (lambda x: F.layer_norm(x, (FEATURES,)), 1),
        (lambda x: x.softmax(-1), 1),
        (lambda x: x.sum(2), 1),
        (lambda x: rearrange(x, "b t f -> (b t) f").relu(), 1),
        (
            lambda x: rearrange(
                rearrange(x, "b t f -> (b t) f") @ x.new_ones(FEATURES, 7), "(b t) h -> t h b", b=B
            ),
            1,
        ),
        (lambda x: x.unfold(1, 5, 2), 5),
        (lambda x: torch.stack([x[:, :-2], x[:, 2:]], -1).amax(-1), 3),
        (lambda x: x[:, 7], 1),
        (lambda x: x[:, -1:], 1),
        (lambda x: torch.cat([x.new_zeros(B, 1, FEATURES), x[:, :-1]], 1), 1),
        (lambda x: x.diff(dim=1), 2),
        (lambda x: F.pad(x, (0, 0, 4, 0)), 1),
        (lambda x: torch.cat(x.split(20, 1), 1), 1),
        (lambda x: x.unsqueeze(1).expand(B, 4, T, FEATURES).permute(0, 3, 2, 1), 1),
        (lambda x: torch.cat(x.chunk(2, -1), -1), 1),
        (
            lambda x: F.conv2d(
                rearrange(x, "b t (c h w) -> (b t) c h w", c=1, h=5), x.new_ones(2, 1, 3, 1)
            ),
            1,
        ),
        (
            lambda x: F.conv3d(
                rearrange(x, "b t f -> b 1 t f 1"), x.new_ones(2, 1, 3, 2, 1), dilation=(2, 1, 1)
            ),
            5,
        ),
        (lambda x: x.where(x.isfinite(), 0), 1),
    ],
)
def test_what_does_not_mix_time_sees_its_window(function, frames):
    reach, y = track(function, torch.rand(B, T, FEATURES))
    assert reach.size == frames


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_recurrent_layer_sees_all_steps(cell):
    net = cell(FEATURES, 3, batch_first=True, bidirectional=True)
    reach, _ = track(lambda x: net.to("meta")(x)[0], torch.rand(B, T, FEATURES))
    assert reach.size >= T


def test_shifts_are_followed():
    x = torch.rand(B, T, FEATURES)
    assert track(lambda x: x[:, 3::2], x)[0] == Reach(3, 1, 2, (B, 29, FEATURES))
    assert track(lambda x: F.pad(x, (0, 0, 4, 0)), x)[0] == Reach(-4, 1, 1, (B, T + 4, FEATURES))
    assert track(lambda x: x[:, -9], x)[0].first == T - 9
    assert track(lambda x: x.unbind(1)[4], x)[0].first == 4


def test_writing_into_a_part_counts_as_everything():
    def function(x):
        y = torch.zeros_like(x)
        y[:, 1:] = x[:, :-1]
        return y * 2

    assert math.isinf(track(function, torch.rand(B, T, FEATURES))[0].size)
    assert track(lambda x: x.clone().relu_().add_(1), torch.rand(B, T, FEATURES))[0].size == 1


def test_inputs_are_told_apart():
    with torch.inference_mode(), Tracker() as tracker:
        a, b = (
            tracker.watch(torch.rand(B, T, FEATURES, device="meta"), "a"),
            tracker.watch(torch.rand(B, 17, FEATURES, device="meta"), "b"),
        )
        crossed = F.scaled_dot_product_attention(a, b, b)
    seen = tracker.sees(crossed)
    assert seen["a"].size == 1 and math.isinf(seen["b"].size)
    assert tracker.sees(torch.zeros(3)) == {}


def test_masks_stay_real_beside_meta_values():
    with torch.inference_mode(), Tracker() as tracker:
        x, mask = (
            tracker.watch(torch.rand(B, T, FEATURES, device="meta"), "x"),
            torch.arange(T) < torch.tensor([[T], [9]]),
        )
        masked = x.masked_fill(~mask[..., None], 0)
        assert masked.is_meta and tracker.sees(masked)["x"].size == 1
        # still known
        assert int(mask.to(x.device).sum()) == T + 9 and x[mask].shape == (T + 9, FEATURES)
        late = torch.arange(T, device=x.device) > 5
        assert not (late & mask).is_meta and bool((late & mask).any())


def test_memory_counts_the_bytes_of_new_results():
    x, net = torch.rand(B, T, FEATURES), nn.Sequential(nn.Linear(FEATURES, 3), nn.ReLU())
    with torch.inference_mode(), Tracker() as tracker:
        net(x).transpose(0, 1).view(T, B, 3)
    assert tracker.memory == 2 * B * T * 3 * 4


def test_random_states_end_as_they_began():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seeded():
        return (random.seed(1), np.random.seed(1), torch.manual_seed(1))

    seeded()
    plain = draw()
    seeded()
    with without_traces("cpu"):
        draw()
        draw()
    assert draw() == plain


def test_a_shadow_keeps_what_is_shared_and_copies_no_weight():
    net = nn.Sequential(
        nn.Linear(FEATURES, FEATURES),
        nn.Linear(FEATURES, FEATURES),
        nn.BatchNorm1d(FEATURES),
        torch.nn.utils.weight_norm(nn.Linear(FEATURES, 2)),
    )
    net[1].weight, net[0].extra = net[0].weight, torch.ones(3)
    # weight_norm now holds a tensor that is no leaf
    net[1].bias.requires_grad_(False)
    net(torch.rand(B, FEATURES)).sum().backward()
    ghost = shadow_copy(net)
    assert ghost[1].weight is ghost[0].weight and all(
        t.is_meta for t in [*ghost.parameters(), *ghost.buffers(), ghost[0].extra, ghost[3].weight]
    )
    assert (
        [p.requires_grad for p in ghost.parameters()] == [p.requires_grad for p in net.parameters()]
        and net.training
        and not ghost.training
    )
    real = shadow_copy(net, "cpu")
    assert (
        torch.equal(real[0].weight, net[0].weight)
        and real[0].weight.data_ptr() != net[0].weight.data_ptr()
    )


def test_join_is_an_upper_bound():
    a, b = Reach(-1, 3, 1, (2, 9, 4)), Reach(-4, 2, 1, (2, 9, 4))
    assert join_reach([a, b]) == Reach(-4, 6, 1, (2, 9, 4)) and join_reach([a, a]) == a
    assert (
        join_reach([a, Reach(0, 1, 2, (2, 9, 4))]).size == math.inf
        and follow_axes(a, (2, 9, 4), {}, (2, 4)) == REACH_EVERYTHING
    )
