//! The TLS of this process: read at the start, and again when its files change.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::config::{Config, Faults, PeerTls, RoleName, TlsFiles};
use crate::telemetry::{Credential, Family, Gauge, Metrics, Refusals};
use crate::transport::tls::{ClientTls, Identity, PeerTrust, ServerTls, TlsFault};

/// The files of one use, as they were read.
#[derive(Clone)]
struct Read {
    identity: Identity,
    peers: Option<PeerTrust>,
}

impl Read {
    /// Whether the files hold the same as those of `other`.
    fn is(&self, other: &Self) -> bool {
        let trust = |read: &Self| read.peers.as_ref().map(|peers| peers.digest);
        self.identity.digest == other.identity.digest && trust(self) == trust(other)
    }
}

/// All files, as they were read.
#[derive(Default)]
pub(super) struct TlsFilesRead {
    push: Option<Read>,
    collect: Option<Read>,
    peer: Option<Read>,
}

impl TlsFilesRead {
    /// Reads the files that the configuration names and the roles of this process need. Those that
    /// `tls` has in use are not checked again: a certificate that expires is no fault of a
    /// configuration, which may bring the next one, or a key that must be turned.
    ///
    /// # Errors
    ///
    /// Each file that cannot be used, with its key.
    pub(super) fn of(config: &Config, clock: &Clock, tls: Option<&Tls>) -> Result<Self, Faults> {
        let mut faults = Vec::new();
        let now_s = clock.now().seconds();
        let in_use = |section: &str| tls.and_then(|tls| tls.digest_in_use(section));
        let mut plain = |section: &str, role: RoleName, files: &Option<TlsFiles>| {
            let files = files.as_ref().filter(|_| config.runs(role))?;
            let read = Identity::read(&files.cert, &files.key, now_s, in_use(section));
            read.map(|identity| Read { identity, peers: None })
                .map_err(|fault| faults.push(named(section, &fault)))
                .ok()
        };
        let push = plain("push.tls", RoleName::Push, &config.tls.push);
        let collect = plain("collect.tls", RoleName::Collect, &config.tls.collect);
        // Auth alone calls nobody, and is called by nobody that is a peer.
        let is_peer = config.roles.iter().any(|role| *role != RoleName::Auth);
        let peer = config.tls.peer.as_ref().filter(|_| is_peer);
        let peer = peer.and_then(|PeerTls { own, ca, name }| {
            let identity = Identity::read(&own.cert, &own.key, now_s, in_use("peer.tls"));
            let read =
                identity.and_then(|identity| Ok(Read { identity, peers: Some(PeerTrust::read(ca, name)?) }));
            read.map_err(|fault| faults.push(named("peer.tls", &fault))).ok()
        });
        if faults.is_empty() { Ok(Self { push, collect, peer }) } else { Err(Faults(faults)) }
    }
}

fn named(section: &str, fault: &TlsFault) -> String {
    format!("{section}.{fault}")
}

/// A listener, and what it serves with.
struct Use<T> {
    tls: T,
    read: Mutex<Read>,
}

/// The TLS in use. Cloned, it is the same.
#[derive(Clone)]
pub(super) struct Tls {
    inner: Arc<Inner>,
}

struct Inner {
    push: Option<Use<ServerTls>>,
    collect: Option<Use<ServerTls>>,
    peer: Option<Use<(ServerTls, ClientTls)>>,
    expiries: Family<[(&'static str, &'static str); 1], Gauge>,
    /// The sections of which it was told that a restart alone takes them.
    told: Mutex<BTreeSet<&'static str>>,
}

