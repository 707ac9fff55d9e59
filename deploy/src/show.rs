//! What a person sees: the summary's table or JSON.

use anyhow::Result;
use std::process::ExitCode;
use unisono_coordinator::Summary;

/// Prints the summary: one JSON line on stdout, or a short table on stdout.
pub fn summary(s: &Summary, json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string(s)?);
        return Ok(());
    }
    println!();
    let row = |name: &str, value: String| println!("  {name:<12} {value}");
    row("job", format!("{} ({}, {} parameters)", s.job, s.status, s.parameters));
    row("steps", format!("{} ({} epochs, {} samples)", s.steps, s.epochs, s.samples));
    row("workers", format!("{} over {}, {} ({} lost)", s.workers, s.transport, s.isa, s.workers_lost));
    let rate = s.samples_per_second.map(|rate| format!(", {rate:.0} samples/s")).unwrap_or_default();
    row("time", format!("{:.1} s{rate}", s.wall_seconds));
    if let Some(ms) = &s.step_ms {
        row("step", format!("{:.2} ms median, {:.2} ms p99", ms.p50, ms.p99));
    }
    if let Some(skipped) = s.skipped {
        let s = if skipped == 1 { "" } else { "s" };
        row("left out", format!("{skipped} sample{s} that cannot be read"));
    }
    if let Some(loss) = s.train_loss {
        row("train loss", format!("{loss:.5}"));
    }
    if let Some(eval) = &s.eval {
        row("test", eval.to_string());
    }
    row("weights", s.weights_digest.clone());
    row("checkpoint", s.checkpoint.clone());
    Ok(())
}

/// 0 where the job is done, 130 where it was interrupted.
pub fn exit_code(s: &Summary, interrupted: bool) -> ExitCode {
    if s.status != "done" && interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS }
}
