# The fast path for connections whose rights are limited: a route may be used where the slow path has found the right.
#
# Invariant: clients with equal rights share one table. It remembers serials of routes: a route that is withdrawn and
# installed again has another one, so nothing has to be withdrawn here. A change of rights is another table.

cdef enum:
    FEWEST_PERMITS = 16
    MOST_PERMITS = 4096  # as many as there are places in the table of recent routes


@cython.final
cdef class PermittedRoutes(FastPath):
    """The routes of `routes` to topics for which `permit` was called since they were installed."""

    cdef:
        readonly RouteCache routes
        Permits permits
        uint32_t count  # of `permit` since the table has grown

    def __cinit__(self, RouteCache routes not None):
        self.routes = routes
        self.permits.serials = <uint64_t*> calloc(FEWEST_PERMITS, sizeof(uint64_t))
        if self.permits.serials == NULL:
            raise MemoryError
        self.permits.mask = FEWEST_PERMITS - 1

    def __dealloc__(self):
        free(self.permits.serials)

    def permit(self, str topic not None):
        """Say that a publish to this topic is allowed to these clients. Without a route to it, this does nothing."""
        cdef Route route = self.routes.find(topic.encode())
        if route is None or self.permits.serials[route.serial & self.permits.mask] == route.serial:
            return
        self.count += 1
        if self.count > self.permits.mask // 2 and self.permits.mask < MOST_PERMITS - 1:
            self.grow()
        self.permits.serials[route.serial & self.permits.mask] = route.serial

    cdef int grow(self) except -1:
        cdef uint32_t mask = 4 * self.permits.mask + 3, place
        cdef uint64_t* serials = <uint64_t*> calloc(mask + 1, sizeof(uint64_t))
        if serials == NULL:
            raise MemoryError
        for place in range(self.permits.mask + 1):
            if self.permits.serials[place]:
                serials[self.permits.serials[place] & mask] = self.permits.serials[place]
        free(self.permits.serials)
        self.permits.serials = serials
        self.permits.mask = mask
        self.count = 0
        return 0

    cdef bint publish(self, Writer connection, const unsigned char* data, size_t size, bint checked,
                      const Permits* permits) except -1:
        """As that of the routes; False, which leaves it to the session, where no permit is known."""
        return self.routes.publish(connection, data, size, checked, &self.permits)
