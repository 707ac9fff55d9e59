//! The streams against rustls' own, and against themselves.

use super::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{AlertDescription, Error};
use std::future::poll_fn;
use std::path::PathBuf;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const NAME: &str = "coordinator.unisono";

/// An authority's configurations of both sides.
fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
    let key = KeyPair::generate().expect("a key");
    let own = CertificateParams::new(vec![NAME.to_string()]).expect("a name");
    let own = own.signed_by(&key, &ca).expect("a certificate");
    let identity = Identity {
        folder: PathBuf::from("x"),
        ca: ca.pem().into_bytes(),
        certificate: Some(crate::identity::Certificate {
            chain: own.pem().into_bytes(),
            key: key.serialize_pem().into_bytes(),
        }),
        token: None,
        coordinator: None,
    };
    let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&rustls::version::TLS13]);
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
        authorities(&identity).expect("an authority"),
        provider(),
    );
    let config = config.expect("TLS 1.3").with_client_cert_verifier(verifier.build().expect("a verifier"));
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
    let mut config = config.with_single_cert(vec![own.der().clone()], key).expect("they belong together");
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_secret_extraction = true;
    (client(&identity).expect("a configuration"), Arc::new(config))
}

fn name() -> ServerName<'static> {
    ServerName::try_from(NAME).expect("a name")
}

/// A pair of ours over a pipe that holds so much.
async fn ours(holds: usize) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let (configs, (a, b)) = (configs(), duplex(holds));
    let (a, b) = tokio::join!(connect(configs.0, name(), a), accept(configs.1, b));
    let (a, b) = (a.expect("it connects"), b.expect("it is let in"));
    assert_eq!((a.peer_certificates().len(), b.peer_certificates().len()), (1, 1));
    (a, b)
}

fn data(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Both sides send at once, in pieces of `piece` bytes, and end; each gets what the other has sent, and its end.
async fn exchange<A, B>(a: A, b: B, len: usize, piece: usize)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    async fn side<T: AsyncRead + AsyncWrite + Unpin>(stream: T, own: Vec<u8>, other: Vec<u8>, piece: usize) {
        let (mut read, mut write) = tokio::io::split(stream);
        let sends = async {
            for piece in own.chunks(piece) {
                write.write_all(piece).await.expect("it is taken");
            }
            write.shutdown().await.expect("it ends");
        };
        let takes = async {
            let mut came = Vec::new();
            read.read_to_end(&mut came).await.expect("it comes, and ends well");
            assert!(came == other, "{} of {} bytes came", came.len(), other.len());
        };
        tokio::join!(sends, takes);
    }
    let (first, second) = (data(1, len), data(2, len));
    tokio::join!(side(a, first.clone(), second.clone(), piece), side(b, second, first, piece));
}

#[tokio::test]
async fn what_is_sent_comes_whatever_its_pieces_and_however_often_keys_change() {
    for (holds, len, piece, limit) in [
        (1 << 20, 1 << 20, 1 << 19, 1 << 24),
        (1000, 200_000, 70_000, 3),
        (70_000, 300_000, 16_385, 2),
        (500, 5000, 1, 9),
    ] {
        let (mut a, mut b) = ours(holds).await;
        (a.records.limit, b.records.limit) = (limit, limit + 1);
        exchange(a, b, len, piece).await;
    }
}

#[tokio::test]
async fn rustls_understands_us_on_either_side() {
    let (client, server) = configs();
    for (holds, len, piece) in [(1 << 20, 1 << 20, 1 << 18), (777, 100_000, 20_000)] {
        let (a, b) = duplex(holds);
        let connector = TlsConnector::from(client.clone());
        let (a, b) = tokio::join!(connector.connect(name(), a), accept(server.clone(), b));
        let (mut a, mut b) = (a.expect("it connects"), b.expect("it is let in"));
        b.records.limit = 4;
        // It asks us to change ours, too.
        a.get_mut().1.refresh_traffic_keys().expect("it has keys");
        exchange(a, b, len, piece).await;

        let (a, b) = duplex(holds);
        let acceptor = TlsAcceptor::from(server.clone());
        let (a, b) = tokio::join!(connect(client.clone(), name(), a), acceptor.accept(b));
        let (mut a, mut b) = (a.expect("it connects"), b.expect("it is let in"));
        a.records.limit = 4;
        b.get_mut().1.refresh_traffic_keys().expect("it has keys");
        exchange(a, b, len, piece).await;
    }
}

/// The error of rustls below one of a stream.
fn cause(e: &io::Error) -> Option<&Error> {
    e.get_ref()?.downcast_ref()
}

