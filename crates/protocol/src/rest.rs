//! The bodies of responses that both sides read and write. docs/protocol.md has their meaning.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::frame::ReconnectHint;

/// The body of `POST /v1/connect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectRequest {
    /// Name of the device.
    pub device: String,
}

/// The response to `POST /v1/connect`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectResponse {
    /// The URL to open, with a ticket in its query.
    pub url: String,
    /// The same URL without the ticket, if the node there takes a ticket in `auth`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// The ticket for `auth` at `socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// The node at that URL.
    #[serde(default)]
    pub node: String,
    /// Generation of the view that names that node.
    #[serde(default)]
    pub generation: String,
    /// Epoch of the view that names that node.
    #[serde(default)]
    pub epoch: u64,
    /// How long the ticket is good for, in ms.
    #[serde(default)]
    pub expires_in_ms: u64,
    /// The hint for the next reconnect.
    #[serde(default)]
    pub reconnect: Option<ReconnectHint>,
}

/// The body of `POST /v1/verify`.
#[derive(Serialize, Deserialize)]
pub struct VerifyRequest<'a> {
    /// The token.
    pub token: &'a str,
}

/// The response to `POST /v1/verify`.
#[derive(Debug, Serialize, Deserialize)]
pub struct VerifyResponse {
    /// `sub` of the token.
    pub user: String,
    /// `exp` of the token, RFC 3339.
    #[serde(default)]
    pub expires_at: Option<String>,
    /// All claims.
    #[serde(default)]
    pub claims: Option<Box<RawValue>>,
}

/// The response to `POST /v1/tokens`.
#[derive(Serialize, Deserialize)]
pub struct TokenResponse {
    /// The token.
    pub token: String,
    /// When it expires, RFC 3339.
    pub expires_at: String,
}

/// The response to `GET /v1/users/{user}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UserResponse {
    /// The user.
    pub user: String,
    /// The owner in the view in use; `None` if there is no push node.
    pub owner: Option<String>,
    /// Whether the user has a session.
    pub online: bool,
    /// Every device with a cursor or a session, by name.
    pub devices: Vec<DeviceEntry>,
    /// The highest position; `None` if the user never had a message.
    pub head: Option<u64>,
}

/// A device in [`UserResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceEntry {
    /// Name of the device.
    pub device: String,
    /// Its cursor; 0 if it has none.
    pub acked: u64,
    /// When its youngest session began, RFC 3339; `None` if it has no session.
    pub connected_at: Option<String>,
    /// The node of that session.
    pub node: Option<String>,
    /// What the client of that session says that it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// Numbers of the inbox that it has not acked, up to the head.
    #[serde(default)]
    pub lag: u64,
}

/// The response to `GET /v1/users/{user}/messages/{seq or id}/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusResponse {
    /// The number in the user's inbox.
    pub seq: u64,
    /// The id of the message.
    pub id: String,
    /// When it was accepted, RFC 3339.
    pub accepted_at: String,
    /// When it expires or expired, RFC 3339.
    pub expires_at: String,
    /// What it tells, if its sender named that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<String>,
    /// The trace that it belongs to, if its sender named one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// The topic by which it came, if it came by one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<String>,
    /// `acked` if a device has acked it, else `expired` or `waiting`.
    pub state: String,
    /// What became of it on each device that has a cursor or a session.
    pub devices: Vec<DeviceStatus>,
}

/// A device in [`StatusResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Name of the device.
    pub device: String,
    /// It has a session now.
    pub online: bool,
    /// The node of that session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Whether that session has sent it; `None` without a session, or where its node is older.
    pub sent: Option<bool>,
    /// The device has acked it.
    pub acked: bool,
}

/// The response to `PUT /v1/topics/{topic}` and `GET /v1/topics/{topic}`, and an entry of
/// [`TopicsResponse`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicResponse {
    /// The topic.
    pub topic: String,
    /// How messages reach the members: `inbox` or `log`.
    pub delivery: String,
    /// Life of messages whose sender names none, in seconds.
    pub ttl_s: u64,
    /// When the topic was made, RFC 3339.
    pub created_at: String,
    /// Number of members; only where one topic is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<u64>,
    /// The highest position of its log, 0 if there never was a message; only where one topic with a
    /// log is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<u64>,
    /// Number of sockets that read its log; as `head`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub online: Option<u64>,
}

/// The response to `GET /v1/topics` and `GET /v1/users/{user}/topics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicsResponse {
    /// The topics in the order of their names.
    pub topics: Vec<TopicResponse>,
    /// The value of `after` for the next page; `None` if this is the last.
    pub next: Option<String>,
}

/// The response to `GET /v1/topics/{topic}/members`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembersResponse {
    /// The members in the order of their ids.
    pub members: Vec<String>,
    /// The value of `after` for the next page; `None` if this is the last.
    pub next: Option<String>,
}

/// The response to `POST /v1/topics/{topic}/members`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembersChangedResponse {
    /// Users that are members now and were none before.
    pub added: u64,
    /// Users that were members and are none now.
    pub removed: u64,
    /// Users that did not join, and why.
    pub refused: Vec<RefusedMember>,
}

/// A user that did not join a topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedMember {
    /// The user.
    pub user: String,
    /// Why, and the remedy.
    pub detail: String,
}

/// The response to `GET /v1/cluster`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterResponse {
    /// Generation of the view in use.
    pub generation: String,
    /// Epoch of the view in use.
    pub epoch: u64,
    /// Digest of the view in use, hexadecimal.
    pub digest: String,
    /// Whether the view is held.
    pub held: bool,
    /// The push nodes.
    pub nodes: Vec<ClusterNode>,
}

impl ClusterResponse {
    /// Name and weight of each node that takes users: what the ring is built from.
    pub fn on_ring(&self) -> impl Iterator<Item = (&str, f64)> {
        let active = self.nodes.iter().filter(|node| node.state == "active");
        active.map(|node| (node.node.as_str(), node.weight))
    }
}

/// A push node in [`ClusterResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterNode {
    /// Name of the node.
    pub node: String,
    /// Incarnation of its process.
    pub incarnation: u64,
    /// `active` or `draining`.
    pub state: String,
    /// Its weight.
    pub weight: f64,
    /// Its share of all users, 0.0 to 1.0.
    pub share: f64,
    /// Its sessions.
    pub sessions: u64,
    /// Users with a session there that another node owns.
    pub displaced: u64,
    /// Messages sent to sockets since its process started.
    #[serde(default)]
    pub delivered: u64,
    /// `move` frames sent since its process started.
    #[serde(default)]
    pub moves: u64,
    /// Time from the acceptance of a message to its way into the socket, in ms: half of those of
    /// the last minute took at most as long; `None` if there were none.
    #[serde(default)]
    pub delivery_p50_ms: Option<u64>,
    /// The same for 99 of a hundred.
    #[serde(default)]
    pub delivery_p99_ms: Option<u64>,
    /// Its public URL.
    pub url: Option<String>,
}

/// The response to `GET /readyz`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyResponse {
    /// Whether the process is ready.
    pub ready: bool,
    /// The conditions by name.
    pub conditions: std::collections::BTreeMap<String, ReadyCondition>,
}

/// A condition in [`ReadyResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReadyCondition {
    /// Whether it holds.
    pub ok: bool,
    /// An explanation for people.
    pub detail: String,
}
