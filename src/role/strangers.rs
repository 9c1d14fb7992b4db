//! Limits on clients that have not shown who they are, by their address.
//!
//! They are off unless `push.trusted_proxies` is set: behind a balancer or a NAT that nobody has
//! named, all clients have one address. A good token or ticket always passes; what is limited is
//! how often an address may show a bad one, and how many of its sockets may wait for one.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use parking_lot::Mutex;

use crate::live::Live;
use crate::telemetry::{Counter, Family, Metrics};
use crate::wire::refusal::RefusalReason;

/// The time over which bad tokens are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Most addresses that are remembered, about 100 bytes each: 10 MB. Beyond them an address that is
/// not remembered is not limited.
const ADDRESSES: usize = 100_000;
/// Shortest time between two looks for addresses whose time is over.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// Whoever has an IPv6 address has a network of this size (RFC 6177).
const V6_PREFIX: u8 = 64;
/// Most entries of `X-Forwarded-For` that are looked at.
const HOPS: usize = 32;

/// Whether a refused credential counts. One whose signature was good is nobody's guess: a crowd
/// behind one address whose tokens end together must hear that, and come again. Tickets are made
/// here for half a minute, and many are late.
#[must_use]
pub fn is_guess(reason: RefusalReason) -> bool {
    !matches!(
        reason,
        RefusalReason::TokenExpired | RefusalReason::TokenRevoked | RefusalReason::TicketInvalid
    )
}

/// What is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StrangerRules {
    /// The networks of the proxies whose word about the client's address counts; empty: clients
    /// come directly. `None` turns the limits off.
    pub proxies: Option<Vec<IpNet>>,
    /// Bad tokens per minute and address.
    pub failures_per_min: u32,
    /// Sockets of one address that wait for a token.
    pub handshakes: u32,
}

/// Counts by address. Cheap to clone.
#[derive(Clone)]
pub struct Strangers {
    inner: Arc<Inner>,
}

struct Inner {
    rules: Live<StrangerRules>,
    seen: Mutex<Table>,
    refused: Family<[(&'static str, &'static str); 1], Counter>,
}

/// What is remembered of addresses.
#[derive(Default)]
struct Table {
    by_address: HashMap<IpAddr, Seen>,
    /// When those whose time is over were last taken out because there was no room.
    swept: Option<Instant>,
}

/// What an address did.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// When the window of its bad tokens began.
    began: Instant,
    failures: u32,
    waiting: u32,
}

impl Seen {
    fn is_over(&self, now: Instant) -> bool {
        self.waiting == 0 && now.saturating_duration_since(self.began) >= WINDOW
    }
}

/// A client whose address is known.
#[derive(Debug, Clone)]
pub struct Stranger {
    strangers: Strangers,
    address: IpAddr,
}

impl std::fmt::Debug for Strangers {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Strangers")
    }
}

/// A socket that waits for a token, until this is dropped.
#[derive(Debug)]
pub struct Waiting {
    stranger: Stranger,
    /// There was room to remember it.
    is_counted: bool,
}

impl Strangers {
    /// Counts by `rules`.
    #[must_use]
    pub fn register(rules: Live<StrangerRules>, metrics: &Metrics) -> Self {
        let refused: Family<[(&'static str, &'static str); 1], Counter> = Family::default();
        let shown = refused.clone();
        let help = "Clients refused because their address has shown too many bad tokens, or has too many sockets waiting";
        metrics.register(|r| r.register("strangers_refused", help, shown));
        for reason in ["bad_tokens", "handshakes"] {
            drop(refused.get_or_create(&[("reason", reason)]));
        }
        Self { inner: Arc::new(Inner { rules, seen: Mutex::default(), refused }) }
    }

    /// Whether the limits are on.
    #[must_use]
    pub fn are_limited(&self) -> bool {
        self.inner.rules.get().proxies.is_some()
    }

