# The policy `replay`: what the client cannot take now is counted, and fed from the topic's history once there is room.
#
# Invariant: `lag` counts the newest events of the subscription, which are neither sent nor queued; while it is not 0,
# each further event adds to it.


cdef int count_lag(SubscriptionBase self) except -1:
    """Leave an event to history."""
    self.lag += 1
    refresh_state(self)
    update_sendable(self)
    make_candidate(self)
    return note_lagging(self.outbox)


cdef int unqueue_newest(SubscriptionBase self) except -1:
    """Leave the newest queued event to history, from which it comes again."""
    cdef Queued* entry = at(&self.queue, self.queue.span - 1)
    cdef PyObject* event = entry.event
    cdef size_t before = self.queue.bytes
    take_out(&self.queue, entry)
    Py_DECREF(<Event> event)
    count_dequeued(self, before - self.queue.bytes)
    return count_lag(self)


cdef int take_lag(SubscriptionBase self, uint64_t count) except -1:
    """The oldest `count` events that it lags behind are fed, or not to be had any more."""
    self.lag -= count
    self.asked = False
    refresh_state(self)
    update_sendable(self)
    make_candidate(self)
    return mark_dirty(self.outbox)


cdef int ask_to_catch_up(SubscriptionBase self) except -1:
    """There is room: have the node feed what this client lags behind, once.

    Not while something is queued, which may wait for what has to go out before it: a gap that the node announces would
    overtake it.
    """
    cdef LoopState context = context_of(self.outbox)
    if not self.asked and self.credit != 0 and is_empty(&self.queue) and context.catch_up is not None:
        self.asked = True
        context.catch_up(self)
    return 0


cdef int drop_lag(SubscriptionBase self) except -1:
    """The policy is `replay` no more: what was left to history is lost. `policy` is still the old one."""
    cdef uint64_t lag = self.lag
    self.lag = 0
    self.asked = False
    if lag:
        self.queue.missed.by[REASON_OVERFLOW] += lag
        count_dropped(self, REASON_OVERFLOW, lag)
    refresh_state(self)
    return update_sendable(self)
