//! The layout of what is stored, and what damage does.

use super::super::conformance::{Bench, suite};
use super::super::memory::MemoryInbox;
use super::records::*;
use super::*;
use crate::inbox::topics::{
    LogMembership, MembersChange, MembersChanged, Memberships, TopicSettings, Topics,
};
use crate::inbox::{Logs, StartAt};
use crate::message::{DeviceId, LogId, MessageId, Millis, TopicName};
use crate::topic::{Delivery, LOG_TOPICS};
use bytes::Bytes;

const START: Millis = Millis(1_795_380_000_000);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_model_keeps_the_contract() {
    let clock = Clock::standing(START);
    let logs = Logs::new(Arc::new(MemoryInbox::new(clock.clone())));
    suite(&Bench { inbox: Arc::new(MemoryInbox::new(clock.clone())), logs, clock }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_keeps_the_contract() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::standing(START);
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), clock.clone()).unwrap();
    let logs = Logs::new(Arc::new(inbox.logs()));
    suite(&Bench { inbox: Arc::new(inbox), logs, clock }).await;
}

#[test]
fn the_layout_is_what_was_stored() {
    let user = |name: &str| UserId::parse(name).unwrap();
    // From the draft's own table: "a" and "foobar".
    assert_eq!(hash(&user("a")), 0xe40c_292cu32.to_be_bytes());
    assert_eq!(hash(&user("foobar")), 0xbf9c_f968u32.to_be_bytes());
    assert_eq!(message_key(&user("a"), 1), b"\xe4\x0c\x29\x2ca\0\0\0\0\0\0\0\0\x01");
}

