# What the node asks of a subscription: to begin, to change, to end, to take credit, to be fed.
#
# Invariant: what is in a batch goes out as it was agreed before the operation; what is queued follows the new
# agreement.


@cython.no_gc_clear
@cython.final
cdef class Subscription(SubscriptionBase):
    """One client's interest in one topic or pattern.

    `credit` is how many events may be sent; -1 for any number. `overflow` is the name of a policy.
    Raises ValueError if the connection is not open, KeyError for an unknown policy, OverflowError if too many
    subscriptions of the connection wait for events that are queued under others.
    """

    def __cinit__(self, Connection connection not None, Filter filter not None, *, uint32_t max_queue,
                  str overflow="drop_oldest", bint echo=True, int64_t credit=UNLIMITED):
        cdef uint8_t policy = OVERFLOW[overflow]
        # A connection that was cut is not closed before its transport says so.
        if not is_open(&connection.outbox) and connection.outbox.state != DISCONNECTED:
            raise ValueError("the connection is not open")
        self.max_queue = max_queue
        self.policy = self.agreed = policy
        self.echo = echo
        self.credit = credit
        if connection.outbox.bytes and not connection.outbox.socket_full and not connection.outbox.writing:
            connection.write()  # no barrier for what only waits for the end of this turn
        begin_subscription(self, filter, connection)

    def __dealloc__(self):
        try:
            end_subscription(self)
        except Exception:
            pass  # nobody ended it, so all of it is being collected, and its transport may have gone before it

    def change(self, *, uint32_t max_queue, str overflow, bint echo, credit=None):
        """Change what was agreed. What is queued stays, brought under the new bound and policy.

        What had to go is counted in a gap; under the policy `close` it is the connection that goes, and under `block`
        nothing goes. `credit` sets what remains; None leaves it as it is.
        """
        cdef uint8_t policy = OVERFLOW[overflow]
        cdef uint8_t before = self.agreed
        cdef int64_t credits
        check_active(self)
        write_queue_now(self)
        credits = self.credit if credit is None else credit  # only now: what was sent took of it
        if self.state_number == LIVE and (policy == BLOCK or credits != UNLIMITED):
            # What is in a batch goes out as it was agreed; from now on this one is offered each event.
            flush_audiences_of(self)
        if echo != self.echo:
            change_echo(self, echo)
        if before == REPLAY and policy != REPLAY and not self.recovering:
            drop_lag(self)
        self.max_queue = max_queue
        self.agreed = policy
        if self.replaying:
            policy = before = REPLAY
        self.policy = policy
        self.credit = credits
        if self.state_number == LIVE and never_live(self):
            stop_batching(self)
        refresh_state(self)
        make_candidate(self)
        if policy != LATEST:
            forget_newest(self)
        elif before != LATEST:
            conflate_queue(self)
        keep_bound(self)
        if self.parks is not None:
            release_parked(self)

    def add_credit(self, int64_t add):
        """Let so many more events come. Raises ValueError if the subscription was made without credit."""
        check_active(self)
        if self.credit == UNLIMITED:
            raise ValueError("the subscription was made without credit")
        set_credit(self, min(self.credit + add, MAX_CREDIT))

    def hold(self):
        """Begin a recovery. History keeps the events until `replay` gives the offset to begin after. The queue is
        emptied, because history sends its events again."""
        check_active(self)
        if self.state_number == LIVE:
            flush_audiences_of(self)
        forget_queue(self)
        forget_newest(self)
        self.replaying = self.recovering = self.asked = True
        self.policy = REPLAY
        self.cursor = self.newest = 0
        if self.parks is not None:
            release_parked(self)
        if self.state_number == LIVE:
            leave_live(self)
        else:
            refresh_state(self)
            update_sendable(self)

    def replay(self, uint64_t cursor, uint64_t newest=0):
        """Have it fed from behind the offset `cursor`; after `hold`, or because the numbering is another one.

        `newest` is the offset of the newest event, if no event up to it can be offered any more.
        """
        check_active(self)
        if not self.replaying:
            raise ValueError("the subscription is not replaying")
        self.cursor = cursor
        self.newest = max(self.newest, newest)
        go_on_replaying(self)

    def feed(self, list events not None):
        """Send events of the history: the next ones behind `cursor`. Returns how many of them have found room.

        If that is not all, `LoopContext.catch_up` is called again once there is room.
        """
        cdef Event event
        cdef uint32_t taken = 0
        check_active(self)
        if not self.replaying:
            raise ValueError("the subscription is not replaying")
        for event in events:
            if event.offset <= self.cursor:
                raise ValueError("the event was sent before")
            if taken and is_full(self, PyBytes_GET_SIZE(event.frame)) or self.queue.count >= self.room:
                break
            queue_event(self, event)
            self.cursor = event.offset
            taken += 1
        go_on_replaying(self)
        return taken

    def advance(self, uint64_t offset):
        """There is nothing to be fed up to this offset: what was there was superseded, or is counted in a gap."""
        check_active(self)
        self.cursor = max(self.cursor, offset)
        go_on_replaying(self)

    def end_recovery(self):
        """All was fed, and the client knows it. It stays replaying: what is offered next is fed from history."""
        check_active(self)
        self.recovering = self.asked = False
        refresh_state(self)
        update_sendable(self)

    def end_replay(self):
        """All was fed: let events be offered to its queue, and let it become live."""
        check_active(self)
        stop_replaying(self)

    def announce_loss(self):
        """Announce, behind all that was published until now, that events may be lost: a gap, with no count."""
        if self.outbox == NULL or not is_open(self.outbox):
            return
        flush_audiences_of(self)
        stop_batching(self)  # what comes in this turn comes behind it
        self.queue.missed.unknown += 1
        update_sendable(self)

    def cancel(self):
        """End the subscription and forget its queue. Ending it twice does nothing."""
        if self.outbox != NULL:
            write_queue_now(self)
            end_subscription(self)

    @property
    def state(self):
        """The name of its state, see SUBSCRIPTION_TRANSITIONS."""
        return SUBSCRIPTION_STATES[self.state_number]

    @property
    def behind(self):
        """Whether it is not live: events are offered to it one by one."""
        return self.state_number != LIVE

    @property
    def overflow(self):
        """The name of the policy that was agreed."""
        return OVERFLOW_NAMES[self.agreed]

    @property
    def lag(self):
        """While replaying: how many offsets the client is behind."""
        return count_lacking(self)

    @property
    def room(self):
        """How many events the queue takes at the most, or the credit allows."""
        if self.credit != UNLIMITED and self.credit < self.max_queue:
            return <uint32_t> self.credit
        return self.max_queue

    @property
    def queued(self):
        """How many events are queued."""
        return self.queue.count

    @property
    def waiting(self):
        """For how long the oldest of the queued events has waited, in seconds; 0 if none is queued."""
        if self.queue.count == 0:
            return 0.0
        return (now_ms() - first_event(&self.queue).waiting_since) / 1000.0

    @property
    def dropped_by_reason(self):
        """How many events were dropped, by the reason that their gaps gave."""
        return {GAP_REASONS[reason]: self.dropped_by[reason] for reason in range(REASONS)}


