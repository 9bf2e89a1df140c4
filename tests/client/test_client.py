"""The client over its connections: what it asks for again, what it announces, what becomes of publishes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pydantic
import pytest
import pytest_asyncio

from tests.client.model import Broker, running
from wsbroker_client import (
    AlreadySubscribed,
    Changed,
    Client,
    ClientClosed,
    Closed,
    CommandRefused,
    ConnectionLost,
    Event,
    Gap,
    InvalidEvent,
    Join,
    Leave,
    Live,
    NotConnected,
    Position,
    Refused,
    State,
    Subscription,
    TimedOut,
    TokenFailed,
)


@pytest_asyncio.fixture
async def broker() -> AsyncIterator[Broker]:
    async with running() as broker:
        yield broker


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnections are tried soon, so that no test waits for one."""
    monkeypatch.setattr("wsbroker_client.reconnection.FIRST_DELAY", 0.01)
    monkeypatch.setattr("wsbroker_client.reconnection.MAX_DELAY", 0.05)


async def take(subscription: Subscription[Any], count: int) -> list[Any]:
    """So many messages of a subscription, gaps and the like too."""
    found: list[Any] = []
    async for message in subscription.messages():
        found.append(message)
        if len(found) == count:
            break
    return found


def data(messages: list[Any]) -> list[Any]:
    """The data of events; other messages as they are."""
    return [message.data if isinstance(message, Event) else message for message in messages]


async def cut(broker: Broker, client: Client) -> None:
    """End the connection, and wait for the next one."""
    reconnected = asyncio.ensure_future(changes_to(client, State.WAITING))
    await asyncio.sleep(0)
    broker.cut()
    await reconnected
    await client.connect()


async def changes_to(client: Client, state: State) -> None:
    while client.state is not state:
        waiter = asyncio.get_running_loop().create_future()
        client._state_waiters.add(waiter)
        await waiter


# States


async def test_states_are_told_in_order(broker: Broker) -> None:
    seen: list[Changed] = []
    async with Client(broker.url, on_state=seen.append) as client:
        assert client.state is State.CONNECTING
        await client.connect()
        assert client.welcome["server"] == "model"
        await cut(broker, client)
    states = [change.state for change in seen]
    assert states[:2] == [State.CONNECTING, State.CONNECTED]
    assert states[2:5] == [State.WAITING, State.CONNECTING, State.CONNECTED]
    assert states[-1] is State.CLOSED
    waiting = seen[2]
    assert isinstance(waiting.failure, Closed)
    assert waiting.delay is not None


async def test_connect_waits_through_failed_attempts() -> None:
    async with running() as broker:
        url = broker.url
    client = Client(url)
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0.05)
    async with running(int(url.rpartition(":")[2])):
        await connecting
        await client.close()


async def test_connect_in_vain_says_the_last_failure() -> None:
    async with running() as broker:
        url = broker.url
    async with Client(url) as client:
        with pytest.raises(asyncio.TimeoutError) as caught:
            await client.connect(timeout=0.05)
        assert "Connect call failed" in str(caught.value.__cause__) or "refused" in str(caught.value.__cause__)


@pytest.mark.parametrize("code", [4500, 4502, 4503, 4999])
async def test_close_codes_from_4500_end_the_client(broker: Broker, code: int) -> None:
    async with Client(broker.url) as client:
        await client.connect()
        subscription = client.subscribe("t")
        await subscription.ready()
        await broker.close_peers(code, "enough")
        with pytest.raises(Closed) as caught:
            await anext(subscription)
        assert caught.value.close_code == code
        assert client.state is State.CLOSED
        with pytest.raises(Closed):
            await client.publish("t", 1)
        with pytest.raises(Closed):
            client.subscribe("u")
    assert len(broker.tokens) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1013, 4000, 4499])
async def test_other_close_codes_are_followed_by_a_reconnection(broker: Broker, code: int) -> None:
    async with Client(broker.url) as client:
        await client.connect()
        await broker.close_peers(code)
        await broker.until_connected()


