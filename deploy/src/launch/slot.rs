//! One worker on a host: started, and started again when it or its host has died, until the run is over.

use super::ssh::{Facts, Failure, LIMIT, STARTED, plain};
use super::{Run, handed};
use crate::progress;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin};
use tokio::sync::{Mutex, mpsc, watch};

/// Pauses between attempts.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// A worker that lasted so long was no failed attempt.
const LONG: Duration = Duration::from_secs(60);
/// What a worker may take to say goodbye when the run is over, and to end when its launcher goes.
pub const GOODBYE: Duration = Duration::from_secs(10);
const END: Duration = Duration::from_secs(3);
/// Bytes of a line, at most.
const LINE: u64 = 16 << 10;

/// What is known of a host by all its slots; who holds it is at work there.
#[derive(Default)]
pub struct Known {
    facts: Option<Facts>,
    /// Why the last attempt did not get as far as to a worker, and when.
    failed: Option<(Instant, Failure)>,
}

/// What becomes of a worker.
pub enum Event {
    /// It was started on its host.
    Started(usize),
    /// It is not there.
    Failed(usize, Failure),
}

/// A worker's place.
pub struct Slot {
    pub index: usize,
    /// Of its host, in the hosts file.
    pub host: usize,
    /// What its lines begin with, and its name in the run.
    pub name: String,
}

