"""Masked softmax, the clock, cross-attention against torch's, pooling, the fusions, and the
measure of where attention looks.
"""

import math
import re

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import padded
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.diagnostics.walk import walk
from mmemo.models.attention import Clock, CrossAttention, CrossBlock, masked_softmax
from mmemo.models.base import Multimodal, Project, RegressionHead
from mmemo.models.crossmodal import (
    AlignedCurve,
    AttentionPool,
    CrossModalFusion,
    DynamicFusion,
    attention_mass,
    draw_attention,
)
from mmemo.training.objectives import mse

WIDTHS = {"text": 6, "audio": 4, "video": 3}
PAIRS = (("text", "audio"), ("text", "video"))


def stream(B=5, T=7, F=8, rate=10, seed=0, least=1):
    g = torch.Generator().manual_seed(seed)
    return Stream.of(
        torch.randn(B, T, F, generator=g),
        torch.arange(T) < torch.randint(least, T + 1, (B, 1), generator=g),
        rate=rate,
    )


def streams(B=5, seed=0):
    return {
        n: stream(B, T, F, rate, seed + T)
        for (n, F), T, rate in zip(WIDTHS.items(), (7, 11, 9), (3, 10, 8))
    }


def lost(s, row):
    "The stream with item `row` missing."
    mask = s.mask.clone()
    mask[row] = False
    return Stream(s.x, mask, s.t)


def fusion(pairs=PAIRS, **options):
    torch.manual_seed(3)
    return CrossModalFusion(WIDTHS, 8, 2, pairs, **{"dropout": 0.0, **options})


def random_weights(module, seed=1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in module.named_parameters():
            if "log_width" not in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return module


def finite(module):
    return all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


# ------------------------------------------------------------------ masked softmax
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(0, 10**6), st.sampled_from([1.0, 1e4, 1e30])
)
def test_masked_softmax_is_the_softmax_of_the_real_steps_alone(B, T, seed, size):
    g = torch.Generator().manual_seed(seed)
    scores, mask = torch.randn(B, T, generator=g) * size, torch.rand(B, T, generator=g) < 0.6
    found = masked_softmax(scores, mask)
    for row, m, w in zip(scores, mask, found):
        assert w[~m].eq(0).all() and torch.allclose(w[m], row[m].softmax(0))


def test_masked_softmax_of_nothing_is_zero_and_silent_in_the_backward_pass():
    scores = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]], requires_grad=True)
    weights = masked_softmax(scores, torch.tensor([[True, True], [False, False]]))
    (weights * torch.tensor([1.0, 3.0])).sum().backward()
    assert weights[1].eq(0).all() and scores.grad[1].eq(0).all() and scores.grad[0].abs().min() > 0


def test_masked_softmax_is_float32_whatever_comes_in():
    assert (
        masked_softmax(torch.randn(2, 3).half(), torch.ones(2, 3, dtype=torch.bool)).dtype
        == torch.float32
    )


# ------------------------------------------------------------------ the clock
def test_clock_by_hand():
    clock = Clock(3, 0.1)
    query, key = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 1.0, 3.0, 0.5]])
    found = clock(query, key)
    assert found.shape == (1, 3, 2, 4) and torch.allclose(
        clock.log_width.exp(), torch.tensor([0.1, 0.2, 0.4])
    )
    for h, q, k in ((0, 0, 0), (1, 1, 2), (2, 0, 3)):
        gap = float(query[0, q] - key[0, k])
        assert math.isclose(
            found[0, h, q, k].item(), -0.5 * (gap / (0.1 * 2**h)) ** 2, rel_tol=1e-5
        )
    assert found[0, :, 1, 1].eq(0).all()


def test_clock_moves_attention_to_the_querys_own_time_and_only_gaps_count():
    torch.manual_seed(0)
    words, frames = stream(3, 4, 8, 2), stream(3, 42, 8, 21, seed=1, least=42)
    attend = CrossAttention(8, 2, clock=Clock(2, 0.01))
    weights = attend(words, frames)[1]
    nearest = (words.t[:, :, None] - frames.t[:, None]).abs().argmin(-1)
    assert torch.equal(weights[:, 0].argmax(-1)[words.mask], nearest[words.mask])
    later = [Stream(s.x, s.mask, s.t + 4.0) for s in (words, frames)]
    assert torch.allclose(attend(*later)[1], weights, atol=5e-3)


