# How much one connection may send: two buckets, of commands and of bytes, which fill up with time.
#
# Invariant: only connections with a limit have one. It stands before their routes, so that the fast path of all others
# needs no check.


@cython.final
cdef class IntakeLimit(FastPath):
    """`command_rate` commands and `byte_rate` bytes a second on the average, the bursts at once. 0: no limit.

    `path` is what carries out plain publishes, or None.
    """

    cdef:
        public FastPath path
        public int refused  # how many in a row were refused; kept by the session
        readonly double command_rate
        readonly double command_burst
        readonly double byte_rate
        readonly double byte_burst
        double commands
        double bytes  # below 0 after a message that is larger than what was left
        double filled  # when both were last filled, by `exact_time`

    def __init__(self, double command_rate, double command_burst, double byte_rate, double byte_burst):
        self.change(command_rate, command_burst, byte_rate, byte_burst)
        self.commands = command_burst
        self.bytes = byte_burst
        self.filled = exact_time()

    def change(self, double command_rate, double command_burst, double byte_rate, double byte_burst):
        """Let it be so much from now on. What was left stays, up to the new bursts."""
        if not (command_rate >= 0 and byte_rate >= 0 and command_burst >= 1 and byte_burst >= 1):
            raise ValueError("a rate is not negative, and a burst holds one at least")
        self.command_rate = command_rate
        self.command_burst = command_burst
        self.byte_rate = byte_rate
        self.byte_burst = byte_burst

    cdef bint fill(self):
        """Add what has come with time. Returns whether one more message may come."""
        cdef double now = exact_time()
        cdef double passed = now - self.filled
        self.commands = min(self.command_burst, self.commands + passed * self.command_rate)
        self.bytes = min(self.byte_burst, self.bytes + passed * self.byte_rate)
        self.filled = now
        return (self.commands >= 1 or self.command_rate == 0) and (self.bytes > 0 or self.byte_rate == 0)

    def take(self, size_t size):
        """Take a command of this many bytes. Returns 0 if it may come, else after how many seconds one may."""
        cdef double wait = 0
        if self.fill():
            self.commands -= 1
            self.bytes -= size
            return 0.0
        if self.command_rate > 0 and self.commands < 1:
            wait = (1 - self.commands) / self.command_rate
        if self.byte_rate > 0 and self.bytes <= 0:
            wait = max(wait, (1 - self.bytes) / self.byte_rate)
        return wait

    cdef bint publish(self, Writer connection, const unsigned char* data, size_t size, bint checked,
                      const Permits* permits) except -1:
        """As that of the path. Beyond the limit the session refuses the command."""
        if self.path is None or not self.fill() or not self.path.publish(connection, data, size, checked, permits):
            return False
        self.commands -= 1
        self.bytes -= size
        self.refused = 0
        return True