async def test_bye_says_when_to_come_back(broker: Broker) -> None:
    seen: list[Changed] = []
    async with Client(broker.url, on_state=seen.append) as client:
        await client.connect()
        await broker.close_peers(1001, retry_after_ms=37)
        await broker.until_connected()
    (waiting,) = [change for change in seen if change.state is State.WAITING]
    assert waiting.delay == 0.037


async def test_close_says_goodbye_and_fails_what_is_under_way(broker: Broker) -> None:
    client = Client(broker.url)
    await client.connect()
    subscription = client.subscribe("t")
    broker.swallow.add("publish")
    publishing = asyncio.create_task(client.publish("u", 1))
    iterating = asyncio.create_task(anext(subscription))
    await asyncio.sleep(0.01)
    connection = broker.peers[0].connection
    await client.close()
    assert connection.protocol.close_rcvd is not None
    assert connection.protocol.close_rcvd.code == 1000
    with pytest.raises(ClientClosed):
        await publishing
    with pytest.raises(StopAsyncIteration):
        await iterating
    with pytest.raises(ClientClosed):
        await client.publish("u", 2)


async def test_silence_ends_the_connection(broker: Broker) -> None:
    broker.ping = 0.02
    failures: list[str] = []
    async with Client(broker.url, on_state=lambda change: failures.append(str(change.failure))) as client:
        await client.connect()
        await changes_to(client, State.WAITING)
    assert "nothing was heard from the broker for 0.05 seconds" in failures


async def test_timer_of_this_moment_can_be_followed_by_another(broker: Broker) -> None:
    async with Client(broker.url) as client:
        await client.connect()
        calls: list[int] = []
        assert client._stream is not None
        client._stream._call_later(0.0, calls.append, 1)
        client._stream._call_later(0.0001, calls.append, 2)
        await client.publish("t", 1)
        await asyncio.sleep(0.001)
        assert calls == [1, 2]
        await asyncio.gather(*(client.publish("t", 1, timeout=0.000_01) for _ in range(20)), return_exceptions=True)
        await client.ping()
        assert client.state is State.CONNECTED


async def test_error_that_concerns_no_call_is_reported_but_for_what_the_application_knows(broker: Broker) -> None:
    errors: list[BaseException] = []
    async with Client(broker.url, on_error=errors.append) as client:
        await client.connect()
        peer = broker.peers[0]
        peer.send({"op": "error", "id": 999, "code": "unavailable", "message": "a late answer", "retry": True})
        peer.send({"op": "error", "code": "draining", "message": "to a command of the client's own", "retry": True})
        peer.send({"op": "error", "code": "internal", "message": "unexpected"})
        await client.ping()
        assert [getattr(error, "code", None) for error in errors] == ["internal"]


async def test_refusal_that_will_not_change_ends_the_client() -> None:
    async with running() as broker:
        broker.valid_tokens = {"good"}
        async with Client(broker.url, token="bad") as client:
            with pytest.raises(Refused) as caught:
                await client.connect()
            assert caught.value.status == 401


# Subscriptions


async def test_subscriptions_are_made_again_in_the_same_order_with_the_same_options(broker: Broker) -> None:
    async with Client(broker.url) as client:
        client.subscribe("b.*", overflow="latest", max_queue=64, credit=7, info=1)
        client.subscribe("a")
        await client.subscribe("c").ready()
        await cut(broker, client)
        await client.ping()
        first, second = broker.commands("subscribe")[:3], broker.commands("subscribe")[3:]
    assert first == second == [
        {"op": "subscribe", "topic": "b.*", "overflow": "latest", "max_queue": 64, "credit": 7, "info": 1},
        {"op": "subscribe", "topic": "a", "credit": 256},
        {"op": "subscribe", "topic": "c", "credit": 256},
    ]  # fmt: skip


