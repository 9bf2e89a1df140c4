# Publishes that wait for a store: those of the fast path to topics whose history is not kept in this process.
#
# Invariant: a publish waits in one batch, in the order in which it came, and is answered once: when its event was kept
# and delivered (`deliver_batch`), or with an error (`refused`). Until then it counts as a command of its connection.

cdef enum:
    FOR_STORE = 8  # why reading is stopped: `max_inflight` publishes of the connection wait
    MAX_ID = 255  # bytes of an id that a publish is remembered with
    PACK_HEAD = 8  # the head of an event in a pack, see `broker.engines.store.ENTRY`


cdef struct Waiting:
    # One publish. Its key, data and id are in `PendingBatch.text`, in this order.
    PyObject* route  # owned
    PyObject* origin  # owned
    uint64_t offset  # 0: not numbered, or refused
    size_t start
    uint32_t key_size
    uint32_t data_size
    uint8_t id_size  # 0: there is none
    bint keyed
    uint32_t place  # of its topic
    uint32_t following  # the next entry of its topic; 0: none


@cython.final
cdef class PendingBatch:
    """Some publishes, for one transaction. `count` and `size`, the bytes of their keys, data and ids, say how many."""

    cdef:
        Array entries
        Array text
        readonly uint32_t count
        uint32_t delivered
        list epochs  # of the topics, by place: as bytes, or the object that refuses its events

    def __dealloc__(self):
        cdef uint32_t i
        for i in range(self.count):
            Py_XDECREF(waiting_at(self, i).route)
            Py_XDECREF(waiting_at(self, i).origin)
        release(&self.entries)
        release(&self.text)

    @property
    def size(self):
        return self.text.size

    def number(self, take not None, uint32_t most_events, size_t most_bytes):
        """Give each event its offset. Returns the packs: (topic, entries, count, size) with at most so many events, and
        bytes of keys and data but one event at least.

        `take(topic, retention)` is called once for each topic. It returns (what stands for the topic in the packs, the
        newest offset, the epoch), or an object that refuses the events of the topic.
        """
        cdef list tops = [], names = [], packs = []
        cdef dict places = {}
        cdef Array ends  # (first, last) entry of each topic, plus 1
        cdef uint32_t place
        memset(&ends, 0, sizeof(Array))
        self.epochs = []
        try:
            link_topics(self, take, places, names, tops, &ends)
            for place in range(len(names)):
                if tops[place] is not None:
                    number_topic(self, (<uint32_t*> ends.data)[2 * place], tops[place])
                    pack_topic(self, (<uint32_t*> ends.data)[2 * place], names[place], packs, most_events, most_bytes)
        finally:
            release(&ends)
        return packs

    def refused(self, error=None):
        """Return (connection, id as it was sent or None, why) of each publish that is to be answered with an error: all
        with `error` where it is given, else those whose topic was refused. They do not wait any more."""
        cdef uint32_t i
        cdef Waiting* entry
        cdef list found = []
        for i in range(self.count):
            entry = waiting_at(self, i)
            if entry.origin == NULL or (error is None and entry.offset):
                continue
            end_waiting(<Connection> entry.origin)
            id = None
            if entry.id_size:
                id = PyBytes_FromStringAndSize(<char*> id_of_entry(self, entry), entry.id_size)
            found.append((<Connection> entry.origin, id, self.epochs[entry.place] if error is None else error))
            Py_DECREF(<Connection> entry.origin)
            entry.origin = NULL
        return found


cdef inline Waiting* waiting_at(PendingBatch self, uint32_t index) noexcept:
    return <Waiting*> self.entries.data + index


cdef inline unsigned char* id_of_entry(PendingBatch self, const Waiting* entry) noexcept:
    return self.text.data + entry.start + entry.key_size + entry.data_size


cdef int link_topics(PendingBatch self, take, dict places, list names, list tops, Array* ends) except -1:
    """Find the topic of each entry, and link the entries of each."""
    cdef uint32_t i, place
    cdef uint32_t* end
    cdef Waiting* entry
    cdef Route route
    for i in range(self.count):
        entry = waiting_at(self, i)
        route = <Route> entry.route
        found = places.get(route.topic)
        if found is None:
            found = places[route.topic] = len(names)
            result = take(route.topic, route.retention)
            if isinstance(result, tuple):
                names.append(result[0])
                tops.append(result[1])
                self.epochs.append((<str> result[2]).encode())
            else:
                names.append(None)
                tops.append(None)
                self.epochs.append(result)
            memset(reserve(ends, 2 * sizeof(uint32_t), 64), 0, 2 * sizeof(uint32_t))
            ends.size += 2 * sizeof(uint32_t)
        place = entry.place = found
        end = <uint32_t*> ends.data + 2 * place
        if end[0] == 0:
            end[0] = i + 1
        else:
            waiting_at(self, end[1] - 1).following = i + 1
        end[1] = i + 1
    return 0


