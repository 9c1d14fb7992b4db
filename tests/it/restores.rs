//! MongoDB restored, dropped, without its index, or with damaged documents; an embedded store put
//! back.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use ringpush::clock::Clock;
use ringpush::inbox::mongo::{MongoInbox, MongoTimes};
use ringpush::inbox::{Append, Appended, Inbox, Janitor, PageLimit, PositionQuery, StartAt};
use ringpush::message::{Seq, UserId};
use serde_json::{Value, json};

use crate::replica_set::{item, open};
use ringpush_testing::foreign::ReplicaSet;
use ringpush_testing::{Server, eventually};

/// Times of which all that follow are short: a look at the store every 20 ms, one at its indexes
/// every 0.6 s.
const BRISK: MongoTimes = MongoTimes { head_trust: Duration::from_secs(6) };

fn collection(set: &mongodb::Client, database: &str) -> mongodb::Collection<Document> {
    set.database(database).collection("inbox")
}

async fn client(set: &ReplicaSet) -> mongodb::Client {
    mongodb::Client::with_uri_str(set.uri()).await.unwrap()
}

async fn all_of(collection: &mongodb::Collection<Document>) -> Vec<Document> {
    collection.find(doc! {}).await.unwrap().try_collect().await.unwrap()
}

/// As a restore does it: what stands there goes, and what stood there comes.
async fn put_back(collection: &mongodb::Collection<Document>, backup: &[Document]) {
    collection.delete_many(doc! {}).await.unwrap();
    for document in backup {
        // Somebody may have looked meanwhile, and have written a new marker.
        let place = doc! { "_id": document.get("_id").unwrap() };
        collection.replace_one(place, document).upsert(true).await.unwrap();
    }
}

async fn one(inbox: &MongoInbox, user: &UserId, id: &str) -> Seq {
    match inbox.append(vec![item(user, id, 3_600_000)]).await.remove(0) {
        Ok(Appended::Stored(message)) => message.seq,
        other => panic!("{other:?}"),
    }
}

fn watched(inbox: &MongoInbox) -> tokio::task::JoinHandle<()> {
    let inbox = inbox.clone();
    tokio::spawn(async move { inbox.watch().await })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_no_number_is_given_twice_and_what_comes_is_found() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "restored");
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    // Another writer that has no head in memory, and knows the store all the same.
    let other = open(&set.uri(), database, BRISK, Clock::system()).await;
    // One that has a head in memory, and does not look.
    let stale = open(&set.uri(), database, BRISK, Clock::system()).await;
    let watching = [watched(&inbox), watched(&other)];
    let stored = collection(&client, database);
    for (n, writer) in [&inbox, &other].into_iter().enumerate() {
        let user = UserId::parse(&format!("alice-{n}")).unwrap();
        let mut given = Vec::new();
        for n in 0..9 {
            given.push(one(&inbox, &user, &format!("before-{n}")).await);
        }
        given.push(one(&stale, &user, "before-9").await);
        let backup = all_of(&stored).await;
        for n in 10..20 {
            given.push(one(&inbox, &user, &format!("before-{n}")).await);
        }
        let (tenth, last) = (given[9], given[19]);
        // Some looks later, so that the pulse has risen.
        tokio::time::sleep(Duration::from_millis(200)).await;
        put_back(&stored, &backup).await;
        for n in 0..5 {
            let seq = one(writer, &user, &format!("after-{n}")).await;
            assert!(!given.contains(&seq) && seq > last, "{seq} was given before: {given:?}");
            given.push(seq);
        }
        // What stands after the last that it remembers is no message: it reads its head again.
        let met = one(&stale, &user, "met").await;
        assert!(met > *given.last().unwrap(), "{met}: {given:?}");
        let there = |from| PositionQuery { user: user.clone(), from: StartAt::After(from) };
        let eventually_found = async {
            // From where the store was restored to, from what is gone, and from the beginning.
            while !inbox.positions(vec![there(tenth)]).await.unwrap()[0].more {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), eventually_found)
            .await
            .expect("there is more after the tenth");
        assert!(inbox.positions(vec![there(last)]).await.unwrap()[0].more);
        let page =
            inbox.page(user.clone(), tenth, PageLimit { messages: 100, bytes: 1 << 20 }).await.unwrap();
        let ids: Vec<&str> = page.messages.iter().map(|message| message.id.as_str()).collect();
        assert_eq!(ids, ["after-0", "after-1", "after-2", "after-3", "after-4", "met"]);
    }
    watching.iter().for_each(|task| task.abort());
}

