//! The logs of topics, their members, and positions in them.

use std::sync::Arc;

use super::{Bench, DAY_S, WIDE, numbers, user};
use crate::inbox::logs::key;
use crate::inbox::topics::{
    LogMembership, MemberRefusal, MembersChange, MembersChanged, PutTopic, TopicSettings,
};
use crate::inbox::{Append, Appended, CURSOR_LIFE_MS, Change, StartAt};
use crate::message::{DeviceId, LogEntry, LogId, Message, Seq, TopicName, UserId, Via};
use crate::topic::{Delivery, LOG_TOPICS};

fn topic(name: &str) -> TopicName {
    TopicName::parse(name).unwrap()
}

fn log(name: &str) -> LogId {
    LogId::Topic(topic(name))
}

impl Bench {
    /// Makes a topic with a log. Returns its life.
    async fn make_log(&self, name: &str) -> u64 {
        let settings = TopicSettings { delivery: Some(Delivery::Log), ttl_s: None, default_ttl_s: DAY_S };
        match self.inbox.put(topic(name), settings).await.unwrap() {
            PutTopic::Created(topic) => topic.version.life,
            other => panic!("it was there: {other:?}"),
        }
    }

    async fn publish(&self, to: &LogId, life: u64, id: &str, payload: &str) -> Appended {
        let via = Some(Arc::new(Via::Log(LogEntry { life, except: vec![user("eve")] })));
        let item = Append { user: key(to), deduplicated: true, via, ..self.message("x", id, payload, DAY_S) };
        self.logs.store().append(vec![item]).await.remove(0).unwrap()
    }

    async fn change_log(&self, name: &str, add: &[&str], remove: &[&str], from: Seq) -> MembersChanged {
        let users = |names: &[&str]| names.iter().map(|name| user(name)).collect();
        let change = MembersChange { add: users(add), remove: users(remove), from: Some(from) };
        self.inbox.change_members(topic(name), change).await.unwrap()
    }

    /// How often the memberships of a user have changed, as a session that attaches is told.
    async fn changes(&self, name: &str) -> u64 {
        self.ask(name, StartAt::Latest).await.memberships
    }
}

fn stored(outcome: Appended) -> Arc<Message> {
    match outcome {
        Appended::Stored(message) => message,
        other => panic!("not stored: {other:?}"),
    }
}

pub(super) async fn a_log_is_apart_from_inboxes_and_numbered_like_one(bench: &Bench) {
    let (life, of) = (bench.make_log("apart").await, log("apart"));
    // A user of the same name, and everyone.
    bench.put("apart", "1", DAY_S).await;
    bench.put("*", "1", DAY_S).await;
    let head = bench.logs.head(&of).await.unwrap();
    let first = stored(bench.publish(&of, life, "1", "1").await);
    let second = stored(bench.publish(&of, life, "2", "2").await);
    assert_eq!((first.seq, second.seq), (head.next(), head.next().next()), "numbers go on above the head");
    assert_eq!(bench.publish(&of, life, "2", "2").await, Appended::Duplicate(second.seq));
    assert_eq!(bench.publish(&of, life, "2", "3").await, Appended::Conflict);
    let page = bench.logs.page(&of, life, Seq::BEGINNING, WIDE).await.unwrap();
    assert_eq!(numbers(&page), [first.seq, second.seq]);
    assert_eq!(page.messages[0].log_entry(), Some(&LogEntry { life, except: vec![user("eve")] }));
    assert_eq!(bench.logs.head(&of).await.unwrap(), second.seq);
    let all = stored(bench.publish(&LogId::Everyone, 0, "1", "1").await);
    let page = bench.logs.page(&LogId::Everyone, 0, Seq::BEGINNING, WIDE).await.unwrap();
    assert_eq!(numbers(&page), [all.seq]);
    assert_eq!(bench.page("apart", Seq::BEGINNING, WIDE).await.messages.len(), 1);
    let asked = vec![(of.clone(), StartAt::After(first.seq)), (of, StartAt::After(second.seq))];
    let answers = bench.logs.positions(asked).await.unwrap();
    assert_eq!(answers.iter().map(|answer| answer.more).collect::<Vec<_>>(), [true, false]);
}

