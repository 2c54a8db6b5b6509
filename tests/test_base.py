"""Encoders, fusion, frozen features and weight names."""

import json
import os

import pytest
import torch
from streams import padded
from torch import nn

from mmemo.core.batch import Batch, Stream, masked_mean
from mmemo.core.errors import DataError, ShapeError, WeightsError
from mmemo.core.files import fingerprint_tensors
from mmemo.models.base import (
    ClassHead,
    ConcatFusion,
    Frozen,
    MeanPool,
    Multimodal,
    Project,
    RegressionHead,
    Standardize,
    precompute,
    static_front,
    static_model,
)
from mmemo.models.text import TextEncoder, Tokenizer, WordEmbeddings, resolve_weights
from mmemo.synthetic.known_answer import TOKEN_IDS, VOCABULARY, known_answer


@pytest.fixture(scope="module")
def data():
    return known_answer(24, seed=2)


@pytest.fixture(scope="module")
def tiny():
    return TextEncoder.pretrained("mmemo-tiny").eval()


def small(B=3, T=5, F=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B, 1), generator=g)
    return Stream.of(torch.randn(B, T, F, generator=g), torch.arange(T) < lengths, rate=10)


def model_for(s, dropout=0.0):
    return Multimodal(
        {
            "audio": nn.Sequential(
                Standardize.fit(Batch({"audio": s}), "audio"), MeanPool(), Project(4, 6)
            ),
            "video": Project(2, 5),
        },
        ConcatFusion({"audio": 6, "video": 5}, 7, dropout),
        {"phq8": RegressionHead(7, 9.0, 4.0), "emotion": ClassHead(7, 3)},
    )


# ------------------------------------------------------------------ parts
def test_standardize_has_the_statistics_of_the_real_steps():
    s = small(6, 9, 4)
    s.x[..., 2] = 7.0
    s.x.masked_fill_(~s.mask[..., None], 0)
    z = Standardize.fit(Batch({"audio": s}), "audio", chunk=2)(s)
    real = z.x[s.mask].double()
    assert torch.allclose(real.mean(0), torch.zeros(4, dtype=torch.double), atol=1e-5)
    assert torch.allclose(
        real[:, [0, 1, 3]].std(0, correction=0), torch.ones(3, dtype=torch.double), atol=1e-4
    )
    # a constant column is 0, not noise blown up
    assert real[:, 2].abs().max() < 1e-5 and z.x[~s.mask].eq(0).all()
    big = Stream(s.x * 1e6, s.mask, s.t)
    assert Standardize.fit(Batch({"audio": s}), "audio", limit=5)(big).x.abs().max() <= 5


def test_standardize_wants_something_to_look_at():
    empty = Stream(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3))
    with pytest.raises(DataError, match="audio"):
        Standardize.fit(Batch({"audio": empty}), "audio")


def test_the_columns_of_covarep_all_come_to_one_scale(data):
    z = Standardize.fit(data, "audio")(data.streams["audio"])
    sd = z.x[z.mask].std(0)
    assert sd.max() < 1.05 and sd.min() > 0.9  # from spreads between 3e-5 and 48


def test_pooling_and_projecting_by_hand():
    s = small(3, 5, 4)
    pooled = MeanPool()(s)
    assert (
        pooled.x.shape == (3, 1, 4)
        and torch.allclose(pooled.x[:, 0], masked_mean(s.x, s.mask))
        and torch.allclose(pooled.t[:, 0], masked_mean(s.t, s.mask))
    )
    project = Project(4, 6)
    assert (
        torch.allclose(
            project(s).x[s.mask],
            s.x[s.mask] @ project.linear.weight.T + project.linear.bias,
            atol=1e-6,
        )
        and project(s).x[~s.mask].eq(0).all()
    )


def test_model_shapes_and_heads():
    s, v = small(3, 5, 4), small(3, 7, 2, 1)
    out = model_for(s)(Batch({"audio": s, "video": v}))
    assert (
        out.predictions["phq8"].shape == (3,)
        and out.predictions["emotion"].shape == (3, 3)
        and out.embedding.shape == (3, 7)
    )
    head = RegressionHead(7, 9.0, 4.0)
    assert torch.allclose(
        head(out.embedding),
        9 + 4 * (out.embedding @ head.linear.weight[0] + head.linear.bias),
        atol=1e-5,
    )
    with pytest.raises(ShapeError, match="video"):
        model_for(s)(Batch({"audio": s}))


