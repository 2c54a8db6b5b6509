"""Streams, masks and clocks: values, not only shapes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmemo.core.batch import Batch, Stream, align, collate, last_real, masked_mean, masked_std
from mmemo.core.errors import ConfigError, ShapeError
from mmemo.core.style import draw_masks

sizes = dict(B=st.integers(1, 4), T=st.integers(1, 9), F=st.integers(1, 5), seed=st.integers(0, 99))


def stream(B, T, F, seed=0, holes=0.3):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) > holes
    return Stream.of(torch.randn(B, T, F, generator=g), mask, rate=10)


@pytest.mark.parametrize(
    "mask, t, axis",
    [
        (torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 5), "axis T"),
        (torch.ones(3, 5, dtype=torch.bool), torch.zeros(2, 5), "axis B"),
        (torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 6), "axis T"),
        (torch.ones(2, 5), torch.zeros(2, 5), "torch.bool"),
    ],
)
def test_a_stream_says_which_axis_disagrees(mask, t, axis):
    with pytest.raises(ShapeError, match=axis):
        Stream(torch.zeros(2, 5, 3), mask, t)
    with pytest.raises(ShapeError, match=f"audio: .*{axis}"):
        Batch({"audio": (torch.zeros(2, 5, 3), mask, t)})


@pytest.mark.parametrize(
    "streams, targets, meta, names",
    [
        ({"text": stream(3, 4, 2), "audio": stream(2, 4, 2)}, {}, {}, ("text", "audio")),
        ({"text": stream(3, 4, 2)}, {"phq8": torch.zeros(2)}, {}, ("text", "phq8")),
        ({"text": stream(3, 4, 2)}, {}, {"speaker": ["a"]}, ("text", "speaker")),
    ],
)
def test_a_batch_says_who_disagrees(streams, targets, meta, names):
    with pytest.raises(ShapeError) as caught:
        Batch(streams, targets, meta)
    assert all(n in str(caught.value) for n in names)


def test_nan_frames_become_masks_and_zeros():
    x = torch.randn(2, 5, 3)
    x[0, 1, 2] = float("nan")
    x[1, 4] = float("inf")
    s = Stream.of(x, rate=100)
    assert s.mask.tolist() == [[True, False, True, True, True], [True, True, True, True, False]]
    assert torch.equal(s.x[s.mask], x[s.mask]) and s.x[~s.mask].eq(0).all()
    assert torch.allclose(s.t[0], torch.tensor([0.005, 0.015, 0.025, 0.035, 0.045]))
    with pytest.raises(ConfigError, match="clock"):
        Stream.of(x)


@given(**sizes)
@settings(max_examples=40, deadline=None)
def test_masked_pooling_is_numpy_over_the_real_steps(B, T, F, seed):
    s = stream(B, T, F, seed)
    for i in range(B):
        real = s.x[i][s.mask[i]].numpy()
        want = (real.mean(0), real.std(0)) if len(real) else (np.zeros(F), np.zeros(F))
        np.testing.assert_allclose(masked_mean(s.x, s.mask)[i].numpy(), want[0], atol=1e-5)
        np.testing.assert_allclose(masked_std(s.x, s.mask, eps=0)[i].numpy(), want[1], atol=1e-5)


def test_masked_std_has_a_finite_gradient_on_a_constant():
    x = torch.ones(2, 4, 3, requires_grad=True)
    masked_std(x, torch.ones(2, 4, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(x.grad).all()


@given(**sizes, pad=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_padding_changes_no_measurement(B, T, F, seed, pad):
    s = stream(B, T, F, seed)
    longer = Stream(
        torch.cat([s.x, torch.full((B, pad, F), 9.0)], 1),
        torch.cat([s.mask, torch.zeros(B, pad, dtype=torch.bool)], 1),
        torch.cat([s.t, torch.zeros(B, pad)], 1),
    )
    assert torch.allclose(masked_mean(longer.x, longer.mask), masked_mean(s.x, s.mask), atol=1e-6)
    clock = Stream(
        torch.zeros(B, 3),
        torch.ones(B, 3, dtype=torch.bool),
        torch.tensor([0.1, 0.4, 0.7]).expand(B, 3),
    )
    assert torch.allclose(align(longer, clock).x, align(s, clock).x, atol=1e-6)


@given(**sizes)
@settings(max_examples=30, deadline=None)
def test_collate_undoes_taking_items_apart(B, T, F, seed):
    s = stream(B, T, F, seed)
    batch = Batch(
        {"audio": s},
        {"y": torch.arange(B)},
        {"id": [str(i) for i in range(B)], "f": torch.randn(B, 2)},
    )
    back = collate(list(batch))
    T = last_real(s.mask)
    assert torch.equal(back.streams["audio"].mask, s.mask[:, :T]) and torch.equal(
        back.streams["audio"].x * 1.0, s.x[:, :T]
    )
    assert (
        torch.equal(back.targets["y"], batch.targets["y"])
        and back.meta["id"] == batch.meta["id"]
        and torch.equal(back.meta["f"], batch.meta["f"])
    )


def test_a_missing_modality_is_a_row_of_false():
    a = Batch({"audio": stream(1, 3, 2), "video": stream(1, 4, 5)}, {"y": torch.ones(1)})
    b = Batch({"audio": stream(1, 6, 2)}, {"y": torch.zeros(1)})
    both = collate([a, b])
    assert both.streams["audio"].x.shape == (2, 6, 2) and both.streams["video"].x.shape == (2, 4, 5)
    assert not both.streams["video"].mask[1].any() and both.streams["video"].x[1].eq(0).all()
    gone = both.without("audio")
    assert not gone.streams["audio"].mask.any() and torch.equal(
        gone.streams["video"].x, both.streams["video"].x
    )
    with pytest.raises(ConfigError, match="smell"):
        both.without("smell")


@pytest.mark.parametrize(
    "items, said",
    [
        ([], "empty"),
        ([Batch({"audio": stream(1, 3, 2)}), Batch({"audio": stream(1, 3, 4)})], "audio: axis F"),
        (
            [
                Batch({"audio": stream(1, 3, 2)}, {"y": torch.ones(1)}),
                Batch({"audio": stream(1, 3, 2)}),
            ],
            "'y' is given for some",
        ),
    ],
)
def test_collate_refuses_what_does_not_fit(items, said):
    with pytest.raises(ShapeError, match=said):
        collate(items)


def test_rows_of_a_batch_are_trimmed_and_kept_together():
    mask = torch.arange(6) < torch.tensor([[2], [6], [3]])
    batch = Batch(
        {
            "audio": Stream(
                torch.arange(36.0).reshape(3, 6, 2), mask, torch.arange(6.0).expand(3, 6)
            )
        },
        {"y": torch.tensor([5, 6, 7])},
        {"id": list("abc")},
    )
    part = batch[[2, 0]]
    assert (
        part.streams["audio"].x.shape == (2, 3, 2)
        and part.targets["y"].tolist() == [7, 5]
        and part.meta["id"] == ["c", "a"]
    )
    assert torch.equal(part.streams["audio"].x[1, :2], batch.streams["audio"].x[0, :2])
    assert len(batch[1]) == 1 and batch[1:].meta["id"] == ["b", "c"]


def nearest(source, clock):
    "Alignment by brute force."
    out = torch.zeros(len(source), clock.steps, source.x.shape[-1])
    mask = torch.zeros(len(source), clock.steps, dtype=torch.bool)
    for i in range(len(source)):
        real = clock.mask[i].nonzero().flatten()
        for j in real.tolist():
            mine = [
                f
                for f in range(source.steps)
                if source.mask[i, f]
                and real[(clock.t[i, real] - source.t[i, f]).abs().argmin()] == j
            ]
            if mine:
                out[i, j], mask[i, j] = source.x[i, mine].mean(0), True
    return out, mask


@given(B=st.integers(1, 3), S=st.integers(1, 12), T=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_align_is_the_nearest_step_in_time(B, S, T, seed):
    g = torch.Generator().manual_seed(seed)
    source = Stream(
        torch.randn(B, S, 3, generator=g),
        torch.rand(B, S, generator=g) > 0.3,
        torch.rand(B, S, generator=g).sort(1).values * 5,
    )
    clock = Stream(
        torch.zeros(B, T),
        torch.rand(B, T, generator=g) > 0.3,
        torch.rand(B, T, generator=g).sort(1).values * 5,
    )
    out = align(source, clock)
    want, mask = nearest(source, clock)
    assert (
        torch.equal(out.mask, mask)
        and torch.allclose(out.x, want, atol=1e-5)
        and torch.equal(out.t, clock.t)
    )


def test_align_refuses_a_clock_that_runs_backwards():
    with pytest.raises(ShapeError, match="decrease"):
        align(
            stream(1, 3, 2),
            Stream(
                torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[2.0, 1.0]])
            ),
        )


def test_masks_are_drawn_one_panel_a_modality():
    axes = draw_masks(
        collate(
            [
                Batch({"text": stream(1, 3, 2), "audio": stream(1, 6, 2)}),
                Batch({"audio": stream(1, 4, 2)}),
            ]
        )
    )
    assert [ax.get_ylabel() for ax in axes] == ["text", "audio"]
