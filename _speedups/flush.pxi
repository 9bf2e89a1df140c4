# Sends batches to their live members, and makes the changes of membership that have to wait for that.
#
# Invariant: `send_batches` writes to each connection once. Before a subscription begins, ends or becomes live, the
# batches of its audiences have gone out.

cdef inline void count_sends(AudienceBase self) noexcept:
    """Count what sending the batch costs, as work of the commands that filled it."""
    self.context.work += self.live * SEND_WORK + <uint32_t> (self.batch.size * self.live >> WORK_SHIFT)


cdef int leave_dirty(AudienceBase self) except -1:
    """Take the audience out of the list of those with a batch, which owns it."""
    if is_linked(&self.context.dirty_audiences, &self.dirty):
        remove(&self.context.dirty_audiences, &self.dirty)
        Py_DECREF(self)
    return 0


cdef int flush_audience(AudienceBase self) except -1:
    """Send the batch to each live member, by one call for each."""
    if self.segment_count == 0 or self.flushing:
        return 0
    leave_dirty(self)
    count_sends(self)
    self.flushing = True
    try:
        if is_shared(self.context, self.live, self.live * self.batch.size):
            share_audience(self)
        else:
            send_to_members(self)
    finally:
        self.flushing = False
        self.context.pending.size = 0
        drop_batch(self)
    return 0


cdef int send_to_members(AudienceBase self) except -1:
    cdef uint32_t i = self.live
    cdef Member* member
    cdef Writer connection
    # Backwards, because a member that stops being live changes place with the last live one.
    while i:
        try:
            while i:
                i -= 1
                if i >= AHEAD:
                    __builtin_prefetch(&(<Writer> self.places[i - AHEAD].connection).fd)
                member = self.places[i]
                connection = <Writer> member.connection
                if connection.control.size == 0 and connection.fd >= 0:
                    send_batch(connection, self, member)
                else:
                    reserve(&self.context.pending, sizeof(Pending), 64 * sizeof(Pending))
                    pend(connection, self, member)
                    connection.write()
        except Exception as error:
            give_up(connection, error)
    return 0


cdef int send_batches(LoopState context) except -1:
    """Send all batches: to each connection all that it is to get by one write."""
    cdef AudienceBase audience
    cdef Writer connection
    cdef list audiences, connections
    cdef object each
    context.batched = 0
    if context.dirty_audiences.first == NULL:
        return 0
    if context.dirty_audiences.first == context.dirty_audiences.last:
        audience = <AudienceBase> context.dirty_audiences.first.owner
        return flush_audience(audience)
    audiences = []
    connections = []
    try:
        note_pending(context, audiences, connections)
        if context.senders != NULL and is_shared(context, len(connections), pending_bytes(audiences)):
            share_pending(context, connections)
        else:
            send_pending(context, connections)
    except BaseException:
        for connection in connections:
            connection.pending_first = -1
        raise
    finally:
        for each in audiences:
            audience = <AudienceBase> each
            audience.flushing = False
            leave_dirty(audience)
            drop_batch(audience)
        context.pending.size = 0
        if context.pending.room > FREE_SLOTS * sizeof(Pending):
            release(&context.pending)
    return 0


cdef int note_pending(LoopState context, list audiences, list connections) except -1:
    """Note for each connection which batches it is to get. If that fails nothing has changed."""
    cdef AudienceBase audience
    cdef Writer connection
    cdef Link* link = context.dirty_audiences.first
    cdef uint32_t i
    try:
        while link != NULL:
            audience = <AudienceBase> link.owner
            link = link.next
            audiences.append(audience)
            audience.flushing = True
            if audience.live:
                reserve(&context.pending, audience.live * sizeof(Pending), 64 * sizeof(Pending))
            count_sends(audience)
            for i in range(audience.live):
                connection = <Writer> audience.places[i].connection
                if connection.pending_first < 0:
                    connections.append(connection)
                pend(connection, audience, audience.places[i])
    except BaseException:
        for audience in audiences:
            audience.flushing = False
        audiences.clear()  # they keep their batches, for the next turn
        context.schedule()
        raise
    return 0


cdef int send_pending(LoopState context, list connections) except -1:
    """Write once to each of these connections."""
    cdef Writer connection
    cdef Pending* pending
    cdef Py_ssize_t place = 0
    while place < len(connections):
        try:
            while place < len(connections):
                connection = <Writer> connections[place]
                place += 1
                if connection.pending_first < 0:
                    continue  # it was disconnected since
                if (connection.pending_first == connection.pending_last and connection.control.size == 0
                        and connection.fd >= 0):
                    pending = pending_at(context, connection.pending_first)
                    connection.pending_first = -1
                    send_batch(connection, <AudienceBase> pending.audience, pending.member)
                else:
                    connection.write()
        except Exception as error:
            give_up(connection, error)
    return 0


