//! The streams of parameters, by hand: generated code would copy every chunk twice on each side.
//!
//! The bytes are those of the proto file's messages, so any gRPC client can talk to it. A chunk's values must be its last
//! field, which is where protobuf's encoders put them.

use crate::{WireError, v1};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint};
use std::error::Error;
use tonic::Status;

/// gRPC's frame around a message: whether it is compressed (a byte), and its length (four, big-endian).
const PREFIX: usize = 5;
/// Messages without values are shorter.
const SHORT: usize = 1024;
/// All of a chunk's message before its values, at most.
const HEAD: usize = 48;
/// A chunk before its values: of a gradient, or of the weights of `step`, or of their average.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkHead {
    pub step: u64,
    pub average: bool,
    pub index: u32,
    /// XXH3 (64 bits) of the values; none on an encrypted connection, whose own check is better.
    pub checksum: Option<u64>,
}

impl ChunkHead {
    /// The same, where it has the checksum that it needs.
    ///
    /// # Errors
    /// None where one is `needed`.
    pub fn summed(self, needed: bool) -> Result<ChunkHead, WireError> {
        if needed && self.checksum.is_none() { Err(WireError::Unsummed { index: self.index }) } else { Ok(self) }
    }

    /// Checks what the values' checksum is, where they were sent with one.
    ///
    /// # Errors
    /// Another than they were sent with.
    pub fn check(self, checksum: impl FnOnce() -> u64) -> Result<(), WireError> {
        let Some(want) = self.checksum else { return Ok(()) };
        let (index, got) = (self.index, checksum());
        if got == want { Ok(()) } else { Err(WireError::Checksum { index, got, want }) }
    }
}

/// A message of either stream.
#[derive(Debug, PartialEq)]
pub enum Part {
    /// One without values.
    Short(v1::push_part::Kind),
    /// A chunk, whose values [`Reader::values`] reads next: so many bytes.
    Chunk(ChunkHead, usize),
    /// A piece of rows' gradients, in the same way.
    Rows(ChunkHead, usize),
}

/// The parts of a message in its frame: all before the values, and the values, which are shared.
fn framed(head: &[u8], values: &Bytes) -> impl Iterator<Item = Bytes> + use<> {
    let mut first = BytesMut::with_capacity(PREFIX + head.len());
    first.put_u8(0);
    first.put_u32((head.len() + values.len()) as u32);
    first.extend_from_slice(head);
    let values = Some(values.clone()).filter(|values| !values.is_empty());
    std::iter::once(first.freeze()).chain(values)
}

fn values_field(number: u32, len: usize) -> BytesMut {
    let mut field = BytesMut::new();
    encode_key(number, WireType::LengthDelimited, &mut field);
    encode_varint(len as u64, &mut field);
    field
}

/// A message `WeightChunk`.
pub fn weights(head: ChunkHead, values: &Bytes) -> impl Iterator<Item = Bytes> + use<> {
    let ChunkHead { step, average, index, checksum } = head;
    let chunk = v1::WeightChunk { step, average, index, checksum, values: Bytes::new() };
    let mut message = BytesMut::from(&chunk.encode_to_vec()[..]);
    message.extend_from_slice(&values_field(5, values.len()));
    framed(&message, values)
}

/// A message `PushPart` that holds a `GradientChunk`.
pub fn gradient(head: ChunkHead, values: &Bytes) -> impl Iterator<Item = Bytes> + use<> {
    pushed(GRADIENT, head, values)
}

/// A message `PushPart` that holds a `RowPiece`.
pub fn rows(head: ChunkHead, values: &Bytes) -> impl Iterator<Item = Bytes> + use<> {
    pushed(ROWS, head, values)
}

/// Bytes of a `RowPiece`'s values, at most.
pub const ROW_PIECE: usize = 1 << 20;

/// Fields of a `PushPart` that hold values, in messages with the same fields.
const GRADIENT: u32 = 3;
const ROWS: u32 = 5;

