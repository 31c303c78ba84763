"""Figures from the results files: the wall, the roofline, the share of time of every op.

    python -m benchmarks.plots             # writes docs/figures/<results file>-<figure>.png
    python -m benchmarks.plots --check     # exit status 1 if a figure is of other results than the file holds

A figure carries a digest of the results that it shows, so that checking needs no matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.details import roof
from benchmarks.results import FOLDER, load_all, measured_time, setting_of
from benchmarks.words import bytes_words, provider_words

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ROOT / "docs" / "figures"
DIGEST = "Results"
COLORS = {"published": "#b2182b", "reference": "#ef8a62", "gcng": "#2166ac", "gcng-no-extension": "#92c5de"}
LINES = ("published", "reference", "gcng", "gcng-recompute")


def figure_path(results_name: str, kind: str, folder: Path = FIGURES) -> Path:
    """Where a figure of a results file lies."""
    return folder / f"{Path(results_name).stem}-{kind}.png"


def digest(shown: Any) -> str:
    """What a figure shows, in short."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def stored_digest(path: Path) -> str | None:
    """The digest inside a PNG, None where there is no file or no digest."""
    if not path.exists():
        return None
    for kind, body in _chunks(path.read_bytes()):
        if kind == b"tEXt" and body.startswith(DIGEST.encode() + b"\0"):
            return body.partition(b"\0")[2].decode("latin-1")
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = 8  # after the signature
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        yield data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        place += 12 + length


# -- what each figure shows, as plain data: None where a file has nothing to show -----------------------------------


def wall_data(results: dict) -> dict | None:
    """By width: time and memory over N of every provider, and sizes that do not fit with their predicted bytes."""
    rows = [row for row in results["rows"] if row["operation"] == "iteration"]
    precision = "bfloat16" if "gpu" in results["machine"] else "float32"
    out: dict[str, dict] = {}
    for row in rows:
        setting = setting_of(row)
        plain = setting.num_layers == 1 and not setting.classes and setting.samples_per_class == 2
        if not plain or row["precision"] not in (precision, "float32"):
            continue
        for name in LINES:
            provider = row["providers"].get(name)
            if provider is None or (name.startswith("gcng") and row["precision"] != precision):
                continue
            line = out.setdefault(str(setting.embedding_size), {}).setdefault(
                name, {"time": [], "memory": [], "wall": []}
            )
            time, memory = measured_time(row, name), provider.get("memory", {})
            if time:
                line["time"].append([setting.samples, time["median"], time["min"], time["max"]])
            if "peak_bytes" in memory:
                line["memory"].append([setting.samples, memory["peak_bytes"]])
            elif memory.get("predicted_bytes"):
                line["wall"].append([setting.samples, memory["predicted_bytes"]])
    # A width with one size, as the scaling over D measures it, has no curve.
    out = {width: lines for width, lines in out.items() if any(len(line["memory"]) > 1 for line in lines.values())}
    limit = results["machine"].get("gpu_memory_bytes") or results["machine"]["memory_bytes"]
    return {"widths": out, "limit": limit} if out else None


def share_data(results: dict) -> dict | None:
    """Seconds of every op by setting and provider."""
    found = {
        f"{one['name']}, {provider_words(one['provider'])}": {name: s["seconds"] for name, s in one["stages"].items()}
        for one in results["stages"]
    }
    return found or None


def roofline_data(results: dict) -> dict | None:
    """Intensity and rate of every op that has products, under the roof of its setting."""
    points, roofs = [], {}
    for one in results["stages"]:
        rate = roof(results, one)
        if rate is None or one["provider"] != "gcng":
            continue
        for name, stage in one["stages"].items():
            if stage["flops"] and stage["bytes"] and stage["seconds"] > 0:
                points.append([one["name"], name, stage["flops"] / stage["bytes"], stage["flops"] / stage["seconds"]])
        roofs[one["name"]] = list(rate)
    return {"points": points, "roofs": roofs} if points else None


# -- drawing ------------------------------------------------------------------------------------------------------


