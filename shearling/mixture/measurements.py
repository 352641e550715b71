"""Losses of a family's models at several sizes, checked, and what their scaling laws say of another size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

from shearling.errors import UserError, raise_all
from shearling.mixture.law import Law, fit
from shearling.mixture.reference import (
    PER_TOKEN,
    Reference,
    as_number,
    is_loss,
    loss_errors,
    origin_errors,
    unknown_keys,
)

KEYS = ("sizes", "losses", "unit", "tokenizer", "exponent")
SHAPE = "write sizes: [...] and losses: {domain: [...]}"
EXPONENTS = (0.001, 10.0)
NEAR = 1.001  # sizes nearer than that are one size measured twice
FALL = 1e-9  # of a loss; what is less is rounding


@dataclass(frozen=True)
class Measurements:
    """Losses by domain in `unit`, one for each of the rising `sizes` (parameters); an `exponent` given, or None."""

    sizes: tuple[float, ...]
    losses: Mapping[str, tuple[float, ...]]
    unit: str
    tokenizer: str | None
    exponent: float | None

    def laws(self, *, where: str) -> dict[str, Law]:
        """A law for each domain. Raises UserError naming the domains whose losses follow none."""
        laws = {domain: fit(self.sizes, losses, exponent=self.exponent) for domain, losses in self.losses.items()}
        raise_all(
            [
                UserError(
                    f"{where}, domain {domain!r}",
                    found="losses that fall faster than any E + A / N^a with a above 0",
                    expected="falls that flatten as the size grows",
                    change="check the losses, or give an exponent",
                )
                for domain, law in laws.items()
                if law is None
            ]
        )
        return {domain: law for domain, law in laws.items() if law is not None}

    def at(self, size: int, *, where: str) -> Reference:
        """What the laws say of a model of `size` parameters, with a note on each domain's fit.

        Raises UserError where there is no law, or one that ends below 0 at that size.
        """
        laws = self.laws(where=where)
        losses = {domain: law.at(size) for domain, law in laws.items()}
        raise_all(
            [
                UserError(
                    f"{where}, domain {domain!r}",
                    found=f"a law that comes to {loss:.4g} at {size:,} parameters",
                    expected="a loss above 0",
                    change="choose a --size nearer to those measured, or give an exponent",
                )
                for domain, loss in losses.items()
                if not is_loss(loss)
            ]
        )
        how = f"L(N) = E + A / N^a through {len(self.sizes)} sizes of {where}, at N = {size:,}"
        exact = len(self.sizes) == (3 if self.exponent is None else 2)
        notes = tuple(_note(domain, law, exact=exact) for domain, law in laws.items())
        return Reference(losses, how, self.unit, self.tokenizer, notes)


def parse_measurements(raw: object, *, where: str) -> Measurements:
    """What a file with `sizes` and `losses` holds. Raises UserError for all that doesn't fit, at once."""
    if not isinstance(raw, Mapping):
        raise UserError(where, found=type(raw).__name__, expected="keys and values", change=SHAPE)
    exponent = raw.get("exponent")
    sizes, errors = _sizes(raw.get("sizes"), least=3 if exponent is None else 2, where=where)
    errors += unknown_keys(raw, KEYS, where=where) + origin_errors(raw, where=where)
    errors += _exponent_errors(exponent, where=where) + _table_errors(raw.get("losses"), sizes, where=where)
    raise_all(errors)
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    rows = {str(domain): tuple(float(row[i]) for i in order) for domain, row in raw["losses"].items()}
    unit, a = raw.get("unit", PER_TOKEN), None if exponent is None else float(exponent)
    return Measurements(tuple(sizes[i] for i in order), rows, unit, raw.get("tokenizer"), a)


def _sizes(raw: object, *, least: int, where: str) -> tuple[list[float], list[UserError]]:
    """The sizes as they stand; empty where there is anything wrong with them, which is the second."""
    where = f"{where}, sizes"
    if not isinstance(raw, list):
        return [], [UserError(where, found=type(raw).__name__, expected="a list of parameter counts", change=SHAPE)]
    numbers = [as_number(size) for size in raw]
    sizes = [size for size in numbers if size is not None and isfinite(size) and size >= 1 and size == int(size)]
    errors = [
        UserError(where, found=repr(size), expected="a whole number of parameters, 1 or above", change="correct it")
        for size, number in zip(raw, numbers, strict=True)
        if number not in sizes
    ]
    if len(raw) < least:
        expected = "3 or more, or 2 and an exponent" if least == 3 else "2 or more"
        change = "measure another size" if least == 2 else "measure another size, or add exponent: a"
        errors.append(UserError(where, found=f"{len(raw)} of them", expected=expected, change=change))
    errors += [
        UserError(where, found=f"{one:,.0f} and {two:,.0f}", expected="sizes that differ", change="leave one out")
        for one, two in pairwise(sorted(sizes))
        if two < one * NEAR
    ]
    return ([] if errors else sizes), errors


def _table_errors(losses: object, sizes: Sequence[float], *, where: str) -> list[UserError]:
    if not isinstance(losses, Mapping) or not losses:
        found = "nothing" if not losses else type(losses).__name__
        return [UserError(f"{where}, losses", found=found, expected="a list of losses for each domain", change=SHAPE)]
    return [error for domain, row in losses.items() for error in _row_errors(domain, row, sizes, where=where)]


def _row_errors(domain: Any, row: object, sizes: Sequence[float], *, where: str) -> list[UserError]:
    """What is wrong with one domain's losses; their order can't be judged without sound `sizes`."""
    what = f"{where}, domain {domain!r}"
    if not isinstance(row, list):
        return [UserError(what, found=type(row).__name__, expected="a list with a loss for each size", change=SHAPE)]
    errors = [error for loss in row for error in loss_errors({domain: loss}, where=where)]
    if sizes and len(row) != len(sizes):
        found, expected = f"{len(row)} losses", f"{len(sizes)}, one for each size"
        errors.append(UserError(what, found=found, expected=expected, change="add or leave out what differs"))
    if errors or not sizes:
        return errors
    points = sorted(zip(sizes, map(float, row), strict=True))
    return [
        UserError(
            what,
            found=f"{first:g} at {small:,.0f} parameters and {second:g} at {large:,.0f}",
            expected="a loss that falls as the size grows",
            change="check both, or leave one of the sizes out",
        )
        for (small, first), (large, second) in pairwise(points)
        if not second < first * (1 - FALL)
    ]


def _exponent_errors(exponent: object, *, where: str) -> list[UserError]:
    number, (least, most) = as_number(exponent), EXPONENTS
    if exponent is None or (number is not None and least <= number <= most):
        return []
    expected = f"a number from {least:g} to {most:g}"
    return [UserError(f"{where}, exponent", found=repr(exponent), expected=expected, change="correct or leave it out")]


def _note(domain: str, law: Law, *, exact: bool) -> str:
    note = f"{domain}: E = {law.floor:.4f}, a = {law.exponent:.4f}"
    if not exact:
        note += ", residuals " + " ".join(f"{residual:+.4f}" for residual in law.residuals)
    # Sheared-LLaMA's own references for cc came from such a law, so it is no reason to refuse.
    return note if law.floor >= 0 else f"{note}; E below 0: don't rely on it far from the sizes measured"
