"""Handles each message once: the work and the message's id go into one transaction."""

import asyncio
import os
import sqlite3
import sys

import ringpush

URL = os.environ.get("RINGPUSH_URL", "http://127.0.0.1:8080")


def prepare(database: sqlite3.Connection) -> None:
    database.executescript("""
        CREATE TABLE IF NOT EXISTS shipment (number INTEGER PRIMARY KEY, customer_order INTEGER NOT NULL, items INTEGER NOT NULL);
        CREATE TABLE IF NOT EXISTS done (message TEXT PRIMARY KEY);
    """)


def handle(database: sqlite3.Connection, message: ringpush.Message) -> bool:
    """Does the work of a message. Returns False where it was done before a crash. Raises ValueError if it is no order."""
    payload = message.payload
    order, items = (payload.get("order"), payload.get("items")) if isinstance(payload, dict) else (None, None)
    if type(order) is not int or type(items) is not int or not 0 <= order < 2**53 or not 0 < items < 10_000:
        raise ValueError("an order has a number and a number of items")
    with database:
        # The id, and not the number: numbers begin anew when the server's store is restored.
        if database.execute("INSERT OR IGNORE INTO done VALUES (?)", (message.id,)).rowcount == 0:
            return False
        database.execute("INSERT INTO shipment (customer_order, items) VALUES (?, ?)", (order, items))
    return True


async def main() -> None:
    database = sqlite3.connect(sys.argv[1] if len(sys.argv) > 1 else "orders.db")
    prepare(database)
    async with ringpush.connect(URL, token=os.environ["RINGPUSH_TOKEN"], device="worker-1") as inbox:
        while True:
            try:
                async for message in inbox:
                    try:
                        fresh = handle(database, message)
                    except ValueError as fault:
                        # No order: it will be none the next time, either.
                        print(f"message {message.id} is no order: {fault}", file=sys.stderr, flush=True)
                        continue
                    print(f"order {message.payload['order']}: {'shipped' if fresh else 'was shipped before'}", flush=True)
                return
            except ringpush.GapError as error:
                # Orders that were not seen: ask the shop for them. Then go on.
                print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
