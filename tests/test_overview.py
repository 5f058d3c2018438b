"""The tables of docs/results.md say what the committed results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def overview():
    spec = importlib.util.spec_from_file_location("overview", ROOT / "benchmarks" / "overview.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("table", ["goals", "claims"])
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
