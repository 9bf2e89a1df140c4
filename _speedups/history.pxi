# The history of topics: what is kept of each of them, and the totals.
#
# Invariant: `memory` is the sum over all topics, each with what its events take up and a fixed part. Topics stand in
# `recent`, or in `emptied` if none of their events is left, in the order in which they were last published to, those
# published to least recently first. (Of those in `recent` some may have been emptied since, by age.)

cdef enum:
    SWEPT_ENTRIES = 20000  # so many entries are looked at in one call of `sweep`, beside the last topic's


@cython.no_gc
@cython.final
cdef class TopicLog(LogBase):
    """The kept events of one topic, and its numbering: `top` is the offset of the newest event that was published, 0
    before the first one; `epoch` says which numbering it is.

    `floor` is the offset up to which events may be missing that no newer one superseded.
    """

    def __dealloc__(self):
        self.newest = None
        drop_kept(self, self.span)
        free(self.ring)

    def after(self, uint64_t offset, uint32_t limit):
        """Read at most `limit` kept events behind this offset, the oldest first. Returns them, and whether there are
        more."""
        trim(self, now_ms())
        return read_events(self, find_entry(self, offset + 1), limit)

    def latest(self, uint32_t limit):
        """Read the `limit` newest kept events, the oldest of them first."""
        return self.after(self.before(limit), limit)[0]

    def before(self, uint32_t count):
        """The offset behind which the `count` newest kept events are; of all that are kept where there are fewer."""
        cdef uint32_t index
        trim(self, now_ms())
        index = self.span
        while count and index:
            index -= 1
            count -= not is_hole(kept_at(self, index))
        return kept_at(self, index).offset - 1 if index < self.span else self.top

    @property
    def oldest(self):
        """The offset of the oldest event that is kept; `top` + 1 if there is none."""
        trim(self, now_ms())
        return kept_at(self, 0).offset if self.span else self.top + 1


cdef tuple read_events(LogBase self, uint32_t index, uint32_t limit):
    """The events from an entry on, at most `limit`, and whether there are more."""
    cdef list events = []
    cdef Kept* entry
    while index < self.span:
        entry = kept_at(self, index)
        index += 1
        if is_hole(entry):
            continue
        if limit == 0:
            return events, True
        limit -= 1
        events.append(event_of(self, entry))
    return events, False


@cython.final
cdef class HistoryStore:
    """What a memory engine keeps: a `TopicLog` for each topic with history.

    `max_bytes` bounds what all of it takes up, `max_topics` the number of topics. `new_epoch()` makes the names of
    numberings, of at most 32 letters and digits: one for all topics, until a topic's numbering has ended; then the
    topics that begin from then on get another one.
    """

    cdef:
        object __weakref__
        dict logs
        object new_epoch
        List recent
        List emptied
        list to_sweep
        public size_t max_bytes
        public uint32_t max_topics
        readonly size_t memory
        readonly uint64_t events_evicted  # dropped because of the totals, before their time
        readonly uint64_t topics_evicted
        readonly str epoch

    def __init__(self, *, size_t max_bytes, uint32_t max_topics, new_epoch):
        self.logs = {}
        self.to_sweep = []
        self.max_bytes = max_bytes
        self.max_topics = max_topics
        self.new_epoch = new_epoch
        self.epoch = new_epoch()

    def __dealloc__(self):
        while oldest_log(self) != NULL:
            unlink_log(self, <TopicLog> oldest_log(self))

    def __len__(self):
        return len(self.logs)

    @property
    def events(self):
        """How many events are kept."""
        return sum([log.count for log in self.logs.values()])

    def find(self, str topic not None):
        """The log of a topic; None if nothing was published there."""
        return self.logs.get(topic)

    def log(self, str topic not None, *, uint32_t events, double age=0, uint64_t bytes=0, bint compact=False,
            double tombstone_age=0):
        """The log of a topic, which is made if it is not there, with this retention from now on. Times are in seconds;
        0: events of any age, any number of bytes."""
        cdef TopicLog log = self.logs.get(topic)
        if log is None:
            log = self.add(topic)
        log.retained.events = max(<uint32_t> 1, events)
        log.retained.age = <uint64_t> (1000 * age)
        log.retained.bytes = bytes
        log.retained.tombstone_age = <uint64_t> (1000 * tombstone_age)
        if compact != log.retained.compact:
            log.retained.compact = compact
            log.newest = None
            if compact:
                begin_compaction(log)
        trim(log, now_ms())
        return log

    cdef TopicLog add(self, str topic):
        cdef TopicLog log = TopicLog.__new__(TopicLog)
        self.forget_topics(self.max_topics - 1)
        log.topic = topic
        log.epoch = self.epoch
        log.epoch_text = self.epoch.encode("ascii")
        if PyBytes_GET_SIZE(log.epoch_text) > MAX_EPOCH:
            raise ValueError("the epoch is too long")
        log.total = &self.memory
        log.store = <PyObject*> self
        log.of_store.owner = <PyObject*> log
        self.logs[topic] = log
        log.is_emptied = True
        append(&self.emptied, &log.of_store)
        self.memory += TOPIC_COST + len(topic)
        return log

    cdef int forget_topics(self, size_t most) except -1:
        """Forget topics until `most` are left: those without events, then those published to least recently."""
        cdef TopicLog log
        while <size_t> len(self.logs) > most:
            log = <TopicLog> oldest_log(self)
            self.topics_evicted += 1
            self.events_evicted += log.count
            self.drop(log.topic)
        return 0

    def drop(self, str topic not None):
        """Forget a topic, and end its numbering. Does nothing if it is not there."""
        cdef TopicLog log = self.logs.pop(topic, None)
        if log is None:
            return
        self.memory -= TOPIC_COST + len(topic)
        unlink_log(self, log)
        self.epoch = self.new_epoch()

    def enforce(self):
        """Go by the totals, which may have been changed."""
        self.forget_topics(self.max_topics)
        evict(self, None)

    def sweep(self):
        """Drop what has grown too old, of some topics. Returns how many topics are left for this round."""
        cdef uint64_t now = now_ms()
        cdef size_t looked_at = 0
        cdef TopicLog log
        if not self.to_sweep:
            self.to_sweep = list(self.logs.values())
        while self.to_sweep and looked_at < SWEPT_ENTRIES:
            log = self.to_sweep.pop()
            looked_at += 1
            if log.dropped:
                continue
            if log.retained.compact:
                looked_at += log.span
                drop_tombstones(log, now)
            trim(log, now)
            if log.count == 0 and not log.is_emptied:
                move_log(self, log)
        return len(self.to_sweep)


