# Decides whether a message is a plain publish command: known fields, each once, without escapes outside of `data`.
#
# Invariant: what it takes is valid JSON (json.pxi), and the session would read the same command from it. What it does
# not take is left to the session.


cdef struct Publish:
    # A publish command, as spans of the message that holds it. Strings are without their quotes, `id` is as written.
    const unsigned char* topic
    const unsigned char* data
    const unsigned char* key
    const unsigned char* id
    size_t topic_size
    size_t data_size
    size_t key_size
    size_t id_size
    int wide  # 0 if all of it is ASCII


cdef bint is_plain_id(const unsigned char* p, size_t size) noexcept nogil:
    """Whether this value is an id that can be written back as it stands: digits, or ASCII without escapes."""
    cdef size_t i
    if p[0] == 0x22:
        if size > 2 + 64:
            return False
        for i in range(1, size - 1):
            if p[i] >= 0x80 or p[i] == 0x5C:
                return False
        return True
    if size > 15:  # 2^53-1 has 16 digits: what is near it is left to the slow path
        return False
    for i in range(size):
        if not 0x30 <= p[i] <= 0x39:
            return False
    return True


cdef inline bint take_field(Publish* out, const unsigned char* name, size_t name_size, const unsigned char* value,
                            size_t value_size, bint escaped, bint* is_publish) noexcept nogil:
    """Note one field of the command. False: it is not a field of a plain publish, or there for the second time."""
    if name_size == 4 and memcmp(name, b"data", 4) == 0:
        if out.data != NULL:
            return False
        out.data = value
        out.data_size = value_size
        return True
    if escaped:
        return False
    if name_size == 2 and memcmp(name, b"op", 2) == 0:
        if is_publish[0] or value_size != 9 or memcmp(value, b'"publish"', 9) != 0:
            return False
        is_publish[0] = True
        return True
    if name_size == 2 and memcmp(name, b"id", 2) == 0:
        if out.id != NULL or not is_plain_id(value, value_size):
            return False
        out.id = value
        out.id_size = value_size
        return True
    if value[0] != 0x22:
        return False
    if name_size == 5 and memcmp(name, b"topic", 5) == 0:
        if out.topic != NULL:
            return False
        out.topic = value + 1
        out.topic_size = value_size - 2
        return True
    if name_size == 3 and memcmp(name, b"key", 3) == 0 and out.key == NULL:
        out.key = value + 1
        out.key_size = value_size - 2
        return True
    return False


cdef bint scan_publish(const unsigned char* p, size_t size, int depth, Publish* out) noexcept nogil:
    """Whether a message is a plain publish command. False says nothing about it but that the session has to look."""
    cdef:
        Scan scan
        const unsigned char* end = p + size
        const unsigned char* name
        const unsigned char* value
        size_t name_size
        bint is_publish = False
    memset(out, 0, sizeof(Publish))
    scan.end = end
    scan.wide = 0
    scan.escaped = scan.too_deep = False
    if size > 25 and memcmp(p, b'{"op":"publish","topic":"', 25) == 0:
        # How nearly every client begins: what follows would find the same, in three times as many steps.
        is_publish = True
        out.topic = p + 25
        p = skip_string(&scan, out.topic)
        if p == NULL or scan.escaped or p == end or p[0] != 0x2C:
            return False
        out.topic_size = p - out.topic - 1
    else:
        p = skip_space(p, end)
        if p == end or p[0] != 0x7B:
            return False
    while True:
        p = skip_space(p + 1, end)
        if p == end or p[0] != 0x22:
            return False
        name = p + 1
        scan.escaped = False
        p = skip_string(&scan, name)
        if p == NULL or scan.escaped:
            return False
        name_size = p - name - 1
        p = skip_space(p, end)
        if p == end or p[0] != 0x3A:
            return False
        value = skip_space(p + 1, end)
        if value < end and value[0] == 0x22:
            p = skip_string(&scan, value + 1)
        else:
            p = skip_value(&scan, value, depth - 1)
        if p == NULL or not take_field(out, name, name_size, value, p - value, scan.escaped, &is_publish):
            return False
        p = skip_space(p, end)
        if p == end:
            return False
        if p[0] == 0x2C:
            continue
        if p[0] != 0x7D or skip_space(p + 1, end) != end:
            return False
        out.wide = scan.wide
        return is_publish and out.topic != NULL and out.data != NULL
