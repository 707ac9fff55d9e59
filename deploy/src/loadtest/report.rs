//! A load test for people: a table, JSON, and a page.

use super::Args;
use super::figures::{Quantiles, Size};
use super::fleet::Pretence;
use crate::show::{count, machine};
use anyhow::Result;
use serde_json::json;
use unisono_common::job::Job;

/// All that was measured.
pub struct Report<'a> {
    pub job: &'a Job,
    pub args: &'a Args,
    pub sizes: &'a [Size],
    pub pretence: Option<&'a Pretence>,
}

impl Report<'_> {
    /// One JSON line on stdout, or tables.
    pub fn print(&self) -> Result<()> {
        if self.args.json {
            println!("{}", serde_json::to_string(&self.json())?);
        } else {
            self.tables();
        }
        Ok(())
    }

    fn kind(&self) -> &'static str {
        if self.pretence.is_some() { "simulated" } else { "processes" }
    }

    /// What was measured, and where.
    pub fn about(&self) -> String {
        let transport = self.sizes.first().map_or("", |size| &size.trace.transport);
        let workers = match self.pretence {
            Some(_) => "simulated workers, which wait instead of computing, in one process".into(),
            None => format!("worker processes of {}", count(self.args.threads, "thread")),
        };
        format!("{workers}, by {transport}; all on one machine: {}", machine())
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "job": self.job.name,
            "machine": machine(),
            "workers": self.kind(),
            "transport": self.sizes.first().map(|size| &size.trace.transport),
            "threads": self.args.threads,
            "sizes": self.sizes,
        })
    }

    /// The sizes of one way to scale.
    pub fn scaled<'a>(&'a self, name: &str) -> Vec<&'a Size> {
        self.sizes.iter().filter(|size| size.scaling == name).collect()
    }

    fn tables(&self) {
        println!("\n  {}: {}", self.job.name, self.about());
        for name in ["strong", "weak"] {
            let sizes = self.scaled(name);
            if sizes.is_empty() {
                continue;
            }
            println!(
                "\n  {name} scaling\n  {:>7} {:>11} {:>11} {:>10} {:>9} {:>9} {:>9} {:>9} {:>12} {:>7} {:>9}  held up by",
                "workers",
                "samples/s",
                "predicted",
                "efficiency",
                "p50 ms",
                "p99 ms",
                "MB/s in",
                "out",
                "coordinator",
                "own",
                "MiB"
            );
            for size in &sizes {
                let predicted = match size.predicted {
                    Some(rate) if size.calibrates => format!("{rate:.0}*"),
                    Some(rate) => format!("{rate:.0}"),
                    None => String::new(),
                };
                let own = size.own_us.map_or("-".into(), |us| format!("{us:.0}"));
                println!(
                    "  {:>7} {:>11.0} {predicted:>11} {:>9.0}% {:>9.2} {:>9.2} {:>9.1} {:>9.1} {:>7.0} us/w {own:>7} {:>9.0}  {}",
                    size.workers,
                    size.samples_per_second,
                    size.efficiency * 100.0,
                    size.step_ms.p50,
                    size.step_ms.p99,
                    size.bytes_pushed_per_second / 1e6,
                    size.bytes_pulled_per_second / 1e6,
                    size.coordinator_us,
                    size.coordinator_memory_mib,
                    size.bottleneck.text()
                );
            }
            if sizes.iter().any(|size| size.calibrates) {
                println!("  * calibrates the predictions");
            }
            println!(
                "  coordinator: its processor time for a worker and step; own: of that, what moving the bytes does not explain"
            );
            if sizes.iter().any(|size| size.churn.is_some()) {
                println!(
                    "\n  ... while workers come and go: ms until a worker's first gradient, until the next step after one has gone, and of \
                     the step\n  that a moment lies in\n  {:>7} {:>11} {:>7} {:>24} {:>24} {:>24}",
                    "workers", "samples/s", "joins", "join p50, p99, max", "leave p50, p99, max", "step p50, p99, max"
                );
            }
            for (size, churn) in sizes.iter().filter_map(|size| Some((size, size.churn.as_ref()?))) {
                let three = |q: &Option<Quantiles>| {
                    q.map(|q| format!("{:.1} {:>7.1} {:>7.1}", q.p50, q.p99, q.max)).unwrap_or_else(|| "-".into())
                };
                let [join, leave, step] = [&churn.join_ms, &churn.leave_ms, &churn.step_ms].map(three);
                println!(
                    "  {:>7} {:>11.0} {:>7} {join:>24} {leave:>24} {step:>24}",
                    size.workers, churn.samples_per_second, churn.joins
                );
            }
        }
    }

    /// One page, with everything in it.
    pub fn html(&self) -> Result<String> {
        super::page::page(self)
    }
}
