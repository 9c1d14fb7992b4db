//! The close codes, as one table. After 4000 to 4499 a client reconnects after the hint; after 4500
//! to 4999 it must do something first.

/// Why the server closes a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseCode {
    /// The response to the client's own close.
    Normal,
    /// The node is leaving.
    Draining,
    /// No token came within the deadline.
    AuthTimeout,
    /// Too many frames or connections.
    RateLimited,
    /// Two pings went unanswered, without any other sign of life.
    HeartbeatTimeout,
    /// The node sheds load, or auth cannot be reached.
    Overloaded,
    /// Not JSON, unknown type, wrong field, binary where text is due.
    BadFrame,
    /// The token is missing, bad, expired or revoked.
    Unauthorized,
    /// The page's origin is not on the list.
    ForbiddenOrigin,
    /// The user has too many sessions: the oldest one is closed.
    Replaced,
    /// A frame or message is over the limit.
    TooBig,
    /// A violation of RFC 6455.
    Protocol,
    /// Text that is not UTF-8.
    InvalidUtf8,
}

/// Code, number on the wire, name.
const TABLE: [(CloseCode, u16, &str); 13] = [
    (CloseCode::Normal, 1000, "normal"),
    (CloseCode::Protocol, 1002, "protocol"),
    (CloseCode::InvalidUtf8, 1007, "invalid_utf8"),
    (CloseCode::Draining, 4302, "draining"),
    (CloseCode::AuthTimeout, 4408, "auth_timeout"),
    (CloseCode::RateLimited, 4429, "rate_limited"),
    (CloseCode::HeartbeatTimeout, 4451, "heartbeat_timeout"),
    (CloseCode::Overloaded, 4453, "overloaded"),
    (CloseCode::BadFrame, 4500, "bad_frame"),
    (CloseCode::Unauthorized, 4501, "unauthorized"),
    (CloseCode::ForbiddenOrigin, 4503, "forbidden_origin"),
    (CloseCode::Replaced, 4509, "replaced"),
    (CloseCode::TooBig, 4513, "too_big"),
];

impl CloseCode {
    fn row(self) -> (u16, &'static str) {
        TABLE.iter().find(|row| row.0 == self).map_or((1000, "normal"), |row| (row.1, row.2))
    }

    /// The number in the close frame.
    #[must_use]
    pub fn number(self) -> u16 {
        self.row().0
    }

    /// The name: the reason in the close frame and `code` in an `error` frame.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Whether a client may reconnect without doing anything else first. Codes that are not ours
    /// count as a lost connection, except a normal close.
    #[must_use]
    pub fn may_reconnect(number: u16) -> bool {
        !matches!(number, 1000 | 4500..=4999)
    }

    /// All codes, for metrics and documents.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_one_number_and_one_name() {
        let mut numbers: Vec<u16> = CloseCode::all().map(CloseCode::number).collect();
        numbers.dedup();
        assert_eq!(numbers.len(), TABLE.len());
        assert_eq!(CloseCode::Replaced.number(), 4509);
        assert_eq!(CloseCode::Draining.name(), "draining");
    }

    #[test]
    fn the_number_says_whether_to_come_back() {
        for code in [4302, 4408, 4429, 4451, 4453, 1006, 1012] {
            assert!(CloseCode::may_reconnect(code), "{code}");
        }
        for code in [1000, 4500, 4501, 4503, 4509, 4513] {
            assert!(!CloseCode::may_reconnect(code), "{code}");
        }
    }
}
