//! Opening the store: the URI, the indexes, the identity, and errors with their remedy.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use mongodb::bson::doc;
use mongodb::error::{Error, ErrorKind};
use mongodb::options::{
    Acknowledgment, ClientOptions, ReadConcern, ReadPreference, SelectionCriteria, WriteConcern,
};
use mongodb::{Client, Database};
use parking_lot::Mutex;

use super::primary::Primary;
use super::stored::{CURSORS, INBOX, LOGS, MEMBERS, TOPICS};
use super::{Inner, MongoInbox, MongoTimes};
use crate::clock::Clock;

/// Why the inbox cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The store does not respond; waiting may help.
    #[error("MongoDB cannot be reached: {0}")]
    Unreachable(String),
    /// A configuration key, and what is wrong with its value. Waiting does not help.
    #[error("{0}: {1}")]
    Refused(&'static str, String),
}

impl MongoInbox {
    /// Parses the URI. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// [`OpenError::Refused`].
    pub async fn new(uri: &str, database: &str, times: MongoTimes, clock: Clock) -> Result<Self, OpenError> {
        let refused = |error: Error| OpenError::Refused("mongo.uri", words(&error));
        let names_compressors = uri.split(['?', '&']).skip(1).any(|option| {
            option.split('=').next().is_some_and(|name| name.eq_ignore_ascii_case("compressors"))
        });
        if names_compressors {
            let why = "compressors= is not built in: leave it out".to_owned();
            return Err(OpenError::Refused("mongo.uri", why));
        }
        let mut options = ClientOptions::parse(uri).await.map_err(refused)?;
        options.app_name.get_or_insert_with(|| "ringpush".to_owned());
        options.retry_writes = Some(true);
        options.server_selection_timeout = Some(SELECTION_TIMEOUT);
        options.connect_timeout = Some(SELECTION_TIMEOUT);
        options.read_concern = Some(ReadConcern::majority());
        options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
        options.write_concern = Some(majority());
        let primary = Arc::new(Primary::new(clock.clone()));
        options.sdam_event_handler = Some(Arc::clone(&primary).observer());
        let client = Client::with_options(options).map_err(refused)?;
        let database = client.database(database);
        let inner = |collection| Inner::new(collection, &database, &primary, &clock, times);
        Ok(Self { inner: Arc::new(inner(INBOX)), logs: Some(Arc::new(inner(LOGS))) })
    }

    /// Connects and checks or creates what must exist: a replica set, the indexes, and the store's
    /// identity, which is returned.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn prepare(&self) -> Result<String, OpenError> {
        let inner = &self.inner;
        let admin = inner.database.client().database("admin");
        let hello = inner.in_time(admin.run_command(doc! { "hello": 1 }).into_future()).await;
        let hello = hello.map_err(|error| open_fault(&error))?;
        if !hello.contains_key("setName") && !hello.get_str("msg").is_ok_and(|kind| kind == "isdbgrid") {
            return Err(OpenError::Refused(
                "mongo.uri",
                "this is a standalone MongoDB, which cannot keep what it acknowledged: start it with --replSet and run \
                 rs.initiate(), or name a replica set"
                    .to_owned(),
            ));
        }
        for inner in [Some(inner), self.logs.as_ref()].into_iter().flatten() {
            inner.check_indexes().await?;
            inner.make_indexes().await?;
            // A user who may not ask for it is refused here, and not taken for an outage.
            super::watch::collection(inner).await.map_err(|error| open_fault(&error))?;
            super::watch::look(inner).await.map_err(|error| OpenError::Unreachable(error.to_string()))?;
        }
        let made = ulid::Ulid::generate().to_string();
        let identity = inner.identity(&made).await.map_err(|error| open_fault(&error))?;
        if let Some(logs) = &self.logs {
            logs.identity.get_or_init(|| identity.clone());
        }
        Ok(inner.identity.get_or_init(|| identity).clone())
    }
}

impl Inner {
    /// A store whose messages stand in `collection`.
    fn new(
        collection: &'static str,
        database: &Database,
        primary: &Arc<Primary>,
        clock: &Clock,
        times: MongoTimes,
    ) -> Self {
        Self {
            is_of_logs: collection == LOGS,
            messages: database.collection(collection),
            documents: database.collection(collection),
            cursors: database.collection(CURSORS),
            topics: database.collection(TOPICS),
            members: database.collection(MEMBERS),
            primary: Arc::clone(primary),
            database: database.clone(),
            clock: clock.clone(),
            times,
            appends: tokio::sync::Mutex::default(),
            marker: Mutex::default(),
            restored: AtomicBool::new(false),
            ids_refused: Mutex::default(),
            removals: tokio::sync::Mutex::default(),
            identity: std::sync::OnceLock::new(),
        }
    }
}

pub(super) fn majority() -> WriteConcern {
    WriteConcern::builder().w(Acknowledgment::Majority).journal(true).w_timeout(MAJORITY_TIMEOUT).build()
}

/// The driver's error text without the URI, or ours where the driver has none.
pub(super) fn words(error: &Error) -> String {
    match &*error.kind {
        ErrorKind::Custom(own) => {
            own.downcast_ref::<&str>().copied().unwrap_or("an error of its own").to_owned()
        }
        kind => kind.to_string(),
    }
}

pub(super) fn open_fault(error: &Error) -> OpenError {
    match &*error.kind {
        ErrorKind::Authentication { .. } => {
            OpenError::Refused("mongo.uri", format!("the user or password is refused: {}", words(error)))
        }
        // 13 Unauthorized, 18 AuthenticationFailed.
        ErrorKind::Command(command) if [13, 18].contains(&command.code) => {
            OpenError::Refused("mongo.uri", format!("the user may not do this: {}", words(error)))
        }
        // 73 InvalidNamespace, 13297 DatabaseDifferCase.
        ErrorKind::Command(command) if [73, 13_297].contains(&command.code) => {
            OpenError::Refused("mongo.database", command.message.clone())
        }
        // A wrong password shows as a failed server selection.
        ErrorKind::ServerSelection { message, .. } if message.contains("uthentication") => {
            OpenError::Refused("mongo.uri", format!("the user or password is refused: {message}"))
        }
        _ => OpenError::Unreachable(words(error)),
    }
}

pub(super) fn index_fault(collection: &str, error: &Error) -> OpenError {
    match &*error.kind {
        // 85 IndexOptionsConflict, 86 IndexKeySpecsConflict, 11000 DuplicateKey.
        ErrorKind::Command(command) if [85, 86, 11000].contains(&command.code) => OpenError::Refused(
            "mongo.database",
            format!(
                "an index of {collection} is not what it must be; drop it and start again: {}",
                command.message
            ),
        ),
        _ => open_fault(error),
    }
}

/// How long the driver looks for a primary.
pub(super) const SELECTION_TIMEOUT: Duration = Duration::from_secs(3);

/// A majority that takes longer counts as no response.
pub(super) const MAJORITY_TIMEOUT: Duration = Duration::from_secs(3);
