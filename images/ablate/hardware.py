# SPDX-License-Identifier: AGPL-3.0-or-later
"""What this machine has: GPUs, memory and disk space. All sizes are in bytes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from common.text import clean


@dataclass(frozen=True)
class Gpu:
    """One GPU. `free` is what other programs have left of `total`."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Disk:
    """The file system that a path is on, or will be on. Two paths share their space if `device` is the same."""

    device: int
    free: int
    writable: bool = True


@dataclass(frozen=True)
class Hardware:
    """This machine. `ram_free`: what a new process may use, within the limit of the container."""

    gpus: tuple[Gpu, ...]
    ram_free: int
    disks: dict[Path, Disk] = field(default_factory=dict)

    @property
    def vram_free(self) -> int:
        """Over all GPUs: Heretic spreads a model's layers over them."""
        return sum(gpu.free for gpu in self.gpus)


def measure(paths: Iterable[Path]) -> Hardware:
    """Look at the machine, and at the file systems of `paths`, which need not exist yet. Raises nothing."""
    return Hardware(gpus=gpus(), ram_free=ram_free(), disks={path: disk(path) for path in paths})


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch can use here (CUDA and ROCm), in its order."""
    import torch

    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Gpu(clean(torch.cuda.get_device_name(index)), total, free))
    return tuple(found)


def ram_free(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What a new process may use: what the system has left, and no more than the container's limit leaves."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = cgroup_free(cgroups, own)
    return available if limit is None else min(available, limit)


def cgroup_free(cgroups: Path, own: Path) -> int | None:
    """What the memory limits above this process leave, None without a limit.

    Version 2 of cgroups has one tree, version 1 one per kind. In a container the tree's root is often the container's
    own group while `own` still names the path that the host sees: then the root is looked at alone.
    """
    left: list[int] = []
    for line in _text(own).splitlines():
        number, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if number == "0" and not kinds:
            root, files = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = cgroups / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Each group above sets a limit too. ".." would lead out of the tree; it stands for what is not visible here.
        parts = [part for part in Path(path).parts if part not in ("/", "..")]
        for depth in range(len(parts) + 1):
            free = _group_free(root.joinpath(*parts[:depth]), *files)
            if free is not None:
                left.append(free)
    return min(left, default=None)


def _group_free(group: Path, limit_file: str, usage_file: str, cache_key: str) -> int | None:
    """One group's limit minus its use; the page cache, which gives way, does not count as used."""
    limit, usage = _text(group / limit_file).strip(), _text(group / usage_file).strip()
    # "max" is no limit; in version 1 a number near 2^63 stands for it, which is more than any machine has.
    if not limit.isdecimal() or not usage.isdecimal():
        return None
    cache = 0
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == cache_key and value.strip().isdecimal():
            cache = int(value)
    return max(0, int(limit) - max(0, int(usage) - cache))


def disk(path: Path) -> Disk:
    """The file system of `path`, by its nearest folder that exists."""
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return Disk(os.stat(folder).st_dev, shutil.disk_usage(folder).free, os.access(folder, os.W_OK | os.X_OK))
    except OSError:
        return Disk(-1, 0, writable=False)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
