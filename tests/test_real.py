"""The static rung on real corpora, and on look-alikes where there are none."""

import numpy as np
import pytest
import torch

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.evaluation.seeds import mean_and_sd
from mmemo.experiments.baselines import meld_static, ravdess_static, select_streams, static_classes
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import write_meld
from mmemo.training.plan import Plan


def blobs(n=240, classes=3, shift=0.0, seed=0):
    "Classes that a linear model tells apart, with `shift` added to every feature."
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=g)
    centre = torch.randn(classes, 5, generator=torch.Generator().manual_seed(9)) * 3
    return Batch(
        {"audio": Stream.of((centre[y] + torch.randn(n, 5, generator=g) + shift)[:, None], rate=1)},
        {"emotion": y},
        {"id": [str(i) for i in range(n)]},
    )


def test_static_classes_learns_and_takes_no_statistic_from_the_test():
    train, test, plan = blobs(), blobs(60, seed=1), Plan(epochs=15, lr=1e-2, seed=0)
    scores, steps = static_classes(train, test, "emotion", 3, plan)
    assert (
        scores.shape == (60, 3)
        and steps == 15 * 8
        and (scores.argmax(1) == test.targets["emotion"]).float().mean() > 0.9
    )
    alone, _ = static_classes(train, test[:1], "emotion", 3, plan)
    assert torch.allclose(alone[0], scores[0], atol=1e-5)  # the other test items change nothing


def test_spread_is_mean_and_sd():
    assert mean_and_sd([1.0, 3.0]) == [2.0, pytest.approx(2**0.5)] and mean_and_sd([4.0]) == [
        4.0,
        0.0,
    ]
    both = select_streams(known_answer(4), ["audio"])
    assert list(both.streams) == ["audio"] and len(both) == 4


def test_meld_look_alike_from_csv_to_f1(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    write_meld(known_answer(600, seed=4), tmp_path / "meld", clips=False)
    found = meld_static(tmp_path / "meld", seeds=[0, 1], smoke=True, task="sentiment")
    assert found["steps"] > 0 and set(found["scores"]) == {
        "majority",
        "TF-IDF",
        "linear, frozen mmemo-tiny",
        "static, frozen mmemo-tiny",
    }
    assert all(0 < mean < 1 and sd >= 0 for mean, sd in found["scores"].values())
    (tmp_path / "meld" / "dev_sent_emo.csv").unlink()
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="no dev split"):
        meld_static(tmp_path / "meld", seeds=[0], smoke=True)


def test_ravdess_on_its_actor_folds(corpora_root, tmp_path, monkeypatch):
    if not (corpora_root / "ravdess").is_dir():
        pytest.skip(f"no ravdess/ in {corpora_root}")
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    found = ravdess_static(corpora_root / "ravdess", seeds=[0], smoke=True)
    # nothing is chosen at smoke scale; not cut, it is .691
    assert found["scores"]["SVM, audio + video"][0] == pytest.approx(0.70, abs=0.02)
    assert found["scores"]["linear, audio + video"][0] == pytest.approx(0.70, abs=0.03)
    assert found["scores"]["static, audio + video"][0] > 2 * found["scores"]["majority"][
        0
    ] and np.isfinite(found["scores"]["static, audio"][0])
