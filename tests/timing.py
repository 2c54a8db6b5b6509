"""Long tests start first, and the end of a run says what each kind of test took.

What a worker is handed whole is called a unit here: one notebook, or one file of unit tests, whose
shared fixtures are then made once. `durations.json` holds the processor seconds of each unit, as a
run with `--record-durations` saw them; a unit that it lacks starts first.
"""

import json
import math
import resource
from collections import Counter
from pathlib import Path

import pytest

DURATIONS = Path(__file__).resolve().parent / "durations.json"
KINDS = ["unit tests", "layout", "lessons", "papermill"]
STARTED = pytest.StashKey[float]()


def unit_of(nodeid: str) -> str:
    file = nodeid.split("::")[0]
    return nodeid if file.endswith("test_notebooks.py") else file


def kind_of(nodeid: str) -> str:
    file, _, test = nodeid.partition("::")
    if file.endswith("test_notebooks.py"):
        return "lessons" if test.startswith("test_lesson_runs") else "papermill"
    return "layout" if file.endswith("test_layout.py") else "unit tests"


def short(unit: str) -> str:
    "The notebook, or the file, or the test."
    return unit.split("/")[-1].split("::")[-1].split("[")[-1].rstrip("]")


def cpu_seconds() -> float:
    "Processor seconds of this process and of those it has waited for."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Timing:
    "A pytest plugin. Every process orders and measures tests; the one that reports adds up."

    def __init__(self, record: bool):
        self.record = record
        self.tests = Counter()
        self.units = Counter()
        self.cpu = Counter()
        self.wall = Counter()
        self.imports = []
        self.without_corpora = 0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        recorded = json.loads(DURATIONS.read_text()) if DURATIONS.is_file() else {}
        items.sort(key=lambda item: -recorded.get(unit_of(item.nodeid), math.inf))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        "With `--dist loadscope` a free worker gets the next unit, in the order of collection."
        if config.getoption("dist") != "loadscope":
            return None
        from xdist.scheduler import LoadScopeScheduling

        class UnitScheduling(LoadScopeScheduling):
            def _split_scope(self, nodeid):
                return unit_of(nodeid)

        config.option.loadscopereorder = False
        return UnitScheduling(config, log)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        item.stash[STARTED] = cpu_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.when == "teardown":
            report.user_properties.append(("test_cpu", cpu_seconds() - item.stash[STARTED]))
        if report.skipped and "corpora_root" in item.fixturenames:
            report.user_properties.append(("without_corpora", True))
        return report

    def pytest_runtest_logreport(self, report):
        "Reports come from the workers, too; a test is counted with the last of its three."
        kind, told = kind_of(report.nodeid), dict(report.user_properties)
        self.wall[kind] += report.duration
        self.without_corpora += "without_corpora" in told and report.skipped
        if report.when == "teardown":
            cpu = told["test_cpu"] + told.get("lesson_cpu", 0)
            self.tests[kind] += 1
            self.cpu[kind] += cpu
            self.units[unit_of(report.nodeid)] += cpu
            if "server_cpu" in told:
                self.imports.append(told["server_cpu"])

    def pytest_terminal_summary(self, terminalreporter):
        if not self.tests:
            return
        write = terminalreporter.write_line
        terminalreporter.section("what it took")
        write(f"{'':<12}{'tests':>8}{'processor':>12}{'all workers':>14}")
        for kind in filter(self.tests.get, KINDS):
            tests, cpu, wall = self.tests[kind], self.cpu[kind], self.wall[kind]
            write(f"{kind:<12}{tests:>8}{cpu:>10.0f} s{wall:>12.0f} s")
        if self.imports:
            cpu = sum(self.imports)
            write(
                f"{'imports':<12}{'':>8}{cpu:>10.0f} s, in {len(self.imports)} servers of lessons"
            )
        longest = [f"{short(unit)} {cpu:.0f} s" for unit, cpu in self.units.most_common(8)]
        write(f"longest: {', '.join(longest)}")
        if self.without_corpora:
            write(f"{self.without_corpora} tests skipped: they need real corpora (set MMEMO_DATA)")
        if self.record:
            recorded = {unit: round(cpu, 1) for unit, cpu in sorted(self.units.items())}
            DURATIONS.write_text(json.dumps(recorded, indent=1) + "\n")
