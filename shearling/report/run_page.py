"""The page of a run: what its stages recorded, in sections; what they didn't record is left out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shearling import record
from shearling.axes.shape import Shape
from shearling.errors import UserError
from shearling.report.figures import kept_by_layer, loss_curves, masks_by_layer
from shearling.report.mixture import mixture_parts
from shearling.report.page import Cell, figure, heading, page, table, text

Event = Mapping[str, Any]
Events = Sequence[Event]

EXPECTED = "expected_"
TRAINING_SETTINGS = ("steps", "tokens", "lr", "batch_sequences", "micro_sequences", "autocast")
MASK_SHAPES = {
    "hidden": "hidden channels, one mask for all layers",
    "layer": "layers",
    "kv_head": "key-value heads",
    "group": "query heads, those of one key-value head side by side",
    "head_dim": "entries of v in each head, those of one key-value head side by side",
    "rotary": "entries of q and k in each head, one choice for all",
    "intermediate": "intermediate (feed-forward) channels",
    "expert": "experts",
    "moe_intermediate": "channels inside experts, those of one expert side by side",
    "shared_intermediate": "channels of the shared expert",
}


def write_run_page(out: Path, *, title: str, folders: Mapping[str, Path]) -> Path:
    """Writes the page of finished stages (label -> folder, in order) to `out`, and gives `out`.

    Raises UserError where a folder lacks the record.jsonl that a stage writes, or the last one its shearling.json.
    """
    assert folders, "a run has stages"
    stages = {label: record.read(Path(folder) / "record.jsonl") for label, folder in folders.items()}
    origin = _origin(Path(list(folders.values())[-1]))
    parts = [
        *shape_parts(origin),
        *loss_parts(stages),
        *curve_parts(stages),
        *(part for label, events in stages.items() for part in mixture_parts(label, events)),
        *learning_parts(origin, stages),
        *layer_parts(origin),
        *(part for events in stages.values() for part in mask_parts(events)),
        *settings_parts(stages),
    ]
    out = Path(out)
    out.write_text(page(title, parts), encoding="utf-8", newline="\n")
    return out


def shape_parts(origin: Mapping[str, Any]) -> list[str]:
    """Shapes and parameters before and after, notes and misses, as shearling.json tells them."""
    if "source" not in origin:
        return []
    pruned = origin["pruned"]
    before, after = pruned["source_parameters"], pruned["parameters"]
    sentence = f"{origin['source']['name']}: {before:,} parameters cut to {after:,}, {after / before:.1%} of them."
    source, target = (
        {**sizes, "parameters": n} for sizes, n in ((origin["source"]["shape"], before), (origin["shape"], after))
    )
    parts = [heading("Shape"), text(sentence), shape_table(source, target)]
    parts += [text(f"Note: {note}.") for note in pruned["notes"]]
    if pruned["misses"]:
        parts += [
            heading("Misses"),
            text("Here the masks had opened another number of entries than the target asks; the cut kept the best."),
            table(("place, entries",), [(miss,) for miss in pruned["misses"]]),
        ]
    return parts


def shape_table(source: Mapping[str, int], target: Mapping[str, int]) -> str:
    """Each size before and after, and the share that is kept."""
    rows = [(key, size, target[key], f"{target[key] / size:.1%}") for key, size in source.items()]
    return table(("size", "source", "result", "kept"), rows)


def loss_parts(stages: Mapping[str, Events]) -> list[str]:
    """Held-out loss by domain: the source, the cut, the healed model."""
    columns = held_out_columns(stages)
    if not columns:
        return []
    domains = dict.fromkeys(domain for losses in columns.values() for domain in losses)
    rows: list[Sequence[Cell]] = [(d, *(losses.get(d, "–") for losses in columns.values())) for d in domains]
    rows.append(("mean of domains", *(_mean(losses) for losses in columns.values())))
    caption = "Mean next-token loss on held-out text, in nats per token; lower is better."
    return [heading("Held-out loss"), text(caption), table(("domain", *columns), rows, highlight=len(rows) - 1)]


def held_out_columns(stages: Mapping[str, Events]) -> dict[str, dict[str, float]]:
    """Losses by domain of each model that was measured whole: "source", "cut", "healed".

    A stage that measured a model anew and found something else (on other windows, say) gets a column of its own.
    """
    columns: dict[str, dict[str, float]] = {}
    for label, events in stages.items():
        for event in _of(events, "held_out"):
            losses = {domain: float(loss) for domain, loss in event["losses"].items()}
            name = event.get("of", "masked")
            if name == "masked" or _alike(columns.get(name), losses):
                continue
            columns[f"{name}, as {label} measured it" if name in columns else name] = losses
    return columns


def curve_parts(stages: Mapping[str, Events]) -> list[str]:
    """Training and held-out loss over the tokens of all stages, one after the other."""
    series: dict[str, list[tuple[float, float]]] = {}
    start = 0.0
    for label, events in stages.items():
        training = training_series(events)
        if not training:
            continue
        series[f"{label}: training"] = [(start + tokens, loss) for tokens, loss in training]
        series[f"{label}: held out"] = [(start + tokens, loss) for tokens, loss in held_out_series(events)]
        start += training[-1][0]
    if not series:
        return []
    svg = loss_curves(series, x_label="training tokens, all stages", y_label="loss (nats per token)")
    return [
        heading("Training"),
        figure(svg, "Loss of the batches trained on, and mean of the domains' held-out losses."),
    ]


def training_series(events: Events) -> list[tuple[float, float]]:
    """(tokens, loss) of one stage's steps."""
    return [(event["tokens"], float(event["loss"])) for event in _of(events, "step")]


