"""What every fusion must obey, whatever its streams; what each of them computes, by hand; the
budget, the names, modality dropout.
"""

import itertools
import re

import pytest
import torch
from streams import learned, padded
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.diagnostics.walk import walk
from mmemo.models.base import Fused, Multimodal, Project, RegressionHead
from mmemo.models.crossmodal import CrossModalFusion, DynamicFusion
from mmemo.models.fusion import (
    FUSIONS,
    AdaptiveFusion,
    BottleneckFusion,
    CrossAttentionFusion,
    GatedFusion,
    ModalityDropout,
    Ramp,
    get_fusion,
    same_budget,
)
from mmemo.models.products import LowRankFusion, ProductFusion, Summaries, TensorFusion

WIDTHS = {"text": 6, "audio": 5, "video": 3}
SETS = [("audio",), ("text", "video"), ("audio", "video"), ("text", "audio", "video")]
every = pytest.mark.parametrize("name", FUSIONS)


def of(names):
    return {n: WIDTHS[n] for n in names}


def streams(names=tuple(WIDTHS), B=5, seed=0, steps=(7, 11, 9)):
    g = torch.Generator().manual_seed(seed)
    made = {}
    for (n, F), T, rate in zip(WIDTHS.items(), steps, (3, 10, 8)):
        x, length = torch.randn(B, T, F, generator=g), torch.randint(1, T + 1, (B, 1), generator=g)
        if n in names:
            made[n] = Stream.of(x, torch.arange(T) < length, rate=rate)
    return made


def fusion(name, names=tuple(WIDTHS), width=8, **options):
    torch.manual_seed(3)
    return learned(get_fusion(name, of(names), width, **options), scale=0.4)


def lose(given, row, *names):
    "The streams with item `row` missing in some."
    return {
        n: Stream(s.x, s.mask & (torch.arange(len(s)) != row)[:, None], s.t) if n in names else s
        for n, s in given.items()
    }


# ------------------------------------------------------------------ what all of them obey
@pytest.mark.parametrize("names", SETS, ids="+".join)
@every
def test_a_vector_an_item_of_one_two_or_three_modalities(name, names):
    found = fusion(name, names)(streams(names))
    assert (
        found.vector.shape == (5, 8)
        and found.vector.isfinite().all()
        and found.vector.std(0).max() > 0
    )
    assert all(len(m) == 5 and m.min() >= 0 for m in found.maps.values())


@pytest.mark.parametrize("names", SETS, ids="+".join)
@every
def test_padding_is_not_seen(name, names):
    given, fuse = streams(names), fusion(name, names)
    more = {
        n: padded(s, 1 + i, fill=torch.nan, when=50.0) for i, (n, s) in enumerate(given.items())
    }
    a, b = fuse(given), fuse(more)
    assert torch.allclose(a.vector, b.vector, atol=1e-6)
    for key, m in a.maps.items():  # maps grow by steps of weight 0
        n = b.maps[key]
        assert torch.allclose(
            m, n[tuple(slice(size) for size in m.shape)], atol=1e-6
        ) and torch.isclose(m.sum(), n.sum(), rtol=1e-5)


@every
def test_every_item_is_fused_for_itself(name):
    given, fuse, order = streams(), fusion(name), torch.tensor([3, 0, 4, 1, 2])
    whole = fuse(given).vector
    assert torch.allclose(
        fuse({n: s[order] for n, s in given.items()}).vector, whole[order], atol=1e-6
    )
    for i in range(5):
        assert torch.allclose(
            fuse({n: s[[i]] for n, s in given.items()}).vector[0], whole[i], atol=1e-6
        )


@pytest.mark.parametrize(
    "lost", [("text",), ("audio", "video"), ("text", "audio", "video")], ids="+".join
)
@every
def test_what_a_missing_modality_holds_reaches_neither_output_nor_gradient(name, lost):
    fuse, results = fusion(name), []
    for fill in (0.0, torch.nan, torch.inf):
        given = lose(streams(), 2, *lost)
        for n in lost:
            given[n].x[2] = fill
        given = {n: s.with_x(s.x.requires_grad_()) for n, s in given.items()}
        fuse.zero_grad()
        vector = fuse(given).vector
        vector.square().sum().backward()
        assert vector.isfinite().all() and all(
            p.grad is None or p.grad.isfinite().all() for p in fuse.parameters()
        )
        for n in lost:
            assert given[n].x.grad[2].eq(0).all()
        results.append(
            (vector.detach(), [p.grad.clone() for p in fuse.parameters() if p.grad is not None])
        )
    for vector, grads in results[1:]:
        assert torch.equal(vector, results[0][0]) and all(
            torch.equal(a, b) for a, b in zip(grads, results[0][1])
        )