/// Its numbers are ahead of the moment, and so is the pulse: whoever sees that fall goes on above
/// the pulse, not above his own moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restore_numbers_of_a_clock_that_was_ahead_are_not_given_again() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "ahead");
    let fast = Clock::standing(Clock::system().now().plus_seconds(3_600));
    let ahead = open(&set.uri(), database, BRISK, fast.clone()).await;
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    let looks = [watched(&ahead), watched(&inbox)];
    let stored = collection(&client, database);
    let backup = all_of(&stored).await;
    let user = UserId::parse("alice").unwrap();
    let last = one(&ahead, &user, "ahead").await;
    fast.advance(10_000);
    let marker = async || {
        let found = stored.find_one(doc! { "_id": { "u": "", "n": 0i64 } }).await.unwrap();
        found.and_then(|marker| marker.get_i64("pulse").ok()).unwrap_or_default()
    };
    eventually("the pulse is ahead", async || marker().await > last.get() as i64 + 5_000).await;
    one(&inbox, &UserId::parse("bob").unwrap(), "has seen the pulse").await;
    looks[0].abort();
    drop(ahead);
    put_back(&stored, &backup).await;
    let next = one(&inbox, &user, "next").await;
    assert!(next > last, "{next} was given before: {last}");
    looks[1].abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_that_was_dropped_is_whole_again_and_gives_no_number_twice() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "dropped");
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    let watching = watched(&inbox);
    let user = UserId::parse("alice").unwrap();
    let mut last = Seq::BEGINNING;
    for n in 0..5 {
        last = one(&inbox, &user, &format!("before-{n}")).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let stored = collection(&client, database);
    let identity = inbox.prepare().await.unwrap();
    // The store's identity, and all else that this cluster keeps there.
    client.database(database).drop().await.unwrap();
    let after = one(&inbox, &user, "after").await;
    assert!(after > last);
    let indexes = async {
        loop {
            let names = stored.list_index_names().await.unwrap_or_default();
            if ["sender_id", "expiry"].iter().all(|name| names.iter().any(|known| known == name)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), indexes).await.expect("the indexes are there again");
    let again = inbox.append(vec![item(&user, "after", 3_600_000)]).await.remove(0);
    assert_eq!(again, Ok(Appended::Duplicate(after)));
    let same = async || {
        let newcomer = MongoInbox::new(&set.uri(), database, BRISK, Clock::system()).await.unwrap();
        newcomer.prepare().await.unwrap() == identity
    };
    assert!(same().await, "whoever comes finds the store that the others have");
    // A client that has what is gone hears of what came.
    let ask = PositionQuery { user: user.clone(), from: StartAt::After(Seq::at(last.get() - 1)) };
    assert!(inbox.positions(vec![ask]).await.unwrap()[0].more);
    let page = inbox.page(user, last, PageLimit { messages: 100, bytes: 1 << 20 }).await.unwrap();
    assert_eq!(page.messages.len(), 1);
    watching.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_index_no_id_is_stored_twice_and_what_is_in_the_way_is_named() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "unindexed");
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    let user = UserId::parse("alice").unwrap();
    let first = one(&inbox, &user, "twice").await;
    let stored = collection(&client, database);
    stored.drop_index("sender_id").await.unwrap();
    let copy = doc! { "_id": { "u": "alice", "n": first.get() as i64 + 1 }, "f": "twice", "a": "", "i": "twice",
    "at": 0i64, "x": i64::MAX, "p": mongodb::bson::Binary { subtype: mongodb::bson::spec::BinarySubtype::Generic, bytes: b"1".to_vec() } };
    stored.insert_one(copy).await.unwrap();
    let watching = watched(&inbox);
    let refused = async {
        let mut n = 0;
        loop {
            n += 1;
            match inbox.append(vec![item(&user, &format!("another-{n}"), 3_600_000)]).await.remove(0) {
                // First that the index is missing, then what is in its way.
                Err(error) if error.to_string().contains("twice") => return error.to_string(),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let why = tokio::time::timeout(Duration::from_secs(20), refused)
        .await
        .expect("publishes with an id are refused");
    for word in ["sender_id", "twice", "alice", "updateOne", "$unset"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    let without_id = Append { deduplicated: false, ..item(&user, "without", 3_600_000) };
    assert!(inbox.append(vec![without_id]).await.remove(0).is_ok(), "nobody repeats this one");
    // A process that is started now says the same, and runs.
    let started = MongoInbox::new(&set.uri(), database, BRISK, Clock::system()).await.unwrap();
    assert!(started.prepare().await.is_ok());
    assert!(started.append(vec![item(&user, "a-third", 3_600_000)]).await.remove(0).is_err());
    let place = doc! { "_id": { "u": "alice", "n": first.get() as i64 + 1 } };
    stored.update_one(place, doc! { "$unset": { "f": "" } }).await.unwrap();
    let taken = async {
        while inbox.append(vec![item(&user, "at-last", 3_600_000)]).await.remove(0).is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), taken).await.expect("they are taken again");
    watching.abort();
}

/// Another index that only has the name: ids are refused, and it is said, until it is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_is_not_unique_tells_no_ids_apart() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "other_index");
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    let user = UserId::parse("alice").unwrap();
    one(&inbox, &user, "before").await;
    let stored = collection(&client, database);
    stored.drop_index("sender_id").await.unwrap();
    let index = doc! { "key": { "_id.u": 1, "f": 1 }, "name": "sender_id" };
    client
        .database(database)
        .run_command(doc! { "createIndexes": "inbox", "indexes": [index] })
        .await
        .unwrap();
    let watching = watched(&inbox);
    let stays = async |taken: bool| {
        for n in 0.. {
            let id = format!("{taken}-{n}");
            match inbox.append(vec![item(&user, &id, 3_600_000)]).await.remove(0) {
                Ok(_) if taken => return,
                Err(error) if !taken => return assert!(error.to_string().contains("sender_id"), "{error}"),
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), stays(false)).await.expect("ids are refused");
    stored.drop_index("sender_id").await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), stays(true)).await.expect("ids are taken again");
    watching.abort();
}

/// What another program, or a damaged disk, may have left there.
fn rubbish() -> Vec<Document> {
    vec![
        doc! {},
        doc! { "p": "text" },
        doc! { "x": "never", "p": 7, "i": 7, "a": 7, "at": "then" },
        doc! { "x": -5i64, "at": -5i64, "i": "", "a": "", "p": [] },
        doc! { "head": "x", "first": -1, "nb": { "a": 1 }, "x": null },
        doc! { "i": "\u{7}", "a": "", "at": 0i64, "x": i64::MAX, "p": mongodb::bson::Binary { subtype: mongodb::bson::spec::BinarySubtype::Generic, bytes: vec![0xff] } },
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_message_goes_with_the_next_one_above_it() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "damaged");
    let clock = Clock::standing(Clock::system().now());
    let inbox = open(&set.uri(), database, BRISK, clock.clone()).await;
    let stored = collection(&client, database);
    let user = UserId::parse("alice").unwrap();
    for n in 0..5 {
        let seq = one(&inbox, &user, &n.to_string()).await;
        if n == 0 || n == 2 || n == 4 {
            let place = doc! { "_id": { "u": "alice", "n": seq.get() as i64 } };
            stored.update_one(place, doc! { "$set": { "x": "never" } }).await.unwrap();
        }
    }
    clock.advance(3_700_000);
    assert_eq!(inbox.run_once().await.unwrap(), 0, "they are seen for the first time");
    clock.advance(3_700_000);
    assert_eq!(inbox.run_once().await.unwrap(), 4);
    let page = inbox.page(user, Seq::BEGINNING, PageLimit { messages: 100, bytes: 1 << 20 }).await.unwrap();
    assert_eq!((page.messages.len(), page.unreadable.len()), (0, 1), "{page:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_passed_over_and_told_by_its_number() {
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "rubbish");
    let inbox = open(&set.uri(), database, BRISK, Clock::system()).await;
    let stored = collection(&client, database);
    let user = UserId::parse("alice").unwrap();
    let mut expected = vec![one(&inbox, &user, "0").await];
    let mut damaged = Vec::new();
    for (n, mut document) in rubbish().into_iter().enumerate() {
        let at = expected[n].get() + 1;
        document.insert("_id", doc! { "u": "alice", "n": at as i64 });
        stored.insert_one(document).await.unwrap();
        damaged.push(Seq::at(at));
        // The place is taken: the next one is.
        let next = one(&inbox, &user, &format!("{}", n + 1)).await;
        assert_eq!(next.get(), at + 1);
        expected.push(next);
    }
    for (n, mut document) in rubbish().into_iter().enumerate() {
        document.insert("_id", doc! { "u": format!("head-{n}"), "n": 0i64 });
        stored.insert_one(document).await.unwrap();
        stored.insert_one(doc! { "_id": { "u": "alice", "n": format!("{n}") } }).await.unwrap();
        stored.insert_one(doc! { "_id": n as i64, "u": "alice" }).await.unwrap();
        let user = UserId::parse(&format!("head-{n}")).unwrap();
        inbox.positions(vec![PositionQuery { user: user.clone(), from: StartAt::Latest }]).await.unwrap();
        one(&inbox, &user, "1").await;
    }
    let page =
        inbox.page(user.clone(), Seq::BEGINNING, PageLimit { messages: 100, bytes: 1 << 20 }).await.unwrap();
    assert_eq!(page.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), expected);
    let told: Vec<Seq> = page.unreadable.clone();
    assert_eq!(told, damaged);
    inbox.run_once().await.unwrap();
    inbox.profile(user).await.unwrap();
}

