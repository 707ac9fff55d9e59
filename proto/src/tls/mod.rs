//! TLS 1.3 (RFC 8446) over TCP: rustls shakes hands, makes keys, seals and opens; what lies between it and the socket is here.
//!
//! rustls' own streams hand over each record in memory of its own, and read one at a time. Here records are opened where the
//! socket put them, several of one read, and their contents are copied once, to whoever reads the stream.

mod handshake;
mod records;
#[cfg(test)]
mod tests;

use crate::identity::{CA, CERTIFICATE, Identity, IdentityError, KEY};
use records::Records;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is spoken over TLS (RFC 7301): HTTP/2.
pub const ALPN: &[u8] = b"h2";

/// The cryptography that is used, with the suites by preference: AWS-LC's, whose AES-GCM uses vectors of 512 bits.
pub fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // The shorter key is as safe, and faster.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// The certificates in a file of an identity.
///
/// # Errors
/// A file that holds something else, or none.
pub fn certificates(
    identity: &Identity,
    file: &str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let all = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|e| identity.wrong(file, e))?;
    if all.is_empty() { Err(identity.wrong(file, "it holds no certificate")) } else { Ok(all) }
}

/// The authorities that an identity trusts.
///
/// # Errors
/// A file that holds something else, or none.
pub fn authorities(identity: &Identity) -> Result<Arc<RootCertStore>, IdentityError> {
    let mut roots = RootCertStore::empty();
    for ca in certificates(identity, CA, &identity.ca)? {
        roots.add(ca).map_err(|e| identity.wrong(CA, e))?;
    }
    Ok(Arc::new(roots))
}

/// What carries bytes: TCP, or TLS over it.
pub trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

/// How who has this identity connects.
///
/// # Errors
/// Files that hold something else, or do not belong together.
pub fn client(identity: &Identity) -> Result<Arc<ClientConfig>, IdentityError> {
    let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]);
    let config = config.map_err(|e| identity.wrong(CA, e))?.with_root_certificates(authorities(identity)?);
    let mut config = match &identity.certificate {
        Some(pem) => {
            let chain = certificates(identity, CERTIFICATE, &pem.chain)?;
            let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|e| identity.wrong(KEY, e))?;
            config.with_client_auth_cert(chain, key).map_err(|e| identity.wrong(KEY, e))?
        }
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    // Each connection shows its certificate anew.
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// Connects to who proves to be `name`.
///
/// # Errors
/// A handshake that fails: the cause is rustls' error, but where the connection itself does.
pub async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    io: T,
) -> io::Result<TlsStream<T>> {
    handshake::client(config, name, io).await
}

/// Lets somebody in; `config` has to let the keys out ([`ServerConfig::enable_secret_extraction`]).
///
/// # Errors
/// A handshake that fails: the cause is rustls' error, but where the connection itself does.
pub async fn accept<T: AsyncRead + AsyncWrite + Unpin>(config: Arc<ServerConfig>, io: T) -> io::Result<TlsStream<T>> {
    handshake::server(config, io).await
}

fn wrong(e: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

/// An open connection.
pub struct TlsStream<T> {
    io: T,
    records: Records,
    certificates: Vec<CertificateDer<'static>>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> TlsStream<T> {
    /// What the other side has shown, its own certificate first; empty where it has shown none.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Sends all that is sealed.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(slices) = self.records.sealed() {
            match ready!(Pin::new(&mut self.io).poll_write_vectored(cx, &slices))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.records.sent(sent),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        loop {
            let opened = this.records.read(out);
            if this.records.has_alert() {
                // It is told as far as it listens: the error is what matters.
                let _ = this.poll_send(cx);
            }
            let is_over = opened.map_err(wrong)?;
            if is_over || out.remaining() == 0 || out.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            let mut room = ReadBuf::new(this.records.room());
            ready!(Pin::new(&mut this.io).poll_read(cx, &mut room))?;
            match room.filled().len() {
                // Whoever ends a connection says so: this was cut.
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                came => this.records.came(came),
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // No more is sealed before what was is sent.
        ready!(this.poll_send(cx))?;
        let taken = this.records.write(bufs).map_err(wrong)?;
        match this.poll_send(cx) {
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            _ => Poll::Ready(Ok(taken)),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.records.end().map_err(wrong)?;
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}