@every
def test_losing_a_modality_is_noticed_by_its_item_alone(name):
    given, fuse = streams(), fusion(name)
    whole, less = fuse(given).vector, fuse(lose(given, 1, "audio")).vector
    rest = torch.tensor([0, 2, 3, 4])
    assert (
        torch.allclose(whole[rest], less[rest], atol=1e-6)
        and (whole[1] - less[1]).abs().max() > 1e-3
    )


@every
def test_pooled_streams_of_one_step_will_do(name):
    given = {n: Stream(s.x[:, :1], s.mask[:, :1], s.t[:, :1]) for n, s in streams().items()}
    assert fusion(name)(given).vector.isfinite().all()


@every
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    fuse, reached = get_fusion(name, WIDTHS, 8, dropout=0.0), {}
    for seed in range(4):  # ReLUs may hide a parameter from one batch
        given = lose(streams(seed=seed), 1, "audio")
        given = {n: lose({n: s}, i, n)[n] for i, (n, s) in enumerate(given.items())}
        fuse.zero_grad()
        (fuse(given).vector * torch.randn(8)).sum().backward()
        for n, p in fuse.named_parameters():
            reached[n] = (
                reached.get(n, False) or p.grad is not None and bool(p.grad.abs().max() > 0)
            )
    silent = {n for n, hit in reached.items() if not hit}
    # softmax does not feel a shift of all scores
    assert all(re.search(r"attend\.key\.bias|pools\..*score\.2\.bias", n) for n in silent), silent


@every
def test_every_fusion_can_be_walked(name):
    model = Multimodal(
        {n: Project(F, 8) for n, F in WIDTHS.items()},
        get_fusion(name, dict.fromkeys(WIDTHS, 8), 8),
        {"phq8": RegressionHead(8)},
    )
    assert "B=5" in str(walk(model, Batch(streams())))


@every
def test_half_precision_stays_finite(name):
    with torch.autocast("cpu", torch.bfloat16):
        vector = fusion(name)(lose(streams(), 0, "text", "audio", "video")).vector
    assert vector.isfinite().all()


# ------------------------------------------------------------------ each of them, by hand
def test_summaries_by_hand_and_their_errors():
    given, net = lose(streams(), 3, "video"), learned(Summaries(WIDTHS, 4))
    vectors, present = net(given)
    assert (
        vectors.shape == (5, 3, 4)
        and present[3].tolist() == [True, True, False]
        and vectors[3, 2].eq(0).all()
    )
    mean = given["audio"].x[1][given["audio"].mask[1]].mean(0)
    layer, norm = net.project["audio"]
    want = nn.functional.layer_norm(
        mean @ layer.weight.T + layer.bias, (4,), norm.weight, norm.bias
    )
    assert torch.allclose(vectors[1, 1], want, atol=1e-5)
    with pytest.raises(ShapeError, match="audio: axis H is 3, the fusion was built for 5"):
        net(given | {"audio": given["video"]})
    with pytest.raises(
        ShapeError, match="there is no video; a missing modality is a stream whose mask is False"
    ):
        net({n: given[n] for n in ("text", "audio")})
    for bad in ({}, WIDTHS):
        with pytest.raises(ConfigError, match="at least one stream and one unit"):
            Summaries(bad, 0)


def test_product_is_the_product_and_a_missing_modality_is_ones():
    fuse, given = learned(ProductFusion(WIDTHS, 8)), lose(streams(), 2, "text")
    vectors, _ = fuse.summaries(given)
    product = vectors[:, 0] * vectors[:, 1] * vectors[:, 2]
    product[2] = vectors[2, 1] * vectors[2, 2]
    assert torch.allclose(fuse(given).vector, fuse.mix(product), atol=1e-6)
    fresh = ProductFusion(WIDTHS, 64).summaries(streams())[0]
    assert abs(fresh.mean() - 1) < 1e-4  # around 1, so that sums have a gradient too


