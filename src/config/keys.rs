//! Every key, with its type and its default.

/// The type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Secret,
    List,
    SecretList,
    /// Tables in which there are secrets.
    SecretTables,
    Number,
    Fraction,
    Switch,
}

/// A key: its name, its type, and its default as it stands in the file.
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) default: &'static str,
}

impl Kind {
    pub(super) const fn is_secret(self) -> bool {
        matches!(self, Self::Secret | Self::SecretList | Self::SecretTables)
    }
}

pub(super) const fn key(name: &'static str, kind: Kind, default: &'static str) -> Key {
    Key { name, kind, default }
}

/// All keys. Addresses are those of development; elsewhere the host is 0.0.0.0.
pub(super) const KEYS: &[Key] = &[
    key("node.name", Kind::Text, "\"\""),
    key("node.roles", Kind::List, "[\"auth\", \"collect\", \"dispatch\", \"push\"]"),
    key("push.listen", Kind::Text, "\"127.0.0.1:8080\""),
    key("push.public_url", Kind::Text, "\"\""),
    key("push.origins", Kind::List, "[\"*\"]"),
    key("push.trusted_proxies", Kind::List, "[\"off\"]"),
    key("push.tls.cert", Kind::Text, "\"\""),
    key("push.tls.key", Kind::Text, "\"\""),
    key("push.drain_window_s", Kind::Number, "60"),
    key("push.accept_per_s", Kind::Number, "4000"),
    key("push.weight", Kind::Fraction, "1.0"),
    key("collect.listen", Kind::Text, "\"127.0.0.1:8081\""),
    key("collect.tls.cert", Kind::Text, "\"\""),
    key("collect.tls.key", Kind::Text, "\"\""),
    key("collect.api_keys", Kind::SecretList, "[]"),
    key("collect.keys", Kind::SecretTables, "[]"),
    key("topics.open", Kind::List, "[]"),
    key("auth.listen", Kind::Text, "\"127.0.0.1:8082\""),
    key("auth.mode", Kind::Text, "\"local\""),
    key("auth.url", Kind::Text, "\"\""),
    key("auth.token_key", Kind::Secret, "\"\""),
    key("auth.token_keys", Kind::SecretTables, "[]"),
    key("auth.jwks_url", Kind::Text, "\"\""),
    key("auth.admin_key", Kind::Secret, "\"\""),
    key("auth.issuer", Kind::Text, "\"\""),
    key("auth.audience", Kind::Text, "\"\""),
    key("auth.token_in_url", Kind::Switch, "false"),
    key("dispatch.listen", Kind::Text, "\"127.0.0.1:8083\""),
    key("peer.listen", Kind::Text, "\"127.0.0.1:7070\""),
    key("peer.secret", Kind::Secret, "\"\""),
    key("peer.secrets", Kind::SecretList, "[]"),
    key("peer.advertise", Kind::Text, "\"\""),
    key("peer.tls.cert", Kind::Text, "\"\""),
    key("peer.tls.key", Kind::Text, "\"\""),
    key("peer.tls.ca", Kind::Text, "\"\""),
    key("peer.tls.name", Kind::Text, "\"\""),
    key("ops.listen", Kind::Text, "\"127.0.0.1:9090\""),
    key("redis.url", Kind::Secret, "\"\""),
    key("redis.tls.ca", Kind::Text, "\"\""),
    key("redis.prefix", Kind::Text, "\"ringpush\""),
    key("mongo.uri", Kind::Secret, "\"\""),
    key("mongo.database", Kind::Text, "\"ringpush\""),
    key("log.level", Kind::Text, "\"info\""),
    key("data.dir", Kind::Text, "\"./data\""),
    key("limits.message_bytes", Kind::Number, "65536"),
    key("limits.recipients", Kind::Number, "1000"),
    key("limits.batch", Kind::Number, "1000"),
    key("limits.message_ttl_s", Kind::Number, "604800"),
    key("limits.member_lists_mib", Kind::Number, "64"),
    key("limits.topic_message_bytes", Kind::Number, "16384"),
    key("limits.everyone_message_bytes", Kind::Number, "4096"),
    key("limits.topic_per_s", Kind::Number, "100"),
    key("limits.everyone_per_s", Kind::Number, "10"),
    key("limits.everyone_backlog", Kind::Number, "20"),
    key("limits.tail_mib", Kind::Number, "64"),
    key("limits.fanout_mib_per_s", Kind::Number, "64"),
    key("limits.outbound_mib", Kind::Number, "512"),
    key("limits.topic_cursor_ms", Kind::Number, "60000"),
    key("limits.topic_cursors_per_s", Kind::Number, "200"),
    key("limits.sessions_per_user", Kind::Number, "64"),
    key("limits.sessions_per_device", Kind::Number, "16"),
    key("limits.auth_deadline_ms", Kind::Number, "5000"),
    key("limits.ping_ms", Kind::Number, "25000"),
    key("limits.sweep_ms", Kind::Number, "30000"),
    key("limits.reconnect_jitter_ms", Kind::Number, "5000"),
    key("limits.auth_failures_per_min", Kind::Number, "60"),
    key("limits.handshakes_per_address", Kind::Number, "256"),
    key("limits.client_frames_per_s", Kind::Number, "20000"),
    key("limits.janitor_ms", Kind::Number, "600000"),
    key("limits.head_trust_ms", Kind::Number, "600000"),
];

pub(super) fn rule_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Text | Kind::Secret => "must be a string",
        Kind::List | Kind::SecretList => "must be a list of strings",
        Kind::SecretTables => {
            "must be a list of tables ([[section.key]]), in the environment a JSON array of objects"
        }
        Kind::Number => "must be an integer",
        Kind::Fraction => "must be a number",
        Kind::Switch => "must be true or false",
    }
}
