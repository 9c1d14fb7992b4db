//! TLS of listeners and between roles. Certificates and keys come from files in PEM, and can be
//! replaced while connections live: a connection keeps what it began with.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{Resumption, verify_server_name};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::lazy_stream::LazyTcpStream;

/// Largest file that is read, in bytes: a bundle of all public authorities has 250 KB.
const FILE_MAX: u64 = 1024 * 1024;
/// The first byte of every TLS connection: a record of the handshake (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 0x16;
/// The response to a request without TLS.
const SPEAK_TLS: &str = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n\
     this port speaks TLS: use https:// or wss://\n";

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub struct TlsFault {
    /// The last part of the key that names the file: `cert`, `key`, `ca` or `name`.
    pub field: &'static str,
    /// What is wrong, with the remedy.
    pub rule: String,
}

fn fault(field: &'static str, rule: impl Into<String>) -> TlsFault {
    TlsFault { field, rule: rule.into() }
}

/// Certificate and key of this process, as they stand in their files.
#[derive(Clone)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: Arc<PrivateKeyDer<'static>>,
    /// When the certificate expires, in seconds since 1970.
    pub expires_at_s: u64,
    /// The digest of both files.
    pub digest: [u8; 32],
}

impl fmt::Debug for Identity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "certificate until {} s", self.expires_at_s)
    }
}

impl Identity {
    /// Reads a chain of certificates and a private key, both in PEM.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or holds something else, a certificate that is not valid at
    /// `now_s`, in seconds since 1970, or that does not belong to the key. Files of the digest
    /// `in_use` were checked before, and have changed nothing.
    pub fn read(cert: &Path, key: &Path, now_s: u64, in_use: Option<[u8; 32]>) -> Result<Self, TlsFault> {
        let (cert_text, key_text) = (read_file("cert", cert)?, read_file("key", key)?);
        let chain = certificates("cert", cert, &cert_text)?;
        let times = times_of("cert", cert, &chain[0])?;
        let (from_s, expires_at_s) = times;
        let digest = Sha256::new().chain_update(&cert_text).chain_update(&key_text).finalize().into();
        let is_new = in_use != Some(digest);
        let shown = |s: u64| {
            humantime::format_rfc3339_seconds(std::time::UNIX_EPOCH + std::time::Duration::from_secs(s))
        };
        if is_new && expires_at_s <= now_s {
            let rule =
                format!("{} expired at {}: put a new certificate there", cert.display(), shown(expires_at_s));
            return Err(fault("cert", rule));
        }
        if is_new && from_s > now_s {
            let rule = format!(
                "{} is valid from {} on: set the clock by NTP, or wait",
                cert.display(),
                shown(from_s)
            );
            return Err(fault("cert", rule));
        }
        let key_der = PrivateKeyDer::from_pem_slice(&key_text)
            .map_err(|_| fault("key", format!("{} holds no private key in PEM", key.display())))?;
        let identity = Self { chain, key: Arc::new(key_der), expires_at_s, digest };
        identity.is_pair().map_err(|why| fault("key", format!("{} {why}", key.display())))?;
        Ok(identity)
    }

    /// Whether the key is that of the certificate; or why it is not.
    fn is_pair(&self) -> Result<(), String> {
        let pair =
            rustls::sign::CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), &provider());
        pair.map(drop).map_err(|error| match error {
            Error::InconsistentKeys(_) => "is not the key of the certificate".to_owned(),
            error => format!("cannot be used: {error}"),
        })
    }
}

/// What the certificates of peers are checked against.
#[derive(Debug, Clone)]
pub struct PeerTrust {
    authorities: Arc<RootCertStore>,
    name: ServerName<'static>,
    /// The digest of the file and the name.
    pub digest: [u8; 32],
}

