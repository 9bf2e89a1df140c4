"""Figures of this machine, out of the files in /proc (proc(5) describes them). Each function takes the file's text."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class CpuTimes(NamedTuple):
    """Ticks since the machine started, of one processor or of all, from a line of /proc/stat."""

    user: int
    system: int
    waiting: int
    idle: int


@dataclasses.dataclass(frozen=True)
class Cpu:
    """What the processors did, in percent of all of their time; `cores` in percent of each one's."""

    user: float
    system: float
    waiting: float
    cores: list[float]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes. `used` cannot be had by a program that asks for it; `cache` can, and is free only for now."""

    total: int
    used: int
    cache: int
    swap_total: int
    swap_used: int


@dataclasses.dataclass(frozen=True)
class Network:
    """Bytes a second, of all interfaces in the list together."""

    received: float
    sent: float
    interfaces: list[str]


@dataclasses.dataclass(frozen=True)
class System:
    """Averages of the runnable over 1, 5 and 15 minutes; threads; seconds since the machine started."""

    load: list[float]
    running: int
    threads: int
    uptime: float


def cpu_times(stat: str) -> dict[str, CpuTimes]:
    """From /proc/stat: `cpu` for all processors together, `cpu0` and so on for each."""
    times = {}
    for line in stat.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu"):
            continue
        user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
        # Time that the host took away (steal) was not available, which is as good as busy to who waits for it.
        times[name] = CpuTimes(user + nice, system + irq + softirq + steal, iowait, idle)
    return times


def cpu(before: dict[str, CpuTimes], after: dict[str, CpuTimes]) -> Cpu:
    """What happened between two readings."""
    user, system, waiting, _ = shares(before["cpu"], after["cpu"])
    cores = []
    for name in sorted(after.keys() & before.keys() - {"cpu"}, key=lambda name: int(name.removeprefix("cpu"))):
        busy = shares(before[name], after[name])
        cores.append(round(busy[0] + busy[1], 1))
    return Cpu(user, system, waiting, cores)


def shares(before: CpuTimes, after: CpuTimes) -> list[float]:
    """Percent of the time between, for each field."""
    # The kernel's count of waiting may go back a little (proc(5)).
    spent = [max(0, new - old) for old, new in zip(before, after, strict=True)]
    return [round(100 * part / (sum(spent) or 1), 1) for part in spent]


def memory(meminfo: str) -> Memory:
    """From /proc/meminfo."""
    kibi = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in meminfo.splitlines())}
    size = {name: value * 1024 for name, value in kibi.items()}
    used = size["MemTotal"] - size["MemAvailable"]
    return Memory(
        total=size["MemTotal"],
        used=used,
        cache=max(0, size["MemAvailable"] - size["MemFree"]),
        swap_total=size["SwapTotal"],
        swap_used=size["SwapTotal"] - size["SwapFree"],
    )


def network_counts(dev: str) -> dict[str, tuple[int, int]]:
    """From /proc/net/dev: bytes received and sent since the start, for each interface."""
    counts = {}
    for line in dev.splitlines()[2:]:
        name, fields = line.split(":")
        received, sent = fields.split()[0], fields.split()[8]
        counts[name.strip()] = (int(received), int(sent))
    return counts


def network(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]], seconds: float) -> Network:
    """What went over the wires between two readings: the loopback counts only where there is nothing else."""
    names = sorted(before.keys() & after.keys())
    outward = [name for name in names if name != "lo" and any(after[name])] or names
    received, sent = (sum(max(0, after[name][way] - before[name][way]) for name in outward) / seconds for way in (0, 1))
    return Network(round(received), round(sent), outward)


def system(loadavg: str, uptime: str) -> System:
    """From /proc/loadavg and /proc/uptime."""
    *load, threads, _ = loadavg.split()
    running, _, total = threads.partition("/")
    seconds, _ = uptime.split()
    return System([float(average) for average in load], int(running), int(total), float(seconds))
