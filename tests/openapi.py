"""Holds docs/openapi.yaml and docs/frames.schema.json against a running server.

    python tests/openapi.py LISTEN_JSON API_KEY ADMIN_KEY TOKEN

Every operation is called, and every answer, faults too, is validated against its schema. Then schemathesis calls each operation
with what its schema allows, and does not allow, from a fixed seed. Exits 1 at the first contradiction.
"""

import asyncio
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jsonschema
import websockets
import yaml

ROOT = Path(__file__).parent.parent
LISTEN, API_KEY, ADMIN_KEY, TOKEN = json.loads(Path(sys.argv[1]).read_text()), *sys.argv[2:5]
DOCUMENT = yaml.safe_load((ROOT / "docs/openapi.yaml").read_text())
FRAMES = json.loads((ROOT / "docs/frames.schema.json").read_text())
CHECKED: set[str] = set()


def resolved(node):
    while "$ref" in node:
        target = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def validate(schema, value):
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole, format_checker=jsonschema.FormatChecker()).validate(value)


def call(operation_id, status, path, body=None, key=None, raw=None, role=None):
    """Calls an operation, at the first of its roles unless another one is named, and validates its answer."""
    for template, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method != "parameters" and operation["operationId"] == operation_id:
                break
        else:
            continue
        break
    else:
        raise AssertionError(f"no operation {operation_id}")
    url = f"http://{LISTEN[role or operation['tags'][0]]}{path}"
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, method=method.upper(), data=data, headers={"Content-Type": "application/json"})
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        answer = error
    text = answer.read()
    assert answer.status == status, f"{operation_id} {path}: {answer.status}, not {status}: {text[:300]!r}"
    declared = resolved(operation["responses"].get(str(status)) or operation["responses"]["default"])
    for kind, media in declared.get("content", {}).items():
        assert answer.headers["Content-Type"].split(";")[0] == kind, (operation_id, answer.headers["Content-Type"])
        if "json" in kind:
            validate(media["schema"], json.loads(text))
    CHECKED.add(operation_id)
    return json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text


