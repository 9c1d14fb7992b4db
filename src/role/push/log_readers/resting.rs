//! The readers of a socket at rest: level in all its logs, with nothing to send and nothing to
//! wait for, as nearly all sockets are nearly always. Then a reader takes 32 bytes. It is told of
//! what comes as before, and wakes when there is news.

use std::sync::Arc;

use super::{LogReaders, Reader, Why};
use crate::message::Seq;
use crate::role::push::registry::SessionHandle;
use crate::role::push::tail::RestingReading;
use crate::session::{AtRest, Session};

/// A reader at rest.
struct RestingReader {
    reading: RestingReading,
    session: AtRest,
    /// Of a member: what stands up to here is not for this member.
    from: Seq,
}

/// The readers of a socket at rest.
pub(in super::super) struct Resting {
    all: Box<[RestingReader]>,
}

impl Reader {
    /// The session, if the reader may rest. One that watches may not, nor one whose tail has seen a
    /// restore: there is a number to remember of it.
    fn at_rest(&self) -> Option<AtRest> {
        let rests = !self.wants && self.was_level && self.why != Why::Watched && self.resets == 0;
        self.session.at_rest().filter(|_| rests)
    }
}

impl LogReaders {
    /// Whether nothing is under way, and nothing is to be remembered but where each reader stands.
    /// A block that was read is dropped: nobody wants more of it.
    pub(in super::super) fn can_rest(&self, handle: &SessionHandle) -> bool {
        self.told_level
            && self.inbox_is_level
            && !self.is_reading
            && !self.windowed
            && self.left.is_empty()
            && self.memberships == handle.memberships()
            && self.all.iter().all(|reader| reader.at_rest().is_some())
    }

    /// Puts readers to rest that can rest. Others would be forgotten.
    pub(in super::super) fn rest(self) -> Resting {
        let rest = |reader: Reader| {
            let (session, from) = (reader.at_rest()?, reader.why.from());
            Some(RestingReader { reading: reader.reading.rest(), session, from })
        };
        Resting { all: self.all.into_iter().filter_map(rest).collect() }
    }
}

impl Resting {
    /// Whether a log has moved, or its topic has ended.
    pub(in super::super) fn has_news(&self) -> bool {
        self.all.iter().any(|RestingReader { reading, session, .. }| {
            let tail = &reading.tail;
            session.sent < tail.position() || tail.resets() > 0 || tail.has_ended()
        })
    }

    /// The readers, awake.
    pub(in super::super) fn wake(self, handle: &Arc<SessionHandle>) -> LogReaders {
        let mut readers = LogReaders::new(handle.user.clone(), handle.memberships(), false);
        readers.reserve(self.all.len());
        (readers.inbox_is_level, readers.told_level) = (true, true);
        readers.all.extend(self.all.into_iter().map(|RestingReader { reading, session, from }| {
            let reading = reading.wake(handle);
            let why = if reading.tail.log.topic().is_some() { Why::Member(from) } else { Why::Everyone };
            Reader {
                reading,
                why,
                session: Session::resumed(session),
                wants: false,
                was_level: true,
                had_backlog: false,
                resets: 0,
                unacked: None,
                // Of one that watches alone.
                began: session.sent,
            }
        }));
        readers
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_reader_at_rest_takes_32_bytes() {
        assert_eq!(size_of::<super::RestingReader>(), 32);
    }
}
