"""The wire protocol: what is understood, what is sent, and what a client is told that made a mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import messages
from broker.config import Limits
from broker.errors import ERRORS, CommandError
from broker.messages import (
    MAX_INTEGER,
    Auth,
    BadCommand,
    Bye,
    Command,
    Credit,
    ErrorAnswer,
    EventMessage,
    Gap,
    History,
    Ok,
    Ping,
    Pong,
    Presence,
    Publish,
    Since,
    Subscribe,
    Unsubscribe,
    Welcome,
    decode_server,
    encode_bye,
    encode_command,
    encode_error,
    encode_event,
    encode_gap,
    encode_ok,
    encode_pong,
    encode_welcome,
)
from broker.overflow import GAP_REASONS, OVERFLOWS
from broker.topics import check_pattern

PROTOCOL = (Path(__file__).parent.parent / "docs" / "protocol.md").read_text(encoding="utf-8")

ids = st.integers(0, MAX_INTEGER) | st.text(max_size=64)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


MAX_DEPTH = Limits().max_depth


def decode(payload: bytes | memoryview, depth: int = MAX_DEPTH) -> Command:
    return messages.decode(payload, depth)


def command(**fields: object) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def refusal(payload: bytes) -> BadCommand:
    with pytest.raises(BadCommand) as raised:
        decode(payload)
    return raised.value


class TestCommands:
    @pytest.mark.parametrize(
        ("payload", "expected"),
        [
            (b'{"op":"subscribe","topic":"a.*"}', Subscribe("a.*")),
            (
                b'{"op":"subscribe","id":1,"topic":"a","max_queue":64,"overflow":"close","echo":false}',
                Subscribe("a", id=1, max_queue=64, overflow="close", echo=False),
            ),
            (b'{"op":"unsubscribe","id":"x","topic":"a"}', Unsubscribe("a", id="x")),
            (b'{"op":"ping"}', Ping()),
            (b'{"op":"ping","id":0}', Ping(id=0)),
            # Parts of version 1 that come later: they are understood, so that the answer can say so.
            (b'{"op":"auth","token":"t"}', Auth("t")),
            (b'{"op":"credit","id":1,"topic":"a","add":5}', Credit("a", 5, id=1)),
            (b'{"op":"history","topic":"a","last":5,"limit":2}', History("a", last=5, limit=2)),
            (b'{"op":"presence","topic":"a"}', Presence("a")),
            (
                b'{"op":"subscribe","topic":"a","credit":0,"since":{"epoch":"k3Zq","offset":0},"presence":true}',
                Subscribe("a", credit=0, since=Since("k3Zq", 0), presence=True),
            ),
            (b'{"op":"subscribe","topic":"a","last":1}', Subscribe("a", last=1)),
        ],
    )
    def test_valid_commands_are_decoded(self, payload: bytes, expected: Command) -> None:
        assert decode(payload) == expected
        assert decode(memoryview(payload)) == expected
        assert decode(encode_command(expected)) == expected

    @pytest.mark.parametrize("overflow", OVERFLOWS)
    def test_every_overflow_policy_is_decoded(self, overflow: str) -> None:
        subscribe = decode(command(op="subscribe", topic="a", overflow=overflow))
        assert isinstance(subscribe, Subscribe)
        assert subscribe.overflow == overflow

    def test_publish_keeps_its_data_unchanged(self) -> None:
        publish = decode(b' {"op":"publish","topic":"t","data": { "a" : [1.50, "\\u00e9" ]\n} ,"key":"","id":"7"} ')
        assert isinstance(publish, Publish)
        assert (publish.topic, publish.key, publish.id) == ("t", "", "7")
        assert bytes(publish.data) == b'{ "a" : [1.50, "\\u00e9" ]\n}'

    @given(values)
    def test_any_json_value_can_be_data(self, value: Any) -> None:
        publish = decode(command(op="publish", topic="t", data=value))
        assert isinstance(publish, Publish)
        assert json.loads(bytes(publish.data)) == value

    @given(ids)
    def test_any_valid_id_is_accepted(self, id: int | str) -> None:
        assert decode(command(op="ping", id=id)) == Ping(id=id)

    def test_unknown_fields_are_ignored(self) -> None:
        assert decode(b'{"x":{"y":[null]},"op":"ping","topic":5}') == Ping()

    def test_the_order_of_the_fields_does_not_matter(self) -> None:
        assert decode(b'{"topic":"a","id":3,"op":"unsubscribe"}') == Unsubscribe("a", id=3)

    def test_field_names_may_have_escapes(self) -> None:
        assert decode(rb'{"\u006fp":"pi\u006eg"}') == Ping()

    @given(ids | st.none(), st.text(max_size=20), st.text(max_size=20) | st.none(), values)
    def test_encoded_commands_are_decoded(
        self,
        id: int | str | None,
        topic: str,
        key: str | None,
        value: Any,
    ) -> None:
        data = msgspec.json.encode(value)
        publish = decode(encode_command(Publish(id=id, topic=topic, key=key, data=msgspec.Raw(data))))
        assert isinstance(publish, Publish)
        assert (publish.id, publish.topic, publish.key, bytes(publish.data)) == (id, topic, key, data)

    def test_absent_fields_are_not_encoded(self) -> None:
        assert encode_command(Subscribe("a")) == b'{"op":"subscribe","topic":"a"}'
        assert encode_command(Ping()) == b'{"op":"ping"}'


class TestBadJson:
    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b" ",
            b"{",
            b"}",
            b'{"op":"ping"',
            b'{"op":"ping"}}',
            b'{"op":"ping"} {"op":"ping"}',
            b'{"op":"ping",}',
            b"{'op':'ping'}",
            b"{op:1}",
            b'{"op":"publish","topic":"a","data":NaN}',
            b'{"op":"publish","topic":"a","data":01}',
            b'{"op":"publish","topic":"a","data":1.}',
            b'{"op":"publish","topic":"a","data":[1,]}',
            b'{"op":"publish","topic":"a","data":"\x01"}',
            b'{"op":"publish","topic":"a","data":"\\x41"}',
            b'{"op":"publish","topic":"a","data":}',
            b'\xef\xbb\xbf{"op":"ping"}',
            b'{"op":"ping"}\x00',
            b"\x80\x00",
        ],
    )
    def test_text_that_is_not_json_is_refused(self, payload: bytes) -> None:
        error = refusal(payload)
        assert (error.code, error.id) == ("bad_json", None)
        assert error.message

    @pytest.mark.parametrize(
        ("payload", "message"),
        [
            (b'{"op":"ping","id":01}', "not valid JSON at character 20: invalid number"),
            ('{"op":"ping","é":x}'.encode(), "not valid JSON at character 18: invalid character"),
            (b'{"op":"ping",}', "not valid JSON at character 14: trailing comma in object"),
            (b'{"op":"ping"} {}', "not valid JSON at character 15: trailing characters"),
            (b'{"op":"ping"', "not valid JSON: it ends too early"),
        ],
    )
    def test_message_says_where_text_stops_being_json(self, payload: bytes, message: str) -> None:
        assert refusal(payload).message == message

    @pytest.mark.parametrize("payload", [b"[]", b"1", b'"op"', b"null", b" true", b'[{"op":"ping"}]'])
    def test_json_that_is_not_an_object_is_refused(self, payload: bytes) -> None:
        error = refusal(payload)
        assert (error.code, error.message) == ("bad_json", "a command is a JSON object")

    @pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80"])
    def test_invalid_utf8_is_refused(self, bad: bytes) -> None:
        assert refusal(b'{"op":"publish","topic":"a","data":"' + bad + b'"}').code == "bad_json"
        assert refusal(b'{"op":"publish","topic":"' + bad + b'","data":1}').code == "bad_json"
        assert refusal(b'{"op":"ping","unknown":"' + bad + b'"}').code == "bad_json"

    # Some subscribers could not decode such an event, and a topic could not be told from another by its UTF-8.
    @pytest.mark.parametrize("half", [rb"\ud800", rb"\udfff", rb"\ud83d\u0041", rb"\ud83d\ud83d", rb"\ud83d\n"])
    def test_lone_surrogate_is_refused(self, half: bytes) -> None:
        for payload in (
            b'{"op":"publish","topic":"a","data":"' + half + b'"}',
            b'{"op":"publish","topic":"a","data":"' + half + b' and more text"}',
            b'{"op":"publish","topic":"a","data":{"' + half + b'":1}}',
            b'{"op":"publish","topic":"' + half + b'","data":1}',
            b'{"op":"ping","unknown":"' + half + b'"}',
        ):
            error = refusal(payload)
            assert (error.code, error.message) == ("bad_json", "a string holds half of a surrogate pair")

    def test_surrogate_pair_is_a_character(self) -> None:
        assert decode(rb'{"op":"ping","id":"\ud83d\ude00"}') == Ping(id="😀")

    @pytest.mark.parametrize("depth", [2, MAX_DEPTH, 512])
    def test_json_over_max_depth_is_refused(self, depth: int) -> None:
        levels = depth - 1  # the command's own object is one
        payload = b'{"op":"publish","topic":"a","data":' + b"[" * levels + b"]" * levels + b"}"
        assert isinstance(decode(payload, depth), Publish)
        with pytest.raises(BadCommand, match=f"deeper than {depth - 1}") as raised:
            decode(payload, depth - 1)
        assert raised.value.code == "bad_json"

    @given(st.binary(max_size=40) | st.text(st.sampled_from('{}[]":,op1 \\ud8'), max_size=40).map(str.encode))
    def test_any_input_is_decoded_or_refused(self, payload: bytes) -> None:
        for full in (payload, b'{"op":"publish","topic":"a","data":' + payload + b"}"):
            try:
                result = decode(full)
            except BadCommand:
                continue
            json.loads(full)  # what is taken, others can read
            if isinstance(result, Publish):
                assert json.loads(encode_event("a", result.data))["op"] == "event"


fields = st.sampled_from(["op", "topic", "id", "data", "key", "max_queue", "overflow", "credit", "add", "other"])
field_values = (
    st.sampled_from(["ping", "publish", "subscribe", "unsubscribe", "credit", "auth", "close", "a", "b"])
    | st.integers(-1, 3)
    | st.none()
    | st.booleans()
    | st.just({"op": "ping"})
)


def spelled(name: str, escape: str) -> str:
    """A JSON string for `name`, with the characters that `escape` names written as escapes, in both cases of hex."""
    return '"' + "".join(f"\\u{ord(c):04{'x' if c < 'p' else 'X'}}" if c in escape else c for c in name) + '"'


class TestDuplicateFields:
    @given(st.lists(st.tuples(fields, st.text("op", max_size=2), field_values), max_size=6), st.booleans())
    def test_last_duplicate_field_applies_as_in_python(
        self, members: list[tuple[str, str, object]], view: bool
    ) -> None:
        pairs = [f"{spelled(name, escape)}:{json.dumps(value)}" for name, escape, value in members]
        payload = f"{{{','.join(pairs)}}}".encode()
        outcomes = []
        for each in (payload, json.dumps(json.loads(payload)).encode()):
            try:
                outcomes.append(msgspec.json.decode(msgspec.json.encode(decode(memoryview(each) if view else each))))
            except BadCommand as error:
                outcomes.append((error.code, error.message, error.id))
        assert outcomes[0] == outcomes[1]

    def test_last_duplicate_op_applies(self) -> None:
        assert decode(b'{"op":"publish","topic":"a","data":1,"op":"unsubscribe"}') == Unsubscribe("a")
        assert decode(rb'{"op":"ping","topic":"a","\u006f\u0070":"unsubscribe"}') == Unsubscribe("a")
        assert decode(rb'{"\u006Fp":"ping","topic":"a","op":"unsubscribe"}') == Unsubscribe("a")
        assert refusal(b'{"op":"ping","op":"nonsense"}').code == "bad_command"
        assert decode(b'{"op":"nonsense","op":"ping","id":[],"id":1}') == Ping(id=1)

    def test_data_stays_byte_for_byte_beside_a_duplicate(self) -> None:
        publish = decode(b'{"op":"ping","topic":"a","data": [1.50, {"op":1}] ,"op":"publish"}')
        assert isinstance(publish, Publish)
        assert bytes(publish.data) == b'[1.50, {"op":1}]'


OPS = "one of auth, subscribe, unsubscribe, publish, credit, history, presence, ping"
ID = "an integer from 0 to 2^53-1 or a string of up to 64 characters"


class TestBadCommand:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {},
                f"`op` is missing: it must be {OPS}",
            ),
            (
                {"op": "subcribe"},
                f"`op` must be {OPS}",
            ),
            ({"op": 5}, f"`op` must be {OPS}"),
            ({"op": "subscribe"}, "`topic` is missing: it must be a string"),
            ({"op": "publish", "topic": "a"}, "`data` is missing: it must be a JSON value"),
            ({"op": "publish", "data": 1}, "`topic` is missing: it must be a string"),
            ({"op": "subscribe", "topic": 1}, "`topic` must be a string, not an integer"),
            ({"op": "subscribe", "topic": ["a"]}, "`topic` must be a string, not an array"),
            ({"op": "subscribe", "topic": None}, "`topic` must be a string, not null"),
            ({"op": "subscribe", "topic": "a", "max_queue": 0}, "`max_queue` must be an integer from 1 to 2^53-1"),
            (
                {"op": "subscribe", "topic": "a", "max_queue": 1.5},
                "`max_queue` must be an integer from 1 to 2^53-1, not a number",
            ),
            (
                {"op": "subscribe", "topic": "a", "max_queue": None},
                "`max_queue` must be an integer from 1 to 2^53-1, not null",
            ),
            ({"op": "subscribe", "topic": "a", "max_queue": 2**53}, "`max_queue` must be an integer from 1 to 2^53-1"),
            ({"op": "subscribe", "topic": "a", "max_queue": 10**40}, "`max_queue` must be an integer from 1 to 2^53-1"),
            (
                {"op": "subscribe", "topic": "a", "overflow": "drop"},
                "`overflow` must be one of drop_oldest, drop_newest, latest, replay, block, close",
            ),
            ({"op": "subscribe", "topic": "a", "echo": "no"}, "`echo` must be true or false, not a string"),
            ({"op": "subscribe", "topic": "a", "echo": 0}, "`echo` must be true or false, not an integer"),
            ({"op": "subscribe", "topic": "a", "credit": -1}, "`credit` must be an integer from 0 to 2^53-1"),
            ({"op": "subscribe", "topic": "a", "last": 0}, '`last` must be an integer from 1 to 2^53-1 or "all"'),
            (
                {"op": "subscribe", "topic": "a", "since": 5},
                "`since` must be an object with `epoch` and `offset`, not an integer",
            ),
            ({"op": "subscribe", "topic": "a", "since": {}}, "`since.epoch` is missing: it must be a string"),
            (
                {"op": "subscribe", "topic": "a", "since": {"epoch": "x", "offset": -1}},
                "`since.offset` must be an integer from 0 to 2^53-1",
            ),
            ({"op": "subscribe", "topic": "a", "presence": 1}, "`presence` must be true or false, not an integer"),
            ({"op": "publish", "topic": "a", "data": 1, "key": 5}, "`key` must be a string, not an integer"),
            ({"op": "publish", "topic": "a", "data": 1, "key": None}, "`key` must be a string, not null"),
            ({"op": "credit", "topic": "a", "add": 0}, "`add` must be an integer from 1 to 2^53-1"),
            ({"op": "history", "topic": "a", "limit": 0}, "`limit` must be an integer from 1 to 2^53-1"),
            ({"op": "auth", "token": None}, "`token` must be a string, not null"),
            ({"op": "ping", "id": None}, f"`id` must be {ID}, not null"),
            ({"op": "ping", "id": True}, f"`id` must be {ID}, not true or false"),
            ({"op": "ping", "id": 1.0}, f"`id` must be {ID}, not a number"),
            ({"op": "ping", "id": {}}, f"`id` must be {ID}, not an object"),
            ({"op": "ping", "id": -1}, f"`id` must be {ID}"),
            ({"op": "ping", "id": 2**53}, f"`id` must be {ID}"),
            ({"op": "ping", "id": "x" * 65}, f"`id` must be {ID}"),
        ],
    )
    def test_error_names_the_field_and_what_is_allowed(self, fields: dict[str, object], message: str) -> None:
        error = refusal(command(**fields))
        assert (error.code, error.message) == ("bad_command", message)

    def test_error_has_the_id_of_an_invalid_command(self) -> None:
        assert refusal(b'{"op":"subscribe","id":7}').id == 7
        assert refusal(b'{"id":"x","op":"nonsense"}').id == "x"
        assert refusal(b'{"op":"publish","topic":5,"data":{"id":3},"id":0}').id == 0

    @pytest.mark.parametrize("bad", [b"null", b"-1", b"1.5", b"true", b"[]", b'"' + b"x" * 65 + b'"'])
    def test_error_for_an_invalid_id_has_no_id(self, bad: bytes) -> None:
        assert refusal(b'{"op":"ping","id":' + bad + b"}").id is None

    def test_error_does_not_quote_long_input(self) -> None:
        assert len(refusal(command(op="x" * 100_000)).message) < 200
        assert len(refusal(command(op="subscribe", topic="a", overflow="x" * 100_000)).message) < 200

    @pytest.mark.parametrize("kind", get_args(Command), ids=lambda kind: kind.__name__)
    def test_every_field_has_an_error_text(self, kind: type[msgspec.Struct]) -> None:
        # An array fits no field but `data` and `info`, which take everything.
        for field in msgspec.structs.fields(kind):
            others: dict[str, object] = {
                other.name: 1 if other.name in ("add", "data") else "a"
                for other in msgspec.structs.fields(kind)
                if other.required
            }
            if field.name in ("data", "info"):
                continue
            error = refusal(command(op=kind.__struct_config__.tag, **(others | {field.name: [{}]})))
            assert error.message.startswith(f"`{field.name}` must be ")
            assert error.message.endswith(", not an array")


class TestAnswers:
    def test_welcome_is_encoded(self) -> None:
        payload = encode_welcome(session="s1", server="wsbroker/0.1.0", ping=25.0, max_size=1048576, max_queue=65536)
        assert payload == (
            b'{"op":"welcome","version":1,"session":"s1","server":"wsbroker/0.1.0","ping":25,"max_size":1048576,"max_queue":65536}'
        )
        assert decode_server(payload) == Welcome(
            version=1, session="s1", server="wsbroker/0.1.0", ping=25, max_size=1048576, max_queue=65536
        )

    def test_welcome_with_an_identity_is_encoded(self) -> None:
        payload = encode_welcome(session="s", server="w", ping=0.5, max_size=1, max_queue=1, identity="ann")
        welcome = decode_server(payload)
        assert isinstance(welcome, Welcome)
        assert (welcome.identity, welcome.ping) == ("ann", 0.5)

    def test_ok_is_encoded(self) -> None:
        payload = encode_ok(2, receivers=3, queued=1, dropped=0)
        assert payload == b'{"op":"ok","id":2,"receivers":3,"queued":1,"dropped":0}'
        assert decode_server(payload) == Ok(id=2, receivers=3, queued=1, dropped=0)
        assert encode_ok("é", topic="a") == '{"op":"ok","id":"é","topic":"a"}'.encode()

    def test_error_is_encoded(self) -> None:
        payload = encode_error(1, "not_subscribed", "there is no subscription to `a`")
        assert payload == (
            b'{"op":"error","id":1,"code":"not_subscribed","message":"there is no subscription to `a`","retry":false}'
        )
        assert decode_server(payload) == ErrorAnswer(
            id=1, code="not_subscribed", message="there is no subscription to `a`", retry=False
        )
        assert encode_error(None, "rate_limited", "slowly", 250) == (
            b'{"op":"error","code":"rate_limited","message":"slowly","retry":true,"retry_after_ms":250}'
        )

    @pytest.mark.parametrize("code", ERRORS)
    def test_error_gets_retry_from_the_table(self, code: str) -> None:
        answer = decode_server(encode_error(0, code, "…"))
        assert isinstance(answer, ErrorAnswer)
        assert answer.retry == ERRORS[code].retry

    def test_event_is_encoded(self) -> None:
        assert encode_event("a", memoryview(b"[1, 2]")) == encode_event("a", b"[1, 2]")
        assert encode_event("a", b"[1, 2]") == b'{"op":"event","topic":"a","data":[1, 2]}'
        payload = encode_event("a", msgspec.Raw(b"{}"), key="", offset=0)
        assert payload == b'{"op":"event","topic":"a","key":"","data":{},"offset":0}'
        event = decode_server(payload)
        assert isinstance(event, EventMessage)
        assert (event.topic, event.key, bytes(event.data), event.offset) == ("a", "", b"{}", 0)

    @given(st.text(min_size=1, max_size=20), values, st.text(max_size=10) | st.none())
    def test_event_keeps_its_data_byte_for_byte(self, topic: str, value: Any, key: str | None) -> None:
        data = json.dumps(value, indent=1).encode()
        payload = encode_event(topic, data, key)
        assert data in payload
        event = decode_server(payload)
        assert isinstance(event, EventMessage)
        assert (event.topic, bytes(event.data), event.key) == (topic, data, key)

    def test_event_is_encoded_without_a_copy_of_the_publish(self) -> None:
        publish = decode(memoryview(b'{"op":"publish","topic":"a","data":"x","key":"k"}'))
        assert isinstance(publish, Publish)
        assert (
            encode_event(publish.topic, publish.data, publish.key) == b'{"op":"event","topic":"a","key":"k","data":"x"}'
        )

    def test_gap_is_encoded(self) -> None:
        assert encode_gap("a.*", 17, "overflow") == b'{"op":"gap","topic":"a.*","missed":17,"reason":"overflow"}'
        payload = encode_gap("a", None, "epoch", 1, 4)
        assert payload == b'{"op":"gap","topic":"a","missed":null,"reason":"epoch","from":1,"to":4}'
        assert decode_server(payload) == Gap(topic="a", missed=None, reason="epoch", from_=1, to=4)

    def test_pong_is_encoded(self) -> None:
        assert encode_pong(None) == b'{"op":"pong"}'
        assert encode_pong(0) == b'{"op":"pong","id":0}'
        assert decode_server(b'{"op":"pong","id":"x"}') == Pong(id="x")

    def test_bye_is_encoded(self) -> None:
        assert encode_bye("shutdown", 3120) == b'{"op":"bye","reason":"shutdown","retry_after_ms":3120}'
        assert decode_server(encode_bye("shutdown", 0)) == Bye("shutdown", 0)


class TestDecodeServer:
    def test_decodes_str_as_well_as_bytes(self) -> None:
        assert decode_server('{"op":"pong"}') == Pong()

    def test_unknown_op_is_decoded_to_none(self) -> None:
        assert decode_server(b'{"op":"hello","x":1}') is None

    def test_unknown_fields_of_the_server_are_ignored(self) -> None:
        assert decode_server(b'{"op":"pong","id":1,"x":{}}') == Pong(id=1)

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"nonsense",
            b"[]",
            b"{}",
            b'{"op":5}',
            b'{"op":"event","topic":"a"}',
            b'{"op":"ok"}',
            b'{"op":"ok","id":null}',
        ],
    )
    def test_invalid_server_message_is_an_error(self, payload: bytes) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            decode_server(payload)


def carry_out(payload: bytes) -> tuple[Command | None, bytes]:
    """The command, and the error that answers it if something is wrong with it."""
    understood = None
    try:
        understood = decode(payload)
        if isinstance(understood, Subscribe | Unsubscribe):
            check_pattern(understood.topic)
    except BadCommand as error:
        return None, encode_error(error.id, error.code, error.message)
    except CommandError as error:
        return None, encode_error(understood.id if understood else None, error.code, error.message)
    return understood, b""


class TestDocumentation:
    """docs/protocol.md is exact: its examples are what the broker reads and writes."""

    EXAMPLES = tuple(re.findall(r"^([<>]) (\{.*\})$", PROTOCOL, re.MULTILINE))

    @pytest.mark.parametrize("payload", [text for side, text in EXAMPLES if side == ">"])
    def test_docs_list_every_command(self, payload: str) -> None:
        understood, answer = carry_out(payload.encode())
        if answer:  # the example is one of a mistake, and shows what is answered
            assert f"> {payload}\n< {answer.decode()}\n" in PROTOCOL
        else:
            assert understood is not None
            assert json.loads(encode_command(understood)) == json.loads(payload)

    @pytest.mark.parametrize("payload", [text for side, text in EXAMPLES if side == "<"])
    def test_docs_list_every_answer(self, payload: str) -> None:
        understood = decode_server(payload)
        assert understood is not None
        # Byte for byte, so that the order of the fields is the documented one.
        assert msgspec.json.encode(understood).decode() == payload

    @pytest.mark.parametrize(
        "kind", [*get_args(Command), *get_args(messages.ServerMessage)], ids=lambda kind: kind.__name__
    )
    def test_docs_list_every_op_and_field(self, kind: type[msgspec.Struct]) -> None:
        tag = kind.__struct_config__.tag
        assert f"`{tag}`" in PROTOCOL
        for field in msgspec.structs.fields(kind):
            if kind is Ok and field.name in ("events", "more", "epoch", "offset", "recovered"):
                continue  # what `history` returns is documented with it
            assert f"`{field.encode_name}`" in PROTOCOL, field.name

    @pytest.mark.parametrize("overflow", OVERFLOWS)
    def test_docs_list_every_overflow_policy(self, overflow: str) -> None:
        assert f"| `{overflow}` |" in PROTOCOL

    def test_docs_list_every_gap_reason(self) -> None:
        table = PROTOCOL.partition("| reason | why |\n|---|---|\n")[2].partition("\n\n")[0]
        documented = [reason for row in table.splitlines() for reason in re.findall(r"`(\w+)`", row.split("|")[1])]
        assert documented == list(GAP_REASONS)
