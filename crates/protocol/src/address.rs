//! Public addresses: the template that names a node to clients, and the paths and queries of a
//! socket request.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

use crate::frame::{Begin, SessionOptions, Since, parse_window};
use crate::message::{ClientName, DeviceId, NodeId};

/// Characters that are escaped in a path segment or a query value.
const RESERVED: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'/')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// Escapes `text` for a path segment or a query value.
#[must_use]
pub fn escape(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// Reverses [`escape`]. Returns `None` if the bytes are not UTF-8.
#[must_use]
pub fn unescape(text: &str) -> Option<String> {
    percent_decode_str(text).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

/// Builds the public URL of a node's socket from a template and a checked node id, never from what
/// a client or a store says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlTemplate {
    before: String,
    after: String,
}

impl UrlTemplate {
    /// Parses a template such as `wss://push.example.com/n/{node}/v1/ws`.
    ///
    /// # Errors
    ///
    /// The rule that the template breaks.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        if !(text.starts_with("ws://") || text.starts_with("wss://")) {
            return Err("must begin with ws:// or wss://");
        }
        if text.contains(['?', '#', ' ']) {
            return Err("must not contain '?', '#' or spaces: queries are added");
        }
        match text.split_once("{node}") {
            Some((_, after)) if after.contains("{node}") => Err("must contain {node} once"),
            Some((before, after)) => Ok(Self { before: before.into(), after: after.into() }),
            None => Err("must contain {node}, which stands for the name of the node, \
                         such as wss://push.example.com/n/{node}/v1/ws"),
        }
    }

    /// The URL of `node`.
    #[must_use]
    pub fn url(&self, node: &NodeId) -> String {
        format!("{}{node}{}", self.before, self.after)
    }
}

impl SessionOptions {
    /// The options as parameters of a query, each after a `&`.
    #[must_use]
    pub fn query(&self) -> String {
        // What a client says of logs stands in its `auth` frame alone.
        let Self { device, since, begin, heartbeat, window, client, logs: _ } = self;
        let since = since.map(|since| match since {
            Since::After(seq) => seq.to_string(),
            Since::Latest => "latest".to_owned(),
        });
        let begin = begin.map(|begin| match begin {
            Begin::Oldest => "oldest".to_owned(),
            Begin::Latest => "latest".to_owned(),
        });
        let all = [
            ("device", device.as_ref().map(|device| escape(device.as_str()))),
            ("since", since),
            ("begin", begin),
            ("heartbeat", heartbeat.map(|heartbeat| u8::from(heartbeat).to_string())),
            ("window", window.map(|window| window.to_string())),
            ("client", client.as_ref().map(|client| escape(client.as_str()))),
        ];
        let shown = |(name, value): (&str, Option<String>)| value.map(|value| format!("&{name}={value}"));
        all.into_iter().filter_map(shown).collect()
    }
}

/// The query of a socket request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SocketQuery {
    /// `device`, `since`, `begin`, `heartbeat`, `window` and `client`.
    pub options: SessionOptions,
    /// `ticket`, from `connect`.
    pub ticket: Option<String>,
    /// `hops`: how often this client was sent on.
    pub hops: u32,
    /// `epoch` of the view that sent it on.
    pub epoch: u64,
    /// `topics=auth`: an `auth` frame follows, which says what the client knows of logs.
    pub topics_in_auth: bool,
    /// `redirect=http`: a 307 instead of a `move` frame.
    pub redirect_http: bool,
    /// `access_token`. It is used only where the configuration allows it.
    pub access_token: Option<String>,
}

