# Bytes to frames to messages (RFC 6455, section 5), for the server's side of a connection.
#
# Invariant: everything that decides whether incoming frames are well formed is in this file, but for UTF-8
# (utf8.pxi), inflating (deflate.pxi) and the body of a close frame (connection.pxi). It knows no socket and no topic:
# a subclass says what happens to a whole message, to a control frame and to a failure.


class FrameError(Exception):
    """The peer broke the protocol: `code` is the close code that answers it, `reason` says why."""

    def __init__(self, int code, str reason):
        super().__init__(reason)
        self.code = code
        self.reason = reason


cdef class Frames:
    """Reads the frames of one peer and puts messages together.

    Its subclass overrides `on_message`, `on_control` and `on_failure`. It may set `halted` in them: reading then stops
    after that frame, and `read` tells how far it came.
    """

    cdef:
        public size_t max_size
        uint32_t max_fragments
        bint halted
        bint failed
        readonly bint inflates  # compressed messages may come (RFC 7692)
        # The frame under way: its head as far as it has come, then what its head said.
        uint8_t head_size
        bint in_body
        bint fin
        uint8_t opcode
        unsigned char head[MAX_HEAD]
        unsigned char key[4]
        uint64_t body_size
        uint64_t body_read
        # The message under way; `message` holds its bytes as far as they have come.
        uint8_t message_opcode
        bint compressed
        Utf8 utf8
        uint32_t fragments
        Array message
        # The control frame under way, which may come between the fragments of a message.
        unsigned char* control

    def __dealloc__(self):
        release(&self.message)
        free(self.control)

    cdef int on_message(self, int opcode, unsigned char* data, size_t size, bint checked) except -1:
        """Take a whole message. `checked` says that its bytes are known to be UTF-8; a text where they are not is for
        the subclass to call `is_text` on."""
        raise NotImplementedError

    cdef int on_control(self, int opcode, unsigned char* data, size_t size) except -1:
        raise NotImplementedError

    cdef int on_failure(self, int code, str reason) except -1:
        raise NotImplementedError

    cdef void on_inflated(self, size_t size) noexcept:
        """Take note that a message of this size was inflated, which takes its time."""

    cdef bint is_text(self, int opcode, const unsigned char* data, size_t size, bint checked) except -1:
        """Whether a message may be taken; False for a text that is not UTF-8, which fails the connection (RFC 6455,
        section 8.1)."""
        if opcode != OP_TEXT or checked or is_utf8(data, size):
            return True
        self.fail(CLOSE_INVALID_DATA, "a text message is not UTF-8")
        return False

    cdef int fail(self, int code, str reason) except -1:
        self.failed = True
        self.forget_message()
        return self.on_failure(code, reason)

    cdef void forget_message(self) noexcept:
        release(&self.message)
        self.message_opcode = 0
        self.compressed = False
        self.fragments = 0
        self.utf8.need = 0

    cdef size_t read(self, unsigned char* data, size_t size) except? 0:
        """Take bytes from the peer, in place: they are unmasked where they lie. Return how many were used up.

        All of them are, unless `halted` was set by a callback. After a failure the rest is thrown away.
        """
        cdef:
            unsigned char* start = data
            unsigned char* end = data + size
            size_t part
        while data < end and not self.failed and not self.halted:
            if not self.in_body:
                if self.head_size == 0:
                    part = self.parse_head(data, end - data)
                    if part == 0 and not self.failed:
                        self.head_size = <uint8_t> (end - data)
                        memcpy(self.head, data, self.head_size)
                        return size
                    data += part
                else:
                    # A head that came in pieces is collected byte by byte: it has at most 14 of them.
                    self.head[self.head_size] = data[0]
                    self.head_size += 1
                    data += 1
                    part = self.parse_head(self.head, self.head_size)
                    if part == 0:
                        continue
                if self.failed:
                    break
                self.head_size = 0
                self.in_body = True
                self.body_read = 0
            part = min(<uint64_t> (end - data), self.body_size - self.body_read)
            if part == 0 and self.body_size:
                break  # the head came, and nothing of its body yet
            self.read_body(data, part)
            data += part
        return size if self.failed else data - start

    @cython.final
    cdef size_t parse_head(self, const unsigned char* head, size_t size) except? 0:
        """Return the length of the head at `head`, or 0 if more of it must come. Fails on what no head may say."""
        cdef size_t length
        cdef uint64_t body = 0
        if not self.check_first_byte(head[0]) or size < 2:
            return 0
        length = self.read_length(head, size, &body)
        if length == 0 or (not self.fits(body) and head[0] & 0x0F < OP_CLOSE and not self.check_size(body)):
            return 0
        if size < length + 4:
            return 0
        memcpy(self.key, head + length, 4)
        self.fin = head[0] & 0x80 != 0
        self.opcode = head[0] & 0x0F
        self.body_size = body
        return length + 4

    @cython.final
    cdef inline bint check_first_byte(self, uint8_t first) except -1:
        """Whether a frame may begin with this byte now: flags and opcode. Fails if not."""
        cdef uint8_t opcode = first & 0x0F
        if first & 0x70:
            # RFC 7692, section 6: of a message's first frame the first bit says that it is compressed.
            if first & 0x70 != RSV1 or not self.inflates or not 0 < opcode < OP_CLOSE:
                self.fail(CLOSE_PROTOCOL_ERROR, "reserved bits must be 0")
                return False
            self.compressed = True
        if opcode > OP_PONG or OP_BINARY < opcode < OP_CLOSE:
            self.fail(CLOSE_PROTOCOL_ERROR, f"opcode {<int> opcode} is reserved")
        elif opcode >= OP_CLOSE and not first & 0x80:
            self.fail(CLOSE_PROTOCOL_ERROR, "a control frame must not be fragmented")
        elif opcode == OP_CONTINUATION and not self.message_opcode:
            self.fail(CLOSE_PROTOCOL_ERROR, "a continuation frame without a message to continue")
        elif 0 < opcode < OP_CLOSE and self.message_opcode:
            self.fail(CLOSE_PROTOCOL_ERROR, "a new message before the end of the last one")
        return not self.failed

    @cython.final
    cdef inline size_t read_length(self, const unsigned char* head, size_t size, uint64_t* body) except? 0:
        """Read the length of the body. Returns where the key begins, or 0 if more must come or it failed."""
        cdef size_t i
        if not head[1] & 0x80:
            self.fail(CLOSE_PROTOCOL_ERROR, "a client must mask its frames")
            return 0
        body[0] = head[1] & 0x7F
        if head[0] & 0x0F >= OP_CLOSE and body[0] > MAX_CONTROL:
            self.fail(CLOSE_PROTOCOL_ERROR, "a control frame is longer than 125 bytes")
            return 0
        if body[0] < 126:
            return 2
        if body[0] == 126:
            if size < 4:
                return 0
            body[0] = (<uint64_t> head[2] << 8) | head[3]
            if body[0] < 126:
                self.fail(CLOSE_PROTOCOL_ERROR, "a length must be written in its shortest form")
                return 0
            return 4
        if size < 10:
            return 0
        body[0] = 0
        for i in range(2, 10):
            body[0] = (body[0] << 8) | head[i]
        if body[0] >> 63:
            self.fail(CLOSE_PROTOCOL_ERROR, "a length must not have its highest bit set")
            return 0
        if body[0] < 65536:
            self.fail(CLOSE_PROTOCOL_ERROR, "a length must be written in its shortest form")
            return 0
        return 10

    @cython.final
    cdef inline bint fits(self, uint64_t body) noexcept:
        """Whether `body` bytes more keep the message under way within max_size and max_fragments."""
        return self.message.size + body <= self.max_size and self.fragments < self.max_fragments

    @cython.final
    cdef bint check_size(self, uint64_t body) except -1:
        """Whether a message that does not fit is allowed all the same, because it is compressed. Fails if not."""
        if self.message.size + body > self.max_size and (
                not self.compressed or self.message.size + body > most_deflated(self.max_size)):
            self.fail(CLOSE_TOO_BIG, f"a message is longer than {self.max_size} bytes")
        elif self.fragments >= self.max_fragments:
            self.fail(CLOSE_TOO_BIG, f"a message has more than {self.max_fragments} fragments")
        return not self.failed

    @cython.final
    cdef int read_body(self, unsigned char* data, size_t size) except -1:
        """Take `size` bytes of the body, which may be all of it, a part, or (for an empty body) nothing."""
        cdef bint whole = self.body_read == 0 and size == self.body_size
        if size:
            apply_mask(data, size, self.key, self.body_read)
            self.body_read += size
        cdef bint ended = self.body_read == self.body_size
        if ended:
            self.in_body = False
        if self.opcode >= OP_CLOSE:
            return self.read_control(data, size, whole, ended)
        if whole and self.fin and self.opcode != OP_CONTINUATION:
            # The way of nearly every message: one frame, all here. It is handed on where it lies.
            if self.compressed:
                self.compressed = False
                return self.inflate_message(self.opcode, data, size)
            return self.on_message(self.opcode, data, size, False)
        if self.opcode != OP_CONTINUATION and not self.message_opcode:
            self.message_opcode = self.opcode
        return self.assemble(data, size, ended)

    cdef int read_control(self, unsigned char* data, size_t size, bint whole, bint ended) except -1:
        if whole:
            return self.on_control(self.opcode, data, size)
        if self.control == NULL:
            self.control = <unsigned char*> malloc(MAX_CONTROL)
            if self.control == NULL:
                raise MemoryError
        memcpy(self.control + self.body_read - size, data, size)
        if not ended:
            return 0
        cdef unsigned char* control = self.control
        self.control = NULL
        try:
            return self.on_control(self.opcode, control, self.body_size)
        finally:
            free(control)

    cdef int assemble(self, unsigned char* data, size_t size, bint ended) except -1:
        """Add to the message under way, and hand it on at its end."""
        cdef:
            size_t most
            unsigned char* message
            int opcode = self.message_opcode
            bint compressed = self.compressed
        if opcode == OP_TEXT and not self.compressed and not utf8_feed(&self.utf8, data, size):
            return self.fail(CLOSE_INVALID_DATA, "a text message is not UTF-8")
        if self.message.size + size > self.message.room:
            # Capacity grows with what has come, not with what a head promises: a promise costs the peer nothing. It
            # doubles, so that many small fragments are not copied again and again, up to what the message can become.
            most = self.message.size + size + self.body_size - self.body_read if self.fin else self.max_size
            grow(&self.message, self.message.size + size, min(2 * self.message.room, most))
        if size:
            memcpy(self.message.data + self.message.size, data, size)
        self.message.size += size
        if not ended:
            return 0
        self.fragments += 1
        if not self.fin:
            return 0
        if opcode == OP_TEXT and self.utf8.need:
            return self.fail(CLOSE_INVALID_DATA, "a text message is not UTF-8")
        message = self.message.data
        size = self.message.size
        self.message.data = NULL
        self.forget_message()
        try:
            if compressed:
                return self.inflate_message(opcode, message, size)
            return self.on_message(opcode, message, size, opcode == OP_TEXT)
        finally:
            free(message)

    cdef int inflate_message(self, int opcode, const unsigned char* data, size_t size) except -1:
        cdef int code = 0
        cdef bytes message = inflate(data, size, self.max_size, &code)
        if code == CLOSE_TOO_BIG:
            return self.fail(code, f"a compressed message is longer than {self.max_size} bytes, or of too many parts")
        if code:
            return self.fail(code, "a compressed message cannot be inflated")
        self.on_inflated(len(message))
        return self.on_message(opcode, <unsigned char*> PyBytes_AS_STRING(message), len(message), False)


