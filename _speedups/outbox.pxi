# What waits for one client: for each of its subscriptions a queue of events, bounded, with a policy at the bound.
#
# The law of this file: every event offered to a subscription is either handed to the socket, in order, or counted in a
# `gap` that stands where the event would have stood.

cdef enum:
    DROP_OLDEST = 0
    DROP_NEWEST = 1
    CLOSE_SLOW = 2

    # What became of an offered event: flags of the answer of `offer`.
    WAITS = 1
    LOST = 2

    # So many entries of an empty queue are kept for the next time.
    KEPT_ROOM = 16

# The overflow policies by their name in the protocol.
OVERFLOW = {"drop_oldest": DROP_OLDEST, "drop_newest": DROP_NEWEST, "close": CLOSE_SLOW}
OVERFLOW_NAMES = {number: name for name, number in OVERFLOW.items()}


@cython.no_gc
@cython.final
cdef class Event:
    """One event that has to wait, shared by all who wait for it: its finished frame, its topic, its key."""

    cdef:
        bytes frame
        str topic
        bytes key  # without quotes, as it was sent; None where the publisher gave none
        uint64_t number  # events are numbered as they are published


cdef struct Queued:
    PyObject* event  # owned; NULL for a gap behind which no event waits
    uint64_t missed  # how many events are lost right before this one


@cython.no_gc_clear
@cython.final
cdef class Subscription:
    """One client's interest in one topic or pattern, and the queue of what waits under it.

    A subscription is *behind* while it is not simply sent what its audiences send: its connection's socket is full, or
    something waits in its queue, or it was set apart for one turn so as not to see an event of its own.
    """

    cdef:
        readonly Connection connection  # None once cancelled
        readonly Filter filter
        readonly bint echo
        readonly bint behind
        readonly uint32_t max_queue
        readonly uint64_t dropped
        uint8_t overflow_policy
        Member* members
        # The queue is a ring.
        Queued* ring
        uint32_t first
        uint32_t count
        uint32_t room
        uint64_t missed  # lost behind the last queued event
        # Links: all subscriptions of the filter, of the connection, and those of the connection with something to send.
        PyObject* filter_next
        PyObject* filter_previous
        PyObject* connection_next
        PyObject* connection_previous
        PyObject* busy_next
        PyObject* busy_previous

    def __cinit__(self, Connection connection not None, Filter filter not None, *, uint32_t max_queue,
                  str overflow="drop_oldest", bint echo=True):
        cdef uint8_t policy = OVERFLOW[overflow]
        if connection.state != OPEN:
            raise ValueError("the connection is not open")
        filter.before_change()
        self.connection = connection
        self.filter = filter
        self.max_queue = max_queue
        self.overflow_policy = policy
        self.echo = echo
        # What waits may be of the same topics, under a subscription that was the most specific one until now: it goes
        # out first.
        self.behind = connection.blocked or connection.busy != NULL
        connection.reactor.behind += self.behind
        if connection.busy != NULL:
            connection.in_order = True
        connection.deaf += not echo
        link_to_filter(self)
        link_to_connection(self)

    def change(self, *, uint32_t max_queue, str overflow, bint echo):
        """Change what was agreed. What is queued stays, brought under the new bound and policy.

        What had to go is counted in a gap; under the policy `close` it is the connection that goes.
        """
        if self.connection is None:
            raise ValueError("the subscription has ended")
        send_what_is_set_apart(self)
        self.overflow_policy = OVERFLOW[overflow]
        self.connection.deaf += <int> self.echo - <int> echo
        self.echo = echo
        self.max_queue = max_queue
        if self.count > max_queue and self.overflow_policy == CLOSE_SLOW:
            self.connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
        while self.count > max_queue:
            if self.overflow_policy == DROP_NEWEST:
                drop_newest_queued(self)
            else:
                drop_oldest_queued(self)

    def cancel(self):
        """End the subscription and forget its queue. Ending it twice does nothing."""
        cdef Queued entry
        if self.connection is None:
            return
        send_what_is_set_apart(self)
        self.filter.before_change()
        unlink_from_filter(self)
        while self.count:
            pop(self, &entry)
            Py_DECREF(<Event> entry.event)
        self.missed = 0
        leave_busy(self)
        free(self.ring)
        self.ring = NULL
        self.room = 0
        unlink_from_connection(self)
        self.connection.deaf -= not self.echo
        self.connection.reactor.behind -= self.behind
        self.connection = None

    @property
    def overflow(self):
        """The policy's name in the protocol."""
        return OVERFLOW_NAMES[self.overflow_policy]

    @property
    def queued(self):
        """How many events wait."""
        return self.count

    def __dealloc__(self):
        if self.connection is not None:
            self.cancel()


