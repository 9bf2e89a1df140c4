# What all connections of one event loop share: the limits, the counters, and what is left to do in this turn.
#
# Invariant: these are data. `LoopContext.flush` does the work, at the end of a turn.

cdef enum:
    WRITE_TIMES = 16

    # Units of work, of about 0.1 microseconds each: for a fast publish, and for each subscriber of it that is not live;
    # for each send; how many bytes make one unit where they are copied, deflated, inflated; how many units pass before
    # the clock is read again.
    PUBLISH_WORK = 4
    OFFER_WORK = 2
    SEND_WORK = 40
    WORK_SHIFT = 8
    DEFLATE_SHIFT = 4
    INFLATE_SHIFT = 6
    CHECK_WORK = 2000

    # The two lines of connections that wait to be read, see `LoopState.lines`.
    FRESH = 0
    SPENT = 1
    LINES = 2

    # What may wait in the batches of all audiences together before they are sent, turn or no turn: bytes, each counted
    # for each live member and once for the memory that it takes.
    BATCHED_COST = 33554432

cdef double WRITE_TIME = 16e-6
# How many times `command_time` all connections together have in one turn.
cdef double TURN_SHARES = 2


cdef struct Limits:
    # What the configuration allows (`broker.config.Limits` has the defaults). Times are in seconds, sizes in bytes.
    size_t max_size
    uint32_t max_fragments
    size_t max_outbox
    size_t max_answers
    int max_depth
    uint32_t max_inflight
    double ping_interval
    double ping_timeout
    double close_timeout
    double block_timeout


cdef int read_limits(Limits* limits, source) except -1:
    """Take over those that may change while the broker runs."""
    limits.max_size = source.max_size
    limits.max_fragments = source.fragments
    limits.max_outbox = source.max_outbox
    limits.max_answers = source.max_answers
    limits.max_depth = source.max_depth
    limits.max_inflight = source.max_inflight
    return 0


cdef int read_times(Limits* limits, source) except -1:
    """Take over those that stay as they are at the start: the keep-alive sweep goes by them."""
    limits.ping_interval = source.ping_interval
    limits.ping_timeout = source.ping_timeout
    limits.close_timeout = source.close_timeout
    limits.block_timeout = source.block_timeout
    return 0


cdef class LoopState:
    """The base of LoopContext: data that the layers below the sockets work on."""

    cdef:
        object __weakref__
        object loop
        bytearray buffer  # all connections read into it
        object small_buffer  # the beginning of it
        object encode_gap
        dict close_reasons  # by close code
        Limits limits
        public object max_age
        public object catch_up
        public object on_lagging
        # Work of this turn.
        List dirty_connections  # with something to send, or to settle
        List dirty_audiences  # with a batch
        list closing  # connections that are to be closed: (connection, code)
        list resuming  # parked publishers whose events have all found room
        # Connections that wait to be read, in their order: those that have had no time yet since they began to wait,
        # and those whose commands have used up their time and that have more of them.
        List lines[LINES]
        size_t batched  # see BATCHED_COST
        uint64_t offset  # of the event that is being published, in the history of its topic; 0 where that keeps none
        bint scheduled
        object flush_method
        double began  # when the turn first had something to send
        # For how long the commands of one connection may be carried out before the others have their turn, in seconds:
        # 4 ms are some 200 of those that cost little, or one that costs much.
        public double command_time
        # The time that commands take, see `Reader.count_work`.
        uint32_t work
        uint32_t work_limit  # 0: the commands of this turn have taken their time
        double work_since  # the clock when `work` was last counted; 0: not since this read began
        double turn_spent
        uint64_t stamp
        # The audiences whose members are known, the one found last first, and how many members they have room for.
        List known_audiences
        readonly uint64_t member_slots
        Deflater deflater
        senders* senders  # the threads that help to send, see senders.pxi; NULL: none
        public uint64_t shared_work  # from which on they do
        Array pending  # batches that connections are to get in the flush under way, see writer.pxi
        dict parked  # keys: subscriptions with events beyond the bound, for which publishers may wait (`block`)
        dict lagging  # keys: connections for which something waits, or waited since the last sweep
        List timers[3]  # see timers.pxi
        double last_tick
        double clock  # of the sweep: does not count time in which the loop stood still
        double tick
        double ping_pause  # from the end of one wait for a sign of life, where there is one, to the next ping
        # Counters.
        readonly uint32_t connections
        readonly uint32_t subscriptions
        readonly uint64_t published
        readonly uint64_t delivered
        readonly uint64_t queued
        readonly uint64_t bytes_in
        readonly uint64_t bytes_out
        readonly uint64_t fast_publishes
        uint64_t dropped[POLICIES][REASONS]
        # From the first thing that a turn has to send until it has been handed to the kernel: how often it took at most
        # 2^i · WRITE_TIME, the rest last, and the sum in seconds.
        uint64_t writes[WRITE_TIMES + 1]
        double write_seconds
        public double writing  # seconds in which nothing but the writing was done, since somebody set it to 0

    cdef int schedule(self) except -1:
        """Have `LoopContext.flush` called at the end of this turn of the loop."""
        if not self.scheduled and self.loop is not None:  # None: all of it is being collected
            try:
                self.loop.call_soon(self.flush_method)
            except RuntimeError:
                if self.loop.is_closed():
                    return 0  # there is no turn any more
                raise
            self.scheduled = True
            self.began = exact_time()
        return 0

    cdef void count_write(self, double seconds) noexcept:
        cdef int i = 0
        cdef double bound = WRITE_TIME
        while i < WRITE_TIMES and seconds > bound:
            bound *= 2
            i += 1
        self.writes[i] += 1
        self.write_seconds += seconds
