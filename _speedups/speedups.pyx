# cython: language_level=3, boundscheck=True, wraparound=False, embedsignature=True, freethreading_compatible=False
"""The native data path of wsbroker: framing, masking, queues and fan-out.

One compiled unit, made of the files included below, in layers: each uses only names of the files above it (a test reads
them), and begins with its invariant. Nothing here imports anything of the package `broker`, or blocks. All of it
belongs to the one event loop; only senders.h has threads, which send what the loop waits for.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.unicode cimport PyUnicode_DecodeASCII
from cpython.ref cimport Py_DECREF, Py_INCREF, Py_XDECREF, PyObject
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, calloc, free, malloc, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset

from time import monotonic
from typing import Literal

# Containers.
include "list.pxi"

# Bytes, frames, messages.
include "mask.pxi"
include "utf8.pxi"
include "json.pxi"
include "command.pxi"
include "wire.pxi"
include "deflate.pxi"
include "frames.pxi"
include "request.pxi"

# Tools and tables.
include "clock.pxi"
include "memory.pxi"
include "patterns.pxi"
include "policies.pxi"
include "states.pxi"
include "threads.pxi"
include "loop_state.pxi"

# Queues. Nothing up to here, and up to `batch`, knows a socket.
include "queue.pxi"
include "log.pxi"
include "retention.pxi"
include "history.pxi"
include "subscription.pxi"
include "barrier.pxi"
include "queueing.pxi"
include "bounds.pxi"
include "latest.pxi"
include "replay.pxi"
include "block.pxi"
include "overflow.pxi"
include "audience.pxi"
include "batch.pxi"

# Sockets.
include "pieces.pxi"
include "writer.pxi"
include "senders.pxi"
include "flush.pxi"
include "timers.pxi"
include "reading.pxi"
include "connection.pxi"
include "keepalive.pxi"
include "context.pxi"

# What the node asks for.
include "delivery.pxi"
include "operations.pxi"
include "route.pxi"
include "keeper.pxi"
include "routes.pxi"
include "kept.pxi"
include "permits.pxi"
include "bucket.pxi"
include "intake.pxi"
