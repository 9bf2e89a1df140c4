# One client as its queues see it (`Outbox`), and one subscription of it: its state and its credit.
#
# Invariant: an event that is offered to a subscription is handed to the socket, in order, counted in a `gap` at its
# place, left to history (`replay`), or lost with its connection. Nothing here knows a socket.

cdef extern from *:
    """
    #define MAX_CREDIT 9007199254740991LL  /* 2^53-1, the largest integer of the protocol */
    """
    const int64_t MAX_CREDIT

cdef enum:
    UNLIMITED = -1  # `credit` of a subscription that needs none


cdef struct Outbox:
    PyObject* owner  # borrowed, as the next: the connection
    PyObject* context  # its LoopState
    Link dirty  # in `LoopState.dirty_connections`
    List subscriptions  # first those that `promote_candidates` has to look at: the candidates
    List sendable  # subscriptions with something that the socket may take now, in turn
    PyObject* changed  # subscriptions of whose barriers some may be lifted, see barrier.pxi
    size_t bytes  # of all queued events
    size_t held_bytes  # of those that do not wait for the socket alone
    uint64_t lagging_since  # in milliseconds of `now_ms`
    uint32_t waiting  # subscriptions with something queued, or left to history
    uint32_t replaying  # those in the state REPLAYING
    uint32_t barriers  # one subscription waits for another one, see barrier.pxi
    uint64_t stamp  # of the last audience that has counted this client, see `find_members`
    uint8_t state  # the connection's
    uint8_t socket_full  # the kernel is full: the transport holds what it did not take
    uint8_t writing  # a write is under way: its pieces are in no queue
    uint8_t listed  # it stands in `LoopState.lagging`
    uint8_t reported  # and was reported


cdef struct Barriers:
    # Of one subscription: who waits for what, see barrier.pxi.
    List waiters  # those that wait for events queued here
    List waits_for  # those that this one waits for
    PyObject* next_changed
    bint changed


@cython.no_gc
cdef class FilterBase:
    """A topic or pattern with its subscriptions. `topic` is what the subscribers wrote."""

    cdef:
        object __weakref__
        readonly str topic
        readonly uint32_t subscribers
        bytes name  # the topic as UTF-8
        List subscriptions


@cython.no_gc_clear
cdef class SubscriptionBase:
    """The data of a subscription; `Subscription` has what the node asks of it.

    `credit` is how many events may still be sent, UNLIMITED for any number. Costs of `credit` and of the policies fall
    on the subscriptions that use them: those are never live, so that the walk over an audience passes them by.
    """

    cdef:
        Outbox* outbox  # NULL once cancelled
        readonly object connection  # None once cancelled
        readonly FilterBase filter
        Queue queue
        readonly bint echo
        bint asked  # `LoopState.catch_up` was called, and nothing was fed since
        readonly bint replaying  # events are left to history, see replay.pxi
        readonly bint recovering  # what the client was away for is fed, and it is to be told of the end
        bint candidate  # `promote_candidates` has to look at it
        bint waits  # it is counted in `Outbox.waiting`
        uint8_t state_number
        uint8_t policy  # REPLAY while it is replaying, else `agreed`
        uint8_t agreed
        uint32_t strays  # parked events for which no publisher can be made to wait
        readonly uint32_t max_queue
        readonly uint64_t dropped
        readonly int64_t credit
        readonly uint64_t cursor  # while replaying: the offset of the newest event that was sent or queued
        readonly uint64_t newest  # and of the newest one that was offered
        uint64_t dropped_by[REASONS]
        List members  # its places in audiences, see audience.pxi
        Barriers* barriers  # NULL where there are none
        list parks  # under `block`: a `Park` for each event beyond the bound, the oldest first, or None
        Link of_filter
        Link of_outbox
        Link in_sendable


cdef inline LoopState context_of(Outbox* outbox):
    return <LoopState> outbox.context


cdef inline bint is_open(const Outbox* outbox) noexcept:
    """Whether the connection takes part."""
    return OPEN <= outbox.state <= CLOSE_PENDING


cdef inline bint is_serving(const Outbox* outbox) noexcept:
    """Whether it takes commands and events."""
    return outbox.state == OPEN or outbox.state == FINISHING


cdef inline void set_connection_state(Outbox* outbox, uint8_t state) noexcept:
    """The one place where the state of a connection changes."""
    check_transition(after_connection_state, outbox.state, state)
    outbox.state = state


cdef inline int mark_dirty(Outbox* outbox) except -1:
    """Have the connection written to at the end of this turn."""
    if not is_linked(&(<LoopState> outbox.context).dirty_connections, &outbox.dirty):
        (<LoopState> outbox.context).schedule()
        append(&(<LoopState> outbox.context).dirty_connections, &outbox.dirty)
    return 0


