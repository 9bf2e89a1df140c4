"""The configuration: layers, mistakes, and the documents that follow from it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import config, messages
from broker.config import Address, Config, Limits, Log, Server, TopicRule, default_toml, load, parse_address, schema
from broker.errors import ConfigError
from broker.overflow import OVERFLOWS
from broker.rules import Rules

DOCUMENTATION = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")

SECTIONS: dict[str, type[msgspec.Struct]] = {"server": Server, "limits": Limits, "log": Log}
KEYS = [f"{section}.{name}" for section, struct in SECTIONS.items() for name in struct.__struct_fields__]


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the configuration of the machine that it runs on."""
    path = tmp_path / "etc" / "wsbroker.toml"
    monkeypatch.setattr(config, "DEFAULT_FILE", path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "wsbroker.toml"


def problems(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(file, environ or {}, flags or {})
    return raised.value.problems


def setting(loaded: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(loaded, section), name)


def reload_of(section: str, name: str) -> config.Reload:
    """What the JSON Schema says about a reload."""
    struct = SECTIONS.get(section, TopicRule)
    found: config.Reload = schema()["$defs"][struct.__name__]["properties"][name]["x-reload"]
    return found


def shown_reload(section: str, name: str) -> str:
    return reload_of(section, name).replace("_", " ")


class TestLayers:
    def test_empty_configuration_has_the_defaults(self) -> None:
        assert load(None, {}, {}) == Config()

    def test_the_defaults_are_those_of_the_design(self) -> None:
        assert Config().server == Server(
            listen=["127.0.0.1:8765"],
            path="/",
            origins=[],
            anonymous=None,
            block="local",
            engine="memory",
            certificate=None,
            key=None,
            compression=False,
        )
        assert Config().limits == Limits(
            max_size=1024 * 1024,
            max_fragments=4096,
            max_connections=None,
            max_subscriptions=1000,
            max_queue=256,
            max_queue_limit=65536,
            max_outbox=4 * 1024 * 1024,
            max_answers=1024 * 1024,
            max_inflight=64,
            max_depth=64,
            open_timeout=10,
            ping_interval=25,
            ping_timeout=10,
            close_timeout=5,
            block_timeout=5,
            publish_rate=0,
            publish_burst=100,
            drain_timeout=10,
            reconnect_spread=5,
            notsent_lowat=16384,
        )
        assert Config().log == Log("text", "info")

    def test_file_overrides_the_defaults(self, file: Path) -> None:
        file.write_text('[limits]\nmax_size = 65536\nopen_timeout = 3\n[log]\nlevel = "debug"\n')
        loaded = load(file, {}, {})
        assert loaded.limits == msgspec.structs.replace(Limits(), max_size=65536, open_timeout=3.0)
        assert loaded.log == Log(level="debug")

    def test_environment_overrides_the_file(self, file: Path) -> None:
        file.write_text("[limits]\nmax_size = 65536\nmax_depth = 10\n")
        limits = load(file, {"WSBROKER_LIMITS__MAX_SIZE": "100"}, {}).limits
        assert (limits.max_size, limits.max_depth) == (100, 10)

    def test_flags_override_the_environment(self, file: Path) -> None:
        file.write_text('[log]\nlevel = "debug"\n')
        environ = {"WSBROKER_LOG__LEVEL": "error", "WSBROKER_LOG__FORMAT": "json"}
        assert load(file, environ, {"log.level": "warning"}).log == Log("json", "warning")

    def test_absent_flags_override_nothing(self) -> None:
        flags = {"log.level": None, "server.listen": ()}
        assert load(None, {"WSBROKER_LOG__LEVEL": "error"}, flags) == Config(log=Log(level="error"))

    def test_a_list_is_replaced_as_a_whole(self, file: Path) -> None:
        file.write_text('[server]\nlisten = ["127.0.0.1:1", "127.0.0.1:2"]\n')
        assert load(file, {}, {"server.listen": ("unix:/run/x",)}).server.listen == ["unix:/run/x"]

    def test_the_default_file_is_read_where_it_exists(self, no_default_file: Path, file: Path) -> None:
        no_default_file.parent.mkdir()
        no_default_file.write_text("[limits]\nmax_depth = 5\n")
        assert load(None, {}, {}).limits.max_depth == 5
        file.write_text("")
        assert load(file, {}, {}) == Config()  # but not if another one is asked for

    @given(
        st.dictionaries(
            st.sampled_from(["max_size", "max_depth", "max_outbox"]),
            st.tuples(*[st.none() | st.integers(4096, 9999)] * 3),
        )
    )
    def test_last_layer_with_a_value_applies(self, given: dict[str, tuple[int | None, ...]]) -> None:
        # max_depth allows less than the others.
        given = {
            name: tuple(v and (v % 500 + 2 if name == "max_depth" else v) for v in row) for name, row in given.items()
        }
        path = config.DEFAULT_FILE
        path.parent.mkdir(exist_ok=True)
        path.write_text("[limits]\n" + "".join(f"{name} = {row[0]}\n" for name, row in given.items() if row[0]))
        environ = {f"WSBROKER_LIMITS__{name.upper()}": str(row[1]) for name, row in given.items() if row[1]}
        flags = {f"limits.{name}": row[2] for name, row in given.items()}
        limits = load(None, environ, flags).limits
        for name in ("max_size", "max_depth", "max_outbox"):
            said = [value for value in given.get(name, ()) if value]
            assert getattr(limits, name) == (said[-1] if said else getattr(Limits(), name))


class TestEnvironment:
    @pytest.mark.parametrize(
        ("variable", "text", "value"),
        [
            ("LIMITS__MAX_SIZE", "4096", 4096),
            ("LIMITS__PING_INTERVAL", "0", 0.0),
            ("LIMITS__PING_INTERVAL", "2.5", 2.5),
            ("LIMITS__MAX_CONNECTIONS", "10", 10),
            ("LIMITS__MAX_CONNECTIONS", "null", None),
            ("SERVER__ANONYMOUS", "true", True),
            ("SERVER__PATH", "/ws", "/ws"),
            ("SERVER__PATH", "/1", "/1"),
            ("SERVER__LISTEN", "127.0.0.1:1, [::1]:2,unix:/x", ["127.0.0.1:1", "[::1]:2", "unix:/x"]),
            ("SERVER__ORIGINS", "", []),
            ("SERVER__ORIGINS", "*", ["*"]),
            ("LOG__FORMAT", "json", "json"),
        ],
    )
    def test_environment_text_is_parsed(self, variable: str, text: str, value: object) -> None:
        loaded = load(None, {f"WSBROKER_{variable}": text}, {})
        assert setting(loaded, variable.lower().replace("__", ".")) == value

    def test_a_variable_may_name_a_file_that_holds_the_value(self, tmp_path: Path) -> None:
        (tmp_path / "origins").write_text("https://a.example, https://b.example\n")
        environ = {"WSBROKER_SERVER__ORIGINS_FILE": str(tmp_path / "origins")}
        assert load(None, environ, {}).server.origins == ["https://a.example", "https://b.example"]

    def test_unreadable_file_of_a_file_variable_is_a_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "bytes").write_bytes(b"\xff")
        for name in ("nothing", "bytes"):
            (problem,) = problems(environ={"WSBROKER_LIMITS__MAX_SIZE_FILE": str(tmp_path / name)})
            assert problem.startswith("limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): ")
            assert "cannot be read" in problem

    def test_a_value_and_a_file_at_once_are_a_mistake(self) -> None:
        environ = {"WSBROKER_LIMITS__MAX_SIZE": "100", "WSBROKER_LIMITS__MAX_SIZE_FILE": "/x"}
        assert problems(environ=environ) == [
            "limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): WSBROKER_LIMITS__MAX_SIZE is set too, "
            "only one of the two may be"
        ]

    def test_unrelated_variables_are_ignored(self) -> None:
        environ = {
            "WSBROKER_URL": "ws://x",
            "WSBROKER_PORT": "tcp://10.0.0.1:8765",  # as Kubernetes sets it for a service of this name
            "WSBROKER_SERVER_PORT": "tcp://10.0.0.1:8765",
            "OTHER_LIMITS__MAX_SIZE": "x",
            "PATH": "/bin",
        }
        assert load(None, environ, {}) == Config()

    def test_variable_with_a_single_underscore_is_a_mistake(self) -> None:
        assert problems(environ={"WSBROKER_LIMITS_MAX_SIZE": "100"}) == [
            "WSBROKER_LIMITS_MAX_SIZE (environment): there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?"
        ]

    def test_variable_without_a_section_is_a_mistake(self) -> None:
        assert problems(environ={"WSBROKER_LISTEN": "127.0.0.1:9", "WSBROKER_PORT": "tcp://10.0.0.1:80"}) == [
            "WSBROKER_LISTEN (environment): there is no such key; did you mean WSBROKER_SERVER__LISTEN?"
        ]

    def test_an_unknown_key_is_a_mistake(self) -> None:
        assert problems(environ={"WSBROKER_LIMITS__MAX_SISE": "1", "WSBROKER_NOTHING__LIKE_IT": "1"}) == [
            "WSBROKER_LIMITS__MAX_SISE (environment): there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?",
            "WSBROKER_NOTHING__LIKE_IT (environment): there is no such key",
        ]

    def test_invalid_utf8_in_a_variable_is_reported(self) -> None:
        (problem,) = problems(environ={"WSBROKER_LIMITS__MAX_SIZE": "\udcff"})
        assert problem.startswith("limits.max_size (WSBROKER_LIMITS__MAX_SIZE): must be an integer")


class TestMistakes:
    def test_mistakes_of_all_layers_are_reported(self, file: Path) -> None:
        file.write_text(
            'max_size = 1\n[limit]\nx = 1\n[limits]\nmax_sise = 1\nmax_depth = "x"\n[log]\nlevel = "loud"\n'
        )
        environ = {"WSBROKER_LIMITS__OPEN_TIMEOUT": "10s", "WSBROKER_LIMITS__MAX_DEPTH": "5"}
        assert problems(file, environ, {"limits.max_queue": 0}) == [
            f"max_size ({file}): there is no such key; did you mean limits.max_size?",
            f"limit ({file}): there is no such section; did you mean limits?",
            f"limits.max_sise ({file}): there is no such key; did you mean limits.max_size?",
            f'limits.max_depth ({file}): must be an integer from 2 to 512, not "x"',
            f'log.level ({file}): must be one of "debug", "info", "warning", "error", not "loud"',
            "limits.open_timeout (WSBROKER_LIMITS__OPEN_TIMEOUT): "
            'must be a number from 0.1 to 3600 (seconds), not "10s"',
            "limits.max_queue (command line): must be an integer from 1 to 16777216, not 0",
        ]

    @pytest.mark.parametrize(
        ("toml", "problem"),
        [
            ("limits.max_size = true", "must be an integer from 64 to 1073741824 (bytes), not true"),
            ("limits.max_size = 1.5", "must be an integer from 64 to 1073741824 (bytes), not 1.5"),
            ('limits.max_size = "1000"', 'must be an integer from 64 to 1073741824 (bytes), not "1000"'),
            ("limits.max_size = 63", "must be an integer from 64 to 1073741824 (bytes), not 63"),
            ("limits.max_connections = 0", "must be an integer from 1 to 10000000, not 0"),
            ("limits.ping_interval = nan", "must be a number from 0 to 86400 (seconds), not NaN"),
            ("limits.ping_interval = inf", "must be a number from 0 to 86400 (seconds), not Infinity"),
            ("limits.ping_interval = -1", "must be a number from 0 to 86400 (seconds), not -1"),
            ("limits.drain_timeout = 2024-01-01", 'must be a number from 0 to 86400 (seconds), not "2024-01-01"'),
            ("limits.max_depth.x = 1", 'must be an integer from 2 to 512, not {"x": 1}'),
            ('server.listen = "127.0.0.1:1"', 'must be a list of strings, not empty, not "127.0.0.1:1"'),
            ("server.listen = []", "must be a list of strings, not empty, not []"),
            ("server.listen = [1]", "must be a list of strings, not empty, not [1]"),
            ("server.anonymous = 1", "must be true or false, not 1"),
            ('server.engine = "redis"', 'must be "memory", not "redis"'),
            (f'log.format = "{"x" * 500}"', f'must be one of "text", "json", not "{"x" * 59}…'),
        ],
    )
    def test_invalid_value_error_states_what_is_allowed(self, file: Path, toml: str, problem: str) -> None:
        file.write_text(toml)
        key = toml.partition(" ")[0].removesuffix(".x")
        assert problems(file) == [f"{key} ({file}): {problem}"]

    def test_section_must_be_a_table(self, file: Path) -> None:
        file.write_text("limits = 5")
        assert problems(file) == [f"limits ({file}): must be a table, [limits]"]

    def test_file_that_is_not_toml_is_reported(self, file: Path) -> None:
        file.write_text("[limits\n")
        (problem,) = problems(file)
        assert problem.startswith(f"{file}: is not TOML: ")
        assert "line 1" in problem

    def test_file_that_is_not_utf8_is_reported(self, file: Path) -> None:
        file.write_bytes(b"\xff\xfe")
        (problem,) = problems(file)
        assert problem.startswith(f"{file}: is not TOML: ")

    def test_missing_file_is_reported(self, file: Path) -> None:
        assert problems(file) == [f"{file}: cannot be read: No such file or directory"]
        assert problems(file.parent) == [f"{file.parent}: cannot be read: Is a directory"]

    def test_invalid_value_is_reported_even_if_overridden(self, file: Path) -> None:
        file.write_text("[limits]\nmax_size = 1\n")
        assert len(problems(file, flags={"limits.max_size": 1000})) == 1

    @given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
    def test_any_value_is_accepted_or_reported_with_its_key(self, value: object) -> None:
        for key in KEYS:
            try:
                load(None, {}, {key: value})
            except ConfigError as error:
                complaints = error.problems
            else:
                complaints = []
            assert all(f"{key} (command line)" in complaint for complaint in complaints)
            assert all("\n" not in complaint for complaint in complaints)


class TestContradictions:
    @pytest.mark.parametrize(("given", "lacking"), [("certificate", "key"), ("key", "certificate")])
    def test_certificate_and_key_need_each_other(self, given: str, lacking: str) -> None:
        assert problems(flags={f"server.{given}": "a.pem"}) == [
            f"server.{given} (command line): needs server.{lacking} beside it"
        ]
        server = load(None, {}, {"server.certificate": "a.pem", "server.key": "b.pem"}).server
        assert (server.certificate, server.key) == ("a.pem", "b.pem")

    def test_max_queue_over_its_limit_is_a_mistake(self) -> None:
        environ = {"WSBROKER_LIMITS__MAX_QUEUE_LIMIT": "100"}
        assert problems(environ=environ) == [
            "limits.max_queue (default): 256 must not be more than "
            "limits.max_queue_limit (WSBROKER_LIMITS__MAX_QUEUE_LIMIT), which is 100"
        ]
        assert load(None, environ, {"limits.max_queue": 100}).limits.max_queue == 100

    @pytest.mark.parametrize(
        "address", ["0.0.0.0:80", "[::]:80", "192.0.2.1:80", "broker.example:80", "[::ffff:192.0.2.1]:80"]
    )
    def test_anonymous_access_from_other_machines_must_be_configured(self, address: str) -> None:
        assert problems(flags={"server.listen": ["127.0.0.1:1", address]}) == [
            f"server.listen (command line): refuses to listen beyond loopback or a Unix socket ({address}) "
            "while everybody is allowed, unless server.anonymous = true"
        ]
        assert load(None, {}, {"server.listen": [address], "server.anonymous": True}).server.listen == [address]

    @pytest.mark.parametrize(
        "address",
        ["127.0.0.1:0", "127.9.9.9:1", "localhost:1", "a.localhost:1", "[::1]:1", "[::ffff:127.0.0.1]:1", "unix:/x"],
    )
    def test_anonymous_access_on_loopback_is_the_default(self, address: str) -> None:
        assert load(None, {}, {"server.listen": [address]}).server.listen == [address]

    def test_anonymous_false_is_not_supported_yet(self) -> None:
        (problem,) = problems(flags={"server.anonymous": False})
        assert problem.startswith("server.anonymous (command line): false is not supported yet")


class TestChecks:
    def test_each_invalid_address_is_reported(self) -> None:
        assert problems(flags={"server.listen": ["nonsense", "127.0.0.1:1", "127.0.0.1:1", "systemd:ws"]}) == [
            "server.listen (command line): 127.0.0.1:1 is listed twice",
            "server.listen (command line): `nonsense` is no address: "
            "it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
            "server.listen (command line): `systemd:ws` is no address: "
            "it must be host:port, [v6]:port, unix:/path or systemd, the port 0 to 65535",
        ]

    @pytest.mark.parametrize("path", ["/", "/ws", "/a/b-c_d.e~f", "/%C3%A9"])
    def test_valid_paths_are_accepted(self, path: str) -> None:
        assert load(None, {}, {"server.path": path}).server.path == path

    @pytest.mark.parametrize("path", ["", "ws", "/a b", "/é", "/a?b", "/a#b", "/a\n", "/healthz"])
    def test_invalid_paths_are_refused(self, path: str) -> None:
        (problem,) = problems(flags={"server.path": path})
        assert problem.startswith("server.path (command line): must ")

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
        ],
    )
    def test_valid_origins_are_accepted(self, origin: str) -> None:
        assert load(None, {}, {"server.origins": [origin]}).server.origins == [origin]

    @pytest.mark.parametrize(
        "origin",
        [
            "",
            "a.example",
            "https://",
            "https://a.example/",
            "https://a.example/x",
            "https://*.example",
            "https://u@a.example",
            "//a",
        ],
    )
    def test_invalid_origins_are_refused(self, origin: str) -> None:
        assert problems(flags={"server.origins": [origin]}) == [
            f"server.origins (command line): `{origin}` is no origin: "
            "it must be scheme://host or scheme://host:port, without a path"
        ]


