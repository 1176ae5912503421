"""Run a function in several real processes over gloo, under any back-end, and return what each of them returned.

    losses = harness.run(train_and_evaluate, folder, backend="fsdp2")

The processes are started by the fork server of `multiprocessing`, which has imported what a training needs. Measured in
units of three steps under DDP: under FSDP2 1.1, under DeepSpeed 3, in a function that only joins the group 0.1, and
the first call of all 7 more. Each call has its own processes, because accelerate keeps one state for a process, and
they end with it, whatever happens: nothing waits for ever, nothing is left behind. The limits are those of `limits`.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from limits import HANG, SPINNING, Limit

ZERO = ("zero1", "zero2", "zero3", "zero3_ungathered")
FSDP2 = ("fsdp2", "fsdp2_sharded")
BACKENDS = ("one", "ddp", *FSDP2, *ZERO)
"""One process; full and sharded state dicts under FSDP2; ZeRO-3 with and without a gathered model in its saves."""
SAME = {"zero3": ("zero3", "zero3_ungathered"), "zero3_ungathered": ("zero3", "zero3_ungathered")}
"""Those that `is_really` cannot tell apart."""

PRELOADED = (
    "torch.distributed.fsdp torch.distributed.checkpoint torch.distributed.tensor transformers.trainer "
    "transformers.models.llama.modeling_llama schedulefree pytest hf_radam.trainer"
).split()
GRACE = 3.0
"""Seconds that the other processes have to end by themselves, once one has failed."""
TAIL = 3000


@dataclass
class Outcome:
    """How one process ended."""

    rank: int
    value: Any = None
    """What the function returned."""
    error: str | None = None
    """Type and message of the exception that it raised, or why there is neither."""
    output: str = ""
    """Traceback or stacks, and the end of what the process wrote to standard output and error."""
    exit_code: int | None = None
    """Negative is the number of a signal; None if the harness killed the process."""
    raised_at: float = 0.0
    """In seconds of `time.monotonic`."""


def context() -> Any:
    """The fork server, with everything imported that a training needs."""
    # The server is started with the environment but not with sys.path.
    here = Path(__file__).resolve()
    paths = [str(here.parents[2]), str(here.parents[1]), *filter(None, sys.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    started = multiprocessing.get_context("forkserver")
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed looks for another one when it is imported
    # accelerate imports DeepSpeed where it is installed, also for a trainer that has nothing to do with it.
    # What it imports when it makes an engine compiles functions, and so imports half of torch: 1.5 s in each process.
    installed = (
        ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"] if importlib.util.find_spec("deepspeed") else []
    )
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else that starts processes for compiling
    started.set_forkserver_preload([*PRELOADED, *installed, "tiny", __name__])
    return started


def arguments(backend: str) -> dict[str, Any]:
    """Keywords of `TrainingArguments` that ask for a back-end."""
    if backend in FSDP2:
        kind = "SHARDED_STATE_DICT" if backend == "fsdp2_sharded" else "FULL_STATE_DICT"
        wrap = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": kind}
        return {"use_cpu": True, "fsdp": True, "fsdp_config": wrap}
    if backend in ZERO:
        zero: dict[str, Any] = {"stage": int(backend[4])}
        if zero["stage"] == 3:
            # Else a tiny model's parameters would stay whole on every rank; so, only its norms, and only in one layout.
            zero["stage3_param_persistence_threshold"] = 40 if backend == "zero3" else 0
            zero["sub_group_size"] = 3000  # several sub-groups, which are stepped one after another
            zero["stage3_gather_16bit_weights_on_model_save"] = backend == "zero3"
        sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        config = dict.fromkeys([*sizes, "gradient_clipping"], "auto") | {"zero_optimization": zero}
        return {"use_cpu": False, "deepspeed": config}
    return {"use_cpu": True, "ddp_find_unused_parameters": False}


def is_really(trainer: Any, backend: str) -> bool:
    """Whether a trainer, in training or after it, has the back-end: upstream may fall back to another in silence."""
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    world = dist.get_world_size() if dist.is_initialized() else 1
    sharded = [isinstance(p, DTensor) and p.device_mesh.size() == world for p in trainer.model.parameters()]
    if backend in ZERO:
        engine = trainer.deepspeed
        return engine is not None and engine.zero_optimization_stage() == int(backend[4])
    if backend in FSDP2:
        if not (trainer.accelerator.is_fsdp2 and all(sharded)):
            return False
        kind = "SHARDED" if backend == "fsdp2_sharded" else "FULL"
        return kind in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    alone = not (any(sharded) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    return alone and isinstance(trainer.model_wrapped, DistributedDataParallel) == (backend == "ddp")


def gathered(trainer: Any) -> dict[str, torch.Tensor]:
    """Every parameter as the forward pass has it, complete, on every rank; collective."""
    from hf_radam.sharding import find_sharding

    sharding = find_sharding(trainer.accelerator.unwrap_model(trainer.model), wrapped=trainer.model_wrapped)
    return {name: sharding.gather_model(name).clone() for name in sharding.parameters}


def missing(backend: str) -> str | None:
    """Why a back-end cannot be tried here, or None."""
    if backend in ZERO and importlib.util.find_spec("deepspeed") is None:
        return "DeepSpeed is not installed"
    return None


def run(
    function: Callable[..., Any],
    *args: Any,
    backend: str = "ddp",
    world: int = 2,
    timeout: float = HANG,
    check: bool = True,
    grace: float | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(*args, **kwargs)` in every process of a group.

    Args:
        function: one of a module that can be imported; its arguments and what it returns must be picklable. It makes
            the process group itself, as a training does (or `join_group`), which is left when it returns.
        *args: its arguments.
        backend: one of `BACKENDS`; the processes can have the others as well, except between FSDP2 and DeepSpeed.
        world: how many processes; with ``"one"`` there is one.
        timeout: seconds without work after which processes that have not ended are killed; see `limits`.
        check: whether every process must come to a good end.
        grace: seconds that the other processes have to end by themselves once one has failed; `GRACE` unless told, and
            with ``check=False`` as long as the timeout.
        **kwargs: more of its arguments.

    Returns:
        What each process returned, by rank; with ``check=False`` the `Outcome` of each. Else a process that raised,
        died, or was killed at its limit is an `AssertionError` with the output of each.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    world = 1 if backend == "one" else world
    if grace is None:
        grace = GRACE if check else timeout
    outcomes = _run_processes(pickle.dumps((function, args, kwargs)), backend, world, timeout, grace)
    if not check:
        return outcomes
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    # The cause first: the others lost a connection, or were killed after it.
    failed.sort(key=lambda outcome: (outcome.exit_code is None, outcome.raised_at))
    assert not failed, "\n".join(
        f"rank {outcome.rank} of {world} ({backend}): {outcome.error}\n{outcome.output}" for outcome in failed
    )
    return [outcome.value for outcome in outcomes]


def _run_processes(call: bytes, backend: str, world: int, timeout: float, grace: float) -> list[Outcome]:
    """Start the processes, wait for them, and kill those that are left."""
    # The port is taken as long as the processes live, and the store is where they meet: as torchrun has it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        environments = [_environment(rank, world, 0 if backend == "one" else store.port) for rank in range(world)]
        processes = [
            context().Process(target=_child, args=(call, backend, folder, environment, timeout))
            for environment in environments
        ]
        try:
            for process in processes:
                process.start()
            hung = _wait_for(processes, timeout, grace=grace)
            _write_stacks(folder, hung)
        finally:
            started = [process for process in processes if process.pid is not None]
            codes = [process.exitcode for process in started]
            for process in started:
                process.kill()
                process.join()
        return [_outcome(folder, rank, code, rank in hung) for rank, code in enumerate(codes)]


def join_group() -> None:
    """Make the process group, for a function that has no trainer to do so."""
    dist.init_process_group("gloo")


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The environment of one process, as torchrun makes it where there is a port, and nothing off this machine."""
    of_the_group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    here = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return dict(os.environ) | here | ({key: str(value) for key, value in of_the_group.items()} if port else {})


