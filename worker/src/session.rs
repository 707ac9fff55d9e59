//! One membership: join, take work and weights, push gradients, until the coordinator says goodbye.

use crate::Options;
use crate::cache::Cache;
use crate::compute::{Compute, Order};
use crate::connect::{Client, answer, endpoint, plain, unreachable};
use crate::samples::{Samples, Sent};
use anyhow::{Context, Result, bail};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use unisono_common::data::partition::Partitions;
use unisono_common::data::{self, Prepared};
use unisono_common::ids::Step;
use unisono_common::job::{Job, Source};
use unisono_common::loss::Loss;
use unisono_common::model::Model;
use unisono_common::protocol::Kind;
use unisono_common::protocol::worker::{Command, Event, Machine, Work};
use unisono_common::tree::Node;
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
    job: Option<KeptJob>,
}

#[derive(Clone)]
struct KeptJob {
    text: String,
    job: Job,
    prepared: Prepared,
    samples: Samples,
    model: Arc<Model>,
}

async fn prepare(client: &mut Client, kept: &mut Kept, options: &Options) -> Result<Result<(), String>> {
    let reply = match answer(options, client.get_job(v1::GetJobRequest { version: wire::VERSION.into() })).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if e.code() == tonic::Code::FailedPrecondition => return Ok(Err(e.message().into())),
        Err(e) => return Err(plain(&options.url, &e)),
    };
    let prepared: Prepared = serde_json::from_str(&reply.prepared).context("the coordinator's data description")?;
    prepared.check().context("the coordinator's data description")?;
    if kept.job.as_ref().is_some_and(|k| k.text == reply.job && k.prepared == prepared) {
        return Ok(Ok(()));
    }
    let job: Job = serde_json::from_str(&reply.job).context("the coordinator's job cannot be read")?;
    let cache = options.cache.as_ref();
    let sent = Samples::Sent(Sent::new(cache.map(|folder| Cache::new(folder.clone(), &job, &prepared))));
    let samples = if job.data.ship == Some(true) {
        sent
    } else {
        let (data, seed) = (job.data.clone(), job.seed);
        match tokio::task::spawn_blocking(move || data::open(&data, seed)).await? {
            Ok(opened) if opened.prepared.digest == prepared.digest => Samples::Read(opened),
            Ok(_) => {
                let what = "this worker's data files differ from the coordinator's";
                return Ok(Err(format!("{what}: copy them from there, or set data.ship = true in the job")));
            }
            Err(e)
                if job.data.ship == Some(false)
                    || matches!(job.data.source, Source::Digits | Source::Synthetic { .. }) =>
            {
                return Ok(Err(format!("this worker cannot read the job's data: {e}")));
            }
            Err(e) => {
                tracing::info!("this worker cannot read the job's data ({e}); the coordinator sends it");
                sent
            }
        }
    };
    let outputs = prepared.outputs(&job.train.loss);
    let model = Arc::new(Model::build(&job.model, &prepared.shape, outputs)?);
    kept.job = Some(KeptJob { text: reply.job, job, prepared, samples, model });
    Ok(Ok(()))
}

/// What it takes to fetch a partition.
#[derive(Clone)]
struct Fetcher {
    client: Client,
    session: bytes::Bytes,
    sent: Sent,
    prepared: Prepared,
    loss: Loss,
    parts: Partitions,
    test_parts: Option<Partitions>,
}

impl Fetcher {
    /// Fetches partitions, one after another.
    async fn fetch(mut self, partitions: Vec<u32>, test: bool) -> Result<()> {
        for partition in partitions {
            let parts = if test { self.test_parts.as_ref().context("there is no test set")? } else { &self.parts };
            let (of, expected) = ((partition, test), parts.len(partition));
            self.sent.fetch(&mut self.client, &self.session, of, expected, &self.prepared, &self.loss).await?;
        }
        Ok(())
    }
}

