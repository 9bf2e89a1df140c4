# What waits for one client: for each of its subscriptions a queue of events, bounded, with a policy at the bound.
#
# The law of this file: every event offered to a subscription is either handed to the socket, in order, or counted in a
# `gap` that stands where the event would have stood.

cdef enum:
    # The overflow policies. Those that do something of their own, see policies.pxi, come behind CLOSE_SLOW.
    DROP_OLDEST = 0
    DROP_NEWEST = 1
    CLOSE_SLOW = 2
    LATEST = 3
    BLOCK = 4
    REPLAY = 5
    POLICIES = 6

    # Why events were lost.
    OVERFLOWN = 0
    CONFLATED = 1
    AGED = 2
    REASONS = 3

    # What became of an offered event: flags of the answer of `offer`.
    WAITS = 1
    LOST = 2

    # So many entries of an empty queue are kept for the next time.
    KEPT_ROOM = 16

    # `credit` of a subscription that needs none.
    UNLIMITED = -1

# The overflow policies and the reasons of gaps by their names in the protocol.
OVERFLOW = {
    "drop_oldest": DROP_OLDEST,
    "drop_newest": DROP_NEWEST,
    "latest": LATEST,
    "replay": REPLAY,
    "block": BLOCK,
    "close": CLOSE_SLOW,
}
OVERFLOW_NAMES = {number: name for name, number in OVERFLOW.items()}
REASON_NAMES = ("overflow", "conflated", "age")


@cython.no_gc
@cython.final
cdef class Event:
    """One event that has to wait, shared by all who wait for it: its finished frame, its topic, its key."""

    cdef:
        bytes frame
        bytes deflated  # the same for those who agreed to compression, made when one of them is sent it
        str topic
        bytes key  # without quotes, as it was sent; None where the publisher gave none
        uint64_t number  # events are numbered as they are published
        uint64_t born  # when it first had to wait, in milliseconds of `now_ms`
        uint64_t expires  # when it is too old to be sent; 0: never
        object mark  # `mark_of`, once somebody has asked


cdef struct Missed:
    # How many events are lost at one place, by reason.
    uint64_t by[REASONS]
    uint64_t holes  # how often it was announced that some may be lost, nobody knows how many


cdef struct Queued:
    PyObject* event  # owned; NULL for one that is lost, or for a gap behind which no event waits
    Missed missed  # what is lost right before this one; of one that is lost, itself included


cdef inline bint is_any(const Missed* missed) noexcept:
    return (missed.by[OVERFLOWN] | missed.by[CONFLATED] | missed.by[AGED] | missed.holes) != 0


cdef inline void add_missed(Missed* missed, const Missed* more) noexcept:
    cdef int reason
    for reason in range(REASONS):
        missed.by[reason] += more.by[reason]
    missed.holes += more.holes