#[test]
fn a_store_of_an_earlier_layout_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let earlier = Database::builder(directory.path().join("inbox")).open().unwrap();
    earlier.keyspace(EARLIER, KeyspaceCreateOptions::default).unwrap();
    drop(earlier);
    let opened = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START));
    assert!(matches!(opened.err(), Some(OpenError::Earlier)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn positions_of_the_earlier_layout_are_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("inbox");
    drop(EmbeddedInbox::open(&directory, Clock::standing(START)).unwrap());
    let names = ["alice", "bob"].map(|name| UserId::parse(name).unwrap());
    let devices = ["desk", "phone"].map(|name| DeviceId::parse(name).unwrap());
    let logs = [LogId::Everyone, LogId::Topic(TopicName::parse("news.of-today").unwrap())];
    let place = |user: &UserId, device: &DeviceId, log: &LogId| {
        let mut place = cursor_key(user, device.as_str());
        place.push(0);
        place.extend_from_slice(crate::inbox::logs::key(log).as_str().as_bytes());
        place
    };
    {
        let db = Database::builder(&directory).open().unwrap();
        let earlier = db.keyspace(EARLIER_POSITIONS, KeyspaceCreateOptions::default).unwrap();
        for (user, device) in names.iter().flat_map(|user| devices.iter().map(move |device| (user, device))) {
            for (log, seq) in logs.iter().zip(7u64..) {
                earlier.insert(place(user, device, log), seq.to_be_bytes()).unwrap();
            }
        }
        earlier.insert(b"\xff no such key", b"short").unwrap();
        db.persist(PersistMode::SyncAll).unwrap();
    }
    // The second start finds nothing to take over.
    for _ in 0..2 {
        let inbox = EmbeddedInbox::open(&directory, Clock::standing(START)).unwrap();
        for (user, device) in names.iter().flat_map(|user| devices.iter().map(move |device| (user, device))) {
            let of = vec![(user.clone(), device.clone())];
            let mut found = inbox.log_positions(of).await.unwrap().remove(0);
            found.sort_by_key(|(_, seq)| *seq);
            let expected: Vec<(LogId, Seq)> = logs.iter().cloned().zip([7, 8].map(Seq::at)).collect();
            assert_eq!(found, expected, "{user} {device}");
        }
    }
    let db = Database::builder(&directory).open().unwrap();
    assert!(!db.keyspace_exists(EARLIER_POSITIONS));
}

/// As a version wrote them that had a row for each membership.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memberships_of_the_earlier_layout_are_taken_over() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path().join("inbox");
    let user = |name: &str| UserId::parse(name).unwrap();
    let topic = |name: &str| TopicName::parse(name).unwrap();
    let names = ["news", "news.today", "team"].map(topic);
    {
        let inbox = EmbeddedInbox::open(&directory, Clock::standing(START)).unwrap();
        for (name, delivery) in names.iter().zip([Delivery::Log, Delivery::Log, Delivery::Inbox]) {
            let settings = TopicSettings { delivery: Some(delivery), ttl_s: None, default_ttl_s: 60 };
            inbox.put(name.clone(), settings).await.unwrap();
        }
        let add = ["alice", "bob"].map(user).to_vec();
        let change = MembersChange { add, remove: Vec::new(), from: None };
        inbox.change_members(names[2].clone(), change).await.unwrap();
    }
    {
        let db = Database::builder(&directory).open().unwrap();
        let keyspace = |name: &str| db.keyspace(name, KeyspaceCreateOptions::default).unwrap();
        let [_, members, of_users] = TOPIC_KEYSPACES.map(keyspace);
        let changes = keyspace(EARLIER_CHANGES);
        for (name, from) in [("alice", 7u64), ("bob", 8)] {
            for topic in &names[..2] {
                let value = [1u64.to_be_bytes(), from.to_be_bytes()].concat();
                let by_user = [&prefix(&user(name)), topic.as_str().as_bytes()].concat();
                members.insert(format!("{topic}\0{name}"), &value).unwrap();
                of_users.insert(by_user, value).unwrap();
            }
            changes.insert(head_key(&user(name)), 2u64.to_be_bytes()).unwrap();
        }
        changes.insert(b"\xff no such key", b"short").unwrap();
        db.persist(PersistMode::SyncAll).unwrap();
    }
    // The second start finds nothing to take over.
    for _ in 0..2 {
        let inbox = EmbeddedInbox::open(&directory, Clock::standing(START)).unwrap();
        for (name, from) in [("alice", 7), ("bob", 8)] {
            let found = inbox.log_memberships(vec![user(name)]).await.unwrap().remove(0);
            let logs = names[..2].iter().map(|topic| LogMembership {
                topic: topic.clone(),
                life: 1,
                from: Seq::at(from),
            });
            assert_eq!(found, Memberships { version: 2, logs: logs.collect() }, "{name}");
            let all: Vec<TopicName> =
                inbox.topics_of(user(name)).await.unwrap().into_iter().map(|topic| topic.name).collect();
            assert_eq!(all, names, "{name}");
        }
    }
    // An earlier version has run once more: what it wrote counts beside what stands there.
    {
        let db = Database::builder(&directory).open().unwrap();
        let keyspace = |name: &str| db.keyspace(name, KeyspaceCreateOptions::default).unwrap();
        let by_user = [&prefix(&user("bob")), names[0].as_str().as_bytes()].concat();
        let value = [1u64.to_be_bytes(), 9u64.to_be_bytes()].concat();
        keyspace(TOPIC_KEYSPACES[2]).insert(by_user, value).unwrap();
        keyspace(EARLIER_CHANGES).insert(head_key(&user("bob")), 1u64.to_be_bytes()).unwrap();
        db.persist(PersistMode::SyncAll).unwrap();
    }
    let inbox = EmbeddedInbox::open(&directory, Clock::standing(START)).unwrap();
    let found = inbox.log_memberships(vec![user("bob")]).await.unwrap().remove(0);
    let mut froms: Vec<u64> = found.logs.iter().map(|membership| membership.from.get()).collect();
    froms.sort_unstable();
    assert_eq!((found.version, froms), (3, vec![8, 9]));
    let leaves =
        MembersChange { remove: vec![user("bob")], from: Some(Seq::at(9)), ..MembersChange::default() };
    let left = inbox.change_members(names[0].clone(), leaves).await.unwrap();
    assert_eq!(left, MembersChanged::Done { added: 0, removed: 1, refused: Vec::new() });
    let found = inbox.log_memberships(vec![user("bob")]).await.unwrap().remove(0);
    assert_eq!((found.version, found.logs.len()), (4, 1));
    drop(inbox);
    let db = Database::builder(&directory).open().unwrap();
    assert!(!db.keyspace_exists(EARLIER_CHANGES));
}

