//! The program as it is, without additions.

use std::process::ExitCode;
use unisono::Extensions;

fn main() -> ExitCode {
    unisono::main(Extensions::default())
}
