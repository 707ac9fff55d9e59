//! Checkpoint files: written aside, fsynced, renamed; the manifest last.

use crate::lock;
use crate::rows::Tables;
use crate::store::Keep;
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use unisono_common::checkpoint::{self, FileDigest, Manifest};
use unisono_common::layout::{Layout, le_bytes, le_bytes_mut};
use unisono_common::rows::optim::RowOptimizer;
use unisono_common::rows::{self, RowBlock, RowLayout};

const MANIFEST: &str = "manifest.json";
const WEIGHTS: &str = "weights.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// The version of a checkpoint's form.
pub const FORMAT: u32 = 1;

/// A checkpoint as it was read back.
pub struct Loaded {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub weights: Vec<u8>,
    pub optimizer: Vec<u8>,
    /// The files of sparse tables, in order.
    pub rows: Vec<Vec<u8>>,
}

/// A safetensors file whose values come in any order.
struct TensorFile {
    path: PathBuf,
    file: fs::File,
    /// Bytes before the first value.
    header: u64,
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {} (make room there, or set checkpoint.dir to another folder)", path.display())
}

impl TensorFile {
    fn create(path: PathBuf, header: &[u8]) -> Result<TensorFile> {
        let at = || cannot_write(&path);
        let mut file = fs::File::options().read(true).write(true).create_new(true).open(&path).with_context(at)?;
        file.write_all(header).with_context(at)?;
        Ok(TensorFile { header: header.len() as u64, path, file })
    }

    fn write(&self, from: usize, values: &[f32]) -> Result<()> {
        let written = self.file.write_all_at(le_bytes(values), self.header + 4 * from as u64);
        written.with_context(|| cannot_write(&self.path))
    }

    fn read(&self, range: Range<usize>) -> Result<Vec<f32>> {
        let mut values = vec![0f32; range.len()];
        let read = self.file.read_exact_at(le_bytes_mut(&mut values), self.header + 4 * range.start as u64);
        read.with_context(|| format!("cannot read {} again", self.path.display()))?;
        Ok(values)
    }

