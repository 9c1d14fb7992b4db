//! gRPC between roles: clients and servers for the values of [`crate::wire::peer`]. Each call
//! carries a proof that its sender knows `peer.secret`; [`Sign`] makes it and [`Verify`] checks it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use hyper::body::Incoming;
use tokio::sync::{Mutex, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::InterceptedService;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::{Interceptor, Routes};
use tonic::transport::{Channel, Endpoint};
use tonic::{GrpcMethod, Request, Response, Status, Streaming};
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

use super::http::Answers;
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, LiveMessage, PeerError, Presence, PushRequest, PushResponse,
    Revocation, ViewVersion,
};
use crate::wire::proto::{ProtoError, batch_of, node_of, peer as message, user_of};

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls/ringpush.peer.v1.rs"));
}

use calls::dispatch_client::DispatchClient;
use calls::dispatch_server::{Dispatch, DispatchServer};
use calls::push_client::PushClient;
use calls::push_server::{Push, PushServer};

/// Deadline for connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Deadline for one call; streams have none.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is pinged this often, and closed if a ping is not answered for as long.
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// Largest gRPC message: a batch of 1000 messages of 64 KiB.
const MESSAGE_MAX: usize = 80 * 1024 * 1024;
/// Batches in flight on a stream.
const IN_FLIGHT: usize = 1;
/// The metadata key of the proof.
const PROOF: &str = "ringpush-peer";
/// The metadata key of the node that is called.
const NODE: &str = "ringpush-node";

/// Makes the proof for one call of this method.
pub type Sign = Arc<dyn Fn(&str) -> String + Send + Sync>;
/// Takes the proof of a call: the proof and the method.
///
/// # Errors
///
/// What is wrong with it, for the caller.
pub type Verify = Arc<dyn Fn(&str, &str) -> Result<(), String> + Send + Sync>;
/// A role, in this process or another one.
pub type Service<Req, Res> = BoxCloneSyncService<Req, Res, PeerError>;
/// Finds the push node that is called.
pub type FindPush = Arc<dyn Fn(&str) -> Option<Service<PushRequest, PushResponse>> + Send + Sync>;

/// Adds proof and node to each call.
#[derive(Clone)]
struct Signed {
    sign: Sign,
    node: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Signed {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        // The generated clients set the method as an extension.
        let method = request.extensions().get::<GrpcMethod<'_>>();
        let method = method.map(|method| format!("/{}/{}", method.service(), method.method()));
        let proof = (self.sign)(&method.unwrap_or_default());
        let proof = proof.parse().map_err(|_| Status::internal("the proof cannot be sent"))?;
        request.metadata_mut().insert(PROOF, proof);
        if let Some(node) = &self.node {
            request.metadata_mut().insert(NODE, node.clone());
        }
        Ok(request)
    }
}

type Link = InterceptedService<Channel, Signed>;

fn link(address: &str, node: Option<&str>, sign: Sign) -> Result<Link, PeerError> {
    let bad = || PeerError::Unavailable(format!("{address:?} is no address of a peer (peer.advertise)"));
    let node = node.map(|node| node.parse().map_err(|_| bad())).transpose()?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| bad())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    Ok(InterceptedService::new(endpoint.connect_lazy(), Signed { sign, node }))
}

fn unavailable(status: Status) -> PeerError {
    PeerError::Unavailable(format!("{}: {}", status.code(), status.message()))
}

fn in_time<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

fn stamp_of(taken: Response<message::Taken>) -> ViewVersion {
    taken.into_inner().stamp.into()
}

fn presences(sessions: Vec<message::Session>) -> Result<Vec<Presence>, PeerError> {
    let read: Result<Vec<Presence>, ProtoError> = sessions.into_iter().map(Presence::try_from).collect();
    read.map_err(|fault| PeerError::Unavailable(fault.to_string()))
}

/// One push node elsewhere. Cloned, it is the same connection and the same stream.
#[derive(Clone)]
pub struct RemotePush {
    client: PushClient<Link>,
    feed: Arc<Mutex<Option<Feed>>>,
}

/// A stream that is open.
struct Feed {
    batches: mpsc::Sender<message::PushBatch>,
    answers: Streaming<message::Taken>,
}

impl RemotePush {
    /// The node of this name at `address`; nothing is connected yet.
    ///
    /// # Errors
    /// That it is no address.
    pub fn new(address: &str, node: &str, sign: Sign) -> Result<Self, PeerError> {
        let client = PushClient::new(link(address, Some(node), sign)?)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Ok(Self { client, feed: Arc::default() })
    }

    /// As the service that dispatch wants.
    #[must_use]
    pub fn service(self) -> Service<PushRequest, PushResponse> {
        BoxCloneSyncService::new(tower::service_fn(move |request| {
            let this = self.clone();
            async move { this.call(request).await }
        }))
    }