/// Runs one membership.
pub async fn session(options: &Options, kept: &mut Kept) -> Result<End> {
    let Options { url, threads, name, .. } = options;
    let channel = endpoint(url)?.connect().await.map_err(|e| unreachable(url, &e))?;
    let weights = v1::weights_client::WeightsClient::new(channel.clone());
    let mut weights = weights.max_decoding_message_size(wire::MAX_MESSAGE);
    let mut client = Client::new(channel).max_decoding_message_size(wire::MAX_MESSAGE);
    if let Err(refused) = prepare(&mut client, kept, options).await? {
        return Ok(End::Refused(refused));
    }
    let Some(KeptJob { job, prepared, samples, model, .. }) = kept.job.clone() else { bail!("no job") };
    let partitions = job.train.partitions;
    let layout = model.layout().clone();
    let join = v1::Join {
        version: wire::VERSION.into(),
        job_digest: job.digest().to_vec().into(),
        layout_digest: layout.digest().to_vec().into(),
        fingerprint: unisono_common::train::fingerprint().to_vec().into(),
        threads: *threads as u32,
        name: name.clone(),
    };
    let (to_coordinator, outgoing) = mpsc::unbounded_channel();
    to_coordinator.send(v1::FromWorker { kind: Some(v1::from_worker::Kind::Join(join)) })?;
    let mut incoming = match answer(options, client.session(UnboundedReceiverStream::new(outgoing))).await {
        Ok(reply) => reply.into_inner(),
        Err(e) if matches!(e.code(), tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument) => {
            return Ok(End::Refused(e.message().into()));
        }
        Err(e) => return Err(plain(&options.url, &e)),
    };
    let joined = match answer(options, incoming.message()).await?.and_then(|m| m.kind) {
        Some(v1::to_worker::Kind::Joined(joined)) => joined,
        Some(v1::to_worker::Kind::Goodbye(bye)) => return Ok(End::Done(bye.reason)),
        Some(v1::to_worker::Kind::Work(_)) | None => bail!("the coordinator did not answer the join"),
    };

    let (push, pushed) = mpsc::channel(4);
    push.send(v1::PushPart { kind: Some(v1::push_part::Kind::Session(joined.session.clone())) }).await?;
    let mut push_client = client.clone();
    let mut pushing = tokio::spawn(async move { push_client.push(ReceiverStream::new(pushed)).await });
    let request = v1::BroadcastRequest { session: joined.session.clone() };
    let mut broadcast = answer(options, weights.broadcast(request)).await?.into_inner();

    let fetcher = match &samples {
        Samples::Read(_) => None,
        Samples::Sent(sent) => Some(Fetcher {
            client: client.clone(),
            session: joined.session.clone(),
            sent: sent.clone(),
            prepared: prepared.clone(),
            loss: Loss::new(&job.train.loss, model.outputs())?,
            parts: Partitions::new(prepared.train_samples as usize, partitions, job.data.hashed.then_some(job.seed))?,
            test_parts: Partitions::new(prepared.test_samples as usize, partitions, None).ok(),
        }),
    };
    let (fetched_in, mut fetched) = mpsc::unbounded_channel();
    let (orders, taken) = std::sync::mpsc::channel();
    let (over, mut compute_over) = mpsc::channel::<()>(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(*threads).build()?;
    let session_out = to_coordinator.clone();
    std::thread::Builder::new().name("compute".into()).spawn(move || {
        let _over = over;
        let ended = pool.install(|| Compute::new(job, samples, prepared, model)?.serve(taken, session_out, push));
        if let Err(e) = ended {
            tracing::debug!("compute ended: {e:#}");
        }
    })?;

    let mut heartbeat = tokio::time::interval(Duration::from_millis(joined.heartbeat_ms.clamp(10, 60_000) as u64));
    let at_hand = fetcher.as_ref().map(|f| f.sent.at_hand());
    let mut machine = Machine::new(layout.chunks(), at_hand);
    let mut incoming_weights = vec![0.0f32; layout.len()];
    let mut weights = Arc::new(Vec::new());
    let end = loop {
        let event = tokio::select! {
            message = incoming.message() => match message {
                Ok(Some(v1::ToWorker { kind: Some(v1::to_worker::Kind::Work(work)) })) => {
                    let nodes: Result<Vec<Node>, _> =
                        work.nodes.iter().map(|n| wire::node(Some(*n), partitions)).collect();
                    let kind = if work.evaluate { Kind::Evaluate } else { Kind::Train };
                    match nodes {
                        Ok(nodes) => {
                            Event::Work(Work { step: Step(work.step), generation: work.generation, kind, nodes })
                        }
                        Err(e) => break End::Again(e.to_string()),
                    }
                }
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
                    Event::Chunk { index, step: Step(chunk.step) }
                }
                Ok(None) => break End::Again("the broadcast ended".into()),
                Err(e) => break End::Again(format!("the broadcast broke: {}", e.message())),
            },
            Some(result) = fetched.recv() => match result {
                Ok(()) => Event::Fetched,
                Err(e) => break End::Again(format!("cannot fetch a partition: {e:#}")),
            },
            pushed = &mut pushing => break End::Again(match pushed {
                Ok(Err(refused)) => format!("the coordinator took no more pushes: {}", refused.message()),
                Ok(Ok(_)) | Err(_) => "the pushes ended".into(),
            }),
            _ = compute_over.recv() => break End::Again("the compute thread ended".into()),
            _ = heartbeat.tick() => {
                let beat = v1::FromWorker { kind: Some(v1::from_worker::Kind::Heartbeat(v1::Heartbeat {})) };
                if to_coordinator.send(beat).is_err() {
                    break End::Again("the session ended".into());
                }
                continue;
            }
        };
        for command in machine.handle(event) {
            match command {
                Command::Adopt { .. } => {
                    // Compute let go of the old ones before its last push; they are filled by the next step's chunks.
                    let spare = Arc::try_unwrap(std::mem::take(&mut weights)).unwrap_or_default();
                    let spare = if spare.is_empty() { vec![0.0; layout.len()] } else { spare };
                    weights = Arc::new(std::mem::replace(&mut incoming_weights, spare));
                }
                Command::Fetch { kind, partitions } => {
                    let Some(fetcher) = fetcher.clone() else { continue };
                    let done = fetched_in.clone();
                    tokio::spawn(
                        async move { done.send(fetcher.fetch(partitions, kind == Kind::Evaluate).await).ok() },
                    );
                }
                Command::Compute(Work { step, generation, kind, nodes }) => {
                    for node in nodes {
                        let evaluate = kind == Kind::Evaluate;
                        let order = Order { step: step.0, generation, node, evaluate, weights: weights.clone() };
                        // Where compute has ended, the loop hears of it.
                        orders.send(order).ok();
                    }
                }
            }
        }
    };
    drop(orders);
    drop((incoming, broadcast, to_coordinator));
    pushing.abort();
    // The compute thread ends when its channels do; the next session's begins with an idle machine.
    tokio::time::timeout(Duration::from_secs(60), compute_over.recv()).await.ok();
    Ok(end)
}