/// An embedded store of which an older copy is put back, as docs/operations.md says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_are_told_when_an_older_embedded_store_is_put_back() {
    let mut server = Server::start().await;
    let data = server.directory.path().to_owned();
    let aside = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        let done = std::process::Command::new("cp").arg("-a").args([from, to]).status();
        assert!(done.unwrap().success());
    };
    let everyone = json!({"to": {"everyone": true}, "payload": "all"});
    let mut shown = Vec::new();
    for n in 0..3 {
        shown.push(server.publish("alice", json!(n)).await);
        assert_eq!(server.try_publish(&everyone).await.status, 202);
    }
    assert_eq!(server.terminate().await, 0);
    copy(&data.join("inbox"), &aside.path().join("inbox"));
    let mut server = Server::on(Arc::clone(&server.directory), server.pinned()).await;
    for n in 3..6 {
        shown.push(server.publish("alice", json!(n)).await);
    }
    assert_eq!(server.terminate().await, 0);
    std::fs::remove_dir_all(data.join("inbox")).unwrap();
    copy(&aside.path().join("inbox"), &data.join("inbox"));
    let server = Server::on(Arc::clone(&server.directory), server.pinned()).await;
    assert!(server.log().contains("the store was copied here"), "{}", server.log());
    // Back before anything new is stored: told, and level below the position that it had.
    let mut early = server.connect("alice", &format!("?device=early&since={}", shown[5])).await;
    let (_, gap) = early.until("gap").await;
    assert_eq!((gap["reason"].as_str(), gap["after"].as_u64()), (Some("reset"), Some(shown[5])), "{gap}");
    assert_eq!(gap["before"].as_u64(), Some(shown[2] + 1), "{gap}");
    for n in 20..23 {
        let given = server.publish("alice", json!(n)).await;
        assert!(!shown.contains(&given), "{given} was given before");
        assert_eq!(early.until("message").await.1["payload"], n);
    }
    // Back later: what was stored and is gone is a gap, and nothing new is missing.
    let mut late = server.connect("alice", &format!("?device=late&since={}", shown[5])).await;
    let (frames, _) = late.until("caught_up").await;
    let gaps: Vec<&Value> = frames.iter().filter(|frame| frame["type"] == "gap").collect();
    assert_eq!(gaps.len(), 1, "{frames:?}");
    assert_eq!(gaps[0]["after"].as_u64(), Some(shown[5]), "{gaps:?}");
    let payloads: Vec<u64> = frames.iter().filter_map(|frame| frame["payload"].as_u64()).collect();
    assert_eq!(payloads, [20, 21, 22]);
    let history = server.get("/v1/users/alice/messages").await.json();
    let kept: Vec<u64> =
        history["messages"].as_array().unwrap().iter().filter_map(|one| one["payload"].as_u64()).collect();
    assert_eq!(kept, [0, 1, 2, 20, 21, 22]);
    let answer = server.try_publish(&everyone).await.json();
    assert!(answer["accepted"][0]["seq"].as_u64().unwrap() > shown[5], "{answer}");
}

