//! `unisono cert`: an authority of one's own, and identities that it signs.

use crate::Wrong;
use anyhow::{Context, Result, anyhow};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use time::{Duration, OffsetDateTime};
use unisono_proto::identity::{CA, CERTIFICATE, KEY, Role, TOKEN};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

/// The authority's key, beside its certificate.
const CA_KEY: &str = "ca.key";
/// Days that an authority is valid.
const CA_DAYS: i64 = 3650;
/// Clocks differ by so much at most.
const SKEW: Duration = Duration::hours(1);

/// Folders below the one that is asked for.
pub const COORDINATOR: &str = "coordinator";
pub const WORKER: &str = "worker";
pub const OPERATOR: &str = "operator";
const JOIN: &str = "join";

#[derive(clap::Args)]
#[command(after_help = "Example:
  unisono cert certs --host train.example.org --host 10.0.0.7
  unisono coordinator job.toml --listen 0.0.0.0:7070 --identity certs/coordinator
  unisono worker --coordinator https://train.example.org:7070 --identity certs/worker")]
pub struct Args {
    /// The folder to make, or to renew: an authority that is there signs again, and a join token stays
    #[arg(default_value = "certs")]
    dir: PathBuf,
    /// A name or address under which workers reach the coordinator, besides this machine's name and localhost; repeatable
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,
    /// Days that certificates are valid; the authority itself is for ten years
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u16).range(1..=CA_DAYS))]
    days: u16,
}

/// Writes a file; a `secret` one is for its owner only.
fn put(path: &Path, text: &str, secret: bool) -> Result<()> {
    let mode = if secret { 0o600 } else { 0o644 };
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.set_permissions(PermissionsExt::from_mode(mode))?;
        file.write_all(text.as_bytes())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

fn folder(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot make the folder {}: name one that this user may make", path.display()))
}

fn params(name: &str, hosts: &[String], now: OffsetDateTime, days: i64) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(hosts.to_vec())?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    (params.not_before, params.not_after) = (now - SKEW, now + Duration::days(days));
    Ok(params)
}

/// The authority of a folder, which is made where there is none; and its certificate.
fn authority(dir: &Path, now: OffsetDateTime) -> Result<(Issuer<'static, KeyPair>, String)> {
    let (certificate, key) = (dir.join(CA), dir.join(CA_KEY));
    if certificate.exists() || key.exists() {
        let read = |path: &Path| {
            let hint = "the authority is its certificate and its key: bring both back, or choose another folder";
            std::fs::read_to_string(path).with_context(|| format!("cannot read {} ({hint})", path.display()))
        };
        let (pem, key_pem) = (read(&certificate)?, read(&key)?);
        let key = KeyPair::from_pem(&key_pem).with_context(|| format!("{} is no key", key.display()))?;
        let public = key.public_key_raw().to_vec();
        let issuer = Issuer::from_ca_cert_pem(&pem, key);
        let issuer = issuer.with_context(|| format!("{} is no certificate", certificate.display()))?;
        if public_key(&pem).is_none_or(|its| its != public) {
            let (certificate, hint) = (certificate.display(), "bring both back, or choose another folder");
            return Err(Wrong(anyhow!("{CA_KEY} is not the key of {certificate}: {hint}")).into());
        }
        return Ok((issuer, pem));
    }
    folder(dir)?;
    let pair = KeyPair::generate()?;
    // Two authorities have two names, so that a stranger's is seen to be one.
    let id = blake3::hash(pair.public_key_raw()).to_hex();
    let mut params = params(&format!("unisono CA {}", &id[..8]), &[], now, CA_DAYS)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let pem = params.self_signed(&pair)?.pem();
    put(&key, &pair.serialize_pem(), true)?;
    put(&certificate, &pem, false)?;
    Ok((Issuer::new(params, pair), pem))
}

/// The public key in a certificate.
fn public_key(pem: &str) -> Option<Vec<u8>> {
    let pem = Pem::iter_from_buffer(pem.as_bytes()).next()?.ok()?;
    Some(pem.parse_x509().ok()?.public_key().subject_public_key.data.to_vec())
}

/// The names and addresses that a certificate is for.
pub fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let all = certificate.subject_alternative_name().ok().flatten();
    let name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_string()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)).ok().map(|address| address.to_string())
        }
        _ => None,
    };
    all.iter().flat_map(|names| &names.value.general_names).filter_map(name).collect()
}

/// [`names`] of the certificate in a folder; none where there is none.
fn names_in(folder: &Path) -> Vec<String> {
    let read = || {
        let pem = std::fs::read(folder.join(CERTIFICATE)).ok()?;
        let pem = Pem::iter_from_buffer(&pem).next()?.ok()?;
        Some(names(&pem.parse_x509().ok()?))
    };
    read().unwrap_or_default()
}

