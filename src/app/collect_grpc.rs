//! Publishing over gRPC: `ringpush.v1.Collect`, beside HTTP on the same port.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::http::Request as HttpRequest;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use hyper::body::Frame;
use prost::Message;
use tokio::time::Sleep;
use tonic::codegen::InterceptedService;
use tonic::{Request, Response, Status, Streaming};
use tower::{ServiceExt, service_fn};

use super::collect_http::CollectEdge;
use super::edge::{BODY_DEADLINE, Routes};
use super::senders::Sender;
use super::traces::TRACEPARENT;
use crate::config::MESSAGE_BYTES_MAX;
use crate::message::{EventName, LogId, MessageId, NameError, Recipients, TopicName, UserId};
use crate::role::collect::Scope;
use crate::transport::held::Held;
use crate::wire::http::{
    EXCEPT_PER_PUBLISH, FieldError, Problem, Publish, PublishError, Published, TOO_DEEP, TOPICS_PER_PUBLISH,
    TTL_S, TopicOutcome, is_shallow,
};
use crate::wire::proto::collect as message;

#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod calls {
    include!(concat!(env!("OUT_DIR"), "/calls/ringpush.v1.rs"));
}

use calls::collect_server::{Collect, CollectServer};

/// Most requests of one stream whose results are not sent yet.
const IN_FLIGHT: usize = 1_000;
/// Room for ids and users beside a payload, in bytes.
const AROUND_PAYLOAD: usize = 256 * 1024;

/// Adds the service to the routes of collect. The key is checked before any message is read.
pub(super) fn with_grpc(routes: Routes, edge: Arc<CollectEdge>) -> Routes {
    let largest = MESSAGE_BYTES_MAX + AROUND_PAYLOAD;
    let server = CollectServer::new(Edge { edge: Arc::clone(&edge) }).max_decoding_message_size(largest);
    let check = {
        let edge = Arc::clone(&edge);
        move |mut request: Request<()>| {
            let sender = authorize(&edge, &request)?;
            request.extensions_mut().insert(sender);
            Ok(request)
        }
    };
    let service = InterceptedService::new(server, check);
    let watched = service_fn(move |request: HttpRequest<Body>| {
        let one = request.uri().path().ends_with("/Publish");
        let held = edge.budget.hold();
        service.clone().oneshot(request.map(|body| Watched::new(body, one, held)))
    });
    routes.route_service("/ringpush.v1.Collect/{call}", watched)
}

fn authorize(edge: &CollectEdge, request: &Request<()>) -> Result<Arc<Sender>, Status> {
    let given = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
    // As over HTTP, the scheme is case-insensitive. A key without a scheme is accepted too, because
    // metadata has no schemes.
    let key = given.map(|given| match given.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        _ => given,
    });
    edge.senders.find(key, &Scope::Publish).map_err(|problem| match problem.status {
        403 => Status::permission_denied(problem.detail),
        _ => Status::unauthenticated(problem.detail),
    })
}

struct Edge {
    edge: Arc<CollectEdge>,
}

#[tonic::async_trait]
impl Collect for Edge {
    async fn publish(
        &self,
        request: Request<message::PublishRequest>,
    ) -> Result<Response<message::PublishResult>, Status> {
        let (sender, of_call) = (sender_of(&request)?, trace_of_call(&request));
        let request = traced(request.into_inner(), of_call.as_deref());
        Ok(Response::new(publish(&self.edge, request, &sender).await))
    }

    type PublishStreamStream = Pin<Box<dyn Stream<Item = Result<message::PublishResult, Status>> + Send>>;

    async fn publish_stream(
        &self,
        request: Request<Streaming<message::PublishRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        let (edge, sender) = (Arc::clone(&self.edge), sender_of(&request)?);
        let of_call: Option<Arc<str>> = trace_of_call(&request).map(Into::into);
        let results = request
            .into_inner()
            .map(move |request| {
                let (edge, sender, of_call) = (Arc::clone(&edge), Arc::clone(&sender), of_call.clone());
                async move {
                    // A stream may outlive its key.
                    let gone = |problem: Problem| Status::unauthenticated(problem.detail);
                    edge.senders.still(&sender).map_err(gone)?;
                    Ok(publish(&edge, traced(request?, of_call.as_deref()), &sender).await)
                }
            })
            .buffered(IN_FLIGHT);
        Ok(Response::new(Box::pin(results)))
    }
}

