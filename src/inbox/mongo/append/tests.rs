use super::*;

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn user(name: &str) -> UserId {
    UserId::parse(name).unwrap()
}

#[test]
fn whom_this_process_may_have_written_to_is_remembered_until_the_store_is_known_to_be_well() {
    let mut heads = Heads::default();
    heads.take(user("read"), 7, at(10));
    assert!(heads.written_since(at(0)).is_empty(), "a head that was only read");
    heads.forget(&user("unanswered"), Some(at(11)));
    heads.known.insert(user("answered"), Known { n: 1, wrote: Some(at(12)), sent: at(12) });
    heads.forget(&user("answered"), None);
    heads.known.insert(user("kept"), Known { n: 1, wrote: Some(at(13)), sent: at(13) });
    let mut all = heads.written_since(at(11));
    all.sort();
    assert_eq!(all, [user("answered"), user("kept"), user("unanswered")]);
    assert_eq!(heads.written_since(at(13)), [user("kept")]);
    // Reading the head again, as for the user's next message, keeps the record.
    heads.take(user("unanswered"), 9, at(14));
    heads.take(user("kept"), 9, at(14));
    assert_eq!(heads.written_since(at(11)).len(), 3);
    assert_eq!((heads.known.len(), heads.written.len()), (3, 1));
}

#[test]
fn what_is_remembered_of_users_is_bounded_and_what_may_have_to_be_mended_stays_longest() {
    let mut heads = Heads::default();
    for n in 0..=HEADS as u64 {
        let wrote = Some(at(if n % 100 == 0 { 50 } else { 10 }));
        heads.known.insert(user(&format!("u{n}")), Known { n, wrote, sent: at(50) });
    }
    heads.make_room(at(51), at(10), at(40));
    assert_eq!((heads.known.len(), heads.written.len()), (0, HEADS / 100 + 1));
    for n in 0..=HEADS as u64 {
        heads.forget(&user(&format!("v{n}")), Some(at(52)));
    }
    heads.make_room(at(53), at(10), at(40));
    assert!(heads.written.len() <= HEADS);
}

#[test]
fn room_is_made_once_and_not_again_at_each_append() {
    let mut heads = Heads::default();
    for n in 0..HEADS as u64 - 10 {
        heads.known.insert(user(&format!("u{n}")), Known { n, wrote: None, sent: at(50) });
    }
    for n in 0..20 {
        heads.forget(&user(&format!("v{n}")), Some(at(50)));
    }
    heads.make_room(at(51), at(10), at(40));
    assert_eq!((heads.known.len(), heads.written.len()), (0, 20));
}
