//! The conformance suite of the inbox: what every adapter must do. A failed expectation panics, as
//! in any test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

mod expiry;
mod logs;
mod topics;

use std::sync::Arc;

use bytes::Bytes;

use expiry::{
    a_page_passes_over_no_more_than_is_said, a_user_is_forgotten_and_numbers_go_on,
    an_expired_original_gives_up_its_id, expired_messages_are_not_shown_and_not_renumbered,
    pages_are_cut_by_count_and_by_bytes, removal_keeps_numbers_dense_for_ever,
    removal_stops_at_the_first_that_lives,
};

use super::{
    Append, Appended, CURSOR_LIFE_MS, Change, DEVICES_PER_USER, Inbox, InboxPage, Janitor, Logs, PageLimit,
    PositionQuery, Sought, StartAt, Topics, UserPosition,
};
use crate::clock::Clock;
use crate::message::{DeviceId, EventName, Message, MessageId, Seq, TopicName, UserId, Via};
use crate::trace::TraceParent;

/// An adapter under test: all three ports.
pub trait Adapter: Inbox + Janitor + Topics {}
impl<T: Inbox + Janitor + Topics> Adapter for T {}

/// An adapter with a standing clock. Each part uses users of its own, so one store serves the whole
/// suite.
pub struct Bench {
    /// The adapter.
    pub inbox: Arc<dyn Adapter>,
    /// Its store of logs.
    pub logs: Logs,
    /// Its clock, a standing one.
    pub clock: Clock,
}

const WIDE: PageLimit = PageLimit { messages: 1000, bytes: 1 << 20 };
const DAY_S: u64 = 24 * 3600;

/// Runs every part.
pub async fn suite(bench: &Bench) {
    numbers_are_dense_and_start_above_the_moment(bench).await;
    a_batch_keeps_its_order_and_its_users_apart(bench).await;
    a_repeat_is_stored_once_and_a_conflict_is_told(bench).await;
    an_event_comes_back_and_another_one_is_a_conflict(bench).await;
    a_trace_comes_back_and_makes_no_conflict(bench).await;
    a_device_that_begins_has_a_cursor_also_at_zero(bench).await;
    an_expired_original_gives_up_its_id(bench).await;
    pages_are_cut_by_count_and_by_bytes(bench).await;
    expired_messages_are_not_shown_and_not_renumbered(bench).await;
    a_page_passes_over_no_more_than_is_said(bench).await;
    removal_keeps_numbers_dense_for_ever(bench).await;
    removal_stops_at_the_first_that_lives(bench).await;
    a_user_is_forgotten_and_numbers_go_on(bench).await;
    standing_is_exact(bench).await;
    a_question_about_an_unknown_user_fixes_its_numbers(bench).await;
    cursors_only_rise(bench).await;
    the_longest_unused_device_goes(bench).await;
    unused_cursors_go_in_the_end(bench).await;
    revocations_only_rise(bench).await;
    names_that_are_prefixes_of_others_do_not_mix(bench).await;
    concurrent_appends_stay_dense(bench).await;
    topics::a_topic_is_made_once_and_its_name_can_be_used_again(bench).await;
    topics::topics_are_listed_in_order(bench).await;
    topics::members_join_and_leave(bench).await;
    topics::a_list_is_read_once_for_each_version(bench).await;
    topics::a_name_that_is_made_anew_has_no_members(bench).await;
    topics::a_user_has_topics_in_order(bench).await;
    topics::a_topic_is_full_at_its_limit(bench).await;
    topics::an_id_by_a_topic_is_another_one(bench).await;
    topics::a_topic_keeps_its_delivery(bench).await;
    logs::a_log_is_apart_from_inboxes_and_numbered_like_one(bench).await;
    a_stored_message_is_found_by_number_and_by_its_senders_id(bench).await;
    logs::a_message_is_for_its_own_life_alone(bench).await;
    logs::a_message_can_end_before_its_time(bench).await;
    logs::members_of_a_log_have_a_beginning_and_users_a_number_of_changes(bench).await;
    logs::a_member_of_a_hundred_logs_joins_no_other(bench).await;
    logs::positions_only_rise_and_go_with_the_device(bench).await;
}

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

