"""Memory before a run: what its steps will take, whether that is there, and what would fit if it isn't."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from shearling.axes.axis import mask_shape
from shearling.data.batch import Batch
from shearling.errors import UserError
from shearling.masks.attach import Attached
from shearling.ranks.ranks import ALONE, Ranks, has_own_memory
from shearling.recipe import Training
from shearling.train.eight_bit import moment_bytes
from shearling.train.rehearsal import FULL, Ledger, pretending, rehearse
from shearling.train.room import Room, room_on
from shearling.verbs.balancing import balanced
from shearling.verbs.session import Session
from shearling.verbs.source import Source
from shearling.verbs.teaching import Teaching
from shearling.weights.adapters import Adapters
from shearling.weights.experts import autocast_experts
from shearling.weights.pretend import whole_windows, without_weights

log = logging.getLogger(__name__)

AUTO_SHARE = 0.9  # of what is there, for a number of windows that nobody has tried
MOMENTS = 2  # AdamW's, for each parameter
RANK = 16  # of the adapters that are spoken of to those who may not know of them
LASTING = ("weights", "optimizer", "teacher_weights", "masks")
# By glibc, of what comes and goes on a CPU: holes of less than 32 MB between blocks that are in use. Measured, from a
# third to as much again (benchmarks/memory.py); with mmap for every block (MALLOC_MMAP_THRESHOLD_) next to nothing.
KEPT_BY_ALLOCATOR = 1 / 3
# Of an entry of a mask, in fp32: its gate, that one's gradient and moments, its score and whether it is closed.
GATE_BYTES = 6 * 4
OFFLOADED = ("weights", "gradients", "optimizer")
SHARED = ("weights", "gradients", "optimizer", "teacher_weights")  # among ranks


@dataclass(frozen=True)
class Need:
    """Bytes at the fullest moment of training, by part. `saving`: of copies beside it while a checkpoint is written.

    Those lie in the computer's memory wherever the run is, as does what is `offloaded`.
    """

    parts: Mapping[str, int]
    saving: int
    offloaded: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def on(self, device: str) -> int:
        """All that its device has to hold."""
        return self.total + (self.saving if device == "cpu" else 0)

    def __str__(self) -> str:
        parts = [(part, nbytes) for part, nbytes in self.parts.items() if nbytes]
        parts += [("a copy while a checkpoint is written", self.saving)] if self.saving else []
        parts += [("in the computer's memory", self.offloaded)] if self.offloaded else []
        return ", ".join(f"{in_gigabytes(nbytes)} {part.replace('_', ' ')}" for part, nbytes in parts)


@dataclass(frozen=True)
class Trained:
    """A training session as far as its memory goes. `axes`: those that masks lie on; `steps`: of the whole stage;
    `before`: the windows at a time that it went on with until it was broken off.
    """

    source: Source
    session: Session
    asked: Training
    steps: int
    teaching: Teaching | None = None
    axes: tuple[str, ...] = ()
    before: int | None = None

    def within_memory(self) -> Session:
        """The session with what it takes, and the micro-batch chosen if it is to be. Raises UserError if it can't fit.

        Where a model can't be rehearsed nothing is known and nothing is refused, which is said. Ranks agree on the
        smallest micro-batch that one of them has chosen.
        """
        ranks, settings = self.session.ranks, self.session.settings
        session = ranks.together(self._within_memory)
        if ranks.count == 1:
            return session
        choices = [settings.micro_sequences, *(each.session.settings.micro_sequences for each in self._smaller())]
        too_many = ranks.any(*(session.settings.micro_sequences < choice for choice in choices))
        agreed = next(choice for choice, many in zip(choices, too_many, strict=True) if not many)
        return replace(session, settings=replace(session.settings, micro_sequences=agreed))

    def _within_memory(self) -> Session:
        device, auto = self.session.device, self.asked.micro_sequences == "auto"
        again = self.with_micro(self.before) if auto and self.before else self
        try:
            room = self._room(device)
            chosen, need = again._chosen(room, self) if auto and room else (again, again.need())
        except (MemoryError, UserError):
            raise
        except Exception as error:
            log.warning("memory can't be estimated (%s: %s)", type(error).__name__, error)
            return again.session
        if room is not None and need.on(device) > room.nbytes:
            raise chosen._refused(room, need)
        host = self._room("cpu")
        if device != "cpu" and host is not None and need.saving + need.offloaded > host.nbytes:
            raise self._no_room_beside(host, need)
        said = {f"{part}_bytes": nbytes for part, nbytes in need.parts.items()}
        said |= {"total_bytes": need.total, "saving_bytes": need.saving, "offloaded_bytes": need.offloaded}
        said |= {"free_bytes": room.nbytes if room else None}
        log.info("memory: %s of %s", in_gigabytes(need.on(device)), in_gigabytes(room.nbytes) if room else "?")
        return replace(chosen.session, memory=said)

    def need(self) -> Need:
        """By a rehearsal of a step, or of two micro-batches where a batch has more than one."""
        settings, device, session = self.session.settings, self.session.device, replace(self.session, ranks=ALONE)
        kept = session.dtype
        computed = (settings.autocast or kept) if self._sharded else kept
        with pretending(device), nullcontext() if self.session.feed.separate else whole_windows():
            model, ledger = without_weights(self.source.folder, dtype=computed), Ledger(device)
            model.requires_grad_(not session.frozen)
            family, config = self.source.family, self.source.config
            autocast_experts(model, family, config)
            adapted = session.adapters.add(model, family, config) if session.adapters else ()
            nbytes = {id(p): p.numel() * (FULL if p.requires_grad else kept.itemsize) for p in model.parameters()}
            ledger.hold(model.parameters(), "weights", lambda p: nbytes[id(p)])
            attached = None
            if self.axes:
                with ledger, ledger.part("masks"):
                    attached = Attached(model, family, config=config, axes=self.axes, adapted=adapted)
                    masks = {axis: torch.ones(shape, requires_grad=True) for axis, shape in self._mask_shapes().items()}
                    attached.set(masks, support=masks)
            session.prepare(
                model, self.asked.model_copy(update={"compile": False, "kernels": "torch"}), self.source.blocks()
            )
            objective, apart = replace(session, compiled=False).objective(), []
            if self.teaching:
                teaching = self.teaching.running(lambda folder, **options: _teacher(folder, ledger, apart, **options))
                objective = teaching.objective(session, under=attached)
            objective = balanced(objective, self.source) or objective
            rehearse(
                model,
                objective,
                self._batch(),
                ledger=ledger,
                autocast=settings.autocast,
                accumulates=settings.micro_sequences < settings.batch_sequences // self.session.ranks.count,
                apart=[teacher.base_model for teacher in apart],
                whole=self._beside(model) if self._sharded else None,
            )
            weights, gathered = sum(nbytes.values()), self._gathered(model)
            learning = [p for p in model.parameters() if p.requires_grad]
            trained = sum(nbytes[id(p)] for p in learning)
            moments = sum(moment_bytes(p.numel()) for p in learning) if self.asked.bits == 8 else trained
        return self._summed(dict(ledger.peak), weights, trained, MOMENTS * moments, gathered)

    @property
    def _sharded(self) -> bool:
        """Whether it computes from copies of its weights, block by block, in the dtype that others autocast to."""
        return self.session.ranks.count > 1 or self.session.ranks.offload

    def _beside(self, model: Any) -> list[Tensor]:
        """The parameters that are in no block."""
        blocks = {id(p) for path in self.source.blocks() for p in model.get_submodule(path).parameters()}
        return [p for p in model.parameters() if id(p) not in blocks]

    def _summed(self, parts: dict[str, int], weights: int, trained: int, moments: int, gathered: int) -> Need:
        """With what is there throughout; or as it is while the optimizer steps, if more is there then."""
        gates = GATE_BYTES * sum(prod(shape) for shape in self._mask_shapes().values())
        lasting = {"weights": weights, "gradients": trained, "optimizer": moments}
        stepping = {**lasting, "teacher_weights": parts.get("teacher_weights", 0), "masks": parts.get("masks", 0)}
        parts |= {"optimizer": lasting["optimizer"]}
        parts = max(parts, stepping, key=lambda found: sum(found.values()))
        if self.session.device == "cpu":
            come_and_go = sum(n for part, n in parts.items() if part not in LASTING)
            parts["allocator"] = round(KEPT_BY_ALLOCATOR * come_and_go)
        parts["masks"] = parts.get("masks", 0) + gates
        shards = _shards(self.session.ranks)
        whole = () if self.teaching is None or self.teaching.options.weights == "as_is" else ("teacher_weights",)
        parts |= {part: parts.get(part, 0) // shards for part in SHARED if part not in whole}
        parts |= {"gathered": gathered + parts.get("gathered", 0)} if self._sharded else {}
        never = self.asked.save_every is not None and self.asked.save_every > self.steps
        saving = 0 if never else (trained + moments) // shards + gates
        if not self.session.ranks.offload:
            return Need(parts, saving)
        on_device = {part: nbytes for part, nbytes in parts.items() if part not in OFFLOADED}
        return Need(on_device, saving, sum(lasting.values()) // shards)

    def _gathered(self, model: Any) -> int:
        """What of weights that are shared out is whole at a time: all that is in no block, the largest block with its
        gradients, and the next one's weights. The others' gradients come as the rehearsal makes them.
        """
        beside = sum(p.nbytes for p in self._beside(model))
        blocks = (model.get_submodule(path).parameters() for path in self.source.blocks())
        return beside + max(sum(p.nbytes * (2 + p.requires_grad) for p in block) for block in blocks)

    def _room(self, device: str) -> Room | None:
        """What there is of a device for this process: of a computer's memory, its share among the ranks there."""
        room, here = room_on(device), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if room is None or device != "cpu" or self.session.ranks.count == 1:
            return room
        return replace(room, nbytes=room.nbytes // here)

    def _mask_shapes(self) -> dict[str, tuple[int, ...]]:
        return {axis: tuple(mask_shape(axis, self.source.shape.axes)) for axis in self.axes}

    def _batch(self) -> Batch:
        s = self.session.settings
        ids = torch.zeros(s.micro_sequences, s.seq_len + 1, dtype=torch.int64)
        domains = tuple(row % len(s.domains) for row in range(len(ids)))
        return Batch(ids, domains, starts=torch.zeros_like(ids) if self.session.feed.separate else None)

    def with_micro(self, sequences: int) -> "Trained":
        """The same at another micro-batch."""
        settings = replace(self.session.settings, micro_sequences=sequences)
        return replace(self, session=replace(self.session, settings=settings))

    def _smaller(self) -> "Iterator[Trained]":
        """At each power of two below its micro-batch, the largest first."""
        sequences = self.session.settings.micro_sequences
        return (self.with_micro(1 << power) for power in reversed(range((sequences - 1).bit_length())))

    def _chosen(self, room: Room, largest: "Trained") -> "tuple[Trained, Need]":
        """Itself, if it is what a run goes on with and fits still: with another micro-batch come other bits. Else the
        `largest` or as many windows as fit with some to spare, or one; and its need.
        """
        device, need = self.session.device, self.need()
        if self.before is not None:
            if need.on(device) <= room.nbytes:
                return self, need
            said = "there isn't the memory any more for %d windows at once: with fewer it goes on, but not to the bit"
            log.warning(said, self.before)
            need = largest.need()
        found, smaller = largest, largest._smaller()
        while need.on(device) > AUTO_SHARE * room.nbytes and (fewer := next(smaller, None)):
            found, need = fewer, fewer.need()
        return found, need

    def _refused(self, room: Room, need: Need) -> UserError:
        device = self.session.device
        return UserError(
            f"memory for training on {device}",
            found=f"{in_gigabytes(room.nbytes)} ({room.nbytes} bytes) free, says {room.by}",
            expected=f"{in_gigabytes(need.on(device))} ({need.on(device)} bytes): {need}",
            change=self._what_fits(room),
        )

    def _what_fits(self, room: Room) -> str:
        """Words for the options that would fit by themselves, else for what all of them together come to."""
        device = self.session.device
        fewer = next((t for t in self._smaller() if t.need().on(device) <= room.nbytes), None)
        found = {} if fewer is None else {f"--micro-batch {fewer.session.settings.micro_sequences}": fewer.need()}
        others = dict(self._others())
        needs = {words: other.need() for words, other in others.items()}
        found |= {words: need for words, need in needs.items() if need.on(device) <= room.nbytes}
        if found:
            each = "; ".join(f"{words} ({in_gigabytes(need.on(device))})" for words, need in found.items())
            return f"any of these would fit: {each}"
        least, words = self.with_micro(1), ["--micro-batch 1"]
        for name, _ in self._others():
            others = dict(least._others())
            if name in others:  # some leave no place for another
                least = others[name]
                words.append(name)
        need = least.need()
        so = "would fit" if need.on(device) <= room.nbytes else "isn't enough; choose a smaller model or another device"
        return f"{' and '.join(words)} ({in_gigabytes(need.on(device))}) {so}"

    def _others(self) -> "Iterator[tuple[str, Trained]]":
        """What else can be asked for so that less is needed, and what comes of it."""
        if self.asked.activation_checkpointing != "full":
            yield "--activation-checkpointing full", self._asking(activation_checkpointing="full")
        if has_own_memory(self.session.device) and not self.session.ranks.offload:
            yield "--offload", self._offloading()
        alone = self.session.ranks.count == 1 and not self.session.ranks.offload
        if self.asked.bits == 32 and not self.session.frozen and alone:
            yield "--optimizer adamw8bit", self._asking(optimizer="adamw8bit")
        if self.session.settings.autocast is None:
            settings = replace(self.session.settings, autocast=torch.bfloat16)
            yield "--autocast bfloat16", replace(self, session=replace(self.session, settings=settings))
        if self.teaching and self.teaching.dtype(self.session.device) == torch.float32:
            yield "a teacher in bfloat16 (teacher.dtype)", replace(self, teaching=self.teaching.in_dtype("bfloat16"))
        if self.teaching:
            yield "no teacher", replace(self, teaching=None)
        if self.session.device == "cpu" and (self.asked.save_every is None or self.asked.save_every <= self.steps):
            yield f"--save-every {self.steps + 1} (no checkpoints)", self._asking(save_every=self.steps + 1)
        if not self.session.frozen and find_spec("peft"):
            adapters = Adapters(RANK, self.asked.seed)
            yield f"--lora-rank {RANK}", replace(self, session=replace(self.session, frozen=True, adapters=adapters))

    def _asking(self, **options: Any) -> "Trained":
        return replace(self, asked=self.asked.model_copy(update=options))

    def _offloading(self) -> "Trained":
        return replace(self, session=replace(self.session, ranks=replace(self.session.ranks, offload=True)))

    def _no_room_beside(self, host: Room, need: Need) -> UserError:
        whole = need.saving + need.offloaded
        return UserError(
            "memory for checkpoints" + (" and what is offloaded" if need.offloaded else ""),
            found=f"{in_gigabytes(host.nbytes)} ({host.nbytes} bytes) free, says {host.by}",
            expected=f"{in_gigabytes(whole)} ({whole} bytes): {in_gigabytes(need.saving)} are the copy that is written "
            "while the run goes on",
            change=f"free some, or leave checkpoints out: --save-every {self.steps + 1}",
        )


def _shards(ranks: Ranks) -> int:
    """In how many parts a model's weights lie."""
    return ranks.count if ranks.mesh is None else ranks.mesh.size(ranks.mesh.ndim - 1)


def in_gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def _teacher(folder: Any, ledger: Ledger, apart: list[Any], *, device: str, dtype: torch.dtype, weights: str) -> Any:
    """As `load_teacher` gives it, without weights."""
    with torch.device(device):
        model = without_weights(folder, dtype=dtype).requires_grad_(False)
    narrow = {id(weight) for weight in _linears(model)} if weights == "int8" else set()
    ledger.hold(
        model.parameters(),
        "teacher_weights",
        # A byte for each, and for each row a scale.
        lambda p: p.numel() + len(p) * p.element_size() if id(p) in narrow else p.nbytes,
    )
    apart.append(model)
    return model


def _linears(model: Any) -> Iterator[Tensor]:
    head = model.get_output_embeddings()
    return (m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