cdef class FrameReader(Frames):
    """The reader on its own, for tools and tests: bytes in, messages and control frames out. No bound unless given."""

    cdef list out
    cdef object error

    def __init__(self, *, size_t max_size=1 << 62, uint32_t max_fragments=0xFFFFFFFF, bint inflates=False):
        self.max_size = max_size
        self.max_fragments = max_fragments
        self.inflates = inflates
        self.out = []

    cdef int on_message(self, int opcode, unsigned char* data, size_t size, bint checked) except -1:
        if not self.is_text(opcode, data, size, checked):
            return 0
        self.out.append((opcode, PyBytes_FromStringAndSize(<char*> data, size)))
        return 0

    cdef int on_control(self, int opcode, unsigned char* data, size_t size) except -1:
        self.out.append((opcode, PyBytes_FromStringAndSize(<char*> data, size)))
        return 0

    cdef int on_failure(self, int code, str reason) except -1:
        self.error = FrameError(code, reason)
        return 0

    def feed(self, data not None):
        """Take masked bytes as a client sends them; return the (opcode, payload) pairs that they complete.

        Raises FrameError, also on every later call, once the peer has broken the protocol; what was complete before
        the mistake is returned first.
        """
        cdef bytearray copy = bytearray(data)
        if len(copy) and self.error is None:
            self.read(<unsigned char*> PyByteArray_AS_STRING(copy), len(copy))
        out, self.out = self.out, []
        if self.error is not None and not out:
            raise self.error
        return out
