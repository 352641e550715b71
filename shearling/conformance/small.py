"""Small odd configs of a family, derived from its table: each axis of a size of its own, every flag both ways.

What the table doesn't speak of stays as transformers' own default has it, unless that would hide something.
"""

from collections.abc import Iterator, Mapping
from itertools import cycle, islice, product
from typing import Any

from shearling.axes.shape import KEYS, UNGROUPED
from shearling.axes.spec import Family

# Hidden is a multiple of whatever heads can be cut to: some configs insist on it.
SIZES = {
    "hidden": 36,
    "layer": 4,
    "head_dim": 8,
    "intermediate": 20,
    "expert": 5,
    "moe_intermediate": 12,
    "shared_intermediate": 28,
    "vocab": 43,
}
RATIOS = {
    "grouped": {"kv_head": 2, "group": 3},
    "multi-head": {"kv_head": 3, "group": 1},
    "one kv head": {"kv_head": 1, "group": 6},
}
TELLING = ("grouped, untied, all flags", "multi-head, tied, no flags")
FEW = 6  # layers, among which there is one of every kind
CHOSEN_EXPERTS = 2  # by each token
WINDOW = 8  # tokens: shorter than the texts tried, so that it matters which layers have one
LOGITS = {"times": 0.5, "over": 3.0, "cap": 2.0}  # what is done to logits, so that it shows
FACTOR = 1.5  # in place of multipliers of 1, which would hide what they multiply


def small(family: Family, model_type: str = "") -> dict[str, dict[str, Any]]:
    """Raw configs by name: every ratio of heads, tied and untied, with all the table's flags and with none."""
    base = _base(family, model_type or family.model_types[0])
    ratios = RATIOS if "group" in family.axes else {"multi-head": RATIOS["multi-head"]}
    found = {}
    for (ratio, sizes), tied, flagged in product(ratios.items(), (False, True), (True, False)):
        name = f"{ratio}, {'tied' if tied else 'untied'}, {'all' if flagged else 'no'} flags"
        flagging = {**dict.fromkeys(flags(family), flagged), "tie_word_embeddings": tied}
        found[name] = {
            **base,
            **_sized(family, {**SIZES, **sizes}),
            **_layers(family, base, spelled=flagged),
            **flagging,
        }
    return found


def telling(family: Family, model_type: str = "") -> dict[str, dict[str, Any]]:
    """Two of `small` that between them have everything both ways: for checks that take long."""
    found = small(family, model_type)
    first = TELLING[0] if TELLING[0] in found else next(iter(found))
    return {name: found[name] for name in (first, TELLING[1])}


def default(family: Family, model_type: str = "") -> dict[str, Any]:
    """transformers' own config of a type. Some of its classes refuse the nulls that they write, some of its models too:
    they are left out, or what the table takes them for.
    """
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type or family.model_types[0]).to_dict()
    sizes = {key: family.setting(config, key) for key in KEYS if key in config and key in family.defaults}
    return {**{key: value for key, value in config.items() if value is not None}, **sizes}


def shortened(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with FEW layers, for what would be the same with more."""
    listed = (rule.key for rule in family.layer_rules if rule.lists is None and config.get(rule.key))
    lists = {key: list(config[key])[:FEW] for key in listed}
    return {**config, **lists, family.names.get("num_hidden_layers", "num_hidden_layers"): FEW}


def flags(family: Family) -> tuple[str, ...]:
    """The config's flags that the table speaks of, ties apart."""
    named = (flag for row in family.tensors for flag in row.when)
    facts = (key for key, value in family.defaults.items() if isinstance(value, bool))
    return tuple(dict.fromkeys(key for key in (*named, *facts) if key != "tie_word_embeddings"))


def _sized(family: Family, sizes: Mapping[str, int]) -> dict[str, int]:
    """The config's sizes, coupled ones made to fit."""
    dims = KEYS if "group" in family.axes else UNGROUPED
    found = {key: dim.size(sizes) for key, dim in dims.items() if family.axes.issuperset(dim.axes())}
    for rule in family.coupled:
        whole, per, each = (word.strip() for word in rule.replace("==", "*").split("*"))
        found[whole] = found[per] * found.pop(each)  # which such a config derives
    return {family.names.get(key, key): size for key, size in found.items()}


def _layers(family: Family, base: Mapping[str, Any], *, spelled: bool) -> dict[str, Any]:
    """Layers of every kind, by lists that name them one by one, or by the rule where the config can hold one."""
    found: dict[str, Any] = {}
    for rule in family.layer_rules:
        form, _, key = rule.at.partition(" ")
        if rule.lists is not None:
            found[rule.key] = [1] if spelled else []
        elif spelled or not rule.at or key.isdigit():
            words = (rule.then, rule.otherwise) if rule.at else tuple(dict.fromkeys(base.get(rule.key) or ()))
            if words:
                found[rule.key] = [*islice(cycle(words), SIZES["layer"])]
        if rule.at and not key.isdigit():
            found[key] = SIZES["layer"] // 2 if form == "from" or not spelled else 1
    return found


def _base(family: Family, model_type: str) -> dict[str, Any]:
    """What a type's small configs share: no ids beyond the vocabulary, windows that matter, what is fixed small."""
    from transformers import AutoConfig, PreTrainedConfig

    default = AutoConfig.for_model(model_type).to_dict()
    own = default.keys() - PreTrainedConfig().to_dict().keys()
    config: dict[str, Any] = {"model_type": model_type}
    config |= {key: None for key in default if key.endswith("_token_id")}
    config |= {key: FACTOR for key in own if default[key] == 1.0 and isinstance(default[key], float)}
    config |= {key: LOGITS[how] for how, key in family.logits.items()}
    config |= {key: _shrunk(default[key]) for key in _fixed(family) if isinstance(default.get(key), int)}
    config |= {rule.key: default.get(rule.key) for rule in family.layer_rules if not rule.at}
    if "rotary" in family.axes:  # said, since a theta that the class fills in can't be changed
        config["rope_parameters"] = default["rope_parameters"]
    if "sliding_window" in own:
        config["sliding_window"] = WINDOW
    if "num_experts_per_tok" in own:
        config["num_experts_per_tok"] = CHOSEN_EXPERTS
    return config


def _fixed(family: Family) -> Iterator[str]:
    """Keys that sizes which are never cut are made of, those apart that are sizes of axes."""
    sizes = {*KEYS, *family.names.values()}
    for expression in family.fixed.values():
        yield from (word for word in str(expression).split() if word.isidentifier() and word not in sizes)


def _shrunk(size: int) -> int:
    """An eighth, so that ratios stay; what is small already stays too."""
    return size if size <= SIZES["head_dim"] else max(2, size // 8)
