//! What is asked of a host, by the system's ssh and a POSIX shell there.

use super::hosts::Host;
use crate::{Wrong, progress};
use anyhow::{Context, Result, anyhow};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};

/// A host that answers nothing for so long is not waited for.
pub const LIMIT: Duration = Duration::from_secs(30);
/// What marks our lines among what a login shell may print.
const FACTS: &str = "unisono-host|";
pub const STARTED: &str = "unisono-started";

/// Nobody is asked at the keyboard, and a connection that is gone ends within 15 s.
const OPTIONS: &[&str] = &[
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oClearAllForwardings=yes",
    "-oForwardAgent=no",
];

/// Why something did not work on a host.
#[derive(Clone, Debug)]
pub struct Failure {
    pub why: String,
    /// Whether it will be the same the next time.
    pub last: bool,
}

impl Failure {
    /// Nothing came within [`LIMIT`].
    pub fn silent() -> Failure {
        Failure::new(format!(
            "no answer within {} s: is it overloaded, or does its shell wait for something?",
            LIMIT.as_secs()
        ))
    }

    pub fn new(why: impl Into<String>) -> Failure {
        Failure { why: why.into(), last: false }
    }

    fn last(why: impl Into<String>) -> Failure {
        Failure { why: why.into(), last: true }
    }
}

/// This program, as it is copied.
pub struct Program {
    file: PathBuf,
    size: u64,
    digest: String,
}

impl Program {
    /// The one that runs, also where its file was replaced meanwhile.
    pub fn this() -> Result<Program> {
        let file = if cfg!(target_os = "linux") { "/proc/self/exe".into() } else { std::env::current_exe()? };
        let mut hasher = blake3::Hasher::new();
        let size = std::fs::File::open(&file).and_then(|mut program| std::io::copy(&mut program, &mut hasher));
        let size = size.context("cannot read this program's own file")?;
        Ok(Program { file, size, digest: hasher.finalize().to_hex()[..32].to_string() })
    }

    /// The system that it is for, as `uname -sm` says it.
    fn system() -> String {
        let os = if cfg!(target_os = "linux") { "Linux" } else { std::env::consts::OS };
        format!("{os} {}", std::env::consts::ARCH)
    }
}

/// What a host says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Whether the program is there.
    there: bool,
    pub cores: usize,
    /// This machine's address, and the host's own, as its sshd sees them.
    pub ours: Option<IpAddr>,
    pub its: Option<IpAddr>,
    system: String,
}

impl Facts {
    fn parse(stdout: &str) -> Option<Facts> {
        let line = stdout.lines().find_map(|line| line.trim().strip_prefix(FACTS))?;
        let [there, cores, connection, system] = line.split('|').collect::<Vec<_>>().try_into().ok()?;
        let address = |n: usize| connection.split_whitespace().nth(n)?.parse().ok().map(|ip: IpAddr| ip.to_canonical());
        let (there, system) = (there == "yes", system.to_string());
        Some(Facts { there, cores: cores.parse().ok()?, ours: address(0), its: address(2), system })
    }
}

/// How hosts are reached.
pub struct Ssh {
    words: Vec<String>,
    program: Program,
    is_quiet: bool,
}

impl Ssh {
    /// With the program and first options of `command`; what takes long is said, unless it `is_quiet`.
    pub fn new(command: &str, is_quiet: bool) -> Result<Ssh> {
        let words: Vec<String> = command.split_whitespace().map(String::from).collect();
        if words.is_empty() {
            return Err(Wrong(anyhow!("--ssh names no program: write it as in --ssh \"ssh -p 2222\"")).into());
        }
        Ok(Ssh { words, program: Program::this()?, is_quiet })
    }

    /// Runs a shell's script on a host.
    fn run(&self, host: &Host, script: &str) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(OPTIONS).arg(&host.target).arg(format!("exec sh -c {}", quote(script)));
        // Ctrl-C is for this process alone, which ends the others when their work is done.
        command.process_group(0).kill_on_drop(true);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn spawn(&self, mut command: Command) -> Result<Child, Failure> {
        let failed =
            |e| Failure::last(format!("cannot start `{}`: {e}; is it installed? --ssh names another", self.words[0]));
        command.spawn().map_err(failed)
    }

