"""demo/report.html: the table, the pictures and what they show, in one file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from demo import table

TITLES = {
    "loss_terms": "Loss terms",
    "neighbors": "Nearest neighbors of some queries before and after training",
    "confusable_pairs": "Most confusable pairs of test classes",
    "hardness": "Hardness of the synthetic negatives",
    "diversity": "Diversity of the generator over time",
}
CAPTIONS = {
    "loss_terms": """
        Thin: every iteration of every seed; thick: running means. N-pair trains on the first term alone; in GCA-HNG
        the same term is one of three that train the extractor, beside the synthetic N-pair and the cross-entropy
        of the graph's nodes. The weight of the synthetic term starts near 0 and grows as the generator total of the
        epoch before falls (21).
    """,
    "neighbors": """
        Test letters, first seed. The upper half of the queries is drawn from all test images, the lower half from
        those whose nearest neighbor is wrong after one of the trainings. Green: same letter as the query; red:
        another letter.
    """,
    "confusable_pairs": """
        r: Pearson correlation of the mean embeddings of two letters (gcng.functional.correlation_topk), GCA-HNG,
        first seed; each letter in Sans, Mono and Serif. Mistaken: images of the two letters whose nearest neighbor
        among all test images is the other letter. Letters that look alike in Sans, Mono and Serif at once are one
        class; some that are drawn alike in most faces but not in all three remain two, and no training can tell
        those apart.
    """,
    "hardness": """
        One fixed batch of training classes, without augmentation and dropout, first seed. At 1 (dotted) a negative
        is as far from its anchor as the positive is. Kappa (16) says how much of the distance beyond that the gates
        may leave; it falls with the N-pair loss.
    """,
    "diversity": """
        Left: how far synthetic negatives turn away from the real ones (25), and the term that rewards different
        gates for different negatives (26). Middle: the spread that it rewards, root mean square over anchors and
        channels of the fixed batch; it makes (26) negative. Right: the distribution of the gates.
    """,
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .35em .9em; border-bottom: 1px solid #ccc; }
th, td { text-align: left; }
td:not(:first-child) { font-variant-numeric: tabular-nums; } th { border-bottom: 2px solid #444; }
img { width: 100%; height: auto; } figure { margin: 1em 0 2.5em; } figcaption { color: #444; }
p.notes { color: #444; } code { font-size: .92em; }
"""


def write(results: dict, outcomes: list[dict], pictures: dict[str, Path], path: Path) -> None:
    """Write the report; the pictures are inside the file."""
    sections = [_figure(name, pictures[name]) for name in CAPTIONS]
    last = [_last_terms(outcome) for outcome in outcomes]
    body = [
        "<h1>GCA-HNG beside N-pair on rendered letters</h1>",
        _table([list(table.HEADER), *table.rows(results)]),
        *(f'<p class="notes">{escape(line)}</p>' for line in table.notes(results) if line),
        _protocol(results),
        *sections,
        "<h2>Loss terms at the end</h2>",
        "<p>Means over the last 20 iterations.</p>",
        _table([["method", "seed", *_term_names(outcomes)], *(_term_row(row, outcomes) for row in last)]),
        "<h2>Settings and machine</h2>",
        _table([["setting", "value"], *([key, str(value)] for key, value in results["settings"].items())]),
        _table([["version", ""], *([key, str(value)] for key, value in results["versions"].items())]),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>GCA-HNG beside N-pair</title><style>{STYLE}</style>"
    path.parent.mkdir(parents=True, exist_ok=True)
    html = "\n".join([f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>', *body, "</body></html>\n"])
    path.write_text(html, encoding="utf-8")


def _protocol(results: dict) -> str:
    load = "the same initial weights of the extractor, the same batches, the same augmentation"
    return (
        f"<p>Both methods start from {load} (checksums agree), and take the same number of iterations; the seconds say "
        "what that costs. Settings were chosen on a part of the <em>training</em> classes: <code>demo/tune.py</code>, "
        "trials in <code>demo/tuning.jsonl</code>. The images are letters of fonts, rendered and augmented; nothing "
        "here says how the methods compare on photographs.</p>"
    )


def _figure(name: str, path: Path) -> str:
    title, caption = TITLES[name], " ".join(CAPTIONS[name].split())
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(title)}</h2>\n<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(rows: list[list[str]]) -> str:
    lines = []
    for place, row in enumerate(rows):
        tag = "td" if place else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _last_terms(outcome: dict) -> dict:
    means = {name: sum(values[-20:]) / len(values[-20:]) for name, values in outcome["terms"].items()}
    return {"method": outcome["method"], "seed": outcome["seed"], **means}


def _term_names(outcomes: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome["terms"]))


def _term_row(row: dict, outcomes: list[dict]) -> list[str]:
    terms = [f"{row[name]:.4g}" if name in row else "" for name in _term_names(outcomes)]
    return [row["method"], str(row["seed"]), *terms]
