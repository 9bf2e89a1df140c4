# The life of a connection behind its handshake (RFC 6455, sections 5 and 7): the protocol of its transport
# (asyncio.BufferedProtocol). Its states are in states.pxi.
#
# Invariant: the session is told once that the connection takes part no more. The subscriptions that it leaves are
# ended right after that.

# Seconds for which one connection is fed from history in one turn.
cdef double REPLAY_SHARE = 0.001


@cython.no_gc_clear
@cython.final
cdef class Connection(Reader):
    """One client behind its handshake.

    `session` is asked by these methods, and may be exchanged before `start`:
    `message(payload: bytes, text: bool)` for each message that the fast path does not take;
    `on_close(code: int, reason: str)` once, as soon as the connection takes part no more (RFC 6455, section 7.1.5; 1006
    where there was no close frame).
    """

    cdef:
        public object session
        public FastPath routes  # None: every message goes to the session, or to `token_bucket`
        public FastPath token_bucket  # None: it may publish as much as it likes
        public int mistakes  # how many commands in a row were malformed
        int close_code  # with which it closes once it has finished
        object close_reason
        ParkedPublisher parking  # while its publishes are parked (`block`), else None
        Timer timer

    def __init__(self, LoopState context not None, session=None):
        self.context = context
        self.session = session
        self.max_size = context.limits.max_size
        self.max_fragments = context.limits.max_fragments
        self.fd = -1
        self.pending_first = -1
        self.timer.kind = NOTHING
        self.timer.link.owner = self.outbox.owner = self.outbox.dirty.owner = <PyObject*> self
        self.turn.owner = <PyObject*> self
        self.outbox.context = <PyObject*> context

    def __dealloc__(self):
        if self.context is not None:
            stop_timer(self.context, &self.timer)
            remove(&self.context.dirty_connections, &self.outbox.dirty)
            self.leave_line()
        release(&self.control)

    @property
    def parked_publishes(self):
        """As a publisher: how many of its events have not found room under `block`."""
        return 0 if self.parking is None else len(self.parking.parks)

    # Life: start, close, loss.

    def start(self, transport not None, bytes upgrade_response=b"", int window_bits=0):
        """Take over a transport. `upgrade_response` is sent first, as it stands: the answer to the handshake.

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
        set_connection_state(&self.outbox, OPEN)
        self.heard = True
        self.context.connections += 1
        if self.context.limits.ping_interval:
            start_timer(self.context, &self.timer, NEXT_PING, self.context.ping_pause)
        transport.set_protocol(self)
        if upgrade_response:
            self.append_control(<const unsigned char*> PyBytes_AS_STRING(upgrade_response), len(upgrade_response))

    def close(self, int code=CLOSE_NORMAL, str reason=""):
        """Begin the closing handshake (RFC 6455, section 7.1.2). What is queued is forgotten.

        The peer has `close_timeout` to answer. Does nothing if the connection closes already.
        """
        if is_open(&self.outbox):
            self.begin_close(code, reason, CLOSING)
            self.write()

    def finish(self, int code, str reason):
        """Close as soon as all that waits has been handed to the socket, but for what waits for the client's credit."""
        if self.outbox.state == OPEN:
            set_connection_state(&self.outbox, FINISHING)
            self.close_code = code
            self.close_reason = reason
            mark_dirty(&self.outbox)

    def abort(self):
        """End the connection at once, without a close frame."""
        if self.transport is not None:
            self.disconnect()

    cdef int close_by_code(self, int code) except -1:
        """Close for a reason of the broker's own."""
        self.close(code, self.context.close_reasons.get(code, ""))
        return 0

    cdef int begin_close(self, int code, str reason, uint8_t state) except -1:
        cdef bytes text = reason.encode()[:MAX_CONTROL - 2].decode(errors="ignore").encode()
        cdef unsigned char payload[MAX_CONTROL]
        set_connection_state(&self.outbox, CLOSING)
        start_timer(self.context, &self.timer, END_OF_CLOSE, self.context.limits.close_timeout)
        payload[0] = code >> 8
        payload[1] = code & 0xFF
        memcpy(payload + 2, PyBytes_AS_STRING(text), len(text))
        try:
            self.leave(code, reason)
        finally:
            self.append_frame(OP_CLOSE, payload, 0 if code == CLOSE_NO_STATUS else 2 + len(text))
            # Only now: what is written while it leaves must not shut the socket before the close frame.
            if state != CLOSING and self.outbox.state == CLOSING:
                set_connection_state(&self.outbox, state)
            self.stops = 0
            self.allow_reading(0)
        return 0

    cdef int leave(self, int code, str reason) except -1:
        """Tell the session, once, that the connection takes part no more."""
        session, self.session = self.session, None
        parking, self.parking = self.parking, None
        self.routes = self.token_bucket = None
        if parking is not None:
            forget_publisher(parking)
        if self.outbox.listed:
            self.outbox.listed = False
            del self.context.lagging[self]
        try:
            if session is not None:
                session.on_close(code, reason)
        finally:
            while self.outbox.subscriptions.first != NULL:
                end_subscription(<SubscriptionBase> self.outbox.subscriptions.first.owner)
        return 0

    def connection_made(self, transport):
        """Nothing: `start` takes over."""

    def eof_received(self):
        """The peer is gone. False lets the transport close: what it has now it sends, what comes later it drops."""
        if self.outbox.state < DISCONNECTED:
            send_waiting(self, 0)
            self.stop_writing()
            start_timer(self.context, &self.timer, END_OF_CLOSE, self.context.limits.close_timeout)
        return False

    def connection_lost(self, exc):
        """The transport has closed, for whatever reason."""
        if self.outbox.state == CLOSED:
            return
        set_connection_state(&self.outbox, CLOSED)
        self.fd = -1
        self.context.connections -= 1
        stop_timer(self.context, &self.timer)
        self.leave_line()
        self.forget_message()
        self.rest = None
        release(&self.control)
        self.transport = None
        self.leave(CLOSE_ABNORMAL, "connection lost" if exc is None else str(exc))

    # Messages.

    cdef int on_message(self, int opcode, unsigned char* data, size_t size, bint checked) except -1:
        cdef FastPath path = self.routes if self.routes is not None else self.token_bucket
        if path is not None and self.takes_commands() and path.publish(self, data, size, checked, NULL):
            if self.context.work >= self.context.work_limit:
                return self.count_work()
            return 0
        if not self.is_text(opcode, data, size, checked) or not self.takes_commands():
            return 0
        cdef double began = exact_time() - self.context.work * 1e-7  # what was done since the last look at the clock
        self.session.message(PyBytes_FromStringAndSize(<char*> data, size), opcode == OP_TEXT)
        self.context.work = 0
        self.context.work_since = 0
        return self.spend(exact_time() - began)

    cdef inline bint takes_commands(self) noexcept:
        """Whether commands are carried out: also those read before the socket broke, until the transport says so."""
        return is_serving(&self.outbox) or self.outbox.state == DISCONNECTED and self.session is not None

    cdef int on_control(self, int opcode, unsigned char* data, size_t size) except -1:
        cdef int code
        if opcode != OP_CLOSE:
            if opcode == OP_PING and is_open(&self.outbox):
                self.append_frame(OP_PONG, data, size)
            self.context.work += PUBLISH_WORK
            return self.count_work() if self.context.work >= self.context.work_limit else 0
        # RFC 6455, section 5.5.1: nothing counts that comes after a close frame.
        self.failed = True
        if self.outbox.state == CLOSING:
            set_connection_state(&self.outbox, HANGING_UP)
            return self.write()
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
        if is_open(&self.outbox):
            self.begin_close(code, reason, HANGING_UP)
        return self.write()

    cdef int on_failure(self, int code, str reason) except -1:
        """What comes now cannot be read: say so, send no more, and let the peer close."""
        if is_open(&self.outbox):
            self.begin_close(code, reason, FAILING)
        elif self.outbox.state == CLOSING:
            set_connection_state(&self.outbox, FAILING)
        return self.write()

    # Writing.

    cdef int write(self) except -1:
        try:
            send_waiting(self, 0)
            self.end_close()
        except Exception as error:
            give_up(self, error)
        return 0

    cdef int end_close(self) except -1:
        """After a write: once the close frame is sent, shut what is to be shut."""
        if self.outbox.socket_full or self.outbox.writing:
            return 0
        if self.outbox.state == HANGING_UP:
            self.transport.close()
        elif self.outbox.state == FAILING:
            set_connection_state(&self.outbox, HALF_CLOSED)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:  # TLS has no half-closed connections in asyncio
                self.transport.close()
        return 0

    cdef int write_turn(self, double until) except -1:
        """The end of a turn: send what waits; no batch is under way."""
        cdef Outbox* outbox = &self.outbox
        cdef double own = 0
        self.spent = 0
        while True:
            send_waiting(self, until)
            self.end_close()
            if outbox.socket_full or outbox.sendable.first != NULL or not is_serving(outbox):
                return 0
            promote_candidates(outbox)
            if outbox.sendable.first == NULL:
                break
            # It was fed from history: go on, so that it catches up with whoever publishes at full speed.
            if own == 0:
                own = min(until, exact_time() + REPLAY_SHARE)
            elif exact_time() > own:
                return 0
        if outbox.listed and not outbox.reported and not is_lagging(outbox):
            outbox.lagging_since = now_ms()
        if (outbox.state == FINISHING and not self.halted and outbox.sendable.first == NULL
                and outbox.replaying == 0):
            self.close(self.close_code, self.close_reason)
        return 0

    def answer(self, bytes payload not None, int opcode=OP_TEXT):
        """Send one message ahead of events, at the end of this turn.

        A client that does not read its answers, so that more than `max_answers` bytes of them wait, is closed (4003).
        """
        if is_open(&self.outbox):
            self.append_frame(opcode, <const unsigned char*> PyBytes_AS_STRING(payload), len(payload))

    def queue_frames(self, bytes frames not None):
        """Send whole frames ahead of events, at the end of this turn. False: not to a client that does not read now."""
        if not is_open(&self.outbox) or self.outbox.socket_full or self.control.size > MAX_WRITE:
            return False
        self.append_control(<const unsigned char*> PyBytes_AS_STRING(frames), len(frames))
        return True

    def answer_publish(self, bytes payload not None):
        """Send the answer to a publish: as `answer`, but not before its event has found room everywhere (`block`)."""
        if self.parking is not None:
            self.parking.answers.append(payload)
        else:
            self.answer(payload)

    cdef int go_on(self) except -1:
        """Each of its publishes that were parked has found room."""
        parking, self.parking = self.parking, None
        try:
            for payload in (<ParkedPublisher> parking).answers:
                self.answer(payload)
        finally:
            self.allow_reading(FOR_ROOM)
        return 0

    cdef int append_frame(self, int opcode, const unsigned char* data, size_t size) except -1:
        """Put a frame into the control buffer."""
        cdef unsigned char head[MAX_SERVER_HEAD]
        cdef size_t max_answers = self.context.limits.max_answers
        self.append_control(head, write_head(head, opcode, size))
        if size:
            self.append_control(data, size)
        if (self.control.size > min(<size_t> MAX_WRITE, max_answers) and is_open(&self.outbox)
                and not self.outbox.socket_full and not self.outbox.writing):
            self.write()  # one turn may bring megabytes of commands: their answers are not held until its end
        if self.control.size > max_answers and self.outbox.socket_full:
            ask_close(&self.outbox, CLOSE_NOT_READING)
        return 0

    cdef int append_control(self, const unsigned char* data, size_t size) except -1:
        memcpy(reserve(&self.control, size, 256), data, size)
        self.control.size += size
        return mark_dirty(&self.outbox)

    def pause_writing(self):
        """The kernel is full: from now on this client's events wait under their policies."""
        cdef Link* link = self.outbox.subscriptions.last
        self.outbox.socket_full = True
        note_lagging(&self.outbox)
        # Live ones become candidates, which stand first.
        while link != NULL and not (<SubscriptionBase> link.owner).candidate:
            subscription = <SubscriptionBase> link.owner
            link = link.previous
            queue_batches(subscription)

    def resume_writing(self):
        """The kernel has taken what the transport held: go on at the end of this turn."""
        if self.outbox.state >= DISCONNECTED:
            return
        self.outbox.socket_full = False
        self.heard = True  # what went out was acknowledged: a slow reader, behind whose queue our ping stands, is alive
        mark_dirty(&self.outbox)
