"""The tables of docs/results.md say what the committed results say, and the speed driver ends with readable ones."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "benchmarks" / "speed"


@contextlib.contextmanager
def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


@pytest.fixture(scope="module")
def overview():
    with script(ROOT / "benchmarks" / "overview.py") as module:
        yield module


@pytest.fixture(scope="module")
def driver():
    with script(SPEED / "tables.py"), script(SPEED / "run.py") as module:
        yield module


@pytest.mark.parametrize("table", ["goals", "accuracy_goals", "speed", "claims"])
def test_tables_are_those_of_the_results(overview, table):
    committed = (ROOT / "docs" / "results" / f"{table}.md").read_text()
    assert committed == getattr(overview, table)(), "run python benchmarks/overview.py"


def test_goals_are_judged_by_their_bounds(overview, monkeypatch, tmp_path):
    (tmp_path / "made_up.json").write_text(json.dumps({"rows": {"ours": {"wall_ratio": 2.0}}}))
    monkeypatch.setattr(overview, "RESULTS", tmp_path)
    page = "calibration/temperature_scaling"
    cases = ((2.5, False, "met"), (1.5, False, "missed"), (1.5, True, "met"), (2.5, True, "missed"))
    goals = [overview.Goal("x", "made_up", bound, overview.ratio("ours"), page, least) for bound, least, _ in cases]
    goals.append(overview.Goal("x", "made_up", 1, overview.ratio("theirs"), page))
    goals.append(overview.Goal("x", "absent", 1, overview.ratio("ours"), page))
    monkeypatch.setattr(overview, "GOALS", goals)
    rows = [[cell.strip() for cell in line.split("|")] for line in overview.goals().splitlines()[2:]]
    assert [row[4] for row in rows] == [verdict for _, _, verdict in cases] + ["", ""]
    assert [row[3] for row in rows] == ["2"] * 4 + ["not measured"] * 2


def test_every_claim_study_is_in_the_table(overview):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if list(overview.said(json.loads(path.read_text()))):
            assert path.stem in overview.STUDIES, f"{path.name} has verdicts; name its page in STUDIES"


REPORT = {
    "environment": {
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "9.9"},
        "cpu": "abacus",
        "threads": 1,
    },
    "batch": "2 x 3 x 8 x 8",
    "rounds": 3,
    "accuracies": {},
    "rows": {
        "ten passes": {"wall_ms": 10.0, "wall_ratio": 1.0, "cpu_ratio": 1.0, "peak_mib": 4.2},
        "ours": {
            "wall_ms": 12.5,
            "wall_ratio": 1.25,
            "cpu_ratio": 1.5,
            "wall_spread": {"median": 1.3, "quartiles": [1.2, 1.4]},
            "peak_mib": None,
        },
    },
}

# Stands for a speed script: "good" writes a report with a peer left out, "bad" fails, "slow" does not come back.
SCRIPT = """
import json, pathlib, sys, time
report = json.loads(pathlib.Path(__file__).with_name("report.json").read_text())
print("a last word")
if "bad" in sys.argv:
    raise SystemExit(3)
if "slow" in sys.argv:
    time.sleep(60)
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(report))
"""


def test_a_speed_table_is_built_from_its_result_alone(driver, tmp_path):
    (tmp_path / "speed_robustness.json").write_text(json.dumps(REPORT | {"left_out": {"foolbox": "not installed"}}))
    lines = driver.tables.aligned(driver.tables.family(tmp_path, "Robustness")).splitlines()
    heads = ["attack", "time, of ten passes", "median (quartiles)", "CPU time, of ten passes", "ms", "memory, MiB"]
    columns = [lines[2].index(head) for head in heads]
    cells = [line[a:b].strip() for line in lines[4:6] for a, b in zip(columns, [*columns[1:], None], strict=True)]
    assert cells == [
        "ten passes",
        "1.00",
        "",
        "1.00",
        "10.0",
        "4",
        "ours",
        "1.25",
        "1.30 (1.20 – 1.40)",
        "1.50",
        "12.5",
        "",
    ]
    assert all(
        word in lines[-1] for word in ("abacus", "1 thread,", "torch 9.9", "foolbox (not installed)", "3 rounds")
    )
    assert "Not measured yet" in driver.tables.family(tmp_path, "Distillation")


def test_every_part_has_a_script_and_a_family(driver):
    assert set(driver.ARGUMENTS) == set(driver.tables.PARTS)
    for part in driver.ARGUMENTS:
        assert (SPEED / f"{part}.py").exists()


@pytest.mark.processes
def test_the_speed_driver_goes_on_after_a_failure_and_says_what_is_missing(driver, monkeypatch, tmp_path, capsys):
    (tmp_path / "report.json").write_text(
        json.dumps(REPORT | {"left_out": {"foolbox": "not installed"}, "samples": 2, "classes": 2})
    )
    for part in ("hessian", "robustness", "h_calibration"):
        (tmp_path / f"{part}.py").write_text(SCRIPT)
    monkeypatch.setattr(driver, "HERE", tmp_path)
    monkeypatch.setattr(
        driver, "ARGUMENTS", {"hessian": ("bad", ""), "robustness": ("", ""), "h_calibration": ("", "")}
    )
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out)])
    assert driver.main() == 1
    said = capsys.readouterr().out
    assert "hessian failed: exit status 3" in said
    assert "a last word" in said
    assert "robustness without foolbox: not installed" in said
    assert sorted(path.name for path in out.iterdir()) == [
        *("speed_h_calibration.json", "speed_h_calibration.md", "speed_robustness.json", "speed_robustness.md")
    ]
    report = json.loads((out / "speed_robustness.json").read_text())
    assert report["rows"] == REPORT["rows"]
    assert report["run"]["seconds"] > 0
    assert "The whole process" in (out / "speed_robustness.md").read_text()


@pytest.mark.processes
def test_a_part_that_hangs_is_ended(driver, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "part.py").write_text(SCRIPT)
    report, why = driver.measure(tmp_path / "part.py", ["slow"], minutes=0.01)
    assert report is None
    assert "over 0.01 minutes" in why


def test_only_a_recent_result_of_the_same_arguments_counts_as_done(driver):
    date = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    report = REPORT | {"environment": {"date": date}, "run": {"arguments": ["--rounds", "3"]}}
    assert driver.is_done(report, ["--rounds", "3"], hours=3)
    assert not driver.is_done(report, ["--rounds", "3"], hours=1)
    assert not driver.is_done(report, ["--rounds", "2"], hours=3)
    assert not driver.is_done(REPORT, [], hours=1e6)
    assert not driver.is_done(None, [], hours=3)