fn pushed(kind: u32, head: ChunkHead, values: &Bytes) -> impl Iterator<Item = Bytes> + use<> {
    let ChunkHead { index, checksum, .. } = head;
    let inner = v1::GradientChunk { index, checksum, values: Bytes::new() }.encode_to_vec();
    let field = values_field(3, values.len());
    let mut message = BytesMut::new();
    encode_key(kind, WireType::LengthDelimited, &mut message);
    encode_varint((inner.len() + field.len() + values.len()) as u64, &mut message);
    message.extend_from_slice(&inner);
    message.extend_from_slice(&field);
    framed(&message, values)
}

/// A message without values.
pub fn short(message: &impl Message) -> Bytes {
    framed(&message.encode_to_vec(), &Bytes::new()).next().unwrap_or_default()
}

/// Why a stream has failed, for people: what HTTP/2 says of a connection that is no more tells nobody anything.
pub fn why(failed: &Status) -> &str {
    // What the other side answers has no source here.
    if failed.source().is_some() { "the connection broke" } else { failed.message() }
}

fn wrong(what: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("a message cannot be read: {what}"))
}

fn unknown(field: u32, of: &str) -> Status {
    wrong(format_args!("field {field} is not as {of} has it: was the other side built from another version?"))
}

/// Reads messages from a body. Whoever stops waiting for a chunk or its values loses nothing: the next call goes on where it
/// was.
pub struct Reader<B> {
    body: B,
    /// What has come and was not read, of a frame of so many bytes.
    rest: Bytes,
    frame: usize,
    /// The frame and the beginning of the open message, of which `have` bytes have come.
    head: [u8; PREFIX + HEAD],
    have: usize,
    /// What the last `taken` bytes of `head` are the beginning of.
    last: Bytes,
    taken: usize,
    /// Those of the open message's values that have come where they come in several pieces, and the number of all others.
    pieces: BytesMut,
    left: usize,
}

