//! The command `topic`: makes topics, and changes and shows their members.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use form_urlencoded::byte_serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::commands::{Addressed, topic_name, user_id};
use super::publish::{Collector, problem_of};
use super::terminal::{OutputError, print_line, say};
use crate::config::Config;
use crate::message::UserId;
use crate::topic::Delivery;
use crate::wire::rest::{MembersChangedResponse, MembersResponse, TopicsResponse};

/// What to do.
pub enum TopicCommand {
    /// Makes a topic with a delivery, or changes the life of its messages, in seconds.
    Create(String, Option<Delivery>, Option<u64>),
    /// Shows a topic.
    Show(String),
    /// Ends a topic.
    Delete(String),
    /// Adds members.
    Add(String, Vec<String>),
    /// Removes members.
    Remove(String, Vec<String>),
    /// Shows the members, one per line.
    Members(String),
    /// Shows the names of all topics, one per line.
    List,
}

/// Sends a request, and returns the body of a good answer.
async fn send(collector: &Collector, method: &str, path: &str, body: Bytes) -> Result<Bytes> {
    match collector.send(method, path, body).await? {
        (200..=299, answer) => Ok(answer),
        (status, answer) => bail!("{}", problem_of(status, &answer)),
    }
}

fn path_of(topic: &str) -> Result<String> {
    Ok(format!("/v1/topics/{}", topic_name("TOPIC", topic)?))
}

/// Reads a list page by page. `show` prints a page and returns where the next one begins.
async fn show_pages<T: DeserializeOwned>(
    collector: &Collector,
    path: &str,
    show: impl Fn(T) -> Result<Option<String>, OutputError>,
) -> Result<()> {
    let mut query = String::new();
    loop {
        let answer = send(collector, "GET", &format!("{path}{query}"), Bytes::new()).await?;
        let page = serde_json::from_slice(&answer).context("the answer of collect")?;
        let Some(next) = show(page)? else { return Ok(()) };
        query = format!("?after={}", byte_serialize(next.as_bytes()).collect::<String>());
    }
}

/// Runs the command.
///
/// # Errors
///
/// What was refused.
pub async fn topic(mut config: Config, at: Addressed, command: TopicCommand) -> Result<ExitCode> {
    let collector = Collector::new(&mut config, &at)?;
    let collector = &collector;
    match command {
        TopicCommand::Create(topic, delivery, ttl_s) => {
            let mut body = json!({ "ttl_s": ttl_s });
            if let Some(delivery) = delivery {
                body["delivery"] = delivery.name().into();
            }
            let body = body.to_string();
            let answer = send(collector, "PUT", &path_of(&topic)?, body.into()).await?;
            print_line(String::from_utf8_lossy(&answer))?;
        }
        TopicCommand::Show(topic) => {
            let answer = send(collector, "GET", &path_of(&topic)?, Bytes::new()).await?;
            print_line(String::from_utf8_lossy(&answer))?;
        }
        TopicCommand::Delete(topic) => {
            send(collector, "DELETE", &path_of(&topic)?, Bytes::new()).await?;
        }
        TopicCommand::Add(topic, users) => return change(collector, &topic, "add", users).await,
        TopicCommand::Remove(topic, users) => return change(collector, &topic, "remove", users).await,
        TopicCommand::Members(topic) => {
            let path = format!("{}/members", path_of(&topic)?);
            show_pages(collector, &path, |page: MembersResponse| {
                page.members.iter().try_for_each(print_line)?;
                Ok(page.next)
            })
            .await?;
        }
        TopicCommand::List => {
            show_pages(collector, "/v1/topics", |page: TopicsResponse| {
                page.topics.iter().try_for_each(|topic| print_line(&topic.topic))?;
                Ok(page.next)
            })
            .await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Adds or removes members. Fails if one is refused.
async fn change(collector: &Collector, topic: &str, how: &str, users: Vec<String>) -> Result<ExitCode> {
    let users = users.iter().map(|user| user_id(user)).collect::<Result<Vec<UserId>>>()?;
    let names: Vec<&str> = users.iter().map(UserId::as_str).collect();
    let path = format!("{}/members", path_of(topic)?);
    let answer = send(collector, "POST", &path, json!({ how: names }).to_string().into()).await?;
    let changed: MembersChangedResponse = serde_json::from_slice(&answer).context("the answer of collect")?;
    print_line(String::from_utf8_lossy(&answer))?;
    for refused in &changed.refused {
        say(format_args!("ringpush: {} did not join: {}", refused.user, refused.detail));
    }
    Ok(if changed.refused.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
