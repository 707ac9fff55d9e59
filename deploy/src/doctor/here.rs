//! What can be seen without anybody else.

use super::Lines;
use crate::{cert, show};
use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::{Resource, getrlimit};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use time::OffsetDateTime;
use unisono_common::data::{self, Dataset, Files};
use unisono_common::job::Job;
use unisono_common::kernels;
use unisono_proto::identity::{CERTIFICATE, Identity, KEY, Role, TOKEN};
use unisono_proto::shm::Weights;
use x509_parser::pem::Pem;

/// Memory below this is little for anything.
const LITTLE_MIB: u64 = 512;
/// A coordinator has two or three connections of each worker; a worker few.
const FILES: u64 = 4096;
/// Days before its end in which a certificate should be renewed.
const SOON: i64 = 14;

/// The machine itself.
pub fn machine(lines: &mut Lines) {
    lines.well("machine", show::machine());
    match memory_mib() {
        Some((all, free)) if free < LITTLE_MIB => {
            lines.change("memory", format!("{free} MiB of {all} are free: end other programs, or use another machine"));
        }
        Some((all, free)) => lines.well("memory", format!("{free} MiB of {all} are free")),
        None => lines.well("memory", "this system does not say"),
    }
    match kernels::isa() {
        Ok(isa) => lines.well("vectors", isa.name()),
        Err(e) => lines.change("vectors", e),
    }
    lines.well("numerics", fingerprint(&unisono_common::train::fingerprint()));
    let now = OffsetDateTime::now_utc();
    let text = format!("{} {:02}:{:02} UTC", now.date(), now.hour(), now.minute());
    // Nothing was built before that.
    match now.year() < 2025 {
        true => lines.change("clock", format!("{text}: set it, certificates are for a time")),
        false => lines.well("clock", text),
    }
    let limit = getrlimit(Resource::Nofile).maximum;
    match limit {
        Some(most) if most < FILES => {
            lines.change("open files", format!("{most} at most: raise it, as with `ulimit -Hn 65536` as root"));
        }
        Some(most) => lines.well("open files", format!("{most} at most")),
        None => lines.well("open files", "as many as there is memory for"),
    }
    if cfg!(target_os = "linux")
        && let Ok(socket) = std::net::TcpListener::bind("127.0.0.1:0")
    {
        match unisono_proto::steady(&socket) {
            Ok(control) => lines.well("tcp", format!("{control} against congestion")),
            Err(e) if !matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::NotFound) => {
                lines.well("tcp", "this system does not say");
            }
            Err(e) => lines.change(
                "tcp",
                format!(
                    "bbr pauses each connection every 10 s, and this user may not choose another ({e}): \
                     `sysctl -w net.ipv4.tcp_congestion_control=cubic` as root"
                ),
            ),
        }
    }
    match Weights::create(1024) {
        Ok(_) => lines.well("shared memory", "works"),
        Err(e) => lines.change("shared memory", format!("{e}: workers of this machine use gRPC; allow memfd_create")),
    }
}

/// The first digits of a numerics fingerprint.
pub fn fingerprint(digest: &[u8]) -> String {
    digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// Memory in all and what is free of it, of this process' group where that has less.
fn memory_mib() -> Option<(u64, u64)> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let of = |name: &str| {
        info.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let (all, free) = (of("MemTotal:")? / 1024, of("MemAvailable:")? / 1024);
    let group = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
    };
    match (group("memory.max"), group("memory.current")) {
        (Some(most), Some(used)) if most < all => Some((most, free.min(most.saturating_sub(used)))),
        _ => Some((all, free)),
    }
}

/// An identity, what it is for, and until when; `None` where it cannot be used.
pub fn identity(lines: &mut Lines, folder: &Path) -> Option<Identity> {
    let identity = match Identity::open(folder) {
        Ok(identity) => identity,
        Err(e) => {
            lines.change("credentials", e.to_string());
            return None;
        }
    };
    let mut whole = true;
    if let Some(certificate) = &identity.certificate {
        let found = certified(&certificate.chain, OffsetDateTime::now_utc());
        let found = found.with_context(|| folder.join(CERTIFICATE).display().to_string());
        whole = found.is_ok();
        lines.found("credentials", found);
    }
    if let Err(e) = unisono_coordinator::check_identity(&identity) {
        whole = false;
        lines.change("credentials", e.to_string());
    }
    if identity.token.is_some() {
        lines.well("join token", "is there; a coordinator says whether it is its own");
    }
    for secret in [KEY, TOKEN] {
        let path = folder.join(secret);
        if std::fs::metadata(&path).is_ok_and(|file| file.permissions().mode() & 0o077 != 0) {
            lines.change("credentials", format!("others can read {0}: `chmod 600 {0}`", path.display()));
        }
    }
    whole.then_some(identity)
}

