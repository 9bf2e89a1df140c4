# What is particular to some subscriptions: credit, the policies `latest`, `block` and `replay`, events that grow old.
#
# The law of this file: who asks for none of it pays nothing for it. A subscription that is to be looked at for each
# event is kept behind for good, so that the walk over an audience passes it by.

cdef extern from "<time.h>" nogil:
    """
    #define MAX_CREDIT 9007199254740991LL  /* 2^53-1, the largest integer of the protocol */
    """
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* time)
    enum:
        CLOCK_MONOTONIC
        CLOCK_MONOTONIC_COARSE
    const int64_t MAX_CREDIT

cdef enum:
    # Under `block`, so many events for which nobody can be made to wait (their publisher is gone, or on another node)
    # may wait beyond the bound before the subscriber is parted with.
    MAX_STRAYS = 64


cdef uint64_t now_ms() noexcept:
    """Milliseconds of a clock that costs no system call; it moves every few of them (clock_gettime(2))."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time)
    return <uint64_t> time.tv_sec * 1000 + time.tv_nsec // 1000000


cdef double exact_time() noexcept:
    """Seconds of a clock that moves all the time, and costs some tens of nanoseconds."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return time.tv_sec + time.tv_nsec * 1e-9


cdef inline bint is_single(Subscription self) noexcept:
    """Whether this subscription is offered each event, and never gets a batch."""
    return self.credit != UNLIMITED or self.overflow_policy == BLOCK


cdef inline bint has_something(Subscription self) noexcept:
    return self.count != 0 or is_any(&self.missed)


cdef int flush_audiences(Subscription self) except -1:
    """Send the batches under way of all audiences in which this subscription is a member."""
    cdef Member* member = self.members
    while member != NULL:
        (<Audience> member.audience).flush()
        member = member.next
    return 0


# Age


cdef int drop_aged(Subscription self) except -1:
    """Turn the events at the head of the queue that are too old into a gap."""
    cdef Event event
    cdef uint64_t now = 0
    while self.count:
        event = <Event> at(self, 0).event
        if event.expires == 0:
            break
        if now == 0:
            now = now_ms()
        if event.expires > now:
            break
        drop_oldest_queued(self, AGED)
        self.connection.mark_dirty()  # others may have waited for it
    return 0


# Credit


cdef int set_credit(Subscription self, int64_t credit) except -1:
    cdef bint had_none = self.credit == 0
    self.credit = credit
    if credit == 0:
        leave_busy(self)
    elif had_none:
        if has_something(self):
            enter_busy(self)
        self.connection.mark_dirty()
    return 0


cdef bint is_pattern(str topic) except -1:
    return "*" in topic or ">" in topic


cdef bint may_overlap(str one, str other) except -1:
    """Whether there is a topic that both patterns match. Of those with `$` it may say so though there is none."""
    cdef list left = one.split(".")
    cdef list right = other.split(".")
    cdef Py_ssize_t place
    for place in range(min(len(left), len(right))):
        if left[place] == ">" or right[place] == ">":
            return True
        if left[place] != right[place] and left[place] != "*" and right[place] != "*":
            return False
    return len(left) == len(right)


# latest


cdef object mark_of(Event event):
    """What tells whether one event stands for the same thing as another one: its topic, and its key if it has one."""
    if event.mark is None:
        event.mark = event.topic if event.key is None else (event.topic, event.key)
    return event.mark


cdef int64_t place_of(Subscription self, object mark) except -2:
    """Where in the queue the event with this mark is; -1 if none is."""
    cdef object place = self.newest.get(mark)
    if place is None:
        return -1
    return <int64_t> (<uint64_t> place - self.base)


cdef int conflate(Subscription self, Event event) except -1:
    """Give up the queued event that a newer one replaces. Returns LOST if there was one, else 0; and WAITS if the older
    one goes on waiting, because the newer one would not fit."""
    cdef int64_t place
    if self.newest is None:
        conflate_queue(self)
    place = place_of(self, mark_of(event))
    if place >= 0 and is_free(self):
        self.connection.write(False)  # who keeps up is to see every event
        place = place_of(self, event.mark)
    if place < 0:
        return 0
    if never_fits(self, PyBytes_GET_SIZE(event.frame)):
        return WAITS
    lose(self, <uint32_t> place, CONFLATED)
    return LOST


cdef int conflate_queue(Subscription self) except -1:
    """Keep only the newest event of each mark, each at its place."""
    cdef uint32_t place = self.span
    cdef PyObject* event
    cdef set seen = set()
    self.newest = None
    while place:
        place -= 1
        if place >= self.span:
            continue
        event = at(self, place).event
        if event == NULL:
            continue
        mark = mark_of(<Event> event)
        if mark in seen:
            lose(self, place, CONFLATED)
        else:
            seen.add(mark)
    self.newest = {}
    find_places(self)
    return 0


cdef int find_places(Subscription self) except -1:
    cdef uint32_t place
    cdef PyObject* event
    for place in range(self.span):
        event = at(self, place).event
        if event != NULL:
            self.newest[mark_of(<Event> event)] = self.base + place
    return 0


cdef int close_holes(Subscription self) except -1:
    """Move the events of the queue together; what was lost between them is counted before the next one."""
    cdef uint32_t place, kept = 0
    cdef Queued entry
    cdef Missed missed
    memset(&missed, 0, sizeof(Missed))
    for place in range(self.span):
        entry = at(self, place)[0]
        add_missed(&missed, &entry.missed)
        if entry.event != NULL:
            entry.missed = missed
            at(self, kept)[0] = entry
            kept += 1
            memset(&missed, 0, sizeof(Missed))
    self.span = kept
    if self.newest is not None:
        find_places(self)
    return 0


