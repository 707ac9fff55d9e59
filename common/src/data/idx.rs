//! IDX files, gzipped or not: `magic, sizes, bytes`, all big-endian (LeCun's MNIST page).

use super::{DataError, Dataset, Features, Files, Raw, Scale, Targets, numbered, reader};
use crate::job::IdxPaths;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// The magic number of unsigned bytes; its lowest byte is the number of dimensions.
const BYTES: u32 = 0x0000_0800;

/// One file: the first of `sizes` counts samples.
struct Idx {
    path: String,
    sizes: Vec<usize>,
    bytes: Vec<u8>,
}

enum What {
    Images,
    Labels,
}

impl Idx {
    fn read(path: &Path, what: What) -> Result<Idx, DataError> {
        let name = path.display().to_string();
        let mut file = reader(path).map_err(DataError::read(&name))?;
        let mut word = || -> Result<u32, DataError> {
            let mut word = [0; 4];
            match file.read_exact(&mut word) {
                Ok(()) => Ok(u32::from_be_bytes(word)),
                Err(e) if e.kind() == ErrorKind::UnexpectedEof => {
                    Err(DataError::TruncatedHeader { path: name.clone() })
                }
                Err(e) => Err(DataError::read(&name)(e)),
            }
        };
        let found = word()?;
        let (allowed, what, want) = match what {
            What::Images => (2..=3, "images", "0x00000803 (or 0x00000802: rows of features)"),
            What::Labels => (1..=1, "labels", "0x00000801"),
        };
        if found & !0xff != BYTES || !allowed.contains(&(found & 0xff)) {
            return Err(DataError::Magic { path: name, found, what, want });
        }
        let sizes = (0..found & 0xff).map(|_| word()).collect::<Result<Vec<u32>, DataError>>()?;
        // Three sizes of 32 bits: their product cannot overflow, and is believed only as far as the file goes.
        let want: u128 = sizes.iter().map(|&n| n as u128).product();
        if want == 0 {
            return Err(DataError::Empty { path: name });
        }
        let mut bytes = Vec::with_capacity(want.min(1 << 20) as usize);
        let limit = want.saturating_add(1).min(u64::MAX as u128) as u64;
        match file.take(limit).read_to_end(&mut bytes) {
            Ok(_) => {}
            // A gzipped file that was cut short: what was unpacked is in `bytes`, and says more than the error.
            Err(e) if e.kind() == ErrorKind::UnexpectedEof && (bytes.len() as u128) < want => {}
            Err(e) => return Err(DataError::read(&name)(e)),
        }
        match (bytes.len() as u128).cmp(&want) {
            std::cmp::Ordering::Less => Err(DataError::Truncated { path: name, want, got: bytes.len() }),
            std::cmp::Ordering::Greater => Err(DataError::Trailing { path: name, want }),
            std::cmp::Ordering::Equal => {
                bytes.shrink_to_fit();
                Ok(Idx { path: name, sizes: sizes.into_iter().map(|n| n as usize).collect(), bytes })
            }
        }
    }
}

fn pair(files: &Files, paths: &IdxPaths) -> Result<(Idx, Idx), DataError> {
    let images = Idx::read(&files.find(&paths.base, &paths.images)?, What::Images)?;
    let labels = Idx::read(&files.find(&paths.base, &paths.labels)?, What::Labels)?;
    if images.sizes[0] != labels.sizes[0] {
        return Err(DataError::Counts {
            image_count: images.sizes[0],
            images: images.path,
            label_count: labels.sizes[0],
            labels: labels.path,
        });
    }
    Ok((images, labels))
}

fn dataset(images: Idx, labels: Idx) -> Dataset {
    let labels = Targets::Class(labels.bytes.into_iter().map(u32::from).collect());
    Dataset::new(shape(&images), Features::U8(images.bytes), labels)
}

/// Images have one channel; rows of features have no more than their length.
fn shape(images: &Idx) -> Vec<usize> {
    match images.sizes[1..] {
        [features] => vec![features],
        ref size => [&[1], size].concat(),
    }
}

