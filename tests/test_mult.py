"""Cheap dropout, attention in cache, encoders side by side against torch's own layers, the
cross-modal transformer, the LSTM over real steps, the sampler.
"""

import math
from functools import partial

import pytest
import torch
from streams import learned, padded
from torch import nn
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.core.state import epoch_order
from mmemo.models.base import Multimodal, RegressionHead
from mmemo.models.mult import (
    CrossModalConfig,
    CrossModalTransformer,
    LastState,
    Windows,
    _runs,
    last_step,
    mean_step,
)
from mmemo.models.stacked import Dropout, Encoders, attend_cached, cheap_dropout
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan, alike_lengths
from mmemo.training.tracking import QUIET

WIDTHS = {"text": 7, "audio": 4, "video": 3}


def stream(B=5, T=7, features=8, rate=10, seed=0, least=1):
    g = torch.Generator().manual_seed(seed)
    return Stream.of(
        torch.randn(B, T, features, generator=g),
        torch.arange(T) < torch.randint(least, T + 1, (B, 1), generator=g),
        rate=rate,
    )


def streams(lengths=(6, 9, 9), rates=(5, 8, 8), B=5):
    return {
        n: stream(B, T, f, rate, seed)
        for seed, ((n, f), T, rate) in enumerate(zip(WIDTHS.items(), lengths, rates))
    }


def lost(s, row):
    mask = s.mask.clone()
    mask[row] = False
    return Stream(s.x, mask, s.t)


def fusion(maps=False, **options):
    torch.manual_seed(3)
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "output_dropout": 0.0}
    config = CrossModalConfig(2, 2, **silent | options)
    return CrossModalTransformer(WIDTHS, 8, config, maps).eval()


def finite(module):
    return all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


# ------------------------------------------------------------------ dropout
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_keeps_the_mean_and_its_share(p):
    x = torch.ones(201, 1003)
    found = cheap_dropout(x, p)
    kept = found.ne(0).float()
    level = round(p * 256) / 256
    assert found.unique().numel() == 2 and math.isclose(
        float(found.max()), 1 / (1 - level), rel_tol=1e-6
    )
    assert abs(kept.mean() - (1 - level)) < 0.005 and abs(found.mean() - 1) < 0.02
    # the eight bytes of a number are alike and independent
    bits = kept.flatten()[:200000].view(-1, 8)
    assert (bits.mean(0) - (1 - level)).abs().max() < 0.012 and (
        torch.corrcoef(bits.T) - torch.eye(8)
    ).abs().max() < 0.03


def test_drop_passes_gradients_through_what_it_kept_and_obeys_the_seed():
    x = torch.randn(13, 7, requires_grad=True)
    torch.manual_seed(5)
    a = cheap_dropout(x, 0.4)
    torch.manual_seed(5)
    b = cheap_dropout(x, 0.4)
    a.sum().backward()
    assert (
        torch.equal(a, b)
        and torch.allclose(x.grad * x, a)
        and x.grad.eq(0).any()
        and x.grad.ne(0).any()
    )


def test_dropout_layer():
    s, layer = stream(), Dropout(0.5)
    assert layer(s).x.eq(0).float().mean() > 0.3 and torch.equal(layer(s).mask, s.mask)
    assert (
        layer.eval()(s).x is s.x
        and cheap_dropout(s.x, 0.0) is s.x
        and cheap_dropout(s.x, 1.0).eq(0).all()
    )
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="dropout=.* cannot be"):
            Dropout(p)


