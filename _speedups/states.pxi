# The states of a connection and of a subscription, and what may follow what. docs/architecture.md shows both tables.
#
# Invariant: a state is changed by `set_connection_state` and `set_state` alone; `begin_subscription` sets the first
# one. A build with DEBUG_STATES (make sanitize, make fuzz) asserts that each change stands in its table.

cdef extern from *:
    """
    #ifndef DEBUG_STATES
    #define DEBUG_STATES 0
    #endif
    """
    const bint DEBUG_STATES

cdef enum:
    # Of a connection. From OPEN to CLOSE_PENDING its session is there. From CLOSING on nothing is written but the
    # batches under way and the close frame.
    NEW = 0  # its handshake is not over
    OPEN = 1
    FINISHING = 2  # it closes once everything that waits for its socket is sent
    CLOSE_PENDING = 3  # it closes at the end of this turn, and takes no more events or commands
    CLOSING = 4  # our close frame is on its way; the peer's is waited for
    FAILING = 5  # the same after a protocol error: our half of the socket is shut behind the close frame
    HANGING_UP = 6  # both close frames are there: the transport closes once ours is sent
    HALF_CLOSED = 7  # our half of the socket is shut, after a protocol error; the peer closes
    DISCONNECTED = 8  # the socket is broken, cut, or shut by the peer: nothing is written any more
    CLOSED = 9  # the transport has closed

    # Of a subscription that is not live, the first of BARRIER, NO_CREDIT, REPLAYING, QUEUED that is true.
    LIVE = 0  # it is sent the batches of its audiences
    QUEUED = 1  # events are offered to its queue, and go out as the socket takes them
    BARRIER = 2  # queued behind events that wait under overlapping patterns of the same client
    NO_CREDIT = 3  # queued until the client gives credit
    REPLAYING = 4  # events are left to history, and fed from it
    CANCELLED = 5

CONNECTION_STATES = ("new", "open", "finishing", "close_pending", "closing", "failing", "hanging_up", "half_closed",
                     "disconnected", "closed")
SUBSCRIPTION_STATES = ("live", "queued", "barrier", "no_credit", "replaying", "cancelled")

CONNECTION_TRANSITIONS = {
    "new": ("open",),
    "open": ("finishing", "close_pending", "closing", "failing", "hanging_up", "disconnected", "closed"),
    "finishing": ("close_pending", "closing", "failing", "hanging_up", "disconnected", "closed"),
    "close_pending": ("closing", "failing", "hanging_up", "disconnected", "closed"),
    "closing": ("failing", "hanging_up", "disconnected", "closed"),
    "failing": ("half_closed", "disconnected", "closed"),
    "hanging_up": ("disconnected", "closed"),
    "half_closed": ("disconnected", "closed"),
    "disconnected": ("closed",),
    "closed": (),
}
SUBSCRIPTION_TRANSITIONS = {
    "live": ("queued", "no_credit", "replaying", "cancelled"),
    "queued": ("live", "no_credit", "replaying", "cancelled"),
    "barrier": ("queued", "no_credit", "replaying", "cancelled"),
    "no_credit": ("queued", "replaying", "cancelled"),
    "replaying": ("queued", "no_credit", "cancelled"),
    "cancelled": (),
}

# The same as bits: of each state, those that may follow.
cdef uint32_t after_connection_state[10]
cdef uint32_t after_state[6]


cdef int read_transitions(uint32_t* after, tuple names, dict table) except -1:
    """Make the bits of one table."""
    cdef int state
    for state in range(len(names)):
        after[state] = 0
        for following in table[names[state]]:
            after[state] |= <uint32_t> 1 << <int> names.index(following)
    return 0


read_transitions(after_connection_state, CONNECTION_STATES, CONNECTION_TRANSITIONS)
read_transitions(after_state, SUBSCRIPTION_STATES, SUBSCRIPTION_TRANSITIONS)


cdef inline void check_transition(const uint32_t* after, int state, int following) noexcept:
    """In a debug build: end the process if this change of state is not in its table."""
    if DEBUG_STATES and not after[state] >> following & 1:
        fail_transition(state, following)


cdef void fail_transition(int state, int following) noexcept:
    fprintf(stderr, b"wsbroker: state %d must not be followed by %d\n", state, following)
    abort()
