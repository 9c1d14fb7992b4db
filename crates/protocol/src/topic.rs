//! What a topic is: how its messages reach its members.

use std::fmt;

/// How a message to a topic reaches the members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Delivery {
    /// It is stored in the inbox of each member, in one order with everything else that the member
    /// gets. For up to [`INBOX_MEMBERS`] members.
    Inbox,
    /// It is stored once, in the log of the topic, and the nodes read it for their sockets. For any
    /// number of members; in one order for each topic, and in none with other messages.
    Log,
}

/// Most members of a topic with [`Delivery::Inbox`]. Members that join at the same moment may
/// exceed it by a few.
pub const INBOX_MEMBERS: usize = 1_000;
/// Most topics with [`Delivery::Inbox`] that a user is a member of.
pub const INBOX_TOPICS: usize = 1_000;
/// Most topics with [`Delivery::Log`] that a user is a member of.
pub const LOG_TOPICS: usize = 100;

impl Delivery {
    /// The name in requests, responses and documents.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbox => "inbox",
            Self::Log => "log",
        }
    }

    /// The delivery of this name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Inbox, Self::Log].into_iter().find(|delivery| delivery.name() == name)
    }
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
