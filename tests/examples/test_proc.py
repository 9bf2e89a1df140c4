"""Figures out of the text of files in /proc."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.vitals import proc

STAT = """\
cpu  100 10 50 1000 40 5 5 10 0 0
cpu0 60 10 30 480 20 5 5 0 0 0
cpu1 40 0 20 520 20 0 0 10 0 0
intr 12345 0 0
ctxt 987654
"""

STAT_LATER = """\
cpu  130 10 60 1050 40 5 5 20 0 0
cpu0 90 10 30 490 20 5 5 0 0 0
cpu1 40 0 30 560 19 0 0 20 0 0
intr 12399 0 0
"""

MEMINFO = """\
MemTotal:       16000 kB
MemFree:         4000 kB
MemAvailable:   10000 kB
Buffers:          500 kB
SwapTotal:       2000 kB
SwapFree:        1500 kB
HugePages_Total:       0
"""

DEV = """\
Inter-|   Receive                                        |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo: 1000 1 0 0 0 0 0 0 1000 1 0 0 0 0 0 0
  eth0: 5000 1 0 0 0 0 0 0 300 1 0 0 0 0 0 0
 dummy: 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
"""


def test_cpu_usage_is_percent_of_the_time_between_readings() -> None:
    found = proc.cpu(proc.cpu_times(STAT), proc.cpu_times(STAT_LATER))
    assert found == proc.Cpu(user=30.0, system=20.0, waiting=0.0, cores=[75.0, 33.3])


def test_cpus_without_any_ticks_are_idle() -> None:
    # Two readings within one tick of the kernel's clock.
    times = proc.cpu_times(STAT)
    assert proc.cpu(times, times) == proc.Cpu(user=0.0, system=0.0, waiting=0.0, cores=[0.0, 0.0])


def test_cpu_that_came_online_between_readings_is_ignored() -> None:
    later = proc.cpu_times(STAT_LATER)
    before = {name: times for name, times in proc.cpu_times(STAT).items() if name != "cpu1"}
    assert len(proc.cpu(before, later).cores) == 1


def test_ten_or_more_cpus_keep_their_order() -> None:
    before = {name: proc.CpuTimes(0, 0, 0, 0) for name in ["cpu", *(f"cpu{number}" for number in range(11))]}
    after = {name: proc.CpuTimes(number, 0, 0, 100 - number) for number, name in enumerate(before)}
    assert proc.cpu(before, after).cores == [float(number) for number in range(1, 12)]


def test_memory_is_reported_in_bytes() -> None:
    assert proc.memory(MEMINFO) == proc.Memory(
        total=16000 * 1024, used=6000 * 1024, cache=6000 * 1024, swap_total=2000 * 1024, swap_used=500 * 1024
    )


def test_traffic_is_reported_in_bytes_per_second_without_loopback() -> None:
    before = proc.network_counts(DEV)
    after = {**before, "eth0": (9000, 500), "lo": (90_000, 90_000)}
    assert proc.network(before, after, seconds=2) == proc.Network(received=2000, sent=100, interfaces=["eth0"])


def test_machine_with_loopback_only_reports_no_traffic() -> None:
    assert proc.network({"lo": (0, 0)}, {"lo": (10, 20)}, seconds=1) == proc.Network(10, 20, ["lo"])


def test_reset_counters_are_no_traffic() -> None:
    assert proc.network({"eth0": (500, 500)}, {"eth0": (1, 1)}, seconds=1) == proc.Network(0, 0, ["eth0"])


def test_load_threads_and_uptime_are_parsed() -> None:
    found = proc.system("0.52 0.58 0.59 3/467 12345\n", "3661.25 7000.00\n")
    assert found == proc.System(load=[0.52, 0.58, 0.59], running=3, threads=467, uptime=3661.25)


@pytest.mark.parametrize("name", ["stat", "meminfo", "net/dev", "loadavg", "uptime"])
def test_this_machines_own_files_can_be_read(name: str) -> None:
    text = (Path("/proc") / name).read_text()
    match name:
        case "stat":
            assert proc.cpu_times(text)["cpu"].idle > 0
        case "meminfo":
            assert 0 < proc.memory(text).used < proc.memory(text).total
        case "net/dev":
            assert proc.network_counts(text)
        case "loadavg":
            assert proc.system(text, "1 1").threads > 0
        case "uptime":
            assert proc.system("0 0 0 1/1 1", text).uptime > 0
