"""From where values come, in which order, and what of them is reported."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.config import Config, Limits, Log, Reading, TopicRule, load, sources
from broker.config.sources import CLIENT_VARIABLES, flag_of
from broker.errors import ConfigError
from tests.cli.commands import commands
from tests.config.reading import KEYS, problems, setting

# Layers


def test_empty_configuration_has_the_defaults() -> None:
    assert load(None, {}, {}) == Config()


def test_file_overrides_the_defaults(file: Path) -> None:
    file.write_text('[limits]\nmax_size = 65536\nopen_timeout = 3\n[log]\nlevel = "debug"\n')
    loaded = load(file, {}, {})
    assert loaded.limits == msgspec.structs.replace(Limits(), max_size=65536, open_timeout=3.0)
    assert loaded.log == Log(level="debug")


def test_environment_overrides_the_file(file: Path) -> None:
    file.write_text("[limits]\nmax_size = 65536\nmax_depth = 10\n")
    limits = load(file, {"WSBROKER_LIMITS__MAX_SIZE": "100"}, {}).limits
    assert (limits.max_size, limits.max_depth) == (100, 10)


def test_flags_override_the_environment(file: Path) -> None:
    file.write_text('[log]\nlevel = "debug"\n')
    environ = {"WSBROKER_LOG__LEVEL": "error", "WSBROKER_LOG__FORMAT": "json"}
    assert load(file, environ, {"log.level": "warning"}).log == Log("json", "warning")


def test_absent_flags_override_nothing() -> None:
    flags = {"log.level": None, "server.listen": ()}
    assert load(None, {"WSBROKER_LOG__LEVEL": "error"}, flags) == Config(log=Log(level="error"))


def test_a_list_is_replaced_as_a_whole(file: Path) -> None:
    file.write_text('[server]\nlisten = ["127.0.0.1:1", "127.0.0.1:2"]\n')
    assert load(file, {}, {"server.listen": ("unix:/run/x",)}).server.listen == ["unix:/run/x"]


def test_the_default_file_is_read_where_it_exists(no_default_file: Path, file: Path) -> None:
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
def test_last_layer_with_a_value_applies(given: dict[str, tuple[int | None, ...]]) -> None:
    # max_depth allows less than the others.
    given = {name: tuple(v and (v % 500 + 2 if name == "max_depth" else v) for v in row) for name, row in given.items()}
    path = sources.DEFAULT_FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text("[limits]\n" + "".join(f"{name} = {row[0]}\n" for name, row in given.items() if row[0]))
    environ = {f"WSBROKER_LIMITS__{name.upper()}": str(row[1]) for name, row in given.items() if row[1]}
    flags = {f"limits.{name}": row[2] for name, row in given.items()}
    limits = load(None, environ, flags).limits
    for name in ("max_size", "max_depth", "max_outbox"):
        said = [value for value in given.get(name, ()) if value]
        assert getattr(limits, name) == (said[-1] if said else getattr(Limits(), name))


# Environment


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
def test_environment_text_is_parsed(variable: str, text: str, value: object) -> None:
    loaded = load(None, {f"WSBROKER_{variable}": text}, {})
    assert setting(loaded, variable.lower().replace("__", ".")) == value


def test_a_variable_may_name_a_file_that_holds_the_value(tmp_path: Path) -> None:
    (tmp_path / "origins").write_text("https://a.example, https://b.example\n")
    environ = {"WSBROKER_SERVER__ORIGINS_FILE": str(tmp_path / "origins")}
    assert load(None, environ, {}).server.origins == ["https://a.example", "https://b.example"]


def test_unreadable_file_of_a_file_variable_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name in ("nothing", "bytes"):
        (problem,) = problems(environ={"WSBROKER_LIMITS__MAX_SIZE_FILE": str(tmp_path / name)})
        assert problem.startswith("limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): ")
        assert "cannot be read" in problem


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_reload_reads_no_pipe_and_no_endless_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    reason = "it is a pipe or a terminal, and not a file" if name == "pipe" else "it is larger than 4 MiB"
    environ = {"WSBROKER_LIMITS__MAX_SIZE_FILE": str(path)}
    assert [str(problem) for problem in Reading(path, environ, {}, wait=False).problems] == [
        f"{path}: cannot be read: {reason}",
        f"limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): {path} cannot be read: {reason}",
    ]


def test_start_reads_a_pipe_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as pool:
        loaded = pool.submit(load, tmp_path / "pipe", {}, {})
        with (tmp_path / "pipe").open("w") as pipe:  # opens once there is a reader
            pipe.write("[limits]\n")
            pipe.flush()
            pipe.write("max_depth = 5\n")
        assert loaded.result().limits.max_depth == 5


def test_a_value_and_a_file_at_once_are_a_mistake() -> None:
    environ = {"WSBROKER_LIMITS__MAX_SIZE": "100", "WSBROKER_LIMITS__MAX_SIZE_FILE": "/x"}
    assert problems(environ=environ) == [
        "limits.max_size (WSBROKER_LIMITS__MAX_SIZE_FILE): WSBROKER_LIMITS__MAX_SIZE is set too, "
        "only one of the two may be"
    ]


def test_unrelated_variables_are_ignored() -> None:
    environ = {
        "WSBROKER_URL": "ws://x",
        "WSBROKER_PORT": "tcp://10.0.0.1:8765",  # as Kubernetes sets it for a service of this name
        "WSBROKER_SERVER_PORT": "tcp://10.0.0.1:8765",
        "WSBROKER_SERVICE_HOST": "10.0.0.1",
        "WSBROKER_SERVICE_PORT_WS": "8765",
        "WSBROKER_PORT_8765_TCP_ADDR": "10.0.0.1",
        "OTHER_LIMITS__MAX_SIZE": "x",
        "PATH": "/bin",
    }
    assert load(None, environ, {}) == Config()


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("WSBROKER_FOO", "1", None),
        ("WSBROKER_PORT", "8765", None),
        ("WSBROKER_MAXSIZE", "1", "WSBROKER_LIMITS__MAX_SIZE"),
        ("WSBROKER_LOGLEVEL", "debug", "WSBROKER_LOG__LEVEL"),
        ("WSBROKER_LIMITS__MAX_SISE_FILE", "/x", "WSBROKER_LIMITS__MAX_SIZE_FILE"),
    ],
)
def test_unknown_variable_is_a_mistake(name: str, value: str, nearest: str | None) -> None:
    hint = f"did you mean {nearest}?" if nearest else "`wsbroker config default` shows the settings"
    assert problems(environ={name: value}) == [f"{name}: there is no such key; {hint}"]


def test_variables_of_the_client_commands_are_known() -> None:
    read = {str(option.envvar) for _, command in commands() for option in command.params if option.envvar}
    assert read == CLIENT_VARIABLES


@pytest.mark.parametrize("form", ["max_depth = 5\n", "max_depth = 5\r\n"])
def test_byte_order_mark_is_ignored(file: Path, tmp_path: Path, form: str) -> None:
    file.write_bytes(b"\xef\xbb\xbf[limits]\n" + form.encode())
    (tmp_path / "value").write_bytes(b"\xef\xbb\xbf4096\r\n")
    limits = load(file, {"WSBROKER_LIMITS__MAX_SIZE_FILE": str(tmp_path / "value")}, {}).limits
    assert (limits.max_depth, limits.max_size) == (5, 4096)


def test_variable_with_a_single_underscore_is_a_mistake() -> None:
    assert problems(environ={"WSBROKER_LIMITS_MAX_SIZE": "100"}) == [
        "WSBROKER_LIMITS_MAX_SIZE: there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?"
    ]


def test_variable_without_a_section_is_a_mistake() -> None:
    assert problems(environ={"WSBROKER_LISTEN": "127.0.0.1:9", "WSBROKER_PORT": "tcp://10.0.0.1:80"}) == [
        "WSBROKER_LISTEN: there is no such key; did you mean WSBROKER_SERVER__LISTEN?"
    ]


def test_an_unknown_key_is_a_mistake() -> None:
    assert problems(environ={"WSBROKER_LIMITS__MAX_SISE": "1", "WSBROKER_NOTHING__LIKE_IT": "1"}) == [
        "WSBROKER_LIMITS__MAX_SISE: there is no such key; did you mean WSBROKER_LIMITS__MAX_SIZE?",
        "WSBROKER_NOTHING__LIKE_IT: there is no such key; `wsbroker config default` shows the settings",
    ]


def test_the_nearest_key_is_looked_for_a_hundred_times(file: Path) -> None:
    file.write_text("[log]\n" + "".join(f"levl{number} = 1\n" for number in range(200)))  # as a file of another program
    said = problems(file)
    assert [line.endswith("did you mean log.level?") for line in said] == [True] * 100 + [False] * 100


def test_invalid_utf8_in_a_variable_is_reported() -> None:
    (problem,) = problems(environ={"WSBROKER_LIMITS__MAX_SIZE": "\udcff"})
    assert problem.startswith("limits.max_size (WSBROKER_LIMITS__MAX_SIZE): must be an integer")


# Mistakes


def test_mistakes_of_all_layers_are_reported(file: Path) -> None:
    file.write_text('max_size = 1\n[limit]\nx = 1\n[limits]\nmax_sise = 1\nmax_depth = "x"\n[log]\nlevel = "loud"\n')
    environ = {"WSBROKER_LIMITS__OPEN_TIMEOUT": "10s", "WSBROKER_LIMITS__MAX_DEPTH": "5"}
    assert problems(file, environ, {"limits.max_queue": 0}) == [
        f"max_size ({file}:1): there is no such key; did you mean limits.max_size?",
        f"limit ({file}:2): there is no such section; did you mean limits?",
        f"limits.max_sise ({file}:5): there is no such key; did you mean limits.max_size?",
        f'limits.max_depth ({file}:6): must be an integer from 2 to 512, not "x"',
        f'log.level ({file}:8): must be one of "debug", "info", "warning", "error", not "loud"',
        'limits.open_timeout (WSBROKER_LIMITS__OPEN_TIMEOUT): must be a number from 0.1 to 3600 (seconds), not "10s"',
        "limits.max_queue (--limits-max-queue): must be an integer from 1 to 16777216, not 0",
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
        ("server.listen = [1]", "must be a string, not 1"),
        ("server.anonymous = 1", "must be true or false, not 1"),
        (
            'server.engine = "redis"',
            "must be memory, or sqlite:// and an absolute path, like sqlite:///var/lib/wsbroker/broker.db, not redis",
        ),
        (f'log.format = "{"x" * 500}"', f'must be one of "text", "json", not "{"x" * 59}…'),
    ],
)
def test_invalid_value_error_states_what_is_allowed(file: Path, toml: str, problem: str) -> None:
    file.write_text(toml)
    key = toml.partition(" ")[0].removesuffix(".x")
    assert problems(file) == [f"{key} ({file}:1): {problem}"]


def test_section_must_be_a_table(file: Path) -> None:
    file.write_text("limits = 5")
    assert problems(file) == [f"limits ({file}:1): must be a table, [limits]"]


def test_file_that_is_not_toml_is_reported(file: Path) -> None:
    file.write_text("[limits\n")
    assert problems(file) == [f"{file}:1:8: is not valid TOML: expected ']' at the end of a table declaration"]
    file.write_text('a = 1\nb = """\nx')
    assert problems(file) == [f"{file}:3:2: is not valid TOML: unterminated string"]