impl PeerTrust {
    /// Reads the certificates of authorities in PEM. Each peer's certificate must be signed by one
    /// of them, and have this name.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or has no certificate; a name that no certificate can have.
    pub fn read(ca: &Path, name: &str) -> Result<Self, TlsFault> {
        let text = read_file("ca", ca)?;
        let mut authorities = RootCertStore::empty();
        for certificate in certificates("ca", ca, &text)? {
            authorities.add(certificate).map_err(|error| {
                fault("ca", format!("{} has a certificate that cannot be used: {error}", ca.display()))
            })?;
        }
        let parsed = ServerName::try_from(name.to_owned());
        let parsed = parsed.map_err(|_| {
            fault("name", format!("{name:?} must be a DNS name, such as peer.ringpush.internal"))
        })?;
        let digest = Sha256::new().chain_update(&text).chain_update(name).finalize().into();
        Ok(Self { authorities: Arc::new(authorities), name: parsed, digest })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

/// Reads a file of certificates or keys, up to a megabyte.
///
/// # Errors
///
/// It cannot be read, or is larger; `field` is the part of the key that names it.
pub fn read_file(field: &'static str, path: &Path) -> Result<Vec<u8>, TlsFault> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| fault(field, format!("{} cannot be read: {error}", path.display())))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(fault(field, format!("{} is larger than {FILE_MAX} bytes", path.display())));
    }
    Ok(bytes)
}

/// At least one certificate.
fn certificates(
    field: &'static str,
    path: &Path,
    text: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    let none = || fault(field, format!("{} holds no certificate in PEM (BEGIN CERTIFICATE)", path.display()));
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(none)
}

/// From and until when a certificate is valid, in seconds since 1970.
fn times_of(field: &'static str, path: &Path, der: &CertificateDer<'_>) -> Result<(u64, u64), TlsFault> {
    let parsed = x509_parser::parse_x509_certificate(der);
    let (_, certificate) =
        parsed.map_err(|_| fault(field, format!("{} holds no X.509 certificate", path.display())))?;
    let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
    let validity = certificate.validity();
    Ok((seconds(validity.not_before), seconds(validity.not_after)))
}

/// The TLS of a listener. Cloned, it is the same: what replaces its certificate does so everywhere.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<RwLock<Arc<ServerConfig>>>,
    /// Told why a handshake failed.
    refused: Arc<dyn Fn(&str) + Send + Sync>,
}

impl ServerTls {
    /// Serves with `identity`. With `peers`, a client must show a certificate that they allow.
    /// `refused` is told why a handshake failed.
    ///
    /// # Errors
    ///
    /// rustls does not take the certificate.
    pub fn new(
        identity: &Identity,
        peers: Option<&PeerTrust>,
        refused: impl Fn(&str) + Send + Sync + 'static,
    ) -> Result<Self, TlsFault> {
        let mut config = server_config(identity, peers)?;
        if peers.is_none() {
            // A client that comes again spares both sides the signature. Peers stay connected, and
            // each is checked each time.
            config.ticketer = aws_lc_rs::Ticketer::new().map_err(|error| fault("cert", error.to_string()))?;
            config.send_tls13_tickets = 1;
        }
        Ok(Self { config: Arc::new(RwLock::new(Arc::new(config))), refused: Arc::new(refused) })
    }

    /// Prepares what new connections are to be served with. It is in use once the result was
    /// called.
    ///
    /// # Errors
    ///
    /// As [`ServerTls::new`]; what is in use then stays.
    pub fn replacement(
        &self,
        identity: &Identity,
        peers: Option<&PeerTrust>,
    ) -> Result<impl FnOnce() + use<>, TlsFault> {
        let mut config = server_config(identity, peers)?;
        let current = Arc::clone(&self.config);
        Ok(move || {
            let mut current = current.write();
            config.ticketer = Arc::clone(&current.ticketer);
            config.send_tls13_tickets = current.send_tls13_tickets;
            *current = Arc::new(config);
        })
    }