@cython.no_gc_clear
@cython.final
cdef class Subscription:
    """One client's interest in one topic or pattern, and the queue of what waits under it.

    A subscription is *behind* while it is not simply sent what its audiences send: its connection's socket is full, or
    something waits in its queue, or it was set apart for one turn so as not to see an event of its own. One whose
    events are counted or waited for singly (`credit`, the policy `block`) always is.

    `credit` is how many events may still be sent; -1 for any number.
    """

    cdef:
        readonly Connection connection  # None once cancelled
        readonly Filter filter
        readonly bint echo
        readonly bint behind
        bint asked  # `LoopContext.catch_up` was called, and nothing was fed since
        readonly uint32_t max_queue
        readonly uint64_t dropped
        readonly int64_t credit
        readonly uint64_t lag  # under `replay`: the newest events, which are neither sent nor held
        uint8_t overflow_policy
        Member* members
        # The queue is a ring. Its first and its last entry are events; of those between, some may be lost (`latest`).
        Queued* ring
        uint32_t first
        uint32_t span  # entries
        uint32_t count  # events among them
        uint32_t room
        Missed missed  # lost behind the last queued event
        uint64_t lost[REASONS]
        # Under `latest`: `mark_of` an event → its place, `base` being that of the first entry.
        dict newest
        uint64_t base
        size_t queued_size  # bytes of the queued events
        # The less specific subscriptions of which what waited when this one began goes out first, that is the events up
        # to number `since`; None if there is nothing to wait for any more.
        list after
        uint64_t since
        # Under `block`: a `Hold` for each event beyond the bound, the oldest first; None where there is none.
        list holds
        uint32_t strays  # those of them for which nobody waits
        # Links: all subscriptions of the filter, of the connection, and those of the connection with something to send.
        PyObject* filter_next
        PyObject* filter_previous
        PyObject* connection_next
        PyObject* connection_previous
        PyObject* busy_next
        PyObject* busy_previous

    def __cinit__(self, Connection connection not None, Filter filter not None, *, uint32_t max_queue,
                  str overflow="drop_oldest", bint echo=True, int64_t credit=UNLIMITED):
        cdef uint8_t policy = OVERFLOW[overflow]
        if connection.state != OPEN:
            raise ValueError("the connection is not open")
        filter.before_change()
        self.connection = connection
        self.filter = filter
        self.max_queue = max_queue
        self.overflow_policy = policy
        self.echo = echo
        self.credit = credit
        if connection.outbox_size:
            find_what_goes_first(self)
        self.behind = connection.blocked or connection.busy != NULL or is_single(self) or self.after is not None
        connection.unsettled |= self.behind
        connection.deaf += not echo
        link_to_filter(self)
        link_to_connection(self)

    def change(self, *, uint32_t max_queue, str overflow, bint echo, credit=None):
        """Change what was agreed. What is queued stays, brought under the new bound and policy.

        What had to go is counted in a gap; under the policy `close` it is the connection that goes, and under `block`
        nothing goes. `credit` sets what remains; None leaves it as it is.
        """
        cdef uint8_t policy = OVERFLOW[overflow]
        cdef uint8_t before = self.overflow_policy
        cdef int64_t credits
        if self.connection is None:
            raise ValueError("the subscription has ended")
        send_what_is_set_apart(self)
        # Only now: what was sent took of it.
        credits = self.credit if credit is None else credit
        if not self.behind and (policy == BLOCK or credits != UNLIMITED):
            # What is in a batch goes out as it was agreed; from now on this one is offered each event.
            flush_audiences(self)
        self.connection.deaf += <int> self.echo - <int> echo
        self.echo = echo
        self.max_queue = max_queue
        self.overflow_policy = policy
        set_credit(self, credits)
        if is_single(self):
            set_behind(self)
        # It may be ready for batches again, and who waits for what goes may go on.
        self.connection.unsettled = True
        self.connection.mark_dirty()
        if before == REPLAY and policy != REPLAY:
            lose_lag(self)
        if policy != LATEST:
            self.newest = None
        elif before != LATEST:
            conflate_queue(self)
        if self.count > max_queue and policy == CLOSE_SLOW:
            self.connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
        while self.count > max_queue and policy != BLOCK:
            if policy == DROP_NEWEST:
                drop_newest_queued(self)
            else:
                drop_oldest_queued(self, OVERFLOWN)
        if self.holds is not None:
            let_publishers_go(self)

    def add_credit(self, int64_t add):
        """Let so many more events come. Raises ValueError if the subscription was made without credit."""
        if self.connection is None:
            raise ValueError("the subscription has ended")
        if self.credit == UNLIMITED:
            raise ValueError("the subscription was made without credit")
        set_credit(self, min(self.credit + add, MAX_CREDIT))

    def feed(self, str topic not None, bytes payload not None):
        """Under `replay`: send an event of the topic's history, the oldest one that this client lags behind.

        `payload` is encoded as the protocol's `event` message. Returns whether there is room for more of them now; if
        there is not, `LoopContext.catch_up` is called again once there is.
        """
        return feed_replay(self, topic, payload)

    def skip(self, uint64_t count):
        """Under `replay`: so many of the oldest events that this client lags behind are not to be had any more.

        The caller announces it, in a gap ahead of what it feeds next.
        """
        skip_replay(self, count)

    def announce_loss(self):
        """Announce, behind all that was published until now, that events may be lost: a gap, with no count."""
        if self.connection is None or self.connection.state != OPEN:
            return
        flush_audiences(self)
        set_behind(self)  # what comes in this turn comes behind it
        self.missed.holes += 1
        enter_busy(self)
        self.connection.mark_dirty()

    def cancel(self):
        """End the subscription and forget its queue. ShutdownSignal it twice does nothing."""
        cdef Connection connection = self.connection
        if connection is not None:
            send_what_is_set_apart(self)
            self.end()
            if connection.state == OPEN:
                connection.mark_dirty()  # others may have waited for what is forgotten now

    cdef int end(self) except -1:
        cdef Queued entry
        self.filter.before_change()
        unlink_from_filter(self)
        while self.count:
            pop(self, &entry)
            Py_DECREF(<Event> entry.event)
        memset(&self.missed, 0, sizeof(Missed))
        self.lag = 0
        leave_busy(self)
        free(self.ring)
        self.ring = NULL
        self.room = 0
        unlink_from_connection(self)
        self.connection.deaf -= not self.echo
        self.connection.aside -= self.after is not None
        self.after = None
        if self.holds is not None:
            let_all_publishers_go(self)
        self.connection = None
        return 0

    @property
    def overflow(self):
        """The policy's name in the protocol."""
        return OVERFLOW_NAMES[self.overflow_policy]

    @property
    def queued(self):
        """How many events wait."""
        return self.count

    @property
    def waiting(self):
        """For how long the oldest of the queued events has waited, in seconds; 0 if none waits."""
        if self.count == 0:
            return 0.0
        return (now_ms() - (<Event> self.ring[self.first].event).born) / 1000.0

    @property
    def lost_by_reason(self):
        """How many events were lost, by the reason that their gaps gave."""
        return {REASON_NAMES[reason]: self.lost[reason] for reason in range(REASONS)}

    def __dealloc__(self):
        if self.connection is not None:
            self.end()


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
    connection.context.subscriptions += 1
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
    connection.context.subscriptions -= 1
    return 0


