"""Registries: what comes with the package is found, made and listed by its entry; what people add
in a module of their own is used everywhere by its name; a recipe is read without torch.
"""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.core.errors import ConfigError, DataError
from mmemo.core.plugins import load_plugins
from mmemo.core.registry import (
    ENCODER_REGISTRY,
    FUSION_REGISTRY,
    REGISTRIES,
    TAKES,
    Part,
    check_part,
    list_registered,
    register_fusion,
    register_protocol,
    register_tracker,
)
from mmemo.experiments.build import build_fusion, build_head, build_model, walk_recipe
from mmemo.experiments.recipe import Recipe, list_recipes, load_recipe, load_suite
from mmemo.experiments.results import recipe_folds
from mmemo.experiments.run import evaluate_run, train_recipe
from mmemo.experiments.sources import kind_of, recipe_items
from mmemo.models.fusion import FUSIONS, get_fusion
from mmemo.training.tracking import check_track, open_trackers

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = """
"A fusion, an encoder, a head, a loss and a corpus of somebody who is not mmemo."
import torch
from pydantic import BaseModel
from torch import nn

from mmemo.core.batch import masked_mean
from mmemo.core.registry import (
    register_corpus,
    register_encoder,
    register_fusion,
    register_head,
    register_loss,
)
from mmemo.models.base import Fused
from mmemo.synthetic.known_answer import known_answer


class Sharpness(BaseModel):
    sharpness: float = 1.0


@register_fusion("tst_mean", options=Sharpness)
class Mean(nn.Module):
    "The mean over the modalities, sharpened."

    def __init__(self, widths, width, dropout=0.1, sharpness=1.0):
        super().__init__()
        self.project = nn.ModuleDict({n: nn.Linear(w, width) for n, w in widths.items()})
        self.sharpness = sharpness

    def forward(self, streams):
        each = [p(masked_mean(streams[n].x, streams[n].mask)) for n, p in self.project.items()]
        return Fused(torch.stack(each).mean(0) * self.sharpness)


class Layers(BaseModel):
    layers: int


@register_encoder("tst_dense", takes="features", options=Layers)
class Dense(nn.Module):
    "Dense layers, step by step."

    def __init__(self, features, width, layers):
        super().__init__()
        sizes = [features] + [width] * layers
        self.net = nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])))

    def forward(self, stream):
        return stream.with_x(self.net(stream.x))


@register_encoder("tst_sound", takes="waveform")
class Sound(nn.Module):
    "Windows of a waveform."

    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(1, width)

    def forward(self, stream):
        return stream.with_x(self.net(stream.x.unsqueeze(-1)))


@register_head("tst_scores", predicts="classes")
class Scores(nn.Linear):
    "A score for each class."


@register_loss("tst_nll", teaches="classes")
def nll(task, label_smoothing=0.0, weight=None):
    "Minus the log probability."

    def objective(output, batch):
        said, right = output.predictions[task], batch.targets[task]
        return {"loss": nn.functional.cross_entropy(said, right, weight, ignore_index=-100)}

    return objective


@register_corpus(
    "tst_corpus", title="Somebody's corpus", lies_in=lambda f: (f / "mine.txt").exists(),
    sign="mine.txt",
)
def read(source, recipe, seed, progress):
    "Forty answers."
    return known_answer(40, int((source / "mine.txt").read_text()), items_per_speaker=2)
"""
NAMES = {
    "fusions": ["tst_mean", "tst_other"],
    "encoders": ["tst_dense", "tst_sound"],
    "heads": ["tst_scores"],
    "losses": ["tst_nll"],
    "corpora": ["tst_corpus"],
    "protocols": ["tst_thirds"],
    "trackers": ["tst_list"],
}
MINE = """
name: mine
about: With parts of my own.
source: nobody
plugins: [my_parts.py]
corpus: {items: 60, knobs: {items_per_speaker: 4}}
encoders:
  text:
    {kind: transformer, weights: mmemo-tiny, max_length: 32, tuning: frozen, pool: mean, width: 8}
  audio: {kind: tst_dense, columns: all, standardize: true, layers: 2, width: 8}
fusion: {kind: tst_mean, width: 8, dropout: 0.0, sharpness: 2.0}
heads: {emotion: {kind: tst_scores, classes: 7}}
objective: {emotion: {kind: tst_nll, task: emotion}}
plan: {epochs: 1, batch_size: 16, lr: 0.003}
evaluation: {resamples: 100}
"""
SUITE = (
    MINE
    + """
seeds: 1
experiments:
  own: {about: mine}
  gated: {about: theirs, fusion: {kind: gated, width: 8, dropout: 0.0}}
"""
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    yield
    for kind, names in NAMES.items():
        for name in names:
            REGISTRIES[kind].forget(name)


@pytest.fixture
def home(tmp_path):
    "A folder with a plugin, a recipe, a suite that name it, and a corpus of the plugin's."
    (tmp_path / "my_parts.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "suite.yaml").write_text(SUITE.replace("name: mine", "name: several"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine.txt").write_text("3")
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


# ---- what comes with the package


def test_every_entry_is_there_and_says_what_it_is():
    for kind, registry in REGISTRIES.items():
        assert len(registry) and list(list_registered(kind)) == list(registry)
        for name, entry in registry.items():
            assert callable(entry.load()) and entry.about and entry.name == name, (kind, name)
            if registry.bases:
                assert issubclass(registry.schema(name), Part)
    assert callable(REGISTRIES["losses"]["cross_entropy"].load_scaled())
    with pytest.raises(ConfigError, match="unknown kind 'fusion'; did you mean 'fusions'"):
        list_registered("fusion")


def test_a_fusion_is_made_from_its_schema_with_every_option():
    "The options of a class and those of its entry do not drift apart."
    given = {"width": 8, "dropout": 0.1, "heads": 2, "size": 2, "rank": 2, "latents": 2}
    given |= {"layers": 2, "rounds": 1, "residual": 0.5, "clock": 0.1, "pairs": [["text", "audio"]]}
    for name, entry in FUSION_REGISTRY.items():
        fields = FUSION_REGISTRY.schema(name).model_fields
        form = {key: value for key, value in given.items() if key in fields}
        part = check_part(FUSION_REGISTRY, {"kind": name, **form})
        assert isinstance(build_fusion(part, {"text": 6, "audio": 5}), nn.Module)
        taken = set(inspect.signature(entry.load()).parameters) - {"widths"}
        assert taken == set(part.options()), name


def test_the_ten_of_the_lesson_are_the_compared_ones():
    assert len(FUSIONS) == 10 and set(FUSIONS) < set(FUSION_REGISTRY)
    assert type(get_fusion("batchnorm_concat", {"text": 3}, 4)).__name__ == "ConcatNorm"


def test_every_encoder_can_be_walked_from_what_it_takes():
    for entry in (entry for _, entry in ENCODER_REGISTRY.items()):
        assert entry.takes in TAKES
    for name in list_recipes():
        assert walk_recipe(load_recipe(name, "smoke")).params > 0


def test_reading_recipes_loads_no_torch():
    script = """
import sys
import mmemo.experiments.recipe as recipe
from mmemo.core.registry import REGISTRIES, list_registered
for name in recipe.list_recipes():
    for experiment in recipe.load_suite(name).experiments:
        assert len(recipe.load_scales(name, experiment)) == 3
for kind in REGISTRIES:
    assert list_registered(kind)
for wrong in ("fine_tun",):
    try:
        recipe.load_recipe(wrong)
    except ValueError:
        pass
heavy = "torch transformers numpy scipy pandas matplotlib sklearn torchvision accelerate".split()
print([name for name in heavy if name in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


# ---- what people add


def test_parts_of_ones_own_are_trained_measured_and_checked(home):
    result = run("train", home / "mine.yaml", "--scale", "full", "--out", home / "run")
    assert result.exit_code == 0 and "emotion uar" in result.output, result.output
    kept = json.loads((home / "run/recipe.json").read_text())
    assert kept["plugins"] == [str(home / "my_parts.py")]
    assert kept["fusion"]["sharpness"] == 2.0 and kept["encoders"]["audio"]["layers"] == 2
    recipe = load_recipe(home / "mine.yaml")
    model = build_model(recipe, recipe_items(recipe))
    assert type(model.fusion).__name__ == "Mean" and model.fusion.sharpness == 2.0
    assert len(model.encoders["audio"].tst_dense.net) == 2
    again = evaluate_run(home / "run")
    metrics = json.loads((home / "run/metrics.json").read_text())
    assert list(again["emotion"]["uar"]) == pytest.approx(metrics["emotion"]["uar"], abs=1e-6)
    checked = run("check", home / "mine.yaml", "--scale", "full", "--seconds", "20")
    assert checked.exit_code == 0 and "✗" not in checked.output, checked.output
    walked = run("walk", home / "mine.yaml")
    assert walked.exit_code == 0 and "tst_dense" in walked.output, walked.output


def test_a_corpus_of_ones_own_is_recognised_and_read(home):
    recipe = load_recipe(home / "mine.yaml")
    assert kind_of(home / "corpus") == "tst_corpus"
    assert len(recipe_items(recipe, home / "corpus")) == 40
    result = run(
        "train", home / "mine.yaml", "--scale", "full", "--data", home / "corpus", "--out",
        home / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((home / "run/metrics.json").read_text())["data"] == "tst_corpus"


def test_a_suite_of_ones_own_ends_with_its_report(home, forked_kernels):
    result = run(
        "train", home / "suite.yaml", "--all", "--scale", "full", "--data", home / "corpus",
        "--jobs", "2", "--out", home / "run", "--no-progress",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    book = nbformat.read(home / "run/report.ipynb", 4)
    assert "Measured on Somebody's corpus" in book.cells[0].source
    outputs = [o for c in book.cells if c.cell_type == "code" for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3


@pytest.mark.parametrize(
    "was, becomes, said",
    [
        ("sharpness: 2.0", "sharpnes: 2.0", "unknown key 'sharpnes'; did you mean 'sharpness'?"),
        (
            "sharpness: 2.0",
            "sharpness: x",
            "fusion.sharpness: 'x' cannot be: it must be a valid num",
        ),
        ("layers: 2", "layers: two", "encoders.audio.layers: 'two' cannot be"),
        ("layers: 2, ", "", "encoders.audio.layers: is missing; it must be given"),
        ("kind: tst_mean", "kind: tst_men", "did you mean 'tst_mean'?"),
        ("kind: tst_dense", "kind: tst_dens", "encoders.audio.kind: 'tst_dens' cannot be: choose"),
        ("kind: tst_dense", "kind: r3d", "encoders.audio.kind: 'r3d' cannot be: choose 'mean'"),
        ("kind: tst_nll", "kind: mse", "mse cannot teach emotion; choose cross_entropy or tst_nll"),
        ("kind: tst_scores", "kind: regression", "emotion needs classes or tst_scores"),
        ("[my_parts.py]", "[my_part.py]", "plugins: there is no file"),
        ("[my_parts.py]", "[no_such_module]", "plugins: there is no module 'no_such_module'"),
        ("plugins: [my_parts.py]", "plugins: 3", "plugins: 3 cannot be: it must be a valid list"),
    ],
)
def test_what_is_wrong_with_a_part_of_ones_own_is_one_line(home, was, becomes, said):
    load_recipe(home / "mine.yaml")
    (home / "wrong.yaml").write_text(MINE.replace(was, becomes, 1))
    result = run("show", home / "wrong.yaml")
    assert result.exit_code == 1 and said in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "code, said",
    [
        ("1 / 0", "fails with ZeroDivisionError: division by zero"),
        ("import no_such_thing", "needs no_such_thing, which is not installed"),
        ("def (", "fails with SyntaxError"),
        (
            "from mmemo.core.registry import register_fusion as r\n@r('gated')\nclass A: pass",
            "the fusion 'gated' is there already (from mmemo.models.fusion:GatedFusion)",
        ),
        (
            "from mmemo.core.registry import register_fusion as r\n@r('tst_other')\nclass A: pass\n"
            "@r('tst_other')\nclass B: pass",
            "the fusion 'tst_other' is there already",
        ),
        (
            "from mmemo.core.registry import register_encoder as r\nr('a', print, takes='sound')",
            "unknown takes 'sound'",
        ),
    ],
)
def test_a_plugin_that_cannot_be_is_one_line(home, code, said):
    (home / "my_parts.py").write_text(code)
    with pytest.raises(ConfigError) as error:
        load_recipe(home / "mine.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_name_twice_is_refused_and_a_cell_can_be_run_again(home):
    load_plugins(["my_parts.py"], home)
    (home / "copy.py").write_text(PLUGIN)
    with pytest.raises(
        ConfigError, match="'tst_mean' is there already .from mmemo_plugin_my_parts"
    ):
        load_plugins(["copy.py"], home)
    for _ in range(2):

        @register_fusion("tst_other")
        class Again:
            pass

    assert FUSION_REGISTRY["tst_other"].load() is Again


def test_a_run_of_a_stranger_runs_no_code(home):
    "The recipe that a run left behind names a file: nobody loads it unasked."
    (home / "bad.py").write_text("raise SystemExit('code was run')")
    form = load_recipe("simple_cnn", "smoke").model_dump() | {"plugins": [str(home / "bad.py")]}
    (home / "run").mkdir()
    (home / "run/recipe.json").write_text(json.dumps(form))
    (home / "run/run.json").write_text("{}")
    with pytest.raises(DataError, match="bad.py is not loaded, and code is not run unasked"):
        evaluate_run(home / "run")


def test_a_recipe_with_plugins_goes_to_another_process(home):
    recipe = load_recipe(home / "mine.yaml")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert load_recipe("fine_tune").model_dump().get("plugins") is None
    (home / "shown.yaml").write_text(recipe.text())
    assert load_recipe(home / "shown.yaml") == recipe
    assert load_suite(home / "suite.yaml").experiments == {"own": "mine", "gated": "theirs"}


def test_protocols_and_trackers_of_ones_own(home):
    @register_protocol("tst_thirds")
    def thirds(recipe, items):
        from mmemo.experiments.results import Fold

        rows = [list(range(k, len(items), 3)) for k in range(3)]
        return {"one": Fold(*(items[part] for part in rows[:2]), {"test": items[rows[2]]})}

    class Kept(list):
        name = "tst_list"

        def log(self, values, step):
            self.append(step)

        def finish(self):
            self.append("finished")

    kept = Kept()
    register_tracker("tst_list", lambda folder, step, about: kept)
    form = load_recipe("fine_tune", "smoke").model_dump()
    form["corpus"].update(items=30, knobs={"items_per_speaker": 2})
    form["evaluation"].update(resamples=100, xray=False, protocol="tst_thirds")
    form["plan"]["epochs"] = 1
    recipe = Recipe.model_validate(form)
    assert list(recipe_folds(recipe, recipe_items(recipe))) == ["one"]
    check_track(["tst_list"], None)
    assert open_trackers(["tst_list"], None, 0, {}) == [kept]
    _, metrics = train_recipe(recipe, home / "run", track=("tst_list",))
    assert metrics["protocol"] == "tst thirds" and kept[-1] == "finished" and len(kept) > 2
    form["evaluation"]["protocol"] = "tst_third"
    (home / "own.yaml").write_text(yaml.safe_dump(form))
    with pytest.raises(ConfigError, match="protocol: 'tst_third' cannot.*mean 'tst_thirds'"):
        load_recipe(home / "own.yaml")


def test_a_head_gets_what_it_predicts():
    head = check_part(REGISTRIES["heads"], {"kind": "classes", "classes": 3, "hidden": 4})
    assert build_head(head, 8, ())(torch.zeros(2, 8)).shape == (2, 3)
