//! The UCI handwritten digits (test part, 1,797 samples; CC BY 4.0), embedded: a data set that is always there.

use super::{Dataset, Features, Raw, Scale, Targets, numbered};
use crate::rng::{Key, Purpose};
use std::io::Read;

/// A line a sample: 64 pixels in `0..=16`, then the label.
static FILE: &[u8] = include_bytes!("digits.csv.gz");
const PIXELS: usize = 64;

fn all() -> Dataset {
    let mut text = String::new();
    flate2::read::GzDecoder::new(FILE).read_to_string(&mut text).expect("the embedded digits unpack");
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for line in text.lines() {
        pixels.extend(line.split(',').map(|cell| cell.parse::<u8>().expect("the embedded digits are bytes")));
        labels.extend(pixels.pop().map(u32::from));
    }
    Dataset::new(vec![PIXELS], Features::U8(pixels), Targets::Class(labels))
}

/// The digits; a fifth, chosen by hash of (seed, index), is the test set.
pub(super) fn read(seed: u64) -> Raw {
    let all = all();
    let key = Key::new(seed, Purpose::Split);
    let (test, train): (Vec<usize>, Vec<usize>) = (0..all.samples()).partition(|&i| key.below(i as u64, 5) == 0);
    let scale = Scale { per_feature: false, unit: 1.0 / 16.0 };
    Raw::new(all.select(&train), Some(all.select(&test)), Some(numbered(10)), scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_digits_are_whole() {
        let all = all();
        assert_eq!((all.samples(), all.sample_len()), (1797, 64));
        let Features::U8(pixels) = &all.features else { panic!() };
        assert_eq!((pixels.len(), pixels.iter().max()), (1797 * 64, Some(&16)));
        let Targets::Class(labels) = &all.targets else { panic!() };
        assert!((0..10).all(|c| labels.iter().filter(|l| **l == c).count() > 150) && labels.iter().all(|l| *l < 10));
    }

    #[test]
    fn about_a_fifth_is_tested_and_the_seed_decides_which() {
        let (a, b) = (read(1), read(2));
        let test = a.test.unwrap();
        assert_eq!(a.train.samples() + test.samples(), 1797);
        assert!((280..440).contains(&test.samples()), "{}", test.samples());
        assert_ne!(a.train, b.train);
        assert_eq!(a.train, read(1).train);
    }
}
