"""Decide whether optimizers take their steps in one pass over memory, and call the kernels for that.

RAdam's fused step is torch's fused AdamW (`radam.py`). The schedule-free step and averages have C++ kernels on CPUs
(`schedule_free.cpp`, built when first needed and cached); on GPUs, `torch.compile` makes one for the former.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_radam.sharding import Sharding
from hf_radam.sharding.base import all_gather_object

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("schedule_free.cpp")
COMPILERS = ("g++", "c++", "clang++")  # GCC first: its OpenMP is the one that torch brings
# Without contraction, results do not depend on vectorization; square roots vectorize only without errno and traps.
OPTIONS = "-std=c++17 -O3 -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
DTYPES, DEVICES = {torch.float32: "float32", torch.float64: "float64"}, ("cpu", "cuda")
MIN_NUMEL = 2  # elements of a tensor below which torch.compile would make a kernel for just that size
TENSORS_PER_CALL = 4  # of the compiled kernel
AVERAGED = {torch.float32: "average_float32", torch.bfloat16: "average_bfloat16"}
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
Entry = tuple[Tensor, ...]  # a parameter, its gradient and its states
Kernel = Callable[[Sequence[list[Tensor]], list[float]], None]


class FusedMixin:
    """The option `fused` of both optimizers: True (or an error), False, or None for wherever possible."""

    fused: bool | None = None
    own_kernels = False  # whether fused steps need kernels of this package
    _fuses: bool | None = None
    _master_weights = False
    param_groups: list[dict[str, Any]]

    def _decide_fused(self) -> bool:
        """Return whether rectified steps are fused; the first call decides, and builds their kernels."""
        if self.fused is False:
            return False
        if self._fuses is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            reasons = unsupported_reasons(parameters, own_kernels=self.own_kernels)
            reason = next(filter(None, reasons), None)
            if reason is not None and self.fused:
                raise ValueError(f"fused=True is not possible: {reason}. Leave it out, or set it to False.")
            if reason is not None:
                logger.warning("%s takes unfused steps, which are slower: %s.", type(self).__name__, reason)
            self._fuses = None in reasons
        return self._fuses

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for `copy.deepcopy` and pickle."""
        state: Any = super().__getstate__()
        return {**state, "fused": self.fused, "_master_weights": self._master_weights}


def unsupported_reasons(parameters: Iterable[Tensor], *, own_kernels: bool) -> list[str | None]:
    """Return why steps of each kind of parameters (or shards) cannot be fused, or None; build the kernels they need."""
    kinds = dict.fromkeys((parameter.dtype, parameter.device) for parameter in parameters)
    return [_unsupported_reason(*kind, own_kernels=own_kernels) for kind in kinds]


def _unsupported_reason(dtype: torch.dtype, device: torch.device, *, own_kernels: bool) -> str | None:
    if dtype not in DTYPES:
        return f"a parameter is {str(dtype).removeprefix('torch.')}"
    if device.type not in DEVICES:
        return f"there is no kernel for {device.type}"
    if not own_kernels:
        return None
    if device.type == "cpu":
        return library if isinstance(library := load_library(), str) else None
    try:
        compiled_kernel(dtype, device)
    except Exception as error:  # of any of the many parts of a compiler
        return f"compiling failed ({type(error).__name__}: {str(error)[:200].strip()})"
    return None


