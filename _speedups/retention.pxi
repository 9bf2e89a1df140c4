# What of a log is kept: so many events, of that age, with so many bytes; on a compacted topic the newest of each key.
#
# Invariant: whatever is dropped before a newer event of its key has superseded it counts in `floor`. On a compacted
# topic `newest` has the offset of the event that is kept of each key.


cdef int settle_append(LogBase self, Kept* entry, bytes key) except -1:
    """Go by the retention, now that the sizes in the newest entry are known. `key`: of a compacted topic, or None."""
    self.bytes += entry.data_size + entry.key_size
    if self.retained.compact and key is not None:
        supersede(self, key, entry.offset)
    trim(self, entry.published)
    return 0


cdef int supersede(LogBase self, bytes key, uint64_t offset) except -1:
    """The event with this offset is the newest of its key: the one before it goes."""
    cdef uint32_t index
    cdef object before = self.newest.get(key)
    self.newest[key] = offset
    if before is None:
        return 0
    index = find_entry(self, before)
    if index < self.span and kept_at(self, index).offset == <uint64_t> before:
        forget_entry(self, kept_at(self, index))
        trim_kept_holes(self)
    return 0


cdef int drop_kept(LogBase self, uint32_t entries) except -1:
    """Drop so many of the oldest entries; those that no newer one superseded are missing from now on."""
    cdef Kept* entry
    while entries and self.span:
        entry = kept_at(self, 0)
        if not is_hole(entry):
            self.floor = entry.offset
            drop_key(self, entry)
            forget_entry(self, entry)
        self.first = (self.first + 1) & (self.room - 1)
        self.span -= 1
        entries -= 1
    trim_kept_holes(self)
    return 0


cdef int drop_key(LogBase self, Kept* entry) except -1:
    """Forget the key of an event that is dropped."""
    cdef object key
    if self.newest is None:
        return 0
    key = key_of(entry)
    if key is not None and self.newest.get(key) == entry.offset:
        del self.newest[key]
    return 0


cdef int trim(LogBase self, uint64_t now) except -1:
    """Drop what the retention does not keep any more. The newest event may be longer than all that is allowed."""
    cdef const Retained* retained = &self.retained
    cdef Kept* oldest
    while self.span:
        oldest = kept_at(self, 0)
        if not is_hole(oldest) and not (
                self.count > retained.events
                or retained.age and oldest.published + retained.age <= now
                or retained.bytes and self.bytes > retained.bytes and self.count > 1):
            return 0
        drop_kept(self, 1)
    return 0


cdef int drop_tombstones(LogBase self, uint64_t now) except -1:
    """Drop the removals of keys that have been kept for long enough. It looks at each entry."""
    cdef uint32_t i
    cdef Kept* entry
    if self.retained.tombstone_age == 0:
        return 0
    for i in range(self.span):
        entry = kept_at(self, i)
        if entry.tombstone and not is_hole(entry) and entry.published + self.retained.tombstone_age <= now:
            self.floor = max(self.floor, entry.offset)
            drop_key(self, entry)
            forget_entry(self, entry)
    trim_kept_holes(self)
    return 0


cdef int begin_compaction(LogBase self) except -1:
    """The topic is compacted from now on: keep only the newest event of each key."""
    cdef uint32_t i
    cdef Kept* entry
    cdef object key
    self.newest = {}
    for i in range(self.span):
        entry = kept_at(self, i)
        key = None if is_hole(entry) else key_of(entry)
        if key is not None:
            before = self.newest.get(key)
            self.newest[key] = entry.offset
            if before is not None:
                forget_entry(self, kept_at(self, find_entry(self, before)))
    trim_kept_holes(self)
    return 0
