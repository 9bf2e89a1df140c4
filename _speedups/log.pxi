# The log of one topic: the frames of its newest events, as they were sent, by their offsets, in a ring.
#
# Invariant: the entries stand in the order of their offsets; the first and the last one are events, of those between
# some may be holes (of events that a newer one of their key superseded). Each event above `floor` that no newer one
# superseded is kept. An event's frame is kept once: as bytes of its own, or in its object.

cdef enum:
    MAX_ENTRIES = 1 << 30
    MAX_EPOCH = 32
    OFFSET_TEXT = 31  # `,"offset":`, at most 20 digits, `}`

    # What an event takes up beside its frame, and a topic beside its events, as the totals count it: the entry in a
    # ring that is three quarters full on the average, the allocator; the object, its place in a dict, the names.
    EVENT_COST = 112
    TOPIC_COST = 640


cdef struct Kept:
    # One event of a history. A hole has neither a frame nor an object.
    uint64_t offset
    uint64_t published  # in milliseconds of `now_ms`
    unsigned char* frame  # owned; NULL where `event` has it
    PyObject* event  # owned; made when somebody reads it
    uint32_t size  # of the frame
    uint32_t key_start  # within the frame; 0 where there is no key
    uint32_t key_size
    uint32_t data_size
    bint tombstone


cdef struct Retained:
    # What is kept, see `broker.retention.Retention`. Times are in milliseconds; 0: any.
    uint32_t events
    uint64_t age
    uint64_t bytes
    uint64_t tombstone_age
    bint compact


@cython.no_gc
cdef class LogBase:
    """The data of a `TopicLog`."""

    cdef:
        object __weakref__
        readonly str topic
        readonly str epoch
        bytes epoch_text  # plain ASCII, at most MAX_EPOCH bytes
        readonly uint64_t top
        readonly uint64_t floor
        readonly uint32_t count  # events that are kept
        readonly size_t bytes  # of their data and keys
        readonly bint dropped  # the numbering has ended: nothing may be published here any more
        size_t* total  # of all topics: what their events take up; NULL once dropped
        Retained retained
        Kept* ring
        uint32_t first
        uint32_t span  # entries
        uint32_t room  # a power of two
        dict newest  # of a compacted topic: the offset of the event that is kept of each key
        PyObject* store  # borrowed: the HistoryStore; NULL once dropped
        Link of_store
        bint is_emptied  # which of its two lists that is


cdef inline Kept* kept_at(LogBase self, uint32_t index) noexcept:
    """An entry, the first one being 0."""
    return &self.ring[(self.first + index) & (self.room - 1)]


cdef inline bint is_hole(const Kept* entry) noexcept:
    return entry.frame == NULL and entry.event == NULL


cdef inline size_t cost_of(const Kept* entry) noexcept:
    """What an event takes up."""
    return entry.size + EVENT_COST


# Append.


cdef int make_kept_room(LogBase self) except -1:
    """Make room for one more entry: close the holes where they are many, else double the ring."""
    cdef Kept* ring
    cdef uint32_t i, room
    if self.span < self.room:
        return 0
    if self.span and self.count <= self.span // 2:
        close_kept_holes(self)
        return 0
    room = max(<uint32_t> 2, self.room * 2)
    if room > MAX_ENTRIES:
        raise MemoryError
    ring = <Kept*> malloc(room * sizeof(Kept))
    if ring == NULL:
        raise MemoryError
    for i in range(self.span):
        ring[i] = kept_at(self, i)[0]
    free(self.ring)
    self.ring = ring
    self.first = 0
    self.room = room
    return 0


cdef void close_kept_holes(LogBase self) noexcept:
    """Move the events together."""
    cdef uint32_t i, kept = 0
    for i in range(self.span):
        if not is_hole(kept_at(self, i)):
            kept_at(self, kept)[0] = kept_at(self, i)[0]
            kept += 1
    self.span = kept


cdef unsigned char* begin_append(LogBase self, size_t size) except NULL:
    """Return room for the frame of the next event, which has the offset `top` + 1. `end_append` or `free` takes it."""
    cdef unsigned char* frame
    if size > <size_t> 0xFFFFFFFF:
        raise OverflowError("the event is too long to be kept")
    make_kept_room(self)
    frame = <unsigned char*> malloc(size)
    if frame == NULL:
        raise MemoryError
    return frame


cdef Kept* end_append(LogBase self, unsigned char* frame, size_t size) noexcept:
    """Number and keep the event whose frame was written to where `begin_append` said. Drops nothing yet: the caller
    fills in the entry, and calls `settle_append`."""
    cdef Kept* entry = kept_at(self, self.span)
    self.top += 1
    memset(entry, 0, sizeof(Kept))
    entry.offset = self.top
    entry.published = now_ms()
    entry.frame = frame
    entry.size = <uint32_t> size
    self.span += 1
    self.count += 1
    self.total[0] += cost_of(entry)
    return entry


# Entries.


cdef void forget_entry(LogBase self, Kept* entry) noexcept:
    """Make an entry a hole."""
    if is_hole(entry):
        return
    self.count -= 1
    self.bytes -= entry.data_size + entry.key_size
    if self.total != NULL:
        self.total[0] -= cost_of(entry)
    free(entry.frame)
    Py_XDECREF(entry.event)
    entry.frame = NULL
    entry.event = NULL


cdef void trim_kept_holes(LogBase self) noexcept:
    """Take holes from both ends of the ring; give up a ring that is empty."""
    while self.span and is_hole(kept_at(self, 0)):
        self.first = (self.first + 1) & (self.room - 1)
        self.span -= 1
    while self.span and is_hole(kept_at(self, self.span - 1)):
        self.span -= 1
    if self.span == 0 and self.room > 2:
        free(self.ring)
        self.ring = NULL
        self.first = self.room = 0


cdef object key_of(const Kept* entry):
    """The key of an event as UTF-8; None if it has none."""
    if entry.event != NULL:
        return (<Event> entry.event).key_bytes
    if entry.key_start == 0:
        return None
    return PyBytes_FromStringAndSize(<char*> entry.frame + entry.key_start, entry.key_size)


cdef uint32_t find_entry(LogBase self, uint64_t offset) noexcept:
    """The index of the first entry whose offset is not below `offset`; `span` if there is none."""
    cdef uint32_t low = 0, high = self.span, middle
    cdef uint64_t oldest
    if high == 0:
        return 0
    oldest = kept_at(self, 0).offset
    if offset <= oldest:
        return 0
    if offset - oldest < high and kept_at(self, <uint32_t> (offset - oldest)).offset == offset:
        return <uint32_t> (offset - oldest)  # without holes that were closed
    while low < high:
        middle = (low + high) // 2
        if kept_at(self, middle).offset < offset:
            low = middle + 1
        else:
            high = middle
    return low


cdef Event event_of(LogBase self, Kept* entry):
    """The event of an entry as an object, the same for all who ask. It takes over the frame."""
    cdef Event event
    if entry.event == NULL:
        event = Event.__new__(Event)
        event.frame = PyBytes_FromStringAndSize(<char*> entry.frame, entry.size)
        event.topic = self.topic
        event.key_bytes = key_of(entry)
        event.offset = entry.offset
        event.waiting_since = entry.published
        event.data_size = entry.data_size
        Py_INCREF(event)
        entry.event = <PyObject*> event
        free(entry.frame)
        entry.frame = NULL
    return <Event> entry.event
