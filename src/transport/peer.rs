//! gRPC between roles: clients and servers for the values of [`crate::wire::peer`]. Each call
//! carries a proof that its sender knows `peer.secret`; [`Sign`] makes it and [`Verify`] checks it.

mod server;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::InterceptedService;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint};
use tonic::{GrpcMethod, Request, Response, Status, Streaming};
use tower::util::BoxCloneSyncService;

use super::tls::ClientTls;
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, PeerError, Presence, PushRequest, PushResponse, Received, TopicWrite,
    TopicWritten, ViewVersion,
};
use crate::wire::proto::{ProtoError, node_of, peer as message};
pub use server::routes;

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls/ringpush.peer.v1.rs"));
}

use calls::collect_client::CollectClient;
use calls::dispatch_client::DispatchClient;
use calls::push_client::PushClient;

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

/// How a peer is called: the proof of each call, and TLS if the cluster has it.
#[derive(Clone)]
pub struct Dial {
    /// Makes the proofs.
    pub sign: Sign,
    /// The certificates of both sides; `None` calls in the clear.
    pub tls: Option<ClientTls>,
}

/// Connects over TLS, with the certificates that are in use at that time.
async fn connect_over(tls: ClientTls, uri: Uri) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let authority = uri.authority().ok_or(io::ErrorKind::InvalidInput)?;
    let stream = TcpStream::connect(authority.as_str()).await?;
    stream.set_nodelay(true)?;
    tls.connect(stream).await.map(TokioIo::new)
}

fn link(address: &str, node: Option<&str>, dial: Dial) -> Result<Link, PeerError> {
    let bad = || PeerError::Unavailable(format!("{address:?} is no address of a peer (peer.advertise)"));
    let node = node.map(|node| node.parse().map_err(|_| bad())).transpose()?;
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|_| bad())?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    let Dial { sign, tls } = dial;
    let channel = match tls {
        None => endpoint.connect_lazy(),
        Some(tls) => {
            let connect = move |uri: Uri| {
                tokio::time::timeout(CONNECT_TIMEOUT, connect_over(tls.clone(), uri))
                    .map(|made| made.map_err(io::Error::from)?)
            };
            endpoint.connect_with_connector_lazy(tower::service_fn(connect))
        }
    };
    Ok(InterceptedService::new(channel, Signed { sign, node }))
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
    /// The same for hints about logs.
    hints: Arc<Mutex<Option<Feed>>>,
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
    pub fn new(address: &str, node: &str, dial: Dial) -> Result<Self, PeerError> {
        let client = PushClient::new(link(address, Some(node), dial)?)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Ok(Self { client, feed: Arc::default(), hints: Arc::default() })
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
                let stamp = Some((&stamp).into());
                self.deliver(message::PushBatch { messages, sweep, stamp, ..Default::default() }).await
            }
            PushRequest::Hint { hints, missed, stamp } => {
                let (hints, stamp) = (hints.iter().map(message::Hint::from).collect(), Some((&stamp).into()));
                let batch = message::PushBatch { hints, hints_missed: missed, stamp, ..Default::default() };
                self.deliver_hints(batch).await
            }
            PushRequest::Readers(log) => {
                let found = self.client.count_readers(in_time(message::Log::from(&log))).await;
                Ok(PushResponse::Readers(found.map_err(unavailable)?.into_inner().count))
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
        self.send(kept, batch).await
    }

    /// On a stream of their own: messages of inboxes never wait for hints about logs.
    async fn deliver_hints(&mut self, batch: message::PushBatch) -> Result<PushResponse, PeerError> {
        let kept = Arc::clone(&self.hints);
        self.send(kept, batch).await
    }

    async fn send(
        &mut self,
        kept: Arc<Mutex<Option<Feed>>>,
        batch: message::PushBatch,
    ) -> Result<PushResponse, PeerError> {
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
    pub fn new(address: &str, dial: Dial) -> Result<Self, PeerError> {
        let client = DispatchClient::new(link(address, None, dial)?)
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
                let stamp = Some((&stamp).into());
                let asked = message::DispatchBatch { messages, missed, stamp, ..Default::default() };
                self.client.deliver(in_time(asked)).await.map_err(unavailable)?;
                Ok(DispatchResponse::Done)
            }
            DispatchRequest::Hint { hints, missed, stamp } => {
                let (hints, stamp) = (hints.iter().map(message::Hint::from).collect(), Some((&stamp).into()));
                let asked =
                    message::DispatchBatch { hints, hints_missed: missed, stamp, ..Default::default() };
                self.client.deliver(in_time(asked)).await.map_err(unavailable)?;
                Ok(DispatchResponse::Done)
            }
            DispatchRequest::Readers(log) => {
                let found = self.client.count_readers(in_time(message::Log::from(&log))).await;
                Ok(DispatchResponse::Readers(found.map_err(unavailable)?.into_inner().count))
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

/// One collect elsewhere. Cloned, it is the same connection.
#[derive(Clone)]
pub struct RemoteCollect {
    client: CollectClient<Link>,
}

impl RemoteCollect {
    /// The collect at `address`; nothing is connected yet.
    ///
    /// # Errors
    /// That it is no address.
    pub fn new(address: &str, dial: Dial) -> Result<Self, PeerError> {
        let client = CollectClient::new(link(address, None, dial)?)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Ok(Self { client })
    }

    /// As the service that collect wants: it answers when the publish was received.
    #[must_use]
    pub fn service(self) -> Service<TopicWrite, Received> {
        BoxCloneSyncService::new(tower::service_fn(move |write| {
            let this = self.clone();
            async move { this.write(&write).await }
        }))
    }

    async fn write(mut self, write: &TopicWrite) -> Result<Received, PeerError> {
        use message::write_answer::Answer;
        let mut answers =
            self.client.write(message::TopicWrite::from(write)).await.map_err(unavailable)?.into_inner();
        let ended = || PeerError::Unavailable("the stream ended".to_owned());
        let first = answers.message().await.map_err(unavailable)?.ok_or_else(ended)?;
        if !matches!(first.answer, Some(Answer::Received(_))) {
            return Err(PeerError::Unavailable("a publish was answered with something else".to_owned()));
        }
        let outcome = async move {
            let last = answers.message().await.map_err(unavailable)?.ok_or_else(ended)?;
            TopicWritten::try_from(last).map_err(|fault| PeerError::Unavailable(fault.to_string()))
        };
        Ok(Received(outcome.boxed()))
    }
}
