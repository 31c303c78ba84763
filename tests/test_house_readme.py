"""What the documents promise holds: README programs run, links lead to files, commands and targets exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gcng.cli import main

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "csrc" / "README.md"])


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs_from_top_to_bottom():
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert torch.isfinite(namespace["loss"])
    assert namespace["terms"].skipped == ""
    assert namespace["values"].shape == (40, 5)
    assert namespace["similarity"].shape == (40, 3)
    assert namespace["estimate"].peak_bytes > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_to_files_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, missing


@pytest.mark.parametrize("line", re.findall(r"^gcng .*$", "\n".join(blocks("sh")), re.MULTILINE))
def test_the_commands_of_the_readme_succeed(line, capsys):
    words = line.split("#")[0].split()
    assert main(words[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_the_make_targets_of_the_readme_exist():
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_the_extras_of_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.search(r"other extras: ([a-z, ]+)", text).group(1).split(", ")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert {*named, "train"} == set(re.findall(r"^([a-z]+) = \[", section, re.MULTILINE))


def test_every_table_and_figure_of_the_readme_is_generated_and_names_its_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    generated = dict(re.findall(r"<!-- (\w+):begin -->\n(.*?)\n<!-- \1:end -->", text, re.DOTALL))
    assert set(generated) == {"demo", "benchmark"}
    separator, picture = re.compile(r"^\|[-:| ]+\|$", re.MULTILINE), re.compile(r"^!\[", re.MULTILINE)
    for pattern, most in ((separator, 3), (picture, 2)):
        found = len(pattern.findall(text))
        assert found <= most and found == sum(len(pattern.findall(block)) for block in generated.values())
    assert "`demo/results.json`" in generated["demo"]
    parts = generated["benchmark"].split("\n\n")
    for before, part in zip(parts, parts[1:], strict=False):
        if separator.search(part) and "not measured" not in part:
            assert re.search(r"`benchmarks/results/[\w-]+\.json`", before), part.splitlines()[0]
    for line in (part for part in parts if part.startswith("![")):
        assert re.search(r"`benchmarks/results/[\w-]+\.json`", line), line