#[tokio::test]
async fn a_connection_that_was_cut_or_changed_gives_nothing_more() {
    // Cut after whole records: nobody has said that it ends.
    let (a, mut b) = ours(1 << 16).await;
    let TlsStream { io, .. } = a;
    drop(io);
    let cut = b.read(&mut [0; 10]).await.expect_err("it was cut");
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);

    // Any flipped bit of a record's contents, or of its length.
    for at in [3, 4, 5, 20, 40] {
        let (mut a, mut b) = ours(1 << 16).await;
        let taken = a.records.write(&[IoSlice::new(b"twenty bytes of data"), IoSlice::new(b", and some")]);
        assert_eq!(taken.expect("there is room"), 30);
        let slices = a.records.sealed().expect("a record");
        let mut record = slices[0].to_vec();
        record[at] ^= 1;
        a.io.write_all(&record).await.expect("it is sent");
        a.io.write_all(&[0; 300]).await.expect("it is sent");
        let mut came = Vec::new();
        let wrong = b.read_to_end(&mut came).await.expect_err("it was changed");
        assert_eq!(
            (wrong.kind(), cause(&wrong), came.len()),
            (io::ErrorKind::InvalidData, Some(&Error::DecryptError), 0)
        );
        // The other side is told.
        let told = a.read(&mut [0; 10]).await.expect_err("it is left");
        assert_eq!(cause(&told), Some(&Error::AlertReceived(AlertDescription::BadRecordMac)));
        assert!(b.write(b"more").await.is_err(), "it goes on after its alert");
    }

    // What came before it is read, and then nothing, however often one asks.
    let (mut a, mut b) = ours(1 << 16).await;
    a.write_all(b"good").await.expect("it is sent");
    a.io.write_all(&[23, 3, 3, 0, 20]).await.expect("it is sent");
    a.io.write_all(&[7; 20]).await.expect("it is sent");
    a.write_all(b"good again").await.expect("it is sent");
    let mut came = [0; 100];
    assert_eq!(b.read(&mut came).await.expect("it is there"), 4);
    for _ in 0..3 {
        assert_eq!(cause(&b.read(&mut came).await.expect_err("it was refused")), Some(&Error::DecryptError));
    }

    // What is no record of data: in the clear, too long, or new keys again and again.
    for sent in [&[22, 3, 3, 0, 1, 0][..], &[23, 3, 3, 0x41, 0x01]] {
        let (mut a, mut b) = ours(1 << 16).await;
        a.io.write_all(sent).await.expect("it is sent");
        let wrong = b.read(&mut [0; 10]).await.expect_err("it was refused");
        assert!(matches!(cause(&wrong), Some(Error::InvalidMessage(_) | Error::PeerSentOversizedRecord)), "{wrong:?}");
        let told = a.read(&mut [0; 10]).await.expect_err("it is left");
        assert!(matches!(cause(&told), Some(Error::AlertReceived(_))), "{told:?}");
    }
    let (mut a, mut b) = ours(1 << 16).await;
    for _ in 0..50 {
        a.records.change_keys().expect("there are keys");
        poll_fn(|cx| a.poll_send(cx)).await.expect("it is sent");
    }
    let wrong = b.read(&mut [0; 10]).await.expect_err("it is too much");
    assert!(matches!(cause(&wrong), Some(Error::PeerMisbehaved(_))), "{wrong:?}");
}

/// What is sent behind the handshake's last message comes with it, in one read.
#[tokio::test]
async fn what_comes_with_the_handshakes_end_is_not_lost() {
    let (client, server) = configs();
    let (a, b) = duplex(1 << 16);
    let first = async {
        let mut a = connect(client, name(), a).await.expect("it connects");
        a.write_all(b"one ").await.expect("it is sent");
        a.records.change_keys().expect("there are keys");
        a.write_all(b"two").await.expect("it is sent");
        a.shutdown().await.expect("it ends");
        let mut came = Vec::new();
        a.read_to_end(&mut came).await.expect("it comes");
        came
    };
    let second = async {
        let mut b = accept(server, b).await.expect("it is let in");
        let mut came = Vec::new();
        b.read_to_end(&mut came).await.expect("it comes");
        b.write_all(b"three").await.expect("it is sent");
        b.shutdown().await.expect("it ends");
        came
    };
    assert_eq!(tokio::join!(first, second), (b"three".to_vec(), b"one two".to_vec()));
}

#[tokio::test]
async fn what_speaks_no_tls_is_refused() {
    let (client, server) = configs();
    for said in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"P", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[22, 3, 1, 0, 4, 1, 0, 0, 0]]
    {
        let ((mut a, b), (c, mut d)) = (duplex(1 << 16), duplex(1 << 16));
        a.write_all(said).await.expect("it is said");
        d.write_all(said).await.expect("it is said");
        // Who says no more, ends.
        a.shutdown().await.expect("it ends");
        d.shutdown().await.expect("it ends");
        for refused in [accept(server.clone(), b).await.err(), connect(client.clone(), name(), c).await.err()] {
            let refused = refused.expect("it is refused");
            let is_cut = said.len() == 1 && refused.kind() == io::ErrorKind::UnexpectedEof;
            assert!(
                is_cut
                    || matches!(
                        cause(&refused),
                        Some(
                            Error::InvalidMessage(_)
                                | Error::InappropriateMessage { .. }
                                | Error::InappropriateHandshakeMessage { .. }
                        )
                    ),
                "{refused:?}"
            );
        }
        let mut told = Vec::new();
        a.read_to_end(&mut told).await.expect("it ends");
        assert!(said.len() == 1 || told[..5] == [21, 3, 3, 0, 2], "an alert: {told:?}");
    }
}

#[tokio::test]
async fn whoever_is_not_trusted_is_told_why() {
    let ((client, _), (_, server)) = (configs(), configs());
    let (a, b) = duplex(1 << 16);
    let (a, b) = tokio::join!(connect(client, name(), a), accept(server, b));
    let unknown = a.err().expect("it is another authority's");
    assert!(matches!(cause(&unknown), Some(Error::InvalidCertificate(_))), "{unknown:?}");
    let told = b.err().expect("nobody came");
    assert!(matches!(cause(&told), Some(Error::AlertReceived(_))), "{told:?}");
}
