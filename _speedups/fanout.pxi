# An audience, and the flush at the end of a loop turn.
#
# The law of this file: in one turn of the event loop an event is appended once to the batch of its audience, and each
# member's socket gets the whole batch by one system call. Only for members that are behind is an event looked at
# singly. An audience's membership changes only after its batch is flushed.

cdef extern from * nogil:
    void __builtin_prefetch(const void* address)

cdef enum:
    # A batch goes out when it would grow beyond this, turn or no turn. A kernel takes 64 kB at once, and beyond that a
    # longer batch saves nothing.
    BATCH_SIZE = 65536

    # Room for a batch that is kept from turn to turn, in bytes and in events: where thousands of topics have one event
    # each a turn, malloc and free would cost as much as all else but the system call. There may be as many audiences as
    # routes are remembered, so it is no more.
    KEPT_SIZE = 512
    KEPT_SEGMENTS = 4

    # How many members ahead the walk over an audience fetches: one system call takes longer than memory.
    AHEAD = 2


cdef struct Member:
    # One connection in one audience, under the most specific of its subscriptions there.
    PyObject* connection  # borrowed, as all of these: a member dies before any of them
    PyObject* subscription
    PyObject* audience
    Member* next  # of the same subscription
    Member* previous
    uint32_t place  # in its audience's array


cdef struct Segment:
    # One event of a batch.
    PyObject* topic  # owned
    size_t end
    uint64_t number  # `Event.number`
    uint32_t key_start  # within the frame; 0 where there is no key
    uint32_t key_size


cdef struct Pending:
    # A batch that a connection is to get in the flush under way; a list for each connection, by index.
    PyObject* audience
    Member* member
    int32_t next


cdef struct Receipt:
    uint32_t receivers
    uint32_t queued
    uint32_t dropped


@cython.no_gc
@cython.final
cdef class Filter:
    """A topic or pattern with its subscriptions. `topic` is what the subscribers wrote."""

    cdef:
        object __weakref__
        readonly str topic
        readonly uint32_t subscribers
        PyObject* first
        # The audiences that this filter is a part of.
        PyObject** audiences
        uint32_t audience_count
        uint32_t audience_room

    def __cinit__(self, str topic not None):
        self.topic = topic

    cdef int before_change(self) except -1:
        """To be called before a subscription is added or removed: sends what is batched, and forgets the members."""
        cdef uint32_t i
        for i in range(self.audience_count):
            (<Audience> self.audiences[i]).forget_members()
        return 0

    def __dealloc__(self):
        free(self.audiences)