# ------------------------------------------------------------------ attention
def inputs(N=7, heads=3, Q=5, K=11, D=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(N, heads, T, D, generator=g, dtype=dtype).requires_grad_() for T in (Q, K, K)
    )
    allowed = torch.rand(N, 1, Q, K, generator=g) < 0.6
    allowed[..., 0] = True
    return (q, k, v), torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize(
    "sizes", [dict(), dict(N=40, heads=10, Q=50, K=46, D=5), dict(N=1, heads=1, Q=1, K=1, D=1)]
)
def test_attention_in_cache_is_torchs(sizes):
    (q, k, v), bias = inputs(**sizes)
    want = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    pull = torch.randn_like(want)
    grads = torch.autograd.grad((want * pull).sum(), (q, k, v))
    for weights in (False, True):
        found, share = attend_cached(q, k, v, bias, weights=weights)
        assert torch.allclose(found, want, atol=1e-5) and (share is not None) == weights
        for a, b in zip(torch.autograd.grad((found * pull).sum(), (q, k, v)), grads):
            assert torch.allclose(a, b, atol=1e-4)
    assert torch.allclose(share.sum(-1), torch.ones(share.shape[:-1]), atol=1e-5)


def test_long_sequences_go_to_the_fused_kernel_and_agree():
    (q, k, v), bias = inputs(Q=3, K=150)
    assert torch.allclose(
        attend_cached(q, k, v, bias)[0], attend_cached(q, k, v, bias, weights=True)[0], atol=1e-5
    )


def test_dropout_inside_attention_and_its_gradient():
    """The same noise again: the mean over many draws is the answer without dropout, and the
    gradient is that of the autograd form under the same seed.
    """
    (q, k, v), bias = inputs()
    torch.manual_seed(2)
    found, _ = attend_cached(q, k, v, bias, 0.3)
    torch.manual_seed(2)
    want, _ = attend_cached(q, k, v, bias, 0.3, weights=True)
    assert torch.allclose(found, want, atol=1e-5)
    pull = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * pull).sum(), (q, k, v)),
        torch.autograd.grad((want * pull).sum(), (q, k, v)),
    ):
        assert torch.allclose(a, b, atol=1e-4)
    with torch.no_grad():
        mean = torch.stack([attend_cached(q, k, v, bias, 0.3)[0] for _ in range(600)]).mean(0)
    assert (
        (mean - attend_cached(q, k, v, bias)[0]).abs().max()
        < 0.25
        < (found - attend_cached(q, k, v, bias)[0]).abs().max()
    )


# ------------------------------------------------------------------ encoders side by side
# (against torch's layers with the same weights)
def plain(ours, g, width, cross):
    """Encoder g of `ours` as torch's own modules: for each layer norm, attention, norm, two linear
    layers; and the last norm.
    """

    def view(v, n):
        return v.view(-1, ours.count, n)[:, g]

    layers = []
    with torch.no_grad():
        for i in range(ours.layers):
            layer = nn.TransformerEncoderLayer(
                width, ours.heads, 4 * width, 0.0, batch_first=True, norm_first=True
            )
            layer.self_attn.in_proj_weight.copy_(ours.inward[i, g].T)
            layer.self_attn.in_proj_bias.copy_(view(ours.inward_bias, 3 * width)[i])
            layer.self_attn.out_proj.weight.copy_(ours.outward[i, g].T)
            layer.self_attn.out_proj.bias.copy_(view(ours.outward_bias, width)[i])
            layer.linear1.weight.copy_(ours.up[i, g].T)
            layer.linear1.bias.copy_(view(ours.up_bias, 4 * width)[i])
            layer.linear2.weight.copy_(ours.down[i, g].T)
            layer.linear2.bias.copy_(view(ours.down_bias, width)[i])
            for j, norm in enumerate((layer.norm1, layer.norm2)):
                norm.weight.copy_(view(ours.norm_scale, 2 * width)[i].chunk(2)[j])
                norm.bias.copy_(view(ours.norm_shift, 2 * width)[i].chunk(2)[j])
            layers.append(layer)
        last = nn.LayerNorm(width)
        last.weight.copy_(view(ours.last_scale, width)[0])
        last.bias.copy_(view(ours.last_shift, width)[0])

    def run(x, asked, allowed):
        weights = None
        for layer in layers:
            if cross:
                z = layer.norm1(asked)
                found, weights = layer.self_attn(
                    layer.norm1(x),
                    z,
                    z,
                    attn_mask=~allowed.repeat_interleave(ours.heads, 0),
                    average_attn_weights=False,
                )
                x = x + found
                x = x + layer.linear2(layer.linear1(layer.norm2(x)).relu())
            else:
                x = layer(x, src_mask=~allowed.repeat_interleave(ours.heads, 0))
        return last(x), weights

    return run, layers