/// A user in as many logs as there can be, all of which end: what is left of them does not grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memberships_in_logs_that_have_ended_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START)).unwrap();
    let names: Vec<TopicName> =
        (0..LOG_TOPICS).map(|n| TopicName::parse(&format!("t{n}")).unwrap()).collect();
    let alice = UserId::parse("alice").unwrap();
    let stored = || inbox.store.user_logs_of(&inbox.store.db.snapshot(), &alice).unwrap();
    let live_and_end = async |names: &[TopicName]| {
        for name in names {
            let delivery = Some(Delivery::Log);
            inbox
                .put(name.clone(), TopicSettings { delivery, ttl_s: None, default_ttl_s: 60 })
                .await
                .unwrap();
            let joins = MembersChange {
                add: vec![alice.clone()],
                from: Some(Seq::at(1)),
                ..MembersChange::default()
            };
            let joined = inbox.change_members(name.clone(), joins).await.unwrap();
            assert_eq!(joined, MembersChanged::Done { added: 1, removed: 0, refused: Vec::new() });
        }
        for name in names {
            assert!(inbox.remove(name.clone()).await.unwrap());
        }
    };
    live_and_end(&names).await;
    assert_eq!(stored().logs.len(), LOG_TOPICS);
    live_and_end(&[TopicName::parse("one-more").unwrap()]).await;
    assert_eq!(stored().logs.len(), 1, "those that have ended made room");
    live_and_end(&names[..3]).await;
    inbox.run_once().await.unwrap();
    assert!(stored().logs.is_empty());
    assert_eq!(stored().changes, LOG_TOPICS as u64 + 4, "the number never falls");
    assert!(inbox.store.topic_members.is_empty().unwrap());
}

/// A name with lives of both deliveries: nothing of any of them is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memberships_of_a_name_that_changes_its_delivery_are_removed() {
    let directory = tempfile::tempdir().unwrap();
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START)).unwrap();
    let (name, alice) = (TopicName::parse("group").unwrap(), UserId::parse("alice").unwrap());
    for (delivery, from) in
        [(Delivery::Inbox, None), (Delivery::Log, Some(Seq::at(1))), (Delivery::Inbox, None)]
    {
        let settings = TopicSettings { delivery: Some(delivery), ttl_s: None, default_ttl_s: 60 };
        inbox.put(name.clone(), settings).await.unwrap();
        let joins = MembersChange { add: vec![alice.clone()], from, ..MembersChange::default() };
        inbox.change_members(name.clone(), joins).await.unwrap();
        let topics = inbox.topics_of(alice.clone()).await.unwrap();
        assert_eq!(topics.iter().map(|topic| topic.delivery).collect::<Vec<_>>(), [delivery]);
        let logs = inbox.log_memberships(vec![alice.clone()]).await.unwrap().remove(0).logs;
        assert_eq!(logs.len(), usize::from(delivery == Delivery::Log));
        inbox.remove(name.clone()).await.unwrap();
        assert!(inbox.topics_of(alice.clone()).await.unwrap().is_empty());
    }
    inbox.run_once().await.unwrap();
    assert!(inbox.store.topic_members.is_empty().unwrap());
    assert!(inbox.store.user_topics.is_empty().unwrap());
    assert!(inbox.store.user_logs_of(&inbox.store.db.snapshot(), &alice).unwrap().logs.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_about_a_new_user_stands_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let users = ["begins", "goes on", "strange"].map(|name| UserId::parse(name).unwrap());
    let ask = async |inbox: &EmbeddedInbox, positions: [Seq; 3]| {
        let asks = users.iter().zip(positions);
        let asks = asks.map(|(user, at)| PositionQuery { user: user.clone(), from: StartAt::After(at) });
        <[UserPosition; 3]>::try_from(inbox.positions(asks.collect()).await.unwrap()).unwrap()
    };
    let first = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START)).unwrap();
    let strange = Seq::at(4_711);
    let answers = ask(&first, [Seq::BEGINNING, Seq::at(START.0), strange]).await;
    assert!(answers.iter().all(|answer| answer.head == Seq::at(START.0) && !answer.more));
    drop(first);
    // Meanwhile the clock was set back. Only the third user was told a number, and that number
    // stands.
    let earlier = Millis(START.0 - 60_000);
    let again = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(earlier)).unwrap();
    let answers = ask(&again, [Seq::BEGINNING, Seq::BEGINNING, Seq::at(START.0)]).await;
    let (start, earlier) = (Seq::at(START.0), Seq::at(earlier.0));
    assert_eq!(answers.map(|answer| answer.head), [earlier, earlier, start]);
    assert!(answers.iter().all(|answer| !answer.more));
}

