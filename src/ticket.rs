//! Tickets: `connect` hands one out so that a client can open one socket on one node without
//! showing its token again.
//!
//! A ticket is signed under a key derived from `peer.secret` for this use alone, so a ticket never
//! passes for a token, nor a token for a ticket. This module signs and verifies. The node that a
//! ticket is for makes sure that it is taken only once ([`UsedNonces`]).

use std::collections::BTreeSet;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::message::{DeviceId, Millis, NodeId, UserId};
use crate::secret::SharedKeys;
use crate::watching::WatchRights;

/// Life of a ticket, in ms (docs/design.md, section 11).
pub const TICKET_LIFE_MS: u64 = 30_000;
/// Most nonces that one node remembers until their tickets expire. 4000 tickets/s over one life are
/// 120,000; the bound is four times that, for a node without a limit on its accept rate. 500,000 x
/// 40 bytes = 20 MB.
pub const USED_NONCES_MAX: usize = 500_000;

/// What a ticket vouches for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The user whose socket it opens.
    pub user: UserId,
    /// The device of that socket.
    pub device: DeviceId,
    /// The node that must open it.
    pub node: NodeId,
    /// The incarnation of that node.
    pub incarnation: u64,
    /// `iat` of the token that it was made for, in whole seconds; zero if that token had none.
    pub token_iat_s: u64,
    /// `exp` of that token, in whole seconds. The session ends at that time.
    pub token_exp_s: u64,
    /// The node was not the owner when the ticket was made: the session stays there until the view
    /// changes.
    pub keep: bool,
    /// A random number that makes the ticket unique.
    pub nonce: u64,
    /// When the ticket itself expires.
    pub expires_at: Millis,
    /// What the token allows to watch, if it says so.
    pub watch: Option<WatchRights>,
}

/// Why a ticket is refused. Each is answered 401; the client asks `connect` again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// It was not signed by this cluster.
    #[error("this is not a ticket of this cluster")]
    Forged,
    /// Its life is over.
    #[error("this ticket has expired")]
    Expired,
    /// It has opened a socket before.
    #[error("this ticket was used already")]
    Used,
    /// It is for another node, or for an earlier process of this node.
    #[error("this ticket is for another process")]
    Elsewhere,
}

/// The ticket as it travels, with short names, because it stands in a URL.
#[derive(Serialize, Deserialize)]
struct Packed<'a> {
    u: &'a str,
    d: &'a str,
    n: &'a str,
    i: u64,
    a: u64,
    x: u64,
    k: bool,
    o: u64,
    e: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    w: Option<Vec<&'a str>>,
}

/// Signs and verifies tickets. Cheap to clone.
#[derive(Clone)]
pub struct TicketKey {
    keys: SharedKeys,
}

impl TicketKey {
    /// Derives the keys for tickets from the secrets that all roles share.
    #[must_use]
    pub fn derive(peer_secrets: &[&str]) -> Self {
        Self { keys: SharedKeys::derive(peer_secrets, b"ringpush ticket key, version 1") }
    }

    /// Replaces the secrets, in every clone.
    pub fn replace(&self, peer_secrets: &[&str]) {
        self.keys.replace(peer_secrets);
    }

    /// Encodes and signs `ticket` for a URL.
    #[must_use]
    pub fn sign(&self, ticket: &Ticket) -> String {
        let packed = Packed {
            u: ticket.user.as_str(),
            d: ticket.device.as_str(),
            n: ticket.node.as_str(),
            i: ticket.incarnation,
            a: ticket.token_iat_s,
            x: ticket.token_exp_s,
            k: ticket.keep,
            o: ticket.nonce,
            e: ticket.expires_at.0,
            w: ticket.watch.as_ref().map(|rights| rights.patterns().collect()),
        };
        // Only strings and numbers: serialisation cannot fail.
        let body = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&packed).unwrap_or_default());
        let mac = self.keys.mac(&body);
        format!("{body}.{mac}")
    }

    /// Reads a ticket meant for `node` in its present `incarnation`.
    ///
    /// # Errors
    /// [`TicketError`], all but [`TicketError::Used`].
    pub fn verify(
        &self,
        text: &str,
        node: &NodeId,
        incarnation: u64,
        now: Millis,
    ) -> Result<Ticket, TicketError> {
        let ticket = self.open(text).ok_or(TicketError::Forged)?;
        if ticket.node != *node || ticket.incarnation != incarnation {
            return Err(TicketError::Elsewhere);
        }
        if ticket.expires_at <= now || ticket.token_exp_s <= now.seconds() {
            return Err(TicketError::Expired);
        }
        Ok(ticket)
    }

    fn open(&self, text: &str) -> Option<Ticket> {
        let (body, given) = text.split_once('.')?;
        if !self.keys.is_mac(body, given) {
            return None;
        }
        let json = URL_SAFE_NO_PAD.decode(body).ok()?;
        let packed: PackedOwned = serde_json::from_slice(&json).ok()?;
        Some(Ticket {
            user: UserId::parse(&packed.u).ok()?,
            device: DeviceId::parse(&packed.d).ok()?,
            node: NodeId::parse(&packed.n).ok()?,
            incarnation: packed.i,
            token_iat_s: packed.a,
            token_exp_s: packed.x,
            keep: packed.k,
            nonce: packed.o,
            expires_at: Millis(packed.e),
            watch: packed.w.and_then(|all| WatchRights::parse(all.iter().map(String::as_str)).ok()),
        })
    }
}

