"""Receiving: one line (a socket) at a time, two during a move; each message once, in order, acked when handled."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import inspect
import json
import logging
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Union

import websockets
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as open_socket

from ._errors import GapError, Refused, Stopped, retry_after_s

log = logging.getLogger("ringpush")

CLIENT = "ringpush-python/0.1.0"
#: Seconds that a token, and the opening of a line, may take.
PATIENCE_S, OPEN_S = 30.0, 10.0
#: Longest wait between two tries in seconds, unless the server names a longer one.
RETRY_MAX_S = 10.0
#: Seconds of silence beyond the server's interval, and that a line has to answer a :meth:`Inbox.wake`.
GRACE_S, WAKE_S = 5.0, 3.0
#: Seconds between two looks at the clock, and by how much it must have moved meanwhile: the machine slept.
LOOK_S, JUMP_S = 1.0, 10.0
MOVE_TRIES = 3
#: Seconds by which acks are gathered.
ACK_S = 0.05
SUBPROTOCOL = "ringpush.v1.json"
#: The inbox, among the logs of topics, and the log of what goes to all users. No topic has such a name.
INBOX, EVERYONE = "", "everyone"
#: Seconds between two frames about watched topics.
PACE_S = 0.12
_TOPIC = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
#: Topics whose positions are told at the start of a line, and topics in one ack: 128 names, and 4 KiB, are the server's limits.
TOPICS_TOLD, TOPICS_ACKED = 128, 40

TokenReason = Literal["first", "expiring", "expired", "revoked"]
Token = Union[str, Callable[[TokenReason], Union[str, Awaitable[str]]]]


@dataclass(frozen=True)
class Message:
    """A message. ``topic`` is the one by which it came, ``"everyone"`` if it was sent to all users, ``None`` if it was sent to
    the user; ``live`` is false where it comes from the backlog. ``seq`` is its number in the user's inbox, or with ``in_log``
    in the log of the topic. ``traceparent`` is the trace that its sender named, if it named one (W3C Trace Context)."""

    seq: int
    id: str
    payload: Any
    event: str | None
    topic: str | None
    accepted_at: datetime
    expires_at: datetime
    live: bool
    in_log: bool = False
    traceparent: str | None = None


@dataclass(frozen=True)
class Gap:
    """Numbers above ``after`` and below ``before`` will never come: in the log of ``topic``, or in the inbox."""

    after: int
    before: int
    reason: str
    topic: str | None = None


@dataclass(frozen=True)
class State:
    """``connecting``, ``catching-up``, ``live``, ``moving``, ``waiting`` or ``stopped``; the cause of the last three; the node
    that holds the line, and when moving the node that the server named."""

    name: str
    cause: str | None = None
    node: str | None = None


def connect(
    url: str,
    *,
    token: Token,
    device: str | None = None,
    user: str | None = None,
    begin: Literal["oldest", "latest"] | None = None,
    window: int = 256,
    ack: Literal["handled", "received"] = "handled",
    gaps: Literal["raise", "item"] = "raise",
) -> Inbox:
    """An inbox to be entered by ``async with`` and read by ``async for``.

    ``url`` is that of the server, such as ``https://push.example.com``. ``token`` is a token, or is asked for one with the
    reason; raise :class:`Refused` to stop. Name a ``device``: it has the cursor. Another user than ``user`` stops the inbox.
    ``window`` is how many messages may be ahead of the acks. A gap is raised, or with ``gaps="item"`` handed over.
    """
    if not 1 <= window <= 10_000:
        raise ValueError("window is an integer from 1 to 10000")
    if begin not in (None, "oldest", "latest"):
        raise ValueError('begin is "oldest" or "latest"')
    if device is None:
        log.warning("no device is named: the next start is another device", extra={"code": "device_not_kept"})
        device = f"python-{uuid.uuid4().hex[:12]}"
    return Inbox(url, token, device, user, begin, window, ack, gaps)


class _Closed(Exception):
    def __init__(self, code: int, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason or f"closed with {code}")
        self.code, self.reason, self.retry_after = code, reason, retry_after


class _TokenFault(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class _Line:
    """One socket, from its ``welcome`` on."""

    def __init__(self, socket: ClientConnection, welcome: dict[str, Any]) -> None:
        self.socket, self.welcome = socket, welcome
        self.caught_up = False
        # By log, as all that follows: what came, and what was acked.
        self.seq: dict[str, int] = {}
        self.acked: dict[str, int] = {}
        self.logs = _logs(welcome)
        # `left`s that are due for what this side has ended, by topic; and when the next frame about a watched topic may be said.
        self.lefts: dict[str, int] = {}
        self._turn = 0.0
        self.heard = 0
        self.reason = ""
        self.hint: dict[str, int] | None = None
        beat = welcome.get("heartbeat_ms")
        every = beat or welcome.get("ping_every_ms") or 25_000
        self.silence = every / 1000 + GRACE_S
        self.ask_every = None if beat else every / 1000

    async def send(self, frame: dict[str, Any]) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            await self.socket.send(json.dumps(frame))

    async def send_paced(self, frame: dict[str, Any]) -> None:
        """Says a frame about a watched topic when its turn comes: the server takes ten in a second."""
        now = time.monotonic()
        self._turn = max(self._turn + PACE_S, now)
        await asyncio.sleep(self._turn - now)
        await self.send(frame)

    async def frame(self) -> dict[str, Any]:
        """The next frame. Raises :class:`_Closed` when the line has ended, or says nothing or rubbish."""
        try:
            text = await asyncio.wait_for(self.socket.recv(), self.silence)
        except (TimeoutError, asyncio.TimeoutError):
            self.abort()
            raise _Closed(1006, "silent") from None
        except websockets.ConnectionClosed as error:
            code = error.rcvd.code if error.rcvd else 1006
            raise _Closed(code, self.reason or (error.rcvd.reason if error.rcvd else "")) from None
        self.heard += 1
        return _parsed(text, self.abort)

    def abort(self) -> None:
        transport = self.socket.transport
        if transport is not None:
            transport.abort()

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.socket.close(1000), 1.0)
        self.abort()


def _parsed(text: str | bytes, abort: Callable[[], None]) -> dict[str, Any]:
    try:
        frame = json.loads(text)
    except ValueError:
        frame = None
    if not isinstance(frame, dict) or not isinstance(frame.get("type"), str):
        abort()
        raise _Closed(1006, "rubbish")
    return frame


def _logs(welcome: dict[str, Any]) -> dict[str, int] | None:
    """The logs that a line reads, and after which number; ``None`` where the server does not know of logs."""
    topics, everyone = welcome.get("topics"), welcome.get("everyone")
    if not isinstance(topics, dict):
        return None
    logs = {name: int(at["after"]) for name, at in topics.items()}
    if isinstance(everyone, dict):
        logs[EVERYONE] = int(everyone["after"])
    return logs


def _log_of(frame: dict[str, Any]) -> str:
    """The log that a frame is about."""
    return EVERYONE if frame.get("everyone") is True else frame.get("topic") or INBOX


class _Ledger:
    """The numbers of one log, or of the inbox: received, handled, acked."""

    def __init__(self, after: int | None = None) -> None:
        self.received = self.handled = after
        self.acked: int | None = None
        # It is read because it is watched, and for no other reason.
        self.watched = False
        # What was handled before the last reset is not acked in the numbers after it.
        self.resets = 0
        self.last_reset: tuple[_Line, int] | None = None
        # A reset that is not handled yet: where its numbers begin.
        self.base: int | None = None


#: An item with its log, and the number of resets of that log before it.
_Held = tuple[_Ledger, int, Union[Message, Gap]]


class Inbox:
    """What :func:`connect` returns."""

    def __init__(self, url: str, token: Token, device: str, user: str | None, begin: str | None, window: int,
                 ack: str, gaps: str) -> None:
        self._url, self._ask, self._device, self._user = url.rstrip("/"), token, device, user
        self._begin, self._window, self._ack_when, self._gaps = begin, window, ack, gaps
        self._queue: deque[_Held] = deque()
        self._ledgers: dict[str, _Ledger] = {INBOX: _Ledger()}
        self._watches: dict[str, int | str] = {}
        self._ahead = 0.0
        self._filled = asyncio.Event()
        self._at_hand: _Held | None = None
        self._line: _Line | None = None
        self._next: _Line | None = None
        self._hint: dict[str, int] = {"min_ms": 0, "max_ms": 2000}
        self._failures = self._refusals = 0
        self._token: str | None = None
        self._fresh, self._why = False, "first"
        self._token_lock = asyncio.Lock()
        self._caught_up = False
        self._stopped: str | None = None
        self._states: list[asyncio.Queue[State]] = []
        self._state = State("connecting")
        self._woken = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._runner: asyncio.Task[None] | None = None
        self._mover: asyncio.Task[None] | None = None
        self._acker: asyncio.Task[None] | None = None
        self._refresher: asyncio.Task[None] | None = None

    # --- what an application uses -----------------------------------------------------------------

    @property
    def state(self) -> State:
        """The state now."""
        return self._state

    async def states(self) -> AsyncIterator[State]:
        """The states from now on."""
        queue: asyncio.Queue[State] = asyncio.Queue()
        if self._state.name == "stopped":
            return
        self._states.append(queue)
        try:
            state = self._state
            while state.name != "stopped":
                state = await queue.get()
                yield state
        finally:
            self._states.remove(queue)

    async def __aenter__(self) -> Inbox:
        self._runner = asyncio.create_task(self._run())
        self._spawn(self._watch_clock())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._handled_at_hand()
        await self.close()

    def __aiter__(self) -> Inbox:
        # Whoever left a loop has not handled what was at hand.
        if self._at_hand is not None:
            if isinstance(self._at_hand[2], Gap) and self._gaps == "raise":
                # It was raised, and the application is back: it has reloaded its state.
                self._handled_at_hand()
            else:
                self._queue.appendleft(self._at_hand)
                self._at_hand = None
        return self

    async def __anext__(self) -> Any:
        """The next message (or :class:`Gap`). The one before counts as handled. Raises :class:`Stopped`."""
        self._handled_at_hand()
        while not self._queue:
            if self._stopped is not None:
                if self._stopped == "closed":
                    raise StopAsyncIteration
                raise Stopped(self._stopped)
            self._filled.clear()
            await self._filled.wait()
        self._at_hand = self._queue.popleft()
        item = self._at_hand[2]
        if isinstance(item, Gap) and self._gaps == "raise":
            raise GapError(item)
        return item

    def wake(self) -> None:
        """Looks at once whether the line lives, and tries again at once where the inbox waits."""
        self._woken.set()
        if self._line is not None and self._next is None:
            self._spawn(self._probe(self._line))

    async def refresh(self) -> None:
        """Fetches another token, and shows it to the server."""
        self._token, self._why = None, "expiring"
        token = await self._get_token()
        if (line := self._next or self._line) is not None:
            await line.send({"type": "refresh", "token": token})

    async def watch(self, topic: str, *, since: int | Literal["latest", "last"] = "latest") -> None:
        """Reads the log of a topic of which the user is no member, after ``since``, from its newest message on (``last``), or what
        comes from now on. The token's claim ``watch`` must allow it. The messages come in the same loop, with their topic, also
        after reconnects, until :meth:`unwatch` or the topic's end. A refusal is logged with the code ``forbidden_topic`` or
        ``unknown_topic``."""
        if not _TOPIC.fullmatch(topic) or topic == EVERYONE:
            raise ValueError(f"{topic!r} is no name of a topic")
        if since not in ("latest", "last") and not (isinstance(since, int) and 0 <= since < 2**53):
            raise ValueError('since is a number, "latest" or "last"')
        if topic not in self._watches:
            self._watches[topic] = since
            await self._say_watch(topic, self._line, self._next)

    async def unwatch(self, topic: str) -> None:
        """Ends :meth:`watch`. A membership is not ended by it."""
        if self._watches.pop(topic, None) is None:
            return
        ledger = self._ledgers.get(topic)
        if ledger is not None and not ledger.watched:
            return
        self._ledgers.pop(topic, None)
        for line in (self._line, self._next):
            if line is not None and line.logs is not None:
                line.lefts[topic] = line.lefts.get(topic, 0) + 1
                await line.send_paced({"type": "unwatch", "topic": topic})

    def _drop_watched(self, topic: str) -> None:
        ledger = self._ledgers.get(topic)
        if ledger is not None and ledger.watched:
            del self._ledgers[topic]

    async def _say_watch(self, topic: str, *lines: _Line | None) -> None:
        ledger = self._ledgers.get(topic)
        position = self._position(ledger) if ledger is not None else None
        since = self._watches[topic] if position is None else position
        for line in lines:
            if line is not None and line.logs is not None:
                await line.send_paced({"type": "watch", "topic": topic, "since": since})

    async def close(self) -> None:
        """Says the pending acks and closes."""
        if self._stopped is None:
            self._stop("closed")
        await self._say_acks()
        for line in (self._line, self._next):
            if line is not None:
                await line.close()
        self._line = self._next = None
        for task in (self._runner, self._mover, self._acker, self._refresher, *self._tasks):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    # --- the loop ---------------------------------------------------------------------------------

    async def _run(self) -> None:
        while self._stopped is None:
            self._set("connecting")
            wait: float | None = None
            try:
                self._line = await self._open()
                cause = await self._serve()
            except Refused as refused:
                self._stop("refused", str(refused))
                break
            except _TokenFault as fault:
                log.warning("%s", fault, extra={"code": fault.code})
                cause = fault.code
            except _Closed as closed:
                wait, cause = self._ended(closed)
            except (OSError, websockets.WebSocketException, asyncio.TimeoutError) as error:
                cause = str(error) or type(error).__name__
            except BaseException as error:
                # A fault of this library, or a cancelled token, must not leave the application waiting for ever.
                self._stop("internal", repr(error))
                raise
            if self._stopped is not None:
                break
            self._failures += 1
            delay = self._delay() if wait is None else wait
            self._set("waiting", cause)
            self._woken.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._woken.wait(), None if delay == float("inf") else delay)

    def _delay(self) -> float:
        low, high = self._hint["min_ms"] / 1000, self._hint["max_ms"] / 1000
        longest = max(high, min(RETRY_MAX_S, 0.2 * 2 ** min(self._failures, 10)), low)
        return random.uniform(low, longest)

    def _ended(self, closed: _Closed) -> tuple[float | None, str]:
        """What to wait, and why, after a line or its opening has ended."""
        cause = closed.reason or f"closed with {closed.code}"
        if closed.code in (401, 4501):
            return self._refused(closed.reason), cause
        if closed.code == 4509:
            return float("inf"), "replaced"
        if closed.code == 403 or 4500 <= closed.code < 5000:
            self._stop(cause)
        return self._delay() + closed.retry_after if closed.retry_after else None, cause

    def _refused(self, reason: str) -> float | None:
        if reason == "ticket_invalid":
            return None
        if self._fresh:
            self._refusals += 1
        if self._refusals >= 2:
            self._stop("unauthorized", reason)
            return 0.0
        self._token = None
        self._why = "revoked" if reason == "token_revoked" else "expired"
        return 0.0

    async def _open(self) -> _Line:
        token = await self._get_token()
        place = await asyncio.to_thread(_place, self._url, token, self._device)
        if place is None:
            base = urllib.parse.urlsplit(self._url)
            url = base._replace(scheme=base.scheme.replace("http", "ws"), path=f"{base.path}/v1/ws").geturl()
            return await self._open_at(url, {"token": token}, self._positions())
        if "socket" in place and "ticket" in place:
            return await self._open_at(place["socket"], {"ticket": place["ticket"]}, self._positions())
        return await self._open_at(place["url"], None, self._positions())

    async def _open_at(self, url: str, credential: dict[str, str] | None, known: dict[str, int]) -> _Line:
        options: dict[str, Any] = {"heartbeat": True, "window": self._window, "client": CLIENT}
        if INBOX in known:
            options["since"] = known[INBOX]
        elif self._begin is not None:
            options["begin"] = self._begin
        if credential is None:
            options["heartbeat"] = 1
            url += "&" + urllib.parse.urlencode(options)
        else:
            topics = [(name, seq) for name, seq in known.items() if name not in (INBOX, EVERYONE)]
            options["topics"] = dict(topics[:TOPICS_TOLD]) or True
            if EVERYONE in known:
                options["everyone"] = known[EVERYONE]
        try:
            socket = await open_socket(
                url, subprotocols=[websockets.Subprotocol(SUBPROTOCOL)], open_timeout=OPEN_S, ping_interval=None,
                max_size=None, compression=None)
        except websockets.InvalidStatus as error:
            raise _http_closed(error.response.status_code, error.response.headers, bytes(error.response.body or b"")) from None
        try:
            if credential is not None:
                auth = {"type": "auth", **credential, "device": self._device, **options}
                await socket.send(json.dumps(auth))
            reason, hint = "", None
            while True:
                text = await asyncio.wait_for(socket.recv(), OPEN_S)
                frame = _parsed(text, lambda: socket.transport.abort())
                if frame["type"] == "welcome":
                    return _Line(socket, frame)
                if frame["type"] == "error":
                    reason, hint = frame.get("reason") or "", frame.get("reconnect")
        except websockets.ConnectionClosed as error:
            code = error.rcvd.code if error.rcvd else 1006
            self._hint = hint or self._hint
            raise _Closed(code, reason or (error.rcvd.reason if error.rcvd else "")) from None
        except BaseException:
            if socket.transport is not None:
                socket.transport.abort()
            raise

    async def _serve(self) -> str:
        """Reads lines, the next where one is replaced, until none is left."""
        assert self._line is not None
        await self._welcome(self._line)
        while (line := self._line) is not None:
            try:
                while self._stopped is None and self._line is line:
                    await self._frame(line, await line.frame())
                if self._stopped is not None:
                    return "closed"
                continue
            except _Closed as closed:
                if self._line is not line:
                    continue
                if self._next is not None:
                    self._take(self._next)
                    if self._mover is not None:
                        # It reads that line until now.
                        self._mover.cancel()
                        await asyncio.wait([self._mover])
                    continue
                if line.hint is not None:
                    self._hint = line.hint
                self._line, self._caught_up = None, False
                if self._mover is not None:
                    self._mover.cancel()
                self._rewind()
                raise closed
        return "closed"

    async def _welcome(self, line: _Line) -> None:
        welcome = line.welcome
        if self._user is not None and welcome.get("user") != self._user:
            self._stop("wrong_user", f"the token is of {welcome.get('user')}, not of {self._user}")
            # Nothing is said on it any more, an ack least of all.
            if line is self._line:
                self._line = None
            if line is self._next:
                self._next = None
            await line.close()
            return
        self._failures = self._refusals = 0
        self._fresh, self._why = False, "expiring"
        self._hint = welcome.get("reconnect") or self._hint
        inbox = self._ledgers[INBOX]
        if inbox.received is None:
            inbox.received = inbox.handled = welcome["since"]
        # What this line does not read is read no more.
        logs = line.logs or {}
        self._ledgers = {name: ledger for name, ledger in self._ledgers.items()
                         if name == INBOX or name in logs or name in self._watches}
        for name, after in logs.items():
            self._ledgers.setdefault(name, _Ledger(after)).watched = False
        if line.ask_every is not None:
            self._spawn(self._ask_on(line, line.ask_every))
        if expires := welcome.get("token_expires_at"):
            if server_time := welcome.get("server_time"):
                self._ahead = _moment(server_time).timestamp() - time.time()
            self._schedule_refresh(expires)
        if line is self._line:
            self._set("catching-up")
        await self._say_acks(again=True)
        if self._watches:
            self._spawn(self._say_watches(line))

    async def _say_watches(self, line: _Line) -> None:
        for topic in list(self._watches):
            if topic in self._watches and line in (self._line, self._next):
                await self._say_watch(topic, line)

    async def _ask_on(self, line: _Line, every: float) -> None:
        while line in (self._line, self._next):
            await asyncio.sleep(every)
            await line.send({"type": "ping"})

    async def _frame(self, line: _Line, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        if kind in ("message", "gap"):
            name = _log_of(frame)
            ledger = self._ledgers.get(name)
            if ledger is None:
                # It crossed with the end of a membership.
                return
            if kind == "message":
                await self._take_message(line, name, ledger, frame)
            else:
                self._take_gap(line, name, ledger, frame)
            self._reached()
        elif kind == "topic":
            topic, state = frame["topic"], frame.get("state")
            if state == "left" and line.lefts.get(topic, 0) > 0:
                # What this side has ended itself may be watched anew meanwhile.
                line.lefts[topic] -= 1
            elif state == "left":
                self._ledgers.pop(topic, None)
                self._watches.pop(topic, None)
            elif topic not in self._ledgers:
                ledger = self._ledgers[topic] = _Ledger(frame.get("after") or 0)
                ledger.watched = state == "watching"
            elif state == "joined":
                self._ledgers[topic].watched = False
        elif kind == "caught_up":
            if frame.get("all") is not True if line.logs is not None else _log_of(frame) != INBOX:
                return
            line.caught_up = True
            if line is self._next:
                self._take(line)
            else:
                self._caught_up = True
                self._set("live")
        elif kind == "move" and line is self._line:
            if self._mover is not None:
                self._mover.cancel()
            self._set("moving", frame.get("reason"), frame.get("node"))
            self._mover = asyncio.create_task(self._move(frame))
        elif kind == "refreshed":
            self._fresh = False
            self._schedule_refresh(frame["expires_at"])
        elif kind == "error":
            line.reason = frame.get("reason") or ""
            if hint := frame.get("reconnect"):
                line.hint = self._hint = hint
            if (refused := frame.get("topic")) is not None:
                self._watches.pop(refused, None)
                self._drop_watched(refused)
                log.error("%s: %s", refused, frame.get("message"), extra={"code": frame.get("code")})

    async def _take_message(self, line: _Line, name: str, ledger: _Ledger, frame: dict[str, Any]) -> None:
        seq = line.seq[name] = frame["seq"]
        if ledger.received is not None and seq <= ledger.received:
            # The ack of a repeat gives its credit back.
            await self._say_acks(again=True)
            return
        ledger.received = seq
        self._put(ledger, _message(frame, self._caught_up))
        if self._ack_when == "received":
            self._ack(ledger, seq)

    def _take_gap(self, line: _Line, name: str, ledger: _Ledger, frame: dict[str, Any]) -> None:
        before, reason = frame["before"], frame["reason"]
        reset = reason == "reset"
        if reset:
            # During a move both lines may say it.
            told, ledger.last_reset = ledger.last_reset, (line, before)
            if told is not None and told[0] is not line and told[1] == before:
                return
        if not reset and ledger.received is not None and before <= ledger.received + 1:
            return
        ledger.received = before - 1
        if reset:
            ledger.acked = None
            ledger.resets += 1
            ledger.base = before - 1
        # Nobody is told that there is something that is not for this user.
        if reason != "excepted":
            self._put(ledger, Gap(frame["after"], before, reason, name or None))

    def _reached(self) -> None:
        following, line = self._next, self._line
        if following is None or not following.seq:
            return
        old = line.seq if line is not None else {}
        if all(following.seq.get(name, 0) >= seq for name, seq in old.items()):
            self._take(following)

    def _take(self, line: _Line) -> None:
        old, self._line, self._next = self._line, line, None
        for ledger in self._ledgers.values():
            ledger.last_reset = None
        self._caught_up = line.caught_up or self._caught_up
        self._set("live" if self._caught_up else "catching-up")
        if old is not None and old is not line:
            self._spawn(self._leave(old))

    async def _leave(self, line: _Line) -> None:
        await self._say_acks_on(line, again=True)
        await line.close()

    async def _move(self, order: dict[str, Any]) -> None:
        await asyncio.sleep(order.get("after_ms", 0) / 1000)
        for attempt in range(MOVE_TRIES):
            line: _Line | None = None
            try:
                line = await self._open_at(order["url"], {"token": await self._get_token()}, self._received())
                self._next = line
                await self._welcome(line)
                while self._next is line:
                    await self._frame(line, await line.frame())
                return
            except asyncio.CancelledError:
                if line is not None and line is not self._line:
                    self._next = None
                    self._spawn(line.close())
                raise
            except Exception as error:  # noqa: BLE001 - whatever it was, the old line goes on
                log.debug("a move failed: %s", error)
                if self._line is line:
                    return
                self._next = None
            if attempt + 1 < MOVE_TRIES:
                await asyncio.sleep(random.uniform(self._hint["min_ms"], self._hint["max_ms"]) / 1000)
        self._set("live" if self._caught_up else "catching-up")

    async def _watch_clock(self) -> None:
        """Looks whether the line lives, whenever the clock has jumped."""
        seen = time.time()
        while self._stopped is None:
            await asyncio.sleep(LOOK_S)
            now = time.time()
            if abs(now - seen) > JUMP_S and self._line is not None and self._next is None:
                self._spawn(self._probe(self._line))
            seen = now

    async def _probe(self, line: _Line) -> None:
        heard = line.heard
        await line.send({"type": "ping"})
        await asyncio.sleep(WAKE_S)
        if self._line is not line or line.heard != heard or self._next is not None:
            return
        try:
            following = await self._open()
        except Exception:  # noqa: BLE001 - the loop will see what is wrong
            line.abort()
            return
        if self._stopped is not None or self._line is not line or self._next is not None:
            # The loop, or a move, was faster.
            await following.close()
            return
        self._next = following
        await self._welcome(following)
        self._take(following)
        line.abort()

    # --- tokens -----------------------------------------------------------------------------------

    async def _get_token(self) -> str:
        async with self._token_lock:
            if self._token is None:
                self._token = await self._fetch_token()
                self._fresh = True
            return self._token

    async def _fetch_token(self) -> str:
        if isinstance(self._ask, str):
            return self._ask
        try:
            asked = self._ask(self._why)  # type: ignore[arg-type]
            token = await asyncio.wait_for(asked, PATIENCE_S) if inspect.isawaitable(asked) else asked
        except (Refused, asyncio.CancelledError):
            raise
        except (TimeoutError, asyncio.TimeoutError):
            raise _TokenFault("token_timeout", "token did not answer in 30 s") from None
        except Exception as error:
            raise _TokenFault("token_failed", f"token raised {error!r}") from error
        if not isinstance(token, str) or not token or any(not "!" <= letter <= "~" for letter in token):
            raise _TokenFault("token_rubbish", "token must return a token: a string")
        return token

    def _schedule_refresh(self, expires_at: str) -> None:
        if self._refresher is not None and self._refresher is not asyncio.current_task():
            self._refresher.cancel()
        left = _moment(expires_at).timestamp() - (time.time() + self._ahead)
        self._refresher = asyncio.create_task(self._refresh_in(max(left, 0) * 0.8))

    async def _refresh_in(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        attempt = 0
        while self._stopped is None:
            try:
                await self.refresh()
                return
            except Refused as refused:
                self._stop("refused", str(refused))
            except _TokenFault as fault:
                log.warning("%s", fault, extra={"code": fault.code})
                attempt += 1
                await asyncio.sleep(random.uniform(0, min(RETRY_MAX_S, 0.5 * 2**attempt)))

    # --- the queue, and acks ----------------------------------------------------------------------

    def _position(self, ledger: _Ledger) -> int | None:
        if ledger.base is not None:
            return ledger.base
        if self._at_hand is not None and self._at_hand[0] is ledger and isinstance(self._at_hand[2], Message):
            return self._at_hand[2].seq
        return ledger.handled

    def _positions(self) -> dict[str, int]:
        """Where a new line begins: after what was handled, or is at hand."""
        at = {name: self._position(ledger) for name, ledger in self._ledgers.items() if not ledger.watched}
        return {name: seq for name, seq in at.items() if seq is not None}

    def _received(self) -> dict[str, int]:
        """Where the next line of a move begins."""
        at = {name: ledger.received for name, ledger in self._ledgers.items() if not ledger.watched}
        return {name: seq for name, seq in at.items() if seq is not None}

    def _rewind(self) -> None:
        # What was not handed over comes again, save a reset, which is told once.
        self._queue = deque(held for held in self._queue if held[1] == held[0].resets and isinstance(held[2], Gap)
                            and held[2].reason == "reset")
        for ledger in self._ledgers.values():
            ledger.last_reset = None
            if ledger.received is not None:
                ledger.received = self._position(ledger)
                # What was acked as received and comes again is acked again, or its credit would be gone.
                if ledger.acked is not None and ledger.received is not None:
                    ledger.acked = min(ledger.acked, ledger.received)

    def _put(self, ledger: _Ledger, item: Message | Gap) -> None:
        self._queue.append((ledger, ledger.resets, item))
        self._filled.set()

    def _handled_at_hand(self) -> None:
        held, self._at_hand = self._at_hand, None
        if held is None or held[1] != held[0].resets:
            return
        ledger, _, item = held
        if isinstance(item, Gap):
            seq, reset = item.before - 1, item.reason == "reset"
        else:
            seq, reset = item.seq, False
        ledger.handled = seq if reset or ledger.handled is None else max(seq, ledger.handled)
        if reset:
            ledger.base = None
        if self._ack_when == "handled":
            self._ack(ledger, ledger.handled)

    def _ack(self, ledger: _Ledger, seq: int) -> None:
        if ledger.acked is not None and seq <= ledger.acked:
            return
        ledger.acked = seq
        if self._acker is None or self._acker.done():
            self._acker = asyncio.create_task(self._ack_soon())

    async def _ack_soon(self) -> None:
        await asyncio.sleep(ACK_S)
        await self._say_acks()

    async def _say_acks(self, again: bool = False) -> None:
        for line in (self._line, self._next):
            if line is not None:
                await self._say_acks_on(line, again)

    async def _say_acks_on(self, line: _Line, again: bool) -> None:
        acked = {name: ledger.acked for name, ledger in self._ledgers.items() if ledger.acked is not None}
        new = {name: seq for name, seq in acked.items() if again or line.acked.get(name) != seq}
        line.acked.update(new)
        frame: dict[str, Any] = {"type": "ack"}
        if INBOX in new:
            frame["seq"] = new.pop(INBOX)
        if line.logs is None:
            new = {}
        if EVERYONE in new:
            frame["everyone"] = new.pop(EVERYONE)
        topics = list(new.items())
        while topics or len(frame) > 1:
            if topics:
                frame["topics"] = dict(topics[:TOPICS_ACKED])
            topics = topics[TOPICS_ACKED:]
            await line.send(frame)
            frame = {"type": "ack"}

    # --- the rest ---------------------------------------------------------------------------------

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set(self, name: str, cause: str | None = None, node: str | None = None) -> None:
        if (self._stopped is not None and name != "stopped") or (self._state.name == name != "waiting"):
            return
        if node is None and name in ("catching-up", "live") and self._line is not None:
            node = self._line.welcome.get("node")
        self._state = State(name, cause, node)
        for queue in self._states:
            queue.put_nowait(self._state)

    def _stop(self, cause: str, detail: str = "") -> None:
        if self._stopped is not None:
            return
        self._stopped = cause
        # What was not handed over comes again at the next start.
        self._queue.clear()
        if cause != "closed":
            log.error("stopped: %s %s", cause, detail, extra={"code": cause})
        self._set("stopped", cause)
        self._woken.set()
        self._filled.set()


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _message(frame: dict[str, Any], live: bool) -> Message:
    name = _log_of(frame)
    return Message(frame["seq"], frame["id"], frame.get("payload"), frame.get("event"), frame.get("via") or name or None,
                   _moment(frame["accepted_at"]), _moment(frame["expires_at"]), live, name != INBOX,
                   frame.get("traceparent"))


def _http_closed(status: int, headers: Any, body: bytes) -> _Closed:
    try:
        reason = json.loads(body).get("reason") or ""
    except (ValueError, AttributeError):
        reason = ""
    return _Closed(status, reason or f"answered {status}" if status not in (401, 403) else reason,
                   retry_after_s(headers.get("Retry-After")))


def _place(url: str, token: str, device: str) -> dict[str, str] | None:
    """Where to open a socket; ``None`` where the server has no such call or cannot be reached by it."""
    request = urllib.request.Request(
        f"{url}/v1/connect", method="POST", data=json.dumps({"device": device}).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=OPEN_S) as answer:
            place = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (404, 405):
            return None
        body = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = error.read()
        raise _http_closed(error.code, error.headers, body) from None
    except (OSError, ValueError, http.client.HTTPException):
        return None
    return place if isinstance(place, dict) and isinstance(place.get("url"), str) else None
