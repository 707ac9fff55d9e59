//! What a coordinator says, and how fast it is reached.

use super::{Lines, here};
use anyhow::{Context, Result, anyhow, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};
use tokio_stream::StreamExt;
use tonic::Status;
use unisono_common::data::{Files, Prepared};
use unisono_common::job::Job;
use unisono_proto::{self as wire, v1};
use unisono_worker::{Address, Channel};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Calls of which the fastest counts.
const CALLS: usize = 20;
/// Clocks may differ by so much: certificates and logs are compared by them.
const SKEW: Duration = Duration::from_secs(10);
/// Bytes that are moved each way, and at once.
const BYTES: u64 = 64 << 20;
const PIECE: usize = 256 << 10;

/// Asks a coordinator for all that concerns this machine.
pub async fn coordinator(lines: &mut Lines, address: &Address, roots: Vec<PathBuf>) {
    let channel = match limited(address.connect()).await {
        Ok(channel) => channel,
        Err(e) => return lines.change("coordinator", format!("{e:#}")),
    };
    let plain = |e: Status| address.plain(&e);
    match status(&channel).await {
        Err(e) => return lines.change("coordinator", format!("{:#}", plain(e))),
        Ok((reply, took, offset)) => {
            let text = format!(
                "{}, step {} of {}, in {:.2} ms",
                reply.job,
                reply.step,
                reply.total_steps,
                took.as_secs_f64() * 1e3
            );
            lines.well("coordinator", text);
            agreement(lines, &reply, offset);
        }
    }
    lines.found("bandwidth", bandwidth(&channel).await.map_err(plain));
    match get_job(channel).await {
        Ok(reply) => lines.found("job's data", job_data(reply, roots).await),
        Err(e) if e.code() == tonic::Code::PermissionDenied => {
            lines.well("job's data", "not looked at: these credentials are no worker's");
        }
        Err(e) => lines.change("job's data", format!("{:#}", plain(e))),
    }
}

async fn limited<T>(what: impl Future<Output = Result<T>>) -> Result<T> {
    let silent =
        || anyhow!("no answer within {} s: is it a coordinator, and not stopped or overloaded?", LIMIT.as_secs());
    tokio::time::timeout(LIMIT, what).await.unwrap_or_else(|_| Err(silent()))
}

async fn answer<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    let answered = tokio::time::timeout(LIMIT, call).await;
    Ok(answered.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))?.into_inner())
}

fn unix_ms() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_millis() as i64)
}

/// Where the run stands, how long the fastest of several calls took, and by how many milliseconds its clock is ahead of ours.
async fn status(channel: &Channel) -> Result<(v1::StatusReply, Duration, i64), Status> {
    let mut client = v1::operator_client::OperatorClient::new(channel.clone());
    let mut best: Option<(v1::StatusReply, Duration, i64)> = None;
    for _ in 0..CALLS {
        let (began, before) = (Instant::now(), unix_ms());
        let reply = answer(client.status(v1::StatusRequest {})).await?;
        let took = began.elapsed();
        // Half of the call is taken for the way back.
        let offset = reply.unix_ms as i64 - before - took.as_millis() as i64 / 2;
        if best.as_ref().is_none_or(|(_, fastest, _)| took < *fastest) {
            best = Some((reply, took, offset));
        }
    }
    best.ok_or_else(|| Status::internal("no call was made"))
}

/// Whether both sides are the same where they have to be.
fn agreement(lines: &mut Lines, reply: &v1::StatusReply, offset: i64) {
    match reply.version == wire::VERSION {
        true => lines.well("version", format!("{} on both sides", wire::VERSION)),
        false => lines.change(
            "version",
            format!("{} here, {} there: install the same version on both machines", wire::VERSION, reply.version),
        ),
    }
    let mine = unisono_common::train::fingerprint();
    match reply.fingerprint == mine[..] {
        true => lines.well("same bits", "this machine computes the coordinator's"),
        false => lines.change(
            "same bits",
            format!(
                "numerics fingerprint {} here, {} there: use machines of one type",
                here::fingerprint(&mine),
                here::fingerprint(&reply.fingerprint)
            ),
        ),
    }
    let seconds = offset.unsigned_abs() as f64 / 1e3;
    match Duration::from_secs_f64(seconds) > SKEW {
        true => {
            let which = if offset > 0 { "behind" } else { "ahead of" };
            lines.change("clocks", format!("this one is {seconds:.0} s {which} the coordinator's: set them by NTP"));
        }
        false => lines.well("clocks", format!("{seconds:.2} s apart")),
    }
}

/// How fast bytes come and go, one way after the other.
async fn bandwidth(channel: &Channel) -> Result<String, Status> {
    let client = v1::probe_client::ProbeClient::new(channel.clone());
    let mut client = client.max_decoding_message_size(wire::MAX_MESSAGE);
    let rate = |bytes: u64, began: Instant| bytes as f64 / 1e6 / began.elapsed().as_secs_f64().max(1e-9);
    let began = Instant::now();
    let mut pieces = answer(client.download(v1::DownloadRequest { bytes: BYTES })).await?;
    let mut came = 0;
    while let Some(piece) =
        tokio::time::timeout(LIMIT, pieces.message()).await.map_err(|_| Status::deadline_exceeded("no answer"))??
    {
        came += piece.bytes.len() as u64;
        // A slow link need not move all of it to be known.
        if began.elapsed() > LIMIT / 2 {
            break;
        }
    }
    let down = rate(came, began);
    drop(pieces);
    let began = Instant::now();
    let piece = v1::Filler { bytes: vec![0; PIECE].into() };
    let pieces = tokio_stream::iter(0..BYTES / PIECE as u64)
        .take_while(move |_| began.elapsed() < LIMIT / 2)
        .map(move |_| piece.clone());
    let taken = answer(client.upload(pieces)).await?.bytes;
    Ok(format!("{down:.0} MB/s from there, {:.0} MB/s to there", rate(taken, began)))
}

async fn get_job(channel: Channel) -> Result<v1::GetJobReply, Status> {
    let client = v1::coordinator_client::CoordinatorClient::new(channel);
    answer(client.max_decoding_message_size(wire::MAX_JOB).get_job(v1::GetJobRequest { version: wire::VERSION.into() }))
        .await
}

/// Whether a worker here would read the job's data or be sent them.
async fn job_data(reply: v1::GetJobReply, roots: Vec<PathBuf>) -> Result<String> {
    let prepared: Prepared = serde_json::from_str(&reply.prepared).context("the coordinator's data description")?;
    let job: Job = serde_json::from_str(&reply.job).context("the coordinator's job")?;
    if job.data.ship == Some(true) {
        return Ok("the coordinator sends them".into());
    }
    let ship = job.data.ship;
    let opened = tokio::task::spawn_blocking(move || here::open(&Files::below(roots), &job)).await?;
    match opened {
        Ok(opened) => {
            let same = opened.prepared == prepared;
            ensure!(
                same,
                "the files here differ from the coordinator's: copy them from there, or set data.ship = true in the job"
            );
            Ok(format!("read here, {}", here::described(&opened)))
        }
        Err(e) if ship == Some(false) => Err(e.context("they cannot be read here, and data.ship = false")),
        Err(e) => Ok(format!("the coordinator sends them, because they cannot be read here: {e:#}")),
    }
}
