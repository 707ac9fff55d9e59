//! Reaching a coordinator: its address, the transport's settings, and errors in plain words.

use crate::Options;
use anyhow::{Result, anyhow, bail};
use std::time::Duration;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint};
use unisono_proto::stream::Reader;
use unisono_proto::{self as wire, v1};

/// Where a coordinator is, with the transport's settings.
///
/// # Errors
/// A URL that is none.
pub fn endpoint(url: &str) -> Result<Endpoint> {
    let url = if url.contains("://") { url.to_string() } else { format!("http://{url}") };
    if url.starts_with("https://") {
        bail!("`{url}`: connections are not encrypted yet; write it as http://HOST:PORT");
    }
    let endpoint = Endpoint::from_shared(url.clone()).ok();
    let has_port = |e: &Endpoint| e.uri().scheme_str() == Some("http") && e.uri().port_u16().is_some();
    let Some(endpoint) = endpoint.filter(has_port) else {
        bail!("`{url}` is not a coordinator's URL; write it as http://HOST:PORT")
    };
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(wire::KEEPALIVE)
        .keep_alive_timeout(wire::KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(wire::STREAM_WINDOW)
        .initial_connection_window_size(wire::CONNECTION_WINDOW)
        .max_frame_size(wire::MAX_FRAME)
        .tcp_nodelay(true))
}

/// The error of a connection that could not be made: its last cause says all.
pub fn unreachable(url: &str, e: &tonic::transport::Error) -> anyhow::Error {
    let mut cause: &dyn std::error::Error = e;
    while let Some(next) = cause.source() {
        cause = next;
    }
    anyhow!("cannot reach a coordinator at {url}: {cause}")
}

/// A refused call in plain words: what a server that is no coordinator says is of no use to anybody.
pub fn plain(url: &str, e: &tonic::Status) -> anyhow::Error {
    use tonic::Code::{Cancelled, DeadlineExceeded, Internal, Unavailable, Unimplemented, Unknown};
    match e.code() {
        Cancelled | DeadlineExceeded => anyhow!("{url} does not answer"),
        Internal | Unavailable | Unimplemented | Unknown => {
            anyhow!("what listens at {url} is no coordinator of this version, or has just ended")
        }
        _ => anyhow!("{}", e.message()),
    }
}

pub(crate) type Client = v1::coordinator_client::CoordinatorClient<Channel>;

/// The answer to a call, or an error where none comes.
pub(crate) async fn answer<T>(
    options: &Options,
    call: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, tonic::Status> {
    let limit = options.patience.clamp(Duration::from_secs(1), Duration::from_secs(10));
    let nothing = |_| tonic::Status::deadline_exceeded(format!("{} does not answer", options.url));
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
