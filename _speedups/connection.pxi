# One client's connection behind its handshake: the protocol of its transport (asyncio.BufferedProtocol).
#
# The law of this file: everything that is written to a connection's socket is written by `Connection.write` or
# `Connection.send_batch`, whole frames in order, and directly only while the transport's own buffer is empty.

cdef extern from "<sys/uio.h>" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    cdef struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    ssize_t send(int fd, const void* data, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr* message, int flags)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL

cdef enum:
    NEW = 0
    OPEN = 1
    CLOSING = 2  # our close frame is on its way: what still comes is read for the peer's close frame alone
    CLOSED = 3

    LANE = 0
    GAP = 1
    EVENT = 2
    BATCH = 3

    # How many pieces one system call writes, and about how many bytes: more than the kernel takes at once helps nobody.
    MAX_PIECES = 64
    MAX_WRITE = 65536

    # Why reading is stopped.
    FOR_SESSION = 1
    FOR_ROOM = 2
    FOR_OTHERS = 4
    FOR_A_WHILE = 8

    # How many system calls are made for one connection before the others have their turn.
    MAX_ROUNDS = 16


cdef struct Piece:
    # One part of a write.
    int kind
    const char* data
    size_t size
    PyObject* owned  # what keeps `data` alive: an Event, or the bytes of a gap
    PyObject* subscription
    PyObject* audience
    Missed missed  # of a gap, or of the gaps by several reasons that stand at one place
    bint paired  # of a gap: the next piece is the event behind it


cdef inline Piece* new_piece(Piece* pieces, int* count, int kind, const char* data, size_t size) noexcept:
    cdef Piece* piece = &pieces[count[0]]
    count[0] += 1
    memset(piece, 0, sizeof(Piece))
    piece.kind = kind
    piece.data = data
    piece.size = size
    return piece


