//! Entries of the registry: how they are stored, and how they are checked when they are read.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::super::Delays;
use super::super::keeper::Snapshot;
use super::super::{Counts, Member, NodeInfo, NodeState, Outsiders};
use crate::message::NodeId;
use crate::peer_proof::{Entry, EntryKey};
use crate::transport::redis::{RedisError, Reply};

/// Nodes that are looked at. The ring was measured up to that number.
pub(super) const NODES_MAX: usize = 1_000;

/// Longest text of one node that is looked at, in bytes. An entry has about 300.
pub(super) const TEXT_MAX: usize = 2_048;

/// Longest address of a peer port: a host name of 253 characters, a colon and a port.
pub(super) const PEER_MAX: usize = 260;

/// Longest identity of a store or generation, in bytes. Each is a ULID of 26 characters.
pub(super) const ID_MAX: usize = 64;

/// Bounds for what is registered about a node; the same as those of configuration.
pub(super) const WEIGHTS: std::ops::RangeInclusive<f64> = 0.01..=100.0;

pub(super) const ACCEPTS_MAX: u32 = 1_000_000;

/// Larger numbers cannot be represented exactly in a browser's JSON.
pub(super) const COUNT_MAX: u64 = 1 << 53;

/// The feature of a node that takes a ticket in an `auth` frame.
const FEATURE_TICKET: &str = "ticket";

/// Node info as it is stored. Unknown fields are ignored, so that versions may mix.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredInfo {
    pub(super) weight: f64,
    pub(super) accept_per_s: u32,
    pub(super) peer: String,
    pub(super) push: bool,
    pub(super) dispatch: bool,
    pub(super) draining: bool,
    /// Another node has reached it at `peer`.
    #[serde(default)]
    pub(super) reached: bool,
    /// Identity of its store.
    #[serde(default)]
    pub(super) store: String,
    /// What the node understands beyond the first version.
    #[serde(default)]
    pub(super) features: Vec<String>,
    /// Made with `peer.secret` over what others rely on before they have spoken to the node.
    #[serde(default)]
    pub(super) proof: String,
}

impl StoredInfo {
    pub(super) fn entry<'a>(&'a self, node: &'a NodeId) -> Entry<'a> {
        let Self { peer, push, dispatch, store, .. } = self;
        Entry { node: node.as_str(), peer, push: *push, dispatch: *dispatch, store }
    }

    pub(super) fn text(info: &NodeInfo, state: NodeState, reached: bool, key: &EntryKey) -> String {
        let mut stored = Self {
            weight: info.weight,
            accept_per_s: info.accept_per_s,
            peer: info.peer.to_string(),
            push: info.push,
            dispatch: info.dispatch,
            draining: state == NodeState::Draining,
            reached,
            store: info.store.to_string(),
            features: info.ticket_in_auth.then(|| FEATURE_TICKET.to_owned()).into_iter().collect(),
            proof: String::new(),
        };
        stored.proof = key.sign(stored.entry(&info.node));
        // Plain fields: serialisation cannot fail.
        serde_json::to_string(&stored).unwrap_or_default()
    }
}

/// What one look at the registry shows.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) snapshot: Snapshot,
    pub(super) counts: HashMap<NodeId, Counts>,
    /// Why Redis renews no lease for now.
    pub(super) refused: Option<String>,
    /// Entries that are not as they should be, with their key.
    pub(super) complaints: Vec<String>,
}

/// Reads the response to a snapshot. Nothing in it is trusted: another program, or another version
/// of this one, may have written it.
pub(super) fn read_snapshot(reply: &Reply, key: &EntryKey, prefix: &str) -> Result<Look, RedisError> {
    let [generation, epoch, all, refused, count] = reply.items() else {
        return Err(RedisError::Refused(
            "a look at the registry was answered with something else".to_owned(),
        ));
    };
    let generation = generation.text();
    let is_plain = generation.bytes().all(|byte| byte.is_ascii_graphic());
    let refused = Some(refused.text()).filter(|why| !why.is_empty());
    if refused.is_none() && (generation.is_empty() || generation.len() > ID_MAX || !is_plain) {
        let why = format!("{{{prefix}}}:meta has no generation of ringpush: delete that key");
        return Err(RedisError::Refused(why));
    }
    let mut look = Look {
        snapshot: Snapshot {
            generation: generation.into(),
            epoch: epoch.int(),
            nodes: Vec::new(),
            outsiders: Outsiders::default(),
        },
        counts: HashMap::new(),
        refused: refused.map(str::to_owned),
        complaints: Vec::new(),
    };
    if count.int() > NODES_MAX as u64 {
        let count = count.int();
        look.complaints.push(format!("{{{prefix}}}:nodes has {count} entries; {NODES_MAX} are looked at"));
    }
    for entry in all.items().iter().take(NODES_MAX) {
        if let Err(complaint) = read_entry(entry, key, &mut look) {
            let name = entry.items().first().map_or("", Reply::text).escape_debug().to_string();
            look.complaints.push(format!("the entry {name:?} of {{{prefix}}}:info {complaint}"));
        }
    }
    look.snapshot.outsiders.candidates.sort_by(|a, b| a.info.node.cmp(&b.info.node));
    look.snapshot.outsiders.strangers.sort();
    Ok(look)
}

