//! Who may open a socket: decided before the upgrade, from the request alone.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::PushMetrics;
use super::availability::Availability;
use super::ownership::Ownership;
use super::registry::Arrival;
use super::tokens::{Known, TokenCheck};
use crate::clock::Clock;
use crate::fallback::Holder;
use crate::live::Live;
use crate::role::connect::PublicUrls;
use crate::role::strangers::is_guess;
use crate::role::strangers::{Stranger, Waiting};
use crate::telemetry::{Credential, WAY};
use crate::ticket::{Ticket, TicketError, TicketKey, UsedNonces};
use crate::wire::address::SocketQuery;
use crate::wire::frame::SessionOptions;
use crate::wire::peer::PeerError;
use crate::wire::refusal::{RefusalReason, Refused};

/// Burst of accepted sockets, in seconds of `accept_per_s` (docs/design.md, section 11).
const BURST_S: f64 = 2.0;

/// The origins whose pages may open sockets and call `connect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origins {
    /// Every origin, in development.
    Any,
    /// These origins, compared as they are. A request without `Origin` comes from no page and
    /// passes.
    Listed(Vec<String>),
}

impl Origins {
    /// Whether pages of this origin may.
    #[must_use]
    pub fn allows(&self, origin: Option<&str>) -> bool {
        match (self, origin) {
            (Self::Any, _) | (_, None) => true,
            (Self::Listed(list), Some(origin)) => list.iter().any(|listed| listed == origin),
        }
    }
}

/// A request for a socket.
#[derive(Debug, Clone, Copy, Default)]
pub struct SocketRequest<'a> {
    /// The node in the path, if there is one.
    pub node_in_path: Option<&'a str>,
    /// The raw query.
    pub query: &'a str,
    /// The `Origin` header.
    pub origin: Option<&'a str>,
    /// The bearer token of the `Authorization` header.
    pub bearer: Option<&'a str>,
    /// The client by its address, if addresses are limited.
    pub stranger: Option<&'a Stranger>,
}

/// A client that may open a socket, perhaps without a token yet.
#[derive(Debug)]
pub struct Admission {
    /// Set if a token or ticket came with the request.
    pub(super) identity: Option<Known>,
    pub(super) options: SessionOptions,
    pub(super) arrival: Arrival,
    /// An `auth` frame follows, whoever the client is.
    pub(super) topics_in_auth: bool,
    /// The client by its address, if addresses are limited.
    pub(super) stranger: Option<Stranger>,
    /// Set while it is not known who the client is.
    pub(super) waiting: Option<Waiting>,
}