@pytest.mark.parametrize("cross", [True, False])
def test_encoders_side_by_side_are_torchs_one_by_one(cross):
    G, B, Q, K, H = 3, 4, 5, 9, 12
    torch.manual_seed(0)
    ours = learned(Encoders(G, H, 3, 2), scale=0.4)
    x, asked = torch.randn(G, B, Q, H), torch.randn(G, B, K, H) if cross else None
    allowed = torch.rand(G, B, Q, K if cross else Q) < 0.5
    allowed[..., 0] = True
    found, maps = ours(x, asked, allowed, weights=True)
    assert torch.allclose(ours(x, asked, allowed)[0], found, atol=1e-5)
    pull = torch.randn_like(found)
    (found * pull).sum().backward()
    for g in range(G):
        run, layers = plain(ours, g, H, cross)
        want, weights = run(x[g], asked[g] if cross else None, allowed[g])
        assert torch.allclose(found[g], want, atol=2e-5)
        if cross:
            assert torch.allclose(maps[g], weights, atol=1e-5)
        (want * pull[g]).sum().backward()
        for i, layer in enumerate(layers):
            close = partial(torch.allclose, rtol=1e-3, atol=1e-3)
            assert close(ours.inward.grad[i, g].T, layer.self_attn.in_proj_weight.grad) and close(
                ours.up.grad[i, g].T, layer.linear1.weight.grad
            )
            assert close(
                ours.norm_scale.grad.view(2, G, 2, H)[i, g, 0], layer.norm1.weight.grad
            ) and close(ours.norm_shift.grad.view(2, G, 2, H)[i, g, 1], layer.norm2.bias.grad)


def test_a_query_that_may_look_nowhere_finds_zeros():
    torch.manual_seed(0)
    ours, x, asked = learned(Encoders(2, 8, 2, 1)), torch.randn(2, 3, 4, 8), torch.randn(2, 3, 5, 8)
    allowed = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    allowed[:, 1] = False
    a, maps = ours(x, asked, allowed, weights=True)
    b, _ = ours(x, torch.randn(2, 3, 5, 8), allowed)
    assert (
        torch.equal(a[:, 1], b[:, 1])
        and maps[:, 1].eq(0).all()
        and (a[:, 0] - b[:, 0]).abs().max() > 0.1
    )
    ours(x, asked, allowed)[0].square().sum().backward()
    assert finite(ours)


def test_some_of_the_encoders_alone():
    ours, x = learned(Encoders(4, 8, 2, 2)), torch.randn(4, 3, 5, 8)
    allowed = torch.ones(1, 3, 5, 5, dtype=torch.bool)
    assert torch.allclose(
        ours(x, None, allowed)[0][1:3], ours(x[1:3], None, allowed, slice(1, 3))[0], atol=1e-6
    )


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="width=8 cannot be divided among heads=3"):
        Encoders(2, 8, 3, 1)


