"""`inspect --draft`, as the terminal shows it."""

from contextlib import suppress
from pathlib import Path

from shearling.cli.show import print_json
from shearling.errors import UserError
from shearling.stage import check_place

ANOTHER = "choose another name"


def show_draft(model: str, *, out: str | None, as_json: bool) -> None:
    """Drafts a family and writes it to `out`, or prints it where none is given.

    Raises UserError for a refusal and, once it is printed, for a draft that can't be written.
    """
    path = None if out is None else Path(out).expanduser()
    if path is not None:
        if path.exists():
            raise UserError("--out", found=f"{out}, which exists", expected="a new file", change=ANOTHER)
        check_place(path, what=f"--out {out}", change=ANOTHER)

    from shearling.draft.draft import draft_model

    found = draft_model(model)
    if found.family is None:
        raise UserError(
            f"draft of {model}",
            found=found.refused,
            expected="a model whose every part can be explained and proved",
            change="write its table by hand: docs/add-a-family.md",
        )
    if path is not None:
        _write(path, found.text())
    if as_json:
        print_json({"model": model, "out": out, **found.to_json()})
        return
    print(f"{found.model_type}: proved along {', '.join(found.axes)}")
    for axis, reason in found.family.uncut.items():
        print(f"  left whole: {axis}: {reason}")
    print(f"written to {out}: use it with --arch {out}" if out is not None else f"\n{found.text()}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        print(text)  # minutes of proving aren't to be lost
        found, change = f"it can't be written ({error.strerror})", "keep the text that was printed"
        raise UserError(f"--out {path}", found=found, expected="a file that can be written", change=change) from error
