"""A teacher for a student: opened, checked against it, loaded when it is first asked, an objective for each session."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from shearling.data.store import Store
from shearling.data.tokenise import fingerprint, load_tokenizer
from shearling.errors import UserError
from shearling.loss.streams import Alignment, Weights
from shearling.masks.attach import Attached
from shearling.ranks.ranks import Ranks
from shearling.teacher.cache import Cache, Manifest
from shearling.teacher.cached import CachedTeacher
from shearling.teacher.live import LiveTeacher
from shearling.teacher.model import Reader, check_same_tokens, default_dtype, kept_of, load_teacher
from shearling.teacher.options import Options
from shearling.train.distilled import Distilled, Streams, linear
from shearling.verbs.session import Session, choose_device
from shearling.verbs.source import Source
from shearling.verbs.together import load


def check_teacher(options: Options, *, student: Source, ranks: Ranks) -> None:
    """Raises UserError for what headers tell of a teacher that is named, before there is its student."""
    choose_device(options.device)
    if options.model is not None:
        teacher = ranks.one_before_others(lambda: Source.open(str(options.model), like=student))
        check_same_tokens(_reader(teacher), _reader(student))


@dataclass(frozen=True)
class Teaching:
    """A teacher made ready for a student. `alignment`: what of their residual streams is compared, if anything.

    `loader` gives its model, as `load_teacher` does.
    """

    options: Options
    teacher: Source
    alignment: Alignment | None
    loader: Callable[..., Any] = load_teacher

    @classmethod
    def plan(cls, options: Options, *, teacher: Source, student: Source) -> "Teaching":
        """Raises UserError for a teacher of other tokens, on no device here, and for streams that can't be compared."""
        choose_device(options.device)
        check_same_tokens(_reader(teacher), _reader(student))
        if not options.hidden:
            return cls(options, teacher, None)
        if options.cache is not None:
            raise UserError(
                "hidden-state term",
                found=f"a cached teacher ({options.cache}), which keeps distributions alone",
                expected="a teacher that runs along",
                change="leave the cache out, or the hidden-state term",
            )
        layers = student.shape["num_hidden_layers"]
        if student.fingerprint == teacher.fingerprint:  # before the cut, and so under masks
            return cls(options, teacher, Alignment.whole(student.family, layers=layers))
        kept = kept_of(student.origin(), student=student.name, teacher=teacher.name, fingerprint=teacher.fingerprint)
        return cls(options, teacher, Alignment.of(kept, student.family, layers=layers))

    @classmethod
    def wanted(
        cls, options: Options, *, student: Source, own: Source | None, why: str, device: str, ranks: Ranks
    ) -> "Teaching | None":
        """The teaching that was asked for, if any, by `own` where no model is named, of a student on a device.

        Raises UserError: see `plan`; and where ranks that share the teacher out are to have it on another kind of it.
        """
        if not options.wanted:
            return None
        kind = _kind(device)
        if options.device and ranks.count > 1 and options.weights == "as_is" and _kind(options.device) != kind:
            raise UserError(
                "teacher.device",
                found=f"{options.device}, with {ranks.count} ranks on {kind}",
                expected=f"{kind}: they share its weights out as they do the student's",
                change="leave it out, or start one process",
            )
        name, teacher = options.model, own
        if name is not None:
            teacher = ranks.one_before_others(lambda: Source.open(name, like=student))
        if teacher is None:
            change = "name one: --teacher MODEL"
            raise UserError("teacher", found=why, expected="the model that this one was cut from", change=change)
        teacher.identify(ranks)
        return cls.plan(options, teacher=teacher, student=student)

    def objective(self, session: Session, *, under: Attached | None = None) -> Distilled:
        """For one session: hand it to the loop as its objective, and first among its terms.

        `under`: the masks that the student is under, for what they keep of its streams.
        """
        domains, options = session.settings.domains, self.options
        live = partial(self._live, self._device(session), session.ranks)
        if options.cache is None:
            teacher = live()
        else:
            teacher = CachedTeacher(Cache.open(*self._cache_of(Path(options.cache), session)), live, domains=domains)
        return Distilled(
            teacher,
            domains=len(domains),
            share=partial(linear, start=options.share, end=options.end),
            steps=session.settings.steps,
            streams=self._streams(under),
        )

    def _streams(self, under: Attached | None) -> Streams | None:
        if self.alignment is None:
            return None
        counting = (lambda: Weights.of_masks(under.masks)) if under else Weights
        return Streams(self.alignment.student, self.options.hidden, counting)

    def check(self, session: Session) -> None:
        """Raises UserError for windows that the teacher has no positions for, and for a cache of other things, before
        anything is computed.
        """
        self.teacher.seq_len(session.settings.seq_len)
        if self.options.cache is not None:
            Cache.check(*self._cache_of(Path(self.options.cache), session))

    def running(self, loader: Callable[..., Any]) -> "Teaching":
        """The same with a teacher that runs along, whatever is in a cache, its model as `loader` gives it."""
        return replace(self, options=replace(self.options, cache=None), loader=loader)

    def in_dtype(self, name: str) -> "Teaching":
        """The same, its weights in another dtype."""
        return replace(self, options=replace(self.options, dtype=name))

    def dtype(self, device: str) -> torch.dtype:
        """What its weights are in, beside a student on this device."""
        return self._dtype(self.options.device or device)

    def flops(self, session: Session, tokens: int) -> float:
        """FLOPs of the teacher's forward passes over so many tokens; what a cache saves of them isn't known before."""
        return session.flops(self.teacher, self.teacher.shape, tokens=tokens) / 3

    def identity(self) -> Mapping[str, Any]:
        """What a stage's identity has to have of it beside the options."""
        return {"taught_by": self.teacher.fingerprint, "cached": self.options.cache is not None}

    def _device(self, session: Session) -> str:
        """Where it runs. Each of several ranks has one device of a kind, whatever number was asked for."""
        asked, own = self.options.device, session.device
        return own if asked is None or (session.ranks.count > 1 and _kind(asked) == _kind(own)) else asked

    def _live(self, device: str, ranks: Ranks) -> LiveTeacher:
        blocks, channels = (self.alignment.source, self.alignment.channels) if self.alignment else ((), None)
        return LiveTeacher(self._models(device, ranks), blocks=blocks, channels=channels)

    def _models(self, device: str, ranks: Ranks) -> Any:
        if device not in self._loaded:
            dtype, weights = self._dtype(device), self.options.weights
            if ranks.count > 1 and weights == "as_is":
                model = load(self.teacher, device=device, ranks=ranks, dtype=dtype).requires_grad_(False)
            else:  # int8 weights can't be shared out: each rank has all of them
                model = self.loader(self.teacher.folder, device=device, dtype=dtype, weights=weights)
            self._loaded[device] = model
        return self._loaded[device]

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    def _dtype(self, device: str) -> torch.dtype:
        return getattr(torch, self.options.dtype) if self.options.dtype else default_dtype(device)

    def _cache_of(self, folder: Path, session: Session) -> tuple[Path, Manifest]:
        store, seq_len, separate = session.feed.store, session.settings.seq_len, session.feed.separate
        manifest = Manifest(
            kind=self.options.kind,
            k=min(self.options.k, self.teacher.shape["vocab_size"]),
            seed=0,  # not the run's: runs of other seeds are to read it too
            seq_len=seq_len,
            separate=separate,
            vocab_size=self.teacher.shape["vocab_size"],
            store=store.digest,
            teacher=self.teacher.fingerprint,
            weights=f"{self._dtype(self.options.device or session.device)} {self.options.weights}",
            windows={domain: store.window_count(domain, "train", seq_len) for domain in store.domains},
        )
        return folder.expanduser() / _place(store, seq_len, separate), manifest


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _place(store: Store, seq_len: int, separate: bool) -> str:
    """A folder for each way of reading each store, so that the phases of a run can share one cache."""
    return f"{store.digest[:12]}-{seq_len}" + ("-separate" if separate else "")


def _reader(model: Source) -> Reader:
    return Reader(model.name, model.shape["vocab_size"], fingerprint(load_tokenizer(model.folder)))