def held_out_series(events: Events) -> list[tuple[float, float]]:
    """(tokens, mean of the domains' held-out losses) of one stage, from what it starts with to what it ends with."""
    steps = {event["step"]: event["tokens"] for event in _of(events, "step")}
    # Measured before the first step or after the last one, a loss has no tokens of its own.
    last = max(steps.values(), default=0)
    return [
        (event.get("tokens", 0 if event["step"] == 0 else steps.get(event["step"], last)), _mean(event["losses"]))
        for event in _of(events, "held_out")
    ]


def learning_parts(origin: Mapping[str, Any], stages: Mapping[str, Events]) -> list[str]:
    """How the expected sizes went to their targets."""
    if "source" not in origin:
        return []
    source, target = Shape(origin["source"]["shape"]).axes, Shape(origin["shape"]).axes
    return [part for events in stages.values() for part in expected_parts(events, source=source, target=target)]


def expected_parts(events: Events, *, source: Mapping[str, int], target: Mapping[str, int]) -> list[str]:
    """Expected entries kept per axis over the steps, as shares of the source's; `source`, `target` by axis."""
    steps = [event for event in _of(events, "step") if any(key.startswith(EXPECTED) for key in event)]
    if not steps:
        return []
    axes = [key.removeprefix(EXPECTED) for key in steps[0] if key.startswith(EXPECTED)]
    series = {axis: [(e["step"], float(e[EXPECTED + axis]) / source[axis]) for e in steps] for axis in axes}
    svg = loss_curves(
        series,
        x_label="step",
        y_label="share of the source expected to stay",
        goals={axis: target[axis] / source[axis] for axis in axes},
    )
    caption = "Entries that the masks are expected to keep along each axis, averaged over layers; dashed, the target."
    return [heading("Sizes while masks were learned"), figure(svg, caption)]


def layer_parts(origin: Mapping[str, Any]) -> list[str]:
    """Which of the source's layers stay, where some don't."""
    choices = origin.get("kept", {}).get("layer")
    if not choices:
        return []
    kept, layers = choices[0]["kept"], origin["source"]["shape"]["num_hidden_layers"]
    return [
        heading("Layers kept"),
        figure(kept_by_layer(kept, layers), f"{len(kept)} of {layers} layers stay (filled)."),
    ]


def mask_parts(events: Events) -> list[str]:
    """The masks as the cut took them, a heat map an axis."""
    figures = [
        figure(masks_by_layer(mask, title=axis), f"{MASK_SHAPES.get(axis, axis)}; white is removed.")
        for event in _of(events, "masks")
        for axis, mask in event.items()
        if axis not in ("event", "time")
    ]
    return [heading("Masks at the cut"), *figures] if figures else []


def settings_parts(stages: Mapping[str, Events]) -> list[str]:
    """What each stage was run with, and on."""
    columns = {label: _settings(events) for label, events in stages.items() if events}
    if not columns:
        return []
    keys = list(dict.fromkeys(key for settings in columns.values() for key in settings))
    rows = [(key, *(settings.get(key, "–") for settings in columns.values())) for key in keys]
    return [heading("Settings and versions"), table(("", *columns), rows)]


def _settings(events: Events) -> dict[str, Cell]:
    """The first event is the stage's own: what it was asked and what it chose."""
    first = {key: value for key, value in events[0].items() if key not in ("event", "time", "target")}
    versions = first.pop("versions", {})
    if not any(_of(events, "step")):
        first = {key: value for key, value in first.items() if key not in TRAINING_SETTINGS}
    return {key: _setting(value) for key, value in {**first, **versions}.items()}


def _setting(value: Any) -> Cell:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _origin(folder: Path) -> dict[str, Any]:
    path = folder / "shearling.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}", found=str(error), expected="the JSON that prune or heal wrote", change="give a finished stage"
        ) from error


def _of(events: Events, kind: str) -> Iterator[Event]:
    return (event for event in events if event["event"] == kind)


def _mean(losses: Mapping[str, Any]) -> float:
    return sum(map(float, losses.values())) / len(losses)


def _alike(known: Mapping[str, float] | None, losses: Mapping[str, float]) -> bool:
    # As the table shows them.
    return known is not None and {d: f"{x:.4f}" for d, x in known.items()} == {d: f"{x:.4f}" for d, x in losses.items()}
