//! The command line: commands and their options.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::audit::ClientLibrary;
use super::commands;
use super::topic::TopicCommand;
use crate::app::PUSH_NODES_MAX;
use crate::config::Faults;
use crate::topic::Delivery;
use crate::wire::frame::Since;

/// The command line.
#[derive(Parser)]
#[command(name = "ringpush", version, about, long_about = LONG_ABOUT, after_help = EXAMPLES)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub common: Common,
    /// What to do; nothing is `serve`.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const LONG_ABOUT: &str = "A WebSocket push cluster: post a message for a user, and the user's browser or app has it a \
moment later. Without a command it serves: all roles in one process, an embedded store under ./data, loopback only.";

const EXAMPLES: &str = "Examples:
  ringpush                                   serve, with nothing configured
  ringpush token alice                       print a token for alice
  ringpush listen alice                      print alice's messages as they come
  ringpush publish alice '{\"text\":\"hello\"}'  send one
  ringpush topic create news                 make a topic; then topic add, publish --topic
  ringpush serve --push-nodes 3              three push nodes in one process";

/// Options of every command.
#[derive(Args, Clone)]
pub struct Common {
    /// Configuration file (TOML); see config/local.toml for every key.
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where the embedded store and the development keys are [default: ./data, or RINGPUSH_DATA].
    #[arg(long, global = true, value_name = "DIR")]
    pub data: Option<PathBuf>,
}

