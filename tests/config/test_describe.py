"""The documents that follow from the settings, and docs/configuration.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from broker.config import Config, Limits, Reading, load
from broker.config.describe import default_toml, schema
from broker.config.keys import KEYS as ALL_KEYS
from broker.config.keys import SECTIONS, TABLE_KEYS, TABLES
from broker.config.schema import RELOADS
from broker.errors import ConfigError
from broker.rules import Rules
from tests.config.reading import DOCUMENTATION, KEYS, problems, reload_of, setting, shown_reload


def test_the_commented_file_is_the_default_configuration(file: Path) -> None:
    file.write_text(default_toml())
    assert load(file, {}, {}) == Config()


def test_the_commented_file_has_every_key() -> None:
    text = default_toml()
    document = tomllib.loads(text)
    for key in KEYS:
        section, name = key.split(".")
        if setting(Config(), key) is None:
            assert re.search(rf"^# {name} = \S", text, re.MULTILINE)
        else:
            assert document[section][name] == setting(Config(), key)


def test_examples_in_the_commented_file_are_valid(file: Path) -> None:
    file.write_text(re.sub(r"^# (\w+ = |\[\[)", r"\1", default_toml(), flags=re.MULTILINE))
    with pytest.raises(ConfigError) as raised:  # of settings of which one may be set, all are there
        load(file, {}, {})
    assert {problem.key for problem in raised.value.problems} <= {
        "auth.key_file",
        "auth.secret",
        "auth.key",
        "auth.secret_file",
        "auth.algorithms",
        "server.anonymous",
    }
    loaded = Reading(file, {}, {}).config
    assert (loaded.server.anonymous, loaded.limits.max_connections) == (True, 10_000)


def test_the_schema_has_every_key_with_its_range_and_default() -> None:
    definitions = schema()["$defs"]
    for key in KEYS:
        section, name = key.split(".")
        property_ = definitions[SECTIONS[section].__name__]["properties"][name]
        assert property_["description"]
        assert property_["default"] == setting(Config(), key)
    assert definitions["Limits"]["properties"]["max_size"]["minimum"] == 64
    assert all(definition["additionalProperties"] is False for definition in definitions.values())


@pytest.mark.parametrize("key", KEYS)
def test_each_key_is_documented_with_its_default_and_what_it_allows(key: str) -> None:
    default = setting(Config(), key)
    shown = "left out" if default is None else f"`{msgspec.json.encode(default).decode()}`"
    assert f"must be {ALL_KEYS[key].allowed}" in problems(flags={key: {}})[0]
    section, name = key.split(".")
    assert f"| `{key}` | {shown} | {ALL_KEYS[key].allowed} | {shown_reload(section, name)} |" in DOCUMENTATION


def test_docs_have_no_unknown_keys() -> None:
    assert re.findall(r"^\| `(\w+\.\w+)` \|", DOCUMENTATION, re.MULTILINE) == KEYS


def test_example_files_in_the_docs_are_valid(file: Path) -> None:
    examples = re.findall(r"```toml\n(.*?)```", DOCUMENTATION, re.DOTALL)
    file.write_text(examples[0])
    assert load(file, {}, {}).limits.max_size == 65536
    for example in examples[1:]:
        file.write_text(example)
        assert load(file, {}, {}) != load(None, {}, {})


def test_example_errors_in_the_docs_are_real(file: Path) -> None:
    file.write_text("[limits]\nmax_sise = 1\n")
    said = problems(file, {"WSBROKER_LIMITS__OPEN_TIMEOUT": "10s"})
    assert "\n".join(said).replace(str(file), "wsbroker.toml") in DOCUMENTATION


@pytest.mark.parametrize("section", TABLES)
def test_each_key_of_a_table_is_documented_with_what_it_allows(section: str) -> None:
    for name, key in TABLE_KEYS[section].items():
        assert f"| `{name}` | {key.allowed} | {shown_reload(section, name)} |" in DOCUMENTATION


def test_commented_file_says_what_a_reload_changes() -> None:
    comments = re.sub(r"\n# (?!\[|\w+ = )", " ", default_toml())
    for section, struct in SECTIONS.items():
        for name in struct.__struct_fields__:
            words = RELOADS[reload_of(section, name)]
            assert re.search(rf"{re.escape(words)}\n(# )?{name} = ", comments), name


def test_rule_in_the_commented_file_is_valid(file: Path) -> None:
    text = default_toml()
    assert "# #" not in text
    file.write_text(re.sub(r"^# (\w+ = |\[\[)", r"\1", text, flags=re.MULTILINE))
    (rule,) = Reading(file, {}, {}).config.topics
    assert None not in msgspec.structs.astuple(rule)
    assert Rules([rule], Limits()).policy("prices.a").overflow == "latest"
