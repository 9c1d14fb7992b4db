//! Proofs that somebody knows `peer.secret`: a caller, for one call; a node, for its entry in the
//! registry.
//!
//! The proof of a call names the node and process that it is for, and the method. It has a time, a
//! random number of the caller's link and a counter. Whoever sees one cannot use it elsewhere, for
//! another method, or again: each counter is taken once ([`Calls`]). A proof does not cover the
//! message: without mutual TLS somebody between two roles can read and change it.
//!
//! The proof of an entry covers the node's address, so that no node dials an address that somebody
//! merely wrote into the registry.

use std::collections::HashMap;

use crate::message::{Millis, NodeId};
use crate::secret::SharedKeys;

/// How far the clocks of two peers may differ, in seconds.
pub const PROOF_LIFE_S: u64 = 60;
/// Most links of peers that are remembered, 550 bytes each: 2 MB. A process has one link to each
/// node that it calls.
pub const LINKS_MAX: usize = 4_096;
/// How far the counters of one link may overtake one another: four times the streams of an HTTP/2
/// connection.
const WINDOW: u64 = 4_096;
const WORDS: usize = WINDOW as usize / 64;

/// The call that a proof is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call<'a> {
    /// The node that is called.
    pub node: &'a str,
    /// The incarnation of that node.
    pub incarnation: u64,
    /// The path of the method, such as `/ringpush.peer.v1.Push/Ping`.
    pub method: &'a str,
}

/// Why a proof is refused. The text names the setting at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// It was not made with our secret.
    #[error("the caller's peer.secret is not the one of this node")]
    Secret,
    /// Made for another node, or for another process of this one.
    #[error(
        "the call is for another node or process: the peer.advertise of that node leads here, or its caller is late"
    )]
    Elsewhere,
    /// Its time is too far in the past or future.
    #[error("the caller's clock is more than {PROOF_LIFE_S} s from the one of this node; set both by NTP")]
    Clock,
    /// It was taken before.
    #[error("this call was made already")]
    Repeated,
    /// There are more links than are remembered.
    #[error("too many callers at once")]
    Crowded,
}

/// The keys for proofs of calls. Cloned, they are the same keys.
#[must_use]
pub fn call_keys(peer_secrets: &[&str]) -> SharedKeys {
    SharedKeys::derive(peer_secrets, b"ringpush peer call, version 2")
}

/// Makes the proofs of one link. Each link has a counter of its own.
pub struct Signer {
    keys: SharedKeys,
    link: u64,
    count: std::sync::atomic::AtomicU64,
}

impl Signer {
    /// `link` is a random number that identifies the link.
    #[must_use]
    pub fn new(keys: SharedKeys, link: u64) -> Self {
        Self { keys, link, count: std::sync::atomic::AtomicU64::new(1) }
    }

    /// The proof of one call that is made now.
    #[must_use]
    pub fn sign(&self, call: Call<'_>, now: Millis) -> String {
        let count = self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let Call { node, incarnation, method } = call;
        let said = format!("2.{node}.{incarnation}.{}.{}.{count}", now.seconds(), self.link);
        let mac = self.keys.mac(&format!("{said} {method}"));
        format!("{said}.{mac}")
    }
}

/// Verifies calls, and takes each once.
pub struct Calls {
    keys: SharedKeys,
    links: HashMap<u64, Window>,
}

/// Which counters of a link were taken: all below `highest - WINDOW`, and those whose bit is set.
struct Window {
    highest: u64,
    bits: [u64; WORDS],
    /// When the last proof of the link was made, in seconds.
    made_s: u64,
}

impl Calls {
    /// No counter was taken yet.
    #[must_use]
    pub fn new(keys: SharedKeys) -> Self {
        Self { keys, links: HashMap::new() }
    }

    /// Takes the proof of a call of `method`. `is_here` says whether a node of this name and
    /// incarnation runs in this process. Returns the node that is meant.
    ///
    /// # Errors
    ///
    /// [`ProofError`].
    pub fn take(
        &mut self,
        proof: &str,
        method: &str,
        now: Millis,
        is_here: impl FnOnce(&str, u64) -> bool,
    ) -> Result<NodeId, ProofError> {
        let (said, given) = proof.rsplit_once('.').ok_or(ProofError::Secret)?;
        if !self.keys.is_mac(&format!("{said} {method}"), given) {
            return Err(ProofError::Secret);
        }
        // From here on the text is known to come from somebody who knows the secret.
        let parts: Vec<&str> = said.split('.').collect();
        let ["2", node, incarnation, made_s, link, count] = parts[..] else { return Err(ProofError::Secret) };
        let number = |text: &str| text.parse::<u64>().map_err(|_| ProofError::Secret);
        let (made_s, link, count) = (number(made_s)?, number(link)?, number(count)?);
        let node_id = NodeId::parse(node).map_err(|_| ProofError::Secret)?;
        if !is_here(node, number(incarnation)?) {
            return Err(ProofError::Elsewhere);
        }
        if made_s.abs_diff(now.seconds()) > PROOF_LIFE_S {
            return Err(ProofError::Clock);
        }
        self.take_count(link, count, made_s, now)?;
        Ok(node_id)
    }

