//! The rules of the files of TLS. The files themselves are read where they are used, and again when
//! they change.

use std::path::PathBuf;

use super::reader::Reader;

/// The certificate of a listener and its key, both in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, the certificate of the listener first.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Mutual TLS between roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTls {
    /// The certificate of this process.
    pub own: TlsFiles,
    /// The certificates of the authorities that sign those of peers, in PEM.
    pub ca: PathBuf,
    /// The one name that every peer's certificate has.
    pub name: String,
}

/// Everything about TLS that is configured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// `push.tls`; `None` serves plain connections.
    pub push: Option<TlsFiles>,
    /// `collect.tls`.
    pub collect: Option<TlsFiles>,
    /// `peer.tls`.
    pub peer: Option<PeerTls>,
    /// `redis.tls.ca`; `None` trusts the authorities of the system.
    pub redis_ca: Option<PathBuf>,
}

impl Reader {
    pub(super) fn tls(&mut self) -> TlsConfig {
        let push = self.tls_files("push.tls.cert", "push.tls.key");
        let collect = self.tls_files("collect.tls.cert", "collect.tls.key");
        let own = self.tls_files("peer.tls.cert", "peer.tls.key");
        let (ca, name) = (self.text("peer.tls.ca"), self.text("peer.tls.name"));
        let peer = match own {
            Some(own) => {
                for (key, value, what) in [
                    (
                        "peer.tls.ca",
                        &ca,
                        "the certificates of the authorities that sign those of peers, in PEM",
                    ),
                    ("peer.tls.name", &name, "the one name that every peer's certificate has"),
                ] {
                    if value.is_empty() {
                        self.faults.push(format!("{key}: is required with peer.tls.cert: {what}"));
                    }
                }
                Some(PeerTls { own, ca: ca.into(), name })
            }
            None => {
                for (key, value) in [("peer.tls.ca", &ca), ("peer.tls.name", &name)] {
                    if !value.is_empty() {
                        self.faults.push(format!("{key}: stands beside peer.tls.cert and peer.tls.key"));
                    }
                }
                None
            }
        };
        let redis_ca = self.text("redis.tls.ca");
        if !redis_ca.is_empty() && !self.text("redis.url").starts_with("rediss") {
            self.faults.push("redis.tls.ca: is for a redis.url that begins with rediss".to_owned());
        }
        let redis_ca = (!redis_ca.is_empty()).then(|| redis_ca.into());
        TlsConfig { push, collect, peer, redis_ca }
    }

    fn tls_files(&mut self, cert_key: &'static str, key_key: &'static str) -> Option<TlsFiles> {
        let (cert, key) = (self.text(cert_key), self.text(key_key));
        match (cert.is_empty(), key.is_empty()) {
            (true, true) => None,
            (false, false) => Some(TlsFiles { cert: cert.into(), key: key.into() }),
            (true, false) => {
                self.faults.push(format!(
                    "{cert_key}: is required with {key_key}: the chain of certificates in PEM"
                ));
                None
            }
            (false, true) => {
                self.faults.push(format!("{key_key}: is required with {cert_key}: the private key in PEM"));
                None
            }
        }
    }
}