# ------------------------------------------------------------------ invariances
def test_padding_never_changes_a_prediction():
    s, v = small(3, 5, 4), small(3, 7, 2, 1)
    model = model_for(s).eval()
    want, got = (
        model(Batch({"audio": s, "video": v})),
        model(Batch({"audio": padded(s, 4), "video": padded(v, 2)})),
    )
    for task in want.predictions:
        assert torch.allclose(want.predictions[task], got.predictions[task], atol=1e-6)


def test_a_missing_modality_gives_one_finite_prediction_whatever_was_there():
    s, v = small(3, 5, 4), small(3, 7, 2, 1)
    model = model_for(s).eval()
    one = model(Batch({"audio": s, "video": v}).without("video")).predictions["phq8"]
    two = model(Batch({"audio": s, "video": small(3, 7, 2, 9)}).without("video")).predictions[
        "phq8"
    ]
    assert torch.isfinite(one).all() and torch.equal(one, two)


def test_items_do_not_see_each_other():
    s, v = small(4, 5, 4), small(4, 7, 2, 1)
    model = model_for(s).eval()
    batch = Batch({"audio": s, "video": v})
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(
        model(batch).predictions["phq8"][order], model(batch[order]).predictions["phq8"], atol=1e-6
    )


def test_gradients_reach_what_learns_and_nothing_else(data, tiny):
    model = Multimodal(
        {
            "text": nn.Sequential(
                Frozen(TextEncoder.pretrained()), MeanPool(), Project(tiny.width, 6)
            ),
            "audio": nn.Sequential(MeanPool(), Project(74, 6)),
        },
        ConcatFusion({"text": 6, "audio": 6}, 7),
        {"phq8": RegressionHead(7)},
    ).train()
    model(data).predictions["phq8"].square().mean().backward()
    for name, p in model.named_parameters():
        frozen = name.startswith("encoders.text.0.")
        assert p.requires_grad != frozen and (p.grad is None) == frozen, name
        assert frozen or p.grad.abs().sum() > 0, name


def test_frozen_means_frozen():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9))

    class OverFrames(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, s):
            return s.with_x(self.net(s.x.flatten(0, 1)).view_as(s.x))

    frozen, s = Frozen(OverFrames()), small(3, 5, 4)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    outer = nn.Sequential(frozen).train()
    one, two = outer(s).x, outer(s).x
    assert torch.equal(one, two) and not one.requires_grad  # no dropout, no graph
    # no running statistic moved
    assert all(torch.equal(before[k], v) for k, v in frozen.state_dict().items())
    assert not frozen.module.training and outer.training


# ------------------------------------------------------------------ text
def test_the_tokenizer_agrees_with_the_corpus(data):
    stream = Tokenizer("mmemo-tiny").stream(data.meta["words"], data.meta["spans"])
    want = data.streams["text"]
    assert torch.equal(stream.x, want.x) and torch.equal(stream.mask, want.mask)
    inner = want.x > TOKEN_IDS["[SEP]"]
    assert torch.allclose(stream.t[inner], want.t[inner])


def test_pieces_keep_the_time_of_their_word_and_anything_can_be_spelled():
    tokenizer = Tokenizer()
    ids, t = tokenizer(["Calm", "zebra"], torch.tensor([[0.0, 1.0], [2.0, 4.0]]))
    assert [VOCABULARY[i] for i in ids] == [
        "[CLS]",
        "calm",
        "z",
        "##e",
        "##b",
        "##r",
        "##a",
        "[SEP]",
    ] and t.tolist() == [0, 0.5, 3, 3, 3, 3, 3, 4]
    empty = tokenizer.stream([[], ["calm"]])
    assert not empty.mask[0].any() and empty.mask[1].sum() == 3
    with pytest.raises(ShapeError, match="2 words have 1 spans"):
        tokenizer(["a", "b"], torch.zeros(1, 2))


