"""Reference losses: what a model should reach on each domain, checked, and in nats per token of the store at hand."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from shearling.errors import UserError, nearest, raise_all

FORMAT, VERSION = "shearling-reference", 1
PER_TOKEN, PER_BYTE = "nats_per_token", "nats_per_byte"
UNITS = (PER_TOKEN, PER_BYTE)
KEYS = ("format", "version", "unit", "tokenizer", "losses", "how", "notes")


@dataclass(frozen=True)
class Reference:
    """Losses by domain in `unit`, where they come from, and the fingerprint of the tokenizer they belong to, if known.

    A loss per byte belongs to no tokenizer.
    """

    losses: Mapping[str, float]
    how: str
    unit: str = PER_TOKEN
    tokenizer: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a reference file holds."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "notes": list(self.notes)}

    def per_token(
        self, *, domains: Sequence[str], tokenizer: str | None, bytes_per_token: Mapping[str, float], where: str
    ) -> dict[str, float]:
        """Nats per token by domain, in the order of `domains`, for text in the tokens of `tokenizer` (a fingerprint).

        Raises UserError for domains that are missing or unknown, losses of another tokenizer, and losses per byte
        where nobody knows how many bytes a token has.
        """
        errors = domain_errors(self.losses, domains, where=where)
        if self.unit == PER_TOKEN and None not in (tokenizer, self.tokenizer) and tokenizer != self.tokenizer:
            errors.append(
                UserError(
                    where,
                    found=f"nats per token of the tokenizer {str(self.tokenizer)[:12]}",
                    expected=f"of the tokenizer {str(tokenizer)[:12]}, which the data was prepared with",
                    change=f"measure again with that tokenizer, or give the losses with unit: {PER_BYTE}",
                )
            )
        if self.unit == PER_BYTE:
            errors += [
                UserError(
                    f"{where}, domain {domain!r}",
                    found="nats per byte, and data that doesn't say how many bytes a token has",
                    expected="a token store with text in it",
                    change=f"prepare the data again, or give {PER_TOKEN}",
                )
                for domain in domains
                if domain in self.losses and not bytes_per_token.get(domain)
            ]
        raise_all(errors)
        return {d: self.losses[d] * (bytes_per_token[d] if self.unit == PER_BYTE else 1.0) for d in domains}


def parse_reference(raw: object, *, where: str) -> Reference:
    """The reference that a file holds: one as `Reference.to_json` writes it, or a mapping of domains to nats per token.

    Raises UserError for all that doesn't fit, at once.
    """
    if not isinstance(raw, Mapping) or not raw:
        raise UserError(where, found=_kind(raw), expected="a loss for each domain", change="write {domain: loss}")
    if "format" not in raw and not isinstance(raw.get("losses"), Mapping):
        errors = loss_errors(raw, where=where)
        raise_all(errors)
        return Reference({str(domain): float(loss) for domain, loss in raw.items()}, where)
    found = (raw.get("format", FORMAT), raw.get("version", VERSION))
    errors = unknown_keys(raw, KEYS, where=where)
    if found != (FORMAT, VERSION):
        expected, change = f"{FORMAT} version {VERSION}", "write it again with `shearling reference`"
        errors.append(UserError(where, found=f"{found[0]} version {found[1]}", expected=expected, change=change))
    losses = raw.get("losses")
    errors += loss_errors(losses, where=where)
    errors += origin_errors(raw, where=where)
    raise_all(errors)
    assert isinstance(losses, Mapping)
    plain = {str(domain): float(loss) for domain, loss in losses.items()}
    return Reference(plain, where, raw.get("unit", PER_TOKEN), raw.get("tokenizer"))


def parse_given(text: str) -> dict[str, float]:
    """Losses by domain from text like `wiki=1.9,code=0.8`. Raises UserError for every part that doesn't fit."""
    losses: dict[str, float] = {}
    errors = []
    for part in text.split(","):
        domain, sign, value = (word.strip() for word in part.rpartition("="))
        number = as_number(value)
        if not (sign and domain) or number is None:
            expected = "domain=loss"
            errors.append(
                UserError("reference", found=repr(part), expected=expected, change="write as wiki=1.9,code=0.8")
            )
        elif domain in losses:
            errors.append(
                UserError("reference", found=f"{domain!r} twice", expected="a loss for each", change="leave one out")
            )
        else:
            losses[domain] = number
    raise_all(errors + loss_errors(losses, where="reference"))
    return losses


def as_number(value: object) -> float | None:
    """A number, or text that spells one (YAML leaves 1e9 as text); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def loss_errors(losses: object, *, where: str) -> list[UserError]:
    """What keeps `losses` from being a finite loss, 0 or above, for each domain."""
    if not isinstance(losses, Mapping):
        change = "write losses: {domain: loss}"
        return [UserError(f"{where}, losses", found=_kind(losses), expected="a loss for each domain", change=change)]
    return [
        UserError(
            f"{where}, domain {domain!r}",
            found=f"the loss {loss!r}",
            expected="a finite number, 0 or above",
            change="measure it again, or correct it",
        )
        for domain, loss in losses.items()
        if not is_loss(loss)
    ]


def is_loss(value: object) -> bool:
    """Whether `value` is a finite number, 0 or above."""
    number = as_number(value)
    return number is not None and isfinite(number) and number >= 0


def domain_errors(losses: Mapping[str, object], domains: Sequence[str], *, where: str) -> list[UserError]:
    """Which `domains` have no loss, and which losses belong to no domain."""
    missing = [domain for domain in domains if domain not in losses]
    errors = [
        UserError(
            f"{where}, domain {d!r}", found="no loss", expected="one for each domain of the data", change="add it"
        )
        for d in missing
    ]
    return errors + [
        UserError(
            f"{where}, domain {d!r}", found="no such domain", expected="those of the data", change=nearest(d, domains)
        )
        for d in losses
        if d not in domains
    ]


def origin_errors(raw: Mapping[str, Any], *, where: str) -> list[UserError]:
    """What is wrong with the unit and the tokenizer of a file of losses."""
    errors, unit, tokenizer = [], raw.get("unit", PER_TOKEN), raw.get("tokenizer")
    if unit not in UNITS:
        change = nearest(str(unit), UNITS)
        errors.append(UserError(f"{where}, unit", found=repr(unit), expected=" or ".join(UNITS), change=change))
    if tokenizer is not None and not isinstance(tokenizer, str):
        change = "leave it out, or copy it from the manifest.json of the store"
        expected = "a tokenizer's fingerprint as text"
        errors.append(UserError(f"{where}, tokenizer", found=repr(tokenizer), expected=expected, change=change))
    return errors


def unknown_keys(raw: Mapping[str, Any], known: Sequence[str], *, where: str) -> list[UserError]:
    """An error for each key of `raw` that isn't known."""
    return [
        UserError(f"{where}, {key}", found="an unknown key", expected="a known one", change=nearest(str(key), known))
        for key in raw
        if key not in known
    ]


def _kind(value: object) -> str:
    return "nothing" if value is None or value == {} else type(value).__name__
