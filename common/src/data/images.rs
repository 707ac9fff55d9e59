//! Pictures in files: a folder, in it a folder for each class, in those PNG and JPEG.

use super::bad::Bad;
use super::{DataError, Dataset, Features, Files, Raw, Scale, Targets, picture};
use crate::job;
use crate::rng::{Key, Purpose};
use rayon::prelude::*;
use std::path::{Path, PathBuf};

/// What is in a folder and not hidden, by name.
///
/// # Errors
/// A folder that cannot be read, and in it links to what may not be.
fn entries(allowed: &Files, folder: &Path) -> Result<Vec<PathBuf>, DataError> {
    let wrong = |e| DataError::read(&folder.display().to_string())(e);
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            allowed.check(&entry.path())?;
            all.push(entry.path());
        }
    }
    all.sort();
    Ok(all)
}

fn name(path: &Path) -> String {
    path.file_name().map_or(String::new(), |name| name.to_string_lossy().into())
}

/// A split's classes, by name, and their files.
fn classes(allowed: &Files, folder: &Path) -> Result<Vec<(String, Vec<PathBuf>)>, DataError> {
    let mut classes = Vec::new();
    for class in entries(allowed, folder)?.into_iter().filter(|path| path.is_dir()) {
        let files = entries(allowed, &class)?;
        if files.is_empty() {
            return Err(DataError::EmptyClass { path: class.display().to_string() });
        }
        classes.push((name(&class), files));
    }
    Ok(classes)
}

/// Decodes the files, each of a class, in their order; those that are left out are taken from `files`.
fn dataset(
    files: &mut Vec<(PathBuf, u32)>,
    [height, width]: [usize; 2],
    channels: usize,
    bad: &mut Bad,
) -> Result<Dataset, DataError> {
    let shape = vec![channels, height, width];
    let len: usize = shape.iter().product();
    let too_large = || DataError::PicturesTooLarge { pictures: files.len(), len };
    let mut pixels = Vec::new();
    let bytes = files.len().checked_mul(len).ok_or_else(too_large)?;
    pixels.try_reserve_exact(bytes).map_err(|_| too_large())?;
    pixels.resize(bytes, 0);
    let decode = |(out, (path, _)): (&mut [u8], &(PathBuf, u32))| {
        let name = || path.display().to_string();
        let bytes = std::fs::read(path).map_err(|e| DataError::read(&name())(e))?;
        picture::read(&bytes, [height, width], channels, out).map_err(|why| DataError::Picture { path: name(), why })
    };
    let done: Vec<Result<(), DataError>> = pixels.par_chunks_mut(len).zip(&files[..]).map(decode).collect();
    // The first that is wrong comes first, whichever was found first.
    let mut good = 0;
    for (i, done) in done.into_iter().enumerate() {
        match done {
            Ok(()) => {
                files.swap(good, i);
                pixels.copy_within(i * len..(i + 1) * len, good * len);
                good += 1;
            }
            Err(error) => bad.take(error)?,
        }
    }
    bad.check()?;
    files.truncate(good);
    pixels.truncate(good * len);
    let targets = Targets::Class(files.iter().map(|(_, class)| *class).collect());
    Ok(Dataset::new(shape, Features::U8(pixels), targets))
}

