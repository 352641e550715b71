"""`heal`: continued pre-training of a model, from the loss that the cut left it with."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shearling.data.store import Store
from shearling.recipe import Heal
from shearling.record import Record, versions
from shearling.stage import Stage
from shearling.train.loop import train
from shearling.train.optim import adamw
from shearling.verbs.session import Session, Watch, unwatched
from shearling.verbs.source import ORIGIN, Source, figures, write_origin
from shearling.weights.model import load_model, reader

TOKENS_PER_PARAMETER = 20  # about what a model of this size can use (Hoffmann et al. 2022, arXiv 2203.15556)


@dataclass(frozen=True)
class Healed:
    """What healing came to: held-out losses in nats per token, by domain."""

    out: Path
    parameters: int
    losses_before: Mapping[str, float]
    losses: Mapping[str, float]
    tokens: int
    flops: float
    done_before: bool = False


def heal(model: str, *, data: str, out: str, asked: Heal, watch: Watch = unwatched) -> Healed:
    """Trains `model` on `data` and leaves the result as a model folder at `out`."""
    source = Source.open(model, dtype=asked.dtype)
    store = Store.open(data)
    session = Session.plan(asked, source, store, default_tokens=TOKENS_PER_PARAMETER * source.parameters)
    identity = {"verb": "heal", "model": source.fingerprint, "data": store.digest}
    stage = Stage(Path(out), {**identity, **asked.model_dump(mode="json")})
    if stage.done:
        healed = json.loads((stage.out / ORIGIN).read_text(encoding="utf-8"))["healed"]
        return Healed(out=stage.out, done_before=True, **healed)
    source.check_finite()
    with stage as folder:
        return _heal(source, session, asked, folder, stage.out, watch)


def _heal(source: Source, session: Session, asked: Heal, folder: Path, out: Path, watch: Watch) -> Healed:
    record = Record(folder / "record.jsonl")
    record.write("heal", versions=versions(), **session.describe())
    model = load_model(source.folder, device=session.device)
    before = session.losses(model)
    record.write("held_out", step=0, of="cut", losses=before)
    session.prepare(model, asked)
    state = train(
        model,
        settings=session.settings,
        state=session.state(),
        draw=session.feed.draw,
        optimizers=[adamw(model.parameters(), lr=session.lr)],
        evaluate=session.evaluate(model),
        log=record.write,
        on_step=watch("healing", session.settings.steps),
    )
    after = session.losses(model)
    record.write("held_out", step=state.step, of="healed", losses=after)
    layers = tuple(range(source.shape["num_hidden_layers"]))
    source.save(folder, shape=source.shape, layers=layers, dtype=asked.dtype, tensor=reader(model))
    result = Healed(
        out=out,
        parameters=source.parameters,
        losses_before=before,
        losses=after,
        tokens=state.tokens,
        flops=session.flops(source, source.shape),
    )
    write_origin(folder, {**source.origin(), "healed": figures(result)})
    return result
