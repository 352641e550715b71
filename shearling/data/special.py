"""Special tokens that a text spells out: kept plain, so that no text can end a document or forge a turn."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PRIVATE_USE = range(0xF0000, 0x10FFFD)  # characters that mean nothing to anyone


def special_tokens(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """The special tokens' texts, longest first, as one may begin with another."""
    added = tokenizer.added_tokens_decoder.values()
    return sorted((token.content for token in added if token.special), key=len, reverse=True)


def forgeable(tokenizer: "PreTrainedTokenizerFast") -> set[int]:
    """The ids of the special tokens that plain text must not become; what is unknown may be."""
    ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {id for id in ids if id != tokenizer.unk_token_id}


def encode_piece(
    tokenizer: "PreTrainedTokenizerFast", piece: str, *, plain: bool, first: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids and character offsets of a piece of a text, special tokens parsed unless it is plain."""
    # After a line end, which no tokenizer prefixes with the space that some put at the start of a text.
    lead = "" if first else "\n"
    encoded = tokenizer(
        lead + piece,
        add_special_tokens=False,
        split_special_tokens=plain,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    of_lead = sum(end <= len(lead) for _, end in offsets) if lead else 0
    if any(start < len(lead) for start, _ in offsets[of_lead:]):  # a token across the line end
        return encode_piece(tokenizer, piece, plain=plain, first=True)
    return ids[of_lead:], [(start - len(lead), end - len(lead)) for start, end in offsets[of_lead:]]


def encode_around(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """A text's ids with every special token in it cut after its first character, so that none is recognised.

    For tokenizers whose model has its special tokens as words (Unigram, WordLevel): there no setting keeps them plain.
    """
    words = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in special_tokens(tokenizer))
    pieces = [piece for piece in re.split(words or "(?!)", text) if piece]
    encoded = (encode_piece(tokenizer, piece, plain=True, first=at == 0) for at, piece in enumerate(pieces))
    return [id for ids, _ in encoded for id in ids]


def strings(value: object) -> Iterator[str]:
    """Every string inside lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def unused_characters(value: object) -> tuple[str, str]:
    """Two characters that no string of a value holds, to mark special tokens with."""
    used = set().union(*strings(value))
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    return next(free), next(free)


def mark(value: Any, tokens: Sequence[str], open_mark: str, close_mark: str) -> Any:
    """A value of strings, lists and dicts with every special token that one spells out between marks."""
    specials = re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def marked(inner: Any) -> Any:
        if isinstance(inner, str):
            return specials.sub(rf"{open_mark}\g<0>{close_mark}", inner)
        if isinstance(inner, dict):
            return {marked(key): marked(item) for key, item in inner.items()}
        return [marked(item) for item in inner] if isinstance(inner, list | tuple) else inner

    return marked(value)
