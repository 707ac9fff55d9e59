//! Handshakes, by rustls, over a socket.

use super::records::{HEAD, Keys, Records, SEALED};
use super::{ALPN, TlsStream, wrong};
use rustls::client::UnbufferedClientConnection;
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ContentType, Error, ExtractedSecrets, ServerConfig};
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of one side's messages that have not been understood yet, at most.
const MOST: usize = 64 << 10;

/// What is to be done next.
enum Next {
    /// Nothing: there is more to see.
    Look,
    Send,
    Receive,
    Ready,
}

/// Does what `state` asks for, with what is to be sent in `outgoing`.
fn step<D>(state: ConnectionState<'_, '_, D>, outgoing: &mut Vec<u8>) -> io::Result<Next> {
    Ok(match state {
        ConnectionState::EncodeTlsData(mut state) => {
            let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) = state.encode(&mut [])
            else {
                return Err(wrong("a message of nothing"));
            };
            let at = outgoing.len();
            outgoing.resize(at + required_size, 0);
            state.encode(&mut outgoing[at..]).map_err(wrong)?;
            Next::Look
        }
        ConnectionState::TransmitTlsData(state) => {
            state.done();
            Next::Send
        }
        ConnectionState::BlockedHandshake => Next::Receive,
        ConnectionState::WriteTraffic(_) => Next::Ready,
        // Of data and ends of connections rustls is shown nothing.
        _ => return Err(io::ErrorKind::UnexpectedEof.into()),
    })
}

/// Bytes of the record that these begin with, as far as they are there; `None` where it is not whole.
fn record(bytes: &[u8]) -> Option<usize> {
    let [typ, _, _, high, low] = bytes.first_chunk::<HEAD>()?;
    let len = usize::from(u16::from_be_bytes([*high, *low]));
    let is_none = matches!(ContentType::from(*typ), ContentType::Unknown(_)) || len > SEALED;
    // What is none it can see at once.
    if is_none { Some(bytes.len()) } else { Some(HEAD + len).filter(|len| *len <= bytes.len()) }
}

/// A connection of rustls, of either side.
trait Shaking {
    const IS_CLIENT: bool;

    type Data;

    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn common(&self) -> &CommonState;

    fn keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error>;
}

/// rustls has the same methods for both, and no trait.
macro_rules! shaking {
    ($connection:ty, $data:ty, $is_client:expr) => {
        impl Shaking for $connection {
            const IS_CLIENT: bool = $is_client;

            type Data = $data;

            fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
                self.process_tls_records(incoming)
            }

            fn common(&self) -> &CommonState {
                self
            }

            fn keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error> {
                self.dangerous_into_kernel_connection()
            }
        }
    };
}

shaking!(UnbufferedClientConnection, rustls::client::ClientConnectionData, true);
shaking!(UnbufferedServerConnection, rustls::server::ServerConnectionData, false);

pub async fn client<T: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    io: T,
) -> io::Result<TlsStream<T>> {
    let (stream, speaks) = shake(UnbufferedClientConnection::new(config, name).map_err(wrong)?, io).await?;
    if speaks.as_deref() == Some(ALPN) { Ok(stream) } else { Err(wrong("what listens there speaks no HTTP/2")) }
}

pub async fn server<T: AsyncRead + AsyncWrite + Unpin>(config: Arc<ServerConfig>, io: T) -> io::Result<TlsStream<T>> {
    shake(UnbufferedServerConnection::new(config).map_err(wrong)?, io).await.map(|(stream, _)| stream)
}

/// Gives the connection, and what is to be spoken over it.
async fn shake<S, T>(mut shaking: S, mut io: T) -> io::Result<(TlsStream<T>, Option<Vec<u8>>)>
where
    S: Shaking,
    KernelConnection<S::Data>: Keys,
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (mut incoming, mut outgoing) = (Vec::new(), Vec::new());
    // What rustls sees of what came: record by record, so that it sees none after the handshake's last.
    let mut shown = 0;
    loop {
        let UnbufferedStatus { discard, state } = shaking.process(&mut incoming[..shown]);
        let next = state.map(|state| step(state, &mut outgoing));
        incoming.drain(..discard);
        shown -= discard;
        match next {
            Ok(next) => match next? {
                Next::Look => {}
                Next::Send => {
                    io.write_all(&outgoing).await?;
                    io.flush().await?;
                    outgoing.clear();
                }
                Next::Receive => match record(&incoming[shown..]) {
                    Some(len) => shown += len,
                    None if incoming.len() >= MOST => return Err(wrong("a message of the handshake is too long")),
                    None => {
                        let mut came = [0; 4096];
                        match io.read(&mut came).await? {
                            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                            n => incoming.extend_from_slice(&came[..n]),
                        }
                    }
                },
                Next::Ready => break,
            },
            Err(e) => {
                // The other side is told why, if it listens.
                while shaking.common().wants_write()
                    && let Ok(state @ ConnectionState::EncodeTlsData(_)) = shaking.process(&mut incoming[..shown]).state
                {
                    step(state, &mut outgoing)?;
                }
                let _ = io.write_all(&outgoing).await;
                let _ = io.flush().await;
                return Err(wrong(e));
            }
        }
    }
    let speaks = shaking.common().alpn_protocol().map(<[_]>::to_vec);
    let certificates = shaking.common().peer_certificates().unwrap_or_default().to_vec();
    let (secrets, keys) = shaking.keys().map_err(wrong)?;
    let suite = keys.negotiated_cipher_suite().tls13().ok_or_else(|| wrong("the other side speaks no TLS 1.3"))?;
    let records = Records::new(S::IS_CLIENT, suite, secrets, Box::new(keys), incoming).map_err(wrong)?;
    Ok((TlsStream { io, records, certificates }, speaks))
}
