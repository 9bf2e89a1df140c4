"""`make chaos`: 200 rounds for each client: 40 % with history in memory, 40 % in SQLite, the others on the model."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Final

from tests.chaos.rounds import SUBJECTS, Target, check, play, subject
from tests.chaos.test_chaos import target_of

SHARES: Final = {"memory": 0.4, "sqlite": 0.4, "model": 0.2}

GROWTH: Final = 1.25
"""How much the objects (Python) or the heap (JavaScript) may grow after the first tenth of the rounds."""


async def main(rounds: int, first: int, clients: list[str]) -> None:
    """Play, and say what came of it. The first broken account ends it."""
    for client in clients:
        for kind, share in SHARES.items():
            async with contextlib.AsyncExitStack() as stack:
                target: Target = await stack.enter_async_context(target_of(kind))
                driven = await stack.enter_async_context(subject(client))
                settled = 0
                for number in range(max(1, int(rounds * share))):
                    account = await play(target, driven, first + number)
                    try:
                        check(account, target)
                    except AssertionError as error:
                        raise SystemExit(
                            f"{client}, {kind}, --seed {first + number}: {account.strikes}: {error}"
                        ) from error
                    driven.tell(do="memory")
                    memory = await driven.until("objects")
                    if memory["alive"]:
                        raise SystemExit(
                            f"{client}, --seed {first + number}: these outlive their round: {memory['alive']}"
                        )
                    if number <= max(3, rounds // 25):
                        settled = max(settled, memory["objects"])
                    elif memory["objects"] > GROWTH * settled:
                        raise SystemExit(
                            f"{client}: memory grows: {settled} → {memory['objects']} after {number} rounds"
                        )
                    print(f"\r{client} {kind} {number + 1}", end="", flush=True)
            print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--rounds", type=int, default=200, help="for each client (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (default: %(default)s)")
    parser.add_argument("--client", action="append", choices=list(SUBJECTS), help="(default: all)")
    options = parser.parse_args()
    asyncio.run(main(options.rounds, options.seed, options.client or list(SUBJECTS)))
