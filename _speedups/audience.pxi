# An audience: all connections that are to get the events of some topics, each once.
#
# Invariant: `places` has the live members first. Membership changes only while no batch is under way.

cdef enum:
    # Members of audiences that may be remembered beyond those that the number of subscriptions allows: 3.5 MB of them.
    FREE_SLOTS = 65536


cdef struct Member:
    # One connection in one audience, under the most specific of its subscriptions there.
    Link of_subscription  # in `SubscriptionBase.members`; its owner is the audience
    PyObject* connection  # borrowed, as the next: a member goes before either of them
    PyObject* subscription
    uint32_t place  # in the array of its audience


cdef struct Receipt:
    # What became of an event, counted over the members of its audience.
    uint32_t receivers
    uint32_t queued
    uint32_t dropped


cdef struct Segment:
    # One event of a batch.
    PyObject* topic  # owned
    size_t end
    uint64_t number  # `Event.number`
    uint64_t offset  # `Event.offset`
    uint32_t key_start  # within the frame; 0 where there is no key
    uint32_t key_size


@cython.no_gc
@cython.final
cdef class Filter(FilterBase):
    """A topic or pattern, the subscriptions to it, and the audiences that it is a part of."""

    cdef List audiences

    def __cinit__(self, str topic not None):
        self.topic = topic
        self.name = topic.encode()


@cython.no_gc
cdef class AudienceBase:
    """The data of an audience; `Audience` has what the node asks of it.

    `filters` are the filters that match, the most specific first: a connection is a member under the first of them
    that it subscribed to. The members are found at the first publish after a change.
    """

    cdef:
        object __weakref__
        LoopState context
        readonly tuple filters
        Link* of_filters  # one for each filter, in `Filter.audiences`
        bint known  # whether the members below are up to date; the audience is then in `LoopState.known_audiences`
        List routes  # of the topics whose events it gets, see routes.pxi
        bint flushing
        Link in_known
        Link dirty  # in `LoopState.dirty_audiences`
        Member* members
        Member** places  # first those that are live, then the others
        Member** no_echo  # those whose subscription says `echo` false, by the address of their connection
        uint32_t slots  # how many members there is room for
        uint32_t size
        uint32_t live
        uint32_t no_echo_count
        # The batch of this turn, see batch.pxi.
        Array batch  # frames
        Array segments
        uint32_t segment_count
        list events  # the segments as objects, made when the first one that is not live needs them
        Array deflated  # the same batch deflated, made when a member is sent it that agreed to compression
        size_t* deflated_ends

    def __cinit__(self, LoopState context not None, tuple filters not None):
        cdef Filter filter
        cdef Py_ssize_t place
        self.context = context
        self.dirty.owner = self.in_known.owner = <PyObject*> self
        for filter in filters:
            if filter is None:
                raise TypeError("a filter is not None")
        self.filters = filters
        self.of_filters = <Link*> PyMem_Calloc(max(1, len(filters)), sizeof(Link))
        if self.of_filters == NULL:
            raise MemoryError
        for place in range(len(filters)):
            self.of_filters[place].owner = <PyObject*> self
            append(&(<Filter> filters[place]).audiences, &self.of_filters[place])

    def __dealloc__(self):
        cdef Py_ssize_t place
        drop_members(self)
        if self.context is not None:
            remove(&self.context.dirty_audiences, &self.dirty)
        if self.of_filters != NULL:
            for place in range(len(self.filters)):
                remove(&(<Filter> self.filters[place]).audiences, &self.of_filters[place])
            PyMem_Free(self.of_filters)


cdef int make_slots(LoopState context, uint64_t wanted) except -1:
    """Forget the members of the audiences that have been known for longest until there is room for `wanted` more.

    The lists of members of all audiences hold at most twice as many as there are subscriptions, and some. Without a
    bound every topic published to would keep a list of all who subscribed to a wide pattern. No batch may be under way.
    """
    cdef uint64_t most = 2 * <uint64_t> context.subscriptions + FREE_SLOTS
    while context.known_audiences.last != NULL and context.member_slots + wanted > most:
        drop_members(<AudienceBase> context.known_audiences.last.owner)
    return 0


cdef uint64_t count_subscriptions(AudienceBase self):
    """How many subscriptions its filters have together: the most members that there may be."""
    cdef uint64_t count = 0
    cdef Filter filter
    for filter in self.filters:
        count += filter.subscribers
    return count


