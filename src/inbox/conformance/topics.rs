//! Topics and their members.

use std::sync::Arc;

use super::{Bench, DAY_S, WIDE, user};
use crate::inbox::topics::{
    MembersChange, MembersChanged, MembersVersion, PutTopic, Topic, TopicRecipients, TopicSettings,
};
use crate::inbox::{Append, Appended};
use crate::message::{Seq, TopicName, UserId, Via};
use crate::topic::{Delivery, INBOX_MEMBERS};

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).unwrap()
}

fn users(names: &[&str]) -> Vec<UserId> {
    names.iter().map(|name| user(name)).collect()
}

const fn settings(ttl_s: Option<u64>) -> TopicSettings {
    TopicSettings { delivery: None, ttl_s, default_ttl_s: DAY_S }
}

impl Bench {
    async fn make(&self, name: &str) -> Topic {
        match self.inbox.put(topic(name), settings(None)).await.unwrap() {
            PutTopic::Created(topic) => topic,
            other => panic!("it was there: {other:?}"),
        }
    }

    async fn change(&self, name: &str, add: &[&str], remove: &[&str]) -> MembersChanged {
        let change = MembersChange { add: users(add), remove: users(remove), from: None };
        self.inbox.change_members(topic(name), change).await.unwrap()
    }

    async fn members(&self, name: &str) -> Vec<UserId> {
        self.inbox.members(topic(name), None, 10_000).await.unwrap().unwrap()
    }

    async fn version(&self, name: &str) -> MembersVersion {
        self.inbox.topic(topic(name)).await.unwrap().unwrap().version
    }
}

fn done(added: u64, removed: u64) -> MembersChanged {
    MembersChanged::Done { added, removed, refused: Vec::new() }
}

pub(super) async fn a_topic_is_made_once_and_its_name_can_be_used_again(bench: &Bench) {
    assert_eq!(bench.inbox.topic(topic("made")).await.unwrap(), None);
    assert!(!bench.inbox.remove(topic("made")).await.unwrap());
    let made = bench.make("made").await;
    assert_eq!((made.ttl_s, made.created_at), (DAY_S, bench.clock.now()));
    let again = bench.inbox.put(topic("made"), settings(None)).await.unwrap();
    assert_eq!(again, PutTopic::Known(made.clone()));
    let PutTopic::Known(changed) = bench.inbox.put(topic("made"), settings(Some(60))).await.unwrap() else {
        panic!("made twice")
    };
    assert_eq!(changed, Topic { ttl_s: 60, ..made.clone() });
    assert_eq!(bench.inbox.topic(topic("made")).await.unwrap(), Some(changed));
    assert!(bench.inbox.remove(topic("made")).await.unwrap());
    assert_eq!(bench.inbox.topic(topic("made")).await.unwrap(), None);
    let anew = bench.make("made").await;
    assert_eq!((anew.ttl_s, anew.version.life), (DAY_S, made.version.life + 1));
}

pub(super) async fn topics_are_listed_in_order(bench: &Bench) {
    for name in ["list.b", "list.a", "list", "list:c", "lisa", "list.d"] {
        bench.make(name).await;
    }
    bench.inbox.remove(topic("list.d")).await.unwrap();
    let list = async |prefix: &str, after: Option<&str>, limit: usize| -> Vec<String> {
        let found = bench.inbox.list(prefix.to_owned(), after.map(topic), limit).await.unwrap();
        found.iter().map(|topic| topic.name.to_string()).collect()
    };
    assert_eq!(list("list", None, 10).await, ["list", "list.a", "list.b", "list:c"]);
    assert_eq!(list("list", None, 2).await, ["list", "list.a"]);
    assert_eq!(list("list", Some("list.a"), 10).await, ["list.b", "list:c"]);
    assert_eq!(list("lis", Some("a"), 1).await, ["lisa"]);
    assert_eq!(list("list.", Some("zzz"), 10).await, Vec::<String>::new());
}

