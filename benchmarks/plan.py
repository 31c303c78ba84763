"""The order of the timings: providers take turns within a setting, so that a slow minute hits all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.settings import PROVIDERS, Setting

DEFAULT_REPEATS = 3


@dataclass(frozen=True)
class Case:
    """One timed call: a provider ("gemm" is the yardstick product) at a setting, in one round.

    `providers` are all providers of the setting that fit in memory, `truth` is the one that runs in float64
    for the closeness gate.
    """

    setting: Setting
    provider: str
    round: int
    providers: tuple[str, ...]
    truth: str

    def identifier(self) -> str:
        """The test id."""
        return f"{self.setting.name}-{self.provider}-{self.round}"


def cases_of(setting: Setting, providers: Iterable[str], truth: str, repeats: int) -> list[Case]:
    """All timed calls of a setting, interleaved."""
    fitting = tuple(providers)
    turns = (*fitting, "gemm")
    return [Case(setting, name, turn, fitting, truth) for turn in range(repeats) for name in turns]


def default_plan() -> list[Case]:
    """What `pytest benchmarks` runs without a plan: one small setting."""
    return cases_of(Setting(1, 128, 80), PROVIDERS, "published", DEFAULT_REPEATS)


def dump_plan(settings: list[tuple[Setting, tuple[str, ...], str]], repeats: int) -> dict:
    """A plan as JSON: per setting the providers that fit and the provider of the truth."""
    rows = [
        {"setting": s.as_dict(), "providers": list(names), "truth": truth} for s, names, truth in settings
    ]
    return {"repeats": repeats, "settings": rows}


def load_plan(plan: dict) -> list[Case]:
    """The cases of a plan written by `dump_plan`."""
    return [
        case
        for row in plan["settings"]
        for case in cases_of(Setting(**row["setting"]), row["providers"], row["truth"], plan["repeats"])
    ]