impl Tls {
    /// Serves with what was read.
    ///
    /// # Errors
    ///
    /// rustls does not take it.
    pub(super) fn new(read: TlsFilesRead, metrics: &Metrics, refusals: &Refusals) -> Result<Self, Faults> {
        let fault = |section: &'static str| move |fault: TlsFault| Faults(vec![named(section, &fault)]);
        let public = |section: &'static str, read: Option<Read>| {
            let told = move |why: &str| tracing::debug!(listener = section, why, "a TLS handshake failed");
            let made = read.map(|read| {
                let tls = ServerTls::new(&read.identity, None, told)?;
                Ok(Use { tls, read: Mutex::new(read) })
            });
            made.transpose().map_err(fault(section))
        };
        let peer = read.peer.map(|read| {
            let Some(peers) = &read.peers else { return Ok(None) };
            let refusals = refusals.clone();
            let told = move |why: &str| refusals.note(Credential::PeerCertificate, why);
            let server = ServerTls::new(&read.identity, Some(peers), told)?;
            let client = ClientTls::new(&read.identity, peers)?;
            Ok(Some(Use { tls: (server, client), read: Mutex::new(read) }))
        });
        let inner = Inner {
            push: public("push.tls", read.push)?,
            collect: public("collect.tls", read.collect)?,
            peer: peer.transpose().map_err(fault("peer.tls"))?.flatten(),
            expiries: Family::default(),
            told: Mutex::default(),
        };
        let help = "When the certificate in use expires, in seconds since 1970";
        let shown = inner.expiries.clone();
        metrics.register(|r| r.register("certificate_expiry_timestamp_seconds", help, shown));
        let this = Self { inner: Arc::new(inner) };
        this.show_expiries();
        Ok(this)
    }

    pub(super) fn push(&self) -> Option<ServerTls> {
        self.inner.push.as_ref().map(|used| used.tls.clone())
    }

    pub(super) fn collect(&self) -> Option<ServerTls> {
        self.inner.collect.as_ref().map(|used| used.tls.clone())
    }

    pub(super) fn peer_server(&self) -> Option<ServerTls> {
        self.inner.peer.as_ref().map(|used| used.tls.0.clone())
    }

    pub(super) fn peer_client(&self) -> Option<ClientTls> {
        self.inner.peer.as_ref().map(|used| used.tls.1.clone())
    }

    /// The digest of the files that are in use in this section.
    fn digest_in_use(&self, section: &str) -> Option<[u8; 32]> {
        let read = match section {
            "push.tls" => self.inner.push.as_ref().map(|used| &used.read),
            "collect.tls" => self.inner.collect.as_ref().map(|used| &used.read),
            _ => self.inner.peer.as_ref().map(|used| &used.read),
        };
        read.map(|read| read.lock().identity.digest)
    }

    /// Prepares what was read again, where it is not what is in use. It is taken once the result
    /// was called.
    ///
    /// # Errors
    ///
    /// rustls does not take it.
    pub(super) fn replacement(&self, read: TlsFilesRead) -> Result<Box<dyn FnOnce()>, Faults> {
        let fault = |section: &'static str| move |fault: TlsFault| Faults(vec![named(section, &fault)]);
        let inner = &*self.inner;
        let public = |tls: &ServerTls, read: &Read| {
            let swap = tls.replacement(&read.identity, None)?;
            Ok(Box::new(swap) as Box<dyn FnOnce()>)
        };
        let of_peers = |(server, client): &(ServerTls, ClientTls), read: &Read| {
            let Some(peers) = &read.peers else { return Ok(Box::new(|| {}) as Box<dyn FnOnce()>) };
            let serve = server.replacement(&read.identity, Some(peers))?;
            let connect = client.replacement(&read.identity, peers)?;
            Ok(Box::new(move || {
                serve();
                connect();
            }) as Box<dyn FnOnce()>)
        };
        let prepared = [
            self.prepared("push.tls", inner.push.as_ref(), &read.push, public).map_err(fault("push.tls"))?,
            self.prepared("collect.tls", inner.collect.as_ref(), &read.collect, public)
                .map_err(fault("collect.tls"))?,
            self.prepared("peer.tls", inner.peer.as_ref(), &read.peer, of_peers)
                .map_err(fault("peer.tls"))?,
        ];
        let this = self.clone();
        Ok(Box::new(move || {
            prepared.into_iter().flatten().for_each(|swap| swap());
            for (used, read) in [
                (this.inner.push.as_ref().map(|used| &used.read), read.push),
                (this.inner.collect.as_ref().map(|used| &used.read), read.collect),
                (this.inner.peer.as_ref().map(|used| &used.read), read.peer),
            ] {
                if let (Some(used), Some(read)) = (used, read) {
                    *used.lock() = read;
                }
            }
            this.show_expiries();
        }))
    }

    /// What takes one use's files anew; `None` if they hold the same as before.
    fn prepared<T>(
        &self,
        section: &'static str,
        used: Option<&Use<T>>,
        read: &Option<Read>,
        replacement: impl FnOnce(&T, &Read) -> Result<Box<dyn FnOnce()>, TlsFault>,
    ) -> Result<Option<Box<dyn FnOnce()>>, TlsFault> {
        match (used, read) {
            (Some(used), Some(read)) => {
                if used.read.lock().is(read) {
                    return Ok(None);
                }
                let (swap, until_s) = (replacement(&used.tls, read)?, read.identity.expires_at_s);
                let told = "the certificate was taken anew; connections keep the one that they began with";
                Ok(Some(Box::new(move || {
                    swap();
                    tracing::info!(section, until_s, "{told}");
                })))
            }
            (None, None) => Ok(None),
            _ => {
                if self.inner.told.lock().insert(section) {
                    tracing::warn!(section, "TLS is turned on or off by a restart alone");
                }
                Ok(None)
            }
        }
    }

    fn show_expiries(&self) {
        let inner = &*self.inner;
        let of = |read: &Mutex<Read>| read.lock().identity.expires_at_s;
        for (name, expires_at_s) in [
            ("push", inner.push.as_ref().map(|used| of(&used.read))),
            ("collect", inner.collect.as_ref().map(|used| of(&used.read))),
            ("peer", inner.peer.as_ref().map(|used| of(&used.read))),
        ] {
            if let Some(expires_at_s) = expires_at_s {
                let gauge = inner.expiries.get_or_create(&[("use", name)]);
                gauge.set(i64::try_from(expires_at_s).unwrap_or(i64::MAX));
            }
        }
    }
}
