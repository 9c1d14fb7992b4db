//! Topics in a real MongoDB that several processes change at the same moment.

use std::collections::BTreeSet;
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use ringpush::clock::Clock;
use ringpush::inbox::mongo::{MongoInbox, MongoTimes};
use ringpush::inbox::topics::{
    MembersChange, MembersChanged, MembersVersion, PutTopic, TopicRecipients, TopicSettings, Topics,
};
use ringpush::message::{Seq, TopicName, UserId};
use ringpush::topic::{Delivery, INBOX_MEMBERS};

use ringpush_testing::foreign::ReplicaSet;

use crate::replica_set::{open, users};

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).unwrap()
}

async fn make(inbox: &MongoInbox, name: &str) -> PutTopic {
    let settings = TopicSettings { delivery: Some(Delivery::Inbox), ttl_s: None, default_ttl_s: 60 };
    inbox.put(topic(name), settings).await.unwrap()
}

async fn members(inbox: &MongoInbox, name: &str) -> BTreeSet<UserId> {
    inbox.members(topic(name), None, 100_000).await.unwrap().unwrap().into_iter().collect()
}

/// A process as collect is one: it keeps the list that it has read.
#[derive(Default)]
struct Kept {
    list: Option<(MembersVersion, BTreeSet<UserId>)>,
}

impl Kept {
    async fn read(&mut self, inbox: &MongoInbox, name: &str) -> BTreeSet<UserId> {
        let known = self.list.as_ref().map(|list| list.0);
        match inbox.recipients(topic(name), known).await.unwrap() {
            TopicRecipients::NoTopic | TopicRecipients::Log(_) => BTreeSet::new(),
            TopicRecipients::Known(_) => self.list.as_ref().unwrap().1.clone(),
            TopicRecipients::Read(topic, users) => {
                let users: BTreeSet<UserId> = users.into_iter().collect();
                self.list = Some((topic.version, users.clone()));
                users
            }
        }
    }
}

