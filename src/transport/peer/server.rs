//! The server of calls between processes.

use std::pin::Pin;

use futures_util::{Stream, StreamExt};
use hyper::body::Incoming;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt;

use super::super::http::Answers;
use super::calls::collect_server::{Collect, CollectServer};
use super::calls::dispatch_server::{Dispatch, DispatchServer};
use super::calls::push_server::{Push, PushServer};
use super::{FindPush, MESSAGE_MAX, NODE, PROOF, Service, Verify};
use crate::wire::peer::{
    DispatchRequest, DispatchResponse, LiveMessage, PeerError, PushRequest, PushResponse, Received,
    Revocation, TopicWrite, ViewVersion,
};
use crate::wire::proto::{ProtoError, batch_of, hints_of, peer as message, user_of};

/// What a process offers to its peers: all calls of the roles that run there, each looked at by
/// `verify` before anything of it is read.
pub fn routes(
    dispatch: Option<Service<DispatchRequest, DispatchResponse>>,
    push: Option<FindPush>,
    collect: Option<Service<TopicWrite, Received>>,
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
    if let Some(role) = collect {
        routes = routes
            .add_service(CollectServer::new(CollectPeer { role }).max_decoding_message_size(PUBLISH_MAX));
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
        PeerError::Unauthorized(refused) => Status::unauthenticated(refused.detail),
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
        let message::DispatchBatch { messages, missed, stamp, hints, hints_missed } = request.into_inner();
        let (batch, hints) = (batch_of(messages).map_err(invalid)?, hints_of(hints).map_err(invalid)?);
        let stamp: ViewVersion = stamp.into();
        if !hints.is_empty() || hints_missed {
            let (missed, stamp) = (hints_missed, stamp.clone());
            self.ask(DispatchRequest::Hint { hints, missed, stamp }).await?;
        }
        if !batch.is_empty() || missed {
            self.ask(DispatchRequest::Deliver { batch, missed, stamp }).await?;
        }
        Ok(Response::new(message::Taken::default()))
    }

    async fn lookup(&self, request: Request<message::User>) -> Result<Response<message::Found>, Status> {
        let user = user_of(&request.into_inner().user).map_err(invalid)?;
        match self.ask(DispatchRequest::Lookup(user)).await? {
            DispatchResponse::Found { owner, sessions } => Ok(Response::new(message::Found {
                owner: owner.map(|node| node.as_str().to_owned()),
                sessions: sessions.iter().map(message::Session::from).collect(),
            })),
            _ => Err(Status::internal("no answer to a lookup")),
        }
    }

    async fn count_readers(
        &self,
        request: Request<message::Log>,
    ) -> Result<Response<message::Readers>, Status> {
        let log = request.into_inner().try_into().map_err(invalid)?;
        match self.ask(DispatchRequest::Readers(log)).await? {
            DispatchResponse::Readers(count) => Ok(Response::new(message::Readers { count })),
            _ => Err(Status::internal("no number of readers")),
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

/// Largest publish to a topic that is taken from another collect: its payload, and names.
const PUBLISH_MAX: usize = 4 * 1024 * 1024;

struct CollectPeer {
    role: Service<TopicWrite, Received>,
}

#[tonic::async_trait]
impl Collect for CollectPeer {
    type WriteStream = Pin<Box<dyn Stream<Item = Result<message::WriteAnswer, Status>> + Send>>;

    async fn write(
        &self,
        request: Request<message::TopicWrite>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        use message::write_answer::Answer;
        let write: TopicWrite = request.into_inner().try_into().map_err(invalid)?;
        let Received(outcome) = self.role.clone().oneshot(write).await.map_err(status)?;
        let received = message::WriteAnswer { answer: Some(Answer::Received(message::Received {})) };
        let outcome = async move { outcome.await.map(|written| (&written).into()).map_err(status) };
        let answers =
            futures_util::stream::once(async { Ok(received) }).chain(futures_util::stream::once(outcome));
        Ok(Response::new(Box::pin(answers)))
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
        _ => Err(Status::internal("this is no answer to a batch")),
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
                let message::PushBatch { messages, sweep, stamp, hints, hints_missed } = batch?;
                let batch: Vec<LiveMessage> = batch_of(messages).map_err(invalid)?;
                let hints = hints_of(hints).map_err(invalid)?;
                let stamp: ViewVersion = stamp.into();
                if !hints.is_empty() || hints_missed {
                    let hints = hints.into();
                    return taken(role, PushRequest::Hint { hints, missed: hints_missed, stamp }).await;
                }
                taken(role, PushRequest::Deliver { batch: batch.into(), sweep, stamp }).await
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
            _ => Err(Status::internal("no answer to a lookup")),
        }
    }

    async fn count_readers(
        &self,
        request: Request<message::Log>,
    ) -> Result<Response<message::Readers>, Status> {
        let role = self.meant(&request)?;
        let log = request.into_inner().try_into().map_err(invalid)?;
        match role.oneshot(PushRequest::Readers(log)).await.map_err(status)? {
            PushResponse::Readers(count) => Ok(Response::new(message::Readers { count })),
            _ => Err(Status::internal("no number of readers")),
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
