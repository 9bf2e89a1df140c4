# What all connections of one event loop share, and the two things that happen to all of them: the flush at the end of a
# loop turn, and the keep-alive sweep.
#
# The law of this file: a connection that is idle has no task, no timer and no buffer of its own.


cdef extern from *:
    """
    #ifdef __GLIBC__
    #include <malloc.h>
    static int trim_heap(void) { return malloc_trim(0); }
    #else
    static int trim_heap(void) { return 0; }
    #endif
    """
    int trim_heap() nogil


def trim_memory():
    """Give memory that was freed back to the system, as far as the C library can (malloc_trim(3)).

    Of itself glibc gives back what lies at the end of its heap only, and so nothing as long as one small thing is left
    behind many that have gone. Returns whether there was anything.
    """
    cdef int found
    with nogil:
        found = trim_heap()
    return found != 0


cdef struct Waiting:
    # A list of connections in the order in which they are due.
    PyObject* first
    PyObject* last


cdef double WRITE_TIME = 16e-6

cdef enum:
    # What a connection may wait for: the lists of the sweep.
    NEXT_PING = 0
    SIGN_OF_LIFE = 1
    END_OF_CLOSE = 2
    NOTHING = 3

    # How long a connection is behind before it is told of, in milliseconds. Every client with a burst is, for a moment.
    TELL_AFTER = 1000
    WRITE_TIMES = 16

    # Members of audiences that may be remembered beyond those that the number of subscriptions allows: 3.5 MB of them.
    FREE_SLOTS = 65536


