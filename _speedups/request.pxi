# The head of a plain request for a WebSocket (RFC 6455, section 4.1): bytes in, its values out.
#
# Invariant: what is found here websockets would find as well. All that is wrong, rare or only unusual is left to it.

cdef enum:
    # The values of a request, by their places in what `read_upgrade` gives.
    PLAIN_PATH = 0
    PLAIN_HOST = 1
    PLAIN_KEY = 2
    PLAIN_ORIGIN = 3
    PLAIN_EXTENSIONS = 4
    PLAIN_SUBPROTOCOLS = 5
    PLAIN_FORWARDED = 6
    PLAIN_VALUES = 7
    # These have one right value each.
    PLAIN_UPGRADE = 7
    PLAIN_CONNECTION = 8
    PLAIN_VERSION = 9
    PLAIN_HEADERS = 10

    # Its presence makes a request unusual.
    UNUSUAL = 10
    # It must be 0.
    CONTENT_LENGTH = 11
    # All others say nothing about the WebSocket.
    OTHER = 12

    MOST_HEADERS = 100  # websockets takes 128


cdef struct KnownHeader:
    const char* name  # in lower case
    uint8_t size
    uint8_t which

cdef KnownHeader[12] KNOWN_HEADERS = [
    KnownHeader(b"host", 4, PLAIN_HOST),
    KnownHeader(b"origin", 6, PLAIN_ORIGIN),
    KnownHeader(b"upgrade", 7, PLAIN_UPGRADE),
    KnownHeader(b"connection", 10, PLAIN_CONNECTION),
    KnownHeader(b"sec-websocket-key", 17, PLAIN_KEY),
    KnownHeader(b"sec-websocket-version", 21, PLAIN_VERSION),
    KnownHeader(b"sec-websocket-protocol", 22, PLAIN_SUBPROTOCOLS),
    KnownHeader(b"sec-websocket-extensions", 24, PLAIN_EXTENSIONS),
    KnownHeader(b"authorization", 13, UNUSUAL),
    KnownHeader(b"content-length", 14, CONTENT_LENGTH),
    KnownHeader(b"transfer-encoding", 17, UNUSUAL),
    KnownHeader(b"", 0, OTHER),
]


cdef struct Span:
    const unsigned char* start  # NULL: there is none
    size_t size


cdef inline unsigned char lower(unsigned char byte) noexcept:
    return byte | 0x20 if b"A"[0] <= byte <= b"Z"[0] else byte


cdef bint equals_lower(const unsigned char* text, const char* wanted, size_t size) noexcept:
    """Whether a text is `wanted`, which is in lower case, in any case."""
    cdef size_t i
    for i in range(size):
        if lower(text[i]) != <unsigned char> wanted[i]:
            return False
    return True


cdef inline bint is_token_byte(unsigned char byte) noexcept:
    """Whether it may be in a token (RFC 9110, section 5.6.2), but for the signs that no header in use has."""
    return (b"a"[0] <= lower(byte) <= b"z"[0] or b"0"[0] <= byte <= b"9"[0] or byte == b"-"[0] or byte == b"_"[0]
            or byte == b"."[0])


cdef uint8_t which_header(Span name, Span forwarded) noexcept:
    cdef KnownHeader* known = KNOWN_HEADERS
    if name.size == forwarded.size and equals_lower(name.start, <const char*> forwarded.start, name.size):
        return PLAIN_FORWARDED
    while known.size:
        if known.size == name.size and equals_lower(name.start, known.name, name.size):
            return known.which
        known += 1
    return OTHER


cdef bint lists_upgrade(Span value) noexcept:
    """Whether a list of tokens (RFC 9110, section 5.6.1) is one without empty elements, and has "upgrade" in it."""
    cdef size_t i = 0, start
    cdef bint found = False
    while True:
        while i < value.size and value.start[i] == b" "[0]:
            i += 1
        start = i
        while i < value.size and is_token_byte(value.start[i]):
            i += 1
        if i == start:
            return False
        found = found or (i - start == 7 and equals_lower(value.start + start, b"upgrade", 7))
        while i < value.size and value.start[i] == b" "[0]:
            i += 1
        if i == value.size:
            return found
        if value.start[i] != b","[0]:
            return False
        i += 1


cdef bint is_key(Span value) noexcept:
    """Whether it is 16 bytes in Base64 (RFC 6455, section 4.1)."""
    cdef size_t i
    cdef unsigned char byte
    if value.size != 24 or value.start[22] != b"="[0] or value.start[23] != b"="[0]:
        return False
    for i in range(22):
        byte = value.start[i]
        if not (b"a"[0] <= lower(byte) <= b"z"[0] or b"0"[0] <= byte <= b"9"[0] or byte == b"+"[0]
                or byte == b"/"[0]):
            return False
    return True


