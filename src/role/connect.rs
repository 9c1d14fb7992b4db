//! Connect tells a client on which node to open its socket, and hands it a ticket. Push and
//! dispatch both offer it.

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
use crate::watching::WatchRights;
use crate::wire::address::UrlTemplate;
use crate::wire::peer::{Identity, PeerError, VerifyRequest};
use crate::wire::refusal::Refused;

/// The public URLs of the nodes.
#[derive(Debug, Clone)]
pub enum PublicUrls {
    /// Built from the configured template.
    Template(UrlTemplate),
    /// The bound addresses of the nodes of this process, in development.
    Own(HashMap<NodeId, String>),
}

impl PublicUrls {
    /// The URL of a checked node; `None` if it is unknown.
    #[must_use]
    pub fn of(&self, node: &NodeId) -> Option<String> {
        match self {
            Self::Template(template) => Some(template.url(node)),
            Self::Own(urls) => urls.get(node).cloned(),
        }
    }
}

/// The response to a client that asked where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// URL without the ticket.
    pub socket: String,
    /// The ticket.
    pub ticket: String,
    /// Whether the node there takes a ticket in `auth`.
    pub ticket_in_auth: bool,
    /// The user.
    pub user: UserId,
    /// `iat` of the token in whole seconds; zero if it has none.
    pub token_iat_s: u64,
    /// The node of that URL.
    pub node: NodeId,
    /// Generation of the view that names that node.
    pub generation: Arc<str>,
    /// Epoch of the view that names that node.
    pub epoch: u64,
}

/// Why no node was named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The token is refused.
    #[error("{0}")]
    Unauthorized(Refused),
    /// There is no push node, or auth cannot be reached.
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

/// Names nodes and makes tickets. Cheap to clone.
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
    /// The last view that had to be reduced. A crowd that comes from a dead node needs the same
    /// one.
    reduced: Mutex<Option<Reduced>>,
}

/// A view without some nodes.
struct Reduced {
    of: Arc<View>,
    without: Vec<NodeId>,
    view: Arc<View>,
}

/// Nodes that are tried for one client. A client that meets three silent nodes comes again a moment
/// later.
const TRIES: usize = 3;

impl Connect {
    /// Names nodes by `views` and builds their URLs from `urls`.
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

    /// Verifies a token.
    ///
    /// # Errors
    ///
    /// [`ConnectError`].
    pub async fn verify(&self, token: &str) -> Result<Identity, ConnectError> {
        Ok(self.inner.verify.clone().oneshot(VerifyRequest { token: token.into() }).await?)
    }

    /// Names the node for a verified user, with a ticket that opens one socket there for `device`.
    ///
    /// # Errors
    ///
    /// [`ConnectError::Unavailable`].
    pub async fn place(&self, identity: Identity, device: DeviceId) -> Result<Place, ConnectError> {
        let view = Arc::clone(&self.inner.views.borrow());
        let nobody = || ConnectError::Unavailable("no push node takes sockets now".to_owned());
        let named = self.first_that_answers(&view, &identity.user).await.ok_or_else(nobody)?;
        let base = self.inner.urls.of(&named.info.node).ok_or_else(nobody)?;
        // A node that is not the owner must keep the client, or it would send it to the owner at
        // once.
        let keep = view.owner(&identity.user).is_none_or(|owner| owner.info.node != named.info.node);
        let (user, token_iat_s) = (identity.user.clone(), identity.issued_at_s);
        let ticket = self.inner.key.sign(&self.ticket(identity, device, &named, keep));
        Ok(Place {
            socket: base,
            ticket,
            ticket_in_auth: named.info.ticket_in_auth,
            user,
            token_iat_s,
            node: named.info.node.clone(),
            generation: Arc::clone(&view.generation),
            epoch: view.epoch,
        })
    }

    /// The first node, clockwise from the user's key, that the registry shows and that answers.
    async fn first_that_answers(&self, view: &Arc<View>, user: &UserId) -> Option<Member> {
        // A registry that shows no node says nothing about any node.
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
        let watch = WatchRights::of_claims(&identity.claims);
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
            watch,
        }
    }
}