# block


@cython.final
cdef class Hold:
    """An event beyond the bound of one queue, and the publisher that waits until it has found room."""

    cdef:
        Subscription subscription
        Connection publisher  # None: nobody waits for it, or nobody any more
        double due  # in the context's clock: when it has waited long enough


cdef inline uint32_t beyond_bound(Subscription self) noexcept:
    """How many events wait beyond the bound."""
    return self.count - self.max_queue if self.count > self.max_queue else 0


cdef int hold_publisher(Subscription self, Connection origin) except -1:
    """Stop reading from a publisher whose event, which comes next, does not fit into the queue."""
    cdef LoopContext context = self.connection.context
    cdef Hold hold
    if self.holds is None:
        self.holds = []
        context.holding[self] = None
        self.connection.holding += 1
    hold = Hold.__new__(Hold)
    hold.subscription = self
    self.holds.append(hold)
    if origin is None or origin.state != OPEN:
        return add_stray(self)
    hold.publisher = origin
    # The clock moves once in a tick.
    hold.due = context.clock + context.tick + context.block_timeout
    if origin.waits_at is None:
        origin.waits_at = {}
    origin.waits_at[hold] = None
    origin.parked_publishes += 1
    origin.stop_reading(FOR_ROOM)
    context.schedule()
    return 0


cdef int add_stray(Subscription self) except -1:
    cdef uint32_t beyond = beyond_bound(self) + 1  # the next event is beyond it as well
    self.strays += 1
    while (<uint32_t> len(self.holds) > beyond and (<Hold> self.holds[0]).publisher is None
            and self.connection.outbox_size <= self.connection.context.max_outbox):
        self.holds.pop(0)  # it has found room since
        self.strays -= 1
    if self.strays > MAX_STRAYS:
        self.connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
    return 0


cdef int let_publishers_go(Subscription self) except -1:
    """Let those publishers go on whose events have found room: as many as there are, but for those still beyond it."""
    cdef Connection connection = self.connection
    cdef Hold hold
    while self.holds:
        if self.overflow_policy == BLOCK:
            if self.count > self.max_queue:
                if <uint32_t> len(self.holds) <= beyond_bound(self):
                    return 0
            elif self.count and connection.outbox_size > connection.context.max_outbox:
                return 0
        hold = self.holds.pop(0)
        if hold.publisher is None:
            self.strays -= 1
        else:
            hold.publisher.find_room(hold)
    end_holds(self)
    return 0


cdef int let_all_publishers_go(Subscription self) except -1:
    cdef Hold hold
    holds = self.holds
    end_holds(self)
    for hold in holds:
        if hold.publisher is not None:
            hold.publisher.find_room(hold)
    return 0


cdef int end_holds(Subscription self) except -1:
    self.holds = None
    self.strays = 0
    self.connection.holding -= 1
    del self.connection.context.holding[self]
    return 0


cdef Hold longest_hold(Subscription self):
    """The publisher that has waited for longest; None if none waits."""
    cdef Hold hold
    for hold in self.holds:
        if hold.publisher is not None:
            return hold
    return None


cdef int forget_publisher(Connection publisher) except -1:
    """Wait for room no more: the publisher is gone. Its events stay."""
    cdef Hold hold
    holds = publisher.waits_at
    publisher.waits_at = publisher.held = None
    publisher.parked_publishes = 0
    for hold in holds:
        hold.publisher = None
        add_stray(hold.subscription)
    return 0


# replay


cdef bint lags(Subscription self, Event event) except -1:
    """Whether an event is left to history: the client cannot take it now, or lacks older ones."""
    if self.lag or not is_free(self):
        self.lag += 1
        self.connection.unsettled = True
        if not self.connection.listed:
            self.connection.fall_behind()
        return True
    return False


cdef int feed_replay(Subscription self, str topic, bytes payload) except -1:
    cdef Event event
    if self.lag == 0 or self.connection is None:
        raise ValueError("the subscription does not lag behind")
    event = Event.__new__(Event)
    event.frame = frame(OP_TEXT, payload)
    event.topic = topic
    event.born = now_ms()
    self.lag -= 1
    self.asked = False
    push(self, event)
    self.connection.mark_dirty()
    return (self.lag != 0 and is_free(self) and not is_full(self, PyBytes_GET_SIZE(event.frame))
            and (self.credit == UNLIMITED or self.count < self.credit))


cdef int skip_replay(Subscription self, uint64_t count) except -1:
    if count > self.lag or self.connection is None:
        raise ValueError("the subscription does not lag behind by so many")
    self.lag -= count
    self.asked = False
    self.connection.mark_dirty()
    return 0


cdef int ask_to_catch_up(Subscription self) except -1:
    """There is room: have the node feed what this client lags behind, once.

    Not while something is queued, which may wait for what has to go out before it: a gap that the node announces would
    overtake it.
    """
    cdef LoopContext context = self.connection.context
    if not self.asked and self.credit != 0 and not has_something(self) and context.catch_up is not None:
        self.asked = True
        context.catch_up(self)
    return 0


cdef int lose_lag(Subscription self) except -1:
    """The policy is `replay` no more: what was left to history is lost."""
    cdef uint64_t lag = self.lag
    self.lag = 0
    self.asked = False
    if lag:
        self.missed.by[OVERFLOWN] += lag
        self.dropped += lag
        self.lost[OVERFLOWN] += lag
        self.connection.context.lost[REPLAY][OVERFLOWN] += lag
        enter_busy(self)
    return 0
