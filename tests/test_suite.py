"""Suites: only what is not done is run, by one process or several, and one report compares it."""

import json
from dataclasses import replace

import folders
import nbformat
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mmemo.cli import app
from mmemo.core.errors import ConfigError, DataError
from mmemo.data.interviews import TRANSCRIPT_OFFSETS
from mmemo.evaluation.metrics import compare
from mmemo.experiments import suite as suite_module
from mmemo.experiments.recipe import load_recipe, load_suite, merge_forms, pick_experiments
from mmemo.experiments.report import (
    by_experiment,
    compare_experiments,
    read_answers,
    read_runs,
    results_table,
)
from mmemo.experiments.run import train_recipe
from mmemo.experiments.suite import SuiteChoice, SuiteOutput, run_suite, suite_cells
from mmemo.synthetic.known_answer import known_answer
from mmemo.synthetic.lookalike import write_daicwoz

TINY = """
base: emotion2vec_text
name: tiny
about: Two fusions of almost nothing.
seeds: 2
corpus: {items: 96, knobs: {items_per_speaker: 6}}
encoders: {text: {weights: mmemo-tiny, width: 8}, audio: {width: 8}}
fusion: {width: 8}
heads: {emotion: {hidden: 8}}
plan: {epochs: 1, batch_size: 16}
evaluation: {resamples: 100, protocol: split}
scales: null
experiments:
  concat: {about: side by side}
  gated: {about: through gates, fusion: {kind: gated, width: 8, dropout: 0.1}}
"""

ONE_SEED = SuiteChoice(seeds=1)


@pytest.fixture(scope="module")
def done(tmp_path_factory, lesson_server):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch, lesson_server.forked_kernels():
        patch.setenv("MMEMO_CACHE", str(folder / "cache"))
        [one] = suite_cells(
            folder / "tiny.yaml", folder / "run", "full", SuiteChoice(["2"], seeds=1)
        )
        train_recipe(one.recipe, one.folder, seed=one.seed)
        before = (one.folder / "metrics.json").stat().st_mtime_ns
        result = CliRunner().invoke(
            app,
            [
                "train",
                str(folder / "tiny.yaml"),
                "--all",
                "--scale",
                "full",
                "--jobs",
                "2",
                "--out",
                str(folder / "run"),
                "--no-progress",
            ],
        )
        assert (
            result.exit_code == 0 and "gated" in result.output and "report.html" in result.output
        ), result.output
        # what was done is not done again
        assert (one.folder / "metrics.json").stat().st_mtime_ns == before
        yield folder


def test_a_suite_is_what_its_experiments_change(tmp_path):
    suite = load_suite("multimodal_baseline")
    assert (
        len(suite.experiments) == 6
        and suite.seeds == 3
        and pick_experiments(suite, ["2", "everything"]) == ["curriculum", "everything"]
        and pick_experiments(suite, []) == list(suite.experiments)
    )
    with pytest.raises(
        ConfigError, match="unknown experiment 'curiculum'; did you mean 'curriculum'"
    ):
        pick_experiments(suite, ["curiculum"])
    plain, all_of_it = (
        load_recipe("multimodal_baseline", "laptop", e) for e in ("plain", "everything")
    )
    differ = {k for k, v in plain.model_dump().items() if all_of_it.model_dump()[k] != v}
    assert differ == {"name", "about", "curriculum", "speakers"}
    assert {
        load_recipe("fusion_ablation", "full", e).fusion.kind
        for e in load_suite("fusion_ablation").experiments
    } == {"concat", "gated", "adaptive", "cross_attention"}
    assert load_recipe("audio_only").encoders.names == ("audio",) and load_recipe(
        "text_only"
    ).encoders.names == ("text",)
    assert merge_forms(
        {"a": {"kind": "x", "b": 1}, "c": {"d": 1, "e": 2}},
        {"a": {"kind": "y", "f": 2}, "c": {"d": 3}},
    ) == {"a": {"kind": "y", "f": 2}, "c": {"d": 3, "e": 2}}
    (tmp_path / "bad.yaml").write_text(
        TINY.replace("through gates, fusion: {kind: gated", "through gates, fusion: {kind: gate")
    )
    with pytest.raises(
        ConfigError, match="bad.yaml: fusion.kind: 'gate' cannot be.*did you mean 'gated'"
    ):
        load_suite(tmp_path / "bad.yaml")


def test_published_plan_of_the_audio_text_system():
    r = load_recipe("emotion2vec_text")
    assert (r.plan.optimiser, r.plan.lr, r.plan.schedule, r.plan.batch_size, r.plan.epochs) == (
        "adam",
        9e-3,
        "cosine",
        64,
        30,
    )
    assert (
        r.encoders.audio.size,
        r.fusion.width,
        r.heads["emotion"].hidden,
        r.heads["emotion"].classes,
    ) == (768, 512, 1024, 4)
    c = load_recipe("multimodal_baseline", experiment="everything").curriculum
    assert (c.epochs, c.pacing, c.dropout) == (15, "sqrt", [0.1, 0.6]) and c.scaling > 0


