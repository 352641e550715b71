"""The mixture in the page of a run: shares over time, each domain against its reference, and why they changed."""

from collections.abc import Mapping, Sequence
from typing import Any

from shearling.report.figures import loss_curves, stacked_shares
from shearling.report.page import Cell, figure, heading, table, text

Event = Mapping[str, Any]
SHOWN_CHANGES = 12


def mixture_parts(label: str, events: Sequence[Event]) -> list[str]:
    """What a stage's record says of its mixture; nothing for one that had a single domain."""
    changes = [event for event in events if event["event"] == "mixture"]
    if all(len(change["weights"]) < 2 for change in changes):
        return []
    parts = [heading(f"Mixture of the data: {label}")]
    parts += [text(f"{_capital(note)}.") for change in changes if change["step"] == 0 for note in change["notes"]]
    parts += [_shares_table(change) for change in changes if change["step"] == 0]
    if len(changes) == 1:
        return parts
    end = max(event["tokens"] for event in events if event["event"] in ("step", "mixture"))
    svg = stacked_shares(_shares(changes, end), x_label="training tokens", y_label="share of each batch")
    parts.append(figure(svg, "Each domain's share of what was trained on. A change holds from its step on."))
    references = {d: loss for change in changes for d, loss in change["references"].items()}
    if not references:
        return parts
    losses = {d: [(c["tokens"], float(c["losses"][d])) for c in changes if _has_loss(c, d)] for d in references}
    svg = loss_curves(losses, x_label="training tokens", y_label="loss (nats per token)", goals=references)
    parts.append(figure(svg, "What the mixture followed: each domain's loss and, dashed, its reference."))
    return [*parts, *_gaps_table(changes[-1]), *_changes(changes)]


def _shares(changes: Sequence[Event], end: int) -> dict[str, list[tuple[float, float]]]:
    """Weights by domain over tokens, the last ones held to the end."""
    domains = dict.fromkeys(d for c in changes for d in c["weights"])  # a phase may have data of its own
    points = {d: [(float(c["tokens"]), float(c["weights"].get(d, 0.0))) for c in changes] for d in domains}
    return {d: [*found, (float(end), found[-1][1])] for d, found in points.items()}


def _shares_table(start: Event) -> str:
    rows = [(d, f"{w:.2%}", f"{start['readings'][d]:.3g}") for d, w in start["weights"].items()]
    return table(("domain", "share at the start", "readings, if it stays"), rows)


def _gaps_table(last: Event) -> list[str]:
    """How far each domain was from its reference at the last change."""
    if not last["references"]:
        return []
    rows: list[Sequence[Cell]] = []
    for domain, reference in last["references"].items():
        has = _has_loss(last, domain)
        loss = float(last["losses"][domain]) if has else "–"
        gap = float(last["losses"][domain]) - reference if has else "–"
        rows.append((domain, f"{last['weights'][domain]:.2%}", loss, reference, gap))
    return [table(("domain", "share at the end", "loss at the last change", "reference", "gap"), rows)]


def _changes(changes: Sequence[Event]) -> list[str]:
    told = [(c["step"], "; ".join(c["notes"])) for c in changes if c["step"] > 0]
    more = len(told) - SHOWN_CHANGES
    parts = [table(("after step", "what changed"), told[:SHOWN_CHANGES])]
    return [*parts, text(f"And {more} more, in record.jsonl.")] if more > 0 else parts


def _has_loss(change: Event, domain: str) -> bool:
    # The record writes what isn't finite as text, and the first event has no losses yet.
    return isinstance(change.get("losses", {}).get(domain), float)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
