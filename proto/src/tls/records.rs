//! Records (RFC 8446, 5): what came is opened in place, what is to be sent is sealed; keys change in time.

use rustls::crypto::cipher::{
    AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, Error, ExtractedSecrets, HandshakeType, InvalidMessage,
    PeerMisbehaved, ProtocolVersion, Tls13CipherSuite,
};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use tokio::io::ReadBuf;

/// Bytes of a record: of its head, of its contents, and of all that follows the head (5.1 and 5.2).
pub const HEAD: usize = 5;
const CONTENTS: usize = 1 << 14;
pub const SEALED: usize = CONTENTS + 256;
/// Bytes that are received at once, at most: four records.
const ROOM: usize = 66 << 10;
/// Those at first.
const LEAST: usize = 4 << 10;
/// Bytes that are sealed at once, at most.
const AHEAD: usize = 4 * CONTENTS;
/// Records without data, one after another, that are borne with.
const IDLE: u32 = 32;
/// Bytes of a message that is no data, at most.
const MESSAGE: usize = 16 << 10;

/// What gives the next keys (7.2).
pub trait Keys: Send + Sync + 'static {
    fn to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;

    fn to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error>;
}

impl<D> Keys for KernelConnection<D>
where
    KernelConnection<D>: Send + Sync + 'static,
{
    fn to_open(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_rx_secret()
    }

    fn to_seal(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        self.update_tx_secret()
    }
}

/// A key, with the number of the next record that it seals or opens.
struct Next<T: ?Sized> {
    number: u64,
    key: Box<T>,
}

fn parts(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), Error> {
    use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
    match secrets {
        Aes128Gcm { key, iv } | Aes256Gcm { key, iv } | Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(Error::General("a cipher that is not known".into())),
    }
}

fn opens(
    suite: &Tls13CipherSuite,
    (number, secrets): (u64, ConnectionTrafficSecrets),
) -> Result<Next<dyn MessageDecrypter>, Error> {
    let (key, iv) = parts(secrets)?;
    Ok(Next { number, key: suite.aead_alg.decrypter(key, iv) })
}

fn seals(
    suite: &Tls13CipherSuite,
    (number, secrets): (u64, ConnectionTrafficSecrets),
) -> Result<Next<dyn MessageEncrypter>, Error> {
    let (key, iv) = parts(secrets)?;
    Ok(Next { number, key: suite.aead_alg.encrypter(key, iv) })
}

/// The records of one connection, both ways.
pub struct Records {
    is_client: bool,
    suite: &'static Tls13CipherSuite,
    keys: Box<dyn Keys>,
    opens: Next<dyn MessageDecrypter>,
    seals: Next<dyn MessageEncrypter>,
    /// So many records are sealed with one key.
    pub(super) limit: u64,
    buffer: Vec<u8>,
    /// Of the buffer, data that is opened, and after it what is not; all the rest is room.
    data: Range<usize>,
    closed: Range<usize>,
    /// Messages that are no data, until they are whole.
    messages: Vec<u8>,
    /// Records without data since the last with some.
    idle: u32,
    /// Whether the other side has said that nothing more comes, and whether that, or why, was said to it, or need not be.
    is_over: bool,
    has_ended: bool,
    /// Why nothing more is read.
    failed: Option<Error>,
    /// Whether the other side waits for new keys (4.6.3).
    owes_keys: bool,
    /// Sealed records, and how much of the first is sent.
    outgoing: VecDeque<Vec<u8>>,
    sent: usize,
    has_alert: bool,
}

impl Records {
    /// After a handshake, behind which `incoming` came.
    pub fn new(
        is_client: bool,
        suite: &'static Tls13CipherSuite,
        ExtractedSecrets { tx, rx }: ExtractedSecrets,
        keys: Box<dyn Keys>,
        incoming: Vec<u8>,
    ) -> Result<Records, Error> {
        let mut records = Records {
            is_client,
            suite,
            keys,
            opens: opens(suite, rx)?,
            seals: seals(suite, tx)?,
            limit: suite.common.confidentiality_limit,
            data: 0..0,
            closed: 0..incoming.len(),
            buffer: incoming,
            messages: Vec::new(),
            idle: 0,
            is_over: false,
            has_ended: false,
            failed: None,
            owes_keys: false,
            outgoing: VecDeque::new(),
            sent: 0,
            has_alert: false,
        };
        if records.seals.number > 0 {
            // AWS-LC takes the first record that it seals for the first of its key, and refuses numbers that then do not fit: where the
            // handshake has sealed some with this one, all but the message that says so are sealed with the next.
            records.change_keys()?;
        }
        Ok(records)
    }