/// Reads both splits. The training set's folders are the classes; its pictures are in an order that the seed decides, so
/// that each of its partitions has some of every class.
pub(super) fn read(allowed: &Files, spec: &job::Images, seed: u64, on_error: job::OnError) -> Result<Raw, DataError> {
    let job::Images { base, train, test, holdout, size, channels } = spec;
    let folder = |path| allowed.look_up(base, path, "folder", Path::is_dir);
    let train_folder = folder(train)?;
    let (names, files): (Vec<String>, Vec<Vec<PathBuf>>) = classes(allowed, &train_folder)?.into_iter().unzip();
    if names.len() < 2 {
        return Err(DataError::NoClasses { path: train_folder.display().to_string(), found: names.len() });
    }
    let mut bad = Bad::new(on_error);
    let sorted: Vec<(PathBuf, u32)> =
        (0..).zip(files).flat_map(|(class, files)| files.into_iter().map(move |file| (file, class))).collect();
    let key = Key::new(seed, Purpose::Split);
    let shuffled = |sorted: &[(PathBuf, u32)]| -> Vec<(PathBuf, u32)> {
        key.named("order").permutation(sorted.len()).into_iter().map(|i| sorted[i as usize].clone()).collect()
    };
    let mut files = shuffled(&sorted);
    let mut train = dataset(&mut files, *size, *channels, &mut bad)?;
    if train.samples() == 0 {
        return Err(DataError::Empty { path: train_folder.display().to_string() });
    }
    if files.len() < sorted.len() {
        // In the order in which they would be if the others had never been there.
        files.sort();
        train = dataset(&mut shuffled(&files), *size, *channels, &mut Bad::new(job::OnError::Stop))?;
    }
    let (train, test) = match (test, holdout) {
        (Some(test), _) => {
            let mut files = Vec::new();
            for (class, paths) in classes(allowed, &folder(test)?)? {
                let Ok(at) = names.binary_search(&class) else {
                    let (path, train) = (paths[0].display().to_string(), train_folder.display().to_string());
                    return Err(DataError::OtherClass { path, class, train });
                };
                files.extend(paths.into_iter().map(|path| (path, at as u32)));
            }
            let set = dataset(&mut files, *size, *channels, &mut bad)?;
            if files.is_empty() {
                return Err(DataError::NoClasses { path: test.clone(), found: 0 });
            }
            (train, Some(set))
        }
        (None, Some(share)) => {
            let (train, test) = held_out(&train, key, *share, &train_folder)?;
            (train, Some(test))
        }
        (None, None) => (train, None),
    };
    let raw = Raw::new(train, test, Some(names), Scale { per_feature: false, unit: 1.0 / 255.0 });
    Ok(Raw { skipped: bad.skipped(), ..raw })
}

/// A share of the pictures, by hash of their pixels: equal ones are on one side.
fn held_out(all: &Dataset, key: Key, share: f64, folder: &Path) -> Result<(Dataset, Dataset), DataError> {
    let Features::U8(pixels) = &all.features else { panic!("pictures are bytes") };
    let hash = |row: usize| {
        let [first, ..] = *blake3::hash(&pixels[row * all.sample_len()..][..all.sample_len()]).as_bytes().as_chunks().0
        else {
            panic!("a hash is longer");
        };
        u64::from_le_bytes(first)
    };
    let (test, train): (Vec<usize>, Vec<usize>) =
        (0..all.samples()).partition(|&row| f64::from(key.with(hash(row)).uniform(0)) < share);
    for (rows, what) in [(&train, "learn from"), (&test, "test")] {
        if rows.is_empty() {
            return Err(DataError::Holdout { share, path: folder.display().to_string(), what });
        }
    }
    Ok((all.select(&train), all.select(&test)))
}

#[cfg(test)]
mod tests {
    use super::super::picture::tests::encoded;
    use super::*;
    use tempfile::TempDir;

    const STOP: job::OnError = job::OnError::Stop;

