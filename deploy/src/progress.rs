//! What a person sees while a run goes on: progress lines on a terminal, log lines otherwise.

use crate::JobArgs;
use indicatif::{HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::watch;
use tracing::Level;
use unisono_coordinator::Progress;

/// How a run is shown.
pub struct View {
    lines: bool,
    level: Level,
}

/// The progress lines of this process, which log lines must not break.
static LINES: OnceLock<MultiProgress> = OnceLock::new();

/// Writes to stderr, above progress lines where there are some.
pub fn write(bytes: &[u8]) -> std::io::Result<()> {
    let write = || std::io::stderr().lock().write_all(bytes);
    LINES.get().map_or_else(write, |lines| lines.suspend(write))
}

/// Progress lines that are being drawn, by a thread of their own: a terminal may keep whoever writes to it.
pub struct Shown(Option<(mpsc::Sender<()>, JoinHandle<()>)>);

impl View {
    /// By the terminal and the options; starts the log.
    pub fn new(args: &JobArgs) -> View {
        let lines = std::io::stderr().is_terminal() && !args.quiet && !args.verbose;
        let level = match (args.quiet || lines, args.verbose) {
            (_, true) => Level::DEBUG,
            (true, false) => Level::WARN,
            (false, false) => Level::INFO,
        };
        crate::log(level);
        View { lines, level }
    }

    /// What the log shows.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Begins to draw.
    pub fn show(&self, progress: watch::Receiver<Progress>) -> Shown {
        let begin = || {
            let (stop, stopped) = mpsc::channel();
            let thread = std::thread::Builder::new().name("draw".into());
            thread.spawn(move || draw(&progress, &stopped)).ok().map(|thread| (stop, thread))
        };
        Shown(self.lines.then(begin).flatten())
    }
}

impl Shown {
    /// Takes the lines away.
    pub fn end(self) {
        if let Some((stop, thread)) = self.0 {
            drop(stop);
            thread.join().ok();
            LINES.get().map(MultiProgress::clear);
        }
    }
}

/// A progress line for the run, and one for each worker, ten times a second until it is stopped.
fn draw(progress: &watch::Receiver<Progress>, stopped: &mpsc::Receiver<()>) {
    let style =
        |template: &str| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let lines = LINES.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
    // What matters comes first: the end of a line is cut off where the terminal is narrow.
    let columns = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(80, |size| size.ws_col);
    let bar = if columns < 100 { "" } else { "{bar:20} " };
    let template = format!("{bar}{{pos}}/{{len}}, {{prefix}}{{wide_msg}}");
    let run = lines.add(ProgressBar::new(0).with_style(style(&template)));
    let mut workers: Vec<ProgressBar> = Vec::new();
    while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
        let p = progress.borrow().clone();
        if p.total_steps == 0 {
            continue; // not begun
        }
        run.set_length(p.total_steps);
        run.set_position(p.step);
        let eval = p.eval.map(|e| format!(", test {e}")).unwrap_or_default();
        let left = |time| format!("{:#} left, ", HumanDuration(time));
        let (left, message) = match (p.workers.is_empty(), p.step) {
            (true, _) => (String::new(), "waiting for workers".into()),
            (false, 0) => (String::new(), "first step".into()),
            _ => (
                // Before the first step since it waited nobody knows.
                Some(run.eta()).filter(|_| run.per_sec() > 0.0).map_or_else(String::new, left),
                format!("loss {:.4}, {:.0} samples/s, epoch {}{eval}", p.loss, p.samples_per_second, p.epoch),
            ),
        };
        if p.workers.is_empty() {
            run.reset_eta(); // waiting is no pace
        }
        run.set_prefix(left);
        run.set_message(message);
        while workers.len() > p.workers.len() {
            if let Some(line) = workers.pop() {
                lines.remove(&line);
            }
        }
        while workers.len() < p.workers.len() {
            workers.push(lines.add(ProgressBar::new(0).with_style(style("  {wide_msg}"))));
        }
        for (line, w) in workers.iter().zip(p.workers) {
            let late = if w.silent > Duration::from_secs(2) {
                format!(", silent for {} s", w.silent.as_secs())
            } else {
                String::new()
            };
            let count = |n: u32, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
            let (threads, partitions) = (count(w.threads, "thread"), count(w.partitions, "partition"));
            line.set_message(format!("worker {} ({}): {threads}, {partitions}{late}", w.id, w.name));
        }
    }
}