def test_clock_learns_its_widths():
    attend = random_weights(CrossAttention(8, 2, clock=Clock(2, 0.2)))
    attend(stream(), stream(T=9, seed=2))[0].x.square().sum().backward()
    assert attend.clock.log_width.grad.abs().min() > 0


@pytest.mark.parametrize("width", [0.0, -1.0, math.nan, math.inf])
def test_a_clock_needs_a_width(width):
    with pytest.raises(ConfigError, match="clock=.* cannot be"):
        Clock(2, width)


# ------------------------------------------------------------------ cross-attention against torch
def twins(width=12, heads=3):
    torch.manual_seed(1)
    ours, theirs = (
        random_weights(CrossAttention(width, heads)),
        nn.MultiheadAttention(width, heads, batch_first=True),
    )
    with torch.no_grad():
        theirs.in_proj_weight.copy_(
            torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
        )
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    return ours, theirs


def test_equal_to_multihead_attention_in_values_weights_and_gradients():
    ours, theirs = twins()
    query, key = stream(4, 5, 12), stream(4, 9, 12, seed=2)
    a, b = (
        (s.x.clone().requires_grad_() for s in (query, key)),
        (s.x.clone().requires_grad_() for s in (query, key)),
    )
    (qa, ka), (qb, kb) = a, b
    found, weights = ours(query.with_x(qa), key.with_x(ka))
    want, want_weights = theirs(qb, kb, kb, key_padding_mask=~key.mask, average_attn_weights=False)
    real = query.mask
    assert torch.allclose(found.x[real], want[real], atol=1e-5)
    assert torch.allclose(
        rearrange(weights, "B n Q K -> B Q n K")[real],
        rearrange(want_weights, "B n Q K -> B Q n K")[real],
        atol=1e-6,
    )
    pull = torch.randn(int(real.sum()), 12)
    (found.x[real] * pull).sum().backward()
    (want[real] * pull).sum().backward()
    assert torch.allclose(qa.grad, qb.grad, atol=1e-5) and torch.allclose(
        ka.grad, kb.grad, atol=1e-5
    )
    for i, name in enumerate(("query", "key", "value")):
        assert torch.allclose(
            getattr(ours, name).weight.grad, theirs.in_proj_weight.grad.chunk(3)[i], atol=1e-4
        ), name
    assert torch.allclose(ours.out.weight.grad, theirs.out_proj.weight.grad, atol=1e-4)


def test_equal_to_the_fused_kernel_with_the_clock_as_its_bias():
    torch.manual_seed(0)
    ours, query, key = (
        random_weights(CrossAttention(12, 3, clock=Clock(3, 0.3))),
        stream(4, 5, 12),
        stream(4, 9, 12, seed=2),
    )
    q, k, v = (
        rearrange(layer(s.x), "B T (n h) -> B n T h", n=3)
        for layer, s in ((ours.query, query), (ours.key, key), (ours.value, key))
    )
    bias = ours.clock(query.t, key.t).masked_fill(~key.mask[:, None, None], -torch.inf)
    want = ours.out(
        rearrange(nn.functional.scaled_dot_product_attention(q, k, v, bias), "B n T h -> B T (n h)")
    )
    assert torch.allclose(ours(query, key)[0].x[query.mask], want[query.mask], atol=1e-5)


def test_the_maps_are_the_weights_that_made_the_answer():
    ours, query, key = twins()[0], stream(4, 5, 12), stream(4, 9, 12, seed=2)
    found, weights = ours(query, key)
    values = rearrange(ours.value(key.x), "B K (n h) -> B n K h", n=3)
    again = ours.out(rearrange(weights @ values, "B n Q h -> B Q (n h)"))
    assert (
        torch.allclose(found.x[query.mask], again[query.mask], atol=1e-6)
        and found.x[~query.mask].eq(0).all()
    )
    assert torch.allclose(
        weights.sum(-1).mT, query.mask[..., None].float().expand(-1, -1, 3), atol=1e-6
    )


