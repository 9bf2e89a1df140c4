# Compressed messages (permessage-deflate, RFC 7692): one from a client is inflated, an event for many deflated once.
#
# Invariant: no message depends on another one. Both sides have agreed to no context takeover, so that no
# connection holds a window, and one deflated frame is right for all who get the event.

import zlib

cdef enum:
    FULL_WINDOW = 15  # bits of the largest window (RFC 1951, section 2)

    # Shorter payloads are sent as they are: of an event of 100 bytes deflating saves a fifth, for the time of several
    # system calls.
    MIN_DEFLATE = 128

    # Of zlib's levels the quickest. The event loop waits meanwhile: for 100 kB of JSON 0.7 ms in place of 2.5 at the
    # default level, and it comes to 28 % in place of 23. Of short events both make the same.
    DEFLATE_LEVEL = 1

    # A sender that cannot flush ends a deflate stream in place of it (RFC 7692, section 7.2.3.4), once or twice in a
    # message. Each needs a new inflater and another copy of what follows.
    MAX_STREAMS = 64

# What ends a flush, and is left out at the end of a message (RFC 7692, section 7.2.1).
cdef bytes TAIL = b"\x00\x00\xff\xff"


cdef uint64_t most_deflated(uint64_t max_size) noexcept nogil:
    """How long a message of `max_size` bytes may become by deflating it, at the worst: nine bits for each byte, as the
    fixed codes have them (RFC 1951, section 3.2.6), and something for blocks and flushes."""
    return max_size + (max_size >> 3) + 64


cdef bytes inflate(const unsigned char* data, size_t size, size_t max_size, int* code):
    """Return the payload of a compressed message (RFC 7692, section 7.2.2).

    None if it is none, with the close code in `code`: 1007 for what is not deflate (the RFC leaves that open; Node's ws
    does the same, websockets says 1002), 1009 for more than `max_size` bytes, of which no more are made to find that
    out. That the last block does not end passes, as with both of them.
    """
    cdef bytes source = PyBytes_FromStringAndSize(NULL, size + len(TAIL))
    cdef bytes part
    cdef list parts = []
    cdef int i
    memcpy(PyBytes_AS_STRING(source), data, size)
    memcpy(PyBytes_AS_STRING(source) + size, PyBytes_AS_STRING(TAIL), len(TAIL))
    for i in range(MAX_STREAMS):
        inflater = zlib.decompressobj(-FULL_WINDOW)
        try:
            part = inflater.decompress(source, max_size + 1)
        except zlib.error:
            code[0] = CLOSE_INVALID_DATA
            return None
        if <size_t> len(part) > max_size:
            break
        parts.append(part)
        if not inflater.eof:
            return part if i == 0 else b"".join(parts)
        max_size -= len(part)
        source = inflater.unused_data
    code[0] = CLOSE_TOO_BIG
    return None


@cython.final
cdef class Deflater:
    """The one deflater of an event loop. `count` is how many frames it has deflated."""

    cdef object compressor
    cdef uint64_t count

    cdef bytes deflate(self, const unsigned char* frame, size_t size):
        """Return the finished text frame at `frame` once more with its message deflated; None if that saves nothing."""
        cdef:
            unsigned char head[MAX_SERVER_HEAD]
            size_t head_size = 2 if frame[1] < 126 else 4 if frame[1] == 126 else 10
            size_t body_size
            bytes body
        if size - head_size < MIN_DEFLATE:
            return None
        # A full flush makes it forget what was before, so that each message stands alone; a new one for each would take
        # three times as long. One that has failed is not used again.
        compressor, self.compressor = self.compressor, None
        if compressor is None:
            compressor = zlib.compressobj(DEFLATE_LEVEL, zlib.DEFLATED, -FULL_WINDOW)
        body = compressor.compress(PyBytes_FromStringAndSize(<char*> frame + head_size, size - head_size))
        body += compressor.flush(zlib.Z_FULL_FLUSH)
        self.compressor = compressor
        self.count += 1
        body_size = len(body) - len(TAIL)
        head_size = write_head(head, OP_TEXT | RSV1, body_size)
        if head_size + body_size >= size:
            return None
        return PyBytes_FromStringAndSize(<char*> head, head_size) + body[:body_size]
