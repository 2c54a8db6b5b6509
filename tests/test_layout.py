"""The shape of the house.

Modules import from their own layer or from layers to the left; notebooks lie in the folder of their
number; the site lists each of them once; the package is what the notebooks export.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath

import pytest
import yaml
from sidebar import (
    LAYERS,
    RANGES,
    exported_modules,
    lesson_number,
    list_notebooks,
    notebook_code,
    site_text,
)

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmemo"
NOTEBOOKS = list_notebooks()
COURSE = list_notebooks("course")
EXPORTING = [path for path in NOTEBOOKS if exported_modules(path)]

MODULE_LINES = 460  # as ruff formats them
LINE_LENGTH = 100
COMPREHENSION_DEPTH = 2
PARAMETERS = 7
MANY_PARAMETERS = {
    # typer reads a command's options from its parameters
    "cli.train_command",
}


def dotted(path: Path) -> str:
    "The module of a file: mmemo/models/lora.py is models.lora, mmemo/models/__init__.py is models."
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "_modidx.py")
# written by hand: the package itself, its layers, and `python -m mmemo`
BY_HAND = [path for path in SOURCES if path.name in ("__init__.py", "__main__.py")]
MODULES = {dotted(path): path for path in SOURCES if path not in BY_HAND}
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}


def imported_names(path: Path, node: ast.AST) -> list[str]:
    "What one piece of code takes from the package, dotted: core.batch.Stream, models.lora."
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            # one dot is the folder of the file itself
            folder = path.relative_to(ROOT).parent.parts
            parts = folder[: len(folder) - (node.level - 1)]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        names = [f"{base}.{alias.name}" for alias in node.names]
    elif (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("__import__", "import_module", "importlib.import_module")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        names = [str(node.args[0].value)]
    elif isinstance(node, ast.Attribute):
        # behind `import mmemo`: mmemo.fit
        names = [ast.unparse(node)]
    else:
        return []
    inside = [name for name in names if name.startswith("mmemo.")]
    # the package's version is nobody's module
    return [n.removeprefix("mmemo.") for n in inside if n != "mmemo.__version__"]


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere: at its top, inside functions, and
    for type checkers only. "" is the package itself.
    """
    found = set()
    for node in ast.walk(TREES[path]):
        for name in imported_names(path, node):
            parts = name.split(".")
            starts = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
            known = [start for start in starts if start in MODULES or start in LAYERS]
            found.add(known[0] if known else "")
    return found


def layer_of(module: str) -> int:
    return LAYERS.index(module.split(".")[0])


def test_modules_import_from_their_own_layer_or_from_layers_to_the_left():
    for path in SOURCES:
        module = dotted(path)
        if module in ("", "__main__"):
            continue
        for used in sorted(imported_modules(path)):
            assert used, f"{module} imports the package itself, or a module that is not there"
            assert layer_of(used) <= layer_of(module), (
                f"{module} imports {used}, which lies in a layer to the right of it"
            )


def test_no_module_imports_itself_by_a_detour():
    uses = {module: imported_modules(path) & set(MODULES) for module, path in MODULES.items()}
    done = set()

    def follow(module: str, way: tuple[str, ...]):
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for used in sorted(uses[module]):
            follow(used, (*way, module))
        done.add(module)

    for module in sorted(uses):
        follow(module, ())


def public_names(tree: ast.Module) -> list[str]:
    "The names in a module's `__all__`."
    names = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            names += ast.literal_eval(node.value)
    return names


def test_public_names_are_unique_in_the_package():
    homes = defaultdict(list)
    for module, path in MODULES.items():
        for name in public_names(TREES[path]):
            homes[name].append(module)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    assert not twice


def test_numbers_of_notebooks_are_unique_and_lie_in_the_range_of_their_folder():
    numbers = Counter(n for path in NOTEBOOKS if (n := lesson_number(path)) is not None)
    assert [n for n, count in numbers.items() if count > 1] == []
    for folder, (first, last) in RANGES.items():
        for path in list_notebooks(folder):
            assert path.parent.name == folder, f"{path} lies in a folder of a folder"
            number = lesson_number(path)
            assert number is not None and first <= number <= last, (
                f"{path.name} lies in nbs/{folder}, whose numbers are {first:02} to {last}"
            )
    elsewhere = [path for path in NOTEBOOKS if path.parent.name not in (*RANGES, "runs")]
    assert [path.name for path in elsewhere] == ["index.ipynb"]


