"""Figures by what they draw: heights of steps, places of dots, labels; never by pixels."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from mmemo.core.errors import ConfigError, ShapeError
from mmemo.core.style import COLOURS
from mmemo.evaluation.figures import (
    draw_calibration,
    draw_comparison,
    draw_confusion,
    draw_purposes,
    draw_staircase,
    draw_xray,
)
from mmemo.evaluation.intervals import Interval
from mmemo.evaluation.metrics import Comparison
from mmemo.synthetic.factors import FACTORS, INFORMATION, LATENTS, ceiling


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def words(ax):
    return [t.get_text() for t in ax.texts]


def test_steps_of_the_staircase_are_the_explained_variance_of_the_ceilings():
    ax = draw_staircase({"static": {"pooled": [3.6, 3.5, 3.7]}})
    best = [ceiling(h) for h in INFORMATION.values()]
    values, edges, _ = ax.patches[0].get_data()
    assert np.allclose(values, [100 * (1 - (b / best[0]) ** 2) for b in best]) and np.allclose(
        edges, np.arange(6) - 0.5
    )
    assert ax.patches[1].get_linestyle() in ("--", "dashed") and [
        t.get_text() for t in ax.get_xticklabels()
    ] == list(INFORMATION)
    mean = np.mean([1 - (r / best[0]) ** 2 for r in (3.6, 3.5, 3.7)])
    assert f"{100 * mean / (1 - (best[1] / best[0]) ** 2):.0f} %\nof its step" in words(ax)
    assert (
        f"best RMSE {best[2]:.2f}" in words(ax)
        and "hears tone\nface words" in words(ax)
        and "+ negation" in words(ax)
    )


@pytest.mark.parametrize("rungs", [1, 2, 6, 9])
def test_staircase_of_any_number_of_rungs_and_models(rungs):
    ceilings = {"nothing": 5.0, **{f"r{i}": 4.8 - 0.4 * i for i in range(rungs)}}
    scores = {
        f"r{i}": {f"m{j}": [4.9 - 0.4 * i + 0.02 * j] * (j + 1) for j in range(i % 3 + 1)}
        for i in range(rungs)
    }
    ax = draw_staircase(scores, ceilings, {})
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(dots) == sum(len(m) for m in scores.values())
    for name, models in scores.items():
        i = list(ceilings).index(name)
        here = sorted(
            (line for line in dots if abs(np.mean(line.get_xdata()) - i) < 0.5),
            key=lambda line: np.mean(line.get_xdata()),
        )
        for line, seeds in zip(here, models.values(), strict=True):
            assert (
                np.allclose(line.get_ydata(), 100 * (1 - (np.array(seeds) / 5) ** 2))
                and abs(np.asarray(line.get_xdata()) - i).max() < 0.45
            )
    ax.figure.canvas.draw()


def test_a_model_worse_than_a_constant_is_seen_below_zero_and_one_above_its_ceiling_on_top():
    ax = draw_staircase(
        {"nothing": {"constant": [4.35]}, "lora": {"bad": [5.0, 5.1]}, "static": {"leaks": [2.0]}}
    )
    assert ax.get_ylim()[0] < 100 * (1 - (5.1 / ceiling(())) ** 2) < 0 and any(
        w.startswith("-") for w in words(ax)
    )
    right = ax.child_axes[0]
    ax.figure.canvas.draw()
    assert right.get_ylabel() == "RMSE (points)"


def test_an_unknown_rung_is_refused():
    with pytest.raises(ConfigError, match="no ceiling for \\['tcn'\\].*static"):
        draw_staircase({"tcn": {"m": [1.0]}})


def test_xray_shades_what_a_model_should_hear_and_leaves_the_rest_hollow():
    rays = {
        m: {f: Interval(i / 8, i / 8 - 0.1, i / 8 + 0.1) for i, f in enumerate(FACTORS)}
        for m in ("static", "temporal")
    }
    axes = draw_xray(rays, {"static": INFORMATION["static"], "temporal": LATENTS[:6]})
    for ax, hears in zip(axes, (set(LATENTS[:3]), {*LATENTS[:6], "sarcasm"})):
        dots = [line for line in ax.lines if line.get_marker() == "o"]
        assert np.allclose([float(line.get_xdata()[0]) for line in dots], np.arange(8) / 8)
        for factor, line in zip(FACTORS, dots):
            assert (line.get_markerfacecolor() == "white") == (factor not in hears)
        assert len(ax.patches) == len(hears)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == list(FACTORS) and axes[
        0
    ].get_yticklabels()[0].get_color() == COLOURS["audio"]
    # lists of JSON and unheard factors too
    alone = draw_xray({"m": {**rays["static"], "face": (np.nan,) * 3, "onset": (-1.5, -1.7, -1.2)}})
    assert alone[0].get_xlim()[0] < -1.7 and np.isfinite(alone[0].get_xlim()).all()
    with pytest.raises(ShapeError, match="no X-ray"):
        draw_xray({})


def test_confusion_shows_recall_on_the_diagonal_and_class_sizes():
    matrix = np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    ax = draw_confusion(matrix, ["yes", "no", "never"])
    cell = {t.get_position(): t.get_text() for t in ax.texts}
    assert cell == {(0, 0): "75", (1, 0): "25", (0, 1): "25", (1, 1): "75"}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["yes (8)", "no (4)", "never (0)"]
    with pytest.raises(ShapeError, match="3, 3.*2 names"):
        draw_confusion(matrix, ["a", "b"])


def test_calibration_draws_each_model_with_its_error():
    torch.manual_seed(0)
    scores, target = torch.randn(300, 4), torch.randint(4, (300,))
    ax = draw_calibration({"one": scores, "two": 5 * scores}, target)
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert (
        len(ax.collections) == 4
        and labels[0].startswith("one: ECE 0.")
        and labels[0] < labels[1].replace("two", "one")
    )


@pytest.mark.parametrize(
    "low, title, colour",
    [(0.1, "a difference", "fusion"), (-0.1, "no difference to be seen", "ceiling")],
)
def test_comparison_says_whether_zero_is_inside(low, title, colour):
    result = Comparison(
        metric="uar",
        a=Interval(0.5, 0.4, 0.6),
        b=Interval(0.3, 0.2, 0.4),
        difference=Interval(0.2, low, 0.3),
        p=0.04,
        seeds=3,
        people=9,
        about="other people and other seeds",
        verdict="a is better",
    )
    left, right = draw_comparison(result, ("big", "small"))
    assert (
        right.get_title() == f"{title}, p = 0.04" and right.lines[1].get_color() == COLOURS[colour]
    )
    assert [t.get_text() for t in left.get_yticklabels()] == [
        "big",
        "small",
    ] and "UAR (more is better)" == left.get_xlabel()


def purpose_rows():
    stability = [
        {"variant": name, "lr": lr, "diverged": lr > limit, "share": 0.8 + 0.1 * s, "seed": s}
        for name, limit in (("plain", 0.01), ("normalized", 1.0))
        for lr in (0.1, 0.001, 0.03)
        for s in range(2)
    ]
    # a loss that is not finite leaves no share
    del stability[0]["share"]
    labels = [
        {"rung": name, "labels": n, "share": start + 0.1 * s, "seed": s}
        for name, start in (("attention", 0.2), ("multitask", 0.5))
        for n in (5000, 25)
        for s in range(3)
    ]
    return stability, labels


def test_purposes_count_failures_above_and_cross_them_below():
    top, below, _ = draw_purposes(*purpose_rows())
    plain, normalized = top.lines
    assert np.allclose(plain.get_xdata(), (0.001, 0.03, 0.1))
    assert np.allclose(plain.get_ydata(), (0, 1, 1)) and not any(normalized.get_ydata())
    drawn = {(line.get_color(), line.get_marker()): line.get_ydata() for line in below.lines}
    grey, purple = COLOURS["ceiling"], COLOURS["fusion"]
    assert np.allclose(drawn[grey, "o"], (0.8, 0.9)) and len(drawn[purple, "o"]) == 6
    assert len(drawn[grey, "x"]) == 4 and max(drawn[grey, "x"]) < 0
    assert [t.get_text() for t in top.get_legend().get_texts()] == ["plain", "normalized"]


def test_purposes_draw_every_seed_and_their_means_over_the_labels():
    right = draw_purposes(*purpose_rows())[2]
    lines = {line.get_label(): line for line in right.lines if line.get_marker() == "None"}
    assert np.allclose(lines["multitask"].get_ydata(), 0.6)
    assert np.allclose(lines["attention"].get_xdata(), (25, 5000))
    assert sum(len(line.get_xdata()) for line in right.lines if line.get_marker() == "o") == 12
    assert [t.get_text() for t in right.get_xticklabels()] == ["25", "5,000"]
    right.figure.canvas.draw()


def test_purposes_without_rows_are_refused():
    stability, labels = purpose_rows()
    with pytest.raises(ConfigError, match="labels has no row"):
        draw_purposes(stability, [])
    with pytest.raises(ConfigError, match="stability has no row"):
        draw_purposes([], labels)
