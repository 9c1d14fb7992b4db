import asyncio, json, os, random, websockets

async def listen(url, token, last=None):
    while True:  # come back after every break, and go on after the last message
        try:
            async with websockets.connect(url) as socket:
                auth = {"type": "auth", "token": token, "device": "python"}
                await socket.send(json.dumps(auth if last is None else {**auth, "since": last}))
                async for text in socket:
                    frame = json.loads(text)
                    if frame["type"] == "message":
                        print(json.dumps(frame["payload"]), flush=True)
                        last = frame["seq"]
                        await socket.send(json.dumps({"type": "ack", "seq": last}))
        except (OSError, websockets.WebSocketException) as error:
            if getattr(error, "rcvd", None) and error.rcvd.code >= 4500:
                raise  # 4500 and above: do not come back without doing something first
        await asyncio.sleep(random.random())

asyncio.run(listen(os.environ["RINGPUSH_URL"], os.environ["RINGPUSH_TOKEN"]))
