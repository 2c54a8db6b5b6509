"""Runs from the command line: what they leave behind, and how they fail."""

import inspect
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from typer.testing import CliRunner

from mmemo import __version__
from mmemo.cli import app, check_command, list_command, train_command
from mmemo.core.errors import ConfigError, DataError
from mmemo.core.registry import REGISTRIES
from mmemo.experiments.catalogue import KNOWN_ANSWER
from mmemo.experiments.notebooks import execute_notebook, run_notebooks
from mmemo.experiments.recipe import load_recipe
from mmemo.experiments.run import missing_numbers, run_provenance, write_metrics

ROOT = Path(__file__).resolve().parent.parent


def in_a_process(*words: str) -> subprocess.CompletedProcess:
    "A new Python with these words, and every import that it makes on its error stream."
    return subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def imported(done: subprocess.CompletedProcess) -> set[str]:
    "The top packages that such a process imported."
    return set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE))


def write_run(path: Path, code: str) -> None:
    "A run notebook with one cell."
    parameters = nbformat.v4.new_code_cell(
        'scale: str = "laptop"\nseed: int = 0\nout: str = "x"', metadata={"tags": ["parameters"]}
    )
    nb = nbformat.v4.new_notebook(
        cells=[parameters, nbformat.v4.new_code_cell(code)],
        metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}
        },
    )
    nbformat.write(nb, path)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A folder with two run notebooks: one that measures, one that breaks."
    runs = tmp_path / "nbs" / "runs"
    runs.mkdir(parents=True)
    good = (
        "from mmemo.experiments.run import write_metrics\nwrite_metrics(out, dict(steps=3,"
        ' seed=seed, scale=scale, tables=[dict(title="T", columns=["model", "RMSE"],'
        ' rows=[["static", "3.5"]])]))'
    )
    for name, code in (("good", good), ("bad", "1 / 0")):
        write_run(runs / f"{name}.ipynb", code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_shows_its_table_and_where_its_results_are(checkout):
    result = CliRunner().invoke(app, ["run", "good", "--scale", "smoke", "--seed", "5"])
    assert (
        result.exit_code == 0
        and "static" in result.output
        and "3.5" in result.output
        and "_runs/good/good.ipynb" in result.output
    )
    assert json.loads((checkout / "_runs/good/metrics.json").read_text())["seed"] == 5


def test_a_run_that_breaks_is_one_message_and_leaves_no_old_numbers(checkout):
    (checkout / "_runs/bad").mkdir(parents=True)
    (checkout / "_runs/bad/metrics.json").write_text("{}")
    result = CliRunner().invoke(app, ["run", "bad"])
    assert (
        result.exit_code == 1
        and "ZeroDivisionError" in result.output
        and "Traceback" not in result.output
    )
    assert (
        not (checkout / "_runs/bad/metrics.json").exists()
        and (checkout / "_runs/bad/bad.ipynb").exists()
    )


def in_a_terminal(words: list[str], stop_at: str = "") -> tuple[str, int]:
    """What a command shows in a terminal of 120 columns, and its exit code; Ctrl-C is pressed as
    soon as it has shown `stop_at`.
    """
    pty, fcntl, termios = (pytest.importorskip(n) for n in ("pty", "fcntl", "termios"))
    above, below = pty.openpty()
    fcntl.ioctl(below, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    done = subprocess.Popen(
        [sys.executable, "-m", "mmemo", *words],
        stdin=below,
        stdout=below,
        stderr=below,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(below)
    shown = ""
    while True:
        try:
            data = os.read(above, 65536).decode(errors="replace")
        except OSError:
            break
        if not data:
            break
        shown += data
        if stop_at and stop_at in shown:
            os.write(above, b"\x03")
            stop_at = ""
    os.close(above)
    return shown, done.wait()


def test_a_run_shows_its_lines_at_once_and_how_far_it_is(checkout):
    write_run(
        checkout / "nbs/runs/long.ipynb",
        "import json, time\n"
        "from mmemo.experiments.notebooks import tell_progress\n"
        "print('the first')\n"
        "tell_progress(1, 3, 'lora seed 0', 65)\n"
        "time.sleep(3)\n"
        "print('the second')\n"
        "open(out + '/metrics.json', 'w').write('{}')",
    )
    shown, code = in_a_terminal(["run", "long"])
    assert code == 0
    first, bar, second = (shown.index(w) for w in ("the first", "1/3", "the second"))
    assert first < bar < second
    assert re.search(r"1/3 \d\d:\d\d, lora seed 0, about 1:05 left", shown)
    assert not (checkout / "_runs/long/progress.json").exists()


def test_a_run_that_is_stopped_says_one_line(checkout):
    write_run(checkout / "nbs/runs/long.ipynb", "import time\nprint('begun')\ntime.sleep(100)")
    shown, code = in_a_terminal(["run", "long"], stop_at="begun")
    assert code == 130
    after = shown.split("^C")[-1]
    assert "stopped; the same command goes on" in after and "Traceback" not in after


def test_unknown_runs_and_scales_name_the_choices(checkout):
    for words, said in (
        (["run", "stairs"], "bad, good"),
        (["run", "good", "--scale", "huge"], "smoke, laptop or full"),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1 and said in result.output
    with pytest.raises(ConfigError, match="stairs"):
        execute_notebook("stairs", checkout)
    assert set(run_notebooks()) == {"good", "bad"}


@pytest.mark.parametrize(
    "metrics, said",
    [
        (dict(steps=1, rmse=float("nan")), "metrics.rmse"),
        (dict(steps=1, rungs=[dict(a=1), dict(a=None)]), r"metrics.rungs\[1\].a"),
        (dict(steps=1, x=float("inf")), "metrics.x"),
        (dict(rmse=1.0), "no training step"),
        (dict(steps=0), "no training step"),
    ],
)
def test_a_missing_number_fails_the_run_and_writes_nothing(tmp_path, metrics, said):
    with pytest.raises(DataError, match=said):
        write_metrics(tmp_path / "out", metrics)
    assert not (tmp_path / "out").exists()


def test_provenance_says_where_a_number_comes_from():
    known = run_provenance(seed=3)
    assert (
        known["seed"] == 3
        and known["versions"]["torch"]
        and known["threads"] >= 1
        and known["peak_memory_gb"] > 0
        and missing_numbers(known) == []
    )


def test_help_names_the_command():
    assert (
        "run" in CliRunner().invoke(app, ["--help"]).output
        and "--scale" in CliRunner().invoke(app, ["run", "--help"]).output
    )


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--help"], 0, "Commands:"),
        (["list"], 0, "fusion_ablation"),
        (["list", "fusions"], 0, "cross_attention"),
        (["show", "fine_tune"], 0, "bert-base-uncased"),
        (["show", "fine_tun"], 1, "did you mean 'fine_tune'"),
        (["train", "fine_tune", "--sclae", "smoke"], 2, "did you mean --scale"),
    ],
)
def test_what_needs_no_model_imports_no_torch(words, code, said):
    done = in_a_process("-m", "mmemo", *words)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert not imported(done) & {"torch", "transformers", "matplotlib", "pandas", "sklearn"}


def test_help_imports_no_more_than_typer_needs():
    assert not imported(in_a_process("-m", "mmemo", "--help")) & {"rich", "pydantic", "numpy"}


@pytest.mark.parametrize("module", ["mmemo", "mmemo.cli"])
def test_the_command_is_a_module_too(module):
    done = in_a_process("-m", module, "--version")
    assert done.returncode == 0 and done.stdout == f"mmemo {__version__}\n"
    done = in_a_process("-m", module, "lisst")
    assert done.returncode == 2 and "did you mean list" in done.stderr


def test_a_notebook_does_not_start_the_command():
    nb = json.loads((ROOT / "nbs" / "workshop" / "160_cli.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in nb["cells"] if cell["cell_type"] == "code"]
    (last,) = [source for source in cells if "__main__" in source]
    started = []
    # a kernel calls its cells __main__, in no package
    for package in (None, ""):
        exec(last, {"__name__": "__main__", "__package__": package, "app": started.append})
    assert not started
    module = {"__name__": "__main__", "__package__": "mmemo"}
    exec(last, module | {"app": lambda prog_name: started.append(prog_name)})
    assert started == ["mmemo"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["lst"], "there is no command 'lst'; did you mean list"),
        (["xyz"], "there is no command 'xyz'; choose from run, list, show"),
        (["--verison"], "no such option: --verison; did you mean --version?"),
        (["train", "fine_tune", "--sclae", "smoke"], "did you mean --scale or --seed?"),
        (["train", "fine_tune", "--seed", "one"], "'--seed'"),
        (["train", "fine_tune", "--seed", "-1"], "'--seed'"),
        (["show"], "missing argument 'recipe' (see mmemo show --help)"),
        (["show", "fine_tune", "more"], "(more) (see mmemo show --help)"),
        (["show", "fine_tune", "--scale"], "'--scale' requires an argument"),
    ],
)
def test_what_is_typed_wrong_is_one_line_and_exit_code_2(words, said):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and said in result.stderr and not result.stdout
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_help_is_short_and_long_and_what_no_words_mean():
    long = CliRunner().invoke(app, ["--help"])
    assert long.exit_code == 0 and "evaluate" in long.stdout
    for words in (["-h"], []):
        short = CliRunner().invoke(app, words)
        assert short.exit_code == 0 and short.stdout.strip() == long.stdout.strip()
    one, other = (CliRunner().invoke(app, ["train", word]).stdout for word in ("-h", "--help"))
    assert one == other and "--no-progress" in one


def test_things_of_a_kind_are_listed():
    for kind, registry in REGISTRIES.items():
        listed = CliRunner().invoke(app, ["list", kind])
        assert listed.exit_code == 0 and all(name in listed.stdout for name in registry)
        assert kind in inspect.signature(list_command).parameters["kind"].default.help
    wrong = CliRunner().invoke(app, ["list", "fusion"])
    assert wrong.exit_code == 1 and "did you mean 'fusions'" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_an_interrupted_command_ends_with_130(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmemo.experiments.run.evaluate_run", stop)
    result = CliRunner().invoke(app, ["evaluate", "somewhere"])
    assert result.exit_code == 130 and "the same command goes on" in result.stderr


def test_the_data_of_a_command_is_the_known_answer_corpus_unless_told():
    for command in (train_command, check_command):
        assert inspect.signature(command).parameters["data"].default.default == KNOWN_ANSWER


def test_recipes_are_listed_shown_and_walked(tmp_path):
    listed = CliRunner().invoke(app, ["list"])
    assert listed.exit_code == 0 and all(
        name in listed.output
        for name in ("fine_tune", "fine_tune_v1", "configurable_multimodal", "bert-base-uncased")
    )
    (tmp_path / "own.yaml").write_text(
        CliRunner().invoke(app, ["show", "fine_tune_v1", "--scale", "laptop"]).stdout
    )
    assert load_recipe(tmp_path / "own.yaml", "laptop") == load_recipe("fine_tune_v1", "laptop")
    walked = CliRunner().invoke(
        app,
        ["walk", "fine_tune", "--scale", "smoke", "--tokens", "9", "--steps", "31", "--items", "3"],
    )
    assert (
        walked.exit_code == 0
        and "B=3 L=9 H=192" in walked.output
        and "B=3 T=31 F=74" in walked.output
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["show", "fine_tun"], "did you mean 'fine_tune'"),
        (
            ["train", "fine_tune", "--scale", "huge"],
            "unknown scale 'huge'; choose full, smoke, laptop",
        ),
        (["walk", "not/there.yaml"], "cannot be read"),
        (["evaluate", "not/there"], "is this the folder of a run"),
        (
            ["train", "fine_tune", "--scale", "full", "--out", "x"],
            "weights 'bert-base-uncased' could not be had",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert (
        result.exit_code == 1
        and said in result.output
        and len(result.output.strip().splitlines()) == 1
        and result.output.startswith("error: ")
    )
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_trained_and_measured_again_from_its_folder(tmp_path):
    form = load_recipe("fine_tune", "smoke").model_dump()
    form["corpus"].update(items=32, knobs={"items_per_speaker": 1})
    form["evaluation"].update(resamples=100, xray=False)
    form["plan"]["epochs"] = 1
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(form))
    trained = CliRunner().invoke(
        app,
        [
            "train",
            str(tmp_path / "own.yaml"),
            "--scale",
            "smoke",
            "--seed",
            "3",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    again = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert (
        trained.exit_code == again.exit_code == 0
        and "phq8 rmse" in again.stdout
        and again.stdout in trained.stdout
    )
    assert json.loads((tmp_path / "run/metrics.json").read_text())["seed"] == 3


def test_a_recipe_is_checked_before_it_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("MMEMO_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(app, ["check", "multimodal_fer", "--scale", "smoke", "--branches"])
    assert result.exit_code == 0, result.output
    assert (
        "0 wrong" not in result.output
        and "✗" not in result.output
        and "✓ eight by heart" in result.output
        and "audio only" in result.output
    )
    form = load_recipe("multimodal_fer", "smoke").model_dump()
    form["plan"]["lr"] = {"encoders.*": 0.0, "*": 0.001}
    (tmp_path / "still.yaml").write_text(yaml.safe_dump(form))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "still.yaml"), "--scale", "smoke"])
    assert result.exit_code == 1 and "✗ rates" in result.output
    result = CliRunner().invoke(
        app, ["check", "multimodal_fer", "--data", str(tmp_path / "nowhere")]
    )
    assert (
        result.exit_code == 1
        and "there is no folder" in result.output
        and "Traceback" not in result.output
    )
