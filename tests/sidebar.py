"""The sidebar of the web site, made from the notebooks that are there.

`python tests/sidebar.py` (or `make sidebar`) writes it into `_quarto.yml`, below the marker. A new
lesson finds its place by its number and, in the workshop, by the layer of its module.
"""

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
MARKER = "  # made by `make sidebar` from here to the end\n"
LAYERS = (
    "core",
    "data",
    "synthetic",
    "models",
    "training",
    "evaluation",
    "diagnostics",
    "experiments",
    "serving",
    "cli",
)
# Folders of numbered lessons, and the numbers that they may use: first and last.
RANGES = {"course": (0, 19), "electives": (20, 99), "workshop": (100, 199)}
# Groups of electives, and the last number of each.
ELECTIVES = {
    "Fusion and robustness": 25,
    "People and protocols": 30,
    "Raw media and fine-tuning": 37,
    "Stability": 44,
    "Understanding and shipping": 99,
}
ELSEWHERE = {46: "People and protocols"}  # lessons that belong to another group than their number


def list_notebooks(folder: str = "") -> list[Path]:
    "Every notebook below `nbs/` or one folder of it, in the order of folders and numbers."
    found = (ROOT / "nbs" / folder).rglob("*.ipynb")
    paths = [path for path in found if ".ipynb_checkpoints" not in path.parts]
    return sorted(paths, key=lambda path: (path.parent, lesson_number(path) or 0, path.name))


def lesson_number(path: Path) -> int | None:
    "The number that a notebook's name begins with; None where it has none."
    found = re.match(r"(\d\d\d?)_", path.name)
    return int(found[1]) if found else None


def notebook_code(path: Path) -> str:
    "All code cells of a notebook, one below the other."
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def exported_modules(path: Path) -> list[str]:
    "The modules that a notebook names as its export, e.g. ['models.lora']."
    return re.findall(r"^#\s*\|\s*default_exp\s+([\w.]+)", notebook_code(path), re.M)


def make_section(name: str, paths: list[Path]) -> dict:
    "One section of the sidebar."
    return {
        "section": name,
        "contents": [path.relative_to(ROOT).as_posix() for path in paths],
    }


def elective_group(path: Path) -> str:
    "The group of electives that a number belongs to."
    number = lesson_number(path)
    if number in ELSEWHERE:
        return ELSEWHERE[number]
    return next(name for name, last in ELECTIVES.items() if number is not None and number <= last)


def workshop_layer(path: Path) -> str:
    "The layer of the module that a notebook of the workshop builds."
    modules = exported_modules(path)
    return modules[0].split(".")[0] if modules else "no module"


def make_sidebar() -> list:
    "The whole sidebar, as Quarto reads it."
    electives, workshop = list_notebooks("electives"), list_notebooks("workshop")
    groups = [
        make_section(name, [path for path in electives if elective_group(path) == name])
        for name in ELECTIVES
    ]
    layers = [
        make_section(name, [path for path in workshop if workshop_layer(path) == name])
        for name in (*LAYERS, "no module")
    ]
    return [
        "nbs/index.ipynb",
        make_section("Course", list_notebooks("course")),
        {"section": "Electives", "contents": [group for group in groups if group["contents"]]},
        {"section": "Workshop", "contents": [layer for layer in layers if layer["contents"]]},
        make_section("Runs", list_notebooks("runs")),
    ]


def site_text() -> str:
    "`_quarto.yml` as it should be: what stands above the marker, and the sidebar."
    head = (ROOT / "_quarto.yml").read_text().split(MARKER)[0]
    sidebar = {"sidebar": {"style": "floating", "contents": make_sidebar()}}
    made = yaml.safe_dump(sidebar, sort_keys=False, allow_unicode=True, width=100)
    indented = "".join(f"  {line}\n" for line in made.splitlines())
    return head + MARKER + indented


if __name__ == "__main__":
    (ROOT / "_quarto.yml").write_text(site_text())
