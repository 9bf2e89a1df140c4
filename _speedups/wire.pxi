# The numbers of RFC 6455 and RFC 7692 and the broker's own close codes, and the head of a frame that a server sends.
#
# Invariant: nothing here has a state.

cdef enum:
    OP_CONTINUATION = 0
    OP_TEXT = 1
    OP_BINARY = 2
    OP_CLOSE = 8
    OP_PING = 9
    OP_PONG = 10

    RSV1 = 0x40  # of the first byte of a frame: its message is deflated (RFC 7692, section 6)

    CLOSE_NORMAL = 1000
    CLOSE_PROTOCOL_ERROR = 1002
    CLOSE_NO_STATUS = 1005
    CLOSE_ABNORMAL = 1006
    CLOSE_INVALID_DATA = 1007
    CLOSE_TOO_BIG = 1009
    CLOSE_SLOW_CONSUMER = 4000
    CLOSE_PING_TIMEOUT = 4001
    CLOSE_NOT_READING = 4003

    MAX_HEAD = 14  # two bytes, eight of length, four of key
    MAX_CONTROL = 125  # RFC 6455, section 5.5
    MAX_SERVER_HEAD = 10  # the same without a key


cdef size_t write_head(unsigned char* out, int opcode, size_t size) noexcept nogil:
    """Write the head of an unmasked, final frame (at most MAX_SERVER_HEAD bytes) and return its length."""
    cdef int i
    out[0] = 0x80 | opcode
    if size < 126:
        out[1] = size
        return 2
    if size < 65536:
        out[1] = 126
        out[2] = size >> 8
        out[3] = size & 0xFF
        return 4
    out[1] = 127
    for i in range(8):
        out[2 + i] = (size >> (56 - 8 * i)) & 0xFF
    return 10


def frame(int opcode, data not None):
    """Return `data` (bytes-like) as one final, unmasked frame, as a server sends it (RFC 6455, section 5.2)."""
    cdef const unsigned char[::1] view = memoryview(data).cast("B")
    cdef unsigned char head[MAX_SERVER_HEAD]
    cdef size_t size = write_head(head, opcode, view.shape[0])
    return PyBytes_FromStringAndSize(<char*> head, size) + bytes(view)


def is_close_code(int code):
    """Whether a peer may send `code` in a close frame (RFC 6455, section 7.4)."""
    return 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
