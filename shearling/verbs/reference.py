"""`reference`: losses by domain that a smaller model should reach, from its source, a scaling law, or given."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shearling.errors import UserError, raise_all
from shearling.mixture.measurements import parse_measurements
from shearling.mixture.reference import (
    FORMAT,
    PER_BYTE,
    PER_TOKEN,
    Reference,
    loss_errors,
    parse_given,
    parse_reference,
)
from shearling.recipe import Eval, Heal, parse_tokens, validated
from shearling.stage import check_place
from shearling.strict_yaml import read_mapping

if TYPE_CHECKING:
    from shearling.data.store import Store

WAYS = "one of --from-source, --scaling-law and --given"
ELSEWHERE = "choose another --out, or move what is there away"
UNKNOWN_TOKENIZER = "the tokenizer isn't known: losses in nats per token are those of one tokenizer alone"


def reference(
    *,
    from_source: str | None = None,
    scaling_law: str | None = None,
    given: str | None = None,
    size: str | None = None,
    data: str | None = None,
    asked: Eval | None = None,
) -> Reference:
    """Reference losses in nats per token, by exactly one of the three ways.

    With `data`, a token store, they are held against its domains and its tokenizer. Raises UserError.
    """
    asked = asked or validated(Eval, {})
    _check_words(from_source, scaling_law, given, size=size, data=data, asked=asked)
    store = None if data is None else _open(data)
    if from_source is not None:
        assert store is not None
        found = _of_source(from_source, store, asked)
    elif scaling_law is not None:
        measures = read_mapping(Path(scaling_law).expanduser(), what="scaling law")
        measured = parse_measurements(measures, where=scaling_law)
        found = measured.at(parse_size(size), where=scaling_law)
    else:
        found = Reference(parse_given(given or ""), "as given")
    return _in_tokens_of(store, found, where=from_source or scaling_law or "--given")


def load_reference(
    given: str | Path | Mapping[str, Any],
    *,
    domains: Sequence[str],
    tokenizer: str,
    bytes_per_token: Mapping[str, float],
) -> dict[str, float]:
    """Nats per token for each of `domains`, of data in the tokens of `tokenizer` (its fingerprint).

    `given` is a file that `shearling reference` wrote, a JSON or YAML file of {domain: loss} or such a mapping itself,
    or text like `wiki=1.9,code=0.8`. Raises UserError for whatever doesn't fit.
    """
    found, where = read_reference(given)
    return found.per_token(domains=domains, tokenizer=tokenizer, bytes_per_token=bytes_per_token, where=where)


def read_reference(given: str | Path | Mapping[str, Any]) -> tuple[Reference, str]:
    """The same as it was given, whatever data it is for, and what messages call it."""
    where = "reference"
    if isinstance(given, Mapping):
        return parse_reference(given, where=where), where
    if _is_path(path := Path(given).expanduser()):
        where = f"reference {given}"
        return parse_reference(read_mapping(path, what="reference"), where=where), where
    return Reference(parse_given(str(given)), where), where


def write_reference(found: Reference, out: Path) -> None:
    """Writes `found` as a file, whole or not at all. Raises UserError where a file with something else is there."""
    text = json.dumps(found.to_json(), indent=1) + "\n"
    check_out(out)
    if out.exists():
        if out.read_text(encoding="utf-8") != text:
            raise UserError(f"out {out}", found="another reference", expected="nothing, or this one", change=ELSEWHERE)
        return
    partial = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out)
    except OSError as error:
        expected = "a file that can be written"
        raise UserError(f"out {out}", found=error.strerror, expected=expected, change=ELSEWHERE) from error


def check_out(out: Path) -> None:
    """Raises UserError, before anything is computed, unless `out` can be written, or is a reference that may be this
    very one.
    """
    if not out.exists():
        check_place(out, what=f"out {out}", change=ELSEWHERE)
        return
    try:
        ours = json.loads(out.read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"out {out}", found="something that isn't a reference", expected="nothing", change=ELSEWHERE)


def parse_size(text: str | None) -> int:
    """A number of parameters, as 1.3B or a whole number. Raises UserError."""
    try:
        size = parse_tokens(text)
    except ValueError:
        size = 0
    if size < 1:
        found = "nothing" if text is None else repr(text)
        raise UserError("size", found=found, expected="parameters, as 1.3B or 1345423360", change="give --size N")
    return size


def _is_path(given: Path) -> bool:
    """Whether it is a file, there or not, and no text of losses: a path may have a folder lang=en in it."""
    looks = len(given.parts) > 1 or given.suffix in (".json", ".yaml", ".yml")
    return looks or os.path.isfile(given) or "=" not in str(given)


def _check_words(*ways: str | None, size: str | None, data: str | None, asked: Eval) -> None:
    """Raises UserError unless one way was chosen, with what it needs and nothing that belongs to another."""
    from_source, scaling_law, _ = ways
    count = sum(way is not None for way in ways)
    errors = []
    if count != 1:
        errors.append(UserError("reference", found=f"{count or 'none'} of them", expected=WAYS, change="choose one"))
    if from_source is not None and data is None:
        expected, change = "a token store to measure on", "give --data STORE"
        errors.append(UserError("--data", found="nothing", expected=expected, change=change))
    if scaling_law is not None and size is None:
        expected, change = "the size to take the law at", "give --size N, as 1.3B"
        errors.append(UserError("--size", found="nothing", expected=expected, change=change))
    stray = {"size": None if scaling_law is not None else size}
    if from_source is None:
        stray |= asked.model_dump()
    for name in (name for name, value in stray.items() if value is not None):
        belongs = "--scaling-law" if name == "size" else "--from-source"
        option = f"--{name.replace('_', '-')}"
        errors.append(UserError(option, found=stray[name], expected=f"it with {belongs} only", change="leave it out"))
    raise_all(errors)


def _of_source(model: str, store: "Store", asked: Eval) -> Reference:
    """The losses of the model itself, on the windows that healing measures on unless others were asked for."""
    from shearling.verbs.evaluate import evaluate  # torch, which the other two ways do without

    windows = asked.windows or validated(Heal, {}).eval_windows
    found = evaluate(model, data=str(store.folder), **{**asked.model_dump(), "windows": windows})
    notes = tuple(
        f"{domain}: windows {figures.windows}, documents {figures.documents}"
        + ("" if figures.standard_error is None else f", standard error {figures.standard_error:.4f}")
        for domain, figures in found.figures.items()
    )
    how = f"losses of {model} itself, on at most {windows} held-out windows of {found.seq_len} tokens a domain"
    raise_all(loss_errors(found.losses, where=model))
    return Reference(found.losses, how, PER_TOKEN, store.fingerprint, notes)


def _in_tokens_of(store: "Store | None", found: Reference, *, where: str) -> Reference:
    """The same in nats per token, held against the store where there is one."""
    if store is not None:
        from shearling.data.loader import bytes_per_token

        losses = found.per_token(
            domains=store.domains,
            tokenizer=store.fingerprint,
            bytes_per_token=bytes_per_token(store),
            where=where,
        )
        tokenizer = store.fingerprint if found.unit == PER_BYTE else found.tokenizer
        found = replace(found, losses=losses, unit=PER_TOKEN, tokenizer=tokenizer)
    if found.unit == PER_BYTE:
        expected = "the token store whose bytes per token make them nats per token"
        raise UserError("--data", found="nothing, and losses in nats per byte", expected=expected, change="give --data")
    return found if found.tokenizer else replace(found, notes=(*found.notes, UNKNOWN_TOKENIZER))


def _open(data: str) -> "Store":
    from shearling.data.store import Store

    return Store.open(data)
