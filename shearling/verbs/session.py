"""A training stage made ready: what the user left open chosen, once, from the model, the budget and the data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite, log2
from typing import Any

import torch

from shearling.axes.count import flops_per_token
from shearling.axes.shape import Shape
from shearling.data.feed import Feed, by_size
from shearling.data.loader import bytes_per_token
from shearling.data.store import Store
from shearling.errors import UserError, raise_all
from shearling.loss.held_out import Measured, measure
from shearling.recipe import Training
from shearling.train.optim import default_lr
from shearling.train.schedule import cosine, trapezoid
from shearling.train.step import Settings, State
from shearling.verbs.source import Source

FORWARD_TOKENS = 8192  # tokens that go through the model at once
Watch = Callable[[str, int], Callable[[int, float], None]]  # (title, steps) -> called with (step, loss)


def unwatched(title: str, steps: int) -> Callable[[int, float], None]:
    """No progress shown."""
    return lambda step, loss: None


@dataclass(frozen=True)
class Session:
    """All that one call of the training loop needs beside the model, and the rate to train at."""

    settings: Settings
    feed: Feed
    device: str
    lr: float
    eval_windows: int

    @classmethod
    def plan(cls, asked: Training, source: Source, store: Store, *, default_tokens: int) -> "Session":
        """Fills in what `asked` leaves open."""
        source.check_store(store)
        device = choose_device(asked.device)
        seq_len = asked.seq_len or source.seq_len()
        tokens = asked.tokens or (asked.steps or 0) * (asked.batch_tokens or 0) or default_tokens
        batch_tokens = asked.batch_tokens or default_batch_tokens(source.parameters, tokens)
        sequences = max(1, round(batch_tokens / seq_len))
        steps = asked.steps or max(1, round(tokens / (sequences * seq_len)))
        micro = asked.micro_sequences or max(1, FORWARD_TOKENS // seq_len)
        settings = Settings(
            steps=steps,
            seq_len=seq_len,
            batch_sequences=sequences,
            micro_sequences=min(micro, sequences),
            schedule=_schedule(asked),
            clip_norm=asked.clip_norm,
            eval_every=max(1, steps // 10) if asked.eval_every is None else asked.eval_every,
            autocast=_autocast(asked.autocast, device),
        )
        feed = Feed(store, asked.proportions or by_size(store), seq_len, sequences, asked.seed)
        return cls(settings, feed, device, asked.lr or default_lr(source.parameters), asked.eval_windows)

    def state(self) -> State:
        return State(step=0, tokens=0, sampler=self.feed.start())

    def measure(self, model: Any) -> dict[str, Measured]:
        """Held-out figures by domain of a model as it is. Raises UserError where a loss isn't finite."""
        windows = self.feed.held_out(limit=self.eval_windows, sequences=self.settings.micro_sequences)
        measured = measure(model, windows, bytes_per_token=bytes_per_token(self.feed.store))
        raise_all(
            [
                UserError(
                    f"held-out loss of {domain!r}",
                    found=figures.nats_per_token,
                    expected="a finite loss",
                    change=f"lower --lr: it was {self.lr:.3g}, and training diverged",
                )
                for domain, figures in measured.items()
                if not isfinite(figures.nats_per_token)
            ]
        )
        return measured

    def losses(self, model: Any) -> dict[str, float]:
        """Held-out loss by domain of a model as it is, in nats per token. Raises UserError where it isn't finite."""
        return {domain: figures.nats_per_token for domain, figures in self.measure(model).items()}

    def evaluate(self, model: Any) -> Callable[[], dict[str, float]]:
        return partial(self.losses, model)

    def prepare(self, model: Any, asked: Training) -> None:
        """Switches on what was asked for to save memory or time."""
        if asked.activation_checkpointing:
            model.train()  # transformers checkpoints in training mode only; every dropout is 0
            model.activation_checkpointing_enable({"use_reentrant": False})
        if asked.compile:
            model.base_model.compile()

    def flops(self, source: Source, shape: Shape) -> float:
        """FLOPs of the stage's training steps, forward and backward, at the mean context of a causal window."""
        per_token = flops_per_token(source.family, shape, context=self.settings.seq_len // 2)
        return 3.0 * per_token * self.settings.steps * self.settings.batch_tokens

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the record."""
        s = self.settings
        return {
            "steps": s.steps,
            "seq_len": s.seq_len,
            "batch_sequences": s.batch_sequences,
            "micro_sequences": s.micro_sequences,
            "tokens": s.steps * s.batch_tokens,
            "lr": self.lr,
            "device": self.device,
            "autocast": str(s.autocast),
            "proportions": dict(self.feed.proportions),
            "seed": self.feed.seed,
        }


def choose_device(asked: str | None) -> str:
    """The device asked for, or the best one here. Raises UserError for one that isn't here."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    known = [name for name, there in here.items() if there]
    if asked is None:
        return known[0]
    kind, _, number = asked.partition(":")
    numbered = kind == "cuda" and number.isdecimal() and int(number) < torch.cuda.device_count()
    if kind in known and (asked == kind or numbered):
        return asked
    raise UserError("device", found=repr(asked), expected=" or ".join(known), change="choose another --device")


def default_batch_tokens(parameters: int, tokens: int) -> int:
    """About 4K tokens at 260 thousand parameters, 128K at 7 billion (Sheared-LLaMA's), and 200 steps at the least."""
    by_model = 2 ** round(log2(4096 * (parameters / 260_000) ** 0.34))
    return max(1, min(by_model, tokens // 200))


def _schedule(asked: Training) -> Callable[[int, int], float]:
    if asked.schedule == "cosine":
        return partial(cosine, warmup=asked.warmup)
    return partial(trapezoid, warmup=asked.warmup, decay=asked.decay)


def _autocast(choice: str, device: str) -> torch.dtype | None:
    # Measured on CPUs without AMX, bf16 matrix products run slower than fp32 ones, so there it has to be asked for.
    on = choice == "bfloat16" or (choice == "auto" and device.startswith("cuda"))
    return torch.bfloat16 if on else None
