"""Proves the tables: conformance of every model type, seconds each, and masked steps compiled.

    python benchmarks/conformance.py                       # what conformance.json lacks or has of another table
    python benchmarks/conformance.py llama qwen3           # these
    python benchmarks/conformance.py --compile inductor    # a masked step of every type, compiled, against eager

Figures go to benchmarks/conformance.json, from which `make docs` makes docs/families.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from shearling.arch import families
from shearling.axes.count import parameters
from shearling.axes.spec import Family
from shearling.conformance.model import random_model
from shearling.conformance.page import digest, stale
from shearling.conformance.proof import Proof, prove
from shearling.conformance.small import default, small, telling
from shearling.conformance.table import table_is_model
from shearling.conformance.targets import alone, together
from shearling.conformance.training import compiled

HERE = Path(__file__).resolve().parent
RESULT = HERE / "conformance.json"
CONFIGS = HERE.parents[1] / "shared" / "data" / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--compile", choices=("aot_eager", "inductor"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    known = {model_type: family for family in families() for model_type in family.model_types}
    wanted = [(known[t], t) for t in asked.types] if asked.types else [*known_pairs(known)] if asked.compile else []
    for family, model_type in wanted or stale(families(), results):
        if asked.compile:
            compile_one(family, model_type, asked.compile)
            continue
        proof = prove(family, model_type=model_type)
        results[model_type] = written(proof)
        state = f"{len(proof.broken)} broken" if proof.broken else "proved"
        print(f"{model_type}: {state}, {len(proof.findings)} findings, {proof.seconds:.0f} s", flush=True)
        for finding in proof.broken:
            print("   ", finding)
        kept = {t: results[t] for t in sorted(results) if t in known}
        RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def known_pairs(known: dict[str, Family]) -> list[tuple[Family, str]]:
    return [(family, model_type) for model_type, family in known.items()]


def written(proof: Proof) -> dict[str, Any]:
    """What conformance.json keeps of a proof."""
    family, model_type = proof.family, proof.model_type
    return {
        "family": family.name,
        "digest": digest(family),
        "axes": list(proof.axes),
        "configs": {name: parameters(family, config) for name, config in proved_configs(family, model_type).items()},
        "small": len(small(family, model_type)),
        "errors": {check: float(f"{error:.1e}") for check, error in proof.errors.items()},
        "findings": len(proof.findings),
        "broken": [str(finding) for finding in proof.broken],
        "seconds": round(proof.seconds, 1),
    }


def proved_configs(family: Family, model_type: str) -> dict[str, Any]:
    """The real configs of a type that are at hand, and transformers' default, where the table is the model."""
    found = {}
    for path in sorted(CONFIGS.glob("*/config.json")):
        config = json.loads(path.read_text())
        if config["model_type"] == model_type:
            found[path.parent.name] = config
    found["transformers' defaults"] = default(family, model_type)
    return {name: config for name, config in found.items() if table_is_model(family, config, name).held}


def compile_one(family: Family, model_type: str, backend: str) -> None:
    name, config = next(iter(telling(family, model_type).items()))
    made = random_model(family, config, name=f"{model_type}, {name}")
    axes = dict.fromkeys(axis for unit in alone(made) for axis in unit)
    target = next(iter(together(made, axes=axes).values()))
    for finding in compiled(made, target, backend=backend):
        print("held  " if finding.held else "BROKEN", finding, flush=True)


if __name__ == "__main__":
    main()
