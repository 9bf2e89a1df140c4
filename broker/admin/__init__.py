"""The second listener, for operators: whether the broker lives and is ready, its metrics, its clients.

It runs in the broker's own event loop, so that it answers only while that turns; and it answers while the broker is
full, drains, or has no descriptors left.
"""