/// The response instead of the upgrade.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdmissionError {
    /// 503 with `Retry-After`: draining, over the rate, or auth cannot be reached.
    Unavailable(&'static str),
    /// 403.
    ForbiddenOrigin,
    /// 401, with the reason.
    Unauthorized(Refused),
    /// 422: parameters and rules.
    BadQuery(Vec<(&'static str, String)>),
    /// 307 to this URL, for a client that asked for it.
    Redirect(String),
    /// 429: this address has shown too many bad tokens, or has too many sockets waiting. It may
    /// come again after this many seconds.
    TooMany(u32),
}

/// The same, or too many of them if the client's address has shown many bad tokens before.
fn counted(stranger: Option<&Stranger>, error: AdmissionError) -> AdmissionError {
    let failed = || stranger?.failed(std::time::Instant::now());
    match &error {
        AdmissionError::Unauthorized(refused) if is_guess(refused.reason) => {
            failed().map_or(error, AdmissionError::TooMany)
        }
        _ => error,
    }
}

impl AdmissionError {
    /// The names of all, in metrics.
    pub(super) const NAMES: [&str; 6] =
        ["unavailable", "forbidden_origin", "unauthorized", "bad_query", "redirect", "too_many"];

    const fn name(&self) -> &'static str {
        Self::NAMES[match self {
            Self::Unavailable(_) => 0,
            Self::ForbiddenOrigin => 1,
            Self::Unauthorized(_) => 2,
            Self::BadQuery(_) => 3,
            Self::Redirect(_) => 4,
            Self::TooMany(_) => 5,
        }]
    }
}

/// What is configured about requests for sockets.
pub(super) struct AdmissionRules {
    /// The origins whose pages may open sockets.
    pub(super) origins: Live<Origins>,
    /// Whether a token may stand in the URL.
    pub(super) token_in_url: bool,
}

/// Takes tickets for this process, each once.
pub(super) struct Tickets {
    key: TicketKey,
    holder: Holder,
    clock: Clock,
    used: Mutex<UsedNonces>,
}

impl Tickets {
    /// Tickets for `holder`, verified with `key`.
    pub(super) fn new(key: TicketKey, holder: Holder, clock: Clock) -> Self {
        Self { key, holder, clock, used: Mutex::default() }
    }

    fn verify(&self, text: &str) -> Result<Ticket, TicketError> {
        self.key.verify(text, &self.holder.node, self.holder.incarnation, self.clock.now())
    }

    fn redeem(&self, ticket: &Ticket) -> Result<(), TicketError> {
        self.used.lock().take(ticket, self.clock.now())
    }
}

/// Decides about requests for sockets.
pub(super) struct Admitter {
    pub(super) rules: AdmissionRules,
    pub(super) availability: Arc<Availability>,
    pub(super) budgets: AcceptBudgets,
    pub(super) tickets: Tickets,
    pub(super) tokens: Arc<TokenCheck>,
    pub(super) ownership: Arc<Ownership>,
    pub(super) urls: Arc<PublicUrls>,
    pub(super) metrics: PushMetrics,
}

impl Admitter {
    /// Decides about one request.
    ///
    /// # Errors
    ///
    /// The response instead of the upgrade.
    pub(super) async fn admit(&self, request: SocketRequest<'_>) -> Result<Admission, AdmissionError> {
        let decided = self.decide(request).await;
        if let Err(error) = &decided {
            self.metrics.refused.inc();
            self.metrics.sockets_refused.get_or_create(&[("reason", error.name())]).inc();
        }
        decided
    }

    async fn decide(&self, request: SocketRequest<'_>) -> Result<Admission, AdmissionError> {
        if !self.availability.takes_sockets() {
            return Err(AdmissionError::Unavailable("this node is leaving; another one takes sockets"));
        }
        if !self.rules.origins.get().allows(request.origin) {
            let why = "pages of this origin may not open sockets (push.origins)";
            self.tokens.refuse(Credential::Origin, why);
            return Err(AdmissionError::ForbiddenOrigin);
        }
        let mut query = SocketQuery::parse(request.query).map_err(AdmissionError::BadQuery)?;
        let mut arrival = self.arrival(request.node_in_path, &query);
        let identity = match &query.ticket {
            Some(ticket) => self.redeem(ticket, &mut arrival, &mut query.options).map(Some),
            None => self.verify_token(&request, &query).await,
        };
        let identity = identity.map_err(|error| counted(request.stranger, error))?;
        let waiting = match request.stranger.filter(|_| identity.is_none()) {
            Some(stranger) => {
                Some(stranger.waits(std::time::Instant::now()).ok_or(AdmissionError::TooMany(1))?)
            }
            None => None,
        };
        let user = identity.as_ref().map_or("not known yet", |known| known.user.as_str());
        tracing::debug!(target: WAY, step = 1, user, node = %self.ownership.node(), "asked for a socket");
        // A ticket was made for this node, and is used up.
        if query.redirect_http
            && query.ticket.is_none()
            && let Some(known) = &identity
            && let Some(url) = self.elsewhere(known, &query.options, arrival)
        {
            return Err(AdmissionError::Redirect(url));
        }
        let topics_in_auth = query.topics_in_auth;
        let stranger = request.stranger.cloned();
        Ok(Admission { identity, options: query.options, arrival, topics_in_auth, stranger, waiting })
    }

    /// A client that was sent on twice, or whose path names another node, is kept until the view
    /// changes.
    fn arrival(&self, node_in_path: Option<&str>, query: &SocketQuery) -> Arrival {
        let own = self.ownership.node().as_str();
        let keep = query.hops >= 2 || node_in_path.is_some_and(|name| name != own);
        let keep_at = keep.then(|| self.ownership.digest());
        Arrival { hops: query.hops, client_epoch: query.epoch, keep_at }
    }

    /// Takes a ticket, which names the device too.
    ///
    /// # Errors
    ///
    /// It is not good, or the node takes no more sockets this second.
    pub(super) fn redeem(
        &self,
        text: &str,
        arrival: &mut Arrival,
        options: &mut SessionOptions,
    ) -> Result<Known, AdmissionError> {
        let refused = |error: TicketError| {
            let why = error.to_string();
            self.tokens.refuse(Credential::Ticket, &why);
            AdmissionError::Unauthorized(Refused::new(RefusalReason::TicketInvalid, why))
        };
        let ticket = self.tickets.verify(text).map_err(refused)?;
        // Before the ticket is used up: a ticket that cannot be served now stays good.
        self.budgets.try_acquire(Who::Known)?;
        self.tickets.redeem(&ticket).map_err(refused)?;
        if ticket.keep {
            arrival.keep_at = Some(self.ownership.digest());
        }
        options.device = Some(ticket.device);
        let (issued_at_s, expires_at_s) = (ticket.token_iat_s, ticket.token_exp_s);
        let watch = ticket.watch.map(Arc::new);
        Ok(Known { user: ticket.user, issued_at_s, expires_at_s, watch })
    }

    async fn verify_token(
        &self,
        request: &SocketRequest<'_>,
        query: &SocketQuery,
    ) -> Result<Option<Known>, AdmissionError> {
        let in_url = query.access_token.as_deref().filter(|_| self.rules.token_in_url);
        let Some(token) = request.bearer.or(in_url) else {
            self.budgets.try_acquire(Who::Stranger)?;
            return Ok(None);
        };
        if token.is_empty() {
            let why = "a token is needed: Authorization: Bearer <token>";
            self.tokens.refuse(Credential::Token, why);
            return Err(AdmissionError::Unauthorized(Refused::new(RefusalReason::TokenMissing, why)));
        }
        match self.tokens.verify(token).await {
            Ok(known) => {
                self.budgets.try_acquire(Who::Known)?;
                Ok(Some(known))
            }
            Err(PeerError::Unauthorized(refused)) => Err(AdmissionError::Unauthorized(refused)),
            Err(PeerError::Unavailable(_)) => {
                Err(AdmissionError::Unavailable("tokens cannot be verified now"))
            }
        }
    }

    /// The owner's URL, if another node owns the user and the client may be sent there.
    fn elsewhere(&self, known: &Known, options: &SessionOptions, arrival: Arrival) -> Option<String> {
        let view = self.ownership.view();
        let owner = view.owner(&known.user).filter(|owner| owner.info.node != *self.ownership.node())?;
        if view.held || arrival.keep_at.is_some() {
            return None;
        }
        let hops = arrival.hops.saturating_add(1);
        let mut url = format!("{}?hops={hops}&epoch={}", self.urls.of(&owner.info.node)?, view.epoch);
        url.push_str(&options.query());
        self.metrics.moves.inc();
        Some(url)
    }
}

/// Who asks for a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// A client that brought a good token or ticket with the request.
    Known,
    /// A client that has yet to show a token.
    Stranger,
}

