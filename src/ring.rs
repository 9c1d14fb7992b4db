//! The ring: which of a set of weighted names owns a key, by arithmetic alone.
//!
//! The `hashring` crate does the search (sorted points, binary search). This wrapper owns what that
//! crate leaves to its caller: the hash, the points of a name, and ties. A ring is immutable; a new
//! set of names makes a new ring.

use std::hash::{BuildHasher, Hash, Hasher};

use hashring::HashRing;
use xxhash_rust::xxh3::xxh3_64;

/// Points for a weight of 1.0. Measured worst share over the mean: 1.08, 1.11, 1.15 and 1.20 at 3,
/// 10, 100 and 1000 names (docs/design.md, section 3).
pub const POINTS_PER_WEIGHT: f64 = 512.0;

/// Upper bound for the points of one ring: 2,097,152 x 16 bytes = 32 MB, four times what 1000 names
/// of weight 1.0 need. If the weights ask for more, all are scaled down in proportion, so that no
/// set of weights exhausts memory.
pub const POINTS_MAX: f64 = 2_097_152.0;

/// The key of a user: `xxh3_64` of the id's bytes.
#[must_use]
pub fn key(user: &str) -> u64 {
    xxh3_64(user.as_bytes())
}

/// The `k`-th point of a name: `xxh3_64(name, 0x00, k as u32 little-endian)`.
#[must_use]
pub fn point(name: &str, k: u32) -> u64 {
    point_in(&mut Vec::with_capacity(name.len() + 5), name, k)
}

/// Like [`point`], with a buffer that is reused: a ring of a thousand names has half a million
/// points.
fn point_in(bytes: &mut Vec<u8>, name: &str, k: u32) -> u64 {
    bytes.clear();
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&k.to_le_bytes());
    xxh3_64(bytes)
}

/// Mean number of points per arc: few enough for one or two cache lines.
const POINTS_PER_ARC: usize = 8;
/// Upper bound for the number of arcs, as a power of two: 65,536 arcs x 48 bytes.
const ARC_BITS_MAX: u32 = 16;

/// An immutable consistent-hash ring over weighted names.
///
/// The circle is cut into arcs by the top bits of a key. Each arc is a `HashRing` with the points
/// of that arc and the first point after it. A look-up then touches two cache lines instead of
/// searching a megabyte: 25 ns instead of 87 ns at 100 names x 512 points
/// (docs/decisions/005-arcs-of-the-ring.md).
#[derive(Debug, Clone)]
pub struct Ring {
    names: Vec<String>,
    /// The share of all keys that each name owns (0.0 to 1.0), in the order of the names.
    shares: Vec<f64>,
    arcs: Vec<HashRing<Point, AsIs>>,
    /// A key's arc is the key shifted right by this. 64 if there is only one arc.
    shift: u32,
}

