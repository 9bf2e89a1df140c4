# Writes to sockets: the only code that touches a descriptor. A partial write is settled by `settle_pieces`.
#
# Invariant: what is written to a connection's socket are whole frames in order, directly only while the transport's
# own buffer is empty. What the socket takes of a write is accounted for piece by piece; the rest of the piece at the
# cut goes to the transport, the pieces behind it go back to where they came from.

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

cdef inline bint is_writable(Writer self) noexcept:
    return not self.outbox.socket_full and OPEN <= self.outbox.state <= HANGING_UP


cdef int send_waiting(Writer self, double until) except -1:
    """Send the control buffer, the batches that are pending, then the queues in turn, until the kernel is full.

    With `until` not 0 queues wait for the next turn from that time on (`exact_time`).
    """
    cdef Piece pieces[MAX_PIECES]
    cdef ssize_t sent
    cdef int count
    if self.outbox.writing:
        return 0
    self.outbox.writing = True
    try:
        while is_writable(self):
            count = collect(self, pieces)
            if count == 0:
                break
            try:
                sent = send_pieces(self, pieces, count)
            except BaseException:
                self.stop_writing()
                settle_pieces(self, pieces, count, -1)
                raise
            settle_pieces(self, pieces, count, sent)
            if (until and self.outbox.sendable.first != NULL and self.pending_first < 0
                    and exact_time() > until):
                mark_dirty(&self.outbox)
                break
        if self.pending_first >= 0 and self.outbox.state < DISCONNECTED:
            queue_pending(self)
    finally:
        self.outbox.writing = False
        self.pending_first = -1
    return lift_barriers(&self.outbox)


