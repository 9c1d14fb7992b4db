//! Configurations, good and bad; and the samples that ship.

use super::reader::*;
use super::*;
use secrecy::ExposeSecret;
use std::ffi::OsString;

fn load(file: &str, environment: &[(&str, &str)]) -> Result<Config, Faults> {
    let environment =
        environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Config::load(&Sources {
        file: Some(("test.toml".into(), file.into())),
        environment,
        ..Sources::default()
    })
}

fn faults(file: &str, environment: &[(&str, &str)]) -> String {
    load(file, environment).unwrap_err().to_string()
}

const CLUSTER: &str = r#"
[push]
public_url = "wss://push.example.com/n/{node}/v1/ws"
origins = ["https://shop.example.com"]
[auth]
token_key = "0123456789abcdef0123456789abcdef"
admin_key = "admin-key-of-at-least-thirty-two-bytes"
[collect]
api_keys = ["api-key-one-of-at-least-thirty-two-bytes"]
[peer]
secret = "peer-secret-of-at-least-thirty-two-bytes"
[mongo]
uri = "mongodb://mongo"
[redis]
url = "redis://redis"
"#;

#[test]
fn nothing_at_all_is_development() {
    let config = load("", &[]).unwrap();
    assert!(config.development);
    assert_eq!(config.roles.len(), 4);
    assert_eq!(config.listen.push.to_string(), "127.0.0.1:8080");
    assert_eq!(config.origins, Origins::Any);
    assert_eq!(config.drain_window, Duration::from_secs(60));
}

#[test]
fn the_environment_wins_over_the_file_and_only_double_underscores_are_keys() {
    let config = load(
        "[push]\naccept_per_s = 1\nlisten = \"127.0.0.1:1\"",
        &[
            ("RINGPUSH_PUSH__ACCEPT_PER_S", "2"),
            ("RINGPUSH_PORT", "tcp://10.0.0.1:80"),
            ("RINGPUSH_NODE__ROLES", "push, collect"),
            (
                "RINGPUSH_COLLECT__API_KEYS",
                r#"["a,b-0123456789abcdef0123456789abcdef","c-0123456789abcdef0123456789abcdef"]"#,
            ),
            ("POD_NAME", "push-7"),
        ],
    )
    .unwrap();
    assert_eq!(config.accept_per_s, 2);
    assert_eq!(config.roles, [RoleName::Collect, RoleName::Push]);
    let keys: Vec<&str> = config.api_keys.iter().map(|key| key.expose_secret()).collect();
    assert_eq!(keys, ["a,b", "c"].map(|key| format!("{key}-0123456789abcdef0123456789abcdef")));
    assert_eq!(config.node.as_str(), "push-7");
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    let said = faults("[push]\nlisten_on = \"x\"\n[redis]\nuri = \"y\"", &[("RINGPUSH_MONGO__URL", "z")]);
    assert!(said.contains("push.listen_on: no such key (in test.toml); did you mean push.listen?"), "{said}");
    assert!(said.contains("redis.uri: no such key") && said.contains("did you mean redis.url?"), "{said}");
    assert!(
        said.contains("mongo.url: no such key (in RINGPUSH_MONGO__URL); did you mean mongo.uri?"),
        "{said}"
    );
}

#[test]
fn every_fault_is_listed() {
    let said = faults(
        r#"
        [node]
        name = "Push 1"
        roles = ["push", "pusher"]
        [push]
        listen = "8080"
        public_url = "wss://push.example.com/v1/ws"
        origins = ["shop.example.com", "https://a.example/path"]
        accept_per_s = "many"
        weight = -1
        [auth]
        mode = "psychic"
        token_key = "short"
        token_in_url = 1
        [topics]
        open = ["a*b"]
        [limits]
        batch = 1001
        "#,
        &[("RINGPUSH_PUSH__DRAIN_WINDOW_S", "soon")],
    );
    for name in [
        "node.name",
        "node.roles",
        "push.listen",
        "push.public_url",
        "push.origins: \"shop.example.com\"",
        "push.origins: \"https://a.example/path\"",
        "push.accept_per_s",
        "push.weight",
        "topics.open: \"a*b\"",
        "auth.mode",
        "auth.token_key",
        "auth.token_in_url",
        "limits.batch",
        "push.drain_window_s",
        "mongo.uri",
    ] {
        assert!(said.lines().any(|line| line.starts_with(name)), "{name} is missing in:\n{said}");
    }
    assert!(faults("[push", &[]).contains("is not TOML"));
}

