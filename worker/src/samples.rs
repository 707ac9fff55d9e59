//! The samples that a worker computes on: read from the job's paths, or sent by the coordinator.

use crate::Simulated;
use crate::cache::Cache;
use crate::connect::Client;
use anyhow::{Context, Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use unisono_common::data::partition::Partitions;
use unisono_common::data::{Batch, Dataset, Draw, Opened, Prepared, Seen};
use unisono_common::loss::Loss;
use unisono_proto::{self as wire, v1};

/// A partition's number, and whether it is one of the test set.
pub type PartitionOf = (u32, bool);

/// Where samples come from.
#[derive(Clone)]
pub enum Samples {
    /// The worker reads what the coordinator reads.
    Read(Box<Opened>),
    /// The coordinator sends the partitions of the worker's leases; they are kept for the next time.
    Sent(Sent),
    /// There are none: this is how long they would take.
    Simulated(Simulated),
}

/// Partitions that came over the wire.
#[derive(Clone)]
pub struct Sent {
    came: Arc<Mutex<BTreeMap<PartitionOf, Arc<Dataset>>>>,
    cache: Option<Cache>,
}

impl Sent {
    /// No partitions yet; they are kept in `cache` as well as in memory.
    pub fn new(cache: Option<Cache>) -> Sent {
        Sent { came: Arc::default(), cache }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PartitionOf, Arc<Dataset>>> {
        crate::lock(&self.came)
    }

    /// The partitions that have come.
    pub fn at_hand(&self) -> BTreeSet<PartitionOf> {
        self.lock().keys().copied().collect()
    }

    /// Gets one partition from the cache or the coordinator, checks it against what is known of it, and keeps it.
    ///
    /// # Errors
    /// A broken connection, damaged pieces, and samples that do not fit the job.
    pub async fn fetch(
        &self,
        client: &mut Client,
        session: &bytes::Bytes,
        of: PartitionOf,
        expected: usize,
        prepared: &Prepared,
        loss: &Loss,
    ) -> Result<()> {
        let (partition, test) = of;
        let decode = |bytes: &[u8]| -> Result<Dataset> {
            let data = Dataset::from_bytes(bytes).with_context(|| format!("partition {partition}"))?;
            prepared.check_samples(&data).with_context(|| format!("partition {partition}"))?;
            if data.samples() != expected {
                bail!("partition {partition} has {} samples; the job says {expected}", data.samples());
            }
            loss.check_targets(&data.targets)?;
            Ok(data)
        };
        let stored = match &self.cache {
            Some(cache) => cache.read(partition, test).await.and_then(|bytes| decode(&bytes).ok()),
            None => None,
        };
        let data = match stored {
            Some(data) => data,
            None => {
                let request = v1::FetchRequest { session: session.clone(), partition, test };
                // Kinds and sizes, then at most a word a value, two a target (with its weight) and three an id; of tokens, two windows are stored. Beside
                // implicit feedback comes what its users have, which is in the training set.
                let words = 2 + 2 * (prepared.shape.iter().product::<usize>() + 2 * prepared.id_fields());
                let seen =
                    prepared.implicit.map_or(0, |candidates| Seen::encoded_len(expected as u64, candidates.pairs));
                let most = 1024 + 4 * expected as u64 * words as u64 + seen;
                let bytes = download(client, request, most).await?;
                let data = decode(&bytes)?;
                if let Some(cache) = &self.cache {
                    cache.write(partition, test, &bytes).await;
                }
                data
            }
        };
        self.lock().insert(of, Arc::new(data));
        Ok(())
    }
}

/// One partition's bytes, from its pieces.
async fn download(client: &mut Client, request: v1::FetchRequest, most: u64) -> Result<Vec<u8>> {
    let partition = request.partition;
    let mut pieces = client.fetch_partition(request).await?.into_inner();
    let (mut bytes, mut total) = (Vec::new(), 0);
    while let Some(piece) = pieces.message().await? {
        if wire::checksum(&piece.bytes) != piece.checksum {
            bail!("a piece of partition {partition} was damaged on the way");
        }
        total = piece.total;
        if total > most {
            bail!("partition {partition} is said to have {total} bytes, more than its samples can take ({most})");
        }
        bytes.extend_from_slice(&piece.bytes);
        if bytes.len() as u64 > total {
            bail!("partition {partition} is longer than its {total} bytes");
        }
    }
    if bytes.len() as u64 != total {
        bail!("partition {partition} ended after {} of {total} bytes", bytes.len());
    }
    tracing::debug!("partition {partition} came: {total} bytes");
    Ok(bytes)
}

impl Samples {
    /// Appends samples to `batch`: positions within one partition, as they are in the epoch of `draw`.
    ///
    /// # Panics
    /// Where the partition was neither read nor sent: the session waits for it before it gives the order.
    pub fn fill(
        &self,
        batch: &mut Batch,
        prepared: &Prepared,
        parts: &Partitions,
        of: PartitionOf,
        positions: impl Iterator<Item = usize>,
        draw: Option<Draw<'_>>,
    ) {
        match self {
            Samples::Read(opened) => {
                let data = if of.1 { opened.test.as_ref() } else { Some(&opened.train) };
                let data = data.expect("the test set is there when it is evaluated");
                batch.fill(data, prepared, positions.map(|i| parts.sample(of.0, i)), draw, true);
            }
            Samples::Sent(sent) => {
                let data = sent.lock().get(&of).cloned().expect("the session fetched it");
                let draw = draw.map(|draw| draw.of_partition(parts, of.0));
                batch.fill(&data, prepared, positions, draw, true);
            }
            Samples::Simulated(_) => panic!("there are no samples"),
        }
    }
}
