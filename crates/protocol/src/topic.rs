//! What a topic is: how its messages reach its members.

use std::fmt;

use crate::message::{TOPIC_MAX_BYTES, TopicName};

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

/// Patterns of names of topics. A pattern is a name, or the beginning of names with one `*` behind
/// it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TopicPatterns(Vec<Box<str>>);

impl TopicPatterns {
    /// Reads patterns. Returns the first that is none as the error.
    ///
    /// # Errors
    ///
    /// What is no pattern.
    pub fn parse<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, &'a str> {
        let read = |pattern| if is_pattern(pattern) { Ok(Box::from(pattern)) } else { Err(pattern) };
        patterns.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a name follows one of the patterns.
    #[must_use]
    pub fn match_name(&self, topic: &TopicName) -> bool {
        let name = topic.as_str();
        self.0.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == &**pattern,
        })
    }

    /// The patterns as text.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.iter().map(|pattern| &**pattern)
    }
}

fn is_pattern(pattern: &str) -> bool {
    match pattern.strip_suffix('*') {
        None => TopicName::parse(pattern).is_ok(),
        // Any beginning of a name, also the empty one: all topics.
        Some("") => true,
        Some(beginning) => {
            beginning.len() < TOPIC_MAX_BYTES && TopicName::parse(&format!("{beginning}x")).is_ok()
        }
    }
}
