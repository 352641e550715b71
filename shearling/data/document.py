"""A document as every source gives it, and how the user asks for it to be read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shearling.data.conversation import check_messages
from shearling.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What to take from records, and what to do with a broken one.

    `messages_column` asks for conversations instead of texts; with `assistant_loss_only` the loss counts on what the
    assistant says alone. `tokens_dtype` is what the bytes of an MDS column `tokens` are, which MDS doesn't say.
    With `skip_broken` a record that can't be read is passed over and counted; a file that can't be read never is.
    """

    text_column: str = "text"
    messages_column: str | None = None
    assistant_loss_only: bool = False
    tokens_dtype: str = "int64"  # what llm-foundry writes
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.assistant_loss_only and self.messages_column is None:
            raise UserError(
                "assistant_loss_only",
                found="no messages column",
                expected="conversations, as a plain text has no assistant",
                change="name the column with --messages-column, or leave --assistant-loss-only out",
            )
        if self.tokens_dtype not in INTEGERS:
            raise UserError(
                "tokens_dtype", found=self.tokens_dtype, expected=f"one of {', '.join(INTEGERS)}", change="change it"
            )

    @property
    def column(self) -> str:
        """The column that holds a record's document."""
        return self.messages_column or self.text_column

    @property
    def option(self) -> str:
        """The command line's name for what chooses the column."""
        return "--messages-column" if self.messages_column else "--text-column"


INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True)
class Document:
    """One text, conversation (`messages`) or run of token ids, and where it is from (file, line), for messages.

    `num_bytes` is the length of the text in UTF-8, or of what stands in for it. With `assistant_only` the loss counts
    on the assistant's turns alone.
    """

    text: str
    num_bytes: int
    where: str
    messages: list[dict[str, Any]] | None = None
    ids: np.ndarray | None = None
    assistant_only: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is a text to encode."""
        return self.messages is None and self.ids is None


def of_text(text: object, *, where: str, column: str = "text") -> Document:
    """The document of one text; UserError for what is no string, or holds a surrogate that UTF-8 can't."""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise fault(where, found=f"a {column!r} of type {kind}", expected=f"a {column!r} that is a string")
    try:
        return Document(text, len(text.encode()), where)
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(text[error.start]):04x} at character {error.start} of {column!r}"
        raise fault(where, found=f"a lone surrogate, {lone}", expected="text that UTF-8 can hold") from error


def of_ids(ids: np.ndarray, *, where: str) -> Document:
    """The document of token ids [tokens] of any integer type."""
    return Document("", ids.nbytes, where, ids=ids)


def of_fields(fields: Mapping[str, Any], *, where: str, reading: Reading) -> Document:
    """The document of one record, as `reading` asks; UserError, naming the keys there are, for one that has none."""
    column = reading.column
    if column not in fields:
        found = f"no {column!r} among the keys ({some(list(fields)) or 'none'})"
        change = f"name the column of documents with {reading.option}, or mend the line or remove it"
        raise UserError(where, found=found, expected=f"a {column!r}", change=change)
    if reading.messages_column is None:
        return of_text(fields[column], where=where, column=column)
    messages = check_messages(fields[column], where=where, column=column, assistant=reading.assistant_loss_only)
    size = sum(len(str(message.get("content", "")).encode(errors="replace")) for message in messages)
    return Document("", size, where, messages=messages, assistant_only=reading.assistant_loss_only)


def check_column(names: Sequence[str], *, where: str, reading: Reading) -> None:
    """UserError, naming the columns there are, if a table lacks the one that `reading` asks for."""
    if reading.column not in names:
        raise UserError(
            where,
            found=f"no column {reading.column!r} among {', '.join(names) or 'none'}",
            expected=f"a column {reading.column!r}",
            change=f"name the column of documents with {reading.option}",
        )


def refuse_messages(where: str, *, found: str, reading: Reading) -> None:
    """UserError if `reading` asks for conversations of a source that can't hold any."""
    if reading.messages_column:
        raise UserError(
            where,
            found=found,
            expected=f"records with a column {reading.messages_column!r}",
            change="give conversations as JSON lines, Parquet or a dataset, or leave --messages-column out",
        )


def fault(where: str, *, found: str, expected: str) -> UserError:
    """What is wrong with one record."""
    return UserError(where, found=found, expected=expected, change="mend the line or remove it")


def some(names: Sequence[str]) -> str:
    """The first names of many, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
