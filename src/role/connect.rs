//! Connect: which node a client should open its socket on, and a ticket for it. Push and dispatch both offer it.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::watch;
use tower::ServiceExt;

use super::VerifyService;
use crate::clock::Clock;
use crate::membership::{Member, NodeState, View};
use crate::message::{DeviceId, NodeId};
use crate::ticket::{TICKET_LIFE_MS, Ticket, TicketKey};
use crate::wire::address::UrlTemplate;
use crate::wire::peer::{Identity, PeerFault, VerifyRequest};

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
    /// Whose URL that is.
    pub node: NodeId,
    /// Of the view that says so.
    pub generation: Arc<str>,
    /// Of the view that says so.
    pub epoch: u64,
}

/// Why no place was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectFault {
    /// The token is not good.
    #[error("{0}")]
    Unauthorized(String),
    /// No push node, or auth cannot be reached: later.
    #[error("{0}")]
    Unavailable(String),
}

impl From<PeerFault> for ConnectFault {
    fn from(fault: PeerFault) -> Self {
        match fault {
            PeerFault::Unauthorized(reason) => Self::Unauthorized(reason),
            PeerFault::Unavailable(reason) => Self::Unavailable(reason),
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
    clock: Clock,
}

impl Connect {
    /// Places by `views`, with the public names of `urls`.
    #[must_use]
    pub fn new(
        verify: VerifyService,
        views: watch::Receiver<Arc<View>>,
        urls: PublicUrls,
        key: TicketKey,
        clock: Clock,
    ) -> Self {
        Self { inner: Arc::new(Inner { verify, views, urls, key, clock }) }
    }

    /// Names the node for the token's user, with a ticket that opens one socket there for `device`.
    ///
    /// # Errors
    /// [`ConnectFault`].
    pub async fn place(&self, token: &str, device: DeviceId) -> Result<Place, ConnectFault> {
        let request = VerifyRequest { token: token.into() };
        let identity = self.inner.verify.clone().oneshot(request).await?;
        let view = Arc::clone(&self.inner.views.borrow());
        let owner = view.owner(&identity.user).filter(|member| member.state == NodeState::Active);
        let nobody = || ConnectFault::Unavailable("no push node takes sockets now".to_owned());
        let owner = owner.ok_or_else(nobody)?;
        let base = self.inner.urls.of(&owner.info.node).ok_or_else(nobody)?;
        let ticket = self.inner.key.sign(&self.ticket(identity, device, owner));
        Ok(Place {
            url: format!("{base}?ticket={ticket}"),
            node: owner.info.node.clone(),
            generation: Arc::clone(&view.generation),
            epoch: view.epoch,
        })
    }

    fn ticket(&self, identity: Identity, device: DeviceId, owner: &Member) -> Ticket {
        let now = self.inner.clock.now();
        Ticket {
            user: identity.user,
            device,
            node: owner.info.node.clone(),
            incarnation: owner.incarnation,
            token_iat_s: identity.issued_at_s,
            token_exp_s: identity.expires_at_s,
            keep: false,
            nonce: rand::random(),
            expires_at: crate::message::Millis(now.0 + TICKET_LIFE_MS),
        }
    }
}