#[test]
fn outside_development_keys_and_public_names_are_required() {
    let config = load(CLUSTER, &[]).unwrap();
    assert!(!config.development);
    assert_eq!(config.listen.push.to_string(), "0.0.0.0:8080");
    let said = faults("[mongo]\nuri = \"mongodb://mongo\"", &[]);
    for name in ["push.public_url", "auth.token_key", "auth.admin_key", "collect.api_keys", "peer.secret"] {
        assert!(said.lines().any(|line| line.starts_with(name)), "{name} is missing in:\n{said}");
    }
    let open = CLUSTER.replace("[\"https://shop.example.com\"]", "[\"*\"]");
    assert!(faults(&open, &[]).contains("push.origins"));
    let split = faults("[node]\nroles = [\"push\", \"dispatch\"]", &[]);
    assert!(split.contains("collect and push must then run in one process"), "{split}");
}

#[test]
fn what_is_printed_reads_back_and_holds_no_secret() {
    let config = load(CLUSTER, &[("RINGPUSH_NODE__NAME", "push-0")]).unwrap();
    let printed = config.to_toml();
    for secret in
        ["0123456789abcdef", "admin-key-of", "api-key-one", "peer-secret-of", "mongodb://", "redis://"]
    {
        assert!(!printed.contains(secret), "{secret} in:\n{printed}");
    }
    printed.parse::<toml::Table>().unwrap();
    assert!(printed.contains("api_keys = \"(set)\"") && printed.contains("listen = \"0.0.0.0:8080\""));
}

