//! The inbox in a real MongoDB: the contract, two writers at once, and primaries that step down or
//! die.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use ringpush::clock::Clock;
use ringpush::inbox::conformance::{Bench, suite};
use ringpush::inbox::mongo::{MongoInbox, MongoTimes, OpenError};
use ringpush::inbox::{Append, Appended, Inbox, InboxError, Janitor, Logs, PageLimit};
use ringpush::message::{MessageId, Millis, Seq, UserId};

use ringpush_testing::foreign::{Foreign, ReplicaSet, mongod_path};

pub(crate) async fn open(uri: &str, database: &str, times: MongoTimes, clock: Clock) -> MongoInbox {
    let inbox = MongoInbox::new(uri, database, times, clock).await.unwrap();
    inbox.prepare().await.unwrap();
    inbox
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_contract_holds() {
    let set = ReplicaSet::start(1).await;
    let clock = Clock::standing(Millis(1_795_380_000_000));
    let inbox = open(&set.uri(), "contract", MongoTimes::default(), clock.clone()).await;
    let logs = Logs::new(Arc::new(inbox.logs()));
    suite(&Bench { inbox: Arc::new(inbox), logs, clock }).await;
}

pub(crate) fn item(user: &UserId, id: &str, ttl_ms: u64) -> Append {
    let now = Clock::system().now();
    Append {
        append_id: None,
        trace: None,
        user: user.clone(),
        id: MessageId::parse(id).unwrap(),
        deduplicated: true,
        accepted_at: now,
        expires_at: Millis(now.0 + ttl_ms),
        event: None,
        via: None,
        payload: Bytes::from(format!("{id:?}")),
    }
}

/// Two processes try the same append, because the answer of one was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_that_two_processes_try_is_stored_once_and_is_a_repeat_for_neither() {
    let set = ReplicaSet::start(1).await;
    let one = open(&set.uri(), "twice", MongoTimes::default(), Clock::system()).await;
    let two = open(&set.uri(), "twice", MongoTimes::default(), Clock::system()).await;
    let user = users("both", 1).remove(0);
    let stored = |outcome: &Result<Appended, InboxError>| match outcome {
        Ok(Appended::Stored(message)) => message.seq,
        other => panic!("{other:?}"),
    };
    let named =
        |id: &str, append_id: &str| Append { append_id: Some(append_id.into()), ..item(&user, id, 60_000) };
    let mut last = None;
    for round in 0..10 {
        let (id, append_id) = (format!("order-{round}"), format!("append-{round}"));
        let append = named(&id, &append_id);
        // Something of one's own before it, so that the other one's number is taken.
        one.append(vec![item(&user, &format!("before-{round}"), 60_000)]).await;
        let (first, second) = if round % 2 == 0 {
            tokio::join!(one.append(vec![append.clone()]), two.append(vec![append.clone()]))
        } else {
            (one.append(vec![append.clone()]).await, two.append(vec![append.clone()]).await)
        };
        let seq = stored(&first[0]);
        assert_eq!(stored(&second[0]), seq);
        // The same id in another publish is a repeat.
        let again = two.append(vec![named(&id, "another")]).await;
        assert_eq!(again[0], Ok(Appended::Duplicate(seq)));
        assert!(last.is_none_or(|last| seq > last));
        last = Some(seq);
    }
    let all = PageLimit { messages: 100, bytes: 1 << 20 };
    let page = one.page(user, Seq::BEGINNING, all).await.unwrap();
    assert_eq!(page.messages.len(), 20);
}

/// What one writer was promised: for each user the numbers with their ids.
type Promised = HashMap<UserId, Vec<(Seq, String)>>;

