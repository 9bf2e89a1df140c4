"""Plain HTTP for operators and their programs: health and metrics."""

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

from broker.admin.sessions import NO_STORE, Sessions
from broker.config import Address
from broker.net.limiter import ADMIN
from broker.net.listener import PAUSE, Accepting, Acceptor, Port, why
from broker.node import Node

SPARE: Final = 4
"""Descriptors that are kept for times when there are no others."""

KEEP_ALIVE: Final = 5.0
"""Seconds that a connection without a request is kept."""

LIFETIME: Final = 60.0
"""Seconds that a connection is kept at all: of who asks and does not read the answer nothing else would be the end."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger(__name__)


class Admin:
    """The admin listener.

    `unready` says why the broker takes no clients, or None if it does; `node` knows the clients. Of more than `most`
    connections at one time the surplus ones are closed.
    """

    def __init__(
        self, registry: CollectorRegistry, unready: Callable[[], str | None], node: Node, most: int = ADMIN
    ) -> None:
        self._registry = registry
        self._unready = unready
        self._sessions = Sessions(node)
        self._most = most
        app = web.Application(middlewares=[_by_its_own_name])
        app.add_routes(
            [
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/v1/sessions", self._sessions.list),
                web.get("/v1/sessions/{id}", self._sessions.show),
            ]
        )
        app.on_response_prepare.append(_name_server)
        self._runner = web.AppRunner(
            app, handle_signals=False, access_log=None, keepalive_timeout=KEEP_ALIVE, shutdown_timeout=1.0
        )
        self._spare: list[int] = []
        self._serving: set[asyncio.Task[None]] = set()
        self._refilling: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Get ready to serve."""
        await self._runner.setup()
        self._refill()

    async def stop(self) -> None:
        """Close all connections."""
        if self._refilling is not None:
            self._refilling.cancel()
        for task in self._serving:
            task.cancel()
        await self._runner.cleanup()
        while self._spare:
            os.close(self._spare.pop())

    def take(self, sock: socket.socket) -> None:
        """Serve an accepted connection."""
        server = self._runner.server
        if server is None or len(server.connections) + len(self._serving) >= self._most:
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(self._take(sock))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def give_up_one(self) -> bool:
        """Give a descriptor back to the system. False if there is none to spare."""
        if not self._spare:
            return False
        os.close(self._spare.pop())
        if self._refilling is None:
            self._refilling = asyncio.get_running_loop().call_later(PAUSE, self._refill)
        return True

    async def _take(self, sock: socket.socket) -> None:
        server = self._runner.server
        assert server is not None
        try:
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(server, sock)
            asyncio.get_running_loop().call_later(LIFETIME, transport.abort)
        except OSError as exc:
            log.debug("admin connection lost", reason=why(exc))
            sock.close()

    def _refill(self) -> None:
        self._refilling = None
        try:
            while len(self._spare) < SPARE:
                self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            self._refilling = asyncio.get_running_loop().call_later(PAUSE, self._refill)

    async def _livez(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"}, headers=NO_STORE)

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = self._unready()
        if reason is None:
            return web.json_response({"status": "ready"}, headers=NO_STORE)
        return web.json_response({"status": "not ready", "reason": reason}, status=503, headers=NO_STORE)

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={**NO_STORE, "Content-Type": content_type})


@web.middleware
async def _by_its_own_name(request: web.Request, handler: Handler) -> web.StreamResponse:
    """On loopback, tell who is connected under a name of loopback only: a page of anybody's whose name was pointed at
    this machine would be of the same origin, and could read it (DNS rebinding)."""
    name = None if request.transport is None else request.transport.get_extra_info("sockname")
    here = isinstance(name, tuple) and Address(host=name[0]).local
    if here and request.path.startswith("/v1/") and not Address(host=_host_of(request)).local:
        raise web.HTTPMisdirectedRequest(text="the admin listener is on loopback, and has no other name\n")
    return await handler(request)


def _host_of(request: web.Request) -> str:
    host = request.headers.get("Host", "localhost")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "wsbroker"  # and not the versions of everything


class AdminPort(Port):
    """One address of the admin listener."""

    def __init__(self, admin: Admin) -> None:
        super().__init__()
        self._admin = admin

    def _entrance(self, sock: socket.socket) -> Accepting:
        return AdminEntrance(self._admin, sock)


class AdminEntrance(Acceptor):
    """A bound socket that accepts also when the process has no descriptors left: there are some to spare."""

    def __init__(self, admin: Admin, sock: socket.socket) -> None:
        super().__init__(sock)
        self._admin = admin

    def take(self, sock: socket.socket) -> None:
        """Serve it."""
        self._admin.take(sock)

    def spare(self) -> bool:
        """Give up one that was kept for this."""
        return self._admin.give_up_one()