cdef int number_topic(PendingBatch self, uint32_t index, uint64_t top) except -1:
    """Number the entries of one topic, from the one at `index` - 1 on."""
    cdef Waiting* entry
    while index:
        entry = waiting_at(self, index - 1)
        top += 1
        entry.offset = top
        index = entry.following
    return 0


cdef int pack_topic(PendingBatch self, uint32_t index, topic, list packs, uint32_t most_events,
                    size_t most_bytes) except -1:
    """Write the entries of one topic into packs."""
    cdef Waiting* entry
    cdef uint32_t first, count
    cdef size_t size
    while index:
        first, count, size = index, 0, 0
        while index and count < most_events:
            entry = waiting_at(self, index - 1)
            if count and size + entry.key_size + entry.data_size > most_bytes:
                break
            size += entry.key_size + entry.data_size
            count += 1
            index = entry.following
        packs.append((topic, write_pack(self, first, count, size), count, size))
    return 0


cdef bytes write_pack(PendingBatch self, uint32_t index, uint32_t count, size_t size):
    """Write `count` entries of a topic, with `size` bytes of keys and data, as `broker.engines.store` reads them."""
    cdef bytes pack = PyBytes_FromStringAndSize(NULL, size + PACK_HEAD * count)
    cdef unsigned char* out = <unsigned char*> PyBytes_AS_STRING(pack)
    cdef Waiting* entry
    cdef int32_t key_size
    while count:
        entry = waiting_at(self, index - 1)
        key_size = <int32_t> entry.key_size if entry.keyed else -1
        memcpy(out, &key_size, 4)
        memcpy(out + 4, &entry.data_size, 4)
        memcpy(out + PACK_HEAD, self.text.data + entry.start, entry.key_size + entry.data_size)
        out += PACK_HEAD + entry.key_size + entry.data_size
        index = entry.following
        count -= 1
    return pack


@cython.final
cdef class Keeper:
    """Takes publishes for a store. `wake` is called when the first one of a batch has come.

    At most `most` publishes and `most_bytes` bytes of them wait, those under way too; beyond that it takes none.
    """

    cdef:
        object wake
        PendingBatch open
        readonly uint32_t waiting
        readonly size_t waiting_bytes
        public uint32_t most
        public size_t most_bytes

    def __init__(self, wake not None, uint32_t most, size_t most_bytes):
        self.wake = wake
        self.most = most
        self.most_bytes = most_bytes

    def take(self):
        """Return the publishes that have come since the last call, as a PendingBatch; None if there are none.

        It may be called by another thread: the caller holds the GIL, and nothing here lets go of it.
        """
        batch, self.open = self.open, None
        return batch

    def done(self, PendingBatch batch not None):
        """The publishes of a batch do not wait any more."""
        self.waiting -= batch.count
        self.waiting_bytes -= batch.text.size


cdef bint keep_later(Keeper self, Route route, const Publish* command, Connection origin) except -1:
    """Take a publish for the store. False: too many wait."""
    cdef size_t key_size = command.key_size if command.key != NULL else 0
    cdef size_t id_size = command.id_size if command.id != NULL else 0
    cdef size_t size = key_size + command.data_size + id_size
    cdef PendingBatch batch = self.open
    cdef Waiting* entry
    cdef unsigned char* text
    if self.waiting >= self.most or self.waiting_bytes + size > self.most_bytes:
        return False
    if batch is None:
        batch = PendingBatch.__new__(PendingBatch)
    entry = <Waiting*> reserve(&batch.entries, sizeof(Waiting), 64 * sizeof(Waiting))
    text = reserve(&batch.text, size, 16384)
    memset(entry, 0, sizeof(Waiting))
    entry.start = batch.text.size
    entry.key_size = <uint32_t> key_size
    entry.data_size = <uint32_t> command.data_size
    entry.id_size = <uint8_t> id_size
    entry.keyed = command.key != NULL
    if key_size:
        memcpy(text, command.key, key_size)
    memcpy(text + key_size, command.data, command.data_size)
    if id_size:
        memcpy(text + key_size + command.data_size, command.id, id_size)
    Py_INCREF(route)
    Py_INCREF(origin)
    entry.route = <PyObject*> route
    entry.origin = <PyObject*> origin
    batch.entries.size += sizeof(Waiting)
    batch.text.size += size
    batch.count += 1
    self.waiting += 1
    self.waiting_bytes += size
    origin.unanswered += 1
    if origin.unanswered >= origin.context.limits.max_inflight:
        origin.stop_reading(FOR_STORE)
    if self.open is None:
        self.open = batch
        self.wake()
    return True


cdef int end_waiting(Connection origin) except -1:
    """A publish of a connection is about to be answered: read more, if few enough of them wait."""
    origin.unanswered -= 1
    if origin.stops & FOR_STORE and origin.unanswered <= origin.context.limits.max_inflight // 2:
        origin.allow_reading(FOR_STORE)
    return 0
