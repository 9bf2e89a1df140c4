# The queue of one subscription: a ring of waiting events, and counts of what is missing between them.
#
# Invariant: an event leaves the queue by `pop`, by `drop_at`, which counts it in the `Missed` that stands at its
# place, or by `take_out`, whose caller accounts for it. The first and the last entry of the ring are events; of those
# between, some may be holes.

cdef enum:
    # So many entries of an empty queue are kept for the next time.
    KEPT_ROOM = 16


@cython.no_gc
@cython.final
cdef class Event:
    """One event that has to wait, or is kept, shared by all who wait for it: its finished frame, its topic, its key."""

    cdef:
        bytes frame
        bytes deflated  # the same for those who agreed to compression, made when one of them is sent it
        readonly str topic
        bytes key_bytes  # without quotes, as it was sent; None where the publisher gave none
        uint64_t number  # events are numbered as they are published; 0 of those that come from history
        readonly uint64_t offset  # in the history of its topic; 0 where that keeps none
        uint64_t waiting_since  # when it first had to wait, or was kept, in milliseconds of `now_ms`
        uint64_t expires  # when it is too old to be sent; 0: never
        uint32_t data_size  # of an event of a history
        str conflation_key  # `conflation_key`, once somebody has asked

    def __init__(self, str topic not None, bytes payload not None, uint64_t offset, uint32_t data_size, bytes key=None):
        """An event of a history, encoded as the protocol's `event` message, in which `offset` is the last field."""
        self.frame = frame(OP_TEXT, payload)
        self.topic = topic
        self.offset = offset
        self.data_size = data_size
        self.key_bytes = key
        self.waiting_since = now_ms()

    @property
    def data(self):
        """Of an event of a history: its data, as it was sent."""
        cdef Py_ssize_t end = find_data_end(self)
        return self.frame[end - self.data_size : end]

    @property
    def key(self):
        """Its key; None if it has none."""
        return None if self.key_bytes is None else self.key_bytes.decode()


cdef struct Missed:
    # How many events are missing at one place, by reason.
    uint64_t by[REASONS]
    uint64_t unknown  # how often it was announced that some may be missing, nobody knows how many
    uint64_t first  # the offsets between which those counted are, where they have any; else 0
    uint64_t last


cdef struct Queued:
    PyObject* event  # owned; NULL for a hole, or for a gap behind which no event waits
    Missed missed  # what is missing right before this one; of a hole, itself included


cdef struct Queue:
    Queued* ring
    uint32_t first
    uint32_t span  # entries
    uint32_t count  # events among them
    uint32_t room  # a power of two
    size_t bytes  # of the events' frames
    Missed missed  # behind the last event
    uint64_t base  # the place of the first entry, counted from the beginning
    PyObject* newest  # owned; under `latest` a dict: `conflation_key` an event → its place


cdef Py_ssize_t find_data_end(Event self) noexcept:
    """Where the data of an event of a history ends in its frame: before `,"offset":`, the number and `}`."""
    cdef Py_ssize_t end = PyBytes_GET_SIZE(self.frame) - len(b',"offset":}')
    cdef uint64_t rest = self.offset
    while rest:
        end -= 1
        rest //= 10
    return end


cdef bint is_null(Event self) noexcept:
    """Whether the data of an event of a history is null."""
    return self.data_size == 4 and memcmp(PyBytes_AS_STRING(self.frame) + find_data_end(self) - 4, b"null", 4) == 0


cdef inline bint is_any(const Missed* missed) noexcept:
    return (missed.by[REASON_OVERFLOW] | missed.by[REASON_CONFLATED] | missed.by[REASON_AGE] | missed.unknown) != 0


cdef inline void add_missed(Missed* missed, const Missed* more) noexcept:
    cdef int reason
    for reason in range(REASONS):
        missed.by[reason] += more.by[reason]
    missed.unknown += more.unknown
    if more.first:
        widen(missed, more.first, more.last)


cdef inline void widen(Missed* missed, uint64_t first, uint64_t last) noexcept:
    """Events with offsets from `first` to `last` are missing too."""
    missed.first = min(missed.first, first) if missed.first else first
    missed.last = max(missed.last, last)


cdef inline void count_missed(Missed* missed, Event event, int reason) noexcept:
    """An event is missing."""
    missed.by[reason] += 1
    if event.offset:
        widen(missed, event.offset, event.offset)


cdef inline void clear_missed(Missed* missed) noexcept:
    memset(missed, 0, sizeof(Missed))


cdef inline bint is_empty(const Queue* queue) noexcept:
    """Whether there is neither an event nor a gap."""
    return queue.count == 0 and not is_any(&queue.missed)


cdef inline Queued* at(Queue* queue, uint32_t index) noexcept:
    """An entry, the first one being 0."""
    return &queue.ring[(queue.first + index) & (queue.room - 1)]


cdef inline Event first_event(Queue* queue):
    """The oldest event; there must be one."""
    return <Event> queue.ring[queue.first].event


cdef inline str conflation_key(Event event):
    """What tells whether one event stands for the same thing as another one: its topic, and its key if it has one.

    One string, whose hash is computed once; no topic has a control character.
    """
    if event.conflation_key is None:
        if event.key_bytes is None:
            event.conflation_key = event.topic
        else:
            event.conflation_key = f"{event.topic}\0{event.key_bytes.decode()}"
    return event.conflation_key