impl Ring {
    /// Builds the ring of `members`, pairs of name and weight. Their order does not matter. A name
    /// given twice counts once, with its larger weight. A weight that is not finite or not above
    /// zero gives no points.
    #[must_use]
    pub fn build<'a>(members: impl IntoIterator<Item = (&'a str, f64)>) -> Self {
        let members: Vec<(&str, f64)> = members.into_iter().collect();
        // An infinite weight counts as zero: there is no proportion to keep.
        let weight_of = |weight: f64| if weight.is_finite() { weight.max(0.0) } else { 0.0 };
        let total: f64 = members.iter().map(|(_, weight)| weight_of(*weight) * POINTS_PER_WEIGHT).sum();
        let scale = if total > POINTS_MAX { POINTS_MAX / total } else { 1.0 };
        let mut members: Vec<(&str, u32)> =
            members.iter().map(|(name, weight)| (*name, points_of(weight_of(*weight) * scale))).collect();
        members.sort_unstable_by(|a, b| a.0.cmp(b.0).then(b.1.cmp(&a.1)));
        members.dedup_by_key(|member| member.0);
        let points = sorted_points(&members);
        let shares = shares(&points, members.len());
        let bits = (points.len() / POINTS_PER_ARC).max(1).ilog2().min(ARC_BITS_MAX);
        let shift = u64::BITS - bits;
        Self {
            names: members.into_iter().map(|(name, _)| name.to_owned()).collect(),
            shares,
            arcs: arcs(&points, bits),
            shift,
        }
    }

    /// The name that owns `key`: the one whose point is the first at or after it, clockwise. `None`
    /// on a ring without points.
    #[must_use]
    pub fn owner(&self, key: u64) -> Option<&str> {
        self.owner_index(key).map(|index| self.names[index].as_str())
    }

    /// Like [`Ring::owner`], as an index into the sorted, distinct names.
    #[must_use]
    pub fn owner_index(&self, key: u64) -> Option<usize> {
        let arc = key.checked_shr(self.shift).unwrap_or(0) as usize;
        self.arcs.get(arc)?.get(&key).map(|p| p.name_index as usize)
    }

    /// The name that owns `user`.
    #[must_use]
    pub fn owner_of(&self, user: &str) -> Option<&str> {
        self.owner(key(user))
    }

    /// Whether the ring has no points, so that nobody owns anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.arcs.iter().all(HashRing::is_empty)
    }

    /// Each name with the share of all keys that it owns, 0.0 to 1.0, in the order of the names.
    #[must_use]
    pub fn shares(&self) -> Vec<(&str, f64)> {
        self.names.iter().map(String::as_str).zip(self.shares.iter().copied()).collect()
    }
}

/// The points of all members in ascending order, at most one at each place.
fn sorted_points(members: &[(&str, u32)]) -> Vec<Point> {
    let total = members.iter().map(|member| member.1 as usize).sum();
    let mut points = Vec::with_capacity(total);
    let mut bytes = Vec::new();
    for (index, (name, count)) in members.iter().enumerate() {
        let name_index = u32::try_from(index).unwrap_or(u32::MAX);
        points.extend((0..*count).map(|k| Point { at: point_in(&mut bytes, name, k), name_index }));
    }
    // Members are sorted by name, so their index orders ties as the names themselves would.
    points.sort_unstable_by_key(|p| (p.at, p.name_index));
    points.dedup_by_key(|p| p.at);
    points
}

/// Cuts the circle into `2^bits` arcs. The last point of an arc is the first one of the next arc.
/// Behind the last arc that is the first point of the circle; the engine wraps around to it.
fn arcs(points: &[Point], bits: u32) -> Vec<HashRing<Point, AsIs>> {
    let count = 1usize << bits;
    let mut arcs = Vec::with_capacity(count);
    let mut begin = 0;
    for arc in 1..=count {
        let own = points[begin..]
            .iter()
            .take_while(|p| arc == count || ((p.at >> (u64::BITS - bits)) as usize) < arc);
        let end = begin + own.count();
        let mut ring = HashRing::with_hasher(AsIs);
        let next = points.get(end).or(points.first()).copied();
        ring.batch_add(points[begin..end].iter().copied().chain(next).collect());
        arcs.push(ring);
        begin = end;
    }
    arcs
}

/// The share of each of `names`: the sum of the distances from the previous point to each of its
/// own.
fn shares(points: &[Point], names: usize) -> Vec<f64> {
    let mut owned = vec![0u128; names];
    if let (Some(first), Some(last)) = (points.first(), points.last()) {
        owned[first.name_index as usize] += u128::from(u64::MAX - last.at) + u128::from(first.at) + 1;
    }
    for pair in points.windows(2) {
        owned[pair[1].name_index as usize] += u128::from(pair[1].at - pair[0].at);
    }
    owned.into_iter().map(|keys| keys as f64 / 2f64.powi(64)).collect()
}

/// The number of points for a weight: `round(512 * weight)`.
fn points_of(weight: f64) -> u32 {
    // A cast from float saturates and sends NaN to zero, which is what is wanted here.
    (POINTS_PER_WEIGHT * weight).round() as u32
}

