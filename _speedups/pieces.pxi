# The sending half of a connection as data (`Writer`), and what one system call writes: pieces of the control buffer,
# of pending batches, and of queues.
#
# Invariant: queues take turns, one event each time. What is collected is in no queue any more until it is settled.

cdef enum:
    CONTROL = 0
    GAP = 1
    EVENT = 2
    BATCH = 3

    # How many pieces one system call writes, and about how many bytes: more than the kernel takes at once helps nobody.
    MAX_PIECES = 64
    MAX_WRITE = 65536


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


cdef struct Pending:
    # A batch that a connection is to get in the flush under way; a list for each connection, by index.
    PyObject* audience
    Member* member
    int32_t next


cdef class Writer(Frames):
    """The sending half of a connection: its socket, its control buffer, its outbox. `Frames` is the receiving half."""

    cdef:
        object __weakref__
        readonly LoopState context
        object transport
        # The control buffer: answers, pongs, the close frame, which go out ahead of events. It is beside `fd`, for the
        # walk over an audience reads these two of each member, and nothing else.
        Array control
        int fd  # -1 where only the transport may write: TLS, or a transport without a socket
        readonly bint deflates  # events may be sent compressed (RFC 7692)
        int32_t pending_first  # in `LoopState.pending`: batches that it is to get in the flush under way
        int32_t pending_last
        Outbox outbox

    @property
    def state(self):
        """The number of its state, see CONNECTION_STATES."""
        return self.outbox.state

    @property
    def state_name(self):
        """The name of its state, see CONNECTION_TRANSITIONS."""
        return CONNECTION_STATES[self.outbox.state]

    @property
    def blocked(self):
        """Whether the kernel is full: the transport holds what it did not take."""
        return self.outbox.socket_full and self.outbox.state < DISCONNECTED

    @property
    def close_pending(self):
        """Whether it is to be closed at the end of this turn."""
        return self.outbox.state == CLOSE_PENDING

    @property
    def lagging_since(self):
        """When it began to lag behind, in milliseconds of a monotonic clock."""
        return self.outbox.lagging_since

    @property
    def lagging(self):
        """Whether something waits for this client: for its socket, for its credit, or for the end of this turn."""
        return is_lagging(&self.outbox)

    @property
    def queued_bytes(self):
        """How many bytes wait for this client's socket: answers and queued events."""
        return self.control.size + self.outbox.bytes

    cdef int write(self) except -1:
        """Send all that waits, until the kernel is full. Its subclass does."""
        raise NotImplementedError

    cdef int disconnect(self) except -1:
        """The socket is broken, or to be cut. The transport says so in its own time; until then nothing is written."""
        self.stop_writing()
        if self.transport is not None:
            self.transport.abort()
        return 0

    cdef void stop_writing(self) noexcept:
        """Write nothing any more, since it might follow a frame that was cut."""
        if self.outbox.state < DISCONNECTED:
            set_connection_state(&self.outbox, DISCONNECTED)
        self.fd = -1
        self.outbox.socket_full = True
        self.pending_first = -1


cdef inline Pending* pending_at(LoopState context, int32_t index) noexcept:
    return <Pending*> context.pending.data + index