def operations():
    publish = {"to": {"user": "alice"}, "payload": {"n": 1}, "id": "order-1", "event": "order.paid"}
    call("publish", 202, "/v1/messages", publish, API_KEY)
    call("publish", 202, "/v1/messages", {"to": {"users": ["alice", "bob"]}, "payload": None, "id": None}, API_KEY)
    call("publish", 409, "/v1/messages", {**publish, "event": "order.shipped"}, API_KEY)
    call("publish", 422, "/v1/messages", {"to": {}, "ttl_s": 0, "event": "with space"}, API_KEY)
    call("publish", 413, "/v1/messages", {**publish, "payload": "x" * 70_000, "id": "large"}, API_KEY)
    call("publish", 400, "/v1/messages", None, API_KEY, raw=b"{nope")
    call("publish", 401, "/v1/messages", publish)
    call("publishBatch", 202, "/v1/messages/batch", {"messages": [publish, {"to": {"user": ""}, "payload": 1}]}, API_KEY)
    call("publishBatch", 422, "/v1/messages/batch", {"messages": []}, API_KEY)
    call("makeTopic", 201, "/v1/topics/news", {}, API_KEY)
    call("makeTopic", 200, "/v1/topics/news", {"delivery": "inbox", "ttl_s": 60}, API_KEY)
    call("makeTopic", 422, "/v1/topics/everyone", {}, API_KEY)
    call("makeTopic", 422, "/v1/topics/news", {"delivery": "log", "ttl_s": 0}, API_KEY)
    call("changeMembers", 202, "/v1/topics/news/members", {"add": ["alice", "bob"], "remove": ["carol"]}, API_KEY)
    call("changeMembers", 422, "/v1/topics/news/members", {"add": ["alice"], "remove": ["alice"]}, API_KEY)
    call("changeMembers", 404, "/v1/topics/new/members", {"add": ["alice"]}, API_KEY)
    call("publish", 202, "/v1/messages", {"to": {"topic": "news"}, "payload": 1}, API_KEY)
    call("publish", 202, "/v1/messages", {"to": {"topics": ["news"], "except": ["bob"]}, "payload": 1, "id": "t"}, API_KEY)
    call("publish", 409, "/v1/messages", {"to": {"topic": "news"}, "payload": 2, "id": "t"}, API_KEY)
    call("publish", 404, "/v1/messages", {"to": {"topic": "new"}, "payload": 1}, API_KEY)
    call("topic", 200, "/v1/topics/news", key=API_KEY)
    call("topic", 404, "/v1/topics/new", key=API_KEY)
    call("topic", 401, "/v1/topics/news")
    call("topics", 200, "/v1/topics?limit=1", key=API_KEY)
    call("topics", 422, "/v1/topics?limit=0", key=API_KEY)
    call("members", 200, "/v1/topics/news/members?after=alice", key=API_KEY)
    call("topicsOfUser", 200, "/v1/users/alice/topics", key=API_KEY)
    call("leaveTopics", 202, "/v1/users/bob/topics", key=API_KEY)
    call("history", 200, "/v1/users/alice/messages", key=API_KEY)
    call("makeTopic", 201, "/v1/topics/log", {"delivery": "log"}, API_KEY)
    call("makeTopic", 409, "/v1/topics/log", {"delivery": "inbox"}, API_KEY)
    call("changeMembers", 202, "/v1/topics/log/members", {"add": ["alice"]}, API_KEY)
    sent = call("publish", 202, "/v1/messages", {"to": {"topic": "log"}, "payload": 1}, API_KEY)
    call("endMessage", 202, f"/v1/topics/log/messages/{sent['accepted'][0]['seq']}", key=API_KEY)
    call("endMessage", 404, "/v1/topics/log/messages/1", key=API_KEY)
    call("endMessage", 422, "/v1/topics/log/messages/one", key=API_KEY)
    call("publish", 202, "/v1/messages", {"to": {"everyone": True, "except": ["bob"]}, "payload": 1}, API_KEY)
    call("publish", 413, "/v1/messages", {"to": {"everyone": True}, "payload": "x" * 5_000}, API_KEY)
    call("topic", 200, "/v1/topics/log", key=API_KEY)
    call("logHistory", 200, "/v1/topics/log/messages?before=9007199254740991", key=API_KEY)
    call("logHistory", 404, "/v1/topics/news/messages", key=API_KEY)
    call("logHistory", 422, "/v1/topics/log/messages?before=1&after=1", key=API_KEY)
    call("logHistory", 200, "/v1/topics/log/messages", key=TOKEN, role="push")
    call("logHistory", 403, "/v1/topics/news/messages", key=TOKEN, role="push")
    call("everyonesHistory", 200, "/v1/everyone/messages?limit=1", key=API_KEY)
    call("everyonesHistory", 200, "/v1/everyone/messages?limit=1", key=TOKEN, role="push")
    call("everyonesHistory", 401, "/v1/everyone/messages", role="push")
    call("removeTopic", 202, "/v1/topics/news", key=API_KEY)
    call("removeTopic", 404, "/v1/topics/news", key=API_KEY)
    call("user", 200, "/v1/users/alice", key=API_KEY)
    call("user", 200, "/v1/users/nobody%20knows", key=API_KEY)
    call("user", 401, "/v1/users/alice")
    call("history", 200, "/v1/users/alice/messages?limit=1", key=API_KEY)
    call("history", 422, "/v1/users/alice/messages?after=x", key=API_KEY)
    call("messageStatus", 200, "/v1/users/alice/messages/order-1/status", key=API_KEY)
    call("messageStatus", 404, "/v1/users/alice/messages/order-9/status", key=API_KEY)
    call("messageStatus", 401, "/v1/users/alice/messages/order-1/status")
    call("cluster", 200, "/v1/cluster", key=API_KEY)
    call("openapi", 200, "/openapi.yaml")
    call("connect", 200, "/v1/connect", {"device": "web-1"}, TOKEN)
    call("connect", 401, "/v1/connect", {"device": "web-1"})
    call("connect", 422, "/v1/connect", {"device": "a b"}, TOKEN)
    call("ownHistory", 200, "/v1/inbox/messages?before=9007199254740991&limit=1", key=TOKEN)
    call("ownHistory", 422, "/v1/inbox/messages?before=1&after=1", key=TOKEN)
    call("ownHistory", 401, "/v1/inbox/messages", key="rubbish")
    call("verify", 200, "/v1/verify", {"token": TOKEN})
    call("verify", 401, "/v1/verify", {"token": "rubbish"})
    call("issueToken", 200, "/v1/tokens", {"user": "alice", "ttl_s": 60}, ADMIN_KEY)
    call("issueToken", 422, "/v1/tokens", {"user": "alice", "ttl_s": 0}, ADMIN_KEY)
    call("issueToken", 401, "/v1/tokens", {"user": "alice"}, "another")
    call("jwks", 200, "/.well-known/jwks.json")
    call("livez", 200, "/livez")
    call("readyz", 200, "/readyz")
    call("metrics", 200, "/metrics")
    call("forgetUser", 202, "/v1/users/dave", key=API_KEY)
    call("disconnect", 202, "/v1/users/carol/sessions", key=API_KEY)
    declared = {operation["operationId"] for item in DOCUMENT["paths"].values()
                for method, operation in item.items() if method != "parameters"}
    assert CHECKED == declared, f"not called: {declared - CHECKED}"


