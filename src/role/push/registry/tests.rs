use super::*;
use crate::role::push::{LiveLimits, PushLimits};

fn limits(per_user: usize, per_device: usize) -> Arc<LiveLimits> {
    let limits =
        PushLimits { sessions_per_user: per_user, sessions_per_device: per_device, ..PushLimits::default() };
    Arc::new(LiveLimits::of(&limits))
}

fn of_device(user: &str, device: &str) -> Arc<SessionHandle> {
    let (user, device) = (UserId::parse(user).unwrap(), DeviceId::parse(device).unwrap());
    SessionHandle::new(user, device, None, 0, Arrival::default(), Millis(0))
}

fn handle(user: &str) -> Arc<SessionHandle> {
    of_device(user, "default")
}

#[test]
fn the_oldest_of_the_device_goes_when_there_are_too_many_and_counts_return() {
    let registry = Arc::new(Registry::new(limits(9, 2)));
    let take = |user: &str| {
        let registered = registry.register(handle(user));
        registered.set_position(Seq::BEGINNING);
        registered
    };
    let first = take("alice");
    let second = take("alice");
    assert!(matches!(registry.make_room(&second), Room::Enough));
    let attaching = registry.register(handle("alice"));
    assert!(matches!(registry.make_room(&attaching), Room::InPlaceOf(other) if Arc::ptr_eq(&other, &first)));
    assert_eq!(registry.len(), 2);
    drop(first);
    assert_eq!(registry.len(), 2, "an evicted session is not counted out twice");
    let _bob = take("bob");
    drop(second);
    assert!(registry.has(&attaching.user));
    let user = attaching.user.clone();
    drop(attaching);
    assert!(!registry.has(&user));
    assert_eq!((registry.len(), registry.all().len()), (1, 1));
}

#[test]
fn the_own_device_yields_first_a_silent_socket_before_the_oldest_and_no_other_device_ever() {
    let registry = Arc::new(Registry::new(limits(3, 3)));
    let take = |device: &str| {
        let registered = registry.register(of_device("alice", device));
        registered.set_position(Seq::BEGINNING);
        registered
    };
    let (phone, _web, silent) = (take("phone"), take("web"), take("web"));
    silent.set_silent(true);
    let newcomer = take("web");
    assert!(matches!(registry.make_room(&newcomer), Room::InPlaceOf(other) if Arc::ptr_eq(&other, &silent)));
    let stranger = take("tablet");
    assert!(matches!(registry.make_room(&stranger), Room::None));
    drop(stranger);
    assert!(registry.has(&phone.user) && registry.of_user(&phone.user).len() == 3);
}

#[test]
fn only_the_last_session_of_a_user_says_so() {
    let registry = Arc::new(Registry::new(limits(64, 16)));
    let gone = Arc::new(AtomicU64::new(0));
    let take = || {
        let mut registered = registry.register(handle("alice"));
        let gone = Arc::clone(&gone);
        registered.when_last(move |_| {
            gone.fetch_add(1, Ordering::Relaxed);
        });
        registered
    };
    let (one, two) = (take(), take());
    drop(one);
    assert_eq!(gone.load(Ordering::Relaxed), 0);
    drop(two);
    assert_eq!(gone.load(Ordering::Relaxed), 1);
}

#[test]
fn a_client_is_told_once_per_incarnation_of_an_owner() {
    let handle = handle("alice");
    let (one, two) = (NodeId::parse("push-1").unwrap(), NodeId::parse("push-2").unwrap());
    assert!(handle.tell_once(&one, 7));
    assert!(!handle.tell_once(&one, 7));
    assert!(handle.tell_once(&one, 8));
    assert!(handle.tell_once(&two, 8));
}
