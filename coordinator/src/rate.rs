//! How often something may happen, and be said.

use crate::lock;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Instant;

/// Log lines about those who are turned away.
const LINES: Rate = Rate { burst: 20.0, each_second: 1.0 };

/// How often something may happen.
#[derive(Clone, Copy)]
pub struct Rate {
    pub burst: f64,
    pub each_second: f64,
}

/// What is left of a rate: a bucket that fills with time.
pub struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub fn new(rate: Rate, now: Instant) -> Bucket {
        Bucket { left: rate.burst, at: now }
    }

    /// Whether it may happen once more.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let more = now.saturating_duration_since(self.at).as_secs_f64() * rate.each_second;
        (self.left, self.at) = ((self.left + more).min(rate.burst), now);
        let may = self.left >= 1.0;
        if may {
            self.left -= 1.0;
        }
        may
    }

    pub fn is_full(&self, rate: Rate, now: Instant) -> bool {
        self.left + now.saturating_duration_since(self.at).as_secs_f64() * rate.each_second >= rate.burst
    }
}

/// Says who was turned away, but not as often as somebody may want it.
pub struct Complaints(Mutex<(Bucket, u64)>);

impl Complaints {
    pub fn new() -> Complaints {
        Complaints(Mutex::new((Bucket::new(LINES, Instant::now()), 0)))
    }

    pub fn say(&self, address: SocketAddr, why: &str) {
        let mut state = lock(&self.0);
        let (bucket, silent) = &mut *state;
        if !bucket.take(LINES, Instant::now()) {
            *silent += 1;
            return;
        }
        let others = match std::mem::take(silent) {
            0 => String::new(),
            n => format!(" (and {n} others since the last such line)"),
        };
        tracing::warn!("turned away {}: {why}{others}", address.ip().to_canonical());
    }
}