/// Numbers lie a month apart after a restore: what has expired on both sides is removed all the
/// same, and what was seen before the restore says nothing of what stands there now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_expired_is_removed_across_the_numbers_that_a_restore_left_out() {
    const MONTH_MS: u64 = 30 * 24 * 3_600_000;
    let set = ReplicaSet::start(1).await;
    let (client, database) = (client(&set).await, "left_out");
    let clock = Clock::standing(Clock::system().now());
    let inbox = open(&set.uri(), database, BRISK, clock.clone()).await;
    let watching = watched(&inbox);
    let stored = collection(&client, database);
    let user = UserId::parse("alice").unwrap();
    let first = one(&inbox, &user, "before").await;
    let backup = all_of(&stored).await;
    one(&inbox, &user, "gone").await;
    clock.advance(MONTH_MS);
    // Both have expired: a mark stands on the one that will be gone.
    assert_eq!(inbox.run_once().await.unwrap(), 0);
    // A look later, so that the pulse has risen.
    let marker = async || {
        let found = stored.find_one(doc! { "_id": { "u": "", "n": 0i64 } }).await.unwrap();
        found.and_then(|marker| marker.get_i64("pulse").ok()).unwrap_or_default()
    };
    eventually("the pulse has risen", async || marker().await > first.get() as i64 + 1_000_000).await;
    put_back(&stored, &backup).await;
    let after = one(&inbox, &user, "after").await;
    assert!(after.get() > first.get() + MONTH_MS / 2, "{first} {after}");
    for _ in 0..3 {
        let pass = tokio::time::timeout(Duration::from_secs(10), inbox.run_once()).await;
        pass.expect("not a command for every ten thousand numbers").unwrap();
        clock.advance(BRISK.removal_delay().as_millis() as u64 + 1_000);
    }
    let left = doc! { "_id.u": "alice", "_id.n": { "$gt": 0i64 } };
    assert_eq!(stored.count_documents(left).await.unwrap(), 0, "the bridge goes with what follows it");
    let next = one(&inbox, &user, "next").await;
    assert!(next > after, "{after} {next}");
    watching.abort();
}
