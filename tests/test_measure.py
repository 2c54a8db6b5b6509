"""Measure: protocols cut the items so that no speaker is on two sides, predictions are kept, and a
corpus has the folds that were published.
"""

from pathlib import Path

import folders
import pytest
import torch

from mmemo.core.errors import ConfigError, DataError
from mmemo.experiments.recipe import Recipe, load_recipe
from mmemo.experiments.results import recipe_folds
from mmemo.experiments.run import evaluate_run, load_run, train_recipe
from mmemo.experiments.run_folder import fold_folder
from mmemo.experiments.sources import adapt_recipe, kind_of, recipe_items


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))


def small(
    name="multimodal_baseline",
    experiment=None,
    items=80,
    items_per_speaker=10,
    protocol=None,
    **knobs,
):
    form = load_recipe(name, "smoke", experiment).model_dump()
    form["corpus"].update(items=items)
    form["corpus"]["knobs"].update(items_per_speaker=items_per_speaker, **knobs)
    form["evaluation"].update({"resamples": 100} | ({"protocol": protocol} if protocol else {}))
    return Recipe.model_validate(form)


def test_every_protocol_keeps_speakers_apart_and_tests_everybody_once():
    whole = recipe_items(small())
    for protocol, by in (
        ("leave_one_session_out", "session"),
        ("leave_one_speaker_out", "speaker"),
    ):
        made = recipe_folds(small(protocol=protocol), whole)
        tested = [i for f in made.values() for i in f.tests["test"].meta["id"]]
        assert sorted(tested) == sorted(whole.meta["id"]) and list(made) == sorted(
            set(whole.meta[by])
        )
        for fold in made.values():
            sides = [set(part.meta[by]) for part in (fold.train, fold.valid, fold.tests["test"])]
            assert all(sides) and not (
                sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2]
            )
    several = small(protocol="cross_corpus", items=96, items_per_speaker=2, corpora=2)
    made = recipe_folds(several, recipe_items(several))
    assert list(made) == ["corpus0", "corpus1"] and all(
        set(f.train.meta["corpus"]) == {name}
        and {k: set(t.meta["corpus"]) for k, t in f.tests.items()}
        == {"corpus0": {"corpus0"}, "corpus1": {"corpus1"}}
        for name, f in made.items()
    )
    with pytest.raises(DataError, match="at least two corpora"):
        recipe_folds(several, whole)
    with pytest.raises(ConfigError, match="would train [0-9]+ models, one a speaker"):
        recipe_folds(
            small(protocol="leave_one_speaker_out"),
            recipe_items(small(items=160, items_per_speaker=1)),
        )
    assert adapt_recipe(several, protocol="split").evaluation.protocol == "split"
    with pytest.raises(ConfigError, match="unknown protocol 'leave_one_out'"):
        adapt_recipe(several, protocol="leave_one_out")
    with pytest.raises(Exception, match="corpus.knobs.corpora"):
        small(protocol="cross_corpus", corpora=1)


# an actor of each published fold
CLIPS = [
    f"03-01-{emotion:02d}-01-01-01-{actor:02d}"
    for actor in (1, 2, 3, 8, 10)
    for emotion in range(1, 9)
]


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
def test_ravdess_is_measured_by_its_published_folds_under_the_names_of_the_house(tmp_path):
    folder = folders.write_ravdess(tmp_path / "r", CLIPS)
    recipe = small("multimodal_fer")
    assert kind_of(folder) == "ravdess"
    whole = recipe_items(recipe, folder)
    assert whole.streams["audio"].x.shape == (40, 1, 88) and whole.streams["video"].x.shape == (
        40,
        1,
        35,
    )
    # 01 neutral 02 calm 03 happy 04 sad 05 angry 06 fearful 07 disgust 08 surprised
    code = torch.tensor([int(i.split("-")[2]) for i in whole.meta["id"]])
    assert [
        recipe.corpus.emotions[k]
        for k in whole.targets["emotion"][code.argsort(stable=True)].tolist()[::5]
    ] == ["neutral", "calm", "joy", "sadness", "anger", "fear", "disgust", "surprise"]
    made = recipe_folds(recipe, whole)
    assert list(made) == ["0", "1", "2", "3", "4"] and sorted(
        i for f in made.values() for i in f.tests["test"].meta["id"]
    ) == sorted(CLIPS)
    for fold in made.values():
        tested = set(fold.tests["test"].meta["speaker"])
        assert (
            len(tested) == 1
            and not tested & set(fold.train.meta["speaker"])
            and len(fold.train) == 32
            and len(fold.valid) == 0
        )
    form = recipe.model_dump()
    form["evaluation"]["validation"] = 0.25
    assert all(
        len(f.valid) == 8 and not set(f.valid.meta["speaker"]) & set(f.train.meta["speaker"])
        for f in recipe_folds(Recipe.model_validate(form), whole).values()
    )
    seven = dict(
        recipe.model_dump(),
        corpus={**form["corpus"], "emotions": None},
        heads={"emotion": {"kind": "classes", "classes": 7}},
    )
    # the house has no word for calm
    assert (
        recipe_items(Recipe.model_validate(seven), folder).targets["emotion"] == -100
    ).sum() == 5


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
def test_what_ravdess_does_not_have_is_said(tmp_path):
    folder = folders.write_ravdess(tmp_path / "r", CLIPS)
    with pytest.raises(DataError, match="means only; frozen_two_head wants r3d"):
        recipe_items(small("frozen_two_head"), folder)
    form = small("multimodal_fer").model_dump()
    form["encoders"]["audio"] = {"kind": "mean", "columns": ["F0"], "standardize": True, "width": 8}
    with pytest.raises(DataError, match="audio has 25 columns here.*set columns: all"):
        recipe_items(Recipe.model_validate(form), folder)


