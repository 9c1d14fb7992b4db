//! Membership and fallback entries in a real Redis: the contracts, and what a lost, frozen or
//! emptied Redis does to them.

use std::sync::Arc;

use ringpush::clock::Clock;
use ringpush::colleagues::redis::RedisColleagues;
use ringpush::colleagues::{Colleague, Colleagues};
use ringpush::fallback::conformance as fallback_contract;
use ringpush::fallback::redis::RedisFallback;
use ringpush::fallback::{Fallback, Holder, Which};
use ringpush::membership::keeper::Times;
use ringpush::membership::redis::RedisMembership;
use ringpush::membership::{LeaseState, Membership, NodeInfo, Registration, View, conformance};
use ringpush::message::{NodeId, UserId};
use ringpush::peer_proof::EntryKey;
use ringpush::redis_url::RedisUrl;
use ringpush::transport::redis::RedisLink;

use ringpush_testing::foreign::{Foreign, free_port, redis, redis_cli};
use ringpush_testing::{DEADLINE, Options, Server, eventually};

/// A tenth of the real times: a lease of one second.
pub(crate) fn times() -> Times {
    Times::default().shortened(10)
}

pub(crate) fn link(url: &str) -> RedisLink {
    RedisLink::new(&RedisUrl::parse(url).unwrap(), None).unwrap()
}

pub(crate) fn membership(redis: &Foreign) -> RedisMembership {
    let link = link(&format!("redis://127.0.0.1:{}", redis.port));
    RedisMembership::start(link, "test", times(), Clock::system(), entries())
}

pub(crate) fn entries() -> EntryKey {
    EntryKey::derive(&[ringpush_testing::PEER_SECRET])
}

/// Registers a node, and says that somebody has reached it.
pub(crate) async fn join(membership: &RedisMembership, info: NodeInfo) -> Registration {
    let registration = membership.join(info).await.unwrap();
    registration.proof.note();
    registration
}

pub(crate) fn info(name: &str) -> NodeInfo {
    NodeInfo {
        node: NodeId::parse(name).unwrap(),
        weight: 1.0,
        accept_per_s: 4000,
        peer: "127.0.0.1:1".into(),
        push: true,
        dispatch: false,
        store: "".into(),
        ticket_in_auth: false,
    }
}

pub(crate) async fn until(
    membership: &RedisMembership,
    what: &str,
    holds: impl Fn(&View) -> bool,
) -> Arc<View> {
    let mut views = membership.views();
    let seen = tokio::time::timeout(DEADLINE, views.wait_for(|view| holds(view))).await;
    let seen = seen.unwrap_or_else(|_| panic!("never seen: {what}: {:?}", membership.views().borrow()));
    Arc::clone(&seen.unwrap())
}

