//! Samples that cannot be read, and what the job says is done about them.

use super::DataError;
use crate::job::OnError;

/// How many of them a message shows.
const SHOWN: usize = 3;

/// Those of a data set, in the order in which they were found.
pub(super) struct Bad {
    on_error: OnError,
    count: usize,
    first: Vec<String>,
}

/// Samples that were left out because they cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    pub samples: usize,
    /// What is wrong with the first of them.
    pub first: Option<String>,
}

impl Skipped {
    /// What to tell people, where there are some.
    pub fn warning(&self) -> Option<String> {
        let first = self.first.as_ref()?;
        let (samples, s) = (self.samples, if self.samples == 1 { " was" } else { "s were" });
        Some(format!("{samples} sample{s} left out (data.on_error = \"skip\"); the first: {first}"))
    }
}

impl Bad {
    /// None yet.
    pub fn new(on_error: OnError) -> Bad {
        Bad { on_error, count: 0, first: Vec::new() }
    }

    /// Whether they are left out.
    pub fn skips(&self) -> bool {
        !self.on_error.is_stop()
    }

    /// Counts one; where the job stops at it, it is the error.
    pub fn take(&mut self, error: DataError) -> Result<(), DataError> {
        if !self.skips() {
            return Err(error);
        }
        self.count += 1;
        if self.first.len() < SHOWN {
            self.first.push(error.to_string());
        }
        Ok(())
    }

    /// An error where there are more than the job allows.
    pub fn check(&self) -> Result<(), DataError> {
        match self.on_error {
            OnError::Skip { most } if self.count > most => {
                let first = self.first.iter().map(|error| format!("\n  {error}")).collect();
                Err(DataError::TooManyBad { count: self.count, most, first })
            }
            OnError::Skip { .. } | OnError::Stop => Ok(()),
        }
    }

    /// What was left out; `None` where nothing may be.
    pub fn skipped(self) -> Option<Skipped> {
        self.skips().then(|| Skipped { samples: self.count, first: self.first.into_iter().next() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_are_shown_and_only_more_than_was_allowed_is_an_error() {
        let error = |i: usize| DataError::Empty { path: format!("file {i}") };
        let mut bad = Bad::new(OnError::Stop);
        assert!(matches!(bad.take(error(0)), Err(DataError::Empty { .. })));
        assert_eq!(bad.skipped(), None);
        for (count, most) in [(0, 0), (3, 3), (5, 4), (1, 0)] {
            let mut bad = Bad::new(OnError::Skip { most });
            (0..count).for_each(|i| bad.take(error(i)).unwrap());
            match bad.check() {
                Ok(()) => assert!(count <= most),
                Err(e) => {
                    let lines: Vec<String> = e.to_string().lines().map(String::from).collect();
                    assert!(count > most && lines.len() == 1 + count.min(SHOWN), "{lines:?}");
                    assert!(lines[0].contains(&format!("{count} of")) && lines[1].contains("file 0"), "{lines:?}");
                }
            }
            let skipped = bad.skipped().unwrap();
            assert_eq!((skipped.samples, skipped.warning().is_some()), (count, count > 0));
        }
    }
}