cdef void enter_busy(Subscription self) noexcept:
    """Put the subscription last among those of its connection that have something to send. It is a ring."""
    cdef Connection connection = self.connection
    cdef PyObject* first = connection.busy
    if self.busy_next != NULL or self.credit == 0 or self.after is not None:
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


cdef int find_what_goes_first(Subscription self) except -1:
    """Keep the order of topics: what waits under a pattern may be of topics that are this subscription's now."""
    cdef Connection connection = self.connection
    cdef PyObject* link = connection.subscriptions
    cdef Subscription other
    while link != NULL:
        other = <Subscription> link
        if other.count and is_pattern(other.filter.topic) and may_overlap(other.filter.topic, self.filter.topic):
            if self.after is None:
                self.after = []
                connection.aside += 1
            self.after.append(other)
        link = other.connection_next
    self.since = connection.context.published
    return 0


cdef inline bint goes_first(Subscription other, uint64_t since) noexcept:
    """Whether events up to this number wait under a subscription."""
    return other.count != 0 and (<Event> other.ring[other.first].event).number <= since


cdef bint waits_for_credit(Subscription self) except -1:
    """Whether what has to go out before this subscription's events waits for credit itself."""
    cdef Subscription other
    for other in self.after:
        if (other.credit == 0 or other.after is not None) and goes_first(other, self.since):
            return True
    return False


cdef int let_those_go_who_wait(Connection connection) except -1:
    """Look whether what has to go out first has gone. To be called when nothing of it is being written."""
    cdef PyObject* link = connection.subscriptions
    cdef Subscription subscription
    while link != NULL:
        subscription = <Subscription> link
        link = subscription.connection_next
        if subscription.after is None:
            continue
        subscription.after = [other for other in subscription.after
                              if goes_first(<Subscription> other, subscription.since)]
        if not subscription.after:
            subscription.after = None
            connection.aside -= 1
            connection.unsettled = True
            connection.mark_dirty()
            if has_something(subscription):
                enter_busy(subscription)
    return 0