    /// Sets the shell's variables `c`, our folder, and `u`, the program.
    fn place(&self, host: &Host) -> String {
        let cache = r#"c="${XDG_CACHE_HOME:-$HOME/.cache}/unisono""#;
        let program = match &host.binary {
            None => format!(r#""$c/{}/unisono""#, self.program.digest),
            Some(path) => match path.strip_prefix("~/") {
                Some(path) => format!(r#""$HOME"/{}"#, quote(path)),
                None => quote(path),
            },
        };
        format!("{cache}; u={program}")
    }

    /// Asks a host about itself, and copies the program where it is not there.
    pub async fn prepare(&self, host: &Host) -> Result<Facts, Failure> {
        let place = self.place(host);
        let script = format!(
            r#"{place}; p=no; if [ -x "$u" ]; then p=yes; fi; n=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 1); echo "{FACTS}$p|$n|$SSH_CONNECTION|$(uname -sm)""#
        );
        let child = self.spawn(self.run(host, &script))?;
        let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await;
        let output = output.map_err(|_| Failure::silent())?;
        let output = checked(host, output)?;
        let facts = Facts::parse(&String::from_utf8_lossy(&output.stdout));
        let facts = facts.ok_or_else(|| Failure::new("its shell does not answer: is it a POSIX system?"))?;
        match &host.binary {
            Some(path) if !facts.there => {
                return Err(Failure::last(format!(
                    "there is no program {path} there: correct `binary` in {}",
                    host.at
                )));
            }
            Some(_) => {}
            None if facts.system != Program::system() => {
                return Err(Failure::last(format!(
                    "it is {}, and this program is for {}: build unisono there, and name it in {} as binary=PATH",
                    facts.system,
                    Program::system(),
                    host.at
                )));
            }
            None if facts.there => {}
            None => self.copy(host, &place).await?,
        }
        Ok(facts)
    }

    /// Copies the program, whole or not at all. Builds that nobody has copied for a month go.
    async fn copy(&self, host: &Host, place: &str) -> Result<(), Failure> {
        let Program { file, size, digest } = &self.program;
        if !self.is_quiet {
            let line = format!("copying unisono to {} ({} MB)\n", host.name(), size.div_ceil(1_000_000));
            progress::write(line.as_bytes()).ok();
        }
        let script = format!(
            r#"{place}; d="$c/{digest}"; umask 077; mkdir -p "$d" && t=$(mktemp "$d/part.XXXXXX") || exit 1
trap 'rm -f "$t"' EXIT; trap "exit 1" HUP INT TERM; cat >"$t" || exit 1
if [ "$(wc -c <"$t")" -ne {size} ]; then echo "only a part of it came" >&2; exit 1; fi
chmod 700 "$t" && "$t" --version >/dev/null && mv -f "$t" "$u" || exit 1
find "$c" -mindepth 1 -maxdepth 1 -type d -mtime +30 -exec rm -rf {{}} + 2>/dev/null; exit 0"#
        );
        // Shells that are no POSIX ones want one line.
        let mut child = self.spawn(self.run(host, &script.replace('\n', "; ")))?;
        let mut stdin = child.stdin.take();
        let send = async {
            let mut file = tokio::fs::File::open(file).await?;
            if let Some(stdin) = &mut stdin {
                tokio::io::copy(&mut file, stdin).await?;
                stdin.shutdown().await?;
            }
            drop(stdin);
            std::io::Result::Ok(())
        };
        // Who does not take all says why.
        let (sent, output) = tokio::join!(send, child.wait_with_output());
        let failed = |e: Failure| Failure { why: format!("unisono cannot be copied there: {}", e.why), ..e };
        checked(host, output).map_err(failed)?;
        sent.map_err(|e| failed(Failure::new(e.to_string())))
    }

    /// Starts a worker with these options, which prints [`STARTED`] first.
    pub fn worker(&self, host: &Host, options: &[String]) -> Result<Child, Failure> {
        // The data are where they are here, unless the host knows better.
        let data = std::env::var("UNISONO_DATA").ok().filter(|data| !data.is_empty());
        let data = data.map(|data| format!("UNISONO_DATA=${{UNISONO_DATA:-{}}}; export UNISONO_DATA; ", quote(&data)));
        let options: Vec<String> = options.iter().map(|option| quote(option)).collect();
        let script = format!(
            r#"{}; {}echo {STARTED}; exec "$u" worker {} >/dev/null"#,
            self.place(host),
            data.unwrap_or_default(),
            options.join(" ")
        );
        self.spawn(self.run(host, &script))
    }
}

/// The output of what went well; otherwise what was said last.
fn checked(host: &Host, output: std::io::Result<Output>) -> Result<Output, Failure> {
    let output = output.map_err(|e| Failure::new(e.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = stderr.lines().map(plain).rfind(|line| !line.trim().is_empty());
    Err(Failure::new(match said {
        Some(said) => with_hint(host, &said),
        None => format!("ssh ended with {}", output.status),
    }))
}

/// What ssh says, and what to do about it.
pub fn with_hint(host: &Host, said: &str) -> String {
    let (Host { target, at, .. }, said) = (host, said.trim_end_matches('.'));
    let hint = if said.contains("Permission denied (") && !said.contains("(os error") {
        format!("let this user's key in there, as with `ssh-copy-id {target}`")
    } else if said.contains("Host key verification failed") {
        format!("connect once by hand with `ssh {target}`, and compare its key")
    } else if said.contains("Could not resolve") {
        format!("correct its name in {at}")
    } else if said.starts_with("ssh: connect") {
        format!("does `ssh {target}` work by hand? --ssh \"ssh -p PORT\" names another port")
    } else if said.contains("GLIBC") {
        format!("this program is for newer systems: build unisono there, and name it in {at} as binary=PATH")
    } else {
        return said.into();
    };
    format!("{said}: {hint}")
}

/// A line without what a terminal would take for orders.
pub fn plain(line: &str) -> String {
    line.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}

/// One word for a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_one_word_for_a_shell_whatever_is_in_it() {
        for text in ["", "plain", "two words", "it's", "'", r#"$HOME "`id`" \n ; rm & | * ~ # é"#] {
            let out = std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quote(text))]).output();
            assert_eq!(String::from_utf8_lossy(&out.expect("a shell").stdout), text);
        }
    }

    #[test]
    fn facts_are_found_among_what_a_shell_prints() {
        let facts = Facts::parse("Welcome!\nunisono-host|yes|8|10.0.0.1 5000 ::ffff:10.0.0.2 22|Linux x86_64\n");
        let system = "Linux x86_64".to_string();
        let (ours, its) = ("10.0.0.1".parse().ok(), "10.0.0.2".parse().ok());
        assert_eq!(facts, Some(Facts { there: true, cores: 8, ours, its, system: system.clone() }));
        let facts = Facts::parse("unisono-host|no|1||Linux x86_64");
        assert_eq!(facts, Some(Facts { there: false, cores: 1, ours: None, its: None, system }));
        for bad in ["", "unisono-host|", "unisono-host|yes|x||Linux", "xunisono-host|yes|1||Linux"] {
            assert_eq!(Facts::parse(bad), None, "{bad}");
        }
    }
}
