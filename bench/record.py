"""The record of a scenario: every run, with the command, the machine and the versions, as JSON."""

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bench.figures import Run, run_of
from bench.measure import Load, load_core, server_core
from bench.peers import PEERS, base

RESULTS = Path(__file__).parent / "results"


class Failed(msgspec.Struct, frozen=True):
    """A run that could not be made."""

    peer: str
    load: Load
    error: str


class Record(msgspec.Struct, frozen=True):
    """What is kept of a scenario."""

    scenario: str
    command: str
    when: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    missing: dict[str, str]
    """Peers that could not run, with the reason."""
    unable: dict[str, str]
    """Peers that lack what the scenario, or a part of it, is about."""
    failed: list[Failed]
    runs: list[Run]


class _SavedRun(msgspec.Struct):
    peer: str
    load: Load
    result: msgspec.Raw
    repetition: int = 0


class _Saved(msgspec.Struct):
    runs: list[_SavedRun]


class _Head(msgspec.Struct):
    scenario: str
    command: str
    when: str
    machine: dict[str, str | int]
    versions: dict[str, str]
    missing: dict[str, str]
    unable: dict[str, str]
    failed: list[Failed]


def save(record: Record, file: Path) -> None:
    """Writes it, for people and programs: each run is a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = msgspec.json.encode(msgspec.structs.replace(record, runs=[]))
    runs = b",\n  ".join(msgspec.json.encode(run) for run in record.runs)
    text = msgspec.json.format(head, indent=1)
    file.write_bytes(text.replace(b'"runs": []', b'"runs": [\n  ' + runs + b"\n ]") + b"\n")


def load(file: Path) -> Record:
    """Reads one that was saved. Raises OSError, msgspec.DecodeError."""
    text = file.read_bytes()
    head = msgspec.json.decode(text, type=_Head)
    saved = msgspec.json.decode(text, type=_Saved)
    runs = [run_of(each.peer, each.load, bytes(each.result), each.repetition) for each in saved.runs]
    return Record(**msgspec.structs.asdict(head), runs=runs)


def load_all(folder: Path = RESULTS) -> dict[str, Record]:
    """The records of a folder, by scenario."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        if file.name != "recorded.json":
            record = load(file)
            found[record.scenario] = record
    return found


def now() -> str:
    """The time for a record, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine() -> dict[str, str | int]:
    """What the figures are measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split("\n", 1)[0].split()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count() or 1,
        "memory": f"{int(memory[1]) * 1024 / 1e9:.0f} GB",
        "kernel": platform.release(),
        "system": _system(),
        "tcp": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "python": platform.python_version(),
        "shared core": "yes" if server_core() == load_core() else "no",
    }


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def versions() -> Mapping[str, str]:
    """Versions of everything that can be measured here, and of what it stands on."""
    found = {peer.name: peer.version() for peer in PEERS.values()}
    found |= {name: base.module_version(name)() for name in ("uvloop", "msgspec", "aiofastnet")}
    return {name: version for name, version in found.items() if version}
