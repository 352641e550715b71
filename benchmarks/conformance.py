"""Proves the tables: conformance of every model type, seconds each, and masked steps compiled.

    python benchmarks/conformance.py                       # what conformance.json lacks or has of another table
    python benchmarks/conformance.py llama qwen3           # these
    python benchmarks/conformance.py --compile inductor    # a masked step of every type, compiled, against eager

Figures go to benchmarks/conformance.json, from which `make docs` makes docs/families.md; those of --compile to
benchmarks/compiled.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from shearling.arch import families
from shearling.arch.file import digest
from shearling.axes.count import parameters
from shearling.axes.spec import Family
from shearling.conformance.model import random_model
from shearling.conformance.page import stale
from shearling.conformance.proof import CHECKS, Proof, prove
from shearling.conformance.reload import reloaded, save_cut
from shearling.conformance.small import default, small, telling
from shearling.conformance.table import table_is_model
from shearling.conformance.targets import alone, together
from shearling.conformance.training import compiled

HERE = Path(__file__).resolve().parent
BATCH = 6  # model types whose cuts one fresh process loads again
RESULT, COMPILED = HERE / "conformance.json", HERE / "compiled.json"
CONFIGS = HERE.parents[1] / "shared" / "data" / "configs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--compile", choices=("aot_eager", "inductor"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = {model_type: family for family in families() for model_type in family.model_types}
    if asked.compile:
        done = json.loads(COMPILED.read_text()) if COMPILED.is_file() else {}
        for model_type in asked.types or known:
            found = compile_one(known[model_type], model_type, asked.compile)
            done.setdefault(asked.compile, {})[model_type] = found
            COMPILED.write_text(json.dumps(done, indent=1) + "\n")
        return
    results = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    wanted = [(known[t], t) for t in asked.types] or stale(families(), results)
    for start in range(0, len(wanted), BATCH):  # written in between: all of them take minutes
        with TemporaryDirectory() as folder:
            proofs = [proved(family, model_type, Path(folder)) for family, model_type in wanted[start : start + BATCH]]
            proofs = loaded_again(proofs, Path(folder))
        results |= {proof.model_type: written(proof) for proof in proofs}
        RESULT.write_text(json.dumps({t: results[t] for t in sorted(results) if t in known}, indent=1) + "\n")


def proved(family: Family, model_type: str, folder: Path) -> Proof:
    """The proof but for what a fresh process says; what that is to load is left in `folder`/TYPE/NAME."""
    proof = prove(family, model_type=model_type, checks=[check for check in CHECKS if check != "reload"])
    for name, config in telling(family, model_type).items() if proof.axes else ():
        made = random_model(family, config, name=name)
        for target in together(made, axes=proof.axes).values():
            save_cut(made, target, folder / model_type / name)
    print(
        f"{model_type}: {len(proof.findings)} findings, {len(proof.broken)} broken, {proof.seconds:.0f} s", flush=True
    )
    for finding in proof.broken:
        print("   ", finding, flush=True)
    return proof


def loaded_again(proofs: list[Proof], folder: Path) -> list[Proof]:
    """The proofs with what one fresh process says of all their cuts."""
    saved = sorted(path for path in folder.glob("*/*"))
    said = list(reloaded(saved, names=[str(path.relative_to(folder)) for path in saved])) if saved else []
    for finding in said:
        if not finding.held:
            print("BROKEN", finding, flush=True)
    of_each = {p.model_type: [f for f in said if f.config.split("/")[0] == p.model_type] for p in proofs}
    return [replace(proof, findings=(*proof.findings, *of_each[proof.model_type])) for proof in proofs]


def written(proof: Proof) -> dict[str, Any]:
    """What conformance.json keeps of a proof."""
    family, model_type = proof.family, proof.model_type
    return {
        "family": family.name,
        "digest": digest(family),
        "axes": list(proof.axes),
        "configs": {name: parameters(family, config) for name, config in proved_configs(family, model_type).items()},
        "small": [parameters(family, config) for config in small(family, model_type).values()],
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


def compile_one(family: Family, model_type: str, backend: str) -> dict[str, Any]:
    """Errors of loss and gradients, compiled, by check; what was wrong where that isn't a number."""
    name, config = next(iter(telling(family, model_type).items()))
    made = random_model(family, config, name=f"{model_type}, {name}")
    axes = dict.fromkeys(axis for unit in alone(made) for axis in unit)
    target = next(iter(together(made, axes=axes).values()))
    found = {}
    for finding in compiled(made, target, backend=backend):
        print("held  " if finding.held else "BROKEN", finding, flush=True)
        found[finding.check] = finding.error if not finding.why else finding.why
    return found


if __name__ == "__main__":
    main()
