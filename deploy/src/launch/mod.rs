//! `unisono launch`: the coordinator in this process, workers on other hosts by the system's ssh.

mod handed;
mod hosts;
mod slot;
mod ssh;

use crate::progress::View;
use crate::{JobArgs, Wrong, cert, interruption, options, read_job, show};
use anyhow::{Result, anyhow};
pub use handed::take;
use hosts::Host;
use slot::{Event, Known, Slot};
use ssh::{Facts, Failure, Ssh};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinSet;
use tracing::Level;
use unisono_coordinator::{Entrance, Progress};
use unisono_proto::identity::{COORDINATOR_NAME, Identity};

/// Seconds that a worker tries to reach the coordinator before it is taken for failed.
const PATIENCE: u32 = 60;
/// Days that the certificates of a run are valid: a run is shorter.
const DAYS: u16 = 365;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  unisono launch --hosts hosts examples/mnist-mlp.toml
  unisono launch --hosts hosts job.toml --listen 0.0.0.0:7070 --ssh \"ssh -p 2222 -i key\"

The hosts file has a line for each host; all but the host may be left out:
  # worker processes, and compute threads of each [default: one process, and all cores]
  node1
  me@node2  slots=2 threads=4
  10.0.0.7  binary=/opt/unisono/bin/unisono  # is there already; otherwise this program is copied to ~/.cache/unisono")]
pub struct Args {
    /// The job file; without it, the embedded handwritten digits
    job: Option<PathBuf>,
    /// The file that names the hosts, as below
    #[arg(long, value_name = "FILE")]
    hosts: PathBuf,
    /// Address to listen on; port 0 is any free one
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:0")]
    listen: String,
    /// The name or address under which hosts reach this machine [default: where their ssh connections come from]
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// The program that reaches hosts, with first options, as in "ssh -p 2222 -i key"
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    ssh: String,
    /// Keeps the run's certificates in DIR, which is made, for `status`, `drain`, `stop`, and workers that join by hand
    #[arg(long, value_name = "DIR")]
    certs: Option<PathBuf>,
    #[command(flatten)]
    args: JobArgs,
}

/// What the workers of a run have in common.
pub struct Run {
    hosts: Vec<Host>,
    ssh: Ssh,
    listening: SocketAddr,
    advertise: Option<String>,
    /// Options of every worker.
    options: Vec<String>,
    /// What hands the identity over.
    identity: String,
    /// Whether stderr shows colours.
    colours: bool,
    /// Who is in the run.
    there: watch::Receiver<Progress>,
}

impl Run {
    /// Under which URL a host reaches the coordinator.
    async fn url(&self, host: &Host, facts: &Facts) -> Result<String, Failure> {
        let port = self.listening.port();
        let url = |ip: IpAddr| format!("https://{}", SocketAddr::new(ip, port));
        if let Some(name) = &self.advertise {
            return Ok(name.parse().map_or_else(|_| format!("https://{name}:{port}"), url));
        }
        let bound = self.listening.ip();
        if !bound.is_unspecified() {
            return Ok(url(bound));
        }
        // The host may see another machine's address, as behind a jump host.
        let reachable = |ip: &IpAddr| bound.is_ipv6() || ip.is_ipv4();
        if let Some(ours) = facts.ours.filter(reachable)
            && UdpSocket::bind((ours, 0)).await.is_ok()
        {
            return Ok(url(ours));
        }
        let named = tokio::net::lookup_host((host.name(), 9)).await.into_iter().flatten().map(|address| address.ip());
        for its in facts.its.into_iter().chain(named).filter(reachable) {
            // Which address packets to it would leave from; none is sent.
            let socket =
                UdpSocket::bind(SocketAddr::new(if its.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0)).await;
            if let Ok(socket) = socket
                && socket.connect((its, 9)).await.is_ok()
                && let Ok(ours) = socket.local_addr()
            {
                return Ok(url(ours.ip()));
            }
        }
        let how = "name it with --advertise, and listen on [::]:0 where it is of IPv6";
        Err(Failure::new(format!("it is not known by which address {} reaches this machine: {how}", host.name())))
    }

    /// What a worker said last on a host, and what to do about it.
    fn with_hint(&self, host: &Host, said: &str) -> String {
        let (name, port) = (host.name(), self.listening.port());
        let hint = match &self.advertise {
            Some(ours) => {
                format!("does {ours} (--advertise) lead from {name} to this machine, and is port {port} open there?")
            }
            None => format!(
                "is port {port} of this machine open to {name}? --listen 0.0.0.0:PORT settles it, --advertise the address"
            ),
        };
        // Nobody, or somebody else.
        let is_astray =
            ["cannot reach a coordinator", "is of another CA", "speaks no TLS"].iter().any(|way| said.contains(way));
        if is_astray { format!("{said}; {hint}") } else { ssh::with_hint(host, said) }
    }