/// The `traceparent` in the metadata of a call; several are as bad as one that breaks the rules.
fn trace_of_call<T>(request: &Request<T>) -> Option<String> {
    let mut given = request.metadata().get_all(TRACEPARENT).iter();
    let (first, second) = (given.next()?, given.next());
    let text = first.to_str().unwrap_or_default();
    Some(if second.is_none() && !text.is_empty() { text.to_owned() } else { "-".to_owned() })
}

/// A request that names no trace has that of its call.
fn traced(mut request: message::PublishRequest, of_call: Option<&str>) -> message::PublishRequest {
    if request.traceparent.is_empty() {
        request.traceparent = of_call.unwrap_or_default().to_owned();
    }
    request
}

/// Who has called, as the interceptor found out.
fn sender_of<T>(request: &Request<T>) -> Result<Arc<Sender>, Status> {
    let sender = request.extensions().get::<Arc<Sender>>().cloned();
    sender.ok_or_else(|| Status::internal("the key was not checked"))
}

async fn publish(
    edge: &CollectEdge,
    request: message::PublishRequest,
    sender: &Sender,
) -> message::PublishResult {
    let began = Instant::now();
    let result = publish_now(edge, request, sender).await;
    let status = result.error.as_ref().map_or(202, |error| u16::try_from(error.status).unwrap_or(500));
    edge.senders.published(sender, status, began.elapsed());
    result
}

async fn publish_now(
    edge: &CollectEdge,
    request: message::PublishRequest,
    sender: &Sender,
) -> message::PublishResult {
    let id = request.id.clone();
    let failed =
        |problem: &Problem| message::PublishResult { id, accepted: Vec::new(), error: Some(told(problem)) };
    let mut held = edge.budget.hold();
    if let Err(spent) = held.add(request.encoded_len()) {
        return failed(&Problem::new(503, spent.to_string()));
    }
    match read(edge, request) {
        Ok(publish) => match edge.publish(publish, Some(sender)).await {
            Ok(published) => result(&published),
            Err(problem) => failed(&problem),
        },
        Err(problem) => failed(&problem),
    }
}

/// The body of a call while it is read: an incomplete message counts against the memory budget, and
/// must be completed in time.
struct Watched {
    body: Body,
    /// There is one message, and then the end.
    one: bool,
    held: Held,
    message: Prefix,
    /// Set while a message is incomplete.
    due: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    fn new(body: Body, one: bool, held: Held) -> Self {
        let due = one.then(|| Box::pin(tokio::time::sleep(BODY_DEADLINE)));
        Self { body, one, held, message: Prefix::default(), due }
    }

    /// Accounts for data that has arrived.
    ///
    /// # Errors
    ///
    /// The memory budget of all requests is exhausted.
    fn note(&mut self, data: &[u8]) -> Result<(), Status> {
        let Passed { ended, open } = self.message.pass(data);
        if ended {
            self.held.release();
        }
        self.held.add(open).map_err(|spent| Status::unavailable(spent.to_string()))?;
        if !self.one && (ended || open == 0) {
            self.due = None;
        }
        if !self.one && open > 0 && self.due.is_none() {
            // The deadline counts from the beginning of the message.
            self.due = Some(Box::pin(tokio::time::sleep(BODY_DEADLINE)));
        }
        Ok(())
    }
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let next = Pin::new(&mut self.body).poll_frame(cx);
        match next {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    self.note(data)?;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Status::cancelled(error.to_string())))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => match &mut self.due {
                Some(due) => due.as_mut().poll(cx).map(|()| {
                    Some(Err(Status::deadline_exceeded("the message did not come whole and in time")))
                }),
                None => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// Follows the messages of a body. Each has five bytes, a flag and its length, and then the
/// message.
#[derive(Default)]
struct Prefix {
    head: [u8; 5],
    seen: usize,
    left: usize,
}

/// What a piece of a body contained.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    /// A message ended in it.
    ended: bool,
    /// Bytes of the message that has not ended.
    open: usize,
}

