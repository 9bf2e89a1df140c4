# The policy `latest`: of what waits, only the newest event of each topic and key is kept (conflation).
#
# Invariant: while events wait under `latest`, `Queue.newest` has the place of each by its conflation key.


cdef int conflate_queue(SubscriptionBase self) except -1:
    """Keep only the newest event of each conflation key, each at its place."""
    cdef Queue* queue = &self.queue
    cdef uint32_t place = queue.span
    cdef PyObject* event
    cdef dict newest = {}
    cdef object here
    forget_newest(self)
    # From the newest on. Only the drop of the first entry, which comes last, moves the others.
    while place:
        place -= 1
        event = at(queue, place).event
        if event == NULL:
            continue
        here = queue.base + place
        if newest.setdefault(conflation_key(<Event> event), here) is not here:
            drop_queued(self, place, REASON_CONFLATED)
    Py_INCREF(newest)
    queue.newest = <PyObject*> newest
    return 0


cdef void forget_newest(SubscriptionBase self) noexcept:
    """Keep no places any more: the policy is another one, or they are made anew."""
    cdef PyObject* newest = self.queue.newest
    self.queue.newest = NULL
    Py_XDECREF(newest)


cdef int64_t find_older_index(SubscriptionBase self, Event event) except -2:
    """The place of the queued event that a newer one replaces; -1 if there is none."""
    if self.queue.newest == NULL:
        conflate_queue(self)
    place = (<dict> self.queue.newest).get(conflation_key(event))
    if place is None:
        return -1
    return <int64_t> (<uint64_t> place - self.queue.base)