pub(super) fn read_entry(entry: &Reply, key: &EntryKey, look: &mut Look) -> Result<(), String> {
    let [name, info, incarnation, held] = entry.items() else { return Err("is no entry".to_owned()) };
    let node = NodeId::parse(name.text()).map_err(|rule| format!("has a name that is none: {rule}"))?;
    let stored = serde_json::from_str::<StoredInfo>(info.text());
    // An entry of another version that this one cannot read is ignored.
    let mut stored = stored.map_err(|_| "cannot be read".to_owned())?;
    if stored.peer.len() > PEER_MAX || stored.store.len() > ID_MAX {
        return Err("has a text that is too long".to_owned());
    }
    if !key.verify(stored.entry(&node), &stored.proof) {
        look.snapshot.outsiders.strangers.push(node);
        return Err(
            "has no proof by our peer.secret: that node has another one, or another program wrote this; \
                    it is not called, and takes no users"
                .to_owned(),
        );
    }
    let mut numbers = held.text().split(' ').map(|number| number.parse().unwrap_or(0).min(COUNT_MAX));
    let mut next = || numbers.next().unwrap_or(0);
    let (sessions, displaced, delivered, moves) = (next(), next(), next(), next());
    let (p50, p99) = (next(), next());
    let delays = p50.checked_sub(1).zip(p99.checked_sub(1));
    let delays = delays.map(|(p50_ms, p99_ms)| Delays { p50_ms, p99_ms });
    let held = Counts { sessions, displaced, delivered, moves, delays };
    let bad_weight = !WEIGHTS.contains(&stored.weight);
    if bad_weight || stored.accept_per_s > ACCEPTS_MAX {
        let (from, to) = (WEIGHTS.start(), WEIGHTS.end());
        let told =
            format!("has a weight or accept_per_s out of bounds ({from} to {to}, up to {ACCEPTS_MAX})");
        look.complaints.push(format!("the entry {node} {told}: it is held to them"));
        stored.weight = if stored.weight.is_nan() { 1.0 } else { stored.weight.clamp(*from, *to) };
        stored.accept_per_s = stored.accept_per_s.min(ACCEPTS_MAX);
    }
    look.counts.insert(node.clone(), held);
    let reached = stored.reached;
    let member = member(node, incarnation.int(), stored);
    if reached {
        look.snapshot.nodes.push(member);
    } else {
        look.snapshot.outsiders.candidates.push(member);
    }
    Ok(())
}