class TestParseAddress:
    @pytest.mark.parametrize(
        ("text", "address"),
        [
            ("127.0.0.1:8765", Address("127.0.0.1", 8765)),
            ("localhost:0", Address("localhost", 0)),
            ("a-b.example.:65535", Address("a-b.example.", 65535)),
            ("[::1]:80", Address("::1", 80)),
            ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
            ("unix:/run/wsbroker/ws.sock", Address(path="/run/wsbroker/ws.sock")),
            ("unix:/a:1", Address(path="/a:1")),
            ("systemd", Address(systemd=True)),
        ],
    )
    def test_address_round_trips(self, text: str, address: Address) -> None:
        assert parse_address(text) == address
        assert str(address) == text

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "must be host:port"),
            ("localhost", "must be host:port"),
            ("localhost:", "must be host:port"),
            ("localhost:http", "must be host:port"),
            ("localhost:-1", "must be host:port"),
            ("localhost:65536", "must be host:port"),
            ("localhost:٣", "must be host:port"),
            (":8765", "for every interface say 0.0.0.0 or [::]"),
            ("*:8765", "for every interface say 0.0.0.0 or [::]"),
            ("a b:1", "the host must be a name or an IP address"),
            ("-a:1", "the host must be a name or an IP address"),
            ("ws://a:1", "an IPv6 address is put in brackets"),
            ("::1:80", "an IPv6 address is put in brackets"),
            ("[::g]:80", "must be an IPv6 address"),
            ("[127.0.0.1]:80", "must be an IPv6 address"),
            ("unix:", "absolute path"),
            ("unix:run/x", "absolute path"),
            ("unix:/" + "x" * 107, "at most 107 bytes"),
            ("unix:/a\0b", "absolute path"),
        ],
    )
    def test_invalid_address_is_refused(self, text: str, why: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(why)):
            parse_address(text)

    @given(st.ip_addresses(), st.integers(0, 65535))
    def test_every_ip_address_is_accepted(self, ip: object, port: int) -> None:
        text = f"[{ip}]:{port}" if ":" in str(ip) else f"{ip}:{port}"
        assert str(parse_address(text)) == text