    /// What a worker's lines begin with.
    fn prefix(&self, slot: &Slot) -> String {
        match self.colours {
            true => format!("\x1b[{}m{}|\x1b[0m ", 32 + slot.host % 5, slot.name),
            false => format!("{}| ", slot.name),
        }
    }

    /// The slots of all hosts.
    fn slots(&self) -> Vec<Slot> {
        let slots =
            self.hosts.iter().enumerate().flat_map(|(host, Host { slots, .. })| (1..=*slots).map(move |n| (host, n)));
        let slots = slots.enumerate().map(|(index, (host, n))| {
            let name = self.hosts[host].name();
            let name = if self.hosts[host].slots == 1 { name.into() } else { format!("{name}/{n}") };
            Slot { index, host, name }
        });
        slots.collect()
    }

    /// Why no host works, host by host.
    fn hopeless(&self, slots: &[(usize, String)], failed: &BTreeMap<usize, Failure>) -> anyhow::Error {
        let mut lines = String::new();
        let mut hosts: Vec<usize> = Vec::new();
        for (slot, failure) in failed {
            let (host, name) = &slots[*slot];
            if !hosts.contains(host) {
                hosts.push(*host);
                lines += &format!("\n  {name} ({}): {}", self.hosts[*host].at, failure.why);
            }
        }
        anyhow!("no host works:{lines}")
    }

    /// Keeps workers on all hosts until the run is `over`, or ends with an error where none works from the start.
    async fn supervise(
        self: Arc<Self>,
        over: watch::Receiver<bool>,
        mut progress: watch::Receiver<Progress>,
    ) -> Result<()> {
        let known: Arc<Vec<Mutex<Known>>> = Arc::new(self.hosts.iter().map(|_| Mutex::default()).collect());
        let slots = self.slots();
        let names: Vec<(usize, String)> =
            slots.iter().map(|slot| (slot.host, self.hosts[slot.host].name().into())).collect();
        let workers: Vec<String> = slots.iter().map(|slot| slot.name.clone()).collect();
        let (events, mut happens) = mpsc::unbounded_channel();
        let mut living = JoinSet::new();
        for slot in slots {
            let (run, known, events, over) = (self.clone(), known.clone(), events.clone(), over.clone());
            living.spawn(async move { slot.live(&run, &known, events, over).await });
        }
        drop(events);
        // Who has failed; a worker that is started for the first time is waited for.
        let (mut failed, mut tried) = (BTreeMap::new(), BTreeSet::new());
        // The names of those that have joined, and why others are not there.
        let (mut joined, mut why) = (BTreeSet::new(), BTreeMap::new());
        loop {
            tokio::select! {
                Ok(()) = progress.changed() => {
                    joined.extend(progress.borrow_and_update().workers.iter().map(|worker| worker.name.clone()));
                }
                event = happens.recv() => match event {
                    Some(Event::Started(slot)) => if tried.insert(slot) { failed.remove(&slot); },
                    Some(Event::Failed(slot, failure)) => {
                        why.insert(slot, failure.why.clone());
                        failed.insert(slot, failure);
                        let hopeless = failed.len() == names.len() && (joined.is_empty() || failed.values().all(|failure| failure.last));
                        if hopeless && !*over.borrow() {
                            return Err(self.hopeless(&names, &failed));
                        }
                    }
                    None => break,
                },
            }
        }
        // Nobody lives any more: all have done their part, or said why not.
        while living.join_next().await.is_some() {}
        joined.extend(progress.borrow().workers.iter().map(|worker| worker.name.clone()));
        for (slot, name) in workers.iter().enumerate().filter(|(_, name)| !joined.contains(name.as_str())) {
            let why = why.get(&slot).map_or("it was not there before the end", |why| why);
            tracing::warn!("{name} took no part: {why}");
        }
        Ok(())
    }
}

