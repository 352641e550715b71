"""Conversations: checked, rendered through the tokenizer's chat template, encoded with what the assistant says marked.

A template is somebody else's code. transformers runs it in Jinja's sandbox, without attributes of Python's or I/O; what
the sandbox doesn't bound is the time and memory that a template takes.

Special tokens are tokens where the template writes them, and plain text where a message spells one out, so a message
can't end its turn or begin another's. That leaves a template that glues a token together out of pieces of a message,
and added tokens that aren't special, such as <think>, which are words of the vocabulary like any other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from shearling.data.special import encode_piece, forgeable, mark, special_tokens, strings, unused_characters
from shearling.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Closed, as some templates build special tokens out of roles.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
ASSISTANT = "assistant"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates write today's date, unless told one; the same documents must give the same ids on any day.
DAY = datetime(2024, 7, 26)  # what Llama 3's own templates fall back to
DATE = DAY.strftime("%d %b %Y")
# Those that ask transformers' function for it get another one, written in Jinja, as functions can't be handed in: it
# comes first, and ends with a line end that Jinja drops after a block.
CODES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdDeFfGgHIjmMpRrSTuUVwWxXyY"]
WRITTEN = " | ".join(f"replace({code!r}, {DAY.strftime(code)!r})" for code in CODES)
NOW = f"{{% macro strftime_now(format) %}}{{{{ format | {WRITTEN} }}}}{{% endmacro %}}\n"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, in pieces with whether each is plain text, where special tokens are none.

    `spans` are the characters [start, end) of what the assistant says, up to what ends a turn; None if all count.
    """

    pieces: tuple[tuple[str, bool], ...]
    spans: tuple[tuple[int, int], ...] | None

    @property
    def text(self) -> str:
        """The text of all pieces."""
        return "".join(piece for piece, _ in self.pieces)


def check_messages(messages: object, *, where: str, column: str, assistant: bool) -> list[dict[str, Any]]:
    """The messages of one record without their empty fields.

    Raises UserError for anything but a list of {role, content}, for a role that isn't known, and, if `assistant`,
    for a conversation in which the assistant says nothing.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        kind = "an empty list" if isinstance(messages, list) else f"type {type(messages).__name__}"
        raise _fault(where, found=f"{column!r}: {kind}", expected="a list of messages, {role, content} each")
    found = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or "role" not in message:
            keys = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            raise _fault(where, found=f"message {number} with {keys or 'nothing'}", expected="{role, content}")
        message = {key: value for key, value in message.items() if value is not None}
        role = message.get("role")
        if role not in ROLES:
            raise _fault(where, found=f"message {number} of role {role!r}", expected=f"one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            kind = type(message.get("content")).__name__
            raise _fault(where, found=f"message {number} with a content of type {kind}", expected="a string")
        found.append(message)
    for text in strings(found):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = f"a lone surrogate, \\u{ord(text[error.start]):04x}"
            raise _fault(where, found=lone, expected="text that UTF-8 can hold") from error
    if assistant and not any(message["role"] == ASSISTANT for message in found):
        roles = ", ".join(message["role"] for message in found)
        raise _fault(where, found=f"no message of the assistant ({roles})", expected="one, for the loss to count")
    return found


def render(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], *, where: str, assistant_only: bool
) -> Rendered:
    """A conversation as the tokenizer's chat template writes it, and which characters count.

    What counts is what the template's {% generation %} blocks hold. In a template without them it is what follows the
    prompt for each of the assistant's turns; the conversation so far must then be a prefix of the whole. Raises
    UserError for a template that is missing, fails or is not of that kind.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer",
            found="no chat template",
            expected="one, to render conversations with",
            change="take the instruction-tuned model's tokenizer, or give texts instead of messages",
        )
    open_mark, close_mark = unused_characters(messages)
    marked = mark(messages, special_tokens(tokenizer), open_mark, close_mark)
    text = _apply(tokenizer, marked, where=where)
    spans = None
    if assistant_only:
        blocks = GENERATION.search(_template(tokenizer))
        spans = (
            _blocks(tokenizer, marked, text, where=where) if blocks else _turns(tokenizer, marked, text, where=where)
        )
    return _ended(_unmarked(text, spans, open_mark, close_mark), str(tokenizer.eos_token))


def encode(
    tokenizer: "PreTrainedTokenizerFast", rendered: Rendered, *, where: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """A rendered conversation's ids [tokens], and their loss [tokens] of 0 and 1, or None where all count.

    A token counts if it holds a character that counts. Raises UserError if the tokenizer makes a special token of
    plain text all the same.
    """
    specials = forgeable(tokenizer)
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    position = 0
    for number, (piece, plain) in enumerate(rendered.pieces):
        piece_ids, piece_offsets = encode_piece(tokenizer, piece, plain=plain, first=number == 0)
        if plain and specials.intersection(piece_ids):
            raise _fault(where, found=f"{piece!r} that the tokenizer takes for itself", expected="plain text")
        ids += piece_ids
        offsets += [(start + position, end + position) for start, end in piece_offsets]
        position += len(piece)
    whole = np.array(ids, dtype=np.int64)
    if rendered.spans is None:
        return whole, None
    counts = np.zeros(position + 1, dtype=np.int64)
    for start, end in rendered.spans:
        counts[start + 1 : end + 1] = 1
    before = np.cumsum(counts)  # characters that count before each character
    held = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    return whole, (before[held[:, 1]] > before[held[:, 0]]).astype(np.uint8)


def _apply(tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], *, where: str, prompt=False) -> str:
    with_prompt: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, "date_string": DATE}
    try:
        return str(tokenizer.apply_chat_template(messages, chat_template=_template(tokenizer), **with_prompt))
    except Exception as error:  # a template raises what it likes
        raise _failed(where, error) from error