@cython.no_gc
@cython.final
cdef class Audience:
    """All who are to get the events of some topics: the subscribers of some filters, each connection once.

    `filters` are the filters that match, the most specific first: a connection is a member under the first of them
    that it subscribed to. The members are found at the first publish after a change.
    """

    cdef:
        object __weakref__
        LoopContext context
        readonly tuple filters
        bint known  # whether the members below are up to date; the audience then stands in the context's list
        PyObject* known_next
        PyObject* known_previous
        bint flushing
        Member* members
        Member** places  # first those that get the batch, then those that are behind
        uint32_t member_slots  # how many members there is room for
        uint32_t size
        uint32_t ready
        # The batch of this turn.
        unsigned char* batch
        size_t batch_size
        size_t batch_room
        Segment* segments
        uint32_t segment_count
        uint32_t segment_room
        list events  # the segments as objects, made when the first who is behind needs them
        # The same batch deflated, made when a member is sent it that agreed to compression.
        unsigned char* deflated
        size_t* deflated_ends

    def __cinit__(self, LoopContext context not None, tuple filters not None):
        cdef Filter filter
        cdef PyObject** grown
        self.context = context
        self.filters = filters  # first, so that it is taken out again of those that know it if the next one fails
        for filter in filters:
            if filter.audience_count == filter.audience_room:
                filter.audience_room = max(2, 2 * filter.audience_room)
                grown = <PyObject**> realloc(filter.audiences, filter.audience_room * sizeof(PyObject*))
                if grown == NULL:
                    raise MemoryError
                filter.audiences = grown
            filter.audiences[filter.audience_count] = <PyObject*> self
            filter.audience_count += 1

    def __dealloc__(self):
        cdef Filter filter
        cdef uint32_t i
        self.drop_members()
        self.drop_batch()
        free(self.batch)
        free(self.segments)
        for found in self.filters or ():
            if not isinstance(found, Filter):
                break
            filter = <Filter> found
            for i in range(filter.audience_count):
                if filter.audiences[i] == <PyObject*> self:
                    filter.audience_count -= 1
                    filter.audiences[i] = filter.audiences[filter.audience_count]
                    break

    @property
    def receivers(self):
        """How many connections would get an event now."""
        self.find_members()
        return self.size

    def subscriptions(self):
        """Return the subscriptions under which the members get the events: one for each connection."""
        cdef uint32_t i
        self.find_members()
        return [<Subscription> self.places[i].subscription for i in range(self.size)]

    def publish(self, str topic not None, bytes payload not None, bytes key=None, Connection origin=None):
        """Send an event, encoded as the protocol's `event` message, to all members.

        `key` is the event's key as UTF-8, `origin` the connection that published it, if it is one of this node's.
        Returns (receivers, queued, dropped): how many members there are, how many of them the event waits for, how
        many lost this or an older event to it.
        """
        cdef Receipt receipt
        cdef unsigned char* out
        cdef unsigned char head[MAX_SERVER_HEAD]
        cdef size_t head_size = write_head(head, OP_TEXT, len(payload))
        cdef size_t size = head_size + len(payload)
        self.find_members()
        if self.size:
            out = self.reserve(size)
            memcpy(out, head, head_size)
            memcpy(out + head_size, PyBytes_AS_STRING(payload), len(payload))
        self.commit(size, topic, 0, 0, key, origin, &receipt)
        return receipt.receivers, receipt.queued, receipt.dropped

    cdef int find_members(self) except -1:
        """Make the list of members, unless it is known."""
        cdef:
            Filter filter
            PyObject* link
            Subscription subscription
            Connection connection
            Member* member
            size_t most = 0
            uint32_t behind = 0, i
            uint64_t stamp
        if self.known:
            return 0
        for filter in self.filters:
            most += filter.subscribers
        self.context.make_slots(most)
        if most:
            self.members = <Member*> malloc(most * sizeof(Member))
            self.places = <Member**> malloc(most * sizeof(Member*))
            if self.members == NULL or self.places == NULL:
                free(self.members)
                free(self.places)
                self.members = NULL
                self.places = NULL
                raise MemoryError
        self.context.stamp += 1
        stamp = self.context.stamp
        self.size = self.ready = 0
        for filter in self.filters:
            link = filter.first
            while link != NULL:
                subscription = <Subscription> link
                link = subscription.filter_next
                connection = subscription.connection
                if connection.stamp == stamp:
                    continue
                connection.stamp = stamp
                member = &self.members[self.size]
                member.connection = <PyObject*> connection
                member.subscription = <PyObject*> subscription
                member.audience = <PyObject*> self
                member.previous = NULL
                member.next = subscription.members
                if subscription.members != NULL:
                    subscription.members.previous = member
                subscription.members = member
                # Who is behind goes to the end of the array, which is filled from there.
                if subscription.behind:
                    behind += 1
                    member.place = most - behind
                else:
                    member.place = self.ready
                    self.ready += 1
                self.places[member.place] = member
                self.size += 1
        if behind and most > self.size:
            # A connection with overlapping subscriptions was counted twice: close the hole between the two parts.
            memmove(self.places + self.ready, self.places + most - behind, behind * sizeof(Member*))
            for i in range(self.ready, self.size):
                self.places[i].place = i
        self.member_slots = most
        self.known = True
        self.context.add_known(self)
        return 0

    cdef int forget_members(self) except -1:
        if self.known:
            self.flush()
            self.drop_members()
        return 0

    cdef void drop_members(self) noexcept:
        cdef Member* member
        cdef uint32_t i
        for i in range(self.size):
            member = &self.members[i]
            if member.previous != NULL:
                member.previous.next = member.next
            else:
                (<Subscription> member.subscription).members = member.next
            if member.next != NULL:
                member.next.previous = member.previous
        free(self.members)
        free(self.places)
        self.members = NULL
        self.places = NULL
        if self.known:
            self.context.remove_known(self)
        self.size = self.ready = self.member_slots = 0
        self.known = False

    cdef void drop_batch(self) noexcept:
        cdef uint32_t i
        for i in range(self.segment_count):
            Py_DECREF(<str> self.segments[i].topic)
        if self.batch_room > KEPT_SIZE:
            free(self.batch)
            self.batch = NULL
            self.batch_room = 0
        if self.segment_room > KEPT_SEGMENTS:
            free(self.segments)
            self.segments = NULL
            self.segment_room = 0
        self.batch_size = 0
        self.segment_count = 0
        self.events = None
        if self.deflated != NULL:
            drop_deflated(self)

    cdef unsigned char* reserve(self, size_t size) except NULL:
        """Return where to write the next frame of the batch; `commit` makes it part of it."""
        cdef unsigned char* grown
        cdef size_t room
        if self.segment_count and self.batch_size + size > BATCH_SIZE:
            self.context.send_full(self)
        if self.batch_size + size > self.batch_room:
            room = max(self.batch_size + size, min(2 * self.batch_room, <size_t> BATCH_SIZE))
            grown = <unsigned char*> realloc(self.batch, room)
            if grown == NULL:
                raise MemoryError
            self.batch = grown
            self.batch_room = room
        return self.batch + self.batch_size

    cdef int commit(self, size_t size, str topic, uint32_t key_start, uint32_t key_size, bytes key,
                    Connection origin, Receipt* receipt) except -1:
        """Publish the frame that was written to where `reserve` said. `find_members` was called before.

        The key is at `key_start` within the frame, or it is `key`.
        """
        cdef:
            PyObject* own = NULL
            Member* member
            Event event = None
            Subscription subscription
            uint32_t i
            int fate
        receipt.receivers = self.size
        receipt.queued = receipt.dropped = 0
        self.context.published += 1
        if self.size == 0:
            return 0
        if origin is not None and origin.deaf:
            own = self.deaf_subscription(origin)
            if own != NULL:
                # The publisher does not want its own events: for this turn it is treated singly.
                receipt.receivers -= 1
                if not (<Subscription> own).behind:
                    set_behind(<Subscription> own)
                    origin.mark_dirty()
        if self.ready:
            self.add_segment(size, topic, key_start, key_size, key)
        for i in range(self.ready, self.size):
            member = self.places[i]
            if member.subscription == own:
                continue
            if event is None:
                if self.ready:
                    event = self.event(self.segment_count - 1)
                else:
                    event = self.make_event(self.batch_size, size, topic, self.context.published, key_start, key_size,
                                            key)
            subscription = <Subscription> member.subscription
            fate = offer(subscription, event, origin)
            receipt.queued += fate & WAITS
            receipt.dropped += fate >> 1
        if self.segment_count == 0:
            self.drop_batch()
        return 0

    cdef int add_segment(self, size_t size, str topic, uint32_t key_start, uint32_t key_size, bytes key) except -1:
        cdef Segment* grown
        cdef Segment* segment
        cdef uint32_t room
        if self.segment_count == self.segment_room:
            room = max(<uint32_t> KEPT_SEGMENTS, 2 * self.segment_room)
            grown = <Segment*> realloc(self.segments, room * sizeof(Segment))
            if grown == NULL:
                raise MemoryError
            self.segments = grown
            self.segment_room = room
        if self.segment_count == 0:
            self.context.dirty.append(self)
            self.context.schedule()
        segment = &self.segments[self.segment_count]
        self.batch_size += size
        segment.end = self.batch_size
        segment.number = self.context.published
        Py_INCREF(topic)
        segment.topic = <PyObject*> topic
        segment.key_start = key_start
        segment.key_size = key_size
        self.segment_count += 1
        if key is not None:
            # The frame was made elsewhere: where its key stands is not known, so the object is made at once.
            self.event(self.segment_count - 1).key = key
        return 0

    cdef Event make_event(self, size_t start, size_t size, str topic, uint64_t number, uint32_t key_start,
                          uint32_t key_size, bytes key):
        cdef Event event = Event.__new__(Event)
        event.frame = PyBytes_FromStringAndSize(<char*> self.batch + start, size)
        event.topic = topic
        event.number = number
        event.key = key
        event.born = now_ms()
        if key is None and key_start:
            event.key = event.frame[key_start : key_start + key_size]
        if self.context.max_age is not None:
            age = self.context.max_age(topic)
            if age is not None:
                event.expires = event.born + max(<uint64_t> 1, <uint64_t> (1000 * <double> age))
        return event

    cdef Event event(self, uint32_t index):
        """The event of one segment as an object of its own; the same object for all who ask."""
        cdef Segment* segment = &self.segments[index]
        cdef size_t start = self.segments[index - 1].end if index else 0
        cdef Event event
        if self.events is None:
            self.events = []
        while <uint32_t> len(self.events) <= index:
            self.events.append(None)
        event = self.events[index]
        if event is None:
            event = self.make_event(start, segment.end - start, <str> segment.topic, segment.number,
                                    segment.key_start, segment.key_size, None)
            self.events[index] = event
        return event

    cdef PyObject* deaf_subscription(self, Connection connection) noexcept:
        """The subscription under which a connection is a member, if it says `echo` false; else NULL.

        Not found by its members: a wide pattern may be a part of thousands of audiences.
        """
        cdef Py_ssize_t place
        cdef PyObject* filter
        cdef PyObject* link
        for place in range(len(self.filters)):
            filter = <PyObject*> self.filters[place]
            link = connection.subscriptions
            while link != NULL:
                if <PyObject*> (<Subscription> link).filter == filter:
                    return NULL if (<Subscription> link).echo else link
                link = (<Subscription> link).connection_next
        return NULL

    cdef int flush(self) except -1:
        """Send the batch to each member that is not behind, by one call for each."""
        cdef:
            uint32_t i = self.ready
            Member* member
            Connection connection
        if self.segment_count == 0 or self.flushing:
            return 0
        self.flushing = True
        # Backwards, because a member that falls behind changes place with the last one of its part.
        while i:
            try:
                while i:
                    i -= 1
                    if i >= AHEAD:
                        __builtin_prefetch(&(<Connection> self.places[i - AHEAD].connection).fd)
                    member = self.places[i]
                    connection = <Connection> member.connection
                    if connection.lane_size == 0 and connection.fd >= 0:
                        connection.send_batch(self, member)
                    else:
                        self.context.pend(connection, self, member)
                        connection.write(False)
            except Exception as error:
                self.context.give_up(connection, error)
        self.flushing = False
        self.context.pending_count = 0
        self.drop_batch()
        return 0


