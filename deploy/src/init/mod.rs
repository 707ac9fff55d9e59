//! `unisono init`: a job file for the data it is pointed at.
//!
//! | module | what it does |
//! | --- | --- |
//! | `find` | what DATA is |
//! | `columns` | what the columns of a table are, and which one is predicted |
//! | `data`, `model` | the parts of the job |

mod columns;
mod data;
mod find;
mod model;

use crate::Wrong;
use anyhow::{Context, Result, anyhow, bail};
use data::{Kind, Place, Section, quote};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use unisono_common::data::{Files, Opened, open};
use unisono_common::job::{self, Job, JobText};

#[derive(clap::Args)]
#[command(after_help = "Examples:
  unisono init people.csv --target income
  unisono init pictures --out pictures.toml")]
pub struct Args {
    /// A table (CSV, JSON lines, Parquet), ratings, libsvm lines or plain text; or a folder: of such a file, of a folder of pictures
    /// for each class (or train and test with these), of IDX files, or of CIFAR's
    data: PathBuf,
    /// The column of a table to predict [default: one that is called target, label, class or y; or else the last]
    #[arg(long, value_name = "COLUMN")]
    target: Option<String>,
    /// The job file to write; its name is the run's, unless it is job.toml: then that is the data's
    #[arg(long, value_name = "FILE", default_value = JOB)]
    out: PathBuf,
    /// Replaces FILE where it exists
    #[arg(long)]
    force: bool,
}

/// The file where none is named.
const JOB: &str = "job.toml";

/// What a run is called: a job file's name without its ending, or, of the usual one, the data file's or the folder's.
fn run_name(out: &Path, data: &Path) -> String {
    // Two jobs about the same data are two runs.
    let stem = if find::name(out) != JOB {
        out.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    } else {
        let whole = data.canonicalize().unwrap_or_else(|_| data.into());
        find::name(&whole).split('.').next().unwrap_or_default().into()
    };
    let plain = stem.replace(|c: char| !c.is_alphanumeric() && c != '-' && c != '_', "-");
    match plain.trim_matches('-') {
        "" => "job".into(),
        // A folder's name has at most 200 bytes.
        name => name.chars().take(50).collect(),
    }
}

/// A job that was written, and what was guessed.
struct Written {
    toml: String,
    name: String,
    kind: Kind,
    says: Vec<(&'static str, String)>,
}

fn parse(args: &Args, place: &Place, toml: &str) -> Result<Job> {
    let base = place.base.display().to_string();
    let text = JobText { file: args.out.display().to_string(), base, toml: toml.into(), overrides: vec![] };
    Ok(job::parse(text)?)
}

/// The data as the section says, with the first of its test sets that can be used; and the section with that.
fn opened(args: &Args, place: &Place, head: &str, section: &mut Section) -> Result<(String, Opened)> {
    let mut tested = std::mem::take(&mut section.tested).into_iter().peekable();
    let mut unused = None;
    while let Some(test) = tested.next() {
        let text = format!("{head}{}", section.with(&test));
        let job = parse(args, place, &format!("{text}[model]\nkind = \"linear\"\n[train]\nepochs = 1\n"))?;
        match open(&Files::any(), &job.data, job.seed) {
            Ok(opened) => {
                let unused = unused.map(|why| format!("; {why}")).unwrap_or_default();
                section.says.push(("test set", format!("{}{unused}", test.says)));
                return Ok((text, opened));
            }
            // It may be wrong with the test set alone; otherwise it is so with the next, too.
            Err(error) if tested.peek().is_some() => {
                unused = Some(format!("{} cannot be one: {error}", test.says));
            }
            Err(error) => return Err(error.into()),
        }
    }
    bail!("there is no test set") // the last one is used, or its error is given
}

fn write(args: &Args) -> Result<Written> {
    let folder = args.out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        bail!("there is no folder {}: make it first, or choose another file with --out", folder.display());
    }
    let exists =
        || anyhow!("{} exists; add --force to replace it, or choose another file with --out", args.out.display());
    let root = std::env::var_os("UNISONO_DATA").filter(|root| !root.is_empty());
    let root = root.map(std::path::absolute).transpose()?;
    let place = Place { base: std::path::absolute(folder)?, root };
    let data = place.find(&args.data);
    if data.exists() && args.out.exists() && !args.force {
        return Err(exists());
    }
    let mut section = data::section(&data, &place, args.target.as_deref())?;
    let name = run_name(&args.out, &data);
    let head = format!(
        "# A first job for {}, as `unisono init` guessed it; docs/job.md has every key.\nname = {}\nseed = 7\n\n",
        quote(&find::name(&std::path::absolute(&data)?)),
        quote(&name)
    );
    let nothing = || "nothing was written";
    let (text, opened) = opened(args, &place, &head, &mut section).with_context(nothing)?;
    let (rest, model) = model::sections(&section.kind, &opened).with_context(nothing)?;
    section.says.push(("model", model));
    let toml = format!("{text}\n{rest}");
    let job = parse(args, &place, &toml).with_context(nothing)?;
    unisono_coordinator::prepare_opened(job, opened).and_then(|ready| ready.tested()).with_context(nothing)?;
    let mut file = OpenOptions::new();
    file.write(true);
    match args.force {
        true => file.create(true).truncate(true),
        false => file.create_new(true),
    };
    let mut file = file.open(&args.out).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => exists(),
        _ => anyhow!(e).context(format!("cannot write {}", args.out.display())),
    })?;
    file.write_all(toml.as_bytes()).with_context(|| format!("cannot write {}", args.out.display()))?;
    Ok(Written { toml, name, kind: section.kind, says: section.says })
}

/// `unisono init`.
pub fn run(args: &Args) -> Result<ExitCode> {
    let Written { toml, name, kind, says } = write(args).map_err(Wrong)?;
    for (what, text) in says {
        println!("  {what:<12} {text}");
    }
    let job = args.out.display();
    println!(
        "\nwrote {job} ({} lines): these are guesses, and it says what else could stand there. Then:\n",
        toml.lines().count()
    );
    println!("unisono local {job}");
    println!("unisono eval runs/{name}");
    match kind {
        Kind::Table | Kind::Texts => {
            let names = toml.contains("\ncolumns = [").then_some("; its first line is the names in `columns`");
            let new = if toml.contains("\nformat = \"json-lines\"\n") { "NEW.jsonl" } else { "NEW.csv" };
            println!("unisono predict runs/{name} {new}    # rows to predict for{}", names.unwrap_or_default());
        }
        Kind::Ratings => println!("unisono predict runs/{name} NEW.csv    # with the columns user and item"),
        Kind::Sparse => println!("unisono predict runs/{name} NEW.svm"),
        Kind::Language(_) => println!("unisono predict runs/{name} --generate \"The \""),
        Kind::Pictures => println!("unisono eval runs/{name} --confusion classes.svg"),
    }
    Ok(ExitCode::SUCCESS)
}