#[derive(Debug, Clone, Copy)]
struct Point {
    at: u64,
    name_index: u32,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.at);
    }
}

/// Passes the `u64` that is written through unchanged: points and keys are hashed before they reach
/// the engine.
#[derive(Debug, Clone, Copy)]
struct AsIs;

impl BuildHasher for AsIs {
    type Hasher = Written;
    fn build_hasher(&self) -> Written {
        Written(0)
    }
}

struct Written(u64);

impl Hasher for Written {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write_u64(&mut self, at: u64) {
        self.0 = at;
    }
    /// Not reached: points and keys write one `u64`.
    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn five() -> Ring {
        Ring::build(["push-0", "push-1", "push-2", "push-3", "push-4"].map(|n| (n, 1.0)))
    }

    #[test]
    fn golden_values_hold_on_every_platform() {
        assert_eq!(key("alice"), 0x4da1_0dd6_1a01_16b0);
        assert_eq!(key("用户42"), 0x95c3_3615_fad0_f67d);
        assert_eq!(point("push-0", 0), 0xb017_0e66_9965_f2e2);
        assert_eq!(point("push-1", 511), 0x1beb_c7d4_bb28_b9fd);
        let ring = five();
        for (user, owner) in [
            ("alice", "push-3"),
            ("bob", "push-2"),
            ("carol", "push-3"),
            ("user-00000000", "push-3"),
            ("user-00000001", "push-1"),
            ("用户42", "push-4"),
        ] {
            assert_eq!(ring.owner_of(user), Some(owner), "{user}");
        }
    }

    #[test]
    fn a_hundred_thousand_users_split_as_written_down() {
        let ring = five();
        let mut split = [0u32; 5];
        for n in 0..100_000 {
            let owner = ring.owner_of(&format!("user-{n}")).unwrap();
            split[owner.strip_prefix("push-").unwrap().parse::<usize>().unwrap()] += 1;
        }
        assert_eq!(split, [19350, 20235, 19529, 21007, 19879]);
    }

    #[test]
    fn a_ring_of_many_heavy_names_is_bounded_and_keeps_its_proportions() {
        let names: Vec<String> = (0..1_000).map(|n| format!("push-{n}")).collect();
        let heavy = Ring::build(
            names.iter().enumerate().map(|(n, name)| (name.as_str(), if n < 500 { 100.0 } else { 50.0 })),
        );
        let points: usize = heavy.arcs.iter().map(HashRing::len).sum();
        // Each arc has one point more behind its own.
        assert!(points as f64 <= POINTS_MAX + f64::from(1u32 << ARC_BITS_MAX), "{points} points");
        let of_the_heavier: f64 =
            heavy.shares.iter().zip(0..).filter(|(_, n)| heavier(&heavy.names[*n])).map(|(s, _)| s).sum();
        assert!((of_the_heavier - 2.0 / 3.0).abs() < 0.02, "{of_the_heavier} of all keys");
        fn heavier(name: &str) -> bool {
            name.trim_start_matches("push-").parse::<u32>().unwrap() < 500
        }
    }

    #[test]
    fn an_empty_ring_owns_nothing() {
        assert_eq!(Ring::build([]).owner_of("alice"), None);
        assert_eq!(Ring::build([("a", 0.0), ("b", f64::NAN), ("c", -1.0)]).owner_of("alice"), None);
    }

    #[test]
    fn shares_are_what_keys_get() {
        let ring = five();
        let shares = ring.shares();
        assert!((shares.iter().map(|s| s.1).sum::<f64>() - 1.0).abs() < 1e-9);
        for (name, share) in shares {
            let owned = (0..100_000).filter(|n| ring.owner_of(&format!("user-{n}")) == Some(name)).count();
            assert!((share - owned as f64 / 100_000.0).abs() < 0.01, "{name}: {share}");
        }
    }

