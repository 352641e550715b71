"""Documents to a token store: batches through the fast tokenizer, EOS after each document, a share held out."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shearling.data import conversation
from shearling.data.documents import Document, Domain, find_domains, parts, read
from shearling.data.special import encode_around
from shearling.data.store import DomainEntry, Manifest, SplitWriter, Store, TokenizerEntry, dtype_for
from shearling.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")
BATCH_DOCUMENTS, BATCH_BYTES = 512, 1 << 20
MIN_EVAL_TOKENS = 2  # one prediction
PROGRESS_TOKENS = 1 << 18
# How texts are encoded: what spells out a special token is plain text, or a web page could forge a document's end.
PLAIN: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}

Progress = Callable[[str, int, int], None]  # a domain, its documents and its tokens so far


@dataclass(frozen=True)
class Piece:
    """A document with its ids [tokens], EOS included, and which of them count in the loss; None if all do."""

    document: Document
    ids: np.ndarray
    text_bytes: int
    loss: np.ndarray | None = None


def prepare(
    inputs: Sequence[str | Path],
    *,
    tokenizer: Path,
    out: Path,
    held_out: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Store:
    """Tokenises documents into the existing folder `out` and opens the store; memory is bounded by one batch.

    Splits that the inputs name are kept; elsewhere the share `held_out` of the documents is, chosen by a hash of
    (seed, domain, number of the document), never none and never all. Of a domain with a single document the last
    `held_out` share of its tokens is held out, and its train part then has no EOS. A special
    token spelt out in a text stays plain text, so that no document can end another; a chat template's are tokens.
    Raises UserError for what documents, tokenizer or share lack.
    """
    if not 0 < held_out < 1:
        raise UserError("held_out", found=held_out, expected="a share between 0 and 1", change="0.01 holds out 1%")
    domains = find_domains(inputs)
    encoder = Encoder(load_tokenizer(tokenizer), folder=tokenizer)
    manifest = Manifest(
        dtype=dtype_for(encoder.vocab_size),
        vocab_size=encoder.vocab_size,
        eos_id=encoder.eos_id,
        tokenizer=TokenizerEntry(fingerprint=fingerprint(encoder.tokenizer), name=tokenizer.resolve().name),
        seed=seed,
        held_out=held_out,
        domains={
            domain.name: _write(domain, encoder, out=out, held_out=held_out, seed=seed, progress=progress)
            for domain in domains
        },
    )
    manifest.write(out)
    return Store.open(out)


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
        if not (isinstance(error, Exception) or _is_panic(error)):
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
    """A tokenizer that ends documents with EOS, checks every id, and says which document it failed on."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, folder: Path):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {folder}",
                found="no end-of-sequence token",
                expected="one, as documents end with it",
                change=f"set eos_token in {Path(folder) / 'tokenizer_config.json'}",
            )
        self.tokenizer, self.eos_id = tokenizer, cast(int, tokenizer.eos_token_id)
        # The length alone is too small for a vocabulary with holes.
        self.vocab_size = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))

    def pieces(self, documents: Iterable[Document]) -> Iterator[Piece]:
        """Each document's ids with EOS, none of them for one without text."""
        for group in _batches(documents):
            plain = [document for document in group if document.is_text]
            texts = iter(self._ids(plain) if plain else ())
            for document in group:
                yield self._ended(document, next(texts)) if document.is_text else self._made(document)

    def _made(self, document: Document) -> Piece:
        """The piece of a conversation, or of ids that were there already."""
        if document.messages is None:
            return self._ended(document, document.ids)
        rendered = conversation.render(
            self.tokenizer, document.messages, where=document.where, assistant_only=document.assistant_only
        )
        ids, loss = conversation.encode(self.tokenizer, rendered, where=document.where)
        return self._ended(document, ids, loss=loss, text_bytes=len(rendered.text.encode()))

    def _ended(
        self, document: Document, ids, *, loss: np.ndarray | None = None, text_bytes: int | None = None
    ) -> Piece:
        """A document's ids, checked, with EOS unless they end with it or are none; EOS counts if what it ends does."""
        ids = np.asarray(ids)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            wrong = ids.max() if ids.max() >= self.vocab_size else ids.min()
            found, expected = f"token id {wrong}", f"ids below {self.vocab_size}"
            raise UserError(document.where, found=found, expected=expected, change="check the tokenizer")
        ids = ids.astype(np.int64)
        if text_bytes is None:
            text_bytes = document.num_bytes if document.is_text else self._text_bytes(ids)
        if len(ids) and ids[-1] != self.eos_id:
            ids = np.append(ids, self.eos_id)
            loss = None if loss is None else np.append(loss, loss[-1])
        return Piece(document, ids, text_bytes, loss)

    def _text_bytes(self, ids: np.ndarray) -> int:
        return len(str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).encode())

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
        last_bytes = min(self._last_bytes(piece, kept), piece.text_bytes)
        halves = (None, None) if piece.loss is None else (piece.loss[:kept], piece.loss[kept:])
        first = Piece(document, piece.ids[:kept], piece.text_bytes - last_bytes, halves[0])
        return first, Piece(document, piece.ids[kept:], last_bytes, halves[1])

    def _last_bytes(self, piece: Piece, kept: int) -> int:
        """The bytes of text that the ids from `kept` on stand for."""
        text = piece.document.text
        if not piece.document.is_text:
            return self._text_bytes(piece.ids[kept:])
        encoded = self.tokenizer(text, **PLAIN, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]] + [len(text)]
        if len(starts) != len(piece.ids):  # encoded around a special token
            return self._text_bytes(piece.ids[kept:])
        return len(text[starts[kept] :].encode())

    def _ids(self, documents: list[Document]) -> list[list[int]]:
        texts = [document.text for document in documents]
        try:
            encoded = self.tokenizer(texts, **PLAIN, return_attention_mask=False, return_token_type_ids=False)
            # A tokenizer may make tokens of no text at all.
            found = [ids if text else [] for ids, text in zip(encoded["input_ids"], texts, strict=True)]
            forged = (self.eos_id in ids for ids in found)
            return [
                encode_around(self.tokenizer, text) if is_forged else ids
                for ids, text, is_forged in zip(found, texts, forged, strict=True)
            ]
        except BaseException as error:
            if not (type(error) is Exception or _is_panic(error)):  # what tokenizers raises has no type of its own
                raise
            if len(documents) > 1:
                return [ids for document in documents for ids in self._ids([document])]
            found = f"text that the tokenizer fails on ({type(error).__name__}: {error})"
            change = "remove the document or mend the tokenizer"
            raise UserError(documents[0].where, found=found, expected="token ids", change=change) from error