pub(super) async fn a_message_is_for_its_own_life_alone(bench: &Bench) {
    let (first_life, of) = (bench.make_log("lives").await, log("lives"));
    let first = stored(bench.publish(&of, first_life, "id", "1").await);
    bench.inbox.remove(topic("lives")).await.unwrap();
    let life = bench.make_log("lives").await;
    assert!(life > first_life);
    // A publish that crosses the removal.
    let late = stored(bench.publish(&of, first_life, "late", "2").await);
    let second = stored(bench.publish(&of, life, "id", "3").await);
    assert_eq!((late.seq, second.seq), (first.seq.next(), late.seq.next()), "numbers go on");
    let page = bench.logs.page(&of, life, Seq::BEGINNING, WIDE).await.unwrap();
    assert_eq!((numbers(&page), page.upto), (vec![second.seq], second.seq));
    let page = bench.logs.page(&of, first_life, first.seq, WIDE).await.unwrap();
    assert_eq!((numbers(&page), page.upto), (vec![late.seq], late.seq), "what follows is not passed over");
    assert!(page.more);
    let page = bench.logs.page(&of, first_life, late.seq, WIDE).await.unwrap();
    assert_eq!((numbers(&page), page.upto, page.more), (vec![], late.seq, true), "that life is over");
}

pub(super) async fn a_message_can_end_before_its_time(bench: &Bench) {
    let (life, of) = (bench.make_log("ends").await, log("ends"));
    let mut seqs = Vec::new();
    for id in ["1", "2", "3"] {
        seqs.push(stored(bench.publish(&of, life, id, "1").await).seq);
    }
    let end = |seq| Change::End { user: key(&of), seq, at: bench.clock.now() };
    bench.logs.store().update(vec![end(seqs[1]), end(seqs[2].next())]).await.unwrap();
    let page = bench.logs.page(&of, life, Seq::BEGINNING, WIDE).await.unwrap();
    assert_eq!((numbers(&page), page.upto), (vec![seqs[0], seqs[2]], seqs[2]));
    assert_eq!(stored(bench.publish(&of, life, "4", "1").await).seq, seqs[2].next(), "numbers go on");
    bench.logs.store().update(vec![end(seqs[2].next())]).await.unwrap();
    let page = bench.logs.page(&of, life, seqs[2], WIDE).await.unwrap();
    assert_eq!((numbers(&page), page.upto), (vec![], seqs[2].next()), "also the newest one");
}

pub(super) async fn members_of_a_log_have_a_beginning_and_users_a_number_of_changes(bench: &Bench) {
    let life = bench.make_log("begins").await;
    assert_eq!(bench.changes("begins-a").await, 0);
    let from = bench.logs.head(&log("begins")).await.unwrap();
    let joined = bench.change_log("begins", &["begins-a", "begins-b"], &[], from).await;
    assert_eq!(joined, MembersChanged::Done { added: 2, removed: 0, refused: vec![] });
    let first = bench.changes("begins-a").await;
    assert!(first > 0);
    let of = async |name: &str| {
        bench.inbox.log_memberships(vec![user("begins-none"), user(name)]).await.unwrap().remove(1)
    };
    let member = |life, from| LogMembership { topic: topic("begins"), life, from };
    assert_eq!((of("begins-a").await.version, of("begins-a").await.logs), (first, vec![member(life, from)]));
    // Again: the row stands as it is, and the number rises.
    bench.change_log("begins", &["begins-a"], &["begins-c"], from.next()).await;
    assert_eq!(of("begins-a").await.logs, [member(life, from)]);
    assert!(bench.changes("begins-a").await > first && bench.changes("begins-c").await > 0);
    bench.change_log("begins", &[], &["begins-a"], from).await;
    assert_eq!(of("begins-a").await.logs, []);
    bench.change_log("begins", &["begins-a"], &[], from.next()).await;
    assert_eq!(of("begins-a").await.logs, [member(life, from.next())], "who comes back begins anew");
    // A topic of the other kind is none of these.
    let settings = TopicSettings { delivery: None, ttl_s: None, default_ttl_s: DAY_S };
    bench.inbox.put(topic("begins.inbox"), settings).await.unwrap();
    let change = MembersChange { add: vec![user("begins-a")], ..MembersChange::default() };
    bench.inbox.change_members(topic("begins.inbox"), change).await.unwrap();
    assert_eq!(of("begins-a").await.logs.len(), 1);
    let names = bench.inbox.topics_of(user("begins-a")).await.unwrap();
    assert_eq!(names.len(), 2);
    // Another life has no members.
    bench.inbox.remove(topic("begins")).await.unwrap();
    assert_eq!(of("begins-b").await.logs, []);
    let life = bench.make_log("begins").await;
    assert_eq!(of("begins-b").await.logs, []);
    bench.change_log("begins", &["begins-b"], &[], from.next().next()).await;
    assert_eq!(of("begins-b").await.logs, [member(life, from.next().next())]);
    bench.inbox.run_once().await.unwrap();
    assert_eq!(of("begins-b").await.logs.len(), 1, "upkeep removes the others alone");
}