/// Reads both splits; where `classes` does not, the training set's labels say how many classes there are.
pub(super) fn read(
    files: &Files,
    train: &IdxPaths,
    test: Option<&IdxPaths>,
    classes: Option<usize>,
) -> Result<Raw, DataError> {
    let (images, labels) = pair(files, train)?;
    let (sample, largest) = (0..).zip(&labels.bytes).max_by_key(|(_, label)| **label).map_or((0, 0), |(i, l)| (i, *l));
    let last = classes.map_or(largest, |classes| (classes - 1) as u8);
    if largest > last {
        return Err(DataError::Label { path: labels.path, sample, label: largest, last });
    }
    let used: std::collections::BTreeSet<u8> = labels.bytes.iter().copied().collect();
    // A few classes without a sample are possible; more are a damaged file.
    if classes.is_none() && 2 * used.len() < last as usize + 1 {
        return Err(DataError::LoneLabel { path: labels.path, sample, label: last, used: used.len() });
    }
    let train_shape = shape(&images);
    let test = match test {
        None => None,
        Some(paths) => {
            let (images, labels) = pair(files, paths)?;
            if shape(&images) != train_shape {
                return Err(DataError::TestShape { test: shape(&images), path: images.path, train: train_shape });
            }
            if let Some(sample) = labels.bytes.iter().position(|&l| l > last) {
                let label = labels.bytes[sample];
                return Err(DataError::TestLabel { path: labels.path, sample, label, last: last as usize });
            }
            Some(dataset(images, labels))
        }
    };
    let scale = Scale { per_feature: train_shape.len() == 1, unit: 1.0 / 255.0 };
    Ok(Raw::new(dataset(images, labels), test, Some(numbered(last as usize + 1)), scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tempfile::TempDir;

    fn idx(magic: u32, sizes: &[u32], bytes: &[u8]) -> Vec<u8> {
        let header = std::iter::once(&magic).chain(sizes).flat_map(|n| n.to_be_bytes());
        header.chain(bytes.iter().copied()).collect()
    }

    fn gz(bytes: &[u8]) -> Vec<u8> {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    fn images() -> Vec<u8> {
        idx(0x803, &[3, 2, 2], &[0, 1, 2, 3, 10, 11, 12, 13, 255, 254, 253, 252])
    }

    fn labels() -> Vec<u8> {
        idx(0x801, &[3], &[2, 0, 1])
    }

    /// Writes images and labels, and names them.
    fn put(dir: &TempDir, split: &str, images: &[u8], labels: &[u8]) -> IdxPaths {
        let (i, l) = (format!("{split}-images"), format!("{split}-labels"));
        std::fs::write(dir.path().join(&i), images).unwrap();
        std::fs::write(dir.path().join(&l), labels).unwrap();
        IdxPaths { base: dir.path().display().to_string(), images: i, labels: l }
    }

    fn train(images: &[u8], labels: &[u8]) -> Result<Raw, DataError> {
        let dir = TempDir::new().unwrap();
        read(&Files::default(), &put(&dir, "train", images, labels), None, None)
    }

    /// The error says all of `parts`, in one of the ways that `|` parts.
    fn says(result: Result<Raw, DataError>, parts: &[&str]) {
        let message = result.err().expect("an error").to_string();
        for part in parts {
            assert!(part.split('|').any(|p| message.contains(p)), "{message:?} does not say {part:?}");
        }
    }

    #[test]
    fn gzipped_and_plain_files_are_equal() {
        let plain = train(&images(), &labels()).unwrap();
        let packed = train(&gz(&images()), &gz(&labels())).unwrap();
        assert_eq!(plain.train, packed.train);
        assert_eq!(plain.train.shape, [1, 2, 2]);
        assert_eq!(plain.train.targets, Targets::Class(vec![2, 0, 1]));
        assert_eq!(plain.classes.unwrap(), ["0", "1", "2"]);
        assert_eq!(plain.scale.unit, 1.0 / 255.0);
        assert!(!plain.scale.per_feature);
    }

    #[test]
    fn two_dimensions_are_rows_of_features() {
        let raw = train(&idx(0x802, &[3, 2], &[1, 2, 3, 4, 5, 6]), &labels()).unwrap();
        assert_eq!((raw.train.shape, raw.scale.per_feature), (vec![2], true));
    }

    #[test]
    fn wrong_files_are_named() {
        says(train(&labels(), &images()), &["train-images", "0x00000801", "0x00000803", "swapped"]);
        says(train(&images(), &images()), &["train-labels", "labels"]);
        says(train(&idx(0x0d03, &[3, 2, 2], &[0; 48]), &labels()), &["0x00000d03"]);
        says(train(&idx(0x804, &[1, 1, 1, 1], &[0]), &labels()), &["0x00000804"]);
        says(train(b"label,pixel\n1,2\n", &labels()), &["train-images starts with"]);
        says(train(&idx(0x803, &[0, 2, 2], &[]), &labels()), &["train-images", "no samples"]);
        says(train(&images(), &idx(0x801, &[2], &[0, 1])), &["3 images", "2 labels", "train-images", "train-labels"]);
        says(train(&gz(&images())[..20], &labels()), &["train-images", "copy"]);
    }

    #[test]
    fn a_label_out_of_range_is_named() {
        let odd = idx(0x801, &[3], &[2, 200, 1]);
        says(train(&images(), &odd), &["train-labels: sample 1 has label 200", "3 different", "data.classes"]);
        let dir = TempDir::new().unwrap();
        let read = |labels: &[u8], classes| {
            read(&Files::default(), &put(&dir, "train", &images(), labels), None, Some(classes))
        };
        says(read(&odd, 10), &["train-labels: sample 1 has label 200", "end at 9", "data.classes"]);
        assert_eq!(read(&labels(), 10).unwrap().classes.unwrap().len(), 10);
        assert_eq!(read(&odd, 201).unwrap().classes.unwrap().len(), 201);
    }

    #[test]
    fn every_cut_and_every_addition_is_refused() {
        let whole = images();
        for end in 0..whole.len() {
            says(train(&whole[..end], &labels()), &["train-images ends", "copy the file again"]);
            says(train(&gz(&whole[..end]), &labels()), &["train-images ends", "copy the file again"]);
        }
        says(train(&[&whole[..], &[0]].concat(), &labels()), &["train-images goes on after the 12 bytes"]);
        says(train(&gz(&[&whole[..], &[0]].concat()), &labels()), &["train-images goes on after the 12 bytes"]);
        let packed = gz(&whole);
        for end in 2..packed.len() {
            // Even where only the checksum is missing.
            says(train(&packed[..end], &labels()), &["train-images", "copied whole|copy the file again"]);
        }
    }

    #[test]
    fn announced_sizes_take_no_memory() {
        says(
            train(&idx(0x803, &[u32::MAX; 3], &[1, 2, 3]), &labels()),
            &["79228162458924105385300197375", "3 are there"],
        );
    }

    #[test]
    fn a_test_set_that_does_not_fit_is_refused() {
        let dir = TempDir::new().unwrap();
        let paths = put(&dir, "train", &images(), &labels());
        let test = |images: &[u8], labels: &[u8]| {
            read(&Files::default(), &paths, Some(&put(&dir, "test", images, labels)), None)
        };
        assert!(test(&images(), &labels()).unwrap().test.is_some());
        says(test(&idx(0x803, &[3, 2, 1], &[0; 6]), &labels()), &["test-images", "[1, 2, 1]", "[1, 2, 2]"]);
        says(test(&images(), &idx(0x801, &[3], &[0, 3, 1])), &["test-labels: sample 1 has label 3", "end at 2"]);
    }

    #[test]
    fn mnist_has_its_known_shape() {
        let Some(root) = std::env::var_os("UNISONO_DATA") else {
            eprintln!("skipped: UNISONO_DATA is not set");
            return;
        };
        let paths = |split: &str| IdxPaths {
            base: String::new(),
            images: format!("mnist/{split}-images-idx3-ubyte.gz"),
            labels: format!("mnist/{split}-labels-idx1-ubyte.gz"),
        };
        let raw = read(&Files::of(root.as_ref()), &paths("train"), Some(&paths("t10k")), Some(10)).unwrap();
        assert_eq!((raw.train.samples(), raw.test.as_ref().unwrap().samples()), (60_000, 10_000));
        let prepared = raw.prepare(true).prepared;
        // The values that every MNIST program has: 0.1307 and 0.3081 of 255.
        assert!((prepared.mean[0] / 255.0 - 0.1307).abs() < 2e-4, "{:?}", prepared.mean);
        assert!((1.0 / prepared.inv_std[0] / 255.0 - 0.3081).abs() < 2e-4, "{:?}", prepared.inv_std);
    }
}
