"""JSON is valid where Python's own parser and msgspec's both take it, and nothing else is."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker._speedups import check_json
from tests.speedups.documents import SOUP, SPACE, VALUES, mutated, words
from tests.speedups.wire import examples

TEXTS = st.tuples(SPACE, VALUES, SPACE).map(lambda parts: "".join(parts).encode())


@examples(250)
@given(TEXTS)
def test_accepts_valid_json(text: bytes) -> None:
    check_json(text)
    _assert_like_python(text)


@examples(500)
@given(st.one_of(mutated(TEXTS), SOUP, mutated(SOUP)))
def test_accepts_what_python_accepts(text: bytes) -> None:
    _assert_like_python(text)


@examples(150)
@given(TEXTS)
def test_accepts_the_prefixes_that_python_accepts(text: bytes) -> None:
    # What lies behind the end might complete it, and is not looked at.
    for size in range(len(text)):
        assert _is_taken(memoryview(text)[:size]) == _python_takes(text[:size]), text[:size]


@examples(500)
@given(st.one_of(TEXTS, mutated(TEXTS), SOUP))
def test_refuses_what_msgspec_refuses(text: bytes) -> None:
    if _is_taken(text):
        _READ_ALL.decode(text)


@pytest.mark.parametrize(
    ("alphabet", "size", "around"),
    [
        (words("0 1 - + . e E"), 5, ("", "")),
        (words("0 1 - + . e E"), 4, ('{"a":', "}")),
        (words('{ } [ ] , : "a" 1'), 5, ("", "")),
        (["{", "}", "[", "]", ",", ":", " ", "\n", '""', "null"], 4, ("[", "]")),
        (["\\", '"', "/", "u", "n", "x", "0", "\x1f", "\x7f", "é"], 4, ('"', '"')),
        (words("\\u D d 8 B C F 0"), 5, ('"\\u', '"')),
        (words(r'\ud7ff \ud800 \uDBFF \udc00 \uDfFf \ue000 \\ \" x'), 4, ('"', '"')),
        (words("t r u e f a l s n"), 4, ("", "")),
    ],
)  # fmt: skip
def test_accepts_the_short_texts_that_python_accepts(alphabet: list[str], size: int, around: tuple[str, str]) -> None:
    begin, end = around
    for length in range(size + 1):
        for parts in itertools.product(alphabet, repeat=length):
            _assert_like_python(f"{begin}{''.join(parts)}{end}".encode())


def test_finds_the_end_of_a_string_at_every_offset() -> None:
    # Whole words are passed over at once: what is not plain may be anywhere in them, also behind a byte like it.
    for place, size in itertools.combinations(range(36), 2):
        for byte in b'"\\\x00\x1f\x20\x21\x23\x5b\x5d\x7f\x80\xff':
            text = bytearray(b"a" * size)
            text[place] = byte
            _assert_like_python(b'"' + text + b'"')
            text[place:place] = b"\xc3\xa9"
            _assert_like_python(b'"' + text + b'"')


@pytest.mark.parametrize(
    "text", [b'{"a":[1,-2.5e+3,true],"b":{"":null}}', b'"x\\u0aF9\\n\\ud83d\\ude00\xc3\xa9"', b"[ false ,\n0]"]
)
def test_agrees_with_python_on_any_replaced_byte(text: bytes) -> None:
    for place in range(len(text) + 1):
        for byte in range(256):
            _assert_like_python(text[:place] + bytes([byte]) + text[place:])
            _assert_like_python(text[:place] + bytes([byte]) + text[place + 1 :])


@pytest.mark.parametrize("kinds", ["[", "{", "[{", "{["])
def test_counts_nesting_depth(kinds: str) -> None:
    for depth in (1, 2, 3, 63, 64, 65, 66, 200):
        text = _nested(kinds, depth)
        assert json.loads(text) is not None
        for limit in (1, 2, 64, 65, 512):
            if depth <= limit:
                check_json(text, limit)
            else:
                with pytest.raises(ValueError, match=f"nested deeper than {limit} levels"):
                    check_json(text, limit)


def test_depth_counts_open_containers_only() -> None:
    check_json(b"[" + b"[[],{}]," * 100 + b"[[]]]", 3)
    with pytest.raises(ValueError, match="deeper"):
        check_json(b"[" + b"[[],{}]," * 100 + b"[[[]]]]", 3)


def test_excess_depth_stops_the_scan() -> None:
    with pytest.raises(ValueError, match="deeper than 64"):
        check_json(b"[" * 1_000_000)


def test_depth_zero_allows_scalars_only() -> None:
    check_json(b"1", 0)
    for depth in (0, -1):
        with pytest.raises(ValueError, match="deeper"):
            check_json(b"[]", depth)


@pytest.mark.parametrize("space", [b" ", b"\n", b"\r", b"\t"])
def test_allows_white_space_around_everything(space: bytes) -> None:
    parts = words('{ "a" : [ 1 , true ] , "b" : { } }')
    check_json(space.join([b"", *(part.encode() for part in parts), b""]))


@pytest.mark.parametrize("space", [b"\x0b", b"\x0c", b"\x00", "\u00a0".encode(), "\u2028".encode(), "\ufeff".encode()])
def test_allows_no_other_white_space(space: bytes) -> None:
    for text in (space + b"1", b"1" + space, b"[" + space + b"]", b"[1" + space + b",1]"):
        assert not _is_taken(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "the message is empty"),
        (b" ", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"NaN", "not valid JSON"),
        (b"[Infinity]", "not valid JSON"),
        (b"01", "not valid JSON"),
        (b'{"a":1,}', "not valid JSON"),
        (b"'a'", "not valid JSON"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b'"\\udc00\\ud800"', "half of a surrogate pair"),
        (b'{"\\ud800x":1}', "half of a surrogate pair"),
        (b'"\xff"', "not valid UTF-8"),
        (b'{"a":"\xed\xa0\x80"}', "not valid UTF-8"),
        (b'"\xc3"', "not valid UTF-8"),
    ],
)  # fmt: skip
def test_error_names_the_problem(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_json(text)


def test_accepts_any_bytes_like_object() -> None:
    check_json(bytearray(b"[1]"))
    check_json(memoryview(b"x[1]x")[1:4])
    with pytest.raises(ValueError, match="not valid JSON"):
        check_json(memoryview(b"[1]")[:2])


# Details

_READ_ALL = msgspec.json.Decoder(Any, float_hook=str)


def _is_taken(text: bytes | memoryview) -> bool:
    try:
        check_json(text)
    except ValueError:
        return False
    return True


def _assert_like_python(text: bytes) -> None:
    assert _is_taken(text) == _python_takes(text), text


def _python_takes(text: bytes) -> bool:
    """Whether Python can read this, at most 64 levels deep, and every character in it stands for one."""
    try:
        value = json.loads(
            text.decode(),
            parse_constant=_refuse,
            parse_int=str.strip,
            parse_float=str.strip,
            object_pairs_hook=lambda pairs: [part for pair in pairs for part in pair],
        )
    except (ValueError, RecursionError):
        return False
    return _is_plain(value, 64)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_plain(value: object, depth: int) -> bool:
    if isinstance(value, list):
        return depth > 0 and all(_is_plain(member, depth - 1) for member in value)
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def _nested(kinds: str, depth: int) -> bytes:
    """Arrays and objects, one in the other, the innermost empty."""
    brackets = (kinds * depth)[:depth]
    begin = "".join('{"a":' if bracket == "{" else "[" for bracket in brackets).removesuffix('"a":')
    end = "".join("}" if bracket == "{" else "]" for bracket in reversed(brackets))
    return f"{begin}{end}".encode()
