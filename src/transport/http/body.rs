//! Reading the body of a request, up to a limit and within a time.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Limited};
use hyper::body::Body;

use super::super::held::Held;

/// Why a body was not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyError {
    /// It is over the limit.
    TooLarge,
    /// It did not arrive within the deadline, or was cut off.
    Incomplete,
    /// The memory budget of all requests is exhausted.
    Spent,
}

/// The body of a request.
pub trait RequestBody: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> {}

impl<B> RequestBody for B where B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> {}

/// Reads a body of at most `limit` bytes within `deadline`. `held` accounts for it.
///
/// # Errors
///
/// [`BodyError`].
pub async fn read_body<B: RequestBody>(
    body: B,
    limit: usize,
    deadline: Duration,
    held: &mut Held,
) -> Result<Bytes, BodyError> {
    let reading = async {
        let mut body = pin!(Limited::new(body, limit));
        let (mut first, mut all) = (Bytes::new(), BytesMut::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| match error.is::<http_body_util::LengthLimitError>() {
                true => BodyError::TooLarge,
                false => BodyError::Incomplete,
            })?;
            let Ok(data) = frame.into_data() else { continue };
            held.add(data.len()).map_err(|_| BodyError::Spent)?;
            // Nearly all bodies come in one piece, which is not copied.
            match (first.is_empty(), all.is_empty()) {
                (true, true) => first = data,
                (_, true) => {
                    all.extend_from_slice(&std::mem::take(&mut first));
                    all.extend_from_slice(&data);
                }
                _ => all.extend_from_slice(&data),
            }
        }
        Ok(if all.is_empty() { first } else { all.freeze() })
    };
    tokio::time::timeout(deadline, reading).await.unwrap_or(Err(BodyError::Incomplete))
}
