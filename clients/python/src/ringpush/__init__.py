"""The client library of ringpush: :func:`connect` receives messages, :class:`Publisher` publishes them."""

from ._errors import GapError, Refused, RingpushError, Stopped
from ._inbox import Gap, Inbox, Message, State, connect
from ._publish import Accepted, Publisher, PublishFailed, SyncPublisher, TopicAccepted

__all__ = [
    "Accepted", "Gap", "GapError", "Inbox", "Message", "PublishFailed", "Publisher", "Refused", "RingpushError", "State",
    "Stopped", "SyncPublisher", "TopicAccepted", "connect",
]
__version__ = "0.1.0"
