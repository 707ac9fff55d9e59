//! `unisono simulate`: how far a job scales, before anybody has the machines.

pub mod cluster;
mod resource;
pub mod trace;
pub mod units;

use crate::{Wrong, read_job};
use anyhow::{Context, Result, anyhow, bail};
use cluster::{Failures, Hosts, Load, Outcome, Stragglers};
use serde_json::json;
use std::path::PathBuf;
use std::process::ExitCode;
use trace::Trace;
use unisono_common::job::{Job, Length};
use units::{BytesPerSecond, Counts, Seconds};

/// What grows with the workers.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// Nothing: they share the job's partitions
    Strong,
    /// The partitions, and so the global batch: each worker has as many as with the fewest workers
    Weak,
}

impl Scaling {
    /// Partitions for so many workers, where the job has `partitions` for the `fewest`.
    pub fn partitions(self, partitions: u32, fewest: usize, workers: usize) -> u32 {
        match self {
            Scaling::Strong => partitions,
            Scaling::Weak => (partitions as usize).div_ceil(fewest).saturating_mul(workers) as u32,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Scaling::Strong => "strong",
            Scaling::Weak => "weak",
        }
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// The job file
    job: PathBuf,
    /// Numbers of workers, as in 1,2,4,8; or the first and the last, as in 1..4096, with their doublings between
    #[arg(long, default_value = "1..256")]
    workers: Counts,
    /// How fast a host's link is, each way; every worker has a host of its own
    #[arg(long, value_name = "RATE", default_value = "10Gbit")]
    link: BytesPerSecond,
    /// Time from host to host and back
    #[arg(long, value_name = "TIME", default_value = "0.2ms")]
    rtt: Seconds,
    /// Time that the gradient of one partition takes
    #[arg(long, value_name = "TIME", conflicts_with = "from")]
    compute: Option<Seconds>,
    /// Takes this, and what bytes cost, from a run that `unisono loadtest --trace FILE` has measured
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Cores of the coordinator's host [default: this machine's]
    #[arg(long)]
    cores: Option<u32>,
    /// What grows with the workers
    #[arg(long, value_enum, default_value = "strong")]
    scaling: Scaling,
    /// Stragglers: so often a worker's step takes so many times as long, as in 0.01x5
    #[arg(long, value_name = "SHARExTIMES", value_parser = stragglers)]
    stragglers: Option<Stragglers>,
    /// Failures: a worker's mean time to the next one
    #[arg(long, value_name = "TIME")]
    failures: Option<Seconds>,
    /// Time until another worker takes a failed one's place
    #[arg(long, value_name = "TIME", default_value = "30s")]
    restart: Seconds,
    /// Steps that are simulated for each number of workers
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    steps: u64,
    /// Another seed gives other times, stragglers and failures
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Overrides a key of the job, as in train.partitions=64; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Prints one JSON object on the last line of stdout
    #[arg(long)]
    json: bool,
}

fn stragglers(text: &str) -> Result<Stragglers, String> {
    let both = text.split_once('x').and_then(|(share, factor)| Some((share.parse().ok()?, factor.parse().ok()?)));
    match both {
        Some((share, factor)) if (0.0..=1.0).contains(&share) && (1.0..=1e6).contains(&factor) => {
            Ok(Stragglers { share, factor })
        }
        _ => Err(format!(
            "{text:?} is not a share and a factor, as in 0.01x5: one step in a hundred takes 5 times as long"
        )),
    }
}

/// One number of workers, and what came of it.
pub struct Predicted {
    pub workers: usize,
    pub partitions: u32,
    pub outcome: Outcome,
}

/// What is scaled, and where.
struct Plan {
    load: Load,
    hosts: Hosts,
    scaling: Scaling,
    fewest: usize,
    steps: u64,
    seed: u64,
}

impl Plan {
    fn run(&self, workers: usize) -> Result<Predicted> {
        let partitions = self.scaling.partitions(self.load.partitions, self.fewest, workers);
        let load = self.load.with_partitions(partitions);
        let outcome = cluster::run(&load, &self.hosts, workers as u32, self.steps, self.seed);
        let outcome = outcome.with_context(|| {
            format!(
                "with {workers} workers none lives long enough for its share: raise --failures, or train.partitions"
            )
        })?;
        Ok(Predicted { workers, partitions, outcome })
    }