/// Joins and leaves of one's own users, one after another; after each answer a reader that keeps
/// its list must see it.
async fn come_and_go(inbox: MongoInbox, name: &'static str, own: Vec<UserId>, seed: u64) -> BTreeSet<UserId> {
    let mut random = StdRng::seed_from_u64(seed);
    let (mut joined, mut kept) = (BTreeSet::new(), Kept::default());
    for _ in 0..60 {
        let mut change = MembersChange::default();
        for user in &own {
            match random.random_range(0..4) {
                0 => change.add.push(user.clone()),
                1 => change.remove.push(user.clone()),
                _ => {}
            }
        }
        if change.add.is_empty() && change.remove.is_empty() {
            continue;
        }
        joined.retain(|user| !change.remove.contains(user));
        joined.extend(change.add.iter().cloned());
        let done = inbox.change_members(topic(name), change).await.unwrap();
        assert!(matches!(done, MembersChanged::Done { .. }), "{done:?}");
        let seen: BTreeSet<UserId> =
            kept.read(&inbox, name).await.into_iter().filter(|user| own.contains(user)).collect();
        assert_eq!(seen, joined, "an old list stands under a new version");
    }
    joined
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_was_answered_is_seen_whoever_else_changes_the_topic() {
    let set = ReplicaSet::start(1).await;
    let one = open(&set.uri(), "topics", MongoTimes::default(), Clock::system()).await;
    let two = open(&set.uri(), "topics", MongoTimes::default(), Clock::system()).await;
    let (first, second) = tokio::join!(make(&one, "team"), make(&two, "team"));
    let created = [&first, &second].into_iter().filter(|made| matches!(made, PutTopic::Created(_)));
    assert_eq!(created.count(), 1, "{first:?} {second:?}");
    let all = tokio::join!(
        tokio::spawn(come_and_go(one.clone(), "team", users("a", 6), 1)),
        tokio::spawn(come_and_go(two.clone(), "team", users("b", 6), 2)),
        tokio::spawn(come_and_go(two.clone(), "team", users("c", 6), 3)),
    );
    let expected: BTreeSet<UserId> = [all.0, all.1, all.2].into_iter().flat_map(Result::unwrap).collect();
    assert_eq!(members(&one, "team").await, expected);
    assert_eq!(one.count_members(topic("team")).await.unwrap(), expected.len() as u64);
}

/// What a session knows of the topics with a log of its user: a list, and the number of changes
/// under which it was read. It reads the list again where the number has changed.
#[derive(Default)]
struct Session {
    version: u64,
    topics: BTreeSet<TopicName>,
}

impl Session {
    async fn look(&mut self, inbox: &MongoInbox, user: &UserId) {
        let found = inbox.log_memberships(vec![user.clone()]).await.unwrap().remove(0);
        if found.version != self.version {
            let topics = found.logs.into_iter().map(|row| row.topic).collect();
            *self = Self { version: found.version, topics };
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_keeps_its_list_sees_every_change_that_was_answered() {
    let set = ReplicaSet::start(1).await;
    let inbox = open(&set.uri(), "topics", MongoTimes::default(), Clock::system()).await;
    let (alice, names) = (users("alice", 1).remove(0), (0..20).map(|n| format!("news-{n}")));
    let names: Vec<String> = names.collect();
    for name in &names {
        let settings = TopicSettings { delivery: Some(Delivery::Log), ttl_s: None, default_ttl_s: 60 };
        inbox.put(topic(name), settings).await.unwrap();
    }
    let session = Arc::new(tokio::sync::Mutex::new(Session::default()));
    let looks = {
        let (inbox, session, alice) = (inbox.clone(), Arc::clone(&session), alice.clone());
        tokio::spawn(async move {
            loop {
                session.lock().await.look(&inbox, &alice).await;
                tokio::task::yield_now().await;
            }
        })
    };
    for (round, is_member) in [(1, true), (2, false), (3, true)] {
        for name in &names {
            let mut change = MembersChange { from: Some(Seq::at(round)), ..MembersChange::default() };
            if is_member { &mut change.add } else { &mut change.remove }.push(alice.clone());
            let done = inbox.change_members(topic(name), change).await.unwrap();
            assert!(matches!(done, MembersChanged::Done { .. }), "{done:?}");
            let mut session = session.lock().await;
            session.look(&inbox, &alice).await;
            assert_eq!(session.topics.contains(&topic(name)), is_member, "{name} in round {round}");
        }
    }
    looks.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_crowds_that_join_at_once_each_user_is_told_whether_it_is_a_member() {
    let set = ReplicaSet::start(1).await;
    let inbox = open(&set.uri(), "topics", MongoTimes::default(), Clock::system()).await;
    make(&inbox, "crowd").await;
    let joining = (0..4).map(|n| {
        let (inbox, add) = (inbox.clone(), users(&format!("crowd-{n}"), 400));
        tokio::spawn(async move {
            let change = MembersChange { add, remove: Vec::new(), from: None };
            inbox.change_members(topic("crowd"), change).await.unwrap()
        })
    });
    let (mut sum, mut all_refused) = (0, BTreeSet::new());
    for done in futures_util::future::join_all(joining).await {
        let MembersChanged::Done { added, refused, .. } = done.unwrap() else { panic!("it was not removed") };
        assert_eq!(added + refused.len() as u64, 400);
        sum += added;
        all_refused.extend(refused.into_iter().map(|(user, _)| user));
    }
    let members = members(&inbox, "crowd").await;
    // The limit is checked before the rows are written, so crowds may exceed it.
    assert!(members.len() >= INBOX_MEMBERS, "{}", members.len());
    assert_eq!(members.len() as u64, sum);
    let late = MembersChange { add: users("late", 1), remove: Vec::new(), from: None };
    let refused = inbox.change_members(topic("crowd"), late).await.unwrap();
    assert!(matches!(refused, MembersChanged::Done { added: 0, .. }), "{refused:?}");
    assert!(members.is_disjoint(&all_refused), "who was refused is no member");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_removed_and_made_anew_under_joins_keeps_nobody_of_before() {
    let set = ReplicaSet::start(1).await;
    let inbox = open(&set.uri(), "topics", MongoTimes::default(), Clock::system()).await;
    make(&inbox, "phoenix").await;
    let joining = {
        let inbox = inbox.clone();
        tokio::spawn(async move {
            let (mut told, everybody) = (0, users("p", 150));
            for user in everybody {
                let change = MembersChange { add: vec![user], remove: Vec::new(), from: None };
                let done = inbox.change_members(topic("phoenix"), change).await.unwrap();
                told += u32::from(!matches!(done, MembersChanged::Done { .. }));
            }
            told
        })
    };
    let (mut lives, mut kept) = (BTreeSet::new(), Kept::default());
    while !joining.is_finished() {
        assert!(inbox.remove(topic("phoenix")).await.unwrap());
        assert!(kept.read(&inbox, "phoenix").await.is_empty(), "a removed topic has no members");
        let PutTopic::Created(made) = make(&inbox, "phoenix").await else { panic!("it was removed") };
        assert!(lives.insert(made.version.life), "a life was given twice");
        tokio::task::yield_now().await;
    }
    assert!(joining.await.unwrap() > 0, "no join met a removal");
    // All joins are over, so whoever is a member now has joined this life.
    inbox.remove(topic("phoenix")).await.unwrap();
    make(&inbox, "phoenix").await;
    assert!(members(&inbox, "phoenix").await.is_empty());
    assert!(kept.read(&inbox, "phoenix").await.is_empty());
}
