"""The report's pictures, as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from demo.findings import choose_queries, confusable_pairs
from demo.settings import METHOD_NAMES
from gcng.data import GlyphDataset
from gcng.functional import knn

COLORS = {"n-pair": "#4477aa", "gca-hng": "#cc6644"}
REAL, SYNTHETIC = "#777777", "#cc6644"
RIGHT, WRONG = "#228833", "#cc3311"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10.5}
RESOLUTION = 110
SMOOTHED_OVER = 20
QUERIES, NEIGHBORS = 8, 5
PAIRS, PAIRS_PER_ROW, FACES_SHOWN = 12, 3, (0, 4, 8)  # Sans, Mono, Serif
TERMS = {
    "n_pair": "N-pair loss (19)",
    "synthetic": "synthetic N-pair, weighted (21)",
    "node_ce": "node cross-entropy (22)",
    "classifier": "classifier (23)",
    "class_ce": "class of the synthetic (24)",
    "similarity": "similarity (25), unweighted",
    "diversity": "diversity (26), unweighted",
    "generator": "generator total (27)",
}

FROM_ZERO = ("n_pair", "synthetic", "similarity")


def draw_all(outcomes: list[dict], test: GlyphDataset, runs: Path, folder: Path) -> dict[str, Path]:
    """Draw every figure; returns name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {method: next(o for o in outcomes if o["method"] == method) for method in METHOD_NAMES}
    embeddings = {method: np.load(runs / f"{method}-{o['seed']}.npz") for method, o in first.items()}
    after = {method: torch.from_numpy(arrays["after"]) for method, arrays in embeddings.items()}
    spaces = {
        "not trained": torch.from_numpy(embeddings["n-pair"]["before"]),
        **{METHOD_NAMES[m]: e for m, e in after.items()},
    }
    generated = [outcome for outcome in outcomes if outcome["method"] == "gca-hng"]
    with pyplot.rc_context(STYLE):
        drawn = {
            "loss_terms": draw_loss_terms(outcomes),
            "neighbors": draw_neighbors(spaces, test),
            "confusable_pairs": draw_confusable_pairs(after["gca-hng"], test),
            "hardness": draw_hardness(generated[0]["probes"]),
            "diversity": draw_diversity(generated),
        }
        paths = {}
        for name, figure in drawn.items():
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name], dpi=RESOLUTION)
            pyplot.close(figure)
    return paths


def draw_loss_terms(outcomes: list[dict]) -> Figure:
    """One panel per term: every seed as a thin line, a running mean as a thick one."""
    figure, grid = pyplot.subplots(2, 4, figsize=(14, 6.2), sharex=True, layout="constrained")
    for axes, (name, title) in zip(grid.flat, TERMS.items(), strict=True):
        for outcome in outcomes:
            if name in outcome["terms"]:
                _curve(axes, outcome["terms"][name], COLORS[outcome["method"]])
        axes.set_title(title)
        if name in FROM_ZERO:
            axes.set_ylim(bottom=0)
    for axes in grid[1]:
        axes.set_xlabel("iteration")
    handles = [Line2D([], [], color=COLORS[m], lw=2, label=METHOD_NAMES[m]) for m in METHOD_NAMES]
    grid[0, 0].legend(handles=handles, frameon=False)
    return figure


