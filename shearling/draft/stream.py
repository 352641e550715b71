"""The residual stream of a traced pass: who reads it, through which norm, and who writes it.

D hidden. A block is explained when its output is its input plus what some of its modules gave, as they gave it; a norm
reads the stream where its input is the block's input plus some of that. What isn't so is no stream that a table knows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from shearling.draft.refused import Refused
from shearling.draft.trace import Call, Trace, explain, same


@dataclass(frozen=True)
class Part:
    """One module with parameters of its own, by what it does to the stream.

    `role` is a table's, or "route" or "experts". `reads` is the path of the norm that a reader reads through; "-" for
    one that reads the stream as it is.
    """

    path: str
    role: str
    reads: str = ""
    scale: float = 1.0  # what is multiplied into a writer's result before the add


def read_block(trace: Trace, block: str, before: Tensor, after: Tensor) -> tuple[Part, ...]:
    """The parts of one block in order. Raises Refused, naming what isn't explained."""
    return _Block(trace.inside(block), block, before, after).parts()


class _Block:
    def __init__(self, units: Sequence[Call], block: str, before: Tensor, after: Tensor):
        self.units, self.block, self.before = units, block, before
        wide = [u for u in units if u.output.numel() == before.numel() and u.output.shape[-1] == before.shape[-1]]
        # Of modules that gave the same, as a projection and what merely passes it on, the first.
        wide = [u for i, u in enumerate(wide) if not any(same(u.output, other.output) for other in wide[:i])]
        found = explain(after, [before, *(u.output for u in wide)])
        if found is None:
            raise Refused(
                f"what {block} gives is not its input plus what its modules give: something between them changes it"
            )
        if abs(found.pop(0, 0.0) - 1.0) > 1e-6:
            raise Refused(f"{block} gives the stream on changed: a norm after the residual add, or a scaled residual")
        self.scales = {wide[j - 1].path: scale for j, scale in found.items()}
        self.norms: dict[str, Tensor] = {}  # what the norms of the stream gave, by path

    def parts(self) -> tuple[Part, ...]:
        found: list[Part] = []
        for unit in self.units:
            part = self._norm(unit, found) if is_norm(unit) else self._linear(unit)
            found.append(part)
        return tuple(found)

    def _norm(self, unit: Call, found: list[Part]) -> Part:
        if self._is_stream(unit.input):
            self.norms[unit.path] = unit.output
            if unit.path in self.scales:
                raise Refused(f"{unit.path} reads the stream and writes it: a norm that is a block of its own")
            return Part(unit.path, "norm")
        if unit.path in self.scales:
            above = next((u for u in self.units if same(u.output, unit.input)), None)
            if above is None:
                raise Refused(f"{unit.path} is a norm before the residual add, but what it normalises wasn't found")
            place = next(i for i, part in enumerate(found) if part.path == above.path)
            found[place] = Part(above.path, "write")
            return Part(unit.path, "post", scale=self.scales[unit.path])
        return Part(unit.path, "inner norm")

    def _linear(self, unit: Call) -> Part:
        reads = next((path for path, gave in self.norms.items() if same(gave, unit.input)), "")
        if not reads and self._is_stream(unit.input):
            reads = "-"
        if unit.path in self.scales:
            if reads and not unit.own == ("gate_up_proj", "down_proj"):
                raise Refused(f"{unit.path} reads the stream and writes it at once: no role of a table does")
            return Part(unit.path, "experts" if reads else "write", reads, self.scales[unit.path])
        if reads:
            return Part(unit.path, "read", reads)
        return Part(unit.path, "inner")

    def _is_stream(self, x: Tensor) -> bool:
        """Whether x is the block's input plus what some of the writers so far gave, as they give it to the stream."""
        if x.numel() != self.before.numel() or x.shape[-1] != self.before.shape[-1]:
            return False
        writers = [u for u in self.units if u.path in self.scales]
        found = explain(x, [self.before, *(u.output for u in writers)])
        if found is None or abs(found.pop(0, 0.0) - 1.0) > 1e-6:
            return False
        return all(abs(c - self.scales[writers[j - 1].path]) < 1e-6 for j, c in found.items())


def is_norm(unit: Call) -> bool:
    """A module with a weight of one dim, or a bias beside it, whose result is of its input's shape."""
    return (
        set(unit.own) <= {"weight", "bias"}
        and "weight" in unit.own
        and unit.module.get_parameter("weight").dim() == 1
        and unit.input.shape == unit.output.shape
    )


@dataclass(frozen=True)
class Ends:
    """What lies before the first block and after the last: embeddings, perhaps their norm, the last norm, the head."""

    embeds: tuple[Part, ...]
    norm: str
    head: str
    logits: float | None  # what the head's result is multiplied by; None: something else is done to it
    capped: bool = False


def read_ends(trace: Trace, first: Tensor, last: Tensor, head: nn.Module | None) -> Ends:
    """The parts outside the blocks; `first` comes into the first block, `last` out of the last one."""
    units = [u for u in trace.units() if not any(u.path.startswith(f"{block}.") for block in trace.blocks)]
    tail = next((u for u in units if u.module is head), None)
    if tail is None:
        raise Refused("the model's head wasn't called")
    early = [u for u in units if u is not tail]
    found = explain(first, [u.output for u in early])
    if found is None:
        raise Refused("what comes into the first block is not a sum of what embeddings give")
    embeds = []
    for j, scale in found.items():
        unit = early[j]
        if not isinstance(unit.module, nn.Embedding):
            raise Refused(f"{unit.path}, a {type(unit.module).__name__}, stands between the embedding and the blocks")
        embeds.append(Part(unit.path, "embed", scale=scale))
    norm = next((u for u in early if is_norm(u) and same(u.input, last)), None)
    if norm is None or not same(norm.output, tail.input):
        raise Refused("the head doesn't read the last block's output through a norm with a weight")
    scale = explain(trace.logits, [tail.output])
    return Ends(tuple(embeds), norm.path, tail.path, scale[0] if scale else None)
