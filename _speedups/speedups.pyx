# cython: language_level=3, boundscheck=True, wraparound=False, embedsignature=True, freethreading_compatible=False
"""The native data path of wsbroker: framing, masking, outboxes and fan-out.

One compiled unit, made of the rooms included below; each begins with the law that it keeps. Nothing here imports
anything of the package `broker`, or blocks, or starts a thread. All of it belongs to the one event loop.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove, memset

from time import monotonic


# These classes know each other; each is defined in the room that bears its noun.
cdef class Event
cdef class Subscription
cdef class Filter
cdef class Audience
cdef class LoopContext
cdef class Hold
cdef class RouteCache
cdef class TokenBucket

include "mask.pxi"
include "utf8.pxi"
include "frames.pxi"

cdef class Connection(Frames)

include "json.pxi"
include "outbox.pxi"
include "policies.pxi"
include "fanout.pxi"
include "deflate.pxi"
include "context.pxi"
include "connection.pxi"
include "routes.pxi"
include "bucket.pxi"
