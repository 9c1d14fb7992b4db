"""The Python library as the transcripts drive it: see clients/conformance/README.md."""

import asyncio
import json
import logging
import sys
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
import ringpush  # noqa: E402


def say(event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class Told(logging.Handler):
    def emit(self, record):
        if hasattr(record, "code"):
            say({"error": record.code})


logging.getLogger("ringpush").addHandler(Told())
logging.getLogger("ringpush").propagate = False
mode = "ok"
changed = asyncio.Event()
inboxes = []


def token(url):
    async def fetch(reason):
        def get():
            try:
                with urllib.request.urlopen(f"{url}/token?reason={reason}") as answer:
                    return answer.read().decode()
            except urllib.error.HTTPError as error:
                if error.code == 403:
                    raise ringpush.Refused from None
                raise
        return await asyncio.to_thread(get)
    return fetch


async def show_states(inbox):
    async for state in inbox.states():
        say({"state": state.name, "cause": state.cause})


async def read(inbox):
    async with inbox:
        while True:
            try:
                async for item in inbox:
                    if isinstance(item, ringpush.Gap):
                        say({"gap": {"after": item.after, "before": item.before, "reason": item.reason,
                                     "topic": item.topic}})
                        continue
                    shown = {"seq": item.seq, "payload": item.payload, "live": item.live}
                    if item.event is not None:
                        shown["event"] = item.event
                    if item.topic is not None:
                        shown["topic"] = item.topic
                    say({"message": shown})
                    if mode == "fail":
                        say({"error": "handler"})
                        break
                    while mode == "hold":
                        changed.clear()
                        await changed.wait()
                else:
                    return
            except ringpush.Stopped:
                return
            await asyncio.sleep(0.2)


async def main():
    global mode
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = []
    while line := await reader.readline():
        command = json.loads(line)
        if "connect" in command:
            options = command["connect"]
            url, count = options.pop("url"), options.pop("clients", 1)
            device = options.pop("device")
            for n in range(count):
                name = device if count == 1 else f"d-{n}"
                inbox = ringpush.connect(url, token=token(url), device=name, gaps="item", **options)
                inboxes.append(inbox)
                tasks.append(asyncio.create_task(show_states(inbox)))
                await asyncio.sleep(0)
                tasks.append(asyncio.create_task(read(inbox)))
        if "handler" in command:
            mode = command["handler"]
            changed.set()
        for inbox in inboxes:
            if command.get("wake"):
                inbox.wake()
            if command.get("refresh"):
                tasks.append(asyncio.create_task(inbox.refresh()))
            if watch := command.get("watch"):
                await inbox.watch(**watch)
            if topic := command.get("unwatch"):
                await inbox.unwatch(topic)
            if command.get("close"):
                await inbox.close()
                say({"closed": True})


asyncio.run(main())
