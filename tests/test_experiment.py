"""Experiments: protocols cut the items, what is frozen is computed once and never moves,
predictions and numbers survive.
"""

import json

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from mmemo.core.batch import Stream
from mmemo.core.errors import ConfigError, DataError
from mmemo.experiments.build import (
    build_model,
    recipe_objective,
    recipe_plan,
    split_frozen,
    training_course,
    with_speaker_targets,
)
from mmemo.experiments.recipe import Recipe, load_recipe
from mmemo.experiments.records import by_task, read_measured
from mmemo.experiments.run import evaluate_run, load_run, train_recipe
from mmemo.experiments.sources import recipe_data, recipe_items
from mmemo.models.base import Frozen, predict
from mmemo.training.loop import fit
from mmemo.training.plan import Plan, parameter_groups
from mmemo.training.tracking import QUIET
from mmemo.training.update import NonFiniteError


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMEMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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
    if "frames" in (form["encoders"]["video"] or ()):
        form["encoders"]["video"].update(frames=4, size=16)
    form["evaluation"].update({"resamples": 100} | ({"protocol": protocol} if protocol else {}))
    form["plan"].update(epochs=2)
    return Recipe.model_validate(form)


def of_folds(metrics) -> dict:
    "{fold: {task: {metric: interval}}} of the records of a run's metrics."
    records = read_measured(metrics)
    folds = dict.fromkeys(r.fold for r in records if r.fold is not None)
    return {fold: by_task(r for r in records if r.fold == fold) for fold in folds}


def of_subsets(metrics) -> dict:
    "{subset: {task: {metric: interval}}} of the records of a run's metrics."
    records = read_measured(metrics)
    subsets = dict.fromkeys(r.subset for r in records if r.subset is not None)
    return {subset: by_task(r for r in records if r.subset == subset) for subset in subsets}


