//! The conformance suite of the fallback: what every adapter must do. A failed expectation panics,
//! as in any test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::missing_panics_doc)]

use std::sync::Arc;
use std::time::Duration;

use super::{Fallback, Holder, Which};
use crate::message::{NodeId, UserId};

/// One set of entries as a push node and a router see it. In one process both may be the same.
pub struct Bench {
    /// The side of the push nodes.
    pub own: Arc<dyn Fallback>,
    /// The side of a router.
    pub others: Arc<dyn Fallback>,
}

/// How long a change may take to become visible.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs every part, on entries that nobody has used.
pub async fn suite(bench: &Bench) {
    entries_come_and_go_by_holder(bench).await;
    an_earlier_process_of_a_name_has_a_set_of_its_own(bench).await;
    many_users_go_in_and_out_at_once(bench).await;
}

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

fn holder(name: &str, incarnation: u64) -> Holder {
    Holder { node: NodeId::parse(name).unwrap(), incarnation }
}

impl Bench {
    async fn add(&self, holder: &Holder, users: &[&str]) {
        self.own.add(holder, users.iter().map(|name| user(name)).collect()).await.unwrap();
    }

    async fn remove(&self, holder: &Holder, users: &[&str]) {
        let which = Which::Users(users.iter().map(|name| user(name)).collect());
        self.own.remove(holder, which).await.unwrap();
    }

    /// Waits until these users are where they are expected. Returns the last response if they never
    /// are.
    async fn expect(&self, users: &[&str], expected: &[&[&str]]) {
        let users: Vec<UserId> = users.iter().map(|name| user(name)).collect();
        let began = tokio::time::Instant::now();
        loop {
            let found = self.others.nodes_of(users.clone()).await.unwrap();
            let mut names: Vec<Vec<&str>> =
                found.iter().map(|nodes| nodes.iter().map(NodeId::as_str).collect()).collect();
            names.iter_mut().for_each(|nodes| nodes.sort_unstable());
            if names == expected {
                return;
            }
            assert!(began.elapsed() < DEADLINE, "{names:?} rather than {expected:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_empty(&self) {
        let empty = async {
            while !self.others.hints().empty {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, empty).await.expect("nobody is displaced any more");
    }
}

async fn entries_come_and_go_by_holder(bench: &Bench) {
    let (zero, one) = (holder("push-0", 7), holder("push-1", 8));
    assert!(bench.others.hints().empty);
    bench.add(&zero, &["a", "b", "a"]).await;
    bench.add(&one, &["a", "用户42"]).await;
    bench.expect(&["a", "b", "c", "用户42"], &[&["push-0", "push-1"], &["push-0"], &[], &["push-1"]]).await;
    assert!(!bench.others.hints().empty);
    assert_eq!(bench.own.keep(&zero).await.unwrap(), 2);
    bench.add(&zero, &["a"]).await;
    assert_eq!(bench.own.keep(&zero).await.unwrap(), 2, "twice is once");
    bench.remove(&zero, &["a", "c"]).await;
    bench.expect(&["a", "b"], &[&["push-1"], &["push-0"]]).await;
    bench.own.remove(&one, Which::All).await.unwrap();
    bench.remove(&zero, &["b"]).await;
    bench.until_empty().await;
    bench.expect(&["a", "b"], &[&[], &[]]).await;
    assert_eq!(bench.own.keep(&zero).await.unwrap(), 0);
}

async fn an_earlier_process_of_a_name_has_a_set_of_its_own(bench: &Bench) {
    let (earlier, later) = (holder("push-0", 7), holder("push-0", 9));
    bench.add(&earlier, &["a"]).await;
    bench.add(&later, &["b"]).await;
    bench.own.remove(&earlier, Which::All).await.unwrap();
    bench.expect(&["a", "b"], &[&[], &["push-0"]]).await;
    bench.own.remove(&later, Which::All).await.unwrap();
    bench.until_empty().await;
}

async fn many_users_go_in_and_out_at_once(bench: &Bench) {
    let zero = holder("push-0", 7);
    let users: Vec<UserId> = (0..20_000).map(|n| user(&format!("user-{n}"))).collect();
    bench.own.add(&zero, users.clone()).await.unwrap();
    assert_eq!(bench.own.keep(&zero).await.unwrap(), users.len());
    bench.expect(&["user-0", "user-19999", "user-20000"], &[&["push-0"], &["push-0"], &[]]).await;
    bench.own.remove(&zero, Which::Users(users)).await.unwrap();
    assert_eq!(bench.own.keep(&zero).await.unwrap(), 0);
    bench.until_empty().await;
}
