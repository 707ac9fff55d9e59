//! The broadcast of weights, as a gRPC service by hand: a generated one would copy each chunk into the buffer of each stream.
//! Here, the bytes that go to the sockets are the store's own, whatever the number of workers.

use crate::shared::Shared;
use crate::store::Sent;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, Response, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Status, codegen::Service};
use unisono_proto::v1;

/// gRPC's frame around a message: whether it is compressed (a byte), and its length (four, big-endian).
const PREFIX: usize = 5;

/// The service `Weights` of the proto file, over the shared state of one run.
#[derive(Clone)]
pub struct Weights(pub Arc<Shared>);

impl NamedService for Weights {
    const NAME: &'static str = "unisono.v1.Weights";
}

impl Service<Request<Body>> for Weights {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = self.0.clone();
        Box::pin(async move { Ok(answer(shared, request).await.unwrap_or_else(Status::into_http)) })
    }
}

async fn answer(shared: Arc<Shared>, request: Request<Body>) -> Result<Response<Body>, Status> {
    if request.uri().path() != "/unisono.v1.Weights/Broadcast" {
        return Err(Status::unimplemented("the service Weights has one method, Broadcast"));
    }
    let asked = tokio::time::timeout(Duration::from_secs(10), one_message(request.into_body()));
    let asked: v1::BroadcastRequest =
        asked.await.map_err(|_| Status::deadline_exceeded("no request came for 10 s"))??;
    shared.member(&asked.session)?;
    let (send, receive) = mpsc::channel(4);
    tokio::spawn(broadcast(shared, asked.session, send));
    let mut response = Response::new(Body::new(StreamBody::new(ReceiverStream::new(receive))));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    Ok(response)
}

/// The first message of a request, which must be short.
async fn one_message<M: Message + Default>(mut body: Body) -> Result<M, Status> {
    const MOST: usize = 1024;
    let wrong = |what: String| Status::invalid_argument(format!("the request cannot be read: {what}"));
    let mut bytes = BytesMut::new();
    loop {
        if let Some((prefix, message)) = bytes.split_first_chunk::<PREFIX>() {
            let [compressed, length @ ..] = *prefix;
            let length = u32::from_be_bytes(length) as usize;
            if compressed != 0 || length > MOST {
                return Err(wrong(format!("it must be one message of at most {MOST} bytes, not compressed")));
            }
            if let Some(message) = message.get(..length) {
                return M::decode(message).map_err(|e| wrong(e.to_string()));
            }
        }
        let frame = body.frame().await.ok_or_else(|| wrong("it ends too early".into()))?;
        bytes.extend(frame.map_err(|e| wrong(e.to_string()))?.into_data().ok());
    }
}

/// Sends every version of every chunk as it is ready, until nobody listens or the session is over.
async fn broadcast(shared: Arc<Shared>, session: Bytes, send: mpsc::Sender<Result<Frame<Bytes>, Status>>) {
    let mut changes = shared.store.changes();
    let mut sent = vec![None; shared.store.layout().chunks()];
    while shared.member(&session).is_ok() {
        changes.borrow_and_update();
        let mut idle = true;
        for (index, sent) in sent.iter_mut().enumerate() {
            let Some(next) = shared.store.next(index, *sent) else { continue };
            shared.store.bytes_pulled.fetch_add(next.bytes.len() as u64, Ordering::Relaxed);
            *sent = Some(next.step);
            for part in frame(index as u32, next) {
                if send.send(Ok(Frame::data(part))).await.is_err() {
                    return;
                }
            }
            idle = false;
        }
        if idle {
            tokio::select! {
                _ = changes.changed() => {}
                () = send.closed() => return,
            }
        }
    }
    let mut status = HeaderMap::new();
    status.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    send.send(Ok(Frame::trailers(status))).await.ok();
}

/// A message `WeightChunk` in its frame: all before the values, and the values, which are shared.
fn frame(index: u32, Sent { step, crc, bytes: values }: Sent) -> [Bytes; 2] {
    let head = v1::WeightChunk { step: step.0, index, crc, values: Bytes::new() };
    let mut field = BytesMut::new();
    prost::encoding::encode_key(4, prost::encoding::WireType::LengthDelimited, &mut field);
    prost::encoding::encode_varint(values.len() as u64, &mut field);
    let mut out = BytesMut::new();
    out.put_u8(0);
    out.put_u32((head.encoded_len() + field.len() + values.len()) as u32);
    head.encode_raw(&mut out);
    out.extend_from_slice(&field);
    [out.freeze(), values]
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::ids::Step;

    #[test]
    fn a_frame_is_what_a_decoder_reads_and_its_values_are_shared() {
        for (step, index, crc, values) in
            [(0, 0, 0, vec![]), (1, 7, 9, vec![1u8; 4]), (u64::MAX, 1 << 20, u32::MAX, vec![3; 1 << 20])]
        {
            let bytes = Bytes::from(values.clone());
            let [head, tail] = frame(index, Sent { step: Step(step), crc, bytes: bytes.clone() });
            assert_eq!(tail.as_ptr(), bytes.as_ptr());
            let all = [head, tail].concat();
            assert_eq!(all[..PREFIX], *[&[0][..], &((all.len() - PREFIX) as u32).to_be_bytes()].concat());
            let read = v1::WeightChunk::decode(&all[PREFIX..]).expect("a message");
            assert_eq!(read, v1::WeightChunk { step, index, crc, values: values.into() });
        }
    }
}