impl<B: Body<Data = Bytes> + Unpin> Reader<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Reads from the beginning of `body`.
    pub fn new(body: B) -> Reader<B> {
        let (rest, last, pieces) = Default::default();
        Reader { body, rest, frame: 0, head: [0; PREFIX + HEAD], have: 0, last, taken: 0, pieces, left: 0 }
    }

    /// Waits for bytes; false at the body's end.
    async fn more(&mut self) -> Result<bool, Status> {
        while self.rest.is_empty() {
            let Some(frame) = self.body.frame().await else { return Ok(false) };
            match frame.map_err(|e| Status::from_error(e.into()))?.into_data() {
                Ok(data) => (self.frame, self.rest) = (data.len(), data),
                Err(trailers) => return ended(trailers),
            }
        }
        Ok(true)
    }

    /// The length of the next message, whose beginning is in `head` then; `None` at the stream's end.
    async fn peek(&mut self) -> Result<Option<usize>, Status> {
        if self.left > 0 || !self.pieces.is_empty() {
            return Err(wrong("its values were not read"));
        }
        loop {
            let length = self.head[..self.have].first_chunk::<PREFIX>().map(|&[compressed, length @ ..]| {
                let length = u32::from_be_bytes(length) as usize;
                let right = compressed == 0 && length <= crate::MAX_MESSAGE;
                let most = crate::MAX_MESSAGE;
                right.then_some(length).ok_or_else(|| wrong(format_args!("it is compressed, or above {most} bytes")))
            });
            let length = length.transpose()?;
            let want = PREFIX + length.map_or(0, |length| length.min(HEAD));
            if let Some(length) = length.filter(|_| self.have == want) {
                self.have = 0; // for the next one
                return Ok(Some(length));
            }
            if !self.more().await? {
                return if self.have == 0 { Ok(None) } else { Err(wrong("it ends too early")) };
            }
            let n = (want - self.have).min(self.rest.len());
            (self.last, self.taken) = (self.rest.clone(), n);
            self.rest.copy_to_slice(&mut self.head[self.have..self.have + n]);
            self.have += n;
        }
    }

    /// A message of `length` bytes that has no values.
    async fn decode<M: Message + Default>(&mut self, length: usize) -> Result<M, Status> {
        if length > SHORT {
            return Err(wrong(format_args!("it must be at most {SHORT} bytes")));
        }
        self.hold(0, length, length)?;
        M::decode(&*self.values().await?).map_err(wrong)
    }

    /// The next message, which must be short.
    ///
    /// # Errors
    /// A broken connection, and a message that is none.
    pub async fn short<M: Message + Default>(&mut self) -> Result<Option<M>, Status> {
        match self.peek().await? {
            Some(length) => self.decode(length).await.map(Some),
            None => Ok(None),
        }
    }

    /// The next `WeightChunk`, and the length of its values.
    ///
    /// # Errors
    /// A broken connection, and a message that is none.
    pub async fn weights(&mut self) -> Result<Option<(ChunkHead, usize)>, Status> {
        let Some(length) = self.peek().await? else { return Ok(None) };
        let (mut chunk, mut values) = (ChunkHead::default(), 0);
        let head = length.min(HEAD);
        let mut fields = Fields(&self.head[PREFIX..PREFIX + head]);
        while !fields.0.is_empty() {
            match fields.key()? {
                (1, WireType::Varint) => chunk.step = fields.varint()?,
                (2, WireType::Varint) => chunk.index = fields.small()?,
                (3, WireType::SixtyFourBit) => chunk.checksum = Some(fields.fixed()?),
                (4, WireType::Varint) => chunk.average = fields.varint()? != 0,
                (5, WireType::LengthDelimited) => {
                    values = fields.small()? as usize;
                    break;
                }
                (field, _) => return Err(unknown(field, "a chunk of weights")),
            }
        }
        let at = head - fields.0.len();
        self.hold(at, length, values)?;
        Ok(Some((chunk, values)))
    }

    /// The next `PushPart`.
    ///
    /// # Errors
    /// A broken connection, and a message that is none.
    pub async fn part(&mut self) -> Result<Option<Part>, Status> {
        let Some(length) = self.peek().await? else { return Ok(None) };
        let (mut chunk, mut values) = (ChunkHead::default(), 0);
        let head = length.min(HEAD);
        let mut fields = Fields(&self.head[PREFIX..PREFIX + head]);
        let kind = if head == 0 { (0, WireType::Varint) } else { fields.key()? };
        if kind != (GRADIENT, WireType::LengthDelimited) && kind != (ROWS, WireType::LengthDelimited) {
            let part: v1::PushPart = self.decode(length).await?;
            return part.kind.map(|kind| Some(Part::Short(kind))).ok_or_else(|| wrong("it is empty"));
        }
        let inner = fields.small()? as usize;
        if inner != length - (head - fields.0.len()) {
            return Err(wrong("something follows the chunk"));
        }
        while !fields.0.is_empty() {
            match fields.key()? {
                (1, WireType::Varint) => chunk.index = fields.small()?,
                (2, WireType::SixtyFourBit) => chunk.checksum = Some(fields.fixed()?),
                (3, WireType::LengthDelimited) => {
                    values = fields.small()? as usize;
                    break;
                }
                (field, _) => return Err(unknown(field, "a chunk")),
            }
        }
        let at = head - fields.0.len();
        self.hold(at, length, values)?;
        Ok(Some(if kind.0 == ROWS { Part::Rows(chunk, values) } else { Part::Chunk(chunk, values) }))
    }

    /// The values begin at `at` of a message of `length` bytes.
    fn hold(&mut self, at: usize, length: usize, values: usize) -> Result<(), Status> {
        if length - at != values {
            return Err(wrong("the values are not its last field"));
        }
        // What came with the head is their beginning; as a rule it goes back to where it came from.
        let held = length.min(HEAD) - at;
        let last = std::mem::take(&mut self.last);
        self.left = values;
        if held <= self.taken {
            self.rest = last.slice(self.taken - held..);
        } else {
            self.pieces.extend_from_slice(&self.head[PREFIX + at..][..held]);
            self.left -= held;
        }
        Ok(())
    }

    /// The values of the message whose head came last: in the memory they came in, where that is one frame of at most twice
    /// their length, so that whoever keeps them keeps little else.
    ///
    /// # Errors
    /// A broken connection.
    pub async fn values(&mut self) -> Result<Bytes, Status> {
        while self.rest.len() < self.left || !self.pieces.is_empty() {
            let n = self.left.min(self.rest.len());
            self.pieces.reserve(self.left);
            self.pieces.extend_from_slice(&self.rest.split_to(n));
            self.left -= n;
            if self.left == 0 {
                return Ok(std::mem::take(&mut self.pieces).freeze());
            }
            if !self.more().await? {
                return Err(wrong("it ends too early"));
            }
        }
        let values = self.rest.split_to(std::mem::take(&mut self.left));
        Ok(if self.frame <= 2 * values.len() { values } else { Bytes::copy_from_slice(&values) })
    }
}

