# What happens to an event that is offered to a subscription which is not live: it is queued, or its policy decides.
#
# Invariant: `offer` works on queues and counts alone, and returns a verdict; whoever offers carries it out.

cdef enum:
    # The verdict of `offer`, as flags.
    WAITS = 1  # the event waits for the client
    DROPPED = 2  # this or an older event was dropped
    PARK = 4  # the event is queued beyond the bound: park its publisher
    CLOSE = 8  # close the connection
    WRITE = 16  # nothing was done: write what waits first, since the socket may take it, and then offer again
    NOT_QUEUED = 32  # of `decide_at_bound`: the event is not to be queued


cdef inline int offer(SubscriptionBase self, Event event, bint can_write) except -1:
    """Queue an event, or do at the bound what the policy says. Returns the verdict.

    `can_write` says that whoever offers can write, so that the verdict may be WRITE.
    """
    cdef Outbox* outbox = self.outbox
    cdef size_t size = PyBytes_GET_SIZE(event.frame)
    cdef int64_t place
    cdef int verdict = 0
    if outbox.state > FINISHING:  # nothing is sent any more
        count_dropped(self, OVERFLOWN, 1)
        return DROPPED
    if self.policy == LATEST:
        place = find_older(self, event)
        if place >= 0:
            if can_write and is_free(self):
                return WRITE  # a client that keeps up is to see every event
            if never_fits(self, size):
                drop_offered(self)
                return DROPPED
            drop_queued(self, <uint32_t> place, CONFLATED)
            verdict = DROPPED
    elif self.policy == REPLAY and (self.lag or not is_free(self)):
        count_lag(self)
        return WAITS
    if is_full(self, size):
        # A write may also lift the barrier.
        if can_write and not outbox.blocked and not outbox.writing and self.state_number != NO_CREDIT:
            return WRITE
        verdict |= decide_at_bound(self, size)
        if verdict & NOT_QUEUED:
            return verdict & ~NOT_QUEUED
    queue_event(self, event)
    if outbox.blocked or is_held(self):
        if not outbox.listed:
            note_lagging(outbox)
        return verdict | WAITS
    mark_dirty(outbox)
    return verdict


cdef inline int decide_at_bound(SubscriptionBase self, size_t size) except -1:
    """Make room for an event of `size` bytes as the policy says. Returns flags of the verdict."""
    if self.queue.count and (<LoopState> self.outbox.shared).max_age is not None:
        drop_aged(self)
        if not is_full(self, size):
            return 0
    while True:
        if self.policy == BLOCK:
            return PARK
        if self.policy == REPLAY:
            count_lag(self)
            return NOT_QUEUED | WAITS
        if self.policy == CLOSE_SLOW:
            count_dropped(self, OVERFLOWN, 1)
            return NOT_QUEUED | DROPPED | CLOSE
        if self.policy == DROP_NEWEST or self.queue.count == 0 or (self.policy == LATEST and never_fits(self, size)):
            drop_offered(self)
            return NOT_QUEUED | DROPPED
        drop_queued(self, 0, OVERFLOWN)
        if not is_full(self, size):
            return DROPPED
