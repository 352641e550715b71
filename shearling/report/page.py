"""One HTML file that needs nothing beside itself: no script, no address, dark on white, fit to print."""

import re
from collections.abc import Sequence
from html import escape

Cell = str | int | float

CSS = """
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: #fff; color: #1c1c1c;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .92rem; }
th, td { padding: .22rem .9rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e6e6e6;
  overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 1px solid #888; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.lit td { background: #eaf2fb; font-weight: 600; }
figure { margin: 1.2rem 0; }
figure svg { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; color: #555; max-width: 46rem; }
.sample { margin: .8rem 0; border-left: 3px solid #9db7d5; padding-left: .9rem; }
.sample b { font-size: .88rem; }
.sample pre { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; line-height: 1.45; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; }
  figure, .sample, tr { break-inside: avoid; } h2 { break-after: avoid; }
  tr.lit td { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""

# The policy lets a browser refuse whatever would be fetched; the heat maps are data: images.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""

NUMBER = re.compile(r"[-+−]?(\d[\d,.]*(e[-+]?\d+)?|nan|inf)( ?%)?|–|")


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page. `parts` are HTML, from the builders below; `title` is text."""
    name = escape(title)
    head = f"{HEAD}<title>{name}</title>\n<style>{CSS}</style>\n</head>\n"
    body = "\n".join([f"<h1>{name}</h1>", *parts])
    return f"{head}<body>\n{body}\n</body>\n</html>\n"


def heading(words: str) -> str:
    """A section's heading."""
    return f"<h2>{escape(words)}</h2>"


def text(paragraph: str) -> str:
    """A paragraph."""
    return f"<p>{escape(paragraph)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], *, highlight: int | None = None) -> str:
    """A table; whole numbers with thousands marked, others to four places, and columns of numbers to the right.

    `highlight` is the index of a row to set off.
    """
    assert all(len(row) == len(head) for row in rows), "each row needs a cell for each column"
    words = [[_words(cell) for cell in row] for row in rows]
    is_number = [all(NUMBER.fullmatch(row[i]) for row in words) for i in range(len(head))]
    lines = [_row("th", head, is_number, lit=False)]
    lines += [_row("td", row, is_number, lit=i == highlight) for i, row in enumerate(words)]
    return f"<table>\n<thead>{lines[0]}</thead>\n<tbody>\n" + "\n".join(lines[1:]) + "\n</tbody>\n</table>"


def figure(svg: str, caption: str) -> str:
    """A figure with its caption. `svg` is markup, from figures.py; the caption is text."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def sample(label: str, words: str) -> str:
    """A text that a model wrote, line breaks and all, under a label."""
    return f'<div class="sample"><b>{escape(label)}</b>\n<pre>{escape(words)}</pre></div>'


def _row(tag: str, cells: Sequence[str], is_number: Sequence[bool], *, lit: bool) -> str:
    classes = [' class="n"' if number else "" for number in is_number]
    inner = "".join(f"<{tag}{c}>{escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True))
    return f'<tr class="lit">{inner}</tr>' if lit else f"<tr>{inner}</tr>"


def _words(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:,.4f}"
