//! The keys of senders: who they are, what they may do, and how much in a second.

use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::Instant;

use crate::message::{LogId, Recipients};
use crate::topic::TopicPatterns;

/// What a key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Publish to anybody.
    Publish,
    /// Publish to topics of these names.
    PublishTopics(TopicPatterns),
    /// Read messages.
    Read,
    /// Look at users, close their sessions, forget them.
    Users,
    /// Make topics, change their members, remove them.
    Topics,
    /// Look at the cluster.
    Cluster,
}

/// The rule of a scope, for whoever broke it.
pub const SCOPE_RULE: &str = "is no scope: there are publish, publish:topic/PATTERN (such as publish:topic/news-*), read, users, topics and cluster";

impl Scope {
    /// The scope of this name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(pattern) = text.strip_prefix("publish:topic/") {
            return TopicPatterns::parse([pattern]).ok().map(Self::PublishTopics);
        }
        [Self::Publish, Self::Read, Self::Users, Self::Topics, Self::Cluster]
            .into_iter()
            .find(|scope| scope.to_string() == text)
    }

    /// All scopes: those of a key in `collect.api_keys`.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![Self::Publish, Self::Read, Self::Users, Self::Topics, Self::Cluster]
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Publish => f.write_str("publish"),
            Self::PublishTopics(patterns) => {
                write!(f, "publish:topic/{}", patterns.iter().next().unwrap_or_default())
            }
            Self::Read => f.write_str("read"),
            Self::Users => f.write_str("users"),
            Self::Topics => f.write_str("topics"),
            Self::Cluster => f.write_str("cluster"),
        }
    }
}

/// How much a key may publish: messages times recipients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRate {
    /// In a second.
    pub per_s: u32,
    /// At once.
    pub burst: u32,
}

/// A key as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySettings {
    /// Its name, in metrics and logs.
    pub name: String,
    /// The digest of its secret (SHA-256).
    pub digest: [u8; 32],
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// How much it may publish; `None`: any number.
    pub rate: Option<KeyRate>,
}

impl KeySettings {
    /// The digest of a secret.
    #[must_use]
    pub fn digest_of(secret: &str) -> [u8; 32] {
        Sha256::digest(secret.as_bytes()).into()
    }
}

/// A key, and what it may still publish now.
#[derive(Debug)]
pub struct ApiKey {
    settings: KeySettings,
    left: Mutex<(f64, Instant)>,
}

impl ApiKey {
    /// A key that has published nothing yet.
    #[must_use]
    pub fn new(settings: KeySettings) -> Self {
        let left = settings.rate.map_or(0.0, |rate| f64::from(rate.burst));
        Self { settings, left: Mutex::new((left, Instant::now())) }
    }

    /// What is configured of it.
    #[must_use]
    pub fn settings(&self) -> &KeySettings {
        &self.settings
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.settings.name
    }

    /// Whether this is its secret, by digest. It takes as long whatever the digest.
    #[must_use]
    pub fn is_of(&self, digest: &[u8; 32]) -> bool {
        self.settings.digest.ct_eq(digest).into()
    }

    /// Whether it has a scope.
    #[must_use]
    pub fn has(&self, scope: &Scope) -> bool {
        self.settings.scopes.contains(scope)
    }

    /// Its scopes in one text.
    #[must_use]
    pub fn scopes(&self) -> String {
        let names: Vec<String> = self.settings.scopes.iter().map(Scope::to_string).collect();
        names.join(", ")
    }

    /// Whether it may publish to anybody at all.
    #[must_use]
    pub fn publishes(&self) -> bool {
        self.settings.scopes.iter().any(|scope| matches!(scope, Scope::Publish | Scope::PublishTopics(_)))
    }

    /// Whom of these it may not publish to; `None`: it may.
    #[must_use]
    pub fn forbids(&self, to: &Recipients) -> Option<String> {
        if self.has(&Scope::Publish) {
            return None;
        }
        let allowed = |name| {
            self.settings
                .scopes
                .iter()
                .any(|scope| matches!(scope, Scope::PublishTopics(patterns) if patterns.match_name(name)))
        };
        match to {
            Recipients::User(_) | Recipients::Users(_) => Some("users".to_owned()),
            Recipients::Topics { topics, .. } => topics.iter().find_map(|log| match log {
                LogId::Everyone => Some("everyone".to_owned()),
                LogId::Topic(name) => (!allowed(name)).then(|| format!("the topic {name:?}")),
            }),
        }
    }