cdef bint is_host(Span value) noexcept:
    """Whether it is a name or an IPv4 address, with or without a port."""
    cdef size_t i = 0
    while i < value.size and is_token_byte(value.start[i]):
        i += 1
    if i == 0 or i == value.size:
        return i > 0
    if value.start[i] != b":"[0] or i + 1 == value.size:
        return False
    for i in range(i + 1, value.size):
        if not b"0"[0] <= value.start[i] <= b"9"[0]:
            return False
    return True


cdef bint find_path(const unsigned char** place, const unsigned char* end, Span* path) noexcept:
    """Read the request line; the path is what stands before a "?". Moves `place` behind its end."""
    cdef const unsigned char* byte = place[0] + 4
    if end - place[0] < 4 or memcmp(place[0], b"GET ", 4) != 0:
        return False
    path.start = byte
    path.size = 0
    while byte < end and 0x21 <= byte[0] <= 0x7E:
        if byte[0] == b"?"[0] and path.size == 0:
            path.size = byte - path.start
        byte += 1
    if path.size == 0:
        path.size = byte - path.start
    if path.size == 0 or path.start[0] != b"/"[0] or end - byte < 11 or memcmp(byte, b" HTTP/1.1\r\n", 11) != 0:
        return False
    place[0] = byte + 11
    return True


cdef bint find_header(const unsigned char** place, const unsigned char* end, Span* name, Span* value) noexcept:
    """Read one header, whose value is printable ASCII. Moves `place` behind the end of its line."""
    cdef const unsigned char* byte = place[0]
    name.start = byte
    while byte < end and is_token_byte(byte[0]):
        byte += 1
    name.size = byte - name.start
    if name.size == 0 or byte == end or byte[0] != b":"[0]:
        return False
    byte += 1
    while byte < end and byte[0] == b" "[0]:
        byte += 1
    value.start = byte
    while byte < end and 0x20 <= byte[0] <= 0x7E:
        byte += 1
    value.size = byte - value.start
    if end - byte < 2 or byte[0] != b"\r"[0] or byte[1] != b"\n"[0]:
        return False
    while value.size and value.start[value.size - 1] == b" "[0]:
        value.size -= 1
    place[0] = byte + 2
    return True


cdef bint find_headers(const unsigned char* byte, const unsigned char* end, Span forwarded, Span* found) noexcept:
    """Read all headers, up to the empty line at `end`. Each that is known may be there once."""
    cdef Span name, value
    cdef uint8_t which
    cdef int count = 0
    while not (end - byte == 2 and byte[0] == b"\r"[0] and byte[1] == b"\n"[0]):
        count += 1
        if count > MOST_HEADERS or not find_header(&byte, end, &name, &value):
            return False
        which = which_header(name, forwarded)
        if which == OTHER or which == CONTENT_LENGTH and value.size == 1 and value.start[0] == b"0"[0]:
            continue
        if which >= UNUSUAL or value.size == 0 or found[which].start != NULL:
            return False
        found[which] = value
    return True


def read_upgrade(bytes head not None, bytes forwarded not None):
    """Read a complete head of a request, if it is a plain one for a WebSocket.

    `forwarded` is the name of the header with the client's address, in lower case. Returns the path without its query,
    Host, Sec-WebSocket-Key, Origin, Sec-WebSocket-Extensions, Sec-WebSocket-Protocol, and the header of this name, each
    as a str, or None where it is absent. Returns None for a request that is not plain, whatever it is.
    """
    cdef Span found[PLAIN_HEADERS]
    cdef Span name
    cdef const unsigned char* byte = <const unsigned char*> PyBytes_AS_STRING(head)
    cdef const unsigned char* end = byte + PyBytes_GET_SIZE(head)
    cdef int which
    name.start = <const unsigned char*> PyBytes_AS_STRING(forwarded)
    name.size = PyBytes_GET_SIZE(forwarded)
    memset(found, 0, sizeof(found))
    if not find_path(&byte, end, &found[PLAIN_PATH]) or not find_headers(byte, end, name, found):
        return None
    for which in (PLAIN_HOST, PLAIN_KEY, PLAIN_UPGRADE, PLAIN_CONNECTION, PLAIN_VERSION):
        if found[which].start == NULL:
            return None
    if not (found[PLAIN_UPGRADE].size == 9 and equals_lower(found[PLAIN_UPGRADE].start, b"websocket", 9)
            and found[PLAIN_VERSION].size == 2 and memcmp(found[PLAIN_VERSION].start, b"13", 2) == 0
            and lists_upgrade(found[PLAIN_CONNECTION]) and is_key(found[PLAIN_KEY]) and is_host(found[PLAIN_HOST])):
        return None
    return tuple([None if found[which].start == NULL
                  else PyUnicode_DecodeASCII(<const char*> found[which].start, found[which].size, NULL)
                  for which in range(PLAIN_VALUES)])
