"""What the terminal shows: progress, tables, JSON."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shearling.loss.held_out import Measured
WAIT_SAID = 0.1  # share of a step's time
SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """Rich progress on the terminal, with time left; elsewhere, as in a job's log, a line a minute; silent where asked,
    and on all ranks but the first.
    """

    def __init__(self, *, quiet: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        quiet = quiet or os.environ.get("RANK", "0") != "0"
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._lines, self._last_line = not quiet and not console.is_terminal, monotonic()

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def steps(self, title: str, steps: int) -> Callable[[int, Mapping[str, float], Mapping[str, float]], None]:
        task, first = self._bars.add_task(title, total=steps, note=""), (0, monotonic())

        def update(step: int, figures: Mapping[str, float], excess: Mapping[str, float]) -> None:
            nonlocal first
            first = first if first[0] else (step, monotonic())  # steps before it were another command's, or compiled
            worst = sorted(excess, key=lambda domain: -excess[domain])[:3]
            behind = ", ".join(f"{domain} +{excess[domain]:.2f}" for domain in worst if excess[domain] > 0)
            note = "; ".join([step_note(figures), *([f"behind: {behind}"] * bool(behind))])
            self._bars.update(task, completed=step, note=note)
            left = (steps - step) * (monotonic() - first[1]) / max(1, step - first[0])
            self._line(f"{title}: step {step:,} of {steps:,}, {timedelta(seconds=round(left))} left; {note}")

        return update

    def documents(self, domain: str, documents: int, tokens: int) -> None:
        task = next((t.id for t in self._bars.tasks if t.description == domain), None)
        if task is None:
            task = self._bars.add_task(domain, total=None, note="")
        self._bars.update(task, completed=documents, note=f"{tokens:,} tokens")
        self._line(f"{domain}: {documents:,} documents, {tokens:,} tokens")

    def _line(self, said: str) -> None:
        if self._lines and monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = monotonic()
            print(said, file=sys.stderr, flush=True)


def step_note(figures: Mapping[str, float]) -> str:
    """What the progress line says of a step."""
    used = f", MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
    waits = f", {figures['data_wait_share']:.0%} waiting for data" if figures["data_wait_share"] > WAIT_SAID else ""
    speed = f"{figures['tokens_per_second']:,.0f} tokens/s{used}, {figures['memory_bytes'] / 1e9:.2f} GB"
    return f"loss {figures['loss']:.3f}; {speed}{waits}"


def print_json(value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    print(json.dumps(value, default=str))


def say_done(out: str, before: bool) -> None:
    print(f"{out}: {'already done' if before else 'done'}")


def print_table(title: str, values: Mapping[str, Any]) -> None:
    print(f"\n{title}")
    width = max(map(len, values))
    for key, value in values.items():
        print(f"  {key:<{width}}  {value:>18,}" if isinstance(value, int) else f"  {key:<{width}}  {value:>18}")


def print_losses(columns: Mapping[str, Mapping[str, float]]) -> None:
    """Held-out losses, a row a domain, and their mean."""
    domains = list(next(iter(columns.values())))
    rows = [(d, *(f"{losses[d]:.4f}" for losses in columns.values())) for d in domains]
    means = (f"{sum(losses.values()) / len(losses):.4f}" for losses in columns.values())
    print_rows(("held-out loss", *columns), [*rows, ("mean", *means)])


def print_figures(figures: Mapping[str, "Measured"]) -> None:
    """All figures of a measurement, a row a domain, and the mean loss."""
    head = ("held-out loss", "nats per token", "standard error", "nats per byte", "perplexity", "tokens", "documents")
    rows = [
        (
            domain,
            f"{found.nats_per_token:.4f}",
            _or_dash(found.standard_error),
            _or_dash(found.nats_per_byte),
            f"{found.perplexity:,.2f}",
            f"{found.tokens:,}",
            f"{found.documents:,}",
        )
        for domain, found in figures.items()
    ]
    mean = sum(found.nats_per_token for found in figures.values()) / len(figures)
    print_rows(head, [*rows, ("mean", f"{mean:.4f}", "", "", "", "", "")])


def _or_dash(figure: float | None) -> str:
    return "–" if figure is None else f"{figure:.4f}"


def print_rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        first, *rest = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join((first.strip().ljust(widths[0]), *rest)))


def in_bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
