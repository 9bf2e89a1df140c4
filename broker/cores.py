"""How many cores this process may use: those of its affinity, and no more than the CPU quota of its control groups.

A container or a systemd unit with `CPUQuota=` has all cores of the machine in its affinity, and a share of their time.
Threads beyond that share would not run at the same time, but use it up early.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

MOST_SENDERS: Final = 8
"""Threads that send without a setting. More of them would wait for the kernel's locks rather than work."""


def default_threads() -> int:
    """Give the number of threads that send where the configuration says nothing."""
    return min(MOST_SENDERS, usable_cores())


def usable_cores(root: Path = Path("/")) -> int:
    """Give the number of whole cores that this process may use, at least 1. `root` is where /proc and /sys are."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Give the CPU quotas of the process, in cores. A file that cannot be read sets no quota."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # number:controllers:path, see cgroups(7). Version 2 names no controllers.
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        folder = root / "sys/fs/cgroup"
        if controllers:
            if "cpu" not in controllers.split(","):
                continue
            folder /= "cpu"
        # Each group above has a quota of its own. In a container the path may be that outside, where nothing is.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            quota = _quota_of(folder / str(group).lstrip("/"), is_v2=not controllers)
            if quota is not None:
                yield quota


def _quota_of(folder: Path, *, is_v2: bool) -> float | None:
    """Give the quota of one group, in cores; None: it has none."""
    try:
        if is_v2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        share = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None
    return share if share > 0 else None  # -1 in version 1: none
