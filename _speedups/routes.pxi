# The fast path: a publish to a topic whose route is known needs no Python.
#
# Invariant: it does exactly what the slow path (the session) would do, or leaves the message to it. Connections whose
# rights are limited have the routes behind a table of permits, see permits.pxi.


cdef enum:
    # Places in the table of routes looked up last: 32 kB for all publishers who share them.
    RECENT = 4096


cdef uint32_t recent_place(const unsigned char* name, size_t size) noexcept nogil:
    """Where in the table a topic belongs. A mix of its bytes, eight at a time; the last eight may overlap others."""
    cdef uint64_t word = 0, mixed = size
    cdef size_t i = 0
    while i + 8 < size:
        memcpy(&word, name + i, 8)
        mixed = (mixed ^ word) * <uint64_t> 0x9E3779B97F4A7C15
        mixed ^= mixed >> 32
        i += 8
    if size >= 8:
        memcpy(&word, name + size - 8, 8)
    else:
        word = 0
        memcpy(&word, name, size)
    mixed = (mixed ^ word) * <uint64_t> 0x9E3779B97F4A7C15
    return (mixed >> 32) % RECENT


@cython.final
cdef class RouteCache(FastPath):
    """The known topics, for all connections that may publish to the same ones.

    It remembers at least the `limit` topics last published to, and at most twice as many: those used since the last
    turn-over are young, the others old; when the young ones are too many, the old ones are forgotten. Before both there
    is a table of recent ones, one for each place, which is looked up without making an object of the topic. What is
    found there stays there until another topic takes its place, however often it is forgotten elsewhere: so at most
    RECENT more are remembered.
    """

    cdef:
        dict young
        dict old
        PyObject* recent[RECENT]  # routes, owned; NULL where there is none
        uint64_t installed
        readonly uint32_t limit

    def __init__(self, uint32_t limit=4096):
        self.limit = limit
        self.young = {}
        self.old = {}

    def install(self, str topic not None, Audience audience not None, bytes prefix not None, TopicLog log=None,
                Keeper keeper=None, retention=None):
        """Let publishes to `topic` go to `audience`, and be kept in `log`; or wait in `keeper` for a store, which goes
        by `retention`. `prefix` is the `event` message up to where `key` would stand."""
        cdef Route route = Route.__new__(Route)
        route.audience = audience
        route.topic = topic
        route.name = topic.encode()
        route.prefix = prefix
        route.log = log
        route.keeper = keeper
        route.is_kept = log is not None or keeper is not None
        route.retention = retention
        route.cache = <PyObject*> self
        self.installed += 1
        route.serial = self.installed
        route.of_audience.owner = <PyObject*> route
        append(&audience.routes, &route.of_audience)
        self.forget_recent(route.name)
        self.remember(route.name, route)

    def withdraw(self, str topic not None):
        """Forget one topic; the next publish to it goes to the session."""
        name = topic.encode()
        self.forget_recent(name)
        self.young.pop(name, None)
        self.old.pop(name, None)

    def withdraw_matching(self, str pattern not None):
        """Forget the topics that a pattern matches. It costs a comparison for each topic that is remembered."""
        cdef bytes name = pattern.encode()
        cdef PyObject* route
        cdef int place
        for place in range(RECENT):
            route = self.recent[place]
            if route != NULL and matches(name, (<Route> route).name):
                self.recent[place] = NULL
                Py_XDECREF(route)
        for routes in (self.young, self.old):
            for topic in [topic for topic in <dict> routes if matches(name, <bytes> topic)]:
                del (<dict> routes)[topic]

    def withdraw_filter(self, Filter filter not None):
        """Forget the topics of all audiences that a filter is a part of. It costs as much as there are such topics."""
        cdef Link* of_audience = filter.audiences.first
        cdef Link* of_route
        cdef AudienceBase audience
        cdef Route route
        cdef list topics = []
        while of_audience != NULL:
            audience = <AudienceBase> of_audience.owner
            of_audience = of_audience.next
            of_route = audience.routes.first
            while of_route != NULL:
                route = <Route> of_route.owner
                of_route = of_route.next
                if route.cache == <PyObject*> self:
                    topics.append(route.topic)
        for topic in topics:  # only now: to withdraw a route may free it, and others
            self.withdraw(topic)

    def clear(self):
        """Forget all."""
        self.forget_all_recent()
        self.young.clear()
        self.old.clear()

    def __len__(self):
        return len(self.young) + len(self.old)

    def __contains__(self, str topic not None):
        return self.find(topic.encode()) is not None

    def __dealloc__(self):
        self.forget_all_recent()

    cdef void forget_recent(self, bytes name) noexcept:
        """Empty the one place where this topic's route may stand."""
        cdef uint32_t place = recent_place(<const unsigned char*> PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
        cdef PyObject* route = self.recent[place]
        self.recent[place] = NULL
        Py_XDECREF(route)

    cdef void forget_all_recent(self) noexcept:
        cdef PyObject* route
        cdef int place
        for place in range(RECENT):
            route = self.recent[place]
            self.recent[place] = NULL
            Py_XDECREF(route)

    cdef Route look_up(self, const unsigned char* name, size_t size):
        """The route of a topic; None if there is none."""
        cdef uint32_t place = recent_place(name, size)
        cdef PyObject* known = self.recent[place]
        cdef Route route
        if known != NULL:
            route = <Route> known
            if <size_t> PyBytes_GET_SIZE(route.name) == size and memcmp(PyBytes_AS_STRING(route.name), name, size) == 0:
                return route
        route = self.find(PyBytes_FromStringAndSize(<char*> name, size))
        if route is not None:
            Py_INCREF(route)
            self.recent[place] = <PyObject*> route
            Py_XDECREF(known)
        return route

    cdef Route find(self, bytes name):
        cdef object route = self.young.get(name)
        if route is None:
            route = self.old.pop(name, None)
            if route is not None:
                self.remember(name, route)
        return <Route> route

    cdef int remember(self, bytes name, Route route) except -1:
        if len(self.young) >= self.limit:
            self.old = self.young
            self.young = {}
        self.young[name] = route
        return 0

    cdef bint publish(self, Writer connection, const unsigned char* data, size_t size, bint checked,
                      const Permits* permits) except -1:
        """Carry out a message if it is a plain publish command to a topic with a route; False leaves it to the session.

        Where `checked` is False and all of the message is ASCII, the scan has seen that.
        """
        cdef:
            Publish command
            Route route
            AudienceBase audience
            Receipt receipt
        if not scan_publish(data, size, connection.context.limits.max_depth, &command):
            return False
        if command.wide and not checked and not is_utf8(data, size):
            return False
        route = self.look_up(command.topic, command.topic_size)
        if route is None or (permits != NULL and permits.serials[route.serial & permits.mask] != route.serial):
            return False
        if route.is_kept:
            return publish_to_kept(self, route, &command, <Connection> connection)
        audience = route.audience
        prepare_members(audience)
        publish_command(route, &command, connection, &receipt)
        connection.context.fast_publishes += 1
        (<Connection> connection).mistakes = 0
        if command.id != NULL and is_open(&connection.outbox):
            answer_receipt(<Connection> connection, command.id, command.id_size, &receipt, None, 0)
        return True


ctypedef bint (*PublishToKept)(RouteCache, Route, const Publish*, Connection) except -1


cdef bint take_kept(RouteCache self, Route route, const Publish* command, Connection connection) except -1:
    """Carry out a publish to a topic that keeps its events, here or elsewhere; False leaves it to the session."""
    cdef Receipt receipt
    if route.keeper is not None:
        if command.id_size > MAX_ID or not keep_later(<Keeper> route.keeper, route, command, connection):
            return False
        connection.context.work += PUBLISH_WORK
    elif route.log.dropped:
        self.withdraw(route.topic)
        return False
    else:
        prepare_members(route.audience)
        publish_kept(route, command, connection, &receipt)
        if command.id != NULL and is_open(&connection.outbox):
            answer_receipt(connection, command.id, command.id_size, &receipt, route.log.epoch_text, route.log.top)
    connection.context.fast_publishes += 1
    connection.mistakes = 0
    return True


# By a pointer, so that the compiler leaves it out of the way of a plain publish: inlined, it would cost that 50
# instructions.
cdef PublishToKept publish_to_kept = take_kept
