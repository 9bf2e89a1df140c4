# UTF-8 validation (RFC 3629), resumable at any byte, because a message may be cut into fragments anywhere.
#
# Invariant: what is wrong is noticed at its first wrong byte, never later.


cdef struct Utf8:
    # What the next byte has to be, if a sequence is under way: `need` continuation bytes, the first of them between
    # `low` and `high` (the ranges that rule out overlong forms, surrogates and what lies beyond U+10FFFF).
    uint8_t need
    uint8_t low
    uint8_t high


cdef bint utf8_feed(Utf8* state, const unsigned char* data, size_t size) noexcept nogil:
    """Take the next bytes of a text; False as soon as no valid text can begin like this."""
    cdef:
        const unsigned char* end = data + size
        unsigned char byte
        uint64_t word, other
        uint8_t need = state.need, low = state.low, high = state.high
    while data < end:
        if need:
            byte = data[0]
            if byte < low or byte > high:
                return False
            low = 0x80
            high = 0xBF
            need -= 1
            data += 1
            continue
        # ASCII is by far the most common: sixteen bytes at a time while no high bit is set.
        while data + 16 <= end:
            memcpy(&word, data, 8)
            memcpy(&other, data + 8, 8)
            if (word | other) & <uint64_t> 0x8080808080808080:
                break
            data += 16
        while data < end and data[0] < 0x80:
            data += 1
        if data == end:
            break
        byte = data[0]
        data += 1
        low = 0x80
        high = 0xBF
        if byte < 0xC2:  # a continuation byte out of place, or an overlong form of ASCII
            return False
        elif byte < 0xE0:
            need = 1
        elif byte < 0xF0:
            need = 2
            if byte == 0xE0:
                low = 0xA0
            elif byte == 0xED:
                high = 0x9F
        elif byte < 0xF5:
            need = 3
            if byte == 0xF0:
                low = 0x90
            elif byte == 0xF4:
                high = 0x8F
        else:
            return False
    state.need = need
    state.low = low
    state.high = high
    return True


cdef bint is_utf8(const unsigned char* data, size_t size) noexcept nogil:
    """Whether these bytes are a whole, valid text."""
    cdef Utf8 state
    state.need = state.low = state.high = 0
    return utf8_feed(&state, data, size) and state.need == 0


def valid_utf8(data not None):
    """Whether the bytes-like `data` is a whole, valid UTF-8 text (RFC 3629)."""
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    return is_utf8(&view[0], view.shape[0]) if view.shape[0] else True


cdef class Utf8Validator:
    """Validates a text that comes in pieces."""

    cdef Utf8 state
    cdef bint wrong

    def feed(self, data not None):
        """Take the next bytes; return whether a valid text can begin with all that was fed so far."""
        cdef const unsigned char[::1] view = memoryview(data).cast("B")
        if view.shape[0] and not self.wrong:
            self.wrong = not utf8_feed(&self.state, &view[0], view.shape[0])
        return not self.wrong

    @property
    def complete(self):
        """Whether the text may end here."""
        return self.state.need == 0 and not self.wrong
