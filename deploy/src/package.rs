//! What goes with the program where it is installed: shell completions, manual pages, and what it was built of.

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use std::path::Path;
use std::process::ExitCode;
use std::sync::LazyLock;
use unisono_common::kernels;

/// What `--version` says after the program's name: version, commit, features, and the vectors that this machine has.
pub fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let features = [
            ("parquet", cfg!(feature = "parquet")),
            ("parquet-zstd", cfg!(feature = "parquet-zstd")),
            ("tokenizers", cfg!(feature = "tokenizers")),
        ];
        let features: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        let features = if features.is_empty() { "none".into() } else { features.join(", ") };
        let isa = kernels::isa().map_or_else(|e| e.to_string(), |isa| isa.name().into());
        format!(
            "{}\ncommit    {}\nfeatures  {features}\nvectors   {isa}",
            env!("CARGO_PKG_VERSION"),
            env!("UNISONO_COMMIT"),
        )
    });
    &TEXT
}

/// `unisono completions`.
pub fn completions(shell: Shell) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut crate::Cli::command(), "unisono", &mut script);
    print!("{}", String::from_utf8(script)?);
    Ok(ExitCode::SUCCESS)
}

/// `unisono man`: a page for the program, and one for each command.
pub fn man(dir: &Path) -> Result<ExitCode> {
    let made = std::fs::create_dir_all(dir);
    made.with_context(|| format!("cannot make the folder {}: name one that this user may make", dir.display()))?;
    let mut all = crate::Cli::command();
    all.build();
    let pages = [("unisono".to_string(), &all)].into_iter();
    let commands = all.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    let pages = pages.chain(commands.map(|command| (format!("unisono-{}", command.get_name()), command)));
    for (name, command) in pages {
        let path = dir.join(format!("{name}.1"));
        // A page's name has no spaces.
        let page = clap_mangen::Man::new(command.clone().display_name(name));
        let write = || page.render(&mut std::fs::File::create(&path)?);
        write().with_context(|| format!("cannot write {}", path.display()))?;
    }
    println!("wrote {}; read one with `man -l {}`", dir.display(), dir.join("unisono.1").display());
    Ok(ExitCode::SUCCESS)
}
