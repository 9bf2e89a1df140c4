"""Every peer really runs, with everything that it is said to be able to do."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.measure import MeasureError, Opening, Publishing, missing_ability, server
from bench.peers import ABILITIES, BROKER, FLOOR, LACKS, PEERS, Dialogue, Peer, Setting, Talk, base

pytestmark = pytest.mark.needs("peers")

REACHED = [(name, way) for name, peer in PEERS.items() for way in ("tcp", "unix", "tls") if way in peer.abilities]


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_registered(name: str) -> None:
    """The others would fail all the same; this one says what to install."""
    assert PEERS[name].missing() is None


@pytest.mark.parametrize(("name", "way"), REACHED)
def test_every_peer_delivers_events(name: str, way: str) -> None:
    result = Publishing(subscribers=5, window=2, transport=way, seconds=0.05, warmup=0).run(PEERS[name])
    assert result.total_deliveries == 5 * result.total_publishes > 0


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "topics" in peer.abilities])
def test_topics_and_patterns_are_distinguished(name: str) -> None:
    # In an open loop, with somebody beside who does not read.
    patterns = "patterns" in PEERS[name].abilities
    load = Publishing(
        subscribers=6, topics=3, patterns=patterns, rate=200, stalled=1, seconds=0.05, warmup=0, sample=0.01
    )
    result = load.run(PEERS[name])
    assert result.total_deliveries == 2 * result.total_publishes > 0
    assert result.samples


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if "deflate" in peer.abilities])
def test_compressed_events_equal_the_published_ones(name: str) -> None:
    load = Publishing(subscribers=3, window=2, payload=1024, deflate=True, seconds=0.05, warmup=0)
    result = load.run(PEERS[name])
    assert result.total_deliveries > 0
    assert result.event_bytes < 1024


@pytest.mark.parametrize("name", PEERS)
def test_connections_are_opened(name: str) -> None:
    load = Opening(connections=20, base=5, settle=0.02, subscribed="unsubscribed" not in PEERS[name].abilities)
    result = load.run(PEERS[name])
    assert (result.connections, result.base) == (20, 5)
    assert result.connect_us is not None
    assert result.connect_us.p99 > 0


def test_abilities_are_known_names() -> None:
    assert {ability for peer in PEERS.values() for ability in peer.abilities} <= ABILITIES
    assert set(LACKS) | {"tcp"} == ABILITIES


def test_peer_reports_missing_abilities() -> None:
    load = Publishing(subscribers=2, topics=2, window=1, patterns=True, transport="tls")
    assert missing_ability(FLOOR, load) == "has no patterns, no TLS, no publisher of many topics"
    assert missing_ability(FLOOR, Publishing(subscribers=2, window=1)) is None


def test_missing_program_is_reported_with_its_package() -> None:
    assert base.program_missing("no-such-server", "package")() == "there is no no-such-server; apt install package"
    assert base.program_missing(sys.executable, "python3")() is None
    missing = base.module_missing("msgspec", "no_such_module")()
    assert missing == "not installed: no_such_module; pip install no_such_module"
    assert base.module_version("no-such-module")() is None
    assert base.program_says("no-such-program", "--version") == ""


def failing(program: str) -> Peer:
    """A peer whose server is this Python program."""
    return replace(FLOOR, name="failing", command=lambda setting: [sys.executable, "-c", program])


def test_output_of_a_server_that_does_not_start_is_reported() -> None:
    with pytest.raises(MeasureError, match=r"ended with status 3 before it listened\nThe server said:\nno luck"):
        Publishing(subscribers=1, window=1).run(failing("print('no luck'); raise SystemExit(3)"))


def test_environment_of_the_shell_does_not_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WSBROKER_LIMITS__MAX_QUEUE", "1")
    monkeypatch.setenv("OTHER_VARIABLE", "1")
    program = "import os; raise SystemExit(str([name for name in os.environ if name.endswith(('QUEUE', 'VARIABLE'))]))"
    with pytest.raises(MeasureError, match=r"\['OTHER_VARIABLE'\]"), server(failing(program)):
        pass


def test_server_that_does_not_compress_is_detected() -> None:
    # It takes the offer, and has no intention to use it.
    uncompressed = replace(
        PEERS["socketify"],
        command=lambda setting: PEERS["socketify"].command(replace(setting, deflate=False)),
    )
    with pytest.raises(MeasureError, match="permessage-deflate"):
        Publishing(subscribers=2, window=1, payload=1024, deflate=True, seconds=0.05).run(uncompressed)


def test_load_program_gets_only_changed_options() -> None:
    assert Dialogue().options() == []
    assert Dialogue(publish="x", publisher_greetings=1, deflate=True, framing="raw").options() == [
        "--publisher-greetings=1",
        "--publish=x",
        "--framing=raw",
        "--deflate=1",
    ]


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("payload", [0, 1, 16, 16 * 1024])
def test_payload_has_its_size_and_needs_no_escapes(payload: int, deflate: bool) -> None:
    data = base.data(Talk(payload, deflate=deflate))
    assert len(data.encode()) == payload
    assert not set(data) & {'"', "\\", "%"}
    assert data == base.data(Talk(payload, deflate=deflate))


def test_pings_are_off_in_a_long_run() -> None:
    with server(BROKER, pings=False) as (pid, setting):
        os.kill(pid, 0)
        assert "ping_interval = 0" in (setting.folder / "wsbroker.toml").read_text()


def test_broker_runs_with_defaults_and_the_options_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    defaults = BROKER.command(Setting(tmp_path, 8765))
    assert file.read_text() == "[server]\n"
    assert defaults[-4:] == ["--listen", "127.0.0.1:8765", "--admin", "127.0.0.1:0"]
    BROKER.command(Setting(tmp_path, 8765, "tls", deflate=True, stalled=True))
    keys = [line.split(" = ")[0] for line in file.read_text().splitlines()]
    assert keys == ["[server]", "certificate", "key", "compression"]


@pytest.mark.parametrize("name", ["socketify", "wsbroker"])
def test_stalled_subscribers_use_the_default_bounds_of_the_server(name: str) -> None:
    """uWebSockets holds 64 kB for a client unless it is told otherwise, the broker 256 events, which all share."""
    load = Publishing(subscribers=1, window=4, payload=16_000, stalled=20, seconds=0.5, warmup=0.5)
    result = load.run(PEERS[name])
    assert result.total_publishes * result.event_bytes > 8_000_000, "more than the kernel holds, and they may"
    assert result.server_rss - result.server_rss_before < 20_000_000


def test_nchan_reports_loads_beyond_its_event_numbers() -> None:
    load = Publishing(subscribers=1, window=16)
    assert missing_ability(PEERS["nchan"], load) == (
        "has no numbers for more than 32,767 events of a topic in a second, and stops there"
    )
    assert missing_ability(PEERS["nchan"], Publishing(subscribers=1, window=1)) is None
    assert missing_ability(PEERS["nchan"], Publishing(subscribers=100, window=16)) is None
