//! `redis.url` and the template of public URLs: an error never shows the password.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringpush::redis_url::RedisUrl;
use ringpush_protocol::address::{UrlTemplate, escape, unescape};

fuzz_target!(|text: &str| {
    if let Ok(url) = RedisUrl::parse(text) {
        let shown = format!("{url:?}");
        assert!(url.password.len() < 8 || !shown.contains(&url.password), "{shown}");
    }
    let _ = UrlTemplate::parse(text);
    assert_eq!(unescape(&escape(text)).as_deref(), Some(text));
});
