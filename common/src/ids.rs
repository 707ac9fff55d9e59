//! Numbers that must not be mixed.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// One optimizer update, and so the version of the weights that it starts from (step 0 reads the initial weights).
    Step(u64)
);
id!(
    /// The membership's version; moves with every join and every loss.
    Generation(u64)
);
id!(
    /// Unique per process incarnation; never reused within a run.
    WorkerId(u64)
);

/// Weights that somebody computes with: those that a step starts from, or their average over the steps before it, which is what
/// is evaluated where there is one. In this order they follow one another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    pub step: Step,
    pub average: bool,
}

impl Version {
    /// The weights of a step.
    pub fn of(step: Step) -> Version {
        Version { step, average: false }
    }

    /// Which of two buffers they lie in, by its parity: an average lies where the weights of the next step will.
    pub fn place(self) -> u64 {
        self.step.0.wrapping_add(u64::from(self.average))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.step, if self.average { " (the average)" } else { "" })
    }
}

impl Step {
    /// The step after this one.
    pub fn next(self) -> Step {
        Step(self.0 + 1)
    }
}
