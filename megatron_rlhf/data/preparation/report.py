"""What a preparation kept, dropped and found: report.json, and the same as a page. No text of any record is in them."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.data.preparation.cleaning import DROPPED, REPORT, SAMPLES, Counts

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 0 0 2rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8886; vertical-align: top; }
td:last-child { overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; }
@media (max-width: 45rem) {  /* a phone: each row is a card */
  tr:first-child { display: none; }
  tr, td { display: block; }
  tr { border-bottom: 1px solid #8886; padding: .4rem 0; }
  td, td.n { border: 0; text-align: left; padding: .1rem 0; }
  td::before { content: attr(data-name) " "; opacity: .65; }
}
"""
MEANINGS = {
    "duplicate": "begins like an earlier prompt",
    "near_duplicate": "is nearly the same as an earlier prompt",
    "over_user_limit": "its user has enough prompts already",
    "prompt_too_long": "the prompt is over the limit",
    "personal_data": "holds personal data",
}


def write_report(folder: Path, counts: Counts, settings: Mapping[str, Any]) -> None:
    """Write `report.json` and `report.html`, the page first: the JSON says that all is done."""
    content = {**counts.as_json(), "kept": sum(counts.parts.values()), "settings": settings}
    examples: dict[str, list[str]] = {}
    with (folder / DROPPED).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            shown = examples.setdefault(row["reason"], [])
            if len(shown) < SAMPLES:
                shown.append(row["where"] + (f" (as {row['of']})" if "of" in row else ""))
    (folder / "report.html").write_text(_page(content, examples), encoding="utf-8")
    (folder / REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _page(content: Mapping[str, Any], examples: Mapping[str, Sequence[str]]) -> str:
    read, kept = content["read"], content["kept"]
    dropped = [
        (reason, MEANINGS.get(reason, ""), count, f"{count / read:.1%}", "; ".join(examples.get(reason, ())))
        for reason, count in sorted(content["dropped"].items(), key=lambda item: -item[1])
    ]
    personal = [
        (kind, each["count"], each["records"], "; ".join(f"{s['where']}: {s['form']}" for s in each["samples"]))
        for kind, each in sorted(content["personal"].items())
    ]
    parts = [
        "<h1>Prepared data</h1>",
        f"<p>{kept:,} of {read:,} records kept ({kept / max(read, 1):.1%}).</p>",
        _table("Kept", ("part", "records"), sorted(content["parts"].items())),
        _table("Dropped", ("reason", "meaning", "records", "share", "the first of them"), dropped),
        _table("Personal data", ("kind", "found", "in records", "where, and its form"), personal),
        f"<h2>Settings</h2><pre>{html.escape(json.dumps(content['settings'], indent=2))}</pre>",
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>Prepared data</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(name: str, value: Any) -> str:
        kind, shown = (' class="n"', f"{value:,}") if isinstance(value, int) else ("", html.escape(str(value)))
        return f'<td{kind} data-name="{name}:">{shown}</td>'

    cells = ("".join(map(cell, head, row)) for row in rows)
    body = "".join(f"<tr>{row}</tr>" for row in cells) or f'<tr><td colspan="{len(head)}">none</td></tr>'
    names = "".join(f"<th>{name}</th>" for name in head)
    return f"<h2>{title}</h2><table><tr>{names}</tr>{body}</table>"