    /// What would move the run with so many workers: each resource doubled in turn, and how many times as fast that makes it. What
    /// helps most comes first, and last what makes it another job.
    fn remedies(&self, workers: usize, now: f64) -> Result<Vec<(&'static str, f64)>> {
        let variant = |what: &'static str, change: &dyn Fn(&mut Load, &mut Hosts)| {
            let (mut load, mut hosts) = (self.load.clone(), self.hosts);
            change(&mut load, &mut hosts);
            let run = Plan { load, hosts, ..*self }.run(workers)?;
            Ok::<_, anyhow::Error>((what, run.outcome.samples_per_second / now))
        };
        let mut all = vec![
            variant("a link twice as fast", &|_, hosts| hosts.link *= 2.0)?,
            variant("twice the coordinator's cores", &|_, hosts| hosts.cores *= 2.0)?,
            variant("half the round-trip time", &|_, hosts| hosts.rtt /= 2.0)?,
            variant("workers that compute twice as fast", &|load, _| load.compute.iter_mut().for_each(|s| *s /= 2.0))?,
        ];
        if self.hosts.stragglers.is_some() {
            all.push(variant("no stragglers", &|_, hosts| hosts.stragglers = None)?);
        }
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.push(variant("twice the partitions, and so the global batch", &|load, _| {
            *load = load.with_partitions(load.partitions * 2);
        })?);
        Ok(all)
    }
}

/// The last of these numbers of workers up to which each more brought at least half of what it should.
fn knee(all: &[(usize, f64)]) -> usize {
    let pays = |two: &&[(usize, f64)]| {
        let ((few, slow), (many, fast)) = (two[0], two[1]);
        fast / slow - 1.0 >= 0.5 * (many as f64 / few as f64 - 1.0)
    };
    all.windows(2).take_while(pays).count()
}

/// `unisono simulate`.
pub fn run(args: &Args) -> Result<ExitCode> {
    crate::log(tracing::Level::WARN);
    let job = read_job(Some(&args.job), &args.set)?;
    let cores = match args.cores {
        Some(0) => return Err(Wrong(anyhow!("--cores must be at least 1")).into()),
        Some(cores) => cores as f64,
        None => std::thread::available_parallelism().map_or(1, |n| n.get()) as f64,
    };
    let failures = args.failures.map(|Seconds(between)| Failures { between, restart: args.restart.0 });
    let hosts =
        Hosts { cores, together: false, link: args.link.0, rtt: args.rtt.0, stragglers: args.stragglers, failures };
    let ready = unisono_coordinator::prepare_unkept(job).map_err(Wrong)?;
    if !ready.model().rows().is_empty() {
        return Err(Wrong(anyhow!(
            "the model has sparse tables, whose rows are not simulated: measure it with `unisono loadtest`"
        ))
        .into());
    }
    let load = match (&args.from, args.compute) {
        (Some(path), _) => Trace::read(path).and_then(|trace| from_trace(&trace, ready.job())).map_err(Wrong)?,
        (None, Some(Seconds(compute))) => trace::load(&ready, compute),
        (None, None) => {
            return Err(Wrong(anyhow!(
                "it is not known how long a partition takes: say it, as with --compute 40ms, or measure it: `unisono loadtest JOB \
                 --transport grpc --workers 4 --trace FILE`, and --from FILE"
            ))
            .into());
        }
    };
    let counts = &args.workers.0;
    let plan = Plan { load, hosts, scaling: args.scaling, fewest: counts[0], steps: args.steps, seed: args.seed };
    let all = counts.iter().map(|workers| plan.run(*workers)).collect::<Result<Vec<_>>>()?;
    let rates: Vec<(usize, f64)> = all.iter().map(|p| (p.workers, p.outcome.samples_per_second)).collect();
    let knee = knee(&rates);
    let (at, rate) = rates[(knee + 1).min(rates.len() - 1)];
    let remedies = plan.remedies(at, rate)?;
    // A job of so many steps has more samples where there are more partitions.
    let samples = |p: &Predicted| {
        let partitions = match ready.job().train.length {
            Length::Steps(_) => p.partitions,
            Length::Epochs(_) => plan.load.partitions,
        };
        ready.total_steps() as f64 * plan.load.with_partitions(partitions).samples
    };
    if args.json {
        let size = |p: &Predicted| {
            let Outcome { samples_per_second, steps, cores, out, inward, computing } = &p.outcome;
            let seconds = samples(p) / samples_per_second;
            json!({ "workers": p.workers, "partitions": p.partitions, "samples_per_second": samples_per_second,
                    "efficiency": efficiency(rates[0], p), "step_ms": { "p50": p.ms(0.5), "p99": p.ms(0.99) },
                    "seconds": seconds, "worker_hours": seconds * p.workers as f64 / 3600.0, "steps": steps.len(),
                    "busy": { "cores": cores, "link_out": out, "link_in": inward, "workers": computing } })
        };
        let each: Vec<_> = remedies.iter().map(|(what, times)| json!({ "change": what, "times": times })).collect();
        println!(
            "{}",
            json!({ "job": ready.job().name, "scaling": args.scaling.name(), "knee": rates[knee].0,
                    "sizes": all.iter().map(size).collect::<Vec<_>>(), "remedies": { "workers": at, "each": each } })
        );
        return Ok(ExitCode::SUCCESS);
    }
    let Load { partitions, weights, gradient, .. } = plan.load;
    println!(
        "\n  {}: {partitions} partitions, {:.2} MB of weights to each worker and {:.2} MB back for each node\n",
        ready.job().name,
        weights / 1e6,
        gradient / 1e6
    );
    println!(
        "  {:>7} {:>12} {:>10} {:>9} {:>9} {:>9} {:>12}   busy: cores, link out, in, workers",
        "workers", "samples/s", "efficiency", "step ms", "p99 ms", "hours", "worker-hours"
    );
    for p in &all {
        let Outcome { samples_per_second, cores, out, inward, computing, .. } = &p.outcome;
        let hours = samples(p) / samples_per_second / 3600.0;
        let percent = |share: &f64| format!("{:>4.0}%", share * 100.0);
        let busy = [cores, out, inward, computing].map(percent).join(" ");
        println!(
            "  {:>7} {samples_per_second:>12.0} {:>9.0}% {:>9.2} {:>9.2} {hours:>9.2} {:>12.2}   {busy}",
            p.workers,
            efficiency(rates[0], p) * 100.0,
            p.ms(0.5),
            p.ms(0.99),
            hours * p.workers as f64
        );
    }
    match rates.get(knee + 1) {
        Some((more, _)) => println!(
            "\n  Up to {} workers each more brings at least half of what it should; with {more} it does not. There, it would help:",
            rates[knee].0
        ),
        None => println!("\n  Each more worker brings at least half of what it should. With {at} it would help:"),
    }
    let worth: Vec<_> = remedies.iter().filter(|(_, times)| *times >= 1.05).collect();
    if worth.is_empty() {
        println!("    nothing by itself by more than 5%");
    }
    for (what, times) in worth {
        println!("    {what}: {times:.2} times the samples a second");
    }
    Ok(ExitCode::SUCCESS)
}