async def frames():
    """Frames of a real socket, each of one kind of the schema, and of no other."""
    def check(side, text):
        frame = json.loads(text)
        jsonschema.Draft202012Validator({**FRAMES, "$ref": f"#/$defs/{side}"}).validate(frame)
        return frame

    async def until(socket, kind):
        while (frame := check("server", await asyncio.wait_for(socket.recv(), 20)))["type"] != kind:
            pass
        return frame

    async def say(socket, frame):
        check("client", json.dumps(frame))
        await socket.send(json.dumps(frame))

    async with websockets.connect(f"ws://{LISTEN['push']}/v1/ws") as socket:
        await say(socket, {"type": "auth", "token": TOKEN, "device": "web-1", "begin": "oldest", "heartbeat": True, "window": 9,
                           "client": "openapi/1"})
        await until(socket, "welcome")
        message = await until(socket, "message")
        await say(socket, {"type": "ack", "seq": message["seq"]})
        await until(socket, "caught_up")
        await say(socket, {"type": "ping"})
        await until(socket, "pong")
        await say(socket, {"type": "refresh", "token": TOKEN})
        await until(socket, "refreshed")
        await socket.send("[]")
        assert (await until(socket, "error"))["code"] == "bad_frame"
    async with websockets.connect(f"ws://{LISTEN['push']}/v1/ws?topics=auth",
                                  additional_headers={"Authorization": f"Bearer {TOKEN}"}) as socket:
        await say(socket, {"type": "auth", "device": "logs", "topics": {"log": 1, "none": 7}})
        assert (await until(socket, "welcome"))["topics"].keys() == {"log"}
        assert (await until(socket, "gap"))["reason"] == "joined"
        while (caught_up := await until(socket, "caught_up")).get("all") is not True:
            pass
        await say(socket, {"type": "ack", "seq": 1, "topics": {"log": 1}, "everyone": 1})
        await say(socket, {"type": "watch", "topic": "other", "since": "last"})
        refused = await until(socket, "error")
        assert (refused["code"], refused["topic"]) == ("forbidden_topic", "other")
        await say(socket, {"type": "unwatch", "topic": "other"})
        await say(socket, {"type": "ping"})
        await until(socket, "pong")
    async with websockets.connect(f"ws://{LISTEN['push']}/v1/ws?since=9007199254740991",
                                  additional_headers={"Authorization": f"Bearer {TOKEN}"}) as socket:
        assert (await until(socket, "gap"))["reason"] == "reset"


def generated():
    """schemathesis, role by role, from a fixed seed. What the rules of JSON Schema cannot say (a name's length in bytes, a
    payload's size) may be refused though the schema allows it."""
    keys = {"collect": API_KEY, "push": TOKEN, "auth": ADMIN_KEY}
    for role, key in keys.items():
        subprocess.run([
            Path(sys.executable).parent / "schemathesis", "run", ROOT / "docs/openapi.yaml", "--url", f"http://{LISTEN[role]}",
            "--include-tag", role, "--header", f"Authorization: Bearer {key}", "--seed", "1", "--max-examples", "10",
            "--phases", "examples,coverage,fuzzing", "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
            "--suppress-health-check", "all", "--no-color",
        ], check=True)


operations()
asyncio.run(frames())
generated()
