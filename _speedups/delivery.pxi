# One event to all members of an audience: appended to the batch for those that are live, offered to the others.
#
# Invariant: verdicts of `offer` are carried out here (and in batch.pxi where the socket is full). A client whose
# socket takes data, and that has credit, loses nothing: before an event is dropped, the queues are written.


cdef int offer_event(SubscriptionBase self, Event event, Writer origin) except -1:
    """Offer an event and carry out the verdict. `origin` published it; None where no one can be parked.

    Returns the flags VERDICT_WAITS and VERDICT_DROPPED.
    """
    cdef int verdict = offer(self, event, True)
    if verdict == VERDICT_WRITE:
        write_queues(self)
        verdict = offer(self, event, False)
    if verdict & VERDICT_CLOSE:
        ask_close(self.outbox, CLOSE_SLOW_CONSUMER)
    elif verdict & VERDICT_PARK:
        park_origin(self, origin)
    return verdict & (VERDICT_WAITS | VERDICT_DROPPED)


cdef int write_queues(SubscriptionBase self) except -1:
    """Write what waits for this client, in the middle of a turn."""
    cdef Writer connection = <Writer> self.connection
    connection.context.work += SEND_WORK
    return connection.write()


cdef int park_origin(SubscriptionBase self, Writer origin) except -1:
    """Park the publisher of the event that was queued beyond the bound, and read nothing more from it."""
    cdef Connection publisher
    publisher = <Connection> origin
    if publisher is None or not publisher.takes_commands():
        return park(self, None)
    if publisher.parking is None:
        publisher.parking = ParkedPublisher.__new__(ParkedPublisher)
        publisher.parking.connection = publisher
        publisher.parking.parks = {}
        publisher.parking.answers = []
    park(self, publisher.parking)
    return publisher.stop_reading(FOR_ROOM)


cdef int stop_batching(SubscriptionBase self) except -1:
    """Let the subscription be offered each event from now on, the ones of the batches under way first."""
    cdef Link* link = self.members.first
    cdef AudienceBase audience
    cdef uint32_t i
    if self.state_number != LIVE:
        return 0
    leave_live(self)
    while link != NULL:
        audience = <AudienceBase> link.owner
        link = link.next
        if not audience.flushing:
            for i in range(audience.segment_count):
                offer_event(self, event_at(audience, i), None)
    return 0


cdef inline int prepare_members(AudienceBase self) except -1:
    """Find the members, unless they are known."""
    return 0 if self.known else renew_members(self)


cdef int renew_members(AudienceBase self) except -1:
    """Find the members; those of other audiences are forgotten where there are too many."""
    cdef uint64_t slots = count_subscriptions(self)
    if self.context.member_slots + slots > 2 * <uint64_t> self.context.subscriptions + FREE_SLOTS:
        send_batches(self.context)
        make_slots(self.context, slots)
    return find_members(self, slots)


cdef inline unsigned char* reserve_frame(AudienceBase self, size_t size) except NULL:
    """Return where to write the next frame of the batch; `commit` makes it part of it."""
    if self.segment_count and self.batch.size + size > BATCH_SIZE:
        send_full(self)
    return reserve(&self.batch, size, 0)


cdef int send_full(AudienceBase self) except -1:
    """Send a batch that has no room for more, in the middle of a turn."""
    cdef double began = exact_time()
    flush_audience(self)
    self.context.writing += exact_time() - began
    return 0


cdef int commit(AudienceBase self, size_t size, str topic, uint32_t key_start, uint32_t key_size, bytes key,
                Writer origin, Receipt* receipt) except -1:
    """Publish the frame that was written to where `reserve_frame` said. The members are known.

    The key is at `key_start` within the frame, or it is `key`.
    """
    cdef LoopState context = self.context
    cdef Member* own = NULL
    receipt.receivers = self.size
    receipt.queued = receipt.dropped = 0
    context.published += 1
    context.work += PUBLISH_WORK + <uint32_t> (size >> WORK_SHIFT)
    if self.size == 0:
        return 0
    if self.no_echo_count and origin is not None:
        own = own_member(self, <PyObject*> origin)
        if own != NULL:
            # The publisher does not want its own events: for this turn it is not live.
            receipt.receivers -= 1
            stop_batching(<SubscriptionBase> own.subscription)
    if self.live:
        add_segment(self, size, topic, key_start, key_size, key)
        context.batched += size * (self.live + 1)
    if self.live < self.size:
        offer_to_others(self, size, topic, key_start, key_size, key, own, origin, receipt)
    if context.batched > BATCHED_COST:
        send_batches(context)
    return 0


cdef int offer_to_others(AudienceBase self, size_t size, str topic, uint32_t key_start, uint32_t key_size, bytes key,
                         Member* own, Writer origin, Receipt* receipt) except -1:
    """Offer the event that was just committed to the members that are not live, but for `own`."""
    cdef Event event = None
    cdef Member* member
    cdef uint32_t i
    cdef int verdict
    self.context.work += (self.size - self.live) * OFFER_WORK
    for i in range(self.live, self.size):
        member = self.places[i]
        if member == own:
            continue
        if event is None:
            if self.live:
                event = event_at(self, self.segment_count - 1)
            else:
                event = make_event(self, self.batch.size, size, topic, self.context.published, self.context.offset,
                                   key_start, key_size, key)
        verdict = offer_event(<SubscriptionBase> member.subscription, event, origin)
        receipt.queued += verdict & VERDICT_WAITS
        receipt.dropped += (verdict & VERDICT_DROPPED) != 0
    if self.segment_count == 0:
        drop_batch(self)
    return 0


@cython.no_gc
@cython.final
cdef class Audience(AudienceBase):
    """All who are to get the events of some topics: the subscribers of `filters`, each connection once."""

    def __dealloc__(self):
        drop_batch(self)
        release(&self.batch)
        release(&self.segments)

    @property
    def receivers(self):
        """How many connections would get an event now."""
        prepare_members(self)
        return self.size

    def subscriptions(self):
        """Return the subscriptions under which the members get the events: one for each connection."""
        cdef uint32_t i
        prepare_members(self)
        return [<SubscriptionBase> self.places[i].subscription for i in range(self.size)]

    def publish(self, str topic not None, bytes payload not None, bytes key=None, Connection origin=None,
                uint64_t offset=0):
        """Send an event, encoded as the protocol's `event` message, to all members.

        `key` is the event's key as UTF-8, `origin` the connection that published it, if it is one of this node's,
        `offset` its number, where the topic keeps history.
        Returns (receivers, queued, dropped): how many members there are, how many of them the event waits for, how
        many lost this or an older event to it.
        """
        cdef Receipt receipt
        cdef unsigned char* out
        cdef unsigned char head[MAX_SERVER_HEAD]
        cdef size_t head_size = write_head(head, OP_TEXT, len(payload))
        cdef size_t size = head_size + len(payload)
        prepare_members(self)
        if self.size:
            out = reserve_frame(self, size)
            memcpy(out, head, head_size)
            memcpy(out + head_size, PyBytes_AS_STRING(payload), len(payload))
        self.context.offset = offset
        try:
            commit(self, size, topic, 0, 0, key, origin, &receipt)
        finally:
            self.context.offset = 0
        return receipt.receivers, receipt.queued, receipt.dropped
