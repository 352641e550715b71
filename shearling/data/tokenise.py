"""Documents to ids: the fast tokenizer of a model, EOS after each document, every id checked."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from shearling.data.documents import Document
from shearling.data.long_text import encode_long
from shearling.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")
BATCH_DOCUMENTS, BATCH_BYTES = 512, 1 << 20
LONG_BYTES = 1 << 22  # a text from here on is encoded piece by piece: at once it takes some 100 bytes a token
MIN_EVAL_TOKENS = 2  # one prediction


@dataclass(frozen=True)
class Piece:
    """A document with its ids [tokens], EOS included, and which tokens' loss counts, uint8 [tokens]; None: all."""

    document: Document
    ids: np.ndarray
    text_bytes: int
    loss: np.ndarray | None = None


@dataclass(frozen=True)
class Pipeline:
    """What encoding needs of a tokenizer, as plain values that travel to other processes."""

    folder: Path
    json: str
    splits_special: bool
    eos_id: int
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", *, folder: Path) -> "Pipeline":
        """That of a tokenizer loaded from `folder`. Raises UserError where it lacks an end-of-sequence token."""
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {folder}",
                found="no end-of-sequence token",
                expected="one, as documents end with it",
                change=f"set eos_token in {Path(folder) / 'tokenizer_config.json'}",
            )
        return cls(
            folder=Path(folder),
            json=tokenizer.backend_tokenizer.to_str(),
            splits_special=tokenizer.split_special_tokens,
            eos_id=cast(int, tokenizer.eos_token_id),
            # The length alone is too small for a vocabulary with holes.
            vocab_size=max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a local folder, without running code from it; UserError if there is none that loads."""
    folder = Path(folder)
    what, change = f"tokenizer of {folder}", "copy the tokenizer files of the model there"
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers would go on without: some classes then start with an empty vocabulary
        found = "no vocabulary file" if folder.is_dir() else "no such folder"
        raise UserError(what, found=found, expected=f"one of {', '.join(VOCABULARIES)}", change=change)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"  # transformers adds advice below
        raise UserError(what, found=found, expected="a tokenizer that transformers loads", change=change) from error
    if not tokenizer.is_fast:
        raise UserError(what, found=type(tokenizer).__name__, expected="a fast tokenizer", change="add tokenizer.json")
    return tokenizer


def fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The sha256 of a fast tokenizer as loaded: vocabulary, pipeline, special tokens.

    Not of its files: transformers replaces some tokenizers by what config.json's model_type says.
    """
    pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # calls change them, and they don't decide ids
        pipeline.pop(setting, None)
    described = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "pipeline": pipeline,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special_ids": sorted(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class Encoder:
    """A tokenizer that ends documents with EOS, checks every id, and says which document it failed on.

    A special token spelt out in a text becomes that token, as transformers does it everywhere.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    @cached_property
    def backend(self) -> "Tokenizer":
        """The tokenizer itself, without transformers: a process of its own is ready in a tenth of the time."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.pipeline.json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.pipeline.splits_special
        return backend

    def pieces(self, documents: Iterable[Document]) -> Iterator[Piece]:
        """Each document's ids with EOS, none of them for one without text. Raises UserError, naming the document."""
        for group in _batches(documents):
            for document, ids in zip(group, self._ids(group), strict=True):
                ended = np.append(ids, self.pipeline.eos_id) if len(ids) else ids
                if len(ids) and ended.max() >= self.pipeline.vocab_size:
                    found, expected = f"token id {ended.max()}", f"ids below {self.pipeline.vocab_size}"
                    raise UserError(document.where, found=found, expected=expected, change="check the tokenizer")
                yield Piece(document, ended, document.num_bytes)

    def cut(self, piece: Piece, *, share: float) -> tuple[Piece, Piece]:
        """A document's first and last tokens, the last `share` of them apart; UserError below four tokens."""
        count, document = len(piece.ids), piece.document
        kept = count - max(MIN_EVAL_TOKENS, math.ceil(share * count))
        if kept < MIN_EVAL_TOKENS:
            raise UserError(
                document.where,
                found=f"a domain of {count} tokens",
                expected=f"{2 * MIN_EVAL_TOKENS} or more, some of them to hold out",
                change="add documents or leave it out",
            )
        starts = [*self._long(document)[:, 1].tolist(), len(document.text)]
        last_bytes = len(document.text[starts[kept] :].encode())
        masks = (None, None) if piece.loss is None else (piece.loss[:kept], piece.loss[kept:])
        first = Piece(document, piece.ids[:kept], document.num_bytes - last_bytes, masks[0])
        return first, Piece(document, piece.ids[kept:], last_bytes, masks[1])

    def _ids(self, documents: list[Document]) -> list[np.ndarray]:
        texts = [document.text for document in documents]
        try:
            if len(documents) == 1 and documents[0].num_bytes >= LONG_BYTES:
                return [self._long(documents[0])[:, 0]]
            encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            # A tokenizer may make tokens of no text at all.
            found = zip(encoded, texts, strict=True)
            return [np.array(one.ids if text else [], dtype=np.int64) for one, text in found]
        except BaseException as error:
            if not (type(error) is Exception or is_panic(error)):  # what tokenizers raises has no type of its own
                raise
            if len(documents) > 1:
                return [ids for document in documents for ids in self._ids([document])]
            found = f"text that the tokenizer fails on ({type(error).__name__}: {error})"
            change = "remove the document or mend the tokenizer"
            raise UserError(documents[0].where, found=found, expected="token ids", change=change) from error

    def _long(self, document: Document) -> np.ndarray:
        return encode_long(lambda text: self.backend.encode(text, add_special_tokens=False), document.text)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        if group and (len(group) == BATCH_DOCUMENTS or size + document.num_bytes > BATCH_BYTES):
            yield group
            group, size = [], 0
        group.append(document)
        size += document.num_bytes
    if group:
        yield group


def is_panic(error: BaseException) -> bool:
    """Whether the tokenizer's Rust has panicked."""
    # pyo3 makes this class at run time, outside any module to import it from, and not under Exception.
    return type(error).__name__ == "PanicException"