/// `unisono launch`.
pub async fn run(args: Args, started: Instant) -> Result<ExitCode> {
    let Args { job, hosts: file, listen, advertise, ssh, certs, args } = args;
    let view = View::new(&args);
    let hosts = hosts::read(&file)?;
    let job = read_job(job.as_ref(), &args.set)?;
    let (slots, partitions) = (hosts.iter().map(|host| host.slots).sum::<usize>(), job.train.partitions as usize);
    if slots > partitions {
        tracing::warn!("{slots} workers share {partitions} partitions: {} will have none", slots - partitions);
    }
    if let Some(bad) = advertise.as_ref().filter(|name| !cert::is_host(name)) {
        let hint = "the port is that of --listen";
        return Err(
            Wrong(anyhow!("--advertise is a name or an address without scheme and port, not `{bad}`: {hint}")).into()
        );
    }
    let options = options(&args, started)?;
    let ssh = Ssh::new(&ssh, args.quiet)?;
    let listener = TcpListener::bind(&listen).await.map_err(|e| {
        Wrong(anyhow!("cannot listen on {listen}: {e}; write --listen as HOST:PORT, as in 0.0.0.0:7070"))
    })?;
    let listening = listener.local_addr()?;
    let ready = unisono_coordinator::prepare(job, args.begin()).map_err(Wrong)?;
    let names = [Some(COORDINATOR_NAME.to_string()), advertise.clone()].into_iter().flatten().collect::<Vec<_>>();
    let open = |dir: PathBuf| Identity::open(&dir);
    let (coordinator, worker) = match &certs {
        Some(dir) => {
            // Whoever has copied certificates from there would be shut out.
            if dir.exists() {
                return Err(Wrong(anyhow!(
                    "--certs {0}: {0} is there already; name a folder that is not (that of an earlier run may be removed)",
                    dir.display()
                ))
                .into());
            }
            cert::make(dir, &names, DAYS)?;
            (open(dir.join(cert::COORDINATOR))?, open(dir.join(cert::WORKER))?)
        }
        // What is on the disk is gone when both are read.
        None => {
            let made = cert::Temporary::new(&names, DAYS)?;
            (open(made.identity(cert::COORDINATOR))?, open(made.identity(cert::WORKER))?)
        }
    };
    if !args.quiet {
        eprintln!("listening on https://{listening} for the workers of {}", file.display());
        if let Some(dir) = &certs {
            let (dir, port) = (dir.join(cert::OPERATOR), listening.port());
            eprintln!(
                "steer it with `unisono status --coordinator https://localhost:{port} --identity {}`",
                dir.display()
            );
        }
    }
    let mut worker_options = vec!["--identity-stdin".into(), "--data-root".into(), "/".into()];
    worker_options
        .extend(["--transport", args.transport.name(), "--patience", &PATIENCE.to_string()].map(String::from));
    worker_options.extend(match view.level() {
        Level::DEBUG | Level::TRACE => Some("--verbose".into()),
        Level::INFO => None,
        _ => Some("--quiet".into()),
    });
    let (progress, watching) = watch::channel(Progress::default());
    let run = Arc::new(Run {
        hosts,
        ssh,
        listening,
        advertise,
        options: worker_options,
        identity: handed::line(&worker)?,
        colours: std::io::stderr().is_terminal(),
        there: progress.subscribe(),
    });
    let entrance = Entrance::new(listener, Some(&coordinator))?;
    let (joining, there) = (progress.subscribe(), progress.subscribe());
    let shown = view.show(watching);
    let interrupted = interruption();
    let (end, over) = watch::channel(false);
    let mut workers = tokio::spawn(run.supervise(over, joining));
    let mut training =
        std::pin::pin!(unisono_coordinator::run(ready, options, entrance, progress, interrupted.clone()));
    let trained = tokio::select! {
        trained = &mut training => trained,
        ended = &mut workers => match ended? {
            Err(hopeless) => Err(hopeless),
            // Workers may hear first that the run is over.
            Ok(()) => match tokio::time::timeout(slot::GOODBYE, &mut training).await {
                Ok(trained) => trained,
                Err(_) => {
                    // Others may have joined by hand.
                    if there.borrow().workers.is_empty() {
                        tracing::warn!("no worker is there, and none comes from any host: all have left or were refused; end the run with Ctrl-C, and go on with --resume");
                    }
                    training.await
                }
            },
        },
    };
    shown.end();
    end.send_replace(true);
    if !workers.is_finished() {
        workers.await??;
    }
    let summary = trained?;
    show::summary(&summary, args.json)?;
    Ok(show::exit_code(&summary, *interrupted.borrow()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_goes_astray_is_told_of_the_address() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = dir.path().join("hosts");
        std::fs::write(&file, "me@node1\n").expect("written");
        let run = |advertise: Option<&str>| Run {
            hosts: hosts::read(&file).expect("a host"),
            ssh: Ssh::new("ssh", true).expect("a program"),
            listening: ([0, 0, 0, 0], 7070).into(),
            advertise: advertise.map(String::from),
            options: Vec::new(),
            identity: String::new(),
            colours: false,
            there: watch::channel(Progress::default()).1,
        };
        let hint = |advertise, said| {
            let run = run(advertise);
            run.with_hint(&run.hosts[0], said)
        };
        let unreachable = "cannot reach a coordinator at https://x:7070: refused";
        let told = hint(Some("x"), unreachable);
        assert!(told.starts_with(unreachable) && told.contains("x (--advertise) lead from node1"), "{told}");
        let told = hint(None, unreachable);
        assert!(told.contains("port 7070 of this machine open to node1") && told.contains("--listen"), "{told}");
        // Who was answered has found the way.
        for said in
            ["the certificate of https://x:7070 is not valid yet: compare the clocks of both machines", "Killed"]
        {
            assert_eq!(hint(Some("x"), said), said);
        }
        // A folder's permissions are not a user's.
        assert!(hint(None, "me@node1: Permission denied (publickey).").contains("`ssh-copy-id me@node1`"));
        let said = "cannot read rows.csv: Permission denied (os error 13)";
        assert_eq!(hint(None, said), said);
    }
}
