use super::*;
use crate::membership::NodeInfo;
use crate::message::NodeId;
use proptest::prelude::*;

fn node(name: &str, state: NodeState) -> Member {
    let info = NodeInfo {
        node: NodeId::parse(name).unwrap(),
        weight: 1.0,
        accept_per_s: 4000,
        peer: "".into(),
        push: name.starts_with("push"),
        dispatch: name.starts_with("dispatch"),
        store: "".into(),
        ticket_in_auth: false,
    };
    Member { info, incarnation: 1, state }
}

fn snapshot(generation: &str, epoch: u64, names: &[&str]) -> Snapshot {
    let nodes = names.iter().map(|name| node(name, NodeState::Active)).collect();
    Snapshot { generation: generation.into(), epoch, nodes, outsiders: Outsiders::default() }
}

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

fn names(keeper: &Keeper) -> Vec<String> {
    keeper.view().members.iter().map(|m| m.info.node.to_string()).collect()
}

fn keeper(names: &[&str]) -> Keeper {
    let mut keeper = Keeper::new(Times::default());
    assert!(keeper.shown(at(0.0), snapshot("g", 10, names)));
    keeper
}

const FIVE: [&str; 5] = ["push-0", "push-1", "push-2", "push-3", "push-4"];

#[test]
fn ordinary_changes_are_taken_at_once() {
    let mut keeper = keeper(&FIVE[..3]);
    assert!(!keeper.shown(at(1.0), snapshot("g", 10, &FIVE[..3])), "nothing new");
    assert!(keeper.shown(at(2.0), snapshot("g", 11, &FIVE[..4])));
    assert!(keeper.shown(at(3.0), snapshot("g", 12, &FIVE[1..4])), "one of four may die");
    assert_eq!((names(&keeper).len(), keeper.view().held), (3, false));
}

#[test]
fn a_mass_death_is_not_believed_until_it_has_lasted() {
    let mut keeper = keeper(&FIVE);
    assert!(keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..3])));
    assert!(keeper.view().held && names(&keeper).len() == 5);
    assert_eq!(keeper.view().absent.len(), 2);
    assert_eq!(keeper.view().epoch, 10, "it is the old view");
    assert!(!keeper.shown(at(14.0), snapshot("g", 11, &FIVE[..3])), "13 s are not enough");
    assert!(keeper.shown(at(15.1), snapshot("g", 11, &FIVE[..3])));
    assert!(!keeper.view().held && names(&keeper).len() == 3);
}

#[test]
fn a_mass_death_is_one_also_when_leases_end_one_after_another() {
    let mut keeper = keeper(&FIVE);
    assert!(keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..4])), "one of five may die");
    assert!(keeper.shown(at(2.0), snapshot("g", 12, &FIVE[..3])));
    assert!(keeper.view().held && names(&keeper).len() == 4);
    assert!(keeper.shown(at(3.0), snapshot("g", 13, &FIVE)), "they are back");
    assert!(!keeper.view().held);
    // A lease apart, they count as separate failures.
    assert!(keeper.shown(at(4.0), snapshot("g", 14, &FIVE[..4])) && !keeper.view().held);
    for second in 5..15 {
        assert!(!keeper.shown(at(f64::from(second)), snapshot("g", 14, &FIVE[..4])));
    }
    assert!(keeper.shown(at(15.0), snapshot("g", 15, &FIVE[..3])) && !keeper.view().held);
}

#[test]
fn a_hold_begins_anew_when_something_else_is_shown_and_ends_when_the_old_nodes_are_back() {
    let mut keeper = keeper(&FIVE);
    keeper.shown(at(1.0), snapshot("g", 11, &FIVE[..2]));
    keeper.shown(at(10.0), snapshot("g", 12, &FIVE[..3]));
    assert!(!keeper.shown(at(20.0), snapshot("g", 12, &FIVE[..3])), "ten seconds of this");
    assert!(keeper.shown(at(21.0), snapshot("g", 13, &FIVE)));
    assert!(!keeper.view().held && keeper.view().epoch == 13);
}

#[test]
fn nodes_that_said_they_leave_are_no_mass_death() {
    let mut keeper = keeper(&FIVE);
    let mut draining = snapshot("g", 11, &FIVE);
    draining.nodes.iter_mut().take(4).for_each(|node| node.state = NodeState::Draining);
    assert!(keeper.shown(at(1.0), draining));
    assert!(keeper.shown(at(2.0), snapshot("g", 12, &FIVE[4..])));
    assert!(!keeper.view().held);
}

