"""Why a stage is below half of its roof, and what would move it: the notes of notes.toml that the results call for."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

FILE = Path(__file__).parent / "notes.toml"
ENOUGH = 0.5  # share of the roof above which a stage needs no note
NO_NOTE = "no note yet"


def read(path: Path = FILE) -> dict[str, str]:
    """Stage -> its note, in words.

    Raises:
        ValueError: an entry that does not hold ``why`` and ``moves``, and nothing else.
    """
    found = {}
    for stage, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
        if not isinstance(entry, dict) or set(entry) != {"why", "moves"}:
            raise ValueError(f"{path.name}: [{stage}] must hold why and moves, and nothing else")
        found[stage] = f"{entry['why']} What would move it: {entry['moves'][0].lower()}{entry['moves'][1:]}"
    return found


def below(results: dict, share: Callable[[dict, dict, dict], float | None]) -> dict[str, list[str]]:
    """Stage -> its shares below ENOUGH by setting, of gcng as installed; ``share`` takes results, setting and stage."""
    found: dict[str, list[str]] = {}
    for one in results["stages"]:
        for name, stage in one["stages"].items() if one["provider"] == "gcng" else ():
            reached = share(results, one, stage)
            if reached is not None and reached < ENOUGH:
                found.setdefault(name, []).append(f"{100 * reached:.0f} % at {one['name']}")
    return found


def missing(results: dict, share: Callable[[dict, dict, dict], float | None], known: dict[str, str]) -> list[str]:
    """Stages below ENOUGH without a note: none in a file that is shipped."""
    return [] if _unspoken(results) else [stage for stage in below(results, share) if stage not in known]


def _unspoken(results: dict) -> bool:
    """Whether the notes do not speak of this machine."""
    return "gpu" in results["machine"]


def lines(results: dict, share: Callable[[dict, dict, dict], float | None], known: dict[str, str]) -> str:
    """The notes as a list; nothing for a GPU, whose stages the notes do not speak of."""
    if _unspoken(results):
        return ""
    found = below(results, share)
    items = [f"- `{name}` ({', '.join(shares)}): {known.get(name, NO_NOTE)}" for name, shares in found.items()]
    return "\n".join(["Below half of their roof (`benchmarks/notes.toml`):", "", *items]) if items else ""
