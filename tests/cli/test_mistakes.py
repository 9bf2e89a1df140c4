"""A table of wrong command lines and configurations: one line each, that says what is wrong, where, and what to write."""

# ruff: noqa: E501 -- a message is one line here, as it is on the terminal

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from broker.cli import main
from broker.config import sources
from tests.fixtures_command import wsbroker

# The command line, its exit status and what it is told.
COMMAND_LINES = [
    ("nonsense", 2, "No such command 'nonsense'; see wsbroker --help"),
    ("pubb t", 2, "No such command 'pubb'; see wsbroker --help"),
    ("--nonsense", 2, "No such option '--nonsense'; see wsbroker --help"),
    ("serve extra", 2, "Got unexpected extra argument (extra); see wsbroker serve --help"),
    (
        "serve --log-level loud",
        2,
        "Invalid value for '--log-level': 'loud' is not one of 'debug', 'info', 'warning', 'error'; see wsbroker serve --help",
    ),
    (
        "serve --log-format xml",
        2,
        "Invalid value for '--log-format': 'xml' is not one of 'text', 'json'; see wsbroker serve --help",
    ),
    ("serve --listen", 2, "Option '--listen' requires an argument; see wsbroker --help"),
    ("serve --port 1", 2, "No such option '--port'; see wsbroker serve --help"),
    ("check extra", 2, "Got unexpected extra argument (extra); see wsbroker check --help"),
    ("check --config", 2, "Option '--config' requires an argument; see wsbroker --help"),
    ("check --jsn", 2, "No such option '--jsn'. Did you mean '--json'?; see wsbroker check --help"),
    ("config nothing", 2, "No such command 'nothing'; see wsbroker config --help"),
    ("config default x", 2, "Got unexpected extra argument (x); see wsbroker config default --help"),
    ("version x", 2, "Got unexpected extra argument (x); see wsbroker version --help"),
    ("version --jsonn", 2, "No such option '--jsonn'. Did you mean '--json'?; see wsbroker version --help"),
    ("pub", 2, "Missing argument 'TOPIC'; see wsbroker pub --help"),
    ("pub t 1 2", 2, "Got unexpected extra argument (2); see wsbroker pub --help"),
    (
        "pub t 1 --kye k",
        2,
        "No such option '--kye'. (Did you mean one of: '--key', '--token'?); see wsbroker pub --help",
    ),
    ("pub t 1 --key", 2, "Option '--key' requires an argument; see wsbroker --help"),
    (
        "pub t 1 --url localhost:8765",
        2,
        "Invalid value for --url: `localhost:8765` is neither ws://host:port, wss://host:port nor unix:/path; see wsbroker pub --help",
    ),
    (
        "pub t 1 --url http://x",
        2,
        "Invalid value for --url: `http://x` is neither ws://host:port, wss://host:port nor unix:/path; see wsbroker pub --help",
    ),
    (
        "sub t --url ws://a..b",
        2,
        "Invalid value for --url: the host is no valid name: each part of it has 1 to 63 bytes; see wsbroker sub --help",
    ),
    (
        f"bench --url ws://{'a' * 64}:1",
        2,
        "Invalid value for --url: the host is no valid name: each part of it has 1 to 63 bytes; see wsbroker bench --help",
    ),
    (
        "pub t 1 --url ws://é..b",
        2,
        "Invalid value for --url: the host is no valid name: each part of it has 1 to 63 bytes; see wsbroker pub --help",
    ),
    ("pub t 1 --url ws://", 2, "Invalid value for --url: hostname isn't provided; see wsbroker pub --help"),
    (
        "pub t 1 --url unix:x",
        2,
        "Invalid value for --url: `unix:x`: a Unix socket is written unix:/path, with the whole path; see wsbroker pub --help",
    ),
    (
        "pub t 1 --ca /none.pem",
        2,
        "Invalid value for --ca: /none.pem cannot be read: No such file or directory; see wsbroker pub --help",
    ),
    (
        "pub t 1 --token aé",
        2,
        "Invalid value for --token: a token is printable ASCII without blanks; see wsbroker pub --help",
    ),
    ("pub a..b 1", 65, "bad_topic: `a..b`: a token is empty; tokens are joined by single dots"),
    ("pub a.* 1", 65, "bad_topic: `a.*`: `*` and `>` are for subscriptions, a topic holds neither"),
    (
        "pub t hello",
        65,
        "bad_json: not valid JSON at character 1: invalid character (with --text, DATA is a plain string)",
    ),
    ("pub t {", 65, "bad_json: not valid JSON: it ends too early (with --text, DATA is a plain string)"),
    ("pub t [1,", 65, "bad_json: not valid JSON: it ends too early (with --text, DATA is a plain string)"),
    ('pub t {"ä"1}', 65, "bad_json: not valid JSON at character 5: expected ':' (with --text, DATA is a plain string)"),
    (
        "pub t 1}",
        65,
        "bad_json: not valid JSON at character 2: trailing characters (with --text, DATA is a plain string)",
    ),
    ("pub  1", 65, "bad_topic: a topic must not be empty"),
    ("sub", 2, "Missing argument 'TOPIC...'; see wsbroker sub --help"),
    ("sub t --since 3", 2, "No such option '--since'. Did you mean '--json'?; see wsbroker sub --help"),
    ("sub t --last 0", 2, "Invalid value for '--last': 0 is not in the range x>=1; see wsbroker sub --help"),
    ("history", 2, "Missing argument 'TOPIC'; see wsbroker history --help"),
    (
        "history t --last x",
        2,
        "Invalid value for '--last': 'x' is not a valid integer range; see wsbroker history --help",
    ),
    ("history a..b", 65, "bad_topic: `a..b`: a token is empty; tokens are joined by single dots"),
    ("presence >", 65, "bad_topic: `>`: `*` and `>` are for subscriptions, a topic holds neither"),
    ("store info", 78, "server.engine is memory: there is no file"),
    ("store info x", 2, "Got unexpected extra argument (x); see wsbroker store info --help"),
    (
        "sub t --overflow none",
        2,
        "Invalid value for '--overflow': 'none' is not one of 'drop_oldest', 'drop_newest', 'latest', 'replay', 'block', 'close'; see wsbroker sub --help",
    ),
    ("sub t --max-queue 0", 2, "Invalid value for '--max-queue': 0 is not in the range x>=1; see wsbroker sub --help"),
    (
        "sub t --max-queue x",
        2,
        "Invalid value for '--max-queue': 'x' is not a valid integer range; see wsbroker sub --help",
    ),
    ("sub t --credit 0", 2, "Invalid value for '--credit': 0 is not in the range x>=1; see wsbroker sub --help"),
    ("sub t --credit -1", 2, "Invalid value for '--credit': -1 is not in the range x>=1; see wsbroker sub --help"),
    ("sub a..b", 65, "bad_topic: `a..b`: a token is empty; tokens are joined by single dots"),
    ("sub >.b", 65, "bad_topic: `>.b`: `>` must be the last token"),
    (
        "sub t --url ftp://x",
        2,
        "Invalid value for --url: `ftp://x` is neither ws://host:port, wss://host:port nor unix:/path; see wsbroker sub --help",
    ),
    (
        "sub t --ca /none.pem",
        2,
        "Invalid value for --ca: /none.pem cannot be read: No such file or directory; see wsbroker sub --help",
    ),
    (
        "bench --subscribers 0",
        2,
        "Invalid value for '--subscribers' / '--connections': 0 is not in the range 1<=x<=1000000; see wsbroker bench --help",
    ),
    (
        "bench --subscribers x",
        2,
        "Invalid value for '--subscribers' / '--connections': 'x' is not a valid integer range; see wsbroker bench --help",
    ),
    (
        "bench --topics 0",
        2,
        "Invalid value for '--topics': 0 is not in the range 1<=x<=100000; see wsbroker bench --help",
    ),
    (
        "bench --topics 3",
        2,
        "Invalid value for --subscribers: 100 is not a multiple of the 3 topics; see wsbroker bench --help",
    ),
    (
        "bench --window 0",
        2,
        "Invalid value for '--window': 0 is not in the range 1<=x<=65536; see wsbroker bench --help",
    ),
    (
        "bench --rate 0",
        2,
        "Invalid value for '--rate': 0.0 is not in the range 0<x<=10000000; see wsbroker bench --help",
    ),
    ("bench --window 1 --rate 1", 2, "--window and --rate exclude each other; see wsbroker bench --help"),
    (
        "bench --payload 1",
        2,
        "Invalid value for '--payload': 1 is not in the range 2<=x<=65000; see wsbroker bench --help",
    ),
    (
        "bench --payload 70000",
        2,
        "Invalid value for '--payload': 70000 is not in the range 2<=x<=65000; see wsbroker bench --help",
    ),
    (
        "bench --seconds 0",
        2,
        "Invalid value for '--seconds': 0.0 is not in the range 0.1<=x<=86400; see wsbroker bench --help",
    ),
    ("bench extra", 2, "Got unexpected extra argument (extra); see wsbroker bench --help"),
    (
        "bench --url x",
        2,
        "Invalid value for --url: `x` is neither ws://host:port, wss://host:port nor unix:/path; see wsbroker bench --help",
    ),
]