def test_where_torch_gives_nan_a_query_without_keys_gets_zero():
    ours, theirs = twins()
    query, key = stream(4, 5, 12, least=5), lost(stream(4, 9, 12, seed=2), 1)
    want = theirs(query.x, key.x, key.x, key_padding_mask=~key.mask)[0]
    assert want[1].isnan().all()
    found, weights = ours(query, key)
    assert (
        found.x[1].eq(0).all()
        and weights[1].eq(0).all()
        and torch.allclose(found.x[[0, 2, 3]], want[[0, 2, 3]], atol=1e-5)
    )
    found.x.sum().backward()
    assert finite(ours)


def test_large_scores_survive_half_precision():
    attend = CrossAttention(64, 1)
    with torch.no_grad():
        for layer in (attend.query, attend.key):
            layer.weight.copy_(torch.eye(64))
            layer.bias.zero_()
    # 64 · 40² is beyond fp16, an eighth of it is not
    big = Stream.of(torch.full((1, 3, 64), 40.0), rate=1)
    with torch.autocast("cpu", torch.float16):
        weights = attend(big, big)[1]
    assert torch.allclose(weights.float(), torch.full((1, 1, 3, 3), 1 / 3), atol=1e-3)


def test_heads_must_divide_the_width():
    for heads in (3, 0):
        with pytest.raises(ConfigError, match=f"width=8 cannot be divided among heads={heads}"):
            CrossAttention(8, heads)


# ------------------------------------------------------------------ block, pool, dynamic fusion
def test_block_by_hand():
    torch.manual_seed(0)
    block, query, key = random_weights(CrossBlock(8, 2, dropout=0.0)), stream(), stream(T=9, seed=2)
    asks, offers = block.norms[0](query.x), block.norms[1](key.x)
    x = (
        query.x
        + (asks @ block.gate.weight.T + block.gate.bias)
        * block.attend(query.with_x(asks), key.with_x(offers))[0].x
    )
    want = x + block.mix(block.norms[2](x))
    found, weights = block(query, key)
    assert (
        torch.allclose(found.x[query.mask], want[query.mask], atol=1e-5)
        and found.x[~query.mask].eq(0).all()
        and weights.shape == (5, 2, 7, 9)
    )


def test_gates_begin_wide():
    torch.manual_seed(0)
    assert 0.9 < CrossBlock(64, 4).gate.weight.std().item() * 8 / 2 < 1.1


def test_even_attention_hears_a_sign_among_decoys_only_through_a_gate():
    """Four steps whose signs sum to zero, one of them marked in the query: without a gate the
    pooled answer is the same for either sign.
    """
    torch.manual_seed(0)
    signs = torch.tensor([[1.0, -1, -1, 1], [-1, 1, 1, -1]])
    # the voice: up, down, down, up, and its opposite
    steps = Stream.of(signs[..., None] * torch.randn(8), rate=1)
    words = Stream.of(torch.randn(4, 8).expand(2, -1, -1), rate=1)  # the same four words for both
    block = CrossBlock(8, 2, dropout=0.0, clock=Clock(2, 1e-3))  # each word hears its own moment
    block.norms[1] = nn.Identity()
    heard = block.attend(words, steps)[0].x.mean(1)
    asks = block.norms[0](words.x)
    gated = (block.gate(asks) * block.attend(words.with_x(asks), steps)[0].x).mean(1)
    assert (heard[0] - heard[1]).abs().max() < 1e-6 < 1e-2 < (gated[0] - gated[1]).abs().max()


def test_pool_is_a_mean_under_its_weights():
    pool, s = random_weights(AttentionPool(8)), lost(stream(), 2)
    vector, weights = pool(s)
    assert (
        vector.shape == (5, 8)
        and weights.shape == (5, 7)
        and weights[~s.mask].eq(0).all()
        and vector[2].eq(0).all()
    )
    for i in (0, 1, 3, 4):
        w = pool.score(s.x[i][s.mask[i]])[:, 0].softmax(0)
        assert torch.allclose(weights[i][s.mask[i]], w, atol=1e-6) and torch.allclose(
            vector[i], w @ s.x[i][s.mask[i]], atol=1e-5
        )


