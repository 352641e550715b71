"""YAML that says what it means: a key that comes twice is an error, not a silent last one."""

from pathlib import Path
from typing import Any

import yaml

from shearling.errors import UserError


class StrictLoader(yaml.SafeLoader):
    """Plain values alone, each key of a mapping once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merged = "tag:yaml.org,2002:merge"  # `<<: *other` may come beside keys that override the other's
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merged]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(sorted(map(repr, twice)))} comes twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_mapping(path: Path, *, what: str, change: str = "mend the file") -> dict[str, Any]:
    """The keys and values of a YAML file, of which JSON is a kind; `what` it is. Raises UserError, a key twice too."""
    what = f"{what} {path}"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise UserError(what, found=error.strerror, expected="a YAML file", change="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(what, found=str(error), expected="YAML", change="mend the file") from error
    if not isinstance(values, dict):
        raise UserError(what, found=type(values).__name__, expected="keys and values", change=change)
    return values