def agree_on_fused(optimizer: Any, wanted: str, sharding: Sharding, *, log: bool) -> None:
    """Decide `fused` alike on all ranks, as replicas that round differently would drift apart; collective.

    `wanted` is `auto`, `true` (or a `ValueError`) or `false`. Optimizers of other packages are left alone.
    """
    if not isinstance(optimizer, FusedMixin):
        return
    if wanted == "auto" and optimizer.fused is not None:  # an optimizer that was passed
        wanted = str(optimizer.fused).lower()
    reasons: list[list[str | None]] = []
    if wanted != "false":
        shards = [sharding.optimizer_shard(name) for name in sharding.trained]
        reasons = all_gather_object(unsupported_reasons(shards, own_kernels=optimizer.own_kernels))
    reason = next(filter(None, (one for of_rank in reasons for one in of_rank)), None)
    if reason is not None and wanted == "true":
        raise ValueError(f"fused_optimizer=true is not possible: {reason}. Leave it out, or set it to false.")
    optimizer._fuses = wanted != "false" and all(None in of_rank for of_rank in reasons)
    if log and reason is not None:
        part = "partly" if optimizer._fuses else "not"
        logger.warning("The optimizer's steps are %s fused (fused_optimizer=auto): %s.", part, reason)
    elif log and optimizer._fuses:
        logger.info("The optimizer's steps are fused.")


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor on this rank, another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def are_plain(*tensors: Tensor) -> bool:
    """Return whether the memory of tensors holds their elements in order: kernels see addresses alone."""
    for t in tensors:
        if type(t) not in PLAIN or not t.is_contiguous() or t.is_neg() or t.is_inference():
            return False
        if not t.data_ptr() and t.numel():
            return False
    return True


def group_for_fusing(entries: Sequence[Entry]) -> tuple[list[list[Entry]], list[Entry]]:
    """Group entries by dtype and device, as one call of a kernel takes them; return the groups and the rest.

    The rest are what no kernel takes, and parameters that begin at one address, whose steps must follow one another.
    """
    addresses = [local(entry[0]).data_ptr() if entry[0].layout is torch.strided else 0 for entry in entries]
    counts = Counter(addresses)
    groups: dict[tuple[torch.dtype, torch.device], list[Entry]] = {}
    rest: list[Entry] = []
    for entry, address in zip(entries, addresses, strict=True):
        if counts[address] == 1 and _fits(entry[:4]):
            groups.setdefault((entry[0].dtype, entry[0].device), []).append(entry)
        else:
            rest.append(entry)
    return [*groups.values()], rest


