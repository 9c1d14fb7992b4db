//! The router: look-ups on the ring, dispatch alone, dispatch to another process, and the design
//! that it replaces. B6 to B8.

use std::hint::black_box;
use std::io::{BufRead, BufReader, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use prost::Message as _;
use ringpush::clock::Clock;
use ringpush::fallback::local::LocalFallback;
use ringpush::interest::local::Everywhere;
use ringpush::membership::local::LocalMembership;
use ringpush::membership::{Membership, NodeInfo};
use ringpush::message::{Message, MessageId, Millis, NodeId, Seq, UserId};
use ringpush::ring::{Ring, key};
use ringpush::role::dispatch::Dispatch;
use ringpush::role::{PeerDirectory, PushService};
use ringpush::telemetry::Metrics;
use ringpush::transport::http::{HttpLimits, bind, serve};
use ringpush::transport::peer::{Dial, RemotePush, routes};
use ringpush::wire::peer::{DispatchRequest, LiveMessage, PushRequest, PushResponse, ViewVersion};
use ringpush::wire::proto::peer as proto;
use tokio::task::JoinSet;
use tower::util::BoxCloneSyncService;
use tower::{Service, ServiceExt};

use crate::Options;
use crate::foreign;
use crate::measure::Spread;
use crate::report::{Results, words};
use crate::servers::{self, Process};

/// Messages in a batch between roles.
const BATCH: usize = 1_000;
/// Users that messages go to in turn.
const USERS: usize = 15_000;
/// Push nodes of the router that is measured.
const NODES: usize = 4;
/// Look-ups under way at once in the design with one per message.
const LOOKUPS: usize = 256;

fn build(nodes: usize) -> Ring {
    let names: Vec<String> = (0..nodes).map(|n| format!("push-{n}")).collect();
    Ring::build(names.iter().map(|name| (name.as_str(), 1.0)))
}

/// B6.
pub fn ring(results: &mut Results) {
    let ring = build(100);
    let looked = Spread::of((0..5).map(|run| {
        const TIMES: u64 = 2_000_000;
        let mut place = run;
        let began = Instant::now();
        for _ in 0..TIMES {
            // Another place every time, so that none stays in a near cache by being asked again.
            place = u64::wrapping_add(place, 0x9e37_79b9_7f4a_7c15);
            black_box(ring.owner(place));
        }
        began.elapsed().as_nanos() as f64 / TIMES as f64
    }));
    let built = Spread::of((0..5).map(|_| {
        let began = Instant::now();
        black_box(build(1000));
        began.elapsed().as_secs_f64() * 1e3
    }));
    let measured = format!("look-up {} ns, build of 1000 x 512 {} ms", words(looked, 1), words(built, 1));
    let met = looked.zip(built).map(|(looked, built)| looked.median <= 60.0 && built.median <= 50.0);
    results.row("B6", "owner look-up, 100 x 512", measured, "<= 60 ns, <= 50 ms", met);
}

fn batches() -> Vec<Vec<LiveMessage>> {
    let live = |n: usize| LiveMessage {
        user: UserId::parse(&format!("user-{n:08}")).unwrap(),
        message: Arc::new(Message {
            trace: None,
            seq: Seq::at(1_795_380_000_000),
            id: MessageId::parse("01K0000000000000000000000").unwrap(),
            accepted_at: Millis(1_795_380_000_000),
            expires_at: Millis(1_795_980_000_000),
            event: None,
            via: None,
            payload: Bytes::from_static(&[b'x'; 120]),
        }),
    };
    let all: Vec<LiveMessage> = (0..USERS).map(|n| live(n * 7_919 % USERS)).collect();
    all.chunks(BATCH).map(<[LiveMessage]>::to_vec).collect()
}

/// Nodes that encode what they are sent, as the stream to another process would, and drop it.
struct Encoding(Arc<AtomicU64>);

impl PeerDirectory for Encoding {
    fn find(&self, _: &NodeId) -> Option<PushService> {
        let count = Arc::clone(&self.0);
        Some(BoxCloneSyncService::new(tower::service_fn(move |request| {
            let count = Arc::clone(&count);
            async move {
                if let PushRequest::Deliver { batch, sweep, stamp } = request {
                    let messages = batch.iter().map(proto::Live::from).collect();
                    let stamp = Some((&stamp).into());
                    let message = proto::PushBatch { messages, sweep, stamp, ..Default::default() };
                    black_box(message.encode_to_vec());
                    count.fetch_add(batch.len() as u64, Ordering::Relaxed);
                }
                Ok(PushResponse::Done(ViewVersion::default()))
            }
        })))
    }
}

/// B7 and B8.
pub fn measure(options: &Options, results: &mut Results, runtime: &tokio::runtime::Runtime) {
    // One thread: what one core does.
    let one_core = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let alone = Spread::of((0..options.runs).map(|_| one_core().block_on(dispatch_alone(options.seconds))));
    let met = alone.map(|alone| alone.median >= 1_000_000.0);
    let measured = format!("{}/s", words(alone, 0));
    results.row("B7", "dispatch: decide, group, encode, one core", measured, ">= 1,000,000/s", met);

    let across = Spread::of((0..options.runs).map(|_| to_another_process(options.seconds, runtime)));
    let met = across.map(|across| across.median >= 250_000.0);
    results.row("B7", "dispatch to another process", format!("{}/s", words(across, 0)), ">= 250,000/s", met);

    match foreign::redis() {
        Ok(redis) => {
            let looked_up = Spread::of(
                (0..options.runs).map(|_| one_core().block_on(look_up_each(redis.port, options.seconds))),
            );
            let ratio = alone.zip(looked_up).map(|(alone, looked_up)| alone.median / looked_up.median);
            let measured = format!(
                "{}/s with a look-up per message: ring x {}",
                words(looked_up, 0),
                ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.0}"))
            );
            results.row("B8", "ring for Redis", measured, ">= 10 x", ratio.map(|ratio| ratio >= 10.0));
        }
        Err(why) => results.row("B8", "ring for Redis", why, ">= 10 x", None),
    }
}