cdef void move_member(Member* member, uint32_t place) noexcept:
    """Let two members of an audience change places."""
    cdef Audience audience = <Audience> member.audience
    cdef Member* other = audience.places[place]
    audience.places[member.place] = other
    other.place = member.place
    audience.places[place] = member
    member.place = place


cdef int set_behind(Subscription self) except -1:
    """From now on events are offered to this subscription one by one; first those of the batches under way."""
    cdef Member* member = self.members
    cdef Audience audience
    cdef uint32_t i
    if self.behind:
        return 0
    self.behind = self.connection.unsettled = True
    while member != NULL:
        audience = <Audience> member.audience
        audience.ready -= 1
        move_member(member, audience.ready)
        if not audience.flushing:
            for i in range(audience.segment_count):
                offer(self, audience.event(i), None)
        member = member.next
    return 0


cdef int set_ready(Subscription self) except -1:
    """From now on the subscription gets its audiences' batches again. Nothing waits in its queue."""
    cdef Member* member = self.members
    cdef Audience audience
    if self.lag:
        self.connection.unsettled = True  # to be looked at again
        return ask_to_catch_up(self)
    if not self.behind or is_single(self) or self.after is not None:
        return 0
    self.behind = False
    while member != NULL:
        audience = <Audience> member.audience
        # It has seen what is in a batch under way, so that goes out without it.
        audience.flush()
        move_member(member, audience.ready)
        audience.ready += 1
        member = member.next
    return 0
