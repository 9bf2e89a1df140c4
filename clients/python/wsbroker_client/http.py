"""Publishes from backends by the broker's HTTP API, without an open WebSocket: Django, FastAPI, Celery, cron.

    publisher = Publisher("http://127.0.0.1:8766", key=API_KEY)
    publisher.publish("orders.created", {"id": 7})

It uses the standard library alone. A publisher may be used by any number of threads: each has a connection of its own,
which is kept open and used again.
"""

from __future__ import annotations

import http.client
import json
import random
import secrets
import select
import ssl
import threading
import time
from collections.abc import Iterable
from typing import Any, Union
from urllib.parse import urlsplit

import orjson

from wsbroker_client.errors import CommandRefused, ConnectionLost, NotABroker, Unreachable
from wsbroker_client.model import Receipt, receipt_of
from wsbroker_client.wire import Default, encode_data

MAX_BATCH = 1000
"""Events in one request: as many as the broker takes."""

FIRST_DELAY = 0.1
MAX_DELAY = 5.0
"""Seconds. The bounds of the wait between two attempts; it doubles, with full jitter."""


class Publisher:
    """Publishes to the broker whose admin listener is at `url`.

    `key` is an API key, where the broker wants one. `timeout` is in seconds, for each call as a whole. `default` is
    what orjson calls for a value that it cannot serialise, `context` what an https:// address is verified with.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8766",
        *,
        key: str | None = None,
        timeout: float = 10.0,
        default: Default | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"`{url}` is neither http://host:port nor https://host:port")
        self._parts = parts
        self._key = key
        self._timeout = timeout
        self._default = default
        self._context = context
        self._local = threading.local()

    def publish(
        self, topic: str, data: Any, *, key: str | None = None, dedup: str | None = None, reliable: bool = False
    ) -> Receipt:
        """Publish one event. With `reliable` (or `dedup`) it is repeated until the broker answers, or the time is over.

        Raises CommandRefused, Unreachable (nothing was sent), ConnectionLost (it is not known whether the event was
        published), NotABroker, and TypeError for data that cannot be serialised.
        """
        if dedup is None and reliable:
            dedup = secrets.token_urlsafe(15)
        event = self._event(topic, data, key, dedup)
        return receipt_of(self._call("/v1/publish", event, repeat=dedup is not None))

    def publish_batch(
        self, events: Iterable[dict[str, Any]], *, reliable: bool = False
    ) -> list[Union[Receipt, CommandRefused]]:
        """Publish up to 1,000 events, dicts with `topic`, `data` and optionally `key` and `dedup`. One result for each.

        A result is a Receipt or, for an event that was not published, a CommandRefused; that stops no other event.
        Raises as `publish` does where the whole request failed.
        """
        encoded = []
        for event in events:
            dedup = event.get("dedup") or (secrets.token_urlsafe(15) if reliable else None)
            encoded.append(self._event(event["topic"], event["data"], event.get("key"), dedup))
        if len(encoded) > MAX_BATCH:
            raise ValueError(f"a batch has at most {MAX_BATCH:,} events, not {len(encoded):,}")
        answer = self._call("/v1/publish/batch", b'{"events":[%b]}' % b",".join(encoded), repeat=reliable)
        return [refused(each) if "code" in each else receipt_of(each) for each in answer["results"]]

    def close(self) -> None:
        """Close the connection of the calling thread. It is opened again by the next call."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _event(self, topic: str, data: Any, key: str | None, dedup: str | None) -> bytes:
        fields = {"topic": topic, "key": key, "dedup": dedup}
        head = orjson.dumps({name: value for name, value in fields.items() if value is not None})
        return head[:-1] + b',"data":' + encode_data(data, self._default) + b"}"

    def _call(self, path: str, body: bytes, *, repeat: bool) -> dict[str, Any]:
        end = time.monotonic() + self._timeout
        delay = FIRST_DELAY
        while True:
            try:
                return self._request(path, body, max(0.05, end - time.monotonic()))
            except (CommandRefused, ConnectionLost, Unreachable) as error:  # noqa: PERF203 -- it is what repeats
                wait = random.uniform(0, delay) + (getattr(error, "retry_after_ms", None) or 0) / 1000
                if not repeat or (isinstance(error, CommandRefused) and not error.retry):
                    raise
                if time.monotonic() + wait >= end:
                    raise
                time.sleep(wait)
                delay = min(MAX_DELAY, 2 * delay)

    def _request(self, path: str, body: bytes, timeout: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        where = f"{self._parts.scheme}://{self._parts.netloc}"
        connection = self._connection(timeout)
        try:
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(timeout)
        except OSError as error:
            self.close()
            raise Unreachable(f"cannot connect to {where}: {error}") from error
        try:
            connection.request("POST", self._parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            words = f"{where} did not answer ({error}); whether the event was published is not known"
            raise ConnectionLost(words) from error
        try:
            answer = json.loads(content)
            if response.status >= 400:
                raise refused(answer)
            return dict(answer)
        except (ValueError, KeyError, TypeError) as error:
            raise NotABroker(f"{where} is not a wsbroker: HTTP {response.status} without its JSON") from error

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        """Give this thread's connection: the open one, unless the broker has closed it meanwhile."""
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None and connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            self.close()
            connection = None
        if connection is None:
            host = self._parts.hostname or ""
            if self._parts.scheme == "https":
                context = self._context or ssl.create_default_context()
                connection = http.client.HTTPSConnection(host, self._parts.port, timeout=timeout, context=context)
            else:
                connection = http.client.HTTPConnection(host, self._parts.port, timeout=timeout)
            self._local.connection = connection
        return connection


def refused(answer: dict[str, Any]) -> CommandRefused:
    """Make the exception for an error of the API."""
    return CommandRefused(
        answer["code"],
        answer.get("message", ""),
        retry=bool(answer.get("retry")),
        retry_after_ms=answer.get("retry_after_ms"),
    )