impl Prefix {
    /// Passes over data that has arrived.
    fn pass(&mut self, mut data: &[u8]) -> Passed {
        let mut passed = Passed { ended: false, open: 0 };
        while !data.is_empty() {
            let count = if self.seen < self.head.len() {
                self.head[self.seen] = data[0];
                self.seen += 1;
                if self.seen == self.head.len() {
                    let [_, length @ ..] = self.head;
                    self.left = u32::from_be_bytes(length) as usize;
                }
                1
            } else {
                let count = self.left.min(data.len());
                self.left -= count;
                count
            };
            data = &data[count..];
            passed.open += count;
            if self.seen == self.head.len() && self.left == 0 {
                self.seen = 0;
                passed = Passed { ended: true, open: 0 };
            }
        }
        passed
    }
}

fn fault(pointer: &str, detail: String) -> Problem {
    Problem::fields(vec![FieldError { pointer: pointer.to_owned(), detail }])
}

/// The recipients of a request: users or topics.
fn recipients(request: &message::PublishRequest, most: usize) -> Result<Recipients, Problem> {
    if request.topics.is_empty() && !request.everyone {
        if !request.except.is_empty() {
            return Err(fault("/except", "is only for topics".to_owned()));
        }
        return Ok(match <[UserId; 1]>::try_from(names(&request.users, "/users", most, UserId::parse)?) {
            Ok([user]) => Recipients::User(user),
            Err(users) => Recipients::Users(users),
        });
    }
    if !request.users.is_empty() {
        return Err(fault("/users", "must be empty beside topics and everyone".to_owned()));
    }
    let topics = match (request.everyone, request.topics.is_empty()) {
        (true, true) => vec![LogId::Everyone],
        (true, false) => return Err(fault("/topics", "must be empty beside everyone".to_owned())),
        (false, _) => {
            let topics = names(&request.topics, "/topics", TOPICS_PER_PUBLISH, TopicName::parse)?;
            topics.into_iter().map(LogId::Topic).collect()
        }
    };
    let except = if request.except.is_empty() {
        Vec::new()
    } else {
        names(&request.except, "/except", EXCEPT_PER_PUBLISH, UserId::parse)?
    };
    Ok(Recipients::Topics { topics, except })
}

/// The names of a list, which has 1 to `most`.
fn names<T>(
    list: &[String],
    pointer: &str,
    most: usize,
    parse: impl Fn(&str) -> Result<T, NameError>,
) -> Result<Vec<T>, Problem> {
    if list.is_empty() || list.len() > most {
        return Err(fault(pointer, format!("must have 1 to {most} names")));
    }
    let read = |(n, name): (usize, &String)| {
        parse(name).map_err(|rule| fault(&format!("{pointer}/{n}"), rule.to_string()))
    };
    list.iter().enumerate().map(read).collect()
}

