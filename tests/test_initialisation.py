"""Weights drawn as torch draws them where torch is right, signals measured where a hand can
compute them, shares with honest intervals.
"""

import math

import pytest
import torch
from torch import nn

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.evaluation.metrics import share_of
from mmemo.evaluation.seeds import diverged
from mmemo.models.attention import CrossBlock
from mmemo.models.base import ConcatFusion, Multimodal, Project, RegressionHead
from mmemo.models.initialisation import (
    INITIAL_GAINS,
    INITIAL_STRATEGIES,
    RESIDUAL_ENDS,
    Layer,
    draw_signal,
    initialise,
    measure_signal,
    residual_blocks,
)
from mmemo.models.lora import add_lora
from mmemo.models.mult import CrossModalConfig, CrossModalTransformer
from mmemo.models.stacked import Encoders
from mmemo.models.temporal import TCN
from mmemo.models.text import TextEncoder
from mmemo.training.objectives import mse

DRAWN = tuple(INITIAL_GAINS)


def stream(B=3, T=5, F=4):
    return Stream(
        torch.randn(B, T, F),
        torch.arange(T) < torch.tensor([[T], [2], [1]])[:B],
        torch.arange(T).float().repeat(B, 1),
    )


# --- weights


def test_they_are_torchs_own_draws():
    for strategy, torchs in (
        ("xavier", lambda w, g: nn.init.xavier_uniform_(w, generator=g)),
        ("small", lambda w, g: nn.init.xavier_uniform_(w, 0.1, generator=g)),
        ("kaiming", lambda w, g: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=g)),
        ("orthogonal", lambda w, g: nn.init.orthogonal_(w, generator=g)),
    ):
        for module in (nn.Linear(7, 5), nn.Conv1d(3, 6, 5), nn.Conv2d(3, 4, (3, 2))):
            initialise(module, strategy, seed=4)
            assert torch.allclose(
                module.weight,
                torchs(torch.empty_like(module.weight), torch.Generator().manual_seed(4)),
                atol=1e-7,
            ), strategy
            assert not module.bias.any()


def test_the_spread_that_is_said_is_the_spread_that_is_drawn():
    for strategy in DRAWN:
        model = nn.Sequential(
            nn.Linear(200, 300),
            nn.Conv1d(40, 60, 5),
            nn.Conv1d(240, 240, 41, groups=240),
            nn.LSTM(90, 110),
            nn.MultiheadAttention(96, 4),
        )
        made, gain = initialise(model, strategy, seed=0), 0.7
        for name, sd in made.items():
            p = model.get_parameter(name)
            assert float(p.detach().std()) == pytest.approx(sd, rel=0.05), (strategy, name)
        again = initialise(model, strategy, gain, seed=1)
        assert all(
            again[n] == pytest.approx(sd * gain / INITIAL_GAINS[strategy]) for n, sd in made.items()
        )
        for name, sd in again.items():
            assert float(model.get_parameter(name).detach().std()) == pytest.approx(sd, rel=0.05)


def test_maps_that_share_a_parameter_are_counted_one_by_one():
    """torch's own functions would take the three projections of attention for one map with three
    times the outputs, and a depthwise convolution for a dense one.
    """
    attention, lstm, deep, side = (
        nn.MultiheadAttention(12, 2),
        nn.LSTM(5, 7),
        nn.Conv1d(8, 8, 3, groups=8),
        Encoders(3, 8, 2, 2),
    )
    assert initialise(attention, "xavier")["in_proj_weight"] == pytest.approx(math.sqrt(2 / 24))
    made = initialise(lstm, "xavier")
    assert made["weight_ih_l0"] == pytest.approx(math.sqrt(2 / 12)) and made[
        "weight_hh_l0"
    ] == pytest.approx(math.sqrt(2 / 14))
    assert initialise(deep, "xavier")["weight"] == pytest.approx(math.sqrt(2 / 6))
    made = initialise(side, "kaiming", gain=1.0)
    assert {n: round(1 / v**2) for n, v in made.items() if v} == {
        "inward": 8,
        "outward": 8,
        "up": 8,
        "down": 32,
    }
    initialise(side, "orthogonal")
    for weight in (*side.inward.flatten(0, 1).split(8, -1), side.outward.flatten(0, 1)):
        assert torch.allclose(weight @ weight.mT, torch.eye(8).expand_as(weight), atol=1e-5)


