"""Many clients in one process, as ``ringpush audit --clients python`` drives them.

It reads one line of JSON from its standard input, {"url","device","users":[{"user","token"}]}, and writes one JSON array per
line to its standard output: [n,"message",seq,id] or for a message of a log [n,"message",seq,id,topic], [n,"gap",after,before] or [n,"state",{…}] of user n. It ends when its
input does.
"""

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
import ringpush  # noqa: E402


def say(*event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def show_states(n, inbox):
    async for state in inbox.states():
        say(n, "state", {"name": state.name, "node": state.node, "cause": state.cause})


async def read(n, inbox):
    async with inbox:
        try:
            async for item in inbox:
                if isinstance(item, ringpush.Gap):
                    # The audit knows what a log lacks.
                    if item.topic is None:
                        say(n, "gap", item.after, item.before)
                else:
                    say(n, "message", item.seq, item.id, *([item.topic] if item.in_log else []))
        except ringpush.Stopped:
            pass


async def main():
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=64 * 1024 * 1024)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    plan = json.loads(await reader.readline())
    tasks = []
    inboxes = []
    for n, one in enumerate(plan["users"]):
        inbox = ringpush.connect(plan["url"], token=one["token"], user=one["user"], device=plan["device"], begin="latest",
                                 gaps="item")
        inboxes.append(inbox)
        tasks.append(asyncio.create_task(show_states(n, inbox)))
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(read(n, inbox)))
    while await reader.read(65536):
        pass
    await asyncio.gather(*(inbox.close() for inbox in inboxes))
    for task in tasks:
        task.cancel()


asyncio.run(main())