/// Appends to all users in turn, in batches of several, and repeats what was not promised.
async fn write(inbox: MongoInbox, users: Vec<UserId>, writer: usize, rounds: usize, ttl_ms: u64) -> Promised {
    let mut promised = Promised::new();
    for round in 0..rounds {
        let batch: Vec<Append> = users
            .iter()
            .enumerate()
            .flat_map(|(n, user)| {
                (0..1 + (round + n) % 3).map(move |k| item(user, &format!("w{writer}-{round}-{k}"), ttl_ms))
            })
            .collect();
        let mut pending = batch;
        while !pending.is_empty() {
            let outcomes = inbox.append(pending.clone()).await;
            let mut again = Vec::new();
            for (item, outcome) in pending.into_iter().zip(outcomes) {
                let seq = match outcome {
                    Ok(Appended::Stored(message)) => message.seq,
                    Ok(Appended::Duplicate(seq)) => seq,
                    Ok(Appended::Conflict) => panic!("nobody else uses this id"),
                    Err(_) => {
                        again.push(item);
                        continue;
                    }
                };
                promised.entry(item.user).or_default().push((seq, item.id.to_string()));
            }
            pending = again;
        }
    }
    promised
}

/// Everything stored is what was promised under its number; nobody's number was given twice, no id
/// stored twice. When it is `complete`, nothing can have expired: all that was promised is there,
/// and there is no hole. (Of messages that expire, the one that another writer accepted earlier may
/// be gone before the number below it.)
async fn audit(inbox: &MongoInbox, users: &[UserId], promised: &[Promised], complete: bool) {
    const WIDE: PageLimit = PageLimit { messages: 100_000, bytes: 1 << 30 };
    for user in users {
        let page = inbox.page(user.clone(), Seq::BEGINNING, WIDE).await.unwrap();
        if complete {
            let dense = page.messages.windows(2).all(|pair| pair[1].seq == pair[0].seq.next());
            assert!(dense, "a hole for {user}");
        }
        let stored: HashMap<Seq, &str> = page.messages.iter().map(|m| (m.seq, m.id.as_str())).collect();
        let mut ids: Vec<&str> = stored.values().copied().collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), stored.len(), "an id was stored twice for {user}");
        let mut given = HashMap::new();
        for (seq, id) in promised.iter().filter_map(|promised| promised.get(user)).flatten() {
            assert!(
                given.insert(*seq, id).is_none_or(|other| other == id),
                "{seq} of {user} was given twice"
            );
            let there = stored.get(seq);
            assert!(there.is_some() || !complete, "{seq} of {user} is lost");
            assert!(there.is_none_or(|there| there == id), "{seq} of {user} is another than was promised");
        }
    }
}

