//! What this machine can do at most, measured with as little around it as possible.

use super::Workload;
use anyhow::{Context, Result};
use bytes::Bytes;
use serde::Serialize;
use std::hint::black_box;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use unisono_common::kernels::{Mat, gemm};
use unisono_common::layout::CHUNK;
use unisono_coordinator::{Options, Window};
use unisono_proto::v1;
use unisono_worker::Simulated;

/// The best of several rounds each.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Limits {
    /// Products of 512 x 512 matrices on one thread, in GFLOP/s (a multiply-add is two).
    pub gemm_gflops: f64,
    /// Copying memory on one thread: GB/s read and written together.
    pub copy_gb_per_second: f64,
    /// Bytes through one TCP connection over loopback, one way, in GB/s.
    pub tcp_gb_per_second: f64,
    /// Chunks through gRPC over loopback, both ways at once, in GB/s each way.
    pub grpc_gb_per_second: f64,
    /// The same for gradients and weights of a run whose worker computes nothing, checked and updated on their way: a mean over
    /// as long.
    pub push_broadcast_gb_per_second: f64,
}

const ROUNDS: usize = 4;
const ROUND: Duration = Duration::from_millis(250);

/// The best rate of several rounds of `work`, which says how much it has done.
fn best(mut work: impl FnMut() -> usize) -> f64 {
    let mut round = || {
        let (began, mut done) = (Instant::now(), 0);
        while began.elapsed() < ROUND {
            done += work();
        }
        done as f64 / began.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(|_| round()).fold(0.0, f64::max)
}

impl Limits {
    /// Measures for about six seconds.
    pub async fn measure() -> Result<Limits> {
        let measure = || {
            // A thread for each side, as two processes have.
            let sides = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            let grpc = sides.block_on(streams()).context("cannot measure gRPC")?;
            let wire = sides.block_on(exchange()).context("cannot measure pushes and broadcasts")?;
            Ok::<_, anyhow::Error>((products(), copies(), loopback()?, grpc, wire))
        };
        let (gemm, copy, tcp, grpc, wire) = tokio::task::spawn_blocking(measure).await??;
        Ok(Limits {
            gemm_gflops: gemm / 1e9,
            copy_gb_per_second: copy / 1e9,
            tcp_gb_per_second: tcp / 1e9,
            grpc_gb_per_second: grpc / 1e9,
            push_broadcast_gb_per_second: wire / 1e9,
        })
    }
}

fn products() -> f64 {
    const N: usize = 512;
    let values: Vec<f32> = (0..N * N).map(|i| (i * 7919 % 1013) as f32 / 506.0 - 1.0).collect();
    let mut out = vec![0.0; N * N];
    best(|| {
        gemm(black_box(&mut out), Mat::new(&values, N, N), Mat::new(&values, N, N), false);
        2 * N * N * N
    })
}

fn copies() -> f64 {
    let (from, mut to) = (vec![1u8; 64 << 20], vec![0; 64 << 20]);
    best(|| {
        black_box(&mut to).copy_from_slice(black_box(&from));
        2 * from.len()
    })
}

fn loopback() -> Result<f64> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let mut out = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (mut come, _) = listener.accept()?;
    let came = Arc::new(AtomicU64::new(0));
    let counted = came.clone();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(n @ 1..) = come.read(&mut buffer) {
            counted.fetch_add(n as u64, Ordering::Relaxed);
        }
    });
    let (buffer, mut before) = (vec![1; 1 << 20], 0);
    let mut failed = None;
    let rate = best(|| {
        failed = out.write_all(&buffer).err().or(failed.take());
        let now = came.load(Ordering::Relaxed);
        (now - std::mem::replace(&mut before, now)) as usize
    });
    drop(out);
    reader.join().ok();
    failed.map_or(Ok(rate), |e| Err(e).context("cannot measure TCP"))
}

/// Takes pushes, and sends chunks as long as somebody takes them.
struct Peer {
    came: Arc<AtomicU64>,
    values: Bytes,
}

#[tonic::async_trait]
impl v1::parameters_server::Parameters for Peer {
    async fn push(&self, request: Request<Streaming<v1::PushPart>>) -> Result<Response<v1::PushReply>, Status> {
        let mut parts = request.into_inner();
        while let Some(part) = parts.message().await? {
            if let Some(v1::push_part::Kind::Chunk(chunk)) = part.kind {
                self.came.fetch_add(chunk.values.len() as u64, Ordering::Relaxed);
            }
        }
        Ok(Response::new(v1::PushReply {}))
    }