def choose(
    pieces: Iterable[Piece], *, share: float, key: str, cut: Callable[[Piece], tuple[Piece, Piece]]
) -> Iterator[tuple[str, Piece]]:
    """Each piece with its split, a share of them "eval" by a hash of `key` and their number, neither split empty.

    While one split is empty, the piece nearest to falling into it is kept back: at the end it goes there. A piece
    that is alone is cut in two.
    """
    kept: tuple[float, Piece] | None = None
    given: set[str] = set()
    for number, piece in enumerate(pieces):
        ticket = _ticket(f"{key}/{number}")
        if len(given) == 2:
            yield "eval" if ticket < share else "train", piece
            continue
        if kept is None:
            kept = ticket, piece
            continue
        low, high = sorted((kept, (ticket, piece)), key=lambda ticketed: ticketed[0])
        splits = {"eval" if ticketed[0] < share else "train" for ticketed in (low, high)}
        if "eval" in splits:
            yield "eval", low[1]
        if "train" in splits:
            yield "train", high[1]
        given |= splits
        kept = low if splits == {"train"} else high
    if kept and not given:
        yield from zip(("train", "eval"), cut(kept[1]), strict=True)
    elif kept and len(given) == 1:
        yield "train" if given == {"eval"} else "eval", kept[1]


def _write(
    domain: Domain, encoder: Encoder, *, out: Path, held_out: float, seed: int, progress: Progress | None
) -> DomainEntry:
    dtype = dtype_for(encoder.vocab_size)
    with (
        SplitWriter(out, domain=domain.name, split="train", dtype=dtype) as train,
        SplitWriter(out, domain=domain.name, split="eval", dtype=dtype) as held,
    ):
        writers = {"train": train, "eval": held}
        told = 0
        for split, piece in _chosen(domain, encoder, writers=writers, held_out=held_out, seed=seed):
            writers[split].add(piece.ids, text_bytes=piece.text_bytes)
            tokens = train.tokens + held.tokens
            if progress and tokens - told >= PROGRESS_TOKENS:
                told = tokens
                progress(domain.name, train.documents + held.documents, tokens)
        if progress:
            progress(domain.name, train.documents + held.documents, train.tokens + held.tokens)
    for split, writer in writers.items():
        if writer.documents == 0:
            raise UserError(
                f"domain {domain.name!r} ({domain.path})",
                found=f"no documents with text for {split} ({writer.skipped} empty ones)",
                expected="at least one",
                change="add text or leave the domain out",
            )
    return DomainEntry(train=train.entry(), eval=held.entry())


def _chosen(
    domain: Domain, encoder: Encoder, *, writers: dict[str, SplitWriter], held_out: float, seed: int
) -> Iterator[tuple[str, Piece]]:
    """A domain's pieces, each with its split; the writer of the split they are read for counts the empty ones."""

    def pieces(split: str) -> Iterator[Piece]:
        paths = domain.eval if split == "eval" else domain.train
        for piece in encoder.pieces(document for path in paths for part in parts(path) for document in read(part)):
            if len(piece.ids):
                yield piece
            else:
                writers[split].skipped += 1

    if domain.eval:
        return ((split, piece) for split in writers for piece in pieces(split))
    cut = partial(encoder.cut, share=held_out)
    return choose(pieces("train"), share=held_out, key=f"{seed}/{domain.name}", cut=cut)


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


def _ticket(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest()) / 2**48


def _is_panic(error: BaseException) -> bool:
    # pyo3 makes this class at run time, outside any module to import it from, and not under Exception.
    return type(error).__name__ == "PanicException"