#[test]
fn an_emptied_registry_changes_nothing_for_ever() {
    let mut keeper = keeper(&FIVE);
    for second in 1..1000 {
        keeper.shown(at(f64::from(second)), snapshot("h", 20, &[]));
        assert!(keeper.view().held && names(&keeper).len() == 5);
    }
    assert!(keeper.shown(at(1001.0), snapshot("h", 21, &FIVE)));
    assert_eq!((&*keeper.view().generation, keeper.view().held), ("h", false));
}

#[test]
fn silence_holds_the_view_and_the_first_word_after_it_is_not_believed() {
    let mut keeper = keeper(&FIVE[..3]);
    assert!(!keeper.silent(at(2.0)));
    assert!(keeper.silent(at(3.5)) && keeper.view().held);
    assert!(!keeper.silent(at(9.0)), "once is enough");
    keeper.shown(at(30.0), snapshot("g", 11, &FIVE[..2]));
    assert!(keeper.view().held && names(&keeper).len() == 3);
    assert!(keeper.shown(at(31.0), snapshot("g", 12, &FIVE[..3])));
    assert!(!keeper.view().held);
    assert!(keeper.silent(at(35.0)) && keeper.view().held);
    assert!(keeper.shown(at(36.0), snapshot("g", 13, &FIVE)), "nobody is missing, and two have come");
    assert!(!keeper.view().held && names(&keeper).len() == 5);
}

#[test]
fn routers_come_and_go_while_the_ring_is_held() {
    let mut keeper = keeper(&["push-0", "push-1", "push-2", "dispatch-0"]);
    assert!(keeper.shown(at(1.0), snapshot("h", 1, &["push-0", "dispatch-1"])));
    assert_eq!(names(&keeper).len(), 3);
    assert_eq!(keeper.view().routers[0].node.as_str(), "dispatch-1");
}

#[test]
fn a_member_that_was_started_again_keeps_its_place_for_a_lease_until_it_is_reached() {
    let candidate = |name: &str, incarnation| Member { incarnation, ..node(name, NodeState::Active) };
    let shown = |epoch, names: &[&str], candidates: Vec<Member>| Snapshot {
        outsiders: Outsiders { candidates, strangers: Vec::new() },
        ..snapshot("g", epoch, names)
    };
    let mut keeper = keeper(&FIVE);
    // A node that was never a member is in no ring before it was reached.
    keeper.shown(at(1.0), shown(11, &FIVE, vec![candidate("push-9", 9)]));
    assert_eq!((names(&keeper).len(), keeper.view().outsiders.candidates.len()), (5, 1));
    keeper.shown(at(2.0), shown(12, &FIVE[1..], vec![candidate("push-0", 2)]));
    assert_eq!(names(&keeper).len(), 5);
    assert_eq!(keeper.view().members[0].incarnation, 2, "it is where the new process is");
    let mut reached = keeper;
    keeper = Keeper { returning: reached.returning.clone(), ..Keeper::new(Times::default()) };
    keeper.current = Arc::clone(reached.view());
    reached.shown(at(3.0), shown(13, &FIVE, Vec::new()));
    assert!(names(&reached).len() == 5 && reached.returning.is_empty());
    // A node that is never reached loses its place once, whatever it registers meanwhile.
    for (second, epoch) in [(8.0, 13), (12.0, 14), (12.5, 14), (40.0, 16)] {
        keeper.shown(at(second), shown(epoch, &FIVE[1..], vec![candidate("push-0", 2)]));
        assert_eq!(names(&keeper).len(), if second <= 12.0 { 5 } else { 4 }, "{second}");
    }
}

proptest! {
    /// Whatever is shown: no view loses all push nodes, and a view that is not held is what was
    /// shown last.
    #[test]
    fn the_rules_hold_whatever_is_shown(steps in proptest::collection::vec((0u8..32, 0u8..3, 0.1f64..20.0), 1..60)) {
        let mut keeper = keeper(&FIVE);
        let (mut now, mut epoch) = (0.0, 10);
        for (set, generation, pause) in steps {
            now += pause;
            epoch += 1;
            let shown: Vec<&str> =
                FIVE.iter().enumerate().filter(|(n, _)| set & (1 << n) != 0).map(|(_, name)| *name).collect();
            let generation = format!("g{generation}");
            keeper.shown(at(now), snapshot(&generation, epoch, &shown));
            prop_assert!(!keeper.view().members.is_empty());
            if !keeper.view().held {
                prop_assert_eq!(names(&keeper), shown);
                prop_assert_eq!(&*keeper.view().generation, generation.as_str());
            }
        }
    }
}