def test_the_same_seed_is_the_same_start_and_the_world_draws_on_as_before():
    one, other = (
        CrossModalTransformer({"text": 3, "audio": 4}, 8, CrossModalConfig(2, 1)) for _ in range(2)
    )
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    for m in (one, other):
        initialise(m, "kaiming", seed=5)
    assert torch.equal(torch.rand(2), wanted)
    assert all(
        torch.equal(p, q)
        for (n, p), q in zip(one.named_parameters(), other.parameters())
        if "norm" not in n
    )
    assert not torch.equal(
        one.mix[0].weight, (initialise(other, "kaiming", seed=6), other.mix[0].weight)[1]
    )


def test_what_it_must_not_touch_stays():
    model = nn.Sequential(
        nn.Embedding(9, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 9, bias=False),
    )
    model[4].weight = model[0].weight  # tied
    model[2].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for strategy in DRAWN:
        assert set(initialise(model, strategy)) == {"2.weight"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k != "2.weight")
    assert initialise(model, "default") == {}
    adapted = add_lora(TextEncoder.pretrained("mmemo-tiny"), r=2)
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    with pytest.raises(ConfigError, match="nothing to draw"):
        initialise(adapted, "xavier")
    assert any("lora_" in k for k in before) and all(
        torch.equal(v, before[k]) for k, v in adapted.state_dict().items()
    )


def lfm2():
    from transformers import Lfm2Config, Lfm2Model

    config = Lfm2Config(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention", "conv"],
    )
    model = Lfm2Model(config)
    return (
        model,
        lambda: model(inputs_embeds=WIDE).last_hidden_state,
        lambda: model.embedding_norm(WIDE),
    )


def hugging(name):
    def make():
        import transformers as t

        size = dict(
            hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2
        )
        model = {
            "bert": lambda: t.BertModel(t.BertConfig(vocab_size=9, **size)),
            "roberta": lambda: t.RobertaModel(t.RobertaConfig(vocab_size=9, **size)),
            "vit": lambda: t.ViTModel(t.ViTConfig(**size)),
            "wav2vec2": lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**size)),
            "distilbert": lambda: t.DistilBertModel(
                t.DistilBertConfig(vocab_size=9, dim=16, n_heads=2, hidden_dim=32, n_layers=2)
            ),
        }[name]().eval()
        layer = next(m for m in model.modules() if type(m).__name__ in RESIDUAL_ENDS)
        norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]

        def first(out):
            return out if isinstance(out, torch.Tensor) else out[0]

        # norms after the sum, in the order of the sums
        normed = name in ("bert", "roberta", "distilbert", "wav2vec2")
        return (
            layer,
            lambda: first(layer(WIDE)),
            lambda: norms[1](norms[0](WIDE)) if normed else WIDE,
        )

    return make


def layer(norm_first=True):
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first).eval()
    return (
        block,
        lambda: block(WIDE),
        lambda: WIDE if norm_first else block.norm2(block.norm1(WIDE)),
    )


def tcn():
    block, s = TCN(16, 16).eval(), Stream.of(WIDE, rate=10)
    return block, lambda: block(s).x, lambda: WIDE


def cross():
    block, s = CrossBlock(16, 2).eval(), Stream.of(WIDE, rate=10)
    return block, lambda: block(s, s)[0].x, lambda: WIDE


def encoders():
    block = Encoders(2, 16, 2, 3).eval()
    x = WIDE.expand(2, -1, -1, -1)
    return (
        block,
        lambda: block(x, None, torch.ones(1, 2, 7, 7, dtype=torch.bool))[0],
        lambda: nn.functional.layer_norm(x, (16,)),
    )


