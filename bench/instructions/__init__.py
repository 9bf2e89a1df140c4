"""How many instructions the pure CPU parts of the data path take: the same number on every run, on a busy machine too.

    python -m bench.instructions                 counts, and shows them beside those recorded
    python -m bench.instructions --check         fails if one has grown
    python -m bench.instructions --record        records them in bench/instructions/recorded.json

Instructions are not time: what waits for memory, and what the kernel does, is not in them. The other scenarios of the
bench have that. In return a difference of one percent is one, which no clock could tell.
"""
