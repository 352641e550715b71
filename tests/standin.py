"""An accelerator where there is none: torch's device "standin" (standin.cpp), built by the compiler that is here."""

import multiprocessing
import os
import shutil
import subprocess
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils import _pytree, cpp_extension
from two_ranks import on_ranks

SOURCE = Path(__file__).with_suffix(".cpp")
LIBRARIES = ("c10", "torch_cpu", "torch")
EXCHANGES = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_", "broadcast_")  # of c10d


def built(folder: Path) -> Path:
    """The library. Skips a test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("the stand-in for an accelerator needs a C++ compiler")
    library = folder / "standin.so"
    if not library.exists():
        new = folder / f"standin-{os.getpid()}.so"
        places = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        places += [f"-L{path}" for path in cpp_extension.library_paths()] + [f"-l{name}" for name in LIBRARIES]
        command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O1", str(SOURCE), "-o", str(new), *places]
        subprocess.run(command, check=True)
        new.replace(library)
    return library


class Done:
    """A stream that is never behind, or an event that has happened."""

    def __init__(self, **_: Any):
        pass

    def record_event(self, event: Any = None) -> "Done":
        return self

    record = record_event

    def wait_event(self, event: Any) -> None:
        pass

    wait_stream = wait_event

    def synchronize(self) -> None:
        pass


def register(library: Path) -> None:
    """Makes it this process's accelerator, for good."""
    torch.ops.load_library(library)
    module: Any = types.ModuleType("torch.standin")
    module.Stream = module.Event = Done
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = torch._C._accelerator_getDeviceIndex
    module.current_stream = lambda device=None: Done()
    module.stream = module.device = lambda _: nullcontext()
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.empty_cache = lambda: None
    torch.utils.rename_privateuse1_backend("standin")
    torch._register_device_module("standin", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else tied weights come apart on the way there
    dist.Backend.default_device_backend_map["standin"] = "gloo"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once", UserWarning)  # of what is put in another's place
        for name in EXCHANGES:
            by_gloo = partial(_by_gloo, getattr(torch.ops.c10d, name).default)
            torch.library.impl(f"c10d::{name}", "PrivateUse1", by_gloo)


def _by_gloo(exchange: Any, given: Any, *others: Any) -> Any:
    """What ranks exchange, on copies in the computer's memory: `given` is what is written."""
    on_host = _pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, (given, *others))
    *_, work = exchange(*on_host)
    torch._C._distributed_c10d.Work.unbox(work).wait()
    _pytree.tree_map(torch.Tensor.copy_, given, on_host[0])
    return given, work


def on_standin(folder: Path, work: Callable[..., Any], *args: Any, count: int = 1, code: int = 0) -> list[Any]:
    """What `work(*args)`, all of it importable, gives on each rank, in processes whose accelerator is the stand-in.

    They are forked from one that has done nothing but imports: autograd's threads don't follow into a fork.
    """
    multiprocessing.set_forkserver_preload(["standin_work"])
    return on_ranks(_registered, built(folder), work, *args, count=count, code=code, method="forkserver")


def _registered(library: Path, work: Callable[..., Any], *args: Any) -> Any:
    torch.set_num_threads(1)
    register(library)
    return work(*args)