cdef int make_room(Queue* queue) except -1:
    """Make room in a full ring: close the holes where they are many, else double it."""
    cdef uint32_t room, head
    cdef Queued* ring
    if queue.count <= queue.room // 2 and queue.room:
        return close_holes(queue)
    room = max(8, queue.room * 2)
    ring = <Queued*> malloc(room * sizeof(Queued))
    if ring == NULL:
        raise MemoryError
    head = queue.room - queue.first
    if queue.room:
        memcpy(ring, queue.ring + queue.first, head * sizeof(Queued))
        memcpy(ring + head, queue.ring, queue.first * sizeof(Queued))
    free(queue.ring)
    queue.ring = ring
    queue.first = 0
    queue.room = room
    return 0


cdef int close_holes(Queue* queue) except -1:
    """Move the events together; what is missing between two of them is counted before the later one."""
    cdef uint32_t place, kept = 0
    cdef Queued entry
    cdef Missed missed
    clear_missed(&missed)
    for place in range(queue.span):
        entry = at(queue, place)[0]
        add_missed(&missed, &entry.missed)
        if entry.event != NULL:
            entry.missed = missed
            at(queue, kept)[0] = entry
            kept += 1
            clear_missed(&missed)
    queue.span = kept
    if queue.newest != NULL:
        find_places(queue)
    return 0


cdef int find_places(Queue* queue) except -1:
    """Note the place of each event by its conflation key (`latest`)."""
    cdef uint32_t place
    cdef PyObject* event
    for place in range(queue.span):
        event = at(queue, place).event
        if event != NULL:
            (<dict> queue.newest)[conflation_key(<Event> event)] = queue.base + place
    return 0


cdef inline int push(Queue* queue, Event event) except -1:
    """Queue an event as the newest."""
    cdef Queued* entry
    if queue.span == queue.room:
        make_room(queue)
    if queue.newest != NULL:
        (<dict> queue.newest)[conflation_key(event)] = queue.base + queue.span
    entry = at(queue, queue.span)
    Py_INCREF(event)
    entry.event = <PyObject*> event
    entry.missed = queue.missed
    clear_missed(&queue.missed)
    queue.span += 1
    queue.count += 1
    queue.bytes += PyBytes_GET_SIZE(event.frame)
    return 0


cdef int put_back(Queue* queue, PyObject* event, const Missed* missed) except -1:
    """Put back as the oldest what `pop` gave and the socket did not take. Takes over the reference."""
    if event == NULL:
        add_missed(&at(queue, 0).missed if queue.count else &queue.missed, missed)
        return 0
    if queue.span == queue.room:
        make_room(queue)
    if queue.newest != NULL:
        (<dict> queue.newest)[conflation_key(<Event> event)] = queue.base - 1
    queue.first = (queue.first - 1) & (queue.room - 1)
    queue.base -= 1
    queue.span += 1
    queue.ring[queue.first].event = event
    queue.ring[queue.first].missed = missed[0]
    queue.count += 1
    queue.bytes += PyBytes_GET_SIZE((<Event> event).frame)
    return 0


cdef inline int pop(Queue* queue, Queued* entry) except -1:
    """Take the oldest entry, or the gap behind the last event. The caller owns the event's reference."""
    if queue.count == 0:
        entry.event = NULL
        entry.missed = queue.missed
        clear_missed(&queue.missed)
        return 0
    entry[0] = at(queue, 0)[0]
    clear_missed(&at(queue, 0).missed)
    return take_out(queue, at(queue, 0))


cdef inline int drop_at(Queue* queue, uint32_t index, int reason) except -1:
    """Turn an event into a part of the gap that stands at its place."""
    cdef Queued* entry = at(queue, index)
    cdef PyObject* event = entry.event
    count_missed(&entry.missed, <Event> event, reason)
    take_out(queue, entry)
    Py_DECREF(<Event> event)
    return 0


cdef inline int take_out(Queue* queue, Queued* entry) except -1:
    """Make an entry a hole. The caller owns the event's reference."""
    cdef PyObject* event = entry.event
    if queue.newest != NULL:
        del (<dict> queue.newest)[conflation_key(<Event> event)]
    entry.event = NULL
    queue.count -= 1
    queue.bytes -= PyBytes_GET_SIZE((<Event> event).frame)
    if entry == at(queue, 0):
        trim_front(queue)
    elif entry == at(queue, queue.span - 1):
        trim_back(queue)
    return 0


cdef inline void trim_front(Queue* queue) noexcept:
    """Take holes from the front of the ring: what they count moves to the next event, or behind the last one."""
    cdef Queued* entry = at(queue, 0)
    cdef Queued* following
    while queue.span > 1:
        following = at(queue, 1)
        add_missed(&following.missed, &entry.missed)
        queue.first = (queue.first + 1) & (queue.room - 1)
        queue.span -= 1
        queue.base += 1
        if following.event != NULL:
            return
        entry = following
    trim_back(queue)


cdef void trim_back(Queue* queue) noexcept:
    """Take holes from the back of the ring: what they count moves behind the last event."""
    cdef Queued* entry
    while queue.span:
        entry = at(queue, queue.span - 1)
        if entry.event != NULL:
            return
        add_missed(&queue.missed, &entry.missed)
        queue.span -= 1
        queue.base += queue.span == 0
    if queue.room > KEPT_ROOM:
        free(queue.ring)
        queue.ring = NULL
        queue.first = queue.room = 0


cdef void clear_queue(Queue* queue) noexcept:
    """Forget all, and free what the queue holds."""
    cdef uint32_t place
    for place in range(queue.span):
        Py_XDECREF(at(queue, place).event)
    free(queue.ring)
    Py_XDECREF(queue.newest)
    memset(queue, 0, sizeof(Queue))