    async fn call(mut self, request: PushRequest) -> Result<PushResponse, PeerError> {
        match request {
            PushRequest::Deliver { batch, sweep, stamp } => {
                let messages = batch.iter().map(message::Live::from).collect();
                self.deliver(message::PushBatch { messages, sweep, stamp: Some((&stamp).into()) }).await
            }
            PushRequest::Lookup(user) => {
                let asked = in_time(message::User { user: user.as_str().to_owned() });
                let found = self.client.lookup(asked).await.map_err(unavailable)?;
                presences(found.into_inner().sessions).map(PushResponse::Sessions)
            }
            PushRequest::Disconnect(revocation) => {
                let asked = in_time(message::Revocation::from(&revocation));
                self.client.disconnect(asked).await.map(stamp_of).map(PushResponse::Done).map_err(unavailable)
            }
            PushRequest::Gone(stamp) => {
                let asked = in_time(message::Stamp::from(&stamp));
                self.client.gone(asked).await.map(stamp_of).map(PushResponse::Done).map_err(unavailable)
            }
            PushRequest::Ping => {
                let asked = in_time(message::Stamp::default());
                self.client.ping(asked).await.map(stamp_of).map(PushResponse::Done).map_err(unavailable)
            }
        }
    }

    async fn deliver(&mut self, batch: message::PushBatch) -> Result<PushResponse, PeerError> {
        let kept = Arc::clone(&self.feed);
        let mut kept = kept.lock().await;
        // Taken out until it is answered: a call that is given up must not leave its answer to the
        // next one.
        let mut feed = match kept.take() {
            Some(feed) => feed,
            None => self.open().await?,
        };
        let ended = || PeerError::Unavailable("the stream ended".to_owned());
        feed.batches.send(batch).await.map_err(|_| ended())?;
        let taken = feed.answers.message().await.map_err(unavailable)?.ok_or_else(ended)?;
        *kept = Some(feed);
        Ok(PushResponse::Done(taken.stamp.into()))
    }

    async fn open(&mut self) -> Result<Feed, PeerError> {
        let (batches, sent) = mpsc::channel(IN_FLIGHT);
        let answers = self.client.feed(ReceiverStream::new(sent)).await.map_err(unavailable)?.into_inner();
        Ok(Feed { batches, answers })
    }
}

/// One router elsewhere. Cloned, it is the same connection.
#[derive(Clone)]
pub struct RemoteDispatch {
    client: DispatchClient<Link>,
}

impl RemoteDispatch {
    /// The router at `address`; nothing is connected yet.
    ///
    /// # Errors
    /// That it is no address.
    pub fn new(address: &str, sign: Sign) -> Result<Self, PeerError> {
        let client = DispatchClient::new(link(address, None, sign)?)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Ok(Self { client })
    }

    /// Asks it.
    ///
    /// # Errors
    /// That it cannot be reached, or cannot do it now.
    pub async fn call(mut self, request: DispatchRequest) -> Result<DispatchResponse, PeerError> {
        match request {
            DispatchRequest::Deliver { batch, missed, stamp } => {
                let messages = batch.iter().map(message::Live::from).collect();
                let asked = message::DispatchBatch { messages, missed, stamp: Some((&stamp).into()) };
                self.client.deliver(in_time(asked)).await.map_err(unavailable)?;
                Ok(DispatchResponse::Done)
            }
            DispatchRequest::Lookup(user) => {
                let asked = in_time(message::User { user: user.as_str().to_owned() });
                let found = self.client.lookup(asked).await.map_err(unavailable)?.into_inner();
                let owner = found.owner.map(|name| node_of(&name)).transpose();
                let owner = owner.map_err(|fault| PeerError::Unavailable(fault.to_string()))?;
                Ok(DispatchResponse::Found { owner, sessions: presences(found.sessions)? })
            }
            DispatchRequest::Disconnect(revocation) => {
                let asked = in_time(message::Revocation::from(&revocation));
                self.client.disconnect(asked).await.map_err(unavailable)?;
                Ok(DispatchResponse::Done)
            }
            DispatchRequest::Ping => {
                self.client.ping(in_time(message::Stamp::default())).await.map_err(unavailable)?;
                Ok(DispatchResponse::Done)
            }
        }
    }
}

/// What a process offers to its peers: all calls of the roles that run there, each looked at by
/// `verify` before anything of it is read.
pub fn routes(
    dispatch: Option<Service<DispatchRequest, DispatchResponse>>,
    push: Option<FindPush>,
    verify: Verify,
) -> impl Answers<tonic::body::Body> {
    let mut routes = Routes::default();
    if let Some(role) = dispatch {
        routes = routes
            .add_service(DispatchServer::new(DispatchPeer { role }).max_decoding_message_size(MESSAGE_MAX));
    }
    if let Some(find) = push {
        routes =
            routes.add_service(PushServer::new(PushPeer { find }).max_decoding_message_size(MESSAGE_MAX));
    }
    let routes = routes.prepare();
    tower::service_fn(move |request: http::Request<Incoming>| {
        let proof = request.headers().get(PROOF).and_then(|proof| proof.to_str().ok()).unwrap_or_default();
        let taken = verify(proof, request.uri().path());
        let routes = routes.clone();
        async move {
            match taken {
                Err(why) => Ok(Status::unauthenticated(why).into_http()),
                Ok(()) => routes.oneshot(request).await,
            }
        }
    })
}