impl Bench {
    fn message(&self, name: &str, id: &str, payload: &str, ttl_s: u64) -> Append {
        let now = self.clock.now();
        Append {
            trace: None,
            append_id: None,
            user: user(name),
            id: MessageId::parse(id).unwrap(),
            deduplicated: false,
            accepted_at: now,
            expires_at: now.plus_seconds(ttl_s),
            event: None,
            via: None,
            payload: Bytes::copy_from_slice(payload.as_bytes()),
        }
    }

    async fn append(&self, batch: Vec<Append>) -> Vec<Appended> {
        self.inbox
            .append(batch)
            .await
            .into_iter()
            .map(|outcome| outcome.expect("the store takes it"))
            .collect()
    }

    async fn put(&self, name: &str, payload: &str, ttl_s: u64) -> Seq {
        match self.append(vec![self.message(name, "m", payload, ttl_s)]).await.remove(0) {
            Appended::Stored(message) => message.seq,
            other => panic!("not stored: {other:?}"),
        }
    }

    async fn put_fenced(&self, name: &str, id: &str, payload: &str, ttl_s: u64) -> Appended {
        let item = Append { deduplicated: true, ..self.message(name, id, payload, ttl_s) };
        self.append(vec![item]).await.remove(0)
    }

    async fn page(&self, name: &str, after: Seq, limit: PageLimit) -> InboxPage {
        self.inbox.page(user(name), after, limit).await.unwrap()
    }

    async fn ask(&self, name: &str, from: StartAt) -> UserPosition {
        self.inbox.positions(vec![PositionQuery { user: user(name), from }]).await.unwrap().remove(0)
    }

    /// Sees what has expired, and removes it an hour later. Returns how many messages were removed.
    async fn removes_expired(&self) -> u64 {
        self.clock.advance(10_000);
        let mut removed = self.inbox.run_once().await.unwrap();
        self.clock.advance(3_600_000);
        removed += self.inbox.run_once().await.unwrap();
        removed
    }

    async fn ack(&self, name: &str, device: &str, acked: Seq) {
        let device = DeviceId::parse(device).unwrap();
        self.inbox.update(vec![Change::Cursor { user: user(name), device, acked }]).await.unwrap();
    }
}

fn stored(outcome: &Appended) -> &Message {
    match outcome {
        Appended::Stored(message) => message,
        other => panic!("not stored: {other:?}"),
    }
}

fn numbers(page: &InboxPage) -> Vec<Seq> {
    page.messages.iter().map(|m| m.seq).collect()
}

async fn numbers_are_dense_and_start_above_the_moment(bench: &Bench) {
    let now = bench.clock.now();
    let first = bench.put("dense", "1", DAY_S).await;
    assert_eq!(first.get(), now.0 + 1);
    for n in 1..5 {
        assert_eq!(bench.put("dense", "2", DAY_S).await.get(), first.get() + n);
    }
    let page = bench.page("dense", Seq::BEGINNING, WIDE).await;
    assert_eq!(page.messages.len(), 5);
    assert_eq!((page.upto.get(), page.more), (first.get() + 4, false));
    assert_eq!(page.messages[0].payload, "1");
    assert_eq!(page.messages[0].accepted_at, now);
    assert_eq!(page.messages[0].expires_at, now.plus_seconds(DAY_S));
}