pub(crate) fn users(name: &str, count: usize) -> Vec<UserId> {
    (0..count).map(|n| UserId::parse(&format!("{name}-{n}")).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_share_users_and_no_number() {
    let set = ReplicaSet::start(1).await;
    let users = users("shared", 20);
    let times = MongoTimes::default();
    let one = open(&set.uri(), "two", times, Clock::system()).await;
    let two = open(&set.uri(), "two", times, Clock::system()).await;
    let both = tokio::join!(
        tokio::spawn(write(one.clone(), users.clone(), 1, 60, 3_600_000)),
        tokio::spawn(write(two, users.clone(), 2, 60, 3_600_000))
    );
    audit(&one, &users, &[both.0.unwrap(), both.1.unwrap()], true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_is_far_behind_another_does_not_try_one_number_after_another() {
    let set = ReplicaSet::start(1).await;
    let users = users("behind", 2);
    let one = open(&set.uri(), "behind", MongoTimes::default(), Clock::system()).await;
    let two = open(&set.uri(), "behind", MongoTimes::default(), Clock::system()).await;
    let first = write(one.clone(), users.clone(), 1, 1, 3_600_000).await;
    let others = write(two.clone(), users.clone(), 2, 150, 3_600_000).await;
    // One number at a time, with a rest after each, would take over ten seconds.
    let next = write(one.clone(), users.clone(), 3, 1, 3_600_000);
    let next = tokio::time::timeout(Duration::from_secs(5), next).await.expect("it finds its place at once");
    // And when it knows that another writes here.
    let more = write(two, users.clone(), 4, 150, 3_600_000).await;
    let last = write(one.clone(), users.clone(), 5, 1, 3_600_000);
    let last = tokio::time::timeout(Duration::from_secs(5), last).await.expect("it finds its place at once");
    audit(&one, &users, &[first, others, next, more, last], true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_writers_and_two_janitors_keep_numbers_dense_when_everything_expires() {
    let set = ReplicaSet::start(1).await;
    let users = users("expiring", 10);
    // A head is trusted for 50 ms, verified after 150 ms, and removal waits for 300 ms.
    let times = MongoTimes { head_trust: Duration::from_millis(50) };
    let one = open(&set.uri(), "expiry", times, Clock::system()).await;
    let two = open(&set.uri(), "expiry", times, Clock::system()).await;
    let janitor = |inbox: MongoInbox| async move {
        let mut removed = 0;
        loop {
            removed += inbox.run_once().await.unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(20)).await;
            if removed > 200 {
                return removed;
            }
        }
    };
    let janitors = (tokio::spawn(janitor(one.clone())), tokio::spawn(janitor(two.clone())));
    let writing = tokio::join!(
        tokio::spawn(write(one.clone(), users.clone(), 1, 80, 30)),
        tokio::spawn(write(two.clone(), users.clone(), 2, 80, 90))
    );
    let promised = [writing.0.unwrap(), writing.1.unwrap()];
    audit(&one, &users, &promised, false).await;
    for user in &users {
        let mut given: Vec<u64> =
            promised.iter().flat_map(|promised| &promised[user]).map(|(seq, _)| seq.get()).collect();
        given.sort_unstable();
        assert!(given.windows(2).all(|pair| pair[1] == pair[0] + 1), "numbers of {user} are not dense");
    }
    assert!(janitors.0.await.unwrap() > 0 && janitors.1.await.unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_promised_survives_primaries_that_step_down_and_die() {
    let mut set = ReplicaSet::start(3).await;
    let users = users("failover", 20);
    let times = MongoTimes::default();
    let one = open(&set.uri(), "failover", times, Clock::system()).await;
    let two = open(&set.uri(), "failover", times, Clock::system()).await;
    let writers = [
        tokio::spawn(write(one.clone(), users.clone(), 1, 120, 3_600_000)),
        tokio::spawn(write(two, users.clone(), 2, 120, 3_600_000)),
    ];
    tokio::time::sleep(Duration::from_millis(300)).await;
    set.step_down().await;
    let primary = set.primary().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    set.members[primary].kill();
    set.primary().await;
    set.members[primary].start_again().await;
    let mut promised = Vec::new();
    for writer in writers {
        promised.push(writer.await.unwrap());
    }
    audit(&one, &users, &promised, true).await;
}

/// One message without an id of its sender's for each user; what was promised for them.
async fn append_once(inbox: &MongoInbox, users: &[UserId], name: &str) -> Promised {
    let batch = users.iter().enumerate().map(|(n, user)| {
        let id = format!("{name}-{n}");
        Append { deduplicated: false, ..item(user, &id, 3_600_000) }
    });
    let outcomes = inbox.append(batch.clone().collect()).await;
    let stored = batch.zip(outcomes).map(|(item, outcome)| match outcome {
        Ok(Appended::Stored(message)) => (item.user, vec![(message.seq, item.id.to_string())]),
        other => panic!("{}: {other:?}", item.id),
    });
    stored.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_stored_is_not_stored_again_when_a_read_of_its_batch_fails() {
    let set = ReplicaSet::start(1).await;
    let users = users("failing", 20);
    let (times, clock) = (MongoTimes::default(), Clock::system());
    let one = open(&set.uri(), "failing", times, clock.clone()).await;
    let two = open(&format!("{}&appName=second", set.uri()), "failing", times, clock).await;
    let mut promised = vec![append_once(&one, &users, "a").await, append_once(&two, &users, "b").await];
    // Half of the numbers that the second would give next are taken, and it cannot look at what
    // stands there.
    promised.push(append_once(&one, &users[..10], "c").await);
    let fail = |mode: mongodb::bson::Bson| {
        mongodb::bson::doc! {
            "configureFailPoint": "failCommand", "mode": mode,
            // Nothing that the driver would try again by itself.
            "data": { "failCommands": ["find"], "errorCode": 1, "appName": "second" },
        }
    };
    set.command(0, fail(mongodb::bson::doc! { "times": 3 }.into())).await;
    promised.push(append_once(&two, &users, "d").await);
    let failed = set.command(0, fail("off".into())).await;
    assert!(failed.get_i64("count").or(failed.get_i32("count").map(i64::from)).unwrap() >= 3, "{failed}");
    audit(&one, &users, &promised, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_work_is_refused_with_a_remedy() {
    let standalone = Foreign::start(&[
        mongod_path().to_str().unwrap(),
        "--port",
        "{port}",
        "--bind_ip",
        "127.0.0.1",
        "--dbpath",
        "{dir}",
    ])
    .await;
    let uri = format!("mongodb://127.0.0.1:{}", standalone.port);
    let inbox = MongoInbox::new(&uri, "x", MongoTimes::default(), Clock::system()).await.unwrap();
    let refused = inbox.prepare().await.unwrap_err();
    assert!(
        matches!(&refused, OpenError::Refused("mongo.uri", why) if why.contains("--replSet")),
        "{refused}"
    );
    let refused = MongoInbox::new("mongodb:/x", "x", MongoTimes::default(), Clock::system()).await;
    assert!(matches!(refused.err(), Some(OpenError::Refused("mongo.uri", _))));
    let nobody = MongoInbox::new("mongodb://127.0.0.1:1", "x", MongoTimes::default(), Clock::system()).await;
    assert!(matches!(nobody.unwrap().prepare().await, Err(OpenError::Unreachable(_))));
    let set = ReplicaSet::start(1).await;
    let client = mongodb::Client::with_uri_str(set.uri()).await.unwrap();
    let index = mongodb::bson::doc! { "key": { "_id.u": 1, "f": 1 }, "name": "sender_id" };
    let ttl = mongodb::bson::doc! { "key": { "x": 1 }, "name": "ttl", "expireAfterSeconds": 1 };
    for (database, index) in [("plain", index), ("ttl", ttl)] {
        let make = mongodb::bson::doc! { "createIndexes": "inbox", "indexes": [index] };
        client.database(database).run_command(make).await.unwrap();
        let inbox =
            MongoInbox::new(&set.uri(), database, MongoTimes::default(), Clock::system()).await.unwrap();
        let refused = inbox.prepare().await.unwrap_err();
        assert!(
            matches!(&refused, OpenError::Refused("mongo.database", why) if why.contains("drop it")),
            "{refused}"
        );
    }
}

/// What expires within an hour may be more than one command reads or removes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_has_expired_goes_an_hour_later_and_readers_of_logs_begin_above_it() {
    const HALF: usize = 10_500;
    let set = ReplicaSet::start(1).await;
    let clock = Clock::standing(Clock::system().now());
    let logs = open(&set.uri(), "removal", MongoTimes::default(), clock.clone()).await.logs();
    let log = UserId::parse("news").unwrap();
    let minutes = |n: u64| n * 60_000;
    let mut seqs = Vec::new();
    for (half, ttl_ms) in [(0, minutes(1)), (1, minutes(31))] {
        for n in (0..HALF).step_by(500) {
            let one =
                |k: usize| Append { deduplicated: false, ..item(&log, &format!("{half}-{}", n + k), ttl_ms) };
            for outcome in logs.append((0..500).map(one).collect()).await {
                let Ok(Appended::Stored(message)) = outcome else { panic!("{outcome:?}") };
                seqs.push(message.seq);
            }
        }
    }
    let page = async || {
        let limit = PageLimit { messages: 100, bytes: 1_000_000 };
        logs.page(log.clone(), Seq::BEGINNING, limit).await.unwrap()
    };
    clock.advance(minutes(2));
    assert_eq!(logs.run_once().await.unwrap(), 0);
    assert_eq!(page().await.messages[0].seq, seqs[HALF], "above all that has expired, at once");
    clock.advance(minutes(30));
    assert_eq!(logs.run_once().await.unwrap(), 0);
    let all = page().await;
    assert_eq!((all.messages.len(), all.upto, all.more), (0, seqs[2 * HALF - 1], false));
    clock.advance(minutes(31));
    assert_eq!(logs.run_once().await.unwrap(), HALF as u64, "an hour after it was seen, all of it");
    clock.advance(minutes(30));
    assert_eq!(logs.run_once().await.unwrap(), HALF as u64, "and what expired later, later");
    assert_eq!(page().await.upto, seqs[2 * HALF - 1]);
}