def test_runs_and_report_lie_where_they_are_looked_for(done):
    suite, runs = read_runs(done / "run")
    assert suite.name == "tiny" and [(r.experiment, r.seed) for r in runs] == [
        ("concat", 0),
        ("gated", 0),
        ("concat", 1),
        ("gated", 1),
    ]
    book = nbformat.read(done / "run/report.ipynb", 4)
    pictures = [
        o
        for c in book.cells
        if c.cell_type == "code"
        for o in c.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 3 and not any(
        o.output_type == "error" for c in book.cells if c.cell_type == "code" for o in c.outputs
    )
    html, metrics = (
        (done / "run/report.html").read_text(),
        json.loads((done / "run/metrics.json").read_text()),
    )
    assert "image/png" in html and "COVAREP" in html and str(done) not in html
    assert (
        [row[0] for row in metrics["tables"][0]["rows"]] == ["concat", "gated"]
        and metrics["runs"] == 4
        and metrics["steps"] > 0
        and metrics["notes"]
    )


def test_the_difference_is_paired_over_people_and_averaged_over_seeds(done):
    grouped = by_experiment(read_runs(done / "run")[1])
    a, b = read_answers(grouped["concat"]), read_answers(grouped["gated"])
    assert (
        (a.id == b.id).all()
        and len(a.id) == len(set(a.id))
        and len(a.said) == len(b.said) == 2
        and compare_experiments({"concat": a, "gated": b})["concat"] is None
    )
    found = compare_experiments({"concat": a, "gated": b})["gated"]
    assert found == compare(b.said, a.said, a.label, a.speaker, "uar")
    assert (found.seeds, found.people) == (2, len(set(a.speaker)))
    hits = [np.mean(said.argmax(1) == v.label) for v in (a, b) for said in v.said]
    row = results_table(read_runs(done / "run")[1])["rows"]
    assert (
        row[0][1] == f"{np.mean(hits[:2]):.3f} ± {np.std(hits[:2], ddof=1):.3f}"
        and row[1][1] == f"{np.mean(hits[2:]):.3f} ± {np.std(hits[2:], ddof=1):.3f}"
    )


def test_a_run_that_fails_is_named_and_the_others_are_finished(done, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(done / "cache"))
    real = suite_module.train_recipe

    def breaks(recipe, folder, *rest):
        if recipe.fusion.kind == "concat":
            raise DataError("no luck")
        return real(recipe, folder, *rest)

    monkeypatch.setattr(suite_module, "train_recipe", breaks)
    with pytest.raises(DataError, match="1 of 2 runs failed: concat, seed 0: DataError: no luck"):
        run_suite(
            done / "tiny.yaml",
            done / "other",
            "full",
            choice=ONE_SEED,
            output=SuiteOutput(progress=False),
        )
    assert (done / "other/gated/seed-0/metrics.json").is_file() and not (
        done / "other/report.html"
    ).exists()


def test_what_cannot_be_is_one_line(done, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words, said in (
        (
            ["train", "fusion_ablation"],
            "is a suite: say --all, or --experiment with one of 1 concat, 2 gated",
        ),
        (["train", "fine_tune", "--all"], "is one recipe and no suite"),
        (["train", "fusion_ablation", "--experiment", "9"], "unknown experiment '9'"),
        (["train", "fine_tune", "--features", "x.npz"], "no encoder of utterance features"),
        (
            ["train", "fine_tune", "--scale", "smoke", "--track", "mlflow"],
            "there is no tracker 'mlflow'",
        ),
    ):
        result = CliRunner().invoke(app, words)
        assert (
            result.exit_code == 1
            and said in result.output
            and len(result.output.strip().splitlines()) == 1
        ), result.output
    with pytest.raises(ConfigError, match="holds another run .seed differ"):
        [
            replace(c, seed=5).done("known-answer")
            for c in suite_cells(done / "tiny.yaml", done / "run", "full", ONE_SEED)
        ]


@pytest.mark.filterwarnings("ignore:.*remarks on the data")
@pytest.mark.parametrize("corpus", ["ravdess", "daicwoz"])
def test_a_suite_on_a_real_corpus_ends_with_its_report(
    tmp_path, monkeypatch, forked_kernels, corpus
):
    "The report knows what every corpus is called that a run can be given."
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    if corpus == "ravdess":
        clips = [f"03-01-{e:02d}-01-01-01-{a:02d}" for a in range(1, 25) for e in (1, 3, 5)]
        home, title = folders.write_ravdess(tmp_path / "r", clips), "RAVDESS"
        base, task = "multimodal_fer_lite", "emotion"
    else:
        home, title = tmp_path / "d", "DAIC-WOZ"
        base, task = "fine_tune", "phq8"
        sessions = [i for i in range(300, 340) if str(i) not in TRANSCRIPT_OFFSETS][:12]
        given = known_answer(12, 5, items_per_speaker=1)
        write_daicwoz(given, home, hog=False, sessions=sessions)
    form = load_recipe(base, "smoke").model_dump() | {"name": "real", "scale": "full", "seeds": 1}
    form["plan"].update(epochs=1)
    form["evaluation"].update(resamples=100, protocol="split", xray=False)
    form["experiments"] = {
        "one": {"about": "as it is"},
        "gated": {"about": "gates", "fusion": {"kind": "gated", "width": 8, "dropout": 0.0}},
    }
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(form))
    run_suite(tmp_path / "real.yaml", tmp_path / "run", "full", home, output=SuiteOutput(False, ()))
    book = nbformat.read(tmp_path / "run/report.ipynb", 4)
    assert f"Measured on {title}, scale full, split." in book.cells[0].source
    assert task == read_answers(read_runs(tmp_path / "run")[1][:1]).task