    /// Copies what has come into `out`, as far as there is room. Gives whether nothing more comes.
    ///
    /// # Errors
    /// What the other side may not send, of which it is told, and what it says is wrong.
    pub fn read(&mut self, out: &mut ReadBuf<'_>) -> Result<bool, Error> {
        let before = out.filled().len();
        loop {
            let some = self.data.len().min(out.remaining());
            out.put_slice(&self.buffer[self.data.start..][..some]);
            self.data.start += some;
            if self.is_over || out.remaining() == 0 {
                return Ok(self.is_over);
            }
            let opened = match &self.failed {
                Some(e) => Err(e.clone()),
                None => self.open(),
            };
            match opened {
                Ok(true) => {}
                Ok(false) => return Ok(false),
                Err(e) => {
                    if self.failed.is_none() {
                        self.fail(e.clone())?;
                    }
                    // What came before it is good.
                    return if out.filled().len() > before { Ok(false) } else { Err(e) };
                }
            }
        }
    }

    /// Nothing more is read or written, but why.
    fn fail(&mut self, e: Error) -> Result<(), Error> {
        let why = match &e {
            Error::AlertReceived(_) => None,
            Error::DecryptError => Some(AlertDescription::BadRecordMac),
            Error::PeerSentOversizedRecord => Some(AlertDescription::RecordOverflow),
            _ => Some(AlertDescription::UnexpectedMessage),
        };
        self.failed = Some(e);
        self.has_alert = why.is_some();
        why.map_or(Ok(()), |why| self.alert(Alert::Fatal, why))?;
        self.has_ended = true;
        Ok(())
    }

    /// Opens the next record, when all before it is read; false where it is not there.
    fn open(&mut self) -> Result<bool, Error> {
        let Some([typ, _, _, high, low]) = self.buffer[self.closed.clone()].first_chunk::<HEAD>() else {
            return Ok(false);
        };
        let (typ, len) = (ContentType::from(*typ), usize::from(u16::from_be_bytes([*high, *low])));
        if typ != ContentType::ApplicationData {
            return Err(InvalidMessage::UnexpectedMessage("a record in the clear").into());
        }
        if len > SEALED {
            return Err(Error::PeerSentOversizedRecord);
        }
        let start = self.closed.start + HEAD;
        if start + len > self.closed.end {
            return Ok(false);
        }
        self.closed.start = start + len;
        let sealed = InboundOpaqueMessage::new(typ, ProtocolVersion::TLSv1_2, &mut self.buffer[start..start + len]);
        let opened = self.opens.key.decrypt(sealed, self.opens.number)?;
        self.opens.number += 1;
        self.idle += 1;
        if !self.messages.is_empty() && opened.typ != ContentType::Handshake {
            return Err(PeerMisbehaved::MessageInterleavedWithHandshakeMessage.into());
        }
        match opened.typ {
            ContentType::ApplicationData if !opened.payload.is_empty() => {
                // In place: it begins where the record's contents did.
                self.data = start..start + opened.payload.len();
                self.idle = 0;
            }
            ContentType::ApplicationData => {}
            ContentType::Alert => {
                let [_, why] = opened.payload else {
                    return Err(InvalidMessage::UnexpectedMessage("an alert of another length").into());
                };
                match AlertDescription::from(*why) {
                    AlertDescription::CloseNotify => self.is_over = true,
                    AlertDescription::UserCanceled => {}
                    why => return Err(Error::AlertReceived(why)),
                }
            }
            ContentType::Handshake => {
                self.messages.extend_from_slice(opened.payload);
                self.take_messages()?;
            }
            _ => return Err(InvalidMessage::UnexpectedMessage("a record of another kind").into()),
        }
        if self.idle > IDLE {
            return Err(PeerMisbehaved::TooManyEmptyFragments.into());
        }
        Ok(true)
    }

