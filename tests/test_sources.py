"""Sources: one data path, whatever a recipe reads; what stands in for what is said."""

import numpy as np
import pytest
import torch

from mmemo.core.errors import ConfigError, DataError
from mmemo.data.features import write_features
from mmemo.experiments.recipe import Recipe, load_recipe
from mmemo.experiments.run import train_recipe
from mmemo.experiments.sources import adapt_recipe, kind_of, recipe_data, recipe_items, stand_ins
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import write_meld


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))


def small(name, experiment=None, items=24, **changes):
    form = load_recipe(name, "smoke", experiment).model_dump()
    form["corpus"].update(items=items)
    form["corpus"]["knobs"].update(items_per_speaker=2)
    return Recipe.model_validate(form | changes)


def test_only_the_kept_emotions_are_there_and_renumbered():
    recipe, corpus = (
        small("emotion2vec_text", items=80),
        known_answer(80, 3, items_per_speaker=2, speaker=0.3, imbalance=0.0),
    )
    found = recipe_items(recipe, seed=3)
    names = [recipe.corpus.emotions[i] for i in found.targets["emotion"].tolist()]
    from mmemo.data.standards import EMOTIONS

    own = {i: EMOTIONS[e] for i, e in zip(corpus.meta["id"], corpus.targets["emotion"].tolist())}
    assert (
        0 < len(found) < 80
        and names == [own[i] for i in found.meta["id"]]
        and set(names) <= set(recipe.corpus.emotions)
    )


def test_utterance_features_are_the_table_or_the_means_and_said(tmp_path):
    recipe = small("emotion2vec_text")
    assert "COVAREP" in stand_ins(recipe)["audio"] and "emotion2vec" in stand_ins(recipe)["audio"]
    corpus = known_answer(24, 0, items_per_speaker=2, speaker=0.3, imbalance=0.0)
    means, where = recipe_items(recipe), {i: n for n, i in enumerate(corpus.meta["id"])}
    audio = corpus.streams["audio"]
    for i, name in enumerate(means.meta["id"]):
        row = where[name]
        torch.testing.assert_close(
            means.streams["audio"].x[i, 0],
            audio.x[row][audio.mask[row]].mean(0),
            atol=1e-4,
            rtol=1e-4,
        )
    ids = means.meta["id"]
    table = {name: torch.full((5,), float(n)) for n, name in enumerate(ids[:-1])}
    write_features(tmp_path / "own.safetensors", table)
    told = adapt_recipe(recipe, {"audio": str(tmp_path / "own.safetensors")})
    assert stand_ins(told) == {}
    with pytest.warns(UserWarning, match="1 of .* items are not in the table"):
        found = recipe_items(told)
    assert (
        found.streams["audio"].x.shape == (len(ids), 1, 5)
        and found.streams["audio"].x[3, 0].tolist() == [3.0] * 5
        and not found.streams["audio"].mask[-1].any()
    )
    with pytest.raises(ConfigError, match="no encoder of utterance features for audio"):
        adapt_recipe(load_recipe("fine_tune"), {"audio": "x.npz"})


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
def test_rendered_media_and_a_meld_folder_of_clips_have_the_same_shapes(tmp_path):
    recipe = small("frozen_two_head", items=12)
    mine = recipe_data(recipe, seed=1)
    write_meld(known_answer(12, 1, items_per_speaker=1, imbalance=0.0), tmp_path / "meld")
    (tmp_path / "meld/train_splits/dia0_utt0.mp4").write_bytes(b"no clip")
    assert kind_of(tmp_path / "meld") == "meld"
    theirs = recipe_data(recipe, tmp_path / "meld")
    for parts in (mine, theirs):
        train = parts["train"]
        assert (
            train.streams["video"].x.shape[1:] == (8, 3, 32, 32)
            and train.streams["video"].x.dtype == torch.uint8
        )
        assert (
            train.streams["audio"].x.shape[1] <= 3 * 16_000
            and train.streams["audio"].mask.any(1).any()
            and train.streams["text"].mask.any()
        )
        assert (
            set(train.targets) == {"emotion", "sentiment"} and (train.targets["emotion"] >= 0).all()
        )
    assert sum(map(len, theirs.values())) == 11  # the broken clip is left out, the others stay
    _, metrics = train_recipe(adapt_recipe(recipe), tmp_path / "run", tmp_path / "meld")
    assert (
        metrics["steps"] > 0
        and metrics["data"] == "meld"
        and {"accuracy", "weighted_precision"} <= set(metrics["emotion"])
        and (tmp_path / "run/training/tb").is_dir()
    )


def test_a_corpus_that_is_not_there_or_not_known_is_one_line(tmp_path):
    with pytest.raises(DataError, match="there is no folder"):
        kind_of(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no corpus that is known here.*train_sent_emo.csv"):
        kind_of(tmp_path)
    form = small("fine_tune").model_dump()
    form["corpus"]["emotions"] = ["joy", "fear"]
    (tmp_path / "300_P").mkdir()
    assert kind_of(tmp_path) == "daicwoz"
    with pytest.raises(DataError, match="DAIC-WOZ has no pictures"):
        recipe_items(small("frozen_two_head"), tmp_path)
    assert set(
        np.unique(
            recipe_items(Recipe.model_validate(form | {"evaluation": {"resamples": 100}})).meta[
                "split"
            ]
        )
    ) <= {"train", "valid", "test"}