/// Like [`Packed`] with owned strings: a user id may contain characters that JSON escapes.
#[derive(Deserialize)]
struct PackedOwned {
    u: String,
    d: String,
    n: String,
    i: u64,
    a: u64,
    x: u64,
    k: bool,
    o: u64,
    e: u64,
    #[serde(default)]
    w: Option<Vec<String>>,
}

/// The nonces of the tickets that were taken here and have not expired, in the order of their
/// expiry.
#[derive(Debug, Default)]
pub struct UsedNonces {
    taken: BTreeSet<(Millis, u64)>,
}

impl UsedNonces {
    /// Takes a ticket that [`TicketKey::verify`] accepted, once. After its expiry `verify` refuses
    /// it, so its nonce is dropped then.
    ///
    /// # Errors
    ///
    /// [`TicketError::Used`] the second time, and when [`USED_NONCES_MAX`] nonces are remembered:
    /// to refuse is safe, to forget is not.
    pub fn take(&mut self, ticket: &Ticket, now: Millis) -> Result<(), TicketError> {
        while self.taken.first().is_some_and(|(expires_at, _)| *expires_at <= now) {
            self.taken.pop_first();
        }
        if self.taken.len() >= USED_NONCES_MAX || !self.taken.insert((ticket.expires_at, ticket.nonce)) {
            return Err(TicketError::Used);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket() -> Ticket {
        Ticket {
            user: UserId::parse("a\"\\用户").unwrap(),
            device: DeviceId::parse("web-1").unwrap(),
            node: NodeId::parse("push-1").unwrap(),
            incarnation: 7,
            token_iat_s: 90,
            token_exp_s: 10_000,
            keep: false,
            nonce: 42,
            expires_at: Millis(130_000),
            watch: Some(WatchRights::parse(["match-*"]).unwrap()),
        }
    }

    #[test]
    fn a_ticket_opens_where_and_while_it_should() {
        let key = TicketKey::derive(&["secret-one"]);
        let text = key.sign(&ticket());
        let (node, now) = (NodeId::parse("push-1").unwrap(), Millis(100_000));
        assert_eq!(key.verify(&text, &node, 7, now), Ok(ticket()));
        assert_eq!(key.verify(&text, &node, 8, now), Err(TicketError::Elsewhere));
        let other = NodeId::parse("push-2").unwrap();
        assert_eq!(key.verify(&text, &other, 7, now), Err(TicketError::Elsewhere));
        assert_eq!(key.verify(&text, &node, 7, Millis(130_000)), Err(TicketError::Expired));
        let stranger = TicketKey::derive(&["secret-two"]);
        assert_eq!(stranger.verify(&text, &node, 7, now), Err(TicketError::Forged));
    }

    #[test]
    fn a_ticket_is_taken_once_even_when_others_expire_in_between() {
        let mut used = UsedNonces::default();
        let (first, mut second) = (ticket(), ticket());
        second.nonce = 43;
        second.expires_at = Millis(110_000);
        assert_eq!(used.take(&first, Millis(100_000)), Ok(()));
        assert_eq!(used.take(&second, Millis(109_000)), Ok(()));
        assert_eq!(used.take(&second, Millis(109_999)), Err(TicketError::Used));
        assert_eq!(used.take(&first, Millis(129_999)), Err(TicketError::Used));
        assert_eq!(used.taken.len(), 1, "one that has expired is not remembered");
    }

    proptest! {
        #[test]
        fn a_changed_ticket_is_forged(at: proptest::sample::Index, flip in 1u8..=127) {
            let key = TicketKey::derive(&["secret-one"]);
            let mut bytes = key.sign(&ticket()).into_bytes();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let node = NodeId::parse("push-1").unwrap();
            if let Ok(text) = String::from_utf8(bytes) {
                // The last character of a base64 group has bits that mean nothing; all else must be
                // refused.
                if let Ok(read) = key.verify(&text, &node, 7, Millis(100_000)) {
                    prop_assert_eq!(read, ticket());
                }
            }
        }
    }
}
