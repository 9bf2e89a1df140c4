# JSON (RFC 8259): is this a valid text?
#
# Invariant: what it accepts, every JSON parser accepts. An event's data is passed on byte for byte, so what slips
# through here would reach every subscriber. Strings may hold any bytes beyond ASCII: the caller checks that they are
# UTF-8.


cdef struct Scan:
    const unsigned char* end
    int wide  # not 0 if a string may have had a byte beyond ASCII; elsewhere the grammar has none
    bint escaped  # whether a string had an escape since this was last reset
    bint too_deep
    bint half_pair


cdef inline const unsigned char* skip_space(const unsigned char* p, const unsigned char* end) noexcept nogil:
    while p < end and (p[0] == 0x20 or p[0] == 0x0A or p[0] == 0x0D or p[0] == 0x09):
        p += 1
    return p


cdef int hex4(const unsigned char* p, const unsigned char* end) noexcept nogil:
    """The value of the four hexadecimal digits at `p`; -1 if they are not there."""
    cdef int value = 0, i
    if end - p < 4:
        return -1
    for i in range(4):
        value <<= 4
        if 0x30 <= p[i] <= 0x39:
            value |= p[i] - 0x30
        elif 0x41 <= p[i] <= 0x46:
            value |= p[i] - 0x37
        elif 0x61 <= p[i] <= 0x66:
            value |= p[i] - 0x57
        else:
            return -1
    return value


cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif

    /* Behind the bytes from p on that stand for themselves in a string: to the first quote, backslash or control
     * character, or to somewhere near the end. Sets *wide if there is a byte beyond ASCII among those looked at. */
    static inline const unsigned char* skip_plain(const unsigned char* p, const unsigned char* end, int* wide) {
    #ifdef __SSE2__ /* every x86-64 has it: sixteen bytes take as long as eight do below */
        const __m128i quotes = _mm_set1_epi8(0x22), slashes = _mm_set1_epi8(0x5C), controls = _mm_set1_epi8(0x1f);
        for (; end - p >= 16; p += 16) {
            __m128i bytes = _mm_loadu_si128((const __m128i*) p);
            *wide |= _mm_movemask_epi8(bytes);
            __m128i marks = _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(bytes, quotes), _mm_cmpeq_epi8(bytes, slashes)),
                                         _mm_cmpeq_epi8(_mm_min_epu8(bytes, controls), bytes));
            int mask = _mm_movemask_epi8(marks);
            if (mask != 0)
                return p + __builtin_ctz((unsigned) mask);
        }
    #endif
        /* Such a test may mark a harmless byte above a marked one, never the lowest one wrongly. */
        for (; end - p >= 8; p += 8) {
            uint64_t word;
            memcpy(&word, p, 8);
            *wide |= (word & 0x8080808080808080u) != 0;
            uint64_t quote = word ^ 0x2222222222222222u, slash = word ^ 0x5C5C5C5C5C5C5C5Cu;
            uint64_t marks = (((quote - 0x0101010101010101u) & ~quote) | ((slash - 0x0101010101010101u) & ~slash)
                              | ((word - 0x2020202020202020u) & ~word)) & 0x8080808080808080u;
            if (marks == 0)
                continue;
    #if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
            return p + (__builtin_ctzll(marks) >> 3);
    #else
            break;
    #endif
        }
        return p;
    }
    """
    const unsigned char* skip_plain(const unsigned char* p, const unsigned char* end, int* wide) noexcept nogil


cdef const unsigned char* skip_string(Scan* scan, const unsigned char* p) noexcept nogil:
    """From behind the opening quote to behind the closing one; NULL if the string is not valid."""
    cdef:
        const unsigned char* end = scan.end
        unsigned char c
        int unit
    while True:
        p = skip_plain(p, end, &scan.wide)
        if p == end:
            return NULL
        c = p[0]
        scan.wide |= c & 0x80
        p += 1
        if c == 0x22:
            return p
        if c < 0x20:
            return NULL
        if c == 0x5C:
            scan.escaped = True
            if p == end:
                return NULL
            c = p[0]
            p += 1
            if c == 0x75:  # \uXXXX, or two of them for what lies beyond the 16 bits (RFC 8259, section 7)
                unit = hex4(p, end)
                if unit < 0:
                    return NULL
                p += 4
                if 0xD800 <= unit <= 0xDFFF:
                    # The grammar allows half of a pair, but parsers differ on it, and many refuse the whole text.
                    if unit < 0xDC00 and end - p >= 6 and p[0] == 0x5C and p[1] == 0x75:
                        unit = hex4(p + 2, end)
                    else:
                        unit = -1
                    if not 0xDC00 <= unit <= 0xDFFF:
                        scan.half_pair = True
                        return NULL
                    p += 6
            elif not (c == 0x22 or c == 0x5C or c == 0x2F or c == 0x62 or c == 0x66 or c == 0x6E or c == 0x72
                      or c == 0x74):
                return NULL


cdef const unsigned char* skip_digits(const unsigned char* p, const unsigned char* end) noexcept nogil:
    """Behind the digits at `p`; NULL if there is none."""
    if p == end or not 0x30 <= p[0] <= 0x39:
        return NULL
    while p < end and 0x30 <= p[0] <= 0x39:
        p += 1
    return p


cdef const unsigned char* skip_number(const unsigned char* p, const unsigned char* end) noexcept nogil:
    if p[0] == 0x2D:
        p += 1
    if p < end and p[0] == 0x30:
        p += 1
    else:
        p = skip_digits(p, end)
        if p == NULL:
            return NULL
    if p < end and p[0] == 0x2E:
        p = skip_digits(p + 1, end)
        if p == NULL:
            return NULL
    if p < end and (p[0] == 0x65 or p[0] == 0x45):
        p += 1
        if p < end and (p[0] == 0x2B or p[0] == 0x2D):
            p += 1
        return skip_digits(p, end)
    return p


cdef const unsigned char* skip_value(Scan* scan, const unsigned char* p, int depth) noexcept nogil:
    """From the first byte of a value to behind it; NULL if it is not valid. It may hold `depth` levels more."""
    cdef:
        const unsigned char* end = scan.end
        unsigned char closing
    if p == end:
        return NULL
    if p[0] == 0x22:
        return skip_string(scan, p + 1)
    if p[0] == 0x2D or 0x30 <= p[0] <= 0x39:
        return skip_number(p, end)
    if p[0] == 0x74:
        return p + 4 if end - p >= 4 and memcmp(p, b"true", 4) == 0 else NULL
    if p[0] == 0x66:
        return p + 5 if end - p >= 5 and memcmp(p, b"false", 5) == 0 else NULL
    if p[0] == 0x6E:
        return p + 4 if end - p >= 4 and memcmp(p, b"null", 4) == 0 else NULL
    if p[0] != 0x7B and p[0] != 0x5B:
        return NULL
    if depth <= 0:
        scan.too_deep = True
        return NULL
    closing = p[0] + 2  # "{" and "}", "[" and "]" lie two apart in ASCII
    p = skip_space(p + 1, end)
    if p < end and p[0] == closing:
        return p + 1
    while True:
        if closing == 0x7D:
            if p == end or p[0] != 0x22:
                return NULL
            p = skip_string(scan, p + 1)
            if p == NULL:
                return NULL
            p = skip_space(p, end)
            if p == end or p[0] != 0x3A:
                return NULL
            p = skip_space(p + 1, end)
        p = skip_value(scan, p, depth - 1)
        if p == NULL:
            return NULL
        p = skip_space(p, end)
        if p == end:
            return NULL
        if p[0] == closing:
            return p + 1
        if p[0] != 0x2C:
            return NULL
        p = skip_space(p + 1, end)


def check_json(data not None, int depth=64):
    """Check that the bytes-like `data` is one valid JSON text (RFC 8259) nested at most `depth` levels deep.

    Returns None; raises ValueError with a message for people if it is not.
    """
    cdef:
        const unsigned char[::1] view = memoryview(data).cast("B")
        const unsigned char* start
        const unsigned char* p
        Scan scan
    if view.shape[0] == 0:
        raise ValueError("the message is empty")
    start = &view[0]
    scan.end = start + view.shape[0]
    scan.wide = 0
    scan.escaped = scan.too_deep = scan.half_pair = False
    p = skip_value(&scan, skip_space(start, scan.end), depth)
    if scan.too_deep:
        raise ValueError(f"JSON is nested deeper than {depth} levels")
    if scan.half_pair:
        raise ValueError("a string holds half of a surrogate pair")
    if p == NULL or skip_space(p, scan.end) != scan.end:
        raise ValueError("not valid JSON")
    if not is_utf8(start, view.shape[0]):
        raise ValueError("not valid UTF-8")
