//! What is checked or made once: the identity of the store, and indexes that must not be there.

use futures_util::StreamExt;
use mongodb::bson::{Document, doc};
use mongodb::error::Error;
use mongodb::options::ReturnDocument;

use super::stored::ABOUT;
use super::{Inner, OpenError};

impl Inner {
    /// The identity of the store. `made` is stored and returned if there is none yet (majority).
    pub(super) async fn identity(&self, made: &str) -> mongodb::error::Result<String> {
        let about = self.database.collection::<Document>(ABOUT);
        let update = doc! { "$setOnInsert": { "id": made } };
        let finding = about
            .find_one_and_update(doc! { "_id": "store" }, update)
            .upsert(true)
            .return_document(ReturnDocument::After);
        let found = self.in_time(finding.into_future()).await?.unwrap_or_default();
        found
            .get_str("id")
            .map(str::to_owned)
            .map_err(|_| Error::custom("the identity of the store is no text"))
    }

    /// An index that removes documents by itself would break the order of writers.
    pub(super) async fn check_indexes(&self) -> Result<(), OpenError> {
        for collection in [&self.documents, &self.cursors] {
            let Ok(mut indexes) = collection.list_indexes().await else { continue };
            while let Some(Ok(index)) = indexes.next().await {
                if index.options.as_ref().is_some_and(|options| options.expire_after.is_some()) {
                    return Err(OpenError::Refused(
                        "mongo.database",
                        format!(
                            "the collection {} has a TTL index, {}, which removes what only ringpush may remove: drop it",
                            collection.name(),
                            index.keys
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}
