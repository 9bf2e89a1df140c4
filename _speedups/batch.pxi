# The batch of an audience: the frames of the events that were published to it in this turn of the event loop.
#
# Invariant: an event is appended once, whatever the number of members. Those that are live are sent the batch by one
# system call each; for the others, and for those that stop being live meanwhile, its events become objects.

cdef enum:
    # A batch goes out when it would grow beyond this, turn or no turn. A kernel takes 64 kB at once, and beyond that a
    # longer batch saves nothing.
    BATCH_SIZE = 65536

    # Room for a batch that is kept from turn to turn, in bytes and in events: where thousands of topics have one event
    # each a turn, malloc and free would cost as much as all else but the system call. There may be as many audiences as
    # routes are remembered, so it is no more.
    KEPT_SIZE = 512
    KEPT_SEGMENTS = 4


cdef inline Segment* segment_at(AudienceBase self, uint32_t index) noexcept:
    return <Segment*> self.segments.data + index


cdef int add_segment(AudienceBase self, size_t size, str topic, uint32_t key_start, uint32_t key_size,
                     bytes key) except -1:
    """Make the `size` bytes that were written behind the batch a part of it. The key is at `key_start`, or `key`."""
    cdef Segment* segment = <Segment*> reserve(&self.segments, sizeof(Segment), KEPT_SEGMENTS * sizeof(Segment))
    if self.segment_count == 0:
        self.context.schedule()
        Py_INCREF(self)  # it is kept until its batch is sent, see `leave_dirty`
        append(&self.context.dirty_audiences, &self.dirty)
    self.segments.size += sizeof(Segment)
    self.batch.size += size
    segment.end = self.batch.size
    segment.number = self.context.published
    segment.offset = self.context.offset
    Py_INCREF(topic)
    segment.topic = <PyObject*> topic
    segment.key_start = key_start
    segment.key_size = key_size
    self.segment_count += 1
    if key is not None:
        # The frame was made elsewhere: where its key stands is not known, so the object is made at once.
        event_at(self, self.segment_count - 1).key_bytes = key
    return 0


cdef Event make_event(AudienceBase self, size_t start, size_t size, str topic, uint64_t number, uint64_t offset,
                      uint32_t key_start, uint32_t key_size, bytes key):
    """Make an object of the frame at `start` in the batch."""
    cdef Event event = Event.__new__(Event)
    event.frame = PyBytes_FromStringAndSize(<char*> self.batch.data + start, size)
    event.topic = topic
    event.number = number
    event.offset = offset
    event.key_bytes = key
    event.waiting_since = now_ms()
    if key is None and key_start:
        event.key_bytes = event.frame[key_start : key_start + key_size]
    if self.context.max_age is not None:
        age = self.context.max_age(topic)
        if age is not None:
            event.expires = event.waiting_since + max(<uint64_t> 1, <uint64_t> (1000 * <double> age))
    return event


cdef Event event_at(AudienceBase self, uint32_t index):
    """The event of one segment as an object of its own; the same object for all who ask."""
    cdef Segment* segment = segment_at(self, index)
    cdef size_t start = segment_at(self, index - 1).end if index else 0
    cdef Event event
    if self.events is None:
        self.events = []
    while <uint32_t> len(self.events) <= index:
        self.events.append(None)
    event = self.events[index]
    if event is None:
        event = make_event(self, start, segment.end - start, <str> segment.topic, segment.number, segment.offset,
                           segment.key_start, segment.key_size, None)
        self.events[index] = event
    return event


cdef void drop_batch(AudienceBase self) noexcept:
    """Forget the batch: it was sent."""
    cdef uint32_t i
    for i in range(self.segment_count):
        Py_DECREF(<str> segment_at(self, i).topic)
    if self.batch.room > KEPT_SIZE:
        release(&self.batch)
    if self.segments.room > KEPT_SEGMENTS * sizeof(Segment):
        release(&self.segments)
    self.batch.size = self.segments.size = 0
    self.segment_count = 0
    self.events = None
    if self.deflated_ends != NULL:
        release(&self.deflated)
        free(self.deflated_ends)
        self.deflated_ends = NULL


# What a member is sent, plain or deflated.


cdef bytes frame_for(bint deflates, Event event, LoopState context):
    """The frame in which a connection gets an event. It is deflated when the first one asks, for all."""
    if not deflates:
        return event.frame
    if event.deflated is None:
        context.work += <uint32_t> (PyBytes_GET_SIZE(event.frame) >> DEFLATE_SHIFT)
        event.deflated = context.deflater.deflate(<const unsigned char*> PyBytes_AS_STRING(event.frame),
                                                  PyBytes_GET_SIZE(event.frame)) or event.frame
    return event.deflated


