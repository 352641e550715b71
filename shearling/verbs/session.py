"""A training stage made ready: what the user left open chosen, once, from the model, the budget and the data."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, isfinite, log2
from typing import Any

import torch

from shearling.axes.count import flops_per_token
from shearling.axes.shape import Shape
from shearling.data.batch import Batch
from shearling.data.feed import Feed, by_size
from shearling.data.files import is_remote
from shearling.data.loader import bytes_per_token
from shearling.data.sampler import SamplerState
from shearling.data.store import Store
from shearling.errors import UserError, nearest, raise_all
from shearling.loss.held_out import Measured, measure
from shearling.mixture.options import Signal
from shearling.mixture.steering import Steered
from shearling.mixture.weights import Mixture, check_weights
from shearling.ranks.ranks import ALONE, Ranks
from shearling.recipe import Training
from shearling.train.checkpointing import checkpointing
from shearling.train.eight_bit import check_8bit
from shearling.train.liger import check_liger, use_liger
from shearling.train.objective import NextToken, Objective
from shearling.train.optim import default_adapters_lr, default_lr
from shearling.train.schedule import cosine, trapezoid
from shearling.train.step import Draw, Log, OnStep, Settings, State
from shearling.verbs.sinks import check_sinks
from shearling.verbs.source import Source
from shearling.verbs.together import Evenly, dealt, load
from shearling.weights.adapters import Adapters, Read, check_rank, merged

log = logging.getLogger(__name__)

FORWARD_TOKENS = 8192  # tokens that go through the model at once
# What comes of a limited domain that has been read as often as it may be. "refuse" is about what is known beforehand.
AT_END = {
    "refuse": "the run ends",
    "stop": "the run ends",
    "redistribute": "its share goes to the others",
    "repeat": "it is read again",
}
LOG_EVERY_ON_GPU = 10  # steps: at each of those the host waits for the device, which then waits for the host
WINDOWS_BETWEEN = 4  # of the smallest domain, between two updates of the mixture
UPDATES = 20  # of the mixture in a run, where nobody asks for another number
Watch = Callable[[str, int], OnStep]  # (title, steps) -> train's on_step


def unwatched(title: str, steps: int) -> OnStep:
    """No progress shown."""
    return lambda step, figures, excess: None


@dataclass(frozen=True)
class Session:
    """All that one call of the training loop needs beside the model, and the rate to train at.

    `mixture` is what it starts with, `steering` who changes it. `notes` say what a user should know before it starts.
    """

    settings: Settings
    feed: Feed
    device: str
    lr: float
    eval_windows: int
    mixture: Mixture
    ranks: Ranks = ALONE
    frozen: bool = False  # the weights of what is trained
    adapters: Adapters | None = None  # on them, that are trained then
    compiled: bool = False
    steering: Steered | None = None
    notes: tuple[str, ...] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)  # what a step is estimated to take

    @classmethod
    def plan(
        cls,
        asked: Training,
        source: Source,
        store: Store,
        *,
        default_tokens: int,
        most_between_updates: int,
        device: str | None = None,
        ranks: Ranks = ALONE,
    ) -> "Session":
        """Fills in what `asked` leaves open; the mixture is steered once `towards` has said what by."""
        check_rank(asked.lora_rank, source.family, source.config, source.shape.axes)
        source.check_store(store)
        check_sinks(asked.sinks)
        device = device or choose_device(asked.device)
        if asked.bits == 8:
            check_8bit(device, ranks)
        if asked.kernels == "liger":
            check_liger(device, str(source.config["model_type"]))
        seq_len = source.seq_len(asked.seq_len)
        tokens = asked.tokens or (asked.steps or 0) * (asked.batch_tokens or 0) or default_tokens
        by_default = default_batch_tokens(source.parameters, tokens)
        sequences = batch_windows(asked.batch_tokens, seq_len=seq_len, by_default=by_default, ranks=ranks)
        steps = asked.steps or max(1, round(tokens / (sequences * seq_len)))
        auto = asked.micro_sequences == "auto"  # then at most the batch: verbs/memory.py says how many
        micro = sequences if auto else asked.micro_sequences or max(1, FORWARD_TOKENS // seq_len)
        settings = Settings(
            steps=steps,
            seq_len=seq_len,
            batch_sequences=sequences,
            micro_sequences=min(int(micro), sequences // ranks.count),
            halves=auto and ranks.mesh is None,
            domains=store.domains,
            schedule=_schedule(asked),
            clip_norm=asked.clip_norm,
            log_every=asked.log_every or (LOG_EVERY_ON_GPU if device.startswith("cuda") else 1),
            eval_every=max(1, steps // 10) if asked.eval_every is None else asked.eval_every,
            autocast=_autocast(asked.autocast, device),
        )
        feed = Feed(
            store,
            seq_len,
            sequences,
            asked.seed,
            repeats=_repeats(asked.repeats, store),
            at_end=asked.at_end,
            separate=asked.separate_documents,
            workers=asked.workers,
            rank=ranks.rank,
            ranks=ranks.count,
            pin=device.startswith("cuda"),
        )
        mixture = _starting(asked, store)
        adapters = Adapters.asked(asked.lora_rank, asked.seed)
        rate = asked.lr or (default_adapters_lr if adapters else default_lr)(source.parameters)
        session = cls(settings, feed, device, rate, asked.eval_windows, mixture, ranks, asked.frozen, adapters)
        often = max(min(steps // UPDATES, most_between_updates), _windows_apart(mixture, sequences))
        every = asked.mixture.every or max(1, min(often, steps // 2))
        notes = (*_batch_notes(asked.batch_tokens, settings), *session._end_notes())
        return replace(session, notes=notes, compiled=asked.compile, steering=_unaimed(asked, every))

    def towards(self, references: Mapping[str, float] | None, said: str) -> "Session":
        """The same, its mixture steered towards `references`, or constant where there are none; `said` is why."""
        steering = replace(self.steering, references=references) if self.steering and references else None
        limits = self._limit_notes() if steering else ()
        return replace(self, steering=steering, notes=(*self.notes, *limits, said))

    @property
    def signal(self) -> Signal | None:
        """What the mixture is to be steered by; None if it is to stay."""
        return self.steering.signal if self.steering else None

    def state(self) -> State:
        """Before the first step."""
        return State(step=0, tokens=0, sampler=self.feed.start(), mixture=self.mixture)

    def state_after(self, state: State, last: "Session", *, same_mixture: bool) -> State:
        """Before the first step, `state` being what the session before ended in.

        Where it read the same windows this one reads on; with the same mixture it goes on with what came out of it.
        """
        found = replace(self.state(), tokens=state.tokens)
        if self.feed.store.digest == last.feed.store.digest:
            if self.feed.seq_len == last.feed.seq_len:
                found = replace(found, sampler=state.sampler)
            if same_mixture:
                found = replace(found, mixture=state.mixture)
        return found

    def objective(self) -> Objective:
        return NextToken(len(self.settings.domains), compiled=self.compiled)

    def measure(self, model: Any) -> dict[str, Measured]:
        """Held-out figures by domain of a model as it is. Raises UserError where a loss isn't finite."""
        windows = self.feed.held_out(
            limit=self.eval_windows, sequences=self.settings.micro_sequences, **dealt(self.ranks)
        )
        evenly = Evenly(model, self.ranks, self.settings.seq_len + 1)
        measured = measure(
            model,
            {domain: evenly.taken(batches) for domain, batches in windows.items()},
            bytes_per_token=bytes_per_token(self.feed.store),
            together=evenly.together,
        )
        raise_all(
            [
                UserError(
                    f"held-out loss of {domain!r}",
                    found=figures.nats_per_token,
                    expected="a finite loss",
                    change=f"lower --lr if this came of training (it was {self.lr:.3g}), else look at the model",
                )
                for domain, figures in measured.items()
                if not isfinite(figures.nats_per_token)
            ]
        )
        return measured

    def losses(self, model: Any) -> dict[str, float]:
        """Held-out loss by domain of a model as it is, in nats per token. Raises UserError where it isn't finite."""
        return {domain: figures.nats_per_token for domain, figures in self.measure(model).items()}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights of what is trained, in memory."""
        return torch.bfloat16 if self.frozen else torch.float32

    def load(self, source: Source, *, dtype: torch.dtype = torch.float32, adapters: Adapters | None = None) -> Any:
        """A model to train or to measure."""
        compute = self.settings.autocast
        return load(source, device=self.device, ranks=self.ranks, dtype=dtype, compute=compute, adapters=adapters)

    def reader(self, source: Source, model: Any) -> Read:
        """The weights that training ends with: those learned, or the source's with what adapters have."""
        if self.adapters:
            return merged(model, source.reads(self.ranks))
        return source.reads(self.ranks) if self.frozen else source.reader(model)

    def evaluate(self, model: Any) -> Callable[[], dict[str, float]]:
        return partial(self.losses, model)

    def prepare(self, model: Any, asked: Training, blocks: Iterable[str]) -> None:
        """Switches on what was asked for to save memory or time; blocks are compiled one by one."""
        if asked.kernels == "liger":
            use_liger(model)
        if asked.activation_checkpointing != "none":
            model.train()  # transformers checkpoints in training mode only; no dropout and no noise is on
            model.activation_checkpointing_enable(checkpointing(asked.activation_checkpointing))
        if asked.compile:
            for block in blocks:
                model.get_submodule(block).compile()

    @property
    def tokens(self) -> int:
        """What it trains on, if the data lasts."""
        return self.settings.steps * self.settings.batch_tokens

    def flops(self, source: Source, shape: Shape, *, tokens: int) -> float:
        """FLOPs of training on so many tokens, forward and backward, at the mean context of a causal window."""
        return 3.0 * flops_per_token(source.family, source.config, shape, context=self.settings.seq_len // 2) * tokens

    def measured_on(self) -> dict[str, Any]:
        """What held-out losses of this session belong to: the same, and they can be compared."""
        return {"data": self.feed.store.digest, "seq_len": self.settings.seq_len, "windows": self.eval_windows}

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the record."""
        s = self.settings
        return {
            "steps": s.steps,
            "seq_len": s.seq_len,
            "batch_sequences": s.batch_sequences,
            "micro_sequences": s.micro_sequences,
            "tokens": self.tokens,
            "lr": self.lr,
            "device": self.device,
            "autocast": str(s.autocast),
            "seed": self.feed.seed,
            "ranks": self.ranks.count,
            **({"memory": dict(self.memory)} if self.memory else {}),
        }

    def describe_mixture(self, state: State) -> dict[str, Any]:
        """The mixture that the run starts with, and what will change it, for the record.

        `readings`: how often the run reads each domain if the weights stay.
        """
        s, weights = self.steering, state.mixture.weights
        return {
            "weights": dict(weights),
            "references": dict(s.references) if s else {},
            "steering": f"{s.rule.kind}, by {s.signal} losses, every {s.every} steps" if s else "constant",
            "readings": self.feed.readings(weights, self.settings.steps),
            "notes": list(self.notes),
        }

    def _end_notes(self) -> tuple[str, ...]:
        """When limited domains run out, at the weights it starts with. Raises UserError where they may not."""
        ends = {d: step for d, step in self.feed.ends(self.mixture.weights).items() if step <= self.settings.steps}
        if ends and self.feed.at_end == "refuse":
            raise_all(
                [
                    UserError(
                        f"domain {domain!r}",
                        found=f"{self.feed.limits()[domain]} windows, which at {self.mixture.weights[domain]:.1%} of "
                        f"the data end at step {step}",
                        expected=f"enough for {self.settings.steps} steps",
                        change="lower its weight, allow more repeats, or say what happens then: "
                        "--at-end stop, redistribute or repeat",
                    )
                    for domain, step in ends.items()
                ]
            )
        return tuple(
            f"{domain} will have been read {self.feed.repeats[domain]} times at step {step} of "
            f"{self.settings.steps}, if the weights stay: then {AT_END[self.feed.at_end]}"
            for domain, step in ends.items()
        )

    def _limit_notes(self) -> tuple[str, ...]:
        """Of limited domains that last at the weights it starts with: that a mixture which changes may end them."""
        steps, weights = self.settings.steps, self.mixture.weights
        found = {domain: self.feed.longest_share(domain, steps) for domain in self.feed.limits()}
        return tuple(
            f"{domain} lasts to the end while it is at most {share:.1%} of the data on average; it starts at "
            f"{weights[domain]:.1%}, and the mixture may change that: if it is used up, {AT_END[self.feed.at_end]}"
            for domain, share in found.items()
            if weights[domain] <= share < 1
        )

    def telling(self, draw: Draw, state: State, write: Log) -> Draw:
        """`draw`, from `state` on, with an event "used_up" for each limited domain whose last window it draws, or for
        those that the data ends with.
        """
        before = state.step - sum(state.sampler.drawn) // self.feed.sequences

        def drawing(sampler: SamplerState, weights: Mapping[str, float]) -> tuple[Batch | None, SamplerState]:
            found, after = draw(sampler, weights)
            ended = self.feed.used_up(sampler, weights) if found is None else []
            for domain in ended or self.feed.used_up_between(sampler, after):
                step, left = before + sum(after.drawn) // self.feed.sequences, self.feed.shares_left(after, weights)
                note = f"{domain} has been read {self.feed.repeats[domain]} times: {AT_END[self.feed.at_end]}"
                write("used_up", step=step, domain=domain, weights=left, note=note)
                log.info("%s, at step %d of %d", note, step, self.settings.steps)
            return found, after

        return drawing


def check_contents(source: Source, stores: Iterable[Store], ranks: Ranks) -> None:
    """Reads a model and every local store once, dealt out to the ranks; what one finds has all of them fail.

    Raises UserError for the first tensor that isn't finite, or naming a store's files whose sums aren't the manifest's.
    A store at an address is read in place, so this would fetch all of it: `shearling data --verify` does.
    """

    def check() -> None:
        source.check_finite(**dealt(ranks))
        for store in {store.digest: store for store in stores}.values():
            if not is_remote(str(store.folder)):
                store.verify(**dealt(ranks))

    ranks.together(check)


def warn_of_end(session: Session, state: State) -> None:
    """Says so if the data ended before the last step."""
    if state.step < session.settings.steps:
        used_up = ", ".join(session.feed.used_up(state.sampler, state.mixture.weights))
        log.warning("%s ended at step %d of %d, and the run with it", used_up, state.step, session.settings.steps)


def choose_device(asked: str | None) -> str:
    """The device asked for, or the best one here. Raises UserError for one that isn't here."""
    best = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu"] if best is None else [best.type, "cpu"]
    if asked is None:
        return known[0]
    kind, _, number = asked.partition(":")
    numbered = best and kind == best.type and number.isdecimal() and int(number) < torch.accelerator.device_count()
    if kind in known and (asked == kind or numbered):
        return asked
    raise UserError("device", found=repr(asked), expected=" or ".join(known), change="choose another --device")


def default_batch_tokens(parameters: int, tokens: int) -> int:
    """About 4K tokens at 260 thousand parameters, 128K at 7 billion (Sheared-LLaMA's), and 200 steps at the least."""
    by_model = 2 ** round(log2(4096 * (parameters / 260_000) ** 0.34))
    return max(1, min(by_model, tokens // 200))


def _starting(asked: Training, store: Store) -> Mixture:
    weights = asked.mixture.weights
    if weights is not None:
        check_weights(weights, store.domains)
    return Mixture.starting({d: w for d in store.domains for w in [(weights or by_size(store))[d]]})


def batch_windows(asked: int | None, *, seq_len: int, by_default: int, ranks: Ranks) -> int:
    """Windows in a batch of `asked` tokens, or of about as many as there are by default: then a power of two, the same
    for any number of ranks. Raises UserError where the ranks don't divide it.
    """
    found = 2 ** int(log2(max(1.0, by_default / seq_len))) if asked is None else max(1, round(asked / seq_len))
    if found % ranks.count:
        below, above = found // ranks.count * ranks.count, -(-found // ranks.count) * ranks.count
        said = f"{found * seq_len} by default" if asked is None else str(asked)
        raise UserError(
            "batch_tokens",
            found=f"{said}, {found} windows on {ranks.count} ranks",
            expected=f"a multiple of {ranks.count} windows",
            change=" or ".join(f"{n * seq_len} tokens ({n} windows)" for n in (below, above) if n),
        )
    return found


def _batch_notes(asked: int | None, settings: Settings) -> tuple[str, ...]:
    """What a batch comes to, if that isn't what was asked for."""
    found = settings.batch_tokens
    if asked in (None, found):
        return ()
    return (f"a batch has {settings.batch_sequences} windows, {found} tokens; asked for were {asked}",)


def _windows_apart(mixture: Mixture, sequences: int) -> int:
    """Steps in which the smallest domain has WINDOWS_BETWEEN windows: a change starts the counts anew."""
    return ceil(WINDOWS_BETWEEN / (min(mixture.weights.values()) * sequences))


def _unaimed(asked: Training, every: int) -> Steered | None:
    """The steering that was asked for, its references still to be found; one domain leaves nothing to steer."""
    options = asked.mixture
    if options.schedule in ("constant", "proportional"):
        return None
    return Steered(options.chosen_rule(), {}, options.signal, every)


def _repeats(asked: Mapping[str, int] | int | None, store: Store) -> dict[str, int]:
    if asked is None or isinstance(asked, int):
        return {} if asked is None else dict.fromkeys(store.domains, asked)
    raise_all(
        [
            UserError("repeats", found=repr(d), expected="a domain of the data", change=nearest(d, store.domains))
            for d in asked
            if d not in store.domains
        ]
    )
    return dict(asked)


def _schedule(asked: Training) -> Callable[[int, int], float]:
    if asked.schedule == "cosine":
        return partial(cosine, warmup=asked.warmup)
    return partial(trapezoid, warmup=asked.warmup, decay=asked.decay)


def _autocast(choice: str, device: str) -> torch.dtype | None:
    # Measured on CPUs without AMX, bf16 matrix products run slower than fp32 ones, so there it has to be asked for.
    on = choice == "bfloat16" or (choice == "auto" and device.startswith("cuda"))
    return torch.bfloat16 if on else None
