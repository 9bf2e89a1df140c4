# The policy `block`: an event beyond the bound is queued, and its publisher is parked until it has found room.
#
# Invariant: a publisher goes on once each event that it is parked for has found room, or has gone with its
# subscription. Here are the lists; delivery.pxi stops the reading, `Connection.go_on` starts it again.

cdef enum:
    # So many events for which no publisher can be parked (it has gone, or is on another node) may wait beyond the bound
    # before the subscriber is closed.
    MAX_STRAYS = 64


@cython.final
cdef class ParkedPublisher:
    """A connection that is not read until some events of its have found room."""

    cdef:
        object connection  # None once it has gone
        dict parks  # keys: a `Park` for each of the events
        list answers  # to its publishes, kept until then


@cython.final
cdef class Park:
    """One event beyond the bound of one queue, and the publisher that is parked for it."""

    cdef:
        SubscriptionBase subscription
        ParkedPublisher publisher  # None: nobody is parked for it, or nobody any more
        double due  # in the clock of the sweep: when it has waited long enough


cdef inline uint32_t count_beyond_bound(SubscriptionBase self) noexcept:
    """How many events are queued beyond the bound."""
    return self.queue.count - self.max_queue if self.queue.count > self.max_queue else 0


cdef int park(SubscriptionBase self, ParkedPublisher publisher) except -1:
    """Park a publisher for the event that was just queued beyond the bound. None: there is no one to park."""
    cdef LoopState context = context_of(self.outbox)
    cdef Park entry = Park.__new__(Park)
    if self.parks is None:
        self.parks = []
        context.parked[self] = None
    entry.subscription = self
    self.parks.append(entry)
    if publisher is None:
        return add_stray(self, max(<uint32_t> 1, count_beyond_bound(self)))
    entry.publisher = publisher
    entry.due = context.clock + context.tick + context.limits.block_timeout  # the clock moves once in a tick
    publisher.parks[entry] = None
    return context.schedule()


cdef int add_stray(SubscriptionBase self, uint32_t beyond) except -1:
    """Count an event for which no one is parked; `beyond` events are queued beyond the bound."""
    self.strays += 1
    while (<uint32_t> len(self.parks) > beyond and (<Park> self.parks[0]).publisher is None
            and not has_too_many_bytes(self, 0)):
        self.parks.pop(0)  # it has found room since
        self.strays -= 1
    if self.strays > MAX_STRAYS:
        ask_close(self.outbox, CLOSE_SLOW_CONSUMER)
    return 0


cdef int release_parked(SubscriptionBase self) except -1:
    """Let those publishers go on whose events have found room: all but as many as are still beyond the bound."""
    cdef Park entry
    while self.parks:
        if self.policy == BLOCK:
            if self.queue.count > self.max_queue:
                if <uint32_t> len(self.parks) <= count_beyond_bound(self):
                    return 0
            elif self.queue.count and has_too_many_bytes(self, 0):
                return 0
        entry = self.parks.pop(0)
        if entry.publisher is None:
            self.strays -= 1
        else:
            release_publisher(context_of(self.outbox), entry)
    return end_parking(self)


cdef int release_all_parked(SubscriptionBase self) except -1:
    """Let all publishers go on: the subscription ends. All of them do, even if this raises."""
    cdef Park entry
    cdef object fault = None
    for entry in self.parks:
        if entry.publisher is not None:
            try:
                release_publisher(context_of(self.outbox), entry)
            except BaseException as error:
                fault = error
    end_parking(self)
    if fault is not None:
        raise fault
    return 0


cdef int end_parking(SubscriptionBase self) except -1:
    self.parks = None
    self.strays = 0
    del context_of(self.outbox).parked[self]
    return 0


cdef int release_publisher(LoopState context, Park entry) except -1:
    """One of the events of this publisher has found room. After the last one it goes on, at the end of the turn."""
    cdef ParkedPublisher publisher = entry.publisher
    del publisher.parks[entry]
    if not publisher.parks:
        context.resuming.append(publisher)
        context.schedule()
    return 0


cdef int forget_publisher(ParkedPublisher publisher) except -1:
    """Park it no more: it has gone. Its events stay."""
    cdef Park entry
    publisher.connection = None
    parks = publisher.parks
    publisher.parks = {}
    for entry in parks:
        entry.publisher = None
        add_stray(entry.subscription, count_beyond_bound(entry.subscription) + 1)
    return 0


cdef Park longest_parked(SubscriptionBase self):
    """The publisher that has been parked for longest; None if none is."""
    cdef Park entry
    for entry in self.parks:
        if entry.publisher is not None:
            return entry
    return None
