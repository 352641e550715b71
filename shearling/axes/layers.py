"""Keys of a config that say something of each layer, and what they say of the layers that stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shearling.errors import UserError

Setting = Callable[[str], Any]  # a config's value by key, defaults filled in


@dataclass(frozen=True)
class LayerRule:
    """A key of the config that gives each layer a word, and how the words follow where the config doesn't list them.

    The key holds a list with an entry a layer or, with `lists`, the numbers of the layers that have that word. Else
    entry i is `then` where `at` says, `otherwise` elsewhere: `at` is "from KEY" (i >= config[KEY]) or "every KEY"
    ((i + 1) % config[KEY] == 0), KEY a key or a number. Without `at`, and where one of `needs` is null or false, all
    layers are alike.
    """

    key: str
    at: str = ""
    then: Any = None
    otherwise: Any = None
    needs: tuple[str, ...] = ()
    lists: Any = None

    def words(self, config: Mapping[str, Any], setting: Setting) -> list[Any] | None:
        """Each layer's word, None where all are alike. Raises UserError for a list that isn't one entry a layer."""
        layers, spelled = setting("num_hidden_layers"), config.get(self.key)
        if self.lists is None and spelled is not None:
            if len(spelled) != layers:
                found, expected = f"{len(spelled)} entries", f"{layers}, one a layer"
                raise UserError(self.key, found=found, expected=expected, change="mend config.json")
            return list(spelled)
        if not self.at or not all(setting(key) for key in self.needs):
            return None
        form, _, key = self.at.partition(" ")
        n = int(key) if key.isdigit() else setting(key)
        hits = [i >= n if form == "from" else bool(n) and (i + 1) % n == 0 for i in range(layers)]
        listed = (spelled or ()) if self.lists is not None else ()
        return [self.lists if i in listed else self.then if hit else self.otherwise for i, hit in enumerate(hits)]

    def written(self, words: Sequence[Any], kept: Sequence[int]) -> dict[str, Any]:
        """What a config says that keeps these of the layers with these words."""
        stay = [words[layer] for layer in kept]
        if self.lists is None:
            return {self.key: stay}
        # The rule itself is switched off: from here on only the list counts.
        _, _, key = self.at.partition(" ")
        off = {} if not key or key.isdigit() else {key: 1}
        return {self.key: [i for i, word in enumerate(stay) if word == self.lists], **off}
