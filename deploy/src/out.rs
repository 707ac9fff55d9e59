//! Standard output and standard error. Whoever stops reading (`| head`) wants no more, and ends nothing; where output cannot be
//! written otherwise, the program says so, goes on, and fails at its end.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
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
        Err(e) if e.kind() != ErrorKind::BrokenPipe && !LOST.swap(true, Ordering::Relaxed) => {
            eprintln!("unisono: cannot write to the standard output: {e}");
        }
        Ok(()) | Err(_) => {}
    }
}

/// Whether all was written that somebody wanted to read.
pub fn is_whole() -> bool {
    !LOST.load(Ordering::Relaxed)
}