class TestDocuments:
    def test_the_commented_file_is_the_default_configuration(self, file: Path) -> None:
        file.write_text(default_toml())
        assert load(file, {}, {}) == Config()

    def test_the_commented_file_has_every_key(self) -> None:
        text = default_toml()
        document = tomllib.loads(text)
        for key in KEYS:
            section, name = key.split(".")
            if setting(Config(), key) is None:
                assert re.search(rf"^# {name} = \S", text, re.MULTILINE)
            else:
                assert document[section][name] == setting(Config(), key)

    def test_examples_in_the_commented_file_are_valid(self, file: Path) -> None:
        file.write_text(re.sub(r"^# (\w+ = )", r"\1", default_toml(), flags=re.MULTILINE))
        loaded = load(file, {}, {})
        assert (loaded.server.anonymous, loaded.limits.max_connections) == (True, 10_000)

    def test_the_schema_has_every_key_with_its_range_and_default(self) -> None:
        definitions = schema()["$defs"]
        for key in KEYS:
            section, name = key.split(".")
            property_ = definitions[SECTIONS[section].__name__]["properties"][name]
            assert property_["description"]
            assert property_["default"] == setting(Config(), key)
        assert definitions["Limits"]["properties"]["max_size"]["minimum"] == 64
        assert all(definition["additionalProperties"] is False for definition in definitions.values())

    @pytest.mark.parametrize("key", KEYS)
    def test_each_key_is_documented_with_its_default_and_what_it_allows(self, key: str) -> None:
        default = setting(Config(), key)
        shown = "left out" if default is None else f"`{msgspec.json.encode(default).decode()}`"
        allowed = re.search(r"must be (.*?)( \(\w+\))?, not \{", problems(flags={key: {}})[0])
        assert allowed
        section, name = key.split(".")
        assert f"| `{key}` | {shown} | {allowed[1]} | {shown_reload(section, name)} |" in DOCUMENTATION

    def test_docs_have_no_unknown_keys(self) -> None:
        assert re.findall(r"^\| `(\w+\.\w+)` \|", DOCUMENTATION, re.MULTILINE) == KEYS

    def test_example_file_in_the_docs_is_valid(self, file: Path) -> None:
        (example,) = re.findall(r"```toml\n(.*?)```", DOCUMENTATION, re.DOTALL)
        file.write_text(example)
        assert load(file, {}, {}).limits.max_size == 65536

    def test_example_errors_in_the_docs_are_real(self, file: Path) -> None:
        file.write_text("[limits]\nmax_sise = 1\n")
        said = problems(file, {"WSBROKER_LIMITS__OPEN_TIMEOUT": "10s"})
        assert "\n".join(said).replace(str(file), "wsbroker.toml") in DOCUMENTATION


