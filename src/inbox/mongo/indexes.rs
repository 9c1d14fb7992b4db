//! The indexes: which must exist, and what is refused while the unique one cannot.

use futures_util::TryStreamExt;
use mongodb::bson::{Bson, Document, doc};
use mongodb::error::ErrorKind;
use mongodb::options::IndexOptions;
use mongodb::{Collection, IndexModel};

use super::stored::{CURSORS, MEMBERS, TOPICS};
use super::{DUPLICATE_KEY, Inner, OpenError, index_fault, words};

/// MongoDB's code for a collection that does not exist.
const NO_COLLECTION: i32 = 26;
/// Duplicate ids that are named in the error text.
const NAMED: i64 = 5;

impl Inner {
    /// Whether the unique index on idempotency keys exists.
    async fn tells_ids_apart(&self) -> Result<bool, OpenError> {
        let all = async { self.documents.list_indexes().await?.try_collect::<Vec<IndexModel>>().await };
        let all = match self.in_time(all).await {
            Err(error) if matches!(&*error.kind, ErrorKind::Command(one) if one.code == NO_COLLECTION) => {
                Vec::new()
            }
            all => all.map_err(|error| index_fault(self.documents.name(), &error))?,
        };
        let is_it = |options: &IndexOptions| {
            options.name.as_deref() == Some("sender_id") && options.unique == Some(true)
        };
        Ok(all.iter().filter_map(|index| index.options.as_ref()).any(is_it))
    }

    fn refuse_ids(&self, why: Option<String>) {
        let before = std::mem::replace(&mut *self.ids_refused.lock(), why.clone());
        // A store that is being opened has no indexes yet.
        let is_open = self.identity.get().is_some();
        match (before, why) {
            (before, Some(why)) if is_open && before.as_ref() != Some(&why) => {
                tracing::warn!("mongo.database: publishes with an id are refused: {why}");
            }
            (Some(_), None) if is_open => tracing::info!("publishes with an id are accepted again"),
            _ => {}
        }
    }

    /// Creates missing indexes. While duplicate ids prevent the unique one, publishes with an id
    /// are refused, because another one could be stored twice.
    pub(super) async fn make_indexes(&self) -> Result<(), OpenError> {
        let missing = !self.tells_ids_apart().await?;
        if missing && self.ids_refused.lock().is_none() {
            // Holds until the index exists, however long it takes to create it.
            let collection = self.documents.name();
            self.refuse_ids(Some(format!(
                "the index sender_id of the collection {collection} is not there, or is not unique"
            )));
        }
        let unique = IndexOptions::builder()
            .name("sender_id".to_owned())
            .unique(true)
            .partial_filter_expression(doc! { "f": { "$exists": true } })
            .build();
        let unique = IndexModel::builder().keys(doc! { "_id.u": 1, "f": 1 }).options(unique).build();
        let made = self.in_time(self.documents.create_index(unique).into_future()).await;
        let in_the_way = match &made {
            Err(error) if matches!(&*error.kind, ErrorKind::Command(one) if one.code == DUPLICATE_KEY) => {
                true
            }
            Err(error) => return Err(index_fault(self.documents.name(), error)),
            Ok(_) => false,
        };
        let why = if in_the_way { Some(self.ids_that_stand_twice().await) } else { None };
        self.refuse_ids(why);
        let named = |name: &str| IndexOptions::builder().name(name.to_owned()).build();
        let index =
            |keys: Document, name: &str| IndexModel::builder().keys(keys).options(named(name)).build();
        let mut all: Vec<(&Collection<Document>, &str, Document, &str)> =
            vec![(&self.documents, self.documents.name(), doc! { "x": 1, "_id.u": 1 }, "expiry")];
        if !self.is_of_logs {
            self.make_topic_indexes().await?;
            all.extend([
                (&self.cursors, CURSORS, doc! { "at": 1 }, "unused"),
                (&self.cursors, CURSORS, doc! { "_id.u": 1, "at": 1 }, "user"),
                (&self.members, MEMBERS, doc! { "_id.t": 1, "_id.u": 1 }, "topic"),
            ]);
        }
        for (collection, shown, keys, name) in all {
            let made = self.in_time(collection.create_index(index(keys, name)).into_future()).await;
            made.map_err(|error| index_fault(shown, &error))?;
        }
        Ok(())
    }

    async fn make_topic_indexes(&self) -> Result<(), OpenError> {
        let partial = |keys: Document, name: &str, field: &str| {
            let options = IndexOptions::builder()
                .name(name.to_owned())
                .partial_filter_expression(doc! { field: { "$exists": true } })
                .build();
            IndexModel::builder().keys(keys).options(options).build()
        };
        let read_at_attach = doc! { "_id.u": 1, "_id.t": 1, "life": 1, "from": 1 };
        for (collection, shown, index) in [
            // Free names stay, and may be many.
            (&self.topics, TOPICS, partial(doc! { "_id": 1, "life": 1 }, "alive", "life")),
            (&self.topics, TOPICS, partial(doc! { "dead": 1 }, "dead", "dead")),
            (&self.members, MEMBERS, partial(read_at_attach, "logs", "from")),
        ] {
            let made = self.in_time(collection.create_index(index).into_future()).await;
            made.map_err(|error| index_fault(shown, &error))?;
        }
        Ok(())
    }

    /// An error text that names some duplicate ids and the remedy.
    async fn ids_that_stand_twice(&self) -> String {
        let collection = self.documents.name();
        let group =
            doc! { "_id": { "u": "$_id.u", "f": "$f" }, "at": { "$push": "$_id.n" }, "count": { "$sum": 1 } };
        let pipeline = [
            doc! { "$match": { "f": { "$exists": true } } },
            doc! { "$group": group },
            doc! { "$match": { "count": { "$gt": 1 } } },
            doc! { "$limit": NAMED },
        ];
        let reading = async {
            self.documents
                .aggregate(pipeline)
                .allow_disk_use(true)
                .await?
                .try_collect::<Vec<Document>>()
                .await
        };
        let found = match self.in_time(reading).await {
            Ok(found) => found,
            Err(error) => {
                return format!("ids stand twice in {collection}, and cannot be listed: {}", words(&error));
            }
        };
        let show = |one: &Document| {
            let key = one.get_document("_id").cloned().unwrap_or_default();
            let at = one.get_array("at").map(|all| all.iter().map(Bson::to_string).collect::<Vec<_>>());
            let part = |name: &str| key.get_str(name).unwrap_or_default().to_owned();
            format!("{:?} of user {:?} at {}", part("f"), part("u"), at.unwrap_or_default().join(", "))
        };
        let shown: Vec<String> = found.iter().map(show).collect();
        format!(
            "the index sender_id of {collection} is missing and cannot be made, for these ids stand twice: {}; unset f of all but the \
             first of each (db.{collection}.updateOne({{_id: {{u: USER, n: NUMBER}}}}, {{$unset: {{f: \"\"}}}}), and they are taken \
             again within a minute",
            shown.join("; ")
        )
    }
}