cdef int ask_close(Outbox* outbox, int code) except -1:
    """Have the connection closed at the end of this turn; now its members or queues are being walked over."""
    cdef LoopState context = context_of(outbox)
    if is_serving(outbox):
        set_connection_state(outbox, CLOSE_PENDING)
        context.closing.append((<object> outbox.owner, code))
        context.schedule()
    return 0


cdef bint is_lagging(const Outbox* outbox) noexcept:
    """Whether something waits for this client."""
    return is_open(outbox) and (outbox.socket_full or outbox.waiting != 0)


cdef int note_lagging(Outbox* outbox) except -1:
    """Note that something has to wait for this client."""
    if not outbox.listed and is_open(outbox):
        outbox.listed = True
        outbox.lagging_since = now_ms()
        context_of(outbox).lagging[<object> outbox.owner] = None
    return 0


# The state.


cdef inline bint is_held(SubscriptionBase self) noexcept:
    """Whether its events wait for more than the socket."""
    return self.state_number == BARRIER or self.state_number == NO_CREDIT


cdef inline bint never_live(SubscriptionBase self) noexcept:
    """Whether it is offered each event for good, and never gets a batch."""
    return self.credit != UNLIMITED or self.policy == BLOCK


cdef inline bint has_barrier(SubscriptionBase self) noexcept:
    return self.barriers != NULL and self.barriers.waits_for.first != NULL


cdef inline uint64_t count_lacking(SubscriptionBase self) noexcept:
    """How many offsets the cursor of a replay is behind the newest event. Without compaction each of them is an event
    that the client still needs."""
    return self.newest - self.cursor if self.replaying and self.newest > self.cursor else 0


cdef uint8_t waiting_state(SubscriptionBase self) noexcept:
    """The state of a subscription that is not live."""
    if has_barrier(self):
        return BARRIER
    if self.credit == 0 and not (self.recovering and count_lacking(self) == 0):  # the end of a recovery costs none
        return NO_CREDIT
    return REPLAYING if self.recovering or count_lacking(self) else QUEUED


cdef int set_state(SubscriptionBase self, uint8_t state) except -1:
    """The one place where the state of a subscription changes."""
    cdef Outbox* outbox = self.outbox
    cdef bint was_held = is_held(self)
    cdef uint8_t before = self.state_number
    if before == state:
        return 0
    check_transition(after_state, before, state)
    self.state_number = state
    if is_held(self) and not was_held:
        outbox.held_bytes += self.queue.bytes
    elif was_held and not is_held(self):
        outbox.held_bytes -= self.queue.bytes
    outbox.replaying += <uint32_t> (state == REPLAYING) - <uint32_t> (before == REPLAYING)
    return update_sendable(self)


cdef int refresh_state(SubscriptionBase self) except -1:
    """Let the state follow what has changed: credit, barriers, lag. One that is live stays so."""
    if self.state_number == LIVE:
        return 0
    return set_state(self, waiting_state(self))


cdef int update_sendable(SubscriptionBase self) except -1:
    """Let the lists of the outbox follow what has changed: the state, or whether there is anything to send."""
    cdef Outbox* outbox = self.outbox
    cdef bint something = not is_empty(&self.queue)
    cdef bint waits = something or self.recovering or count_lacking(self) != 0
    if waits != self.waits:
        self.waits = waits
        outbox.waiting += 1 if waits else -1
    if not something or (self.state_number != QUEUED and self.state_number != REPLAYING):
        remove(&outbox.sendable, &self.in_sendable)
    elif not is_linked(&outbox.sendable, &self.in_sendable):
        append(&outbox.sendable, &self.in_sendable)
        if not outbox.socket_full:
            mark_dirty(outbox)
    return 0


cdef int make_candidate(SubscriptionBase self) except -1:
    """Have `promote_candidates` look at it once nothing is sendable: it may become live, or be fed from history."""
    cdef Outbox* outbox = self.outbox
    if self.state_number == LIVE:
        return 0
    if not self.candidate:
        self.candidate = True
        remove(&outbox.subscriptions, &self.of_outbox)
        prepend(&outbox.subscriptions, &self.of_outbox)
    if not outbox.socket_full:
        mark_dirty(outbox)
    return 0


cdef void unmake_candidate(SubscriptionBase self) noexcept:
    self.candidate = False
    remove(&self.outbox.subscriptions, &self.of_outbox)
    append(&self.outbox.subscriptions, &self.of_outbox)


cdef int set_credit(SubscriptionBase self, int64_t credit) except -1:
    """Let so many events be sent from now on."""
    self.credit = credit
    refresh_state(self)
    return make_candidate(self)