def test_tensor_holds_the_product_of_every_choice_of_entries():
    torch.manual_seed(0)
    fuse, given = TensorFusion(WIDTHS, 4, size=2).eval(), lose(streams(), 1, "audio")
    z = nn.functional.pad(fuse.summaries(given)[0], (1, 0), value=1.0)
    seen = []
    fuse.weigh.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    fuse(given)
    for at, (i, j, k) in enumerate(itertools.product(range(3), repeat=3)):
        assert torch.allclose(seen[0][:, at], z[:, 0, i] * z[:, 1, j] * z[:, 2, k])
    # without a modality, no product that it is part of
    assert seen[0][1].reshape(3, 3, 3)[:, 1:].eq(0).all()


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_low_rank_is_the_tensor_fusion_whose_weight_its_factors_make(names):
    torch.manual_seed(0)
    low, full = (
        learned(LowRankFusion(of(names), 7, size=3, rank=5)),
        TensorFusion(of(names), 7, size=3).eval(),
    )
    full.summaries.load_state_dict(low.summaries.state_dict())
    full.mix.load_state_dict(low.mix.state_dict())
    weight = torch.zeros(5, 1, 7) + 1
    # outer products, rank by rank
    for factor in low.factors:
        weight = torch.einsum("r i h, r j h -> r i j h", weight, factor).flatten(1, 2)
    with torch.no_grad():
        full.weigh.weight.copy_(weight.sum(0).T)
        full.weigh.bias.copy_(low.bias)
    given = lose(streams(names), 1, names[-1])
    assert torch.allclose(low(given).vector, full(given).vector, atol=1e-4)


def test_gates_by_hand():
    fuse, given = learned(GatedFusion(WIDTHS, 4, 0.0)), lose(streams(), 0, "video")
    vectors, _ = fuse.summaries(given)
    found = fuse(given)
    gates = torch.sigmoid(vectors.flatten(1) @ fuse.gate.weight.T + fuse.gate.bias).reshape(5, 3, 4)
    gates[0, 2] = 0
    assert torch.allclose(found.maps["gates"], gates, atol=1e-6)
    assert torch.allclose(
        found.vector, sum(gates[:, m] * vectors[:, m].tanh() for m in range(3)), atol=1e-6
    )


def test_adaptive_weighs_what_is_there_and_stands_in_for_what_is_not():
    fuse, given = learned(AdaptiveFusion(WIDTHS, 4, 0.0)), lose(streams(), 0, "video")
    vectors, present = fuse.summaries(given)
    vectors[0, 2] = fuse.stand_in[2]
    weights = fuse.reliability(torch.cat([vectors.flatten(1), present.float()], 1)).softmax(1)
    found = fuse(given)
    assert torch.allclose(found.maps["modality"], weights, atol=1e-6) and torch.allclose(
        weights.sum(1), torch.ones(5)
    )
    assert torch.allclose(
        found.vector, fuse.mix((weights.unsqueeze(-1) * vectors).sum(1)), atol=1e-6
    )
    before = found.vector[0].clone()
    with torch.no_grad():
        fuse.stand_in[2] += 1
    again = fuse(given).vector
    assert not torch.allclose(again[0], before) and torch.equal(again[1:], found.vector[1:])


def test_bottleneck_by_hand_is_the_mean_answer_of_what_is_there():
    fuse, given = (
        learned(BottleneckFusion(WIDTHS, 8, 0.0, heads=2, latents=3, rounds=2)),
        lose(streams(), 4, "text"),
    )
    found, own = fuse(given), {n: s.with_x(fuse.project[n](s.x)) for n, s in given.items()}
    for item, names in ((0, WIDTHS), (4, ("audio", "video"))):
        asks = Stream(fuse.latents[None], torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3))
        for k, blocks in enumerate(fuse.rounds, 1):
            answers = {n: blocks[n](asks, own[n][[item]]) for n in names}
            for n, (_, w) in answers.items():
                assert torch.allclose(
                    found.maps[f"latents→{n} {k}"][item, ..., : w.shape[-1]], w[0], atol=1e-6
                )
            asks = asks.with_x(sum(a.x for a, _ in answers.values()) / len(answers))
        assert torch.allclose(found.vector[item], fuse.mix(asks.x[0].mean(0)), atol=1e-5)
    assert found.maps["latents→text 1"][4].eq(0).all()