def _child(call: bytes, backend: str, folder: Path, environment: dict[str, str], timeout: float) -> None:
    """What every process does; the fork server's environment is that of its start, so this one is put in its place."""
    gc.freeze()  # what the fork server has imported; see `tests/conftest.py`
    os.environ.clear()
    os.environ.update(environment)
    rank = int(environment.get("RANK", "0"))
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = (folder / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    faulthandler.dump_traceback_later(2 * SPINNING * timeout, exit=True, file=stacks)  # if nobody is left to kill it
    torch.set_num_threads(1)
    try:
        if backend in (*FSDP2, *ZERO):
            from processes.shim.sitecustomize import pretend

            pretend("fsdp" if backend in FSDP2 else "deepspeed")
        function, args, kwargs = pickle.loads(call)
        result = pickle.dumps(("value", function(*args, **kwargs)))
    except BaseException as error:
        said = f"{type(error).__name__}: {error}", traceback.format_exc()
        _leave(folder / f"{rank}.outcome", pickle.dumps(("error", (*said, time.monotonic()))))
        os._exit(1)
    _leave(folder / f"{rank}.outcome", result)
    gc.collect()  # DDP's wrapper must be gone before its group, or the process may abort at its end
    if dist.is_initialized():
        dist.barrier()  # who leaves first must not cut the others off
        dist.destroy_process_group()


def _leave(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    file.with_suffix(".part").write_bytes(content)
    file.with_suffix(".part").rename(file)


def _wait_for(processes: list[Any], timeout: float, *, grace: float) -> dict[int, Any]:
    """Wait until all have ended, or for `grace` seconds once one has failed; return those at their limit, by rank."""
    left = {process.sentinel: rank for rank, process in enumerate(processes)}
    limit, until = Limit([process.pid for process in processes], timeout), float("inf")
    while left and time.monotonic() < until:
        for ended in wait(list(left), timeout=0.2):
            process = processes[left.pop(ended)]  # type: ignore[arg-type]
            process.join()
            if process.exitcode != 0:
                until = min(until, time.monotonic() + grace)
        if left and limit.passed():
            return {rank: processes[rank] for rank in left.values()}
    return {}


def _write_stacks(folder: Path, hung: dict[int, Any]) -> None:
    """Have every process that hangs write where it is."""
    files = [folder / f"{rank}.stacks" for rank in hung]
    for process in hung.values():
        os.kill(process.pid, signal.SIGUSR1)
    until = time.monotonic() + 10
    while time.monotonic() < until and not all(file.exists() and file.stat().st_size for file in files):
        time.sleep(0.05)
    time.sleep(0.1 if hung else 0)  # the rest of the lines


def _outcome(folder: Path, rank: int, exit_code: int | None, hung: bool) -> Outcome:
    file, stacks, log = (folder / f"{rank}.{kind}" for kind in ("outcome", "stacks", "log"))
    written = log.read_text(errors="replace")[-TAIL:] if log.exists() else ""
    seen = stacks.read_text(errors="replace") if stacks.exists() else ""
    if file.exists():
        kind, what = pickle.loads(file.read_bytes())
        if kind == "error":
            return Outcome(rank, None, what[0], f"{what[1]}{written}", exit_code, what[2])
        wrong = None if exit_code == 0 else f"returned, and then ended with exit code {exit_code}"
        return Outcome(rank, what, wrong, f"{seen}{written}", exit_code)
    why = f"died with exit code {exit_code}"
    if exit_code is None:
        why = "had not returned when the time was up" if hung else "was killed after another had failed"
    return Outcome(rank, None, why, f"{seen}{written}", exit_code)
