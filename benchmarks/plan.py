"""What is measured, in which order: parts of settings and providers, and the cases that a session times in turn.

The most valuable comes first, because a run may be bounded in time. Providers take turns within a setting, so that a
slow minute hits all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from benchmarks import operations
from benchmarks.results import row_name
from benchmarks.settings import Setting, sweep, unique

DENSE = ("published", "reference")
OURS = ("gcng", "gcng-no-extension")
PLAIN = ("pml n-pairs", "pml multi-similarity, memory")
COMPILING = ("flex_attention", "cut-cross-entropy")  # peers that go through torch.compile on a CPU
SAMPLES = (40, 80, 160, 320, 640)
EMBEDDING_SIZES = (64, 128, 512)
CLASSES = (100, 1000, 11_318, 100_000)
MODELS = tuple(name for name in operations.OPERATIONS if name != "iteration")


@dataclass(frozen=True)
class Entry:
    """One operation at one setting, by some providers.

    Args:
        providers: names, or () for all that the operation has but the compiled ones.
        rounds: timed calls of each provider at most; seconds: after which no further round starts (two always run).
    """

    operation: str
    setting: Setting
    providers: tuple[str, ...] = ()
    precision: str = "float32"
    rounds: int = 9
    seconds: float = 15.0

    @property
    def name(self) -> str:
        """Name of its row."""
        return row_name(self.operation, self.setting, self.precision)


@dataclass(frozen=True)
class Case:
    """One timed call of a provider; ``round`` counts the turns, ``entry`` says what takes turns with it."""

    entry: Entry
    provider: str
    round: int

    def identifier(self) -> str:
        """The test id."""
        return f"{self.entry.setting.name}-{self.entry.precision}-{self.provider.replace(' ', '_')}-{self.round}"


def providers_of(entry: Entry) -> tuple[str, ...]:
    """The providers of an entry, in the operation's order."""
    known = operations.load(entry.operation).providers
    if entry.providers:
        return tuple(name for name in known if name in entry.providers)
    return tuple(name for name in known if not name.endswith("-compiled"))


def cases_of(entries: Iterable[Entry]) -> list[Case]:
    """All timed calls, interleaved within each entry."""
    return [
        Case(entry, name, turn) for entry in entries for turn in range(entry.rounds) for name in providers_of(entry)
    ]


def default_entries(operation: str) -> list[Entry]:
    """What `pytest benchmarks` measures without a plan: one small setting."""
    return [Entry(operation, operations.load(operation).small, rounds=3)]


def _iterations(settings: Iterable[Setting], providers=(*DENSE, *OURS), **options) -> list[Entry]:
    return [Entry("iteration", s, tuple(providers), **options) for s in settings]


def cpu_plan() -> dict[str, list[Entry]]:
    """Parts of the CPU measurement by name, most valuable first."""
    narrow, base, wide = Setting(1, 64, 160), Setting(1, 128, 160), Setting(1, 512, 160)
    every, compiled = (*DENSE, *OURS, *PLAIN), ("published", "published-compiled", "reference", *OURS)
    scaled = sweep(base, embedding_size=(64, 256), num_layers=(2, 3), samples_per_class=(4, 8))
    few = ("published", "gcng")  # where a call takes a quarter of a minute
    known = {
        "first": [Entry("iteration", wide, every, rounds=5, seconds=240)],
        "wall": [
            *_iterations([replace(base, samples=80)], compiled),
            *_iterations(sweep(base, samples=SAMPLES[:-1])),
            *_iterations(sweep(wide, samples=(80, 40))),
            *_iterations([replace(wide, samples=320)], (*DENSE, "gcng"), rounds=2),
            *_iterations([replace(base, samples=640)], few, rounds=2),
        ],
        "layers": [
            *_iterations([replace(base, samples=n, num_layers=2) for n in (80, 160, 320)], (*DENSE, "gcng"), rounds=2),
            *_iterations([replace(wide, samples=n, num_layers=2) for n in (80, 160, 320)], (*DENSE, "gcng"), rounds=2),
        ],
        "ops": [
            *(Entry(name, wide) for name in MODELS),
            *(Entry(name, base, _everything(name), seconds=8) for name in MODELS),
        ],
        "classes": [
            *(Entry("class_cross_entropy", s, seconds=8) for s in sweep(Setting(1, 128, 1024), classes=CLASSES)),
            *_iterations(sweep(replace(base, samples=80), classes=CLASSES[1:]), seconds=10),
        ],
        "scaling": _iterations(scaled, OURS, seconds=6),
        "grid": [
            *(Entry(name, s, _not_compiled(name), seconds=4) for name in MODELS for s in sweep(base, samples=SAMPLES)),
            *_iterations(sweep(narrow, samples=SAMPLES), seconds=4),
            *(
                Entry(name, s, _not_compiled(name), seconds=3)
                for name in MODELS
                for s in sweep(narrow, samples=SAMPLES)
            ),
        ],
        "large": [
            Entry("retrieval", Setting(1, 128, 16_384), (*OURS, "faiss")),
            *_iterations([replace(base, samples=1024)], (*DENSE, "gcng"), rounds=2),
            *_iterations([replace(wide, samples=640)], (*DENSE, "gcng"), rounds=2),
            *(Entry(n, s, _not_compiled(n), rounds=3, seconds=4) for n in MODELS for s in sweep(wide, samples=SAMPLES)),
        ],
    }
    return _each_once(known)