cdef int flush_matching(LoopState context, bytes pattern) except -1:
    """Send the batches that hold an event of a topic that `pattern` matches."""
    cdef Link* link = context.dirty_audiences.first
    cdef AudienceBase audience
    cdef uint32_t i
    while link != NULL:
        audience = <AudienceBase> link.owner
        link = link.next
        for i in range(audience.segment_count):
            if matches(pattern, (<str> segment_at(audience, i).topic).encode()):
                flush_audience(audience)
                break
    return 0


# Membership.


cdef int before_change(Filter filter) except -1:
    """To be called before a subscription is added or removed: sends what is batched, and forgets the members.

    The members of all audiences are forgotten, even if it raises: they point to their subscriptions.
    """
    cdef Link* link = filter.audiences.first
    cdef AudienceBase audience
    cdef object fault = None
    while link != NULL:
        audience = <AudienceBase> link.owner
        link = link.next
        if audience.known:
            if audience.segment_count:
                try:
                    flush_audience(audience)
                except BaseException as error:
                    fault = error
            drop_members(audience)
    if fault is not None:
        raise fault
    return 0


cdef int flush_audiences_of(SubscriptionBase self) except -1:
    """Send the batches under way of all audiences in which this subscription is a member."""
    cdef Link* link = self.members.first
    cdef AudienceBase audience
    while link != NULL:
        audience = <AudienceBase> link.owner
        link = link.next
        flush_audience(audience)
    return 0


cdef int enter_live(SubscriptionBase self) except -1:
    """Let the subscription get its audiences' batches again. Nothing is queued, and no barrier or credit holds it."""
    cdef Link* link
    cdef AudienceBase audience
    flush_audiences_of(self)  # it has seen what is in them
    set_state(self, LIVE)
    link = self.members.first
    while link != NULL:
        audience = <AudienceBase> link.owner
        move_member(<Member*> link, audience.live)
        audience.live += 1
        link = link.next
    return 0


cdef int promote_candidates(Outbox* outbox) except -1:
    """Nothing is sendable, and no batch is under way: let candidates become live, or be fed from history."""
    cdef SubscriptionBase subscription
    while outbox.subscriptions.first != NULL and outbox.sendable.first == NULL:
        subscription = <SubscriptionBase> outbox.subscriptions.first.owner
        if not subscription.candidate:
            break
        unmake_candidate(subscription)
        if subscription.replaying:
            if not is_held(subscription):
                ask_to_catch_up(subscription)
        elif (subscription.state_number == QUEUED and not never_live(subscription)
                and is_empty(&subscription.queue)):
            enter_live(subscription)
    return 0


cdef int begin_subscription(SubscriptionBase self, Filter filter, Writer connection) except -1:
    """Link a new subscription with its filter and its connection. Its policy, credit and echo are set."""
    cdef Outbox* outbox = &connection.outbox
    cdef LoopState context = connection.context
    before_change(filter)
    self.filter = filter
    self.connection = connection
    self.outbox = outbox
    self.of_filter.owner = self.of_outbox.owner = self.in_sendable.owner = <PyObject*> self
    prepend(&filter.subscriptions, &self.of_filter)
    filter.subscribers += 1
    append(&outbox.subscriptions, &self.of_outbox)
    context.subscriptions += 1
    # From here on `end_subscription` undoes all of it.
    if outbox.bytes:
        raise_barriers(self)
    self.state_number = QUEUED
    if has_barrier(self) or self.credit == 0:
        self.state_number = waiting_state(self)
    elif not outbox.socket_full and outbox.sendable.first == NULL and not never_live(self):
        self.state_number = LIVE
    if self.state_number != LIVE and not never_live(self):
        make_candidate(self)
    return 0


cdef int end_subscription(SubscriptionBase self) except -1:
    """Unlink a subscription and forget its queue. Ending it twice does nothing."""
    cdef Outbox* outbox = self.outbox
    cdef LoopState context
    if outbox == NULL:
        return 0
    context = context_of(outbox)
    try:
        before_change(<Filter> self.filter)
    finally:
        unlink_subscription(self, outbox, context)
    return 0


cdef int unlink_subscription(SubscriptionBase self, Outbox* outbox, LoopState context) except -1:
    """Take a subscription out of all lists and counts. It is out of them even if this raises."""
    cdef object fault
    remove(&self.filter.subscriptions, &self.of_filter)
    self.filter.subscribers -= 1
    outbox.bytes -= self.queue.bytes
    if is_held(self):
        outbox.held_bytes -= self.queue.bytes
    context.queued -= self.queue.count
    clear_queue(&self.queue)
    self.replaying = self.recovering = False
    fault = forget_barriers(self)
    set_state(self, CANCELLED)
    remove(&outbox.subscriptions, &self.of_outbox)
    context.subscriptions -= 1
    try:
        if self.parks is not None and context.loop is not None:  # None: all of it is being collected
            release_all_parked(self)
    finally:
        self.outbox = NULL
        self.connection = None
    if fault is not None:
        raise fault
    return 0
