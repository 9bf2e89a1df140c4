# The two containers of the data path: an intrusive, doubly linked list, and an array that grows.
#
# Invariant: a list owns nothing, but for `LoopState.dirty_audiences`. An object that has a Link takes it out of its
# list before it goes.


cdef struct Link:
    # A place in a List, as a part of what is listed. In no list `next` and `previous` are NULL.
    Link* next
    Link* previous
    PyObject* owner  # borrowed: the object that this link is a part of


cdef struct List:
    Link* first
    Link* last


cdef inline bint is_linked(List* list, Link* link) noexcept:
    return link.previous != NULL or list.first == link


cdef inline void append(List* list, Link* link) noexcept:
    """Put a link that is in no list at the end."""
    link.next = NULL
    link.previous = list.last
    if list.last != NULL:
        list.last.next = link
    else:
        list.first = link
    list.last = link


cdef inline void prepend(List* list, Link* link) noexcept:
    """Put a link that is in no list at the beginning."""
    link.previous = NULL
    link.next = list.first
    if list.first != NULL:
        list.first.previous = link
    else:
        list.last = link
    list.first = link


cdef inline void remove(List* list, Link* link) noexcept:
    """Take a link out of the list. Does nothing if the link is in no list; it must not be in another one."""
    if not is_linked(list, link):
        return
    if link.previous != NULL:
        link.previous.next = link.next
    else:
        list.first = link.next
    if link.next != NULL:
        link.next.previous = link.previous
    else:
        list.last = link.previous
    link.next = link.previous = NULL


cdef struct Array:
    # Bytes that grow. `size` of them are in use; there is room for `room`.
    unsigned char* data
    size_t size
    size_t room


cdef inline unsigned char* reserve(Array* array, size_t more, size_t least) except NULL:
    """Make room for `more` bytes, at least one, behind those in use, and return where. The caller adds to `size`.

    The room doubles, from `least` on. Raises MemoryError; the array is then as it was.
    """
    if array.size + more > array.room:
        grow(array, array.size + more, max(least, 2 * array.room))
    return array.data + array.size


cdef int grow(Array* array, size_t least, size_t wanted) except -1:
    """Give the array room for `wanted` bytes, or for `least` if that is more."""
    cdef size_t room = max(max(least, wanted), <size_t> 1)
    cdef unsigned char* grown = <unsigned char*> realloc(array.data, room)
    if grown == NULL:
        raise MemoryError
    array.data = grown
    array.room = room
    return 0


cdef inline void release(Array* array) noexcept:
    """Free what the array holds; it is then empty."""
    free(array.data)
    array.data = NULL
    array.size = array.room = 0