def draw_wall(data: dict, plt: Any) -> Any:
    """Time above, memory below, one column per width; hollow marks are predictions that do not fit."""
    widths = sorted(data["widths"], key=int)
    figure, axes = plt.subplots(2, len(widths), figsize=(4.2 * len(widths), 6.4), sharex="col", squeeze=False)
    for column, width in enumerate(widths):
        top, bottom = axes[0][column], axes[1][column]
        for name, line in data["widths"][width].items():
            color = COLORS.get(name, "#555555")
            if line["time"]:
                n, median, low, high = zip(*sorted(line["time"]), strict=True)
                spread = [
                    [m - x for m, x in zip(median, low, strict=True)],
                    [x - m for m, x in zip(median, high, strict=True)],
                ]
                top.errorbar(n, median, spread, marker="o", color=color, label=provider_words(name))
            if line["memory"]:
                bottom.plot(
                    *zip(*sorted(line["memory"]), strict=True), marker="o", color=color, label=provider_words(name)
                )
            known = sorted(line["memory"])[-1:]
            if line["wall"]:
                bottom.plot(*zip(*known, *sorted(line["wall"]), strict=True), "--", color=color)
                bottom.plot(*zip(*sorted(line["wall"]), strict=True), "o", mfc="white", color=color)
        bottom.axhline(data["limit"], color="black", linewidth=0.8)
        place = {"ha": "left", "va": "top", "fontsize": 8, "transform": bottom.get_yaxis_transform()}
        bottom.text(0.02, data["limit"], f"the machine has {bytes_words(data['limit'])}", **place)
        top.set_title(f"D = {width}")
        for axis, label in ((top, "seconds per iteration"), (bottom, "peak bytes")):
            axis.set(xscale="log", yscale="log", ylabel=label if column == 0 else "")
            axis.grid(True, which="major", alpha=0.3)
        ticks = sorted({p[0] for line in data["widths"][width].values() for p in [*line["memory"], *line["wall"]]})
        bottom.set_xticks(ticks, [str(n) for n in ticks])
        bottom.minorticks_off()
        bottom.set_xlabel("N")
    handles = {
        label: h for row in axes for axis in row for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, bbox_to_anchor=(0.5, -0.04))
    return figure


def draw_share(data: dict, plt: Any) -> Any:
    """One bar per setting and provider, divided among the ops."""
    names = sorted(
        {name for stages in data.values() for name in stages}, key=lambda n: -max(s.get(n, 0) for s in data.values())
    )
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.55 * len(data) + 0.1 * len(names)))
    for place, stages in enumerate(data.values()):
        total, left = sum(max(s, 0) for s in stages.values()), 0.0
        for index, name in enumerate(names):
            share = 100 * max(stages.get(name, 0), 0) / total
            label = name if place == 0 else None
            axis.barh(place, share, left=left, color=plt.get_cmap("tab20")(index % 20), label=label)
            if share > 6:
                axis.text(left + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8)
            left += share
    axis.set_yticks(range(len(data)), list(data))
    axis.set(xlabel="percent of the iteration", xlim=(0, 100))
    axis.invert_yaxis()
    axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.1 / len(data)))
    return figure


def draw_roofline(data: dict, plt: Any) -> Any:
    """Measured products per second of every op at its intensity, under the copy and product rates of its setting."""
    figure, axis = plt.subplots(figsize=(7.5, 5))
    ridges = {setting: products / copies for setting, (products, copies) in data["roofs"].items()}
    low = min(*ridges.values(), *(point[2] for point in data["points"])) / 2
    high = max(*ridges.values(), *(point[2] for point in data["points"])) * 2
    for (setting, ridge), marker, line in zip(ridges.items(), "osD^v", ("-", "--", ":", "-.", "-"), strict=False):
        products, copies = data["roofs"][setting]
        roof_line = [low * copies, products, products]
        axis.plot([low, ridge, high], roof_line, line, color="black", label=f"roof, {setting}")
        for index, (_, name, x, y) in enumerate(p for p in data["points"] if p[0] == setting):
            axis.plot(x, y, marker, color=plt.get_cmap("tab20")(index % 20), label=f"{name}, {setting}")
    axis.set(xscale="log", yscale="log", xlabel="useful operations per byte", ylabel="useful operations per second")
    axis.grid(True, which="both", alpha=0.2)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


KINDS = {"wall": (wall_data, draw_wall), "share": (share_data, draw_share), "roofline": (roofline_data, draw_roofline)}


def stale(name: str, results: dict, folder: Path = FIGURES) -> list[str]:
    """Figures of a results file that are missing or show other results."""
    shown = {kind: read(results) for kind, (read, _) in KINDS.items()}
    return [
        kind for kind, data in shown.items()
        if data is not None and stored_digest(figure_path(name, kind, folder)) != digest(data)
    ]  # fmt: skip


def write(name: str, results: dict, folder: Path = FIGURES) -> list[Path]:
    """Draw what a results file has; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, (read, draw) in KINDS.items():
        data, path = read(results), figure_path(name, kind, folder)
        if data is None:
            path.unlink(missing_ok=True)
            continue
        figure = draw(data, plt)
        figure.savefig(path, dpi=110, bbox_inches="tight", metadata={DIGEST: digest(data), "Software": None})
        plt.close(figure)
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Writes the figures, or checks them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if out of date")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results files")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder of the figures")
    options = parser.parse_args(arguments)
    status = 0
    for name, results in load_all(options.results):
        if options.check:
            for kind in stale(name, results, options.figures):
                print(f"figure {kind} of {name} is out of date: run python -m benchmarks.plots", file=sys.stderr)
                status = 1
        else:
            write(name, results, options.figures)
    return status


if __name__ == "__main__":
    sys.exit(main())
