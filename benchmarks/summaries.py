"""The README's two tables and two figures: the iteration by N on a CPU, the GPU targets. Also the ops beside peers."""

from __future__ import annotations

from benchmarks import targets
from benchmarks.operations import OPERATIONS
from benchmarks.results import measured_time, setting_of
from benchmarks.settings import Setting
from benchmarks.words import bytes_words, missing_words, provider_words, seconds_words, source_line, table

TIMED = ("published", "reference", "gcng")
GCNG = ("gcng", "gcng-no-extension")
NARROWEST = 128  # channels of the README's rows; narrower ones are in the docs
FIGURES = {"wall": "Time and peak memory of one iteration over N", "share": "Where the time of an iteration goes"}


def readme(files: list[tuple[str, dict]]) -> str:
    """Everything between the README's markers: of each kind of machine the file with most rows; all are in the docs."""
    parts = []
    for name, results in _richest([one for one in files if "gpu" not in one[1]["machine"]]):
        parts += [iterations(name, results), figures(name)]
    gpus = _richest([one for one in files if "gpu" in one[1]["machine"]])
    parts += [gpu_targets(*found) for found in gpus] or [gpu_targets(None, None)]
    return "\n\n".join(part for part in parts if part)


def _richest(files: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """The file with most rows, or none."""
    return [max(files, key=lambda one: len(one[1]["rows"]))] if files else []


def iterations(name: str, results: dict) -> str:
    """One line per setting: time and memory by provider, and the ratios to the dense forms."""
    rows = [row for row in results["rows"] if row["operation"] == "iteration" and row["precision"] == "float32"]
    plain = [
        row
        for row in rows
        if "published" in row["providers"]
        and (s := setting_of(row)).embedding_size >= NARROWEST
        and not s.classes
        and s.samples_per_class == 2
    ]
    plain.sort(key=lambda row: _order(setting_of(row)))
    header = ["L", "N", "D", *(provider_words(n) for n in TIMED), "faster than published", "than reference"]
    header += ["memory of published", "share of GEMM rate"]
    lines = []
    for row in plain:
        setting, providers = setting_of(row), row["providers"]
        cells = [str(setting.num_layers), str(setting.samples), str(setting.embedding_size)]
        cells += [time_and_memory(row, n) for n in TIMED]
        cells += [speedup(row, n) for n in TIMED[:2]]
        cells += [memory_share(providers), gemm_share(row)]
        lines.append(cells)
    about = "One iteration: time / peak memory; float32, K = 2, C = max(100, N / 2), dropout 0."
    return f"{about} {source_line(name, results, plain)}\n\n{table(header, lines)}" if lines else ""


def _order(setting: Setting) -> tuple[int, int, int]:
    return setting.num_layers, setting.embedding_size, setting.samples


def time_and_memory(row: dict, name: str) -> str:
    """A cell: median and peak, or why not."""
    provider = row["providers"].get(name)
    peak = (provider or {}).get("memory", {}).get("peak_bytes")
    time = measured_time(row, name)
    if peak is None:
        return seconds_words(time["median"]) if time else missing_words(provider)
    return f"{seconds_words(time['median']) if time else missing_words(provider)} / {bytes_words(peak)}"


def speedup(row: dict, other: str) -> str:
    """How many times slower another provider is."""
    times = [measured_time(row, name) for name in (other, "gcng")]
    return f"{times[0]['median'] / times[1]['median']:.1f}x" if all(times) else "-"


def memory_share(providers: dict) -> str:
    """Peak of gcng as a share of the published formulation's, measured or predicted."""
    found = [providers.get(name, {}).get("memory", {}) for name in ("published", "gcng")]
    sizes = [one.get("peak_bytes") or one.get("predicted_bytes") for one in found]
    return f"{100 * sizes[1] / sizes[0]:.1f} %" if all(sizes) else "-"


def gemm_share(row: dict) -> str:
    """Useful operations over time, as a share of the rate of a product beside it."""
    time = measured_time(row, "gcng")
    if time is None or "gemm" not in row:
        return "-"
    work = row["work"].get("both", row["work"]["forward"])
    return f"{100 * work['flops'] / time['median'] / row['gemm']['flops']:.0f} %"


def ops(name: str, results: dict) -> str:
    """One line per op at its widest setting: forward and backward by provider, and the fastest peer."""
    lines, used = [], []
    for operation in OPERATIONS[1:]:
        rows = [row for row in results["rows"] if row["operation"] == operation and row["precision"] == "float32"]
        rows = [row for row in rows if measured_time(row, "gcng") and setting_of(row).samples == 160]
        if rows:
            row = max(rows, key=lambda one: setting_of(one).embedding_size)
            used.append(row)
            lines.append(_op_cells(row))
    if not lines:
        return ""
    header = ["op", "N, D", "gcng", "no extension", "dense reference", "published", "fastest peer"]
    about = "Each op, forward and backward (retrieval and correlation have no backward)."
    return f"{about} {source_line(name, results, used)}\n\n{table(header, lines)}"


def _op_cells(row: dict) -> list[str]:
    setting = setting_of(row)
    cells = [row["operation"], f"{setting.samples}, {setting.embedding_size}"]
    for name in (*GCNG, "reference", "published"):
        time = measured_time(row, name)
        cells.append(seconds_words(time["median"]) if time else "-")
    peers = {n: t["median"] for n in row["providers"] if n not in _KNOWN and (t := _whole(row, n))}
    best = min(peers, key=peers.get, default=None)
    return [*cells, "-" if best is None else f"{provider_words(best)}: {seconds_words(peers[best])}"]


_KNOWN = {*GCNG, "reference", "published"}


def _whole(row: dict, name: str) -> dict | None:
    """The time of a peer that does all that gcng does: forward only does not count where gcng has a backward."""
    ours, theirs = (row["providers"][n].get("time") or {} for n in ("gcng", name))
    return theirs.get("both") if "both" in ours else theirs.get("forward")


def figures(name: str) -> str:
    """The two figures of a file, where they exist."""
    from benchmarks.plots import figure_path

    found = [(words, figure_path(name, kind)) for kind, words in FIGURES.items()]
    return "\n\n".join(
        f"![{words}](docs/figures/{path.name})\n{words}; `benchmarks/results/{name}`."
        for words, path in found
        if path.exists()
    )


def gpu_targets(name: str | None, results: dict | None) -> str:
    """The targets on a GPU and what was measured."""
    header = ["on a GPU: bfloat16, D = 512, L = 1, K = 2", "target (H200)", "measured", "reached"]
    where = source_line(name, results, results["rows"]) if results else "No GPU has a results file yet."
    made = table(header, targets.readings(results))
    return f"{where} `benchmarks/gpu_suite.sh` measures it. {targets.form_ahead(results)}\n\n{made}"


def cpu_targets(results: dict) -> str:
    """The targets on a CPU and what was measured; the rows that they read name their commits above."""
    header = ["on a CPU: float32, N = 160, D = 512, L = 1, K = 2", "target", "measured", "reached"]
    return table(header, targets.readings(results, targets.CPU_TARGETS))
