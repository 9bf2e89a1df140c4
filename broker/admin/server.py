"""The admin listener: health, metrics and sessions over HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from broker.admin.answers import NO_STORE, respond
from broker.admin.sessions import Sessions
from broker.config import Address
from broker.net.limiter import ADMIN_CONNECTIONS
from broker.net.listener import ACCEPT_RETRY_DELAY, UNIX_MODE, Acceptor, BaseListener, SocketAcceptor, describe_error
from broker.net.origin import Origins
from broker.node import Node

SPARE_FDS: Final = 4
"""Descriptors kept open to be released when the process has no others."""

KEEP_ALIVE: Final = 5.0
"""Seconds that an idle connection is kept."""

LIFETIME: Final = 60.0
"""Maximum age of a connection in seconds: nothing else closes a client that does not read its answer."""

OWN_PAGES: Final = Origins(())
"""The rule for origins: only the pages of the requested host itself."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger(__name__)


class Admin:
    """The admin listener.

    `unready_reason` gives the reason for not being ready, or None; `node` has the sessions. A connection over
    `max_connections` takes the place of the oldest one. A request takes milliseconds, so that one is stuck or idle, and
    no client can keep probes out.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        unready_reason: Callable[[], str | None],
        node: Node,
        max_connections: int = ADMIN_CONNECTIONS,
    ) -> None:
        self._registry = registry
        self._unready_reason = unready_reason
        self._sessions = Sessions(node)
        self._identities = node.identities
        self._max_connections = max_connections
        self.is_remote = False
        """Whether other machines can reach it. Set before it serves."""
        app = web.Application(middlewares=[_check_host, _check_origin, self._check_key])
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/v1/sessions", self._sessions.list),
                web.get("/v1/sessions/{id}", self._sessions.show),
            ]
        )
        app.on_response_prepare.append(_set_server_header)
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, keepalive_timeout=KEEP_ALIVE, shutdown_timeout=1.0
        )
        self._spare_fds: list[int] = []
        self._open: list[asyncio.Transport] = []
        """The connections, the oldest first; some of them may be closed."""
        self._serving: set[asyncio.Task[None]] = set()
        self._refilling: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Prepare to serve."""
        await self._runner.setup()
        self._refill_spare_fds()

    async def stop(self) -> None:
        """Close all connections."""
        if self._refilling is not None:
            self._refilling.cancel()
        for task in self._serving:
            task.cancel()
        await self._runner.cleanup()
        while self._spare_fds:
            os.close(self._spare_fds.pop())

    def handle(self, sock: socket.socket) -> None:
        """Serve an accepted connection."""
        server = self._runner.server
        if server is None:
            sock.close()
            return
        self._open = [transport for transport in self._open if not transport.is_closing()]
        if len(self._open) + len(self._serving) >= self._max_connections:
            if not self._open:
                sock.close()
                return
            self._open.pop(0).abort()
        task = asyncio.get_running_loop().create_task(self._serve(sock))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)  # also of a task that is cancelled before it begins

    def release_spare_fd(self) -> bool:
        """Close a spare descriptor, so that the process can open another. False if none is left."""
        if not self._spare_fds:
            return False
        os.close(self._spare_fds.pop())
        if self._refilling is None:
            self._refilling = asyncio.get_running_loop().call_later(ACCEPT_RETRY_DELAY, self._refill_spare_fds)
        return True

    async def _serve(self, sock: socket.socket) -> None:
        server = self._runner.server
        assert server is not None
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(server, sock)
            self._open.append(transport)
            task = asyncio.current_task()
            assert task is not None
            self._serving.discard(task)  # now, so that no connection is counted twice
            asyncio.get_running_loop().call_later(LIFETIME, transport.abort)
        except OSError as exc:
            log.debug("admin connection lost", reason=describe_error(exc))
            sock.close()

    def _refill_spare_fds(self) -> None:
        self._refilling = None
        try:
            while len(self._spare_fds) < SPARE_FDS:
                self._spare_fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._refilling = asyncio.get_running_loop().call_later(ACCEPT_RETRY_DELAY, self._refill_spare_fds)

    @web.middleware
    async def _check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Serve what tells of clients and topics to API keys with the role `admin` alone, as soon as there are any."""
        if request.path.startswith("/v1/"):
            values = request.headers.getall("Authorization", [])
            key = values[0][7:].strip() if len(values) == 1 and values[0][:7].lower() == "bearer " else None
            denied = self._identities.refuse_admin(key, remote=self.is_remote)
            if denied is not None:
                code = "unauthorized" if denied.status == 401 else "forbidden"
                answer = respond({"code": code, "message": denied.reason, "retry": False}, denied.status)
                if denied.status == 401:
                    answer.headers["WWW-Authenticate"] = 'Bearer realm="wsbroker"'
                return answer
        return await handler(request)

    async def _livez(self, request: web.Request) -> web.Response:
        return respond({"status": "alive"})

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = self._unready_reason()
        if reason is None:
            return respond({"status": "ready"})
        return respond({"status": "not ready", "reason": reason}, 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        try:
            # It repeats the version that it was asked for.
            encode, content_type = choose_encoder(accept if accept.isascii() else "")
        except (TypeError, ValueError):  # a version that is none
            encode, content_type = choose_encoder("")
        return web.Response(body=encode(self._registry), headers={**NO_STORE, "Content-Type": content_type})


@web.middleware
async def _check_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    """On loopback, serve /v1/ under loopback host names only. A web page whose own host name resolves to this machine
    would have the same origin, and could read the sessions (DNS rebinding)."""
    sockname = None if request.transport is None else request.transport.get_extra_info("sockname")
    here = isinstance(sockname, tuple) and Address(host=sockname[0]).local
    if here and request.path.startswith("/v1/") and not Address(host=_host_of(request)).local:
        raise web.HTTPMisdirectedRequest(text="the admin listener is on loopback, and has no other name\n")
    return await handler(request)


@web.middleware
async def _check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse /v1/ to pages of another origin. A browser sends some requests before it asks whether the page may."""
    origins = request.headers.getall("Origin", [])
    if origins and request.path.startswith("/v1/"):
        host = request.headers.get("Host", "")
        if any(OWN_PAGES.refusal(origin, host, loopback=False) is not None for origin in origins):
            raise web.HTTPForbidden(text="the admin listener is not for pages of another origin\n")
    return await handler(request)


def _host_of(request: web.Request) -> str:
    host = request.headers.get("Host", "localhost")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _set_server_header(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "wsbroker"  # and not the versions of everything


class AdminListener(BaseListener):
    """One address of the admin listener."""

    def __init__(self, admin: Admin, *, unix_mode: int = UNIX_MODE, unix_group: int | None = None) -> None:
        super().__init__(unix_mode=unix_mode, unix_group=unix_group)
        self._admin = admin

    def _make_acceptor(self, sock: socket.socket) -> Acceptor:
        return AdminAcceptor(self._admin, sock)


class AdminAcceptor(SocketAcceptor):
    """Accepts even when the process has no descriptors left, by releasing a spare one."""

    def __init__(self, admin: Admin, sock: socket.socket) -> None:
        super().__init__(sock)
        self._admin = admin

    def handle(self, sock: socket.socket) -> None:
        """Serve an accepted connection."""
        self._admin.handle(sock)

    def release_spare_fd(self) -> bool:
        """Release one of the spare descriptors."""
        return self._admin.release_spare_fd()
