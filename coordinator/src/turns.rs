//! Connections that are read in turns.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// When a connection has been read so many bytes, others have their turn before the next read: so a chunk is added up while it is in
/// the cache, and what waits stays with the kernel.
const TURN: usize = 256 << 10;

/// A connection that lets others be read now and then.
pub struct Turns<W> {
    wire: W,
    /// Bytes read one after another, without having to wait.
    turn: usize,
}

impl<W> Turns<W> {
    pub fn new(wire: W) -> Turns<W> {
        Turns { wire, turn: 0 }
    }
}

impl<W: AsyncRead + Unpin> AsyncRead for Turns<W> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.turn >= TURN {
            self.turn = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.wire).poll_read(cx, buf);
        self.turn = if read.is_pending() { 0 } else { self.turn + buf.filled().len() - before };
        read
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Turns<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.wire).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}

impl<W: Connected> Connected for Turns<W> {
    type ConnectInfo = W::ConnectInfo;

    fn connect_info(&self) -> W::ConnectInfo {
        self.wire.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::io::AsyncWriteExt;

    /// All that was sent is read, turn after turn, when nothing more comes that would wake the reader.
    #[tokio::test]
    async fn a_turn_that_is_over_is_followed_by_another() {
        let (mut writer, reader) = tokio::io::duplex(16 * TURN);
        let sent: Vec<u8> = (0..8 * TURN + 1).map(|i| (i % 251) as u8).collect();
        writer.write_all(&sent).await.expect("there is room");
        let (mut reader, mut got, mut pauses) = (Turns::new(reader), Vec::new(), 0);
        let all = poll_fn(|cx| {
            while got.len() < sent.len() {
                let mut some = [0; TURN / 16];
                let mut buf = ReadBuf::new(&mut some);
                let Poll::Ready(read) = Pin::new(&mut reader).poll_read(cx, &mut buf) else {
                    pauses += 1;
                    return Poll::Pending;
                };
                read.expect("it is read");
                got.extend_from_slice(buf.filled());
            }
            Poll::Ready(())
        });
        tokio::time::timeout(Duration::from_secs(60), all).await.expect("a turn was the last one");
        assert!(got == sent, "other bytes came");
        assert_eq!(pauses, 8);
        drop(writer);
    }
}