async def test_reconnection_is_a_gap_on_topics_without_history(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("t.*")
        await subscription.ready()
        await client.publish("t.a", 1)
        assert data(await take(subscription, 1)) == [1]
        await cut(broker, client)
        await client.publish("t.a", 2)
        assert data(await take(subscription, 2)) == [Gap("t.*", None, "disconnected"), 2]


async def test_event_carries_the_gaps_before_it(broker: Broker) -> None:
    gaps: list[Gap] = []
    async with Client(broker.url) as client:
        subscription = client.subscribe("t", on_gap=gaps.append)
        await subscription.ready()
        await broker.send({"op": "gap", "topic": "t", "missed": 3, "reason": "overflow", "from": 4, "to": 6})
        await client.publish("t", 1)
        event = await anext(subscription)
        assert event.gaps == (Gap("t", 3, "overflow", 4, 6),) == tuple(gaps)
        await client.publish("t", 2)
        assert (await anext(subscription)).gaps == ()


async def test_topic_with_history_goes_on_where_it_was(broker: Broker) -> None:
    async with Client(broker.url) as client, Client(broker.url) as other:
        subscription = client.subscribe("h.t")
        await subscription.ready()
        for number in range(3):
            await other.publish("h.t", number)
        assert data(await take(subscription, 3)) == [0, 1, 2]
        assert subscription.position == Position("e1", 3)
        client_peer = next(peer for peer in broker.peers if peer.subscriptions)
        client_peer.connection.transport.abort()
        for number in range(3, 6):
            await other.publish("h.t", number)
        messages = await take(subscription, 4)
        assert data(messages) == [3, 4, 5, Live("h.t", 6)]
        await other.publish("h.t", 6)
        assert data(await take(subscription, 1)) == [6]


async def test_what_history_no_longer_has_is_a_gap(broker: Broker) -> None:
    broker.keep = 2
    async with Client(broker.url) as client, Client(broker.url) as other:
        subscription = client.subscribe("h.t")
        await subscription.ready()
        await other.publish("h.t", 1)
        assert data(await take(subscription, 1)) == [1]
        next(peer for peer in broker.peers if peer.subscriptions).connection.transport.abort()
        for number in range(2, 7):
            await other.publish("h.t", number)
        expected = [Gap("h.t", 3, "expired", 2, 4), 5, 6]
        assert data(await take(subscription, 3)) == expected


async def test_new_epoch_is_a_gap_and_what_is_kept_comes(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("h.t")
        await subscription.ready()
        await client.publish("h.t", "old")
        await take(subscription, 1)
        del broker.topics["h.t"]
        await cut(broker, client)
        await client.publish("h.t", "new")
        messages = await take(subscription, 3)
        assert messages[0] == Gap("h.t", None, "epoch")
        assert {type(messages[1]), type(messages[2])} == {Live, Event}


async def test_topic_that_lost_its_history_goes_on_with_a_gap(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("h.t")
        await subscription.ready()
        broker.refuse["subscribe"].append({"code": "no_history"})
        await cut(broker, client)
        assert (await take(subscription, 1)) == [Gap("h.t", None, "disconnected")]


async def test_last_replays_and_then_is_live(broker: Broker) -> None:
    async with Client(broker.url) as client:
        for number in range(5):
            await client.publish("h.t", number)
        subscription = client.subscribe("h.t", last=2)
        assert data(await take(subscription, 3)) == [3, 4, Live("h.t", 5)]
        await cut(broker, client)
        await client.ping()
        assert broker.commands("subscribe")[-1]["since"] == {"epoch": "e1", "offset": 5}


async def test_interrupted_replay_goes_on(broker: Broker) -> None:
    async with Client(broker.url) as client:
        for number in range(10):
            await client.publish("h.t", number)
        subscription = client.subscribe("h.t", last="all", credit=4)
        await subscription.ready()
        await client.ping()
        await cut(broker, client)
        assert [each for each in data(await take(subscription, 11)) if isinstance(each, int)] == list(range(10))


async def test_slow_consumer_gets_as_many_events_as_its_credit(broker: Broker) -> None:
    async with Client(broker.url) as client, Client(broker.url) as other:
        subscription = client.subscribe("t", credit=4)
        await subscription.ready()
        for number in range(20):
            await other.publish("t", number)
        await client.ping()
        assert len(subscription._core.inbox) == 4
        assert [event.data async for event in first(subscription, 20)] == list(range(20))


async def test_credit_is_not_more_after_a_reconnection(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("t", credit=4)
        await subscription.ready()
        for number in range(3):
            await client.publish("t", number)
        await cut(broker, client)
        await client.ping()
        assert broker.commands("subscribe")[-1]["credit"] == 1


async def first(subscription: Subscription[Any], count: int) -> AsyncIterator[Event[Any]]:
    async for event in subscription:
        yield event
        count -= 1
        if count == 0:
            return


async def test_overlapping_subscriptions_get_each_event_once(broker: Broker) -> None:
    async with Client(broker.url) as client:
        exact, pattern, everything = client.subscribe("t.a", credit=2), client.subscribe("t.*"), client.subscribe(">")
        await everything.ready()
        for number in range(6):
            await client.publish("t.a", number, timeout=5)
            await client.publish("t.b", -number, timeout=5)
            if number % 2:
                await take(exact, 2)
                await take(pattern, 4)
                assert data(await take(everything, 4)) == [number - 1, 1 - number, number, -number]
        await broker.send({"op": "gap", "topic": "t.a", "missed": 1, "reason": "overflow"})
        for subscription in (exact, pattern, everything):
            assert await take(subscription, 1) == [Gap("t.a", 1, "overflow")]


async def test_replay_of_an_exact_topic_is_not_new_to_a_pattern(broker: Broker) -> None:
    async with Client(broker.url) as client:
        pattern = client.subscribe("h.*")
        await pattern.ready()
        await client.publish("h.t", 1)
        exact = client.subscribe("h.t", last="all")
        assert data(await take(exact, 2)) == [1, Live("h.t", 1)]
        await client.publish("h.t", 2)
        assert data(await take(pattern, 3)) == [1, Gap("h.t", None, "overlap"), 2]
        assert data(await take(exact, 1)) == [2]


async def test_second_subscription_to_a_topic_is_refused(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("t")
        with pytest.raises(AlreadySubscribed):
            client.subscribe("t")
        await subscription.unsubscribe()
        await client.subscribe("t").ready()


async def test_refused_subscription_raises(broker: Broker) -> None:
    broker.refuse["subscribe"] += [{"code": "forbidden"}]
    async with Client(broker.url) as client:
        subscription = client.subscribe("t")
        with pytest.raises(CommandRefused, match="forbidden"):
            await subscription.ready()
        with pytest.raises(CommandRefused, match="forbidden"):
            await anext(subscription)


async def test_subscription_is_asked_for_again_when_it_may_succeed(broker: Broker) -> None:
    broker.refuse["subscribe"] += [{"code": "unavailable", "retry": True}] * 2
    async with Client(broker.url) as client:
        await client.subscribe("t").ready()
        assert len(broker.commands("subscribe")) == 3


async def test_right_that_is_taken_away_ends_the_subscription(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("t")
        await subscription.ready()
        await broker.send({"op": "error", "code": "forbidden", "topic": "t", "message": "no more", "retry": False})
        with pytest.raises(CommandRefused, match="no more"):
            await anext(subscription)


async def test_unsubscribe_ends_the_iteration(broker: Broker) -> None:
    async with Client(broker.url) as client:
        subscription = client.subscribe("t")
        await subscription.ready()
        await client.publish("t", 1)
        iterating = asyncio.create_task(take(subscription, 2))
        await client.ping()
        await subscription.unsubscribe()
        assert data(await iterating) == [1]
        await client.ping()
        assert broker.peers[0].subscriptions == {}


async def test_callback_that_raises_is_reported_and_stops_nobody(broker: Broker) -> None:
    errors: list[BaseException] = []

    def fail(_: object) -> None:
        raise LookupError("mine")

    async with Client(broker.url, on_error=errors.append, on_state=fail) as client:
        subscription = client.subscribe("t", on_gap=fail)
        await subscription.ready()
        await broker.send({"op": "gap", "topic": "t", "missed": 3, "reason": "overflow"})
        await client.publish("t", 1)
        assert (await anext(subscription)).data == 1
    assert [type(error) for error in errors] == [LookupError] * 4  # three states, one gap


async def test_typed_events_are_decoded_and_a_misfit_is_explained(broker: Broker) -> None:
    class Price(msgspec.Struct):
        bid: float

    async with Client(broker.url) as client:
        prices = client.subscribe("t", type=Price)
        await prices.ready()
        await client.publish("t", {"bid": 1.5})
        await client.publish("t", {"bid": "none"})
        await client.publish("t", {"bid": 2})
        assert (await anext(prices)).data == Price(1.5)
        wrong = await anext(prices)
        with pytest.raises(InvalidEvent, match="an event of t does not fit: Expected `float`, got `str`"):
            print(wrong.data)  # noqa: T201 -- to read it
        assert wrong.raw == b'{"bid":"none"}'
        assert (await anext(prices)).data.bid == 2


async def test_events_are_decoded_into_a_pydantic_model(broker: Broker) -> None:
    class Price(pydantic.BaseModel):
        bid: float

    async with Client(broker.url) as client:
        prices = client.subscribe("t", type=Price)
        await prices.ready()
        await client.publish("t", {"bid": 1.5})
        await client.publish("t", {"bid": "none"})
        assert (await anext(prices)).data == Price(bid=1.5)
        wrong = await anext(prices)
        with pytest.raises(InvalidEvent, match="an event of t does not fit: 1 validation error for Price"):
            print(wrong.data)  # noqa: T201 -- to read it


# Publish


async def test_publish_waits_for_the_connection(broker: Broker) -> None:
    async with Client(broker.url) as client:
        receipt = await client.publish("h.t", {"x": 1}, key="k")
        assert (receipt.receivers, receipt.offset, receipt.duplicate) == (0, 1, False)
        assert broker.commands("publish") == [{"op": "publish", "topic": "h.t", "key": "k", "data": {"x": 1}}]


async def test_publish_without_a_connection_can_fail_at_once(broker: Broker) -> None:
    async with Client(broker.url) as client:
        with pytest.raises(NotConnected):
            await client.publish("t", 1, queue=False)


async def test_publish_without_a_connection_times_out() -> None:
    async with running() as broker:
        url = broker.url
    async with Client(url) as client:
        with pytest.raises(TimedOut) as caught:
            await client.publish("t", 1, timeout=0.05)
        assert not caught.value.sent


async def test_publish_without_an_answer_times_out(broker: Broker) -> None:
    broker.swallow.add("publish")
    async with Client(broker.url) as client:
        await client.connect()
        with pytest.raises(TimedOut) as caught:
            await client.publish("t", 1, timeout=0.05)
        assert caught.value.sent


async def test_publish_under_way_at_a_loss_is_not_repeated(broker: Broker) -> None:
    broker.swallow.add("publish")
    async with Client(broker.url) as client:
        publishing = asyncio.create_task(client.publish("t", 1))
        while not broker.received:  # noqa: ASYNC110
            await asyncio.sleep(0)
        broker.cut()
        with pytest.raises(ConnectionLost):
            await publishing
        await client.connect()
        await client.ping()
        assert len(broker.commands("publish")) == 1


async def test_reliable_publish_is_repeated_and_published_once(broker: Broker) -> None:
    broker.swallow.add("publish")
    async with Client(broker.url) as client:
        publishing = [asyncio.create_task(client.publish("h.t", number, reliable=True)) for number in range(3)]
        while len(broker.received) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        broker.swallow.clear()
        broker.cut()
        receipts = await asyncio.gather(*publishing)
        assert [(receipt.offset, receipt.duplicate) for receipt in receipts] == [(1, True), (2, True), (3, True)]
        assert [event["data"] for event in broker.topics["h.t"].kept] == [0, 1, 2]


async def test_reliable_publish_is_repeated_when_it_may_succeed(broker: Broker) -> None:
    broker.refuse["publish"] += [{"code": "unavailable", "retry": True}, {"code": "draining", "retry": True}]
    async with Client(broker.url) as client:
        await client.publish("t", 1, reliable=True)
        broker.refuse["publish"] += [{"code": "forbidden", "retry": False}]
        with pytest.raises(CommandRefused, match="forbidden"):
            await client.publish("t", 1, reliable=True)


async def test_too_large_publish_is_not_sent(broker: Broker) -> None:
    async with Client(broker.url) as client:
        with pytest.raises(CommandRefused, match="limit: the command has"):
            await client.publish("t", "x" * 70_000)
        assert broker.received == []


async def test_what_orjson_cannot_serialise_goes_to_default(broker: Broker) -> None:
    async with Client(broker.url, default=str) as client:
        await client.publish("t", {"x": 1j})
        assert broker.received[0]["data"] == {"x": "1j"}
    async with Client(broker.url) as client:
        with pytest.raises(TypeError):
            await client.publish("t", {"x": 1j})


# Tokens


async def test_token_is_fetched_for_each_connection(broker: Broker) -> None:
    tokens = iter(["one", "two"])

    async def fetch() -> str:
        return next(tokens)

    async with Client(broker.url, token=fetch) as client:
        await client.connect()
        await cut(broker, client)
        assert broker.tokens == ["one", "two"]


async def test_token_is_renewed_before_it_expires(broker: Broker) -> None:
    broker.expires_in = 0.2
    tokens = iter(["one", "two", "three"])
    async with Client(broker.url, token=lambda: next(tokens)) as client:
        await client.connect()
        while len(broker.tokens) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        broker.expires_in = None
        assert broker.tokens == ["one", "two", "three"]
        assert len(broker.peers) == 1


@pytest.mark.parametrize("code", [4500, 4501])
async def test_refused_token_is_fetched_once_more(broker: Broker, code: int) -> None:
    count = 0

    def fetch() -> str:
        nonlocal count
        count += 1
        return f"t{count}"

    async with Client(broker.url, token=fetch) as client:
        await client.connect()
        await broker.close_peers(code)
        await client.connect()
        await broker.until_connected()
        await broker.close_peers(code)
        await changes_to(client, State.CLOSED)
    assert broker.tokens == ["t1", "t2"]


async def test_unauthorized_subscription_is_asked_for_with_a_new_token(broker: Broker) -> None:
    broker.refuse["subscribe"].append({"code": "unauthorized"})
    async with Client(broker.url, token=lambda: "t") as client:
        await client.subscribe("t").ready()
        assert len(broker.commands("auth")) == 1


async def test_failing_token_function_is_tried_again(broker: Broker) -> None:
    answers: list[Callable[[], str]] = [lambda: str(1 // 0), lambda: "good"]
    seen: list[Changed] = []
    async with Client(broker.url, token=lambda: answers.pop(0)(), on_state=seen.append) as client:  # noqa: PLW0108 -- a new one each time
        await client.connect()
    assert isinstance(seen[1].failure, TokenFailed)
    assert isinstance(seen[1].failure.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("token", ["", "a b", "ü", "a\r\nX: y"])
async def test_what_is_no_token_is_not_sent(broker: Broker, token: str) -> None:
    seen: list[Changed] = []
    async with Client(broker.url, token=lambda: token, on_state=seen.append) as client:
        await changes_to(client, State.WAITING)
    assert isinstance(seen[1].failure, TokenFailed)
    assert broker.tokens == []


# History and presence


async def test_history_pages_by_itself(broker: Broker) -> None:
    broker.keep = 3000
    async with Client(broker.url) as client:
        for number in range(2500):
            broker.do_publish(broker.peers[0] if broker.peers else None, {"topic": "h.t", "data": number})  # type: ignore[arg-type]
        assert [event.data async for event in client.history("h.t")] == list(range(2500))
        assert [event.data async for event in client.history("h.t", last=1200)] == list(range(1300, 2500))
        assert [event.offset async for event in client.history("h.t", since=Position("e1", 2498))] == [2499, 2500]
        with pytest.raises(CommandRefused, match="no_history"):
            _ = [event async for event in client.history("t")]


async def test_presence_pages_by_itself_and_tells_of_others(broker: Broker) -> None:
    seen: list[Any] = []
    async with Client(broker.url) as client:
        await client.connect()
        watching = client.subscribe("p.t", info="me", on_join=seen.append, on_leave=seen.append)
        await watching.ready()
        async with Client(broker.url) as two, Client(broker.url) as three:
            await two.connect()
            await two.subscribe("p.t", info={"n": 2}).ready()
            await three.subscribe("p.t").ready()
            members = [member async for member in client.presence("p.t")]
            assert [member.info for member in members] == ["me", {"n": 2}, None]
        messages = await take(watching, 4)
        assert [type(message) for message in messages] == [Join, Join, Leave, Leave]
        assert seen == messages
        assert len({message.session for message in messages}) == 2
