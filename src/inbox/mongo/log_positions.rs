//! The positions of devices in logs of topics. They stand in the document of the device's cursor
//! and go with it.

use std::collections::HashMap;

use futures_util::TryStreamExt;
use mongodb::bson::{Document, doc};
use mongodb::options::ReadConcern;

use super::stored::{int, integer};
use super::{Inner, unavailable};
use crate::inbox::{Device, InboxError, Positions};
use crate::message::{LogId, Seq, TopicName};

/// The field of the positions by topic, and that of everyone's.
const TOPICS: &str = "p";
const EVERYONE: &str = "e";

/// The path of a position. A `.` would divide it, and stands as `/`, which no topic has.
fn path(log: &LogId) -> String {
    match log {
        LogId::Topic(name) => format!("{TOPICS}.{}", name.as_str().replace('.', "/")),
        LogId::Everyone => EVERYONE.to_owned(),
    }
}

/// The part of an update that raises positions.
pub(super) fn raised(logs: &[(LogId, Seq)]) -> Document {
    logs.iter().map(|(log, seq)| (path(log), int(seq.get()).into())).collect()
}

/// The user and the device of a cursor.
fn device_of(document: &Document) -> Option<(&str, &str)> {
    let place = document.get_document("_id").ok()?;
    Some((place.get_str("u").ok()?, place.get_str("d").ok()?))
}

fn read(document: &Document) -> Positions {
    let seq = |document: &Document, name: &str| {
        integer(document, name).and_then(|n| u64::try_from(n).ok()).map(Seq::at)
    };
    let by_topic = document.get_document(TOPICS).ok();
    let topics = by_topic.into_iter().flat_map(|topics| topics.keys().map(move |name| (topics, name)));
    let topics = topics.filter_map(|(topics, name)| {
        Some((LogId::Topic(TopicName::parse(&name.replace('/', ".")).ok()?), seq(topics, name)?))
    });
    topics.chain(seq(document, EVERYONE).map(|seq| (LogId::Everyone, seq))).collect()
}

impl Inner {
    /// A majority is not waited for, because losing a position costs only repeats.
    pub(super) async fn log_positions(&self, devices: &[Device]) -> Result<Vec<Positions>, InboxError> {
        let place = |(user, device): &Device| doc! { "u": user.as_str(), "d": device.as_str() };
        let places: Vec<Document> = devices.iter().map(place).collect();
        let reading = async {
            let fields = doc! { TOPICS: 1, EVERYONE: 1 };
            let found = self.cursors.find(doc! { "_id": { "$in": places } }).projection(fields);
            let found = found.batch_size(10_000).read_concern(ReadConcern::local()).await?;
            found.try_collect::<Vec<Document>>().await
        };
        let found = self.in_time(reading).await.map_err(unavailable)?;
        let known: HashMap<(&str, &str), &Document> =
            found.iter().filter_map(|document| Some((device_of(document)?, document))).collect();
        let of = |(user, device): &Device| {
            known.get(&(user.as_str(), device.as_str())).map(|document| read(document)).unwrap_or_default()
        };
        Ok(devices.iter().map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_dots_do_not_stand_in_one_another() {
        let logs = ["a", "a.b", "a.b.c", "a:b"].map(|name| LogId::Topic(TopicName::parse(name).unwrap()));
        let all: Vec<(LogId, Seq)> =
            logs.into_iter().chain([LogId::Everyone]).zip((1..).map(Seq::at)).collect();
        let update = raised(&all);
        // As MongoDB applies it: each path names a field of `p`, whose name has no dot.
        let mut document = Document::new();
        for (path, n) in &update {
            match path.split_once('.') {
                None => drop(document.insert(path, n.clone())),
                Some((field, name)) => {
                    assert!(!name.contains('.'), "{path}");
                    let mut inner = document.get_document(field).cloned().unwrap_or_default();
                    inner.insert(name, n.clone());
                    document.insert(field, inner);
                }
            }
        }
        assert_eq!(read(&document), all);
        assert_eq!(read(&doc! { "p": { "a b": 1i64, "c": -1i64, "d": "x" }, "e": 1.5 }), []);
    }
}