fn status(fault: PeerError) -> Status {
    match fault {
        PeerError::Unavailable(why) => Status::unavailable(why),
        PeerError::Unauthorized(why) => Status::unauthenticated(why),
    }
}

fn invalid(fault: ProtoError) -> Status {
    Status::invalid_argument(fault.to_string())
}

struct DispatchPeer {
    role: Service<DispatchRequest, DispatchResponse>,
}

impl DispatchPeer {
    async fn ask(&self, request: DispatchRequest) -> Result<DispatchResponse, Status> {
        self.role.clone().oneshot(request).await.map_err(status)
    }
}

#[tonic::async_trait]
impl Dispatch for DispatchPeer {
    async fn deliver(
        &self,
        request: Request<message::DispatchBatch>,
    ) -> Result<Response<message::Taken>, Status> {
        let message::DispatchBatch { messages, missed, stamp } = request.into_inner();
        let batch = batch_of(messages).map_err(invalid)?;
        self.ask(DispatchRequest::Deliver { batch, missed, stamp: stamp.into() }).await?;
        Ok(Response::new(message::Taken::default()))
    }

    async fn lookup(&self, request: Request<message::User>) -> Result<Response<message::Found>, Status> {
        let user = user_of(&request.into_inner().user).map_err(invalid)?;
        match self.ask(DispatchRequest::Lookup(user)).await? {
            DispatchResponse::Found { owner, sessions } => Ok(Response::new(message::Found {
                owner: owner.map(|node| node.as_str().to_owned()),
                sessions: sessions.iter().map(message::Session::from).collect(),
            })),
            DispatchResponse::Done => Err(Status::internal("no answer to a lookup")),
        }
    }

    async fn disconnect(
        &self,
        request: Request<message::Revocation>,
    ) -> Result<Response<message::Taken>, Status> {
        let revocation = Revocation::try_from(request.into_inner()).map_err(invalid)?;
        self.ask(DispatchRequest::Disconnect(revocation)).await?;
        Ok(Response::new(message::Taken::default()))
    }

    async fn ping(&self, _: Request<message::Stamp>) -> Result<Response<message::Taken>, Status> {
        self.ask(DispatchRequest::Ping).await?;
        Ok(Response::new(message::Taken::default()))
    }
}

struct PushPeer {
    find: FindPush,
}

impl PushPeer {
    fn meant<T>(&self, request: &Request<T>) -> Result<Service<PushRequest, PushResponse>, Status> {
        let node = request.metadata().get(NODE).and_then(|node| node.to_str().ok()).unwrap_or_default();
        (self.find)(node).ok_or_else(|| Status::not_found(format!("{node:?} is not here")))
    }
}

async fn taken(
    role: Service<PushRequest, PushResponse>,
    request: PushRequest,
) -> Result<message::Taken, Status> {
    match role.oneshot(request).await.map_err(status)? {
        PushResponse::Done(stamp) => Ok(message::Taken { stamp: Some((&stamp).into()) }),
        PushResponse::Sessions(_) => Err(Status::internal("sessions are no answer to this")),
    }
}

#[tonic::async_trait]
impl Push for PushPeer {
    type FeedStream = Pin<Box<dyn Stream<Item = Result<message::Taken, Status>> + Send>>;

    async fn feed(
        &self,
        request: Request<Streaming<message::PushBatch>>,
    ) -> Result<Response<Self::FeedStream>, Status> {
        let role = self.meant(&request)?;
        let answers = request.into_inner().then(move |batch| {
            let role = role.clone();
            async move {
                let message::PushBatch { messages, sweep, stamp } = batch?;
                let batch: Vec<LiveMessage> = batch_of(messages).map_err(invalid)?;
                taken(role, PushRequest::Deliver { batch: batch.into(), sweep, stamp: stamp.into() }).await
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lookup(&self, request: Request<message::User>) -> Result<Response<message::Sessions>, Status> {
        let role = self.meant(&request)?;
        let user = user_of(&request.into_inner().user).map_err(invalid)?;
        match role.oneshot(PushRequest::Lookup(user)).await.map_err(status)? {
            PushResponse::Sessions(sessions) => Ok(Response::new(message::Sessions {
                sessions: sessions.iter().map(message::Session::from).collect(),
            })),
            PushResponse::Done(_) => Err(Status::internal("no answer to a lookup")),
        }
    }

    async fn disconnect(
        &self,
        request: Request<message::Revocation>,
    ) -> Result<Response<message::Taken>, Status> {
        let role = self.meant(&request)?;
        let revocation = Revocation::try_from(request.into_inner()).map_err(invalid)?;
        taken(role, PushRequest::Disconnect(revocation)).await.map(Response::new)
    }

    async fn gone(&self, request: Request<message::Stamp>) -> Result<Response<message::Taken>, Status> {
        let role = self.meant(&request)?;
        taken(role, PushRequest::Gone(Some(request.into_inner()).into())).await.map(Response::new)
    }

    async fn ping(&self, request: Request<message::Stamp>) -> Result<Response<message::Taken>, Status> {
        taken(self.meant(&request)?, PushRequest::Ping).await.map(Response::new)
    }
}