@cython.no_gc_clear
@cython.final
cdef class Connection(Frames):
    """One client behind its handshake.

    `session` is asked by these methods, and may be exchanged before `start`:
    `message(payload: bytes, text: bool)` for each message that the fast path does not take;
    `left(code: int, reason: str)` once, as soon as the connection takes part no more (RFC 6455, section 7.1.5; 1006
    where there was no close frame).
    """

    cdef:
        object __weakref__
        readonly LoopContext context
        public object session
        public RouteCache routes  # None: every message goes to the session
        public TokenBucket token_bucket  # None: it may publish as much as it likes
        public int mistakes  # how many commands in a row were malformed
        object transport
        # The lane ahead of events: answers, pongs, the close frame. It stands beside `fd` for the sake of the walk over
        # an audience, which reads these two of each member, and nothing else.
        unsigned char* lane
        size_t lane_room
        size_t lane_size
        int fd  # -1 where only the transport may write: TLS, or a transport without a socket
        readonly uint8_t state
        readonly bint deflates  # events may be sent compressed (RFC 7692)
        readonly bint blocked  # the kernel is full: the transport holds what it did not take
        bint resuming
        bint writing
        bint dirty
        bint heard
        readonly bint close_pending
        bint finishing
        bint hang_up  # close the transport once the lane is empty
        bint half_close  # the same, but go on reading until the peer closes
        int close_code
        object close_reason
        # The queues of the subscriptions.
        PyObject* subscriptions
        PyObject* busy
        uint32_t aside  # subscriptions that wait for what has to go out before them
        bint unsettled  # some subscription may be ready for batches again once nothing is queued any more
        bint listed  # it stands in the context's list of those that are behind
        bint told  # and was told of
        readonly uint64_t lagging_since  # in milliseconds of `now_ms`
        size_t outbox_size
        uint32_t deaf  # subscriptions with `echo` false
        uint64_t stamp
        int32_t pending_first
        int32_t pending_last
        # What came while reading was paused, and how much of it has been read since.
        bytearray rest
        size_t rest_read
        uint8_t stops
        double spent  # how long its commands have taken in this turn, in seconds
        # As a publisher: how many of its events have not found room under `block`, and the answers that wait for it.
        readonly uint32_t parked_publishes
        list held
        dict waits_at  # as its keys a `Hold` for each of these events
        uint32_t holding  # as a subscriber: subscriptions with events beyond the bound under `block`
        # The sweep.
        uint8_t waiting_for
        double due
        double asked  # when the first ping went out that had no answer yet
        PyObject* waiting_next
        PyObject* waiting_previous

    def __init__(self, LoopContext context not None, session=None):
        self.context = context
        self.session = session
        self.max_size = context.max_size
        self.max_fragments = context.max_fragments
        self.fd = -1
        self.pending_first = -1
        self.waiting_for = NOTHING

    def __dealloc__(self):
        if self.context is not None:
            self.context.wait_no_more(self)
        free(self.lane)

    # Life: start, close, loss.

    def start(self, transport not None, bytes upgrade_response=b"", int window_bits=0):
        """Take over a transport. `upgrade_response` is sent as it stands, ahead of all: the answer to the handshake.

        `window_bits` is 0 unless the handshake has agreed to compression without context takeover (RFC 7692): then it
        is what the client asked for as `server_max_window_bits`, or 15. Events are deflated once for all, with the full
        window: a client that asked for less gets them as they are, which every sender may do.
        """
        self.transport = transport
        self.inflates = window_bits > 0
        self.deflates = window_bits >= FULL_WINDOW
        sock = transport.get_extra_info("socket")
        tls = transport.get_extra_info("ssl_object") is not None
        # uvloop's TLS pauses whoever has as much as `high` waiting: with 0, also who has nothing.
        transport.set_write_buffer_limits(high=1 if tls else 0)
        if sock is not None and not tls:
            self.fd = sock.fileno()
        self.state = OPEN
        self.heard = True
        self.context.connections += 1
        if self.context.ping_interval:
            self.context.wait(self, NEXT_PING, self.context.ping_pause)
        transport.set_protocol(self)
        if upgrade_response:
            self.append(<const unsigned char*> PyBytes_AS_STRING(upgrade_response), len(upgrade_response))

    def feed(self, bytes data not None):
        """Read bytes that came before `start`, with the handshake."""
        if data:
            copy = bytearray(data)
            self.take(<unsigned char*> PyByteArray_AS_STRING(copy), len(data))

    def close(self, int code=CLOSE_NORMAL, str reason=""):
        """Begin the closing handshake (RFC 6455, section 7.1.2). What is queued is forgotten.

        The peer has `close_timeout` to answer. Does nothing if the connection closes already.
        """
        if self.state == OPEN:
            self.begin_close(code, reason)
            self.write(False)

    def finish(self, int code, str reason):
        """Close as soon as all that waits has been handed to the socket, but for what waits for the client's credit."""
        if self.state == OPEN and not self.finishing and not self.close_pending:
            self.finishing = True
            self.close_code = code
            self.close_reason = reason
            self.mark_dirty()

    def abort(self):
        """End the connection at once, without a close frame."""
        if self.transport is not None:
            self.transport.abort()

    cdef int begin_close(self, int code, str reason) except -1:
        cdef bytes text = reason.encode()[:MAX_CONTROL - 2].decode(errors="ignore").encode()
        cdef unsigned char payload[MAX_CONTROL]
        self.state = CLOSING
        payload[0] = code >> 8
        payload[1] = code & 0xFF
        memcpy(payload + 2, PyBytes_AS_STRING(text), len(text))
        self.leave(code, reason)
        self.append_frame(OP_CLOSE, payload, 0 if code == CLOSE_NO_STATUS else 2 + len(text))
        self.context.wait(self, END_OF_CLOSE, self.context.close_timeout)
        self.stops = 0
        self.read_again(0)
        return 0

    cdef int leave(self, int code, str reason) except -1:
        """Tell the session, once, that the connection takes part no more."""
        session, self.session = self.session, None
        self.routes = None
        if self.parked_publishes:
            forget_publisher(self)
        if self.listed:
            self.listed = False
            del self.context.behind[self]
        if session is not None:
            session.on_close(code, reason)
        while self.subscriptions != NULL:
            (<Subscription> self.subscriptions).cancel()
        return 0

    cdef int doom(self, int code, str reason) except -1:
        """Have the connection closed at the end of this turn: now somebody walks over its members or queues."""
        if not self.close_pending and self.state == OPEN:
            self.close_pending = True
            self.close_code = code
            self.close_reason = reason
            self.context.close_pending.append(self)
            self.context.schedule()
        return 0

    def connection_made(self, transport):
        """Nothing: the handshake's protocol was told, and `start` takes over."""

    def connection_lost(self, exc):
        """The transport has closed, for whatever reason."""
        if self.state == CLOSED:
            return
        cdef bint closed_by_frame = self.state == CLOSING
        self.state = CLOSED
        self.fd = -1
        self.context.connections -= 1
        self.context.wait_no_more(self)
        self.forget_message()
        self.rest = None
        free(self.lane)
        self.lane = NULL
        self.lane_size = self.lane_room = 0
        if not closed_by_frame:
            self.leave(CLOSE_ABNORMAL, "connection lost" if exc is None else str(exc))
        self.transport = None

    # Reading.

    def get_buffer(self, sizehint):
        """All connections of a loop read into one buffer: its bytes are used up before the next read."""
        return self.context.buffer

    def buffer_updated(self, Py_ssize_t size):
        """`size` bytes have come into the shared buffer."""
        self.take(<unsigned char*> PyByteArray_AS_STRING(self.context.buffer), size)

    def data_received(self, data):
        """The same for a transport that has its own buffer. (uvloop also forgets the handshake's method for it.)"""
        self.feed(bytes(data))

    def eof_received(self):
        """The peer sends no more, so it is gone: False lets the transport close."""
        return False

    cdef int take(self, unsigned char* data, size_t size) except -1:
        cdef size_t used
        self.heard = True
        self.context.bytes_in += size
        if self.failed:
            return 0
        used = self.read(data, size)
        if used < size:
            rest = PyBytes_FromStringAndSize(<char*> data + used, size - used)
            if self.rest is None:
                self.rest = bytearray(rest)
            else:
                self.rest += rest
        return 0

    def pause(self):
        """Stop reading from this client; what already came is kept, and TCP does the rest."""
        self.stop_reading(FOR_SESSION)

    def resume(self):
        """Go on reading, first what came before the pause took effect. Without a `pause` it does nothing."""
        self.read_again(FOR_SESSION)

    def pause_for(self, double seconds):
        """Stop reading from this client for a while. It has nothing to do with `pause` and `resume`: the later ends."""
        self.stop_reading(FOR_A_WHILE)
        self.context.loop.call_later(seconds, self.end_pause)

    def end_pause(self):
        """The end of `pause_for`."""
        self.read_again(FOR_A_WHILE)

    cdef int stop_reading(self, uint8_t why) except -1:
        if self.state != OPEN:  # who closes has to read, for the peer's close frame
            return 0
        self.stops |= why
        self.resuming = False
        if not self.halted:
            self.halted = True
            self.transport.pause_reading()
        return 0

    cdef int read_again(self, uint8_t why) except -1:
        self.stops &= ~why
        if self.halted and not self.resuming and self.stops == 0:
            self.resuming = True
            self.context.loop.call_soon(self.read_on)
        return 0

    def read_on(self):
        """The second half of `resume`, on an empty stack."""
        if not self.resuming or self.transport is None:
            return
        cdef bytearray rest = self.rest
        self.resuming = self.halted = False
        self.spent = 0
        if rest is not None:
            # It stays where it is: many a pause ends for one message, and there may be thousands of them.
            try:
                self.rest_read += self.read(<unsigned char*> PyByteArray_AS_STRING(rest) + self.rest_read,
                                            len(rest) - self.rest_read)
            except BaseException:
                self.rest_read = len(rest)  # some of it is unmasked by now, and cannot be read a second time
                raise
            if self.rest_read == <size_t> len(rest) or self.state == CLOSED:
                self.rest = None
                self.rest_read = 0
        if not self.halted and self.transport is not None:
            self.transport.resume_reading()
            if self.finishing:
                self.mark_dirty()  # it may have waited for what was read now

    cdef int on_message(self, int opcode, unsigned char* data, size_t size, bint checked) except -1:
        if self.state == OPEN and not self.close_pending:
            if self.routes is not None:
                if fast_publish(self, data, size, checked):
                    return 0
            elif self.token_bucket is not None and publish_within(self, data, size, checked):
                return 0
        if not self.is_text(opcode, data, size, checked) or self.state != OPEN or self.close_pending:
            return 0
        cdef double began = exact_time()
        self.session.message(PyBytes_FromStringAndSize(<char*> data, size), opcode == OP_TEXT)
        if self.state != OPEN:
            return 0
        if self.spent == 0:
            self.mark_dirty()  # the end of the turn sets it back
        self.spent += exact_time() - began
        if self.spent > self.context.command_time and not self.finishing:
            self.stop_reading(FOR_OTHERS)
            self.read_again(FOR_OTHERS)
        return 0

    cdef int on_control(self, int opcode, unsigned char* data, size_t size) except -1:
        cdef int code
        if opcode == OP_PING:
            if self.state == OPEN:
                self.append_frame(OP_PONG, data, size)
            return 0
        if opcode == OP_PONG:
            return 0
        # RFC 6455, section 5.5.1: nothing counts that comes after a close frame.
        self.failed = True
        if self.state == CLOSING:
            self.hang_up = True
            return self.write(False)
        code = CLOSE_NO_STATUS
        reason = ""
        if size >= 2:
            code = (data[0] << 8) | data[1]
            if not is_close_code(code):
                return self.on_failure(CLOSE_PROTOCOL_ERROR, f"{code} must not be sent as a close code")
            if not is_utf8(data + 2, size - 2):
                return self.on_failure(CLOSE_INVALID_DATA, "the reason of the close is not UTF-8")
            reason = PyBytes_FromStringAndSize(<char*> data + 2, size - 2).decode()
        elif size == 1:
            return self.on_failure(CLOSE_PROTOCOL_ERROR, "a close code has two bytes")
        self.begin_close(code, reason)
        self.hang_up = True
        return self.write(False)

    cdef int on_failure(self, int code, str reason) except -1:
        """What comes now cannot be read: say so, send no more, and let the peer close."""
        if self.state == OPEN:
            self.begin_close(code, reason)
        self.half_close = True
        return self.write(False)

    # Writing.

    def answer(self, bytes payload not None, int opcode=OP_TEXT):
        """Send one message in the lane ahead of events, at the end of this turn.

        A client that does not read its answers, so that more than `max_answers` bytes of them wait, is closed (4003).
        """
        if self.state != OPEN:
            return
        self.append_frame(opcode, <const unsigned char*> PyBytes_AS_STRING(payload), len(payload))

    def answer_publish(self, bytes payload not None):
        """Send the answer to a publish: as `answer`, but not before its event has found room everywhere (`block`)."""
        if self.parked_publishes:
            hold_answer(self, payload)
        else:
            self.answer(payload)

    cdef int find_room(self, Hold hold) except -1:
        """One of the events of this publisher has found room."""
        del self.waits_at[hold]
        self.parked_publishes -= 1
        if self.parked_publishes:
            return 0
        held, self.held = self.held, None
        if held is not None:
            for payload in held:
                self.answer(payload)
        return self.read_again(FOR_ROOM)

    cdef int fall_behind(self) except -1:
        """Note that something has to wait for this client."""
        if self.state != OPEN:
            return 0
        self.listed = True
        self.lagging_since = now_ms()
        self.context.behind[self] = None
        return 0

    @property
    def lagging(self):
        """Whether something waits for this client: for its socket, for its credit, or for the end of this turn."""
        return self.is_lagging()

    cdef bint is_lagging(self):
        cdef PyObject* link = self.subscriptions
        if self.state != OPEN:
            return False
        if self.outbox_size or self.blocked:
            return True
        while link != NULL:
            if has_something(<Subscription> link) or (<Subscription> link).lag:
                return True
            link = (<Subscription> link).connection_next
        return False

    cdef bint has_to_send(self):
        """Whether something waits that can be sent without any more credit."""
        cdef PyObject* link = self.subscriptions
        if self.busy != NULL:
            return True
        while link != NULL:
            if (<Subscription> link).lag and (<Subscription> link).credit != 0:
                return True
            link = (<Subscription> link).connection_next
        return False

    @property
    def outbox(self):
        """How many bytes wait for this client's socket: answers and queued events."""
        return self.lane_size + self.outbox_size

    cdef int append_frame(self, int opcode, const unsigned char* data, size_t size) except -1:
        cdef unsigned char head[MAX_SERVER_HEAD]
        cdef size_t head_size = write_head(head, opcode, size)
        self.append(head, head_size)
        if size:
            self.append(data, size)
        if (self.lane_size > min(<size_t> MAX_WRITE, self.context.max_answers) and self.state == OPEN
                and not self.blocked and not self.writing):
            self.write(False)  # one turn may bring megabytes of commands: their answers are not held until its end
        if self.lane_size > self.context.max_answers and self.blocked:
            self.doom(CLOSE_NOT_READING, "not_reading")
        return 0

    cdef int append(self, const unsigned char* data, size_t size) except -1:
        cdef unsigned char* grown
        if self.lane_size + size > self.lane_room:
            self.lane_room = max(self.lane_size + size, max(2 * self.lane_room, <size_t> 256))
            grown = <unsigned char*> realloc(self.lane, self.lane_room)
            if grown == NULL:
                raise MemoryError
            self.lane = grown
        memcpy(self.lane + self.lane_size, data, size)
        self.lane_size += size
        self.mark_dirty()
        return 0

    cdef int mark_dirty(self) except -1:
        if not self.dirty:
            self.dirty = True
            self.context.dirty_connections.append(self)
            self.context.schedule()
        return 0

    def pause_writing(self):
        """The kernel is full: from now on this client's events wait under their policies."""
        cdef PyObject* link = self.subscriptions
        self.blocked = True
        if not self.listed:
            self.fall_behind()
        while link != NULL:
            set_behind(<Subscription> link)
            link = (<Subscription> link).connection_next

    def resume_writing(self):
        """The kernel has taken what the transport held: go on at the end of this turn."""
        self.blocked = False
        self.heard = True  # what went out was acknowledged: a slow reader, behind whose queue our ping stands, is alive
        if self.state != CLOSED:
            self.mark_dirty()

    cdef int send_batch(self, Audience audience, Member* member) except -1:
        """Send an audience's batch, to a connection for which nothing else waits."""
        cdef Piece piece
        cdef ssize_t sent
        cdef size_t size
        cdef const unsigned char* batch = batch_for(self, audience, &size)
        while True:
            sent = send(self.fd, batch, size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent == <ssize_t> size:
                self.context.bytes_out += sent
                self.context.delivered += audience.segment_count
                return 0
            if sent >= 0 or errno != EINTR:
                break
        if sent < 0:
            if errno != EAGAIN:
                return self.lose()
            sent = 0
        memset(&piece, 0, sizeof(Piece))
        piece.kind = BATCH
        piece.size = size
        piece.subscription = member.subscription
        piece.audience = <PyObject*> audience
        self.writing = True
        try:
            return self.settle_pieces(&piece, 1, sent)
        finally:
            self.writing = False

    cdef int lose(self) except -1:
        """The socket is broken. The transport will say so in its own time; until then nothing is written."""
        self.fd = -1
        self.blocked = True
        self.pending_first = -1
        self.abort()
        return 0

    cdef int write(self, bint settle) except -1:
        """Send what waits: the lane, then the queues in turn, then the batches that are pending, until all is sent or
        the kernel is full.

        `settle` says that no batch is under way: subscriptions that have nothing queued any more are then ready for
        batches again, and a connection that only waited for this is closed.
        """
        cdef Piece pieces[MAX_PIECES]
        cdef int count
        cdef int rounds = 0
        cdef ssize_t sent
        if self.writing:
            return 0
        self.writing = True
        try:
            while not self.blocked and self.state != CLOSED:
                if rounds == MAX_ROUNDS:
                    self.mark_dirty()
                    break
                rounds += 1
                count = self.collect(pieces)
                if count == 0:
                    break
                sent = self.send_pieces(pieces, count)
                self.settle_pieces(pieces, count, sent)
            if self.pending_first >= 0 and self.state != CLOSED:
                self.queue_pending()
        finally:
            self.writing = False
            self.pending_first = -1
        if self.blocked or self.state == CLOSED:
            return 0
        if self.state == CLOSING:
            if self.hang_up:
                self.transport.close()
            elif self.half_close:
                self.half_close = False
                if self.transport.can_write_eof():
                    self.transport.write_eof()
                else:  # TLS has no half-closed connections in asyncio
                    self.transport.close()
            return 0
        if settle:
            self.settle()
            if self.listed and not self.told and not self.is_lagging():
                self.lagging_since = now_ms()
            if self.finishing and self.state == OPEN and not self.halted and not self.has_to_send():
                self.close(self.close_code, self.close_reason)
        return 0

    cdef int settle(self) except -1:
        cdef PyObject* link = self.subscriptions
        if self.busy != NULL or not self.unsettled:
            return 0
        self.unsettled = False
        while link != NULL:
            set_ready(<Subscription> link)
            link = (<Subscription> link).connection_next
        return 0

    cdef int collect(self, Piece* pieces) except -1:
        """Choose what the next system call writes."""
        cdef:
            int count = 0
            size_t size = 0, batch_size
            Piece* piece
            Subscription subscription
            Audience audience
            bytes event
            Queued entry
            Pending* pending
        if self.lane_size:
            piece = new_piece(pieces, &count, LANE, <char*> self.lane, self.lane_size)
            size = piece.size
        if self.aside:
            let_those_go_who_wait(self)
        while self.busy != NULL and count + 2 <= MAX_PIECES and size < MAX_WRITE and self.state == OPEN:
            subscription = <Subscription> self.busy
            if subscription.count and self.context.max_age is not None:
                drop_aged(subscription)
            if not has_something(subscription):
                leave_busy(subscription)
                continue
            self.busy = subscription.busy_next  # one event of each in turn
            pop(subscription, &entry)
            if is_any(&entry.missed):
                gap = self.encode_gaps(subscription, &entry.missed)
                Py_INCREF(gap)
                piece = new_piece(pieces, &count, GAP, PyBytes_AS_STRING(gap), PyBytes_GET_SIZE(gap))
                piece.owned = <PyObject*> gap
                piece.subscription = <PyObject*> subscription
                piece.missed = entry.missed
                piece.paired = entry.event != NULL
                size += piece.size
            if entry.event != NULL:
                event = frame_for(self, <Event> entry.event)
                piece = new_piece(pieces, &count, EVENT, PyBytes_AS_STRING(event), PyBytes_GET_SIZE(event))
                piece.owned = entry.event
                piece.subscription = <PyObject*> subscription
                size += piece.size
                subscription.credit -= subscription.credit != UNLIMITED
            if not has_something(subscription) or subscription.credit == 0:
                leave_busy(subscription)
        while self.pending_first >= 0 and count < MAX_PIECES and size < 2 * MAX_WRITE:
            pending = &self.context.pending[self.pending_first]
            audience = <Audience> pending.audience
            piece = new_piece(pieces, &count, BATCH, <char*> batch_for(self, audience, &batch_size), 0)
            piece.size = batch_size
            piece.audience = pending.audience
            piece.subscription = pending.member.subscription
            size += piece.size
            self.pending_first = pending.next
        return count

    cdef bytes encode_gaps(self, Subscription subscription, const Missed* missed):
        """The gaps at one place, one for each reason."""
        cdef int reason
        cdef bytes gaps = b""
        for reason in range(REASONS):
            if missed.by[reason]:
                gaps += frame(OP_TEXT, self.context.encode_gap(subscription.filter.topic, missed.by[reason],
                                                               REASON_NAMES[reason]))
        if missed.holes:
            gaps += frame(OP_TEXT, self.context.encode_gap(subscription.filter.topic, None, "lost"))
        return gaps

    cdef ssize_t send_pieces(self, Piece* pieces, int count) except -2:
        """Write the pieces; return how many bytes were taken, or -1 if the socket is broken."""
        cdef:
            iovec vector[MAX_PIECES]
            msghdr message
            ssize_t sent
            int i
        if self.fd < 0:
            data = b"".join([PyBytes_FromStringAndSize(pieces[i].data, pieces[i].size) for i in range(count)])
            self.context.bytes_out += len(data)
            self.transport.write(data)
            return len(data)
        for i in range(count):
            vector[i].iov_base = <void*> pieces[i].data
            vector[i].iov_len = pieces[i].size
        memset(&message, 0, sizeof(message))
        message.msg_iov = vector
        message.msg_iovlen = count
        while True:
            sent = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent >= 0:
                return sent
            if errno == EAGAIN:
                return 0
            if errno != EINTR:
                self.lose()
                return -1

    cdef int settle_pieces(self, Piece* pieces, int count, ssize_t sent) except -1:
        """Account for what a write took. The rest of the piece at the cut goes to the transport, which then says when
        there is room again; the pieces behind it go back to where they came from.
        """
        cdef:
            int i
            int cut = -1
            bint paired
            Piece* piece
            size_t left
            Missed nothing
        if sent > 0 and self.fd >= 0:
            self.context.bytes_out += sent
        if sent < 0:
            for i in range(count):
                if pieces[i].owned != NULL:
                    Py_DECREF(<object> pieces[i].owned)
            return 0
        left = sent
        for i in range(count):
            piece = &pieces[i]
            if left < piece.size:
                cut = i
                break
            left -= piece.size
            if piece.kind == LANE:
                self.lane_sent(piece.size)
            elif piece.kind == BATCH:
                self.context.delivered += (<Audience> piece.audience).segment_count
            else:
                self.context.delivered += piece.kind == EVENT
                Py_DECREF(<object> piece.owned)
        if cut < 0:
            return 0
        memset(&nothing, 0, sizeof(Missed))
        # Put back what is behind the cut before anything is handed to the transport, which may call back.
        for i in range(count - 1, cut, -1):
            piece = &pieces[i]
            if piece.kind == EVENT:
                paired = pieces[i - 1].paired and i - 1 > cut
                push_back_first(<Subscription> piece.subscription, piece.owned,
                                &pieces[i - 1].missed if paired else &nothing)
            elif piece.kind == GAP:
                if not piece.paired:
                    push_back_first(<Subscription> piece.subscription, NULL, &piece.missed)
                Py_DECREF(<object> piece.owned)
        piece = &pieces[cut]
        if piece.kind == LANE:
            rest = PyBytes_FromStringAndSize(piece.data + left, piece.size - left)
            self.lane_sent(piece.size)
        elif piece.kind == BATCH:
            rest = self.queue_batch(piece, left)
        elif piece.kind == EVENT:
            rest = memoryview(frame_for(self, <Event> piece.owned))[left:]
            self.context.delivered += 1
            Py_DECREF(<object> piece.owned)
        else:
            rest = memoryview(<bytes> piece.owned)[left:]
            Py_DECREF(<object> piece.owned)
        for i in range(cut + 1, count):
            if pieces[i].kind == BATCH:
                self.queue_segments(&pieces[i], 0)
        self.context.bytes_out += len(rest)
        self.transport.write(rest)
        return 0

    cdef void lane_sent(self, size_t size) noexcept:
        """The first `size` bytes of the lane have gone. More may have been appended behind them since."""
        self.lane_size -= size
        if self.lane_size:
            memmove(self.lane, self.lane + size, self.lane_size)
        else:
            free(self.lane)
            self.lane = NULL
            self.lane_room = 0

    cdef object queue_batch(self, Piece* piece, size_t sent):
        """Queue the events of a batch that begin behind byte `sent`, where the socket stopped.

        Returns what is left of the event at that byte, which has to go out whole before anything else.
        """
        cdef Audience audience = <Audience> piece.audience
        cdef uint32_t index = 0
        cdef size_t start = 0, end = segment_end(self, audience, 0)
        while end <= sent:
            start = end
            index += 1
            end = segment_end(self, audience, index)
        self.context.delivered += index + 1
        self.queue_segments(piece, index + 1)
        if self.deflates:
            return PyBytes_FromStringAndSize(<char*> audience.deflated + sent, end - sent)
        return memoryview(audience.event(index).frame)[sent - start :]

    cdef int queue_pending(self) except -1:
        """Queue the batches that the kernel was full before."""
        cdef Piece piece
        cdef Pending* pending
        while self.pending_first >= 0:
            pending = &self.context.pending[self.pending_first]
            self.pending_first = pending.next
            piece.audience = pending.audience
            piece.subscription = pending.member.subscription
            self.queue_segments(&piece, 0)
        return 0

    cdef int queue_segments(self, Piece* piece, uint32_t index) except -1:
        """Queue the events of a batch from one on."""
        cdef Audience audience = <Audience> piece.audience
        cdef Subscription subscription = <Subscription> piece.subscription
        set_behind(subscription)
        self.mark_dirty()
        while index < audience.segment_count:
            offer(subscription, event_for(self, audience, index), None)
            index += 1
        return 0


cdef int hold_answer(Connection self, bytes payload) except -1:
    """Keep the answer to a publish until its event has found room."""
    if self.held is None:
        self.held = []
    self.held.append(payload)
    return 0