pub(super) async fn members_join_and_leave(bench: &Bench) {
    assert_eq!(bench.change("joined", &["a"], &[]).await, MembersChanged::NoTopic);
    assert_eq!(bench.inbox.members(topic("joined"), None, 10).await.unwrap(), None);
    bench.make("joined").await;
    let before = bench.version("joined").await;
    assert_eq!(bench.change("joined", &["b", "a", "用户"], &["c"]).await, done(3, 0));
    assert_eq!(bench.members("joined").await, users(&["a", "b", "用户"]));
    assert_eq!(bench.inbox.count_members(topic("joined")).await.unwrap(), 3);
    let after = bench.version("joined").await;
    assert!(after.life == before.life && after.changes > before.changes);
    assert_eq!(bench.change("joined", &["a"], &["c"]).await, done(0, 0));
    assert_ne!(bench.version("joined").await, after, "a repeat mends what a crash has left");
    assert_eq!(bench.change("joined", &["d"], &["a", "b"]).await, done(1, 2));
    assert_eq!(bench.members("joined").await, users(&["d", "用户"]));
    let page = bench.inbox.members(topic("joined"), Some(user("d")), 10).await.unwrap();
    assert_eq!(page, Some(users(&["用户"])));
    let page = bench.inbox.members(topic("joined"), None, 1).await.unwrap();
    assert_eq!(page, Some(users(&["d"])));
}

pub(super) async fn a_list_is_read_once_for_each_version(bench: &Bench) {
    assert_eq!(bench.inbox.recipients(topic("read"), None).await.unwrap(), TopicRecipients::NoTopic);
    let made = bench.make("read").await;
    let known = TopicRecipients::Known(made.clone());
    assert_eq!(bench.inbox.recipients(topic("read"), Some(made.version)).await.unwrap(), known);
    bench.change("read", &["a", "b"], &[]).await;
    let asked = bench.inbox.recipients(topic("read"), Some(made.version)).await.unwrap();
    let TopicRecipients::Read(read, mut members) = asked else { panic!("{asked:?}") };
    members.sort();
    assert_eq!(members, users(&["a", "b"]));
    assert_eq!(read.version, bench.version("read").await);
    // The same name in another life has other members, and another version.
    bench.inbox.remove(topic("read")).await.unwrap();
    assert_eq!(
        bench.inbox.recipients(topic("read"), Some(read.version)).await.unwrap(),
        TopicRecipients::NoTopic
    );
    bench.make("read").await;
    let anew = bench.inbox.recipients(topic("read"), Some(read.version)).await.unwrap();
    assert!(matches!(anew, TopicRecipients::Read(_, none) if none.is_empty()));
}

pub(super) async fn a_name_that_is_made_anew_has_no_members(bench: &Bench) {
    bench.make("anew").await;
    bench.change("anew", &["a", "b"], &[]).await;
    bench.inbox.remove(topic("anew")).await.unwrap();
    assert_eq!(bench.change("anew", &["c"], &[]).await, MembersChanged::NoTopic);
    bench.make("anew").await;
    assert_eq!(bench.members("anew").await, users(&[]));
    assert_eq!(bench.inbox.topics_of(user("a")).await.unwrap(), []);
    assert_eq!(bench.change("anew", &["a"], &["b"]).await, done(1, 0), "rows of an earlier life are none");
    bench.inbox.run_once().await.unwrap();
    assert_eq!(bench.members("anew").await, users(&["a"]), "upkeep removes the others alone");
    bench.inbox.remove(topic("anew")).await.unwrap();
    bench.inbox.run_once().await.unwrap();
    assert_eq!(bench.inbox.count_members(topic("anew")).await.unwrap(), 0);
}

pub(super) async fn a_user_has_topics_in_order(bench: &Bench) {
    for name in ["of.b", "of", "of.a", "of.c"] {
        bench.make(name).await;
        bench.change(name, &["many", "many2", "man"], &[]).await;
    }
    bench.change("of.b", &[], &["many"]).await;
    bench.inbox.remove(topic("of.c")).await.unwrap();
    let names = async |name: &str| -> Vec<String> {
        let found = bench.inbox.topics_of(user(name)).await.unwrap();
        found.iter().map(|topic| topic.name.to_string()).collect()
    };
    assert_eq!(names("many").await, ["of", "of.a"]);
    assert_eq!(names("many2").await, ["of", "of.a", "of.b"]);
    assert_eq!(names("man").await, ["of", "of.a", "of.b"]);
}

