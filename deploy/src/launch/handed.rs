//! What a launched worker is given through its stdin: who it is, in one line, and then signs of life for as long as the run
//! lasts. So no secret is on its disk, its command line or in its environment, and it ends when its launcher is gone.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use unisono_proto::identity::{COORDINATOR_NAME, Certificate, Identity};

/// Between two signs of life.
pub const BEAT: Duration = Duration::from_secs(2);
/// So many may be missing: a connection that was cut says nothing for hours, and is not waited for.
const MISSING: u32 = 10;
/// Bytes of an identity, at most.
const MOST: u64 = 1 << 20;

/// An identity on its way, in PEM.
#[derive(Serialize, Deserialize)]
struct Handed {
    ca: String,
    certificate: String,
    key: String,
}

/// The line that hands a worker's identity over.
pub fn line(identity: &Identity) -> Result<String> {
    let text = |pem: &[u8]| String::from_utf8_lossy(pem).to_string();
    let mine = identity.certificate.as_ref().context("a worker's identity without a certificate")?;
    let handed = Handed { ca: text(&identity.ca), certificate: text(&mine.chain), key: text(&mine.key) };
    Ok(serde_json::to_string(&handed)? + "\n")
}

/// Takes the identity from stdin. From then on this process ends when stdin does, or is silent for too long.
pub fn take() -> Result<Identity> {
    let mut line = String::new();
    std::io::stdin().lock().take(MOST).read_line(&mut line).context("cannot read the identity from stdin")?;
    // The error of the parser could show a part of it.
    let handed: Option<Handed> = serde_json::from_str(&line).ok();
    let handed = handed.context("what came through stdin is no identity of `unisono launch` of this version")?;
    let heard = Arc::new(AtomicU64::new(0));
    let hears = heard.clone();
    std::thread::Builder::new().name("launcher".into()).spawn(move || {
        let mut byte = [0];
        while matches!(std::io::stdin().lock().read(&mut byte), Ok(1)) {
            hears.fetch_add(1, Ordering::Relaxed);
        }
        std::process::exit(1);
    })?;
    tokio::spawn(async move {
        let (mut last, mut missing) = (0, 0);
        // Beats are counted, not seconds: a process that was paused has missed one.
        while missing <= MISSING {
            tokio::time::sleep(BEAT).await;
            let now = heard.load(Ordering::Relaxed);
            missing = if now == last { missing + 1 } else { 0 };
            last = now;
        }
        // Without a word: who should read it is gone.
        std::process::exit(1);
    });
    Ok(Identity {
        folder: "stdin".into(),
        ca: handed.ca.into_bytes(),
        certificate: Some(Certificate { chain: handed.certificate.into_bytes(), key: handed.key.into_bytes() }),
        token: None,
        coordinator: Some(COORDINATOR_NAME),
    })
}
