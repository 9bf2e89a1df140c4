# Events into and out of the queue of a subscription, with the sums of its outbox.
#
# Invariant: the sums of an outbox are those of its subscriptions' queues; a barrier is lifted when the last event that
# it waited for leaves its queue, or, while a write is under way, when that has been settled.


cdef inline int queue_event(SubscriptionBase self, Event event) except -1:
    """Queue an event as the newest."""
    cdef Outbox* outbox = self.outbox
    cdef size_t size = PyBytes_GET_SIZE(event.frame)
    push(&self.queue, event)
    outbox.bytes += size
    if is_held(self):
        outbox.held_bytes += size
    (<LoopState> outbox.context).queued += 1
    if not self.waits or (not is_held(self) and not is_linked(&outbox.sendable, &self.in_sendable)):
        update_sendable(self)
    return 0


cdef int dequeue_event(SubscriptionBase self, Queued* entry) except -1:
    """Take the oldest event with the gap before it, or the gap behind the last one. The caller owns the reference."""
    cdef size_t before = self.queue.bytes
    cdef bint is_event = self.queue.count != 0
    pop(&self.queue, entry)
    if is_event:
        count_dequeued(self, before - self.queue.bytes)
    return 0


cdef int requeue(SubscriptionBase self, PyObject* event, const Missed* missed) except -1:
    """Put back what `dequeue_event` gave and the socket did not take. Takes over the reference."""
    cdef Outbox* outbox = self.outbox
    cdef LoopState context = context_of(outbox)
    cdef size_t size
    put_back(&self.queue, event, missed)
    if event != NULL:
        size = PyBytes_GET_SIZE((<Event> event).frame)
        outbox.bytes += size
        context.queued += 1
        if is_held(self):
            outbox.held_bytes += size
        if self.credit != UNLIMITED:
            self.credit += 1
            refresh_state(self)
    return update_sendable(self)


cdef int forget_queue(SubscriptionBase self) except -1:
    """Forget what is queued, gaps too: it comes again, from history."""
    cdef Queued entry
    while not is_empty(&self.queue):
        dequeue_event(self, &entry)
        Py_XDECREF(entry.event)
    return update_sendable(self)


cdef inline int count_dequeued(SubscriptionBase self, size_t size) except -1:
    """Take an event of this size out of the sums; subscriptions behind a barrier may have waited for it."""
    cdef Outbox* outbox = self.outbox
    cdef Barriers* barriers = self.barriers
    outbox.bytes -= size
    if is_held(self):
        outbox.held_bytes -= size
    (<LoopState> outbox.context).queued -= 1
    if barriers != NULL and barriers.waiters.first != NULL and not barriers.changed:
        barriers.changed = True
        barriers.next_changed = outbox.changed
        outbox.changed = <PyObject*> self
        if not outbox.writing:
            lift_barriers(outbox)
    return 0


cdef inline int drop_queued(SubscriptionBase self, uint32_t index, int reason) except -1:
    """Turn a queued event into a part of the gap that stands at its place."""
    cdef size_t before = self.queue.bytes
    drop_at(&self.queue, index, reason)
    count_dropped(self, reason, 1)
    # There was something to send, and still is: the gap.
    return count_dequeued(self, before - self.queue.bytes)


cdef int drop_offered(SubscriptionBase self, Event event) except -1:
    """Turn the event that is being offered into a gap behind the last one."""
    count_missed(&self.queue.missed, event, REASON_OVERFLOW)
    count_dropped(self, REASON_OVERFLOW, 1)
    return 0 if self.waits and not self.replaying else update_sendable(self)


cdef inline void count_dropped(SubscriptionBase self, int reason, uint64_t count) noexcept:
    self.dropped += count
    self.dropped_by[reason] += count
    (<LoopState> self.outbox.context).dropped[self.policy][reason] += count


cdef int drop_aged(SubscriptionBase self) except -1:
    """Turn the events at the head of the queue that are too old into a gap."""
    cdef uint64_t now = 0, expires
    while self.queue.count:
        expires = first_event(&self.queue).expires
        if expires == 0:
            break
        if now == 0:
            now = now_ms()
        if expires > now:
            break
        drop_queued(self, 0, REASON_AGE)
    return 0
