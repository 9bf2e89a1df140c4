"""The admin listener, for operators: health, metrics and sessions.

It runs in the broker's event loop, so it answers only while the loop runs. It also answers while the broker is full,
drains, or has no descriptors left.
"""