cdef int check_active(SubscriptionBase self) except -1:
    if self.outbox == NULL:
        raise ValueError("the subscription has ended")
    return 0


cdef int write_queue_now(SubscriptionBase self) except -1:
    """Send what is queued only for this turn, while the socket takes it: that has not overflowed anything."""
    if self.queue.count and is_open(self.outbox) and not self.outbox.socket_full and not self.outbox.writing:
        write_queues(self)
    return 0


cdef int change_echo(SubscriptionBase self, bint echo) except -1:
    """Let the client get its own events, or no longer. Audiences keep a list of those that do not."""
    before_change(<Filter> self.filter)
    self.echo = echo
    return 0


cdef int keep_bound(SubscriptionBase self) except -1:
    """Bring the queue under a bound that was lowered, as the policy says."""
    if self.queue.count > self.max_queue and self.policy == CLOSE_AT_BOUND:
        ask_close(self.outbox, CLOSE_SLOW_CONSUMER)
    while self.queue.count > self.max_queue and self.policy != BLOCK:
        if self.policy == REPLAY and (<Event> at(&self.queue, self.queue.span - 1).event).offset:
            unqueue_newest(self)
        else:
            drop_queued(self, self.queue.span - 1 if self.policy == DROP_NEWEST else 0, REASON_OVERFLOW)
    return 0
