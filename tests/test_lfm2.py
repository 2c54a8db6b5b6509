"""The LFM2 fusion against transformers' own model, packing against padding, missing modalities,
gradients, weights, progressive training.
"""

import math

import pytest
import torch
from streams import padded
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.diagnostics.walk import walk
from mmemo.models.base import ClassHead, Multimodal
from mmemo.models.lfm2 import GIANT, Lfm2Fusion, pack_steps
from mmemo.training.finetune import head_first
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import cross_entropy
from mmemo.training.plan import Plan
from mmemo.training.tracking import QUIET

WIDTHS = {"text": 5, "audio": 4, "video": 3}


def streams(B=6, seed=0, share=0.6):
    g = torch.Generator().manual_seed(seed)
    return {
        n: Stream.of(
            torch.randn(B, T, f, generator=g), torch.rand(B, T, generator=g) < share, rate=2
        )
        for (n, f), T in zip(WIDTHS.items(), (4, 7, 2))
    }


def fusion(layers=5, every=2, **options):
    torch.manual_seed(3)
    return Lfm2Fusion(WIDTHS, 16, layers, 2, every=every, **options).reset(0.3).eval()


def without(s, name, rows=slice(None), fill=99.0):
    mask, x = s[name].mask.clone(), s[name].x.clone()
    mask[rows], x[rows] = False, fill
    return {**s, name: Stream(x, mask, s[name].t)}


def net(**options):
    torch.manual_seed(1)
    return Multimodal(
        {n: nn.Identity() for n in WIDTHS},
        Lfm2Fusion(WIDTHS, 16, 3, 2, every=2, **options),
        {"emotion": ClassHead(16, 3)},
    )


