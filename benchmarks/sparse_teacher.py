"""A teacher in a few numbers a token, likeliest ids against draws, at equal bytes: how far the gradient is off.

    python benchmarks/sparse_teacher.py MODEL TEXT     writes benchmarks/sparse_teacher.json

MODEL is a source folder, TEXT a domain's documents. The student is the source's one-shot cut to half its sizes, as
cut and after some steps of healing. Of the KL's gradient, relative to its own norm, over TOKENS tokens:

bias        of the logits' gradient, token by token: its mean over DRAWS caches, less the whole one's
one_cache   the same of a single cache: what a token sees
head        of the sum over all tokens, as the head's weight gets it from a single cache: what AdamW sees
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shearling.axes.index import select
from shearling.axes.target import resolve_target
from shearling.cut.extract import Cut
from shearling.cut.importance import measure
from shearling.data.feed import Feed
from shearling.data.prepare import prepare
from shearling.data.store import Store
from shearling.loss.cross_entropy import hidden_states
from shearling.loss.distillation import Sparse
from shearling.record import versions
from shearling.teacher.sparse import Kind, Sampled, TopK
from shearling.train.objective import NextToken
from shearling.train.optim import adamw, default_lr
from shearling.verbs.source import Source
from shearling.weights.model import load_model

TOKENS, DRAWS, SEQ_LEN, SEQUENCES, STEPS = 4096, 64, 256, 16, 150
HALVED = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def one_shot(source: Source, store: Store, folder: Path) -> Any:
    """The source cut to half its sizes."""
    target, _ = resolve_target(source.family, source.shape, {key: source.shape[key] // 2 for key in HALVED})
    model = load_model(source.folder)
    calibration = Feed(store, SEQ_LEN, SEQUENCES, 0).calibration(32, dict.fromkeys(store.domains, 1.0))
    found = measure(model, source.family, config=source.config, batches=calibration)
    scores = {axis: score.tolist() for axis, score in found.scores.items()}
    kept = select(scores, source=source.shape, target=target)
    cut = Cut(source.family, source.config, target, kept, norm_scales=found.norm_scales(kept))
    folder.mkdir()
    source.save(
        folder, shape=target, layers=kept.layers, dtype=None, tensor=lambda row, i: cut.tensor(row, i, source.read)
    )
    return load_model(folder)


def heal(model: Any, store: Store, *, lr: float) -> None:
    """Some steps on the next token."""
    feed, optimizer = Feed(store, SEQ_LEN, SEQUENCES, 0), adamw(model.parameters(), lr=lr)
    weights = dict.fromkeys(store.domains, 1.0)
    state, objective = feed.start(), NextToken(1)
    for _ in range(STEPS):
        positions, state = feed.following(state, weights)
        batch = feed.read(positions)
        (objective(model, batch).total / batch.num_targets()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def read(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the head reads, [N, D], and its logits [N, V], in float64."""
    hidden = hidden_states(model, ids).flatten(0, 1).double()
    return hidden, hidden @ model.get_output_embeddings().weight.double().T


def compare(kind: Kind, change: Callable[[Sparse], Sparse], source: Tensor, hidden: Tensor, student: Tensor) -> dict:
    """The figures of one kind; `change` makes another of what it says."""
    log_q = student.log_softmax(-1)
    whole = log_q.exp() - source.softmax(-1)
    mean, spread, heads = torch.zeros_like(whole), 0.0, []
    draws = DRAWS if isinstance(kind, Sampled) else 1
    for seed in range(draws):
        offsets = torch.rand(len(source), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        said = change(kind.read(kind.write(source.clone(), offsets)))
        _, grad = said.against(slice(None), log_q.clone(), share=1.0)
        mean += grad / draws
        off = grad - whole
        spread += float(off.square().sum()) / draws
        heads.append(float((off.T @ hidden).norm() / (whole.T @ hidden).norm()))
    bias = float((mean - whole).square().sum())
    if draws > 1:  # the draws' own share of it, which more draws would take away
        bias = max(0.0, bias - (spread - bias) / (draws - 1))
    norm = float(whole.square().sum())
    return {"bias": (bias / norm) ** 0.5, "one_cache": (spread / norm) ** 0.5, "head": sum(heads) / draws}


def as_it_is(said: Sparse) -> Sparse:
    return said


def renormalised(said: Sparse) -> Sparse:
    """The likeliest ids as if there were no others."""
    p = said.probabilities / said.probabilities.sum(-1, keepdim=True)
    return replace(said, probabilities=p, rest=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    asked = parser.parse_args()
    source, found = Source.open(asked.model), {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "store"
        folder.mkdir()
        store = prepare([asked.text], tokenizer=source.folder, out=folder)
        student, teacher = one_shot(source, store, Path(made) / "cut"), load_model(source.folder)
        windows = Feed(store, SEQ_LEN, SEQUENCES, 0).held_out(limit=TOKENS // SEQ_LEN, sequences=TOKENS // SEQ_LEN)
        ids = next(windows[store.domains[0]])[:, :-1]
        _, truth = read(teacher, ids)
        for stage in ("cut", "healed"):
            if stage == "healed":
                heal(student, store, lr=default_lr(source.parameters))
            hidden, logits = read(student, ids)
            kl = float((truth.softmax(-1) * (truth.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean())
            found[stage] = {"kl_nats": kl}
            for k in (4, 8, 16, 32):
                nbytes = TopK(k).record(truth.shape[-1]).itemsize
                draws = (nbytes - 4) // 2
                assert abs(Sampled(draws).record(truth.shape[-1]).itemsize - nbytes) <= 1
                found[stage][f"{nbytes} bytes a token"] = {
                    f"top {k} and a rest": compare(TopK(k), as_it_is, truth, hidden, logits),
                    f"top {k} renormalised": compare(TopK(k), renormalised, truth, hidden, logits),
                    f"{draws} draws": compare(Sampled(draws), as_it_is, truth, hidden, logits),
                }
            print(stage, json.dumps(found[stage], indent=1), flush=True)
    options = {"parameters": source.parameters, "vocab": truth.shape[-1], "tokens": TOKENS, "draws": DRAWS}
    options |= {"healing_steps": STEPS, "healing_batch": [SEQUENCES, SEQ_LEN]}
    result = {"options": options, "found": found, "versions": versions()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
