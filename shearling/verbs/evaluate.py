"""`eval`: held-out loss by domain of any model on a token store."""

from dataclasses import dataclass

import torch

from shearling.data.feed import Feed
from shearling.data.loader import bytes_per_token
from shearling.data.store import Store
from shearling.loss.held_out import Measured, measure
from shearling.verbs.session import FORWARD_TOKENS, choose_device
from shearling.verbs.source import Source
from shearling.weights.model import load_model


@dataclass(frozen=True)
class Evaluated:
    """Held-out losses in nats per token, by domain, with all the figures behind them, on windows of `seq_len`."""

    model: str
    parameters: int
    losses: dict[str, float]
    figures: dict[str, Measured]
    seq_len: int


def evaluate(
    model: str,
    *,
    data: str,
    seq_len: int | None = None,
    windows: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    arch: str | None = None,
) -> Evaluated:
    """The losses of `model`, computed in `dtype` (float32), on at most `windows` held-out windows a domain, or all.

    `arch` is the file of its family, where that has no table.
    """
    device = choose_device(device)
    source = Source.open(model, dtype=dtype, arch=arch)
    store = Store.open(data)
    source.check_store(store)
    seq_len = source.seq_len(seq_len)
    sequences = max(1, FORWARD_TOKENS // seq_len)
    feed = Feed(store, seq_len, sequences, seed=0)
    loaded = load_model(source.folder, dtype=getattr(torch, dtype or "float32"), device=device)
    figures = measure(loaded, feed.held_out(limit=windows, sequences=sequences), bytes_per_token=bytes_per_token(store))
    losses = {domain: found.nats_per_token for domain, found in figures.items()}
    return Evaluated(model, source.parameters, losses, figures, seq_len)