impl SocketQuery {
    /// Parses a raw query. Unknown parameters are ignored.
    ///
    /// # Errors
    ///
    /// Every faulty parameter with the rule that it breaks.
    pub fn parse(query: &str) -> Result<Self, Vec<(&'static str, String)>> {
        let mut read = Self::default();
        let mut faults = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, raw) = pair.split_once('=').unwrap_or((pair, ""));
            let Some(value) = unescape(&raw.replace('+', " ")) else {
                faults.push(("query", format!("the value of {name:?} is not UTF-8")));
                continue;
            };
            if let Err(fault) = read.take(name, value) {
                faults.push(fault);
            }
        }
        if faults.is_empty() { Ok(read) } else { Err(faults) }
    }

    fn take(&mut self, name: &str, value: String) -> Result<(), (&'static str, String)> {
        match name {
            "device" => {
                self.options.device = Some(DeviceId::parse(&value).map_err(|f| ("device", f.to_string()))?);
            }
            "since" => {
                self.options.since = Some(Since::parse(&value).map_err(|rule| ("since", rule.to_owned()))?);
            }
            "begin" => {
                self.options.begin = Some(Begin::parse(&value).map_err(|rule| ("begin", rule.to_owned()))?);
            }
            "window" => {
                let window = parse_window(&value).map_err(|rule| ("window", rule.to_owned()))?;
                self.options.window = Some(window);
            }
            "heartbeat" => {
                self.options.heartbeat = match value.as_str() {
                    "1" => Some(true),
                    "0" => Some(false),
                    _ => return Err(("heartbeat", "heartbeat is 1 or 0".to_owned())),
                }
            }
            "client" => {
                let client = ClientName::parse(&value).map_err(|f| ("client", f.to_string()))?;
                self.options.client = Some(client);
            }
            "ticket" => self.ticket = Some(value),
            "access_token" => self.access_token = Some(value),
            "hops" => {
                self.hops = value.parse().map_err(|_| ("hops", "hops is a small integer".to_owned()))?
            }
            "epoch" => self.epoch = value.parse().map_err(|_| ("epoch", "epoch is an integer".to_owned()))?,
            "topics" if value == "auth" => self.topics_in_auth = true,
            "topics" => return Err(("topics", "topics is \"auth\" or absent".to_owned())),
            "redirect" if value == "http" => self.redirect_http = true,
            "redirect" => return Err(("redirect", "redirect is \"http\" or absent".to_owned())),
            _ => {}
        }
        Ok(())
    }
}

/// The node in the path `/n/{node}/v1/ws`. `None` for other paths and for names that no node can
/// have.
#[must_use]
pub fn node_in_path(path: &str) -> Option<&str> {
    path.strip_prefix("/n/")?.strip_suffix("/v1/ws").filter(|node| NodeId::parse(node).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Seq;
    use proptest::prelude::*;

    #[test]
    fn a_template_names_any_node_and_nothing_else() {
        let template = UrlTemplate::parse("wss://push.example.com/n/{node}/v1/ws").unwrap();
        let node = NodeId::parse("push-2").unwrap();
        assert_eq!(template.url(&node), "wss://push.example.com/n/push-2/v1/ws");
        for bad in [
            "",
            "https://x/{node}",
            "wss://x/ws",
            "wss://x/{node}/{node}",
            "wss://x/{node}?a=b",
            "wss:// x/{node}",
        ] {
            assert!(UrlTemplate::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_query_asks_of_its_session_what_auth_may_ask() {
        let query =
            SocketQuery::parse("begin=latest&heartbeat=1&window=256&client=ringpush-js%2F1.0").unwrap();
        let SessionOptions { begin, heartbeat, window, client, .. } = query.options;
        assert_eq!((begin, heartbeat, window), (Some(Begin::Latest), Some(true), Some(256)));
        assert_eq!(client.unwrap().as_str(), "ringpush-js/1.0");
        for (name, bad) in [
            ("window", "0"),
            ("window", "-1"),
            ("window", "10001"),
            ("window", "99999999999999999999"),
            ("window", "many"),
            ("begin", "newest"),
            ("heartbeat", "yes"),
            ("client", "%00"),
            ("client", ""),
            ("topics", "news"),
        ] {
            let faults = SocketQuery::parse(&format!("{name}={bad}")).unwrap_err();
            assert!(faults.len() == 1 && faults[0].0 == name && faults[0].1.contains(name), "{faults:?}");
        }
    }

    #[test]
    fn a_query_is_read_whole_or_every_fault_is_named() {
        let query = SocketQuery::parse("device=web-1&since=41&hops=2&epoch=8&redirect=http&x=y").unwrap();
        assert_eq!(query.options.since, Some(Since::After(Seq::new(41).unwrap())));
        assert_eq!((query.hops, query.epoch, query.redirect_http), (2, 8, true));
        let faults = SocketQuery::parse("device=a%20b&since=-1&hops=many").unwrap_err();
        assert_eq!(faults.iter().map(|f| f.0).collect::<Vec<_>>(), ["device", "since", "hops"]);
    }

    #[test]
    fn the_path_names_a_node() {
        assert_eq!(node_in_path("/n/push-2/v1/ws"), Some("push-2"));
        assert_eq!(node_in_path("/v1/ws"), None);
        for no_node in ["a/b", "", "..", "VM", "%70ush-0", "push_0"] {
            assert_eq!(node_in_path(&format!("/n/{no_node}/v1/ws")), None, "{no_node}");
        }
    }

    proptest! {
        #[test]
        fn what_is_escaped_comes_back(text in "\\PC{0,40}") {
            let escaped = escape(&text);
            prop_assert!(!escaped.contains(['/', '?', '&', ' ']));
            prop_assert_eq!(unescape(&escaped), Some(text));
        }
    }
}