cdef inline Queued* at(Subscription self, uint32_t index) noexcept:
    """An entry of the queue, the first one being 0."""
    return &self.ring[(self.first + index) & (self.room - 1)]  # the room is a power of two


cdef int make_room(Subscription self) except -1:
    """Make room in a full ring: close the holes where they are many, else double it."""
    cdef uint32_t room, head
    cdef Queued* ring
    if self.count <= self.room // 2 and self.room:
        close_holes(self)
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
    if self.span == self.room:
        make_room(self)
    entry = at(self, self.span)
    Py_INCREF(event)
    entry.event = <PyObject*> event
    entry.missed = self.missed
    memset(&self.missed, 0, sizeof(Missed))
    if self.newest is not None:
        self.newest[event.mark] = self.base + self.span
    self.span += 1
    count_queued(self, event)
    enter_busy(self)
    return 0


cdef int push_back_first(Subscription self, PyObject* event, const Missed* missed) except -1:
    """Put back as the oldest what `pop` gave and the socket did not take. Takes over the reference."""
    if event == NULL:
        add_missed(&at(self, 0).missed if self.count else &self.missed, missed)
        enter_busy(self)
        return 0
    if self.span == self.room:
        make_room(self)
    self.first = (self.first - 1) & (self.room - 1)
    self.base -= 1
    self.span += 1
    self.ring[self.first].event = event
    self.ring[self.first].missed = missed[0]
    if self.newest is not None:
        self.newest[(<Event> event).mark] = self.base
    count_queued(self, <Event> event)
    self.credit += self.credit != UNLIMITED
    enter_busy(self)
    return 0


cdef int pop(Subscription self, Queued* entry) except -1:
    """Take the oldest entry, or the gap behind the last event. The caller owns the event's reference."""
    if self.count == 0:
        entry.event = NULL
        entry.missed = self.missed
        memset(&self.missed, 0, sizeof(Missed))
        return 0
    entry[0] = at(self, 0)[0]
    count_not_queued(self, <Event> entry.event)
    at(self, 0).event = NULL
    memset(&at(self, 0).missed, 0, sizeof(Missed))
    trim(self)
    return 0


cdef int count_queued(Subscription self, Event event) except -1:
    cdef size_t size = PyBytes_GET_SIZE(event.frame)
    self.count += 1
    self.queued_size += size
    self.connection.outbox_size += size
    self.connection.context.queued += 1
    return 0


cdef int count_not_queued(Subscription self, Event event) except -1:
    cdef size_t size = PyBytes_GET_SIZE(event.frame)
    self.count -= 1
    self.queued_size -= size
    self.connection.outbox_size -= size
    self.connection.context.queued -= 1
    if self.newest is not None:
        del self.newest[event.mark]
    return 0


cdef void trim(Subscription self) noexcept:
    """Take lost entries from both ends of the queue: what they count moves to the next event, or behind the last."""
    cdef Queued* entry
    while self.span:
        entry = at(self, 0)
        if entry.event != NULL:
            break
        add_missed(&at(self, 1).missed if self.span > 1 else &self.missed, &entry.missed)
        self.first = (self.first + 1) & (self.room - 1)
        self.span -= 1
        self.base += 1
    while self.span:
        entry = at(self, self.span - 1)
        if entry.event != NULL:
            break
        add_missed(&self.missed, &entry.missed)
        self.span -= 1
    if self.span == 0 and self.room > KEPT_ROOM:
        free(self.ring)
        self.ring = NULL
        self.first = self.room = 0