async fn a_batch_keeps_its_order_and_its_users_apart(bench: &Bench) {
    let batch = ["a", "b", "a", "c", "a", "b"]
        .iter()
        .enumerate()
        .map(|(n, who)| bench.message(&format!("batch-{who}"), &format!("id-{n}"), &n.to_string(), DAY_S))
        .collect();
    let outcomes = bench.append(batch).await;
    let base = stored(&outcomes[0]).seq.get();
    assert_eq!(stored(&outcomes[2]).seq.get(), base + 1);
    assert_eq!(stored(&outcomes[4]).seq.get(), base + 2);
    let page = bench.page("batch-a", Seq::BEGINNING, WIDE).await;
    assert_eq!(page.messages.iter().map(|m| m.payload.clone()).collect::<Vec<_>>(), ["0", "2", "4"]);
    assert_eq!(page.messages.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["id-0", "id-2", "id-4"]);
}

async fn a_repeat_is_stored_once_and_a_conflict_is_told(bench: &Bench) {
    let first = stored(&bench.put_fenced("fenced", "order-17", "{}", DAY_S).await).seq;
    assert_eq!(bench.put_fenced("fenced", "order-17", "{}", DAY_S).await, Appended::Duplicate(first));
    assert_eq!(bench.put_fenced("fenced", "order-17", "{ }", DAY_S).await, Appended::Conflict);
    let other = bench.put_fenced("fenced-2", "order-17", "{}", DAY_S).await;
    assert!(matches!(other, Appended::Stored(_)), "another user's id is another id");
    let twice = Append { deduplicated: true, ..bench.message("fenced", "order-18", "[]", DAY_S) };
    let conflicting = Append { payload: Bytes::from_static(b"[1]"), ..twice.clone() };
    let outcomes = bench.append(vec![twice.clone(), twice, conflicting]).await;
    let seq = stored(&outcomes[0]).seq;
    assert_eq!(outcomes[1..], [Appended::Duplicate(seq), Appended::Conflict], "also within one batch");
    assert_eq!(bench.page("fenced", Seq::BEGINNING, WIDE).await.messages.len(), 2);
}

async fn an_event_comes_back_and_another_one_is_a_conflict(bench: &Bench) {
    let event = |name: &str| Some(EventName::parse(name).unwrap());
    let paid = Append {
        deduplicated: true,
        event: event("order.paid"),
        ..bench.message("evented", "e", "1", DAY_S)
    };
    let without = Append { event: None, ..paid.clone() };
    let shipped = Append { event: event("order:shipped"), ..paid.clone() };
    let outcomes = bench.append(vec![paid.clone()]).await;
    let seq = stored(&outcomes[0]).seq;
    let outcomes = bench.append(vec![paid, without, shipped]).await;
    assert_eq!(outcomes, [Appended::Duplicate(seq), Appended::Conflict, Appended::Conflict]);
    let page = bench.page("evented", Seq::BEGINNING, WIDE).await;
    assert_eq!(page.messages[0].event, event("order.paid"));
    assert_eq!(page.messages[0].payload, "1");
}

async fn a_trace_comes_back_and_makes_no_conflict(bench: &Bench) {
    let trace = |digit: &str| {
        let text = format!("00-{}-{}-01", digit.repeat(32), digit.repeat(16));
        TraceParent::parse(&text).map(Arc::new)
    };
    let traced = Append { deduplicated: true, trace: trace("a"), ..bench.message("traced", "t", "1", 5) };
    let again = Append { trace: trace("b"), ..traced.clone() };
    let outcomes = bench.append(vec![traced]).await;
    let first = stored(&outcomes[0]);
    assert_eq!(first.trace, trace("a"));
    assert_eq!(
        bench.append(vec![again]).await,
        [Appended::Duplicate(first.seq)],
        "a repeat has its own trace"
    );
    bench.put("traced", "2", DAY_S).await;
    let page = bench.page("traced", Seq::BEGINNING, WIDE).await;
    let traces: Vec<_> = page.messages.iter().map(|message| message.trace.clone()).collect();
    assert_eq!(traces, [trace("a"), None]);
    let found = bench.inbox.stored(user("traced"), Sought::At(first.seq)).await.unwrap();
    assert_eq!(found.unwrap().trace, trace("a"));
}