def test_dynamic_fusion_by_hand():
    data, fuse = streams(), random_weights(DynamicFusion(WIDTHS, 10, 0.0))
    fused = fuse(data)
    vectors = torch.stack([fuse.project[n](fuse.pools[n](s)[0]) for n, s in data.items()], 1)
    weights = fuse.score(vectors.flatten(1)).softmax(-1)
    assert torch.allclose(fused.maps["modality"], weights, atol=1e-6) and torch.allclose(
        fused.vector, fuse.mix((weights[..., None] * vectors).sum(1)), atol=1e-5
    )
    assert {n: list(m.shape) for n, m in fused.maps.items()} == {
        "modality": [5, 3],
        "pool text": [5, 7],
        "pool audio": [5, 11],
        "pool video": [5, 9],
    }


@pytest.mark.parametrize("name", WIDTHS)
def test_a_missing_modality_weighs_exactly_zero(name):
    data, fuse = streams(), random_weights(DynamicFusion(WIDTHS, 10, 0.0))
    weights = fuse({**data, name: lost(data[name], 2)}).maps["modality"]
    gone = list(WIDTHS).index(name)
    assert (
        weights[2, gone] == 0
        and torch.allclose(weights.sum(-1), torch.ones(5))
        and weights[[0, 1, 3, 4]].min() > 0
    )
    nothing = fuse({n: lost(s, slice(None)) for n, s in data.items()})
    assert nothing.maps["modality"].eq(0).all() and nothing.vector.isfinite().all()


# ------------------------------------------------------------------ the whole fusion
def test_maps_of_every_direction_and_rows_that_sum_to_one():
    data = streams()
    maps = fusion()(data).maps
    assert {n: list(m.shape) for n, m in maps.items() if "→" in n} == {
        "text→audio": [5, 2, 7, 11],
        "audio→text": [5, 2, 11, 7],
        "text→video": [5, 2, 7, 9],
        "video→text": [5, 2, 9, 7],
    }
    for name, m in maps.items():
        if "→" in name:
            assert torch.allclose(
                m.sum(-1),
                data[name.split("→")[0]].mask[:, None].float().expand(-1, 2, -1),
                atol=1e-6,
            )


def test_what_two_streams_tell_is_added_up():
    data, fuse = streams(), random_weights(fusion())
    own = {
        n: data[n].with_x(fuse.project[n](data[n].x).masked_fill(~data[n].mask[..., None], 0))
        for n in WIDTHS
    }

    def gain(a, b):
        return fuse.blocks[f"{a}→{b}"](own[a], own[b])[0].x - own[a].x

    want = fuse.fuse(
        {
            "text": (
                own["text"].with_x(own["text"].x + gain("text", "audio") + gain("text", "video"))
            ),
            "audio": own["audio"].with_x(own["audio"].x + gain("audio", "text")),
            "video": own["video"].with_x(own["video"].x + gain("video", "text")),
        }
    )
    assert torch.allclose(fuse(data).vector, want.vector, atol=1e-4)


@pytest.mark.parametrize("clock", [0.05, None])
def test_padding_never_changes_a_prediction(clock):
    data, fuse = streams(), random_weights(fusion(clock=clock))
    plain, longer = (
        fuse(data),
        fuse({n: padded(s, by, 0.0) for by, (n, s) in enumerate(data.items(), 2)}),
    )
    assert torch.allclose(plain.vector, longer.vector, atol=1e-5)
    assert (
        torch.allclose(
            plain.maps["text→audio"], longer.maps["text→audio"][:, :, :7, :11], atol=1e-6
        )
        and longer.maps["text→audio"][..., 11:].eq(0).all()
    )


