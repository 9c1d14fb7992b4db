//! Errors as in RFC 9457.

use serde::{Deserialize, Serialize};

use super::Accepted;
use crate::refusal::Refused;

/// One fault in a body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldError {
    /// JSON pointer to the field.
    pub pointer: String,
    /// What is wrong, and what is allowed.
    pub detail: String,
}

/// An error as in RFC 9457.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Always `about:blank`: the status tells the kind.
    #[serde(rename = "type", default = "about_blank")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, and the remedy.
    pub detail: String,
    /// Why a token or ticket was refused, with 401: the name of a
    /// [`RefusalReason`](crate::refusal::RefusalReason).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The faults of a body, field by field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// Id of a publish that was stored in part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The outcome for each recipient of that publish.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted: Option<Vec<Accepted>>,
    /// Value of `Retry-After`, in seconds.
    #[serde(skip)]
    pub retry_after_s: Option<u32>,
}

pub(super) fn about_blank() -> String {
    "about:blank".to_owned()
}

impl Problem {
    /// A problem with this status and its usual title.
    #[must_use]
    pub fn new(status: u16, detail: impl Into<String>) -> Self {
        let title = match status {
            400 => "Bad Request",
            401 => "Unauthorized",
            403 => "Forbidden",
            404 => "Not Found",
            405 => "Method Not Allowed",
            408 => "Request Timeout",
            409 => "Conflict",
            413 => "Content Too Large",
            415 => "Unsupported Media Type",
            422 => "Unprocessable Content",
            426 => "Upgrade Required",
            429 => "Too Many Requests",
            503 => "Service Unavailable",
            _ => "Internal Server Error",
        };
        Self {
            kind: about_blank(),
            title: title.to_owned(),
            status,
            detail: detail.into(),
            reason: None,
            errors: Vec::new(),
            id: None,
            accepted: None,
            // A second is long enough for a queue to drain and short enough not to be noticed.
            retry_after_s: matches!(status, 429 | 503).then_some(1),
        }
    }

    /// A 401 for a token or ticket that was refused.
    #[must_use]
    pub fn refused(refused: &Refused) -> Self {
        Self { reason: Some(refused.reason.name().to_owned()), ..Self::new(401, refused.detail.clone()) }
    }

    /// A 422 (or 413) for wrong fields.
    #[must_use]
    pub fn fields(errors: Vec<FieldError>) -> Self {
        let status = if errors.iter().any(|e| e.detail.starts_with(TOO_LARGE)) { 413 } else { 422 };
        let detail = match errors.as_slice() {
            [one] => format!("{}: {}", one.pointer, one.detail),
            all => format!("{} fields are wrong", all.len()),
        };
        Self { errors, ..Self::new(status, detail) }
    }

    /// The body as JSON.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Prefix of the detail of a field that is too large. It turns the problem into a 413.
pub(super) const TOO_LARGE: &str = "too large: ";