# The file and what is said of it.
FILES = [
    ("[limits\n", "FILE:1:8: is not valid TOML: expected ']' at the end of a table declaration"),
    ("a = \n", "FILE:1:5: is not valid TOML: invalid value"),
    ("a = 1\na = 2\n", "FILE:2:6: is not valid TOML: this key has a value already"),
    ("[log]\n[log]\n", "FILE:2:5: is not valid TOML: cannot declare [log] twice"),
    ("a.b.c = 1\n[a.b]\n", "FILE:2:5: is not valid TOML: cannot declare [a.b] twice"),
    ("[server]\nunix_mode = 660\n", 'server.unix_mode (FILE:2): must be a string, not 660; write "660"'),
    ("[server]\norigins = ['https://a', 5]\n", "server.origins (FILE:2): must be a string, not 5"),
    ('a = "x\n', "FILE:1:7: is not valid TOML: illegal character '\\n'"),
    ("max_size = 1\n", "max_size (FILE:1): there is no such key; did you mean limits.max_size?"),
    ("[limit]\nx = 1\n", "limit (FILE:1): there is no such section; did you mean limits?"),
    ("limits = 5\n", "limits (FILE:1): must be a table, [limits]"),
    ("[limits]\nmax_sise = 1\n", "limits.max_sise (FILE:2): there is no such key; did you mean limits.max_size?"),
    ("[limits]\nmax_size = 1\n", "limits.max_size (FILE:2): must be an integer from 64 to 1073741824 (bytes), not 1"),
    (
        "[limits]\nmax_size = true\n",
        "limits.max_size (FILE:2): must be an integer from 64 to 1073741824 (bytes), not true",
    ),
    (
        "[limits]\nmax_size = '1000'\n",
        'limits.max_size (FILE:2): must be an integer from 64 to 1073741824 (bytes), not "1000"',
    ),
    (
        "\n[limits]\n\nping_interval = -1\n",
        "limits.ping_interval (FILE:4): must be a number from 0 to 86400 (seconds), not -1",
    ),
    (
        "[limits]\nopen_timeout = '10s'\n",
        'limits.open_timeout (FILE:2): must be a number from 0.1 to 3600 (seconds), not "10s"',
    ),
    (
        "[limits]\nmax_queue = 100000\n",
        "limits.max_queue (FILE:2): 100000 must not be more than limits.max_queue_limit (default), which is 65536",
    ),
    ("[limits]\nmax_depth = 1000\n", "limits.max_depth (FILE:2): must be an integer from 2 to 512, not 1000"),
    ("[limits]\nmax_fragments = 0\n", "limits.max_fragments (FILE:2): must be an integer from 1 to 1000000, not 0"),
    ("limits.max_inflight = 0\n", "limits.max_inflight (FILE:1): must be an integer from 1 to 65536, not 0"),
    (
        "limits = { max_answers = 1 }\n",
        "limits.max_answers (FILE:1): must be an integer from 1024 to 1073741824 (bytes), not 1",
    ),
    (
        "[server]\nlisten = '127.0.0.1:1'\n",
        'server.listen (FILE:2): must be a list of strings, not empty, not "127.0.0.1:1"',
    ),
    ("[server]\nlisten = []\n", "server.listen (FILE:2): must be a list of strings, not empty, not []"),
    (
        "[server]\nlisten = ['nonsense']\n",
        "server.listen (FILE:2): `nonsense` is no address: it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
    ),
    (
        "[server]\nlisten = [\n  '127.0.0.1:1',\n  '127.0.0.1:1',\n]\n",
        "server.listen (FILE:4): `127.0.0.1:1` is listed twice",
    ),
    (
        "[server]\norigins = [\n  'https://a.example', # one\n  'b.example',\n]\n",
        "server.origins (FILE:4): `b.example` is no origin: it must be scheme://host or scheme://host:port, without a path; "
        "https://*.example.com stands for any subdomain",
    ),
    (
        "[server]\nproxy_protocol = [\n  'unix',\n  'tcp',\n]\n",
        "server.proxy_protocol (FILE:4): `tcp` is no network, as 10.0.0.0/8: 'tcp' does not appear to be an IPv4 or IPv6 network",
    ),
    (
        "[server]\nlisten = [\n  'localhost:80',\n  '0.0.0.0:80',\n]\n",
        "server.listen (FILE:4): 0.0.0.0:80 can be reached from other machines, and everybody is allowed; require tokens ([auth]), listen on 127.0.0.1:8765 or a Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] (WSBROKER_SERVER__ANONYMOUS=true) to allow it",
    ),
    (
        "[server]\nlisten = ['0.0.0.0:80']\n",
        "server.listen (FILE:2): 0.0.0.0:80 can be reached from other machines, and everybody is allowed; require tokens ([auth]), listen on 127.0.0.1:8765 or a Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] (WSBROKER_SERVER__ANONYMOUS=true) to allow it",
    ),
    (
        "[server]\nlisten = [':80']\n",
        "server.listen (FILE:2): `:80`: the host must be a name or an IP address; for every interface say 0.0.0.0 or [::]",
    ),
    (
        "[server]\nlisten = ['a..localhost:80']\n",
        "server.listen (FILE:2): `a..localhost:80`: the host must be a name or an IP address",
    ),
    (
        f"[server]\nadmin = '{'a' * 64}.localhost:80'\n",
        f"server.admin (FILE:2): `{'a' * 64}.localhost:80`: the host must be a name or an IP address",
    ),
    (
        "[server]\nlisten = ['::1:80']\n",
        "server.listen (FILE:2): `::1:80`: an IPv6 address is put in brackets, [::1]:80",
    ),
    (
        "[server]\nlisten = ['unix:x']\n",
        "server.listen (FILE:2): `unix:x`: a Unix socket has an absolute path of at most 107 bytes",
    ),
    (
        "[server]\nadmin = '0.0.0.0:80'\n",
        "server.admin (FILE:2): 0.0.0.0:80 can be reached from other machines, and everybody is allowed; configure an API key ([[keys]]), listen on 127.0.0.1:8766 or a Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] (WSBROKER_SERVER__ANONYMOUS=true) to allow it",
    ),
    (
        "[server]\nadmin = 'x'\n",
        "server.admin (FILE:2): `x` is no address: it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
    ),
    (
        "[server]\npath = 'ws'\n",
        "server.path (FILE:2): must begin with / and hold only visible ASCII characters (others as %XX), no ? and no #",
    ),
    (
        "[server]\nforwarded_header = 'Via'\n",
        'server.forwarded_header (FILE:2): must be one of "X-Forwarded-For", "Forwarded", not "Via"',
    ),
    (
        "[server]\nunix_mode = '0o660'\n",
        'server.unix_mode (FILE:2): must be three octal digits, like "660", not "0o660"',
    ),
    (
        "[server]\nunix_group = 'no such group'\n",
        "server.unix_group (FILE:2): there is no group `no such group` on this machine",
    ),
    ("[limits]\nmax_head = 1\n", "limits.max_head (FILE:2): must be an integer from 1024 to 1048576 (bytes), not 1"),
    ("[server]\npath = '/healthz'\n", "server.path (FILE:2): must not be /healthz, which answers load balancers"),
    (
        "[server]\norigins = ['a.example']\n",
        "server.origins (FILE:2): `a.example` is no origin: it must be scheme://host or scheme://host:port, without a path; "
        "https://*.example.com stands for any subdomain",
    ),
    (
        "[server]\ntrusted_proxies = ['10.0.0.1/8']\n",
        "server.trusted_proxies (FILE:2): `10.0.0.1/8` is no network, as 10.0.0.0/8: 10.0.0.1/8 has host bits set",
    ),
    (
        "[server]\nanonymous = false\n",
        "server.anonymous (FILE:2): nobody could connect: it needs a key for tokens (auth.key_file, auth.jwks_url, auth.secret_file), auth.url, server.client_ca or [[keys]]",
    ),
    (
        "[server]\nengine = 'redis'\n",
        "server.engine (FILE:2): must be memory, or sqlite:// and an absolute path, like "
        "sqlite:///var/lib/wsbroker/broker.db, not redis",
    ),
    (
        "[server]\nengine = 'sqlite://broker.db'\n",
        "server.engine (FILE:2): must be memory, or sqlite:// and an absolute path, like "
        "sqlite:///var/lib/wsbroker/broker.db, not sqlite://broker.db",
    ),
    ("[server]\nblock = 'some'\n", 'server.block (FILE:2): must be one of "local", "all", "none", not "some"'),
    ("[server]\ncertificate = 'a.pem'\n", "server.certificate (FILE:2): needs server.key beside it"),
    ("[server]\nkey = 'a.pem'\n", "server.key (FILE:2): needs server.certificate beside it"),
    ("[log]\nlevel = 'loud'\n", 'log.level (FILE:2): must be one of "debug", "info", "warning", "error", not "loud"'),
    ("[log]\nformat = 'xml'\n", 'log.format (FILE:2): must be one of "text", "json", not "xml"'),
    ("[log]\nlevl = 'info'\n", "log.levl (FILE:2): there is no such key; did you mean log.level?"),
    ("topics = 1\n", "topics (FILE:1): must be tables, each [[topics]]"),
    ("[topics]\nmatch = 'a'\n", "topics (FILE:1): must be tables, each [[topics]]"),
    (
        "[[topics]]\n",
        'topics[1].match (FILE:1): is missing: the topic or pattern that the rule is for, like match = "prices.>"',
    ),
    (
        "[[topics]]\nmatch = 'a..b'\n",
        "topics[1].match (FILE:2): `a..b`: a token is empty; tokens are joined by single dots",
    ),
    (
        "[[topics]]\nmatch = 'a'\nmax_ques = 1\n",
        "topics[1].max_ques (FILE:3): there is no such key; did you mean max_queue?",
    ),
    (
        "[[topics]]\nmatch = 'a'\nmax_age = '1s'\n",
        'topics[1].max_age (FILE:3): must be a number from 0.01 to 31536000 (seconds), not "1s"',
    ),
    (
        "[[topics]]\nmatch = 'a'\noverflow = 'some'\n",
        'topics[1].overflow (FILE:3): must be one of "drop_oldest", "drop_newest", "latest", "replay", "block", "close", not "some"',
    ),
    (
        "[[topics]]\nmatch = 'a'\n[[topics]]\nmatch = 'a'\n",
        "topics[2].match (FILE:4): `a` is there twice, also in topics[1]",
    ),
    (
        "[[topics]]\nmatch = 'a'\nmax_queue = 9\nmax_queue_limit = 5\n",
        "topics[1].max_queue (FILE:3): `a`: max_queue must not be more than its ceiling, which is 5",
    ),
    (
        "[[topics]]\nmatch = 'a'\noverflow = 'replay'\n",
        "topics[1].overflow (FILE:3): `a`: replay needs history beside it, the number of events to keep",
    ),
    (
        "[[topics]]\nmatch = 'a'\nhistory = 'all'\n",
        'topics[1].history (FILE:3): must be an integer from 0 to 16777216, not "all"',
    ),
    (
        "[[topics]]\nmatch = 'a'\ncompact = true\n",
        "topics[1].compact (FILE:3): `a`: needs history beside it, the number of events to keep",
    ),
    (
        "[[topics]]\nmatch = 'a'\nhistory = 9\ntombstone_age = 60\n",
        "topics[1].tombstone_age (FILE:4): `a`: counts only with compact = true",
    ),
]

