"""The rows of a table: what each parameter is to the stream, and of which axes its dims are built.

x W + b is held against what each module gives, so that a module which does more than its weights say is found out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from shearling.draft.fit import fit, layouts
from shearling.draft.probe import Probe
from shearling.draft.refused import Refused
from shearling.draft.stream import Part
from shearling.draft.trace import Call, same

CHANNELS = "channels"  # the fixed word for hidden_size where something inside a block is of that size
ROLES = {"inner norm": "norm", "experts": "inner"}
MOST_LAYOUTS = 6


@dataclass(frozen=True)
class Line:
    """One row to be, with the ways its dims may be laid out in memory; the first is the likeliest."""

    role: str
    name: str
    dims: tuple[tuple[str, ...], ...]
    options: tuple[str, ...] = ()

    def text(self, choice: Sequence[int] = ()) -> str:
        """The line, with these of the layouts of its dims, or with the likeliest."""
        dims = (ways[i] for ways, i in zip(self.dims, choice or [0] * len(self.dims), strict=True))
        return " ".join((self.role, self.name, *dims, *self.options))


class Rows:
    """Makes the lines of one probe."""

    def __init__(self, probe: Probe):
        self.probe = probe
        self.parameters = dict(probe.model.named_parameters(remove_duplicate=False))

    @cached_property
    def words(self) -> tuple[str, ...]:
        keys = self.probe.keys
        found = ["kv_head", *(["group"] if keys.grouped else []), "head_dim"]
        found += [
            word
            for word, size in (
                ("intermediate", "intermediate_size"),
                ("expert", "num_experts"),
                ("moe_intermediate", "moe_intermediate_size"),
            )
            if size in keys.names
        ]
        return (*found, *([] if keys.coupled else ["hidden"]))

    def dims(self, name: str, stream: int | None) -> tuple[tuple[str, ...], ...]:
        """The layouts of each dim of a parameter, of which `stream` lies along the residual stream."""
        seen = self.probe.extents[name]
        if not seen[0]:
            raise Refused(f"{name} is a single number: no term of a table stands for it")
        return tuple(self._dim(name, d, [shape[d] for shape in seen], d == stream) for d in range(len(seen[0])))

    def _dim(self, name: str, dim: int, extents: list[int], stream: bool) -> tuple[str, ...]:
        samples = [{**s, "moe_intermediate": s["moe"]} for s in self.probe.samples]
        if stream:
            if extents != [s["hidden"] for s in samples]:
                raise Refused(f"dim {dim} of {name} lies along the stream but isn't the hidden size")
            return ("hidden",)
        found = fit(samples, extents, self.words)
        if found is None:
            raise Refused(f"dim {dim} of {name}, {extents[:3]} at three sizes, is no sum of products of axes")
        ways = [text.replace("hidden", CHANNELS) for text in layouts(found)]
        return tuple(ways[:MOST_LAYOUTS])

    def block(self, layer: int) -> Iterator[Line]:
        """The lines of one layer's block, in order, its norms' reads told where they aren't the norm above."""
        above = ""
        parts = _ordered(self.probe, layer)
        for part in parts:
            if part.role == "norm":
                above = part.path
            reads = ""
            if part.role in ("read", "experts") and part.reads != above:
                reads = "reads=-" if part.reads == "-" else f"reads={self.starred(part.reads, layer)}.weight"
            yield from self.part(part, layer, reads)

    def starred(self, path: str, layer: int | None) -> str:
        if layer is None:
            return path
        block = self.probe.trace.blocks[layer]
        return f"{self.probe.prefix}.*{path.removeprefix(block)}"

    def part(self, part: Part, layer: int | None, reads: str = "") -> Iterator[Line]:
        """The lines of one module."""
        call, star = self.probe.trace.at(part.path), self.starred(part.path, layer)
        role = ROLES.get(part.role, part.role)
        if part.role in ("norm", "post", "inner norm"):
            along = None if part.role == "inner norm" else 0
            bias = ("bias=always",) if "bias" in call.own else ()
            yield Line(role, f"{star}.weight", self.dims(f"{part.path}.weight", along), bias)
        elif part.role in ("read", "write", "inner") and (inputs := input_dim(call)) is not None:
            stream = {"read": inputs, "write": 1 - inputs, "inner": None}[part.role]
            options = (*(("bias=always",) if "bias" in call.own else ()), *((reads,) if reads else ()))
            yield Line(role, f"{star}.weight", self.dims(f"{part.path}.weight", stream), options)
        elif part.role == "inner" or (part.role == "read" and _has_inner(call.module)):
            for own in call.own:
                yield Line("inner", f"{star}.{own}", self.dims(f"{part.path}.{own}", None))
        else:
            does = "holds experts" if part.role == "experts" else f"{part.role}s the stream"
            raise Refused(
                f"{part.path}, a {type(call.module).__name__}, {does} in a way that no role of a table describes"
            )

    def missing(self, lines: Sequence[Line], layer: int) -> list[str]:
        """Parameters of a block that no line stands for."""
        block = self.probe.trace.blocks[layer]
        named = {line.name for line in lines}
        named |= {line.name.removesuffix("weight") + "bias" for line in lines if "bias=always" in line.options}
        return [
            name
            for name in self.probe.extents
            if name.startswith(f"{block}.") and self.starred(name, layer) not in named
        ]


def input_dim(call: Call) -> int | None:
    """Which dim of a module's weight it sums over; None for a module that is no product with its weight, and a bias."""
    if not {"weight"} <= set(call.own) <= {"weight", "bias"}:
        return None
    weight, bias = call.module.get_parameter("weight"), dict(call.module.named_parameters()).get("bias")
    if weight.dim() != 2:
        return None
    x = call.input.double()
    for dim in (1, 0):
        if x.shape[-1] != weight.shape[dim]:
            continue
        y = x @ (weight.double().T if dim == 1 else weight.double())
        if same(call.output, y if bias is None else y + bias.double()):
            return dim
    return None


def _has_inner(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _ordered(probe: Probe, layer: int) -> list[Part]:
    """The parts of a block, norms over all heads directly under the projection whose result they normalise."""
    parts = list(probe.blocks[layer])
    for part in [p for p in parts if p.role == "inner norm"]:
        came = probe.trace.at(part.path).input
        source = next((p for p in parts if p is not part and same(probe.trace.at(p.path).output, came)), None)
        if source is not None:
            parts.remove(part)
            parts.insert(parts.index(source) + 1, part)
    return parts


def embedding_scale(probe: Probe, part: Part) -> float:
    """What a row of the token table is multiplied by on its way into the stream. Raises Refused if there is none."""
    call = probe.trace.at(part.path)
    weight = probe.model.get_parameter(f"{part.path}.weight").detach().double()
    rows: Tensor = weight[probe.trace.ids]
    ratio = float((call.output.double() * rows).sum() / rows.square().sum())
    if not same(call.output, ratio * rows):
        raise Refused(f"{part.path} gives something else than rows of its table")
    return ratio * part.scale