def test_file_that_is_not_utf8_is_reported(file: Path) -> None:
    file.write_bytes(b"[log]\n# \xff\xfe")
    assert problems(file) == [f"{file}:2:3: is not UTF-8: byte 0xff; save the file as UTF-8"]


def test_missing_file_is_reported(file: Path) -> None:
    assert problems(file) == [f"{file}: cannot be read: No such file or directory"]
    assert problems(file.parent) == [f"{file.parent}: cannot be read: Is a directory"]


def test_invalid_value_is_reported_even_if_overridden(file: Path) -> None:
    file.write_text("[limits]\nmax_size = 1\n")
    assert len(problems(file, flags={"limits.max_size": 1000})) == 1


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=3))
def test_any_value_is_accepted_or_reported_with_its_key(value: object) -> None:
    for key in KEYS:
        try:
            load(None, {}, {key: value})
        except ConfigError as error:
            complaints = list(map(str, error.problems))
        else:
            complaints = []
        assert all(f"{key} ({flag_of(key)})" in complaint for complaint in complaints)
        assert all("\n" not in complaint for complaint in complaints)


# Topic rules


def test_rules_are_read_from_the_file(file: Path) -> None:
    file.write_text('[[topics]]\nmatch = "a.>"\nmax_age = 2\n[[topics]]\nmatch = "b"\noverflows = ["close"]\n')
    assert load(file, {}, {}).topics == [TopicRule("a.>", max_age=2.0), TopicRule("b", overflows=["close"])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topics = 1", ["topics (F:1): must be tables, each [[topics]]"]),
        ("[topics]\nmatch = 'a'", ["topics (F:1): must be tables, each [[topics]]"]),
        (
            "[[topics]]",
            ['topics[1].match (F:1): is missing: the topic or pattern that the rule is for, like match = "prices.>"'],
        ),
        (
            "[[topics]]\nmatch='a'\n[[topics]]\nmatch='b'\nmax_ques=1",
            ["topics[2].max_ques (F:5): there is no such key; did you mean max_queue?"],
        ),
        (
            "[[topics]]\nmatch='a'\nmax_age='1s'\nmax_queue=0",
            [
                'topics[1].max_age (F:3): must be a number from 0.01 to 31536000 (seconds), not "1s"',
                "topics[1].max_queue (F:4): must be an integer from 1 to 16777216, not 0",
            ],
        ),
    ],
)
def test_mistakes_name_their_rule(file: Path, text: str, said: list[str]) -> None:
    file.write_text(text)
    assert problems(file) == [line.replace("(F:", f"({file}:") for line in said]
