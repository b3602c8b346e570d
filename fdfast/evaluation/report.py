"""One HTML page of a run, pictures inside: it opens from a mail, without a network."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fdfast.files import atomic_file

STYLE = """ body { font: 16px/1.5 system-ui, sans-serif; color: #1d2a33; max-width: 60rem; margin:
2rem auto;
       padding: 0 1rem; }
h1, h2 { color: #1b4965; line-height: 1.2; } img { max-width: 100%; } table { border-collapse:
collapse; margin: 1rem 0; } th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px
solid #d7dee2;
         vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } pre { margin: 0; white-space:
pre-wrap; font-size: .85rem; } .held { color: #2e7d4f; font-weight: 600; } .broken { color: #b3261e;
font-weight: 600; } footer { color: #66757f; font-size: .85rem; margin-top: 3rem; }
"""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: a paragraph; plain text.
        header: column names of the table.
        rows: its cells; plain text. "held" and "broken" are coloured.
        figures: PNG files, embedded.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figures: Sequence[Path] = field(default_factory=list)


def write_report(path: Path, title: str, sections: Sequence[Section], footer: str) -> Path:
    """Write the page; whatever text it is given is escaped."""
    body = "\n".join(_section(s) for s in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n<footer>{html.escape(footer)}</footer>\n"
        "</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{html.escape(section.text)}</p>")
    if section.rows:
        head = "".join(f"<th>{html.escape(h)}</th>" for h in section.header)
        rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in section.rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>")
    for figure in section.figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{data}">')
    return "\n".join(parts)


def _cell(text: str) -> str:
    if text in ("held", "broken"):
        return f'<td class="{text}">{text}</td>'
    if text.replace(".", "", 1).replace("%", "").replace("x", "").strip().isdigit():
        return f'<td class="number">{html.escape(text)}</td>'
    return f"<td><pre>{html.escape(text)}</pre></td>"