/// Of what so many workers should do by what the fewest did.
fn efficiency((fewest, rate): (usize, f64), p: &Predicted) -> f64 {
    p.outcome.samples_per_second / rate * fewest as f64 / p.workers as f64
}

impl Predicted {
    /// Milliseconds that a part `q` of all steps is within.
    pub fn ms(&self, q: f64) -> f64 {
        let steps = &self.outcome.steps;
        steps[((steps.len() - 1) as f64 * q).round() as usize] * 1e3
    }
}

/// A trace's load, if it is this job's.
fn from_trace(trace: &Trace, job: &Job) -> Result<Load> {
    if trace.work != trace::work(job) {
        bail!("the trace is of the job \"{}\" as it was then: trace this one as it is now", trace.job);
    }
    if trace.transport != "grpc" {
        bail!("the trace is of workers that shared memory with the coordinator: trace with --transport grpc");
    }
    Ok(trace.load().with_partitions(job.train.partitions))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1 MB each way, 40 ms a partition.
    fn load(partitions: u32) -> Load {
        Load {
            partitions,
            samples: 64.0 * partitions as f64,
            weights: 1e6,
            gradient: 1e6,
            compute: vec![0.040],
            computes: true,
            bytes: cluster::Bytes { coordinator: 0.5e-9, worker: 0.5e-9 },
            update: 0.001,
            rest: 0.0,
        }
    }

    fn hosts() -> Hosts {
        Hosts { cores: 4.0, together: false, link: 1.25e9, rtt: 0.0002, stragglers: None, failures: None }
    }

    fn rate(load: &Load, hosts: &Hosts, workers: u32) -> f64 {
        cluster::run(load, hosts, workers, 50, 0).expect("it ends").samples_per_second
    }

    #[test]
    fn what_is_alone_takes_the_sum_of_its_parts() {
        let outcome = cluster::run(&load(1), &hosts(), 1, 50, 0).expect("it ends");
        // Order and push, weights out and a gradient in by the link, four times its bytes' work, computing, the update on 4 cores.
        let want = 0.0002 + 2.0 * 1e6 / 1.25e9 + 4.0 * 1e6 * 0.5e-9 + 0.040 + 0.001 / 4.0;
        assert!(outcome.steps.iter().all(|step| (step - want).abs() < 1e-6), "{:?}, not {want}", outcome.steps);
        assert!((outcome.computing - 0.040 / want).abs() < 1e-3, "{}", outcome.computing);
    }

    #[test]
    fn workers_help_until_a_link_or_the_cores_are_full() {
        let hosts = hosts();
        let (one, eight) = (rate(&load(64), &hosts, 1), rate(&load(64), &hosts, 8));
        assert!((7.0..=8.01).contains(&(eight / one)), "{}", eight / one);
        // 256 MB out and in a step: no less than 0.2 s each, however many compute; and as all are sent their weights at once by the link,
        // hardly any computes before the others.
        let slow = cluster::run(&load(256), &hosts, 256, 20, 0).expect("it ends");
        let (seconds, link) = (256.0 * 64.0 / slow.samples_per_second, 256e6 / 1.25e9);
        assert!((slow.out * seconds / link - 1.0).abs() < 1e-3, "{slow:?}");
        assert!((slow.inward * seconds / link - 1.0).abs() < 1e-3, "{slow:?}");
        assert!((1.9 * link..2.1 * link + 0.040).contains(&seconds), "{seconds} for {link}: {slow:?}");
        let wide = Hosts { link: 1e12, ..hosts };
        assert!(rate(&load(256), &wide, 256) > 1.5 * slow.samples_per_second);
        // On one host two cores compute for all.
        let one_host = Hosts::one(2.0);
        let (two, many) = (rate(&load(16), &one_host, 2), rate(&load(16), &one_host, 16));
        assert!((many / two - 1.0).abs() < 0.1, "{two} {many}");
    }

    #[test]
    fn who_has_no_partition_is_sent_the_weights_all_the_same() {
        let hosts = Hosts { link: 1.25e7, ..hosts() };
        let (all, idle) = (rate(&load(8), &hosts, 8), rate(&load(8), &hosts, 64));
        assert!(idle < all / 4.0, "{all} {idle}");
    }

    #[test]
    fn stragglers_and_failures_cost_something_and_no_sample() {
        let calm = rate(&load(16), &hosts(), 16);
        let slow = Hosts { stragglers: Some(Stragglers { share: 0.05, factor: 5.0 }), ..hosts() };
        assert!(rate(&load(16), &slow, 16) < 0.8 * calm);
        let failing = Hosts { failures: Some(Failures { between: 2.0, restart: 1.0 }), ..hosts() };
        let got = cluster::run(&load(16), &failing, 16, 200, 3).expect("it ends");
        assert!(got.steps.len() == 200 && got.samples_per_second < 0.9 * calm, "{}", got.samples_per_second);
        let again = cluster::run(&load(16), &failing, 16, 200, 3).expect("it ends");
        assert_eq!(got.steps, again.steps, "time is virtual");
        let hopeless = Hosts { failures: Some(Failures { between: 0.001, restart: 0.001 }), ..hosts() };
        assert!(cluster::run(&load(1), &hopeless, 1, 1, 3).is_none(), "nobody lives for 40 ms");
    }

    #[test]
    fn the_knee_is_where_workers_no_longer_pay() {
        assert_eq!(knee(&[(1, 10.0), (2, 19.0), (4, 36.0), (8, 50.0), (16, 51.0)]), 2);
        assert_eq!(knee(&[(1, 10.0), (2, 20.0)]), 1);
        assert_eq!(knee(&[(3, 10.0)]), 0);
        assert_eq!(Scaling::Weak.partitions(8, 2, 6), 24);
    }

    #[test]
    fn a_remedy_is_what_was_scarce() {
        let plan = |hosts| Plan { load: load(64), hosts, scaling: Scaling::Strong, fewest: 1, steps: 20, seed: 0 };
        let remedies = |plan: &Plan, workers| {
            let now = plan.run(workers).expect("it ends").outcome.samples_per_second;
            plan.remedies(workers, now).expect("they end")
        };
        let best = |plan: Plan, workers| remedies(&plan, workers)[0].0;
        assert_eq!(best(plan(Hosts { link: 1.25e7, ..hosts() }), 64), "a link twice as fast");
        assert_eq!(best(plan(hosts()), 1), "workers that compute twice as fast");
        let idle = plan(Hosts { link: 1e12, ..hosts() });
        let (what, times) = remedies(&idle, 128).pop().expect("the last one");
        assert!(what.contains("partitions") && times > 1.5, "half of them have none: {times}");
    }
}
