//! Tokens, good and bad, by each kind of key.

use super::*;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;

const NOW: Millis = Millis(1_795_380_000_000);
const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn auth(token_key: &str) -> Auth {
    Auth::new(
        AuthConfig { token_keys: vec![token_key.into()], ..AuthConfig::default() },
        Clock::standing(NOW),
    )
    .unwrap()
}

fn signed(claims: &Value, algorithm: Algorithm, key: &EncodingKey) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, key).unwrap()
}

fn hs256(claims: &Value) -> String {
    signed(claims, Algorithm::HS256, &EncodingKey::from_secret(SECRET.as_bytes()))
}

fn good() -> Value {
    serde_json::json!({"sub": "alice", "exp": NOW.seconds() + 60, "iat": NOW.seconds() - 1, "role": "reader"})
}

fn with(name: &str, value: Value) -> Value {
    let mut claims = good();
    claims[name] = value;
    claims
}

#[test]
fn an_issued_token_is_good_until_its_very_end() {
    let clock = Clock::standing(NOW);
    let config = AuthConfig { token_keys: vec![SECRET.into()], ..AuthConfig::default() };
    let auth = Auth::new(config, clock.clone()).unwrap();
    let (token, ends) = auth.issue(&UserId::parse("用户42").unwrap(), 60).unwrap();
    assert_eq!(ends, Millis(NOW.0 + 60_000));
    let identity = auth.verify(&token).unwrap();
    assert_eq!((identity.user.as_str(), identity.expires_at_s), ("用户42", ends.seconds()));
    clock.advance(59_999);
    assert!(auth.verify(&token).is_ok());
    clock.advance(1);
    assert_eq!(auth.verify(&token), Err(TokenError::Expired));
}

#[test]
fn every_kind_of_key_verifies_its_own_and_nothing_else() {
    let rsa = EncodingKey::from_rsa_pem(include_bytes!("../../../tests/keys/rsa-private.pem")).unwrap();
    let ec = EncodingKey::from_ec_pem(include_bytes!("../../../tests/keys/ec-private.pem")).unwrap();
    let ed = EncodingKey::from_ed_pem(include_bytes!("../../../tests/keys/ed-private.pem")).unwrap();
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    let pairs = [
        (Algorithm::RS256, rsa, include_str!("../../../tests/keys/rsa-public.pem")),
        (Algorithm::ES256, ec, include_str!("../../../tests/keys/ec-public.pem")),
        (Algorithm::EdDSA, ed, include_str!("../../../tests/keys/ed-public.pem")),
        (Algorithm::HS256, secret, SECRET),
    ];
    for (n, (_, _, verifying)) in pairs.iter().enumerate() {
        for (m, (algorithm, signing, _)) in pairs.iter().enumerate() {
            let verified = auth(verifying).verify(&signed(&good(), *algorithm, signing));
            assert_eq!(verified.is_ok(), n == m, "{n} {m}");
        }
        let keys = auth(verifying).jwks()["keys"].as_array().unwrap().len();
        assert_eq!(keys, usize::from(n < 3), "a shared secret is never shown");
    }
    // A token signed with the public key's own text as an HS256 secret must not pass for one of its
    // owner.
    let (_, _, public) = &pairs[0];
    let confused = signed(&good(), Algorithm::HS256, &EncodingKey::from_secret(public.as_bytes()));
    assert!(auth(public).verify(&confused).is_err());
}

