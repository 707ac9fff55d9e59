//! Reaching a coordinator: its address, what is shown there, the transport's settings, and errors in plain words.

use crate::{Options, Refused};
use anyhow::{Context, Result, anyhow, bail};
use http::HeaderValue;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig, InvalidMessage};
use std::error::Error;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Polled, Poll};
use std::time::Duration;
use tokio::net::{TcpSocket, TcpStream};
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::transport::channel::ResponseFuture;
use tonic::transport::{self, Endpoint};
use unisono_proto::identity::{CA, Identity};
use unisono_proto::stream::Reader;
use unisono_proto::{self as wire, tls, v1};

/// Where a coordinator is, with the transport's settings, and who asks.
#[derive(Clone, Debug)]
pub struct Address {
    url: String,
    /// By HTTP/2; TLS is the connector's.
    endpoint: Endpoint,
    connector: Connector,
    /// The header `authorization`, which is never shown.
    token: Option<HeaderValue>,
}

impl Address {
    /// From a URL, and what is shown there; without a scheme, TLS is spoken where there is an identity.
    ///
    /// # Errors
    /// A URL that is none, TLS without an identity, an identity that would be sent in the clear, and files that hold no
    /// certificate.
    pub fn new(url: &str, identity: Option<&Identity>) -> Result<Address> {
        let scheme = if identity.is_some() { "https" } else { "http" };
        let url = if url.contains("://") { url.to_string() } else { format!("{scheme}://{url}") };
        let endpoint = Endpoint::from_shared(url.clone()).ok();
        let scheme = |e: &Endpoint| e.uri().scheme_str().unwrap_or_default().to_string();
        let is_url = |e: &Endpoint| ["http", "https"].contains(&&*scheme(e)) && e.uri().port_u16().is_some();
        let Some(endpoint) = endpoint.filter(is_url) else {
            bail!("`{url}` is not a coordinator's URL; write it as https://HOST:PORT, or http://HOST:PORT without TLS")
        };
        let (mut token, mut connector) = (None, Connector::default());
        match (identity, scheme(&endpoint).as_str()) {
            (Some(_), "http") => {
                bail!(
                    "`{url}` is without TLS, and who listens could be anybody: write https://, or leave --identity (UNISONO_IDENTITY) out"
                )
            }
            (None, "https") => {
                bail!("`{url}` is with TLS: give the folder of an identity with --identity (`unisono cert` makes one)")
            }
            (Some(identity), _) => {
                let name = identity.coordinator.unwrap_or(host(endpoint.uri())).to_string();
                let name = ServerName::try_from(name).with_context(|| format!("the host of `{url}`"))?;
                connector.tls = Some((tls::client(identity)?, name));
                if let Some(mine) = &identity.token {
                    let mut header = HeaderValue::from_str(&mine.header()).context("the join token")?;
                    header.set_sensitive(true);
                    token = Some(header);
                }
            }
            (None, _) => {}
        }
        let origin = endpoint.uri().clone();
        let mut parts = origin.clone().into_parts();
        parts.scheme = Some(http::uri::Scheme::HTTP);
        let endpoint = Endpoint::from(http::Uri::from_parts(parts)?)
            .origin(origin)
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(wire::KEEPALIVE)
            .keep_alive_timeout(wire::KEEPALIVE)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(wire::STREAM_WINDOW)
            .initial_connection_window_size(wire::CONNECTION_WINDOW)
            .max_frame_size(wire::MAX_FRAME);
        Ok(Address { url, endpoint, connector, token })
    }

    /// The URL, for people.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection, and whether there is any.
    ///
    /// # Errors
    /// Nobody there, or not whom the identity's authority knows.
    pub async fn connect(&self) -> Result<Channel> {
        let connector = self.connector.clone();
        let encrypted = connector.tls.is_some();
        let wire = self.endpoint.connect_with_connector(connector).await.map_err(|e| self.unreachable(&e))?;
        Ok(Channel { wire, token: self.token.clone(), encrypted })
    }

    /// The error of a connection that could not be made.
    fn unreachable(&self, e: &transport::Error) -> anyhow::Error {
        use CertificateError::{
            Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet, NotValidYetContext,
            UnknownIssuer,
        };
        let url = &self.url;
        // What to try again would not change is final.
        let refused = |why: String| Refused(why).into();
        match tls_error(e) {
            Some(rustls::Error::InvalidCertificate(UnknownIssuer)) => refused(format!(
                "the certificate of {url} is of another CA than {CA} in --identity: is it the right coordinator?"
            )),
            Some(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => refused(
                format!("the certificate of {url} is not for this host: make one with `unisono cert --host HOST`"),
            ),
            Some(rustls::Error::InvalidCertificate(Expired | ExpiredContext { .. })) => {
                anyhow!("the certificate of {url} has expired: make another with `unisono cert`")
            }
            Some(rustls::Error::InvalidCertificate(NotValidYet | NotValidYetContext { .. })) => {
                anyhow!("the certificate of {url} is not valid yet: compare the clocks of both machines")
            }
            Some(rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType)) => {
                anyhow!("what listens at {url} speaks no TLS: start the coordinator with --identity")
            }
            Some(other) => anyhow!("no TLS with {url}: {other}"),
            None if url.starts_with("https:") && was_cut(e) => anyhow!(
                "what listens at {url} ends the connection at once: if it speaks no TLS, write http:// and leave --identity out"
            ),
            None => anyhow!("cannot reach a coordinator at {url}: {}", last_cause(e)),
        }
    }