pub(super) async fn a_member_of_a_hundred_logs_joins_no_other(bench: &Bench) {
    for n in 0..=LOG_TOPICS {
        let name = format!("many{n}");
        bench.make_log(&name).await;
        let joined = bench.change_log(&name, &["many-logs"], &[], Seq::at(1)).await;
        let refused =
            if n < LOG_TOPICS { vec![] } else { vec![(user("many-logs"), MemberRefusal::TooManyLogs)] };
        assert_eq!(joined, MembersChanged::Done { added: u64::from(n < LOG_TOPICS), removed: 0, refused });
    }
    bench.inbox.remove(topic("many0")).await.unwrap();
    let joined = bench.change_log("many100", &["many-logs"], &[], Seq::at(1)).await;
    assert_eq!(joined, MembersChanged::Done { added: 1, removed: 0, refused: vec![] });
}

pub(super) async fn positions_only_rise_and_go_with_the_device(bench: &Bench) {
    let device = |name: &str| DeviceId::parse(name).unwrap();
    let of = async |name: &str| {
        let other = (user("stands"), device("no-such-device"));
        let devices = vec![other.clone(), (user("stands"), device(name)), other];
        let mut found = bench.inbox.log_positions(devices).await.unwrap();
        assert_eq!(found.len(), 3, "one answer for each, in the order of the questions");
        assert_eq!((&found[0], &found[2]), (&vec![], &vec![]));
        let mut found = found.swap_remove(1);
        found.sort();
        found
    };
    let put = async |name: &str, logs: Vec<(LogId, Seq)>| {
        let change = Change::Positions { user: user("stands"), device: device(name), logs };
        bench.inbox.update(vec![change]).await.unwrap();
    };
    assert_eq!(of("web").await, []);
    let dotted = [(log("a"), Seq::at(7)), (log("a.b"), Seq::at(8)), (LogId::Everyone, Seq::at(9))];
    put("web", dotted.to_vec()).await;
    put("web-1", vec![(log("a"), Seq::at(1))]).await;
    put("web", vec![(log("a"), Seq::at(6)), (LogId::Everyone, Seq::at(10))]).await;
    let risen = [(log("a"), Seq::at(7)), (log("a.b"), Seq::at(8)), (LogId::Everyone, Seq::at(10))];
    assert_eq!(of("web").await, risen);
    assert_eq!(of("web-1").await, [(log("a"), Seq::at(1))]);
    bench.ack("stands", "web", Seq::at(3)).await;
    assert_eq!(of("web").await, risen, "the cursor of the inbox stands beside them");
    bench.clock.advance(CURSOR_LIFE_MS);
    bench.inbox.run_once().await.unwrap();
    assert_eq!(of("web").await, []);
    put("web", vec![(log("a"), Seq::at(2))]).await;
    assert_eq!(of("web").await, [(log("a"), Seq::at(2))]);
    bench.inbox.forget(user("stands")).await.unwrap();
    assert_eq!(of("web").await, []);
    let names: Vec<UserId> = vec![user("stands")];
    assert_eq!(bench.inbox.log_memberships(names).await.unwrap().len(), 1);
}