cdef int lose(Subscription self, uint32_t index, int reason) except -1:
    """Turn a queued event into a part of the gap that stands at its place."""
    cdef Queued* entry = at(self, index)
    cdef PyObject* event = entry.event
    entry.event = NULL
    entry.missed.by[reason] += 1
    count_lost(self, reason)
    count_not_queued(self, <Event> event)
    trim(self)
    Py_DECREF(<Event> event)
    return 0


cdef int drop_oldest_queued(Subscription self, int reason) except -1:
    """Turn the oldest queued event into a gap before the next one."""
    return lose(self, 0, reason)


cdef int drop_newest_queued(Subscription self) except -1:
    """Turn the newest queued event into a gap behind the one before it."""
    return lose(self, self.span - 1, OVERFLOWN)


cdef void count_lost(Subscription self, int reason) noexcept:
    self.dropped += 1
    self.lost[reason] += 1
    self.connection.context.lost[self.overflow_policy][reason] += 1


cdef inline bint is_full(Subscription self, size_t size) except -1:
    """Whether one more event of `size` bytes would break a bound: the subscription's, or its connection's.

    An event that alone is larger than the connection's bound may be set apart for this turn, as it may be in a batch.
    """
    cdef size_t waiting = self.connection.outbox_size
    if self.count >= self.max_queue:
        return True
    return waiting + size > self.connection.context.max_outbox and (waiting != 0 or not is_free(self))


cdef inline bint never_fits(Subscription self, size_t size) noexcept:
    """Whether there would be no room for `size` bytes though all that waits for this subscription went: the queues of
    the others fill the connection's bound."""
    return self.connection.outbox_size - self.queued_size + size > self.connection.context.max_outbox


cdef bint is_free(Subscription self) except -1:
    """Whether what waits was only set apart for this turn: the socket may take all of it."""
    return (not self.connection.blocked and not self.connection.writing and self.credit != 0
            and (self.after is None or not waits_for_credit(self)))


cdef int lose_newest(Subscription self) except -1:
    """Turn the event that is being offered into a gap behind the last one."""
    self.missed.by[OVERFLOWN] += 1
    count_lost(self, OVERFLOWN)
    enter_busy(self)
    return LOST


cdef int offer(Subscription self, Event event, Connection origin) except -1:
    """Queue an event for a subscription that is behind, or do at the bound what its policy says.

    `origin` is the connection that published it; None where it cannot be made to wait any more.
    Returns flags: WAITS if the event waits for the socket, LOST if this or an older event was lost.
    """
    cdef:
        Connection connection = self.connection
        size_t size = PyBytes_GET_SIZE(event.frame)
        int fate = 0
    if connection.close_pending:
        count_lost(self, OVERFLOWN)
        return LOST
    if self.overflow_policy == LATEST:
        fate = conflate(self, event)
        if fate & WAITS:
            return lose_newest(self)
    elif self.overflow_policy == REPLAY and lags(self, event):
        return WAITS
    if is_full(self, size):
        if is_free(self):
            connection.write(False)
        if self.count and connection.context.max_age is not None:
            drop_aged(self)
        if connection.close_pending:
            count_lost(self, OVERFLOWN)
            return LOST
        while is_full(self, size):
            if self.overflow_policy == BLOCK:
                hold_publisher(self, origin)
                break
            if self.overflow_policy == REPLAY:
                self.lag += 1
                connection.unsettled = True
                return WAITS
            fate = LOST
            if self.overflow_policy == CLOSE_SLOW:
                count_lost(self, OVERFLOWN)
                connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
                return LOST
            if self.overflow_policy == DROP_NEWEST or self.count == 0 or (
                    self.overflow_policy == LATEST and never_fits(self, size)):
                return lose_newest(self)
            drop_oldest_queued(self, OVERFLOWN)
    push(self, event)
    if connection.blocked or self.credit == 0 or (self.after is not None and waits_for_credit(self)):
        if not connection.listed:
            connection.fall_behind()
        if connection.aside and fate & LOST:
            connection.mark_dirty()  # somebody may have waited for what was lost
        return fate | WAITS
    if not connection.dirty:
        connection.mark_dirty()
    return fate
