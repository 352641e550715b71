"""Documents to ids: the fast tokenizer of a model, EOS after each document, every id checked."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shearling.data import conversation
from shearling.data.document import Document
from shearling.data.long_text import encode_long
from shearling.data.special import encode_around
from shearling.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")
BATCH_DOCUMENTS, BATCH_BYTES = 512, 1 << 20
LONG_BYTES = 1 << 22  # a text from here on is encoded piece by piece: at once it takes some 100 bytes a token
MIN_EVAL_TOKENS = 2  # one prediction
Encoded = tuple[Any, ...]  # ids; perhaps which tokens' loss counts, and the bytes of text


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
            eos_id=cast(int, tokenizer.eos_token_id),
            vocab_size=vocab_size(tokenizer),
        )


def vocab_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """All ids are below it. The length alone is too small for a vocabulary with holes."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a local folder, without running code from it; UserError if there is none that loads."""
    folder = Path(folder)
    what, change = f"tokenizer of {folder}", "copy the tokenizer files of the model there"
    if not any((folder / name).is_file() for name in VOCABULARIES):
        # transformers would go on without: some classes then start with an empty vocabulary
        found = "no vocabulary file" if folder.is_dir() else "no such folder"
        raise UserError(what, found=found, expected=f"one of {', '.join(VOCABULARIES)}", change=change)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except StrictDataclassError as error:  # the model's config, which is read on the way
        what, found = f"config.json of {folder}", " ".join(str(error).split())
        raise UserError(what, found=found, expected="what transformers takes", change="mend config.json") from error
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

    A special token spelt out in a text stays plain text, so that no document can end another; a chat template's are
    tokens.
    """

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    @cached_property
    def backend(self) -> "Tokenizer":
        """What encodes texts: without transformers, so that a process of its own is ready in a tenth of the time."""
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self.pipeline.json)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # as plain text, or a web page could forge a document's end
        return backend

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """What renders conversations and decodes, loaded when the first of them comes."""
        return load_tokenizer(self.pipeline.folder)

    def pieces(
        self, documents: Iterable[Document], *, broken: Callable[[UserError], None] | None = None
    ) -> Iterator[Piece]:
        """Each document's ids with EOS, none of them for one without text. Raises UserError, naming the document.

        One that the tokenizer or its chat template fails on goes to `broken` instead, where it is given; ids that the
        vocabulary doesn't have never do, as that is a fault of all.
        """
        for group in _batches(documents):
            plain = [document for document in group if document.is_text]
            texts = iter(self._ids(plain) if plain else ())
            for document in group:
                found = next(texts) if document.is_text else self._made(document)
                if not isinstance(found, UserError):
                    yield self._ended(document, *found)
                elif broken is None:
                    raise found
                else:
                    broken(found)

    def _made(self, document: Document) -> Encoded | UserError:
        """Of a conversation, or of ids that were there already."""
        if document.messages is None:
            return (document.ids,)
        try:
            rendered = conversation.render(
                self.tokenizer, document.messages, where=document.where, assistant_only=document.assistant_only
            )
            ids, loss = conversation.encode(self.tokenizer, rendered, where=document.where)
        except UserError as error:
            if error.what != document.where:  # no template at all, say
                raise
            return error
        return ids, loss, len(rendered.text.encode())

    def _ended(self, document: Document, ids, loss: np.ndarray | None = None, text_bytes: int | None = None) -> Piece:
        """A document's ids, checked, with EOS unless they end with it or are none; EOS counts if what it ends does."""
        ids, limit = np.asarray(ids), self.pipeline.vocab_size
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            wrong = ids.max() if ids.max() >= limit else ids.min()
            found, expected = f"token id {wrong}", f"ids below {limit}"
            raise UserError(document.where, found=found, expected=expected, change="check the tokenizer")
        ids = ids.astype(np.int64)
        if text_bytes is None:
            text_bytes = document.num_bytes if document.is_text else self._text_bytes(ids)
        if len(ids) and ids[-1] != self.pipeline.eos_id:
            ids = np.append(ids, self.pipeline.eos_id)
            loss = None if loss is None else np.append(loss, loss[-1])
        return Piece(document, ids, text_bytes, loss)

    def _text_bytes(self, ids: np.ndarray) -> int:
        return len(str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).encode())

    def cut(self, piece: Piece, *, share: float) -> tuple[Piece, Piece]:
        """A document's first and last tokens, the last `share` of them apart; UserError below four tokens."""
        count, document = len(piece.ids), piece.document
        kept = max(MIN_EVAL_TOKENS, count - max(MIN_EVAL_TOKENS, math.ceil(share * count)))
        if count < 2 * MIN_EVAL_TOKENS:
            raise UserError(
                document.where,
                found=f"a domain of {count} tokens",
                expected=f"{2 * MIN_EVAL_TOKENS} or more, some of them to hold out",
                change="add documents or leave it out",
            )
        last_bytes = min(self._last_bytes(piece, kept), piece.text_bytes)
        halves = (None, None) if piece.loss is None else (piece.loss[:kept], piece.loss[kept:])
        first = Piece(document, piece.ids[:kept], piece.text_bytes - last_bytes, halves[0])
        return first, Piece(document, piece.ids[kept:], last_bytes, halves[1])

    def _last_bytes(self, piece: Piece, kept: int) -> int:
        """The bytes of text that the ids from `kept` on stand for."""
        text = piece.document.text
        if not piece.document.is_text:
            return self._text_bytes(piece.ids[kept:])
        starts = [*self._long(piece.document)[:, 1].tolist(), len(text)]
        if len(starts) != len(piece.ids):  # encoded around a special token
            return self._text_bytes(piece.ids[kept:])
        return len(text[starts[kept] :].encode())

    def _ids(self, documents: list[Document]) -> list[Encoded | UserError]:
        try:
            encoded = self._encoded(documents)
            return [
                (np.array(encode_around(self.tokenizer, document.text), np.int64) if self._is_forged(ids) else ids,)
                for document, ids in zip(documents, encoded, strict=True)
            ]
        except BaseException as error:
            if not (type(error) is Exception or is_panic(error)):  # what tokenizers raises has no type of its own
                raise
            if len(documents) > 1:
                return [ids for document in documents for ids in self._ids([document])]
            found = f"text that the tokenizer fails on ({type(error).__name__}: {error})"
            change = "remove the document or mend the tokenizer"
            failed = UserError(documents[0].where, found=found, expected="token ids", change=change)
            failed.__cause__ = error
            return [failed]

    def _encoded(self, documents: list[Document]) -> list[np.ndarray]:
        if len(documents) == 1 and documents[0].num_bytes >= LONG_BYTES:
            return [self._long(documents[0])[:, 0]]
        texts = [document.text for document in documents]
        found = zip(self.backend.encode_batch_fast(texts, add_special_tokens=False), texts, strict=True)
        # A tokenizer may make tokens of no text at all.
        return [np.array(one.ids if text else [], dtype=np.int64) for one, text in found]

    def _is_forged(self, ids: np.ndarray) -> bool:
        return bool((ids == self.pipeline.eos_id).any())

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