cdef int send_what_is_set_apart(Subscription self) except -1:
    """Send what is queued only for this turn, while the socket takes it: that has not overflowed anything."""
    cdef Connection connection = self.connection
    if self.count and connection.state == OPEN and not connection.blocked and not connection.writing:
        connection.write(False)
    return 0


cdef int link_to_filter(Subscription self) except -1:
    cdef Filter filter = self.filter
    self.filter_next = filter.first
    if filter.first != NULL:
        (<Subscription> filter.first).filter_previous = <PyObject*> self
    filter.first = <PyObject*> self
    filter.subscribers += 1
    return 0


cdef int unlink_from_filter(Subscription self) except -1:
    cdef Filter filter = self.filter
    if self.filter_previous != NULL:
        (<Subscription> self.filter_previous).filter_next = self.filter_next
    else:
        filter.first = self.filter_next
    if self.filter_next != NULL:
        (<Subscription> self.filter_next).filter_previous = self.filter_previous
    self.filter_next = self.filter_previous = NULL
    filter.subscribers -= 1
    return 0


cdef int link_to_connection(Subscription self) except -1:
    cdef Connection connection = self.connection
    self.connection_next = connection.subscriptions
    if connection.subscriptions != NULL:
        (<Subscription> connection.subscriptions).connection_previous = <PyObject*> self
    connection.subscriptions = <PyObject*> self
    connection.reactor.subscriptions += 1
    return 0


cdef int unlink_from_connection(Subscription self) except -1:
    cdef Connection connection = self.connection
    if self.connection_previous != NULL:
        (<Subscription> self.connection_previous).connection_next = self.connection_next
    else:
        connection.subscriptions = self.connection_next
    if self.connection_next != NULL:
        (<Subscription> self.connection_next).connection_previous = self.connection_previous
    self.connection_next = self.connection_previous = NULL
    connection.reactor.subscriptions -= 1
    return 0


cdef void enter_busy(Subscription self) noexcept:
    """Put the subscription last among those of its connection that have something to send. It is a ring."""
    cdef Connection connection = self.connection
    cdef PyObject* first = connection.busy
    if self.busy_next != NULL:
        return
    if first == NULL:
        self.busy_next = self.busy_previous = connection.busy = <PyObject*> self
        return
    self.busy_next = first
    self.busy_previous = (<Subscription> first).busy_previous
    (<Subscription> self.busy_previous).busy_next = <PyObject*> self
    (<Subscription> first).busy_previous = <PyObject*> self


cdef void leave_busy(Subscription self) noexcept:
    cdef Connection connection = self.connection
    if self.busy_next == NULL:
        return
    if self.busy_next == <PyObject*> self:
        connection.busy = NULL
    else:
        (<Subscription> self.busy_previous).busy_next = self.busy_next
        (<Subscription> self.busy_next).busy_previous = self.busy_previous
        if connection.busy == <PyObject*> self:
            connection.busy = self.busy_next
    self.busy_next = self.busy_previous = NULL


cdef PyObject* oldest_busy(PyObject* first) noexcept:
    """Of a ring of subscriptions with something to send, the one that is to send what was published first."""
    cdef PyObject* link = first
    cdef PyObject* oldest = first
    cdef Subscription subscription
    cdef uint64_t number, least = 0
    while True:
        subscription = <Subscription> link
        if subscription.count == 0:
            return link  # a gap behind its last event
        number = (<Event> subscription.ring[subscription.first].event).number
        if link == first or number < least:
            oldest = link
            least = number
        link = subscription.busy_next
        if link == first:
            return oldest


cdef int make_room(Subscription self) except -1:
    """Double the ring when it is full."""
    cdef uint32_t room, head
    cdef Queued* ring
    if self.count < self.room:
        return 0
    room = max(8, self.room * 2)
    ring = <Queued*> malloc(room * sizeof(Queued))
    if ring == NULL:
        raise MemoryError
    head = self.room - self.first
    if self.room:
        memcpy(ring, self.ring + self.first, head * sizeof(Queued))
        memcpy(ring + head, self.ring, self.first * sizeof(Queued))
    free(self.ring)
    self.ring = ring
    self.first = 0
    self.room = room
    return 0


