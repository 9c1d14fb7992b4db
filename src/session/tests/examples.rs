//! The rules of a session, one example each.

use super::super::*;
use super::{NEVER, NOW};

fn start(start: u64, head: u64, more: bool) -> (Session, Vec<Output<u64>>) {
    let mut outputs = Vec::new();
    let standing = StartPoint { start: Seq::at(start), head: Seq::at(head), more, fresh: false };
    (Session::start(standing, None, |o| outputs.push(o)), outputs)
}

fn outputs(session: &mut Session, input: Input<u64>) -> Vec<Output<u64>> {
    let mut outputs = Vec::new();
    session.step(input, NOW, |o| outputs.push(o));
    outputs
}

fn read(after: u64) -> Output<u64> {
    Output::Read { after: Seq::at(after), most: None }
}

fn live(seq: u64) -> Input<u64> {
    Input::Live(Item { seq: Seq::at(seq), expires_at: NEVER, frame: seq })
}

fn page(after: u64, seqs: &[u64], upto: u64) -> Input<u64> {
    let items = seqs.iter().map(|n| Item { seq: Seq::at(*n), expires_at: NEVER, frame: *n }).collect();
    Input::Page(Page {
        after: Seq::at(after),
        items,
        unreadable: Vec::new(),
        upto: Seq::at(upto),
        more: false,
    })
}

#[test]
fn a_new_user_is_caught_up_at_zero_and_gets_the_first_message_without_a_gap() {
    let (mut session, first) = start(0, 100, false);
    assert_eq!(first, [Output::CaughtUp(Seq::at(0))]);
    assert_eq!(outputs(&mut session, live(101)), [Output::Send(101)]);
}

#[test]
fn a_position_above_the_head_is_reset_and_goes_on_from_the_head() {
    let (mut session, first) = start(900, 43, false);
    let gap = Output::Gap { after: Seq::at(900), before: Seq::at(44), reason: GapReason::Reset };
    assert_eq!(first, [gap, Output::CaughtUp(Seq::at(43))]);
    assert_eq!(outputs(&mut session, live(44)), [Output::Send(44)]);
}

#[test]
fn expired_numbers_are_told_as_one_gap() {
    let (mut session, first) = start(41, 52, true);
    assert_eq!(first, [read(41)]);
    assert_eq!(
        outputs(&mut session, page(41, &[50, 51], 52)),
        [
            Output::Gap { after: Seq::at(41), before: Seq::at(50), reason: GapReason::Expired },
            Output::Send(50),
            Output::Send(51),
            Output::Gap { after: Seq::at(51), before: Seq::at(53), reason: GapReason::Expired },
            Output::CaughtUp(Seq::at(52)),
        ]
    );
}

#[test]
fn a_message_told_of_during_a_read_makes_it_read_again() {
    let (mut session, _) = start(41, 42, true);
    assert_eq!(outputs(&mut session, live(43)), []);
    assert_eq!(outputs(&mut session, page(41, &[42], 42)), [Output::Send(42), read(42)]);
    let rest = outputs(&mut session, page(42, &[43], 43));
    assert_eq!(rest, [Output::Send(43), Output::CaughtUp(Seq::at(43))]);
}

#[test]
fn a_full_socket_is_left_alone_until_it_has_room() {
    let (mut session, _) = start(41, 41, false);
    assert_eq!(outputs(&mut session, Input::Blocked), []);
    assert_eq!(outputs(&mut session, live(42)), []);
    assert_eq!(outputs(&mut session, live(43)), []);
    assert_eq!(outputs(&mut session, Input::Writable), [read(41)]);
    assert_eq!(outputs(&mut session, page(41, &[42, 43], 43)), [Output::Send(42), Output::Send(43)]);
}

#[test]
fn acks_are_cumulative_never_above_what_was_sent_and_never_back() {
    let (mut session, _) = start(41, 41, false);
    outputs(&mut session, live(42));
    assert_eq!(outputs(&mut session, Input::Ack(1 << 52)), [Output::Cursor(Seq::at(42))]);
    assert_eq!(outputs(&mut session, Input::Ack(41)), []);
    let (mut fresh, _) = start(0, 100, false);
    assert_eq!(outputs(&mut fresh, Input::Ack(100)), [], "nothing was sent, so there is nothing to ack");
}