def test_every_module_comes_from_one_notebook_and_knows_its_size():
    sources = defaultdict(list)
    for path in EXPORTING:
        assert len(exported_modules(path)) == 1, f"{path.name} names two modules"
        sources[exported_modules(path)[0]].append(path.name)
        # `#| export other.module` would make it a second one
        assert not re.search(r"^#\s*\|\s*exporti?[ \t]+\S", notebook_code(path), re.M), path.name
    assert {module: found for module, found in sources.items() if len(found) > 1} == {}
    assert set(MODULES) == set(sources)
    for path in NOTEBOOKS:
        if path not in EXPORTING:
            assert not re.search(r"^#\s*\|\s*export", notebook_code(path), re.M), (
                f"{path.name} exports, but names no module"
            )
    for module, path in MODULES.items():
        text = path.read_text()
        assert "AUTOGENERATED" in "".join(text.splitlines()[:10]), f"{module} is not exported"
    sizes = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in sizes.items() if lines > MODULE_LINES} == {}


def test_notebooks_import_only_modules_that_are_there():
    for path in NOTEBOOKS:
        for used in set(re.findall(r"(?:from|import)\s+mmemo\.([\w.]+)", notebook_code(path))):
            assert used in MODULES or used in LAYERS, (
                f"{path.name} imports mmemo.{used}, which no notebook exports"
            )


def long_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > LINE_LENGTH]


def test_no_line_of_code_is_over_100_characters():
    found = {}
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        found[str(path.relative_to(ROOT))] = long_lines(path.read_text())
    for path in NOTEBOOKS:
        found[str(path.relative_to(ROOT))] = long_lines(notebook_code(path))
    assert {name: lines for name, lines in found.items() if lines} == {}


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def deepest_comprehension(node: ast.AST) -> int:
    "How many comprehensions stand inside of each other."
    inside = max((deepest_comprehension(child) for child in ast.iter_child_nodes(node)), default=0)
    return inside + isinstance(node, COMPREHENSIONS)


def test_comprehensions_are_nested_at_most_two_levels():
    for path in SOURCES:
        for statement in ast.walk(TREES[path]):
            if isinstance(statement, COMPREHENSIONS):
                assert deepest_comprehension(statement) <= COMPREHENSION_DEPTH, (
                    f"{dotted(path)}, line {statement.lineno}"
                )


def named_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    "The parameters of a function that a caller can name."
    args = function.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_functions_take_at_most_seven_parameters():
    many = {}
    for path in SOURCES:
        for node in ast.walk(TREES[path]):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if (count := len(named_parameters(node))) > PARAMETERS:
                    many[f"{dotted(path)}.{node.name}"] = count
    assert {name: count for name, count in many.items() if name not in MANY_PARAMETERS} == {}
    assert MANY_PARAMETERS <= set(many), "a name in MANY_PARAMETERS is no longer needed: remove it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_ready_to_read(path):
    nb = json.loads(path.read_text())
    for cell in nb["cells"]:
        source, where = "".join(cell["source"]), f"{path.name}: {''.join(cell['source'])[:60]!r}"
        assert not re.search(r"^#\s*\|\s*export:", source, re.M), (
            f"{where}: export with a colon swallows the next line"
        )
        assert "!pip" not in source and "%pip" not in source and "nbdev_export()" not in source, (
            where
        )
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", f"{where} ends in an error"
            assert output.get("name") != "stderr", f"{where} keeps noise of the error stream"
            assert not re.search(r"\d+%\|", json.dumps(output.get("text", ""))), (
                f"{where} keeps a progress bar"
            )
            assert not re.search(
                rf"(/home/|/root/|/Users/|/tmp/|{re.escape(str(ROOT))})",
                json.dumps(output.get("text", ""))
                + json.dumps(output.get("data", {}).get("text/plain", "")),
            ), f"{where}: its output carries a path of some machine"
    assert "widgets" not in nb["metadata"], (
        f"{path.name} keeps the state of a widget, whose ids differ from run to run"
    )
    assert path.stat().st_size < 2_500_000, f"{path.name} is too heavy to read on the web"


def prose(path: Path) -> str:
    "The text of a notebook or a page, without code, which may look like a link."
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.S)
    return re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "", text)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *sorted(ROOT.glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose(path)):
        if not re.match(r"https?:|mailto:|attachment:", link):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_each_lesson_of_the_course_leads_to_the_next():
    for path, following in zip(COURSE, [*COURSE[1:], None]):
        last = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown"]
        line = "".join(last[-1]["source"]).strip().splitlines()[-1]
        found = re.match(r"\*\*Next:\*\* \[[^]]+\]\(([^)]+)\)", line)
        assert found, f"{path.name} does not end with a line **Next:** [lesson](file)"
        assert following is None or found[1] == following.name, f"{path.name}: {line}"


