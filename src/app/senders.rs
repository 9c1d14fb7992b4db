//! Who sends to collect: the keys in use, what each may do, and what it did.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::time::Instant;

use crate::message::Recipients;
use crate::role::collect::{ApiKey, KeySettings, Scope};
use crate::telemetry::{Counter, Credential, Family, Metrics, Outcome, Refusals, TimingBy};
use crate::wire::http::Problem;

/// A key in use.
pub(super) struct Sender {
    key: ApiKey,
    /// Publishes by outcome.
    publishes: [Counter; 3],
}

/// The keys in use.
pub(super) struct Senders {
    all: RwLock<Vec<Arc<Sender>>>,
    publishes: Family<[(&'static str, String); 2], Counter>,
    times: TimingBy<3>,
    refusals: Refusals,
}

impl Senders {
    pub(super) fn new(keys: Vec<KeySettings>, metrics: &Metrics, refusals: Refusals) -> Self {
        let publishes = Family::default();
        let shown = publishes.clone();
        metrics.register(|r| r.register("publishes", "Publishes by key and outcome", shown));
        let help = "From the reading of a publish to its answer";
        let times = TimingBy::register(metrics, ("publish_seconds", help), "outcome", Outcome::NAMES);
        let this = Self { all: RwLock::default(), publishes, times, refusals };
        this.replace(keys);
        this
    }

    /// From now on these keys count, and no others.
    pub(super) fn replace(&self, keys: Vec<KeySettings>) {
        let counter = |name: &str, outcome: &str| {
            let labels = [("key", name.to_owned()), ("outcome", outcome.to_owned())];
            self.publishes.get_or_create(&labels).clone()
        };
        let before = self.all.read().clone();
        let sender = |settings: KeySettings| {
            // One that stays as it is keeps what it has used of its rate.
            if let Some(same) = before.iter().find(|sender| *sender.key.settings() == settings) {
                return Arc::clone(same);
            }
            let publishes = Outcome::NAMES.map(|outcome| counter(&settings.name, outcome));
            Arc::new(Sender { key: ApiKey::new(settings), publishes })
        };
        let now: Vec<Arc<Sender>> = keys.into_iter().map(sender).collect();
        for gone in before.iter().filter(|gone| !now.iter().any(|one| one.name() == gone.name())) {
            for outcome in Outcome::NAMES {
                self.publishes.remove(&[("key", gone.name().to_owned()), ("outcome", outcome.to_owned())]);
            }
        }
        *self.all.write() = now;
    }

    /// Finds the key of a request, and whether it has the right.
    ///
    /// # Errors
    ///
    /// 401, or 403 with the scope that is missing.
    pub(super) fn find(&self, given: Option<&str>, right: &Scope) -> Result<Arc<Sender>, Problem> {
        let digest = KeySettings::digest_of(given.unwrap_or_default());
        let found = self.all.read().iter().find(|sender| sender.key.is_of(&digest)).cloned();
        let Some(sender) = found.filter(|_| given.is_some()) else {
            let why = match given {
                Some(given) if !given.is_empty() => "this API key is not known",
                _ => "an API key is needed: Authorization: Bearer <key>",
            };
            self.refusals.note(Credential::ApiKey, why);
            return Err(Problem::new(401, why));
        };
        let may = match right {
            Scope::Publish => sender.key.publishes(),
            right => sender.key.has(right),
        };
        if may {
            return Ok(sender);
        }
        if *right == Scope::Publish {
            sender.publishes[Outcome::Refused as usize].inc();
        }
        Err(sender.refusal(&format!("needs the scope {right}")))
    }

    /// The name of a key; `None` if it is not known.
    pub(super) fn name_of(&self, given: Option<&str>) -> Option<String> {
        let digest = KeySettings::digest_of(given?);
        let all = self.all.read();
        all.iter().find(|sender| sender.key.is_of(&digest)).map(|sender| sender.key.settings().name.clone())
    }

    /// Whether a sender that was found before may still send: its key may have been taken away.
    ///
    /// # Errors
    ///
    /// 401.
    pub(super) fn still(&self, sender: &Arc<Sender>) -> Result<(), Problem> {
        match self.all.read().iter().any(|known| Arc::ptr_eq(known, sender)) {
            true => Ok(()),
            false => Err(Problem::new(401, "this API key was taken away or changed: call again")),
        }
    }

    /// Counts a publish of this sender, and how long its request took.
    pub(super) fn published(&self, sender: &Sender, status: u16, took: Duration) {
        let outcome = Outcome::of_status(status);
        self.times.at(outcome as usize).observe(took);
        sender.publishes[outcome as usize].inc();
    }

    /// Counts a batch of this sender: each of its items by its own outcome, and the time once.
    pub(super) fn published_batch(&self, sender: &Sender, statuses: &[u16], took: Duration) {
        let worst = statuses.iter().copied().max().unwrap_or(202);
        self.times.at(Outcome::of_status(worst) as usize).observe(took);
        for status in statuses {
            sender.publishes[Outcome::of_status(*status) as usize].inc();
        }
    }
}

impl Sender {
    /// The name of the key.
    pub(super) fn name(&self) -> &str {
        self.key.name()
    }

    /// Whether the sender may publish to these.
    ///
    /// # Errors
    ///
    /// 403 with the scopes that the key has.
    pub(super) fn may_publish_to(&self, to: &Recipients) -> Result<(), Problem> {
        match self.key.forbids(to) {
            None => Ok(()),
            Some(whom) => Err(self.refusal(&format!("may not publish to {whom}"))),
        }
    }

    /// Takes so many recipients out of what the sender may publish.
    ///
    /// # Errors
    ///
    /// 429 with the time after which there are enough.
    pub(super) fn take(&self, recipients: usize) -> Result<(), Problem> {
        self.key.take(recipients, Instant::now()).map_err(|wait| {
            let why = format!("the key {:?} publishes faster than its rate_per_s: repeat later", self.name());
            let seconds = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX).saturating_add(1);
            Problem { retry_after_s: Some(seconds), ..Problem::new(429, why) }
        })
    }

    fn refusal(&self, what: &str) -> Problem {
        let (name, scopes) = (self.name(), self.key.scopes());
        Problem::new(403, format!("the key {name:?} {what}; its scopes are {scopes}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_taken_away_has_no_metrics_any_more() {
        let key = |name: &str| KeySettings {
            name: name.to_owned(),
            digest: KeySettings::digest_of(name),
            scopes: Scope::all(),
            rate: None,
        };
        let metrics = Metrics::default();
        let refusals = Refusals::register(&metrics);
        let senders = Senders::new(vec![key("stays"), key("goes")], &metrics, refusals);
        let shown = |name: &str| metrics.expose().1.contains(&format!("publishes_total{{key=\"{name}\""));
        assert!(shown("stays") && shown("goes"));
        senders.replace(vec![key("stays"), key("comes")]);
        assert!(shown("stays") && shown("comes") && !shown("goes"));
    }
}
