//! Pages, expiry and removal.

use super::{Bench, DAY_S, WIDE, numbers, stored, user};
use crate::inbox::{Appended, Change, PASSED_OVER, PageLimit, StartAt};
use crate::message::Seq;

pub(super) async fn an_expired_original_gives_up_its_id(bench: &Bench) {
    let first = stored(&bench.put_fenced("reused", "id", "1", 10).await).seq;
    bench.clock.advance(10_000);
    let second = stored(&bench.put_fenced("reused", "id", "2", 10).await).seq;
    assert_eq!(second, first.next());
    assert_eq!(bench.put_fenced("reused", "id", "2", 10).await, Appended::Duplicate(second));
    bench.inbox.run_once().await.unwrap();
    assert_eq!(
        bench.put_fenced("reused", "id", "2", 10).await,
        Appended::Duplicate(second),
        "removing the old one must not take the id from the new one"
    );
}

pub(super) async fn pages_are_cut_by_count_and_by_bytes(bench: &Bench) {
    let first = bench.put("paged", &"1".repeat(100), DAY_S).await;
    for _ in 0..9 {
        bench.put("paged", &"1".repeat(100), DAY_S).await;
    }
    let by_count = bench.page("paged", Seq::BEGINNING, PageLimit { messages: 4, bytes: 1 << 20 }).await;
    assert_eq!((by_count.messages.len(), by_count.more), (4, true));
    assert_eq!(by_count.upto.get(), first.get() + 3);
    let by_bytes = bench.page("paged", by_count.upto, PageLimit { messages: 1000, bytes: 250 }).await;
    assert_eq!((by_bytes.messages.len(), by_bytes.more), (2, true));
    let one_fits = bench.page("paged", by_bytes.upto, PageLimit { messages: 1000, bytes: 1 }).await;
    assert_eq!((one_fits.messages.len(), one_fits.more), (1, true));
    let rest = bench.page("paged", one_fits.upto, WIDE).await;
    assert_eq!((rest.messages.len(), rest.more), (3, false));
    let exact = bench.page("paged", Seq::BEGINNING, PageLimit { messages: 10, bytes: 1 << 20 }).await;
    assert_eq!((exact.messages.len(), exact.more), (10, false), "a page that just fits is not cut");
}

pub(super) async fn expired_messages_are_not_shown_and_not_renumbered(bench: &Bench) {
    let first = bench.put("expiring", "1", DAY_S).await;
    bench.put("expiring", "2", 5).await;
    let third = bench.put("expiring", "3", DAY_S).await;
    let fourth = bench.put("expiring", "4", 5).await;
    bench.clock.advance(5_000);
    let page = bench.page("expiring", Seq::BEGINNING, WIDE).await;
    assert_eq!(numbers(&page), [first, third]);
    assert_eq!((page.upto, page.more), (fourth, false), "numbers that expired at the end count as read");
    assert_eq!(bench.put("expiring", "5", 5).await, fourth.next());
}

pub(super) async fn a_page_passes_over_no_more_than_is_said(bench: &Bench) {
    for _ in 0..PASSED_OVER.div_ceil(1_000) + 1 {
        bench.append((0..1_000).map(|_| bench.message("passed", "m", "1", 5)).collect()).await;
    }
    let living = bench.put("passed", "2", DAY_S).await;
    bench.clock.advance(5_000);
    let first = bench.page("passed", Seq::BEGINNING, WIDE).await;
    assert!(first.messages.is_empty() && first.more && first.upto < living, "{first:?}");
    let second = bench.page("passed", first.upto, WIDE).await;
    assert_eq!((numbers(&second), second.upto, second.more), (vec![living], living, false));
}

pub(super) async fn removal_keeps_numbers_dense_for_ever(bench: &Bench) {
    let mut last = Seq::BEGINNING;
    for _ in 0..20 {
        last = bench.put("removed", "1", 5).await;
    }
    assert!(bench.removes_expired().await >= 20);
    let page = bench.page("removed", Seq::at(last.get() - 5), WIDE).await;
    assert_eq!((page.messages.len(), page.upto, page.more), (0, last, false));
    assert!(bench.ask("removed", StartAt::After(Seq::at(last.get() - 5))).await.more);
    assert!(!bench.ask("removed", StartAt::After(last)).await.more);
    assert_eq!(bench.inbox.profile(user("removed")).await.unwrap().head, Some(last));
    assert_eq!(bench.put("removed", "2", DAY_S).await, last.next());
    bench.inbox.run_once().await.unwrap();
    assert_eq!(bench.page("removed", Seq::BEGINNING, WIDE).await.messages.len(), 1);
}

pub(super) async fn a_user_is_forgotten_and_numbers_go_on(bench: &Bench) {
    bench.inbox.forget(user("forgotten-stranger")).await.unwrap();
    let first = bench.put("forgotten", "1", DAY_S).await;
    let fenced = bench.put_fenced("forgotten", "id", "2", DAY_S).await;
    bench.ack("forgotten", "web", first).await;
    bench.inbox.update(vec![Change::NotBefore { user: user("forgotten"), seconds: 7 }]).await.unwrap();
    bench.inbox.forget(user("forgotten")).await.unwrap();
    let page = bench.page("forgotten", Seq::BEGINNING, WIDE).await;
    assert_eq!((page.messages.len(), page.more), (0, false));
    let profile = bench.inbox.profile(user("forgotten")).await.unwrap();
    assert_eq!((profile.cursors.len(), profile.not_before_s), (0, 7));
    let Appended::Stored(second) = fenced else { panic!("{fenced:?}") };
    let again = bench.put_fenced("forgotten", "id", "3", DAY_S).await;
    assert!(matches!(again, Appended::Stored(message) if message.seq == second.seq.next()), "its id is free");
    bench.removes_expired().await;
    let page = bench.page("forgotten", Seq::BEGINNING, WIDE).await;
    assert_eq!(page.messages.iter().map(|m| m.payload.clone()).collect::<Vec<_>>(), ["3"]);
    assert_eq!(bench.put("forgotten", "4", DAY_S).await, second.seq.next().next());
}

pub(super) async fn removal_stops_at_the_first_that_lives(bench: &Bench) {
    bench.put("mixed", "1", 5).await;
    let second = bench.put("mixed", "2", DAY_S).await;
    bench.put("mixed", "3", 5).await;
    let fourth = bench.put("mixed", "4", DAY_S).await;
    bench.removes_expired().await;
    assert_eq!(numbers(&bench.page("mixed", Seq::BEGINNING, WIDE).await), [second, fourth]);
    let cut = bench.page("mixed", Seq::BEGINNING, PageLimit { messages: 1, bytes: 1 << 20 }).await;
    assert!(cut.upto >= second && cut.upto < fourth && cut.more);
}