def test_bottleneck_tells_one_modality_of_another_from_the_second_round_on():
    given = streams()
    other = given | {"text": given["text"].with_x(-given["text"].x)}
    for rounds, tells in ((1, False), (2, True)):
        fuse = learned(BottleneckFusion(WIDTHS, 8, 0.0, heads=2, rounds=rounds))
        a, b = (fuse(s).maps[f"latents→audio {rounds}"] for s in (given, other))
        assert torch.equal(a, b) != tells


@pytest.mark.parametrize(
    "names, ways",
    [
        (("audio",), []),
        (("audio", "video"), ["audio→video", "video→audio"]),
        (("text", "audio", "video"), ["text→audio", "audio→text", "text→video", "video→text"]),
    ],
    ids="+".join,
)
def test_cross_attention_asks_the_pairs_there_are(names, ways):
    fuse = CrossAttentionFusion(of(names), 8)
    assert set(fuse.blocks) == set(ways) and isinstance(fuse, CrossModalFusion)
    if not ways:
        given = streams(names)
        own = {n: s.with_x(fuse.project[n](s.x)) for n, s in given.items()}
        assert isinstance(fuse.fuse, DynamicFusion) and torch.allclose(
            fuse.eval()(given).vector, fuse.fuse(own).vector, atol=1e-6
        )


def test_cross_attention_takes_pairs_of_ones_own():
    assert set(CrossAttentionFusion(WIDTHS, 8, pairs=[("audio", "video")]).blocks) == {
        "audio→video",
        "video→audio",
    }
    with pytest.raises(ConfigError, match="pairs name .*face"):
        get_fusion("cross_attention", WIDTHS, 8, pairs=[("face", "text")])


# ------------------------------------------------------------------ names, options, budget
@pytest.mark.parametrize(
    "name, words",
    [
        ("gate", "did you mean gated"),
        ("lowrank", "did you mean low_rank"),
        ("qqq", "choose from concat, normalized_concat"),
    ],
)
def test_an_unknown_name_is_told_its_neighbours(name, words):
    with pytest.raises(ConfigError, match=f"there is no fusion '{name}'; {words}"):
        get_fusion(name, WIDTHS, 8)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("low_rank", {"rnk": 3}, "no option 'rnk'; did you mean rank"),
        ("gated", {"heads": 2}, "no option 'heads'; it has none"),
        ("bottleneck", {"width_": 2}, "no option 'width_'"),
        ("bottleneck", {"latents": 0}, "latents=0"),
        ("bottleneck", {"heads": 3}, "width=8 cannot be divided"),
        ("low_rank", {"rank": 0}, "rank=0"),
        ("tensor", {"size": 0}, "size=0"),
        ("tensor", {"size": 10**4}, "2\\^28 weights"),
        ("cross_attention", {"clock": -1.0}, "clock=-1"),
    ],
)
def test_options_that_cannot_be(name, options, words):
    with pytest.raises(ConfigError, match=words):
        get_fusion(name, WIDTHS, 8, **options)


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="width=0"):
        get_fusion("concat", WIDTHS, 0)
    with pytest.raises(ConfigError, match="at least one stream"):
        get_fusion("concat", {}, 8)
    with pytest.raises(ConfigError, match="dropout=1.5"):
        get_fusion("gated", WIDTHS, 8, dropout=1.5)


def test_options_arrive():
    assert get_fusion("low_rank", WIDTHS, 8, rank=6, size=2).factors.shape == (3, 6, 3, 8)
    assert len(get_fusion("bottleneck", WIDTHS, 8, latents=7, rounds=3).rounds) == 3
    assert get_fusion("product", WIDTHS, 8, dropout=0.35).mix[2].p == 0.35 and set(FUSIONS) >= {
        "concat",
        "dynamic",
    }


