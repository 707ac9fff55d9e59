//! One membership: join, take work and weights, push gradients, until the coordinator says goodbye.

use crate::compute::{Compute, Order};
use anyhow::{Context, Result, anyhow, bail};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::transport::{Channel, Endpoint};
use unisono_common::data::{self, Opened, Prepared};
use unisono_common::job::Job;
use unisono_common::model::Model;
use unisono_proto::{self as wire, v1};

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The run is over, or this worker is not wanted any more.
    Done(String),
    /// The worker was taken for lost, or the connection broke: join again.
    Again(String),
    /// The coordinator refuses this worker, and will again.
    Refused(String),
}

/// What stays in memory from session to session: data and model of the job that was last read.
#[derive(Default)]
pub struct Kept {
    job: Option<(String, Job, Opened, Arc<Model>)>,
}

pub(crate) fn endpoint(url: &str) -> Result<Endpoint> {
    let url = if url.contains("://") { url.to_string() } else { format!("http://{url}") };
    Ok(Endpoint::from_shared(url.clone())
        .with_context(|| format!("`{url}` is not a URL; write it as http://HOST:PORT"))?
        .connect_timeout(Duration::from_secs(5))
        .initial_stream_window_size(wire::STREAM_WINDOW)
        .initial_connection_window_size(wire::CONNECTION_WINDOW)
        .tcp_nodelay(true))
}

type Client = v1::coordinator_client::CoordinatorClient<Channel>;

async fn prepare(client: &mut Client, kept: &mut Kept) -> Result<Result<(), String>> {
    let reply = match client.get_job(v1::GetJobRequest { version: wire::VERSION.into() }).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if e.code() == tonic::Code::FailedPrecondition => return Ok(Err(e.message().into())),
        Err(e) => return Err(e.into()),
    };
    if kept.job.as_ref().is_some_and(|(text, ..)| *text == reply.job) {
        return Ok(Ok(()));
    }
    let job: Job = serde_json::from_str(&reply.job).context("the coordinator's job cannot be read")?;
    let prepared: Prepared = serde_json::from_str(&reply.prepared).context("the coordinator's data description")?;
    let opened = match tokio::task::spawn_blocking({
        let job = job.clone();
        move || data::open(&job.data, job.seed)
    })
    .await?
    {
        Ok(opened) => opened,
        Err(e) => return Ok(Err(format!("this worker cannot read the job's data: {e}"))),
    };
    if opened.prepared.digest != prepared.digest {
        return Ok(Err("this worker's data files differ from the coordinator's: copy them from there".into()));
    }
    let outputs = prepared.outputs(&job.train.loss);
    let model = Model::build(&job.model, &prepared.shape, outputs)?;
    kept.job = Some((reply.job, job, Opened { prepared, ..opened }, Arc::new(model)));
    Ok(Ok(()))
}

