"""A small broker by docs/protocol.md, with what the real one does not have yet: history, presence, `dedup`, tokens.

It is for the tests of both clients: on real sockets, slow and simple. Nothing is ever dropped here but by the test. As
a program (`python -m tests.client.model`) it serves the tests of the JavaScript client, which steer it by publishing to
`$test.…`: what they may ask for is in `Broker.steer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from broker.topics import matches, overlap, rank

Message = dict[str, Any]


class Topic:
    """A topic with history: `kept` are its newest events, offsets count from 1."""

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.top = 0
        self.kept: deque[Message] = deque()
        self.dedups: dict[str, int] = {}


class Subscription:
    """A subscription of one connection: what waits for credit, in order."""

    def __init__(self, options: Message) -> None:
        self.options = options
        self.credit: int | None = options.get("credit")
        self.waiting: deque[Message] = deque()
        self.barrier: dict[Subscription, int] = {}
        """How many events of which broader subscriptions must be sent before those of this one."""


class Peer:
    """One connection."""

    def __init__(self, connection: ServerConnection, session: str) -> None:
        self.connection = connection
        self.session = session
        self.identity: str | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self.out: deque[Message] = deque()

    def send(self, message: Message) -> None:
        self.out.append(message)

    def deliver(self, topic: str, message: Message) -> None:
        """Send under a subscription, in order, as far as its credit goes."""
        subscription = self.subscriptions[topic]
        subscription.waiting.append(message)
        self.pump(subscription)

    def pump(self, subscription: Subscription) -> None:
        while subscription.waiting:
            if any(subscription.barrier.values()):
                return
            if subscription.waiting[0]["op"] == "event" and subscription.credit is not None:
                if subscription.credit == 0:
                    return
                subscription.credit -= 1
            self.send(subscription.waiting.popleft())
            for each in self.subscriptions.values():
                if each.barrier.get(subscription, 0) > 0:
                    each.barrier[subscription] -= 1
                    self.pump(each)

    async def flush(self) -> None:
        while self.out:
            await self.connection.send(json.dumps(self.out.popleft(), separators=(",", ":")))


class Broker:
    """All of it. Topics that begin with `h.` keep history (`keep` events each), those with `p.` have presence."""

    def __init__(self) -> None:
        self.url = ""
        self.keep = 100
        self.topics: dict[str, Topic] = {}
        self.peers: list[Peer] = []
        self.received: list[Message] = []
        self.tokens: list[str | None] = []
        self.valid_tokens: set[str] | None = None
        self.expires_in: float | None = None
        self.refuse: dict[str, list[Message]] = defaultdict(list)
        """For an op, the errors that the next commands get instead of being carried out."""
        self.swallow: set[str] = set()
        """Ops that are carried out and not answered."""
        self.ping = 25.0
        self.max_size = 65_536
        self.sessions = itertools.count(1)
        self.epochs = itertools.count(1)
        self.server: Server | None = None
        self.connected = asyncio.Condition()

    # A connection

    def process_request(self, connection: ServerConnection, request: Request) -> Response | None:
        header = request.headers.get("Authorization", "")
        offered = [entry.strip() for entry in request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        shown = [entry.removeprefix("bearer.") for entry in offered if entry.startswith("bearer.")]
        token = header.removeprefix("Bearer ") or next(iter(shown), None)
        self.tokens.append(token)
        if token is not None and self.valid_tokens is not None and token not in self.valid_tokens:
            return connection.respond(HTTPStatus.UNAUTHORIZED, "the token does not verify")
        return None

    async def handle(self, connection: ServerConnection) -> None:
        peer = Peer(connection, f"s{next(self.sessions)}")
        self.peers.append(peer)
        welcome = {"op": "welcome", "version": 1, "session": peer.session, "server": "model", "ping": self.ping}
        if self.expires_in is not None:
            welcome["expires_in"] = self.expires_in
        peer.send({**welcome, "max_size": self.max_size, "max_queue": 256})
        try:
            await peer.flush()
            async with self.connected:
                self.connected.notify_all()
            async for text in connection:
                command = json.loads(text)
                self.received.append(command)
                answer = self.carry_out(peer, command)
                steered = str(command.get("topic")).startswith("$test.")
                if answer is not None and "id" in command and (steered or command["op"] not in self.swallow):
                    peer.out.appendleft({"id": command["id"], **answer})
                for each in list(self.peers):
                    with contextlib.suppress(ConnectionClosed):
                        await each.flush()
        except ConnectionClosed:
            pass
        finally:
            if peer in self.peers:
                self.peers.remove(peer)
            for topic in list(peer.subscriptions):
                self.left(peer, topic)
            for each in list(self.peers):
                with contextlib.suppress(ConnectionClosed):
                    await each.flush()

    def carry_out(self, peer: Peer, command: Message) -> Message | None:
        op = command["op"]
        if self.refuse[op]:
            return {"op": "error", "message": "so the test wants it", "retry": False, **self.refuse[op].pop(0)}
        handler = getattr(self, f"do_{op}", None)
        if handler is None:
            return {"op": "error", "code": "bad_command", "message": op, "retry": False}
        answer: Message = handler(peer, command)
        return answer

    # Commands

    def do_ping(self, _peer: Peer, _command: Message) -> Message:
        return {"op": "pong"}

    def do_auth(self, peer: Peer, command: Message) -> Message:
        self.tokens.append(command["token"])
        if self.valid_tokens is not None and command["token"] not in self.valid_tokens:
            return error("unauthorized")
        peer.identity = command["token"]
        answer = {"op": "ok", "identity": command["token"]}
        return answer if self.expires_in is None else {**answer, "expires_in": self.expires_in}

    def do_subscribe(self, peer: Peer, command: Message) -> Message:
        name = command["topic"]
        if (old := peer.subscriptions.get(name)) is not None:
            old.options = {**old.options, **command}
            old.credit = command.get("credit", old.credit)
            peer.pump(old)
            return {"op": "ok", "topic": name}
        subscription = peer.subscriptions[name] = Subscription(command)
        for broader, each in peer.subscriptions.items():
            if rank(broader) > rank(name) and overlap(broader, name):
                subscription.barrier[each] = len(each.waiting)
        answer: Message = {"op": "ok", "topic": name}
        replay: list[Message] = []
        if "since" in command or "last" in command:
            if not name.startswith("h.") or "*" in name:
                del peer.subscriptions[name]
                return error("no_history" if "*" not in name else "bad_command")
            replay = self.replay(name, command, answer)
        elif name.startswith("h.") and "*" not in name and ">" not in name:
            topic = self.topic(name)
            answer |= {"epoch": topic.epoch, "offset": topic.top}
        subscription.waiting.extend(replay)
        peer.pump(subscription)  # the answer goes before it: see `handle`
        if name.startswith("p."):
            self.tell_presence("join", peer, name)
        return answer

    def replay(self, name: str, command: Message, answer: Message) -> list[Message]:
        """What `since` or `last` brings: a gap where history does not reach, events, `live`."""
        topic = self.topic(name)
        answer |= {"epoch": topic.epoch, "offset": topic.top}
        messages: list[Message] = []
        first = topic.top - len(topic.kept) + 1
        if "since" in command:
            since = command["since"]
            start = since["offset"] + 1
            answer["recovered"] = since["epoch"] == topic.epoch and start >= first
            if since["epoch"] != topic.epoch:
                start = first
                messages.append({"op": "gap", "topic": name, "missed": None, "reason": "epoch"})
            elif start < first:
                missed = first - start
                gap = {
                    "op": "gap",
                    "topic": name,
                    "missed": missed,
                    "reason": "expired",
                    "from": start,
                    "to": first - 1,
                }
                messages.append(gap)
                start = first
        else:
            start = first if command["last"] == "all" else max(first, topic.top - command["last"] + 1)
        messages += [event for event in topic.kept if event["offset"] >= start]
        messages.append({"op": "live", "topic": name, "offset": topic.top})
        return messages

    def do_unsubscribe(self, peer: Peer, command: Message) -> Message:
        if command["topic"] not in peer.subscriptions:
            return error("not_subscribed")
        self.left(peer, command["topic"])
        return {"op": "ok", "topic": command["topic"]}

    def left(self, peer: Peer, topic: str) -> None:
        ended = peer.subscriptions.pop(topic)
        for each in peer.subscriptions.values():
            if each.barrier.pop(ended, 0):
                peer.pump(each)
        if topic.startswith("p."):
            self.tell_presence("leave", peer, topic)

    def do_credit(self, peer: Peer, command: Message) -> Message:
        subscription = peer.subscriptions.get(command["topic"])
        if subscription is None:
            return error("not_subscribed")
        subscription.credit = (subscription.credit or 0) + command["add"]
        peer.pump(subscription)
        return {"op": "ok", "topic": command["topic"]}

    def do_publish(self, peer: Peer, command: Message) -> Message:
        name = command["topic"]
        if name.startswith("$test."):
            return self.steer(peer, name.removeprefix("$test."), command["data"])
        event: Message = {"op": "event", "topic": name}
        if "key" in command:
            event["key"] = command["key"]
        event["data"] = command["data"]
        answer: Message = {"op": "ok", "receivers": 0, "queued": 0, "dropped": 0}
        # Dedups are kept on every topic, as the protocol says.
        topic = self.topic(name)
        dedup = command.get("dedup")
        if name.startswith("h."):
            answer["epoch"] = topic.epoch
        if dedup is not None and dedup in topic.dedups:
            return {**answer, "offset": topic.dedups[dedup], "duplicate": True}
        topic.top += 1
        if dedup is not None:
            topic.dedups[dedup] = topic.top
        if name.startswith("h."):
            event["offset"] = answer["offset"] = topic.top
            topic.kept.append(event)
            while len(topic.kept) > self.keep:
                topic.kept.popleft()
        for each in self.peers:
            found = [pattern for pattern in each.subscriptions if matches(pattern, name)]
            if found:
                answer["receivers"] += 1
                each.deliver(min(found, key=rank), event)
        return answer

    def do_history(self, _peer: Peer, command: Message) -> Message:
        name = command["topic"]
        if not name.startswith("h."):
            return error("no_history")
        topic = self.topic(name)
        limit = min(command.get("limit", 100), 1000)
        events = list(topic.kept)
        if "since" in command:
            after = command["since"]["offset"] if command["since"]["epoch"] == topic.epoch else 0
            events = [event for event in events if event["offset"] > after]
            page = events[:limit]
        else:
            page = events[-min(limit, command["last"]) :] if command["last"] else []
        shown = [{name: event[name] for name in ("offset", "key", "data") if name in event} for event in page]
        answer = {"op": "ok", "epoch": topic.epoch, "offset": topic.top, "events": shown}
        return {**answer, "more": True} if len(page) < len(events) and "since" in command else answer

    def do_presence(self, _peer: Peer, command: Message) -> Message:
        name = command["topic"]
        if not name.startswith("p."):
            return error("no_presence")
        members = [self.member(each, name) for each in self.peers if name in each.subscriptions]
        start, limit = int(command.get("after", 0)), min(command.get("limit", 100), 2)
        answer = {"op": "ok", "topic": name, "members": members[start : start + limit], "count": len(members)}
        return {**answer, "more": str(start + limit)} if start + limit < len(members) else answer

    # Details

    def topic(self, name: str) -> Topic:
        if name not in self.topics:
            self.topics[name] = Topic(f"e{next(self.epochs)}")
        return self.topics[name]

    def member(self, peer: Peer, topic: str) -> Message:
        member = {"session": peer.session, "info": peer.subscriptions[topic].options.get("info")}
        return member if peer.identity is None else {**member, "identity": peer.identity}

    def tell_presence(self, op: str, about: Peer, topic: str) -> None:
        member = {"session": about.session}
        if "info" in (options := about.subscriptions.get(topic, _NONE).options):
            member["info"] = options["info"]
        for each in self.peers:
            if each is not about and each.subscriptions.get(topic, _NONE).options.get("presence"):
                each.send({"op": op, "topic": topic, **member})

    def steer(self, peer: Peer, what: str, data: Any) -> Message:
        """What a test in another process asks for. It happens after the answer."""
        loop = asyncio.get_running_loop()
        if what == "close":  # data: code, and optionally retry_after_ms for a `bye` before it
            loop.call_later(0.01, lambda: asyncio.ensure_future(self.close_peers(**data)))
        elif what == "cut":
            loop.call_later(0.01, self.cut)
        elif what == "set":  # data: attributes
            for name, value in data.items():
                setattr(self, name, set(value) if isinstance(value, list) else value)
        elif what == "refuse":
            self.refuse[data["op"]].append(data["error"])
        elif what == "forget":  # a topic: its numbering begins anew
            self.topics.pop(data, None)
        elif what == "send":  # to all peers, as it stands
            for each in self.peers:
                each.send(data)
        elif what == "received":
            return {"op": "ok", "commands": self.received, "tokens": self.tokens}
        return {"op": "ok", "receivers": 0, "queued": 0, "dropped": 0}

    def cut(self) -> None:
        """End all connections without a close frame."""
        for each in list(self.peers):
            each.connection.transport.abort()

    async def close_peers(self, code: int, reason: str = "", retry_after_ms: int | None = None) -> None:
        """Close all connections with this code, after a `bye` where a time is given."""
        for each in list(self.peers):
            if retry_after_ms is not None:
                each.send({"op": "bye", "reason": "shutdown", "retry_after_ms": retry_after_ms})
            with contextlib.suppress(ConnectionClosed):
                await each.flush()
            await each.connection.close(code, reason)

    async def send(self, message: Message) -> None:
        """Send a message to all connections, as it stands."""
        for each in list(self.peers):
            each.send(message)
            await each.flush()

    async def until_connected(self, count: int = 1) -> None:
        """Wait until so many connections have been welcomed."""
        async with self.connected:
            await self.connected.wait_for(lambda: len(self.peers) >= count)

    def commands(self, op: str) -> list[Message]:
        """What was received with this op, without the ids."""
        return [
            {name: value for name, value in each.items() if name != "id"} for each in self.received if each["op"] == op
        ]


_NONE = Subscription({})


def error(code: str) -> Message:
    return {"op": "error", "code": code, "message": "as the protocol says", "retry": False}


@contextlib.asynccontextmanager
async def running(port: int = 0, broker: Broker | None = None) -> AsyncIterator[Broker]:
    """Serve on loopback. A broker that was running before goes on with what it knows."""
    broker = broker or Broker()
    options: dict[str, Any] = {"subprotocols": [Subprotocol("wsbroker.v1")], "compression": None, "close_timeout": 1}
    async with serve(
        broker.handle, "127.0.0.1", port, process_request=broker.process_request, **options
    ) as broker.server:
        broker.url = f"ws://127.0.0.1:{broker.server.sockets[0].getsockname()[1]}"
        yield broker


async def main() -> None:
    """Say the address on standard output, and serve until standard input ends."""
    async with running() as broker:
        sys.stdout.write(broker.url + "\n")
        sys.stdout.flush()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
