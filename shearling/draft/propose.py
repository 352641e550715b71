"""A family, put together from what probing found. Nothing in it is believed before it is proved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shearling.axes.layers import LayerRule
from shearling.axes.spec import Family, Normalisation
from shearling.draft.build import make_config, quiet
from shearling.draft.facts import costs, head_is_tied, logits_keys, norm_kinds
from shearling.draft.keys import Keys
from shearling.draft.probe import Probe
from shearling.draft.refused import Refused
from shearling.draft.rows import CHANNELS, Line, Rows, embedding_scale

# Keys that say nothing of what a model computes, or nothing that a table could depend on.
HARMLESS = (
    "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "initializer_range",
    "output_attentions", "output_hidden_states", "return_dict", "model_type", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "pretraining_tp", "task_specific_params",
)  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """A family, still with a choice of layouts: `lines` in the order of the table, headings among them.

    `doubts` are axes that can't be cut along, and why.
    """

    probe: Probe
    lines: tuple[Line | str, ...]
    facts: Mapping[str, Any]
    doubts: Mapping[str, str]

    def family(self, choice: Mapping[str, tuple[int, ...]], uncut: Mapping[str, str] | None = None) -> Family:
        """With these layouts, by row, and these axes left whole."""
        text = [line if isinstance(line, str) else line.text(choice.get(line.name, ())) for line in self.lines]
        return Family(**self.facts, table="\n".join(text) + "\n", uncut={**self.doubts, **(uncut or {})})


def propose(probe: Probe) -> Proposal:
    """Raises Refused, naming what isn't explained."""
    rows = Rows(probe)
    lines = list(_lines(probe, rows))
    paths = {
        line.name.removesuffix(".weight"): line
        for line in lines
        if isinstance(line, Line) and line.role in ("norm", "post")
    }
    kinds = norm_kinds(probe, {star: _module(probe, star) for star in paths})
    norms = _named(kinds)
    named: list[Line | str] = []
    for line in lines:
        star = line.name.removesuffix(".weight") if isinstance(line, Line) else ""
        if isinstance(line, Line) and star in kinds and len(norms) > 1:
            name = next(name for name, kind in norms.items() if kind == kinds[star])
            option = () if name == next(iter(norms)) else (f"norm={name}",)
            line = Line(line.role, line.name, line.dims, (*line.options, *option))
        named.append(line)
    cache, scores = costs(probe)
    facts: dict[str, Any] = {
        "name": f"{probe.keys.config['model_type']} (drafted)",
        "model_types": (probe.keys.config["model_type"],),
        "norms": norms if len(norms) > 1 else next(iter(norms.values())),
        "cache": cache,
        "scores": scores,
        "names": {size: key for size, key in probe.keys.names.items() if size != key},
        "defaults": _defaults(probe),
        "logits": logits_keys(probe),
        "requires": _required(probe.keys),
        "layer_rules": tuple(LayerRule(key) for key in probe.keys.layer_lists),
    }
    doubts = _doubts(probe, named)
    if CHANNELS in " ".join(way for line in named if isinstance(line, Line) for ways in line.dims for way in ways):
        facts["fixed"] = {CHANNELS: "hidden_size"}
    if probe.keys.divides:
        facts["divides"] = ("hidden_size % num_attention_heads",)
    if probe.keys.coupled:
        facts["coupled"] = ("hidden_size == num_attention_heads * head_dim",)
    return Proposal(probe, tuple(named), facts, doubts)


def _lines(probe: Probe, rows: Rows) -> Iterator[Line | str]:
    yield "embedding"
    for part in probe.ends.embeds:
        scale = embedding_scale(probe, part) if part is probe.ends.embeds[0] else 1.0
        scaled = ("scaled=hidden",) if abs(scale - probe.small[probe.keys.names["hidden_size"]] ** 0.5) < 1e-3 else ()
        yield Line(
            "embed", f"{part.path}.weight", (_first_dim(probe, rows, f"{part.path}.weight"), ("hidden",)), scaled
        )
    blocks = [tuple(rows.block(layer)) for layer in range(probe.depth)]
    for layer, block in enumerate(blocks):
        if block != blocks[0]:
            raise Refused(f"layer {layer} is built differently from layer 0: kinds of layers aren't drafted yet")
        missing = rows.missing(block, layer)
        if missing:
            raise Refused(f"{missing[0]} is in no module that was called: what it does wasn't found")
    heading = ""
    for line in blocks[0]:
        child = line.name.removeprefix(f"{probe.prefix}.*.").partition(".")[0]
        if line.role != "norm" and line.role != "post" and child != heading:
            heading = child
            yield heading
        yield line
    yield "head"
    yield Line("norm", f"{probe.ends.norm}.weight", (("hidden",),), _bias(probe, probe.ends.norm))
    head = f"{probe.ends.head}.weight"
    tied = (f"tied={probe.ends.embeds[0].path}.weight",) if head_is_tied(probe.model) else ()
    yield Line("head", head, (("vocab",), ("hidden",)), (*_bias(probe, probe.ends.head), *tied))
    outside = {name for name in probe.extents if not name.startswith(f"{probe.prefix}.")}
    known = {part.path for part in (*probe.ends.embeds,)} | {probe.ends.norm, probe.ends.head}
    strange = sorted(name for name in outside if name.rpartition(".")[0] not in known)
    if strange:
        raise Refused(f"{strange[0]} lies outside the blocks, and what it does wasn't found")


