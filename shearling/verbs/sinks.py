"""Where a stage's figures go besides its record: TensorBoard, Weights & Biases. Training needs none of them."""

import logging
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from shearling.errors import UserError, raise_all
from shearling.record import Record

log = logging.getLogger(__name__)

EVENTS = ("step", "held_out")  # of the record, whose numbers are told
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


class Sink(Protocol):
    """Takes figures by name over the tokens trained on, which go on from phase to phase as steps don't."""

    def tell(self, tokens: int, figures: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder OUT.tensorboard; a resumed run's lie beside those before, on the same points."""

    def __init__(self, out: Path):
        self._writer = import_module(MODULES["tensorboard"]).SummaryWriter(
            str(out.with_name(f"{out.name}.tensorboard"))
        )

    def tell(self, tokens: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, global_step=tokens)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "shearling", named after the stage's folder; its environment variables say more."""

    def __init__(self, out: Path):
        self._run = import_module(MODULES["wandb"]).init(project="shearling", name=out.name)
        self._run.define_metric("*", step_metric="tokens")

    def tell(self, tokens: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "tokens": tokens})

    def close(self) -> None:
        self._run.finish()


KINDS: Mapping[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_sinks(names: Iterable[str]) -> None:
    """Raises UserError for those whose package isn't installed, with the extra that brings it."""
    raise_all([missing for name in names for missing in _missing(name)])


def _missing(name: str) -> list[UserError]:
    try:
        import_module(MODULES[name])
    except ImportError as error:
        change = f"pip install 'shearling[{name}]', or leave the sink out"
        return [UserError(f"sink {name}", found=str(error), expected="its package", change=change)]
    return []


class Sinks:
    """Those of one stage, while it is entered. One that fails is left out from then on, which is said once."""

    def __init__(self, names: Iterable[str], out: Path):
        self._names, self._out = tuple(dict.fromkeys(names)), out
        self._open: dict[str, Sink] = {}
        self._tokens = 0

    def __enter__(self) -> "Sinks":
        for name in self._names:
            try:
                self._open[name] = KINDS[name](self._out)
            except Exception as error:
                _gave_up(name, error)
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda sink: sink.close())

    def tell(self, event: str, fields: Mapping[str, Any]) -> None:
        """The numbers of an event of the record."""
        if event in EVENTS:
            self._tokens = max(self._tokens, fields.get("tokens", 0))
            of = fields.get("of")
            figures = dict(numbers(fields, f"{event}/{of}" if of else event))
            self._each(lambda sink: sink.tell(self._tokens, figures))

    def _each(self, work: Any) -> None:
        for name, sink in list(self._open.items()):
            try:
                work(sink)
            except Exception as error:
                del self._open[name]
                _gave_up(name, error)


class Heard(Record):
    """A record whose events sinks are told as well."""

    def __init__(self, path: Path, sinks: Sinks):
        super().__init__(path)
        self._sinks = sinks

    def write(self, event: str, /, **fields: object) -> None:
        super().write(event, **fields)
        self._sinks.tell(event, fields)


def numbers(fields: Mapping[str, Any], under: str) -> Iterable[tuple[str, float]]:
    """Of an event all numbers, those inside mappings too, by their path: step/loss, held_out/losses/code."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{under}/{key}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{under}/{key}", value


def _gave_up(name: str, error: Exception) -> None:
    log.warning("sink %s failed and is left out from here on (%s: %s)", name, type(error).__name__, error)
