//! The instruction set that kernels run on: chosen once, at run time.

use std::cell::Cell;
use std::sync::OnceLock;

/// Overrides the choice: one of [`Isa`]'s names.
pub const VARIABLE: &str = "UNISONO_ISA";

/// An instruction set. All of them give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors (x86-64-v4).
    Avx512,
    /// 256-bit vectors and fused multiply-adds (x86-64-v3).
    Avx2,
    /// 128-bit vectors of aarch64.
    Neon,
    /// What every machine of the target has.
    Portable,
}

impl Isa {
    /// All, widest first.
    pub const ALL: [Isa; 4] = [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// Its name, as in the environment variable.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        }
    }

    /// Those that this machine has, widest first.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.arch().is_some())
    }

    /// The proof that this machine has it.
    fn arch(self) -> Option<pulp::Arch> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => pulp::x86::V4::try_new().map(pulp::Arch::V4),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => pulp::x86::V3::try_new().map(pulp::Arch::V3),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => pulp::aarch64::Neon::try_new().map(pulp::Arch::Neon),
            Isa::Portable => Some(pulp::Arch::Scalar),
            #[allow(unreachable_patterns)] // those of other targets
            Isa::Avx512 | Isa::Avx2 | Isa::Neon => None,
        }
    }
}

/// The instruction set of this process: the widest that the machine has, or what [`VARIABLE`] says.
///
/// # Errors
/// What is wrong with the variable's value, and which values would do.
pub fn isa() -> Result<Isa, String> {
    static CHOSEN: OnceLock<Result<Isa, String>> = OnceLock::new();
    CHOSEN.get_or_init(|| choose(std::env::var_os(VARIABLE).as_ref().map(|v| v.to_string_lossy()).as_deref())).clone()
}

fn choose(wish: Option<&str>) -> Result<Isa, String> {
    let Some(wish) = wish.filter(|wish| !wish.is_empty()) else {
        return Ok(Isa::available().next().unwrap_or(Isa::Portable));
    };
    Isa::available().find(|isa| isa.name() == wish).ok_or_else(|| {
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        format!("{VARIABLE} is \"{wish}\"; this machine has {}", names.join(", "))
    })
}

thread_local! {
    static FORCED: Cell<Option<pulp::Arch>> = const { Cell::new(None) };
}

/// Runs `f` with this thread's kernels on `isa`; `None` where the machine does not have it.
pub fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> Option<R> {
    struct Restore(Option<pulp::Arch>);
    impl Drop for Restore {
        fn drop(&mut self) {
            FORCED.set(self.0);
        }
    }
    let arch = isa.arch()?;
    let _restore = Restore(FORCED.replace(Some(arch)));
    Some(f())
}

/// What kernels dispatch on. A process that did not check [`isa`] runs on the widest where the variable is wrong.
#[inline]
pub(super) fn arch() -> pulp::Arch {
    static CACHED: OnceLock<pulp::Arch> = OnceLock::new();
    let chosen = || isa().ok().and_then(Isa::arch).unwrap_or_default();
    FORCED.get().unwrap_or_else(|| *CACHED.get_or_init(chosen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_is_met_or_answered_with_what_there_is() {
        for isa in Isa::available() {
            assert_eq!(choose(Some(isa.name())), Ok(isa));
        }
        assert_eq!(choose(None), choose(Some("")));
        let error = choose(Some("mmx")).expect_err("no kernel is written for it");
        assert!(error.contains("\"mmx\"") && error.contains("portable"), "{error}");
        assert!(Isa::available().all(|isa| with_isa(isa, || FORCED.get().is_some()) == Some(true)));
        assert!(FORCED.get().is_none(), "the choice outlived its scope");
    }
}