#[test]
fn what_cannot_be_read_is_told_with_its_number_also_to_who_has_seen_nothing() {
    let (mut session, began) = start(0, 3, true);
    assert_eq!(began, [read(0)]);
    let item = |n: u64| Item { seq: Seq::at(n), expires_at: NEVER, frame: n };
    let unreadable = vec![Seq::at(11), Seq::at(13), Seq::at(14)];
    let page = Page {
        after: Seq::at(0),
        items: vec![item(12), item(16)],
        unreadable,
        upto: Seq::at(16),
        more: false,
    };
    let gap = |after: u64, before: u64, reason| Output::Gap {
        after: Seq::at(after),
        before: Seq::at(before),
        reason,
    };
    assert_eq!(
        outputs(&mut session, Input::Page(page)),
        [
            gap(10, 12, GapReason::Unreadable),
            Output::Send(12),
            gap(12, 14, GapReason::Unreadable),
            gap(13, 15, GapReason::Unreadable),
            gap(14, 16, GapReason::Expired),
            Output::Send(16),
            Output::CaughtUp(Seq::at(16)),
        ]
    );
}

#[test]
fn a_position_above_a_restored_store_is_told_and_left_also_while_a_page_is_read() {
    let (mut session, _) = start(100, 100, false);
    let reset = Output::Gap { after: Seq::at(100), before: Seq::at(51), reason: GapReason::Reset };
    let restored = || Input::Reset(Seq::at(100), Seq::at(50));
    assert_eq!(outputs(&mut session, restored()), [reset.clone(), read(50)]);
    assert_eq!(outputs(&mut session, restored()), [], "once");
    let (mut session, _) = start(100, 100, false);
    assert_eq!(outputs(&mut session, Input::Lost), [read(100)]);
    assert_eq!(outputs(&mut session, restored()), [reset], "one read at a time");
    assert_eq!(outputs(&mut session, page(100, &[], 100)), [read(50)]);
    assert_eq!(outputs(&mut session, page(50, &[51], 51)), [Output::Send(51)]);
    assert_eq!(outputs(&mut session, Input::Ack(100)), [], "it was on its way before the reset");
    assert_eq!(outputs(&mut session, Input::Ack(51)), [Output::Cursor(Seq::at(51))]);
}

#[test]
fn a_client_with_a_window_is_sent_no_more_than_that_ahead_and_a_read_waits_for_half_of_it() {
    let standing = StartPoint { start: Seq::at(40), head: Seq::at(41), more: true, fresh: false };
    let mut began = Vec::new();
    let mut session = Session::start(standing, Some(4), |o: Output<u64>| began.push(o));
    assert_eq!(began, [Output::Read { after: Seq::at(40), most: Some(4) }]);
    // A page that has more than was asked for is cut all the same.
    let sent = [41, 42, 43, 44].map(Output::Send);
    assert_eq!(outputs(&mut session, page(40, &[41, 42, 43, 44, 45], 45)), sent);
    assert_eq!(outputs(&mut session, live(45)), [], "there is no credit");
    assert_eq!(outputs(&mut session, Input::Ack(41)), [Output::Cursor(Seq::at(41))], "a quarter is free");
    let read = Output::Read { after: Seq::at(44), most: Some(2) };
    assert_eq!(outputs(&mut session, Input::Ack(42)), [Output::Cursor(Seq::at(42)), read]);
    assert_eq!(outputs(&mut session, Input::Ack(44)), [Output::Cursor(Seq::at(44))], "one read at a time");
    assert_eq!(outputs(&mut session, page(44, &[45], 45)), [Output::Send(45), Output::CaughtUp(Seq::at(45))]);
    assert_eq!(outputs(&mut session, live(46)), [Output::Send(46)]);
}

#[test]
fn an_ack_of_the_numbers_before_a_reset_says_nothing_about_those_after_it() {
    let (mut session, _) = start(990, 990, false);
    assert_eq!(outputs(&mut session, Input::Reset(Seq::at(990), Seq::at(500))).len(), 2);
    let sent = [501, 502].map(Output::Send);
    assert_eq!(outputs(&mut session, page(500, &[501, 502], 502)), sent);
    assert_eq!(outputs(&mut session, Input::Ack(990)), []);
    assert_eq!(outputs(&mut session, Input::Ack(501)), [Output::Cursor(Seq::at(501))]);
    assert_eq!(outputs(&mut session, Input::Ack(2_000)), [Output::Cursor(Seq::at(502))]);
}
