//! What was trained, for other programs: weights as safetensors, models as ONNX.

mod graph;
mod layers;
mod onnx;
mod proto;

use crate::Wrong;
use crate::trained::{Trained, load};
use anyhow::{Context, Result, anyhow};
use prost::Message;
use std::path::Path;
use std::process::ExitCode;
use unisono_common::checkpoint::{weights_to_safetensors, with_rows_to_safetensors};

/// What an export is.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// The weights alone, with PyTorch's names and layouts; of sparse tables the rows of `ids`
    Safetensors,
    /// The model from raw features, or tokens, and ids to logits
    Onnx,
}

impl Format {
    /// By what the file's name ends in.
    fn of(file: &Path) -> Result<Format> {
        match file.extension().map(|end| end.to_string_lossy()).as_deref() {
            Some("onnx") => Ok(Format::Onnx),
            Some("safetensors") | None => Ok(Format::Safetensors),
            Some(_) => Err(anyhow!(
                "{}: safetensors and ONNX can be written; name it *.safetensors or *.onnx, or say --format",
                file.display()
            )),
        }
    }
}

/// `unisono export`: a file that other programs read.
pub fn export(checkpoint: &Path, format: Option<Format>, out: &Path, force: bool) -> Result<ExitCode> {
    let trained = load(checkpoint).map_err(Wrong)?;
    let format = format.map_or_else(|| Format::of(out), Ok).map_err(Wrong)?;
    if let Some(folder) = out.parent().filter(|f| !f.as_os_str().is_empty() && !f.is_dir()) {
        return Err(Wrong(anyhow!("there is no folder {}: make it first", folder.display())).into());
    }
    if out.exists() && !force {
        return Err(Wrong(anyhow!("{} exists; add --force to replace it", out.display())).into());
    }
    let write = |bytes: &[u8]| std::fs::write(out, bytes).with_context(|| format!("cannot write {}", out.display()));
    match format {
        Format::Safetensors => {
            let Trained { model, weights, blocks, .. } = &trained;
            match model.rows().is_empty() {
                true => write(&weights_to_safetensors(model.layout(), weights))?,
                false => write(&with_rows_to_safetensors(model.layout(), weights, model.rows(), blocks))?,
            }
            show_tensors(out, &trained);
        }
        Format::Onnx => {
            let Trained { manifest, model, weights, blocks, .. } = &trained;
            let file =
                onnx::file(&manifest.job, &manifest.prepared, model, weights, blocks).map_err(|e| Wrong(e.into()))?;
            write(&file.encode_to_vec())?;
            onnx::show(out, &file);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show_tensors(out: &Path, trained: &Trained) {
    let layout = trained.model.layout();
    println!("{}: {} tensors, {} values", out.display(), layout.tensors().count(), layout.len());
    for (tensor, _) in layout.tensors() {
        println!("  {:<24} {:?}", tensor.name, tensor.shape);
    }
    for (table, _) in trained.model.rows().tables() {
        println!("  {:<24} {:?}, a row for each of `ids`", table.name, [trained.blocks.keys.len(), table.width]);
    }
    let file = format!("safetensors.torch.load_file({:?})", out.display().to_string());
    match trained.model.rows().is_empty() {
        true => println!("In PyTorch: model.load_state_dict({file})"),
        false => println!("In PyTorch: tensors = {file}; ids = tensors.pop(\"ids\"); model.load_state_dict(tensors)"),
    }
}