#[test]
fn a_secret_may_stand_in_a_file_and_not_beside_itself() {
    let place = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = place.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let secret = "a-secret-of-at-least-thirty-two-bytes";
    let (one, two) = (file("one", &format!("{secret}\n")), file("two", &format!("{secret}\n\n{secret}2\n")));
    let keys = file("keys", r#"[{"kid": "a", "key": "0123456789abcdef0123456789abcdef"}]"#);
    let text = format!(
        "[peer]\nsecrets_file = {two:?}\n[auth]\ntoken_keys_file = {keys:?}\nadmin_key_file = {one:?}\n\
         [[collect.keys]]\nname = \"shop\"\nsecret_file = {one:?}\nscopes = [\"publish\"]"
    );
    let config = load(&text, &[]).unwrap();
    assert_eq!(config.peer_secret_texts(), [secret, &format!("{secret}2")]);
    assert_eq!(config.auth.token_keys[0].kid.as_deref(), Some("a"));
    assert_eq!(config.admin_key.expose_secret(), secret);
    assert_eq!(config.named_keys[0].secret.as_ref().unwrap().expose_secret(), secret);
    assert!(!config.to_toml().contains(secret));
    // The environment stands above the file, whichever of the two forms it has.
    let other = "another-secret-of-at-least-32-bytes-1";
    let config = load(&text, &[("RINGPUSH_AUTH__ADMIN_KEY", other)]).unwrap();
    assert_eq!(config.admin_key.expose_secret(), other);
    let plain = format!("[auth]\nadmin_key = {other:?}");
    let config = load(&plain, &[("RINGPUSH_AUTH__ADMIN_KEY_FILE", &one)]).unwrap();
    assert_eq!(config.admin_key.expose_secret(), secret);
    let public = file("public", include_str!("../../tests/keys/ed-public.pem"));
    let empty = file("empty", "\n");
    for (text, expected) in [
        (
            format!("[auth]\nadmin_key = {other:?}\nadmin_key_file = {one:?}"),
            "auth.admin_key_file: auth.admin_key stands beside it",
        ),
        (
            "[auth]\nadmin_key_file = \"/no/such/file\"".to_owned(),
            "auth.admin_key_file: /no/such/file cannot be read",
        ),
        (format!("[auth]\nadmin_key_file = {empty:?}"), "is empty"),
        ("[auth]\nadmin_key_file = 1".to_owned(), "auth.admin_key_file: must be the path of a file"),
        (format!("[auth]\ntoken_keys_file = {one:?}"), "holds no JSON array of objects"),
        (format!("[auth]\nmode_file = {one:?}"), "auth.mode_file: no such key"),
        (
            "[peer]\nsecret = \"x\"\nsecrets = [\"y\"]".to_owned(),
            "peer.secrets: peer.secret stands beside it",
        ),
        ("[peer]\nsecrets = [\"short\"]".to_owned(), "peer.secrets: is 5 bytes long"),
        ("[[auth.token_keys]]\nkid = \"a\"".to_owned(), "auth.token_keys[0].key: is required"),
        ("[[auth.token_keys]]\nkey = \"short\"".to_owned(), "auth.token_keys[0].key: is 5 bytes long"),
        (
            format!("[[auth.token_keys]]\nkey_file = {public:?}\n[[auth.token_keys]]\nkey_file = {one:?}"),
            "auth.token_keys[0].kid: is required where a public key",
        ),
        ("[[auth.token_keys]]\nkye = \"short\"".to_owned(), "auth.token_keys[0].kye: no such field"),
    ] {
        let said = faults(&text, &[]);
        assert!(said.contains(expected), "{text}:\n{said}");
    }
}

#[test]
fn the_files_of_tls_come_in_pairs() {
    let text = "[push.tls]\ncert = \"c\"\nkey = \"k\"\n[peer.tls]\ncert = \"c\"\nkey = \"k\"\nca = \"a\"\nname = \"n\"";
    let config =
        load(text, &[("RINGPUSH_COLLECT__TLS__CERT", "c"), ("RINGPUSH_COLLECT__TLS__KEY", "k")]).unwrap();
    assert!(config.tls.push.is_some() && config.tls.collect == config.tls.push && config.tls.peer.is_some());
    for (text, expected) in [
        ("[push.tls]\ncert = \"c\"", "push.tls.key: is required"),
        ("[collect.tls]\nkey = \"k\"", "collect.tls.cert: is required"),
        ("[peer.tls]\ncert = \"c\"\nkey = \"k\"", "peer.tls.ca: is required"),
        ("[peer.tls]\nname = \"n\"", "peer.tls.name: stands beside peer.tls.cert"),
        ("[push.tls]\ncret = \"c\"", "push.tls.cret: no such key"),
        ("[redis.tls]\nca = \"c\"", "redis.tls.ca: is for a redis.url"),
    ] {
        let said = faults(text, &[]);
        assert!(said.contains(expected), "{text}:\n{said}");
    }
}

/// Every key stands in each sample, commented or not; and what is commented out is the default.
#[test]
fn the_samples_are_read_and_say_every_default_rightly() {
    for (name, text, environment) in [
        ("local.toml", include_str!("../../config/local.toml"), &[][..]),
        (
            "cluster.toml",
            include_str!("../../config/cluster.toml"),
            &[
                ("RINGPUSH_AUTH__TOKEN_KEY", "0123456789abcdef0123456789abcdef"),
                ("RINGPUSH_AUTH__ADMIN_KEY", "admin-key-of-at-least-thirty-two-bytes"),
                ("RINGPUSH_COLLECT__API_KEYS", "api-key-one-of-at-least-thirty-two-bytes"),
                ("RINGPUSH_PEER__SECRET", "peer-secret-of-at-least-thirty-two-bytes"),
            ][..],
        ),
    ] {
        load(text, environment).unwrap_or_else(|faults| panic!("{name}: {faults}"));
        let bare: String = text
            .lines()
            .map(|line| line.strip_prefix("#").filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .collect::<Vec<_>>()
            .join("\n");
        let all: toml::Table = bare.parse().unwrap_or_else(|error| panic!("{name}: {error}"));
        for key in KEYS {
            let (section, entry) = key.name.split_once('.').unwrap();
            let find = |table: &toml::Table| {
                let inner = table.get(section)?;
                entry.split('.').try_fold(inner, |value, part| value.get(part)).cloned()
            };
            let stands = find(&all);
            let stands = stands.unwrap_or_else(|| panic!("{name} does not show {}", key.name));
            let commented = text.lines().any(|line| line.starts_with(&format!("#{entry} = ")));
            let set = text.parse::<toml::Table>().unwrap();
            let is_set = find(&set).is_some();
            if commented && !is_set {
                let default: toml::Table = format!("v = {}", key.default).parse().unwrap();
                let elsewhere = stands.to_string().replace("0.0.0.0", "127.0.0.1");
                assert_eq!(elsewhere, default["v"].to_string(), "{name}: {}", key.name);
            }
        }
    }
}

#[test]
fn a_key_that_can_be_guessed_is_refused_wherever_it_stands() {
    for (name, good, short) in [
        ("auth.admin_key", "admin-key-of-at-least-thirty-two-bytes", "a"),
        ("collect.api_keys", "api-key-one-of-at-least-thirty-two-bytes", "31-bytes-are-one-too-few-for-it"),
        ("peer.secret", "peer-secret-of-at-least-thirty-two-bytes", "p"),
    ] {
        assert!(load(CLUSTER, &[]).is_ok());
        let said = faults(&CLUSTER.replace(good, short), &[]);
        assert!(said.starts_with(name) && said.contains("openssl rand -base64 32"), "{said}");
        assert!(!said.contains("31-bytes-are"), "a key is told: {said}");
    }
    let development = faults("[peer]\nsecret = \"p\"", &[]);
    assert!(development.contains("peer.secret"), "{development}");
}

#[test]
fn no_password_of_any_url_is_printed() {
    let file = CLUSTER.replace(
        "[auth]",
        "[auth]\nmode = \"remote\"\nurl = \"https://me:pa/ss,wo?rd@pass@word@auth.example/x\"",
    );
    let file = file.replace("https://shop.example.com", "https://user:hunter2@shop.example.com");
    let file = file.replace("wss://push.example.com", "wss://u:secret-of-a-url@push.example.com");
    let printed = load(&file, &[]).unwrap().to_toml();
    for password in ["pa/ss", "wo?rd", "pass@word", "word@", "hunter2", "secret-of-a-url"] {
        assert!(!printed.contains(password), "{password} in:\n{printed}");
    }
    assert!(printed.contains("https://(set)@auth.example/x"), "{printed}");
    let said = faults("[auth]\nmode = \"remote\"\nurl = \"ftp://me:hunter2@auth\"", &[]);
    assert!(said.contains("auth.url") && !said.contains("hunter2"), "{said}");
    let said = faults("[push]\norigins = [\"ftp://me:hunter2@shop\"]", &[]);
    assert!(said.contains("push.origins") && !said.contains("hunter2"), "{said}");
}

#[test]
fn a_variable_that_is_not_utf8_is_a_fault_where_it_is_ours() {
    use std::os::unix::ffi::OsStringExt;
    let variable = |name: &str, bytes: &[u8]| (OsString::from(name), OsString::from_vec(bytes.to_vec()));
    let read = |name, bytes| read_environment([variable(name, bytes)].into_iter());
    assert_eq!(read("RINGPUSH_PEER__SECRET", b"x").unwrap().len(), 1);
    assert!(read("LESSOPEN", b"\xff").unwrap().is_empty(), "of somebody else");
    for name in ["RINGPUSH_PEER__SECRET", "RINGPUSH_DATA", "POD_NAME", "RUST_LOG"] {
        let Faults(faults) = read(name, b"a\xff").unwrap_err();
        assert!(faults.len() == 1 && faults[0].starts_with(name), "{faults:?}");
    }
    let odd = (OsString::from_vec(b"RINGPUSH_PEER__SECRET\xff".to_vec()), OsString::from("x"));
    assert!(read_environment([odd].into_iter()).is_err());
}

#[test]
fn every_fault_of_a_named_key_is_told_with_its_place_and_no_secret() {
    let said = faults(
        r#"
        [[collect.keys]]
        name = "a b"
        secret = "hunter2"
        scopes = ["publish", "admin"]
        [[collect.keys]]
        name = "good"
        secret = "a-secret-of-at-least-thirty-two-bytes"
        secret_sha256 = "00"
        scopes = []
        rate_per_s = 0
        [[collect.keys]]
        name = "good"
        secret_sha256 = "zz"
        scopes = ["read"]
        burst = 3
        colour = "red"
        "#,
        &[],
    );
    for fault in [
        "collect.keys[0].name",
        "collect.keys[0].secret: must be a string of at least 32",
        "collect.keys[0].scopes: \"admin\" is no scope",
        "collect.keys[1].secret_sha256: give secret or secret_sha256, not both",
        "collect.keys[1].scopes: must be a list",
        "collect.keys[1].rate_per_s: must be an integer",
        "collect.keys[2].name: \"good\" is the name of another key",
        "collect.keys[2].secret_sha256: must be 64 hexadecimal digits",
        "collect.keys[2].burst: stands beside rate_per_s",
        "collect.keys[2].colour: no such field",
    ] {
        assert!(said.contains(fault), "{fault}: {said}");
    }
    assert!(!said.contains("hunter2"), "{said}");
    assert!(faults("", &[("RINGPUSH_COLLECT__KEYS", "[1]")]).contains("collect.keys"));
    let same = r#"
        [collect]
        api_keys = ["api-key-one-of-at-least-thirty-two-bytes"]
        [[collect.keys]]
        name = "narrow"
        secret = "api-key-one-of-at-least-thirty-two-bytes"
        scopes = ["read"]
    "#;
    assert!(faults(same, &[]).contains("collect.keys[0].secret: is the secret of another key"));
}

#[test]
fn keys_have_names_of_their_own_and_are_a_hundred_at_most() {
    let same = r#"
        [collect]
        api_keys = ["api-key-one-of-at-least-thirty-two-bytes"]
        [[collect.keys]]
        name = "key-1"
        secret = "the-secret-of-the-shop-which-is-long-enough"
        scopes = ["read"]
    "#;
    assert!(faults(same, &[]).contains("collect.keys[0].name: \"key-1\" is the name of another key"));
    let plain = |count: usize| {
        let all: Vec<String> =
            (0..count).map(|n| format!("\"api-key-{n:03}-of-at-least-thirty-two-bytes\"")).collect();
        format!("[collect]\napi_keys = [{}]\n", all.join(","))
    };
    assert!(load(&plain(100), &[]).is_ok());
    assert!(faults(&plain(101), &[]).contains("101 keys; at most 100"));
}

#[test]
fn a_level_of_the_log_that_is_none_is_a_fault() {
    let good = [
        "info",
        "WARN",
        "off",
        "3",
        "info,ringpush::way=debug",
        " ringpush=trace, hyper=warn,",
        "ringpush",
        "ringpush::way",
        "ringpush=4, [session{id=7}]=debug",
    ];
    for good in good {
        assert!(load(&format!("[log]\nlevel = \"{good}\""), &[]).is_ok(), "{good}");
    }
    for bad in ["loud", "warning", "", " ", "info,=", "ringpush=loud", "info, é=debug=x"] {
        let said = faults(&format!("[log]\nlevel = \"{bad}\""), &[]);
        assert!(said.contains("log.level: ") && said.contains("error, warn, info"), "{bad:?}: {said}");
    }
}

#[test]
fn named_keys_come_from_tables_or_from_json_and_stand_beside_plain_ones() {
    let text = r#"
        [collect]
        api_keys = ["api-key-one-of-at-least-thirty-two-bytes"]
        [[collect.keys]]
        name = "shop"
        secret = "the-secret-of-the-shop-which-is-long-enough"
        scopes = ["publish:topic/news-*", "read"]
        rate_per_s = 10
    "#;
    let config = load(text, &[]).unwrap();
    let keys = all_keys(&config.api_keys, &config.named_keys);
    let names: Vec<&str> = keys.iter().map(|key| key.name.as_str()).collect();
    assert_eq!(names, ["key-1", "shop"]);
    assert_eq!(keys[1].rate.map(|rate| (rate.per_s, rate.burst)), Some((10, 10)));
    assert_eq!(
        keys[1].digest,
        crate::role::collect::KeySettings::digest_of("the-secret-of-the-shop-which-is-long-enough")
    );
    let json = r#"[{"name":"x","secret":"the-secret-of-the-shop-which-is-long-enough","scopes":["read"]}]"#;
    let config = load("", &[("RINGPUSH_COLLECT__KEYS", json)]).unwrap();
    assert_eq!(config.named_keys[0].settings.name, "x");
    assert!(config.to_toml().contains("keys = \"(set)\""));
}
