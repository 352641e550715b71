"""What `inspect --draft` makes of model types that have no table: draft.json, from which docs/families.md tells.

    python benchmarks/draft.py [TYPE ...] [--json benchmarks/draft.json] [--checks table,axes,training,reload]

Each type's config is transformers' own default, with what that leaves out filled in as published models have it. Types
named on the command line are tried again and the others' outcomes kept.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from shearling.arch import families
from shearling.draft.draft import Draft, draft

TYPES = (
    "helium arcee cohere cohere2 stablelm gptj persimmon phi nemotron glm glm4 exaone4 seed_oss hunyuan_v1_dense opt "
    "gpt_bigcode bloom falcon codegen mpt olmo deepseek_v3 jamba mamba bitnet xglm apertus ernie4_5 cwm jais2 lfm2"
).split()
FILLED: dict[str, dict[str, Any]] = {"deepseek_v3": {"n_group": 1, "topk_group": 1}}
AXES = ("hidden", "layer", "kv_head", "group", "intermediate", "expert", "moe_intermediate")


def config_of(model_type: str) -> dict[str, Any]:
    made = CONFIG_MAPPING[model_type](**FILLED.get(model_type, {})).to_dict()
    return {**made, "model_type": model_type}


def described(found: Draft) -> dict[str, Any]:
    """A row of the table in docs/families.md."""
    if found.family is None:
        return {"outcome": "refused", "axes": [], "why": found.refused, "seconds": found.seconds}
    whole = dict(found.family.uncut)
    outcome = "proved without these axes" if whole else "proved"
    why = "; ".join(f"{axis}: {reason}" for axis, reason in whole.items())
    return {
        "outcome": outcome,
        "axes": list(found.axes),
        "why": why,
        "seconds": found.seconds,
        "error": max(found.errors.values(), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--json", default=str(Path(__file__).with_name("draft.json")))
    parser.add_argument("--checks", default="table,axes,training,reload")
    asked = parser.parse_args()
    path = Path(asked.json)
    outcomes = json.loads(path.read_text()) if path.exists() else {}
    listed = {model_type for family in families() for model_type in family.model_types}
    for model_type in asked.types or TYPES:
        if model_type in listed:
            print(f"{model_type}: has a table")
            outcomes.pop(model_type, None)
            continue
        found = described(draft(config_of(model_type), checks=asked.checks.split(",")))
        outcomes[model_type] = {**found, "checks": asked.checks}
        print(f"{model_type}: {found['outcome']}, {found['seconds']} s; {', '.join(found['axes'])}; {found['why']}")
        path.write_text(json.dumps(dict(sorted(outcomes.items())), indent=1) + "\n")
    proved = sum(found["outcome"] != "refused" for found in outcomes.values())
    print(f"{proved} of {len(outcomes)} proved")


if __name__ == "__main__":
    main()