def _first_dim(probe: Probe, rows: Rows, name: str) -> tuple[str, ...]:
    extents = [shape[0] for shape in probe.extents[name]]
    if extents == [sample["vocab"] for sample in probe.samples]:
        return ("vocab",)
    return rows.dims(name, 1)[0]


def _bias(probe: Probe, path: str) -> tuple[str, ...]:
    return ("bias=always",) if "bias" in probe.trace.at(path).own else ()


def _module(probe: Probe, star: str) -> str:
    return star.replace(f"{probe.prefix}.*", probe.trace.blocks[0])


def _named(kinds: Mapping[str, Normalisation]) -> dict[str, Normalisation]:
    """The kinds of norms under names, the commonest first."""
    order = sorted(dict.fromkeys(kinds.values()), key=lambda kind: -list(kinds.values()).count(kind))
    return {("stream" if i == 0 else f"kind{i}"): kind for i, kind in enumerate(order)}


def _defaults(probe: Probe) -> dict[str, Any]:
    """What the class fills in for the sizes and flags that the config leaves out."""
    keys = probe.keys
    found: dict[str, Any] = {"tie_word_embeddings": head_is_tied(probe.model)}
    for size, key in keys.names.items():
        if keys.raw.get(key) is None or size == "head_dim":  # which a cut may have to write out
            found[key] = _derived(keys, size)
    if "num_attention_heads" in keys.names:
        found.setdefault("head_dim", "hidden_size / num_attention_heads")
    return {key: value for key, value in found.items() if value is not None}


def _required(keys: Keys) -> dict[str, Any]:
    """All that the config says beside its sizes: what the table is proved with, and for."""
    sizes = {*keys.names.values(), *keys.layer_lists}
    return {
        key: value
        for key, value in keys.raw.items()
        if key not in sizes and key not in HARMLESS and not key.endswith(("_token_id", "dropout", "pdrop"))
    }


def _derived(keys: Keys, size: str) -> Any:
    """An expression for what the class makes of a size that the config leaves out, or the number itself."""
    ways = {
        "num_key_value_heads": "num_attention_heads",
        "head_dim": "hidden_size / num_attention_heads",
        "intermediate_size": "4 * hidden_size",
    }
    key = keys.names[size]
    left_out = {k: v for k, v in keys.small(layers=2).items() if k != key}
    if key in keys.raw and keys.raw[key] is None:
        left_out[key] = None
    with quiet():
        made = make_config(left_out)
    hidden, heads = left_out[keys.names["hidden_size"]], left_out.get(keys.names.get("num_attention_heads", ""), 1)
    value, way = getattr(made, key, None), ways.get(size)
    expected = {
        "num_attention_heads": heads,
        "hidden_size / num_attention_heads": hidden // heads,
        "4 * hidden_size": 4 * hidden,
    }
    if way is not None and (value is None or value == expected[way]):
        return way
    return value


def _doubts(probe: Probe, lines: list[Line | str]) -> dict[str, str]:
    """Axes that can't be cut along by what is known already."""
    found = {}
    text = " ".join(way for line in lines if isinstance(line, Line) for ways in line.dims for way in ways)
    if CHANNELS in text:
        found["hidden"] = "sizes inside a block follow hidden_size in the model's own code"
    with quiet():
        derived = [key for key in probe.keys.layer_lists if key not in probe.keys.raw]
    if derived:
        found["layer"] = f"the class derives {derived[0]} from the number of layers: write it out in config.json"
    return found


def check_ties(probe: Probe) -> None:
    """Raises Refused where the config says of ties what isn't so."""
    said = getattr(make_config(probe.small), "tie_word_embeddings", False)
    if bool(said) and not head_is_tied(probe.model):
        raise Refused("tie_word_embeddings is true, but the head's weight isn't the embedding's")