WIDE = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "make",
    [
        tcn,
        cross,
        encoders,
        layer,
        lambda: layer(False),
        lfm2,
        *map(hugging, ("bert", "roberta", "distilbert", "vit", "wav2vec2")),
    ],
    ids=[
        "tcn",
        "cross",
        "encoders",
        "pre-norm",
        "post-norm",
        "lfm2",
        "bert",
        "roberta",
        "distilbert",
        "vit",
        "wav2vec2",
    ],
)
def test_a_block_that_ends_in_zero_is_its_residual_path(make):
    """The definition, for every class that the package knows: after zero_residual a block hands on
    what it was given (through its norms, where they stand behind the sum).
    """
    block, out, path = make()
    initialise(block, "kaiming", seed=0)
    assert not torch.allclose(out(), path(), atol=1e-2)
    ends = initialise(block, "zero_residual")
    assert set(ends) == {n for names in residual_blocks(block).values() for n in names} and set(
        ends.values()
    ) == {0.0}
    assert torch.allclose(out(), path(), atol=1e-5)
    out().square().sum().backward()
    grown = [n for n in ends if (g := block.get_parameter(n).grad) is not None and g.any()]
    assert grown, "a zero that gets no gradient stays zero for ever"


def test_every_known_block_is_tested():
    assert set(RESIDUAL_ENDS) == {
        "TCNBlock",
        "CrossBlock",
        "Encoders",
        "TransformerEncoderLayer",
        "Lfm2DecoderLayer",
        "BertLayer",
        "RobertaLayer",
        "TransformerBlock",
        "Wav2Vec2EncoderLayer",
        "ViTLayer",
    }


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.last(self.inside(x).relu())


def test_blocks_of_ones_own_are_told_by_class_and_pattern():
    model, x = nn.Sequential(Own(), Own()), torch.randn(3, 4)
    with pytest.raises(ConfigError, match="no residual block is in this model"):
        initialise(model, "zero_residual")
    assert residual_blocks(model, {"Own": ["last.*"]}) == {
        "0": ["0.last.weight", "0.last.bias"],
        "1": ["1.last.weight", "1.last.bias"],
    }
    assert len(
        initialise(model, "zero_residual", residual={"Own": ["last.*"]})
    ) == 4 and torch.equal(model(x), x)
    with pytest.raises(ConfigError, match="0 is a Own, and none of its parameters fits lost"):
        residual_blocks(model, {"Own": ["lost.*"]})


def test_what_cannot_be_is_said():
    model = nn.Linear(3, 2)
    with pytest.raises(
        ConfigError, match=f"strategy='he' cannot be: choose {', '.join(INITIAL_STRATEGIES)}"
    ):
        initialise(model, "he")
    for strategy in ("default", "zero_residual"):
        with pytest.raises(ConfigError, match="has no gain"):
            initialise(model, strategy, gain=1.0)
    for gain in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="gain"):
            initialise(model, "xavier", gain=gain)
    with pytest.raises(ConfigError, match="nothing to draw"):
        initialise(nn.LayerNorm(4), "xavier")


# --- signals


def test_a_linear_chain_by_hand():
    "Orthogonal maps keep every length: times gain going forward, times gain going back."
    chain = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    initialise(chain, "orthogonal", gain=0.5)
    x = torch.randn(64, 32)
    found = measure_signal(chain, x)
    start, into = float(x.square().mean().sqrt()), found[-1].backward
    assert (
        [layer.name for layer in found] == list("012345")
        and {layer.kind for layer in found} == {"Linear"}
        and into == pytest.approx(1, rel=0.05)
    )
    for i, layer in enumerate(found):
        assert layer.forward == pytest.approx(
            start * 0.5 ** (i + 1), rel=1e-4
        ) and layer.backward == pytest.approx(into * 0.5 ** (5 - i), rel=1e-4)


def test_variance_of_a_relu_net_is_what_he_et_al_computed():
    "Second moment times sd² · in / 2 at every layer, mean over seeds."
    for strategy, factor in (("kaiming", 1.0), ("xavier", 0.5), ("small", 0.005)):
        grown = []
        for seed in range(20):
            net = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(64, 64), nn.ReLU())))
            initialise(net, strategy, seed=seed)
            found = [
                layer
                for layer in measure_signal(
                    net, torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
                )
                if layer.kind == "Linear"
            ]
            grown.append((found[-1].forward / found[0].forward) ** 2)
        assert sum(grown) / 20 == pytest.approx(factor**7, rel=0.35), strategy