# ------------------------------------------------------------------ packing
def test_pack_keeps_the_order_and_says_where_all_went():
    x, mask = (
        torch.arange(12.0).view(2, 6, 1),
        torch.tensor([[0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]).bool(),
    )
    packed, place = pack_steps(x, mask)
    assert (
        packed.shape == (2, 3, 1)
        and packed[0, :, 0].tolist() == [1, 3, 4]
        and packed[1, :2, 0].tolist() == [6, 11]
    )
    for b in range(2):
        assert torch.equal(packed[b, place[b][mask[b]]], x[b][mask[b]])


@torch.no_grad()
def test_is_what_transformers_own_model_computes():
    """An item at a time, its real steps only: Lfm2Model with the same layers has neither padding
    nor packing to get wrong.
    """
    from transformers import Lfm2Config, Lfm2Model

    ours, s = fusion(), streams()
    config = Lfm2Config(
        hidden_size=16,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=3,
        block_auto_adjust_ff_dim=False,
        layer_types=["conv", "full_attention"] * 2 + ["conv"],
        attn_implementation="sdpa",
    )
    theirs = Lfm2Model(config).eval()
    theirs.layers.load_state_dict(ours.layers.state_dict())
    theirs.embedding_norm.load_state_dict(ours.norm.state_dict())
    found = ours(s)
    for b in range(len(s["text"])):
        tokens = torch.cat(
            [
                ours.project[n](s[n].x[b][s[n].mask[b]]) + ours.modality[i]
                for i, n in enumerate(WIDTHS)
            ]
        )
        want = theirs(inputs_embeds=tokens[None], use_cache=False).last_hidden_state[0, -1]
        assert torch.allclose(found.vector[b], want, atol=1e-4) and want.std() > 0.1


# ------------------------------------------------------------------ what must change nothing
@torch.no_grad()
def test_padding_changes_nothing_at_all():
    ours, s = fusion(), streams()
    for names in (["text"], ["audio", "video"], WIDTHS):
        assert torch.equal(
            ours(s).vector,
            ours({n: padded(v, 3, 77.0) if n in names else v for n, v in s.items()}).vector,
        )


@torch.no_grad()
@pytest.mark.parametrize("name", WIDTHS)
def test_a_missing_modality_says_nothing(name):
    ours, s = fusion(), streams()
    gone = without(s, name)
    assert torch.equal(ours(gone).vector, ours(without(s, name, fill=math.nan)).vector)
    assert (ours(gone).vector - ours(s).vector).abs().max() > 0.01
    cut = Stream(s[name].x[:, :1] * 0, s[name].mask[:, :1] & False, s[name].t[:, :1])
    assert torch.equal(ours(gone).vector, ours({**s, name: cut}).vector)


@torch.no_grad()
def test_items_do_not_see_each_other():
    ours, s = fusion(), streams()
    found, turn = ours(s).vector, torch.randperm(6)
    assert torch.allclose(ours({n: v[turn] for n, v in s.items()}).vector, found[turn], atol=1e-5)
    for b in range(6):
        assert torch.allclose(
            ours({n: v[[b]] for n, v in s.items()}).vector[0], found[b], atol=1e-5
        )


def test_nobody_there_is_zero_and_teaches_nothing():
    ours, s = fusion().train(), streams()
    for n in WIDTHS:
        s = without(s, n, 2, math.nan)
    found = ours(s)
    assert (
        found.vector[2].eq(0).all()
        and found.vector.isfinite().all()
        and found.vector[3].ne(0).any()
    )
    found.vector.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    for n in WIDTHS:
        s = without(s, n)
    assert ours(s).vector.eq(0).all()


# ------------------------------------------------------------------ maps, gradients, meta
@torch.no_grad()
def test_maps_are_causal_over_real_steps():
    s, (name, weights) = streams(), list(fusion()(streams()).maps.items())[0]
    mask = torch.cat([v.mask for v in s.values()], 1)
    assert name == "attention 2" and weights.shape == (6, 2, 13, 13)
    assert torch.allclose(weights.sum(-1), mask[:, None].expand(-1, 2, -1).float(), atol=1e-5)
    assert (
        weights.triu(1).eq(0).all()
        and weights.transpose(2, 3)[~mask[:, None].expand(-1, 2, -1)].eq(0).all()
    )


def test_gradients_reach_everything_and_a_thawed_head_alone_first():
    model, batch = net(), Batch(streams(share=0.9), {"emotion": torch.arange(6) % 3})
    rates, thaw = head_first(2, lr=0.01, then=0.001)
    before, seen = {n: p.detach().clone() for n, p in model.named_parameters()}, []

    def at(m, epoch):
        thaw(m, epoch)
        seen.append({n for n, p in m.named_parameters() if not torch.equal(p, before[n])})

    fit(
        model,
        cross_entropy("emotion"),
        batch,
        None,
        Plan(epochs=4, batch_size=6, lr=rates, weight_decay=0),
        tracking=QUIET,
        hooks=Hooks(at_epoch=at),
    )
    heads = {n for n in before if n.startswith("heads.")}
    assert seen[0] == set() and seen[1] == seen[2] == heads and seen[3] == set(before)
    moved = {n: (p - before[n]).abs().max() for n, p in model.named_parameters()}
    assert (
        min(moved[n] for n in heads)
        > 0.008
        > 0.0041
        > max(v for n, v in moved.items() if n not in heads)
    )
    with pytest.raises(ConfigError, match="epochs=0 cannot be"):
        head_first(0)


def test_the_giant_has_149_million_weights_and_walks():
    with torch.device("meta"):
        widths = {"audio": 88, "video": 35}
        model = Multimodal(
            {n: nn.Identity() for n in widths},
            Lfm2Fusion(widths, **GIANT),
            {"emotion": ClassHead(GIANT["width"], 8)},
        )
    assert abs(sum(p.numel() for p in model.parameters()) - 149e6) < 1e6
    batch = Batch({n: Stream.of(torch.randn(5, 1, w), rate=1) for n, w in widths.items()})
    assert "149," in str(walk(model, batch))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_learns_in_lower_precision(precision):
    s = streams(48, share=0.9)
    batch = Batch(s, {"emotion": s["text"].x[:, :, 0].sum(1).gt(0).long()})
    history = fit(
        net(),
        cross_entropy("emotion"),
        batch,
        None,
        Plan(epochs=12, batch_size=16, lr=3e-3, precision=precision),
        tracking=QUIET,
    )
    assert history.epochs[-1]["train"]["loss"] < 0.6 * history.epochs[0]["train"]["loss"]


# ------------------------------------------------------------------ weights
def test_reset_draws_what_it_says():
    torch.manual_seed(0)
    ours = Lfm2Fusion(WIDTHS, 64, 4, 4)

    def matrices():
        return {n: m for n, m in ours.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d))}

    assert all(abs(m.weight.std() / 0.02 - 1) < 0.3 for m in matrices().values())
    ours.reset(0.1, residual=0.5)
    for n, m in matrices().items():
        assert abs(
            m.weight.std() / (0.05 if n.endswith(("out_proj", "w2")) else 0.1) - 1
        ) < 0.3 and (m.bias is None or m.bias.eq(0).all())
    ours.reset(None)
    assert (
        ours.layers[0].conv.conv.weight.abs().max()
        <= 3**-0.5
        < 2 * ours.layers[0].conv.conv.weight.abs().max()
    )
    ours.reset(0.3, residual=0.0)
    ours.layers[0].operator_norm.weight.data.fill_(7)
    assert ours.reset().layers[0].operator_norm.weight.eq(1).all()
    with torch.no_grad():
        s = streams()
        ours.reset(0.3, residual=0.0).eval()
        found = ours(s).vector
        last = [
            torch.cat(
                [
                    ours.project[n](v.x[b][v.mask[b]]) + ours.modality[i]
                    for i, (n, v) in enumerate(s.items())
                ]
            )[-1]
            for b in range(6)
        ]
        # every layer is the identity
        assert torch.allclose(found, ours.norm(torch.stack(last)), atol=1e-5)


def test_bad_inputs_are_named():
    for options, match in (
        (dict(width=16, heads=16), "width=16 cannot be divided among heads=16"),
        (dict(width=16, heads=2, layers=0), "layers=0"),
        (dict(width=16, heads=2, widths={}), "widths={}"),
        (dict(width=16, heads=2, every=0), "every=0"),
    ):
        with pytest.raises(ConfigError, match=match):
            Lfm2Fusion(**{"widths": WIDTHS, "layers": 2, **options})
    s = streams()
    with pytest.raises(ShapeError, match="there is no video"):
        fusion()({n: v for n, v in s.items() if n != "video"})
    with pytest.raises(ShapeError, match="audio: axis H is 5"):
        fusion()({**s, "audio": s["text"]})
