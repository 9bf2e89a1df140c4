"""The server program of the peer `socketify`. Speaks the relay protocol.

A subscription is uWebSockets' own (`subscribe`, `publish`), so that Python is called once for each message that comes
in, and for none that goes out.
"""

from socketify import App, AppListenOptions, AppOptions, CompressOptions, OpCode, WebSocket  # type: ignore[import-untyped]

from bench.peers.relay import RELAY_TOPIC, Arguments

# What may wait for a client before messages to it are dropped. The default would lose events as soon as the
# largest of the bench's are published four at a time; where clients stop reading, it is what they are about.
DEFAULT_BACKPRESSURE = 64 * 1024
ROOMY_BACKPRESSURE = 4 * 1024 * 1024


def relay(client: WebSocket, message: str | bytes, _: OpCode) -> None:
    """Takes a message of a client."""
    if not isinstance(message, str):
        return
    if message.startswith("sub "):
        client.subscribe(message[4:])
        client.send("ok", OpCode.TEXT)
    else:
        client.publish(message[RELAY_TOPIC], message, OpCode.TEXT, compress)


given = Arguments.read()
compress = given.deflate
app = App(AppOptions(key_file_name=str(given.key), cert_file_name=str(given.certificate)) if given.key else None)
app.ws(
    "/*",
    {
        # The shared compressor is the one without context takeover.
        "compression": CompressOptions.SHARED_COMPRESSOR if given.deflate else CompressOptions.DISABLED,
        "max_payload_length": 64 * 1024,
        "max_backpressure": DEFAULT_BACKPRESSURE if given.stalled else ROOMY_BACKPRESSURE,
        "message": relay,
    },
)
app.listen(
    AppListenOptions(domain=str(given.path)) if given.path else AppListenOptions(port=given.port, host=given.host),
    lambda _: None,
)
app.run()
