//! Standard output and standard error. Whoever stops reading (`| head`) wants no more, and ends nothing; where output cannot be
//! written otherwise, the program says so, goes on, and fails at its end.

use std::fmt::Arguments;
use std::io::{self, ErrorKind, StdoutLock, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether something is missing that somebody may have waited for.
static LOST: AtomicBool = AtomicBool::new(false);

/// In place of the standard library's, which panics where nobody reads.
macro_rules! print {
    ($($text:tt)*) => { $crate::out::write(format_args!($($text)*)) };
}

/// [`print`], and the end of the line.
macro_rules! println {
    () => { print!("\n") };
    ($($text:tt)*) => { print!("{}\n", format_args!($($text)*)) };
}

/// The same for standard error.
macro_rules! eprintln {
    ($($text:tt)*) => { $crate::out::complain(format_args!($($text)*)) };
}

/// Writes a line to standard error, where somebody reads it.
pub fn complain(text: Arguments<'_>) {
    writeln!(std::io::stderr().lock(), "{text}").ok();
}

/// Writes to standard output.
pub fn write(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe && is_whole() => eprintln!("unisono: {}", lost(e)),
        Ok(()) | Err(_) => {}
    }
}

/// Standard output for whoever ends at the first error, which says then where it was.
pub struct Out(StdoutLock<'static>);

impl Out {
    pub fn new() -> Out {
        Out(io::stdout().lock())
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(lost)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(lost)
    }
}

/// Notes that something could not be written, and names where; not where nobody reads, or it is tried again.
fn lost(e: io::Error) -> io::Error {
    if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) {
        return e;
    }
    LOST.store(true, Ordering::Relaxed);
    io::Error::new(e.kind(), format!("cannot write to the standard output: {e}"))
}

/// Whether all was written that somebody wanted to read.
pub fn is_whole() -> bool {
    !LOST.load(Ordering::Relaxed)
}
