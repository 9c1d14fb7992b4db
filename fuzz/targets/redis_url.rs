//! `redis.url` and the template of public URLs: nothing that is shown depends on the password.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringpush::redis_url::RedisUrl;
use ringpush_protocol::address::{UrlTemplate, escape, unescape};

fuzz_target!(|text: &str| {
    if let Ok(url) = RedisUrl::parse(text) {
        let other = RedisUrl { password: "another".to_owned(), ..url.clone() };
        assert!(url.password.is_empty() || format!("{url:?}") == format!("{other:?}"));
    }
    let _ = UrlTemplate::parse(text);
    assert_eq!(unescape(&escape(text)).as_deref(), Some(text));
});