    /// The address of the client behind `peer`: the last one in `forwarded`, which is the value of
    /// each `X-Forwarded-For` in order, that is no proxy. What a stranger says of itself does not
    /// count. With the limits off it is `peer`.
    #[must_use]
    pub fn address(&self, peer: IpAddr, forwarded: impl Iterator<Item = impl AsRef<str>>) -> IpAddr {
        let rules = self.inner.rules.get();
        let Some(proxies) = rules.proxies.as_deref() else { return peer };
        let mut address = peer.to_canonical();
        let is_proxy = |address: IpAddr| proxies.iter().any(|net| net.contains(&address));
        if !is_proxy(address) {
            return address;
        }
        let all: Vec<_> = forwarded.collect();
        let hops = all.iter().rev().flat_map(|value| value.as_ref().rsplit(','));
        for hop in hops.take(HOPS) {
            let Some(named) = address_of(hop.trim()) else { break };
            address = named.to_canonical();
            if !is_proxy(address) {
                break;
            }
        }
        address
    }

    /// The client to count; `None` with the limits off.
    #[must_use]
    pub fn client(&self, peer: IpAddr, forwarded: impl Iterator<Item = impl AsRef<str>>) -> Option<Stranger> {
        self.inner.rules.get().proxies.as_ref()?;
        let address = match self.address(peer, forwarded) {
            IpAddr::V6(address) => IpAddr::V6(ipnet::Ipv6Net::new(address, V6_PREFIX).ok()?.network()),
            address => address,
        };
        Some(Stranger { strangers: self.clone(), address })
    }
}

/// An address as proxies write it: perhaps with a port, an IPv6 address perhaps in brackets.
fn address_of(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.split_once(']')).map_or(text, |parts| parts.0);
    let with_port = || text.parse::<std::net::SocketAddr>().ok().map(|at| at.ip());
    bare.parse().ok().or_else(with_port)
}

impl Stranger {
    /// Counts a bad token. Returns after how many seconds the address may come again, if it has
    /// shown too many.
    #[must_use]
    pub fn failed(&self, now: Instant) -> Option<u32> {
        let Inner { rules, seen, refused } = &*self.strangers.inner;
        let most = rules.get().failures_per_min;
        let mut seen = seen.lock();
        let entry = entry(&mut seen, self.address, now)?;
        if now.saturating_duration_since(entry.began) >= WINDOW {
            (entry.began, entry.failures) = (now, 0);
        }
        entry.failures = entry.failures.saturating_add(1);
        if entry.failures <= most {
            return None;
        }
        refused.get_or_create(&[("reason", "bad_tokens")]).inc();
        let left = WINDOW.saturating_sub(now.saturating_duration_since(entry.began));
        Some(u32::try_from(left.as_secs()).unwrap_or(u32::MAX).max(1))
    }

    /// Counts a socket that waits for a token; `None` if there are too many of this address.
    #[must_use]
    pub fn waits(&self, now: Instant) -> Option<Waiting> {
        let Inner { rules, seen, refused } = &*self.strangers.inner;
        let most = rules.get().handshakes;
        let mut seen = seen.lock();
        let mut is_counted = false;
        if let Some(entry) = entry(&mut seen, self.address, now) {
            if entry.waiting >= most {
                refused.get_or_create(&[("reason", "handshakes")]).inc();
                return None;
            }
            entry.waiting += 1;
            is_counted = true;
        }
        Some(Waiting { stranger: self.clone(), is_counted })
    }
}