def _template(tokenizer: "PreTrainedTokenizerFast") -> str:
    template = str(tokenizer.get_chat_template())
    return NOW + template if "strftime_now" in template else template


def _blocks(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], text: str, *, where: str
) -> tuple[tuple[int, int], ...]:
    """What the template's own {% generation %} blocks hold."""
    from transformers.utils.chat_template_utils import render_jinja_template

    settings: dict[str, Any] = {**tokenizer.special_tokens_map, "date_string": DATE}
    try:
        rendered, spans = render_jinja_template(
            [messages], chat_template=_template(tokenizer), return_assistant_tokens_mask=True, **settings
        )
    except Exception as error:
        raise _failed(where, error) from error
    assert rendered[0] == text
    found = tuple((int(start), int(end)) for start, end in spans[0])
    if not any(end > start for start, end in found):
        raise _no_spans(where, found="{% generation %} blocks that hold nothing")
    return found


def _turns(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, Any]], text: str, *, where: str
) -> tuple[tuple[int, int], ...]:
    """From the prompt for each of the assistant's turns to the end of the turn."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        prompt = _apply(tokenizer, messages[:number], where=where, prompt=True) if number else ""
        if not text.startswith(prompt):
            raise _no_spans(where, found=f"a rendering in which what comes before message {number + 1} isn't a prefix")
        spans.append((len(prompt), _turn_end(tokenizer, messages, number, text, start=len(prompt), where=where)))
    return tuple(spans)


def _turn_end(
    tokenizer: "PreTrainedTokenizerFast",
    messages: list[dict[str, Any]],
    number: int,
    text: str,
    *,
    start: int,
    where: str,
) -> int:
    so_far = _apply(tokenizer, messages[: number + 1], where=where)
    if text.startswith(so_far) and len(so_far) >= start:
        return len(so_far)
    # Templates for reasoning write the last turn in another way than those before it. The turn is then its content,
    # which must stand right where the prompt ends, and the special token that ends it.
    content = str(messages[number].get("content", "")).strip()
    at = start + len(text[start:]) - len(text[start:].lstrip())
    if not content or not text.startswith(content, at):
        raise _no_spans(where, found=f"a rendering in which message {number + 1} can't be found")
    end = at + len(content)
    ending = re.compile(r"\s*(" + "|".join(map(re.escape, special_tokens(tokenizer))) + ")").match(text, end)
    return ending.end() if ending else end


def _unmarked(text: str, spans: tuple[tuple[int, int], ...] | None, open_mark: str, close_mark: str) -> Rendered:
    """The text cut at the marks, without them. A template may have parted two; then it is cut there all the same."""
    pieces: list[tuple[str, bool]] = []
    at, plain = 0, False
    marks = np.zeros(len(text) + 1, dtype=np.int64)
    for found in re.finditer(f"[{open_mark}{close_mark}]", text):
        pieces.append((text[at : found.start()], plain and found[0] == close_mark))
        at, plain = found.end(), found[0] == open_mark
        marks[found.start() + 1] = 1
    pieces.append((text[at:], False))
    position = np.arange(len(text) + 1) - np.cumsum(marks)
    shifted = None if spans is None else tuple((int(position[start]), int(position[end])) for start, end in spans)
    return Rendered(tuple(piece for piece in pieces if piece[0]), shifted)


def _ended(rendered: Rendered, eos: str) -> Rendered:
    """Without the blanks that a template writes after its last end-of-sequence token, which ends the document."""
    text, plain = rendered.pieces[-1] if rendered.pieces else ("", True)
    if plain or not text.rstrip().endswith(eos):
        return rendered
    pieces = (*rendered.pieces[:-1], (text.rstrip(), False))
    end = sum(len(piece) for piece, _ in pieces)
    return Rendered(pieces, rendered.spans and tuple((start, min(stop, end)) for start, stop in rendered.spans))


def _fault(where: str, *, found: str, expected: str) -> UserError:
    return UserError(where, found=found, expected=expected, change="mend the conversation or remove it")


def _failed(where: str, error: Exception) -> UserError:
    found = f"that the chat template fails on it ({type(error).__name__}: {error})"
    change = "mend the conversation, or take a tokenizer whose template fits it"
    return UserError(where, found=found, expected="a conversation that it renders", change=change)


def _no_spans(where: str, *, found: str) -> UserError:
    return UserError(
        where,
        found=found,
        expected="a chat template that shows what the assistant says",
        change="put {% generation %} blocks into the template, or leave --assistant-loss-only out",
    )
