"""What the demo found: a table for the terminal, and one page to open in a browser."""

import json
from pathlib import Path

from shearling import record
from shearling.axes.shape import Shape
from shearling.demo.compare import BATCH_TOKENS, PRUNE_STEPS, RATES, SEQ_LEN, Comparison
from shearling.report.figures import loss_curves
from shearling.report.mixture import mixture_parts
from shearling.report.page import figure, heading, page, sample, table, text
from shearling.report.run_page import (
    expected_parts,
    held_out_series,
    layer_parts,
    mask_parts,
    shape_parts,
    training_series,
)

HEAD = ("model", "parameters", "tokens", "FLOPs")


def summary(found: Comparison) -> str:
    """The table, the verdict and a sample of text from each model, as plain text."""
    domains = list(found.source.losses)
    head = (*HEAD, *domains, "mean")
    rows = [tuple(map(str, row)) for row in _rows(found)]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join((row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))))
        for row in (head, *rows)
    ]
    samples = [f"--- {label}\n{words}" for label, words in found.samples.items()]
    return "\n".join((*lines, "", found.verdict(), "", *samples))


def write_demo_page(out: Path, found: Comparison) -> Path:
    """The same as one self-contained HTML page, with loss curves, masks by layer and the shapes before and after."""
    events = {arm.label: record.read(arm.folder / "record.jsonl") for arm in found.arms}
    origin = json.loads((found.cut.folder / "shearling.json").read_text(encoding="utf-8"))
    source, target = Shape(origin["source"]["shape"]).axes, Shape(origin["shape"]).axes
    masked = events[found.cut.label]
    rates = ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
    parts = [
        text(found.verdict()),
        text(
            f"A Llama of {found.source.parameters:,} parameters was trained here, on text of the Python installation, "
            f"to a held-out loss of {found.source.mean:.3f} nats per token. Masks were learned for {PRUNE_STEPS} steps "
            f"of {BATCH_TOKENS:,} tokens in windows of {SEQ_LEN}; its half was healed, and set against the same shape "
            f"cut by one-shot scores, and from scratch, each for as many FLOPs as masks and healing took together. "
            f"Learning rates, the best of three each, found beforehand: {rates}."
        ),
        table((*HEAD, *found.source.losses, "mean"), _rows(found), highlight=2),
        heading("Held-out loss over training"),
        figure(
            loss_curves(_curves(found, events), x_label="FLOPs after the source's training", y_label="nats per token"),
            "Mean of the domains. The sheared model starts as the masked source, whose steps cost more.",
        ),
        *mixture_parts("healing", events[found.healed.label]),
        *shape_parts(origin),
        *expected_parts(masked, source=source, target=target),
        *layer_parts(origin),
        *mask_parts(masked),
        heading("Training loss of the source"),
        figure(
            loss_curves(
                {"source": training_series(events[found.source.label])}, x_label="tokens", y_label="nats per token"
            ),
            "On training batches.",
        ),
        heading("A sample of text from each"),
        *(sample(label, words) for label, words in found.samples.items()),
    ]
    out.write_text(page("Shearling's demo", parts), encoding="utf-8")
    return out


def _rows(found: Comparison) -> list[tuple[str, ...]]:
    return [
        (
            arm.label,
            f"{arm.parameters:,}",
            f"{arm.tokens:,}",
            f"{arm.flops:.2e}",
            *(f"{loss:.3f}" for loss in arm.losses.values()),
            f"{arm.mean:.3f}",
        )
        for arm in found.arms
    ]


def _curves(found: Comparison, events: dict[str, list[dict]]) -> dict[str, list[tuple[float, float]]]:
    """Held-out loss over the FLOPs spent, of the three ways to the target's shape."""
    masks, healing = found.cut.flops, found.healed.flops - found.cut.flops
    sheared = _over(events[found.cut.label], 0.0, masks) + _over(events[found.healed.label], masks, healing)
    others = {arm.label: _over(events[arm.label], 0.0, arm.flops) for arm in (found.one_shot, found.scratch)}
    return {found.healed.label: sheared, **others}


def _over(events: list[dict], start: float, flops: float) -> list[tuple[float, float]]:
    """A stage's held-out losses over FLOPs, which it spends evenly over its tokens."""
    series = held_out_series(events)
    tokens = max(1.0, max(at for at, _ in series))
    return [(start + flops * at / tokens, loss) for at, loss in series]
