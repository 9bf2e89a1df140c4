"""wsbroker: a broker that moves events between WebSocket clients."""

__version__ = "0.1.0"