fn item(user: &str, id: &str, deduplicated: bool) -> Append {
    Append {
        trace: None,
        append_id: None,
        user: UserId::parse(user).unwrap(),
        id: MessageId::parse(id).unwrap(),
        deduplicated,
        accepted_at: START,
        expires_at: START.plus_seconds(60),
        event: None,
        via: None,
        payload: Bytes::from_static(b"1"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_the_fault_of_its_own_user_and_number_alone() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::standing(START);
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), clock.clone()).unwrap();
    let store = &inbox.store;
    let (good, deduplicated, bad) =
        (item("alice", "good", false), item("bob", "again", true), item("eve", "x", false));
    // Damage the fence of a repeat, and a head record.
    store.fences.insert(fence_key(&deduplicated.user, &deduplicated.fence()), b"no fence").unwrap();
    store.heads.insert(head_key(&bad.user), b"no head").unwrap();
    store.cursors.insert(cursor_key(&good.user, "web"), b"no cursor").unwrap();
    for n in 0..3 {
        let batch = vec![good.clone(), bad.clone(), deduplicated.clone(), good.clone()];
        let outcomes = inbox.append(batch).await;
        let seq = |at: usize| match &outcomes[at] {
            Ok(Appended::Stored(message)) => message.seq.get() - START.0,
            other => panic!("{at}: {other:?}"),
        };
        assert_eq!((seq(0), seq(3)), (1 + 2 * n, 2 + 2 * n));
        assert!(matches!(outcomes[1], Err(InboxError::Corrupt(_))));
        assert!(n > 0 || seq(2) == 1, "{:?}", outcomes[2]);
    }
    // A sweep asks for many users: one damaged record must not hide the others.
    let after = |user: &UserId| PositionQuery { user: user.clone(), from: StartAt::After(Seq::at(START.0)) };
    let answers = inbox.positions(vec![after(&bad.user), after(&good.user)]).await.unwrap();
    assert!(answers[1].more);
    assert!(inbox.positions(vec![after(&bad.user)]).await.is_err());
    // Damage four messages: rubbish, cut off, payload that is not JSON, payload that is not
    // text.
    let value = |user: &UserId, n: u64| store.messages.get(message_key(user, START.0 + n)).unwrap().unwrap();
    let cut = value(&good.user, 3)[..5].to_vec();
    store.messages.insert(message_key(&good.user, START.0 + 2), b"").unwrap();
    store.messages.insert(message_key(&good.user, START.0 + 3), cut).unwrap();
    let mut not_json = value(&good.user, 4).to_vec();
    *not_json.last_mut().unwrap() = b'{';
    let mut not_text = not_json.clone();
    *not_text.last_mut().unwrap() = 0xff;
    store.messages.insert(message_key(&good.user, START.0 + 4), not_json).unwrap();
    store.messages.insert(message_key(&good.user, START.0 + 5), not_text).unwrap();
    let page = inbox.page(good.user.clone(), Seq::BEGINNING, PageLimit { messages: 10, bytes: 1_000 }).await;
    let page = page.unwrap();
    let numbers: Vec<u64> = page.messages.iter().map(|message| message.seq.get() - START.0).collect();
    let unreadable: Vec<u64> = page.unreadable.iter().map(|seq| seq.get() - START.0).collect();
    assert_eq!((numbers, unreadable), (vec![1, 6], vec![2, 3, 4, 5]));
    inbox.run_once().await.unwrap();
    // When the sixth has expired, those below it are removed too.
    clock.advance(60_000);
    inbox.run_once().await.unwrap();
    let kept = inbox.page(good.user.clone(), Seq::BEGINNING, PageLimit { messages: 10, bytes: 1_000 }).await;
    let kept = kept.unwrap();
    assert_eq!((kept.messages.len(), kept.unreadable.len(), kept.upto.get()), (0, 0, START.0 + 6));
    inbox.profile(good.user.clone()).await.unwrap();
    let ask = PositionQuery { user: good.user, from: StartAt::Cursor(DeviceId::parse("web").unwrap()) };
    assert!(inbox.positions(vec![ask]).await.unwrap()[0].start.is_beginning(), "a lost cursor costs repeats");
}