@cython.final
cdef class LoopContext:
    """What all connections of one event loop share: the receive buffer, the limits, the flush, the keep-alive sweep.

    `loop` is the event loop; times are in seconds, sizes in bytes. `encode_gap(topic, missed, reason)` makes the
    protocol's `gap` message. `ping_interval` 0 turns keep-alive off.

    `max_age(topic)` gives the age in seconds beyond which an event is not worth sending, or None; it is asked for
    events that have to wait. `on_lagging(connection, lagging)` is told when one has been behind for a while, and
    when it is so no more. `catch_up(subscription)` is to feed what a subscription with the policy `replay` lags behind;
    it is called when there is room. Each may be None.
    """

    cdef:
        object __weakref__
        object loop
        object encode_gap
        bytearray buffer
        list dirty  # audiences with a batch
        list dirty_connections  # connections with something to send, or to settle
        list close_pending
        dict holding  # keys: subscriptions with events beyond the bound, for which publishers may wait (`block`)
        dict behind  # keys: connections for which something waits, or waited since the last sweep
        # For how long the commands of one connection may be carried out before the others have their turn, in seconds:
        # 4 ms are some 200 of those that cost little, or one that costs much. The fast path is not counted.
        public double command_time
        public object max_age
        public object on_lagging
        public object catch_up
        bint scheduled
        object flush_method
        uint64_t stamp
        Pending* pending
        int32_t pending_count
        int32_t pending_room
        object deflater
        # The audiences whose members are known, the one found last first, and how many members they have room for.
        PyObject* known_first
        PyObject* known_last
        readonly uint64_t member_slots
        public size_t max_size
        public uint32_t max_fragments
        public size_t max_outbox
        public size_t max_answers
        public int max_depth
        readonly double ping_interval
        readonly double ping_timeout
        double ping_pause  # from the end of one wait for a sign of life, where there is one, to the next ping
        readonly double close_timeout
        readonly double block_timeout
        # Keep-alive: connections in the order in which they are due, one list for each thing they may wait for.
        Waiting waiting[3]
        double clock
        double last_tick
        double tick
        object timer
        # Counters.
        readonly uint32_t connections
        readonly uint32_t subscriptions
        readonly uint64_t published
        readonly uint64_t delivered
        readonly uint64_t queued
        readonly uint64_t bytes_in
        readonly uint64_t bytes_out
        readonly uint64_t fast_publishes
        readonly uint64_t deflated  # events
        uint64_t lost[POLICIES][REASONS]
        # From the first thing that a turn has to send until it has been handed to the kernel: how often it took at most
        # 2^i · WRITE_TIME, the rest last, and the sum in seconds.
        double began
        uint64_t writes[WRITE_TIMES + 1]
        double write_seconds
        public double writing  # seconds in which nothing but the writing was done, since somebody set it to 0

    def __init__(self, loop, *, encode_gap, size_t max_size=1024 * 1024, uint32_t max_fragments=4096,
                 size_t max_outbox=4 * 1024 * 1024, size_t max_answers=1024 * 1024, int max_depth=64,
                 double ping_interval=25.0, double ping_timeout=10.0, double close_timeout=5.0,
                 double block_timeout=5.0, size_t buffer_size=256 * 1024):
        self.loop = loop
        self.encode_gap = encode_gap
        self.buffer = bytearray(buffer_size)
        self.dirty = []
        self.dirty_connections = []
        self.close_pending = []
        self.holding = {}
        self.behind = {}
        self.flush_method = self.flush
        self.max_size = max_size
        self.max_fragments = max_fragments
        self.max_outbox = max_outbox
        self.max_answers = max_answers
        self.max_depth = max_depth
        self.ping_interval = ping_interval
        self.ping_timeout = ping_timeout
        self.ping_pause = ping_interval - ping_timeout if ping_timeout <= ping_interval else ping_interval
        self.close_timeout = close_timeout
        self.block_timeout = block_timeout
        self.command_time = 0.004
        self.last_tick = monotonic()
        shortest = min(t for t in (ping_interval, ping_timeout, close_timeout, block_timeout) if t > 0)
        self.tick = min(1.0, max(0.01, shortest / 10))

    def __dealloc__(self):
        free(self.pending)

    @property
    def dropped_events(self):
        """How many events subscriptions have lost so far, by (policy, reason), the reason as in their gaps."""
        return {(policy, REASON_NAMES[reason]): self.lost[number][reason]
                for policy, number in OVERFLOW.items() for reason in range(REASONS)}

    @property
    def lagging_connections(self):
        """How many connections are behind: something waits for them that they cannot take now."""
        return sum([connection.lagging for connection in self.behind])

    def start(self):
        """Begin the keep-alive sweep."""
        if self.timer is None:
            self.last_tick = monotonic()
            self.timer = self.loop.call_later(self.tick, self.sweep)

    def stop(self):
        """End the keep-alive sweep."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    cdef int schedule(self) except -1:
        """Have `flush` called at the end of this turn of the loop: when all bytes that came in it have been read."""
        if not self.scheduled:
            self.scheduled = True
            self.began = exact_time()
            self.loop.call_soon(self.flush_method)
        return 0

    cdef int make_slots(self, uint64_t wanted) except -1:
        """Forget the members of the audiences that have been known for longest until there is room for `wanted` more.

        The lists of members of all audiences hold at most twice as many as there are subscriptions, and some. Without
        a bound every topic published to would keep a list of all who subscribed to a wide pattern.
        """
        cdef uint64_t most = 2 * <uint64_t> self.subscriptions + FREE_SLOTS
        if self.member_slots + wanted <= most:
            return 0
        self.send_batches()
        while self.known_last != NULL and self.member_slots + wanted > most:
            (<Audience> self.known_last).drop_members()
        return 0

    cdef void add_known(self, Audience audience) noexcept:
        self.member_slots += audience.member_slots
        audience.known_previous = NULL
        audience.known_next = self.known_first
        if self.known_first != NULL:
            (<Audience> self.known_first).known_previous = <PyObject*> audience
        else:
            self.known_last = <PyObject*> audience
        self.known_first = <PyObject*> audience

    cdef void remove_known(self, Audience audience) noexcept:
        self.member_slots -= audience.member_slots
        if audience.known_previous != NULL:
            (<Audience> audience.known_previous).known_next = audience.known_next
        else:
            self.known_first = audience.known_next
        if audience.known_next != NULL:
            (<Audience> audience.known_next).known_previous = audience.known_previous
        else:
            self.known_last = audience.known_previous
        audience.known_previous = audience.known_next = NULL

    cdef int pend(self, Connection connection, Audience audience, Member* member) except -1:
        """Note that a connection is to get an audience's batch at its next write."""
        cdef Pending* grown
        cdef int32_t index = self.pending_count
        if index == self.pending_room:
            self.pending_room = max(64, 2 * self.pending_room)
            grown = <Pending*> realloc(self.pending, self.pending_room * sizeof(Pending))
            if grown == NULL:
                raise MemoryError
            self.pending = grown
        self.pending_count += 1
        self.pending[index].audience = <PyObject*> audience
        self.pending[index].member = member
        self.pending[index].next = -1
        if connection.pending_first < 0:
            connection.pending_first = index
        else:
            self.pending[connection.pending_last].next = index
        connection.pending_last = index
        return 0

    def flush(self):
        """Send everything that this turn of the loop produced, and part with those whom it made too slow."""
        cdef Connection connection
        cdef list connections
        cdef double began = exact_time(), now
        self.scheduled = False
        self.send_batches()
        if self.dirty_connections:
            connections = self.dirty_connections
            self.dirty_connections = []
            for connection in connections:
                connection.dirty = False
                connection.spent = 0
                try:
                    connection.write(True)
                except Exception as error:
                    self.give_up(connection, error)
            if self.holding:
                # Capacity has come, if any, where something was written or given up: all of these are in the list.
                for connection in connections:
                    if connection.holding:
                        self.make_way(connection)
        while self.close_pending:
            connection = self.close_pending.pop()
            connection.close(connection.close_code, connection.close_reason)
        now = exact_time()
        self.writing += now - began
        self.count_write(now - self.began)

    cdef int give_up(self, Connection connection, error) except -1:
        """Part with a connection that could not be written to: a fault of one is not to be one of all."""
        self.loop.call_exception_handler({"message": "a connection could not be written to", "exception": error})
        return connection.lose()

    cdef void count_write(self, double seconds) noexcept:
        cdef int i = 0
        cdef double bound = WRITE_TIME
        while i < WRITE_TIMES and seconds > bound:
            bound *= 2
            i += 1
        self.writes[i] += 1
        self.write_seconds += seconds

    @property
    def write_times(self):
        """How long it took to write what a turn had to send: (bounds in seconds, how many up to each, the sum)."""
        bounds = [WRITE_TIME * 2 ** i for i in range(WRITE_TIMES)]
        return bounds, [self.writes[i] for i in range(WRITE_TIMES + 1)], self.write_seconds

    cdef int send_full(self, Audience audience) except -1:
        """Send a batch that has no room for more, in the middle of a turn."""
        cdef double began = exact_time()
        audience.flush()
        self.writing += exact_time() - began
        return 0

    cdef int make_way(self, Connection connection) except -1:
        """Let the publishers go on whose events have found room with one subscriber."""
        cdef PyObject* link = connection.subscriptions
        cdef Subscription subscription
        while link != NULL:
            subscription = <Subscription> link
            link = subscription.connection_next
            if subscription.holds is not None:
                let_publishers_go(subscription)
        return 0

    def flush_batches(self):
        """Send all batches now: what is published from here on is seen after them. Nobody is parted with."""
        self.send_batches()

    cdef int send_batches(self) except -1:
        cdef:
            Audience audience
            Connection connection
            list audiences = self.dirty
            list connections
            Py_ssize_t next_one = 0
            uint32_t i
        self.dirty = []
        if len(audiences) == 1:
            audience = audiences[0]
            audience.flush()
        elif audiences:
            # First note for each connection which batches it is to get, then write to each once.
            connections = []
            for audience in audiences:
                if audience.segment_count == 0 or audience.flushing:  # it was flushed since, or it comes a second time
                    continue
                audience.flushing = True
                for i in range(audience.ready):
                    connection = <Connection> audience.places[i].connection
                    if connection.pending_first < 0:
                        connections.append(connection)
                    self.pend(connection, audience, audience.places[i])
            while next_one < len(connections):
                try:
                    while next_one < len(connections):
                        connection = <Connection> connections[next_one]
                        next_one += 1
                        i = connection.pending_first
                        if <int32_t> i == connection.pending_last and connection.lane_size == 0 and connection.fd >= 0:
                            connection.pending_first = -1
                            connection.send_batch(<Audience> self.pending[i].audience, self.pending[i].member)
                        else:
                            connection.write(False)
                except Exception as error:
                    self.give_up(connection, error)
            for audience in audiences:
                if audience.flushing:
                    audience.flushing = False
                    audience.drop_batch()
        self.pending_count = 0
        if self.pending_room > FREE_SLOTS:
            free(self.pending)
            self.pending = NULL
            self.pending_room = 0

    def sweep(self):
        """Ping whom it is time to ping, and part with those who gave no sign of life or do not end their closing."""
        cdef Connection connection
        cdef double now = monotonic()
        # A loop that stood still (a stopped process, a sleeping laptop) is no fault of the clients: the answers to its
        # pings may wait unread in the sockets. Such time does not count.
        self.clock += min(now - self.last_tick, 2 * self.tick)
        self.last_tick = now
        self.timer = self.loop.call_later(self.tick, self.sweep)
        while True:
            connection = self.due(NEXT_PING)
            if connection is None:
                break
            self.ping(connection)
        while True:
            connection = self.due(SIGN_OF_LIFE)
            if connection is None:
                break
            if connection.heard or connection.halted:  # halted: it is we who do not listen
                self.wait(connection, NEXT_PING, self.ping_pause)
            else:
                connection.close(CLOSE_PING_TIMEOUT, "ping_timeout")
        while True:
            connection = self.due(END_OF_CLOSE)
            if connection is None:
                break
            self.wait_no_more(connection)
            connection.abort()
        if self.holding:
            self.end_waiting()
        if self.behind:
            self.look_behind()

    cdef int end_waiting(self) except -1:
        """Part with the subscribers for which a publisher has waited long enough, unless what is too old makes room."""
        cdef Subscription subscription
        cdef Hold hold
        for subscription in list(self.holding):
            if subscription.count and self.max_age is not None:
                drop_aged(subscription)
                let_publishers_go(subscription)
                if subscription.holds is None:
                    continue
            hold = longest_hold(subscription)
            if hold is not None and hold.due <= self.clock:
                subscription.connection.doom(CLOSE_SLOW_CONSUMER, "slow_consumer")
        return 0

    @property
    def parked_publishers(self):
        """How many connections are not read until an event of theirs has found room (`block`)."""
        cdef Subscription subscription
        cdef Hold hold
        waiting = set()
        for subscription in self.holding:
            for hold in subscription.holds:
                if hold.publisher is not None:
                    waiting.add(hold.publisher)
        return len(waiting)

    cdef int look_behind(self) except -1:
        """Forget those that are behind no more, and tell of the others, each once."""
        cdef Connection connection
        cdef list news = []
        cdef uint64_t now = now_ms()
        for connection in list(self.behind):
            if connection.is_lagging():
                if not connection.told and now - connection.lagging_since >= TELL_AFTER:
                    connection.told = True
                    news.append((connection, True))
                continue
            connection.listed = False
            del self.behind[connection]
            if connection.told:
                connection.told = False
                news.append((connection, False))
        if self.on_lagging is not None:
            for connection, behind in news:
                self.on_lagging(connection, behind)
        return 0

    cdef int ping(self, Connection connection) except -1:
        """Send a ping. Where the time for an answer is longer than that to the next ping, look for it there."""
        if self.ping_timeout <= self.ping_interval:
            connection.heard = False
            self.wait(connection, SIGN_OF_LIFE, self.ping_timeout)
        else:
            if connection.heard or connection.halted:
                connection.heard = False
                connection.asked = self.clock
            elif self.clock - connection.asked >= self.ping_timeout:
                connection.close(CLOSE_PING_TIMEOUT, "ping_timeout")
                return 0
            self.wait(connection, NEXT_PING, self.ping_pause)
        return connection.append_frame(OP_PING, NULL, 0)

    cdef Connection due(self, int waiting_for):
        """The first connection of a list, if it is due."""
        cdef PyObject* first = self.waiting[waiting_for].first
        if first == NULL or (<Connection> first).due > self.clock:
            return None
        return <Connection> first

    cdef void wait(self, Connection connection, int waiting_for, double seconds) noexcept:
        """Put a connection last in a list; all who wait for the same wait equally long."""
        cdef Waiting* waiting = &self.waiting[waiting_for]
        self.wait_no_more(connection)
        connection.due = self.clock + seconds
        connection.waiting_for = waiting_for
        connection.waiting_previous = waiting.last
        if waiting.last != NULL:
            (<Connection> waiting.last).waiting_next = <PyObject*> connection
        else:
            waiting.first = <PyObject*> connection
        waiting.last = <PyObject*> connection

    cdef void wait_no_more(self, Connection connection) noexcept:
        cdef Waiting* waiting
        if connection.waiting_for == NOTHING:
            return
        waiting = &self.waiting[connection.waiting_for]
        if connection.waiting_previous != NULL:
            (<Connection> connection.waiting_previous).waiting_next = connection.waiting_next
        else:
            waiting.first = connection.waiting_next
        if connection.waiting_next != NULL:
            (<Connection> connection.waiting_next).waiting_previous = connection.waiting_previous
        else:
            waiting.last = connection.waiting_previous
        connection.waiting_previous = connection.waiting_next = NULL
        connection.waiting_for = NOTHING