async fn a_device_that_begins_has_a_cursor_also_at_zero(bench: &Bench) {
    let device = DeviceId::parse("new").unwrap();
    let begin = |name: &str, at: Seq| Change::Begin { user: user(name), device: device.clone(), at };
    bench.inbox.update(vec![begin("begun-empty", Seq::BEGINNING)]).await.unwrap();
    let profile = bench.inbox.profile(user("begun-empty")).await.unwrap();
    assert_eq!(profile.cursors, [(device.clone(), Seq::BEGINNING)]);
    let first = bench.put("begun", "1", DAY_S).await;
    bench.inbox.update(vec![begin("begun", first)]).await.unwrap();
    bench.put("begun", "2", DAY_S).await;
    let position = bench.ask("begun", StartAt::Cursor(device.clone())).await;
    assert_eq!((position.start, position.more), (first, true));
    bench.inbox.update(vec![begin("begun", Seq::BEGINNING)]).await.unwrap();
    assert_eq!(bench.ask("begun", StartAt::Cursor(device)).await.start, first, "it is never lowered");
}

async fn standing_is_exact(bench: &Bench) {
    let first = bench.put("standing", "1", DAY_S).await;
    let second = bench.put("standing", "2", DAY_S).await;
    let batch =
        [StartAt::After(Seq::BEGINNING), StartAt::After(first), StartAt::After(second), StartAt::Latest]
            .map(|from| PositionQuery { user: user("standing"), from });
    let answers = bench.inbox.positions(batch.to_vec()).await.unwrap();
    assert_eq!(answers.iter().map(|a| a.more).collect::<Vec<_>>(), [true, true, false, false]);
    assert!(answers.iter().all(|a| if a.more { a.head > a.start } else { a.head == second }));
    assert_eq!(answers[3].start, second);
    let above = bench.ask("standing", StartAt::After(Seq::at(second.get() + 50))).await;
    assert_eq!((above.start.get(), above.head, above.more), (second.get() + 50, second, false));
}

async fn a_question_about_an_unknown_user_fixes_its_numbers(bench: &Bench) {
    assert_eq!(bench.inbox.profile(user("new")).await.unwrap().head, None);
    let answer = bench.ask("new", StartAt::Latest).await;
    assert_eq!(
        (answer.start, answer.more),
        (Seq::BEGINNING, false),
        "where nothing ever was, the end is the beginning"
    );
    assert!(!bench.ask("new", StartAt::After(Seq::BEGINNING)).await.more);
    bench.clock.advance(5_000);
    assert_eq!(bench.inbox.profile(user("new")).await.unwrap().head, None, "no message was ever there");
    assert_eq!(bench.put("new", "1", DAY_S).await, answer.head.next(), "latest means the very next");
    assert!(bench.ask("new", StartAt::After(Seq::BEGINNING)).await.more);
}

async fn cursors_only_rise(bench: &Bench) {
    let first = bench.put("acked", "1", DAY_S).await;
    let second = bench.put("acked", "2", DAY_S).await;
    let device = || StartAt::Cursor(DeviceId::parse("web").unwrap());
    let before = bench.ask("acked", device()).await;
    assert_eq!((before.start, before.more), (Seq::BEGINNING, true));
    bench.ack("acked", "web", first).await;
    let after = bench.ask("acked", device()).await;
    assert_eq!((after.start, after.more), (first, true));
    bench.ack("acked", "web", second).await;
    bench.ack("acked", "web", first).await;
    assert_eq!(bench.ask("acked", device()).await.start, second);
    bench.ack("acked", "app", first).await;
    let profile = bench.inbox.profile(user("acked")).await.unwrap();
    let device = |name: &str| DeviceId::parse(name).unwrap();
    assert_eq!(profile.cursors, [(device("app"), first), (device("web"), second)]);
}