/// More than a lot, with unreadable messages in between and at the top.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_is_forgotten_with_what_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START)).unwrap();
    let message = item("alice", "m", false);
    let user = message.user.clone();
    inbox.append(vec![message.clone(); super::JANITOR_BATCH + 10]).await;
    let top = super::JANITOR_BATCH as u64 + 10;
    for n in [500, super::JANITOR_BATCH as u64, top - 1, top] {
        inbox.store.messages.insert(message_key(&user, START.0 + n), b"").unwrap();
    }
    inbox.forget(user.clone()).await.unwrap();
    assert!(inbox.store.messages.is_empty().unwrap());
    let Ok(Appended::Stored(next)) = inbox.append(vec![message]).await.remove(0) else { panic!() };
    assert_eq!(next.seq.get(), START.0 + top + 1, "numbers go on");
    let page = inbox.page(user, Seq::BEGINNING, PageLimit { messages: 10, bytes: 1_000 }).await.unwrap();
    assert_eq!((page.messages.len(), page.unreadable.len()), (1, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_was_written_out_is_held_until_the_store_lets_go_and_then_freed() {
    let directory = tempfile::tempdir().unwrap();
    let inbox = EmbeddedInbox::open(&directory.path().join("inbox"), Clock::standing(START)).unwrap();
    let first = Arc::downgrade(&inbox.store.messages.tree.active_memtable());
    let of_the_store = first.strong_count();
    let until = async |expected: &dyn Fn(usize) -> bool| {
        let counting = async {
            while !expected(first.strong_count()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), counting).await.expect("held, or freed, in time");
    };
    let freeing = tokio::spawn(inbox.clone().free_memory());
    until(&|count| count > of_the_store).await;
    for _ in 0..3 {
        inbox.append(vec![item("alice", "m", false)]).await.remove(0).unwrap();
        tokio::task::block_in_place(|| inbox.store.messages.rotate_memtable_and_wait()).unwrap();
    }
    until(&|count| count == 0).await;
    freeing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_opened_again_goes_on_where_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::standing(START);
    let item = item("alice", "m", true);
    let first = EmbeddedInbox::open(&directory.path().join("inbox"), clock.clone()).unwrap();
    let Ok(Appended::Stored(stored)) = first.append(vec![item.clone()]).await.remove(0) else { panic!() };
    assert!(matches!(
        EmbeddedInbox::open(&directory.path().join("inbox"), clock.clone()),
        Err(OpenError::Locked)
    ));
    drop(first);
    let again = EmbeddedInbox::open(&directory.path().join("inbox"), clock).unwrap();
    assert_eq!(again.append(vec![item.clone()]).await.remove(0), Ok(Appended::Duplicate(stored.seq)));
    let fresh = Append { deduplicated: false, ..item };
    let Ok(Appended::Stored(next)) = again.append(vec![fresh]).await.remove(0) else { panic!() };
    assert_eq!(next.seq, stored.seq.next());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_was_copied_gives_no_number_twice() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let clock = Clock::standing(START);
    let store = async |clock: &Clock, directory: &str, count: usize| {
        let inbox = EmbeddedInbox::open(&at(directory), clock.clone()).unwrap();
        let mut seqs = Vec::new();
        for store in [&inbox, &inbox.logs()] {
            for _ in 0..count {
                let outcome = store.append(vec![item("alice", "id", false)]).await.remove(0);
                let Ok(Appended::Stored(message)) = outcome else { panic!("{outcome:?}") };
                seqs.push(message.seq.get() - START.0);
            }
        }
        seqs
    };
    assert_eq!(store(&clock, "data", 2).await, [1, 2, 1, 2]);
    let copy = |from: &str, to: &str| {
        assert!(
            std::process::Command::new("cp").arg("-a").args([at(from), at(to)]).status().unwrap().success()
        );
    };
    copy("data", "backup");
    // Opened where it was, it goes on.
    assert_eq!(store(&clock, "data", 2).await, [3, 4, 3, 4]);
    std::fs::remove_dir_all(at("data")).unwrap();
    copy("backup", "data");
    clock.advance(1_000);
    assert_eq!(store(&clock, "data", 2).await, [1001, 1002, 1001, 1002]);
    // From then on it is the store of this place.
    clock.advance(1_000);
    assert_eq!(store(&clock, "data", 1).await, [1003, 1003]);
    // Put back into the same directory, so that only the notes differ; the clock has gone back.
    for entry in std::fs::read_dir(at("data")).unwrap() {
        let path = entry.unwrap().path();
        let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        removed.unwrap();
    }
    for entry in std::fs::read_dir(at("backup")).unwrap() {
        let from = entry.unwrap().path();
        let copied = std::process::Command::new("cp").arg("-a").args([&from, &at("data")]).status();
        assert!(copied.unwrap().success());
    }
    let behind = Clock::standing(Millis(START.0 - 10_000));
    assert_eq!(store(&behind, "data", 1).await, [2001, 2001], "above the moment of the last start");
}
