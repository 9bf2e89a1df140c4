"""The only code that knows sockets: from a listening address to a transport that speaks WebSocket.

`listener` binds and accepts, `limiter` limits the connections, `handshake` answers the request, `origin` holds the
rule for pages of other sites. What comes after the upgrade belongs to the node and to the native connection.
"""
