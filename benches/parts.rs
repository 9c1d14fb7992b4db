//! The parts: ring, session, frames, embedded append. `cargo bench --bench parts`
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ringpush::clock::Clock;
use ringpush::inbox::embedded::EmbeddedInbox;
use ringpush::inbox::{Append, Inbox};
use ringpush::message::{Message, MessageId, Millis, Seq, UserId};
use ringpush::ring::{Ring, key};
use ringpush::session::{Input, Item, Output, Session, StartPoint};
use ringpush::wire::frame::message_frame;

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("push-{n}")).collect()
}

fn build(names: &[String]) -> Ring {
    Ring::build(names.iter().map(|name| (name.as_str(), 1.0)))
}

fn ring(c: &mut Criterion) {
    let mut group = c.benchmark_group("ring");
    for count in [10, 100, 1000] {
        let names = names(count);
        let ring = build(&names);
        // Other users every time, so that no place of the ring stays in a near cache by being asked
        // again.
        let mut n = 0u64;
        group.bench_function(format!("owner of {count} nodes x 512"), |b| {
            b.iter(|| {
                n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
                black_box(ring.owner(n))
            });
        });
        // Names as a batch has them: one behind the other in memory, each for another place of the
        // ring.
        let users: Vec<[u8; 13]> =
            (0..65_536).map(|n| format!("user-{n:08}").into_bytes().try_into().unwrap()).collect();
        let mut at = 0;
        group.bench_function(format!("hash and owner, {count} nodes x 512"), |b| {
            b.iter(|| {
                at = (at + 1) & 65_535;
                black_box(ring.owner(key(std::str::from_utf8(&users[at]).unwrap())))
            });
        });
        group.sample_size(20).bench_function(format!("build of {count} x 512"), |b| b.iter(|| build(&names)));
    }
}

fn message(seq: u64) -> Message {
    Message {
        trace: None,
        seq: Seq::at(seq),
        id: MessageId::parse("01K0000000000000000000000").unwrap(),
        accepted_at: Millis(1_795_380_000_000),
        expires_at: Millis(1_795_980_000_000),
        event: None,
        via: None,
        payload: Bytes::from_static(
            br#"{"text":"a message of usual length, for one user","at":100000000000}"#,
        ),
    }
}

fn session(c: &mut Criterion) {
    c.bench_function("session: one live message", |b| {
        let standing = StartPoint { start: Seq::at(1), head: Seq::at(1), more: false, fresh: false };
        let mut session = Session::start(standing, None, |_: Output<Bytes>| {});
        let frame = message_frame(&message(1));
        let mut seq = 1;
        b.iter(|| {
            seq += 1;
            let item = Item { seq: Seq::at(seq), expires_at: Millis(u64::MAX), frame: frame.clone() };
            session.step(Input::Live(item), Millis(0), |output| {
                black_box(output);
            });
        });
    });
}

fn frame(c: &mut Criterion) {
    let message = message(1_795_380_000_001);
    c.bench_function("frame: encode one message", |b| b.iter(|| message_frame(black_box(&message))));
}

fn append(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let inbox = Arc::new(EmbeddedInbox::open(&directory.path().join("inbox"), Clock::system()).unwrap());
    let users: Vec<UserId> = (0..15_000).map(|n| UserId::parse(&format!("user-{n:08}")).unwrap()).collect();
    let mut group = c.benchmark_group("embedded append, synced");
    for size in [1usize, 64, 1000] {
        let mut n = 0;
        group.throughput(Throughput::Elements(size as u64)).sample_size(30).bench_function(
            format!("batch of {size}"),
            |b| {
                b.to_async(&runtime).iter_batched(
                    || {
                        (0..size)
                            .map(|_| {
                                n = (n + 7_919) % users.len();
                                let Message { id, accepted_at, expires_at, payload, .. } = message(1);
                                let user = users[n].clone();
                                Append {
                                    trace: None,
                                    append_id: None,
                                    user,
                                    id,
                                    deduplicated: false,
                                    accepted_at,
                                    expires_at,
                                    event: None,
                                    via: None,
                                    payload,
                                }
                            })
                            .collect::<Vec<_>>()
                    },
                    |batch| {
                        let inbox = Arc::clone(&inbox);
                        async move { inbox.append(batch).await }
                    },
                    BatchSize::SmallInput,
                );
            },
        );
    }
}

criterion_group!(benches, ring, session, frame, append);
criterion_main!(benches);
