# One event loop with its connections: the end of a turn, and the sweep.
#
# Invariant: turns are divided by one flush; what a turn cannot do in its time is left to the next one.

cdef double FLUSH_SHARE = 0.004  # seconds for which queues are written, or connections closed, at the end of one turn

cdef enum:
    CLOCK_WRITES = 8  # connections written to between two looks at the clock


@cython.final
cdef class LoopContext(LoopState):
    """What all connections of one event loop share: the receive buffer, the limits, the flush, the keep-alive sweep.

    `loop` is the event loop; `limits` has the fields of `broker.config.Limits` that the data path goes by, times in
    seconds, sizes in bytes. `encode_gap(topic, missed, reason[, from, to])` makes the protocol's `gap` message.
    `close_reasons` are the texts of the broker's own close codes. A `ping_interval` of 0 turns keep-alive off.

    `threads` is how many threads send batches that go to many members, this one included.

    `max_age(topic)` gives the age in seconds beyond which an event is not worth sending, or None; it is asked for
    events that have to wait. `on_lagging(connection, lagging)` is called when a connection has been behind for a while,
    and when it is so no more. `catch_up(subscription)` is to feed a subscription that is replaying, or to end that if
    it lacks nothing; it is called when there is room and nothing is queued. Each may be None.
    """

    cdef object timer

    def __init__(self, loop, limits, *, encode_gap, dict close_reasons={}, size_t buffer_size=256 * 1024,
                 int threads=1):
        self.loop = loop
        self.encode_gap = encode_gap
        self.close_reasons = close_reasons
        self.buffer = bytearray(buffer_size)
        self.small_buffer = memoryview(self.buffer)[:4096]
        self.closing = []
        self.resuming = []
        self.parked = {}
        self.lagging = {}
        self.deflater = Deflater.__new__(Deflater)
        self.flush_method = self.flush
        self.command_time = 0.004
        self.work_limit = CHECK_WORK
        self.last_tick = monotonic()
        read_limits(&self.limits, limits)
        read_times(&self.limits, limits)
        interval, timeout = self.limits.ping_interval, self.limits.ping_timeout
        self.ping_pause = interval - timeout if timeout <= interval else interval
        shortest = min(time for time in (interval, timeout, self.limits.close_timeout, self.limits.block_timeout)
                       if time > 0)
        self.tick = min(1.0, max(0.01, shortest / 10))

        self.shared_work = SHARED_WORK
        if threads > 1:
            self.senders = senders_new(threads - 1)
            if self.senders == NULL:
                raise MemoryError

    def __dealloc__(self):
        release(&self.pending)
        senders_free(self.senders)

    def configure(self, limits):
        """Go by these limits from now on, but for the times, which stay as they were at the start."""
        read_limits(&self.limits, limits)

    def start(self):
        """Begin the keep-alive sweep."""
        if self.timer is None:
            self.last_tick = monotonic()
            self.timer = self.loop.call_later(self.tick, self.sweep)

    def stop(self):
        """End the keep-alive sweep and the threads."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        senders_free(self.senders)
        self.senders = NULL

    def flush(self):
        """Between two turns of the loop: send all that the last one produced, close what it made too slow, read on."""
        self.scheduled = False
        try:
            self.work_since = self.turn_spent = 0
            self.work_limit = CHECK_WORK
            self.send_all()
            self.read_lines()
        finally:
            if (self.dirty_audiences.first != NULL or self.dirty_connections.first != NULL or self.closing
                    or self.resuming or self.lines[FRESH].first != NULL or self.lines[SPENT].first != NULL):
                self.schedule()

    cdef int send_all(self) except -1:
        """Send what the commands until now have produced, and close what they made too slow."""
        cdef double began = exact_time(), scheduled = self.began, now
        send_batches(self)
        if self.dirty_connections.first != NULL:
            self.write_connections(exact_time() + FLUSH_SHARE)
        if self.parked:
            self.release_publishers()
        if self.resuming:
            self.resume_publishers()
        if self.closing:
            self.close_connections(exact_time() + FLUSH_SHARE)
        now = exact_time()
        self.writing += now - began
        self.count_write(now - scheduled)  # `began` may be that of the next turn by now
        self.work = 0  # what was sent is no work of the commands that come next
        return 0

    cdef int read_lines(self) except -1:
        """The beginning of a turn: read on from the connections that wait for it, as long as the turn has time.

        Those that have had no time yet come first, so that they wait for one turn, however many others have long queues
        of commands. One of these is read in any case: nobody waits for ever.
        """
        if self.lines[FRESH].first != NULL:
            self.read_line(FRESH)
            if self.scheduled and self.lines[SPENT].first != NULL:
                self.send_all()  # before commands of which one may take long
        self.read_line(SPENT)
        return 0

    cdef int read_line(self, int line) except -1:
        cdef Connection connection = None
        cdef bint at_least_one = line == SPENT
        if self.lines[line].first == NULL:
            return 0
        # Those that come in meanwhile wait for the next turn.
        cdef Connection last = <Connection> self.lines[line].last.owner
        while connection is not last and self.lines[line].first != NULL and (self.work_limit or at_least_one):
            at_least_one = False
            connection = <Connection> self.lines[line].first.owner
            connection.leave_line()
            connection.read_on()
            self.work += SEND_WORK
            if self.work_limit and self.work >= self.work_limit:
                connection.count_work()
        return 0

    cdef int write_connections(self, double until) except -1:
        """Write to the connections with something to send; those for which there is no time wait for the next turn."""
        cdef Connection connection = None
        # Those that come in meanwhile wait for the next turn.
        cdef Connection last = <Connection> self.dirty_connections.last.owner
        cdef size_t count = 0
        while connection is not last and self.dirty_connections.first != NULL:
            count += 1
            connection = <Connection> self.dirty_connections.first.owner
            remove(&self.dirty_connections, &connection.outbox.dirty)
            try:
                connection.write_turn(until)
            except Exception as error:
                give_up(connection, error)
            if count % CLOCK_WRITES == 0 and exact_time() > until:
                break
        return 0

    cdef int release_publishers(self) except -1:
        """Let the publishers go on whose events have found room."""
        for subscription in list(self.parked):
            release_parked(subscription)
        return 0

    cdef int resume_publishers(self) except -1:
        """Answer and read again those whose events have all found room."""
        cdef ParkedPublisher publisher
        resuming, self.resuming = self.resuming, []
        for publisher in resuming:
            if (publisher.connection is None or publisher.parks
                    or (<Connection> publisher.connection).parking is not publisher):
                continue
            try:
                (<Connection> publisher.connection).go_on()
            except Exception as error:
                give_up(<Connection> publisher.connection, error)
        return 0

    cdef int close_connections(self, double until) except -1:
        """Close those that were asked to be closed; the last ones of a crowd in the next turn."""
        cdef Connection connection
        cdef Py_ssize_t done = 0
        try:
            while done < len(self.closing):
                connection, code = self.closing[done]
                done += 1
                connection.close_by_code(code)
                if exact_time() > until:
                    break
        finally:
            del self.closing[:done]  # at once: one by one each would move all that follow
        return 0

    def flush_batches(self):
        """Send all batches now: what is published from here on is seen after them. Nothing is closed."""
        send_batches(self)

    def flush_matching(self, str pattern not None):
        """Send the batches with events of topics that `pattern` matches: from here on they have another audience."""
        flush_matching(self, pattern.encode())

    def sweep(self):
        """Once in a tick: what is due by time."""
        cdef double now = monotonic()
        # A loop that stood still (a stopped process, a sleeping laptop) is no fault of the clients: the answers to its
        # pings may wait unread in the sockets. Such time does not count.
        self.clock += min(now - self.last_tick, 2 * self.tick)
        self.last_tick = now
        self.timer = self.loop.call_later(self.tick, self.sweep)
        sweep_timers(self)
        if self.parked:
            end_parked(self)
        if self.lagging:
            report_lagging(self)

    # What is counted.

    @property
    def dropped_events(self):
        """How many events subscriptions have lost so far, by (policy, reason), the reason as in their gaps."""
        return {(policy, GAP_REASONS[reason]): self.dropped[number][reason]
                for policy, number in OVERFLOW.items() for reason in range(REASONS)}

    @property
    def lagging_connections(self):
        """How many connections lag behind: something waits for them that they cannot take now."""
        return sum([connection.lagging for connection in self.lagging])

    @property
    def threads(self):
        """How many threads send large batches, the loop's own included: fewer than wanted where the system refused."""
        return 1 if self.senders == NULL else 1 + self.senders.wanted

    @property
    def parked_publishers(self):
        """How many connections are not read until an event of theirs has found room (`block`)."""
        cdef SubscriptionBase subscription
        cdef Park entry
        publishers = set()
        for subscription in self.parked:
            for entry in subscription.parks:
                if entry.publisher is not None:
                    publishers.add(entry.publisher)
        return len(publishers)

    @property
    def deflated(self):
        """How many events were deflated."""
        return self.deflater.count

    @property
    def write_times(self):
        """How long it took to write what a turn had to send: (bounds in seconds, how many up to each, the sum)."""
        bounds = [WRITE_TIME * 2 ** i for i in range(WRITE_TIMES)]
        return bounds, [self.writes[i] for i in range(WRITE_TIMES + 1)], self.write_seconds
