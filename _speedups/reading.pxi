# The receiving half of a connection: bytes from its transport to `Frames`, and when reading is paused.
#
# Invariant: while reading is paused, what has come already is kept, in order, and TCP holds back the rest. A turn of
# the loop is bounded: commands are carried out for `command_time` for one connection, and for TURN_SHARES times that
# for all of them. Whoever comes later is not read in this turn, not even its first command: it waits in a line, see
# `LoopState.lines`.

cdef enum:
    # Why reading is stopped.
    FOR_SESSION = 1
    FOR_ROOM = 2  # its publishes are parked (`block`)
    FOR_A_DELAY = 4


cdef class Reader(Writer):
    """The receiving half of a connection."""

    cdef:
        bint heard
        uint8_t stops
        uint8_t line  # the line that `turn` is in, if it is in one
        readonly uint32_t unanswered  # publishes that wait for a store, see keeper.pxi
        Link turn
        # What came while reading was stopped, and how much of it has been read since.
        bytearray rest
        size_t rest_read
        double spent  # how long its commands have taken in this turn, in seconds

    def feed(self, bytes data not None):
        """Read bytes that came before `start`, with the handshake."""
        if data:
            copy = bytearray(data)
            self.take(<unsigned char*> PyByteArray_AS_STRING(copy), len(data))

    def get_buffer(self, sizehint):
        """All connections of a loop read into one buffer: its bytes are used up before the next read.

        Where the commands of this turn have taken their time, only a part of it: what cannot be carried out is copied.
        """
        return self.context.buffer if self.context.work_limit else self.context.small_buffer

    def buffer_updated(self, Py_ssize_t size):
        """`size` bytes have come into the shared buffer."""
        self.take(<unsigned char*> PyByteArray_AS_STRING(self.context.buffer), size)

    def data_received(self, data):
        """The same for a transport that has its own buffer. (uvloop also forgets the handshake's method for it.)"""
        self.feed(bytes(data))

    cdef int take(self, unsigned char* data, size_t size) except -1:
        cdef size_t used
        self.heard = True
        self.context.bytes_in += size
        self.context.work_since = 0
        if self.failed:
            return 0
        if self.context.work_limit == 0 and not self.halted and self.outbox.state == OPEN:
            self.wait_in_line(FRESH)
        used = self.read(data, size)
        if used < size:
            if self.rest is None:
                self.rest = bytearray()
            self.rest += PyBytes_FromStringAndSize(<char*> data + used, size - used)
        return 0

    def pause(self):
        """Stop reading from this client; what already came is kept, and TCP does the rest."""
        self.stop_reading(FOR_SESSION)

    def resume(self):
        """Go on reading, first what came before the pause took effect. Without a `pause` it does nothing."""
        self.allow_reading(FOR_SESSION)

    def pause_for(self, double seconds):
        """Stop reading from this client for a while. It has nothing to do with `pause` and `resume`: the later ends."""
        self.stop_reading(FOR_A_DELAY)
        self.context.loop.call_later(seconds, self.end_pause)

    def end_pause(self):
        """The end of `pause_for`."""
        self.allow_reading(FOR_A_DELAY)

    cdef int stop_reading(self, uint8_t why) except -1:
        if not is_open(&self.outbox) and self.outbox.state != DISCONNECTED:
            return 0  # a connection that closes has to read, for the peer's close frame
        self.stops |= why
        self.leave_line()
        self.halt()
        return 0

    cdef int halt(self) except -1:
        if not self.halted:
            self.halted = True
            if self.outbox.state != DISCONNECTED:
                self.transport.pause_reading()
        return 0

    cdef int allow_reading(self, uint8_t why) except -1:
        self.stops &= ~why
        if self.halted and self.stops == 0:
            self.wait_in_line(FRESH)
        return 0

    cdef int wait_in_line(self, uint8_t line) except -1:
        """Read on when it is this connection's turn: `LoopContext.read_lines` calls `read_on`."""
        self.halt()
        if not self.is_in_line():
            self.context.schedule()
            self.line = line
            append(&self.context.lines[line], &self.turn)
        return 0

    cdef inline bint is_in_line(self) noexcept:
        return is_linked(&self.context.lines[self.line], &self.turn)

    cdef inline void leave_line(self) noexcept:
        remove(&self.context.lines[self.line], &self.turn)

    cdef int read_on(self) except -1:
        """Read what came while reading was stopped, and then from the socket."""
        cdef bytearray rest = self.rest
        if self.transport is None:
            return 0
        self.halted = False
        self.spent = 0
        self.context.work_since = 0
        if rest is not None:
            # It stays where it is: many a pause ends for one message, and there may be thousands of them.
            try:
                self.rest_read += self.read(<unsigned char*> PyByteArray_AS_STRING(rest) + self.rest_read,
                                            len(rest) - self.rest_read)
            except BaseException:
                self.rest_read = len(rest)  # some of it is unmasked by now, and cannot be read a second time
                self.disconnect()
                raise
            if self.rest_read == <size_t> len(rest) or self.outbox.state == CLOSED:
                self.rest = None
                self.rest_read = 0
        if not self.halted and self.transport is not None and self.outbox.state != DISCONNECTED:
            self.transport.resume_reading()
            if self.outbox.state == FINISHING:
                mark_dirty(&self.outbox)  # it may have waited for what was read now

    # The time that commands take.

    cdef void on_inflated(self, size_t size) noexcept:
        self.context.work += <uint32_t> (size >> INFLATE_SHIFT)

    cdef int count_work(self) except -1:
        """So much was done since the last call that it is time to look at the clock.

        `LoopState.work` is counted where work is done, in units of about 0.1 microseconds, so that the fast path reads
        no clock. At the first look of a read the units tell how long it took.
        """
        cdef LoopState context = self.context
        cdef double now = exact_time()
        cdef double spent = now - context.work_since if context.work_since else context.work * 1e-7
        context.work = 0
        context.work_since = now
        return self.spend(spent)

    cdef int spend(self, double seconds) except -1:
        """Count time that its commands took; let the others have their turn if it was too much."""
        cdef LoopState context = self.context
        if not is_open(&self.outbox) and self.outbox.state != DISCONNECTED:
            return 0
        if self.spent == 0:
            mark_dirty(&self.outbox)  # the end of the turn sets it back
        self.spent += seconds
        context.turn_spent += seconds
        if context.turn_spent > TURN_SHARES * context.command_time:
            context.work_limit = 0  # from now on each message is looked at
        elif self.spent <= context.command_time:
            return 0
        if self.outbox.state != FINISHING and self.stops == 0:
            self.wait_in_line(SPENT)
        return 0


cdef struct Permits:
    # The routes that may be used, see permits.pxi.
    uint64_t* serials  # each at the place of its last bits; 0 where there is none
    uint32_t mask


cdef class FastPath:
    """Carries out plain publishes without the session."""

    cdef bint publish(self, Writer connection, const unsigned char* data, size_t size, bint checked,
                      const Permits* permits) except -1:
        """Carry out a message if it is a publish that needs no session; False leaves it to the session.

        `checked` says that the message is known to be UTF-8. `permits` limits the topics; NULL: all.
        """
        raise NotImplementedError