def draw_neighbors(spaces: dict[str, torch.Tensor], test: GlyphDataset) -> Figure:
    """A row per query: the query, and its nearest neighbors in every space, framed green where the class is right."""
    lists = {name: knn(space, k=min(NEIGHBORS, len(test) - 1))[1] for name, space in spaces.items()}
    trained = [test.targets[indices[:, 0]] for name, indices in lists.items() if name != "not trained"]
    queries = choose_queries(trained, test.targets, QUERIES)
    columns = 1 + len(spaces) * (NEIGHBORS + 1)
    ratios = [1.0] + ([0.45] + [1.0] * NEIGHBORS) * len(spaces)
    figure, grid = pyplot.subplots(
        len(queries), columns, figsize=(14, 0.86 * len(queries) + 0.7), gridspec_kw={"width_ratios": ratios}
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.62 / figure.get_figheight(), wspace=0.12)
    for row, query in zip(grid, queries, strict=True):
        for axes in row:
            axes.set_axis_off()
        _glyph(row[0], test, query, "#000000")
        for block, indices in enumerate(lists.values()):
            for place, neighbor in enumerate(indices[query].tolist()):
                right = bool(test.targets[neighbor] == test.targets[query])
                _glyph(row[2 + block * (NEIGHBORS + 1) + place], test, neighbor, RIGHT if right else WRONG)
    grid[0, 0].set_title("query", pad=8)
    for block, name in enumerate(lists):
        grid[0, 2 + block * (NEIGHBORS + 1) + NEIGHBORS // 2].set_title(f"nearest, {name}", pad=8)
    return figure


def draw_confusable_pairs(embeddings: torch.Tensor, test: GlyphDataset) -> Figure:
    """Pairs of test classes with the most correlated mean embeddings, in three faces each."""
    pairs = confusable_pairs(embeddings, test.targets, PAIRS)
    rows = -(-len(pairs) // PAIRS_PER_ROW)
    figure = pyplot.figure(figsize=(13.6, 1.2 * rows))
    margins = {"left": 0.01, "right": 0.99, "bottom": 0.02, "top": 1 - 0.3 / figure.get_figheight()}
    outer = figure.add_gridspec(rows, PAIRS_PER_ROW, **margins, wspace=0.07, hspace=0.42)
    for place, pair in zip(outer, pairs, strict=False):
        shown = len(FACES_SHOWN)
        cells = place.subgridspec(1, 2 * shown + 1, width_ratios=[1] * shown + [0.3] + [1] * shown, wspace=0.08)
        for side, label in enumerate((pair.first, pair.second)):
            members = (test.targets == label).nonzero().flatten()
            for i, face in enumerate(FACES_SHOWN):
                axes = figure.add_subplot(cells[side * (shown + 1) + i])
                axes.set_axis_off()
                _glyph(axes, test, int(members[face]), "#bbbbbb")
        heading = figure.add_subplot(place)
        heading.set_axis_off()
        names = " and ".join(f"U+{ord(test.classes[label]):04X}" for label in (pair.first, pair.second))
        numbers = f"r = {pair.correlation:.3f}, {pair.mistakes} of {pair.samples} mistaken"
        heading.set_title(f"{names}: {numbers}", pad=4)
    return figure


def draw_hardness(probes: list[dict]) -> Figure:
    """Left: distances over training; right: their distribution at three moments."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    iterations = [probe["iteration"] for probe in probes]
    for name, color, label in (("real_hardness", REAL, "real negatives"), ("hardness", SYNTHETIC, "synthetic")):
        quantiles = np.array([np.quantile(probe[name], [0.05, 0.5, 0.95]) for probe in probes])
        left.fill_between(iterations, quantiles[:, 0], quantiles[:, 2], color=color, alpha=0.2, lw=0)
        left.plot(iterations, quantiles[:, 1], color=color, lw=2, marker="o", ms=4, label=f"{label}: median, 5 to 95%")
    left.axhline(1, color="black", lw=1, ls=":")
    left.set(xlabel="iteration", ylabel="distance to anchor / distance to positive", ylim=(0, None))
    left.set_title("one fixed batch of training classes, over the training")
    left.legend(frameon=False)
    moments = sorted({0, len(probes) // 2, len(probes) - 1})
    values = np.concatenate([probes[moment]["hardness"] for moment in moments])
    bins = np.linspace(0, np.quantile(values, 0.995), 60)
    shades = pyplot.get_cmap("plasma")(np.linspace(0.1, 0.8, len(moments)))
    for moment, shade in zip(moments, shades, strict=True):
        probe = probes[moment]
        label = f"after {probe['iteration']} iterations, kappa = {probe['kappa']:.2g}"
        right.hist(probe["hardness"], bins, density=True, histtype="step", lw=2, color=shade, label=label)
    right.axvline(1, color="black", lw=1, ls=":")
    right.set(xlabel="distance of synthetic to anchor / distance to positive", ylabel="density")
    right.set_title("distribution of hardness (left of 1: nearer than the positive)")
    right.legend(frameon=False)
    return figure


def draw_diversity(outcomes: list[dict]) -> Figure:
    """Terms (25) and (26) over the iterations; spread and range of the gates at the looks."""
    figure, (terms, spread, gates) = pyplot.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    diversity = terms.twinx()
    diversity.spines["right"].set_visible(True)
    for outcome in outcomes:
        _curve(terms, outcome["terms"]["similarity"], "#4477aa")
        _curve(diversity, outcome["terms"]["diversity"], "#cc6644")
        probes = outcome["probes"]
        iterations = [probe["iteration"] for probe in probes]
        label = f"seed {outcome['seed']}"
        spread.plot(iterations, [probe["gate_spread"] for probe in probes], marker="o", ms=4, label=label)
    terms.set(xlabel="iteration", ylim=(0, None))
    terms.set_ylabel("similarity (25): 1 - cosine", color="#4477aa")
    diversity.set_ylabel("diversity (26)", color="#cc6644")
    terms.set_title("terms of the generator, unweighted")
    largest = max(probe["gate_spread"] for outcome in outcomes for probe in outcome["probes"])
    spread.set(xlabel="iteration", ylabel="standard deviation", ylim=(0, 1.15 * largest))
    spread.set_title("spread of an anchor's gates over its negatives")
    spread.legend(frameon=False, loc="lower right")
    probes = outcomes[0]["probes"]
    iterations = [probe["iteration"] for probe in probes]
    quantiles = np.array([probe["gate_quantiles"] for probe in probes])
    for low, high, alpha, label in ((0, 4, 0.15, "5 to 95%"), (1, 3, 0.3, "25 to 75%")):
        gates.fill_between(
            iterations, quantiles[:, low], quantiles[:, high], color=SYNTHETIC, alpha=alpha, lw=0, label=label
        )
    gates.plot(iterations, quantiles[:, 2], color=SYNTHETIC, lw=2, marker="o", ms=4, label="median")
    gates.set(xlabel="iteration", ylabel="gate", ylim=(0, 1))
    gates.set_title(f"gates between classes, seed {outcomes[0]['seed']}")
    gates.legend(frameon=False)
    return figure


def _curve(axes: Axes, values: list[float], color: str) -> None:
    axes.plot(np.arange(1, len(values) + 1), values, color=color, lw=0.6, alpha=0.35)
    window = min(SMOOTHED_OVER, -(-len(values) // 3))
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(len(mean)) + (window + 1) / 2, mean, color=color, lw=1.8)


def _glyph(axes: Axes, data: GlyphDataset, index: int, frame: str) -> None:
    axes.set_axis_on()
    axes.imshow(data.images[index, 0].numpy(), cmap="gray_r", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=frame, linewidth=2)