    fn put(folder: &TempDir, path: &str, pixel: u8) {
        let path = folder.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, encoded(png::ColorType::Grayscale, [2, 2], &[pixel; 4])).unwrap();
    }

    fn spec(folder: &TempDir) -> job::Images {
        let base = folder.path().display().to_string();
        job::Images { base, train: "train".into(), test: None, holdout: None, size: [2, 2], channels: 1 }
    }

    /// Three classes of 4, 5 and 6 pictures, each of which has its own grey.
    fn three() -> TempDir {
        let folder = TempDir::new().unwrap();
        for (class, name) in ["cat", "dog", "eel"].into_iter().enumerate() {
            for i in 0..4 + class as u8 {
                put(&folder, &format!("train/{name}/{}.png", 9 - i), 20 * class as u8 + i);
            }
        }
        folder
    }

    fn grey(set: &Dataset) -> Vec<u8> {
        let Features::U8(pixels) = &set.features else { panic!("bytes") };
        pixels.chunks_exact(4).map(|p| p[0]).collect()
    }

    #[test]
    fn folders_are_classes_and_the_seed_decides_the_order() {
        let folder = three();
        std::fs::write(folder.path().join("train/README"), "beside the classes").unwrap();
        std::fs::write(folder.path().join("train/cat/.hidden"), "not a picture").unwrap();
        let raw = read(&Files::default(), &spec(&folder), 1, STOP).unwrap();
        assert_eq!(raw.classes.as_ref().unwrap(), &["cat", "dog", "eel"]);
        assert_eq!((&raw.train.shape[..], raw.train.samples(), raw.test.is_none()), (&[1, 2, 2][..], 15, true));
        let Targets::Class(labels) = &raw.train.targets else { panic!("classes") };
        let pixels = grey(&raw.train);
        assert!(pixels.iter().zip(labels).all(|(pixel, label)| *pixel as u32 / 20 == *label));
        assert!(!labels.is_sorted());
        assert_ne!(grey(&read(&Files::default(), &spec(&folder), 2, STOP).unwrap().train), pixels);
        // The order in which a folder lists its files is that in which they were made.
        let again = TempDir::new().unwrap();
        for (class, name) in ["cat", "dog", "eel"].into_iter().enumerate().rev() {
            for i in (0..4 + class as u8).rev() {
                put(&again, &format!("train/{name}/{}.png", 9 - i), 20 * class as u8 + i);
            }
        }
        assert_eq!(grey(&read(&Files::default(), &spec(&again), 1, STOP).unwrap().train), pixels);
    }

    #[test]
    fn a_test_folder_has_the_training_sets_classes() {
        let folder = three();
        put(&folder, "test/eel/a.png", 41);
        put(&folder, "test/dog/b.png", 22);
        let spec = job::Images { test: Some("test".into()), ..spec(&folder) };
        let test = read(&Files::default(), &spec, 1, STOP).unwrap().test.unwrap();
        assert_eq!((grey(&test), test.targets), (vec![22, 41], Targets::Class(vec![1, 2])));
        put(&folder, "test/fox/c.png", 1);
        let message = read(&Files::default(), &spec, 1, STOP).err().unwrap().to_string();
        assert!(message.contains("fox") && message.contains("c.png") && message.contains("train"), "{message}");
    }

    #[test]
    fn equal_pictures_are_held_out_together() {
        let folder = three();
        for i in 0..30 {
            put(&folder, &format!("train/{}/copy{i}.png", ["cat", "dog"][i % 2]), 100 + i as u8 / 3);
        }
        let raw = read(&Files::default(), &job::Images { holdout: Some(0.4), ..spec(&folder) }, 1, STOP).unwrap();
        let (train, test) = (grey(&raw.train), grey(raw.test.as_ref().unwrap()));
        assert_eq!(train.len() + test.len(), 45);
        assert!((5..35).contains(&test.len()) && train.iter().all(|pixel| !test.contains(pixel)));
        let message = read(&Files::default(), &job::Images { holdout: Some(1e-9), ..spec(&folder) }, 1, STOP)
            .err()
            .unwrap()
            .to_string();
        assert!(message.contains("data.holdout"), "{message}");
    }

    #[test]
    fn wrong_folders_and_files_are_named() {
        let says = |folder: &TempDir, parts: &[&str]| {
            let message = read(&Files::default(), &spec(folder), 1, STOP).err().unwrap().to_string();
            parts.iter().for_each(|part| assert!(message.contains(part), "{message:?} does not say {part:?}"));
        };
        let folder = TempDir::new().unwrap();
        says(&folder, &["there is no folder `train`", "UNISONO_DATA"]);
        put(&folder, "train/a.png", 1);
        says(&folder, &["train", "0 folders", "a folder for each class"]);
        put(&folder, "train/cat/a.png", 1);
        says(&folder, &["1 folder", "a folder for each class"]);
        std::fs::create_dir(folder.path().join("train/dog")).unwrap();
        says(&folder, &["train/dog", "no pictures"]);
        put(&folder, "train/dog/a.png", 1);
        read(&Files::default(), &spec(&folder), 1, STOP).unwrap();
        // Of two that are wrong, always the same is named.
        std::fs::write(folder.path().join("train/dog/b.txt"), "a text").unwrap();
        let first = read(&Files::default(), &spec(&folder), 1, STOP).err().unwrap().to_string();
        assert!(first.contains("train/dog/b.txt") && first.contains("PNG"), "{first}");
        std::fs::create_dir(folder.path().join("train/dog/more")).unwrap();
        let named: Vec<_> =
            (0..4).map(|_| read(&Files::default(), &spec(&folder), 1, STOP).err().unwrap().to_string()).collect();
        assert!(named.windows(2).all(|w| w[0] == w[1]), "{named:?}");
    }
    #[test]
    #[cfg(unix)]
    fn links_out_of_what_may_be_read_are_not_followed() {
        let (folder, elsewhere) = (three(), three());
        let allowed = Files::below(vec![folder.path().into()]);
        assert!(read(&allowed, &spec(&folder), 1, STOP).is_ok());
        for (link, to) in [("train/dog/more.png", "train/cat/9.png"), ("train/fox", "train/cat")] {
            let link = folder.path().join(link);
            std::os::unix::fs::symlink(elsewhere.path().join(to), &link).unwrap();
            let message = read(&allowed, &spec(&folder), 1, STOP).err().unwrap().to_string();
            assert!(message.contains("--data-root") && message.contains(link.to_str().unwrap()), "{message}");
            assert!(read(&Files::default(), &spec(&folder), 1, STOP).is_ok(), "one's own job may");
            std::fs::remove_file(link).unwrap();
        }
    }

    #[test]
    fn pictures_that_are_left_out_might_as_well_not_be_there() {
        let (clean, dirty) = (three(), three());
        for folder in [&clean, &dirty] {
            put(folder, "test/eel/a.png", 41);
            put(folder, "test/dog/b.png", 22);
        }
        let bad = ["train/cat/0.png", "train/eel/z.jpg", "test/dog/a.png"];
        for path in bad {
            std::fs::write(dirty.path().join(path), "no picture").unwrap();
        }
        for (test, holdout, left_out) in [(None, None, 2), (Some("test".into()), None, 3), (None, Some(0.4), 2)] {
            let spec = |folder| job::Images { test: Option::clone(&test), holdout, ..spec(folder) };
            let skip = |most| job::OnError::Skip { most };
            let (want, got) = (
                read(&Files::default(), &spec(&clean), 1, STOP).unwrap(),
                read(&Files::default(), &spec(&dirty), 1, skip(3)).unwrap(),
            );
            assert_eq!((got.train, got.test), (want.train, want.test));
            let skipped = got.skipped.unwrap();
            let first = skipped.first.unwrap();
            assert!(skipped.samples == left_out && (first.contains("0.png") || first.contains("z.jpg")), "{first}");
            assert_eq!(want.skipped, None);
            let message = read(&Files::default(), &spec(&dirty), 1, skip(1)).err().unwrap().to_string();
            assert!(message.contains("data.max_errors = 1") && message.contains("z.jpg cannot be read"), "{message}");
        }
        let all = TempDir::new().unwrap();
        for path in ["train/cat", "train/dog"] {
            std::fs::create_dir_all(all.path().join(path)).unwrap();
            std::fs::write(all.path().join(path).join("a.png"), "no picture").unwrap();
        }
        let message =
            read(&Files::default(), &spec(&all), 1, job::OnError::Skip { most: 9 }).err().unwrap().to_string();
        assert!(message.contains("holds no samples"), "{message}");
    }
}
