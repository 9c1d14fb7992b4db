//! The task that holds the lines: connects, follows moves, acks, renews the token.

mod frames;
mod moves;
mod renewal;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ringpush_protocol::backoff::between;
use ringpush_protocol::frame::{ClientFrame, ReconnectHint};
use ringpush_protocol::message::Millis;
use tokio::time::{Instant, sleep, sleep_until};

use crate::clock::Clock;
use crate::dial::{DialError, Dialer};
use crate::inbox::{Life, Shared};
use crate::items::{State, Stopped};
use crate::ledger::LineId;
use crate::line::{Heard, Line};
use crate::tokens::TokenFault;

/// How often a move is tried before its next one is waited for.
const MOVE_TRIES: u32 = 3;
/// How long a line has to answer after a wake-up.
const WAKE: Duration = Duration::from_secs(3);
/// Acks are gathered for so long.
const ACK_DELAY: Duration = Duration::from_millis(50);
/// The part of a token's life after which another one is asked for.
const REFRESH_AT: f64 = 0.8;
/// Where no server has said otherwise yet.
const FIRST_HINT: ReconnectHint = ReconnectHint { min_ms: 0, max_ms: 2_000 };
/// Longest wait between two tries, unless the server names a longer one.
const RETRY_MAX: Duration = Duration::from_secs(10);

/// How serving lines, or opening the first one, ended.
enum Ending {
    /// For good.
    Stop(Stopped),
    /// Come back: why it ended, and when.
    Rest(String, Pause),
}

/// When to come back.
enum Pause {
    /// After a delay drawn from the hint.
    Drawn,
    /// The same, once this has passed.
    AtLeast(Duration),
    /// At once: the next token may do.
    None,
    /// When the application wakes the client.
    UntilWoken,
}

/// A line that is being opened while another one is served.
struct Opening {
    future: BoxFuture<'static, Result<Line, DialError>>,
    /// The old line does not answer: it goes as soon as the new one is there, or cannot be had.
    replaces: bool,
}

/// A move under way, until its line is taken.
struct Moving {
    url: String,
    tries: u32,
}

/// A line that was asked for a sign of life.
struct Probe {
    line: LineId,
    heard: u64,
    until: Instant,
}

pub(crate) struct Actor {
    dialer: Arc<Dialer>,
    shared: Arc<Shared>,
    device_is_kept: bool,
    line: Option<Line>,
    /// The line that takes over.
    next: Option<Line>,
    opening: Option<Opening>,
    moving: Option<Moving>,
    refreshing: Option<BoxFuture<'static, Result<String, TokenFault>>>,
    refresh_failures: u32,
    /// A token was shown to the server, which has not answered yet: it takes one at a time.
    refresh_is_shown: bool,
    hint: ReconnectHint,
    failures: u32,
    is_caught_up: bool,
    probe: Option<Probe>,
    ack_at: Option<Instant>,
    ask_at: Option<Instant>,
    refresh_at: Option<Instant>,
    /// The server's time at this moment, to tell when a token expires.
    server_time: Option<(Instant, Millis)>,
}

/// Tells the end, also where the task panics (the application's token source runs in it) or is
/// dropped with its runtime.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.set(State::Stopped(Stopped::new("internal", None, "the client's task has ended")));
        self.0.life.send_replace(Life::Ended);
    }
}

impl Actor {
    pub(crate) fn new(dialer: Arc<Dialer>, shared: Arc<Shared>, device_is_kept: bool) -> Self {
        Self {
            dialer,
            shared,
            device_is_kept,
            line: None,
            next: None,
            opening: None,
            moving: None,
            refreshing: None,
            refresh_failures: 0,
            refresh_is_shown: false,
            hint: FIRST_HINT,
            failures: 0,
            is_caught_up: false,
            probe: None,
            ack_at: None,
            ask_at: None,
            refresh_at: None,
            server_time: None,
        }
    }