# ------------------------------------------------------------------ windows and pools
def test_windows_are_a_convolution_of_the_real_steps():
    s, layer, conv = stream(4, 9, 6), Windows(6, 10, 5), nn.Conv1d(6, 10, 5, padding=2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(layer.weight.unflatten(1, (5, 10)).permute(2, 0, 1))
    want = conv(s.x.masked_fill(~s.mask[..., None], 0).mT).mT
    assert torch.allclose(layer(padded(s, 3, math.nan)).x[:, :9], want, atol=1e-5)
    with pytest.raises(ConfigError, match="kernel=4 cannot be"):
        Windows(6, 10, 4)


def test_pools():
    x, mask = (
        torch.randn(1, 3, 4, 2),
        torch.tensor([[[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]]).bool(),
    )
    assert torch.equal(last_step(x, mask)[0], torch.stack([x[0, 0, 1], x[0, 1, 2], torch.zeros(2)]))
    assert torch.allclose(
        mean_step(x, mask)[0],
        torch.stack([x[0, 0, :2].mean(0), x[0, 1, [0, 2]].mean(0), torch.zeros(2)]),
    )


# ------------------------------------------------------------------ the whole
@pytest.mark.parametrize("causal", [True, False])
def test_the_transformer_is_its_parts_one_by_one(causal):
    """MulT written plainly from torch's modules: direction by direction, no batching over streams,
    the same weights.
    """
    data, ours = streams(), learned(fusion(causal=causal, kernel=3), scale=0.3)
    own, names = {n: ours.project[n](s) for n, s in data.items()}, list(WIDTHS)
    vectors, g = [], 0
    for i, a in enumerate(names):
        parts = []
        for b in (n for n in names if n != a):
            see = own[b].mask[:, None].expand(-1, own[a].steps, -1)
            if causal:
                see = see & (own[b].t[:, None] <= own[a].t[:, :, None])
            assert see.any(-1)[own[a].mask].all() or causal
            nowhere = ~see.any(-1)
            run, layers = plain(ours.cross, g, 8, True)
            if nowhere.any():  # torch would give NaN: let them look, and take away what they found
                for layer in layers:
                    layer.self_attn.register_forward_hook(
                        lambda m, i, o, none=nowhere: (
                            o[0].sub(m.out_proj.bias).masked_fill(none[..., None], 0)
                            + m.out_proj.bias,
                            o[1],
                        )
                    )
            parts.append(
                run(own[a].x * math.sqrt(8), own[b].x * math.sqrt(8), see | nowhere[..., None])[0]
            )
            g += 1
        joined = torch.cat(parts, -1)
        see = own[a].mask[:, None].expand(-1, own[a].steps, -1) & (
            (own[a].t[:, None] <= own[a].t[:, :, None]) | (not causal)
        )
        remembered = plain(ours.memory, i, 16, False)[0](
            joined * 4, None, see | ~see.any(-1, keepdim=True)
        )[0]
        vectors.append(remembered[torch.arange(5), own[a].mask.sum(1) - 1])
    want = torch.cat(vectors, 1)
    assert torch.allclose(ours(data).vector, want + ours.mix(want), atol=1e-3)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 9, 9), (5, 7, 9)])
def test_batching_over_streams_changes_nothing(lengths):
    "Streams made equally long by padding run side by side; the prediction stays."
    data, ours = streams(lengths), learned(fusion(), scale=0.3)
    plain, alike = (
        ours(data).vector,
        {
            n: (
                padded(s, max(lengths) - s.steps, math.nan, math.nan)
                if s.steps < max(lengths)
                else s
            )
            for n, s in data.items()
        },
    )
    assert _runs([s.steps for s in alike.values()]) == [(0, 3)]
    assert torch.allclose(plain, ours(alike).vector, atol=1e-4)


@pytest.mark.parametrize("options", [dict(), dict(causal=False, pool="mean", kernel=5)])
@pytest.mark.parametrize(
    "fill,when", [(7.0, 3.0), (1e30, 1e30), (math.nan, math.nan), (math.inf, -math.inf)]
)
def test_padding_never_changes_a_prediction(options, fill, when):
    data, ours = streams(), learned(fusion(**options), scale=0.3)
    longer = ours(
        {n: padded(s, by, fill, when) for by, (n, s) in enumerate(data.items(), 1)}
    ).vector
    assert torch.allclose(ours(data).vector, longer, atol=1e-4)
    longer.square().sum().backward()
    assert finite(ours)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_missing_modality(name):
    data, ours = streams(), learned(fusion(), scale=0.3)
    where = list(WIDTHS).index(name)
    gone = {**data, name: lost(data[name], 2)}
    noise = {
        **gone,
        name: Stream(
            torch.where(gone[name].mask[..., None], gone[name].x, torch.nan),
            gone[name].mask,
            gone[name].t,
        ),
    }
    # the vector as it was read
    ours.mix = nn.Sequential(nn.Linear(48, 48))
    nn.init.zeros_(ours.mix[0].weight)
    nn.init.zeros_(ours.mix[0].bias)
    a, b = ours(gone).vector, ours(noise).vector
    assert (
        torch.equal(a, b)
        and a[2, where * 16 : (where + 1) * 16].eq(0).all()
        and a[[0, 1, 3, 4]].equal(ours(data).vector[[0, 1, 3, 4]])
    )
    ours({n: lost(s, slice(None)) for n, s in data.items()}).vector.square().sum().backward()
    assert finite(ours)