cdef PyObject* oldest_log(HistoryStore self) noexcept:
    """The topic to be forgotten first; NULL if there is none."""
    if self.emptied.first != NULL:
        return self.emptied.first.owner
    return NULL if self.recent.first == NULL else self.recent.first.owner


cdef void move_log(HistoryStore self, TopicLog log) noexcept:
    """Put a topic at the end of the list where it belongs: it was published to, or has lost its events."""
    remove(&self.emptied if log.is_emptied else &self.recent, &log.of_store)
    log.is_emptied = log.count == 0
    append(&self.emptied if log.is_emptied else &self.recent, &log.of_store)


cdef int unlink_log(HistoryStore self, TopicLog log) except -1:
    """End the numbering of a topic, and free its events."""
    remove(&self.emptied if log.is_emptied else &self.recent, &log.of_store)
    log.newest = None
    drop_kept(log, log.span)
    log.store = NULL
    log.total = NULL
    log.dropped = True
    return 0


cdef inline int settle_publish(TopicLog log, Kept* entry, bytes key) except -1:
    """An event was appended, and its entry is filled in: go by the retention and the totals."""
    cdef HistoryStore store = <HistoryStore> log.store
    settle_append(log, entry, key)
    move_log(store, log)
    if store.memory > store.max_bytes:
        evict(store, log)
    return 0


cdef int evict(HistoryStore self, TopicLog keep) except -1:
    """Drop events of the topics that were published to least recently until all fits. `keep` keeps its newest event."""
    cdef TopicLog log
    while self.memory > self.max_bytes and self.recent.first != NULL:
        log = <TopicLog> self.recent.first.owner
        if log is keep and log.count <= 1:
            break
        self.events_evicted += 1 if log is keep else log.count
        drop_kept(log, 1 if log is keep else log.span)
        if log.count == 0:
            move_log(self, log)
    while self.memory > self.max_bytes and self.emptied.first != NULL:
        self.topics_evicted += 1
        self.drop((<TopicLog> self.emptied.first.owner).topic)
    return 0


def append_event(TopicLog log not None, bytes payload not None, bytes key, uint32_t data_size):
    """Keep an event that is encoded as the protocol's `event` message with the offset `log.top` + 1, which is returned.

    `key` is its key as UTF-8, `data_size` the length of its data.
    """
    cdef Event event = Event.__new__(Event)
    cdef Kept* entry
    if log.dropped:
        raise ValueError("the numbering of this topic has ended")
    make_kept_room(log)
    event.frame = frame(OP_TEXT, payload)
    event.topic = log.topic
    event.key_bytes = key
    event.data_size = data_size
    entry = end_append(log, NULL, PyBytes_GET_SIZE(event.frame))
    event.offset = entry.offset
    event.waiting_since = entry.published
    Py_INCREF(event)
    entry.event = <PyObject*> event
    entry.key_size = 0 if key is None else <uint32_t> len(key)
    entry.data_size = data_size
    entry.tombstone = key is not None and is_null(event)
    settle_publish(log, entry, key)
    return log.top
