//! A small HTTP client over hyper.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

/// How long the client keeps an idle connection.
const CLIENT_IDLE: Duration = Duration::from_secs(50);
/// How long the client may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// An HTTP client with pooled connections, and TLS if the URL says so.
#[derive(Clone)]
pub struct HttpClient {
    client: Client<hyper_rustls::HttpsConnector<HttpConnector>, Full<Bytes>>,
    /// Largest response that it reads, in bytes.
    answer_max: usize,
}

/// Default of the largest response, in bytes: a page of history with the largest messages.
const ANSWER_MAX: usize = 64 * 1024 * 1024;

impl Default for HttpClient {
    fn default() -> Self {
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let builder = hyper_rustls::HttpsConnectorBuilder::new();
        let connector = match builder.with_native_roots() {
            Ok(builder) => builder.https_or_http().enable_http1().wrap_connector(plain),
            // A machine without root certificates speaks plain HTTP and trusts no server.
            Err(_) => hyper_rustls::HttpsConnectorBuilder::new()
                .with_tls_config(
                    rustls::ClientConfig::builder()
                        .with_root_certificates(rustls::RootCertStore::empty())
                        .with_no_client_auth(),
                )
                .https_or_http()
                .enable_http1()
                .wrap_connector(plain),
        };
        // Shorter than servers keep idle connections, this one included, so that a request does not
        // meet a connection that is being closed.
        let client = Client::builder(TokioExecutor::new()).pool_idle_timeout(CLIENT_IDLE).build(connector);
        Self { client, answer_max: ANSWER_MAX }
    }
}

impl HttpClient {
    /// Limits the responses that this client reads, in bytes.
    #[must_use]
    pub fn reading_at_most(self, bytes: usize) -> Self {
        Self { answer_max: bytes, ..self }
    }

    /// Sends one request and reads the response. `body` is JSON. Returns the status and the body.
    ///
    /// # Errors
    ///
    /// What went wrong, in words.
    pub async fn send(
        &self,
        method: &str,
        url: &str,
        bearer: Option<&str>,
        body: Bytes,
        deadline: Duration,
    ) -> Result<(u16, Bytes), String> {
        let answer = self.exchange(method, url, bearer, body, deadline).await?;
        Ok((answer.status().as_u16(), answer.into_body()))
    }

    /// Sends one request and reads the response with its headers. `body` is JSON.
    ///
    /// # Errors
    ///
    /// What went wrong, in words.
    pub async fn exchange(
        &self,
        method: &str,
        url: &str,
        bearer: Option<&str>,
        body: Bytes,
        deadline: Duration,
    ) -> Result<Response<Bytes>, String> {
        let mut request =
            Request::builder().method(method).uri(url).header("content-type", "application/json");
        if let Some(bearer) = bearer {
            request = request.header("authorization", format!("Bearer {bearer}"));
        }
        let request = request.body(Full::new(body)).map_err(|error| error.to_string())?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| words(&error))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, self.answer_max).collect().await;
            let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
                Some(_) => format!("the answer is larger than {} bytes", self.answer_max),
                None => words(&*error),
            })?;
            Ok(Response::from_parts(head, body.to_bytes()))
        };
        tokio::time::timeout(deadline, exchange).await.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }
}

/// An error with its causes; the last one says what happened.
fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        words = format!("{words}: {inner}");
        cause = inner.source();
    }
    words
}