cdef inline int send_batch(Writer self, AudienceBase audience, Member* member) except -1:
    """Send an audience's batch to a connection for which nothing else waits."""
    cdef size_t size
    cdef const unsigned char* batch = batch_for(self.deflates, audience, &size)
    cdef ssize_t sent = send(self.fd, batch, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent == <ssize_t> size:
        self.context.bytes_out += sent
        self.context.delivered += audience.segment_count
        return 0
    return settle_batch(self, audience, member, batch, size, sent)


cdef int settle_batch(Writer self, AudienceBase audience, Member* member, const unsigned char* batch, size_t size,
                      ssize_t sent) except -1:
    """Account for a batch that was not taken whole. `sent` is what `send` returned."""
    cdef Piece piece
    while sent < 0 and errno == EINTR:
        sent = send(self.fd, batch, size, MSG_DONTWAIT | MSG_NOSIGNAL)
    if sent < 0:
        if errno != EAGAIN:
            return self.disconnect()
        sent = 0
    memset(&piece, 0, sizeof(Piece))
    piece.kind = BATCH
    piece.size = size
    piece.subscription = member.subscription
    piece.audience = <PyObject*> audience
    self.outbox.writing = True
    try:
        return settle_pieces(self, &piece, 1, sent)
    finally:
        self.outbox.writing = False


cdef ssize_t send_pieces(Writer self, Piece* pieces, int count) except -2:
    """Write the pieces; return how many bytes were taken, or -1 if the socket is broken."""
    cdef:
        iovec vector[MAX_PIECES]
        msghdr message
        ssize_t sent
        int i
    if self.fd < 0:
        data = b"".join([PyBytes_FromStringAndSize(pieces[i].data, pieces[i].size) for i in range(count)])
        self.context.bytes_out += len(data)
        hand_over(self, data)
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
            self.disconnect()
            return -1


cdef int hand_over(Writer self, data) except -1:
    """Give bytes to the transport, which writes them before anything else, and says if it cannot at once.

    A transport that is closing may throw them away, and says nothing: then nothing may follow.
    """
    self.transport.write(data)
    if self.transport.is_closing():
        self.stop_writing()
    return 0


cdef int settle_pieces(Writer self, Piece* pieces, int count, ssize_t sent) except -1:
    """Account for what a write took, see the head of this file. `sent` -1: the socket is broken."""
    cdef int cut = 0, i
    cdef size_t left
    cdef object rest
    if sent < 0:
        for i in range(count):
            Py_XDECREF(pieces[i].owned)
        return 0
    if self.fd >= 0:
        self.context.bytes_out += sent
    left = sent
    while cut < count and left >= pieces[cut].size:
        left -= pieces[cut].size
        count_sent(self, &pieces[cut])
        cut += 1
    if cut == count:
        return 0
    # Put back what is behind the cut before anything is handed to the transport, which may call back.
    for i in range(count - 1, cut, -1):
        put_back_piece(pieces, i, i - 1 > cut)
    rest = cut_piece(self, &pieces[cut], left)
    for i in range(cut + 1, count):
        if pieces[i].kind == BATCH:
            queue_batch(self, &pieces[i], 0)
    self.context.bytes_out += len(rest)
    return hand_over(self, rest)


cdef int count_sent(Writer self, Piece* piece) except -1:
    """The socket has taken a whole piece."""
    if piece.kind == CONTROL:
        control_sent(self, piece.size)
    elif piece.kind == BATCH:
        self.context.delivered += (<AudienceBase> piece.audience).segment_count
    else:
        self.context.delivered += piece.kind == EVENT
        Py_DECREF(<object> piece.owned)
    return 0


cdef int put_back_piece(Piece* pieces, int index, bint with_gap) except -1:
    """Put a piece behind the cut back into its queue. `with_gap` says that the one before it is behind the cut too."""
    cdef Piece* piece = &pieces[index]
    cdef Missed nothing
    if piece.kind == EVENT:
        if with_gap and pieces[index - 1].paired:
            requeue(<SubscriptionBase> piece.subscription, piece.owned, &pieces[index - 1].missed)
        else:
            clear_missed(&nothing)
            requeue(<SubscriptionBase> piece.subscription, piece.owned, &nothing)
    elif piece.kind == GAP:
        if not piece.paired:
            requeue(<SubscriptionBase> piece.subscription, NULL, &piece.missed)
        Py_DECREF(<object> piece.owned)
    return 0


cdef object cut_piece(Writer self, Piece* piece, size_t sent):
    """Account for the piece at the cut, and return the rest of its frame, which has to go out before anything else."""
    cdef object rest
    if piece.kind == CONTROL:
        rest = PyBytes_FromStringAndSize(piece.data + sent, piece.size - sent)
        control_sent(self, piece.size)
        return rest
    if piece.kind == BATCH:
        return cut_batch(self, piece, sent)
    if piece.kind == EVENT:
        rest = memoryview(frame_for(self.deflates, <Event> piece.owned, self.context))[sent:]
        self.context.delivered += 1
    else:
        rest = memoryview(<bytes> piece.owned)[sent:]
    Py_DECREF(<object> piece.owned)
    return rest


cdef object cut_batch(Writer self, Piece* piece, size_t sent):
    """Queue the events of a batch that begin behind byte `sent`, where the socket stopped; return the rest of the event
    at that byte."""
    cdef AudienceBase audience = <AudienceBase> piece.audience
    cdef uint32_t index = 0
    cdef size_t start = 0, end = segment_end(self.deflates, audience, 0)
    while end <= sent:
        start = end
        index += 1
        end = segment_end(self.deflates, audience, index)
    self.context.delivered += index + 1
    queue_batch(self, piece, index + 1)
    if self.deflates:
        return PyBytes_FromStringAndSize(<char*> audience.deflated.data + sent, end - sent)
    return memoryview(event_at(audience, index).frame)[sent - start :]


cdef int queue_pending(Writer self) except -1:
    """Queue the batches that the kernel was full before."""
    cdef Piece piece
    cdef Pending* pending
    while self.pending_first >= 0:
        pending = pending_at(self.context, self.pending_first)
        self.pending_first = pending.next
        piece.audience = pending.audience
        piece.subscription = pending.member.subscription
        queue_batch(self, &piece, 0)
    return 0


cdef int queue_batch(Writer self, Piece* piece, uint32_t index) except -1:
    """Queue the events of a batch from one on: the socket is full."""
    cdef SubscriptionBase subscription = <SubscriptionBase> piece.subscription
    queue_batches(subscription)
    return queue_segments(subscription, <AudienceBase> piece.audience, index, self.deflates)