/// What is remembered of an address; `None` if no more addresses can be.
fn entry(table: &mut Table, address: IpAddr, now: Instant) -> Option<&mut Seen> {
    let Table { by_address, swept } = table;
    if by_address.len() >= ADDRESSES && !by_address.contains_key(&address) {
        // A look at all of them takes a millisecond, and a crowd must not cost one each.
        if swept.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP_EVERY) {
            *swept = Some(now);
            by_address.retain(|_, seen| !seen.is_over(now));
        }
        if by_address.len() >= ADDRESSES {
            return None;
        }
    }
    Some(by_address.entry(address).or_insert(Seen { began: now, failures: 0, waiting: 0 }))
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let Stranger { strangers, address } = &self.stranger;
        let mut seen = strangers.inner.seen.lock();
        if let Some(entry) = seen.by_address.get_mut(address).filter(|_| self.is_counted) {
            entry.waiting = entry.waiting.saturating_sub(1);
            if entry.waiting == 0 && entry.failures == 0 {
                seen.by_address.remove(address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strangers(proxies: &[&str]) -> Strangers {
        let proxies = Some(proxies.iter().map(|net| net.parse().unwrap()).collect());
        let rules = StrangerRules { proxies, failures_per_min: 3, handshakes: 2 };
        Strangers::register(Live::new(rules), &Metrics::default())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn only_the_word_of_a_proxy_counts() {
        let behind = strangers(&["10.0.0.0/8", "fd00::/8"]);
        for (peer, forwarded, expected) in [
            ("198.51.100.7", &["203.0.113.9"][..], "198.51.100.7"),
            ("10.1.2.3", &["203.0.113.9"], "203.0.113.9"),
            ("::ffff:10.1.2.3", &["203.0.113.9"], "203.0.113.9"),
            // A client that writes the header itself is behind what its proxy adds.
            ("10.1.2.3", &["192.0.2.1, 203.0.113.9"], "203.0.113.9"),
            ("10.1.2.3", &["192.0.2.1", "203.0.113.9, 10.7.7.7"], "203.0.113.9"),
            ("10.1.2.3", &["192.0.2.1, rubbish"], "10.1.2.3"),
            ("10.1.2.3", &["rubbish \u{fffd}, 203.0.113.9"], "203.0.113.9"),
            ("10.1.2.3", &[], "10.1.2.3"),
            ("10.1.2.3", &["10.9.9.9"], "10.9.9.9"),
            ("fd00::1", &["[2001:db8::7]:4711"], "2001:db8::7"),
            ("fd00::1", &["203.0.113.9:4711"], "203.0.113.9"),
        ] {
            let address = behind.address(ip(peer), forwarded.iter().copied());
            assert_eq!(address, ip(expected), "{peer} {forwarded:?}");
        }
        let direct = strangers(&[]);
        assert_eq!(direct.address(ip("10.1.2.3"), ["203.0.113.9"].into_iter()), ip("10.1.2.3"));
    }

    #[test]
    fn a_minute_has_room_for_some_bad_tokens() {
        let (direct, now) = (strangers(&[]), Instant::now());
        let client = |address: &str| direct.client(ip(address), std::iter::empty::<&str>()).unwrap();
        for _ in 0..3 {
            assert_eq!(client("198.51.100.7").failed(now), None);
        }
        assert_eq!(client("198.51.100.7").failed(now + Duration::from_secs(20)), Some(40));
        assert_eq!(client("198.51.100.8").failed(now), None, "another address");
        assert_eq!(client("198.51.100.7").failed(now + WINDOW), None, "another minute");
        // One IPv6 network is one client.
        for host in 1..=3 {
            assert_eq!(client(&format!("2001:db8::{host}")).failed(now), None);
        }
        assert!(client("2001:db8::4").failed(now).is_some());
        let off = Strangers::register(Live::new(StrangerRules::default()), &Metrics::default());
        assert!(off.client(ip("198.51.100.7"), std::iter::empty::<&str>()).is_none());
    }

    #[test]
    fn sockets_that_wait_give_their_place_back() {
        let (direct, now) = (strangers(&[]), Instant::now());
        let client = direct.client(ip("198.51.100.7"), std::iter::empty::<&str>()).unwrap();
        let first = client.waits(now).unwrap();
        let _second = client.waits(now).unwrap();
        assert!(client.waits(now).is_none());
        drop(first);
        assert!(client.waits(now).is_some());
        assert_eq!(direct.inner.seen.lock().by_address.len(), 1);
        drop(_second);
        assert_eq!(direct.inner.seen.lock().by_address.len(), 0, "nothing is kept of whoever did nothing");
    }

    #[test]
    fn no_crowd_of_addresses_takes_more_memory() {
        let (direct, now) = (strangers(&[]), Instant::now());
        for n in 0..ADDRESSES as u32 + 10 {
            let client = direct.client(IpAddr::from(n.to_be_bytes()), std::iter::empty::<&str>()).unwrap();
            assert_eq!(client.failed(now), None);
        }
        assert_eq!(direct.inner.seen.lock().by_address.len(), ADDRESSES);
        let client = direct.client(ip("255.1.1.1"), std::iter::empty::<&str>()).unwrap();
        assert_eq!(client.failed(now + WINDOW), None);
        assert_eq!(direct.inner.seen.lock().by_address.len(), 1, "those whose minute is over make room");
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange(values in proptest::collection::vec(".{0,60}", 0..4)) {
            let behind = strangers(&["10.0.0.0/8"]);
            let _ = behind.address(ip("10.0.0.1"), values.iter().map(String::as_str));
        }
    }
}
