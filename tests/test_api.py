"""`import mmemo as mm`: every public name, light to import, shown in the README by an example."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mmemo as mm

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(mm.PUBLIC)

# names that one cannot search for: every program has functions called so
FORBIDDEN = {"answers", "data", "items", "objective", "pick", "plan", "report", "table"}


def fresh(code: str, *options: str, check: bool = True) -> subprocess.CompletedProcess:
    "What a new process prints that runs `code`."
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_the_object_of_its_module(name):
    home = import_module(f"mmemo.{mm.PUBLIC[name]}")
    assert getattr(mm, name) is getattr(home, name)
    assert getattr(mm, name).__module__ == home.__name__, "the table names where it is made"
    assert name in home.__all__


def test_type_checkers_see_the_same_names_from_the_same_modules():
    tree = ast.parse((ROOT / "mmemo" / "__init__.py").read_text())
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert len(blocks) == 1
    seen = {}
    for line in blocks[0].body:
        assert isinstance(line, ast.ImportFrom) and line.level == 1
        for alias in line.names:
            # only `X as X` is handed on to those who import the package
            assert alias.asname == alias.name
            seen[alias.name] = line.module
    assert seen == mm.PUBLIC


def test_all_and_dir_have_every_name():
    assert {*mm.PUBLIC, *mm.LAYERS, "__version__"} <= set(dir(mm))
    assert set(mm.__all__) == {*mm.PUBLIC, "__version__"}
    said = fresh("from mmemo import *; print(*sorted(n for n in dir() if n[0] != '_'))").stdout
    assert said.split() == sorted(mm.PUBLIC)


def test_the_layers_are_attributes_too():
    folders = {
        p.parent.name
        for p in (ROOT / "mmemo").glob("*/__init__.py")
        if any(p.parent.glob("[!_]*.py"))
    }
    assert {*mm.LAYERS} == folders | {"cli"}
    said = fresh("import mmemo; print(mmemo.core.__name__, mmemo.models.__name__)").stdout
    assert said.split() == ["mmemo.core", "mmemo.models"]
    assert fresh("import mmemo.core.errors; print(mmemo.core.errors.DataError)").stdout


def test_importing_mmemo_imports_nothing_heavy():
    code = "import sys; import mmemo; print(*(m for m in sys.modules if m.split('.')[0] in"
    code += " ('mmemo', 'torch', 'numpy', 'typer', 'pydantic')))"
    assert fresh(code).stdout.split() == ["mmemo"]


@pytest.mark.parametrize(
    "wrong, near", [("Strem", "Stream"), ("known_anser", "known_answer"), ("modells", "models")]
)
def test_a_wrong_name_is_told_with_the_near_ones(wrong, near):
    with pytest.raises(AttributeError, match=f"has no attribute '{wrong}'; did you mean .*{near}"):
        getattr(mm, wrong)
    assert not hasattr(mm, wrong)


def test_a_wrong_name_that_is_like_nothing_says_where_to_look():
    with pytest.raises(AttributeError, match="lists the names"):
        mm.xyzzy  # noqa: B018
    with pytest.raises(AttributeError, match="'__wrapped__'$"):
        mm.__wrapped__  # noqa: B018
    # Python's own hint would be the second
    told = fresh("import mmemo as mm; mm.Strem", check=False).stderr
    assert told.lower().count("did you mean") == 1


def test_the_version_is_that_of_the_settings_and_survives_an_export(tmp_path, monkeypatch):
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert mm.__version__ == settings["DEFAULT"]["version"]

    config = pytest.importorskip("nbdev.config")
    monkeypatch.chdir(ROOT)
    copy = Path(shutil.copy(ROOT / "mmemo" / "__init__.py", tmp_path))
    before = copy.read_text()
    config.update_version(tmp_path)
    assert copy.read_text() == before


def test_public_functions_have_names_that_can_be_searched_for():
    for path in sorted((ROOT / "mmemo").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.name not in FORBIDDEN, f"{path.name}, line {node.lineno}: {node.name}"


def examples() -> str:
    "The Python of the README's section between its two marks, as one program."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"<!-- examples: begin -->(.*)<!-- examples: end -->", readme, re.DOTALL)
    assert section, (
        "README.md has no section between <!-- examples: begin --> and <!-- examples: end -->; it"
        " is made from nbs/index.ipynb, and shows each public name at work"
    )
    return "\n".join(
        re.findall(r"^```(?:python)?\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    )


def test_the_readme_shows_every_public_name():
    program = examples()
    missing = [name for name in NAMES if not re.search(rf"\bmm\.{name}\b", program)]
    assert not missing, f"no example uses {', '.join(missing)}"


def test_the_examples_of_the_readme_run_offline(tmp_path):
    (tmp_path / "examples.py").write_text(examples(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "examples.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "RMSE" in done.stdout and "%|" not in done.stderr
    # whatever is written lies in a temporary folder
    assert [p.name for p in tmp_path.iterdir()] == ["examples.py"]
