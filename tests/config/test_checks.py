"""What is wrong with values on their own and together."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.config import load
from tests.config.reading import problems

# Together


@pytest.mark.parametrize(("given", "lacking"), [("certificate", "key"), ("key", "certificate")])
def test_certificate_and_key_need_each_other(given: str, lacking: str) -> None:
    assert problems(flags={f"server.{given}": "a.pem"}) == [
        f"server.{given} (--{given}): needs server.{lacking} beside it"
    ]
    server = load(None, {}, {"server.certificate": "a.pem", "server.key": "b.pem"}).server
    assert (server.certificate, server.key) == ("a.pem", "b.pem")


def test_max_queue_over_its_limit_is_a_mistake() -> None:
    environ = {"WSBROKER_LIMITS__MAX_QUEUE_LIMIT": "100"}
    assert problems(environ=environ) == [
        "limits.max_queue (default): 256 must not be more than "
        "limits.max_queue_limit (WSBROKER_LIMITS__MAX_QUEUE_LIMIT), which is 100"
    ]
    assert load(None, environ, {"limits.max_queue": 100}).limits.max_queue == 100


@pytest.mark.parametrize(
    "address", ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "broker.example:80", "[::ffff:192.0.2.1]:80"]
)
def test_anonymous_access_from_other_machines_must_be_configured(address: str) -> None:
    allow = "write anonymous = true under [server] (WSBROKER_SERVER__ANONYMOUS=true) to allow it"
    advice = f"or a Unix socket (unix:/path) behind a proxy, or {allow}"
    open_to_all = f"{address} can be reached from other machines, and everybody is allowed"
    tokens, key = "require tokens ([auth])", "configure an API key ([[keys]])"
    assert problems(flags={"server.listen": ["127.0.0.1:1", address]}) == [
        f"server.listen (--listen): {open_to_all}; {tokens}, listen on 127.0.0.1:8765 {advice}"
    ]
    assert problems(flags={"server.admin": address}) == [
        f"server.admin (--admin): {open_to_all}; {key}, listen on 127.0.0.1:8766 {advice}"
    ]
    assert load(None, {}, {"server.listen": [address], "server.anonymous": True}).server.listen == [address]


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:0", "127.9.9.9:1", "localhost:1", "a.localhost:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/x"],
)
def test_anonymous_access_on_loopback_is_the_default(address: str) -> None:
    assert load(None, {}, {"server.listen": [address]}).server.listen == [address]


KEY = "[[keys]]\nname = 'shop'\nhash = 'sha256:" + 64 * "0" + "'\nroles = ['publisher']\n"
ROLE = "[[roles]]\nname = 'publisher'\npublish = ['>']\n"


@pytest.mark.parametrize("flags", [{"auth.required": True}, {"server.anonymous": False}])
def test_required_identity_needs_something_that_identifies(flags: dict[str, object], file: Path) -> None:
    (problem,) = problems(flags=flags)
    (key,) = flags
    assert problem.startswith(f"{key} (")
    assert "nobody could connect" in problem
    file.write_text(KEY + ROLE)
    assert load(file, {}, flags).roles[0].publish == (">",)


@pytest.mark.parametrize("value", [True, False])
def test_anonymous_and_required_may_not_contradict_each_other(value: bool, file: Path) -> None:
    file.write_text(KEY + ROLE)
    shown = str(value).lower()
    assert problems(file, flags={"server.anonymous": value, "auth.required": value}) == [
        f"server.anonymous (--anonymous): {shown} contradicts auth.required, which is {shown} too"
    ]
    load(file, {}, {"server.anonymous": value, "auth.required": not value})


def test_other_machines_may_connect_where_clients_are_identified(file: Path) -> None:
    file.write_text(KEY + ROLE)
    flags = {"server.listen": ["0.0.0.0:80"], "server.admin": "0.0.0.0:81"}
    assert load(file, {}, flags).server.listen == ["0.0.0.0:80"]
    assert len(problems(file, flags={**flags, "auth.required": False})) == 1
    environ = {"WSBROKER_AUTH__KEY_FILE": "jwt.pub"}
    file.write_text(ROLE)
    assert ["server.admin" in problem for problem in problems(file, environ, flags)] == [True]


def test_keys_without_roles_are_a_mistake(file: Path) -> None:
    file.write_text(KEY)
    (problem,) = problems(file)
    assert problem.startswith("keys: allows nothing without [[roles]]")
    (problem,) = problems(flags={"auth.key_file": "jwt.pub"})
    assert problem.startswith("auth.key_file (--auth-key-file): allows nothing without [[roles]]")


def test_only_one_source_of_a_key_may_be_set(file: Path) -> None:
    file.write_text(ROLE)
    assert problems(file, flags={"auth.key_file": "a", "auth.key": "b"}) == [
        "auth.key_file (--auth-key-file): only one of auth.key_file and auth.key may be set"
    ]


def test_algorithms_and_secrets_must_fit(file: Path) -> None:
    file.write_text(ROLE)
    assert problems(file, flags={"auth.secret": "x" * 32}) == [
        "auth.secret (--auth-secret): is for HS256, HS384 and HS512, and auth.algorithms has none of these"
    ]
    assert problems(file, flags={"auth.key_file": "a", "auth.algorithms": ["HS256", "EdDSA"]}) == [
        "auth.algorithms (--auth-algorithms): HS256 needs auth.secret_file, the secret that it is signed with"
    ]


def test_secrets_are_shown_in_no_message(file: Path) -> None:
    file.write_text("[auth]\nsecret = 4711\n[[keys]]\nname = 'a'\nhash = 4711\nroles = ['r']\n" + ROLE)
    assert "4711" not in "".join(problems(file))
    file.write_text("[[keys]]\nname = 'a'\nhash = 'wsb_hidden'\nroles = ['r']\n" + ROLE)
    assert problems(file) == [
        f"keys[1].hash ({file}:3): is an API key itself; here stands its hash, which `wsbroker key make` prints with it"
    ]
    file.write_text("[[keys]]\nname = 'a'\nhash = 'hidden'\nroles = ['r']\n" + ROLE)
    assert problems(file) == [
        f"keys[1].hash ({file}:3): is no hash as `wsbroker key make` prints it, sha256: and 64 hexadecimal digits"
    ]


# On their own


def test_each_invalid_address_is_reported() -> None:
    assert problems(flags={"server.listen": ["nonsense", "127.0.0.1:1", "127.0.0.1:1", "systemd:ws"]}) == [
        "server.listen (--listen): `nonsense` is no address: "
        "it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
        "server.listen (--listen): `127.0.0.1:1` is listed twice",
        "server.listen (--listen): `systemd:ws` is no address: "
        "it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
    ]


@pytest.mark.parametrize("path", ["/", "/ws", "/a/b-c_d.e~f", "/%C3%A9"])
def test_valid_paths_are_accepted(path: str) -> None:
    assert load(None, {}, {"server.path": path}).server.path == path


@pytest.mark.parametrize("path", ["", "ws", "/a b", "/é", "/a?b", "/a#b", "/a\n", "/healthz"])
def test_invalid_paths_are_refused(path: str) -> None:
    (problem,) = problems(flags={"server.path": path})
    assert problem.startswith("server.path (--path): must ")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("unix_mode", "", 'must be three octal digits, like "660", not ""'),
        ("unix_mode", "rw", 'must be three octal digits, like "660", not "rw"'),
        ("unix_mode", "888", 'must be three octal digits, like "660", not "888"'),
        ("unix_mode", "1660", 'must be three octal digits, like "660", not "1660"'),
        ("unix_group", "no such group", "there is no group `no such group` on this machine"),
        ("unix_group", "a\nb", "there is no group `a\\nb` on this machine"),
        ("unix_group", "\0", "there is no group `\\x00` on this machine"),
        ("unix_group", "", "there is no group `` on this machine"),
    ],
)
def test_invalid_mode_or_group_of_unix_sockets_is_refused(key: str, value: str, problem: str) -> None:
    (found,) = problems(flags={f"server.{key}": value})
    assert found.endswith(f": {problem}")


def test_mode_and_group_of_unix_sockets_are_accepted() -> None:
    for mode in ("660", "0666", "600"):
        assert load(None, {"WSBROKER_SERVER__UNIX_MODE": mode}, {}).server.unix_mode == mode
    for group in ("root", "0", "4242"):
        assert load(None, {"WSBROKER_SERVER__UNIX_GROUP": group}, {}).server.unix_group == group


def test_networks_of_the_proxy_protocol_may_name_unix_sockets() -> None:
    given = ["unix", "10.0.0.0/8"]
    assert load(None, {}, {"server.proxy_protocol": given}).server.proxy_protocol == given
    (problem,) = problems(flags={"server.proxy_protocol": ["unix:"]})
    assert "is no network" in problem


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "https://a.example",
        "http://a.example:8080",
        "https://A.example:443",
        "http://[::1]:3000",
        "http://127.0.0.1",
        "chrome-extension://abcdef",
        "http://xn--caf-dma.example",
        "https://café.example",
        "https://a.example/",
        "https://*.example",
        "https://*.a.example:8443",
        "file://",
        "qrc://",
        "capacitor://localhost",
        "http://[fe80::1%25eth0]",
    ],
)
def test_valid_origins_are_accepted(origin: str) -> None:
    assert load(None, {}, {"server.origins": [origin]}).server.origins == [origin]


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "a.example",
        "https://",
        "https://a.example//",
        "https://a.example/x",
        "https://*",
        "https://*.",
        "https://a*.example",
        "https://a.*.example",
        "https://*.*.example",
        "https://u@a.example",
        "https://a.example:0",
        "https://a.example:65536",
        "https://a..é",
        "*.example",
        "a b://c",
        "//a",
        "https://a..example",
        "https://.example",
        "https://a\\b.example",
        "https://a%20b.example",
        "http://[::::]",
        "http://[1.2.3.4]",
    ],
)
def test_invalid_origins_are_refused(origin: str) -> None:
    assert problems(flags={"server.origins": [origin]}) == [
        f"server.origins (--origins): `{origin}` is no origin: "
        "it must be scheme://host or scheme://host:port, without a path; "
        "https://*.example.com stands for any subdomain"
    ]