/// A new join token: 32 random bytes.
fn token() -> Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| anyhow!("this machine gives no random numbers: {e}"))?;
    Ok(blake3::Hash::from_bytes(bytes).to_hex().to_string())
}

/// This machine's name.
pub fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_string()
}

/// Whether this may be a name or an address, without scheme and port.
pub fn is_host(name: &str) -> bool {
    !name.contains([':', '/']) || name.parse::<std::net::IpAddr>().is_ok()
}

/// Makes or renews all identities of a folder, for a coordinator with these names; gives those, and when the identities end.
pub fn make(dir: &Path, hosts: &[String], days: u16) -> Result<(Vec<String>, OffsetDateTime)> {
    let now = OffsetDateTime::now_utc();
    let mut names = vec!["localhost".to_string(), "127.0.0.1".into(), "::1".into(), hostname()];
    names.extend(hosts.iter().cloned());
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    if let Some(bad) = hosts.iter().find(|name| !is_host(name)) {
        return Err(Wrong(anyhow!("--host is a name or an address without scheme and port, not `{bad}`")).into());
    }
    let role = |role: Role| vec![role.name().to_string()];
    let each = [
        (COORDINATOR, names.clone(), ExtendedKeyUsagePurpose::ServerAuth),
        (WORKER, role(Role::Worker), ExtendedKeyUsagePurpose::ClientAuth),
        (OPERATOR, role(Role::Operator), ExtendedKeyUsagePurpose::ClientAuth),
    ];
    let each = each.into_iter().map(|(name, names, usage)| {
        let mut params = params(&format!("unisono {name}"), &names, now, days.into())
            .map_err(|e| Wrong(e.context(format!("{} cannot be names in a certificate", names.join(", ")))))?;
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        Ok((name, params))
    });
    let each = each.collect::<Result<Vec<_>>>()?;
    let (issuer, ca) = authority(&dir.join("ca"), now)?;
    for (name, params) in each {
        let (to, pair) = (dir.join(name), KeyPair::generate()?);
        folder(&to)?;
        put(&to.join(CA), &ca, false)?;
        put(&to.join(KEY), &pair.serialize_pem(), true)?;
        put(&to.join(CERTIFICATE), &params.signed_by(&pair, &issuer)?.pem(), false)?;
    }
    let join = dir.join(JOIN);
    folder(&join)?;
    put(&join.join(CA), &ca, false)?;
    let secret = match std::fs::read_to_string(join.join(TOKEN)) {
        Ok(there) => there,
        Err(_) => token()? + "\n",
    };
    put(&join.join(TOKEN), &secret, true)?;
    put(&dir.join(COORDINATOR).join(TOKEN), &secret, true)?;
    Ok((names, now + Duration::days(days.into())))
}

/// `unisono cert`.
pub fn run(args: Args) -> Result<ExitCode> {
    let before = names_in(&args.dir.join(COORDINATOR));
    let (names, end) = make(&args.dir, &args.host, args.days)?;
    let dir = args.dir.display();
    println!("{dir}/{COORDINATOR}  for the coordinator, reached as {}", names.join(", "));
    println!("{dir}/{WORKER}       for workers: copy it to each machine that computes");
    println!("{dir}/{OPERATOR}     for drain and stop (status is for any of these)");
    println!("{dir}/{JOIN}         for workers, in place of {WORKER}: a join token, no certificate");
    println!("{dir}/ca           keep {CA_KEY} to yourself; with it this command makes new ones");
    println!("valid until {}; run this command again before, with the same --host", end.date());
    let is = |name: &str, before: &str| {
        name.eq_ignore_ascii_case(before) || name.parse().is_ok_and(|a: IpAddr| a.to_string() == before)
    };
    let gone: Vec<String> = before.into_iter().filter(|before| !names.iter().any(|name| is(name, before))).collect();
    if !gone.is_empty() {
        eprintln!("not for {} any more: to keep a name, give it with --host each time", gone.join(", "));
    }
    println!();
    println!("unisono coordinator JOB --listen 0.0.0.0:7070 --identity {dir}/{COORDINATOR}");
    println!("unisono worker --coordinator https://HOST:7070 --identity {dir}/{WORKER}");
    Ok(ExitCode::SUCCESS)
}

/// Identities for one run, in a folder that goes with it.
pub struct Temporary(tempfile::TempDir);

impl Temporary {
    /// New ones, as [`make`] makes them.
    pub fn new(hosts: &[String], days: u16) -> Result<Temporary> {
        let folder = tempfile::tempdir().context("cannot make a folder for certificates")?;
        make(folder.path(), hosts, days)?;
        Ok(Temporary(folder))
    }

    /// The folder of one of them.
    pub fn identity(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
