"""UTF-8 is valid where Python can decode it, in pieces as in one, and a mistake is noticed at its first wrong byte."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from broker._speedups import Utf8Validator, valid_utf8
from tests.speedups.wire import examples

# One from each side of every border in the table of RFC 3629, section 4.
BORDERS = bytes.fromhex("00 41 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")

PIECES = [
    *(text.encode() for text in ("a", "{", "é", "ß", "€", "한", "😀", "\U0010ffff", "\x00", "\ud7ff", "\ue000")),
    *map(bytes.fromhex, ("80", "c080", "c1", "e08080", "eda080", "edbfbf", "f0808080", "f4908080", "ff")),
    b"plain ASCII that is longer than a machine word or two",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join)
BYTES = st.one_of(st.binary(max_size=40), TEXTS, st.text(max_size=40).map(str.encode))


@examples(500)
@given(BYTES)
def test_accepts_what_python_decodes(data: bytes) -> None:
    assert valid_utf8(data) == _decodes(data)


def test_every_boundary_of_the_table_is_checked() -> None:
    for size in range(5):
        for combination in itertools.product(BORDERS, repeat=size):
            data = bytes(combination)
            assert valid_utf8(data) == _decodes(data), data.hex()


def test_every_character_is_valid() -> None:
    for start in range(0, 0x110000, 0x800):
        if 0xD800 <= start < 0xE000:
            continue
        characters = [chr(code).encode() for code in range(start, start + 0x800)]
        assert valid_utf8(b"".join(characters))
        assert all(not valid_utf8(character[:-1]) for character in characters if len(character) > 1)


def test_no_surrogate_is_valid() -> None:
    for code in range(0xD800, 0xE000):
        assert not valid_utf8(chr(code).encode(errors="surrogatepass"))


def test_invalid_byte_is_found_at_every_offset() -> None:
    # Whole words of ASCII are passed over at once: the byte may be anywhere in them, or behind them.
    for size in range(1, 70):
        for place in range(size):
            data = bytearray(b"x" * size)
            data[place] = 0xFF
            assert not valid_utf8(data)
            data[place] = 0xC3
            assert not valid_utf8(data)
            if place + 1 < size:
                data[place + 1] = 0xA9
                assert valid_utf8(data)


@examples(100)
@given(BYTES)
def test_bytes_after_the_end_are_not_read(data: bytes) -> None:
    for size in range(len(data)):
        assert valid_utf8(memoryview(data)[:size]) == _decodes(data[:size])


@examples(300)
@given(BYTES, st.lists(st.integers(0, 40), max_size=4))
def test_incremental_check_equals_a_whole_check(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert _fed(data[a:b] for a, b in pairwise(places)) == _decodes(data)


@examples(200)
@given(BYTES)
def test_incremental_check_agrees_at_every_split(data: bytes) -> None:
    for cut in range(len(data) + 1):
        assert _fed([data[:cut], data[cut:]]) == _decodes(data)


@examples(300)
@given(BYTES)
def test_invalid_sequence_fails_at_its_first_invalid_byte(data: bytes) -> None:
    _assert_noticed_at_once(data)


def test_invalid_sequence_fails_at_its_first_invalid_byte_at_every_boundary() -> None:
    for combination in itertools.product(BORDERS, repeat=3):
        _assert_noticed_at_once(bytes(combination))
    for first, last in itertools.product(b"\xf0\xf1\xf4\xf5", BORDERS):
        _assert_noticed_at_once(bytes([first, 0x8F, 0x80, last]))
        _assert_noticed_at_once(bytes([first, 0x90, 0x80, last]))


def test_error_state_is_permanent() -> None:
    validator = Utf8Validator()
    assert not validator.feed(b"\xff")
    assert not validator.feed(b"a")
    assert not validator.feed(b"")
    assert not validator.complete


def test_incomplete_character_at_the_end_is_invalid() -> None:
    validator = Utf8Validator()
    assert validator.complete
    for byte in "😀".encode()[:-1]:
        assert validator.feed(bytes([byte]))
        assert not validator.complete
    assert validator.feed("😀".encode()[-1:])
    assert validator.complete


def _decodes(data: bytes | bytearray) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _fed(pieces: Iterable[bytes]) -> bool:
    validator = Utf8Validator()
    verdicts = [validator.feed(piece) for piece in pieces]  # it is fed all, whatever it says
    return all(verdicts) and validator.complete


# What may complete a character: after its first byte the table tells these from each other, further on nothing.
TAILS = [b"", *(second + b"\x80" * more for second in (b"\x80", b"\x90", b"\xa0") for more in range(3))]


def _assert_noticed_at_once(data: bytes) -> None:
    """Byte by byte, the validator says whether any text begins like this."""
    validator = Utf8Validator()
    for place in range(len(data)):
        begun = data[: place + 1]
        right = any(_decodes(begun + tail) for tail in TAILS)
        assert validator.feed(data[place : place + 1]) == right, (data.hex(), place)
        if not right:
            return
        assert validator.complete == _decodes(begun)
