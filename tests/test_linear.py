"""The linear model on a run's own inputs: what it is given, and how a run is held against it."""

import json

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import DataError
from mmemo.evaluation.metrics import class_metrics
from mmemo.experiments.linear import (
    against_linear,
    as_features,
    learning_inputs,
    linear_answers,
    table_of,
    token_counts,
    token_ids,
)
from mmemo.experiments.recipe import Recipe, load_recipe
from mmemo.experiments.results import Said, recipe_folds
from mmemo.experiments.run import evaluate_run, read_items, train_recipe
from mmemo.models.audiovisual import LogMel


def text_stream():
    ids = torch.tensor([[5, 7, 5, 9], [7, 7, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    return Stream.of(ids, mask, rate=1)


def test_tokens_are_counted_as_scipy_counts_them():
    stream = text_stream()
    words = token_ids(Batch({"text": stream}))
    assert words.tolist() == [5, 7, 9]
    rows, steps = np.nonzero(stream.mask.numpy())
    ids = stream.x.numpy()[rows, steps]
    expected = coo_matrix((np.ones(len(ids)), (rows, ids)), (3, 10)).toarray()[:, words]
    assert np.array_equal(token_counts(stream, words), expected)
    # a token that nobody taught is not counted for another one
    assert token_counts(stream, np.array([7, 8])).tolist() == [[1, 0], [2, 0], [0, 0]]


def test_every_kind_of_stream_becomes_numbers():
    g = torch.Generator().manual_seed(0)
    sound = Stream.of(torch.randn(2, 16_000, generator=g), rate=16_000)
    assert torch.equal(as_features(sound).x, LogMel()(sound).x)
    pictures = Stream.of(torch.rand(2, 3, 3, 16, 16, generator=g), rate=5)
    small = as_features(pictures).x
    assert small.shape == (2, 3, 64)
    corner = pictures.x[0, 0, :, :2, :2].mean()
    assert float(small[0, 0, 0]) == pytest.approx(float(corner), rel=1e-5)
    features = Stream.of(torch.randn(2, 5, 4, generator=g), rate=5)
    assert as_features(features) is features
    words = Stream.of(torch.tensor([[3, 4], [4, 4]]), rate=1)
    batch = Batch({"audio": features, "text": words, "video": pictures})
    table = table_of(batch, token_ids(batch))
    assert table.shape == (2, 2 + 2 * 4 + 2 * 64)
    assert table[:, :2].tolist() == [[1, 1], [0, 2]]
    assert np.allclose(table[:, 2:6], features.x.mean(1), atol=1e-6)


@pytest.fixture(scope="module")
def small():
    "A recipe over frozen sentence vectors, its items and folds."
    form = load_recipe("text_only", "smoke", "plain").model_dump()
    form["evaluation"]["protocol"] = "split"
    recipe = Recipe.model_validate(form)
    return recipe, recipe_folds(recipe, read_items(recipe, "known-answer", 0))


def test_a_frozen_encoder_gives_its_vectors(small):
    recipe, folds = small
    parts = learning_inputs(recipe, folds["split"], 0)
    assert parts["train"].streams["text"].x.shape[1:] == (1, 192)
    assert len(token_ids(parts["train"])) == 0


def test_the_line_is_a_line(small):
    recipe, folds = small
    fold = folds["split"]
    ((key, said),) = linear_answers(recipe, folds).items()
    assert key[0] == "split" and said.said["emotion"].shape == (len(said.items), 4)
    assert torch.allclose(said.said["emotion"].exp().sum(1), torch.ones(len(said.items)))
    parts = learning_inputs(recipe, fold, 0)
    x = {part: batch.streams["text"].x[:, 0].numpy() for part, batch in parts.items()}
    mean, spread = x["train"].mean(0), x["train"].std(0)
    x = {part: ((v - mean) / spread).clip(-5, 5) for part, v in x.items()}
    y = {part: batch.targets["emotion"].numpy() for part, batch in parts.items()}
    best = {}
    for C in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0):
        model = LogisticRegression(C=C, max_iter=500).fit(x["train"], y["train"])
        uar = class_metrics(model.predict(x["valid"]), y["valid"])["uar"]
        best.setdefault(uar, model)
    expected = best[max(best)].predict_log_proba(x["test", key[1]])
    assert np.allclose(said.said["emotion"], expected, atol=1e-3)


def test_a_run_is_held_against_the_line(small, tmp_path):
    recipe, folds = small
    train_recipe(recipe, tmp_path / "run", track=())
    metrics = evaluate_run(tmp_path / "run", linear=True)
    found = metrics["against_linear"]["emotion"]
    assert found["metric"] == "uar" and found["run"][0] == metrics["emotion"]["uar"][0]
    assert found["linear"][0] == metrics["linear"]["emotion"]["uar"][0]
    assert found["difference"][0] == pytest.approx(found["run"][0] - found["linear"][0])
    assert "one seed" in found["verdict"] and "a is" not in found["verdict"]
    plain = evaluate_run(tmp_path / "run")
    assert "linear" not in plain and plain["emotion"] == metrics["emotion"]
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--linear"])
    assert shown.exit_code == 0 and "linear model" in shown.output
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "linear" not in kept


def test_whoever_says_the_same_is_not_better(small):
    recipe, folds = small
    line = linear_answers(recipe, folds)
    found = against_linear(recipe, line, line)["emotion"]
    assert tuple(found.difference) == (0, 0, 0) and found.p == 1


def test_numbers_and_inner_folds(small):
    form = load_recipe("fine_tune", "smoke").model_dump()
    form["corpus"]["items"] = 150
    recipe = Recipe.model_validate(form)
    folds = recipe_folds(recipe, read_items(recipe, "known-answer", 0))
    fold = folds["split"]
    nobody = fold.__class__(fold.train, fold.train[[]], fold.tests)
    for some in (fold, nobody):
        ((_, said),) = linear_answers(recipe, {"split": some}).items()
        assert isinstance(said, Said) and said.said["phq8"].shape == (len(said.items),)
        error = (said.said["phq8"] - said.items.targets["phq8"]).square().mean().sqrt()
        assert float(error) < 6
    blank = fold.train.targets["phq8"] * float("nan")
    unknown = Batch(fold.train.streams, {"phq8": blank}, fold.train.meta)
    with pytest.raises(DataError, match="phq8"):
        linear_answers(recipe, {"split": fold.__class__(unknown, fold.valid, fold.tests)})