cdef void pend(Writer connection, AudienceBase audience, Member* member) noexcept:
    """Note that a connection is to get an audience's batch at its next write. There is room for it."""
    cdef LoopState context = connection.context
    cdef int32_t index = <int32_t> (context.pending.size // sizeof(Pending))
    cdef Pending* pending = pending_at(context, index)
    context.pending.size += sizeof(Pending)
    pending.audience = <PyObject*> audience
    pending.member = member
    pending.next = -1
    if connection.pending_first < 0:
        connection.pending_first = index
    else:
        pending_at(context, connection.pending_last).next = index
    connection.pending_last = index


cdef inline Piece* new_piece(Piece* pieces, int* count, int kind, const char* data, size_t size) noexcept:
    cdef Piece* piece = &pieces[count[0]]
    count[0] += 1
    memset(piece, 0, sizeof(Piece))
    piece.kind = kind
    piece.data = data
    piece.size = size
    return piece


cdef int collect(Writer self, Piece* pieces) except -1:
    """Choose what the next system call writes. Returns the number of pieces."""
    cdef int count = 0
    cdef size_t size = 0, batch_size
    cdef Piece* piece
    cdef Pending* pending
    cdef const unsigned char* batch
    if self.control.size:
        new_piece(pieces, &count, CONTROL, <char*> self.control.data, self.control.size)
        size = self.control.size
    while self.pending_first >= 0 and count < MAX_PIECES and size < 2 * MAX_WRITE:
        pending = pending_at(self.context, self.pending_first)
        batch = batch_for(self.deflates, <AudienceBase> pending.audience, &batch_size)
        piece = new_piece(pieces, &count, BATCH, <char*> batch, batch_size)
        piece.audience = pending.audience
        piece.subscription = pending.member.subscription
        size += batch_size
        self.pending_first = pending.next
    if self.outbox.changed != NULL:
        lift_barriers(&self.outbox)
    if self.outbox.sendable.first != NULL and self.pending_first < 0 and is_open(&self.outbox):
        collect_queued(self, pieces, &count, size)
    return count


cdef int collect_queued(Writer self, Piece* pieces, int* count, size_t size) except -1:
    """Add events and gaps of the queues in turn, behind pieces of `size` bytes."""
    cdef SubscriptionBase subscription
    cdef Piece* piece
    cdef Queued entry
    cdef bytes event
    while self.outbox.sendable.first != NULL and count[0] + 2 <= MAX_PIECES and size < MAX_WRITE:
        subscription = <SubscriptionBase> self.outbox.sendable.first.owner
        if subscription.queue.count and self.context.max_age is not None:
            drop_aged(subscription)
        dequeue_event(subscription, &entry)
        if is_any(&entry.missed):
            gap = encode_gaps(self, subscription, &entry.missed)
            Py_INCREF(gap)
            piece = new_piece(pieces, count, GAP, PyBytes_AS_STRING(gap), PyBytes_GET_SIZE(gap))
            piece.owned = <PyObject*> gap
            piece.subscription = <PyObject*> subscription
            piece.missed = entry.missed
            piece.paired = entry.event != NULL
            size += piece.size
        if entry.event != NULL:
            event = frame_for(self.deflates, <Event> entry.event, self.context)
            piece = new_piece(pieces, count, EVENT, PyBytes_AS_STRING(event), PyBytes_GET_SIZE(event))
            piece.owned = entry.event
            piece.subscription = <PyObject*> subscription
            size += piece.size
            if subscription.credit != UNLIMITED:
                subscription.credit -= 1
                if subscription.credit == 0:
                    refresh_state(subscription)
        if is_empty(&subscription.queue):
            update_sendable(subscription)
        elif subscription.in_sendable.next != NULL:
            # The next one's turn.
            remove(&self.outbox.sendable, &subscription.in_sendable)
            append(&self.outbox.sendable, &subscription.in_sendable)
    return 0


cdef bytes encode_gaps(Writer self, SubscriptionBase subscription, const Missed* missed):
    """The gaps at one place, one for each reason."""
    cdef int reason
    cdef bytes gaps = b""
    cdef tuple offsets = ()
    if missed.first and not has_wildcard(subscription.filter.topic.encode()):
        offsets = (missed.first, missed.last)
    for reason in range(REASONS):
        if missed.by[reason]:
            gaps += frame(OP_TEXT, self.context.encode_gap(subscription.filter.topic, missed.by[reason],
                                                           GAP_REASONS[reason], *offsets))
    if missed.unknown:
        gaps += frame(OP_TEXT, self.context.encode_gap(subscription.filter.topic, None, GAP_REASONS[REASON_LOST]))
    return gaps


cdef void control_sent(Writer self, size_t size) noexcept:
    """The first `size` bytes of the control buffer have gone. More may have been appended behind them since."""
    self.control.size -= size
    if self.control.size:
        memmove(self.control.data, self.control.data + size, self.control.size)
    else:
        release(&self.control)