    /// Makes the handshake. A client that speaks HTTP without TLS is told so.
    ///
    /// # Errors
    ///
    /// The handshake failed, or the connection ended.
    pub(super) async fn accept(&self, mut line: LazyTcpStream) -> io::Result<LazyTcpStream> {
        let mut first = [0; 512];
        let count = line.read(&mut first).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if first[0] != HANDSHAKE_RECORD {
            (self.refused)("the client does not speak TLS");
            line.write_all(SPEAK_TLS.as_bytes()).await?;
            line.shutdown().await?;
            // What was sent and not read would reset the connection, and the answer with it.
            let _ = tokio::io::copy(&mut line.take(FILE_MAX), &mut tokio::io::sink()).await;
            return Err(io::ErrorKind::InvalidData.into());
        }
        line.give_back(&first[..count]);
        let acceptor = TlsAcceptor::from(Arc::clone(&self.config.read()));
        match acceptor.accept(line).await {
            Ok(stream) => Ok(LazyTcpStream::tls(stream)),
            Err(error) => {
                (self.refused)(&error.to_string());
                Err(error)
            }
        }
    }
}

fn server_config(identity: &Identity, peers: Option<&PeerTrust>) -> Result<ServerConfig, TlsFault> {
    let unusable = |error: Error| fault("cert", format!("cannot be used: {error}"));
    let builder = ServerConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
    let builder = match peers {
        None => builder.with_no_client_auth(),
        Some(peers) => {
            let chain =
                WebPkiClientVerifier::builder_with_provider(Arc::clone(&peers.authorities), provider());
            let chain = chain.build().map_err(|error| fault("ca", format!("cannot be used: {error}")))?;
            builder.with_client_cert_verifier(Arc::new(NamedClients { chain, name: peers.name.clone() }))
        }
    };
    let built = builder.with_single_cert(identity.chain.clone(), identity.key.clone_key());
    let mut config = built.map_err(unusable)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // Sessions are resumed by tickets, which the client keeps.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Clients whose certificate is signed by a known authority, and has the one name of peers.
#[derive(Debug)]
struct NamedClients {
    chain: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for NamedClients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_name(&parsed, &self.name)
            .map_err(|_| Error::InvalidCertificate(CertificateError::NotValidForName))?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// The TLS towards peers. Cloned, it is the same.
#[derive(Clone)]
pub struct ClientTls {
    current: Arc<RwLock<(Arc<ClientConfig>, ServerName<'static>)>>,
}

impl ClientTls {
    /// Shows `identity` to peers, whose certificates `peers` must allow.
    ///
    /// # Errors
    ///
    /// rustls does not take the certificate.
    pub fn new(identity: &Identity, peers: &PeerTrust) -> Result<Self, TlsFault> {
        Ok(Self { current: Arc::new(RwLock::new(client_config(identity, peers)?)) })
    }

    /// Prepares what new connections are to be made with. It is in use once the result was called.
    ///
    /// # Errors
    ///
    /// As [`ClientTls::new`]; what is in use then stays.
    pub fn replacement(
        &self,
        identity: &Identity,
        peers: &PeerTrust,
    ) -> Result<impl FnOnce() + use<>, TlsFault> {
        let (config, current) = (client_config(identity, peers)?, Arc::clone(&self.current));
        Ok(move || *current.write() = config)
    }

    /// Makes the handshake on a connection to a peer.
    ///
    /// # Errors
    ///
    /// The handshake failed, or the connection ended.
    pub async fn connect<S>(&self, stream: S) -> io::Result<tokio_rustls::client::TlsStream<S>>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    {
        let (config, name) = self.current.read().clone();
        TlsConnector::from(config).connect(name, stream).await
    }
}

fn client_config(
    identity: &Identity,
    peers: &PeerTrust,
) -> Result<(Arc<ClientConfig>, ServerName<'static>), TlsFault> {
    let unusable = |error: Error| fault("cert", format!("cannot be used: {error}"));
    let builder = ClientConfig::builder_with_provider(provider());
    let builder = builder.with_safe_default_protocol_versions().map_err(unusable)?;
    let built = builder
        .with_root_certificates(Arc::clone(&peers.authorities))
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key());
    let mut config = built.map_err(unusable)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok((Arc::new(config), peers.name.clone()))
}
