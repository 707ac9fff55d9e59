//! Checkpoint files: written aside, fsynced, renamed; the manifest last.

use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use unisono_common::checkpoint::{FileDigest, Manifest};
use unisono_common::layout::le_bytes;

const MANIFEST: &str = "manifest.json";

/// The version of a checkpoint's form.
pub const FORMAT: u32 = 1;

/// A checkpoint as it was read back.
pub struct Loaded {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub weights: Vec<u8>,
    pub optimizer: Vec<u8>,
}

/// A file of tensors that is written piece by piece; a piece is let go as soon as it is written, so that training, which
/// must not change it before, need not copy it.
pub struct Tensors {
    pub header: Vec<u8>,
    pub pieces: Vec<Arc<Vec<f32>>>,
}

/// Writes a file and waits until it is on the disk.
fn write_synced(path: &Path, tensors: Tensors) -> Result<FileDigest> {
    let write = || -> std::io::Result<FileDigest> {
        let mut file = fs::File::create(path)?;
        let (mut hasher, mut bytes) = (blake3::Hasher::new(), 0);
        let mut add = |part: &[u8]| {
            hasher.update(part);
            bytes += part.len() as u64;
            file.write_all(part)
        };
        add(&tensors.header)?;
        for piece in tensors.pieces {
            add(le_bytes(&piece))?;
        }
        file.sync_all()?;
        Ok(FileDigest { bytes, blake3: hasher.finalize().to_hex().to_string() })
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes one checkpoint and removes the oldest ones beyond `keep`; gives its path.
pub fn write(dir: &Path, mut manifest: Manifest, weights: Tensors, optimizer: Tensors, keep: usize) -> Result<PathBuf> {
    let name = format!("step-{:08}", manifest.step);
    let aside = dir.join(format!(".{name}.partial"));
    if aside.exists() {
        fs::remove_dir_all(&aside).ok();
    }
    let written = (|| -> Result<PathBuf> {
        fs::create_dir_all(&aside).with_context(|| format!("cannot make the folder {}", aside.display()))?;
        for (file, tensors) in [("weights.safetensors", weights), ("optimizer.safetensors", optimizer)] {
            manifest.files.insert(file.into(), write_synced(&aside.join(file), tensors)?);
        }
        let text = Tensors { header: serde_json::to_vec_pretty(&manifest)?, pieces: Vec::new() };
        write_synced(&aside.join(MANIFEST), text)?;
        let path = dir.join(&name);
        fs::File::open(&aside)?.sync_all()?;
        // The same step, written before: it is whole until the new one has its place.
        let old = dir.join(format!(".{name}.old.partial"));
        if path.exists() {
            fs::rename(&path, &old)?;
        }
        fs::rename(&aside, &path).with_context(|| format!("cannot rename to {}", path.display()))?;
        fs::File::open(dir)?.sync_all()?;
        fs::remove_dir_all(&old).ok();
        Ok(path)
    })();
    if written.is_err() {
        fs::remove_dir_all(&aside).ok();
    }
    let path = written?;
    let others: Vec<PathBuf> = list(dir).into_iter().filter(|other| *other != path).collect();
    for old in others.iter().take((others.len() + 1).saturating_sub(keep.max(1))) {
        fs::remove_dir_all(old).ok();
    }
    Ok(path)
}

/// Makes the folder of a run's checkpoints, and finds out now whether it can be written.
pub fn check(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)
        .with_context(|| format!("cannot make the checkpoint folder {}; set checkpoint.dir", dir.display()))?;
    // What a run left that was ended while it wrote.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().to_string();
        if name.starts_with(".step-") && name.ends_with(".partial") {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
    let probe = dir.join(".probe.partial");
    let written =
        fs::write(&probe, "unisono").context("cannot write checkpoints; set checkpoint.dir to another folder");
    fs::remove_file(&probe).ok();
    written
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
    let manifest: Manifest = serde_json::from_slice(&text).with_context(|| format!("{} is damaged", at.display()))?;
    if manifest.format_version != FORMAT {
        bail!("{} has format {}, this program reads {FORMAT}", path.display(), manifest.format_version);
    }
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
    let (weights, optimizer) = (file("weights.safetensors")?, file("optimizer.safetensors")?);
    Ok(Loaded { path: path.into(), manifest, weights, optimizer })
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

/// Moves the checkpoints of an earlier run into `dir/previous`, replacing what was there.
pub fn set_aside(dir: &Path) -> Result<usize> {
    let old = list(dir);
    if old.is_empty() {
        return Ok(0);
    }
    let previous = dir.join("previous");
    if previous.exists() {
        fs::remove_dir_all(&previous).with_context(|| format!("cannot clear {}", previous.display()))?;
    }
    fs::create_dir_all(&previous)?;
    for path in &old {
        if let Some(name) = path.file_name() {
            fs::rename(path, previous.join(name))?;
        }
    }
    Ok(old.len())
}
