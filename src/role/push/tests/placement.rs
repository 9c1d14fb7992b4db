//! Who is told to move when nodes join, drain, die, or lose their lease.

use super::*;

#[tokio::test(start_paused = true)]
async fn when_a_node_joins_exactly_those_whose_owner_changed_are_told_to_move() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut clients = Vec::new();
    for n in 0..60 {
        clients.push(cluster.connect(0, &format!("user-{n}")).await);
    }
    cluster.join("push-1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut moved = 0;
    for client in &mut clients {
        let frames = client.heard();
        if owner(&["push-0", "push-1"], &client.user) == "push-0" {
            assert_eq!(frames, [], "{} stays", client.user);
            continue;
        }
        moved += 1;
        let [Outgoing::Text(frame)] = frames.as_slice() else { panic!("{}: {frames:?}", client.user) };
        let frame: Value = serde_json::from_slice(frame).unwrap();
        assert_eq!(
            (&frame["type"], &frame["node"], &frame["reason"]),
            (&"move".into(), &"push-1".into(), &"owner".into())
        );
        assert!(
            frame["url"].as_str().unwrap().starts_with("wss://push.example/n/push-1/v1/ws?hops=1&epoch=")
        );
    }
    assert!((10..50).contains(&moved), "{moved} of 60 moved");
    assert_eq!(cluster.nodes[0].counts().displaced, moved, "until they have moved, they are displaced");
    // A client that ignores it is served where it is, and not told again.
    let kept = clients.iter().position(|c| owner(&["push-0", "push-1"], &c.user) == "push-1").unwrap();
    let user = clients[kept].user.clone();
    let message = cluster.store(&user, "1").await;
    cluster.deliver(0, &user, message, false).await;
    clients[kept].expect("message").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(clients[kept].heard(), []);
    // When all have gone, nothing of them is left.
    drop(clients);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let left = cluster.nodes[0].counts();
    assert_eq!((left.sessions, left.displaced), (0, 0));
    assert!(cluster.fallback.hints().empty);
}

#[tokio::test(start_paused = true)]
async fn whoever_goes_is_taken_out_of_the_fallback_set_with_all_who_go_about_then() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut displaced = Vec::new();
    for n in 0..60 {
        let client = cluster.connect(0, &format!("user-{n}")).await;
        if owner(&["push-0", "push-1"], &client.user) == "push-1" {
            displaced.push(client);
        }
    }
    cluster.join("push-1").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.nodes[0].counts().displaced, displaced.len() as u64);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..10 {
        drop(displaced.pop());
        tokio::time::sleep(Duration::from_millis(10)).await;
        seen.insert(cluster.nodes[0].counts().displaced);
    }
    assert!(seen.len() <= 2, "ten in a tenth of a second are one removal or two: {seen:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(cluster.nodes[0].counts().displaced, displaced.len() as u64);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_drains_sends_everybody_away_and_leaves_nothing() {
    let cluster = Cluster::of(&["push-0", "push-1"]).await;
    let mut clients = Vec::new();
    let own =
        (0..).map(|n| format!("user-{n}")).filter(|user| owner(&["push-0", "push-1"], user) == "push-0");
    for user in own.take(40) {
        clients.push(cluster.connect(0, &user).await);
    }
    let node = cluster.nodes[0].clone();
    let draining = tokio::spawn(async move { node.drain(Drain::Move(Duration::from_secs(60))).await });
    let began = tokio::time::Instant::now();
    for client in &mut clients {
        let frame = client.expect("move").await;
        assert_eq!((&frame["node"], &frame["reason"]), (&"push-1".into(), &"drain".into()));
        assert!(frame["url"].as_str().unwrap().contains("hops=2"), "the target keeps them");
    }
    let refused =
        cluster.nodes[0].admit(SocketRequest { bearer: Some("late"), ..SocketRequest::default() }).await;
    assert!(matches!(refused, Err(AdmissionError::Unavailable(_))));
    // They stay, and are served, until their grace is over.
    let user = clients[0].user.clone();
    let message = cluster.store(&user, "1").await;
    cluster.deliver(0, &user, message, false).await;
    clients[0].expect("message").await;
    for client in &mut clients {
        assert_eq!(client.expect("error").await["code"], "draining");
        assert_eq!(client.next().await, Outgoing::Close(CloseCode::Draining, "draining"));
        client.says.send(Incoming::Closed).await.unwrap();
    }
    draining.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert!(cluster.membership.views().borrow().member(&NodeId::parse("push-0").unwrap()).is_none());
    assert!(cluster.fallback.hints().empty);
    let left = cluster.nodes[0].counts();
    assert_eq!((left.sessions, left.displaced), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_was_told_of_a_node_that_leaves_too_is_told_again() {
    let cluster = Cluster::of(&["push-0", "push-1", "push-2"]).await;
    let user = (0..)
        .map(|n| format!("user-{n}"))
        .find(|user| {
            owner(&["push-0", "push-1", "push-2"], user) == "push-0"
                && owner(&["push-1", "push-2"], user) == "push-1"
        })
        .unwrap();
    let mut client = cluster.connect(0, &user).await;
    let node = cluster.nodes[0].clone();
    let draining = tokio::spawn(async move { node.drain(Drain::Move(Duration::from_secs(60))).await });
    assert_eq!(client.expect("move").await["node"], "push-1");
    let one = cluster.nodes[1].node.holder.clone();
    cluster.membership.depart(&one.node, one.incarnation, Departure::Draining).await.unwrap();
    assert_eq!(client.expect("move").await["node"], "push-2");
    drop(client);
    draining.await.unwrap();
}

/// As a router, cut off from the registry or not, would say.
async fn told_gone(node: &Push) {
    node.clone().oneshot(PushRequest::Gone(ViewVersion::default())).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_node_is_barred_only_when_it_is_gone_and_cannot_register() {
    let cluster = Cluster::of(&["push-0", "push-1"]).await;
    let user = (0..)
        .map(|n| format!("user-{n}"))
        .find(|user| owner(&["push-0", "push-1"], user) == "push-0")
        .unwrap();
    let mut client = cluster.connect(0, &user).await;
    let node = cluster.nodes[0].clone();
    told_gone(&node).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.takes_sockets(), "it is a member: whoever says so has an old view");
    cluster.membership.set_standing(node.name(), LeaseState::Lapsed);
    told_gone(&node).await;
    let moved = client.expect("move").await;
    assert_eq!((&moved["node"], &moved["reason"]), (&"push-1".into(), &"drain".into()));
    assert!(!node.takes_sockets() && !cluster.healths[0].report().0);
    let request = SocketRequest { bearer: Some("late"), ..SocketRequest::default() };
    assert!(matches!(node.admit(request).await, Err(AdmissionError::Unavailable(_))));
    cluster.membership.set_standing(node.name(), LeaseState::Member(2));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(node.takes_sockets() && cluster.healths[0].report().0);
}

#[tokio::test(start_paused = true)]
async fn a_fenced_node_closes_its_sessions_and_stays_not_ready() {
    let mut cluster = Cluster::of(&["push-0"]).await;
    let mut client = cluster.connect(0, "alice").await;
    cluster.join("push-0").await;
    assert_eq!(client.expect("error").await["code"], "draining");
    let (earlier, later) = (&cluster.nodes[0], &cluster.nodes[1]);
    assert!(!earlier.takes_sockets() && later.takes_sockets());
}
