//! What a node finds out about logs by itself, when no hint tells it.

use super::*;
use crate::inbox::logs::key;
use crate::inbox::topics::{MembersChange, MembersChanged, PutTopic, TopicSettings, Topics};
use crate::message::{LogEntry, TopicName, Via};
use crate::topic::Delivery;

fn news() -> TopicName {
    TopicName::parse("news").unwrap()
}

impl Cluster {
    /// Makes a topic, and returns its life.
    async fn make(&self, topic: &TopicName) -> u64 {
        let settings = TopicSettings { delivery: Some(Delivery::Log), ttl_s: None, default_ttl_s: 3600 };
        match self.inbox.put(topic.clone(), settings).await {
            Ok(PutTopic::Created(topic)) => topic.version.life,
            other => panic!("{other:?}"),
        }
    }

    async fn make_news(&self) -> u64 {
        self.make(&news()).await
    }

    async fn change(&self, topic: &TopicName, add: &[&str], remove: &[&str]) {
        let users = |names: &[&str]| names.iter().map(|name| UserId::parse(name).unwrap()).collect();
        let from = Some(self.logs_facade().head(&LogId::Topic(topic.clone())).await.unwrap());
        let change = MembersChange { add: users(add), remove: users(remove), from };
        let changed = self.inbox.change_members(topic.clone(), change).await;
        assert!(matches!(changed, Ok(MembersChanged::Done { .. })), "{changed:?}");
    }

    async fn change_news(&self, add: &[&str], remove: &[&str]) {
        self.change(&news(), add, remove).await;
    }

    fn logs_facade(&self) -> Logs {
        Logs::new(Arc::clone(&self.logs) as _)
    }

    /// Stored in the log, and nobody is told.
    async fn store_news(&self, life: u64) -> Seq {
        self.store_in(&news(), life).await
    }

    async fn store_in(&self, topic: &TopicName, life: u64) -> Seq {
        let item = Append {
            trace: None,
            append_id: None,
            user: key(&LogId::Topic(topic.clone())),
            id: MessageId::parse("m").unwrap(),
            deduplicated: false,
            accepted_at: NOW,
            expires_at: NOW.plus_seconds(3600),
            event: None,
            via: Some(Arc::new(Via::Log(LogEntry { life, except: Vec::new() }))),
            payload: Bytes::from_static(b"\"hello\""),
        };
        match self.logs.append(vec![item]).await.remove(0) {
            Ok(Appended::Stored(message)) => message.seq,
            other => panic!("{other:?}"),
        }
    }

