"""`inspect --draft`, as the terminal shows it."""

from pathlib import Path

from shearling.cli.show import print_json
from shearling.errors import UserError


def show_draft(model: str, *, out: str | None, as_json: bool) -> None:
    """Drafts a family and writes it to `out`, or prints it where none is given. Raises UserError for a refusal."""
    if out is not None and Path(out).expanduser().exists():
        raise UserError("--out", found=f"{out}, which exists", expected="a new file", change="choose another name")

    from shearling.draft.draft import draft_model

    found = draft_model(model)
    if found.family is None:
        raise UserError(
            f"draft of {model}",
            found=found.refused,
            expected="a model whose every part can be explained and proved",
            change="write its table by hand: docs/add-a-family.md",
        )
    if out is not None:
        Path(out).expanduser().write_text(found.text(), encoding="utf-8")
    if as_json:
        print_json({"model": model, "out": out, **found.to_json()})
        return
    print(f"{found.model_type}: proved along {', '.join(found.axes)}")
    for axis, reason in found.family.uncut.items():
        print(f"  left whole: {axis}: {reason}")
    print(f"written to {out}: use it with --arch {out}" if out is not None else f"\n{found.text()}")