# The variable, its value and what is said of it.
VARIABLES = [
    ("WSBROKER_FOO", "1", "WSBROKER_FOO: there is no such key; `wsbroker config default` shows the settings"),
    (
        "WSBROKER_LIMITS_MAX_SIZE",
        "1",
        "WSBROKER_LIMITS_MAX_SIZE: there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?",
    ),
    ("WSBROKER_LISTEN", "x", "WSBROKER_LISTEN: there is no such key; did you mean WSBROKER_SERVER__LISTEN?"),
    (
        "WSBROKER_TOPICS__0__MATCH",
        "a",
        "WSBROKER_TOPICS__0__MATCH: there is no such key; rules for topics are set in the file",
    ),
    (
        "WSBROKER_SERVER__PATH_FILE",
        "",
        "server.path (WSBROKER_SERVER__PATH_FILE): is empty; it must be the path of a file",
    ),
    ("WSBROKER_PORT", "8765", "WSBROKER_PORT: there is no such key; `wsbroker config default` shows the settings"),
    (
        "WSBROKER_LIMITS__MAX_SISE",
        "1",
        "WSBROKER_LIMITS__MAX_SISE: there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?",
    ),
    (
        "WSBROKER_LIMITS__MAX_SIZE",
        "x",
        'limits.max_size (WSBROKER_LIMITS__MAX_SIZE): must be an integer from 64 to 1073741824 (bytes), not "x"',
    ),
    (
        "WSBROKER_LIMITS__MAX_SIZE",
        "",
        'limits.max_size (WSBROKER_LIMITS__MAX_SIZE): must be an integer from 64 to 1073741824 (bytes), not ""',
    ),
    (
        "WSBROKER_LOG__LEVEL",
        "loud",
        'log.level (WSBROKER_LOG__LEVEL): must be one of "debug", "info", "warning", "error", not "loud"',
    ),
    (
        "WSBROKER_SERVER__LISTEN",
        "",
        'server.listen (WSBROKER_SERVER__LISTEN): must be a list of strings, not empty, not ""',
    ),
    (
        "WSBROKER_SERVER__ANONYMOUS",
        "maybe",
        'server.anonymous (WSBROKER_SERVER__ANONYMOUS): must be true or false, not "maybe"',
    ),
    (
        "WSBROKER_SERVER__PATH",
        "ws",
        "server.path (WSBROKER_SERVER__PATH): must begin with / and hold only visible ASCII characters (others as %XX), no ? and no #",
    ),
    (
        "WSBROKER_LIMITS__MAX_SIZE_FILE",
        "/none",
        "limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): /none cannot be read: No such file or directory",
    ),
    (
        "WSBROKER_LIMITS__MAX_SISE_FILE",
        "/none",
        "WSBROKER_LIMITS__MAX_SISE_FILE: there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE_FILE?",
    ),
    (
        "WSBROKER_SERVER__ADMIN",
        "0.0.0.0:1",
        "server.admin (WSBROKER_SERVER__ADMIN): 0.0.0.0:1 can be reached from other machines, and everybody is allowed; configure an API key ([[keys]]), listen on 127.0.0.1:8766 or a Unix socket (unix:/path) behind a proxy, or write anonymous = true under [server] (WSBROKER_SERVER__ANONYMOUS=true) to allow it",
    ),
]


