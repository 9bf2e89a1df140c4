# How much one connection may publish: a bucket of tokens, which fills up with time.
#
# Invariant: only connections with a limit have one. Their routes are in the bucket, and not in the connection, so
# that the fast path of all others needs no check.


@cython.final
cdef class TokenBucket(FastPath):
    """`rate` events a second on the average, `burst` at once. `routes` are those of the connection, or None."""

    cdef:
        public FastPath routes
        readonly double rate
        readonly double burst
        double tokens
        double filled  # when tokens were last added, by `exact_time`: who waits as long as it was told is not refused

    def __init__(self, double rate, double burst, FastPath routes=None):
        if not rate > 0 or not burst >= 1:
            raise ValueError("a rate is positive, and a burst holds one event at least")
        self.rate = rate
        self.burst = burst
        self.routes = routes
        self.tokens = burst
        self.filled = exact_time()

    def change(self, double rate, double burst):
        """Let it be so much from now on. What was left stays, up to the new burst."""
        if not rate > 0 or not burst >= 1:
            raise ValueError("a rate is positive, and a burst holds one event at least")
        self.fill()
        self.rate = rate
        self.burst = burst
        self.tokens = min(self.tokens, burst)

    cdef bint fill(self):
        """Add what has come with time. Returns whether there is a token."""
        cdef double now = exact_time()
        self.tokens = min(self.burst, self.tokens + (now - self.filled) * self.rate)
        self.filled = now
        return self.tokens >= 1

    def take(self):
        """Take one token. Returns 0 if there was one, else after how many seconds there will be one."""
        if self.fill():
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) / self.rate

    cdef bint publish(self, Writer connection, const unsigned char* data, size_t size, bint checked,
                      const Permits* permits) except -1:
        """As that of the routes. Without a token the session refuses the publish."""
        cdef bint published
        if self.routes is None or not self.fill():
            return False
        published = self.routes.publish(connection, data, size, checked, permits)
        self.tokens -= published
        return published