    /// Five nodes of weight 1 and one of twice that: its share is twice the mean of the others
    /// within the spread of 512 points (standard error of an arc sum about 1/sqrt(512) = 4.4 %);
    /// over 40 sets the mean is within 5 %.
    #[test]
    fn weights_are_respected_within_five_per_cent() {
        for weight in [0.5, 2.0, 3.0] {
            let mut ratio = 0.0;
            for set in 0..40 {
                let names: Vec<String> = (0..6).map(|n| format!("set{set}-{n}")).collect();
                let ring = Ring::build(
                    names.iter().enumerate().map(|(i, n)| (n.as_str(), if i == 0 { weight } else { 1.0 })),
                );
                let shares = ring.shares();
                let heavy = shares.iter().find(|s| s.0 == names[0]).unwrap().1;
                ratio += heavy / ((1.0 - heavy) / 5.0) / 40.0;
            }
            assert!((ratio / weight - 1.0).abs() < 0.05, "weight {weight}: {ratio}");
        }
    }

    /// The plain ring that the arcs stand for: every point in one sorted list.
    fn plain_owner<'a>(members: &[(&'a str, f64)], key: u64) -> Option<&'a str> {
        let points = members
            .iter()
            .flat_map(|(name, weight)| (0..points_of(*weight)).map(move |k| (point(name, k), *name)));
        let points: std::collections::BTreeSet<(u64, &str)> = points.collect();
        points.range((key, "")..).next().or(points.first()).map(|p| p.1)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn arcs_answer_as_one_ring_would(
                members in proptest::collection::btree_map("[a-z0-9-]{1,8}", 0.0f64..1.2, 0..12), keys: Vec<u64>) {
            let members: Vec<(&str, f64)> = members.iter().map(|(name, weight)| (name.as_str(), *weight)).collect();
            let ring = Ring::build(members.iter().copied());
            let edges = [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, (1 << 63) - 1];
            let own = members.iter().flat_map(|(name, _)| [point(name, 0), point(name, 1).wrapping_add(1)]);
            for key in keys.into_iter().chain(edges).chain(own) {
                prop_assert_eq!(ring.owner(key), plain_owner(&members, key));
            }
        }

        #[test]
        fn order_does_not_matter(mut names in proptest::collection::hash_set("[a-z0-9-]{1,12}", 1..12)
                .prop_map(|s| s.into_iter().collect::<Vec<_>>()).prop_shuffle(), users in users()) {
            let one = Ring::build(names.iter().map(|n| (n.as_str(), 1.0)));
            names.sort();
            let other = Ring::build(names.iter().rev().map(|n| (n.as_str(), 1.0)));
            for user in users {
                prop_assert_eq!(one.owner_of(&user), other.owner_of(&user));
            }
        }

        #[test]
        fn a_node_that_comes_takes_only_for_itself(count in 1usize..12, users in users()) {
            let names: Vec<String> = (0..=count).map(|n| format!("push-{n}")).collect();
            let before = Ring::build(names[..count].iter().map(|n| (n.as_str(), 1.0)));
            let after = Ring::build(names.iter().map(|n| (n.as_str(), 1.0)));
            for user in users {
                let (was, is) = (before.owner_of(&user), after.owner_of(&user));
                prop_assert!(was == is || is == Some(names[count].as_str()));
            }
        }

        #[test]
        fn a_changed_weight_moves_only_to_or_from_that_node(
                count in 2usize..10, from in 0.1f64..3.0, to in 0.1f64..3.0, users in users()) {
            let names: Vec<String> = (0..count).map(|n| format!("push-{n}")).collect();
            let with = |w: f64| Ring::build(
                names.iter().enumerate().map(|(i, n)| (n.as_str(), if i == 0 { w } else { 1.0 })));
            let (before, after) = (with(from), with(to));
            for user in users {
                let (was, is) = (before.owner_of(&user), after.owner_of(&user));
                if was != is {
                    prop_assert_eq!(if to > from { is } else { was }, Some("push-0"));
                }
            }
        }
    }

    fn users() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::vec("[a-z0-9]{1,16}", 200)
    }
}
