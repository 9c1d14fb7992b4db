//! What a node sends to one session, whatever else happens.

use super::*;

/// The answer to the handshake is held back for the welcome, but not for longer than a moment.
#[tokio::test(start_paused = true)]
async fn a_socket_opens_though_the_inbox_hangs() {
    let mut cluster = Cluster::of(&[]).await;
    cluster.trouble = Trouble::Hangs;
    cluster.join("push-0").await;
    let mut client = cluster.open(0, "alice").await;
    assert!(client.heard().is_empty(), "where it stands is not known yet");
}

fn numbers(heard: Vec<Outgoing>) -> Vec<u64> {
    let number = |frame| match frame {
        Outgoing::Text(text) => serde_json::from_slice::<Value>(&text).unwrap()["seq"].as_u64().unwrap(),
        other => panic!("{other:?}"),
    };
    heard.into_iter().map(number).collect()
}

/// Nothing here gives the session's task a turn, but where it is said.
#[tokio::test(start_paused = true)]
async fn a_live_message_to_a_session_that_rests_is_sent_at_once() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let first = cluster.store("alice", "1").await;
    cluster.deliver(0, "alice", Arc::clone(&first), false).await;
    assert_eq!(numbers(client.heard()), [first.seq.get()]);
    // A socket that is full: the rest is written by the task, when there is room.
    client.full.set(true);
    let second = cluster.store("alice", "2").await;
    cluster.deliver(0, "alice", Arc::clone(&second), false).await;
    assert!(client.heard().is_empty());
    client.full.set(false);
    // While this takes turns the clock stands: no timer helps the task up.
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    assert_eq!(numbers(client.heard()), [second.seq.get()]);
    // What waits in the mailbox comes first, and is not read again for having been overtaken.
    let third = cluster.store("alice", "3").await;
    let fourth = cluster.store("alice", "4").await;
    let handles = cluster.nodes[0].node.base.registry.all();
    handles[0].mailbox.try_live(mailbox::encoded(&third));
    cluster.deliver(0, "alice", Arc::clone(&fourth), false).await;
    assert!(client.heard().is_empty(), "the task has had no turn");
    assert_eq!(client.expect("message").await["seq"], third.seq.get());
    assert_eq!(client.expect("message").await["seq"], fourth.seq.get());
    assert_eq!(cluster.nodes[0].node.base.metrics.pages.get(), 0);
    // So does an order to close: who was sent away is sent nothing more.
    handles[0].mailbox.close(CloseCode::Unauthorized, "the token was revoked");
    let fifth = cluster.store("alice", "5").await;
    cluster.deliver(0, "alice", fifth, false).await;
    assert!(client.heard().is_empty());
    assert_eq!(client.expect("error").await["code"], CloseCode::Unauthorized.name());
    assert_eq!(client.next().await, Outgoing::Close(CloseCode::Unauthorized, "token_revoked"));
}

/// Nothing else would bring such a session on: it waits for its page.
#[tokio::test(start_paused = true)]
async fn a_page_that_panics_ends_its_session_and_no_other() {
    let mut cluster = Cluster::of(&[]).await;
    cluster.trouble = Trouble::Panics;
    cluster.join("push-0").await;
    let (mut bob, mut alice) = (cluster.connect(0, "bob").await, cluster.connect(0, "alice").await);
    for (user, client) in [("bob", &mut bob), ("alice", &mut alice)] {
        cluster.store(user, "1").await;
        let second = cluster.store(user, "2").await;
        // The first is missing, so the session reads a page.
        cluster.deliver(0, user, second, false).await;
        if user == "bob" {
            assert_eq!(client.expect("error").await["code"], CloseCode::Overloaded.name());
            assert_eq!(client.next().await, Outgoing::Close(CloseCode::Overloaded, "overloaded"));
        } else {
            client.expect("message").await;
            client.expect("message").await;
        }
    }
}

/// The timer tells the task still, whoever sent what meanwhile.
#[tokio::test(start_paused = true)]
async fn a_session_is_pinged_though_its_messages_are_sent_by_others() {
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    for _ in 0..3 {
        let message = cluster.store("alice", "1").await;
        cluster.deliver(0, "alice", message, false).await;
        client.expect("message").await;
        let ping = tokio::time::timeout(Duration::from_secs(26), client.hears.recv()).await;
        assert_eq!(ping.unwrap(), Some(Outgoing::Ping));
        client.says.send(Incoming::Alive).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sends_each_number_comes_once_and_in_order() {
    const MESSAGES: usize = 1_000;
    let cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    let (says, full) = (client.says.clone(), Arc::clone(&client.full));
    let disturbing = tokio::spawn(async move {
        for n in 0.. {
            full.set(n % 3 == 0);
            if says.send(Incoming::Alive).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
            full.set(false);
        }
    });
    let mut stored = Vec::new();
    for _ in 0..MESSAGES {
        let message = cluster.store("alice", "1").await;
        stored.push(message.seq.get());
        cluster.deliver(0, "alice", message, false).await;
    }
    let mut heard = Vec::new();
    while heard.len() < MESSAGES {
        heard.push(client.expect("message").await["seq"].as_u64().unwrap());
    }
    disturbing.abort();
    assert_eq!(heard, stored);
    assert!(client.heard().is_empty());
}