    fn take_count(&mut self, link: u64, count: u64, made_s: u64, now: Millis) -> Result<(), ProofError> {
        if !self.links.contains_key(&link) {
            if self.links.len() >= LINKS_MAX {
                // A proof that is older is refused for its age, so its counter need not be
                // remembered.
                let old = now.seconds().saturating_sub(2 * PROOF_LIFE_S);
                self.links.retain(|_, window| window.made_s >= old);
            }
            if self.links.len() >= LINKS_MAX {
                return Err(ProofError::Crowded);
            }
        }
        let fresh = || Window { highest: 0, bits: [0; WORDS], made_s };
        let window = self.links.entry(link).or_insert_with(fresh);
        window.made_s = window.made_s.max(made_s);
        if window.take(count) { Ok(()) } else { Err(ProofError::Repeated) }
    }
}

impl Window {
    /// Returns whether `count` was free, and marks it as taken.
    fn take(&mut self, count: u64) -> bool {
        if count == 0 || count.saturating_add(WINDOW) <= self.highest {
            return false;
        }
        if count > self.highest {
            // The counters in between were not taken.
            for passed in (self.highest + 1..=count).rev().take(WINDOW as usize) {
                let (word, bit) = Self::place(passed);
                self.bits[word] &= !bit;
            }
            self.highest = count;
        }
        let (word, bit) = Self::place(count);
        let fresh = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        fresh
    }

    fn place(count: u64) -> (usize, u64) {
        let at = (count % WINDOW) as usize;
        (at / 64, 1 << (at % 64))
    }
}

/// What a node says of itself in the registry, as far as others rely on it before they have spoken
/// to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Name of the node.
    pub node: &'a str,
    /// Address of its peer port.
    pub peer: &'a str,
    /// Whether it holds sockets.
    pub push: bool,
    /// Whether it routes.
    pub dispatch: bool,
    /// Identity of its store.
    pub store: &'a str,
}

/// Signs and verifies entries of the registry. Cheap to clone.
#[derive(Clone)]
pub struct EntryKey {
    keys: SharedKeys,
}

impl EntryKey {
    /// Derives the keys for entries from the secrets that all roles share.
    #[must_use]
    pub fn derive(peer_secrets: &[&str]) -> Self {
        Self { keys: SharedKeys::derive(peer_secrets, b"ringpush registry entry, version 1") }
    }

    /// Replaces the secrets, in every clone. A node signs its entry anew with each heartbeat.
    pub fn replace(&self, peer_secrets: &[&str]) {
        self.keys.replace(peer_secrets);
    }

    /// The proof that is stored beside an entry.
    #[must_use]
    pub fn sign(&self, entry: Entry<'_>) -> String {
        self.keys.mac(&Self::text(entry))
    }

    /// Whether `proof` was made for this entry by somebody who knows the secret.
    #[must_use]
    pub fn verify(&self, entry: Entry<'_>, proof: &str) -> bool {
        self.keys.is_mac(&Self::text(entry), proof)
    }