/// Three nodes, each a process of its own, and one that looks.
pub(crate) async fn three(redis: &Foreign) -> (Vec<RedisMembership>, RedisMembership) {
    let nodes: Vec<RedisMembership> = (0..3).map(|_| membership(redis)).collect();
    for (n, node) in nodes.iter().enumerate() {
        join(node, info(&format!("push-{n}"))).await;
    }
    let looker = membership(redis);
    until(&looker, "three nodes", |view| view.members.len() == 3).await;
    (nodes, looker)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_contracts_hold() {
    let redis = redis(&[]).await;
    let bench =
        conformance::Bench { own: Arc::new(membership(&redis)), others: Arc::new(membership(&redis)) };
    conformance::suite(&bench).await;
    let fallback = || {
        let link = link(&format!("redis://127.0.0.1:{}", redis.port));
        Arc::new(RedisFallback::start(link, "test", times().lease, times().poll))
    };
    fallback_contract::suite(&fallback_contract::Bench { own: fallback(), others: fallback() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_not_that_of_redis_is_told_within_a_beat() {
    let redis = redis(&[]).await;
    let mut options = Options::registered_in(&format!("redis://127.0.0.1:{}", redis.port));
    options.wrapper = ["faketime", "-f", "+60s"].map(str::to_owned).to_vec();
    // A moment that was asked for is a moment that passes: only the time of day is another.
    options.environment.push(("FAKETIME_DONT_FAKE_MONOTONIC".to_owned(), "1".to_owned()));
    let server = Server::with(options).await;
    eventually("the skew is told", async || {
        let log = server.log();
        log.contains("redis.url") && log.contains("NTP") && log.contains("ahead_ms")
    })
    .await;
    eventually("the skew is shown", async || {
        (59_000.0..61_000.0).contains(&server.metric("ringpush_clock_skew_ms").await)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_node_is_gone_when_its_lease_is_over() {
    let redis = redis(&[]).await;
    let (mut nodes, looker) = three(&redis).await;
    let epoch = looker.views().borrow().epoch;
    drop(nodes.remove(1));
    let view = until(&looker, "two nodes", |view| view.members.len() == 2).await;
    assert!(!view.held && view.epoch > epoch);
    assert!(redis_cli(redis.port, &["hkeys", "{test}:info"]).lines().count() == 2, "nothing is left of it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_redis_moves_nobody() {
    let redis = redis(&[]).await;
    let (nodes, looker) = three(&redis).await;
    let before = Arc::clone(&looker.views().borrow());
    redis_cli(redis.port, &["flushall"]);
    let after = until(&looker, "a new generation", |view| view.generation != before.generation).await;
    assert_eq!((after.digest, after.held), (before.digest, false));
    assert!(after.epoch > before.epoch, "the epoch never goes back");
    for (member, earlier) in after.members.iter().zip(&before.members) {
        assert_eq!(member.incarnation, earlier.incarnation, "each is who it was");
    }
    drop(nodes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_redis_holds_the_view_and_a_thawed_one_lets_it_go() {
    let redis = redis(&[]).await;
    let (nodes, looker) = three(&redis).await;
    let before = Arc::clone(&looker.views().borrow());
    redis.signal("STOP");
    let held = until(&looker, "a held view", |view| view.held).await;
    assert_eq!(held.digest, before.digest);
    // Longer than a lease: in Redis all of them have expired.
    tokio::time::sleep(times().lease * 2).await;
    redis.signal("CONT");
    let after = until(&looker, "a view that is not held", |view| !view.held).await;
    assert_eq!(after.digest, before.digest);
    drop(nodes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_full_redis_renews_nothing_nobody_leaves_one_after_another() {
    let redis = redis(&[]).await;
    let (nodes, looker) = three(&redis).await;
    let before = Arc::clone(&looker.views().borrow());
    redis_cli(redis.port, &["config", "set", "maxmemory", "1"]);
    let held = until(&looker, "a held view", |view| view.held).await;
    assert_eq!(held.digest, before.digest);
    let ends = std::time::Instant::now() + times().lease * 4;
    while std::time::Instant::now() < ends {
        assert_eq!(redis_cli(redis.port, &["zcard", "{test}:nodes"]), "3");
        tokio::time::sleep(times().poll).await;
    }
    redis_cli(redis.port, &["config", "set", "maxmemory", "0"]);
    let after = until(&looker, "a view that is not held", |view| !view.held).await;
    assert_eq!(after.digest, before.digest);
    // Whoever does not renew then is gone as ever.
    drop(nodes);
    // Leases that were renewed at different times end one after another: a first one that is alone
    // leaves by the rules, and the view is held at the second.
    let gone = |view: &View| view.held && view.absent.len() == view.members.len();
    let left = until(&looker, "all of them absent", gone).await;
    assert!(left.members.len() >= 2, "{left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_learns_that_its_lease_ran_out_and_that_it_has_it_again() {
    let mut redis = redis(&[]).await;
    let node = membership(&redis);
    let mut joined = join(&node, info("push-0")).await;
    assert_eq!(*joined.standing.borrow_and_update(), LeaseState::Member(1));
    redis.kill();
    let lapsed = joined.standing.wait_for(|standing| *standing == LeaseState::Lapsed);
    tokio::time::timeout(DEADLINE, lapsed).await.unwrap().unwrap();
    redis.start_again().await;
    let again = joined.standing.wait_for(|standing| *standing == LeaseState::Member(2));
    tokio::time::timeout(DEADLINE, again).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_told_at_once_and_a_dead_redis_is_waited_for() {
    let redis = redis(&["--requirepass", "secret"]).await;
    for account in ["", ":wrong@"] {
        let link = link(&format!("redis://{account}127.0.0.1:{}", redis.port));
        let checked = RedisMembership::start(link, "test", times(), Clock::system(), entries()).check().await;
        assert!(
            checked.as_ref().is_err_and(|error| error.to_string().contains("refused")),
            "{account}: {checked:?}"
        );
    }
    let nobody = link(&format!("redis://127.0.0.1:{}", free_port()));
    let membership = RedisMembership::start(nobody, "test", times(), Clock::system(), entries());
    assert_eq!(membership.check().await, Ok(()));
    assert!(membership.views().borrow().generation.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn routers_are_called_for_whoever_comes_and_not_for_whoever_goes() {
    let redis = redis(&[]).await;
    let link = link(&format!("redis://127.0.0.1:{}", redis.port));
    let fallback = RedisFallback::start(link, "test", times().lease, times().poll);
    let holder = Holder { node: NodeId::parse("push-0").unwrap(), incarnation: 7 };
    let users = |names: &[&str]| names.iter().map(|name| UserId::parse(name).unwrap()).collect::<Vec<_>>();
    let calls = || {
        let stats = redis_cli(redis.port, &["info", "commandstats"]);
        let calls = stats.split_once("cmdstat_publish:calls=").map_or("0", |(_, rest)| rest);
        calls.split(',').next().unwrap().parse::<u32>().unwrap()
    };
    fallback.add(&holder, users(&["alice", "bob"])).await.unwrap();
    assert_eq!(calls(), 1);
    fallback.remove(&holder, Which::Users(users(&["alice"]))).await.unwrap();
    assert_eq!((fallback.keep(&holder).await.unwrap(), calls()), (1, 1));
    fallback.add(&holder, users(&["carol"])).await.unwrap();
    assert_eq!(calls(), 2);
}

/// Whatever else stands there: holders that are none, versions and bitmaps that are too long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_among_the_fallback_entries_hides_no_entry() {
    let redis = redis(&[]).await;
    let fallback = || {
        let link = link(&format!("redis://127.0.0.1:{}", redis.port));
        RedisFallback::start(link, "test", times().lease, times().poll)
    };
    let (own, router) = (fallback(), fallback());
    let holder = Holder { node: NodeId::parse("push-0").unwrap(), incarnation: 7 };
    let alice = UserId::parse("alice").unwrap();
    own.add(&holder, vec![alice.clone()]).await.unwrap();
    eventually("the entry is seen", async || !router.hints().empty).await;
    let key = |name: &str| redis_cli(redis.port, &["keys", &format!("*:{name}")]).trim().to_owned();
    let (holders, maps, versions) = (key("holders"), key("maps"), key("versions"));
    let (far, long) = ("9".repeat(13), "x".repeat(5_000));
    for name in ["push-9/1", "nothing", "push-8/x", long.as_str()] {
        redis_cli(redis.port, &["zadd", &holders, &far, name]);
        redis_cli(redis.port, &["hset", &maps, name, &long]);
        redis_cli(redis.port, &["hset", &versions, name, &long]);
    }
    let bob = UserId::parse("bob").unwrap();
    own.add(&holder, vec![bob.clone()]).await.unwrap();
    for user in [alice, bob] {
        let found = async || {
            let nodes = router.nodes_of(vec![user.clone()]).await;
            nodes.is_ok_and(|nodes| nodes == [[holder.node.clone()]])
        };
        eventually("the entry among the rubbish", found).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn entries_of_a_dead_holder_end_with_its_lease() {
    let redis = redis(&[]).await;
    let fallback = || {
        let link = link(&format!("redis://127.0.0.1:{}", redis.port));
        RedisFallback::start(link, "test", times().lease, times().poll)
    };
    let (own, router) = (fallback(), fallback());
    let holder = Holder { node: NodeId::parse("push-0").unwrap(), incarnation: 7 };
    own.add(&holder, vec![UserId::parse("alice").unwrap()]).await.unwrap();
    eventually("the entry is seen", async || !router.hints().empty).await;
    for _ in 0..3 {
        tokio::time::sleep(times().lease / 2).await;
        assert_eq!(own.keep(&holder).await.unwrap(), 1, "kept, it lives on");
    }
    eventually("the entry ends", async || router.hints().empty).await;
    assert_eq!(redis_cli(redis.port, &["keys", "*users*"]), "");
    assert_eq!(own.keep(&holder).await.unwrap(), 0, "what was lost shows in the size");
    eventually("the bitmap is back with the next beat", async || !router.hints().empty).await;
}

fn names(all: &[Colleague]) -> Vec<String> {
    all.iter().map(|one| one.node.to_string()).collect()
}

async fn sees(by: &RedisColleagues, expected: &[&str]) {
    let mut all = by.all();
    let found = all.wait_for(|all| names(all) == expected);
    tokio::time::timeout(DEADLINE, found).await.expect("they are seen").unwrap();
}

/// The contract of `colleagues`, with the times of the tests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collects_see_one_another_come_rest_leave_and_die() {
    let redis = redis(&[]).await;
    let url = format!("redis://127.0.0.1:{}", redis.port);
    let start = || RedisColleagues::start(link(&url), "test", times().lease, times().beat, entries());
    let join = |one: &RedisColleagues, n: u64| {
        let (node, peer) = (NodeId::parse(&format!("collect-{n}")).unwrap(), format!("127.0.0.1:{n}").into());
        one.join(Colleague { node, incarnation: n, peer });
    };
    let [one, two, three] = [start(), start(), start()];
    for (n, who) in [&one, &two, &three].into_iter().enumerate() {
        assert!(!who.is_there());
        join(who, n as u64 + 1);
    }
    let all = ["collect-1", "collect-2", "collect-3"];
    for who in [&one, &two, &three] {
        sees(who, &all).await;
        assert!(who.is_there());
    }
    two.rest(times().lease);
    assert!(!two.is_there());
    sees(&one, &["collect-1", "collect-3"]).await;
    sees(&one, &all).await;
    three.leave().await;
    assert!(!three.is_there());
    sees(&one, &["collect-1", "collect-2"]).await;
    // One that dies tells nobody.
    drop(two);
    sees(&one, &["collect-1"]).await;
    // A registry that has lost everything is told again.
    join(&three, 3);
    sees(&one, &["collect-1", "collect-3"]).await;
    redis_cli(redis.port, &["FLUSHALL"]);
    eventually("both are there again", async || {
        redis_cli(redis.port, &["ZCARD", "{test}:colleagues"]).trim() == "2"
    })
    .await;
    sees(&one, &["collect-1", "collect-3"]).await;
}
