# SPDX-License-Identifier: AGPL-3.0-or-later
"""What this machine has: GPUs, memory and disk space. All sizes are in bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.text import clean

GB = 10**9
_TIMEOUT = 180.0  # seconds; torch takes most of a minute to import from a slow disk
# Asked in a process of its own: to tell how much memory is free, CUDA takes some of it on each GPU until its process ends.
_ASK = """
import json, torch
found = []
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        kind = about.gcnArchName if torch.version.hip else f"sm_{about.major}{about.minor}"
        free, total = torch.cuda.mem_get_info(index)
        found.append([torch.cuda.get_device_name(index), total, free, kind])
built = bool(torch.version.cuda or torch.version.hip)
print(json.dumps([built, found, torch.cuda.get_arch_list()]))
"""
# What a driver leaves where its GPUs cannot be used: Docker shows these in every container.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/nvidia"))


@dataclass(frozen=True)
class Gpu:
    """One GPU. `free` is what other programs have left of `total`. `kind`: "sm_90", or "gfx90a" of AMD. `usable`: has
    the torch that is installed programs for this kind?"""

    name: str
    total: int
    free: int
    kind: str = ""
    usable: bool = True


@dataclass(frozen=True)
class Disk:
    """The file system that a path is on, or will be on. Two paths share their space if `device` is the same."""

    device: int
    free: int
    writable: bool = True


@dataclass(frozen=True)
class Hardware:
    """This machine. `ram_free`: what a new process may use, within the limit of the container. `unseen`: "", or why a GPU
    that is there is not in `gpus`, in a clause."""

    gpus: tuple[Gpu, ...]
    ram_free: int
    disks: dict[Path, Disk] = field(default_factory=dict)
    unseen: str = ""

    @property
    def vram_free(self) -> int:
        """Over all GPUs: Heretic spreads a model's layers over them."""
        return sum(gpu.free for gpu in self.gpus)


def measure(paths: Iterable[Path]) -> Hardware:
    """Look at the machine, and at the file systems of `paths`, which need not exist yet. Raises nothing."""
    found, unseen = gpus()
    return Hardware(found, ram_free(), {path: disk(path) for path in paths}, unseen)


def gpus(command: Sequence[str] = (sys.executable, "-P", "-c", _ASK)) -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that torch can use here (CUDA and ROCm), in its order, and Hardware.unseen. Nothing of them is held after."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        )
        built, listed, programs = json.loads(done.stdout.splitlines()[-1])
        found = tuple(
            Gpu(clean(name), total, free, clean(kind), runs(kind, programs)) for name, total, free, kind in listed
        )
    except subprocess.CalledProcessError as error:
        said = " ".join(clean(error.stderr).split())[-200:]
        return (), f"torch failed when asked about GPUs ({said or f'exit code {error.returncode}'})"
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, LookupError) as error:
        return (), f"torch gave no answer about GPUs ({type(error).__name__})"
    if found or not driver():
        return found, ""
    if not built:
        return (), "a GPU's driver is there, but the torch that is installed is for CPUs only"
    return (), (
        "a GPU's driver is there, but no GPU is visible here: in Docker, install the NVIDIA container toolkit on the"
        " machine; else see what nvidia-smi says"
    )


def driver() -> bool:
    """Is there a sign of an NVIDIA GPU, whether or not it can be used here?"""
    return shutil.which("nvidia-smi") is not None or any(path.exists() for path in _DRIVERS)


def runs(kind: str, programs: Sequence[str]) -> bool:
    """Does a torch that was built for `programs` (torch.cuda.get_arch_list) run on a GPU of this kind?

    A program for sm_80 runs on 8.0 to 8.9, one for compute_80 (which the driver translates) on all from 8.0, one for
    sm_90a on 9.0 alone. A kind that is not told apart here is taken to do.
    """
    have = re.fullmatch(r"sm_(\d+)(\d)", kind)
    if not programs or not kind:
        return True
    if not have:
        return kind.split(":")[0] in {program.split(":")[0] for program in programs}
    major, minor = int(have[1]), int(have[2])
    for program in programs:
        if built := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", program):
            first, second = int(built[2]), int(built[3])
            if built[4] == "a":
                fits = (first, second) == (major, minor)
            elif built[1] == "compute" and not built[4]:
                fits = (first, second) <= (major, minor)
            else:
                fits = first == major and second <= minor
            if fits:
                return True
    return False


def gigabytes(size: float) -> str:
    """A size in bytes as a person reads it, decimal: "29.5 GB", "12.3 MB", "0.4 kB"."""
    for unit, name in ((GB, "GB"), (1e6, "MB")):
        if size >= 0.1 * unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


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
