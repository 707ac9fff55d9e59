//! Where a job's files are, and which of them may be read.

use super::DataError;
use std::path::{Path, PathBuf};

/// Where files of a job are looked up.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// The folder that relative paths are below, if there is such a file (`UNISONO_DATA`).
    root: Option<PathBuf>,
    /// The folders outside of which nothing is read; `None`: the job may name any file.
    only: Option<Vec<PathBuf>>,
}

impl Files {
    /// Any file; relative paths are looked up in `UNISONO_DATA` first, then in the job file's folder.
    pub fn any() -> Files {
        let root = std::env::var_os("UNISONO_DATA").filter(|v| !v.is_empty()).map(PathBuf::from);
        Files { root, only: None }
    }

    /// The same, of files below these folders only, whatever a job says: for jobs that somebody else wrote.
    pub fn below(folders: Vec<PathBuf>) -> Files {
        Files { only: Some(folders), ..Files::any() }
    }

    #[cfg(test)]
    pub(super) fn of(root: &Path) -> Files {
        Files { root: Some(root.into()), only: None }
    }

    /// Where a file of the job is: below `root`, or else below the job file's folder.
    pub(super) fn find(&self, base: &str, path: &str) -> Result<PathBuf, DataError> {
        self.look_up(base, path, "file", Path::is_file)
    }

    /// [`Files::find`], of what `is` one.
    pub(super) fn look_up(
        &self,
        base: &str,
        path: &str,
        what: &'static str,
        is: fn(&Path) -> bool,
    ) -> Result<PathBuf, DataError> {
        let there = Path::new(base).join(path);
        // Joining an absolute path yields that path, from either folder.
        let first = self.root.as_ref().map(|root| root.join(path)).filter(|first| *first != there);
        if let Some(found) = first.iter().chain([&there]).find(|p| is(p)) {
            return self.check(found).map(|()| found.clone());
        }
        let tried = match (&first, &self.root) {
            (Some(first), _) => format!("{} and {}", first.display(), there.display()),
            (None, None) if Path::new(path).is_relative() => format!("{} (UNISONO_DATA is not set)", there.display()),
            (None, _) => there.display().to_string(),
        };
        Err(DataError::Missing { what, path: path.into(), tried })
    }

    /// Whether a path, all links followed, is below one of the folders, and not in one with an authority's certificate: where
    /// that is, there are keys.
    pub(super) fn check(&self, path: &Path) -> Result<(), DataError> {
        let Some(only) = &self.only else { return Ok(()) };
        let is_below = |path: &PathBuf| {
            only.iter().any(|folder| folder.canonicalize().is_ok_and(|folder| path.starts_with(folder)))
        };
        if let Some(whole) = path.canonicalize().ok().filter(is_below) {
            let has_keys = whole.parent().is_some_and(|folder| folder.join("ca.crt").exists());
            return if has_keys { Err(DataError::BesideKeys { path: path.display().to_string() }) } else { Ok(()) };
        }
        let whole = |folder: &PathBuf| folder.canonicalize().unwrap_or_else(|_| folder.clone()).display().to_string();
        let only = only.iter().map(whole).collect::<Vec<_>>().join(", ");
        Err(DataError::Outside { path: path.display().to_string(), only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unisono_data_is_tried_first_and_both_places_are_named() {
        let (root, base) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (files, base_name) = (Files::of(root.path()), base.path().to_str().unwrap());
        let missing = files.find(base_name, "a/b.csv").unwrap_err().to_string();
        for part in [
            root.path().join("a/b.csv").to_str().unwrap(),
            base.path().join("a/b.csv").to_str().unwrap(),
            "set UNISONO_DATA",
        ] {
            assert!(missing.contains(part), "{missing}");
        }
        std::fs::write(base.path().join("x"), "").unwrap();
        assert_eq!(files.find(base_name, "x").unwrap(), base.path().join("x"));
        std::fs::write(root.path().join("x"), "").unwrap();
        assert_eq!(files.find(base_name, "x").unwrap(), root.path().join("x"));
        let unset = Files::default();
        assert_eq!(unset.find(base_name, "x").unwrap(), base.path().join("x"));
        assert!(unset.find(base_name, "y").unwrap_err().to_string().contains("UNISONO_DATA is not set"));
        assert!(unset.find(base_name, ".").is_err(), "a folder is not a file");
        let absolute = root.path().join("nowhere");
        let missing = files.find(base_name, absolute.to_str().unwrap()).unwrap_err().to_string();
        assert!(!missing.contains(" and /"), "{missing}");
    }

    #[test]
    #[cfg(unix)]
    fn nothing_outside_the_folders_is_read_by_whatever_name() {
        let all = tempfile::tempdir().unwrap();
        let at = |path: &str| all.path().join(path);
        let (mine, base) = (at("mine"), at("elsewhere"));
        for folder in [&mine, &at("mine/deep"), &at("mine-too"), &base] {
            std::fs::create_dir(folder).unwrap();
        }
        for file in ["mine/x", "mine/deep/x", "mine-too/x", "elsewhere/x", "secret"] {
            std::fs::write(at(file), "").unwrap();
        }
        std::os::unix::fs::symlink(at("secret"), at("mine/link")).unwrap();
        std::os::unix::fs::symlink(at("mine"), at("elsewhere/in")).unwrap();
        let files = Files { root: Some(mine.clone()), only: Some(vec![at("none"), mine.clone()]) };
        let find = |path: &str| files.find(base.to_str().unwrap(), path);
        for inside in
            ["x", "deep/x", "deep/../x", mine.join("x").to_str().unwrap(), base.join("in/x").to_str().unwrap()]
        {
            assert!(find(inside).is_ok(), "{inside}: {:?}", find(inside));
        }
        std::fs::create_dir(at("mine/worker")).unwrap();
        std::fs::write(at("mine/worker/ca.crt"), "").unwrap();
        std::fs::write(at("mine/worker/token"), "").unwrap();
        let absolute = at("secret");
        for outside in ["../secret", "deep/../../secret", "link", "../mine-too/x", absolute.to_str().unwrap()] {
            let error = find(outside).unwrap_err().to_string();
            assert!(error.contains("--data-root") && error.contains(mine.to_str().unwrap()), "{outside}: {error}");
        }
        let beside_keys = find("worker/token").unwrap_err().to_string();
        assert!(beside_keys.contains("with an identity") && !beside_keys.contains("--data-root"), "{beside_keys}");
        assert!(Files { only: Some(vec![]), ..files.clone() }.find(base.to_str().unwrap(), "x").is_err());
        let anywhere = Files { only: Some(vec!["/".into()]), ..files.clone() };
        assert!(anywhere.find(base.to_str().unwrap(), "../secret").is_ok());
    }
}
