"""Publishing. Each publish has an id, so that its repeats after a 503 or a lost answer are stored once."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from ._errors import RingpushError, retry_after_s

#: Tries of one publish, and the longest wait between two in seconds.
TRIES, RETRY_MAX_S = 8, 10.0
DEADLINE_S = 15.0


@dataclass(frozen=True)
class Accepted:
    """The outcome for one recipient: its number, or why it is not stored."""

    user: str
    seq: int | None
    duplicate: bool
    error: str | None


@dataclass(frozen=True)
class TopicAccepted:
    """The outcome for one topic, or for everyone, whose name is ``everyone``.

    Of an ``inbox`` topic: how many members the message is for, how many have it, and who does not. Of a log: its number
    there, and whether it stood there already; ``members`` and ``stored`` are 0.
    """

    topic: str
    members: int
    stored: int
    failed: list[Accepted]
    error: str | None
    seq: int | None = None
    duplicate: bool = False


class PublishFailed(RingpushError):
    """The server refused a publish, or could not be reached. ``problem`` is its answer; a repeat under ``id`` is safe."""

    def __init__(self, status: int, detail: str, id: str, problem: dict[str, Any] | None) -> None:
        super().__init__(f"{status}: {detail}" if status else detail)
        self.status, self.id, self.problem = status, id, problem


def _users(users: str | Sequence[str]) -> dict[str, Any]:
    return {"user": users} if isinstance(users, str) else {"users": list(users)}


def _topics(topics: str | Sequence[str], exclude: Sequence[str]) -> dict[str, Any]:
    return _but_for(exclude, {"topic": topics} if isinstance(topics, str) else {"topics": list(topics)})


def _but_for(exclude: Sequence[str], to: dict[str, Any]) -> dict[str, Any]:
    return {**to, "except": list(exclude)} if exclude else to


def _body(to: dict[str, Any], payload: Any, id: str | None, event: str | None, ttl_s: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {"to": to, "payload": payload, "id": id or uuid.uuid4().hex}
    if event is not None:
        body["event"] = event
    if ttl_s is not None:
        body["ttl_s"] = ttl_s
    return body


def _error(entry: dict[str, Any]) -> str | None:
    error = entry.get("error")
    return None if error is None else f"{error.get('status')}: {error.get('detail', '')}"


def _accepted(entry: dict[str, Any]) -> Accepted:
    return Accepted(entry["user"], entry.get("seq"), entry.get("duplicate", False), _error(entry))


def _topic_accepted(entry: dict[str, Any]) -> TopicAccepted:
    failed = [_accepted(one) for one in entry.get("failed", [])]
    topic = "everyone" if entry.get("everyone") else entry["topic"]
    return TopicAccepted(topic, entry.get("members", 0), entry.get("stored", 0), failed, _error(entry), entry.get("seq"),
                         entry.get("duplicate", False))


class _Try:
    """Decides after each try: the outcome, an error, or how long to wait."""

    def __init__(self, id: str) -> None:
        self.id, self.tries = id, 0

    def after(self, answer: httpx.Response | httpx.HTTPError) -> list[dict[str, Any]] | float:
        self.tries += 1
        wait = random.uniform(0, min(RETRY_MAX_S, 0.1 * 2**self.tries))
        if isinstance(answer, httpx.HTTPError):
            if self.tries >= TRIES:
                raise PublishFailed(0, f"cannot be reached: {answer!r}", self.id, None) from answer
            return wait
        if answer.status_code == 202:
            accepted: list[dict[str, Any]] = answer.json()["accepted"]
            return accepted
        try:
            problem = answer.json()
        except ValueError:
            problem = {"detail": answer.text[:200]}
        if answer.status_code in (429, 502, 503, 504) and self.tries < TRIES:
            return max(wait, retry_after_s(answer.headers.get("retry-after")))
        raise PublishFailed(answer.status_code, str(problem.get("detail", "")), self.id, problem)


class Publisher:
    """Publishes from asyncio. ``url`` is that of collect, ``key`` an API key."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=DEADLINE_S)

    async def publish(self, users: str | Sequence[str], payload: Any, *, id: str | None = None, event: str | None = None,
                      ttl_s: int | None = None) -> list[Accepted]:
        """Stores a message for one user or several; tries again where that is safe. Raises :class:`PublishFailed`."""
        outcomes = await self._send(_body(_users(users), payload, id, event, ttl_s))
        return [_accepted(entry) for entry in outcomes]

    async def publish_topic(self, topics: str | Sequence[str], payload: Any, *, exclude: Sequence[str] = (), id: str | None = None,
                            event: str | None = None, ttl_s: int | None = None) -> list[TopicAccepted]:
        """Stores a message for the members of one topic or several, but for the users of ``exclude``. As :meth:`publish`."""
        outcomes = await self._send(_body(_topics(topics, exclude), payload, id, event, ttl_s))
        return [_topic_accepted(entry) for entry in outcomes]

    async def publish_everyone(self, payload: Any, *, exclude: Sequence[str] = (), id: str | None = None, event: str | None = None,
                               ttl_s: int | None = None) -> TopicAccepted:
        """Stores a message for all users, but for those of ``exclude``. As :meth:`publish`."""
        to = _but_for(exclude, {"everyone": True})
        [outcome] = await self._send(_body(to, payload, id, event, ttl_s))
        return _topic_accepted(outcome)

    async def _send(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        attempt = _Try(body["id"])
        while True:
            try:
                answer: httpx.Response | httpx.HTTPError = await self._http.post("/v1/messages", json=body)
            except httpx.HTTPError as error:
                answer = error
            outcome = attempt.after(answer)
            if not isinstance(outcome, float):
                return outcome
            await asyncio.sleep(outcome)

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Publisher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class SyncPublisher:
    """The same without asyncio."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=DEADLINE_S)

    def publish(self, users: str | Sequence[str], payload: Any, *, id: str | None = None, event: str | None = None,
                ttl_s: int | None = None) -> list[Accepted]:
        """Stores a message for one user or several; tries again where that is safe. Raises :class:`PublishFailed`."""
        outcomes = self._send(_body(_users(users), payload, id, event, ttl_s))
        return [_accepted(entry) for entry in outcomes]

    def publish_topic(self, topics: str | Sequence[str], payload: Any, *, exclude: Sequence[str] = (), id: str | None = None,
                      event: str | None = None, ttl_s: int | None = None) -> list[TopicAccepted]:
        """Stores a message for the members of one topic or several, but for the users of ``exclude``. As :meth:`publish`."""
        outcomes = self._send(_body(_topics(topics, exclude), payload, id, event, ttl_s))
        return [_topic_accepted(entry) for entry in outcomes]

    def publish_everyone(self, payload: Any, *, exclude: Sequence[str] = (), id: str | None = None, event: str | None = None,
                         ttl_s: int | None = None) -> TopicAccepted:
        """Stores a message for all users, but for those of ``exclude``. As :meth:`publish`."""
        to = _but_for(exclude, {"everyone": True})
        [outcome] = self._send(_body(to, payload, id, event, ttl_s))
        return _topic_accepted(outcome)

    def _send(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        attempt = _Try(body["id"])
        while True:
            try:
                answer: httpx.Response | httpx.HTTPError = self._http.post("/v1/messages", json=body)
            except httpx.HTTPError as error:
                answer = error
            outcome = attempt.after(answer)
            if not isinstance(outcome, float):
                return outcome
            time.sleep(outcome)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> SyncPublisher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