/// Messages per second through dispatch to nodes that encode them.
async fn dispatch_alone(seconds: f64) -> f64 {
    let membership = LocalMembership::new(Clock::system());
    for n in 0..NODES {
        let info = NodeInfo {
            node: NodeId::parse(&format!("push-{n}")).unwrap(),
            weight: 1.0,
            accept_per_s: 4000,
            peer: "".into(),
            push: true,
            dispatch: false,
            store: "".into(),
            ticket_in_auth: false,
        };
        membership.join(info).await.unwrap();
    }
    let stamp = membership.views().borrow().stamp();
    let encoded = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let mut dispatch = Dispatch::start(
        Arc::new(membership),
        Arc::new(LocalFallback::default()),
        Arc::new(Everywhere),
        Arc::new(Encoding(Arc::clone(&encoded))),
        &Metrics::default(),
        &mut tasks,
    );
    let batches = batches();
    let (began, mut sent) = (Instant::now(), 0);
    while began.elapsed().as_secs_f64() < seconds {
        for batch in &batches {
            let request =
                DispatchRequest::Deliver { batch: batch.clone(), missed: false, stamp: stamp.clone() };
            dispatch.call(request).await.unwrap();
            sent += batch.len() as u64;
            // Its queues are bounded and drop: what is measured is what comes through.
            while encoded.load(Ordering::Relaxed) < sent {
                tokio::task::yield_now().await;
            }
        }
    }
    encoded.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

/// A process that takes what dispatch sends to a push node, and drops it. Says its address, and
/// ends with its input.
pub fn sink() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let limits = HttpLimits::default();
        let listener = bind(([127, 0, 0, 1], 0).into(), &limits).unwrap();
        println!("{}", listener.local_addr().unwrap());
        let taker = BoxCloneSyncService::new(tower::service_fn(|request| async move {
            black_box(request);
            Ok(PushResponse::Done(ViewVersion::default()))
        }));
        let find = Arc::new(move |_: &str| Some(taker.clone()));
        let router = routes(None, Some(find), None, Arc::new(|_, _| Ok(())));
        tokio::select! {
            () = serve(listener, router, None, None, limits, Default::default()) => {}
            _ = tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())) => {}
        }
    });
}

/// Messages per second over the stream to a push node in another process.
fn to_another_process(seconds: f64, runtime: &tokio::runtime::Runtime) -> f64 {
    let mut process = Process(servers::again("--sink", &[]));
    let mut line = String::new();
    BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let rate = runtime.block_on(async {
        let remote = RemotePush::new(
            line.trim(),
            "push-0",
            Dial { sign: Arc::new(|_| "proof".to_owned()), tls: None },
        )
        .unwrap()
        .service();
        let batches: Vec<Arc<[LiveMessage]>> = batches().into_iter().map(Arc::from).collect();
        let (began, mut sent) = (Instant::now(), 0);
        for batch in batches.iter().cycle() {
            let request = PushRequest::Deliver {
                batch: Arc::clone(batch),
                sweep: false,
                stamp: ViewVersion::default(),
            };
            remote.clone().oneshot(request).await.unwrap();
            sent += batch.len();
            if began.elapsed().as_secs_f64() >= seconds {
                break;
            }
        }
        sent as f64 / began.elapsed().as_secs_f64()
    });
    let _ = process.0.stdin.take().unwrap().write_all(b"\n");
    rate
}

/// The design that the ring replaces: where a user is stands in Redis, and is asked for each
/// message. Many questions are under way on one connection at once.
async fn look_up_each(port: u16, seconds: f64) -> f64 {
    let client = redis::Client::open(format!("redis://127.0.0.1:{port}")).unwrap();
    let connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut fill = redis::pipe();
    for n in 0..USERS {
        let node = build_name(key(&format!("user-{n:08}")));
        fill.set(format!("route:user-{n:08}"), node).ignore();
    }
    fill.exec_async(&mut connection.clone()).await.unwrap();
    let messages: Vec<LiveMessage> = batches().into_iter().flatten().collect();
    let (began, mut sent) = (Instant::now(), 0usize);
    let mut asking = JoinSet::new();
    while began.elapsed().as_secs_f64() < seconds {
        while asking.len() < LOOKUPS {
            let live = messages[sent % USERS].clone();
            let mut connection = connection.clone();
            sent += 1;
            asking.spawn(async move {
                let node: String = redis::cmd("GET")
                    .arg(format!("route:{}", live.user.as_str()))
                    .query_async(&mut connection)
                    .await
                    .unwrap();
                black_box((node, proto::Live::from(&live).encode_to_vec()));
            });
        }
        asking.join_next().await.unwrap().unwrap();
    }
    (sent - asking.len()) as f64 / began.elapsed().as_secs_f64()
}

fn build_name(place: u64) -> String {
    format!("push-{}", place % NODES as u64)
}
