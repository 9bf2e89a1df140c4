"""The configuration: what can be set (`schema`), from where it comes (`sources`), what is wrong with it (`checks`), and
its description (`describe`)."""

from broker.config.addresses import Address, find_group, parse_address
from broker.config.checks import SQLITE, too_open
from broker.config.files import read_file
from broker.config.keys import RESTART_KEYS
from broker.config.schema import ApiKey, Auth, Config, Limits, Log, Role, Server, TopicRule
from broker.config.sources import Reading, load

__all__ = [
    "RESTART_KEYS",
    "SQLITE",
    "Address",
    "ApiKey",
    "Auth",
    "Config",
    "Limits",
    "Log",
    "Reading",
    "Role",
    "Server",
    "TopicRule",
    "find_group",
    "load",
    "parse_address",
    "read_file",
    "too_open",
]
