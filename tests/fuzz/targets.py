"""What coverage-guided fuzzing calls with bytes of strangers, one function for each parser.

A target says which exceptions are answers; any other one, and any statement that does not hold, is a finding.
`run_target` fuzzes one of them with atheris (libFuzzer for Python); `python -m tests.fuzz` all of them for a while,
with the corpora in tests/fuzz/corpus.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeaderValue

from broker import messages
from broker.auth.permissions import is_covered
from broker.auth.tokens import TokenError, TokenPolicy, TokenVerifier
from broker.auth.verification_keys import Secret
from broker.config import Reading
from broker.errors import CommandError
from broker.identity import Identity
from broker.net.http import HealthCheck, HTTPResponse, Site, Upgrade, answer_request, find_token, parse_head
from broker.net.origin import Origins
from broker.topics import check_pattern, check_topic, matches

CORPUS: Final = Path(__file__).parent / "corpus"
KEY: Final = b"0123456789abcdef0123456789abcdef"
VERIFIER: Final = TokenVerifier(TokenPolicy(algorithms=("HS256",)), Secret(KEY, ("HS256",)), lambda: 1.8e9)
READ_CLAIMS: Final = VERIFIER._read_claims
SITE: Final = Site("/", Origins(["https://*.example.com"]), 16_384, compression=True, passed_on=("Cookie",))
FOLDER: Final = Path(tempfile.gettempdir())
TOPICS: Final = [".".join(tokens) for size in (1, 2, 3, 4) for tokens in itertools.product("ab0", repeat=size)]


def token(data: bytes) -> None:
    """A token as it comes; and its claims, as if the signature were right."""
    try:
        VERIFIER.verify(data.decode("latin-1"))
        raise AssertionError("nobody knows the key")
    except TokenError as error:
        assert str(error).isascii()
    try:
        claims = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(claims, dict):
        try:
            found = READ_CLAIMS(claims)
        except TokenError:
            return
        assert isinstance(found, Identity)
        assert found.name
        assert found.name.isprintable()


def handshake(data: bytes) -> None:
    """The head of a request."""
    request = parse_head(data + b"\r\n\r\n")
    if isinstance(request, HTTPResponse):
        request.serialize(bodiless=False)
        return
    for loopback in (True, False):
        answer = answer_request(request, SITE, loopback=loopback)
        assert isinstance(answer, HTTPResponse | HealthCheck | Upgrade)
        if isinstance(answer, HTTPResponse):
            answer.serialize(bodiless=True)
        if isinstance(answer, Upgrade):
            assert answer.response.count(b"\r\n\r\n") == 1


def authorization(data: bytes) -> None:
    """The headers that may hold a token, one a line."""
    headers = Headers()
    for line in data.decode("latin-1").splitlines():
        name = "Sec-WebSocket-Protocol" if line.startswith("p") else "Authorization"
        try:
            headers[name] = line[1:]
        except InvalidHeaderValue:
            return  # the parser of requests refuses it
    found = find_token(headers)
    if isinstance(found, HTTPResponse):
        assert found.status == 400
    elif found is not None:
        assert "," not in found


def patterns(data: bytes) -> None:
    """Names, and whether patterns cover one. The oracle counts all topics of a small alphabet."""
    name, *allowed = data.decode("utf-8", "replace").split("\n")[:6]
    for each in (name, *allowed):
        for check in (check_pattern, check_topic):
            try:
                check(each)
            except CommandError as error:
                assert error.code == "bad_topic"
                assert error.message.isprintable()
                if check is check_pattern:
                    return
    if len(name) > 7 or any(len(each) > 5 for each in allowed):
        is_covered(name, allowed)
        return
    wanted = [topic for topic in TOPICS if matches(name, topic)]
    if wanted and is_covered(name, allowed):
        assert all(any(matches(pattern, topic) for pattern in allowed) for topic in wanted)


def configuration(data: bytes) -> None:
    """A configuration file: read, or a list of mistakes of one line each."""
    file = FOLDER / f"wsbroker-fuzz-{os.getpid()}.toml"
    file.write_bytes(data)
    reading = Reading(file, {}, {})
    for problem in reading.problems:
        assert "\n" not in str(problem)


def command(data: bytes) -> None:
    """A message of a client."""
    try:
        found = messages.decode(data, 64)
    except messages.BadCommand as error:
        assert error.code in ("bad_json", "bad_command")
        messages.encode_error(error.id, error.code, error.message)
        return
    if isinstance(found, messages.Publish):
        json.loads(bytes(found.data))
        messages.encode_event("t", found.data, found.key)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (token, handshake, authorization, patterns, configuration, command)
}