    pub(crate) async fn run(mut self) {
        let _end = End(Arc::clone(&self.shared));
        if !self.device_is_kept {
            let device = &self.dialer.device;
            let detail = format!("no device is named: this is {device}, and the next start is another one");
            self.shared.tell("device_not_kept", detail);
        }
        let mut life = self.shared.life.subscribe();
        let stopped = tokio::select! {
            biased;
            _ = life.wait_for(|life| *life == Life::Closing) => Stopped::new("closed", None, ""),
            stopped = self.cycle() => stopped,
        };
        self.say_acks(false).await;
        // Whoever waits for the end need not wait for the server's close frame.
        self.shared.set(State::Stopped(stopped));
        for line in self.line.take().into_iter().chain(self.next.take()) {
            line.close().await;
        }
    }

    /// Connects and serves until it is over for good.
    async fn cycle(&mut self) -> Stopped {
        loop {
            self.shared.set(State::Connecting);
            let position = self.shared.with(|books| books.standing());
            let ending = match self.dialer.open(position).await {
                Ok(line) => {
                    self.line = Some(line);
                    self.serve().await
                }
                Err(fault) => self.not_opened(fault).await,
            };
            let (cause, pause) = match ending {
                Ending::Stop(stopped) => return stopped,
                Ending::Rest(cause, pause) => (cause, pause),
            };
            self.failures += 1;
            let rest = match pause {
                Pause::Drawn => Some(self.drawn()),
                Pause::AtLeast(rest) => Some(self.drawn() + rest),
                Pause::None => Some(Duration::ZERO),
                Pause::UntilWoken => None,
            };
            // A wake-up of an earlier time is none.
            let _ = self.shared.wake.notified().now_or_never();
            self.shared.set(State::Waiting { cause, rest });
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = rest_for(rest) => {}
            }
        }
    }

    /// Drawn from the server's hint; the longer it cannot be reached, the longer.
    fn drawn(&self) -> Duration {
        let (min, max) = (Duration::from_millis(self.hint.min_ms), Duration::from_millis(self.hint.max_ms));
        let longer = Duration::from_millis(200 << self.failures.min(10)).min(RETRY_MAX);
        between(min, longer.max(max), &mut rand::rng())
    }

    async fn not_opened(&mut self, fault: DialError) -> Ending {
        match fault {
            DialError::Token(TokenFault::Refused(why)) => Ending::Stop(Stopped::new("refused", None, why)),
            DialError::Token(TokenFault::Later(code, detail)) => {
                self.shared.tell(code, detail);
                Ending::Rest(code.to_owned(), Pause::Drawn)
            }
            DialError::Unreachable(why) => Ending::Rest(why, Pause::Drawn),
            DialError::Refused { code, reason, retry_after, hint } => {
                self.hint = hint.unwrap_or(self.hint);
                self.ended(code, &reason, retry_after).await
            }
        }
    }

    /// What a close code or an HTTP status asks for.
    async fn ended(&mut self, code: u16, reason: &str, retry_after: Option<Duration>) -> Ending {
        let cause = if reason.is_empty() { format!("closed with {code}") } else { reason.to_owned() };
        match code {
            401 | 4501 if reason == "ticket_invalid" => Ending::Rest(cause, Pause::Drawn),
            401 | 4501 if self.dialer.tokens.refused(reason).await => Ending::Rest(cause, Pause::None),
            401 | 4501 => Ending::Stop(Stopped::new("unauthorized", Some(4501), cause)),
            4509 => Ending::Rest(cause, Pause::UntilWoken),
            403 => Ending::Stop(Stopped::new("forbidden_origin", Some(4503), "")),
            4500..=4999 => Ending::Stop(Stopped::new(&cause, Some(code), "")),
            _ => Ending::Rest(cause, retry_after.map_or(Pause::Drawn, Pause::AtLeast)),
        }
    }

    /// Serves a line, and during a move two of them.
    async fn serve(&mut self) -> Ending {
        if let ControlFlow::Break(ending) = self.welcomed(false).await {
            return ending;
        }
        let mut clock = Clock::new();
        loop {
            let has_room = self.shared.has_room();
            let timer = self.earliest_timer();
            let flow = tokio::select! {
                heard = hear(&mut self.line), if has_room => self.heard(false, heard).await,
                heard = hear(&mut self.next), if has_room => self.heard(true, heard).await,
                () = self.shared.room.notified(), if !has_room => ControlFlow::Continue(()),
                opened = opened(&mut self.opening) => self.opened(opened).await,
                token = renewed(&mut self.refreshing) => self.renewed(token).await,
                () = self.shared.acks.notified() => self.ack_soon().await,
                () = self.shared.wake.notified() => self.look().await,
                () = clock.jumps() => self.look().await,
                () = self.shared.renew.notified() => self.renew(),
                () = self.shared.words.notified() => self.say_words().await,
                () = timed(timer) => self.tick().await,
            };
            if let ControlFlow::Break(ending) = flow {
                return ending;
            }
        }
    }

    /// Says what the application wants said, on both lines of a move.
    async fn say_words(&mut self) -> ControlFlow<Ending> {
        let words = self.shared.take_words();
        for line in self.line.iter_mut().chain(&mut self.next) {
            words.iter().cloned().for_each(|frame| line.say_later(frame));
        }
        self.tick().await
    }

    fn earliest_timer(&self) -> Option<Instant> {
        let probe = self.probe.as_ref().map(|probe| probe.until);
        let lines = self.line.iter().chain(&self.next).map(Line::next_words);
        [self.ack_at, self.ask_at, self.refresh_at, probe].into_iter().chain(lines).flatten().min()
    }

    async fn tick(&mut self) -> ControlFlow<Ending> {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if is_due(self.ack_at) {
            self.say_acks(false).await;
        }
        for line in self.line.iter_mut().chain(&mut self.next) {
            line.say_due(now).await;
        }
        if is_due(self.ask_at) {
            for line in self.line.iter_mut().chain(&mut self.next) {
                line.say(ClientFrame::Ping.encode()).await;
            }
            let every = self.line.as_ref().and_then(|line| line.welcome.ask_every);
            self.ask_at = every.map(|every| now + every);
        }
        if is_due(self.refresh_at) {
            self.refresh_at = None;
            return self.renew();
        }
        if is_due(self.probe.as_ref().map(|probe| probe.until)) {
            self.probed();
        }
        ControlFlow::Continue(())
    }

    async fn ack_soon(&mut self) -> ControlFlow<Ending> {
        let due = self.line.as_ref().map_or(0, |line| self.shared.with(|books| books.due(&line.said)));
        if due >= u64::from(self.dialer.window / 2).max(1) {
            self.say_acks(false).await;
        } else {
            self.ack_at.get_or_insert_with(|| Instant::now() + ACK_DELAY);
        }
        ControlFlow::Continue(())
    }

    /// Acks are cumulative: the newest says it all. It goes to both lines of a move.
    async fn say_acks(&mut self, again: bool) {
        self.ack_at = None;
        for line in self.line.iter_mut().chain(&mut self.next) {
            let acks = self.shared.with(|books| books.acks(&mut line.said, again));
            line.say_acks(acks).await;
        }
    }
}

async fn hear(line: &mut Option<Line>) -> Heard {
    match line {
        Some(line) => line.hear().await,
        None => std::future::pending().await,
    }
}

async fn opened(opening: &mut Option<Opening>) -> Result<Line, DialError> {
    match opening {
        Some(opening) => (&mut opening.future).await,
        None => std::future::pending().await,
    }
}

async fn renewed(
    refreshing: &mut Option<BoxFuture<'static, Result<String, TokenFault>>>,
) -> Result<String, TokenFault> {
    match refreshing {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn timed(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn rest_for(rest: Option<Duration>) {
    match rest {
        Some(rest) => sleep(rest).await,
        None => std::future::pending().await,
    }
}
