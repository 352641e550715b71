"""How fast steps go, for the record and the progress line."""

from time import perf_counter

import torch

from shearling.train.device import peak_bytes, peak_flops


class Pace:
    """Counts from one `figures` to the next, but for what it is told was a pause.

    `flops_per_token` are those of training on one, by the axes: what activation checkpointing computes again isn't work
    done. MFU is their share of what all ranks' devices could do (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
    """

    def __init__(self, device: torch.device, *, ranks: int, flops_per_token: float, tokens: int):
        self.device, self.flops_per_token = device, flops_per_token
        one = peak_flops(device)
        self.peak = None if one is None else one * ranks
        self._start_over(tokens)

    def _start_over(self, tokens: int) -> None:
        self._tokens, self._started = tokens, perf_counter()
        self._waited = self._paused = 0.0

    def waited(self, since: float) -> None:
        """For data, since a moment of perf_counter."""
        self._waited += perf_counter() - since

    def paused(self, since: float) -> None:
        """For what is no part of training, since a moment of perf_counter."""
        self._paused += perf_counter() - since

    def figures(self, tokens: int) -> dict[str, float]:
        """Since the last time, `tokens` being all so far. The device has to be done with its work, or it flatters."""
        seconds = perf_counter() - self._started - self._paused
        rate = (tokens - self._tokens) / seconds
        found = {"tokens_per_second": rate, "data_wait_share": self._waited / seconds}
        if self.peak and self.flops_per_token:
            found["mfu"] = rate * self.flops_per_token / self.peak
        self._start_over(tokens)
        return {**found, "memory_bytes": peak_bytes(self.device)}