/// Applies the rules of `POST /v1/messages`, with the names of this request.
fn read(edge: &CollectEdge, request: message::PublishRequest) -> Result<Publish, Problem> {
    let limits = edge.limits.get();
    if request.payload_json.len() > limits.message_bytes {
        return Err(Problem::new(413, format!("the payload is larger than {} bytes", limits.message_bytes)));
    }
    if serde_json::from_slice::<&serde_json::value::RawValue>(&request.payload_json).is_err() {
        return Err(fault("/payload_json", "must be JSON text".to_owned()));
    }
    if !is_shallow(&request.payload_json) {
        return Err(fault("/payload_json", TOO_DEEP.to_owned()));
    }
    let to = recipients(&request, limits.recipients)?;
    let ttl_s = (request.ttl_s != 0).then_some(u64::from(request.ttl_s));
    if ttl_s.is_some_and(|ttl_s| !TTL_S.contains(&ttl_s)) {
        return Err(fault("/ttl_s", format!("must be {} to {}, or 0", TTL_S.start(), TTL_S.end())));
    }
    let id = (!request.id.is_empty()).then(|| MessageId::parse(&request.id)).transpose();
    let event = (!request.event.is_empty()).then(|| EventName::parse(&request.event)).transpose();
    let trace =
        (!request.traceparent.is_empty()).then(|| edge.traces.of_text(&request.traceparent)).flatten();
    Ok(Publish {
        trace,
        to,
        event: event.map_err(|rule| fault("/event", rule.to_string()))?,
        payload: request.payload_json,
        ttl_s,
        id: id.map_err(|rule| fault("/id", rule.to_string()))?,
    })
}

fn told(problem: &Problem) -> message::Problem {
    let mut detail = problem.detail.clone();
    // The detail of one fault names it already.
    if problem.errors.len() > 1 {
        problem.errors.iter().for_each(|fault| detail += &format!("; {}: {}", fault.pointer, fault.detail));
    }
    message::Problem { status: problem.status.into(), title: problem.title.clone(), detail }
}

fn error_of(refusal: &PublishError) -> message::Problem {
    told(&Problem::new(refusal.status, refusal.detail.clone()))
}

fn result(published: &Published) -> message::PublishResult {
    let users = published.accepted.iter().map(|(user, outcome)| {
        let user = user.as_str().to_owned();
        let (seq, duplicate) =
            outcome.as_ref().map_or((0, false), |stored| (stored.seq.get(), stored.duplicate));
        let error = outcome.as_ref().err().map(error_of);
        message::Accepted { user, seq, duplicate, error, ..Default::default() }
    });
    let topics = published.topics.iter().map(|(log, outcome)| {
        let topic = log.topic().map(|topic| topic.as_str().to_owned()).unwrap_or_default();
        let everyone = *log == LogId::Everyone;
        match outcome {
            Ok(TopicOutcome::Log(stored)) => message::Accepted {
                topic,
                everyone,
                seq: stored.seq.get(),
                duplicate: stored.duplicate,
                ..Default::default()
            },
            Ok(TopicOutcome::Members { members, failed }) => message::Accepted {
                topic,
                members: *members as u64,
                stored: (members - failed.len()) as u64,
                failed: failed
                    .iter()
                    .map(|(user, error)| message::Failed {
                        user: user.as_str().to_owned(),
                        error: Some(error_of(error)),
                    })
                    .collect(),
                ..Default::default()
            },
            Err(refusal) => {
                message::Accepted { topic, everyone, error: Some(error_of(refusal)), ..Default::default() }
            }
        }
    });
    message::PublishResult {
        id: published.id.as_str().to_owned(),
        accepted: users.chain(topics).collect(),
        error: published.problem().as_ref().map(told),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the bytes are cut, the message boundaries are known.
        #[test]
        fn the_end_of_a_message_is_seen_however_it_comes(
            lengths in prop::collection::vec(0usize..300, 1..6), cuts in prop::collection::vec(1usize..80, 1..40),
        ) {
            let (mut body, mut ends) = (Vec::new(), vec![0]);
            for length in lengths {
                body.push(0);
                body.extend_from_slice(&(length as u32).to_be_bytes());
                body.extend(std::iter::repeat_n(7u8, length));
                ends.push(body.len());
            }
            let (mut prefix, mut at) = (Prefix::default(), 0);
            for cut in cuts.into_iter().cycle() {
                let end = (at + cut).min(body.len());
                let ended = ends.iter().any(|one| (at + 1..=end).contains(one));
                let open = end - ends.iter().copied().filter(|one| *one <= end).max().unwrap_or(0).max(at);
                prop_assert_eq!(prefix.pass(&body[at..end]), Passed { ended, open });
                at = end;
                if at == body.len() {
                    break;
                }
            }
        }
    }
}
