//! Which calls of collect the audit log names.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Method, Request, Response};
use axum::middleware::Next;

use super::collect_http::CollectEdge;
use super::edge::bearer;
use super::push_http::forwarded;
use crate::role::strangers::Strangers;
use crate::telemetry::audit;
use crate::transport::http::PeerAddress;

/// What a call does, and to whom or what.
#[derive(Debug, PartialEq, Eq)]
struct Act {
    name: &'static str,
    /// What kind of thing `subject` names, and its name.
    subject: Option<(&'static str, String)>,
}

/// The act of a call; `None` if it changes nothing for anybody and reads nobody's messages.
fn act_of(method: &Method, path: &str) -> Option<Act> {
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let named = |kind: &'static str, name: &str| {
        Some((kind, percent_encoding::percent_decode_str(name).decode_utf8_lossy().into_owned()))
    };
    let (name, subject) = match (method.as_str(), &parts[..]) {
        ("DELETE", ["v1", "users", user]) => ("forget_user", named("user", user)),
        ("DELETE", ["v1", "users", user, "sessions"]) => ("disconnect_user", named("user", user)),
        ("DELETE", ["v1", "users", user, "topics"]) => ("leave_topics", named("user", user)),
        ("GET", ["v1", "users", user, "messages"]) => ("read_messages", named("user", user)),
        ("PUT", ["v1", "topics", topic]) => ("make_topic", named("topic", topic)),
        ("DELETE", ["v1", "topics", topic]) => ("remove_topic", named("topic", topic)),
        ("POST", ["v1", "topics", topic, "members"]) => ("change_members", named("topic", topic)),
        ("GET", ["v1", "topics", topic, "messages"]) => ("read_messages", named("topic", topic)),
        ("DELETE", ["v1", "topics", topic, "messages", _]) => ("end_message", named("topic", topic)),
        ("GET", ["v1", "everyone", "messages"]) => ("read_messages", named("topic", "everyone")),
        _ => return None,
    };
    Some(Act { name, subject })
}

/// The address of whoever makes a call; empty if it is not known.
pub(super) fn caller(strangers: &Strangers, request: &Request<Body>) -> String {
    let peer: Option<PeerAddress> = request.extensions().get().copied();
    let address = peer.map(|PeerAddress(peer)| strangers.address(peer, forwarded(request.headers())));
    address.map(|at| at.to_string()).unwrap_or_default()
}

/// The line of an act. One whose caller goes away before it is answered, or that is answered 503,
/// may have been done all the same: its line says so.
struct Line {
    act: Act,
    key: String,
    address: String,
    /// What is written if this is dropped.
    outcome: Option<&'static str>,
}

impl Drop for Line {
    fn drop(&mut self) {
        let Some(outcome) = self.outcome else { return };
        let mut fields = vec![("key", self.key.as_str()), ("address", &self.address), ("outcome", outcome)];
        if let Some((kind, name)) = &self.act.subject {
            fields.push((kind, name));
        }
        audit(self.act.name, &fields);
    }
}

/// Writes a line for each act that was done, or may have been.
pub(super) async fn audited(
    State(edge): State<Arc<CollectEdge>>,
    request: Request<Body>,
    next: Next,
) -> Response<Body> {
    let act = act_of(request.method(), request.uri().path());
    let key = edge.senders.name_of(bearer(request.headers()));
    let (Some(act), Some(key)) = (act, key) else { return next.run(request).await };
    let address = caller(&edge.strangers, &request);
    let mut line = Line { act, key, address, outcome: Some("unknown") };
    let response = next.run(request).await;
    line.outcome = match response.status() {
        status if status.is_success() => Some("done"),
        status if status.is_server_error() => Some("unknown"),
        _ => None,
    };
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acts_are_told_from_other_calls() {
        let act = |method: Method, path: &str| act_of(&method, path).map(|act| (act.name, act.subject));
        let user = |name: &str| Some(("user", name.to_owned()));
        assert_eq!(act(Method::DELETE, "/v1/users/a%20b/sessions"), Some(("disconnect_user", user("a b"))));
        assert_eq!(act(Method::GET, "/v1/users/alice/messages"), Some(("read_messages", user("alice"))));
        assert_eq!(act(Method::GET, "/v1/users/alice"), None);
        assert_eq!(act(Method::POST, "/v1/messages"), None);
        assert_eq!(act(Method::GET, "/"), None);
    }
}
