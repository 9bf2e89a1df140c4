"""Masking is what `websockets` does, at every alignment and from every byte of the key."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.utils import apply_mask

from broker._speedups import FrameReader, mask
from tests.speedups.wire import BINARY, examples

KEYS = st.binary(min_size=4, max_size=4)


@examples(300)
@given(st.binary(max_size=300), KEYS, st.integers(0, 2**40))
def test_masks_like_websockets(data: bytes, key: bytes, offset: int) -> None:
    skipped = offset % 4
    assert mask(data, key, offset) == apply_mask(bytes(skipped) + data, key)[skipped:]


def test_reads_from_every_alignment_and_every_size() -> None:
    room = memoryview(bytes(range(256)))
    key = b"\x01\x23\x45\x67"
    for start in range(16):
        for size in range(80):
            data = room[start : start + size]
            assert mask(data, key) == apply_mask(bytes(data), key)


def test_unmasks_in_place_at_every_alignment() -> None:
    # The reader unmasks a payload where it lies in the receive buffer, behind frames of any length.
    payload, key = bytes(range(100, 167)), b"\xfe\xdc\xba\x98"
    for before in range(32):
        reader = FrameReader()
        stream = _frame(bytes(before), key) + _frame(payload, key)
        assert reader.feed(stream) == [(BINARY, bytes(before)), (BINARY, payload)]


@examples(200)
@given(st.binary(max_size=100), KEYS, st.lists(st.integers(0, 100), max_size=5))
def test_masking_in_pieces_equals_masking_at_once(data: bytes, key: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [mask(data[a:b], key, a) for a, b in pairwise(places)]
    assert b"".join(pieces) == mask(data, key)


@examples(100)
@given(st.binary(max_size=100), KEYS)
def test_masking_twice_restores_the_input(data: bytes, key: bytes) -> None:
    assert mask(mask(data, key), key) == data


def test_input_is_not_modified() -> None:
    # Python has one object for each single byte, which everybody shares.
    for number in range(256):
        byte = bytes([number])
        assert mask(byte, b"\xff\x00\x00\x00") == bytes([number ^ 0xFF])
        assert byte[0] == number
        assert bytes([number])[0] == number
    buffer = bytearray(b"abcdefgh")
    mask(buffer, b"\x01\x02\x03\x04")
    assert buffer == b"abcdefgh"


def test_accepts_any_bytes_like_object() -> None:
    expected = mask(b"abc", b"\x01\x02\x03\x04")
    assert mask(bytearray(b"abc"), b"\x01\x02\x03\x04") == expected
    assert mask(memoryview(b"a_b_c")[::2], b"\x01\x02\x03\x04") == expected


@pytest.mark.parametrize("key", [b"", b"abc", b"abcde"])
def test_refuses_a_key_that_is_not_four_bytes(key: bytes) -> None:
    with pytest.raises(ValueError, match="4 bytes"):
        mask(b"data", key)


def _frame(payload: bytes, key: bytes) -> bytes:
    assert len(payload) < 126
    return bytes([0x82, 0x80 | len(payload)]) + key + apply_mask(payload, key)
