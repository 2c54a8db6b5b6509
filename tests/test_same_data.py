"""A run is resumed with the data that it began with, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from tiny import Kill, Killed, items, same, tiny
from torch.utils.data import Dataset

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import ConfigError
from mmemo.data.corpus import cached
from mmemo.experiments.recipe import Recipe
from mmemo.experiments.run import evaluate_run, train_recipe
from mmemo.training.checkpoint import read_checkpoint
from mmemo.training.loop import Hooks, fit
from mmemo.training.objectives import mse
from mmemo.training.plan import Plan
from mmemo.training.same_data import changed_data, data_parts, run_data
from mmemo.training.tracking import Tracking

PLAN = Plan(epochs=2, batch_size=8, checkpoint_steps=1)


def told(batch: Batch) -> Batch:
    "The items with names."
    return Batch(batch.streams, batch.targets, {"id": [f"i{row}" for row in range(len(batch))]})


TRAIN, VALID = told(items(24)), told(items(12, seed=1))


def relabelled(batch: Batch, row: int = 3) -> Batch:
    y = batch.targets["y"].clone()
    y[row] += 1e-6
    return Batch(batch.streams, {"y": y}, batch.meta)


def louder(batch: Batch) -> Batch:
    s = batch.streams["audio"]
    x = s.x.clone()
    x[-1, -1, -1] += 1e-6
    return batch.replace(audio=s.with_x(x))


def turned(batch: Batch) -> Batch:
    return batch[torch.arange(len(batch)).flip(0)]


def renamed(batch: Batch) -> Batch:
    return Batch(batch.streams, batch.targets, {"id": [*batch.meta["id"][1:], "new"]})


def in_folder(folder, train=TRAIN, valid=VALID, objective=None, plan=PLAN, model=None, **more):
    tracking = Tracking(folder, progress=False, track=(), data=more.pop("data", None))
    model = model or tiny()
    fit(model, objective or mse("y"), train, valid, plan, tracking, Hooks(**more))
    return model


def backwards(epoch):
    return list(range(24))[::-1]


CHANGES = {
    "a label": ({"train": relabelled(TRAIN)}, "train: target y"),
    "a label that is watched": ({"valid": relabelled(VALID)}, "valid: target y"),
    "a stream": ({"train": louder(TRAIN)}, "train: stream audio"),
    "a stream that is watched": ({"valid": louder(VALID)}, "valid: stream audio"),
    "a mask": (
        {
            "train": TRAIN.replace(
                audio=Stream(
                    TRAIN.streams["audio"].x,
                    TRAIN.streams["audio"].mask.clone().index_fill_(1, torch.tensor(4), False),
                    TRAIN.streams["audio"].t,
                )
            )
        },
        "train: stream audio",
    ),
    "names": ({"train": renamed(TRAIN)}, "train: meta id"),
    "the order": ({"train": turned(TRAIN)}, "train: the order of the items"),
    "the order of an epoch": ({"sampler": backwards}, "sampler is new"),
    "the split": ({"train": VALID, "valid": TRAIN}, "train: 12 items, were 24"),
    "one item": ({"valid": VALID[range(11)]}, "valid: 11 items, were 12"),
    "nobody watches": ({"valid": None}, "valid is gone"),
    "another target": (
        {"train": Batch(TRAIN.streams, TRAIN.targets | {"z": torch.zeros(24)}, TRAIN.meta)},
        "train: target z",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_not_resumed_with_other_data(tmp_path, what):
    changed, message = CHANGES[what]
    with pytest.raises(Killed):
        in_folder(tmp_path, objective=Kill(4))
    before = sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    untouched = tiny(seed=5)
    with pytest.raises(ConfigError, match=message) as error:
        in_folder(tmp_path, model=untouched, **changed)
    assert "restore these, or give another folder" in str(error.value)
    assert same(untouched, tiny(seed=5))
    assert before == sorted((p, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())
    # neither is a finished one
    resumed = in_folder(tmp_path)
    with pytest.raises(ConfigError, match=message):
        in_folder(tmp_path, **changed)
    assert same(resumed, in_folder(tmp_path, model=tiny(seed=7)))


def test_the_same_data_in_other_clothes_are_the_same():
    copies = Batch(
        {"audio": Stream(*(v.clone() for v in vars(TRAIN.streams["audio"]).values()))},
        {"y": TRAIN.targets["y"].double().float()},
        {"id": list(TRAIN.meta["id"])},
    )
    assert run_data(TRAIN, VALID) == run_data(copies, VALID)
    assert changed_data(run_data(TRAIN), run_data(copies)) == []
    assert json.loads(json.dumps(run_data(TRAIN))) == run_data(TRAIN)
    # keys of plain values say nothing of the version of a library
    assert run_data(Batch({"a": (torch.zeros(2, 1, 1), torch.ones(2, 1) > 0, torch.ones(2, 1))}))[
        "train"
    ] == {"items": "2", "stream a": "2b768b4700e0ef84", "in any order": "e3b0c44298fc1c14"}


class Own(Dataset):
    "A data set of somebody else: items from a list, with noise in its streams."

    def __init__(self, batch):
        self.batch, self.read = batch, []

    def __len__(self):
        return len(self.batch)

    def __getitem__(self, rows):
        self.read.append(len(rows))
        some = self.batch[rows]
        s = some.streams["audio"]
        return some.replace(audio=s.with_x(s.x + torch.randn(()) * 1e-3))


def test_a_data_set_of_ones_own_is_known_by_its_labels(tmp_path):
    with pytest.raises(Killed):
        in_folder(tmp_path, train=Own(TRAIN), objective=Kill(4))
    with pytest.raises(ConfigError, match="train: target y"):
        in_folder(tmp_path, train=Own(relabelled(TRAIN)))
    state = torch.random.get_rng_state()
    assert data_parts(Own(TRAIN)) == data_parts(Own(louder(TRAIN)))
    assert torch.equal(state, torch.random.get_rng_state())
    in_folder(tmp_path, train=Own(TRAIN))
    large = Own(told(items(500)))
    data_parts(large)
    assert large.read == [64]


def test_keys_of_ones_own_may_tell_the_data(tmp_path):
    with pytest.raises(Killed):
        in_folder(tmp_path, objective=Kill(4), data={"train": {"table": "of May"}})
    with pytest.raises(ConfigError, match="train: table"):
        in_folder(tmp_path, data={"train": {"table": "of June"}})
    in_folder(tmp_path, train=louder(TRAIN), data={"train": {"table": "of May"}})


def test_a_corpus_is_known_by_its_file_and_its_rows(tmp_path):
    def corpus(batch, name):
        return cached("mine", lambda report: [batch], ".", [], cache=tmp_path / name)

    one, other, loud = (
        corpus(batch, name)
        for batch, name in ((TRAIN, "a"), (relabelled(TRAIN), "b"), (louder(TRAIN), "c"))
    )
    assert data_parts(one) == data_parts(corpus(TRAIN, "d"))
    assert changed_data(run_data(one), run_data(other)) == ["train: streams", "train: target y"]
    assert changed_data(run_data(one), run_data(loud)) == ["train: streams"]
    assert changed_data(run_data(one.select([1, 2])), run_data(one.select([2, 1]))) == [
        "train: the order of the items"
    ]


def test_a_checkpoint_without_keys_is_continued_with_a_warning(tmp_path, monkeypatch):
    from mmemo.training import loop

    real = loop.save_run
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            loop,
            "save_run",
            lambda run, history, log, place: real(
                run, history, log, {k: v for k, v in place.items() if k != "data"}
            ),
        )
        in_folder(tmp_path, objective=Kill(4))
    with pytest.warns(UserWarning, match="does not say which data it was made with"):
        in_folder(tmp_path, train=relabelled(TRAIN))
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    assert read_checkpoint(newest).state["data"] == run_data(relabelled(TRAIN), VALID)


# ------------------------------------------------------------------ recipes
RECIPE = {
    "name": "words",
    "about": "a few words",
    "source": "nobody",
    "encoders": {
        "text": {
            "kind": "transformer",
            "weights": "mmemo-tiny",
            "max_length": 16,
            "tuning": "frozen",
            "pool": "mean",
            "width": 8,
        }
    },
    "corpus": {"items": 120},
    "fusion": {"kind": "concat", "width": 8, "dropout": 0.1},
    "heads": {"emotion": {"kind": "classes", "classes": 7}},
    "objective": {"emotion": {"kind": "cross_entropy", "task": "emotion"}},
    "plan": {"epochs": 2, "batch_size": 8},
    "evaluation": {"resamples": 100},
}
HEADER = (
    "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,"
    "StartTime,EndTime"
)
FEELINGS = [("neutral", "neutral"), ("joy", "positive"), ("anger", "negative")]


def write_words(folder: Path, change=lambda split, row: 0, text="hello") -> Path:
    "A small corpus of words; `change` turns labels."
    folder.mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        lines = [HEADER]
        for row in range(12):
            emotion, sentiment = FEELINGS[(row + change(split, row)) % 3]
            lines.append(
                f"{row},{text} {row % 5} there,p{split}{row // 4},{emotion},{sentiment},{row // 4},"
                f'{row % 4},1,1,"00:00:01,000","00:00:03,000"'
            )
        (folder / f"{split}_sent_emo.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_recipe_is_not_trained_or_measured_with_other_labels(tmp_path, monkeypatch, split):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    recipe, run = Recipe.model_validate(RECIPE), tmp_path / "run"
    data = write_words(tmp_path / "data")
    _, metrics = train_recipe(recipe, run, data, track=())
    kept = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    write_words(data, lambda part, row: part == split and row == 5)
    for again in (lambda: train_recipe(recipe, run, data, track=()), lambda: evaluate_run(run)):
        with pytest.raises(ConfigError, match="made with other data .*data: .*target emotion"):
            again()
    assert kept == {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    # asked for by name, they are measured: the weights stay those of the run
    evaluate_run(run, data)
    write_words(data, text="good bye")
    with pytest.raises(ConfigError, match="data: stream text"):
        train_recipe(recipe, run, data, track=())
    write_words(data)
    assert train_recipe(recipe, run, data, track=())[1]["emotion"] == metrics["emotion"]