@pytest.fixture(autouse=True)
def nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration of this machine is read."""
    monkeypatch.setattr(sources, "DEFAULT_FILE", tmp_path / "none.toml")
    for name in [name for name in os.environ if name.startswith(sources.PREFIX)]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("line", "status", "said"), COMMAND_LINES)
def test_wrong_command_line(line: str, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(line.split(" ")), *capsys.readouterr()) == (status, "", f"wsbroker: {said}\n")


@pytest.mark.parametrize(("text", "said"), FILES)
def test_wrong_file(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text(text)
    line = said.replace("FILE", str(file))
    assert (main(["check", "--config", str(file)]), *capsys.readouterr()) == (78, "", f"wsbroker: {line}\n")


def test_every_mistake_is_reported_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text(
        "[server]\nlisten = [\n'nonsense',\n3,\n'127.0.0.1:1',\n'127.0.0.1:1',\n'0.0.0.0:1',\n]\n"
        "[[topics]]\nmatch = 'a..b'\nmax_queue = 0\n"
    )
    assert main(["check", "--config", str(file)]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(f"({file}:")[2].partition(")")[0] for line in lines] == ["4", "3", "6", "11", "7", "10"]


@pytest.mark.parametrize(("name", "value", "said"), VARIABLES)
def test_wrong_variable(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert (main(["check"]), *capsys.readouterr()) == (78, "", f"wsbroker: {said}\n")


def test_the_table_is_long() -> None:
    assert len(COMMAND_LINES) + len(FILES) + len(VARIABLES) >= 100


@pytest.mark.parametrize(("line", "status", "said"), COMMAND_LINES[:3])
async def test_process_says_the_same_of_a_command_line(line: str, status: int, said: str) -> None:
    assert await wsbroker(*line.split(" ")) == (status, "", f"wsbroker: {said}\n")


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize(("text", "said"), FILES[:6:2])
async def test_process_says_the_same_of_a_file(command: str, text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "wsbroker.toml"
    file.write_text(text)
    line = said.replace("FILE", str(file))
    assert await wsbroker(command, "--config", str(file)) == (78, "", f"wsbroker: {line}\n")


def test_usage_error_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", "--json"]) == 2
    assert json.loads(capsys.readouterr().err) == {"error": "usage", "message": "No such option '--json'"}
