"""Tokens, API keys and permissions: from what a client shows to what it may do. No I/O but for the fetching of keys."""
