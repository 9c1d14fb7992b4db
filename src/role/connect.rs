//! Connect: which node a client should open its socket on, and a ticket for it. Push and dispatch both offer it.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tower::ServiceExt;

use super::VerifyService;
use super::reach::PeerProbe;
use crate::clock::Clock;
use crate::membership::{Member, View};
use crate::message::{DeviceId, NodeId, UserId};
use crate::ticket::{TICKET_LIFE_MS, Ticket, TicketKey};
use crate::wire::address::UrlTemplate;
use crate::wire::peer::{Identity, PeerError, VerifyRequest};

/// The public URL of each node: by the template, or, in development, by each node's own address.
#[derive(Debug, Clone)]
pub enum PublicUrls {
    /// As configured.
    Template(UrlTemplate),
    /// As bound, for the nodes of this process.
    Own(HashMap<NodeId, String>),
}

impl PublicUrls {
    /// The URL of a checked node; None where nothing is known of it.
    #[must_use]
    pub fn of(&self, node: &NodeId) -> Option<String> {
        match self {
            Self::Template(template) => Some(template.url(node)),
            Self::Own(urls) => urls.get(node).cloned(),
        }
    }
}

/// The answer to a client that asked where to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// With the ticket in it.
    pub url: String,
    /// Who was placed.
    pub user: UserId,
    /// When the token was issued, in whole seconds; zero where it does not say.
    pub token_iat_s: u64,
    /// Whose URL that is.
    pub node: NodeId,
    /// Of the view that says so.
    pub generation: Arc<str>,
    /// Of the view that says so.
    pub epoch: u64,
}

/// Why no place was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The token is not good.
    #[error("{0}")]
    Unauthorized(String),
    /// No push node, or auth cannot be reached: later.
    #[error("{0}")]
    Unavailable(String),
}

impl From<PeerError> for ConnectError {
    fn from(fault: PeerError) -> Self {
        match fault {
            PeerError::Unauthorized(reason) => Self::Unauthorized(reason),
            PeerError::Unavailable(reason) => Self::Unavailable(reason),
        }
    }
}

/// See the room's comment. Cheap to clone.
#[derive(Clone)]
pub struct Connect {
    inner: Arc<Inner>,
}

struct Inner {
    verify: VerifyService,
    views: watch::Receiver<Arc<View>>,
    urls: PublicUrls,
    key: TicketKey,
    reach: PeerProbe,
    clock: Clock,
    /// The last view from which nodes had to be left out: a crowd that comes from a dead node needs the same.
    reduced: Mutex<Option<Reduced>>,
}

/// A view without some nodes.
struct Reduced {
    of: Arc<View>,
    without: Vec<NodeId>,
    view: Arc<View>,
}

/// Nodes that are tried for one client: whoever finds three silent ones comes back a moment later.
const TRIES: usize = 3;

impl Connect {
    /// Places by `views`, with the public names of `urls`.
    #[must_use]
    pub fn new(
        verify: VerifyService,
        views: watch::Receiver<Arc<View>>,
        urls: PublicUrls,
        key: TicketKey,
        reach: PeerProbe,
        clock: Clock,
    ) -> Self {
        Self { inner: Arc::new(Inner { verify, views, urls, key, reach, clock, reduced: Mutex::new(None) }) }
    }

    /// Whose token this is.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn verify(&self, token: &str) -> Result<Identity, ConnectError> {
        Ok(self.inner.verify.clone().oneshot(VerifyRequest { token: token.into() }).await?)
    }

    /// Names the node for a verified user, with a ticket that opens one socket there for `device`.
    ///
    /// # Errors
    /// [`ConnectError::Unavailable`].
    pub async fn place(&self, identity: Identity, device: DeviceId) -> Result<Place, ConnectError> {
        let view = Arc::clone(&self.inner.views.borrow());
        let nobody = || ConnectError::Unavailable("no push node takes sockets now".to_owned());
        let named = self.first_that_answers(&view, &identity.user).await.ok_or_else(nobody)?;
        let base = self.inner.urls.of(&named.info.node).ok_or_else(nobody)?;
        // One that is not the owner must keep the client, or it would send it to the owner at once.
        let keep = view.owner(&identity.user).is_none_or(|owner| owner.info.node != named.info.node);
        let (user, token_iat_s) = (identity.user.clone(), identity.issued_at_s);
        let ticket = self.inner.key.sign(&self.ticket(identity, device, &named, keep));
        Ok(Place {
            url: format!("{base}?ticket={ticket}"),
            user,
            token_iat_s,
            node: named.info.node.clone(),
            generation: Arc::clone(&view.generation),
            epoch: view.epoch,
        })
    }

    /// The first node from the user's place on the ring that the registry shows and that answers.
    async fn first_that_answers(&self, view: &Arc<View>, user: &UserId) -> Option<Member> {
        // A registry that shows nobody says nothing about anybody.
        let mut without =
            if view.absent.len() < view.members.len() { view.absent.clone() } else { Vec::new() };
        for _ in 0..TRIES {
            let reduced = self.reduced(view, &without);
            let next = reduced.owner(user)?;
            if self.inner.reach.answers(&next.info.node).await {
                return Some(next.clone());
            }
            without.push(next.info.node.clone());
            without.sort();
        }
        None
    }

    fn reduced(&self, of: &Arc<View>, without: &[NodeId]) -> Arc<View> {
        if without.is_empty() {
            return Arc::clone(of);
        }
        let mut kept = self.inner.reduced.lock();
        match &*kept {
            Some(last) if Arc::ptr_eq(&last.of, of) && last.without == without => Arc::clone(&last.view),
            _ => {
                let view = Arc::new(of.without(without));
                *kept =
                    Some(Reduced { of: Arc::clone(of), without: without.to_vec(), view: Arc::clone(&view) });
                view
            }
        }
    }

    fn ticket(&self, identity: Identity, device: DeviceId, owner: &Member, keep: bool) -> Ticket {
        let now = self.inner.clock.now();
        Ticket {
            user: identity.user,
            device,
            node: owner.info.node.clone(),
            incarnation: owner.incarnation,
            token_iat_s: identity.issued_at_s,
            token_exp_s: identity.expires_at_s,
            keep,
            nonce: rand::random(),
            expires_at: crate::message::Millis(now.0 + TICKET_LIFE_MS),
        }
    }
}
