"""``out/index.html``: one page, nothing loaded, that leads to every report under ``out/``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kit.batch.summary import bytes_in_words

__all__ = ["FILES", "ROWS_FILE", "index_html", "load_rows", "write_index"]

ROWS_FILE = "runs.json"
FILES = {"report": ".html", "notebook": ".ipynb", "result JSON": ".json", "events CSV": ".events.csv"}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #fff; --page: #f6f8fa;
  --good: #00684b; --bad: #b03a00; --link: #0060a0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --card: #161b22;
  --page: #0d1117; --good: #3fcf9f; --bad: #ff9d5c; --link: #6cb6f5; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
p.lead { color: var(--soft); margin: 0; }
a { color: var(--link); }
.runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(375px, 100%), 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  display: flex; flex-direction: column; }
article img { width: 100%; height: 210px; object-fit: contain; background: #fff; border-bottom: 1px solid var(--line); }
article div { padding: .9rem 1rem; } h3 { font-size: 1rem; margin: 0 0 .5rem; } h3 small { color: var(--soft); }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .9rem; margin: 0 0 .75rem; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
"""


def load_rows(out: Path) -> list[dict[str, Any]]:
    """Return the rows of earlier batches whose reports are still there."""
    try:
        rows = json.loads((out / ROWS_FILE).read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return []
    known = [row for row in rows if isinstance(row, dict) and {"flow", "scenario"} <= row.keys()]
    return [row for row in known if (out / row["flow"] / f"{row['scenario']}.html").is_file()]


def write_index(out: Path, earlier: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the index and the rows it was made from; a scenario's newest row that succeeded counts."""
    newest = {(row["flow"], row["scenario"]): row for row in (*earlier, *(row for row in rows if not row["error"]))}
    kept = [newest[key] for key in sorted(newest)]
    for name, text in ((ROWS_FILE, json.dumps(kept, indent=1) + "\n"), ("index.html", index_html(kept))):
        part = out / f".{name}.part"
        part.write_text(text, "utf-8")
        part.replace(out / name)


def index_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page for rows that stand in order."""
    flows: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        flows.setdefault(row["flow"], []).append(row)
    # Flows with one run share a grid, so that a page of default runs is not one long column.
    lone = [each[0] for each in flows.values() if len(each) == 1]
    sections = _grid(lone, "") + "".join(_grid(each, flow) for flow, each in flows.items() if len(each) > 1)
    count = f"{len(rows)} run{'' if len(rows) == 1 else 's'} of {len(flows)} flow{'' if len(flows) == 1 else 's'}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Farfault kit: runs</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Farfault kit</h1>\n<p class="lead">{count}</p>\n{sections}</main>\n</body>\n</html>\n'
    )


def _grid(rows: Sequence[Mapping[str, Any]], flow: str) -> str:
    """Return cards side by side, under the name of their flow where they share one."""
    if not rows:
        return ""
    heading = f"<h2>{escape(flow)}</h2>" if flow else "<h2>One run a flow</h2>"
    return f'<section>{heading}<div class="runs">{"".join(map(_card, rows))}</div></section>\n'


def _card(row: Mapping[str, Any]) -> str:
    stem = f"{quote(row['flow'])}/{quote(row['scenario'])}"
    picture = ""
    if row.get("picture"):
        # The text alternative was taken from HTML and is escaped already.
        picture = f'<a href="{stem}.html"><img src="{row["picture"]}" alt="{row.get("alt", "")}"></a>'
    facts = "".join(f"<dt>{escape(name)}</dt><dd{kind}>{escape(text)}</dd>" for name, text, kind in _facts(row))
    links = "".join(f'<a href="{stem}{suffix}">{name}</a>' for name, suffix in FILES.items())
    title = f'<h3><small>{escape(row["flow"])}</small><br><a href="{stem}.html">{escape(row["scenario"])}</a></h3>'
    return f"<article>{picture}<div>{title}<dl>{facts}</dl><nav>{links}</nav></div></article>\n"


def _facts(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return a card's facts: name, words, and the attribute that colours them."""
    facts: list[tuple[str, str, str]] = []
    if row["simulated s"] is not None:
        facts.append(("simulated time", f"{row['simulated s'] * 1e3:.3f} ms", ""))
    facts.append(("wall clock", f"{row['wall s']:.2f} s", ""))
    if row["faults"] is not None:
        facts.append(("faults", f"{row['faults']:,.0f}", ""))
    if row["bytes moved"] is not None:
        facts.append(("moved", bytes_in_words(row["bytes moved"]), ""))
    facts.append(("documented steps", f"{row['steps reached']} of {row['steps documented']}", ""))
    facts.append(("departures from them", str(row["violations"]), _mark(row["violations"])))
    facts.append(("pages lost", f"{row['lost pages']:,} of {row['pages checked']:,}", _mark(row["lost pages"])))
    return facts


def _mark(wrong: int) -> str:
    return ' class="bad"' if wrong else ' class="good"'