async fn the_longest_unused_device_goes(bench: &Bench) {
    let seq = bench.put("devices", "1", DAY_S).await;
    for n in 0..DEVICES_PER_USER {
        bench.ack("devices", &format!("d{n:02}"), seq).await;
        bench.clock.advance(1);
    }
    bench.ack("devices", "d00", seq.next()).await;
    bench.clock.advance(1);
    bench.ack("devices", "one-more", seq).await;
    let cursors = bench.inbox.profile(user("devices")).await.unwrap().cursors;
    assert_eq!(cursors.len(), DEVICES_PER_USER);
    let has = |name: &str| cursors.iter().any(|c| c.0.as_str() == name);
    assert!(has("d00") && !has("d01") && has("d02") && has("one-more"));
}

async fn unused_cursors_go_in_the_end(bench: &Bench) {
    let seq = bench.put("idle", "1", DAY_S).await;
    bench.ack("idle", "old", seq).await;
    bench.clock.advance(CURSOR_LIFE_MS - 1000);
    bench.ack("idle", "young", seq).await;
    bench.inbox.run_once().await.unwrap();
    assert_eq!(bench.inbox.profile(user("idle")).await.unwrap().cursors.len(), 2, "not before its time");
    bench.clock.advance(2000);
    bench.inbox.run_once().await.unwrap();
    let cursors = bench.inbox.profile(user("idle")).await.unwrap().cursors;
    assert_eq!(cursors.iter().map(|c| c.0.as_str()).collect::<Vec<_>>(), ["young"]);
}

async fn revocations_only_rise(bench: &Bench) {
    assert_eq!(bench.ask("revoked", StartAt::Latest).await.not_before_s, 0);
    for seconds in [100, 50] {
        bench.inbox.update(vec![Change::NotBefore { user: user("revoked"), seconds }]).await.unwrap();
    }
    assert_eq!(bench.ask("revoked", StartAt::Latest).await.not_before_s, 100);
    assert_eq!(bench.inbox.profile(user("revoked")).await.unwrap().not_before_s, 100);
    bench.put("revoked", "1", 1).await;
    bench.removes_expired().await;
    assert_eq!(
        bench.ask("revoked", StartAt::Latest).await.not_before_s,
        100,
        "kept when the head record is raised"
    );
    let unknown = Change::NotBefore { user: user("revoked-unknown"), seconds: 7 };
    bench.inbox.update(vec![unknown]).await.unwrap();
    assert_eq!(bench.ask("revoked-unknown", StartAt::Latest).await.not_before_s, 7);
    // Made by a clock that was an hour ahead: it counts from when it is first seen, and stays
    // there.
    let seen = bench.clock.now().seconds();
    let ahead = Change::NotBefore { user: user("revoked-ahead"), seconds: seen + 3_600 };
    bench.inbox.update(vec![ahead]).await.unwrap();
    assert_eq!(bench.ask("revoked-ahead", StartAt::Latest).await.not_before_s, seen);
    bench.clock.advance(5_000);
    assert_eq!(bench.ask("revoked-ahead", StartAt::Cursor(DeviceId::default())).await.not_before_s, seen);
    let soon = Change::NotBefore { user: user("revoked-ahead"), seconds: seen + 60 };
    bench.inbox.update(vec![soon]).await.unwrap();
    assert_eq!(bench.ask("revoked-ahead", StartAt::Latest).await.not_before_s, seen + 60);
}