/// A stream ends with a status, which may be an error.
fn ended(trailers: Frame<Bytes>) -> Result<bool, Status> {
    let status = trailers.into_trailers().ok().and_then(|t| Status::from_header_map(&t));
    match status {
        Some(status) if status.code() != tonic::Code::Ok => Err(status),
        Some(_) | None => Ok(false),
    }
}

/// Fields of a protobuf message.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn varint(&mut self) -> Result<u64, Status> {
        prost::encoding::decode_varint(&mut self.0).map_err(wrong)
    }

    fn small(&mut self) -> Result<u32, Status> {
        u32::try_from(self.varint()?).map_err(wrong)
    }

    fn key(&mut self) -> Result<(u32, WireType), Status> {
        prost::encoding::decode_key(&mut self.0).map_err(wrong)
    }

    fn fixed(&mut self) -> Result<u64, Status> {
        self.0.try_get_u64_le().map_err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;
    use tonic::codegen::tokio_stream;

    const VALUES: [usize; 6] = [0, 4, 40, 52, 1 << 20, (1 << 20) + 12];

    /// All bytes of some messages, cut at every `cut`.
    fn body(all: &[Bytes], cut: usize) -> impl Body<Data = Bytes, Error = Status> + Unpin + use<> {
        let all: Bytes = all.concat().into();
        let pieces: Vec<_> =
            (0..all.len()).step_by(cut).map(|at| Ok(Frame::data(all.slice(at..(at + cut).min(all.len()))))).collect();
        StreamBody::new(tokio_stream::iter(pieces))
    }

    /// Some pieces, each in a frame of its own.
    fn frames(pieces: &[Bytes]) -> impl Body<Data = Bytes, Error = Status> + Unpin + use<> {
        let frames: Vec<_> = pieces.iter().map(|piece| Ok(Frame::data(piece.clone()))).collect();
        StreamBody::new(tokio_stream::iter(frames))
    }

    fn now<T>(future: impl Future<Output = T>) -> T {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut future = std::pin::pin!(future);
        loop {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
                return value;
            }
        }
    }

    #[test]
    fn what_is_sent_is_read_and_is_what_generated_code_reads() {
        for (n, len) in VALUES.into_iter().enumerate() {
            let values: Bytes = (0..len).map(|i| i as u8).collect::<Vec<_>>().into();
            for head in [
                ChunkHead::default(),
                ChunkHead { step: u64::MAX, average: true, index: n as u32, checksum: Some(u64::MAX) },
            ] {
                let ChunkHead { step, average, index, checksum } = head;
                let sent: Vec<Bytes> = weights(head, &values).collect();
                let message = v1::WeightChunk { step, average, index, checksum, values: values.clone() };
                assert_eq!(v1::WeightChunk::decode(&sent.concat()[PREFIX..]).expect("a message"), message);
                assert!(len == 0 || sent[1].as_ptr() == values.as_ptr(), "values are shared");
                let sent_push: Vec<Bytes> = gradient(head, &values).collect();
                let chunk = v1::GradientChunk { index, checksum, values: values.clone() };
                let message = v1::PushPart { kind: Some(v1::push_part::Kind::Chunk(chunk)) };
                assert_eq!(v1::PushPart::decode(&sent_push.concat()[PREFIX..]).expect("a message"), message);
                // As they are sent; nobody copies them. In a frame that is much longer they are not kept from where they came.
                let mut reader = Reader::new(frames(&sent_push));
                assert!(matches!(now(reader.part()), Ok(Some(Part::Chunk(_, got))) if got == len));
                let got = now(reader.values()).expect("readable");
                assert!(got == values && (len == 0 || got.as_ptr() == values.as_ptr()), "{len}");
                let padded: Bytes = [&sent_push.concat()[..], &vec![0; 2 * len + 100]].concat().into();
                let mut reader = Reader::new(frames(std::slice::from_ref(&padded)));
                assert!(matches!(now(reader.part()), Ok(Some(Part::Chunk(_, got))) if got == len));
                let got = now(reader.values()).expect("readable");
                assert!(got == values && !padded.as_ptr_range().contains(&got.as_ptr()), "{len}");
                let header = v1::PushPart { kind: Some(v1::push_part::Kind::Node(v1::NodeHeader::default())) };
                for cut in [1, 7, 50, 1 << 16, 1 << 22].into_iter().filter(|cut| len < 100 || *cut > 7) {
                    let mut reader = Reader::new(body(&[sent.concat().into(), sent.concat().into()], cut));
                    for _ in 0..2 {
                        assert_eq!(now(reader.weights()).expect("readable"), Some((head, len)));
                        let got = now(reader.values()).expect("readable");
                        assert_eq!(got, values);
                    }
                    assert!(now(reader.weights()).expect("readable").is_none());
                    let all = [short(&header), sent_push.concat().into(), short(&header)];
                    let mut reader = Reader::new(body(&all, cut));
                    let node = || Some(Part::Short(v1::push_part::Kind::Node(v1::NodeHeader::default())));
                    assert_eq!(now(reader.part()).expect("readable"), node());
                    let expected = Part::Chunk(ChunkHead { index, checksum, ..ChunkHead::default() }, len);
                    assert_eq!(now(reader.part()).expect("readable"), Some(expected));
                    if len > 0 {
                        assert!(now(reader.part()).is_err(), "values come first");
                    }
                    assert_eq!(now(reader.values()).expect("readable"), values);
                    assert_eq!(now(reader.part()).expect("readable"), node());
                }
            }
        }
    }

    #[test]
    fn what_the_other_side_says_is_told_and_what_a_broken_connection_says_is_not() {
        assert_eq!(why(&Status::internal("there is no chunk 7")), "there is no chunk 7");
        let cut = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert_eq!(why(&Status::from_error(cut.into())), "the connection broke");
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let nonsense: [&[u8]; 8] = [
            &[1, 0, 0, 0, 0],
            &[0, 0xff, 0, 0, 0],
            &[0, 0, 0, 0, 9, 1],
            &[0, 0],
            &[0, 0, 0, 0, 2, 0x1a, 9],
            &[0, 0, 0, 0, 4, 0x1a, 2, 0x1a, 7],
            &[0, 0, 0, 0, 1, 0xff],
            &[0, 0, 0, 0, 0],
        ];
        for bytes in nonsense {
            let bytes = [Bytes::copy_from_slice(bytes)];
            assert!(now(Reader::new(body(&bytes, 1)).part()).is_err(), "{bytes:?}");
        }
        let long = [short(&v1::StatusReply { job: "x".repeat(2000), ..Default::default() })];
        assert!(now(Reader::new(body(&long, 100)).short::<v1::StatusReply>()).is_err());
    }
}
