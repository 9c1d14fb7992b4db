//! Why a token or a ticket is refused.

/// The reasons, as they stand in `reason` of an `error` frame, of a close with 4501, and of a 401
/// problem (docs/protocol.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RefusalReason {
    /// Nothing was shown.
    TokenMissing,
    /// It has not the form of a token.
    TokenMalformed,
    /// Its signature, issuer or audience is wrong, or it is not valid yet.
    TokenInvalid,
    /// It has expired.
    TokenExpired,
    /// It was issued before the user was disconnected.
    TokenRevoked,
    /// The ticket is not good; this says nothing about the token. The client asks `connect` again.
    TicketInvalid,
}

const TABLE: [(RefusalReason, &str); 6] = [
    (RefusalReason::TokenMissing, "token_missing"),
    (RefusalReason::TokenMalformed, "token_malformed"),
    (RefusalReason::TokenInvalid, "token_invalid"),
    (RefusalReason::TokenExpired, "token_expired"),
    (RefusalReason::TokenRevoked, "token_revoked"),
    (RefusalReason::TicketInvalid, "ticket_invalid"),
];

impl RefusalReason {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        TABLE.iter().find(|row| row.0 == self).map_or("token_invalid", |row| row.1)
    }

    /// The reason of this name. An auth service that gives none, or one that is not known here,
    /// means [`RefusalReason::TokenInvalid`].
    #[must_use]
    pub fn parse(name: Option<&str>) -> Self {
        let row = TABLE.iter().find(|row| Some(row.1) == name);
        row.map_or(Self::TokenInvalid, |row| row.0)
    }
}

/// A token or ticket that was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refused {
    /// Why, for programs.
    pub reason: RefusalReason,
    /// Why, for people; never a part of the token.
    pub detail: String,
}

impl Refused {
    /// A refusal for this reason.
    pub fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_and_what_is_not_known_is_an_invalid_token() {
        for (reason, name) in TABLE {
            assert_eq!((reason.name(), RefusalReason::parse(Some(name))), (name, reason));
        }
        assert_eq!(RefusalReason::parse(Some("stolen")), RefusalReason::TokenInvalid);
        assert_eq!(RefusalReason::parse(None), RefusalReason::TokenInvalid);
    }
}