async fn names_that_are_prefixes_of_others_do_not_mix(bench: &Bench) {
    for (name, payload) in [("pre", "1"), ("pref", "2"), ("pre ", "3"), ("pre用", "4")] {
        bench.put(name, payload, DAY_S).await;
        bench.ack(name, payload, Seq::at(1)).await;
    }
    for (name, payload) in [("pre", "1"), ("pref", "2"), ("pre ", "3"), ("pre用", "4")] {
        let page = bench.page(name, Seq::BEGINNING, WIDE).await;
        assert_eq!(page.messages.iter().map(|m| m.payload.clone()).collect::<Vec<_>>(), [payload]);
        assert_eq!(bench.inbox.profile(user(name)).await.unwrap().cursors.len(), 1);
    }
}

async fn concurrent_appends_stay_dense(bench: &Bench) {
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8 {
        let inbox = Arc::clone(&bench.inbox);
        let batches: Vec<Vec<Append>> = (0..25)
            .map(|n| vec![bench.message("crowd", &format!("{task}-{n}"), "1", DAY_S); 1 + n % 3])
            .collect();
        tasks.spawn(async move {
            for batch in batches {
                for outcome in inbox.append(batch).await {
                    outcome.unwrap();
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let page = bench.page("crowd", Seq::BEGINNING, WIDE).await;
    let expected: usize = (0..25).map(|n| 1 + n % 3).sum::<usize>() * 8;
    assert_eq!(page.messages.len(), expected);
    assert!(page.messages.windows(2).all(|pair| pair[1].seq == pair[0].seq.next()));
}

async fn a_stored_message_is_found_by_number_and_by_its_senders_id(bench: &Bench) {
    let name = "looked-up";
    let find = async |which| bench.inbox.stored(user(name), which).await.unwrap().map(|found| found.seq);
    let id = |text: &str| Sought::Under(MessageId::parse(text).unwrap());
    assert_eq!(find(id("order-1")).await, None);
    let put = async |text: &str, ttl_s| match bench.put_fenced(name, text, "1", ttl_s).await {
        Appended::Stored(message) => message.seq,
        other => panic!("not stored: {other:?}"),
    };
    let (first, second) = (put("order-1", 60).await, put("order-2", DAY_S).await);
    assert_eq!(find(Sought::At(first)).await, Some(first));
    assert_eq!(find(Sought::At(Seq::BEGINNING)).await, None);
    assert_eq!(find(id("order-2")).await, Some(second));
    assert_eq!((find(Sought::At(second.next())).await, find(id("order-3")).await), (None, None));
    let of_another = bench.inbox.stored(user("another"), Sought::At(first)).await.unwrap();
    assert_eq!(of_another, None);
    let news = TopicName::parse("news").unwrap();
    let through = |topics: &[&TopicName]| {
        let topics = topics.iter().map(|topic| (*topic).clone()).collect();
        Sought::Through(topics, MessageId::parse("order-3").unwrap())
    };
    let via = Some(Arc::new(Via::Inbox(news.clone())));
    let by_topic = |via| Append { deduplicated: true, via, ..bench.message(name, "order-3", "1", DAY_S) };
    let third = stored(&bench.append(vec![by_topic(via)]).await[0]).seq;
    let other = TopicName::parse("other").unwrap();
    assert_eq!((find(id("order-3")).await, find(through(&[&other])).await), (None, None));
    assert_eq!(find(through(&[&other, &news])).await, Some(third));
    bench.clock.advance(61_000);
    assert_eq!(find(Sought::At(first)).await, Some(first), "also when it has expired");
    bench.inbox.forget(user(name)).await.unwrap();
    let left = bench.inbox.stored(user(name), Sought::At(second)).await.unwrap();
    assert!(left.is_none_or(|left| left.is_expired(bench.clock.now())), "until upkeep has removed it");
    for (topic, why) in [(&other, "not the one that was forgotten"), (&news, "the newest")] {
        let via = Some(Arc::new(Via::Inbox(topic.clone())));
        let newest = stored(&bench.append(vec![by_topic(via)]).await[0]).seq;
        for topics in [[&news, &other], [&other, &news]] {
            assert_eq!(find(through(&topics)).await, Some(newest), "{why}");
        }
    }
}
