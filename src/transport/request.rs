//! What every request on every listener must comply with: RFC 9112 and RFC 9110, as far as hyper
//! leaves it to the server.

use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName, ORIGIN};
use http::uri::Authority;
use http::{Request, Version};

/// Headers that may occur once. With two of them, this server and a proxy before it could read
/// different requests.
const ONCE: [HeaderName; 4] = [HOST, ORIGIN, AUTHORIZATION, CONTENT_TYPE];

/// Checks the head of a request.
///
/// # Errors
///
/// What is wrong with it, for a 400.
pub fn check_head<B>(request: &Request<B>) -> Result<(), &'static str> {
    let headers = request.headers();
    if request.version() == Version::HTTP_11 && !headers.contains_key(HOST) {
        return Err("Host is missing");
    }
    for name in &ONCE {
        if headers.get_all(name).iter().nth(1).is_some() {
            return Err(match *name {
                HOST => "there must be one Host",
                ORIGIN => "there must be one Origin",
                AUTHORIZATION => "there must be one Authorization",
                _ => "there must be one Content-Type",
            });
        }
    }
    if let Some(host) = headers.get(HOST) {
        let host = host.to_str().map_err(|_| "Host is not ASCII")?;
        // Empty if the target has no authority (RFC 9112, section 3.2).
        if !host.is_empty() && !is_host(host) {
            return Err("Host is not a name or an address, with a port or without");
        }
    }
    if has_bad_escape(request.uri().path()) {
        return Err("a percent sign in the path must stand before two hexadecimal digits");
    }
    Ok(())
}

fn is_host(text: &str) -> bool {
    let Ok(authority) = text.parse::<Authority>() else { return false };
    // What follows the brackets of an IPv6 address, or the whole text.
    let after = text.rsplit(']').next().unwrap_or_default();
    !text.contains('@') && !authority.host().is_empty() && after.contains(':') == authority.port().is_some()
}

/// Whether a percent sign is not followed by two hexadecimal digits (RFC 3986, section 2.1).
fn has_bad_escape(path: &str) -> bool {
    path.split('%').skip(1).any(|after| {
        let mut digits = after.bytes().take(2);
        !(0..2).all(|_| digits.next().is_some_and(|digit| digit.is_ascii_hexdigit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(version: Version, path: &str, headers: &[(&str, &str)]) -> Result<(), &'static str> {
        let mut request = Request::builder().version(version).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        check_head(&request.body(()).unwrap())
    }

    #[test]
    fn a_request_has_one_host_and_one_of_each_header_that_decides() {
        let ok = |headers: &[(&str, &str)]| checked(Version::HTTP_11, "/", headers);
        for host in ["push.example.com", "127.0.0.1:8080", "[::1]:8080", ""] {
            assert_eq!(ok(&[("host", host)]), Ok(()), "{host}");
        }
        for host in ["a b", "user@host", "a/b", "host:port"] {
            assert!(ok(&[("host", host)]).is_err(), "{host}");
        }
        assert!(ok(&[]).is_err());
        assert_eq!(checked(Version::HTTP_10, "/", &[]), Ok(()), "HTTP/1.0 knows no Host");
        assert_eq!(checked(Version::HTTP_2, "/", &[]), Ok(()), "HTTP/2 has it elsewhere");
        for name in ["host", "origin", "authorization", "content-type"] {
            let twice = [("host", "x"), (name, "y"), (name, "y")];
            assert!(ok(&twice).is_err(), "{name}");
        }
    }

    #[test]
    fn a_percent_sign_in_a_path_escapes_something() {
        let at = |path: &str| checked(Version::HTTP_2, path, &[]);
        for path in ["/", "/%41", "/%e7%94%a8", "/a?b=%", "/%25"] {
            assert_eq!(at(path), Ok(()), "{path}");
        }
        for path in ["/%", "/%4", "/%zz", "/%%", "/a%2", "/%2/x"] {
            assert!(at(path).is_err(), "{path}");
        }
    }
}