/// Runs one membership.
pub async fn session(url: &str, threads: usize, name: &str, kept: &mut Kept) -> Result<End> {
    let channel = endpoint(url)?.connect().await.map_err(|e| anyhow!("cannot reach {url}: {e}"))?;
    let mut client = Client::new(channel).max_decoding_message_size(wire::MAX_MESSAGE);
    if let Err(refused) = prepare(&mut client, kept).await? {
        return Ok(End::Refused(refused));
    }
    let Some((_, job, opened, model)) = kept.job.take() else { bail!("no job") };
    let text = serde_json::to_string(&job)?;
    let layout = model.layout().clone();
    let join = v1::Join {
        version: wire::VERSION.into(),
        job_digest: job.digest().to_vec().into(),
        layout_digest: layout.digest().to_vec().into(),
        fingerprint: unisono_common::train::fingerprint().to_vec().into(),
        threads: threads as u32,
        name: name.into(),
    };
    let (to_coordinator, outgoing) = mpsc::unbounded_channel();
    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Join(join)) })?;
    let mut incoming = match client.session(UnboundedReceiverStream::new(outgoing)).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if e.code() == tonic::Code::FailedPrecondition => return Ok(End::Refused(e.message().into())),
        Err(e) => return Err(e.into()),
    };
    let Some(v1::to_worker::Kind::Joined(joined)) = incoming.message().await?.and_then(|m| m.kind) else {
        bail!("the coordinator did not answer the join")
    };

    let (push, pushed) = mpsc::channel(4);
    push.send(v1::PushPart { kind: Some(v1::push_part::Kind::WorkerId(joined.worker_id)) }).await?;
    let mut push_client = client.clone();
    let pushing = tokio::spawn(async move { push_client.push(ReceiverStream::new(pushed)).await });
    let request = v1::BroadcastRequest { worker_id: joined.worker_id };
    let mut broadcast = client.broadcast(request).await?.into_inner();

    let (orders, taken) = std::sync::mpsc::channel();
    let (back, mut returned) = mpsc::unbounded_channel();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let session_out = to_coordinator.clone();
    std::thread::Builder::new().name("compute".into()).spawn(move || {
        let again = (job.clone(), opened.clone(), model.clone());
        let ended = pool.install(|| Compute::new(job, opened, model)?.serve(taken, session_out, push));
        if let Err(e) = ended {
            tracing::debug!("compute ended: {e:#}");
        }
        back.send(again).ok();
    })?;

    let mut heartbeat = tokio::time::interval(Duration::from_millis(joined.heartbeat_ms.clamp(10, 60_000) as u64));
    let mut incoming_weights = vec![0.0f32; layout.len()];
    let mut versions: Vec<Option<u64>> = vec![None; layout.chunks()];
    let mut whole: Option<(u64, Arc<Vec<f32>>)> = None;
    let mut waiting: Vec<v1::Work> = Vec::new();
    let end = loop {
        tokio::select! {
            message = incoming.message() => match message {
                Ok(Some(v1::ToWorker { kind: Some(v1::to_worker::Kind::Work(work)) })) => waiting.push(work),
                Ok(Some(v1::ToWorker { kind: Some(v1::to_worker::Kind::Goodbye(bye)) })) => {
                    break if bye.rejoin { End::Again(bye.reason) } else { End::Done(bye.reason) };
                }
                Ok(Some(_)) => break End::Again("the coordinator sent something unexpected".into()),
                Ok(None) => break End::Again("the coordinator closed the session".into()),
                Err(e) => break End::Again(format!("the session broke: {}", e.message())),
            },
            chunk = broadcast.message() => match chunk {
                Ok(Some(chunk)) => {
                    if let Err(e) = wire::check_chunk(&layout, chunk.index, chunk.crc, &chunk.values) {
                        break End::Again(e.to_string());
                    }
                    let index = chunk.index as usize;
                    wire::decode_into(&chunk.values, &mut incoming_weights[layout.chunk(index)]);
                    versions[index] = Some(chunk.step);
                }
                Ok(None) => break End::Again("the broadcast ended".into()),
                Err(e) => break End::Again(format!("the broadcast broke: {}", e.message())),
            },
            _ = heartbeat.tick() => {
                let beat = v1::FromWorker { kind: Some(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {})) };
                if to_coordinator.send(beat).is_err() {
                    break End::Again("the session ended".into());
                }
            }
        }
        while let Some(work) = waiting.first() {
            if whole.as_ref().is_none_or(|(step, _)| *step != work.step) {
                if versions.iter().any(|v| *v != Some(work.step)) {
                    break;
                }
                // Swap the buffers; the old one is filled again by the next step's chunks.
                let spare = whole.take().and_then(|(_, old)| Arc::try_unwrap(old).ok());
                let spare = spare.unwrap_or_else(|| vec![0.0; layout.len()]);
                whole = Some((work.step, Arc::new(std::mem::replace(&mut incoming_weights, spare))));
                versions.fill(None);
            }
            let Some((_, weights)) = &whole else { break };
            let work = waiting.remove(0);
            let partitions = u32::MAX;
            let nodes = work
                .nodes
                .into_iter()
                .map(|n| unisono_common::tree::Node { lo: n.lo, hi: n.hi })
                .filter(|n| n.lo < n.hi && n.hi <= partitions)
                .collect();
            let order = Order {
                step: work.step,
                generation: work.generation,
                nodes,
                evaluate: work.evaluate,
                weights: weights.clone(),
            };
            if orders.send(order).is_err() {
                break;
            }
        }
    };
    drop(orders);
    drop((incoming, broadcast, to_coordinator));
    pushing.abort();
    if let Ok(Some((job, opened, model))) = tokio::time::timeout(Duration::from_secs(60), returned.recv()).await {
        kept.job = Some((text, job, opened, model));
    }
    Ok(end)
}
