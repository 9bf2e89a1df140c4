# The order barrier: a new subscription waits for events that are queued under patterns of the same client that
# overlap with it. Without it, new events would overtake older ones of the same topic.
#
# Invariant: a barrier is lifted as soon as none of what it waits for is queued any more, whatever became of it: sent,
# dropped, or forgotten with its subscription. If a write is under way, the barrier is lifted at its end.

cdef enum:
    # Barriers of one connection. They take 72 bytes each, and a client could raise one for each pair of subscriptions.
    MAX_BARRIERS = 16384


cdef struct Barrier:
    # One subscription waits for another one.
    Link of_blocker  # in `Barriers.waiters`; its owner is the subscription that waits
    Link of_waiter  # in `Barriers.waits_for`; its owner is the earlier subscription
    uint64_t until  # it waits for events up to this number


cdef inline Barriers* barriers_of(SubscriptionBase self) except NULL:
    if self.barriers == NULL:
        self.barriers = <Barriers*> calloc(1, sizeof(Barriers))
        if self.barriers == NULL:
            raise MemoryError
    return self.barriers


cdef int raise_barriers(SubscriptionBase self) except -1:
    """Let a new subscription wait for the events that are queued under overlapping ones of its connection."""
    cdef Link* link = self.outbox.subscriptions.first
    cdef SubscriptionBase other
    while link != NULL:
        other = <SubscriptionBase> link.owner
        link = link.next
        if other.queue.count and has_wildcard(other.filter.name) and overlap(other.filter.name, self.filter.name):
            raise_barrier(self, other)
    return 0


cdef int raise_barrier(SubscriptionBase self, SubscriptionBase blocker) except -1:
    cdef Barriers* waiter
    cdef Barriers* earlier
    cdef Barrier* barrier
    if self.outbox.barriers == MAX_BARRIERS:
        raise OverflowError("too many subscriptions of this connection wait for events that are queued under others")
    waiter = barriers_of(self)
    earlier = barriers_of(blocker)
    barrier = <Barrier*> calloc(1, sizeof(Barrier))
    if barrier == NULL:
        raise MemoryError
    self.outbox.barriers += 1
    barrier.until = context_of(self.outbox).published
    barrier.of_blocker.owner = <PyObject*> self
    barrier.of_waiter.owner = <PyObject*> blocker
    append(&earlier.waiters, &barrier.of_blocker)
    append(&waiter.waits_for, &barrier.of_waiter)
    return 0


cdef void free_barrier(SubscriptionBase blocker, SubscriptionBase waiter, Barrier* barrier) noexcept:
    remove(&blocker.barriers.waiters, &barrier.of_blocker)
    remove(&waiter.barriers.waits_for, &barrier.of_waiter)
    waiter.outbox.barriers -= 1
    free(barrier)


cdef int lift_barrier(SubscriptionBase blocker, Barrier* barrier) except -1:
    """Let a subscription wait for this one no more."""
    cdef SubscriptionBase waiter = <SubscriptionBase> barrier.of_blocker.owner
    free_barrier(blocker, waiter, barrier)
    if not has_barrier(waiter):
        refresh_state(waiter)
        make_candidate(waiter)
    return 0


cdef int lift_barriers(Outbox* outbox) except -1:
    """Lift what can be lifted. To be called when nothing is being written: what is may still be put back."""
    cdef SubscriptionBase blocker
    cdef Barriers* barriers
    cdef Barrier* barrier
    while outbox.changed != NULL:
        blocker = <SubscriptionBase> outbox.changed
        barriers = blocker.barriers
        outbox.changed = barriers.next_changed
        barriers.changed = False
        # They stand in the order in which they were raised, so of their `until`.
        while barriers.waiters.first != NULL:
            barrier = <Barrier*> barriers.waiters.first
            if blocker.queue.count and first_event(&blocker.queue).number <= barrier.until:
                break
            lift_barrier(blocker, barrier)
    return 0


cdef object forget_barriers(SubscriptionBase self):
    """Lift all barriers on both sides: the subscription ends. Returns the exception that was raised meanwhile, or None.

    All of them are lifted, even if that raises: they point to the subscription.
    """
    cdef Barriers* barriers = self.barriers
    cdef Link* link
    cdef object fault = None
    if barriers == NULL:
        return None
    forget_changed(self)
    while barriers.waiters.first != NULL:
        try:
            lift_barrier(self, <Barrier*> barriers.waiters.first)
        except BaseException as error:
            fault = error
    while barriers.waits_for.first != NULL:
        link = barriers.waits_for.first
        free_barrier(<SubscriptionBase> link.owner, self, <Barrier*> (link - 1))  # `of_blocker` is right before it
    free(barriers)
    self.barriers = NULL
    return fault


cdef void forget_changed(SubscriptionBase self) noexcept:
    """Take the subscription out of `Outbox.changed`."""
    cdef PyObject** place = &self.outbox.changed
    if not self.barriers.changed:
        return
    while place[0] != <PyObject*> self:
        place = &(<SubscriptionBase> place[0]).barriers.next_changed
    place[0] = self.barriers.next_changed
    self.barriers.changed = False
