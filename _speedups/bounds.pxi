# The bounds of a queue: how many events, and how many bytes of the whole connection.
#
# Invariant: for a subscription that is held (BARRIER, NO_CREDIT) all queued bytes of the connection count. For any
# other one the bytes of held subscriptions do not count.


cdef inline size_t count_bytes(SubscriptionBase self) noexcept:
    """The queued bytes of the connection that count against this subscription."""
    return self.outbox.bytes if is_held(self) else self.outbox.bytes - self.outbox.held_bytes


cdef inline bint has_too_many_bytes(SubscriptionBase self, size_t size):
    """Whether `size` bytes more would break the bound of the connection."""
    return count_bytes(self) + size > (<LoopState> self.outbox.context).limits.max_outbox


cdef inline bint is_free(SubscriptionBase self) noexcept:
    """Whether what is queued only waits for the end of this turn: the socket may take all of it."""
    return not self.outbox.socket_full and not self.outbox.writing and not is_held(self)


cdef inline bint is_full(SubscriptionBase self, size_t size):
    """Whether one more event of `size` bytes would break a bound: the subscription's, or its connection's.

    An event that alone is larger than the connection's bound may wait for the end of this turn, as it may in a batch.
    """
    if self.queue.count >= self.max_queue:
        return True
    return has_too_many_bytes(self, size) and (not is_free(self) or count_bytes(self) != 0)


cdef inline bint never_fits(SubscriptionBase self, size_t size):
    """Whether there would be no room for `size` bytes though all went that this subscription has queued."""
    return has_too_many_bytes(self, size - self.queue.bytes)
