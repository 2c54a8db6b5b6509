"""Recipes: what stands in them is what is built; what cannot be is one line; a run says the same
from memory and from its folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mmemo.core.batch import Batch, Stream
from mmemo.core.errors import CheckpointError, ConfigError, DataError, WeightsError
from mmemo.data.interviews import TRANSCRIPT_OFFSETS
from mmemo.data.standards import AUS
from mmemo.experiments.build import build_model, recipe_objective, recipe_plan, walk_recipe
from mmemo.experiments.recipe import (
    RECIPE_FOLDER,
    SIZE_KEYS,
    Recipe,
    list_recipes,
    load_recipe,
    load_suite,
)
from mmemo.experiments.results import Said, measured_split
from mmemo.experiments.run import evaluate_run, train_recipe
from mmemo.experiments.sources import column_places, recipe_data
from mmemo.models.base import Standardize, predict
from mmemo.models.text import blank_text_encoder
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import write_daicwoz
from mmemo.training.loop import fit
from mmemo.training.tracking import QUIET

NAMES, SCALES = (
    ("configurable_multimodal", "fine_tune", "fine_tune_v1"),
    ("full", "smoke", "laptop"),
)
BODY = (RECIPE_FOLDER / "configurable_multimodal.yaml").read_text()


def shrunk(name, items=32, items_per_speaker=1, epochs=1):
    "A recipe small enough for a test."
    form = load_recipe(name, "smoke").model_dump()
    form["corpus"].update(items=items, knobs={"items_per_speaker": items_per_speaker})
    for part in form["encoders"].values():
        part.update(
            {k: 8 for k in ("width", "steps") if part.get(k)}
            | ({"steps": 20} if "steps" in part else {})
        )
    form["fusion"]["width"] = 8
    form["plan"].update(epochs=epochs, batch_size=8, lr=0.01)
    form["evaluation"].update(resamples=100, xray=False)
    return Recipe.model_validate(form)


# ---- what stands in the files


def test_shipped_recipes_can_be_read_and_written_at_every_scale(tmp_path):
    assert set(list_recipes()) >= {
        *NAMES,
        "frozen_two_head",
        "emotion2vec_text",
        "multimodal_baseline",
        "audio_only",
        "text_only",
        "fusion_ablation",
    }
    for name in list_recipes():
        for experiment in load_suite(name).experiments:
            for scale in SCALES:
                recipe = load_recipe(name, scale, experiment)
                assert (
                    recipe.name in (name, f"{name}-{experiment}")
                    and recipe.scale == scale
                    and recipe.about
                    and recipe.source
                )
                (tmp_path / "own.yaml").write_text(recipe.text())
                assert load_recipe(tmp_path / "own.yaml", scale) == recipe


def test_at_full_they_are_the_published_systems():
    plain, steady, both = (
        load_recipe(n) for n in ("fine_tune", "fine_tune_v1", "configurable_multimodal")
    )
    for r in (plain, steady):
        e = r.encoders
        assert (
            e.text.weights == "bert-base-uncased"
            and e.text.lora.rank == 8
            and e.text.lora.targets == ["query", "value"]
            and e.text.pool == "mean"
        )
        assert (
            [e.text.width, e.audio.width, e.video.width] == [512] * 3
            and e.audio.kind == e.video.kind == "mean"
            and recipe_plan(r).clip == 1.0
        )
    assert (
        recipe_plan(plain).epochs == 3
        and recipe_plan(plain).patience is None
        and plain.objective["phq8"].kind == "mse"
        and not plain.encoders.text.norm
    )
    assert (
        recipe_plan(steady).epochs == 50
        and recipe_plan(steady).patience
        and recipe_plan(steady).monitor == "mse"
        and steady.objective["phq8"].kind == "rmse"
    )
    assert (
        steady.fusion.kind == "normalized_concat"
        and all(
            getattr(steady.encoders, m).norm and getattr(steady.encoders, m).dropout == 0.2
            for m in ("text", "audio", "video")
        )
        and steady.fusion.dropout == 0.2
    )
    e, p = both.encoders, recipe_plan(both, seed=7)
    assert (
        e.text.weights == "distilbert-base-uncased"
        and e.text.tuning == "full"
        and both.fusion.kind == "cross_attention"
        and both.fusion.clock
    )
    assert all(
        part.kind == "tcn"
        and (part.kernel, part.dilations, part.steps, part.width) == (3, [1, 2, 4], 100, 512)
        for part in (e.audio, e.video)
    )
    assert {loss.kind for loss in both.objective.values()} == {
        "mse",
        "cross_entropy",
        "contrastive",
    } and (p.optimiser, p.schedule, p.warmup, p.seed) == ("adamw", "onecycle", 0.1, 7)
    for r in (plain, steady, both):
        assert (
            len(column_places(r, "audio")) == 74
            and len(column_places(r, "video")) == 10
            and {"AU12_r", "AU04_r"} <= set(r.encoders.video.columns) <= set(AUS)
        )


def test_scales_change_sizes_only():
    def changes(a, b, at=""):
        if not isinstance(a, dict) or at.endswith("lr"):
            return {at.split(".")[-1]} if a != b else set()
        assert set(a) == set(b)
        return {c for k in a if k != "scale" for c in changes(a[k], b[k], f"{at}.{k}")}

    for name in NAMES:
        full = load_recipe(name).model_dump()
        for scale in ("smoke", "laptop"):
            assert changes(full, load_recipe(name, scale).model_dump()) <= set(SIZE_KEYS)


def test_package_data_ships_the_recipes():
    root = Path(__file__).resolve().parent.parent
    assert (
        '"recipes/*.yaml"' in (root / "setup.py").read_text()
        and "recursive-include mmemo/recipes *.yaml" in (root / "MANIFEST.in").read_text()
    )


# ---- what cannot be is one line: file, key path, what, and what would be right


@pytest.mark.parametrize(
    "was, becomes, said",
    [
        (
            "tuning: full",
            "tuning: ful",
            (
                "encoders.text.tuning: 'ful' cannot be: choose 'frozen', 'lora' or 'full'; did you"
                " mean 'full'?"
            ),
        ),
        (
            "tuning: full",
            "tuning: lora",
            "encoders.text: tuning is 'lora', but lora is missing: give rank",
        ),
        (
            "kind: tcn",
            "kind: tnc",
            (
                "encoders.audio.kind: 'tnc' cannot be: choose 'mean', 'tcn', 'utterance',"
                " 'wave_cnn', 'speech'; did you mean 'tcn'?"
            ),
        ),
        ("kind: tcn, ", "", "encoders.audio.kind: is missing: choose mean, tcn"),
        (
            "  kind: cross_attention\n",
            "",
            "fusion.kind: is missing: choose concat, normalized_concat, batchnorm_concat",
        ),
        (
            "width: 512}",
            "widht: 512}",
            "encoders.audio: unknown key 'widht'; did you mean 'width'?",
        ),
        ("weights: distilbert-base-uncased, ", "", "encoders.text.weights: is missing"),
        (
            "max_length: 512",
            "max_length: true",
            "encoders.text.max_length: True cannot be: it must be a valid integer",
        ),
        ("kernel: 3", "kernel: 4", "encoders.audio.kernel: 4 cannot be: choose 1, 3, 5"),
        (
            "[1, 2, 4]",
            "[1, 0, 4]",
            "encoders.audio.dilations.1: 0 cannot be: it must be greater than or equal to 1",
        ),
        ("AU12_r", "AU13_r", "encoders.video.columns: unknown column 'AU13_r'; did you mean 'AU1"),
        ("columns: all", "columns: [F0, F0]", "encoders.audio.columns: name each column once"),
        (
            "columns: all",
            "columns: most",
            "encoders.audio.columns: 'most' cannot be: choose 'all' or a list of names",
        ),
        (
            "heads: 4\n",
            "heads: 5\n",
            "fusion: width 512 cannot be divided among heads 5; choose a divisor, such as 4",
        ),
        (
            "[text, video]]",
            "[text, vido]]",
            (
                "fusion.pairs.1.1: 'vido' cannot be: choose 'text', 'audio' or 'video'; did you"
                " mean 'video'?"
            ),
        ),
        ("[text, video]]", "[audio, text]]", "fusion: pairs: one is given twice"),
        (
            "  text: {kind",
            "  # text: {kind",
            "fusion.pairs: text has no encoder; there are audio, video",
        ),
        (
            "dropout: 0.1",
            "dropout: 1e-1",
            (
                "fusion.dropout: '1e-1' cannot be: it must be a valid number (YAML takes 1e-1 for a"
                " text: write 0.1)"
            ),
        ),
        ("0.00003", "3e-5", "(YAML takes 3e-5 for a text: write 0.00003)"),
        (
            "task: emotion, weight: 0.1",
            "task: phq8, weight: 0.1",
            (
                "objective.contrastive.task: a contrastive loss needs a head of classes, such as"
                " emotion; 'phq8' is none"
            ),
        ),
        (
            "  emotion: {kind: classes, classes: 7}\n",
            "",
            "objective.emotion.task: there is no head 'emotion'; there are phq8",
        ),
        (
            "  emotion: {kind: cross_entropy, task: emotion, weight: 1.0}\n",
            "",
            "heads.emotion: nothing teaches it",
        ),
        (
            "phq8: {kind: mse",
            "phq8: {kind: cross_entropy",
            "objective.phq8.kind: cross_entropy cannot teach phq8; choose mse or rmse",
        ),
        ("classes: 7", "classes: 6", "heads.emotion.classes: 6 cannot be: emotion needs 7"),
        ("epochs: 20", "epochs: 2.5", "plan.epochs: 2.5 cannot be: it must be a valid integer"),
        ("epochs: 20", "epoch: 20", "plan: unknown key 'epoch'; did you mean 'epochs'?"),
        (
            "schedule: onecycle",
            "schedule: one",
            "plan.schedule: 'one' cannot be: choose one of constant, onecycle",
        ),
        ("epochs: 20", "epochs: 0", "plan.epochs: 0 cannot be: choose a whole number from 1"),
        (
            "clip: 1.0",
            "monitor: mse\n  direction: min",
            (
                "plan.monitor: 'mse' is not recorded; choose loss, phq8, emotion, contrastive,"
                " emotion accuracy"
            ),
        ),
        (
            "encoders.text.transformer.*",
            "encoder.text.*",
            (
                "plan.lr: 'encoder.text.*' matches no parameter; their names begin with"
                " encoders.text., encoders.audio."
            ),
        ),
        (
            "unit: answer",
            "unit: answer, knobs: {speker: 1}",
            "corpus.knobs: unknown knob 'speker'; did you mean 'speaker'?",
        ),
        (
            "unit: answer",
            "unit: answer, knobs: {speaker: 99}",
            "corpus.knobs: knob speaker=99: it must lie between 0 and 5",
        ),
        (
            "unit: answer",
            "unit: answer, knobs: {factor_weights: [1, 2]}",
            "corpus.knobs: knob factor_weights=[1.0, 2.0]: eight numbers between 0 and 6",
        ),
        ("items: 8000", "items: .nan", "corpus.items: nan cannot be: it must be a valid integer"),
        (
            "corpus: {items: 8000, unit: answer}",
            "corpus: 3",
            "corpus: 3 cannot be: it must be keys and values",
        ),
        (
            "name: c",
            "name: ../c",
            "name: '../configurable_multimodal' cannot be: it must match pattern",
        ),
        ("evaluation:", "evalution:", "unknown key 'evalution'; did you mean 'evaluation'?"),
        (
            "fusion: {width: 64}",
            "fusion: {kind: concat}",
            "scales.laptop.fusion.kind: a scale may change sizes only (weights",
        ),
        (
            "fusion: {width: 64}",
            "fusion: {with: 64}",
            "scales.laptop.fusion: unknown key 'with'; did you mean 'width'?",
        ),
        (
            "fusion: {width: 64}",
            "fusion: 3",
            "scales.laptop.fusion: 3 cannot be: there are keys here",
        ),
        (
            "fusion: {width: 64}",
            "fusion: {width: 66}",
            "at scale laptop, fusion: width 66 cannot be divided among heads 4",
        ),
        (
            "heads: 4\n",
            "heads: 4\n  heads: 3\n",
            "line 25, column 3: the key 'heads' is given twice; keep one",
        ),
        ("heads: 4\n", "heads: [4\n", "line 25, column 8: expected ',' or ']'"),
        (
            "name: c",
            "on: 1\nname: c",
            "line 1, column 1: the key is read as True; keys are plain words",
        ),
        ("clock: 0.05", "clock: *x", "an alias (*name) cannot be used; write the value out"),
    ],
)
def test_an_impossible_recipe_is_one_line(tmp_path, was, becomes, said):
    assert was in BODY
    (path := tmp_path / "own.yaml").write_text(BODY.replace(was, becomes, 1))
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert (
        str(error.value).startswith(str(path))
        and said in str(error.value)
        and "\n" not in str(error.value)
        and len(str(error.value)) < 450
    )


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "holds nothing"),
        (b"- 1", "holds list"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"[" * 30_000, "nested too deeply"),
        (b"x" * 70_000, "more than 64,000 bytes"),
        (b"a: \x00", "not allowed"),
        (b"a: 2020-13-45", "month must be"),
        (b"a: !!python/object:os.system x", "line 1, column 4: could not determine a constructor"),
        (b"? [1]: 2\n: 3", "the key is read as"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, said):
    (path := tmp_path / "own.yml").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_and_scales_that_are_not_there():
    with pytest.raises(ConfigError, match="unknown recipe 'fine_tun'; did you mean 'fine_tune'"):
        load_recipe("fine_tun")
    with pytest.raises(ConfigError, match="there.yaml: cannot be read"):
        load_recipe("not/there.yaml")
    with pytest.raises(
        ConfigError, match="fine_tune.yaml: unknown scale 'huge'; choose full, smoke, laptop"
    ):
        load_recipe("fine_tune", "huge")


# ---- what is built


def test_full_size_is_walked_with_true_counts_and_nothing_downloaded():
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    with torch.device("meta"):
        bert, distil = (
            BertModel(BertConfig(), add_pooling_layer=False),
            DistilBertModel(DistilBertConfig()),
        )

    def count(m):
        return sum(p.numel() for p in m.parameters())

    lora, heads = 12 * 2 * 2 * 8 * 768, 512 + 1
    mlp, projections = (
        1536 * 512 + 512 + 512 * 512 + 512,
        sum(F_ * 512 + 512 for F_ in (768, 74, 10)),
    )
    w = walk_recipe(load_recipe("fine_tune"))
    text = next(r for r in w.rows if r.name == "transformer")
    assert (
        lora == 294_912 == text.trainable
        and text.params == count(bert) + lora
        and text.shape == (2, 64, 768)
    )
    assert w.params == count(
        bert
    ) + lora + projections + mlp + heads and w.trainable == w.params - count(bert)
    w = walk_recipe(load_recipe("configurable_multimodal"))
    assert w.trainable == w.params and next(
        r for r in w.rows if r.name == "transformer"
    ).params == count(distil)
    assert [r.shape for r in w.rows if r.name == "tcn"] == [(2, 100, 512)] * 2 and [
        r.shape for r in w.rows if r.name == "input"
    ] == [(2, 64), (2, 100, 74), (2, 100, 10)]


def test_blank_architectures():
    from mmemo.models.text import TextEncoder

    mine, own = (
        blank_text_encoder("mmemo-tiny").state_dict(),
        TextEncoder.pretrained("mmemo-tiny").state_dict(),
    )
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in own.items()}
    with pytest.raises(WeightsError, match="'gpt-5'.*choose bert-base-uncased"):
        blank_text_encoder("gpt-5")


@pytest.fixture(scope="module", params=NAMES)
def small(request):
    recipe = shrunk(request.param, items=64)
    parts = recipe_data(recipe, seed=1)
    torch.manual_seed(0)
    return recipe, parts, build_model(recipe, parts["train"])


def test_padding_order_and_missing_modalities(small):
    recipe, parts, model = small
    batch = parts["valid"][[0, 1, 2, 3, 4]]
    said = predict(model, batch)["phq8"]
    assert said.std() > 0
    torch.testing.assert_close(
        torch.cat([predict(model, parts["valid"][[i]])["phq8"] for i in range(5)]),
        said,
        atol=2e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        predict(model, parts["valid"][[4, 2, 0, 3, 1]])["phq8"],
        said[[4, 2, 0, 3, 1]],
        atol=2e-5,
        rtol=1e-5,
    )
    junk = {
        n: Stream(s.x if n == "text" else torch.where(s.mask[..., None], s.x, 1e4), s.mask, s.t)
        for n, s in batch.streams.items()
    }
    torch.testing.assert_close(predict(model, batch.replace(**junk))["phq8"], said, atol=0, rtol=0)
    for gone in (("text",), ("audio", "video"), ("text", "audio", "video")):
        assert torch.isfinite(predict(model, batch.without(*gone))["phq8"]).all()


def test_gradients_reach_what_learns_and_nothing_else(small):
    recipe, parts, model = small
    batch = parts["train"][list(range(12))]
    model.zero_grad()
    recipe_objective(recipe, parts["train"])(model(batch), batch)["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert bool(frozen) == (recipe.encoders.text.tuning == "lora") and not any(
        "lora_" in n for n in frozen
    )
    model.zero_grad()


def test_training_statistics_are_in_the_model(small):
    recipe, parts, model = small
    labels, audio = parts["train"].targets["phq8"], parts["train"].streams["audio"]
    assert model.heads["phq8"].mean == pytest.approx(
        float(labels.mean()), abs=1e-5
    ) and model.heads["phq8"].scale == pytest.approx(float(labels.std(correction=0)), abs=1e-5)
    torch.testing.assert_close(
        model.encoders["audio"].standardize.mean,
        audio.x[audio.mask].double().mean(0).float(),
        atol=1e-4,
        rtol=1e-4,
    )
    form = recipe.model_dump()
    form["encoders"]["audio"]["standardize"] = False
    bare = build_model(Recipe.model_validate(form), parts["train"], pretrained=False)
    assert not any(isinstance(m, Standardize) for m in bare.encoders["audio"].modules()) and any(
        isinstance(m, Standardize) for m in bare.encoders["video"].modules()
    )


def test_the_objective_is_the_sum_that_the_recipe_says():
    recipe = shrunk("configurable_multimodal", items=64)
    parts = recipe_data(recipe, seed=1)
    torch.manual_seed(0)
    model, batch = (
        build_model(recipe, parts["train"], pretrained=False).eval(),
        parts["train"][list(range(9))],
    )
    out = model(batch)
    found = recipe_objective(recipe, parts["train"])(out, batch)
    torch.testing.assert_close(
        found["phq8"], F.mse_loss(out.predictions["phq8"], batch.targets["phq8"])
    )
    torch.testing.assert_close(
        found["emotion"], F.cross_entropy(out.predictions["emotion"], batch.targets["emotion"])
    )
    torch.testing.assert_close(
        found["loss"], found["phq8"] + found["emotion"] + 0.1 * found["contrastive"]
    )
    assert set(found) == set(recipe.recorded) and out.predictions["contrastive"].shape == (9, 16)
    unknown = Batch(batch.streams, {**batch.targets, "emotion": torch.full((9,), -100)})
    torch.testing.assert_close(
        recipe_objective(recipe, parts["train"])(out, unknown)["loss"], found["phq8"]
    )
    for name in ("fine_tune", "fine_tune_v1"):
        assert set(recipe_objective(shrunk(name), parts["train"])(out, batch)) == set(
            shrunk(name).recorded
        )
    torch.testing.assert_close(
        recipe_objective(shrunk("fine_tune_v1"), parts["train"])(out, batch)["loss"],
        found["phq8"].sqrt(),
    )


# ---- a folder and the memory give the same numbers


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
def test_a_daicwoz_folder_and_the_corpus_it_was_written_from_give_equal_numbers(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    # the reader shifts the transcripts of some sessions
    sessions = [i for i in range(300, 340) if str(i) not in TRANSCRIPT_OFFSETS][:32]
    write_daicwoz(
        known_answer(32, 5, items_per_speaker=1), tmp_path / "daic", hog=False, sessions=sessions
    )
    for name in NAMES:
        recipe = shrunk(name, items=32)
        mine, theirs = recipe_data(recipe, seed=5), recipe_data(recipe, tmp_path / "daic", seed=9)
        for split in mine:
            for stream, s in mine[split].streams.items():
                o = theirs[split].streams[stream]
                assert (
                    s.x.shape == o.x.shape
                    and torch.equal(s.mask, o.mask)
                    and torch.equal(s.t[s.mask], o.t[o.mask])
                )
                torch.testing.assert_close(s.x, o.x, atol=1e-6, rtol=1e-6)
            assert torch.equal(mine[split].targets["phq8"], theirs[split].targets["phq8"])
            if "emotion" in recipe.heads:
                assert (theirs[split].targets["emotion"] == -100).all()
                mine[split].targets["emotion"] = theirs[split].targets["emotion"]
        found = []
        for parts in (mine, theirs):
            torch.manual_seed(0)
            model = build_model(recipe, parts["train"])
            fit(
                model,
                recipe_objective(recipe, parts["train"]),
                parts["train"],
                parts["valid"],
                recipe_plan(recipe, 3),
                tracking=QUIET,
            )
            found.append(Said.by(recipe, model, parts["test"]).measure(recipe))
        assert found[0].keys() == found[1].keys() == {"phq8"}
        for metric, value in found[0]["phq8"].items():
            assert found[1]["phq8"][metric] == pytest.approx(value, abs=1e-4), (name, metric)


def test_items_without_text_stay_without_it():
    recipe = shrunk("fine_tune", items=40)
    form = recipe.model_dump()
    form["corpus"]["knobs"] = {"items_per_speaker": 2, "missing_modality": 0.4}
    parts, corpus = (
        recipe_data(Recipe.model_validate(form), seed=2),
        known_answer(40, 2, items_per_speaker=2, missing_modality=0.4),
    )
    has = {i: bool(m) for i, m in zip(corpus.meta["id"], corpus.streams["text"].mask.any(1))}
    for b in parts.values():
        assert b.streams["text"].mask.any(1).tolist() == [has[i] for i in b.meta["id"]]
    assert not all(has.values())


def test_the_measured_split_is_the_one_with_labels():
    recipe = shrunk("fine_tune")
    with_labels, without = (
        Batch(
            {
                "text": Stream(
                    torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool), torch.zeros(2, 1)
                )
            },
            {"phq8": torch.full((2,), v)},
        )
        for v in (3.0, float("nan"))
    )
    assert (
        measured_split(recipe, {"test": with_labels, "valid": with_labels}) == "test"
        and measured_split(recipe, {"test": without, "valid": with_labels}) == "valid"
    )
    with pytest.raises(DataError, match="no label of phq8"):
        measured_split(recipe, {"test": without, "valid": without})


# ---- a run and its folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe, folder = (
        shrunk("configurable_multimodal", items=64, epochs=2),
        tmp_path_factory.mktemp("run"),
    )
    return recipe, folder, *train_recipe(recipe, folder, seed=4)


def test_a_run_leaves_what_a_repetition_needs(run):
    recipe, folder, history, metrics = run
    assert json.loads((folder / "metrics.json").read_text())["phq8"]["rmse"] == list(
        metrics["phq8"]["rmse"]
    )
    assert (
        metrics["steps"] == len(history["split"].steps) == 2 * 5
        and metrics["epochs"] == 2
        and metrics["seed"] == 4
        and metrics["items"] == {"train": 40, "valid": 8, "test": 16}
    )
    assert (
        {"rmse", "mae", "ccc", "rmse of the mean"} == set(metrics["phq8"])
        and "accuracy" in metrics["emotion"]
        and metrics["fingerprint"]
        and metrics["versions"]["torch"]
    )
    assert (
        Recipe.model_validate(json.loads((folder / "recipe.json").read_text())) == recipe
        and (folder / "model.safetensors").is_file()
    )
    assert (
        not list(folder.glob("*.part"))
        and not list(folder.rglob("*.pt"))
        and not list(folder.rglob("*.pkl"))
    )


def test_a_run_measured_from_its_folder_gives_the_same_numbers(run):
    _, folder, _, metrics = run
    again = evaluate_run(folder)
    assert (
        all(again[part] == metrics[part] for part in ("phq8", "emotion"))
        and again["protocol"] == "test"
        and again["items"] == 16
    )


def test_calling_again_takes_no_further_step_and_another_run_is_refused(run):
    recipe, folder, history, metrics = run
    more, same = train_recipe(recipe, folder, seed=4)
    assert [s["loss"] for s in more["split"].steps] == [
        s["loss"] for s in history["split"].steps
    ] and same["phq8"] == metrics["phq8"]
    with pytest.raises(ConfigError, match=r"holds another run \(seed, corpus_seed differ"):
        train_recipe(recipe, folder, seed=5)
    with pytest.raises(ConfigError, match=r"holds another run \(plan differ"):
        train_recipe(
            Recipe.model_validate(
                recipe.model_dump() | {"plan": recipe.plan.model_dump() | {"epochs": 9}}
            ),
            folder,
            seed=4,
        )


def test_a_damaged_run_is_named(run, tmp_path):
    shutil.copytree(run[1], folder := tmp_path / "run")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors does not hold"):
        evaluate_run(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="has no model.safetensors"):
        evaluate_run(folder)
    (folder / "recipe.json").write_text(
        (folder / "recipe.json").read_text().replace('"tcn"', '"tnc"')
    )
    with pytest.raises(DataError, match="recipe.json: encoders.audio.kind: 'tnc' cannot be"):
        evaluate_run(folder)
    (folder / "recipe.json").write_text("{")
    with pytest.raises(DataError, match="recipe.json: cannot be read"):
        evaluate_run(folder)


def test_a_rate_without_parameters_stops_before_anything_is_written(tmp_path):
    form = shrunk("fine_tune").model_dump()
    form["plan"]["lr"] = {"encoders.audio.tcn.*": 0.1, "*": 0.1}
    with pytest.raises(ConfigError, match="encoders.audio.tcn"):
        train_recipe(Recipe.model_validate(form), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_bert_is_also_a_roberta():
    from mmemo.models.text import text_encoder

    bert, roberta = (text_encoder(name, True).eval() for name in ("mmemo-tiny", "roberta-tiny"))
    ids, mask = torch.randint(5, 149, (3, 17)), torch.arange(17) < torch.tensor([[17], [9], [1]])
    stream = Stream(ids.masked_fill(~mask, 0), mask, torch.zeros(3, 17))
    assert type(roberta.model).__name__ == "RobertaModel" and torch.equal(
        roberta(stream).x, bert(stream).x
    )
