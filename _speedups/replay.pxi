# Subscriptions that are fed from history: what the client cannot take now is left to it (the policy `replay`), or the
# client goes on where it stopped (recovery).
#
# Invariant: while a subscription is replaying, no event is offered to its queue. All events up to `cursor` were sent or
# queued, or are counted in a gap; those behind it come from history. `policy` is then REPLAY, whatever was agreed.


cdef int count_lag(SubscriptionBase self, Event event) except -1:
    """Leave an event to history. Returns whether the client lacks it."""
    if not self.replaying:
        self.replaying = True
        self.cursor = event.offset - 1
    if event.offset == 0:
        self.newest += 1  # the topic keeps no history any more: what is missing will be announced
    else:
        if event.offset <= self.newest:
            self.cursor = 0  # the numbering has begun anew
        self.newest = event.offset
    if self.newest == self.cursor and not self.recovering and not self.asked:
        stop_replaying(self)  # the last one that was fed before it came
        return False
    refresh_state(self)
    update_sendable(self)
    if count_lacking(self) == 0:
        return False  # it was fed before it came
    make_candidate(self)
    note_lagging(self.outbox)
    return True


cdef int unqueue_newest(SubscriptionBase self) except -1:
    """Leave the newest queued event, which is one of a history, to it; it comes again from there."""
    cdef Queued* entry = at(&self.queue, self.queue.span - 1)
    cdef PyObject* event = entry.event
    cdef size_t before = self.queue.bytes
    take_out(&self.queue, entry)
    if not self.replaying:
        self.replaying = True
        self.newest = (<Event> event).offset
    self.cursor = (<Event> event).offset - 1
    Py_DECREF(<Event> event)
    count_dequeued(self, before - self.queue.bytes)
    refresh_state(self)
    update_sendable(self)
    make_candidate(self)
    return note_lagging(self.outbox)


cdef int ask_to_catch_up(SubscriptionBase self) except -1:
    """There is room: have the node feed what this client lacks, once.

    Not while something is queued: a gap that the node announces, which goes ahead of events, would overtake it.
    """
    cdef LoopState context = context_of(self.outbox)
    if not self.asked and is_empty(&self.queue) and context.catch_up is not None:
        self.asked = True
        context.catch_up(self)
    return 0


cdef int go_on_replaying(SubscriptionBase self) except -1:
    """Something has changed: let the state and the lists follow."""
    self.asked = False
    refresh_state(self)
    update_sendable(self)
    make_candidate(self)
    return mark_dirty(self.outbox)


cdef int stop_replaying(SubscriptionBase self) except -1:
    """Offer events to the queue from now on, under the policy that was agreed."""
    self.replaying = self.recovering = False
    self.policy = self.agreed
    return go_on_replaying(self)


cdef int drop_lag(SubscriptionBase self) except -1:
    """The policy is `replay` no more: what was left to history is lost. `policy` is still the old one."""
    cdef uint64_t lacking = count_lacking(self)
    if lacking:
        self.queue.missed.by[REASON_OVERFLOW] += lacking
        if self.cursor < self.newest:
            widen(&self.queue.missed, self.cursor + 1, self.newest)
        count_dropped(self, REASON_OVERFLOW, lacking)
    if self.replaying:
        stop_replaying(self)
    return 0
