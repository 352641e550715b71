"""What a model type's class does, tried: which parameters there are at which sizes, and what they do to the stream."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shearling.draft.build import on_meta, quiet, random_model, tokens
from shearling.draft.keys import SMALL, Keys
from shearling.draft.refused import Refused
from shearling.draft.stream import Ends, Part, read_block, read_ends
from shearling.draft.trace import Trace, blocks_of, trace

SAMPLES = 12  # sizes tried on the meta device: what three words in a product need, and SPARE
LEAST_LAYERS, MOST_LAYERS = 2, 12  # of the small models that are run
ROTARY = 4  # what absolute sizes of rotary parts are lowered to, where a small head has no room for them


@dataclass(frozen=True)
class Probe:
    """All that was found out. `samples` are entries per axis, `extents` by parameter the shape at each sample."""

    keys: Keys
    small: Mapping[str, Any]  # the config that was run
    model: Any
    trace: Trace
    blocks: tuple[tuple[Part, ...], ...]  # by layer
    ends: Ends
    samples: tuple[dict[str, int], ...]
    extents: Mapping[str, tuple[tuple[int, ...], ...]]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def prefix(self) -> str:
        """Of the blocks' paths, up to the layer's number."""
        return self.trace.blocks[0].rpartition(".")[0]


def probe(config: Mapping[str, Any]) -> Probe:
    """Raises Refused for whatever can't be built, run or explained."""
    keys, depth = runnable(Keys.read(config))
    if not keys.coupled and "num_attention_heads" in keys.names:
        keys = replace(keys, divides=keys.refuses(hidden=SMALL["hidden"] + 2))
    small = keys.small(layers=depth)
    model = random_model(small)
    found = trace(model, tokens(small[keys.names["vocab_size"]]), layers=depth)
    blocks = []
    for before, block in zip([None, *found.blocks], found.blocks, strict=False):
        came, went = found.at(block).input, found.at(block).output
        if before is not None and not torch.equal(found.at(before).output, came):
            raise Refused(f"{block} doesn't get what {before} gives: something happens between the layers")
        blocks.append(read_block(found, block, came, went))
    head = model.get_output_embeddings()
    ends = read_ends(found, found.at(found.blocks[0]).input, found.at(found.blocks[-1]).output, head)
    samples, extents = sample(keys, depth)
    return Probe(keys, small, model, found, tuple(blocks), ends, samples, extents)


def runnable(keys: Keys) -> tuple[Keys, int]:
    """The keys with whatever small models need to run at all, and how many layers show every kind. Raises Refused."""
    depth = _depth(keys)
    tried: list[Callable[[Keys], Keys]] = [lambda k: k]
    if keys.own_head_dim:
        tried.append(lambda k: replace(k, coupled=True))
    lowered = [
        key
        for key, value in keys.config.items()
        if isinstance(value, int) and not isinstance(value, bool) and value > SMALL["head_dim"] and "rotary" in key
    ]
    if lowered:
        tried.append(lambda k: k.changed(**dict.fromkeys(lowered, ROTARY)))
    said = ""
    for change in tried:
        changed = change(keys)
        try:
            small = changed.small(layers=depth)
            with torch.no_grad(), quiet():
                random_model(small)(tokens(small[keys.names["vocab_size"]]))
            return changed, depth
        except Exception as error:  # whatever a model does at sizes that it wasn't made for
            said = said or f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    raise Refused(f"a small model of this config doesn't run ({said})")


def _depth(keys: Keys) -> int:
    """Layers enough for one of each kind and another one: by their parameters and by what lists say of them."""
    try:
        model = on_meta(keys.small())
    except Exception as error:
        raise Refused(f"no small model of this config can be built ({type(error).__name__}: {error})") from error
    kinds = [
        (
            tuple((name, tuple(p.shape)) for name, p in model.get_submodule(block).named_parameters()),
            tuple(str(keys.config[key][layer]) for key in keys.layer_lists),
        )
        for layer, block in enumerate(blocks_of(model, keys.layers))
    ]
    last = max(kinds.index(kind) for kind in kinds)
    if last + 2 > MOST_LAYERS:
        raise Refused(f"layers of some kind come first at {last}: more than {MOST_LAYERS} would have to be run")
    return min(max(LEAST_LAYERS, last + 2), keys.layers)


def sample(keys: Keys, layers: int) -> tuple[tuple[dict[str, int], ...], dict[str, tuple[tuple[int, ...], ...]]]:
    """Extents of all parameters at random sizes: sizes that the class refuses are left out."""
    draw = random.Random(0)
    samples: list[dict[str, int]] = []
    extents: list[dict[str, tuple[int, ...]]] = []
    for _ in range(3 * SAMPLES):
        if len(samples) == SAMPLES:
            break
        axes = {
            "kv_head": draw.randint(1, 5),
            "group": draw.randint(1, 4) if keys.grouped else 1,
            "head_dim": 8 * draw.randint(1, 4),
            "intermediate": draw.randint(7, 60),
            "expert": draw.randint(4, 9),
            "moe": draw.randint(5, 40),
            "vocab": draw.randint(60, 99),
        }
        heads = axes["kv_head"] * axes["group"]
        axes["hidden"] = heads * axes["head_dim"] if keys.coupled else heads * 2 * draw.randint(2, 9)
        try:
            model = on_meta(keys.small(layers=layers, **axes))
        except Exception:  # sizes that the class refuses teach nothing
            continue
        samples.append(axes)
        extents.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    if len(samples) < SAMPLES:
        raise Refused("the class refuses nearly all sizes")
    names = list(extents[0])
    if any(list(found) != names for found in extents):
        raise Refused("which parameters there are depends on the sizes")
    return tuple(samples), {name: tuple(found[name] for found in extents) for name in names}


def owner(name: str) -> tuple[str, str]:
    """A parameter's module and its name there."""
    path, _, own = name.rpartition(".")
    return path, own


def module_of(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(owner(name)[0])