    /// A refused call in plain words: what a server that is no coordinator says is of no use to anybody.
    pub fn plain(&self, e: &tonic::Status) -> anyhow::Error {
        use tonic::Code::{Cancelled, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
        let url = &self.url;
        match e.code() {
            Cancelled | DeadlineExceeded => anyhow!("{}", silent(url)),
            Unimplemented => anyhow!("what listens at {url} is no coordinator of this version"),
            Internal | Unavailable | Unknown => {
                let tls = if url.starts_with("http:") { ", or asks for TLS (https:// and --identity)" } else { "" };
                anyhow!(
                    "what listens at {url} broke the connection off: it has just ended, or turned this one away (its log says why), \
                     or is no coordinator of this version{tls}"
                )
            }
            _ => anyhow!("{}", e.message()),
        }
    }
}

/// Opens connections, to the first address of a name that answers; by TLS, to who proves to have a name, or without.
#[derive(Clone, Debug, Default)]
struct Connector {
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

fn host(uri: &http::Uri) -> &str {
    uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
}

async fn tcp(uri: &http::Uri) -> io::Result<TcpStream> {
    let host = host(uri);
    let mut failed = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
    for address in tokio::net::lookup_host((host, uri.port_u16().unwrap_or_default())).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // Before it is connected: what BBR sets up stays.
        wire::steady(&socket).ok();
        socket.set_nodelay(true)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

impl Service<http::Uri> for Connector {
    type Response = TokioIo<Box<dyn tls::Wire>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Polled<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let tls = self.tls.clone();
        Box::pin(async move {
            let stream = tcp(&uri).await?;
            Ok(TokioIo::new(match tls {
                Some((config, name)) => Box::new(tls::connect(config, name, stream).await?),
                None => Box::new(stream) as Box<dyn tls::Wire>,
            }))
        })
    }
}

/// The last cause of an error says all.
fn last_cause(e: &dyn Error) -> String {
    let mut cause = e;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// An error, and what caused it.
fn causes<'a>(e: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let source = |e: &&'a (dyn Error + 'static)| -> Option<&'a (dyn Error + 'static)> { Error::source(*e) };
    std::iter::successors(Some(e), source)
}

/// Whether the other side has ended a connection that there was.
fn was_cut(e: &(dyn Error + 'static)) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let cut = |e: &io::Error| matches!(e.kind(), ConnectionReset | ConnectionAborted | BrokenPipe | UnexpectedEof);
    causes(e).any(|e| e.downcast_ref().is_some_and(cut))
}

/// What is wrong with TLS, where that is why there is no connection.
fn tls_error<'a>(e: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let of_io =
        |e: &'a (dyn Error + 'static)| e.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref::<rustls::Error>();
    causes(e).find_map(|e| e.downcast_ref().or_else(|| of_io(e)))
}

/// A connection to a coordinator, which shows the join token with every call, where there is one.
#[derive(Clone, Debug)]
pub struct Channel {
    wire: transport::Channel,
    token: Option<HeaderValue>,
    encrypted: bool,
}

impl Channel {
    /// Whether chunks need a checksum of their own: what is encrypted has a better one.
    pub fn needs_checksum(&self) -> bool {
        !self.encrypted
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, context: &mut Polled<'_>) -> Poll<Result<(), Self::Error>> {
        self.wire.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> ResponseFuture {
        if let Some(token) = &self.token {
            request.headers_mut().insert(http::header::AUTHORIZATION, token.clone());
        }
        self.wire.call(request)
    }
}

pub(crate) type Client = v1::coordinator_client::CoordinatorClient<Channel>;

/// That nothing comes from a coordinator.
fn silent(url: &str) -> String {
    format!("what listens at {url} does not answer: is it a coordinator, and not stopped or overloaded?")
}

/// The answer to a call, or an error where none comes.
pub(crate) async fn answer<T>(
    options: &Options,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, tonic::Status> {
    let limit = options.patience.clamp(Duration::from_secs(1), Duration::from_secs(10));
    let nothing = |_| tonic::Status::deadline_exceeded(silent(options.coordinator.url()));
    tokio::time::timeout(limit, call).await.map_err(nothing)?
}

/// Calls a method of the service `Parameters`, whose messages are written and read by hand.
pub(crate) async fn call(mut channel: Channel, method: &str, body: Body) -> Result<Reader<Body>, tonic::Status> {
    let request = http::Request::post(format!("/unisono.v1.Parameters/{method}"))
        .header(http::header::TE, "trailers")
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .body(body)
        .map_err(|e| tonic::Status::internal(e.to_string()))?;
    let failed = |e: tonic::transport::Error| tonic::Status::from_error(e.into());
    std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(failed)?;
    let response = channel.call(request).await.map_err(failed)?;
    match tonic::Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok => Err(status),
        Some(_) | None => Ok(Reader::new(response.into_body())),
    }
}