    /// Waits until all is on the disk, and reads it once more for its digest.
    fn sync(&self) -> Result<FileDigest> {
        let at = || cannot_write(&self.path);
        self.file.sync_all().with_context(at)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(fs::File::open(&self.path).with_context(at)?).with_context(at)?;
        Ok(FileDigest { bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// Rows of a file of a sparse table, at most.
const ROWS: usize = 1 << 18;

/// The files of sparse tables.
struct RowFiles {
    layout: RowLayout,
    optimizer: RowOptimizer,
    /// Rows of a file, at most.
    most: usize,
    /// What is not in a file yet.
    block: RowBlock,
    written: Vec<FileDigest>,
    digest: rows::Digest,
}

/// The name of the `n`-th file of rows.
fn rows_file(n: usize) -> String {
    format!("rows-{n:05}.safetensors")
}

impl RowFiles {
    fn add(&mut self, aside: &Path, block: &RowBlock) -> Result<()> {
        self.digest.add(block, self.optimizer.row_len());
        self.block.keys.extend_from_slice(&block.keys);
        self.block.rows.extend_from_slice(&block.rows);
        if self.block.keys.len() >= self.most { self.write(aside) } else { Ok(()) }
    }

    fn write(&mut self, aside: &Path) -> Result<()> {
        let block = std::mem::take(&mut self.block);
        if !block.keys.is_empty() {
            let bytes = checkpoint::rows_to_safetensors(&self.layout, &self.optimizer, &block);
            self.written.push(TensorFile::create(aside.join(rows_file(self.written.len())), &bytes)?.sync()?);
        }
        Ok(())
    }
}

/// A checkpoint that is being written, in a folder aside until it is whole.
pub struct Writing {
    dir: PathBuf,
    name: String,
    layout: Arc<Layout>,
    weights: TensorFile,
    optimizer: TensorFile,
    tables: Option<Mutex<RowFiles>>,
    /// The first write that failed.
    failed: Mutex<Option<anyhow::Error>>,
}

impl Writing {
    /// Begins the checkpoint of `step` in `dir`, for a model of `layout`, optimizer state vectors called `slots`, and its sparse
    /// tables.
    pub fn begin(
        dir: &Path,
        step: u64,
        layout: Arc<Layout>,
        slots: &[&str],
        tables: Option<&Tables>,
    ) -> Result<Writing> {
        let name = format!("step-{step:08}");
        let aside = aside(dir, &name);
        fs::remove_dir_all(&aside).ok();
        let begun = (|| {
            fs::create_dir_all(&aside).with_context(|| format!("cannot make the folder {}", aside.display()))?;
            let weights = TensorFile::create(aside.join(WEIGHTS), &checkpoint::weights_header(&layout))?;
            let header = checkpoint::state_header(layout.trainable(), slots);
            let optimizer = TensorFile::create(aside.join(OPTIMIZER), &header)?;
            let files = |tables: &Tables| {
                let (layout, optimizer) = (tables.layout().clone(), tables.optimizer().clone());
                let digest = rows::Digest::new(&layout);
                let (block, written) = (RowBlock::default(), Vec::new());
                Mutex::new(RowFiles { layout, optimizer, most: ROWS, block, written, digest })
            };
            let (tables, failed) = (tables.map(files), Mutex::new(None));
            Ok(Writing { dir: dir.into(), name, layout, weights, optimizer, tables, failed })
        })();
        if begun.is_err() {
            fs::remove_dir_all(&aside).ok();
        }
        begun
    }

    /// Gives the checkpoint up, and removes what there is of it.
    pub fn abandon(&self) {
        fs::remove_dir_all(aside(&self.dir, &self.name)).ok();
    }

    /// Finishes the checkpoint, when all chunks have come, and removes the oldest ones beyond `keep`; gives its path and the
    /// digest of its weights.
    pub fn finish(&self, manifest: Manifest, keep: usize) -> Result<(PathBuf, String)> {
        let finished = self.place(manifest);
        if finished.is_err() {
            self.abandon();
        }
        let (path, digest) = finished?;
        let others: Vec<PathBuf> = list(&self.dir).into_iter().filter(|other| *other != path).collect();
        for old in others.iter().take((others.len() + 1).saturating_sub(keep.max(1))) {
            fs::remove_dir_all(old).ok();
        }
        Ok((path, digest))
    }

    /// The manifest comes last, then the folder gets its name.
    fn place(&self, mut manifest: Manifest) -> Result<(PathBuf, String)> {
        if let Some(e) = lock(&self.failed).take() {
            return Err(e);
        }
        let aside = aside(&self.dir, &self.name);
        let mut digest = self.layout.digest_of_pieces(|range| self.weights.read(range))?;
        for (name, file) in [(WEIGHTS, &self.weights), (OPTIMIZER, &self.optimizer)] {
            manifest.files.insert(name.into(), file.sync()?);
        }
        if let Some(tables) = &self.tables {
            let mut tables = lock(tables);
            tables.write(&aside)?;
            manifest.files.extend(tables.written.iter().cloned().enumerate().map(|(n, digest)| (rows_file(n), digest)));
            digest = tables.digest.finish(&digest);
        }
        manifest.weights_digest = digest.clone();
        manifest.digest = manifest.own_digest();
        TensorFile::create(aside.join(MANIFEST), &serde_json::to_vec_pretty(&manifest)?)?.sync()?;
        fs::File::open(&aside)?.sync_all()?;
        let path = self.dir.join(&self.name);
        // The same step, written before: it stays until the new one has its place, and comes back if that never happens.
        let old = self.dir.join(format!(".{}.old", self.name));
        if path.exists() {
            fs::rename(&path, &old)?;
        }
        fs::rename(&aside, &path).with_context(|| format!("cannot rename to {}", path.display()))?;
        fs::File::open(&self.dir)?.sync_all()?;
        fs::remove_dir_all(&old).ok();
        Ok((path, digest))
    }
}

impl Keep for Writing {
    fn chunk(&self, index: usize, weights: &[f32], slots: &[Vec<f32>]) {
        let trained = self.layout.trainable_of(index);
        let write = || {
            self.weights.write(self.layout.chunk(index).start, weights)?;
            let vectors = (0..).step_by(self.layout.trainable());
            vectors.zip(slots).try_for_each(|(vector, slot)| self.optimizer.write(vector + trained.start, slot))
        };
        if let Err(e) = write() {
            lock(&self.failed).get_or_insert(e);
        }
    }

    fn rows(&self, block: &RowBlock) {
        let Some(tables) = &self.tables else { return };
        if let Err(e) = lock(tables).add(&aside(&self.dir, &self.name), block) {
            lock(&self.failed).get_or_insert(e);
        }
    }
}

fn aside(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!(".{name}.partial"))
}

/// The right to write to a run's folder, as long as it is held.
pub struct Lock {
    _file: fs::File,
}

/// Makes the folder of a run's checkpoints, finds out now whether it can be written, and locks it against other runs.
pub fn check(dir: &Path) -> Result<Lock> {
    fs::create_dir_all(dir)
        .with_context(|| format!("cannot make the checkpoint folder {}; set checkpoint.dir", dir.display()))?;
    let way_out = "set checkpoint.dir to another folder";
    let path = dir.join(".lock");
    let opened = fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = opened.with_context(|| format!("cannot write checkpoints to {}; {way_out}", dir.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another run is writing its checkpoints to {}: wait for its end, or {way_out}", dir.display())
        }
        Err(fs::TryLockError::Error(e)) => {
            return Err(e).with_context(|| format!("cannot lock {}; {way_out}", path.display()));
        }
    }
    // What a run left that was ended while it wrote.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().to_string();
        let Some(hidden) = name.strip_prefix('.').filter(|name| name.starts_with("step-")) else { continue };
        match hidden.strip_suffix(".old").map(|step| dir.join(step)) {
            Some(step) if !step.exists() => fs::rename(entry.path(), step)?,
            Some(_) => fs::remove_dir_all(entry.path())?,
            None if hidden.ends_with(".partial") => fs::remove_dir_all(entry.path())?,
            None => {}
        }
    }
    Ok(Lock { _file: file })
}

/// The checkpoints in `dir`, oldest first; nothing is checked.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse::<u64>().ok();
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let mut found: Vec<(u64, PathBuf)> = entries.filter_map(|path| Some((step(&path)?, path))).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// Reads one checkpoint and checks every digest.
pub fn read(path: &Path) -> Result<Loaded> {
    let at = path.join(MANIFEST);
    let text = fs::read(&at)
        .with_context(|| format!("{} is not a whole checkpoint: cannot read its manifest", path.display()))?;
    let damaged = || format!("{} is damaged", at.display());
    let manifest: Manifest = serde_json::from_slice(&text).with_context(damaged)?;
    if manifest.format_version != FORMAT {
        bail!("{} has format {}, this program reads {FORMAT}", path.display(), manifest.format_version);
    }
    let digest = manifest.own_digest();
    if manifest.digest != digest {
        bail!("{}: its digest is {digest}, it says {}", damaged(), manifest.digest);
    }
    manifest.prepared.check().with_context(damaged)?;
    let file = |name: &str| -> Result<Vec<u8>> {
        let at = path.join(name);
        let bytes = fs::read(&at).with_context(|| format!("cannot read {}", at.display()))?;
        let Some(want) = manifest.files.get(name) else {
            bail!("the manifest of {} does not name {name}", path.display())
        };
        let got = blake3::hash(&bytes).to_hex().to_string();
        if got != want.blake3 {
            bail!("{} is damaged: its digest is {got}, the manifest says {}", at.display(), want.blake3);
        }
        Ok(bytes)
    };
    let (weights, optimizer) = (file(WEIGHTS)?, file(OPTIMIZER)?);
    let named = (0..).map(rows_file).take_while(|name| manifest.files.contains_key(name));
    let rows = named.map(|name| file(&name)).collect::<Result<_>>()?;
    Ok(Loaded { path: path.into(), manifest, weights, optimizer, rows })
}

/// The newest whole checkpoint in `dir`, and why newer ones were passed over.
pub fn newest(dir: &Path) -> (Option<Loaded>, Vec<String>) {
    let mut passed_over = Vec::new();
    for path in list(dir).iter().rev() {
        match read(path) {
            Ok(loaded) => return (Some(loaded), passed_over),
            Err(e) => passed_over.push(format!("{e:#}")),
        }
    }
    (None, passed_over)
}

/// Whether there are checkpoints in `dir`, whole or not.
pub fn are_there(dir: &Path) -> bool {
    !list(dir).is_empty()
}

/// That there is no whole checkpoint in `dir`, and where those of an earlier run are.
pub fn none_whole(dir: &Path) -> String {
    let earlier = (1..).map(|n| dir.join(format!("previous-{n}"))).take_while(|path| path.exists()).last();
    let earlier = earlier.map(|path| format!(" (those of an earlier run are in {})", path.display()));
    format!("there is no whole checkpoint in {}{}", dir.display(), earlier.unwrap_or_default())
}

/// Moves the checkpoints of an earlier run into a folder of their own, `dir/previous-N`, and gives it.
pub fn set_aside(dir: &Path) -> Result<Option<PathBuf>> {
    let old = list(dir);
    if old.is_empty() {
        return Ok(None);
    }
    let mut names = (1..).map(|n| dir.join(format!("previous-{n}")));
    let previous = names.find(|path| !path.exists()).context("there are too many earlier runs")?;
    fs::create_dir_all(&previous)?;
    for path in &old {
        if let Some(name) = path.file_name() {
            fs::rename(path, previous.join(name))?;
        }
    }
    Ok(Some(previous))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::saves::Learning;
    use unisono_common::checkpoint::rows_from_safetensors;
    use unisono_common::ids::Step;
    use unisono_common::job::{self, JobText};
    use unisono_common::rows::key;

    const JOB: &str = r#"
data = { format = "synthetic", task = "clicks", numbers = 1, fields = 2, vocabulary = 50, samples = 8 }
model = { kind = "deepfm", width = 3, hidden = [4] }
train = { partitions = 1, micro_batch = 8, steps = 1, loss = "binary-cross-entropy" }
"#;

    #[test]
    fn rows_in_several_files_are_those_of_one() {
        let text = JobText { file: "job.toml".into(), base: ".".into(), toml: JOB.into(), overrides: vec![] };
        let ready = crate::prepare_unkept(job::parse(text).expect("a job")).expect("it can be trained");
        let (layout, rows) = (Arc::new(ready.model.layout().clone()), ready.model.rows().clone());
        let of_job = ready.job.train.tables();
        let tables = Tables::new(rows.clone(), 7, &of_job, 1, Step(3), &[]).expect("memory");
        let (optimizer, weights) = (RowOptimizer::new(&of_job.optimizer, &rows), layout.init(7));
        // Not in the order of their ids, which is not that in which they were touched.
        let block = |ids: Range<u64>| RowBlock {
            keys: ids.clone().map(|id| key(id * 31 % 50)).collect(),
            rows: ids.flat_map(|id| (0..optimizer.row_len()).map(move |i| (id * 100 + i as u64) as f32)).collect(),
        };
        let write = |most: usize| {
            let dir = tempfile::tempdir().expect("a folder");
            let writing = Writing::begin(dir.path(), 3, layout.clone(), &[], Some(&tables)).expect("begun");
            lock(writing.tables.as_ref().expect("it has tables")).most = most;
            (0..layout.chunks()).for_each(|i| writing.chunk(i, &weights[layout.chunk(i)], &[]));
            (0..6).for_each(|i| writing.rows(&block(4 * i..4 * (i + 1))));
            writing.rows(&block(24..26));
            let manifest = Learning::default().manifest(&ready.job, &ready.opened.prepared, [0; 32], 0);
            let (path, digest) = writing.finish(manifest.expect("a manifest"), 1).expect("written");
            let loaded = read(&path).expect("whole");
            assert_eq!(loaded.manifest.weights_digest, digest);
            let blocks = loaded.rows.iter().map(|file| rows_from_safetensors(&rows, &optimizer, file).expect("rows"));
            (digest, blocks.collect::<Vec<_>>(), loaded.manifest.files.into_keys().collect::<Vec<_>>())
        };
        let (one_digest, one, _) = write(ROWS);
        assert_eq!(one, [block(0..26)]);
        let (digest, several, files) = write(8);
        assert_eq!(several, [block(0..8), block(8..16), block(16..24), block(24..26)]);
        assert_eq!(digest, one_digest);
        for n in 0..4 {
            assert!(files.contains(&format!("rows-0000{n}.safetensors")), "{files:?}");
        }
    }
}