cdef int make_arrays(AudienceBase self, size_t slots) except -1:
    self.members = <Member*> malloc(slots * sizeof(Member))
    self.places = <Member**> malloc(slots * sizeof(Member*))
    if self.members == NULL or self.places == NULL:
        free(self.members)
        free(self.places)
        self.members = NULL
        self.places = NULL
        raise MemoryError
    return 0


cdef int find_members(AudienceBase self, size_t slots) except -1:
    """Make the list of members. `slots` is what `count_subscriptions` gives."""
    cdef:
        Filter filter
        Link* link
        SubscriptionBase subscription
        uint32_t others = 0, no_echo = 0, i
        uint64_t stamp
    if slots:
        make_arrays(self, slots)
    self.context.stamp += 1
    stamp = self.context.stamp
    self.size = self.live = 0
    for filter in self.filters:
        link = filter.subscriptions.first
        while link != NULL:
            subscription = <SubscriptionBase> link.owner
            link = link.next
            if subscription.outbox.stamp == stamp:
                continue
            subscription.outbox.stamp = stamp
            no_echo += not subscription.echo
            # Those that are not live go to the end of the array, which is filled from there.
            if subscription.state_number == LIVE:
                add_member(self, subscription, self.live)
                self.live += 1
            else:
                others += 1
                add_member(self, subscription, slots - others)
    if others and slots > self.size:
        # A connection with overlapping subscriptions was counted twice: close the hole between the two parts.
        memmove(self.places + self.live, self.places + slots - others, others * sizeof(Member*))
        for i in range(self.live, self.size):
            self.places[i].place = i
    self.slots = slots
    self.known = True
    self.context.member_slots += slots
    prepend(&self.context.known_audiences, &self.in_known)
    if no_echo:
        find_no_echo(self, no_echo)
    return 0


cdef void add_member(AudienceBase self, SubscriptionBase subscription, uint32_t place) noexcept:
    cdef Member* member = &self.members[self.size]
    self.size += 1
    member.of_subscription.owner = <PyObject*> self
    prepend(&subscription.members, &member.of_subscription)
    member.connection = <PyObject*> subscription.connection
    member.subscription = <PyObject*> subscription
    member.place = place
    self.places[place] = member


cdef int compare_connections(const void* one, const void* other) noexcept nogil:
    cdef PyObject* a = (<Member**> one)[0].connection
    cdef PyObject* b = (<Member**> other)[0].connection
    return <int> (a > b) - <int> (a < b)


cdef int find_no_echo(AudienceBase self, uint32_t count) except -1:
    """Make the list of members without echo, in which `own_member` searches."""
    cdef uint32_t i
    self.no_echo = <Member**> malloc(count * sizeof(Member*))
    if self.no_echo == NULL:
        drop_members(self)
        raise MemoryError
    for i in range(self.size):
        if not (<SubscriptionBase> self.members[i].subscription).echo:
            self.no_echo[self.no_echo_count] = &self.members[i]
            self.no_echo_count += 1
    qsort(self.no_echo, count, sizeof(Member*), compare_connections)
    return 0


cdef Member* own_member(AudienceBase self, PyObject* connection) noexcept:
    """The place of a connection in the audience, if its subscription says `echo` false; else NULL."""
    cdef uint32_t low = 0, high = self.no_echo_count, middle
    while low < high:
        middle = (low + high) // 2
        if self.no_echo[middle].connection < connection:
            low = middle + 1
        else:
            high = middle
    if low < self.no_echo_count and self.no_echo[low].connection == connection:
        return self.no_echo[low]
    return NULL


cdef void drop_members(AudienceBase self) noexcept:
    """Free the list of members. The next publish makes it again."""
    cdef uint32_t i
    if not self.known:
        return
    for i in range(self.size):
        remove(&(<SubscriptionBase> self.members[i].subscription).members, &self.members[i].of_subscription)
    free(self.members)
    free(self.places)
    free(self.no_echo)
    self.members = NULL
    self.places = NULL
    self.no_echo = NULL
    remove(&self.context.known_audiences, &self.in_known)
    self.context.member_slots -= self.slots
    self.size = self.live = self.slots = self.no_echo_count = 0
    self.known = False


cdef void move_member(Member* member, uint32_t place) noexcept:
    """Let two members of an audience change places."""
    cdef AudienceBase audience = <AudienceBase> member.of_subscription.owner
    cdef Member* other = audience.places[place]
    audience.places[member.place] = other
    other.place = member.place
    audience.places[place] = member
    member.place = place