def _fits(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    if isinstance(first, DTensor):
        layouts = {(t.device_mesh, t.placements) if isinstance(t, DTensor) else None for t in tensors}
        return len(layouts) == 1 and _fits([*map(local, tensors)])
    dtype, device, shape = first.dtype, first.device, first.shape
    if dtype not in DTYPES or device.type not in DEVICES or not are_plain(*tensors):
        return False
    for t in tensors[1:]:
        if t.dtype is not dtype or t.device != device or t.shape != shape:
            return False
    return device.type == "cpu" or first.numel() >= MIN_NUMEL


def schedule_free_step(columns: Sequence[list[Tensor]], scalars: list[float]) -> None:
    """Take a rectified schedule-free step in place.

    Args:
        columns: y, gradients (only read), z and second moments: local tensors of one group of `group_for_fusing`.
        scalars: beta2, 1 - beta2, 1 / (1 - beta2^t), eps, weight decay, weight c of z in the average, and what y and z
            move by, times the direction: lr (beta1 (1 - c) - 1) and lr.
    """
    ys, _, zs, second_moments = columns
    if ys[0].is_cpu:
        call(f"schedule_free_{DTYPES[ys[0].dtype]}", columns, scalars, written=[*ys, *zs, *second_moments])
    else:
        compiled_kernel(ys[0].dtype, ys[0].device)(columns, scalars)


def average_kernel(average: Tensor, weight: Tensor) -> str | None:
    """Return the kernel that moves a float32 average on a CPU towards a weight of its shape; None for torch's `lerp_`.

    Both round alike. Torch's takes 1.25 times as long (2.13, 34 million parameters on 2 cores).
    """
    name = AVERAGED.get(weight.dtype)
    if name is None or not (average.is_cpu and weight.is_cpu and average.dtype is torch.float32):
        return None
    return name if are_plain(average, weight) and not isinstance(load_library(), str) else None


def call(name: str, columns: Sequence[list[Tensor]], scalars: list[float], *, written: list[Tensor]) -> None:
    """Call a C++ kernel on plain tensors on a CPU; the columns are the kinds of tensors that it takes."""
    library, count = load_library(), len(columns[0])
    assert not isinstance(library, str), library
    function = library[name]
    function.restype = None
    function(
        ctypes.c_int64(count),
        (ctypes.c_int64 * count)(*[t.numel() for t in columns[0]]),
        ctypes.c_int(torch.get_num_threads()),
        *[(ctypes.c_void_p * count)(*[t.data_ptr() for t in column]) for column in columns],
        (ctypes.c_double * len(scalars))(*scalars),
    )
    # So that autograd notices graphs that are older than the weights.
    torch.autograd.graph.increment_version(written)


def _step_tensors(
    ys: list[Tensor], gradients: list[Tensor], zs: list[Tensor], second_moments: list[Tensor], scalars: list[Tensor]
) -> None:
    beta2, rest2, correction, eps, decay, c, y_rate, z_rate = scalars
    for y, gradient, z, second_moment in zip(ys, gradients, zs, second_moments, strict=True):
        v = second_moment * beta2 + rest2 * gradient * gradient
        direction = gradient / ((v * correction).sqrt() + eps) + y * decay
        y.copy_(y + (z - y) * c + direction * y_rate)
        z.copy_(z - direction * z_rate)
        second_moment.copy_(v)


@functools.cache
def compiled_kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    """Compile the schedule-free step for any number of tensors of any sizes; called as `schedule_free_step`."""
    kernel: Callable[..., None] = torch.compile(
        _step_tensors, dynamic=True, options={"cpp_cache_precompile_headers": False}
    )

    def zeros(numel: int) -> list[list[Tensor]]:
        return [[torch.zeros(numel + n, dtype=dtype, device=device) for n in range(TENSORS_PER_CALL)] for _ in range(4)]

    fill = zeros(MIN_NUMEL)

    def step(columns: Sequence[list[Tensor]], scalars: list[float]) -> None:
        given = [torch.tensor(scalar, dtype=dtype, device="cpu") for scalar in scalars]
        flat = [[tensor.detach().view(-1) for tensor in column] for column in columns]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # one kernel, whatever surrounds the step
            for first in range(0, len(flat[0]), TENSORS_PER_CALL):
                chunk = [column[first : first + TENSORS_PER_CALL] for column in flat]
                kernel(*[[*some, *rest[len(some) :]] for some, rest in zip(chunk, fill, strict=True)], given)

    with torch.no_grad():
        # Sizes and numbers that are alike now would be compiled in: so all sizes differ and scalars are tensors. Large
        # enough to be split among threads.
        kernel(*zeros(2**17), [torch.tensor(0.5, dtype=dtype, device="cpu") for _ in range(8)])
    return step


@functools.cache
def load_library() -> ctypes.CDLL | str:
    """Load the C++ kernels, built unless the cache has them under a hash of their inputs; return why if that fails."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [path for path in map(shutil.which, COMPILERS) if path][:1]
        if os.name != "posix" or not compiler:
            return f"there is no C++ compiler ({', '.join(COMPILERS)}, or one that $CXX names)"
        # Wider vectors alone: more would not be faster, as memory is the limit.
        wide = platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        command = [*compiler, *(["-mavx2", "-mfma"] if wide else []), *OPTIONS]
        inputs = [SOURCE.read_text("utf-8"), _run([*compiler, "--version"]), platform.machine(), *command]
        key = hashlib.sha256("\0".join(inputs).encode(errors="surrogateescape")).hexdigest()[:20]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_radam")
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        cached = cache / f"schedule_free-{key}.so"
        if _is_private(cache) and _is_private(cached):
            return ctypes.CDLL(str(cached))
        folder = cache if _is_private(cache) and os.access(cache, os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="hf_radam-", dir=folder, ignore_cleanup_errors=True) as building:
            built = Path(building, cached.name)
            _run([*command, "-o", str(built), str(SOURCE)])
            built.chmod(0o700)
            library = ctypes.CDLL(str(built))
            if folder is not None:
                with built.open("rb") as file:
                    os.fsync(file.fileno())  # so that no crash leaves a part of it in the cache
                built.replace(cached)  # atomic: other processes may be doing the same
            return library
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} fails: {error.stderr.strip()[:300]}"
    except (OSError, ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"the C++ kernels cannot be built or loaded ({error})"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=120, check=True)
    return done.stdout


def _is_private(path: Path) -> bool:
    """Return whether a path exists and only this user can have written it: a library that is loaded runs."""
    with contextlib.suppress(OSError):
        about = path.lstat()
        return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return False
