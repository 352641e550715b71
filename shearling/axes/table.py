"""A family's table: a line a tensor, in the order of computation.

    role  name on the module  dim  dim  [options]

`*` in a name stands for the layer's number, `#` for an expert's. A line with one word heads a group for counting. Dims
are written as the tensor is stored, of axes, numbers and the family's `fixed` words.

Roles: `embed` fills the residual stream; `norm` normalises along its dim; `read` belongs to what reads the residual
stream (through the norm above it); `route` reads it to choose experts; `write` is the last operation before the
residual add, or before the `post` norm under it, which then is; `head` gives the logits; `inner` lies between readers
and writers and is cut alone; `join` gives what stands among the embeddings and comes from elsewhere (axes/inside.py).
A norm over heads normalises what the row above it gives.

Options: `bias=FLAG` adds a bias where the config's FLAG is true (`bias=always`: everywhere); `if=FLAG`: the row exists
under FLAG alone; `on=KIND` (`on=A|B`): on layers of that kind alone; `tied=NAME` says which tensor it shares storage
with where the config ties them; `disk=NAME` is its name in files; `norm=NAME` is the Normalisation of a norm that
isn't the family's first; `reads=NAME` is the norm it reads through where that isn't the one above it (`reads=-`: none);
`scaled=AXIS`: what the module gives is multiplied by the root of the axis's size.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from shearling.axes.axis import AXES, Dim

ROLES = ("embed", "norm", "read", "write", "head", "post", "route", "inner", "join")
OPTIONS = ("bias", "if", "on", "tied", "disk", "norm", "reads", "scaled")


@dataclass(frozen=True)
class Tensor:
    """One row: a parameter, or one per layer where the name has a `*`."""

    name: str
    role: str
    dims: tuple[Dim, ...]
    group: str
    norm: str = ""  # the norm through which a reader reads the residual stream
    when: tuple[str, ...] = ()  # the config flags under all of which the parameter exists
    on: tuple[str, ...] = ()  # the kinds of layers that have it; empty: all
    tied: str = ""  # the tensor that it shares storage with where the config ties embeddings
    disk: str = ""
    normalisation: str = ""  # of a norm: which of the family's; empty: the first
    scaled: str = ""  # the axis by the root of whose size the module multiplies what it gives
    is_bias: bool = False

    @property
    def per_layer(self) -> bool:
        return "*" in self.name

    @property
    def stream(self) -> int | None:
        """The dim that lies along the residual stream, None where none does."""
        return next((i for i, dim in enumerate(self.dims) if dim.axes() == ("hidden",)), None)

    @property
    def input(self) -> int | None:
        """The dim that a weight's module sums over; None for what isn't a matrix."""
        if self.is_bias or len(self.dims) < 2 or self.stream is None or self.role in ("embed", "inner"):
            return None
        matrix = (len(self.dims) - 2, len(self.dims) - 1)
        return next(i for i in matrix if (i == self.stream) is (self.role not in ("write", "join")))

    @property
    def output(self) -> int | None:
        """The dim of what a weight's module gives; None for what isn't a matrix."""
        return None if self.input is None else 2 * len(self.dims) - 3 - self.input

    @property
    def ends_stack(self) -> bool:
        """Whether it is the last weight that tokens go through in a stack of experts."""
        return self.role == "write" and self.stacked and not self.is_bias

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices (or of their biases), one for each expert."""
        return self.role in ("read", "write", "inner") and self.dims[0].axes() == ("expert",)

    def nested(self, dim: int) -> Dim | None:
        """A stack's dim with the stack's own in front, where it has a choice of its own in each matrix; None elsewhere.

        So `expert*moe_intermediate` for the `moe_intermediate` of a stack of experts.
        """
        if not self.stacked or not any("expert" in AXES[axis].within for axis in self.dims[dim].axes()):
            return None
        return Dim(tuple(("expert", *product) for product in self.dims[dim].products))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its size along each dim, where `sizes` has each word's."""
        return tuple(dim.size(sizes) for dim in self.dims)

    def at(self, layer: int | None) -> str:
        """The name on the module, for one layer."""
        return self.name.replace("*", str(layer))

    def at_disk(self, layer: int | None) -> str:
        """The name in files, for one layer; what lies in several is for axes/disk.py to say."""
        return (self.disk or self.name).replace("*", str(layer))


def rows(table: str, fixed: Collection[str] = ()) -> Iterator[Tensor]:
    """The tensors of a table, each bias after its weight. Raises ValueError for a line that can't be read."""
    group, norm = "", ""
    for line in filter(None, map(str.strip, table.splitlines())):
        words = line.split()
        if len(words) == 1:
            group = words[0]
            continue
        role, name, *rest = words
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        dims = tuple(Dim.parse(word, fixed) for word in rest if "=" not in word)
        if role not in ROLES or not dims or set(options) - set(OPTIONS):
            raise ValueError(f"a table's line is: role name dim [dim] [options], role one of {ROLES}; found {line!r}")
        if role == "norm" and dims[0].axes() == ("hidden",):
            norm = name
        reads = options.get("reads", norm if role in ("read", "route", "head") and "hidden" in _axes(dims) else "")
        weight = Tensor(
            name,
            role,
            dims,
            group,
            norm="" if reads == "-" else reads,
            when=_flags(options.get("if", "")),
            on=tuple(filter(None, options.get("on", "").split("|"))),
            tied=options.get("tied", ""),
            disk=options.get("disk", ""),
            normalisation=options.get("norm", ""),
            scaled=options.get("scaled", ""),
        )
        yield weight
        if "bias" in options:
            yield _bias(weight, options["bias"])


def _bias(weight: Tensor, flag: str) -> Tensor:
    """The bias of a weight: on all of its dims but the one that is summed over."""
    dims = weight.dims[:1] if weight.role == "inner" else weight.dims
    dims = tuple(dim for i, dim in enumerate(dims) if i != weight.input)
    name, disk = (bias_name(name) if name else "" for name in (weight.name, weight.disk))
    when = (*weight.when, *_flags(flag))
    return Tensor(
        name,
        weight.role,
        dims,
        weight.group,
        when=when,
        on=weight.on,
        disk=disk,
        normalisation=weight.normalisation,
        is_bias=True,
    )


def bias_name(weight: str) -> str:
    """`q_proj.bias` of `q_proj.weight`, `down_proj_bias` of a parameter that is `down_proj` itself."""
    return f"{weight.removesuffix('weight')}bias" if weight.endswith(".weight") else f"{weight}_bias"


def _flags(word: str) -> tuple[str, ...]:
    return tuple(flag for flag in word.split("&") if flag not in ("", "always"))


def _axes(dims: tuple[Dim, ...]) -> set[str]:
    return {axis for dim in dims for axis in dim.axes()}
