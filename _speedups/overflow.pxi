# What happens to an event that is offered to a subscription which is not live: it is queued, or its policy decides.
#
# Invariant: `offer` writes nothing, closes nothing and parks nobody: it returns a verdict, and the caller carries it
# out.

cdef enum:
    # The verdict of `offer`, as flags.
    VERDICT_WAITS = 1  # the event waits for the client
    VERDICT_DROPPED = 2  # this or an older event was dropped
    VERDICT_PARK = 4  # the event is queued beyond the bound: park its publisher
    VERDICT_CLOSE = 8  # close the connection
    VERDICT_WRITE = 16  # nothing was done: write what waits first, since the socket may take it, and then offer again
    VERDICT_NOT_QUEUED = 32  # of `decide_at_bound`: the event is not to be queued


cdef inline int offer(SubscriptionBase self, Event event, bint can_write) except -1:
    """Queue an event, or do at the bound what the policy says. Returns the verdict.

    `can_write`: the caller can write, so the verdict may be VERDICT_WRITE.
    """
    cdef Outbox* outbox = self.outbox
    cdef size_t size = PyBytes_GET_SIZE(event.frame)
    cdef int64_t place
    cdef int verdict = 0
    if outbox.state > FINISHING:  # nothing is sent any more
        count_dropped(self, REASON_OVERFLOW, 1)
        return VERDICT_DROPPED
    if self.policy == LATEST:
        place = find_older_index(self, event)
        if place >= 0:
            if can_write and is_free(self):
                return VERDICT_WRITE  # a client that keeps up is to see every event
            if never_fits(self, size):
                drop_offered(self, event)
                return VERDICT_DROPPED
            drop_queued(self, <uint32_t> place, REASON_CONFLATED)
            verdict = VERDICT_DROPPED
    elif self.policy == REPLAY and (self.replaying or event.offset and not is_free(self)):
        return VERDICT_WAITS if count_lag(self, event) else 0
    if is_full(self, size):
        # A write may also lift the barrier.
        if can_write and not outbox.socket_full and not outbox.writing and self.state_number != NO_CREDIT:
            return VERDICT_WRITE
        verdict |= decide_at_bound(self, event, size)
        if verdict & VERDICT_NOT_QUEUED:
            return verdict & ~VERDICT_NOT_QUEUED
    queue_event(self, event)
    if outbox.socket_full or is_held(self):
        if not outbox.listed:
            note_lagging(outbox)
        return verdict | VERDICT_WAITS
    mark_dirty(outbox)
    return verdict


cdef inline int decide_at_bound(SubscriptionBase self, Event event, size_t size) except -1:
    """Make room for an event of `size` bytes as the policy says. Returns flags of the verdict."""
    if self.queue.count and (<LoopState> self.outbox.context).max_age is not None:
        drop_aged(self)
        if not is_full(self, size):
            return 0
    while True:
        if self.policy == BLOCK:
            return VERDICT_PARK
        if self.policy == REPLAY and event.offset:
            count_lag(self, event)
            return VERDICT_NOT_QUEUED | VERDICT_WAITS
        if self.policy == CLOSE_AT_BOUND:
            count_dropped(self, REASON_OVERFLOW, 1)
            return VERDICT_NOT_QUEUED | VERDICT_DROPPED | VERDICT_CLOSE
        if self.policy == DROP_NEWEST or self.queue.count == 0 or (self.policy == LATEST and never_fits(self, size)):
            drop_offered(self, event)
            return VERDICT_NOT_QUEUED | VERDICT_DROPPED
        drop_queued(self, 0, REASON_OVERFLOW)
        if not is_full(self, size):
            return VERDICT_DROPPED
