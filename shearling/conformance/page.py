"""docs/families.md and README's list of models, from the tables and from what benchmarks/conformance.py found.

Nothing here loads torch: `make docs` takes a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shearling.arch.file import digest
from shearling.axes.axis import FOLLOWS, MASKABLE
from shearling.axes.spec import Family
from shearling.axes.target import uncut
from shearling.conformance.terms import terms

START, END = "<!-- made by `make docs`: start -->", "<!-- made by `make docs`: end -->"

Proofs = Mapping[str, Mapping[str, Any]]  # by model type, as benchmarks/conformance.json has them

HEAD = """# Families

Made by `make docs` from the tables in [shearling/arch/](../shearling/arch) and from what
[benchmarks/conformance.py](../benchmarks/conformance.py) found. How a table is read is in
[architecture.md](architecture.md); how to add one, in [add-a-family.md](add-a-family.md).

Proved means, on small random models of each type, in fp32 and to 1e-5 of the largest logit: the table is
transformers' model (names, sizes, ties, names on disk); the masked model, its cut and the cut loaded again are one
function, along each axis alone and all at once, tied and untied, every flag of the table both ways; a cut of nothing
gives back every bit; dead units go first; it prunes, heals, and generates with its cache what it generates without;
parameters, cache and FLOPs are as counted.
"""

DRAFTS = """## Types without a table

What `shearling inspect MODEL --draft` made of types of transformers' that no table here names. A proposal is proved
like any table; axes along which it wasn't are left whole.

| `model_type` | outcome | cut along | why |
| --- | --- | --- | --- |
"""


def stale(families: Sequence[Family], proofs: Proofs) -> list[tuple[Family, str]]:
    """The families' model types whose proof is missing or of another table."""
    return [
        (family, model_type)
        for family in families
        for model_type in family.model_types
        if proofs.get(model_type, {}).get("digest") != digest(family)
    ]


def families_page(families: Sequence[Family], proofs: Proofs, drafts: Proofs) -> str:
    """All of docs/families.md."""
    summary = ["| family | `model_type` | cut along | parameters proved |", "| --- | --- | --- | --- |"]
    summary += [f"| {f.name} | {_types(f)} | {_axes(f, proofs)} | {_range(f, proofs)} |" for f in families]
    sections = ["\n".join(_section(family, proofs)) for family in families]
    return "\n\n".join([HEAD.rstrip(), "\n".join(summary), *sections, *_drafts(drafts)]) + "\n"


def readme_with(text: str, described: Sequence[tuple[str, Sequence[Family]]], proofs: Proofs) -> str:
    """README's text with its list of models as it is now, a line for each module of tables.

    Raises ValueError where the marks of the list are missing.
    """
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    if not after:
        raise ValueError(f"README.md lacks {START} or {END}")
    rows = ["| models | `model_type` | cut along |", "| --- | --- | --- |"]
    for said, families in described:
        types = ", ".join(_types(family) for family in families)
        axes = list(dict.fromkeys(_axes(family, proofs) for family in families))
        rows.append(f"| {said} | {types} | {'; '.join(axes)} |")
    return before + START + "\n\n" + "\n".join(rows) + "\n\n" + END + after


def _section(family: Family, proofs: Proofs) -> Iterator[str]:
    yield f"## {family.name}"
    yield ""
    yield f"- types: {_types(family)}"
    yield f"- terms: {', '.join(terms(family))}"
    yield from _parts(family)
    for model_type in _proved_types(family):
        found = proofs.get(model_type)
        if not found:
            yield f"- `{model_type}` is not proved yet"
            continue
        named = ", ".join(f"{name} ({count:,})" for name, count in found["configs"].items())
        yield f"- `{model_type}`: {len(found['small'])} small random models; {named}"
        check, error = max(found["errors"].items(), key=lambda pair: pair[1])
        yield f"  - largest error {error:.1e} ({check}), {found['findings']} findings, {found['seconds']:.0f} s of CPU"
        yield from (f"  - not held: {line}" for line in found["broken"])
    yield from (f"- limit: {line}" for line in _limits(family))


def _limits(family: Family) -> Iterator[str]:
    for axis, reason in {**_without_rotary(family), **family.uncut}.items():
        yield f"not along {axis}: {reason}"
    yield from (f"`{rule}`, which transformers' config insists on" for rule in family.divides)
    yield from (f"`{rule}`, in the model's code: these are cut together" for rule in family.coupled)


def _without_rotary(family: Family) -> Mapping[str, str]:
    reasons = uncut(replace(family, uncut={}), {})
    return {axis: reason for axis, reason in reasons.items() if axis == "head_dim" and axis in family.axes}


def _types(family: Family) -> str:
    return ", ".join(f"`{model_type}`" for model_type in family.model_types)


def _axes(family: Family, proofs: Proofs) -> str:
    """The axes proved for all of a family's types."""
    proved = [set(proofs.get(model_type, {}).get("axes", ())) for model_type in _proved_types(family)]
    shown = (axis for axis in MASKABLE if axis not in FOLLOWS and all(axis in axes for axes in proved))
    return ", ".join(shown) or "not proved yet"


def _proved_types(family: Family) -> tuple[str, ...]:
    """The model types that its proofs are of: what lies inside a whole is proved by itself."""
    return family.model_types if family.inside is None else (family.inside.text_type,)


def _parts(family: Family) -> Iterator[str]:
    """Of a whole with other parts, what becomes of them; tests/conformance/test_towers.py holds it."""
    inside = family.inside
    if inside is not None:
        named = ", ".join(f"`{row.name}`" for row in family.connectors)
        yield f"- sheared is its text model, `{inside.text_type}`; with hidden, rows of {named} too"
        yield f"- carried as it is: {', '.join(f'`{start}*`' for start in inside.carried)}"
        if inside.dropped:
            left = ", ".join(f"`{start}*`" for start in inside.dropped)
            yield f"- left out, since transformers' class has no place for it: {left}"
        yield from (f"- refused with `{key}`: {why}" for key, why in inside.refused.items())


def _range(family: Family, proofs: Proofs) -> str:
    found = [proofs[model_type] for model_type in _proved_types(family) if model_type in proofs]
    counts = [n for proof in found for n in (*proof["small"], *proof["configs"].values())]
    return f"{min(counts):,} to {max(counts):,}" if counts else ""


def _drafts(drafts: Proofs) -> Iterator[str]:
    if drafts:
        rows = (
            f"| `{model_type}` | {found['outcome']} | {', '.join(found['axes'])} | {found['why']} |"
            for model_type, found in sorted(drafts.items())
        )
        yield DRAFTS + "\n".join(rows)