@pytest.mark.parametrize("budget", [9_000, 60_000])
@every
def test_same_budget_is_the_nearest_width(name, budget):
    def count(w):
        return sum(p.numel() for p in get_fusion(name, WIDTHS, w).parameters())

    noise = torch.get_rng_state()
    width = same_budget(name, WIDTHS, budget)
    assert torch.equal(noise, torch.get_rng_state())  # looking draws no random number
    step = 4 if name in ("bottleneck", "cross_attention") else 1
    assert width % step == 0 and all(
        abs(count(width) - budget) <= abs(count(w) - budget) for w in (width - step, width + step)
    )


def test_same_budget_heeds_options_and_says_when_there_is_none():
    assert same_budget("bottleneck", WIDTHS, 60_000, heads=16) % 16 == 0
    assert same_budget("tensor", WIDTHS, 20_000, size=4) > same_budget("tensor", WIDTHS, 20_000)
    least = sum(p.numel() for p in get_fusion("tensor", WIDTHS, 1).parameters())
    with pytest.raises(
        ConfigError,
        match=(
            f"budget=500: the narrowest tensor fusion of text, audio, video has {least} parameters"
        ),
    ):
        same_budget("tensor", WIDTHS, 500)
    with pytest.raises(ConfigError, match="did you mean tensor"):
        same_budget("tensr", WIDTHS, 500)


# ------------------------------------------------------------------ modality dropout
class Ear(nn.Module):
    "A fusion that remembers what was there."

    def forward(self, streams):
        self.present = torch.stack([s.mask.any(1) for s in streams.values()], 1)
        return Fused(self.present.float())


def test_modality_dropout_follows_the_law_of_the_corpus():
    """Each is lost with probability p; who would lose all keeps one, each as likely as the other
    (factors._presence).
    """
    from mmemo.synthetic.factors import _presence

    given, p = {n: Stream.of(torch.randn(20_000, 1, 2), rate=1) for n in WIDTHS}, 0.5
    drop = ModalityDropout(ear := Ear(), p).train()
    drop(given)
    assert ear.present.any(1).all()
    for names, share in _presence(p).items():
        want = torch.tensor([n in names for n in WIDTHS])
        assert abs((ear.present == want).all(1).float().mean() - share) < 0.012, names


def test_modality_dropout_keeps_the_last_one_of_an_item_that_has_no_more():
    given = lose(streams(), 2, "text", "video")
    drop = ModalityDropout(ear := Ear(), 0.99).train()
    for _ in range(30):
        drop(given)
        assert ear.present[2].tolist() == [False, True, False] and ear.present.sum(1).min() == 1
    nothing = {n: Stream(s.x, s.mask & False, s.t) for n, s in given.items()}
    drop(nothing)
    assert not ear.present.any()


def test_modality_dropout_is_off_in_evaluation_and_at_zero_and_has_bounds():
    given, fuse = streams(), fusion("gated")
    drop = ModalityDropout(fuse, 0.7)
    assert torch.equal(drop.eval()(given).vector, fuse(given).vector)
    drop.train()
    fuse.eval()
    assert not torch.equal(drop(given).vector, fuse(given).vector)
    still = ModalityDropout(fuse, 0.0).train()
    fuse.eval()
    assert torch.equal(still(given).vector, fuse(given).vector)
    for p in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="cannot be"):
            ModalityDropout(fuse, p)


# ------------------------------------------------------------------ the encoder that costs nothing
def test_ramp_tells_which_way_a_curve_runs_and_ignores_padding():
    t = torch.arange(8.0)
    up = torch.stack([t - 3.5, 3.5 - t, torch.ones(8)]).unsqueeze(-1)
    s = Stream.of(up, rate=4)
    found = Ramp()(s)
    assert found.x.shape == (3, 8, 2) and torch.equal(found.x[..., :1], up)
    slope = found.x.mean(1)[:, 1]
    assert torch.allclose(
        slope, torch.tensor([t.std(correction=0), -t.std(correction=0), 0.0]), atol=1e-4
    )
    assert (
        torch.allclose(Ramp()(padded(s, 3, when=9.0)).x[:, :8], found.x, atol=1e-5)
        and Ramp()(padded(s, 3)).x[:, 8:].eq(0).all()
    )
    nothing = Ramp()(
        Stream(
            torch.full((2, 3, 4), torch.nan), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)
        )
    )
    assert nothing.x.eq(0).all()
