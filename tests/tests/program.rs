//! The program as one among others: its help, its pages, and what it writes where nobody reads.

use std::path::Path;
use std::process::{Command, Stdio};
use unisono_tests::{program, run};

/// `| head` and full disks: no panic; and who could have waited for the text is told that it is not there.
#[test]
fn output_that_nobody_can_read_ends_without_a_panic() {
    let dir = tempfile::tempdir().expect("a folder");
    for args in [&["completions", "bash"][..], &["cert", "certs"], &["doctor"]] {
        let into = |out: Stdio| {
            let mut command = Command::new(program());
            command.args(args).current_dir(dir.path()).stdout(out).stderr(Stdio::piped());
            let out = command.output().expect("it starts");
            (out.status.code(), String::from_utf8_lossy(&out.stderr).to_string())
        };
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let (code, error) = into(writer.into());
        let well = code == Some(0) || args[0] == "doctor" && code == Some(1);
        assert!(well && !error.contains("panicked"), "{args:?}: {error}");
        let full = || std::fs::File::options().write(true).open("/dev/full").expect("Linux has it");
        let (code, error) = into(full().into());
        assert_eq!(code, Some(1), "{args:?}: {error}");
        assert!(error.contains("cannot write to the standard output: No space left"), "{args:?}: {error}");
        // Nor can that be said everywhere.
        let mut command = Command::new(program());
        command.args(args).current_dir(dir.path()).stdout(full()).stderr(full());
        assert_eq!(command.status().expect("it starts").code(), Some(1), "{args:?}");
    }
}

/// The commands that `--help` lists.
fn commands(dir: &Path) -> Vec<String> {
    let help = run(dir, &["--help"]);
    let help = String::from_utf8_lossy(&help.stdout).to_string();
    let block = help.split("Commands:\n").nth(1).and_then(|rest| rest.split("\n\n").next()).expect("commands");
    // What goes on from the line before is further in.
    let begins = block.lines().filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let names = begins.filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(String::from).collect()
}

#[test]
fn every_command_has_an_example_a_page_and_completions() {
    let dir = tempfile::tempdir().expect("a folder");
    let commands = commands(dir.path());
    assert!(["local", "coordinator", "worker", "stop"].iter().all(|name| commands.contains(&name.to_string())));
    assert!(run(dir.path(), &["man", "pages"]).status.success());
    let page = |name: &str| std::fs::read_to_string(dir.path().join("pages").join(name)).expect("a page");
    assert!(page("unisono.1").contains("unisono\\-local(1)"), "{}", page("unisono.1"));
    let completions = run(dir.path(), &["completions", "bash"]);
    let completions = String::from_utf8_lossy(&completions.stdout);
    for command in &commands {
        let help = run(dir.path(), &[command, "--help"]);
        let help = String::from_utf8_lossy(&help.stdout);
        let example = help.split_once("Example").map(|(_, example)| example.contains(&format!("unisono {command}")));
        assert_eq!(example, Some(true), "{command} --help has no example:\n{help}");
        assert!(page(&format!("unisono-{command}.1")).contains(".SH SYNOPSIS"));
        assert!(completions.contains(&format!("unisono,{command}")), "{command} is not completed");
    }
    let version = run(dir.path(), &["--version"]);
    let version = String::from_utf8_lossy(&version.stdout).to_string();
    assert!(["commit ", "features ", "vectors "].iter().all(|word| version.contains(word)), "{version}");
}
