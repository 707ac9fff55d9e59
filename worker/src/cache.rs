//! Partitions that were sent, kept in a folder by digest: a worker that starts again need not ask for them again.

use std::path::PathBuf;
use unisono_common::data::Prepared;
use unisono_common::job::Job;

/// One data set, cut one way, in a folder that other data sets and workers may share.
///
/// A file is the blake3 digest of a partition's bytes, then the bytes; its name is the digest of all that decides them.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
    data: String,
}

impl Cache {
    /// The cache of `job`'s partitions in `folder`.
    pub fn new(folder: PathBuf, job: &Job, prepared: &Prepared) -> Cache {
        let hashed = job.data.hashed.then_some(job.seed);
        Cache { folder, data: format!("{} {} {hashed:?}", prepared.digest, job.train.partitions) }
    }

    fn path(&self, partition: u32, test: bool) -> PathBuf {
        let name = blake3::hash(format!("{} {partition} {test}", self.data).as_bytes()).to_hex();
        self.folder.join(format!("{name}.partition"))
    }

    /// A partition's bytes, where they are here and whole.
    pub async fn read(&self, partition: u32, test: bool) -> Option<Vec<u8>> {
        let mut bytes = tokio::fs::read(self.path(partition, test)).await.ok()?;
        let digest: [u8; blake3::OUT_LEN] = *bytes.first_chunk()?;
        bytes.drain(..digest.len());
        (*blake3::hash(&bytes).as_bytes() == digest).then_some(bytes)
    }

    /// Keeps a partition's bytes; a cache that cannot be written is said once for each and otherwise done without.
    pub async fn write(&self, partition: u32, test: bool, bytes: &[u8]) {
        let path = self.path(partition, test);
        let aside = path.with_extension(format!("{}.partial", std::process::id()));
        let written = async {
            tokio::fs::create_dir_all(&self.folder).await?;
            tokio::fs::write(&aside, [blake3::hash(bytes).as_bytes(), bytes].concat()).await?;
            tokio::fs::rename(&aside, &path).await
        };
        if let Err(e) = written.await {
            tokio::fs::remove_file(&aside).await.ok();
            tracing::warn!("cannot keep partition {partition} in {}: {e}", self.folder.display());
        }
    }
}