cdef int push(Subscription self, Event event) except -1:
    """Queue an event as the newest."""
    cdef Queued* entry
    make_room(self)
    entry = &self.ring[(self.first + self.count) % self.room]
    Py_INCREF(event)
    entry.event = <PyObject*> event
    entry.missed = self.missed
    self.missed = 0
    self.count += 1
    self.connection.outbox_size += PyBytes_GET_SIZE(event.frame)
    self.connection.reactor.queued += 1
    enter_busy(self)
    return 0


cdef int push_back_first(Subscription self, PyObject* event, uint64_t missed) except -1:
    """Put back as the oldest what `pop` gave and the socket did not take. Takes over the reference."""
    if event == NULL:
        if self.count:
            self.ring[self.first].missed += missed
        else:
            self.missed += missed
        enter_busy(self)
        return 0
    make_room(self)
    self.first = (self.first + self.room - 1) % self.room
    self.ring[self.first].event = event
    self.ring[self.first].missed = missed
    self.count += 1
    self.connection.outbox_size += PyBytes_GET_SIZE((<Event> event).frame)
    self.connection.reactor.queued += 1
    enter_busy(self)
    return 0


cdef void pop(Subscription self, Queued* entry) noexcept:
    """Take the oldest entry, or the gap behind the last event. The caller owns the event's reference."""
    if self.count == 0:
        entry.event = NULL
        entry.missed = self.missed
        self.missed = 0
        return
    entry[0] = self.ring[self.first]
    self.first = (self.first + 1) % self.room
    self.count -= 1
    if self.count == 0 and self.room > KEPT_ROOM:
        free(self.ring)
        self.ring = NULL
        self.first = self.room = 0
    self.connection.outbox_size -= PyBytes_GET_SIZE((<Event> entry.event).frame)
    self.connection.reactor.queued -= 1


cdef void drop_oldest_queued(Subscription self) noexcept:
    """Turn the oldest queued event into a gap before the next one."""
    cdef Queued entry
    pop(self, &entry)
    Py_DECREF(<Event> entry.event)
    if self.count:
        self.ring[self.first].missed += entry.missed + 1
    else:
        self.missed += entry.missed + 1
    count_lost(self)


cdef void drop_newest_queued(Subscription self) noexcept:
    """Turn the newest queued event into a gap behind the one before it."""
    cdef Queued* entry = &self.ring[(self.first + self.count - 1) % self.room]
    self.missed += entry.missed + 1
    self.count -= 1
    self.connection.outbox_size -= PyBytes_GET_SIZE((<Event> entry.event).frame)
    self.connection.reactor.queued -= 1
    Py_DECREF(<Event> entry.event)
    count_lost(self)


cdef void count_lost(Subscription self) noexcept:
    self.dropped += 1
    self.connection.reactor.dropped[self.overflow_policy] += 1


cdef bint is_full(Subscription self, size_t size) noexcept:
    """Whether one more event of `size` bytes would break a bound: the subscription's, or its connection's."""
    return (self.count >= self.max_queue
            or self.connection.outbox_size + size > self.connection.reactor.max_outbox)


cdef int offer(Subscription self, Event event) except -1:
    """Queue an event for a subscription that is behind, or do at the bound what its policy says.

    Returns flags: WAITS if the event waits for the socket, LOST if this or an older event was lost.
    """
    cdef:
        Connection connection = self.connection
        size_t size = PyBytes_GET_SIZE(event.frame)
        int fate = 0
    if connection.doomed:
        count_lost(self)
        return LOST
    if is_full(self, size):
        if not connection.blocked and not connection.writing:
            connection.write(False)  # it was only set apart for this turn: its socket may take all
            if connection.doomed:
                count_lost(self)
                return LOST
        while is_full(self, size):
            fate = LOST
            if self.overflow_policy == CLOSE_SLOW:
                count_lost(self)
                connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
                return LOST
            if self.overflow_policy == DROP_NEWEST or self.count == 0:
                self.missed += 1
                count_lost(self)
                enter_busy(self)
                return LOST
            drop_oldest_queued(self)
    push(self, event)
    return fate | WAITS if connection.blocked else fate
