"""What goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._inbox import Gap


#: Longest ``Retry-After`` that is believed, in seconds: a day.
RETRY_AFTER_MAX_S = 86_400.0


def retry_after_s(header: str | None) -> float:
    """The seconds of a ``Retry-After``; 0 where there is none, or one that is no number of seconds."""
    return min(float(header), RETRY_AFTER_MAX_S) if header and header.isascii() and header.isdigit() else 0.0


class RingpushError(Exception):
    """The base of this library's errors."""


class Refused(RingpushError):
    """Raised by ``token``: there will be no token. The inbox stops."""


class Stopped(RingpushError):
    """The inbox has stopped for good; ``cause`` says why."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


class GapError(RingpushError):
    """Numbers will never come (``gaps="raise"``). Reload your state, then iterate again."""

    def __init__(self, gap: Gap) -> None:
        super().__init__(f"messages {gap.after + 1} to {gap.before - 1} are gone ({gap.reason})")
        self.gap = gap
