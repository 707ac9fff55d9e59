//! What a person sees: the summary's table or JSON, and what other tables have in common.

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
    let how = if s.workers > 0 { format!(" over {}, {}", s.transport, s.isa) } else { String::new() };
    row("workers", format!("{}{how} ({} lost)", s.workers, s.workers_lost));
    row("time", time(s.wall_seconds, s.train_seconds, s.samples_per_second));
    if let Some(ms) = &s.step_ms {
        row("step", format!("{:.2} ms median, {:.2} ms p99", ms.p50, ms.p99));
    }
    if let Some(skipped) = s.skipped {
        let s = if skipped == 1 { "" } else { "s" };
        row("left out", format!("{skipped} sample{s} that cannot be read"));
    }
    if let Some(loss) = s.train_loss {
        row("loss", format!("{loss:.5} in the last step"));
    }
    if let Some(eval) = &s.eval {
        row("test", eval.to_string());
    }
    row("weights", s.weights_digest.clone());
    row("checkpoint", if s.checkpoint.is_empty() { "none: nothing was trained".into() } else { s.checkpoint.clone() });
    Ok(())
}

/// What the command took, and how fast it was; who waited long for hosts or data reads which part of it the rate is of.
fn time(wall: f64, train: f64, rate: Option<f64>) -> String {
    let waited = rate.is_some() && wall - train >= 1.0 && train < 0.8 * wall;
    let train = if waited { format!(", {train:.1} s of it from the first step on") } else { String::new() };
    let rate = rate.map(|rate| format!(", {rate:.0} samples/s")).unwrap_or_default();
    format!("{wall:.1} s{train}{rate}")
}

/// 0 where the job is done, 130 where it was interrupted.
pub fn exit_code(s: &Summary, interrupted: bool) -> ExitCode {
    if s.status != "done" && interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS }
}

/// A number with commas.
pub fn thousands(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of things.
pub fn count(n: usize, what: &str) -> String {
    format!("{} {what}{}", thousands(n as f64), if n == 1 { "" } else { "s" })
}

/// The processor's name, and how many threads it runs at once.
pub fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    let isa = isa().map(|isa| format!(", {isa}")).unwrap_or_default();
    format!("{}, {}{isa}", name.unwrap_or(std::env::consts::ARCH), count(cores, "logical core"))
}

/// The instruction set that the kernels use.
pub fn isa() -> Option<&'static str> {
    unisono_common::kernels::isa().ok().map(|isa| isa.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_is_of_a_part_of_the_time_says_so() {
        assert_eq!(time(0.1, 0.04, Some(635_100.2)), "0.1 s, 635100 samples/s");
        assert_eq!(time(60.0, 50.0, Some(20.0)), "60.0 s, 20 samples/s");
        assert_eq!(time(45.1, 12.34, Some(10.0)), "45.1 s, 12.3 s of it from the first step on, 10 samples/s");
        assert_eq!(time(45.1, 0.0, None), "45.1 s");
    }
}