def test_the_past_does_not_see_the_future():
    data, ours = streams((9, 9, 9), (8, 8, 8)), learned(fusion(causal=True), scale=0.3)
    full = {n: Stream(s.x, torch.ones_like(s.mask), s.t) for n, s in data.items()}
    early = {n: Stream(s.x, s.t < 0.6, s.t) for n, s in full.items()}
    changed = {
        n: Stream(torch.where((s.t < 0.6)[..., None], s.x, 5.0), s.t < 0.6, s.t)
        for n, s in full.items()
    }
    assert torch.equal(ours(early).vector, ours(changed).vector)
    own = {n: ours.project[n](s).x[:, :4] for n, s in full.items()}
    x = torch.stack([own["text"]] * 6) * math.sqrt(8)
    asked = torch.randn(6, 5, 9, 8)
    other = asked.clone()
    other[:, :, 5:] = 9.0
    see = torch.arange(9) <= torch.arange(4)[:, None]
    assert torch.equal(
        ours.cross(x, asked, see.expand(6, 5, 4, 9))[0],
        ours.cross(x, other, see.expand(6, 5, 4, 9))[0],
    )


def test_maps_come_from_the_pass_that_made_the_prediction():
    data = streams()
    ours = learned(fusion(maps=True, causal=False), scale=0.3)
    quiet = fusion(causal=False)
    quiet.load_state_dict(ours.state_dict())
    fused = ours(data)
    assert torch.allclose(fused.vector, quiet(data).vector, atol=1e-4) and quiet(data).maps == {}
    assert {n: list(m.shape) for n, m in fused.maps.items()} == {
        "text→audio": [5, 2, 6, 9],
        "text→video": [5, 2, 6, 9],
        "audio→text": [5, 2, 9, 6],
        "audio→video": [5, 2, 9, 9],
        "video→text": [5, 2, 9, 6],
        "video→audio": [5, 2, 9, 9],
    }
    for name, m in fused.maps.items():
        a, b = name.split("→")
        assert torch.allclose(
            m.sum(-1)[:, 0][data[a].mask], torch.ones(int(data[a].mask.sum())), atol=1e-5
        )
        assert m[:, :, :, :].masked_select(~data[b].mask[:, None, None]).eq(0).all()


def test_a_permuted_batch_gives_permuted_vectors():
    data, ours, rows = streams(), learned(fusion(), scale=0.3), [3, 0, 4, 1, 2]
    assert torch.allclose(
        ours({n: Stream(s.x[rows], s.mask[rows], s.t[rows]) for n, s in data.items()}).vector,
        ours(data).vector[rows],
        atol=1e-5,
    )


