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

impl Step {
    /// The step after this one.
    pub fn next(self) -> Step {
        Step(self.0 + 1)
    }
}
