"""Memory as a budget: what the losses may keep between forward and backward, and how large a tile is.

Plain arithmetic, no torch: ``gcng estimate`` answers before anything is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MIB = 2**20
DEFAULT_CPU_BUDGET = 640 * MIB
ITEM_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}


def parse_bytes(budget: int | float | str) -> int:
    """Bytes of ``"2GiB"``, ``"500 MB"``, ``"1.5G"`` or a number.

    Raises:
        ValueError: not a positive size. TypeError: neither a number nor a string.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float, str)):
        raise TypeError(f"memory_budget must be a number of bytes or a string, got {type(budget).__name__}")
    text = str(budget).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f'memory_budget is {budget!r}; use a number of bytes or a size such as "2GiB" or "500MB"')
    size = float(match[1]) * _UNITS[match[2].upper()]
    if not 0 < size < float("inf"):
        raise ValueError(f"memory_budget is {budget!r}; it must be positive")
    return int(size)


def format_bytes(size: float) -> str:
    """A size for people: ``1.25 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def _rounded_up(size: int) -> str:
    """A size that :func:`parse_bytes` reads, not below the one given: ``1235 MiB``."""
    return f"{-(-size // MIB)} MiB"


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept for the backward, and the tile size; the same for every op of a call."""

    pairs_per_tile: int
    stash_edges: bool = False
    stash_hidden: bool = False
    stash_small: bool = False  # gates and message pre-activations


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted peak of one phase with its backward, beyond embeddings, parameters and their gradients."""

    peak_bytes: int
    terms: dict[str, int]
    plan: MemoryPlan
    budget_bytes: int
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [f"  {name:<24} {format_bytes(size):>12}" for name, size in self.terms.items()]
        kept = [name for name in ("edges", "hidden", "small") if getattr(self.plan, f"stash_{name}")]
        rows.append(f"  {'peak':<24} {format_bytes(self.peak_bytes):>12}")
        how = f"keeps {', '.join(kept)}" if kept else "keeps nothing, recomputes"
        return "\n".join([f"{how}; tiles of {self.plan.pairs_per_tile} pairs", *rows])


def default_budget(available: int) -> int:
    """The budget of the CPU path when none is given: 640 MiB, or a quarter of what is available if that is less."""
    return max(min(DEFAULT_CPU_BUDGET, available // 4), 1)


def available_memory() -> int:
    """Bytes that this process may still allocate: free memory, cgroup and rlimits considered."""
    limits = [_meminfo(), *_cgroup(), *_rlimits()]
    return max(min(limits), 0)


def _meminfo() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 8 * 1024 * MIB  # no such file on this system: assume a small laptop


def _cgroup() -> list[int]:
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            return [] if limit == "max" else [int(limit) - int(file.read())]
    except (OSError, ValueError):
        return []


def _rlimits() -> list[int]:
    try:
        import resource

        with open("/proc/self/status", encoding="ascii") as file:
            used = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Vm")}
    except (ImportError, OSError, ValueError):
        return []
    pairs = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))
    limits = [(resource.getrlimit(kind)[0], used.get(name, 0)) for kind, name in pairs]
    return [limit - taken for limit, taken in limits if limit != resource.RLIM_INFINITY]


# Vectors of 4 D and of D numbers that one pair of a tile takes at most, in the backward of an edge layer.
_TILE_HIDDEN_ROWS, _TILE_ROWS = 4, 16
# Bytes of one (pairs, 4 D) tensor at most: on the CPU large against call overhead but not out of cache; on a GPU
# 131,072 pairs at D = 512 in 16 bits, whose work should last longer than starting it. And the shares of the budget, one
# over these, that a tile's workspace may take.
_TILE_BYTES = {"cpu": 16 * MIB, "cuda": 512 * MIB}
_TILE_SHARES = {"cpu": (10,), "cuda": (2, 4, 8, 16)}
# What is kept, in the order of matrix products saved, and the products that its absence costs: units of D^2 for a pair
# and a layer. Hidden 16, edges 36, the small ones 8.
_CHOICES = {(True, True, True): 0, (True, True, False): 8, (True, False, True): 16, (True, False, False): 24,
            (False, False, False): 60}  # fmt: skip
# What a tile costs on a GPU whatever its size, in operations of products: an iteration starts about 270 kernels for it,
# at some 20 us of the host each, while the card could do products at some 400 TFLOP/s in 16 bits, 50 in float32,
# and 25 in float64. By count: none of it was timed on a GPU.
_TILE_COST = {2: 2.2e12, 4: 2.7e11, 8: 1.4e11}


@dataclass(frozen=True)
class ItemSizes:
    """Bytes of a number: of statistics, sums and node tensors, and of what products read and stashes hold."""

    wide: int
    operand: int

    @classmethod
    def of(cls, dtype: str, device: str) -> ItemSizes:
        """For inputs of a dtype, by name: 16-bit tiles are 16 bit on a GPU, and float32 on the CPU."""
        wide = max(ITEM_SIZES[dtype], 4)
        return cls(wide, ITEM_SIZES[dtype] if device == "cuda" else wide)


def _tile_bytes_per_pair(d: int, item: ItemSizes) -> int:
    return d * (4 * _TILE_HIDDEN_ROWS * item.operand + _TILE_ROWS * item.wide)


def _terms(n: int, d: int, layers: int, samples_per_class: int, item: ItemSizes, plan: MemoryPlan) -> dict[str, int]:
    vectors = n * (n + 1) // 2 * d * item.operand
    terms = {
        "nodes": (20 + 36 * layers) * n * d * item.wide,
        "tile workspace": plan.pairs_per_tile * _tile_bytes_per_pair(d, item),
        "anchor x class": n * max(n // max(samples_per_class, 1), 1) * 9,  # float64 and a mask
    }
    if plan.stash_edges:
        terms["edges"] = layers * vectors
        terms["edge gradient"] = (1 if layers == 1 else 2) * vectors
    if plan.stash_hidden:
        terms["hidden"] = 5 * layers * vectors
    if plan.stash_small:
        terms["messages"] = layers * vectors
        terms["gates"] = vectors
    return terms


def _tile_pairs(n: int, d: int, item: ItemSizes, room: int, device: str) -> int:
    """Pairs of a tile: by the size of its hidden tensor, and with a workspace of ``room`` bytes at most."""
    wanted = _TILE_BYTES.get(device, _TILE_BYTES["cpu"]) // (4 * d * item.operand)
    fits = room // _tile_bytes_per_pair(d, item)
    return max(min(wanted, fits, n * n), min(16, n * n), 1)


def plan_memory(
    num_samples: int,
    embedding_size: int,
    num_layers: int,
    *,
    samples_per_class: int = 2,
    dtype: str = "float32",
    device: str = "cpu",
    operand: str | None = None,
    budget: int,
) -> MemoryEstimate:
    """Choose what to keep: the fastest plan whose predicted peak fits the budget.

    ``operand``: dtype that products read and stashes hold, where it is not the device's usual one for ``dtype``.

    Raises:
        MemoryError: not even recomputing everything fits; names the terms and what to change.
    """
    n, d = num_samples, embedding_size
    item = ItemSizes.of(dtype, device)
    item = item if operand is None else ItemSizes(item.wide, ITEM_SIZES[operand])
    pairs, best, least = n * (n + 1) // 2, None, None  # torch.compile traces this: plain loops and comparisons
    shares = _TILE_SHARES.get(device, _TILE_SHARES["cpu"])
    for choice, again in _CHOICES.items():
        for share in shares:
            plan = MemoryPlan(_tile_pairs(n, d, item, budget // share, device), *choice)
            terms = _terms(n, d, num_layers, samples_per_class, item, plan)
            tiles = -(-pairs // plan.pairs_per_tile) if device == "cuda" else 0
            cost = again * num_layers * pairs * d * d + tiles * _TILE_COST[item.operand]
            peak = sum(terms.values())
            # The first of equals is the one that keeps more, with the larger tile.
            if peak <= budget and (best is None or cost < best[1]):
                best = MemoryEstimate(peak, terms, plan, budget), cost
            if least is None or peak < least[0]:
                least = peak, terms
    if best is not None:
        return best[0]
    peak, terms = least
    listing = ", ".join(f"{name} {format_bytes(size)}" for name, size in terms.items())
    # With more budget a tile takes more too, unless it is the smallest one.
    fixed = peak - terms["tile workspace"]
    enough = max(peak, -(-fixed * shares[-1] // (shares[-1] - 1)))
    raise MemoryError(
        f"gcng: N = {n}, D = {d}, L = {num_layers} needs {format_bytes(peak)} ({listing}) but memory_budget is "
        f"{format_bytes(budget)}; raise memory_budget to at least {_rounded_up(enough)}, or use fewer samples or "
        f"channels"
    )


def estimate_memory(
    num_samples: int,
    embedding_size: int,
    num_layers: int = 1,
    num_classes: int | None = None,
    *,
    samples_per_class: int = 2,
    dtype: str = "float32",
    device: str = "cpu",
    memory_budget: int | float | str | None = None,
) -> MemoryEstimate:
    """Predict the peak memory of one phase of :class:`gcng.losses.GCAHNGLoss` with its backward.

    Args:
        num_samples: N, samples of a batch. embedding_size: D. num_layers: L. num_classes: C, training classes; adds
            the classifier's parameters and gradients as a term of their own. samples_per_class: K.
        dtype: of the embeddings, or of autocast, by name (``torch.float32`` works too). device: "cpu" or "cuda".
        memory_budget: as for the loss; None is the default of the CPU path on this machine, and is refused for
            "cuda", whose default depends on the free memory of the GPU.

    Returns:
        MemoryEstimate with ``peak_bytes``, ``terms`` (name -> bytes) and the chosen plan. Bytes come on top of the
        embeddings and the graph's parameters.

    Raises:
        MemoryError: the budget is too small for any plan. ValueError: a size is not positive, or a dtype unknown.

    Example:
        >>> print(gcng.estimate_memory(1024, 128, memory_budget="700MB"))
    """
    sizes = {"num_samples": num_samples, "embedding_size": embedding_size, "num_layers": num_layers}
    sizes |= {"samples_per_class": samples_per_class} | ({} if num_classes is None else {"num_classes": num_classes})
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"estimate_memory: {name} must be a positive integer, got {value!r}")
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_SIZES:
        raise ValueError(f"estimate_memory: dtype {dtype!r} is unknown; use one of {', '.join(ITEM_SIZES)}")
    if device not in _TILE_BYTES:
        raise ValueError(f'estimate_memory: device is {device!r}; use "cpu" or "cuda"')
    if memory_budget is None and device == "cuda":
        raise ValueError('estimate_memory: device="cuda" needs a memory_budget, such as "40GiB"')
    budget = default_budget(available_memory()) if memory_budget is None else parse_bytes(memory_budget)
    estimate = plan_memory(
        num_samples, embedding_size, num_layers,
        samples_per_class=samples_per_class, dtype=name, device=device, budget=budget,
    )  # fmt: skip
    terms = dict(estimate.terms)
    if num_classes is not None:
        # Weight, gradient, and the two moments of Adam.
        terms["classifier"] = 4 * num_classes * (embedding_size + 1) * ItemSizes.of(name, device).wide
    return MemoryEstimate(sum(terms.values()), terms, estimate.plan, budget, sizes)