def test_a_bag_of_embeddings_does_not_know_the_order(data, tiny):
    bag, s = WordEmbeddings(tiny), data.streams["text"][[0]]
    order = torch.randperm(s.steps)
    mixed = Stream(s.x[:, order], s.mask[:, order], s.t[:, order])
    assert torch.allclose(MeanPool()(bag(s)).x, MeanPool()(bag(mixed)).x, atol=1e-6)
    assert not torch.allclose(MeanPool()(tiny(s)).x, MeanPool()(tiny(mixed)).x, atol=1e-3)


def test_the_embedded_encoder_is_small_and_safe():
    folder = resolve_weights("mmemo-tiny")
    assert sum(p.numel() for p in TextEncoder.pretrained().parameters()) == pytest.approx(
        1e6, rel=0.1
    )
    assert os.path.getsize(f"{folder}/model.safetensors") <= 4_000_000 and not [
        f for f in os.listdir(folder) if f.endswith((".bin", ".pt", ".pkl"))
    ]


def test_padding_does_not_change_a_text_encoding(data, tiny):
    s = data.streams["text"][[0, 1, 2]]
    with torch.no_grad():
        want, got = (
            tiny(s).x,
            tiny(
                Stream(
                    torch.cat([s.x, torch.zeros(3, 4, dtype=torch.long)], 1),
                    *(torch.cat([v, torch.zeros(3, 4, dtype=v.dtype)], 1) for v in (s.mask, s.t)),
                )
            ).x,
        )
    assert torch.allclose(want, got[:, : s.steps], atol=1e-5) and got[:, s.steps :].eq(0).all()


# ------------------------------------------------------------------ weights by name
@pytest.mark.parametrize(
    "name, said",
    [
        ("./nowhere", "no folder"),
        ("/no/such/place", "no folder"),
        ("a/b/c", "no folder"),
        ("some-org/some-model-that-is-not-here", "could not be had"),
    ],
)
def test_weights_that_cannot_be_had_say_so_and_name_the_choices(name, said):
    with pytest.raises(WeightsError, match=said) as caught:
        TextEncoder.pretrained(name)
    assert "mmemo-tiny" in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="config.json"):
        resolve_weights(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle is not a choice
    with pytest.raises(WeightsError):
        TextEncoder.pretrained(tmp_path)


def test_a_folder_works(tmp_path, tiny):
    tiny.model.save_pretrained(tmp_path)
    again = TextEncoder.pretrained(tmp_path)
    assert fingerprint_tensors(again) == fingerprint_tensors(TextEncoder.pretrained("mmemo-tiny"))


# ------------------------------------------------------------------ features once
class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.items = 0
        self.linear = nn.Linear(4, 3)

    def forward(self, s):
        self.items += len(s)
        return s.with_x(self.linear(s.x).masked_fill(~s.mask[..., None], 0))


def test_precompute_asks_once_for_each_distinct_input():
    s = small(5, 6, 4)
    twice = Stream(*(torch.cat([v, v[[3, 0]]]) for v in (s.x, s.mask, s.t)))
    data, encoder = Batch({"audio": twice}, {"y": torch.arange(7)}), Counting()
    got = precompute(encoder, data, "audio", batch_size=2)
    with torch.no_grad():
        want = encoder.linear(twice.x).masked_fill(~twice.mask[..., None], 0)
    T = got.streams["audio"].steps
    assert (
        encoder.items == 5
        and torch.allclose(got.streams["audio"].x, want[:, :T], atol=1e-6)
        and torch.equal(got.streams["audio"].mask, twice.mask[:, :T])
    )


def test_the_static_baseline_is_the_same_whether_its_front_is_cached_or_run(data, tiny):
    pooled = data
    fronts = {
        "text": static_front(data, "text", WordEmbeddings(tiny)),
        "audio": static_front(data, "audio"),
        "video": static_front(data, "video"),
    }
    for name, front in fronts.items():
        pooled = precompute(front, pooled, name)
    model = static_model(pooled, {"phq8": RegressionHead(16)}, width=16).eval()
    whole = Multimodal(
        {n: nn.Sequential(fronts[n], model.encoders[n]) for n in fronts},
        model.fusion,
        dict(model.heads.items()),
    ).eval()
    assert torch.allclose(
        model(pooled).predictions["phq8"], whole(data).predictions["phq8"], atol=1e-4
    )
    assert all(s.steps == 1 for s in pooled.streams.values())
