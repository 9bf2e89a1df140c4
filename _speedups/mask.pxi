# Masking (RFC 6455, section 5.3): payload byte i is XORed with key byte i mod 4.
#
# Invariant: `apply_mask` works on any alignment and may start anywhere in the payload, so that a frame can
# be unmasked piece by piece as it arrives.


cdef void apply_mask(unsigned char* data, size_t size, const unsigned char* key, size_t offset) noexcept nogil:
    """XOR `size` bytes in place; `offset` is how far into the payload `data` begins."""
    cdef:
        unsigned char rotated[8]
        uint64_t key64, word
        size_t i
    for i in range(8):
        rotated[i] = key[(offset + i) & 3]
    memcpy(&key64, rotated, 8)
    i = 0
    # memcpy of eight bytes is one unaligned load or store; the compiler makes wide vectors of this loop.
    while i + 8 <= size:
        memcpy(&word, data + i, 8)
        word ^= key64
        memcpy(data + i, &word, 8)
        i += 8
    while i < size:
        data[i] ^= rotated[i & 7]
        i += 1


def mask(data not None, bytes key not None, size_t offset=0):
    """Return `data` masked, or unmasked, with the four bytes of `key` (RFC 6455, section 5.3).

    `data` is any bytes-like object, `offset` the position of its first byte in the payload.
    Raises ValueError if `key` is not four bytes long.
    """
    if len(key) != 4:
        raise ValueError("a masking key has 4 bytes")
    cdef bytearray copy = bytearray(memoryview(data))
    apply_mask(<unsigned char*> PyByteArray_AS_STRING(copy), len(copy), <const unsigned char*> PyBytes_AS_STRING(key),
               offset)
    return bytes(copy)