/// Budgets for new sockets, one for each kind of client: strangers must not spend the budget of
/// those who are known.
#[derive(Debug)]
pub(super) struct AcceptBudgets {
    known: Mutex<AcceptBudget>,
    strangers: Mutex<AcceptBudget>,
}

impl AcceptBudgets {
    /// `per_s` sockets of each kind; zero is no limit.
    pub(super) fn new(per_s: u32) -> Self {
        let budget = || Mutex::new(AcceptBudget::new(per_s));
        Self { known: budget(), strangers: budget() }
    }

    fn try_acquire(&self, who: Who) -> Result<(), AdmissionError> {
        let budget = match who {
            Who::Known => &self.known,
            Who::Stranger => &self.strangers,
        };
        let taken = budget.lock().try_acquire(Instant::now());
        taken.then_some(()).ok_or(AdmissionError::Unavailable("this node takes no more sockets this second"))
    }
}

/// A token bucket over new sockets.
#[derive(Debug)]
struct AcceptBudget {
    per_s: f64,
    left: f64,
    at: Option<Instant>,
}

impl AcceptBudget {
    /// `per_s` of zero is no limit.
    fn new(per_s: u32) -> Self {
        Self { per_s: f64::from(per_s), left: f64::from(per_s) * BURST_S, at: None }
    }

    fn try_acquire(&mut self, now: Instant) -> bool {
        if self.per_s == 0.0 {
            return true;
        }
        let passed = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(now);
        self.left = (self.left + passed.as_secs_f64() * self.per_s).min(self.per_s * BURST_S);
        if self.left < 1.0 {
            return false;
        }
        self.left -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_compared_letter_by_letter() {
        let listed = Origins::Listed(vec!["https://shop.example".to_owned()]);
        assert!(listed.allows(Some("https://shop.example")) && listed.allows(None));
        for other in ["http://shop.example", "https://shop.example.evil", "https://SHOP.example", "null", ""]
        {
            assert!(!listed.allows(Some(other)), "{other}");
        }
        assert!(Origins::Any.allows(Some("https://anywhere")));
    }

    #[test]
    fn strangers_do_not_spend_what_those_have_who_are_known() {
        let budgets = AcceptBudgets::new(10);
        let strangers = (0..1_000).filter(|_| budgets.try_acquire(Who::Stranger).is_ok()).count();
        let known = (0..20).filter(|_| budgets.try_acquire(Who::Known).is_ok()).count();
        assert!((20..=21).contains(&strangers) && known == 20, "{strangers} {known}");
    }

    #[test]
    fn the_accept_budget_allows_a_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut budget = AcceptBudget::new(10);
        assert_eq!((0..100).filter(|_| budget.try_acquire(start)).count(), 20);
        assert_eq!((0..100).filter(|_| budget.try_acquire(start + Duration::from_millis(500))).count(), 5);
        assert_eq!((0..100).filter(|_| budget.try_acquire(start + Duration::from_secs(60))).count(), 20);
        let mut none = AcceptBudget::new(0);
        assert_eq!((0..100_000).filter(|_| none.try_acquire(start)).count(), 100_000);
    }
}