/// What the first certificate of a chain says.
///
/// # Errors
/// One that is no certificate, is not valid now, or will soon not be.
fn certified(chain: &[u8], now: OffsetDateTime) -> Result<String> {
    let pem = Pem::iter_from_buffer(chain).next().context("there is no certificate in it")?;
    let pem = pem.map_err(|e| anyhow!("it is no certificate: {e}"))?;
    let certificate = pem.parse_x509().map_err(|e| anyhow!("it is no certificate: {e}"))?;
    let names = cert::names(&certificate);
    let roles = [Role::Worker, Role::Operator].into_iter().filter(|role| names.iter().any(|name| name == role.name()));
    let roles: Vec<String> = roles.map(|role| format!("{role}'s")).collect();
    let whose =
        if roles.is_empty() { format!("a coordinator's, for {}", names.join(", ")) } else { roles.join(" and ") };
    let (from, to) = (certificate.validity().not_before.to_datetime(), certificate.validity().not_after.to_datetime());
    let again = "make another with `unisono cert`, in the folder of the same CA";
    ensure!(now >= from, "it is not valid before {}: compare the clocks", from.date());
    ensure!(now < to, "it has expired on {}: {again}", to.date());
    let days = (to - now).whole_days();
    ensure!(days >= SOON, "it expires in {days} days: {again}");
    Ok(format!("{whose}, of {}, until {}", certificate.issuer(), to.date()))
}

/// The data of a job: how much there is, and digests that are the same wherever it is.
pub fn data(job: Job, name: &str) -> Result<String> {
    let ready = unisono_coordinator::prepare_unkept(job)?;
    let opened = ready.data();
    Ok(format!("of {name}: {}", described(opened)))
}

/// Samples of both sets, and their digests.
pub fn described(opened: &data::Opened) -> String {
    let set = |name: &str, set: &Dataset| {
        format!("{} for {name} (blake3:{})", show::count(set.samples(), "sample"), digest(set))
    };
    let train = set("training", &opened.train);
    opened.test.as_ref().map_or(train.clone(), |test| format!("{train}, {}", set("testing", test)))
}

/// Samples that are encoded at once.
const AT_ONCE: usize = 4096;

/// The first digits of the digest of all samples, as they would be sent.
fn digest(set: &Dataset) -> String {
    let mut hasher = blake3::Hasher::new();
    for from in (0..set.samples()).step_by(AT_ONCE) {
        let rows: Vec<usize> = (from..(from + AT_ONCE).min(set.samples())).collect();
        hasher.update(&set.select(&rows).to_bytes());
    }
    hasher.finalize().to_hex()[..16].to_string()
}

/// Opens a job's data as a worker does that may read these folders.
pub fn open(files: &Files, job: &Job) -> Result<data::Opened> {
    Ok(data::open(files, &job.data, job.seed)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::Duration;

    #[test]
    fn a_certificate_says_whose_it_is_and_how_long() {
        let certs = cert::Temporary::new(&[], 1).expect("certificates");
        let chain = |name: &str| std::fs::read(certs.identity(name).join(CERTIFICATE)).expect("a certificate");
        let now = OffsetDateTime::now_utc();
        // They are for a day: long before that they are well, and close to their end they are not.
        let soon = certified(&chain(cert::WORKER), now).unwrap_err().to_string();
        assert!(soon.contains("expires in") && soon.contains("unisono cert"), "{soon}");
        let late = certified(&chain(cert::WORKER), now + Duration::days(2)).unwrap_err().to_string();
        assert!(late.contains("has expired on"), "{late}");
        let early = certified(&chain(cert::WORKER), now - Duration::days(2)).unwrap_err().to_string();
        assert!(early.contains("not valid before"), "{early}");
        assert!(certified(b"nothing", now).is_err());
    }
}
