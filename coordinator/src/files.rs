//! Checkpoint files: written aside, fsynced, renamed; the manifest last.

use anyhow::{Context, Result, bail};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use unisono_common::checkpoint::{FileDigest, Manifest};

const MANIFEST: &str = "manifest.json";

/// A checkpoint as it was read back.
pub struct Loaded {
    pub path: PathBuf,
    pub manifest: Manifest,
    pub weights: Vec<u8>,
    pub optimizer: Vec<u8>,
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes one checkpoint and removes the oldest ones beyond `keep`; gives its path.
pub fn write(dir: &Path, mut manifest: Manifest, weights: &[u8], optimizer: &[u8], keep: usize) -> Result<PathBuf> {
    let name = format!("step-{:08}", manifest.step);
    let aside = dir.join(format!(".{name}.partial"));
    if aside.exists() {
        fs::remove_dir_all(&aside).ok();
    }
    let written = (|| -> Result<PathBuf> {
        fs::create_dir_all(&aside).with_context(|| format!("cannot make the folder {}", aside.display()))?;
        for (file, bytes) in [("weights.safetensors", weights), ("optimizer.safetensors", optimizer)] {
            write_synced(&aside.join(file), bytes)?;
            let blake3 = blake3::hash(bytes).to_hex().to_string();
            manifest.files.insert(file.into(), FileDigest { bytes: bytes.len() as u64, blake3 });
        }
        write_synced(&aside.join(MANIFEST), &serde_json::to_vec_pretty(&manifest)?)?;
        let path = dir.join(&name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::rename(&aside, &path).with_context(|| format!("cannot rename to {}", path.display()))?;
        fs::File::open(dir).and_then(|d| d.sync_all()).ok();
        Ok(path)
    })();
    if written.is_err() {
        fs::remove_dir_all(&aside).ok();
    }
    let path = written?;
    let all = list(dir);
    for old in all.iter().take(all.len().saturating_sub(keep.max(1))) {
        fs::remove_dir_all(old).ok();
    }
    Ok(path)
}

/// The checkpoints in `dir`, oldest first; nothing is checked.
pub fn list(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("step-")))
        .collect();
    found.sort();
    found
}

/// Reads one checkpoint and checks every digest.
pub fn read(path: &Path) -> Result<Loaded> {
    let at = path.join(MANIFEST);
    let text = fs::read(&at).with_context(|| format!("{} is not a whole checkpoint: cannot read its manifest", path.display()))?;
    let manifest: Manifest =
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", at.display()))?;
    let file = |name: &str| -> Result<Vec<u8>> {
        let at = path.join(name);
        let bytes = fs::read(&at).with_context(|| format!("cannot read {}", at.display()))?;
        let Some(want) = manifest.files.get(name) else { bail!("the manifest of {} does not name {name}", path.display()) };
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
