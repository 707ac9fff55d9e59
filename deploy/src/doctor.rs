//! `unisono doctor`: whether this machine can do its part in a run, line by line, and what to change where it cannot.

mod here;
mod there;

use crate::{IdentityArg, cli, data_roots, log, read_job};
use anyhow::{Result, anyhow};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing::Level;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  unisono doctor
  unisono doctor job.toml
  unisono doctor --coordinator https://train.example.org:7070 --identity certs/worker")]
pub struct Args {
    /// A job whose data are looked for
    job: Option<PathBuf>,
    /// A coordinator that this machine is to work with
    #[arg(long, value_name = "URL", env = cli::COORDINATOR)]
    coordinator: Option<String>,
    #[command(flatten)]
    identity: IdentityArg,
    /// As `worker` has it
    #[arg(long, value_name = "DIR")]
    data_root: Vec<PathBuf>,
    /// Overrides a key of the job; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "job")]
    set: Vec<String>,
    /// Prints one JSON object on the last line of stdout
    #[arg(long)]
    json: bool,
}

/// What was looked at.
pub struct Line {
    what: &'static str,
    is_well: bool,
    /// What was found, or what to change.
    text: String,
}

/// All lines, in their order.
#[derive(Default)]
pub struct Lines(Vec<Line>);

impl Lines {
    /// Nothing is to be changed.
    fn well(&mut self, what: &'static str, text: impl Into<String>) {
        self.0.push(Line { what, is_well: true, text: text.into() });
    }

    /// Something is.
    fn change(&mut self, what: &'static str, text: impl Into<String>) {
        self.0.push(Line { what, is_well: false, text: text.into() });
    }

    /// The one or the other.
    fn found(&mut self, what: &'static str, found: Result<String>) {
        match found {
            Ok(text) => self.well(what, text),
            Err(e) => self.change(what, format!("{e:#}")),
        }
    }
}

/// `unisono doctor`. The status is 1 where something is to be changed.
pub async fn run(args: Args) -> Result<ExitCode> {
    log(Level::ERROR);
    let roots = data_roots(args.data_root)?;
    let mut lines = Lines::default();
    here::machine(&mut lines);
    let identity = match &args.identity.identity {
        Some(folder) => here::identity(&mut lines, folder),
        None => None,
    };
    if let Some(path) = &args.job {
        let job = read_job(Some(path), &args.set);
        lines.found("data", job.and_then(|job| here::data(job, &path.display().to_string())));
    }
    if let Some(url) = &args.coordinator {
        if args.identity.identity.is_some() && identity.is_none() {
            lines.change("coordinator", "not asked: the credentials above come first");
        } else {
            match unisono_worker::Address::new(url, identity.as_ref()) {
                Ok(address) => there::coordinator(&mut lines, &address, roots).await,
                Err(e) => lines.change("coordinator", format!("{e:#}")),
            }
        }
    }
    let sick = lines.0.iter().filter(|line| !line.is_well).count();
    if args.json {
        let line = |line: &Line| json!({ "what": line.what, "ok": line.is_well, "text": line.text });
        println!("{}", json!({ "ok": sick == 0, "lines": lines.0.iter().map(line).collect::<Vec<_>>() }));
    } else {
        for Line { what, is_well, text } in &lines.0 {
            println!("  {:<6} {what:<14} {text}", if *is_well { "ok" } else { "change" });
        }
    }
    match sick {
        0 => Ok(ExitCode::SUCCESS),
        1 => Err(anyhow!("one thing is to be changed")),
        n => Err(anyhow!("{n} things are to be changed")),
    }
}