def test_the_site_lists_every_notebook_once():
    text = (ROOT / "_quarto.yml").read_text()
    site = yaml.safe_load(text)
    listed = re.findall(r"nbs/[\w/]+\.ipynb", yaml.safe_dump(site["website"]["sidebar"]))
    assert sorted(listed) == sorted(set(listed)), "a notebook is listed twice"
    there = {path.relative_to(ROOT).as_posix() for path in NOTEBOOKS}
    assert set(listed) == there, "run make sidebar"
    assert text == site_text(), "run make sidebar"
    for name in there:
        rendered = [p for p in site["project"]["render"] if PurePosixPath(name).match(p)]
        assert rendered, f"{name} is in the sidebar, but no pattern renders it"
    settings = dict(re.findall(r"^(\w+) *= *(.*)$", (ROOT / "settings.ini").read_text(), re.M))
    assert (
        site["project"]["output-dir"] == settings["doc_path"]
        and site["execute"]["enabled"] is False
    )


def test_exporting_the_notebooks_gives_the_package(tmp_path):
    "`make export` on a copy: the modules that come out are the modules that are there."
    unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "mmemo"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unwanted)
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    # what a notebook does not write again must not be there afterwards
    for path in MODULES.values():
        (tmp_path / path.relative_to(ROOT)).unlink()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for command in (
        ["nbdev_clean"],
        ["nbdev_export"],
        ["ruff", "check", "-q", "--select", "I", "--fix", "mmemo"],
        ["ruff", "format", "-q", "mmemo"],
    ):
        program = Path(sys.executable).parent / command[0]
        subprocess.run([str(program), *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    made = {p.relative_to(tmp_path) for p in (tmp_path / "mmemo").rglob("*.py")}
    there = {p.relative_to(ROOT) for p in PACKAGE.rglob("*.py")}
    assert made == there
    for path in sorted(made):
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), (
            f"{path} is not what its notebook exports: run make export"
        )
    for path in sorted((tmp_path / "nbs").rglob("*.ipynb")):
        assert json.loads(path.read_text()) == json.loads(
            (ROOT / path.relative_to(tmp_path)).read_text()
        ), f"{path.name} is not clean: run make export"


def test_the_package_imports_without_notebooks_or_transformers():
    heavy = (
        "transformers",
        "IPython",
        "jupyter_core",
        "matplotlib",
        "pandas",
        "datasets",
        "sklearn",
        "torchmetrics",
        "papermill",
        "nbdev",
    )
    modules = [module for module in (*MODULES, *LAYERS) if module != "cli"]
    modules = [m for m in modules if m in MODULES or (PACKAGE / m).is_dir()]
    script = (
        f"import sys, torch\nfor m in {modules}: __import__('mmemo.' + m)\nprint([m for m in"
        f" {heavy} if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_nothing_in_the_package_unpickles():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in (
                    "pickle.load",
                    "pickle.loads",
                    "joblib.load",
                    "pd.read_pickle",
                    "pandas.read_pickle",
                ), f"{path.name}: {call}"
                named = {keyword.arg: keyword.value for keyword in node.keywords}
                for keyword in node.keywords:
                    assert not (
                        keyword.arg == "allow_pickle" and getattr(keyword.value, "value", True)
                    ), f"{path.name}: allow_pickle"
                    assert not (
                        keyword.arg == "weights_only"
                        and getattr(keyword.value, "value", False) is False
                    ), f"{path.name}: weights_only=False"
                    assert not (
                        keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", True)
                    ), f"{path.name}: trust_remote_code"
                assert call != "torch.load" or "weights_only" in named, (
                    f"{path.name}: torch.load without weights_only"
                )


def from_the_root(text: str) -> str:
    "The index notebook as Markdown, its links read from the repository's root."
    lines, code = [], False
    for line in text.splitlines():
        code ^= line.startswith("```")
        if not code:
            line = re.sub(r"\]\((?!https?:|\.\./)", "](nbs/", line)
            line = re.sub(r"\]\(\.\./", "](", line)
        lines.append(line)
    return "\n".join(lines)


def test_the_readme_is_the_index_notebook():
    from nbconvert import MarkdownExporter

    text = from_the_root(MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))[0])
    assert (ROOT / "README.md").read_text().strip() == text.strip(), (
        "README.md is not nbs/index.ipynb: run make readme"
    )
    for link in re.findall(r"\]\(([^)#]+)\)", prose(ROOT / "README.md")):
        assert link.startswith("http") or (ROOT / link).exists(), (
            f"README links to {link}, which is not there"
        )
