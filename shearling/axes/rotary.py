"""Which entries of q and k may stay. Rotary positions turn them in pairs, by one set of frequencies for all heads.

D entries of a head before, m after; entry i turns with entry i + D / 2, by theta^(-2 i / D) a position (RoFormer, arXiv
2104.09864, eq. 15). A config holds theta and D and no frequencies, so a reloaded model has those of two choices alone:

prefix  the first m / 2 pairs, the fastest ones, at theta^(m / D)
stride  every (D / m)th pair, from the fastest to the slowest, at the same theta
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shearling.errors import UserError

EACH_BY_ITSELF = ("default", "linear", "llama3")  # what rope types do that look at one frequency at a time
THETAS = ("rope_theta", "rope_local_base_freq")


def unturnable(config: Mapping[str, Any]) -> str:
    """Why entries of q and k can't go from a model with this config; empty if they can."""
    for rope in _ropes(config):
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in EACH_BY_ITSELF:
            return f"its rotary positions are of the type {kind!r}, whose frequencies depend on head_dim otherwise"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return "only a part of each head's entries has rotary positions"
    return ""


def ways(config: Mapping[str, Any]) -> tuple[str, ...]:
    """How the entries that stay may be chosen: not the first ones where the config leaves theta to its class."""
    stated = any(key in rope for rope in _ropes(config) for key in THETAS)
    return ("prefix", "stride") if stated else ("stride",)


def selections(ways: Sequence[str], size: int, kept: int) -> Iterator[tuple[int, ...]]:
    """The choices of `kept` among `size` entries that a config can say, each ascending."""
    if kept % 2 == 0 and "prefix" in ways:
        yield _pairs(range(kept // 2), size)
    if kept % 2 == 0 and size % kept == 0 and "stride" in ways:
        yield _pairs(range(0, size // 2, size // kept), size)


def config_keeping(config: Mapping[str, Any], entries: Sequence[int], size: int) -> dict[str, Any]:
    """The keys that change where these of `size` entries stay: theta, where they are the first ones."""
    if tuple(entries) in selections(("stride",), size, len(entries)):
        return {}
    share = len(entries) / size
    return {key: _slowed(value, key, share) for key, value in config.items() if key in (*THETAS, "rope_parameters")}


def _slowed(value: Any, key: str, share: float) -> Any:
    """A theta to the power `share`, wherever it is in what the config has under a key."""
    if isinstance(value, Mapping):
        return {inner: _slowed(one, inner, share) for inner, one in value.items()}
    return float(value) ** share if key in THETAS and value is not None else value


def _pairs(chosen: Sequence[int], size: int) -> tuple[int, ...]:
    return (*chosen, *(i + size // 2 for i in chosen))


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every set of a config's settings for rotary positions, the config's own level among them."""
    yield {key: config[key] for key in (*THETAS, "partial_rotary_factor") if config.get(key) is not None}
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key) or {}
        if not isinstance(found, Mapping):
            change = "mend config.json"
            raise UserError(f"config.json: {key}", found=repr(found), expected="keys and values", change=change)
        kinds = [one for one in found.values() if isinstance(one, Mapping)]
        yield from kinds or [found]