    type BroadcastStream = ReceiverStream<Result<v1::WeightChunk, Status>>;

    async fn broadcast(&self, _: Request<v1::BroadcastRequest>) -> Result<Response<Self::BroadcastStream>, Status> {
        let (send, chunks) = mpsc::channel(4);
        let chunk = v1::WeightChunk { values: self.values.clone(), ..Default::default() };
        tokio::spawn(async move { while send.send(Ok(chunk.clone())).await.is_ok() {} });
        Ok(Response::new(ReceiverStream::new(chunks)))
    }
}

/// Chunks up and down at once, through one connection with the wire's settings: bytes a second each way.
async fn streams() -> Result<f64> {
    let values = Bytes::from(vec![1; 4 * CHUNK]);
    let came = Arc::new(AtomicU64::new(0));
    let peer = v1::parameters_server::ParametersServer::new(Peer { came: came.clone(), values: values.clone() });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tokio::spawn(unisono_coordinator::server().add_service(peer).serve_with_incoming(incoming));
    let channel = unisono_worker::Address::new(&url, None)?.connect().await?;
    let mut client = v1::parameters_client::ParametersClient::new(channel);

    let (send, parts) = mpsc::channel(4);
    let kind = v1::push_part::Kind::Chunk(v1::GradientChunk { index: 0, checksum: None, values });
    let part = v1::PushPart { kind: Some(kind) };
    let mut pushing = client.clone();
    let up = tokio::spawn(async move { pushing.push(ReceiverStream::new(parts)).await.map(|_| ()) });
    let feed = tokio::spawn(async move { while send.send(part.clone()).await.is_ok() {} });
    let mut chunks = client.broadcast(v1::BroadcastRequest::default()).await?.into_inner();
    let counted = came.clone();
    let down = tokio::spawn(async move {
        while let Ok(Some(chunk)) = chunks.message().await {
            counted.fetch_add(chunk.values.len() as u64, Ordering::Relaxed);
        }
    });
    let mut best: f64 = 0.0;
    for _ in 0..ROUNDS {
        let (began, before) = (Instant::now(), came.load(Ordering::Relaxed));
        tokio::time::sleep(ROUND).await;
        best = best.max((came.load(Ordering::Relaxed) - before) as f64 / 2.0 / began.elapsed().as_secs_f64());
    }
    for task in [feed, down] {
        task.abort();
    }
    up.abort();
    server.abort();
    Ok(best)
}

/// Gradients up and weights down in a run of mlp-wide, whose one worker computes nothing: bytes a second each way.
async fn exchange() -> Result<f64> {
    let ready = unisono_coordinator::prepare_unkept(Workload::MlpWide.job(1, super::BATCHES)?)?;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let worker = unisono_worker::Options {
        coordinator: unisono_worker::Address::new(&format!("http://{}", listener.local_addr()?), None)?,
        threads: 1,
        transport: unisono_worker::Transport::Grpc,
        name: "simulated".into(),
        patience: Duration::from_secs(10),
        cache: None,
        files: Default::default(),
        simulated: Some(Simulated { partition: [0.0].into(), seed: 0 }),
    };
    let options = Options {
        started: Instant::now(),
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        shared_memory: false,
        patience: Default::default(),
        is_resumed: false,
        window: Some(Window {
            workers: 1,
            warm_steps: 2,
            warm: ROUND,
            steps: 1,
            length: ROUND * ROUNDS as u32,
            after: Duration::ZERO,
        }),
    };
    let (progress, _) = watch::channel(Default::default());
    let (_interrupt, interrupted) = watch::channel(false);
    let coordinator = unisono_coordinator::run(
        ready,
        options,
        unisono_coordinator::Entrance::new(listener, None)?,
        progress,
        interrupted,
    );
    let (summary, ()) = tokio::try_join!(coordinator, unisono_worker::run(worker, watch::channel(false).1))?;
    let measured = summary.measured.context("the run ended too soon")?;
    Ok((measured.bytes_pushed + measured.bytes_pulled) as f64 / 2.0 / measured.seconds)
}
