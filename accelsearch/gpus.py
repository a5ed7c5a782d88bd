"""Which GPUs of this machine to use: all, the free ones, or those that are named."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from accelsearch.errors import PlanError, UnsupportedError

__all__ = ["Gpu", "choose", "cores", "installed"]

_FREE_SHARE, _FREE_LOAD = 0.05, 10  # of memory used, and percent of load, up to which one is free
_QUERY = "index,uuid,name,memory.total,memory.used,utilization.gpu"


@dataclass(frozen=True)
class Gpu:
    """One GPU; memory in MiB, load in percent."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    used_mib: int
    load: int

    @property
    def free(self) -> bool:
        """Whether nobody else seems to use it: drivers keep a little memory for themselves."""
        return self.used_mib <= _FREE_SHARE * self.memory_mib and self.load <= _FREE_LOAD


def installed() -> tuple[Gpu, ...]:
    """The GPUs that this process may use, as `nvidia-smi` lists them; none where there is none.

    Raises:
        UnsupportedError: `nvidia-smi` is there and fails.
    """
    if shutil.which("nvidia-smi") is None:
        return ()
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnsupportedError(f"nvidia-smi must list the GPUs, but {error}") from None
    if done.returncode != 0:
        told = done.stdout.strip() or done.stderr.strip()
        if "No devices were found" in told:
            return ()
        raise UnsupportedError(f"nvidia-smi must list the GPUs, but it says: {told}")
    found = tuple(_gpu(line) for line in done.stdout.splitlines() if line.strip())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # A scheduler has given us some of them: the others are somebody else's.
    names = [one.strip() for one in visible.split(",") if one.strip()]
    return tuple(one for one in found if str(one.index) in names or one.uuid in names)


def choose(wanted: str, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPUs that `all`, `free` or a list such as `0,2` names; of none installed, none.

    Raises:
        PlanError: a number that no GPU has, or something else that cannot be meant.
        UnsupportedError: `free`, and every GPU is in use.
    """
    if wanted == "all":
        return gpus
    if wanted == "free":
        free = tuple(gpu for gpu in gpus if gpu.free)
        if gpus and not free:
            used = ", ".join(f"{gpu.index}: {gpu.used_mib} MiB, {gpu.load} % load" for gpu in gpus)
            raise UnsupportedError(f"a GPU must be free, but all are in use ({used}); name one")
        return free
    numbers = wanted.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise PlanError(f"--gpus must be all, free or numbers such as 0,2, got {wanted!r}")
    by_index = {gpu.index: gpu for gpu in gpus}
    chosen = tuple(dict.fromkeys(int(number) for number in numbers))
    for index in chosen:
        if index not in by_index:
            there = ", ".join(map(str, by_index)) or "none"
            raise PlanError(
                f"--gpus must name GPUs of this machine, which are {there}, got {index}"
            )
    return tuple(by_index[index] for index in chosen)


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu(line: str) -> Gpu:
    index, uuid, name, total, used, load = (part.strip() for part in line.split(","))
    # What a virtual GPU does not tell, "[N/A]", it is not held against it.
    return Gpu(int(index), uuid, name, _number(total), _number(used), _number(load))


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