def test_gradients_reach_every_parameter_and_it_learns():
    data = streams((6, 9, 9), B=24)
    batch = Batch(
        data,
        {
            "y": torch.tensor(
                [float(s[m][-1, 0]) for s, m in zip(data["audio"].x, data["audio"].mask)]
            )
        },
    )
    torch.manual_seed(0)
    model = Multimodal(
        {n: nn.Identity() for n in WIDTHS},
        CrossModalTransformer(WIDTHS, 8, CrossModalConfig(2, 1)),
        {"y": RegressionHead(48)},
    )
    mse("y")(model(batch), batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    history = fit(
        model,
        mse("y"),
        batch,
        None,
        Plan(epochs=25, batch_size=8, lr=5e-3, weight_decay=0),
        tracking=QUIET,
    )
    first, last = (history.epochs[i]["train"]["loss"] for i in (0, -1))
    assert last < 0.3 * first


def test_two_streams_or_more():
    one = CrossModalTransformer({"text": 7, "audio": 4}, 8, CrossModalConfig(2, 1))
    assert one.out_width == 16 and one(
        {n: streams()[n] for n in ("text", "audio")}
    ).vector.shape == (5, 16)
    with pytest.raises(ConfigError, match="two streams or more"):
        CrossModalTransformer({"text": 7}, 8)
    with pytest.raises(ConfigError, match="pool='max' cannot be: choose last, mean"):
        CrossModalTransformer(WIDTHS, 8, CrossModalConfig(pool="max"))


def test_half_precision_and_shapes_without_numbers():
    data, ours = streams(), fusion(maps=False)
    gone = {**data, "audio": lost(data["audio"], slice(None))}
    with torch.autocast("cpu", torch.bfloat16):
        vector = ours(gone).vector
    vector.float().square().sum().backward()
    assert (
        finite(ours)
        and (vector.float() - ours(gone).vector).abs().max() < 0.1 * ours(gone).vector.abs().max()
    )
    with torch.device("meta"):
        bare = CrossModalTransformer(WIDTHS, 8, CrossModalConfig(2, 2))
    assert bare({n: s.to("meta") for n, s in data.items()}).vector.shape == (5, 48)


# ------------------------------------------------------------------ the LSTM over real steps
def test_last_state_is_the_lstm_over_each_items_real_steps():
    s, net = stream(6, 8, 5), LastState(5, 7, 3)
    holes = s.mask.clone()
    holes[1] = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    holes[4] = False
    s = Stream(torch.where(holes[..., None], s.x, torch.nan), holes, s.t)
    found = net(s)
    assert (
        found.x.shape == (6, 1, 3)
        and found.x[4].eq(0).all()
        and found.mask[:, 0].tolist() == [True] * 4 + [False, True]
    )
    for i in (0, 1, 2, 3, 5):
        want = net.linear(net.lstm(s.x[i][holes[i]])[1][0][0])
        assert (
            torch.allclose(found.x[i, 0], want, atol=1e-6) and found.t[i, 0] == s.t[i][holes[i]][-1]
        )
    longer = net(padded(s, 4, math.nan, math.nan))
    assert torch.equal(longer.x, found.x) and torch.equal(longer.t, found.t)
    found.x.square().sum().backward()
    assert finite(net)
    nothing = net(lost(s, slice(None)))
    assert nothing.x.eq(0).all() and not nothing.mask.any()


# ------------------------------------------------------------------ alike lengths together
def test_alike_lengths_keep_every_update_and_sort_inside_it():
    lengths, plan = (
        torch.randint(1, 50, (104,), generator=torch.Generator().manual_seed(0)),
        Plan(batch_size=4, accumulate=5, seed=7),
    )
    rows = alike_lengths(lengths.tolist(), plan)
    for epoch in (0, 3):
        found, want = rows(epoch), epoch_order(104, 7, epoch)
        assert sorted(found) == list(range(104)) and found == rows(epoch)
        for a in range(0, 104, 20):
            assert (
                set(found[a : a + 20]) == set(want[a : a + 20])
                and lengths[found[a : a + 20]].diff().min() >= 0
            )


def test_an_update_over_sorted_batches_is_the_same_update():
    data = streams((9, 9, 9), (8, 8, 8), B=16)
    batch, plan, weights = (
        Batch(data, {"y": torch.randn(16)}),
        Plan(epochs=2, batch_size=4, accumulate=2, lr=1e-2, clip=None, optimiser="sgd"),
        [],
    )
    for sampler in (None, alike_lengths(data["text"].mask.sum(1), plan)):
        model = Multimodal({n: nn.Identity() for n in WIDTHS}, fusion(), {"y": RegressionHead(48)})
        nn.init.constant_(model.heads["y"].linear.weight, 0.1)
        fit(model, mse("y"), batch, None, plan, tracking=QUIET, hooks=Hooks(sampler=sampler))
        weights.append(torch.cat([p.flatten() for p in model.parameters()]).detach())
    assert torch.allclose(*weights, atol=1e-4) and not torch.equal(*weights)