    /// Takes so many messages, counted by recipient, out of what it may publish. What is more than
    /// all that it may publish at once is taken when the budget is full.
    ///
    /// # Errors
    ///
    /// How long it takes until there are enough.
    pub fn take(&self, count: usize, now: Instant) -> Result<(), Duration> {
        let Some(rate) = self.settings.rate else { return Ok(()) };
        let (per_s, burst) = (f64::from(rate.per_s), f64::from(rate.burst));
        let mut left = self.left.lock();
        let (before, at) = *left;
        let now_left = (before + now.saturating_duration_since(at).as_secs_f64() * per_s).min(burst);
        let wanted = count as f64;
        if now_left >= wanted.min(burst) {
            *left = (now_left - wanted, now);
            return Ok(());
        }
        *left = (now_left, now);
        Err(Duration::from_secs_f64((wanted.min(burst) - now_left) / per_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{TopicName, UserId};

    fn key(scopes: &[&str], rate: Option<KeyRate>) -> ApiKey {
        let scopes = scopes.iter().map(|scope| Scope::parse(scope).unwrap()).collect();
        ApiKey::new(KeySettings {
            name: "shop".to_owned(),
            digest: KeySettings::digest_of("secret"),
            scopes,
            rate,
        })
    }

    fn topics(names: &[&str]) -> Recipients {
        let topics = names.iter().map(|name| LogId::Topic(TopicName::parse(name).unwrap())).collect();
        Recipients::Topics { topics, except: Vec::new() }
    }

    #[test]
    fn scopes_are_read_as_they_are_written_and_others_are_none() {
        for name in
            ["publish", "publish:topic/news-*", "publish:topic/news", "read", "users", "topics", "cluster"]
        {
            assert_eq!(Scope::parse(name).map(|scope| scope.to_string()).as_deref(), Some(name));
        }
        for bad in ["", "admin", "Publish", "publish:topic/", "publish:topic/a*b", "publish:user/a", "read "]
        {
            assert_eq!(Scope::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_publishes_to_whom_it_may() {
        let users = Recipients::Users(vec![UserId::parse("alice").unwrap()]);
        let all = key(&["publish"], None);
        assert_eq!((all.forbids(&users), all.forbids(&topics(&["a"]))), (None, None));
        let some = key(&["publish:topic/news-*", "publish:topic/alerts"], None);
        assert_eq!(some.forbids(&topics(&["news-1", "alerts"])), None);
        assert_eq!(some.forbids(&topics(&["news-1", "news"])).as_deref(), Some("the topic \"news\""));
        assert_eq!(some.forbids(&users).as_deref(), Some("users"));
        let everyone = Recipients::Topics { topics: vec![LogId::Everyone], except: Vec::new() };
        assert_eq!(some.forbids(&everyone).as_deref(), Some("everyone"));
        assert!(some.publishes() && !key(&["read"], None).publishes());
    }

    #[test]
    fn a_rate_counts_recipients_and_says_how_long_to_wait() {
        let key = key(&["publish"], Some(KeyRate { per_s: 10, burst: 20 }));
        let start = Instant::now();
        assert_eq!(key.take(20, start), Ok(()));
        assert_eq!(key.take(5, start), Err(Duration::from_millis(500)));
        assert_eq!(key.take(5, start + Duration::from_millis(500)), Ok(()));
        // More than can ever be there at once passes when all is there, and is paid for afterwards.
        let full = start + Duration::from_secs(10);
        assert_eq!(key.take(40, full), Ok(()));
        assert_eq!(key.take(1, full + Duration::from_secs(2)), Err(Duration::from_millis(100)));
        assert_eq!(key.take(1, full + Duration::from_millis(2_100)), Ok(()));
    }
}