@pytest.mark.parametrize(
    "fill,when", [(7.0, 3.0), (1e30, 1e30), (math.nan, math.nan), (math.inf, -math.inf)]
)
def test_what_stands_in_the_padding_is_never_looked_at(fill, when):
    data, fuse = streams(), random_weights(fusion())
    zeros, garbage = (
        {n: padded(s, by, *what) for by, (n, s) in enumerate(data.items(), 2)}
        for what in ((0.0, 0.0), (fill, when))
    )
    a, b = fuse(zeros), fuse(garbage)
    assert torch.equal(a.vector, b.vector) and all(
        torch.equal(a.maps[n], b.maps[n]) for n in a.maps
    )
    b.vector.square().sum().backward()
    assert finite(fuse)


@pytest.mark.parametrize(
    "module", [CrossAttention(8, 2, clock=Clock(2)), CrossBlock(8, 2, 0.0, Clock(2))]
)
def test_layers_alone_do_not_look_at_padding_either(module):
    query, key = stream(), stream(T=9, seed=2)
    found, weights = module(
        padded(query, 2, math.nan, math.nan), padded(key, 3, math.inf, math.nan)
    )
    want, want_weights = module(query, key)
    assert torch.allclose(found.x[:, :7], want.x, atol=1e-5) and torch.allclose(
        weights[:, :, :7, :9], want_weights, atol=1e-6
    )
    found.x.square().sum().backward()
    assert finite(module)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_missing_modality_is_silent(name):
    data, fuse = Batch(streams()), random_weights(fusion())
    gone = data.without(name).streams
    noise = {
        **gone,
        name: Stream(torch.randn_like(gone[name].x), gone[name].mask, gone[name].t + 5),
    }
    a = fuse(gone)
    assert torch.equal(a.vector, fuse(noise).vector) and not torch.allclose(
        a.vector, fuse(data.streams).vector
    )
    a.vector.sum().backward()
    assert finite(fuse)
    one = fuse({**data.streams, name: lost(data.streams[name], 2)}).vector
    keep, whole = [0, 1, 3, 4], fuse(data.streams).vector
    assert torch.allclose(one[keep], whole[keep], atol=1e-6) and not torch.allclose(
        one[2], whole[2]
    )


def test_order_of_the_batch_and_of_the_steps_is_of_no_account():
    data, fuse, rows = Batch(streams()), random_weights(fusion()), torch.tensor([3, 0, 4, 2, 1])
    assert torch.allclose(
        fuse(data[rows].streams).vector, fuse(data.streams).vector[rows], atol=1e-5
    )
    # time is in t, not in the row number
    turned = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    s = data.streams["audio"]
    shuffled = {**data.streams, "audio": Stream(s.x[:, turned], s.mask[:, turned], s.t[:, turned])}
    assert torch.allclose(fuse(shuffled).vector, fuse(data.streams).vector, atol=1e-5)


def test_gradients_reach_every_trainable_parameter_and_no_frozen_one():
    data = Batch(streams(12), {"y": torch.randn(12)})
    model = Multimodal(
        {n: Project(F, F) for n, F in WIDTHS.items()},
        random_weights(fusion()),
        {"y": RegressionHead(8)},
    )
    model.encoders["video"].requires_grad_(False)
    mse("y")(model(data), data)["loss"].backward()
    for name, p in model.named_parameters():
        # softmax does not see what is added to every score
        if "key.bias" in name:
            continue
        if "pools" in name and name.endswith("score.2.bias"):
            continue
        assert (p.grad is None) if name.startswith("encoders.video") else p.grad.abs().sum() > 0, (
            name
        )


def test_dropout_acts_in_training_only_and_never_on_the_maps():
    data, fuse = streams(), fusion(dropout=0.5)
    a, b = fuse(data), fuse(data)
    assert not torch.equal(a.vector, b.vector) and torch.equal(
        a.maps["text→audio"], b.maps["text→audio"]
    )
    fuse.eval()
    assert torch.equal(fuse(data).vector, fuse(data).vector)