#[test]
fn tokens_that_are_not_good_are_refused() {
    let auth = auth(SECRET);
    assert!(auth.verify(&hs256(&good())).is_ok());
    let part = |json: &str| URL_SAFE_NO_PAD.encode(json);
    let none = format!("{}.{}.", part(r#"{"alg":"none","typ":"JWT"}"#), part(&good().to_string()));
    for bad in ["", "a.b.c", "....", none.as_str(), &none.replace("none", "None")] {
        assert!(auth.verify(bad).is_err(), "{bad}");
    }
    let other =
        signed(&good(), Algorithm::HS256, &EncodingKey::from_secret(b"another secret of 32 bytes, this"));
    assert_eq!(auth.verify(&other), Err(TokenError::Bad("the token's signature is wrong")));
    let wrong_size = signed(&good(), Algorithm::HS512, &EncodingKey::from_secret(SECRET.as_bytes()));
    assert!(auth.verify(&wrong_size).is_err());
    for (name, value) in [
        ("exp", Value::Null),
        ("exp", "soon".into()),
        ("exp", NOW.seconds().into()),
        ("nbf", (NOW.seconds() + 1).into()),
        ("sub", 7.into()),
        ("sub", "".into()),
        ("sub", "a\u{7}".into()),
        ("iat", "then".into()),
    ] {
        assert!(auth.verify(&hs256(&with(name, value.clone()))).is_err(), "{name}: {value}");
    }
    let mut endless = good();
    endless.as_object_mut().unwrap().remove("exp");
    assert_eq!(auth.verify(&hs256(&endless)), Err(TokenError::Bad("the token has no exp")));
}

#[test]
fn issuer_and_audience_count_where_they_are_configured() {
    let config = AuthConfig {
        token_keys: vec![SECRET.into()],
        issuer: Some("shop".to_owned()),
        audience: Some("push".to_owned()),
    };
    let strict = Auth::new(config, Clock::standing(NOW)).unwrap();
    assert!(strict.verify(&hs256(&good())).is_err());
    let mut claims = with("iss", "shop".into());
    claims["aud"] = "mail".into();
    assert!(strict.verify(&hs256(&claims)).is_err());
    claims["aud"] = serde_json::json!(["mail", "push"]);
    assert!(strict.verify(&hs256(&claims)).is_ok());
    assert!(auth(SECRET).verify(&hs256(&claims)).is_ok());
    let (issued, _) = strict.issue(&UserId::parse("alice").unwrap(), 60).unwrap();
    assert!(strict.verify(&issued).is_ok());
}

#[test]
fn keys_that_cannot_serve_are_named() {
    let make = |key: &str| {
        Auth::new(AuthConfig { token_keys: vec![key.into()], ..AuthConfig::default() }, Clock::standing(NOW))
            .err()
    };
    assert_eq!(make("too short"), Some((0, KeyError::Short(9))));
    assert_eq!(make(include_str!("../../../tests/keys/rsa-private.pem")), Some((0, KeyError::NotAPublicKey)));
    assert_eq!(
        make("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"),
        Some((0, KeyError::NotAPublicKey))
    );
    let public = auth(include_str!("../../../tests/keys/ed-public.pem"));
    assert_eq!(public.issue(&UserId::parse("alice").unwrap(), 60), Err(SigningError));
}

/// A public key, in forms that a person might paste.
#[test]
fn a_public_key_in_any_dress_is_no_secret() {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};
    for pem in [
        include_str!("../../../tests/keys/rsa-public.pem"),
        include_str!("../../../tests/keys/ec-public.pem"),
        include_str!("../../../tests/keys/ed-public.pem"),
    ] {
        let body: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        let der = STANDARD.decode(&body).unwrap();
        let hex: String = der.iter().map(|byte| format!("{byte:02x}")).collect();
        let jwk = auth(pem).jwks()["keys"][0].to_string();
        for dress in [
            format!("\u{feff}{pem}"),
            format!("Bag Attributes\n    friendlyName: key\n{pem}"),
            format!("# the key of the issuer\n{pem}"),
            pem.replace('\n', "\\n").replacen("-----BEGIN", "\"-----BEGIN", 1),
            body.clone(),
            pem.lines().filter(|line| !line.starts_with("-----")).collect::<Vec<_>>().join("\n"),
            body.trim_end_matches('=').to_owned(),
            URL_SAFE.encode(&der),
            hex.clone(),
            hex.to_uppercase(),
            jwk.clone(),
            format!("{{\"keys\": [{jwk}]}}"),
            STANDARD.encode(pem),
            STANDARD.encode(&jwk),
            format!("ssh-ed25519 {body} somebody"),
        ] {
            let config = AuthConfig { token_keys: vec![dress.as_str().into()], ..AuthConfig::default() };
            let made = Auth::new(config, Clock::standing(NOW)).err();
            assert!(matches!(made, Some((0, KeyError::Disguised(_)))), "{dress}: {made:?}");
        }
    }
}

proptest! {
    #[test]
    fn a_random_secret_is_one_in_every_encoding(secret in prop::array::uniform32(any::<u8>())) {
        use base64::engine::general_purpose::STANDARD;
        let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        for text in [STANDARD.encode(secret), URL_SAFE_NO_PAD.encode(secret), hex] {
            prop_assert!(Key::read(&text).is_ok(), "{}", text);
        }
    }
}

#[test]
fn a_token_from_the_future_is_refused_and_one_from_a_clock_a_little_ahead_counts_from_now() {
    let auth = auth(SECRET);
    let issued = |ahead: u64| auth.verify(&hs256(&with("iat", (NOW.seconds() + ahead).into())));
    assert_eq!(issued(0).unwrap().issued_at_s, NOW.seconds());
    assert_eq!(
        issued(60).unwrap().issued_at_s,
        NOW.seconds(),
        "a disconnect in the next second counts for it"
    );
    assert!(matches!(issued(61), Err(TokenError::Bad(reason)) if reason.contains("iat")));
    assert!(issued(NOW.0 - NOW.seconds()).is_err(), "milliseconds");
}

#[test]
fn a_header_that_must_be_understood_and_is_not_refuses_the_token() {
    let signed = |header: &str| {
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let message =
            format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(good().to_string()));
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
        format!("{message}.{signature}")
    };
    let auth = auth(SECRET);
    assert!(auth.verify(&signed(r#"{"alg":"HS256","typ":"JWT","x":1}"#)).is_ok());
    for crit in [r#"["exp"]"#, r#"["b64"]"#, "[]", "null", "7"] {
        let token = signed(&format!(r#"{{"alg":"HS256","crit":{crit}}}"#));
        // Twice: what was refused must not be remembered as good.
        for _ in 0..2 {
            assert!(
                matches!(auth.verify(&token), Err(TokenError::Bad(why)) if why.contains("crit")),
                "{crit}"
            );
        }
    }
}

#[test]
fn keys_of_a_jwks_that_are_for_something_else_do_not_verify() {
    let issuer = auth(include_str!("../../../tests/keys/ec-public.pem"));
    let fetched = |name: &str, value: Value| {
        let fetched = Auth::fetched(AuthConfig::default(), Clock::standing(NOW));
        let mut set = issuer.jwks();
        set["keys"][0][name] = value;
        fetched.take_jwks(set.to_string().as_bytes()).is_ok()
    };
    assert!(fetched("use", "sig".into()) && fetched("key_ops", serde_json::json!(["verify"])));
    assert!(fetched("alg", "ES256".into()));
    assert!(!fetched("use", "enc".into()) && !fetched("use", "other".into()));
    assert!(!fetched("key_ops", serde_json::json!(["sign", "wrapKey"])));
    assert!(!fetched("alg", "ES384".into()));
}

#[test]
fn fetched_keys_verify_by_kid_and_the_key_decides_the_algorithm() {
    let fetched = Auth::fetched(AuthConfig::default(), Clock::standing(NOW));
    let private = EncodingKey::from_ec_pem(include_bytes!("../../../tests/keys/ec-private.pem")).unwrap();
    let token = signed(&good(), Algorithm::ES256, &private);
    assert_eq!(fetched.verify(&token), Err(TokenError::NoKeys));
    assert!(fetched.take_jwks(b"{}").is_err());
    assert!(fetched.take_jwks(br#"{"keys":[]}"#).is_err());
    let issuer = auth(include_str!("../../../tests/keys/ec-public.pem"));
    assert_eq!(fetched.take_jwks(issuer.jwks().to_string().as_bytes()), Ok(1));
    assert!(fetched.verify(&token).is_ok(), "one key, and a token that names none");
    let header = Header { kid: Some("other".to_owned()), ..Header::new(Algorithm::ES256) };
    let named = jsonwebtoken::encode(&header, &good(), &private).unwrap();
    assert_eq!(fetched.verify(&named), Err(TokenError::UnknownKey));
    let confused =
        signed(&good(), Algorithm::HS256, &EncodingKey::from_secret(b"anything at all, but long enough"));
    assert!(fetched.verify(&confused).is_err());
}

#[test]
fn claims_that_are_no_object_or_say_a_thing_twice_are_refused() {
    let (auth, ends) = (auth(SECRET), NOW.seconds() + 60);
    let signed = |payload: &str| {
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let message = format!("eyJhbGciOiJIUzI1NiJ9.{}", URL_SAFE_NO_PAD.encode(payload));
        let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
        format!("{message}.{signature}")
    };
    let good = format!(r#" {{"sub":"alice","exp":{ends},"more":{{"sub":"bob"}}}}"#);
    let identity = auth.verify(&signed(&good)).unwrap();
    assert_eq!((identity.user.as_str(), &*identity.claims), ("alice", good.trim().as_bytes()));
    for bad in [
        format!(r#"{{"sub":"alice","exp":{ends},"sub":"bob"}}"#),
        format!(r#"["alice",{ends},null,null,null,null]"#),
        format!(r#"{{"sub":"alice","exp":{ends}}} {{}}"#),
    ] {
        assert_eq!(auth.verify(&signed(&bad)), Err(TokenError::Malformed), "{bad}");
    }
}

proptest! {
    /// One that has taken a token already says of any other what one says that has not: here with a
    /// letter put, dropped or changed.
    #[test]
    fn a_token_is_judged_alike_by_one_who_has_seen_its_like(
        at in any::<proptest::sample::Index>(), kind in 0..4, letter in "[A-Za-z0-9_.=-]", sub in "[a-z]{0,3}", array in any::<bool>(),
    ) {
        let (fresh, seen) = (auth(SECRET), auth(SECRET));
        prop_assert!(seen.verify(&hs256(&good())).is_ok());
        let claims = if array { serde_json::json!([sub]) } else { with("sub", sub.into()) };
        let mut token = hs256(&claims);
        let at = at.index(token.len());
        match kind {
            0 => {}
            1 => token.insert_str(at, &letter),
            2 => drop(token.remove(at)),
            _ => token.replace_range(at..=at, &letter),
        }
        prop_assert_eq!(fresh.verify(&token), seen.verify(&token));
    }
}

#[test]
fn of_several_keys_the_first_signs_and_each_verifies() {
    let key = |kid: Option<&str>, key: &str| TokenKey { key: key.into(), kid: kid.map(str::to_owned) };
    let (old, new) =
        (key(Some("2026"), SECRET), key(Some("2027"), "another-secret-of-the-tests-0123456789ab"));
    let with = |keys: &[&TokenKey]| {
        let token_keys = keys.iter().map(|key| (*key).clone()).collect();
        Auth::new(AuthConfig { token_keys, ..AuthConfig::default() }, Clock::standing(NOW)).unwrap()
    };
    let alice = UserId::parse("alice").unwrap();
    let auth = with(&[&old]);
    let first = auth.issue(&alice, 60).unwrap().0;
    let named = |token: &str| jsonwebtoken::decode_header(token).unwrap().kid;
    assert_eq!(named(&first).as_deref(), Some("2026"));
    auth.replace_keys(&[new.clone(), old.clone()]).unwrap();
    let second = auth.issue(&alice, 60).unwrap().0;
    assert_eq!(named(&second).as_deref(), Some("2027"));
    // Without a kid, or with one that nobody knows, each is tried.
    let third = with(&[&key(None, SECRET)]).issue(&alice, 60).unwrap().0;
    let fourth = with(&[&key(Some("elsewhere"), SECRET)]).issue(&alice, 60).unwrap().0;
    for token in [&first, &second, &third, &fourth] {
        assert_eq!(auth.verify(token).unwrap().user, alice);
    }
    auth.replace_keys(std::slice::from_ref(&new)).unwrap();
    assert!(auth.verify(&second).is_ok());
    for token in [&first, &third, &fourth] {
        assert!(matches!(auth.verify(token), Err(TokenError::Bad(_))));
    }
    assert_eq!(auth.replace_keys(&[new, key(None, "short")]), Err((1, KeyError::Short(5))));
    assert!(auth.verify(&second).is_ok(), "what is in use stays");
}