@pytest.mark.parametrize("name", ["frozen_two_head", "emotion2vec_text"])
def test_frozen_means_frozen(name, tmp_path):
    """No parameter and no statistic of what is frozen moves; whatever learns does; and the lean
    model is the whole one.
    """
    recipe = small(name, items=16, items_per_speaker=1)
    parts = recipe_data(recipe, seed=2)
    torch.manual_seed(0)
    model = build_model(recipe, parts["train"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = {
        f"{m}.{k}"
        for m, module in model.named_modules()
        if isinstance(module, Frozen)
        for k in module.state_dict()
    }
    assert any("running_mean" in k for k in frozen) == (name == "frozen_two_head")
    small_one, computed = split_frozen(model, parts)
    whole = predict(model, parts["test"])["emotion"]
    torch.testing.assert_close(
        predict(small_one, computed["test"])["emotion"], whole, atol=1e-5, rtol=1e-4
    )
    plan = Plan(epochs=3, batch_size=5, lr=0.01, optimiser="adam")
    fit(
        small_one,
        recipe_objective(recipe, parts["train"]),
        computed["train"],
        computed["valid"],
        plan,
        tracking=QUIET,
    )
    direct = build_model(recipe, parts["train"])
    direct.load_state_dict(before)
    # with the frozen pieces inside the loop
    fit(
        direct,
        recipe_objective(recipe, parts["train"]),
        parts["train"],
        parts["valid"],
        plan,
        tracking=QUIET,
    )
    for one in (model, direct):
        moved = {k for k, v in one.state_dict().items() if not torch.equal(v, before[k])}
        assert not moved & frozen
        learned = {k for k, p in one.named_parameters() if p.requires_grad}
        assert learned <= moved, learned - moved
    for k, v in direct.state_dict().items():
        torch.testing.assert_close(v, model.state_dict()[k], atol=2e-4, rtol=2e-3)


def test_frozen_two_head_is_the_published_system():
    recipe = load_recipe("frozen_two_head")
    with torch.device("meta"):
        model = build_model(recipe, pretrained=False)
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "encoders.text.project.linear.weight": (128, 768),
        "encoders.audio.project.linear.weight": (128, 128),
        "encoders.video.project.linear.weight": (128, 512),
        "fusion.linear.weight": (256, 384),
        "fusion.norm.weight": (256,),
        "heads.emotion.weight": (7, 256),
        "heads.sentiment.weight": (3, 256),
    } | {k: v for k, v in shapes.items() if k.endswith("bias")}
    assert isinstance(model.fusion.norm, nn.BatchNorm1d)
    assert (
        list(recipe.plan.lr.values()) == [8e-6, 8e-5, 8e-5, 5e-4, 5e-4]
        and recipe.plan.optimiser == "adam"
        and recipe.plan.schedule == "plateau"
    )
    assert all(
        loss.class_weights == "inverse" and loss.label_smoothing > 0
        for loss in recipe.objective.values()
    )


def test_curriculum_and_adversary_of_a_recipe():
    recipe = small(experiment="everything")
    parts = recipe_data(recipe)
    told = with_speaker_targets(recipe, parts)
    names = sorted(set(parts["train"].meta["speaker"]))
    assert [names[i] for i in told["train"].targets["speaker"].tolist()] == list(
        parts["train"].meta["speaker"]
    ) and (told["test"].targets["speaker"] == -100).all()
    given, hooks = training_course(recipe, told, lambda rows: None)
    assert (
        len(hooks.sampler(0)) < len(parts["train"]) == len(hooks.sampler(recipe.curriculum.epochs))
    )
    assert (
        0
        <= given["train"].targets["difficulty"].min()
        < given["train"].targets["difficulty"].max()
        <= 1
        and (given["valid"].targets["difficulty"] == 0.5).all()
    )
    model = build_model(recipe, parts["train"])

    def rates():
        return {
            m.p
            for k, m in model.named_modules()
            if isinstance(m, nn.Dropout) and k.startswith(("fusion", "heads"))
        }

    hooks.at_epoch(model, 0)
    assert rates() == {0.1} and model.heads["speaker"].strength == 0
    hooks.at_epoch(model, recipe.curriculum.epochs)
    assert rates() == {0.6} and model.heads["speaker"].strength > 0.9
    batch = given["train"][list(range(12))]
    assert set(recipe_objective(recipe, given["train"])(model(batch), batch)) == set(
        recipe.recorded
    )


def test_difficulty_by_confidence_asks_models_that_have_not_seen_the_item(tmp_path):
    form = small(
        experiment="curriculum", protocol="split", items=160, items_per_speaker=5
    ).model_dump()
    form["curriculum"].update(difficulty="confidence", dropout=None)
    _, metrics = train_recipe(Recipe.model_validate(form), tmp_path / "run")
    assert metrics["steps"] > 0 and metrics["emotion"]["uar"].value >= 0
    form["curriculum"]["difficulty"] = "true"
    parts = recipe_data(recipe := Recipe.model_validate(form))
    for part in parts.values():
        part.meta.pop("difficulty")
    with pytest.raises(DataError, match="true needs the items' difficulty"):
        training_course(recipe, parts, lambda rows: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe, folder = small(experiment="speakers", items=60), tmp_path_factory.mktemp("run")
    return recipe, folder, *train_recipe(recipe, folder, seed=1)


def test_a_run_of_folds_keeps_predictions_and_can_be_measured_again(run):
    recipe, folder, histories, metrics = run
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    whole = recipe_items(recipe, seed=1)
    assert (
        sorted(table["id"]) == sorted(whole.meta["id"])
        and set(table["fold"]) == set(histories) == set(of_folds(metrics))
        and len(table["emotion said"][0]) == 4
    )
    hits = sum(
        max(range(4), key=said.__getitem__) == right
        for said, right in zip(table["emotion said"], table["emotion"])
    ) / len(whole)
    assert (
        metrics["emotion"]["accuracy"].value == pytest.approx(hits)
        and metrics["protocol"] == "leave one session out"
        and "COVAREP" in metrics["notes"][0]
    )
    again = evaluate_run(folder)
    for metric, value in again["emotion"].items():
        assert value == pytest.approx(metrics["emotion"][metric], abs=1e-6)
    with pytest.raises(ConfigError, match="none of them is the one to measure on another corpus"):
        evaluate_run(folder, "somewhere")
    with pytest.raises(DataError, match="has no fold 'x'; there are session000"):
        load_run(folder, "x")


def test_a_second_call_takes_no_step_and_a_killed_fold_goes_on(run):
    recipe, folder, histories, metrics = run
    first = next(iter(histories))
    (folder / "metrics.json").unlink()
    (folder / "folds" / first / "model.safetensors").unlink()
    more, same = train_recipe(recipe, folder, seed=1)
    assert {k: [s["loss"] for s in h.steps] for k, h in more.items()} == {
        k: [s["loss"] for s in h.steps] for k, h in histories.items()
    }
    assert same["emotion"] == metrics["emotion"] and of_folds(
        json.loads((folder / "metrics.json").read_text())
    )


def test_cross_corpus_numbers_are_a_matrix(tmp_path):
    recipe = small(
        "text_only", "plain", protocol="cross_corpus", items=192, items_per_speaker=2, corpora=2
    )
    _, metrics = train_recipe(recipe, tmp_path / "run")
    both = {"corpus0", "corpus1"}
    records = read_measured(metrics)
    pairs = {(r.fold, r.test) for r in records if r.across is None}
    assert pairs == {(one, other) for one in both for other in both}
    assert {(r.task, r.across) for r in records if r.fold is None} == {
        ("emotion", False),
        ("emotion", True),
    }


def test_transductive_runs_say_so(tmp_path):
    form = small(items=60).model_dump()
    form["speakers"] = {"normalise": True}
    _, metrics = train_recipe(Recipe.model_validate(form), tmp_path / "run")
    assert "transductive" in metrics["protocol"]


def test_what_each_modality_says_alone_is_measured_and_measured_again(tmp_path):
    form = small(items=80, items_per_speaker=4, protocol="split").model_dump()
    form["evaluation"]["modalities"] = True
    recipe = Recipe.model_validate(form)
    _, metrics = train_recipe(recipe, tmp_path / "run")
    ways = of_subsets(metrics)
    assert list(ways) == ["text alone", "audio alone"]
    again = of_subsets(evaluate_run(tmp_path / "run"))
    for way in ways:
        assert again[way]["emotion"]["accuracy"] == pytest.approx(ways[way]["emotion"]["accuracy"])
    model, test = load_run(tmp_path / "run"), recipe_data(recipe)["test"]
    text = test.streams["text"]
    deaf = test.replace(text=Stream(text.x, torch.zeros_like(text.mask), text.t))
    right = (
        (predict(model, deaf)["emotion"].argmax(1) == test.targets["emotion"]).float().mean().item()
    )
    assert ways["audio alone"]["emotion"]["accuracy"][0] == pytest.approx(right)


def test_a_thaw_of_a_recipe_keeps_parts_still_until_their_epoch():
    form = small("multimodal_fer", items=80, items_per_speaker=4).model_dump()
    form["thaw"] = {"stages": [["heads.*"], ["*"]], "at": [0, 1]}
    recipe = Recipe.model_validate(form)
    parts = recipe_data(recipe)
    model = build_model(recipe, parts["train"])
    _, hooks = training_course(recipe, parts, lambda rows: model)
    hooks.at_epoch(model, 0)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"heads"}
    hooks.at_epoch(model, 1)
    assert all(p.requires_grad for p in model.parameters())
    form["thaw"]["at"] = [1, 2]
    with pytest.raises(Exception, match="give an epoch for each of the 2 stages, 0 for the first"):
        Recipe.model_validate(form)


def test_a_run_that_turns_to_nan_names_the_cause_and_leaves_a_report(tmp_path):
    form = small("multimodal_fer", items=80, items_per_speaker=4, protocol="split").model_dump()
    form["plan"].update(lr=1e30, clip=None, precision="fp32")
    with pytest.raises(NonFiniteError, match="update") as error:
        train_recipe(Recipe.model_validate(form), tmp_path / "run")
    assert (
        error.value.finding
        and list((tmp_path / "run/training/nan").glob("step-*"))
        and not (tmp_path / "run" / "metrics.json").exists()
    )


def test_end_to_end_trains_from_words_sound_and_pictures(tmp_path):
    form = small("end_to_end", items=24, items_per_speaker=2).model_dump()
    form["plan"].update(epochs=3, keep_every=2, save_every=3, accumulate=2, batch_size=4)
    recipe = Recipe.model_validate(form)
    histories, metrics = train_recipe(recipe, tmp_path / "run")
    steps, kept = (
        histories["split"].epochs,
        {p.name for p in (tmp_path / "run/training/checkpoints").iterdir()},
    )
    # every second epoch, the last and the best
    assert {f"step-{steps[i]['step']:08d}" for i in (1, 2)} | {
        f"step-{histories['split'].best['step']:08d}"
    } == kept
    model, test = load_run(tmp_path / "run"), recipe_data(recipe)["test"]
    kinds = {type(m).__name__ for m in model.modules()}
    assert {"RobertaModel", "Wav2Vec2Model", "ViTModel", "ModalityAttention"} <= kinds
    B, output = len(test), model(test)
    maps = output.maps["modalities"]
    assert maps.shape == (B, 4, 3, 3) and torch.allclose(
        maps.sum(-1), torch.ones(B, 4, 3), atol=1e-5
    )
    rates = {
        name: g["base"] for g in parameter_groups(model, recipe_plan(recipe)) for name in g["names"]
    }
    assert {
        r for n, r in rates.items() if n.split(".")[2] in ("transformer", "speech", "image")
    } == {0.0001} and {r for n, r in rates.items() if n.startswith(("fusion", "heads"))} == {0.001}
    assert sum("sentiment" in found for found in of_subsets(metrics).values()) == 6 and not [
        s for s in histories["split"].steps if s["norm"] is None
    ]


def test_every_dropout_layer_rises_after_the_curriculum():
    "Whoever wrote it: torch's of every dimension, the house's own; no other rate."
    from mmemo.models.base import ConcatFusion
    from mmemo.models.fusion import ModalityDropout
    from mmemo.models.stacked import Dropout
    from mmemo.training.curriculum import dropout_after

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = 0.3

    dropouts = [nn.Dropout(0.1), nn.Dropout1d(0.1), nn.AlphaDropout(0.1), Dropout(0.1), Own()]
    wrapped = ModalityDropout(ConcatFusion({"text": 3}, 4, dropout=0.2), 0.25)
    others = [nn.Linear(2, 2), nn.TripletMarginLoss(p=2.0), nn.LPPool1d(2, 2)]
    model = nn.ModuleDict({"fusion": nn.ModuleList([*dropouts, *others, wrapped])})
    change = dropout_after(2, 0.1, 0.6, where="fusion.*")
    inner = [m for m in wrapped.fusion.modules() if isinstance(m, nn.Dropout)]
    for epoch, rate in ((0, 0.1), (1, 0.1), (2, 0.6)):
        change(model, epoch)
        assert [m.p for m in [*dropouts, *inner]] == [rate] * (len(dropouts) + len(inner))
    assert inner and wrapped.p == 0.25 and others[1].p == 2.0
    with pytest.raises(ConfigError, match="no dropout layer of the model has a name like 'heads"):
        dropout_after(2, where="heads.*")(model, 0)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "camembert", "distilbert"])
def test_no_text_encoder_has_a_pooler_that_nothing_teaches(kind, tmp_path):
    "One function says it for every way in which a text encoder is made."
    from transformers import AutoConfig, AutoModel

    from mmemo.models.text import TextEncoder, blank_text_encoder

    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "distilbert":
        sizes = {"vocab_size": 30, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    config = AutoConfig.for_model(kind, **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    for encoder in (TextEncoder.pretrained(tmp_path), blank_text_encoder(str(tmp_path))):
        assert not [name for name, _ in encoder.model.named_parameters() if "pooler" in name]