/// A command.
#[derive(Subcommand)]
pub enum Command {
    /// Run the roles.
    #[command(after_help = "Examples:
  ringpush serve --push-nodes 3
  ringpush serve --config config/cluster.toml --roles push,dispatch")]
    Serve(Serve),
    /// Print a token for a user, alone on its line.
    #[command(after_help = "Example:\n  TOKEN=$(ringpush token alice --ttl 1h)")]
    Token {
        /// The user id.
        user: String,
        /// How long it lives, such as 90s, 15m, 1h, 7d.
        #[arg(long, default_value = "1h")]
        ttl: String,
        /// A topic that the client may watch without being a member, or the beginning of such names
        /// with a * behind it, such as 'match-*'; more than one may be named.
        #[arg(long, value_name = "PATTERN")]
        watch: Vec<String>,
    },
    /// Publish one JSON payload, or many from standard input, to a user or to the members of a
    /// topic.
    #[command(
        override_usage = "ringpush publish [OPTIONS] USER PAYLOAD
       ringpush publish [OPTIONS] --topic TOPIC PAYLOAD
       ringpush publish [OPTIONS] --everyone PAYLOAD",
        after_help = "Examples:
  ringpush publish alice '{\"text\":\"hello\"}'
  ringpush publish --topic news '{\"text\":\"hello\"}'
  ringpush publish --everyone '{\"text\":\"hello\"}'
  seq 1000 | ringpush publish alice -          one payload per line (NDJSON)
  ringpush publish -- -alice 1                 a user id that begins with a dash"
    )]
    Publish {
        /// The user id; not with --topic and --everyone. Then JSON text, or - to read one payload
        /// per line from standard input.
        #[arg(required = true, num_args = 1..=2, allow_negative_numbers = true, value_names = ["USER", "PAYLOAD"])]
        words: Vec<String>,
        /// A topic whose members get it; more than one may be named.
        #[arg(long, value_name = "TOPIC")]
        topic: Vec<String>,
        /// All users get it.
        #[arg(long, conflicts_with = "topic")]
        everyone: bool,
        /// Collect's URL [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Connect as a user and print a JSON line per message; follows moves, resumes.
    #[command(after_help = "Examples:
  ringpush listen alice                 what this device has not acked yet, then what comes
  ringpush listen alice --since latest  only what comes from now on")]
    Listen {
        /// The user id.
        user: String,
        /// Start after this seq, or at `latest` [default: the device's own cursor].
        #[arg(long, value_name = "SEQ", value_parser = parse_since)]
        since: Option<Since>,
        /// The device, with a cursor of its own.
        #[arg(long, default_value = "cli")]
        device: String,
        /// A topic with a log, of which the user need not be a member; more than one may be named.
        #[arg(long, value_name = "TOPIC")]
        watch: Vec<String>,
        /// A push node's URL, or the load balancer's [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Make topics; change and show their members.
    #[command(after_help = "Examples:
  ringpush topic create news
  ringpush topic create announcements --delivery log
  ringpush topic add news alice bob
  ringpush topic members news")]
    Topic {
        /// What to do with it.
        #[command(subcommand)]
        command: TopicOptions,
        /// Collect's URL [default: the server of the data directory].
        #[arg(long, value_name = "URL", global = true)]
        target: Option<String>,
    },
    /// Show members, shares and epoch; with a user, its owner.
    Ring {
        /// The user id.
        user: Option<String>,
        /// Collect's URL [default: the server of the data directory].
        #[arg(long, value_name = "URL")]
        target: Option<String>,
    },
    /// Publish to many users, hold their sockets, and account for every message: exits 1 if one is
    /// lost.
    #[command(after_help = "Example:
  ringpush audit --target https://push.example.com --publish http://collect:8081 --users 2000 --rate 500 --for 60s")]
    Audit(AuditOptions),
    /// Work with configurations.
    Config {
        /// What to do with it.
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

/// What to do with topics.
#[derive(Subcommand)]
pub enum TopicOptions {
    /// Make a topic, or change the life of its messages.
    Create {
        /// Its name.
        topic: String,
        /// How messages reach the members: inbox, for up to 1,000 members, or log [default: inbox].
        #[arg(long, value_name = "DELIVERY", value_parser = parse_delivery)]
        delivery: Option<Delivery>,
        /// Life of messages whose sender names none, such as 1h or 7d.
        #[arg(long, value_name = "TIME")]
        ttl: Option<String>,
    },
    /// Show a topic with the number of its members.
    Show {
        /// Its name.
        topic: String,
    },
    /// End a topic and its memberships.
    Delete {
        /// Its name.
        topic: String,
    },
    /// Add users to a topic.
    Add {
        /// Its name.
        topic: String,
        /// The user ids.
        #[arg(required = true)]
        users: Vec<String>,
    },
    /// Remove users from a topic.
    Remove {
        /// Its name.
        topic: String,
        /// The user ids.
        #[arg(required = true)]
        users: Vec<String>,
    },
    /// Print the members of a topic, one per line.
    Members {
        /// Its name.
        topic: String,
    },
    /// Print the names of all topics, one per line.
    List,
}

impl TopicOptions {
    /// The command that these options ask for.
    ///
    /// # Errors
    ///
    /// A bad time.
    pub fn command(self) -> Result<TopicCommand, Faults> {
        Ok(match self {
            Self::Create { topic, delivery, ttl } => {
                let rule =
                    |text| Faults(vec![format!("--ttl: {text:?} must be a time such as 15m, 1h or 7d")]);
                let seconds = |text: String| commands::seconds(&text).ok_or_else(|| rule(text));
                TopicCommand::Create(topic, delivery, ttl.map(seconds).transpose()?)
            }
            Self::Show { topic } => TopicCommand::Show(topic),
            Self::Delete { topic } => TopicCommand::Delete(topic),
            Self::Add { topic, users } => TopicCommand::Add(topic, users),
            Self::Remove { topic, users } => TopicCommand::Remove(topic, users),
            Self::Members { topic } => TopicCommand::Members(topic),
            Self::List => TopicCommand::List,
        })
    }
}

/// Options of `audit`.
#[derive(Args)]
pub struct AuditOptions {
    /// The load balancer's URL, or a push node's [default: the server of the data directory].
    #[arg(long, value_name = "URL")]
    pub target: Option<String>,
    /// Collect's URL, once or several times [default: the server of the data directory].
    #[arg(long, value_name = "URL", value_delimiter = ',')]
    pub publish: Vec<String>,
    /// Users, each with one socket.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub users: u32,
    /// Messages per second, to users at random.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Topics that are published to beside, while members join and leave; every second one has a
    /// log. Everyone gets a message each second.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub topics: u32,
    /// Members of each topic at the beginning.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub members: u32,
    /// Messages per second, each to one of the topics.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub topic_rate: u32,
    /// How long it publishes, such as 60s or 5m. Ctrl-C (or SIGTERM) ends the load before, and what
    /// was accepted until then is accounted for.
    #[arg(long = "for", default_value = "60s", value_name = "TIME")]
    pub time: String,
    /// How long accepted messages may take to arrive after the last publish; longer than a sweep.
    #[arg(long, default_value = "50s", value_name = "TIME")]
    pub settle: String,
    /// Fail when a message takes longer than this.
    #[arg(long, value_name = "TIME")]
    pub max_delay: Option<String>,
    /// Seed of the random choice of users [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Print one line of JSON.
    #[arg(long)]
    pub json: bool,
    /// Which client library receives: rust, js (Node 22), python (3.10 or later, with websockets).
    #[arg(long, default_value = "rust", value_name = "LIBRARY", value_parser = ClientLibrary::parse)]
    pub clients: ClientLibrary,
    /// Audits again and again, with this pause between two, until it is interrupted; no audit's
    /// failure ends it. Needs --metrics.
    #[arg(long, value_name = "TIME", requires = "metrics")]
    pub every: Option<String>,
    /// Where the results of --every are served for Prometheus, as ringpush_canary_…, such as
    /// 0.0.0.0:9090.
    #[arg(long, value_name = "ADDRESS", requires = "every")]
    pub metrics: Option<std::net::SocketAddr>,
    /// The Node or Python that runs it [default: node, python3].
    #[arg(long, value_name = "PROGRAM")]
    pub client_program: Option<String>,
}

/// Options of `serve`.
#[derive(Args, Default)]
pub struct Serve {
    /// Which roles run here: auth, collect, dispatch, push.
    #[arg(long, value_name = "ROLES")]
    pub roles: Option<String>,
    /// Run this many push nodes in this process: push-0, push-1, …
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=PUSH_NODES_MAX as i64))]
    pub push_nodes: Option<u16>,
    /// How log lines look: text or json.
    #[arg(long, default_value = "text", value_parser = ["text", "json"])]
    pub log: String,
    /// What is logged, as in RUST_LOG: info, debug, ringpush=debug [default: RUST_LOG, or info].
    #[arg(long, value_name = "FILTER")]
    pub log_filter: Option<String>,
}

/// What to do with a configuration.
#[derive(Subcommand)]
pub enum ConfigCommand {
    /// Validate, and print what is in force, without secrets.
    Check {
        /// The file [default: --config, or none].
        file: Option<PathBuf>,
    },
}

fn parse_delivery(text: &str) -> Result<Delivery, String> {
    Delivery::parse(text).ok_or_else(|| "it is inbox or log".to_owned())
}

fn parse_since(text: &str) -> Result<Since, String> {
    Since::parse(text).map_err(str::to_owned)
}
