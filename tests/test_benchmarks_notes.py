"""Notes of stages below half of their roof: none is missing from a results file that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import details, notes
from benchmarks.results import load_all

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
SHIPPED = [one for one in load_all() if one[1]["stages"]]


@pytest.mark.parametrize(("name", "results"), SHIPPED, ids=[name for name, _ in SHIPPED])
def test_a_shipped_stage_below_half_of_its_roof_has_a_note(name, results):
    missing = notes.missing(results, details.roof_share, notes.read())
    assert not missing, f"{name}: write into {notes.FILE.name} why {missing} are below half, and what would move them"


def test_the_documents_say_no_note_yet_nowhere():
    assert notes.NO_NOTE not in (DOCUMENTS / "benchmarks.md").read_text(encoding="utf-8")


def test_the_stage_without_a_note_is_named():
    shares = {"edges": 0.49, "messages": 0.5, "rest": None, "unknown": 0.1}
    stages = {name: {"share": share} for name, share in shares.items()}
    one = {"provider": "gcng", "name": "N8", "stages": stages}
    results = {"machine": {}, "stages": [one, {**one, "provider": "gcng-no-extension"}]}

    def share(results, one, stage):
        return stage["share"]

    assert notes.missing(results, share, {"edges": "why"}) == ["unknown"]
    assert notes.missing(results, share, {}) == ["edges", "unknown"]
    assert notes.missing({**results, "machine": {"gpu": "x"}}, share, {}) == []
