//! Which topics a token lets its client watch without being a member: the claim `watch`.
//!
//! The claim is a list of patterns. A pattern is the name of a topic, or the beginning of names
//! with one `*` behind it. What cannot be read allows nothing, and does not spoil the token:
//! another issuer may use the claim's name for something else.

use serde::Deserialize;
use serde_json::Value;

use crate::message::TopicName;
use crate::topic::TopicPatterns;

/// Most patterns of a claim.
pub const WATCH_PATTERNS: usize = 16;
/// Most bytes of all patterns of a claim together.
pub const WATCH_BYTES: usize = 512;
/// The claim's rule, for whoever broke it.
pub const WATCH_RULE: &str = "watch is a list of at most 16 patterns with 512 bytes together: names of topics, or beginnings of names with one * behind";

/// What a token allows to watch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WatchRights {
    patterns: TopicPatterns,
    unreadable: bool,
}

impl WatchRights {
    /// Reads patterns.
    ///
    /// # Errors
    ///
    /// [`WATCH_RULE`].
    pub fn parse<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Result<Self, &'static str> {
        let patterns = TopicPatterns::parse(patterns).map_err(|_| WATCH_RULE)?;
        let bytes: usize = patterns.iter().map(str::len).sum();
        let is_good = patterns.iter().len() <= WATCH_PATTERNS && bytes <= WATCH_BYTES;
        if is_good { Ok(Self { patterns, unreadable: false }) } else { Err(WATCH_RULE) }
    }

    /// Reads the claim out of all claims of a token, as JSON text; `None` where there is no such
    /// claim.
    #[must_use]
    pub fn of_claims(claims: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Claims {
            watch: Option<Value>,
        }
        // Most tokens have none, and need not be read twice.
        if !claims.windows(7).any(|part| part == b"\"watch\"") {
            return None;
        }
        let claim = serde_json::from_slice::<Claims>(claims).ok()?.watch?;
        let list = claim.as_array().and_then(|all| all.iter().map(Value::as_str).collect::<Option<Vec<_>>>());
        let read = list.map_or(Err(WATCH_RULE), Self::parse);
        Some(read.unwrap_or(Self { patterns: TopicPatterns::default(), unreadable: true }))
    }

    /// Whether a topic may be watched.
    #[must_use]
    pub fn allows(&self, topic: &TopicName) -> bool {
        self.patterns.match_name(topic)
    }

    /// The claim was there and could not be read.
    #[must_use]
    pub const fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// The patterns.
    pub fn patterns(&self) -> impl Iterator<Item = &str> {
        self.patterns.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topic(name: &str) -> TopicName {
        TopicName::parse(name).unwrap()
    }

    #[test]
    fn a_pattern_is_a_name_or_a_beginning() {
        let rights = WatchRights::parse(["match-*", "news"]).unwrap();
        for (name, allowed) in
            [("match-7", true), ("match-", true), ("match", false), ("news", true), ("news-7", false)]
        {
            assert_eq!(rights.allows(&topic(name)), allowed, "{name}");
        }
        assert!(WatchRights::parse(["*"]).unwrap().allows(&topic("anything")));
        assert!(!WatchRights::default().allows(&topic("news")));
    }

    #[test]
    fn a_bad_claim_allows_nothing() {
        let long = "x".repeat(65);
        let many = vec!["a"; 17];
        let much: Vec<String> = (0..9).map(|_| format!("{}*", "y".repeat(60))).collect();
        let much: Vec<&str> = much.iter().map(String::as_str).collect();
        for bad in [&["a*b"][..], &["**"], &[""], &["-x"], &[&long], &many, &much] {
            assert_eq!(WatchRights::parse(bad.iter().copied()), Err(WATCH_RULE), "{bad:?}");
        }
        for claim in ["\"news\"", "[1]", "{}", "true", "[\"a b\"]"] {
            let rights = WatchRights::of_claims(format!("{{\"watch\":{claim}}}").as_bytes()).unwrap();
            assert!(rights.is_unreadable() && !rights.allows(&topic("news")), "{claim}");
        }
        for none in ["{}", "{\"watch\":null}", "{\"say\":\"watch\"}", "{\"watcher\":[]}"] {
            assert_eq!(WatchRights::of_claims(none.as_bytes()), None, "{none}");
        }
        let read = WatchRights::of_claims(br#"{"sub":"a","watch":["match-*"]}"#).unwrap();
        assert!(read.allows(&topic("match-7")));
    }
}