    /// Each part is preceded by its length, so that two entries never have the same text.
    fn text(entry: Entry<'_>) -> String {
        let Entry { node, peer, push, dispatch, store } = entry;
        format!("{}:{node} {}:{peer} {push} {dispatch} {}:{store}", node.len(), peer.len(), store.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: &str = "peer-secret-of-the-tests-0123456789abcdef";
    const NOW: Millis = Millis(1_795_380_000_000);
    const PING: Call<'static> =
        Call { node: "push-0", incarnation: 7, method: "/ringpush.peer.v1.Push/Ping" };

    fn here(node: &str, incarnation: u64) -> bool {
        (node, incarnation) == ("push-0", 7)
    }

    fn taken(calls: &mut Calls, proof: &str) -> Result<NodeId, ProofError> {
        calls.take(proof, PING.method, NOW, here)
    }

    #[test]
    fn a_proof_is_good_once_for_one_node_process_and_method() {
        let (signer, mut calls) = (Signer::new(call_keys(&[SECRET]), 1), Calls::new(call_keys(&[SECRET])));
        let proof = signer.sign(PING, NOW);
        let other_method = calls.take(&proof, "/ringpush.peer.v1.Push/Disconnect", NOW, here);
        assert_eq!(other_method, Err(ProofError::Secret), "for another method it proves nothing");
        assert_eq!(taken(&mut calls, &proof).unwrap().as_str(), "push-0");
        assert_eq!(taken(&mut calls, &proof), Err(ProofError::Repeated));
        for elsewhere in [Call { node: "push-1", ..PING }, Call { incarnation: 8, ..PING }] {
            assert_eq!(taken(&mut calls, &signer.sign(elsewhere, NOW)), Err(ProofError::Elsewhere));
        }
        let other = Signer::new(call_keys(&["another-secret-of-the-tests-0123456789ab"]), 2).sign(PING, NOW);
        assert_eq!(taken(&mut calls, &other), Err(ProofError::Secret));
        for ago in [0, 60] {
            let then = Millis(NOW.0 - ago * 1000);
            assert!(taken(&mut calls, &signer.sign(PING, then)).is_ok(), "{ago}");
        }
        for then in [Millis(NOW.0 - 61_000), Millis(NOW.0 + 61_000)] {
            assert_eq!(taken(&mut calls, &signer.sign(PING, then)), Err(ProofError::Clock));
        }
        // The form of an earlier version, a signed second.
        assert_eq!(taken(&mut calls, "1795380000.AAAA"), Err(ProofError::Secret));
    }

    #[test]
    fn links_are_remembered_for_as_long_as_their_proofs_are_good() {
        let mut calls = Calls::new(call_keys(&[SECRET]));
        let of = |link: usize, now| Signer::new(call_keys(&[SECRET]), link as u64).sign(PING, now);
        let first = of(0, NOW);
        assert!(taken(&mut calls, &first).is_ok());
        for link in 1..LINKS_MAX {
            assert!(taken(&mut calls, &of(link, NOW)).is_ok());
        }
        assert_eq!(taken(&mut calls, &of(LINKS_MAX, NOW)), Err(ProofError::Crowded));
        assert_eq!(taken(&mut calls, &first), Err(ProofError::Repeated), "nothing is forgotten for it");
        let later = Millis(NOW.0 + 121_000);
        let proof = of(LINKS_MAX, later);
        assert!(calls.take(&proof, PING.method, later, here).is_ok());
        assert_eq!(calls.links.len(), 1);
        assert_eq!(calls.take(&first, PING.method, later, here), Err(ProofError::Clock));
    }

    #[test]
    fn an_entry_is_proved_as_a_whole() {
        let key = EntryKey::derive(&[SECRET]);
        let entry =
            Entry { node: "push-0", peer: "10.0.0.1:7070", push: true, dispatch: false, store: "01J" };
        let proof = key.sign(entry);
        assert!(key.verify(entry, &proof));
        for changed in [
            Entry { node: "push-1", ..entry },
            Entry { peer: "10.0.0.2:7070", ..entry },
            Entry { push: false, ..entry },
            Entry { dispatch: true, ..entry },
            Entry { store: "01K", ..entry },
            Entry { node: "push-0 13:10.0", peer: ".0.1:7070", ..entry },
        ] {
            assert!(!key.verify(changed, &proof), "{changed:?}");
        }
        assert!(!EntryKey::derive(&["another-secret-of-the-tests-0123456789ab"]).verify(entry, &proof));
        assert!(
            !key.verify(entry, "")
                && !key.verify(entry, &Signer::new(call_keys(&[SECRET]), 1).sign(PING, NOW))
        );
    }

    proptest! {
        /// In whatever order they come, however often: each is taken once, unless so many came
        /// before it that it counts as old.
        #[test]
        fn each_count_is_taken_at_most_once(counts in prop::collection::vec(1u64..20_000, 1..300)) {
            let (mut window, mut seen) =
                (Window { highest: 0, bits: [0; WORDS], made_s: 0 }, std::collections::HashSet::new());
            let mut highest = 0;
            for count in counts {
                let expected = count + WINDOW > highest && !seen.contains(&count);
                prop_assert_eq!(window.take(count), expected, "{} after {}", count, highest);
                seen.insert(count);
                highest = highest.max(count);
            }
        }

        #[test]
        fn what_is_no_proof_panics_nobody(text in "\\PC{0,80}", digits in "[0-9.]{0,60}") {
            let mut calls = Calls::new(call_keys(&[SECRET]));
            for text in [text, digits] {
                prop_assert_eq!(calls.take(&text, PING.method, NOW, here), Err(ProofError::Secret));
            }
        }
    }
}