pub(super) fn member(node: NodeId, incarnation: u64, stored: StoredInfo) -> Member {
    Member {
        info: NodeInfo {
            node,
            weight: stored.weight,
            accept_per_s: stored.accept_per_s,
            peer: stored.peer.into(),
            push: stored.push,
            dispatch: stored.dispatch,
            ticket_in_auth: stored.features.iter().any(|feature| feature == FEATURE_TICKET),
            store: stored.store.into(),
        },
        incarnation,
        state: if stored.draining { NodeState::Draining } else { NodeState::Active },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> EntryKey {
        EntryKey::derive(&["peer-secret-of-the-tests-0123456789abcdef"])
    }

    fn bytes(text: &str) -> Reply {
        Reply::Bytes(text.as_bytes().to_vec())
    }

    fn look(entries: Vec<Reply>) -> Reply {
        let count = Reply::Int(entries.len() as i64);
        Reply::List(vec![bytes("01J"), bytes("7"), Reply::List(entries), bytes(""), count])
    }

    fn entry(name: &str, change: impl FnOnce(&mut StoredInfo), key: &EntryKey) -> Reply {
        let mut stored = StoredInfo {
            features: Vec::new(),
            weight: 1.0,
            accept_per_s: 4000,
            peer: "10.0.0.1:7070".to_owned(),
            push: true,
            dispatch: false,
            draining: false,
            reached: true,
            store: "01J".to_owned(),
            proof: String::new(),
        };
        change(&mut stored);
        stored.proof = key.sign(stored.entry(&NodeId::parse(name).unwrap()));
        let info = serde_json::to_string(&stored).unwrap();
        Reply::List(vec![bytes(name), bytes(&info), bytes("9"), bytes("1 2 3 4")])
    }

    fn read(entries: Vec<Reply>) -> Look {
        read_snapshot(&look(entries), &key(), "test").unwrap()
    }

    #[test]
    fn what_the_registry_says_is_held_to_the_bounds_of_configuration_and_told_of() {
        for (weight, held) in [(1e308, 100.0), (1e5, 100.0), (0.0, 0.01), (-3.0, 0.01), (2.5, 2.5)] {
            let found = read(vec![entry("push-0", |info| info.weight = weight, &key())]);
            assert_eq!(found.snapshot.nodes[0].info.weight, held);
            let told = found.complaints.iter().any(|one| one.contains("push-0") && one.contains("weight"));
            assert_eq!(told, weight != held, "{weight}: {:?}", found.complaints);
        }
        let many = read(vec![entry("push-0", |info| info.accept_per_s = u32::MAX, &key())]);
        assert_eq!(many.snapshot.nodes[0].info.accept_per_s, ACCEPTS_MAX);
        for long in ["a".repeat(PEER_MAX + 1), "a".repeat(100_000)] {
            let found = read(vec![entry("push-0", |info| info.peer = long, &key())]);
            assert!(found.snapshot.nodes.is_empty() && found.complaints.len() == 1);
        }
    }

    #[test]
    fn who_was_not_reached_or_does_not_know_the_secret_is_no_member() {
        let other = EntryKey::derive(&["another-secret-of-the-tests-0123456789ab"]);
        let found = read(vec![
            entry("push-0", |_| {}, &key()),
            entry("push-1", |info| info.reached = false, &key()),
            entry("push-2", |_| {}, &other),
            Reply::List(vec![bytes("push-3"), bytes("{}"), bytes("1"), bytes("")]),
            Reply::List(vec![bytes("Push 4"), bytes("{}"), bytes("1"), bytes("")]),
            Reply::Nil,
        ]);
        let names = |members: &[Member]| members.iter().map(|m| m.info.node.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&found.snapshot.nodes), ["push-0"]);
        assert_eq!(names(&found.snapshot.outsiders.candidates), ["push-1"]);
        assert_eq!(found.snapshot.outsiders.strangers.len(), 1);
        assert_eq!(found.complaints.len(), 4, "{:?}", found.complaints);
        assert!(found.complaints[0].contains("push-2") && found.complaints[0].contains("peer.secret"));
    }

    fn anything() -> impl Strategy<Value = Reply> {
        let text = prop_oneof![
            "[ -~]{0,40}",
            "[0-9.e+-]{1,25}",
            Just(r#"{"weight":1e308,"accept_per_s":-1,"peer":7}"#.to_owned()),
        ];
        let leaf = prop_oneof![
            Just(Reply::Nil),
            any::<i64>().prop_map(Reply::Int),
            text.prop_map(|text| Reply::Bytes(text.into_bytes())),
            prop::collection::vec(any::<u8>(), 0..60).prop_map(Reply::Bytes),
        ];
        leaf.prop_recursive(4, 64, 6, |inner| prop::collection::vec(inner, 0..7).prop_map(Reply::List))
    }

    proptest! {
        /// Whatever the registry shows, nothing panics, and every member is within the bounds.
        #[test]
        fn rubbish_in_the_registry_is_no_member(
            rubbish in prop::collection::vec(anything(), 0..6), weight in any::<f64>(), accepts in any::<u32>(),
        ) {
            let _ = read_snapshot(&Reply::List(rubbish.clone()), &key(), "test");
            let odd = entry("push-0", |info| (info.weight, info.accept_per_s) = (weight, accepts), &key());
            if let Ok(found) = read_snapshot(&look([rubbish, vec![odd]].concat()), &key(), "test") {
                for member in &found.snapshot.nodes {
                    prop_assert!(WEIGHTS.contains(&member.info.weight));
                    prop_assert!(member.info.accept_per_s <= ACCEPTS_MAX);
                }
            }
        }
    }
}