def test_gradients_are_autograds_under_an_objective_and_nothing_is_left_behind():
    batch = Batch({"text": stream(), "audio": stream(F=6)}, {"y": torch.randn(3)})
    torch.manual_seed(0)
    model = Multimodal(
        {"text": Project(4, 7), "audio": Project(6, 7)},
        ConcatFusion(dict.fromkeys(("text", "audio"), 7), 9, 0.5),
        {"y": RegressionHead(9)},
    )
    model.encoders.eval()
    modes, noise = [m.training for m in model.modules()], torch.get_rng_state()
    found = {
        layer.name: layer
        for layer in measure_signal(model, batch, mse("y"), which=lambda n, m: True)
    }
    assert (
        torch.equal(noise, torch.get_rng_state())
        and modes == [m.training for m in model.modules()]
        and all(p.grad is None for p in model.parameters())
    )
    assert not any(m._forward_hooks for m in model.modules())
    kept = {}
    handle = model.encoders["text"].register_forward_hook(
        lambda m, _, out: (out.x.retain_grad(), kept.update(s=out))[0]
    )
    mse("y")(model(batch), batch)["loss"].backward()
    handle.remove()
    real = kept["s"].mask
    assert found["encoders.text"].forward == pytest.approx(
        float(kept["s"].x[real].square().mean().sqrt()), rel=1e-5
    )
    assert found["encoders.text"].backward == pytest.approx(
        float(kept["s"].x.grad[real].square().mean().sqrt()), rel=1e-4
    )
    assert {"encoders.audio.linear", "fusion", "heads.y"} <= set(found)


def test_padding_does_not_dilute_a_signal():
    block, s = TCN(4, 6, dropout=0.0), stream()
    initialise(block, "xavier", seed=0)
    more = Stream(
        *(
            torch.cat([v, torch.zeros(3, 4, *v.shape[2:], dtype=v.dtype)], 1)
            for v in (s.x, s.mask, s.t)
        )
    )

    def streams(n, m):
        return type(m).__name__ == "TCNBlock"

    with torch.no_grad():
        assert [
            layer.forward for layer in measure_signal(block, s, which=streams)
        ] == pytest.approx([layer.forward for layer in measure_signal(block, more, which=streams)])


def test_layers_without_a_gradient_and_layers_called_twice():
    shared = nn.Linear(5, 5)
    net = nn.Sequential(
        nn.Linear(5, 5).requires_grad_(False), shared, nn.ReLU(), shared, nn.Embedding(3, 2)
    )
    found = measure_signal(net[:4], torch.randn(7, 5))
    assert (
        [layer.name for layer in found] == ["0", "1", "2", "1"]
        and math.isnan(found[0].backward)
        and all(layer.backward > 0 for layer in found[1:])
    )


def test_a_hook_does_not_outlive_an_error():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        measure_signal(net, torch.randn(2, 3))
    assert not any(m._forward_hooks for m in net.modules())


def test_the_picture_shows_the_numbers():
    layers = [
        Layer("a", "Linear", 1.0, 2.0),
        Layer("b", "ReLU", 9.0, 9.0),
        Layer("c", "Linear", 0.0, math.inf),
    ]
    axes = draw_signal({"one": layers}, which=lambda layer: layer.kind == "Linear")
    for ax, first in zip(axes, (1.0, 2.0)):
        values = ax.lines[0].get_ydata()
        assert values[0] == first and math.isnan(values[1]) and ax.get_yscale() == "log"


# --- shares


def test_diverged_by_hand():
    assert (
        not diverged([5.0, 1.0, 0.5], constant=1.0)
        and diverged([0.1, 0.2, 0.995], constant=1.0)
        and diverged([0.5, math.nan, 0.1], 1.0)
        and diverged([math.inf], 1.0)
    )
    # the mean of the last tenth
    assert not diverged([9.0] * 18 + [0.4, 1.4], 1.0) and diverged([9.0] * 18 + [0.6, 1.4], 1.0)
    assert (
        diverged([0.1, 0.1], 1.0, updates=3)
        and not diverged([0.1] * 3, 1.0, updates=3)
        and diverged([], 1.0, updates=3)
    )
    with pytest.raises(ConfigError, match="without an update"):
        diverged([], 1.0)


def test_wilsons_interval_is_scipys():
    from scipy.stats import binomtest

    for n in (1, 4, 10, 37):
        for k in {0, 1, n // 3, n}:
            for level in (0.8, 0.95):
                found, theirs = (
                    share_of(k, n, level),
                    binomtest(k, n).proportion_ci(level, "wilson"),
                )
                assert found == pytest.approx((k / n, theirs.low, theirs.high), abs=1e-9)