def gpu_plan() -> dict[str, list[Entry]]:
    """Parts of the GPU measurement by name: the table of the targets first."""
    base = Setting(1, 512, 1024)
    ours = {"precision": "bfloat16", "seconds": 10.0}
    wall = [Setting(1, 512, n) for n in (80, 256, 512)]
    known = {
        "first": _iterations([base], OURS, **ours),
        "targets": [
            *_iterations([Setting(1, 512, 4096)], ("gcng", "gcng-recompute"), **ours),
            *_iterations([Setting(1, 512, n) for n in (2048, 8192)], ("gcng",), **ours),
            *_iterations([Setting(1, 512, 4096, classes=11_318)], ("gcng",), **ours),
            *_iterations([Setting(1, 512, 80)], (*DENSE, "gcng"), **ours),
            Entry("class_cross_entropy", Setting(1, 512, 32_768, classes=131_072), _fused(), **ours),
        ],
        "wall": [
            *_iterations(wall, (*DENSE, "gcng"), precision="tf32"),
            *_iterations(wall, (*DENSE, "gcng"), precision="float32"),
            *_iterations(wall, ("gcng",), **ours),
            *_iterations([Setting(1, 512, 16_384)], ("gcng-recompute",), rounds=2, **ours),
        ],
        "ops": [
            Entry(name, setting, precision="bfloat16", seconds=5)
            for name in MODELS
            for setting in (Setting(1, 512, 256), Setting(1, 512, 1024))
        ],
        "scaling": _iterations(
            sweep(base, embedding_size=(128, 256, 384, 768, 1024), num_layers=(2,), samples_per_class=(4, 8)),
            OURS,
            **ours,
        ),
    }
    return _each_once(known)


def smoke_plan() -> dict[str, list[Entry]]:
    """Every operation at its tiny size, one round, without what has to be compiled first: does everything run?"""
    return {
        "smoke": [
            Entry(name, operations.load(name).tiny, _not_compiled(name), rounds=1) for name in operations.OPERATIONS
        ]
    }


def shrunk(parts: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Every entry of a plan at a tiny size, one round: how a plan is rehearsed on another machine."""
    return _each_once({part: [_tiny(entry) for entry in entries] for part, entries in parts.items()})


def _tiny(entry: Entry) -> Entry:
    tiny, setting = operations.load(entry.operation).tiny, entry.setting
    samples = max(tiny.samples, 2 * setting.samples_per_class)
    kept = {"num_layers": setting.num_layers, "samples_per_class": setting.samples_per_class}
    providers = tuple(name for name in providers_of(entry) if name in _not_compiled(entry.operation))
    return replace(entry, setting=replace(tiny, samples=samples, **kept), providers=providers, rounds=1, seconds=1.0)


def _not_compiled(operation: str) -> tuple[str, ...]:
    names = operations.load(operation).providers
    return tuple(name for name in names if not name.endswith("-compiled") and name not in COMPILING)


def _everything(operation: str) -> tuple[str, ...]:
    return tuple(operations.load(operation).providers)


def _fused() -> tuple[str, ...]:
    return ("gcng", "gcng-no-extension", "chunked torch", "cut-cross-entropy", "liger")


def _each_once(parts: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """A row belongs to the first entry that names it."""
    first: dict[str, Entry] = {}
    for entries in parts.values():
        for entry in entries:
            first.setdefault(entry.name, entry)
    return {part: [one for one in unique(entries) if first[one.name] is one] for part, entries in parts.items()}


def dump(entries: Iterable[Entry]) -> list[dict]:
    """Entries as JSON."""
    return [asdict(entry) for entry in entries]


def load(stored: Iterable[dict]) -> list[Entry]:
    """Entries written by `dump`."""
    return [
        Entry(**{**one, "setting": Setting(**one["setting"]), "providers": tuple(one["providers"])}) for one in stored
    ]
