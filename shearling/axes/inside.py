"""Text models that lie inside a whole, beside towers that see or hear, and what of those is cut along with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Inside:
    """Where a family's text model lies in the whole, and what becomes of everything else there.

    Names and keys go by their beginnings. A row of `connectors` (role `join`) is the last that a tower's features pass
    before they stand among the embeddings: it fills the residual stream, and is cut along it. What the whole's config
    says in other parts goes by dotted keys, `vision_config.hidden_size`, in the family's expressions and defaults too.
    """

    text_type: str  # the model type of the text model by itself: as that it is scored, trained and evaluated
    connectors: str  # a table of rows, named as on the whole's module
    carried: tuple[str, ...]  # starts of names in files: these tensors are written back as they are
    key: str = "text_config"  # where the whole's config has the text model's
    module: Mapping[str, str] = field(default_factory=dict)  # start of a name on the text model's module -> the whole's
    disk: Mapping[str, str] = field(default_factory=dict)  # start of a name in the text model's files -> in the whole's
    dropped: tuple[str, ...] = ()  # starts of names in files that transformers' class has no place for
    follows: Mapping[str, str] = field(default_factory=dict)  # the whole's key -> the size that it repeats
    refused: Mapping[str, str] = field(default_factory=dict)  # the whole's key -> why nothing but null or empty will do

    def on_module(self, name: str) -> str:
        """A parameter's name on the whole's module."""
        return _renamed(name, self.module)

    def on_disk(self, name: str) -> str:
        """A row's name in the whole's files, or its pieces' names, joined by `+`."""
        return "+".join(_renamed(part, self.disk) for part in name.split("+"))


def _renamed(name: str, starts: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in starts.items() if name.startswith(old)), name)
