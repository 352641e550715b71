"""Work on two ranks: processes of their own that talk by gloo, as torchrun would have started them."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 240


def on_ranks(work: Callable[..., Any], *args: Any, count: int = 2, code: int = 0, method: str = "fork") -> list[Any]:
    """What `work(*args)` gives on each rank, run in processes started by a `method` of multiprocessing: nothing where
    all are to end with a code.
    """
    context: Any = multiprocessing.get_context(method)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(count)]
        runs = [(work, args, rank, count, port, file) for rank, file in enumerate(files)]
        processes = [context.Process(target=_run, args=run) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
            if process.exitcode is None:
                process.kill()
        codes = [process.exitcode for process in processes]
        assert codes == [code] * count, f"exit codes {codes}"
        return [] if code else [pickle.loads(file.read_bytes()) for file in files]


def _run(work: Callable[..., Any], args: tuple[Any, ...], rank: int, count: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads of a fork don't find the pool that torch had
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out.write_bytes(pickle.dumps(work(*args)))