cdef inline const unsigned char* batch_for(bint deflates, AudienceBase self, size_t* size) except NULL:
    """The batch that a connection gets, and its length."""
    if not deflates:
        size[0] = self.batch.size
        return self.batch.data
    if self.deflated_ends == NULL:
        deflate_batch(self)
    size[0] = self.deflated_ends[self.segment_count - 1]
    return self.deflated.data


cdef size_t segment_end(bint deflates, AudienceBase self, uint32_t index) noexcept:
    """Where a segment ends in the batch that a connection gets."""
    return self.deflated_ends[index] if deflates else segment_at(self, index).end


cdef Event event_for(bint deflates, AudienceBase self, uint32_t index):
    """The event of a segment as an object of its own, for a connection that gets it alone. (What was deflated for the
    batch is not deflated again.)"""
    cdef Event event = event_at(self, index)
    cdef size_t start
    if deflates and event.deflated is None and self.deflated_ends != NULL:
        start = self.deflated_ends[index - 1] if index else 0
        if self.deflated.data[start] & RSV1:
            event.deflated = PyBytes_FromStringAndSize(<char*> self.deflated.data + start,
                                                       self.deflated_ends[index] - start)
        else:
            event.deflated = event.frame
    return event


cdef int deflate_batch(AudienceBase self) except -1:
    """Make the second batch of an audience, with the same events in the same order. It is never longer."""
    cdef:
        size_t* ends = <size_t*> malloc(self.segment_count * sizeof(size_t))
        size_t start = 0, end
        uint32_t i
    if ends == NULL:
        raise MemoryError
    try:
        reserve(&self.deflated, self.batch.size, 0)
        for i in range(self.segment_count):
            end = segment_at(self, i).end
            deflate_segment(self, i, start, end)
            ends[i] = self.deflated.size
            start = end
    except BaseException:
        free(ends)
        release(&self.deflated)
        raise
    self.deflated_ends = ends
    return 0


cdef int deflate_segment(AudienceBase self, uint32_t index, size_t start, size_t end) except -1:
    """Append one event to the deflated batch, which has room for it."""
    cdef Event event = None
    cdef bytes frame
    if self.events is not None and index < <uint32_t> len(self.events):
        event = self.events[index]
    if event is not None and event.deflated is not None:
        frame = event.deflated
    else:
        self.context.work += <uint32_t> (end - start >> DEFLATE_SHIFT)
        frame = self.context.deflater.deflate(self.batch.data + start, end - start)
        if event is not None:
            event.deflated = event.frame if frame is None else frame
    if frame is None:
        memcpy(self.deflated.data + self.deflated.size, self.batch.data + start, end - start)
        self.deflated.size += end - start
    else:
        memcpy(self.deflated.data + self.deflated.size, PyBytes_AS_STRING(frame), PyBytes_GET_SIZE(frame))
        self.deflated.size += PyBytes_GET_SIZE(frame)
    return 0


# Members that stop being live.


cdef int leave_live(SubscriptionBase self) except -1:
    """Let events be offered to this subscription one by one from now on. Whoever calls offers those of the batches."""
    cdef Link* link = self.members.first
    cdef AudienceBase audience
    set_state(self, waiting_state(self))
    make_candidate(self)
    while link != NULL:
        audience = <AudienceBase> link.owner
        audience.live -= 1
        move_member(<Member*> link, audience.live)
        link = link.next
    return 0


cdef int queue_batches(SubscriptionBase self) except -1:
    """The socket is full: the subscription stops being live, and events of the batches under way are queued."""
    cdef Link* link = self.members.first
    cdef AudienceBase audience
    if self.state_number != LIVE:
        return 0
    leave_live(self)
    while link != NULL:
        audience = <AudienceBase> link.owner
        link = link.next
        if not audience.flushing:
            queue_segments(self, audience, 0, False)
    return 0


cdef int queue_segments(SubscriptionBase self, AudienceBase audience, uint32_t index, bint deflates) except -1:
    """Offer the events of a batch from one on to a subscription whose socket is full."""
    while index < audience.segment_count:
        if offer(self, event_for(deflates, audience, index), False) & VERDICT_CLOSE:
            ask_close(self.outbox, CLOSE_SLOW_CONSUMER)
        index += 1
    return 0