    /// Does what whole messages say that are no data (4.6).
    fn take_messages(&mut self) -> Result<(), Error> {
        let mut taken = 0;
        while let Some([typ, len @ ..]) = self.messages[taken..].first_chunk::<4>() {
            let (typ, len) = (HandshakeType::from(*typ), u32::from_be_bytes([0, len[0], len[1], len[2]]) as usize);
            if len > MESSAGE {
                return Err(InvalidMessage::UnexpectedMessage("a long message").into());
            }
            let Some(message) = self.messages[taken + 4..].get(..len) else { break };
            taken += 4 + len;
            match (typ, message) {
                // Each handshake is a whole one here.
                (HandshakeType::NewSessionTicket, _) if self.is_client => {}
                (HandshakeType::KeyUpdate, &[asks @ (0 | 1)]) if self.messages.len() == taken => {
                    self.opens = opens(self.suite, self.keys.to_open()?)?;
                    self.owes_keys |= asks == 1;
                }
                _ => return Err(InvalidMessage::UnexpectedMessage("a message of another kind").into()),
            }
        }
        self.messages.drain(..taken);
        Ok(())
    }

    /// Room for more, when all data is read.
    pub fn room(&mut self) -> &mut [u8] {
        let left = self.closed.len();
        let is_full = self.closed.end == self.buffer.len();
        if self.closed.start > 0 {
            self.buffer.copy_within(self.closed.clone(), 0);
        }
        (self.data, self.closed) = (0..0, 0..left);
        if is_full && self.buffer.len() < ROOM {
            // What fills it is likely to go on.
            self.buffer.resize((2 * self.buffer.len()).clamp(LEAST, ROOM), 0);
        }
        &mut self.buffer[left..]
    }

    /// So much of the room was filled.
    pub fn came(&mut self, bytes: usize) {
        self.closed.end += bytes;
    }

    /// Seals what there is, up to a limit; gives how much.
    ///
    /// # Errors
    /// After the end.
    pub fn write(&mut self, bufs: &[IoSlice<'_>]) -> Result<usize, Error> {
        if self.has_ended {
            return Err(Error::General("the connection has been ended".into()));
        }
        let chunks: Vec<&[u8]> = bufs.iter().map(|buf| &**buf).collect();
        let all = chunks.iter().map(|chunk| chunk.len()).sum::<usize>().min(AHEAD);
        for start in (0..all).step_by(CONTENTS) {
            // The message that says so takes the last number.
            if self.owes_keys || self.seals.number + 1 >= self.limit {
                self.change_keys()?;
            }
            let end = (start + CONTENTS).min(all);
            self.seal(ContentType::ApplicationData, OutboundChunks::Multiple { chunks: &chunks, start, end })?;
        }
        Ok(all)
    }

    /// Says that nothing more is sent.
    ///
    /// # Errors
    /// Where it cannot be sealed.
    pub fn end(&mut self) -> Result<(), Error> {
        self.alert(Alert::Warning, AlertDescription::CloseNotify)
    }

    /// The last that is sent (6).
    fn alert(&mut self, level: Alert, why: AlertDescription) -> Result<(), Error> {
        if std::mem::replace(&mut self.has_ended, true) {
            return Ok(());
        }
        self.seal(ContentType::Alert, OutboundChunks::Single(&[level as u8, why.into()]))
    }

    /// The next records are sealed with the next key, of which the other side is told (4.6.3).
    pub(super) fn change_keys(&mut self) -> Result<(), Error> {
        let message = [HandshakeType::KeyUpdate.into(), 0, 0, 1, 0];
        self.seal(ContentType::Handshake, OutboundChunks::Single(&message))?;
        self.seals = seals(self.suite, self.keys.to_seal()?)?;
        self.owes_keys = false;
        Ok(())
    }

    fn seal(&mut self, typ: ContentType, payload: OutboundChunks<'_>) -> Result<(), Error> {
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        self.outgoing.push_back(self.seals.key.encrypt(message, self.seals.number)?.encode());
        self.seals.number += 1;
        Ok(())
    }

    /// Whether an alert was sealed since this was asked.
    pub fn has_alert(&mut self) -> bool {
        std::mem::take(&mut self.has_alert)
    }

    /// What is to be sent, in the order of the records; `None` where that is nothing.
    pub fn sealed(&self) -> Option<[IoSlice<'_>; AHEAD / CONTENTS]> {
        let first = self.outgoing.front()?;
        let mut slices = [IoSlice::new(&[]); AHEAD / CONTENTS];
        slices.iter_mut().zip(&self.outgoing).for_each(|(slice, record)| *slice = IoSlice::new(record));
        slices[0] = IoSlice::new(&first[self.sent..]);
        Some(slices)
    }

    /// So much of it was sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(first) = self.outgoing.front()
            && self.sent >= first.len()
        {
            self.sent -= first.len();
            self.outgoing.pop_front();
        }
    }
}

#[derive(Clone, Copy)]
enum Alert {
    Warning = 1,
    Fatal = 2,
}