def test_walk_draws_the_fusion_on_meta():
    data = Batch(streams(), {"y": torch.randn(5)})
    model = Multimodal(
        {n: Project(F, F) for n, F in WIDTHS.items()}, fusion(), {"y": RegressionHead(8)}
    )
    w = walk(model, data, depth=2)
    assert (
        w.params == sum(p.numel() for p in model.parameters())
        and any("text→audio" in r.name for r in w.rows)
        and "text→audio" in str(w)
    )
    # what runs side by side is drawn side by side, and after what it needs
    svg = walk(model, data).svg()
    places = {
        title: (float(x), float(y))
        for x, y, title in re.findall(
            r'<text x="(\d+)" y="(\d+)" font-size="12" font-weight="bold" fill="#222">([^<]*)', svg
        )
    }

    def level(*names):
        return {places[n][1] for n in names}

    blocks, projects = (
        [f"blocks.{way}" for way in ("text→audio", "audio→text", "text→video", "video→text")],
        [f"project.{n}" for n in WIDTHS],
    )
    assert (
        len(level(*blocks)) == len(level(*projects)) == 1
        and len({places[b][0] for b in blocks}) == 4
    )
    assert max(level(*projects)) < min(level(*blocks)) < places["fusion fuse"][1]


def test_pairs_must_be_of_streams_that_there_are():
    with pytest.raises(
        ConfigError, match=r"pairs name \['face'\]; the streams are text, audio, video"
    ):
        fusion([("text", "face")])


# ------------------------------------------------------------------ where it looks
def test_attention_mass_by_hand():
    weights = torch.tensor(
        [
            [[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]],
            [[0.25, 0.25, 0.25, 0.25], [0, 0, 0.5, 0.5]],
            [[0.0, 0, 0, 0], [1, 0, 0, 0]],
        ]
    )
    times = torch.tensor([[0.0, 0.1, 0.2, 0.3]]).expand(3, -1)
    found = attention_mass(
        weights, torch.tensor([0, 1, 0]), times, torch.tensor([0.2, 0.0, 0.1]), 0.11
    )
    assert torch.allclose(found[:2], torch.tensor([0.9, 0.0])) and found[2].isnan()


def test_uniform_attention_has_the_mass_of_chance():
    s = stream(6, 30, 4, 10, least=8)
    even = (s.mask / s.mask.sum(1, keepdim=True))[:, None].expand(-1, 3, -1)
    centre = torch.full((6,), 0.45)
    chance = ((s.t - centre[:, None]).abs().le(0.21) & s.mask).sum(1) / s.mask.sum(1)
    assert torch.allclose(
        attention_mass(even, torch.tensor([0, 1, 2, 0, 1, 2]), s.t, centre, 0.21), chance
    )


def test_attention_mass_needs_a_window():
    with pytest.raises(ConfigError, match="window=0"):
        attention_mass(
            torch.ones(2, 3, 4),
            torch.zeros(2, dtype=torch.long),
            torch.zeros(2, 4),
            torch.zeros(2),
            0.0,
        )


def test_the_picture_shows_the_weights_it_was_given():
    import matplotlib.pyplot as plt

    weights, times = torch.rand(3, 5), torch.tensor([0.1, 0.2, 0.4, 0.7, 0.9])
    top, heat = draw_attention(
        weights,
        ["so", "honestly", "sad"],
        times,
        cue=1,
        curve=AlignedCurve(times, torch.randn(5), "level", windows=(0.2, 0.7)),
    )
    mesh = heat.collections[0]
    assert torch.allclose(torch.tensor(mesh.get_array().reshape(3, 5)), weights) and [
        layer.get_text() for layer in heat.get_yticklabels()
    ] == ["so", "honestly", "sad"]
    assert (
        torch.allclose(torch.tensor(top.lines[0].get_xdata()), times)
        and heat.get_yticklabels()[1].get_fontweight() == "bold"
    )
    with pytest.raises(ShapeError, match="2 words for 3 queries"):
        draw_attention(weights, ["so", "sad"], times)
    with pytest.raises(ShapeError, match="4 times for 5 keys"):
        draw_attention(weights, ["a", "b", "c"], times[:4])
    side = draw_attention(weights, ["a", "b", "c"], times, pool=torch.tensor([0.1, 0.7, 0.2]))[
        1
    ].child_axes[0]
    assert [round(bar.get_width(), 3) for bar in side.patches] == [0.1, 0.7, 0.2]
    plt.close("all")
