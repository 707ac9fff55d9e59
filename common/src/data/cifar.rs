//! The binary files of CIFAR-10 and CIFAR-100, gzipped or not: labels and pixels of one sample after another (Krizhevsky's
//! page).

use super::{DataError, Dataset, Features, Files, Raw, Scale, Targets, numbered, reader};
use crate::job;
use std::io::Read;

const SHAPE: [usize; 3] = [3, 32, 32];
const PIXELS: usize = 3 * 32 * 32;

/// Label bytes before a sample's pixels: CIFAR-100 has its coarse class first.
fn labels(classes: usize) -> usize {
    if classes == 100 { 2 } else { 1 }
}

fn dataset(files: &Files, base: &str, paths: &[String], classes: usize) -> Result<Dataset, DataError> {
    let (mut pixels, mut targets) = (Vec::new(), Vec::new());
    let record = labels(classes) + PIXELS;
    for path in paths {
        let found = files.find(base, path)?;
        let name = found.display().to_string();
        let mut bytes = Vec::new();
        reader(&found).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(DataError::read(&name))?;
        if bytes.is_empty() {
            return Err(DataError::Empty { path: name });
        }
        if !bytes.len().is_multiple_of(record) {
            let other = if classes == 10 { 100 } else { 10 };
            return Err(DataError::Cifar { path: name, got: bytes.len(), record, classes, other });
        }
        for (sample, bytes) in bytes.chunks_exact(record).enumerate() {
            let (labels, picture) = bytes.split_at(record - PIXELS);
            let label = labels[labels.len() - 1];
            if label as usize >= classes {
                return Err(DataError::Label { path: name, sample, label, last: (classes - 1) as u8 });
            }
            targets.push(label.into());
            pixels.extend_from_slice(picture);
        }
    }
    Ok(Dataset::new(SHAPE.into(), Features::U8(pixels), Targets::Class(targets)))
}

/// Reads both splits.
pub(super) fn read(files: &Files, spec: &job::Cifar) -> Result<Raw, DataError> {
    let job::Cifar { base, train, test, classes } = spec;
    let train = dataset(files, base, train, *classes)?;
    let test = if test.is_empty() { None } else { Some(dataset(files, base, test, *classes)?) };
    Ok(Raw::new(train, test, Some(numbered(*classes)), Scale { per_feature: false, unit: 1.0 / 255.0 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Samples with these labels, whose pixels are their number in the file and their place.
    fn file(labels: &[&[u8]]) -> Vec<u8> {
        let pixels = |i: usize| (0..PIXELS).map(move |p| (i * 50 + p % 32) as u8);
        labels.iter().enumerate().flat_map(|(i, label)| label.iter().copied().chain(pixels(i))).collect()
    }

    fn read_files(files: &[(&str, Vec<u8>)], train: &[&str], test: &[&str], classes: usize) -> Result<Raw, DataError> {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).unwrap();
        }
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        let base = folder.path().display().to_string();
        read(&Files::default(), &job::Cifar { base, train: owned(train), test: owned(test), classes })
    }

    #[test]
    fn files_follow_one_another_gzipped_or_not() {
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&file(&[&[3], &[0]])).unwrap();
        let files = [("a", file(&[&[9]])), ("b.gz", gz.finish().unwrap()), ("t", file(&[&[1]]))];
        let raw = read_files(&files, &["a", "b.gz"], &["t"], 10).unwrap();
        assert_eq!((&raw.train.shape[..], raw.train.samples()), (&[3, 32, 32][..], 3));
        assert_eq!(raw.train.targets, Targets::Class(vec![9, 3, 0]));
        let Features::U8(pixels) = &raw.train.features else { panic!("bytes") };
        assert_eq!((pixels.len(), pixels[0], pixels[31], pixels[2 * PIXELS]), (3 * PIXELS, 0, 31, 50));
        assert_eq!(raw.test.unwrap().targets, Targets::Class(vec![1]));
        assert_eq!(raw.classes.unwrap().len(), 10);
    }

    #[test]
    fn the_hundred_classes_are_the_fine_ones() {
        let raw = read_files(&[("a", file(&[&[7, 99], &[19, 0]]))], &["a"], &[], 100).unwrap();
        assert_eq!((raw.train.targets, raw.test), (Targets::Class(vec![99, 0]), None));
    }

    #[test]
    fn wrong_files_are_named() {
        let says = |bytes: Vec<u8>, classes, parts: &[&str]| {
            let message = read_files(&[("a.bin", bytes)], &["a.bin"], &[], classes).err().unwrap().to_string();
            parts.iter().for_each(|part| assert!(message.contains(part), "{message:?} does not say {part:?}"));
        };
        let good = file(&[&[1], &[2]]);
        says(good[..good.len() - 1].to_vec(), 10, &["a.bin", "6145 bytes", "3073", "copy the file again"]);
        says(good, 100, &["a.bin", "6146 bytes", "3074", "data.classes = 10"]);
        says(vec![], 10, &["a.bin", "no samples"]);
        says(file(&[&[1], &[10]]), 10, &["a.bin: sample 1 has label 10", "end at 9"]);
    }

    #[test]
    fn each_channel_has_its_own_statistics() {
        let mut bytes = file(&[&[1], &[2]]);
        bytes[1..1 + 1024].fill(200);
        let opened = read_files(&[("a", bytes.clone())], &["a"], &[], 10).unwrap().prepare(true);
        let planes = |c: usize| [&bytes[1 + c * 1024..][..1024], &bytes[3074 + c * 1024..][..1024]].concat();
        for c in 0..3 {
            let x: Vec<f64> = planes(c).into_iter().map(f64::from).collect();
            let mean = x.iter().sum::<f64>() / 2048.0;
            let deviation = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 2048.0).sqrt();
            assert!((opened.prepared.mean[c] as f64 - mean).abs() < 1e-4);
            assert!((opened.prepared.inv_std[c] as f64 * deviation - 1.0).abs() < 1e-5);
        }
        let mut batch = crate::data::Batch::empty();
        batch.fill(&opened.train, &opened.prepared, 0..2, None, false);
        for c in 0..3 {
            let x = |i: usize| &batch.inputs[(3 * i + c) * 1024..][..1024];
            let sum: f32 = x(0).iter().chain(x(1)).sum();
            let square: f32 = x(0).iter().chain(x(1)).map(|x| x * x).sum();
            assert!(sum.abs() < 0.1 && (square / 2048.0 - 1.0).abs() < 1e-3, "{sum} {square}");
        }
        opened.prepared.check().unwrap();
    }
}