def test_a_corpus_without_published_folds_says_so():
    recipe = small("multimodal_fer")
    whole = recipe_items(recipe)
    del whole.meta["fold"]
    with pytest.raises(DataError, match="nobody has published folds of this corpus"):
        recipe_folds(recipe, whole)


PEOPLE = {
    "The Director": 0,
    "The Waiter": 1,
    "Ann Lee": 2,
    "Ann_Lee": 3,
    "a/b": 4,
    "C:": 5,
    "..": 6,
    "Jörg, left out": 7,
}


def called(whole, names):
    "The items with their speakers called by `names`, in the order of the speakers' ids."
    old = sorted(set(whole.meta["speaker"]))
    assert len(old) == len(names)
    new = dict(zip(old, names))
    whole.meta["speaker"] = [new[s] for s in whole.meta["speaker"]]
    return whole


def test_a_fold_is_called_by_the_value_that_it_leaves_out():
    "A speaker's name is no part of a sentence that is taken apart again."
    recipe = small(items=24, items_per_speaker=3, protocol="leave_one_speaker_out")
    whole = called(recipe_items(recipe), PEOPLE)
    made = recipe_folds(recipe, whole)
    assert set(made) == set(PEOPLE)
    for name, fold in made.items():
        assert set(fold.tests["test"].meta["speaker"]) == {name}
    assert sorted(i for f in made.values() for i in f.tests["test"].meta["id"]) == sorted(
        whole.meta["id"]
    )


def test_folders_of_folds_are_safe_and_their_own():
    names = [
        *PEOPLE,
        "the director",
        ".",
        "",
        "session000",
        "0",
        "x" * 300,
        "a\\b",
        "a b",
        "a_b",
        "Anna",
        "anna",
    ]
    folders_of = {name: fold_folder(Path("run"), name) for name in names}
    # and on a disk that takes capital letters for small ones
    assert len({str(folder).lower() for folder in folders_of.values()}) == len(names)
    for name, folder in folders_of.items():
        assert folder.parent == Path("run/folds") and len(folder.name) <= 100, name
        assert set(folder.name) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
        ) and not folder.name.startswith(".")
    # a name that needs no change keeps its folder
    assert folders_of["session000"].name == "session000" and folders_of["0"].name == "0"


def test_a_run_over_people_with_any_names_is_kept_and_read_again(tmp_path, monkeypatch):
    form = small(items=24, items_per_speaker=3, protocol="leave_one_speaker_out").model_dump()
    form["plan"].update(epochs=1)
    recipe = Recipe.model_validate(form)
    from mmemo.experiments import run

    monkeypatch.setattr(run, "recipe_items", lambda *given: called(recipe_items(*given), PEOPLE))
    histories, metrics = train_recipe(recipe, tmp_path / "run", track=())
    assert set(histories) == set(PEOPLE)
    assert {r["fold"] for r in metrics["measured"] if "fold" in r} == set(PEOPLE)
    assert len(list((tmp_path / "run/folds").glob("*/model.safetensors"))) == len(PEOPLE)
    assert load_run(tmp_path / "run", "The Director") is not None
    assert evaluate_run(tmp_path / "run")["emotion"] == metrics["emotion"]


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
@pytest.mark.parametrize("name", ["text_only", "emotion2vec_text"])
def test_a_recipe_of_words_on_a_corpus_without_says_so(tmp_path, name):
    folder = folders.write_ravdess(tmp_path / "r", CLIPS)
    with pytest.raises(DataError, match="the corpus has no words.*leave encoders.text out"):
        recipe_items(small(name), folder)
