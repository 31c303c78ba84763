"""Every example runs, learns, leaves nothing behind, and is short."""

from __future__ import annotations

import os
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Example -> the number that it prints again and again and that training lowers.
FALLING = {
    "plain_loop.py": r"'n_pair': ([\d.]+)",
    "two_phases.py": r"'n_pair': ([\d.]+)",
    "gradient_accumulation.py": r"loss ([\d.]+)",
    "mixed_precision.py": r"loss ([\d.]+), scale 65536",
    "own_extractor.py": None,
}


def examples():
    return sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_every_example_is_checked():
    assert examples() == sorted(FALLING)


@pytest.mark.parametrize("name", examples())
def test_example_is_under_40_lines(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) < 40


@pytest.mark.parametrize("name", examples())
def test_example_runs_and_learns(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads cost more than they give at these sizes
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "nan" not in shown and os.listdir(tmp_path) == []
    if FALLING[name] is None:
        recall = re.fullmatch(r"Recall@1 ([\d.]+) after 20 steps\n", shown)
        assert float(recall[1]) > 0.5
    else:
        values = [float(value) for value in re.findall(FALLING[name], shown)]
        assert len(values) >= 3 and values[-1] < values[0]
