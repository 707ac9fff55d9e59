//! The hosts file: a line for each host, as OpenMPI's.

use crate::Wrong;
use anyhow::{Context, Result, anyhow};
use std::collections::BTreeMap;
use std::path::Path;

/// Workers of one host, at most.
const SLOTS: usize = 256;

/// One line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// What ssh is given: `host` or `user@host`.
    pub target: String,
    /// Where it is said, as FILE:LINE.
    pub at: String,
    /// Worker processes.
    pub slots: usize,
    /// Compute threads of each; `None`: the host's cores, shared out among the slots.
    pub threads: Option<usize>,
    /// A unisono that is there already; `None`: this program is copied.
    pub binary: Option<String>,
}

impl Host {
    /// Its name without the user.
    pub fn name(&self) -> &str {
        self.target.rsplit_once('@').map_or(&self.target, |(_, name)| name)
    }
}

/// Reads a hosts file.
///
/// # Errors
/// What is wrong, with file and line.
pub fn read(path: &Path) -> Result<Vec<Host>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| {
            format!("cannot read the hosts file {} (a line for each host, as `node1 slots=2`)", path.display())
        })
        .map_err(Wrong)?;
    Ok(parse(&path.display().to_string(), &text).map_err(|why| Wrong(anyhow!(why)))?)
}

fn parse(file: &str, text: &str) -> Result<Vec<Host>, String> {
    let mut hosts = Vec::new();
    let mut lines: BTreeMap<String, usize> = BTreeMap::new();
    for (line, text) in text.lines().enumerate() {
        let (line, text) = (line + 1, text.split('#').next().unwrap_or_default());
        let mut words = text.split_whitespace();
        let Some(target) = words.next() else { continue };
        let at = format!("{file}:{line}");
        let host = host(target, &at, words).map_err(|why| format!("{at}: {why}"))?;
        if let Some(first) = lines.insert(host.name().into(), line) {
            return Err(format!("{at}: {} is in line {first} already: give it `slots=2` there", host.name()));
        }
        hosts.push(host);
    }
    if hosts.is_empty() {
        return Err(format!("{file} names no host: write one a line, as in `user@host slots=2 threads=4`"));
    }
    Ok(hosts)
}

fn host<'a>(target: &str, at: &str, words: impl Iterator<Item = &'a str>) -> Result<Host, String> {
    // Not an option of ssh, and nothing that a shell would take for more than a name.
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-:%+".contains(c);
    let parts: Vec<&str> = target.split('@').collect();
    if parts.len() > 2 || parts.iter().any(|part| part.is_empty() || part.starts_with('-') || !part.chars().all(plain))
    {
        return Err(format!("`{target}` is no host: write it as host or user@host, before what it has"));
    }
    let mut host = Host { target: target.into(), at: at.into(), slots: 1, threads: None, binary: None };
    let mut seen = Vec::new();
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(format!("`{word}` is no KEY=VALUE: known are slots, threads and binary"));
        };
        if seen.contains(&key) {
            return Err(format!("`{key}` is there twice"));
        }
        seen.push(key);
        let number = |most: usize| {
            let number = value.parse().ok().filter(|n| (1..=most).contains(n));
            number.ok_or_else(|| format!("`{key}` must be a number from 1 to {most}, not `{value}`"))
        };
        match key {
            "slots" => host.slots = number(SLOTS)?,
            "threads" => host.threads = Some(number(unisono_proto::MAX_THREADS as usize)?),
            "binary" if value.starts_with('/') || value.starts_with("~/") => host.binary = Some(value.into()),
            "binary" => return Err(format!("`binary` must begin with / or ~/, not be `{value}`")),
            _ => return Err(format!("unknown key `{key}`: known are slots, threads and binary")),
        }
    }
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_hosts_with_what_they_have() {
        let text =
            "# mine\n\nnode1\n  me@node2 slots=4 threads=2   # the big one\n10.0.0.7 binary=~/bin/unisono\r\nfe80::1\n";
        let hosts = parse("hosts", text).expect("they are right");
        let host = |target: &str, line: usize| Host {
            target: target.into(),
            at: format!("hosts:{line}"),
            slots: 1,
            threads: None,
            binary: None,
        };
        assert_eq!(
            hosts,
            [
                host("node1", 3),
                Host { slots: 4, threads: Some(2), ..host("me@node2", 4) },
                Host { binary: Some("~/bin/unisono".into()), ..host("10.0.0.7", 5) },
                host("fe80::1", 6),
            ]
        );
        assert_eq!(hosts[1].name(), "node2");
    }

    #[test]
    fn mistakes_are_named_with_file_and_line() {
        for (text, words) in [
            ("a\nb slots=0", "hosts:2: `slots` must be a number from 1 to 256, not `0`"),
            ("a slots=many", "hosts:1: `slots` must be a number from 1 to 256, not `many`"),
            ("a threads=99999", "hosts:1: `threads` must be a number from 1 to"),
            ("a\n\n# b\nb slot=2", "hosts:4: unknown key `slot`: known are slots, threads and binary"),
            ("a 4", "hosts:1: `4` is no KEY=VALUE: known are slots"),
            ("a slots=1 slots=2", "hosts:1: `slots` is there twice"),
            ("a\nme@a", "hosts:2: a is in line 1 already"),
            ("a binary=unisono", "hosts:1: `binary` must begin with / or ~/"),
            ("slots=2", "hosts:1: `slots=2` is no host"),
            ("-oProxyCommand=x", "hosts:1: `-oProxyCommand=x` is no host"),
            ("me@-x", "hosts:1: `me@-x` is no host"),
            ("a;b", "hosts:1: `a;b` is no host"),
            ("a@b@c", "hosts:1: `a@b@c` is no host"),
            ("@b", "hosts:1: `@b` is no host"),
            ("\n# a\n", "hosts names no host"),
        ] {
            let error = parse("hosts", text).expect_err(text);
            assert!(error.starts_with(words), "{text:?}: {error}");
        }
    }
}
