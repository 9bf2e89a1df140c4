# Which topics a pattern matches, and which patterns overlap. The rules are those of `broker.topics`; tests compare
# both.
#
# Invariant: names are valid (`broker.topics` has checked them), and a comparison makes no object.


cdef inline size_t token_end(const char* name, size_t size, size_t start) noexcept:
    """Where the token that begins at `start` ends."""
    while start < size and name[start] != 0x2E:
        start += 1
    return start


cdef inline bint is_wildcard(const char* name, size_t start, size_t end, char wildcard) noexcept:
    return end == start + 1 and name[start] == wildcard


cdef bint has_wildcard(bytes name) noexcept:
    """Whether a valid name is a pattern."""
    cdef const char* p = PyBytes_AS_STRING(name)
    cdef size_t size = PyBytes_GET_SIZE(name)
    return memchr(p, 0x2A, size) != NULL or memchr(p, 0x3E, size) != NULL


cdef bint overlap(bytes one, bytes other) noexcept:
    """Whether some topic is matched by both names, each a topic or a pattern.

    For names that begin with `$` and patterns that begin with a wildcard it may say so though there is none.
    """
    cdef:
        const char* a = PyBytes_AS_STRING(one)
        const char* b = PyBytes_AS_STRING(other)
        size_t a_size = PyBytes_GET_SIZE(one), b_size = PyBytes_GET_SIZE(other)
        size_t a_at = 0, b_at = 0, a_end, b_end
    while True:
        a_end = token_end(a, a_size, a_at)
        b_end = token_end(b, b_size, b_at)
        if is_wildcard(a, a_at, a_end, 0x3E) or is_wildcard(b, b_at, b_end, 0x3E):
            return True
        if not (is_wildcard(a, a_at, a_end, 0x2A) or is_wildcard(b, b_at, b_end, 0x2A)):
            if a_end - a_at != b_end - b_at or memcmp(a + a_at, b + b_at, a_end - a_at) != 0:
                return False
        if a_end == a_size or b_end == b_size:
            return a_end == a_size and b_end == b_size
        a_at = a_end + 1
        b_at = b_end + 1


cdef bint matches(bytes pattern, bytes topic) noexcept:
    """Whether a subscription to `pattern`, a topic or a pattern, gets the events of `topic`."""
    # The broker's own topics: a wildcard at the beginning does not stand for them.
    if PyBytes_AS_STRING(topic)[0] == 0x24 and PyBytes_AS_STRING(pattern)[0] != 0x24:
        return False
    return overlap(pattern, topic)


def pattern_matches(str pattern not None, str topic not None):
    """Whether a subscription to `pattern` (valid) gets an event of `topic` (valid)."""
    return matches(pattern.encode(), topic.encode())