class TestTopics:
    def test_rules_are_read_from_the_file(self, file: Path) -> None:
        file.write_text('[[topics]]\nmatch = "a.>"\nmax_age = 2\n[[topics]]\nmatch = "b"\noverflows = ["close"]\n')
        assert load(file, {}, {}).topics == [TopicRule("a.>", max_age=2.0), TopicRule("b", overflows=["close"])]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("topics = 1", ["topics (F): must be tables, each [[topics]]"]),
            ("[topics]\nmatch = 'a'", ["topics (F): must be tables, each [[topics]]"]),
            ("[[topics]]", ["topics[1].match (F): is missing: the topic or pattern that the rule is for"]),
            (
                "[[topics]]\nmatch='a'\n[[topics]]\nmatch='b'\nmax_ques=1",
                ["topics[2].max_ques (F): there is no such key; did you mean max_queue?"],
            ),
            (
                "[[topics]]\nmatch='a'\nmax_age='1s'\nmax_queue=0",
                [
                    'topics[1].max_age (F): must be a number from 0.01 to 31536000 (seconds), not "1s"',
                    "topics[1].max_queue (F): must be an integer from 1 to 16777216, not 0",
                ],
            ),
        ],
    )
    def test_mistakes_name_their_rule(self, file: Path, text: str, said: list[str]) -> None:
        file.write_text(text)
        assert problems(file) == [line.replace("(F)", f"({file})") for line in said]

    def test_each_key_of_a_rule_is_documented_with_what_it_allows(self, file: Path) -> None:
        for name in TopicRule.__struct_fields__:
            file.write_text(f"[[topics]]\nmatch = 'a'\n{name} = {{}}\n".replace("match = 'a'\nmatch", "match"))
            allowed = re.search(r"must be (.*?)( \(\w+\))?, not \{", problems(file)[0])
            assert allowed
            assert f"| `{name}` | {allowed[1]} | {shown_reload('topics', name)} |" in DOCUMENTATION

    def test_commented_file_says_what_a_reload_changes(self) -> None:
        comments = re.sub(r"\n# (?!# |\w+ = )", " ", default_toml())
        for section, struct in SECTIONS.items():
            for name in struct.__struct_fields__:
                words = config.RELOADS[reload_of(section, name)]
                assert re.search(rf"{re.escape(words)}\n(# )?{name} = ", comments), name

    def test_restart_keys_follow_from_the_fields(self) -> None:
        assert set(config.RESTART_KEYS) == {key for key in KEYS if reload_of(*key.split(".")) == "restart"}
        # Listeners, handshake answers, the keep-alive sweep and sockets are set up once.
        assert {"server.listen", "limits.ping_interval", "limits.notsent_lowat"} <= {*config.RESTART_KEYS}

    def test_rule_in_the_commented_file_is_valid(self, file: Path) -> None:
        file.write_text(re.sub(r"^# # (\w+ = |\[\[)", r"\1", default_toml(), flags=re.MULTILINE))
        (rule,) = load(file, {}, {}).topics
        assert None not in msgspec.structs.astuple(rule)
        assert Rules([rule], Limits()).policy("prices.a").overflow == "latest"

    def test_the_policies_are_those_of_the_protocol(self) -> None:
        protocol = msgspec.json.schema(messages.Subscribe)["$defs"]["Subscribe"]["properties"]["overflow"]["enum"]
        assert sorted(protocol) == sorted(OVERFLOWS)