    /// A socket that says which logs it knows of, with `topics` and `everyone` of `auth`.
    async fn knows(&self, user: &str, logs: &str) -> Client {
        let client = self.open_with(0, user, "topics=auth").await;
        let auth = format!(r#"{{"type":"auth",{logs}}}"#);
        client.says.send(Incoming::Text(auth.into())).await.unwrap();
        client
    }

    /// A socket that reads logs, and is level.
    async fn reads_logs(&self, user: &str) -> Client {
        let mut client = self.knows(user, r#""topics":true"#).await;
        client.expect("welcome").await;
        while client.expect("caught_up").await["all"] != true {}
        client
    }
}

#[tokio::test(start_paused = true)]
async fn the_sweep_of_a_tail_finds_what_no_hint_told_of() {
    let cluster = Cluster::of(&["push-0"]).await;
    let life = cluster.make_news().await;
    cluster.change_news(&["alice"], &[]).await;
    let mut alice = cluster.reads_logs("alice").await;
    // A new tail looks once more after a few seconds.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(alice.heard(), []);
    let seq = cluster.store_news(life).await;
    let message = alice.expect("message").await;
    assert_eq!((&message["topic"], &message["seq"]), (&"news".into(), &seq.get().into()));
}

/// Nobody else reads them here. What came while their tails were made is found by the looks.
#[tokio::test(start_paused = true)]
async fn a_socket_with_many_new_logs_asks_for_all_at_once_and_all_are_looked_at() {
    let cluster = Cluster::of(&["push-0"]).await;
    let names: Vec<TopicName> = (0..50).map(|n| TopicName::parse(&format!("t{n}")).unwrap()).collect();
    let mut lives = Vec::new();
    for name in &names {
        lives.push(cluster.make(name).await);
        cluster.change(name, &["alice"], &[]).await;
    }
    let mut alice = cluster.reads_logs("alice").await;
    let asked = || cluster.logs_asked.positions();
    // The heads of the topics, that of everyone, and a look at all of them.
    assert!(asked() <= 4, "{}", asked());
    for (name, life) in names.iter().zip(&lives) {
        cluster.store_in(name, *life).await;
    }
    let began = tokio::time::Instant::now();
    let mut topics = std::collections::BTreeSet::new();
    for _ in &names {
        topics.insert(alice.expect("message").await["topic"].as_str().unwrap().to_owned());
    }
    assert_eq!(topics.len(), names.len());
    assert!(began.elapsed() <= Duration::from_secs(4), "by the second look: {:?}", began.elapsed());
    assert!(asked() <= 8, "{}", asked());
}

#[tokio::test(start_paused = true)]
async fn devices_that_are_new_to_everyones_log_share_one_page_and_one_failure() {
    for trouble in [Trouble::None, Trouble::Refuses] {
        let mut cluster = Cluster::of(&[]).await;
        cluster.trouble = trouble;
        cluster.join("push-0").await;
        let mut clients = Vec::new();
        for n in 0..50 {
            clients.push(cluster.knows(&format!("user-{n}"), r#""topics":true"#).await);
        }
        for client in &mut clients {
            match trouble {
                Trouble::Refuses => while !matches!(client.next().await, Outgoing::Close(..)) {},
                _ => drop(client.expect("welcome").await),
            }
        }
        // A client that came when the failure was told already reads again.
        let most = if trouble == Trouble::Refuses { 3 } else { 1 };
        assert!((1..=most).contains(&cluster.logs_asked.pages()), "{}", cluster.logs_asked.pages());
    }
}

/// As when a node was started anew: its tails hold nothing of what is missing, and the last block
/// is not whole.
#[tokio::test(start_paused = true)]
async fn sockets_that_are_behind_by_the_same_messages_share_a_read() {
    let cluster = Cluster::of(&["push-0"]).await;
    let life = cluster.make_news().await;
    let names: Vec<String> = (0..50).map(|n| format!("user-{n}")).collect();
    cluster.change_news(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]).await;
    let mut seqs = Vec::new();
    for _ in 0..5 {
        seqs.push(cluster.store_news(life).await.get());
    }
    let mut clients = Vec::new();
    for (n, name) in names.iter().enumerate() {
        let logs = format!(r#""topics":{{"news":{}}},"everyone":0"#, seqs[n % 5] - 1);
        clients.push(cluster.knows(name, &logs).await);
    }
    for (n, client) in clients.iter_mut().enumerate() {
        client.expect("welcome").await;
        for seq in &seqs[n % 5..] {
            let mut frame = client.frame().await;
            while frame["type"] == "caught_up" {
                frame = client.frame().await;
            }
            assert_eq!((&frame["topic"], frame["seq"].as_u64()), (&"news".into(), Some(*seq)), "{frame}");
        }
    }
    // One that began before some had asked, and one for those.
    assert!((1..=2).contains(&cluster.logs_asked.pages()), "{}", cluster.logs_asked.pages());
    // Whoever comes later is given what was kept, as far as it goes.
    let before = cluster.logs_asked.pages();
    seqs.push(cluster.store_news(life).await.get());
    let mut late = cluster.knows(&names[0], r#""topics":true,"everyone":0"#).await;
    let mut heard = Vec::new();
    while heard.len() < seqs.len() {
        let frame = late.frame().await;
        heard.extend(frame["seq"].as_u64().filter(|_| frame["type"] == "message"));
    }
    assert_eq!(heard, seqs);
    // The tail's own page, of the last one.
    assert!(cluster.logs_asked.pages() <= before + 1, "{} {before}", cluster.logs_asked.pages());
}

impl Cluster {
    /// A socket that has seen nothing of its topics, until it has so many messages.
    async fn catches_up(&self, user: &str, count: usize) {
        let mut client = self.knows(user, r#""topics":true,"everyone":0"#).await;
        for _ in 0..count {
            while client.frame().await["type"] != "message" {}
        }
    }

    async fn hint(&self, hints: Vec<LogHint>, missed: bool) {
        let request = PushRequest::Hint { hints: hints.into(), missed, stamp: Default::default() };
        self.nodes[0].clone().oneshot(request).await.unwrap();
    }
}

/// A message that was ended before its time may stand in what is kept, or in what is being read.
#[tokio::test(start_paused = true)]
async fn what_is_kept_of_a_log_goes_when_a_message_is_ended_or_hints_were_lost() {
    let cluster = Cluster::of(&["push-0"]).await;
    let life = cluster.make_news().await;
    cluster.change_news(&["alice", "bob", "carol", "dave", "erin"], &[]).await;
    cluster.store_news(life).await;
    cluster.store_news(life).await;
    let log = LogId::Topic(news());
    let from = Seq::at(cluster.logs_facade().head(&log).await.unwrap().get() - 2);
    let all = PageLimit { messages: 10, bytes: 1024 };
    let page = cluster.logs_facade().page(&log, life, from, all).await.unwrap();
    let ended = Message { expires_at: Millis(0), ..page.messages[0].clone() };
    let ended = || vec![LogHint::Message { log: log.clone(), message: Arc::new(ended.clone()) }];
    let read = || cluster.logs_asked.pages_of("news");
    {
        let alice = cluster.catches_up("alice", 2);
        tokio::pin!(alice);
        while read() == 0 {
            assert!(futures_util::poll!(alice.as_mut()).is_pending());
            tokio::task::yield_now().await;
        }
        // While the page is being read.
        cluster.hint(ended(), false).await;
        alice.await;
    }
    let before = read();
    cluster.catches_up("bob", 2).await;
    assert_eq!(read(), before + 1, "what was read before the end of a message is not kept");
    cluster.catches_up("carol", 2).await;
    assert_eq!(read(), before + 1, "it is kept");
    cluster.hint(ended(), false).await;
    cluster.catches_up("dave", 2).await;
    assert_eq!(read(), before + 2);
    cluster.hint(Vec::new(), true).await;
    cluster.catches_up("erin", 2).await;
    assert_eq!(read(), before + 3);
}

/// The tail has dropped what came while the socket was slow, and the block that is kept ends where
/// the socket stands.
#[tokio::test(start_paused = true)]
async fn a_slow_socket_goes_on_behind_a_block_that_was_not_whole() {
    let mut cluster = Cluster::of(&[]).await;
    cluster.limits.logs.memory_bytes = 256 * 1024;
    cluster.join("push-0").await;
    let life = cluster.make_news().await;
    cluster.change_news(&["alice"], &[]).await;
    cluster.store_news(life).await;
    let mut alice = cluster.knows("alice", r#""topics":true"#).await;
    while alice.frame().await["all"] != true {}
    assert_eq!(cluster.logs_asked.pages_of("news"), 1, "the block was read");
    alice.full.set(true);
    let log = LogId::Topic(news());
    let mut expected = Vec::new();
    for _ in 0..2_000 {
        let seq = cluster.store_news(life).await;
        let before = Seq::at(seq.get() - 1);
        let one = PageLimit { messages: 1, bytes: 1024 };
        let page = cluster.logs_facade().page(&log, life, before, one).await.unwrap();
        let message = Arc::new(page.messages[0].clone());
        cluster.hint(vec![LogHint::Message { log: log.clone(), message }], false).await;
        expected.push(seq.get());
    }
    alice.full.set(false);
    let mut heard = Vec::new();
    while heard.len() < expected.len() {
        let frame = alice.frame().await;
        assert_eq!(frame["type"], "message", "{frame}");
        heard.push(frame["seq"].as_u64().unwrap());
    }
    assert_eq!(heard, expected);
    assert!(cluster.logs_asked.pages_of("news") > 1, "it was below what the tail holds");
}

#[tokio::test(start_paused = true)]
async fn the_sweep_finds_memberships_that_no_hint_told_of() {
    let cluster = Cluster::of(&["push-0"]).await;
    let life = cluster.make_news().await;
    let mut alice = cluster.reads_logs("alice").await;
    cluster.change_news(&["alice"], &[]).await;
    let joined = alice.expect("topic").await;
    assert_eq!((&joined["topic"], &joined["state"]), (&"news".into(), &"joined".into()));
    let seq = cluster.store_news(life).await;
    assert_eq!(alice.expect("message").await["seq"], seq.get());
    cluster.change_news(&[], &["alice"]).await;
    let left = alice.expect("topic").await;
    assert_eq!((&left["topic"], &left["state"]), (&"news".into(), &"left".into()));
}

/// The topic was removed, made anew and joined again, and no hint told of it but its messages. A
/// tail of the earlier life that passed over one of the later life would take the device's position
/// past it.
#[tokio::test(start_paused = true)]
async fn a_message_of_a_later_life_is_not_passed_over() {
    for by_page in [false, true] {
        let cluster = Cluster::of(&["push-0"]).await;
        let earlier = cluster.make_news().await;
        cluster.change_news(&["alice"], &[]).await;
        let mut alice = cluster.reads_logs("alice").await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        cluster.inbox.remove(news()).await.unwrap();
        let later = cluster.make_news().await;
        cluster.change_news(&["alice"], &[]).await;
        let seq = cluster.store_news(later).await;
        // A publish that crosses the removal comes behind it.
        cluster.store_news(earlier).await;
        let log = LogId::Topic(news());
        let mut hints = Vec::new();
        for (life, after) in [(later, Seq::at(seq.get() - 1)), (earlier, seq)] {
            let all = PageLimit { messages: 10, bytes: 1024 };
            let page = cluster.logs_facade().page(&log, life, after, all).await.unwrap();
            let message = Arc::new(page.messages[0].clone());
            hints.push(LogHint::Message { log: log.clone(), message });
        }
        // The hint that was lost is found by a page.
        hints.drain(..usize::from(by_page));
        cluster.hint(hints, false).await;
        let mut frames = Vec::new();
        while frames.last().is_none_or(|frame: &Value| frame["type"] != "message") {
            frames.push(alice.frame().await);
        }
        assert_eq!(frames.last().unwrap()["seq"], seq.get(), "{frames:?}");
        assert!(frames.iter().all(|frame| frame["type"] != "gap"), "{frames:?}");
        assert!(frames.iter().any(|frame| frame["state"] == "left"), "{frames:?}");
    }
}
