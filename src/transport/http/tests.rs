use super::*;
use bytes::Bytes;
use http_body_util::Full;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

/// A handler that refuses every socket, and takes longer for it than a request may take to
/// arrive.
struct Slow(Duration);

impl UpgradeHandler<Full<Bytes>> for Slow {
    fn is_for(&self, _: &str) -> bool {
        true
    }

    fn take(
        &self,
        _: Request<()>,
        line: LazyTcpStream,
    ) -> BoxFuture<'_, Result<ConnectionFuture, (LazyTcpStream, Response<Full<Bytes>>)>> {
        let answer = Response::builder().status(503).body(Full::default()).unwrap();
        Box::pin(async move {
            tokio::time::sleep(self.0).await;
            Err((line, answer))
        })
    }
}

#[tokio::test]
async fn a_refusal_that_takes_longer_than_a_request_may_is_answered() {
    let limits = HttpLimits { first_request: Duration::from_millis(200), ..HttpLimits::default() };
    let listener = bind(([127, 0, 0, 1], 0).into(), &limits).unwrap();
    let (at, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
    let sockets: Arc<dyn UpgradeHandler<Full<Bytes>>> = Arc::new(Slow(limits.first_request * 2));
    let none = tower::service_fn(|_| ready(Ok(Response::new(Full::default()))));
    let serving = tokio::spawn(serve(listener, none, Some(sockets), None, limits, stop.clone()));
    let ask = || async {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    for answer in futures_util::future::join_all((0..16).map(|_| ask())).await {
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer:?}");
    }
    stop.cancel();
    serving.await.unwrap();
}