pub(super) async fn a_topic_is_full_at_its_limit(bench: &Bench) {
    bench.make("full").await;
    let names: Vec<String> = (0..=INBOX_MEMBERS).map(|n| format!("full-{n:04}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let changed = bench.change("full", &names, &[]).await;
    let MembersChanged::Done { added, refused, .. } = changed else { panic!("{changed:?}") };
    assert_eq!((added, refused.len()), (INBOX_MEMBERS as u64, 1));
    let members = bench.inbox.count_members(topic("full")).await.unwrap();
    assert_eq!(members, INBOX_MEMBERS as u64);
    let late = refused[0].0.as_str();
    assert_eq!(bench.change("full", &[late], &[names[1]]).await, done(1, 1), "one leaves, one joins");
}

pub(super) async fn an_id_by_a_topic_is_another_one(bench: &Bench) {
    let direct = Append { deduplicated: true, ..bench.message("via", "same", "1", DAY_S) };
    let via = |name: &str| Some(Arc::new(Via::Inbox(topic(name))));
    let by = |name: &str| Append { via: via(name), ..direct.clone() };
    let outcomes =
        bench.append(vec![direct.clone(), by("news"), by("news.more"), by("news"), direct.clone()]).await;
    let seq = |n: usize| match &outcomes[n] {
        Appended::Stored(message) => message.seq,
        other => panic!("not stored: {other:?}"),
    };
    assert_eq!((seq(1), seq(2)), (seq(0).next(), seq(0).next().next()));
    assert_eq!(outcomes[3], Appended::Duplicate(seq(1)));
    assert_eq!(outcomes[4], Appended::Duplicate(seq(0)));
    assert_eq!(bench.append(vec![by("news")]).await, [Appended::Duplicate(seq(1))]);
    let other = Append { payload: "2".into(), ..by("news.more") };
    assert_eq!(bench.append(vec![other]).await, [Appended::Conflict]);
    let page = bench.page("via", Seq::BEGINNING, WIDE).await;
    let came: Vec<_> = page.messages.iter().map(|message| message.via.clone()).collect();
    assert_eq!(came, [None, via("news"), via("news.more")]);
    let evented = Append { event: Some(crate::message::EventName::parse("e").unwrap()), ..by("both") };
    bench.append(vec![evented]).await;
    let last = bench.page("via", seq(2), WIDE).await.messages.remove(0);
    assert_eq!((last.via, last.event.is_some(), last.payload), (via("both"), true, "1".into()));
}

pub(super) async fn a_topic_keeps_its_delivery(bench: &Bench) {
    let as_log = TopicSettings { delivery: Some(Delivery::Log), ..settings(Some(60)) };
    let PutTopic::Created(log) = bench.inbox.put(topic("keeps.log"), as_log).await.unwrap() else { panic!() };
    assert_eq!((log.delivery, log.ttl_s), (Delivery::Log, 60));
    let as_inbox = TopicSettings { delivery: Some(Delivery::Inbox), ..settings(Some(70)) };
    let other = PutTopic::Other(log.clone());
    assert_eq!(bench.inbox.put(topic("keeps.log"), as_inbox).await.unwrap(), other, "nor its life");
    assert_eq!(
        bench.inbox.put(topic("keeps.log"), settings(None)).await.unwrap(),
        PutTopic::Known(log.clone())
    );
    let recipients = bench.inbox.recipients(topic("keeps.log"), None).await.unwrap();
    assert_eq!(recipients, TopicRecipients::Log(log.clone()));
    let of_other_kind = bench.change("keeps.log", &["a"], &[]).await;
    assert_eq!(of_other_kind, MembersChanged::Ended, "members of a log have a beginning");
    let inbox = bench.make("keeps.inbox").await;
    assert_eq!(inbox.delivery, Delivery::Inbox);
    let change = MembersChange { add: users(&["a"]), remove: vec![], from: Some(Seq::at(1)) };
    let changed = bench.inbox.change_members(topic("keeps.inbox"), change).await.unwrap();
    assert_eq!(changed, MembersChanged::Ended);
    let named = ["keeps.inbox", "keeps.none", "keeps.log"].map(topic).to_vec();
    assert_eq!(bench.inbox.topics_named(named).await.unwrap(), [Some(inbox), None, Some(log)]);
}
