"""A stage's output folder: worked on under another name, finished by one rename, held by one process at a time."""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from shearling.errors import UserError

IDENTITY_FILE = "stage.json"
SHOWN_DIFFERENCES = 3


def starts_over(partial: Path) -> bool:
    """Of a stage that goes on from nothing: no `.partial` of it is resumable."""
    return False


def untouched(out: Path) -> None:
    """Of a stage whose folder is as it is to be."""


class Stage:
    """Works in `OUT.partial/`, which becomes `OUT` by one rename when the `with` block ends without an exception.

    `identity` holds the plain JSON values that make this stage this one: the verb, its inputs' fingerprints, its
    settings. A `.partial` of the same identity, left by a process that died, is emptied and started over unless it is
    `resumable`: then it stays as it is, and whoever works in it clears what it can't use. Whatever else is in the way
    is a UserError, and nothing is touched. After any exception `OUT` is absent and `.partial` stays; but exceptions of
    the kind `discard` leave none that isn't resumable. `tidy` takes out of `OUT` what was for going on from: only then,
    as without it a kill just before the rename would cost everything.
    """

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, object],
        *,
        resumable: Callable[[Path], bool] = starts_over,
        tidy: Callable[[Path], None] = untouched,
        discard: type[BaseException] | None = None,
    ):
        self.out = Path(os.path.abspath(Path(out).expanduser()))
        if not self.out.name:
            change = "choose another --out"
            raise UserError(
                f"output {self.out}", found="the root folder", expected="a folder of its own", change=change
            )
        self.partial = self.out.with_name(f"{self.out.name}.partial")
        # Beside the folder and not in it: it can't travel into the finished folder, it guards the folder's creation
        # too, and unlike a lock on the folder itself it holds on NFS, where flock wants a file open for writing.
        self.lock = self.out.with_name(f"{self.out.name}.partial.lock")
        self.identity = json.loads(_canonical(identity))
        self.resumable, self.tidy, self.discard = resumable, tidy, discard
        self._held = contextlib.ExitStack()

    @property
    def done(self) -> bool:
        """Whether `out` is finished and of this identity. Only a whole folder ever gets that name."""
        if not self._is_ours(_stored_identity(self.out)):
            return False
        self.tidy(self.out)  # again: whoever finished it may have been killed right then
        return True

    def __enter__(self) -> Path:
        """The folder to write into, empty but for stage.json where it isn't resumable.

        Raises UserError if another process holds the stage, if the parent can't be written or something is in the way.
        """
        self._check_out()
        with contextlib.ExitStack() as undo:
            undo.enter_context(locked(self.lock))
            self._check_out()  # again: whoever held the lock may have finished in the meantime
            self._check_partial()
            if not (self.partial.is_dir() and self.resumable(self.partial)):
                self._start_over()
            self._held = undo.pop_all()
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if kind is None:
                _sync_tree(self.partial)
                os.rename(self.partial, self.out)
                sync(self.out.parent)
                self.tidy(self.out)
            elif self.discard and issubclass(kind, self.discard) and not self.resumable(self.partial):
                shutil.rmtree(self.partial)

    def _is_ours(self, stored: dict | None) -> bool:
        # As text: to Python 1, 1.0 and True are equal, and as settings they aren't.
        return stored is not None and _canonical(stored) == _canonical(self.identity)

    def _check_out(self) -> None:
        if not os.path.lexists(self.out) or (_is_folder(self.out) and not os.listdir(self.out)):
            return
        stored = _stored_identity(self.out)
        if self._is_ours(stored):
            raise UserError(
                f"output {self.out}",
                found="this very stage, finished already",
                expected="a stage still to do",
                change="nothing is left to do; to do it again, remove the folder or choose another --out",
            )
        _refuse_other(self.out, stored, self.identity)

    def _check_partial(self) -> None:
        if not os.path.lexists(self.partial):
            return
        # Only a kill in the very first moments leaves a folder without its identity, and then nothing else is in it.
        if _is_folder(self.partial) and set(os.listdir(self.partial)) <= {f"{IDENTITY_FILE}.new"}:
            return
        stored = _stored_identity(self.partial) if _is_folder(self.partial) else None
        if not self._is_ours(stored):
            _refuse_other(self.partial, stored, self.identity)

    def _start_over(self) -> None:
        try:
            self.partial.mkdir(exist_ok=True)
            # The identity stays until the end: killed in the middle of this, the folder is still known as ours.
            for entry in os.scandir(self.partial):
                if entry.name == IDENTITY_FILE:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)
            new = self.partial / f"{IDENTITY_FILE}.new"
            new.write_text(json.dumps({"version": 1, "identity": self.identity}, indent=1) + "\n", encoding="utf-8")
            sync(new)
            os.replace(new, self.partial / IDENTITY_FILE)
            # Whatever is whole in it later, a checkpoint say, is of no use where nobody knows whose it is.
            sync(self.partial)
            sync(self.partial.parent)
        except OSError as error:
            raise _unwritable(self.partial, error) from error


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Holds the file `lock` against every other process, and against this one. Raises UserError if it is held."""
    descriptor = _acquire(lock)
    try:
        yield
    finally:
        # Unlinked while still held: see _acquire for what the next one does about it.
        if _same_file(descriptor, lock):
            os.unlink(lock)
        os.close(descriptor)


def _acquire(lock: Path) -> int:
    # The kernel drops a flock with the process that held it, so a dead holder's file is simply taken over.
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unwritable(lock.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have unlinked the file between our open and our lock: then it guards nothing.
            if _same_file(descriptor, lock):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(
                f"lock {lock}",
                found=_holder(lock),
                expected="nobody else working on this stage",
                change="wait for it to end, stop it, or choose another --out",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise UserError(
                f"lock {lock}",
                found=f"it can't be taken ({error.strerror})",
                expected="a file system with file locks and room to write",
                change="choose an --out on another file system",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def check_place(path: Path, *, what: str, change: str) -> None:
    """Raises UserError where nothing can be made at `path`, of which the folders are yet to be made; makes none."""
    above = next(folder for folder in Path(os.path.abspath(path)).parents if os.path.lexists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        found = "which can't be written" if above.is_dir() else "which is no folder"
        raise UserError(what, found=f"{above}, {found}", expected="a folder that you may write to", change=change)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(lock: Path) -> str:
    try:
        holder = json.loads(lock.read_bytes())
        return f"process {holder['pid']} on host {holder['host']}, which holds it"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process, which has only just taken it"


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _canonical(identity: Mapping[str, object]) -> str:
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _stored_identity(folder: Path) -> dict | None:
    try:
        stored = json.loads((folder / IDENTITY_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    identity = stored.get("identity") if isinstance(stored, dict) else None
    return identity if isinstance(identity, dict) else None


def _refuse_other(path: Path, stored: dict | None, identity: dict) -> None:
    if stored is None:
        found, expected = "something that isn't a stage of Shearling's", "nothing there, or an empty folder"
    else:
        found, expected = (
            f"a stage with other settings ({_differences(stored, identity)})",
            "the same stage, or nothing",
        )
    change = "choose another --out, or move what is there away"
    raise UserError(f"output {path}", found=found, expected=expected, change=change)


def _differences(old: dict, new: dict) -> str:
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    shown = [f"{key}: {before.get(key, 'absent')} there, {after.get(key, 'absent')} now" for key in keys]
    more = len(keys) - SHOWN_DIFFERENCES
    return "; ".join(shown[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _flat(value: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(inner, ensure_ascii=False)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"output folder {path}",
        found=f"it can't be written ({error.strerror})",
        expected="a folder that you may write to",
        change="choose another --out or mend the permissions",
    )


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(parent))


def sync(path: Path) -> None:
    """Has what was written to a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
