//! Publishing over gRPC: `ringpush.v1.Collect`, beside HTTP on the same port.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use super::collect_http::CollectEdge;
use super::edge::Routes;
use crate::message::{MessageId, Recipients, UserId};
use crate::wire::http::{FieldFault, Problem, Publish, Published, TTL_S};
use crate::wire::proto::collect as message;

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls/ringpush.v1.rs"));
}

use calls::collect_server::{Collect, CollectServer};

/// Requests of one stream whose results are not out yet.
const IN_FLIGHT: usize = 1_000;
/// Room for ids and users around a payload.
const AROUND_PAYLOAD: usize = 256 * 1024;

/// Adds the service to the routes of collect.
pub(super) fn with_grpc(routes: Routes, edge: Arc<CollectEdge>) -> Routes {
    let largest = edge.limits.message_bytes + AROUND_PAYLOAD;
    let service = CollectServer::new(Edge { edge }).max_decoding_message_size(largest);
    routes.route_service("/ringpush.v1.Collect/{call}", service)
}

struct Edge {
    edge: Arc<CollectEdge>,
}

impl Edge {
    fn authorize<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let given = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        // As over HTTP the scheme is of any case; a key alone is one too, for metadata knows no schemes.
        let key = given.map(|given| match given.split_once(' ') {
            Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
            _ => given,
        });
        self.edge.check_key(key).map_err(Status::unauthenticated)
    }
}

#[tonic::async_trait]
impl Collect for Edge {
    async fn publish(
        &self,
        request: Request<message::PublishRequest>,
    ) -> Result<Response<message::PublishResult>, Status> {
        self.authorize(&request)?;
        Ok(Response::new(publish(&self.edge, request.into_inner()).await))
    }

    type PublishStreamStream = Pin<Box<dyn Stream<Item = Result<message::PublishResult, Status>> + Send>>;

    async fn publish_stream(
        &self,
        request: Request<Streaming<message::PublishRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        self.authorize(&request)?;
        let edge = Arc::clone(&self.edge);
        let results = request
            .into_inner()
            .map(move |request| {
                let edge = Arc::clone(&edge);
                async move { Ok(publish(&edge, request?).await) }
            })
            .buffered(IN_FLIGHT);
        Ok(Response::new(Box::pin(results)))
    }
}

async fn publish(edge: &CollectEdge, request: message::PublishRequest) -> message::PublishResult {
    let id = request.id.clone();
    match read(edge, request) {
        Ok(publish) => result(&edge.collect.publish(publish).await),
        Err(problem) => message::PublishResult { id, accepted: Vec::new(), error: Some(told(&problem)) },
    }
}

/// The rules of `POST /v1/messages`, by the names of this request.
fn read(edge: &CollectEdge, request: message::PublishRequest) -> Result<Publish, Problem> {
    let limits = &edge.limits;
    let fault = |pointer: &str, detail: String| {
        Problem::fields(vec![FieldFault { pointer: pointer.to_owned(), detail }])
    };
    if request.payload_json.len() > limits.message_bytes {
        return Err(Problem::new(413, format!("the payload is larger than {} bytes", limits.message_bytes)));
    }
    if serde_json::from_slice::<&serde_json::value::RawValue>(&request.payload_json).is_err() {
        return Err(fault("/payload_json", "must be JSON text".to_owned()));
    }
    if request.users.is_empty() || request.users.len() > limits.recipients {
        return Err(fault("/users", format!("must be 1 to {} users", limits.recipients)));
    }
    let mut users = Vec::with_capacity(request.users.len());
    for (n, user) in request.users.iter().enumerate() {
        users.push(UserId::parse(user).map_err(|rule| fault(&format!("/users/{n}"), rule.to_string()))?);
    }
    let ttl_s = if request.ttl_s == 0 { limits.ttl_s } else { u64::from(request.ttl_s) };
    if !TTL_S.contains(&ttl_s) {
        return Err(fault("/ttl_s", format!("must be {} to {}, or 0", TTL_S.start(), TTL_S.end())));
    }
    let id = (!request.id.is_empty()).then(|| MessageId::parse(&request.id)).transpose();
    let to = match <[UserId; 1]>::try_from(users) {
        Ok([user]) => Recipients::User(user),
        Err(users) => Recipients::Users(users),
    };
    Ok(Publish {
        to,
        payload: request.payload_json,
        ttl_s,
        id: id.map_err(|rule| fault("/id", rule.to_string()))?,
    })
}

fn told(problem: &Problem) -> message::Problem {
    let details = problem.errors.iter().map(|fault| format!("{}: {}", fault.pointer, fault.detail));
    let detail = details.fold(problem.detail.clone(), |all, one| format!("{all}; {one}"));
    message::Problem { status: problem.status.into(), title: problem.title.clone(), detail }
}

fn result(published: &Published) -> message::PublishResult {
    let accepted = published.accepted.iter().map(|(user, outcome)| {
        let user = user.as_str().to_owned();
        match outcome {
            Ok(stored) => {
                message::Accepted { user, seq: stored.seq.get(), duplicate: stored.duplicate, error: None }
            }
            Err(refusal) => {
                let problem = Problem::new(refusal.status, refusal.detail.clone());
                message::Accepted { user, seq: 0, duplicate: false, error: Some(told(&problem)) }
            }
        }
    });
    message::PublishResult {
        id: published.id.as_str().to_owned(),
        accepted: accepted.collect(),
        error: published.problem().as_ref().map(told),
    }
}