impl Slot {
    /// Lives until the run is over, or until it cannot.
    pub async fn live(
        self,
        run: &Run,
        known: &[Mutex<Known>],
        events: mpsc::UnboundedSender<Event>,
        mut over: watch::Receiver<bool>,
    ) {
        let mut pause = SHORTEST;
        loop {
            let began = Instant::now();
            let mut ending = over.clone();
            let started = tokio::select! {
                started = self.start(run, &known[self.host]) => started,
                _ = ending.wait_for(|over| *over) => return,
            };
            let ended = match started {
                Ok((child, stdin)) => {
                    events.send(Event::Started(self.index)).ok();
                    self.attend(run, child, stdin, &mut over).await
                }
                Err(failure) => Err(failure),
            };
            let Err(failure) = ended else { return };
            if *over.borrow() {
                return;
            }
            if began.elapsed() > LONG {
                pause = SHORTEST;
            }
            let next =
                if failure.last { "not tried again".into() } else { format!("trying again in {} s", pause.as_secs()) };
            tracing::warn!("{}: {}; {next}", self.name, failure.why);
            let last = failure.last;
            events.send(Event::Failed(self.index, failure)).ok();
            if last {
                return;
            }
            // What was known of the host may be wrong: it may have begun anew.
            known[self.host].lock().await.facts = None;
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = over.wait_for(|over| *over) => return,
            }
            pause = (pause * 2).min(LONGEST);
        }
    }

    /// Starts the worker, and hands it its identity. The slots of a host take turns: an sshd takes few new connections at once.
    async fn start(&self, run: &Run, known: &Mutex<Known>) -> Result<(Child, ChildStdin), Failure> {
        let asked = Instant::now();
        let mut known = known.lock().await;
        if let Some((_, failure)) = known.failed.as_ref().filter(|(at, _)| *at > asked) {
            return Err(failure.clone());
        }
        let started = self.start_in_turn(run, &mut known.facts).await;
        if let Err(failure) = &started {
            known.failed = Some((Instant::now(), failure.clone()));
        }
        started
    }

    async fn start_in_turn(&self, run: &Run, facts: &mut Option<Facts>) -> Result<(Child, ChildStdin), Failure> {
        let host = &run.hosts[self.host];
        let facts = match facts {
            Some(facts) => facts,
            None => facts.insert(run.ssh.prepare(host).await?),
        };
        let url = run.url(host, facts).await?;
        let threads = host.threads.unwrap_or((facts.cores / host.slots).max(1)).to_string();
        let mine = ["--coordinator", &url, "--name", &self.name, "--threads", &threads].map(String::from);
        let mut child = run.ssh.worker(host, &[&mine, &run.options[..]].concat())?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (mut stdin, stdout) = pipes.ok_or_else(|| Failure::new("ssh has no pipes"))?;
        let mut stdout = BufReader::new(stdout.take(LINE)).lines();
        let started = async {
            while let Some(line) = stdout.next_line().await? {
                if line.trim() == STARTED {
                    return stdin.write_all(run.identity.as_bytes()).await.map(|()| true);
                }
            }
            std::io::Result::Ok(false)
        };
        match tokio::time::timeout(LIMIT, started).await {
            Ok(Ok(true)) => Ok((child, stdin)),
            Ok(_) => {
                let said = self.pass_on(child.stderr.take(), None).await;
                Err(self.ended(run, child, said).await.err().unwrap_or_else(|| Failure::new("no worker was started")))
            }
            Err(_) => Err(Failure::silent()),
        }
    }

    /// Passes on what a worker says, and shows it that its launcher lives; takes it down when the run is over.
    async fn attend(
        &self,
        run: &Run,
        mut child: Child,
        mut stdin: ChildStdin,
        over: &mut watch::Receiver<bool>,
    ) -> Result<(), Failure> {
        let mut passing = std::pin::pin!(self.pass_on(child.stderr.take(), Some(run)));
        let beats = async {
            // Who takes no more has ended, and stderr says so.
            while stdin.write_all(b"\n").await.is_ok() {
                tokio::time::sleep(handed::BEAT).await;
            }
            std::future::pending().await
        };
        let late = async {
            over.wait_for(|over| *over).await.ok();
            // Who is not in the run is told nothing.
            if run.there.borrow().workers.iter().any(|worker| *worker.name == *self.name) {
                tokio::time::sleep(GOODBYE).await;
            }
        };
        let said = tokio::select! {
            said = &mut passing => Some(said),
            () = late => None,
            () = beats => None,
        };
        drop(stdin);
        let said = match said {
            Some(said) => said,
            None => tokio::time::timeout(END, passing).await.unwrap_or_default(),
        };
        self.ended(run, child, said).await
    }

    /// Passes on the lines of stderr, where they are to be shown; gives the last one, where that may tell why it ended.
    async fn pass_on(&self, stderr: Option<ChildStderr>, shown: Option<&Run>) -> Option<String> {
        let (mut lines, mut bytes, mut last) = (BufReader::new(stderr?), Vec::new(), None);
        loop {
            bytes.clear();
            match (&mut lines).take(LINE).read_until(b'\n', &mut bytes).await {
                Ok(0) | Err(_) => return last,
                Ok(_) => {}
            }
            let line = plain(&String::from_utf8_lossy(&bytes));
            if let Some(run) = shown {
                // A closed stderr is no reason to stop training.
                progress::write(format!("{}{line}\n", run.prefix(self)).as_bytes()).ok();
            }
            if !line.trim().is_empty() {
                last = Some(line).filter(|line| !says_that_all_is_well(line));
            }
        }
    }

    /// How a worker has ended, that has said this last.
    async fn ended(&self, run: &Run, mut child: Child, said: Option<String>) -> Result<(), Failure> {
        // One that does not end by itself is killed when it is dropped.
        let status = tokio::time::timeout(END, child.wait()).await;
        let status = status
            .map_err(|_| Failure::new("ssh did not end"))
            .and_then(|s| s.map_err(|e| Failure::new(e.to_string())))?;
        if status.success() {
            return Ok(());
        }
        let said = said.map(|said| run.with_hint(&run.hosts[self.host], said.trim_start_matches("unisono: ")));
        // ssh's own status, also for a worker that was killed.
        let what =
            if status.code() == Some(255) { "the connection or the worker was lost" } else { "the worker ended" };
        let why = format!("{what} ({status})");
        Err(Failure { why: said.map_or(why.clone(), |said| format!("{why}: {said}")), last: status.code() == Some(2) })
    }
}

/// Whether a line of a worker's log is no reason for its end: what it had to warn of before is over then.
fn says_that_all_is_well(line: &str) -> bool {
    matches!(line.split_whitespace().nth(1), Some("INFO" | "DEBUG" | "TRACE"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_warns_or_fails_is_a_reason() {
        for calm in ["2026-11-28T07:00:00Z  INFO joined as worker 1 by gRPC", "2026-11-28T07:00:00Z DEBUG a step"] {
            assert!(says_that_all_is_well(calm), "{calm}");
        }
        for reason in [
            "2026-11-28T07:00:00Z  WARN the session broke off: INFO is no level here",
            "unisono: cannot read rows.csv",
            "Killed",
        ] {
            assert!(!says_that_all_is_well(reason), "{reason}");
        }
    }
}
