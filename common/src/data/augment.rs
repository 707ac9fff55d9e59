//! What is drawn anew in each epoch of training: how pictures differ a little, and which candidates samples have.

use super::DataError;
use super::partition::Partitions;
use crate::job::Augment;
use crate::rng::{Key, Purpose};

/// How a training set's samples are in one epoch, or a test set's in every test: a function of the seed, the epoch and a sample's
/// number in the set, so that it is the same for a worker that reads the set and for one that is sent a part of it.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// Of the epoch; `None` in a test.
    key: Option<Key>,
    /// For candidates.
    negatives: Key,
    augment: Option<Augment>,
    /// Which partition the data are that are at hand, where they are not the whole set.
    part: Option<(&'a Partitions, u32)>,
}

impl<'a> Draw<'a> {
    /// For data that are the whole set.
    pub fn new(seed: u64, epoch: u64, augment: Option<Augment>) -> Draw<'a> {
        let negatives = Key::new(seed, Purpose::Negative).named("train").with(epoch);
        Draw { key: Some(Key::new(seed, Purpose::Augment).with(epoch)), negatives, augment, part: None }
    }

    /// For a test.
    pub fn test(seed: u64) -> Draw<'a> {
        Draw { key: None, negatives: Key::new(seed, Purpose::Negative).named("test"), augment: None, part: None }
    }

    /// The same for data that are one partition.
    pub fn of_partition(self, parts: &'a Partitions, partition: u32) -> Draw<'a> {
        Draw { part: Some((parts, partition)), ..self }
    }

    /// The epoch's key, for what all samples share; `None` in a test.
    pub(super) fn key(&self) -> Option<Key> {
        self.key
    }

    /// A row's number in the whole set.
    fn number(&self, row: usize) -> u64 {
        self.part.map_or(row, |(parts, partition)| parts.sample(partition, row)) as u64
    }

    /// The key of a row's candidates, and whether they are those of a test.
    pub(super) fn of_row(&self, row: usize) -> (Key, bool) {
        (self.negatives.with(self.number(row)), self.key.is_none())
    }

    /// What becomes of the picture of a row, if anything.
    pub(super) fn view(&self, row: usize) -> Option<View> {
        let (Augment { crop, flip }, key) = (self.augment?, self.key?);
        let key = key.with(self.number(row));
        let offset = |i| key.below(i, 2 * crop as u64 + 1) as isize - crop as isize;
        Some(View { top: offset(0), left: offset(1), mirrored: flip && key.below(2, 2) == 1 })
    }
}

/// A window as large as the picture, moved over it; what it sees beyond the picture's edge is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    /// Where it begins, in pixels.
    top: isize,
    left: isize,
    /// Whether left and right change places in what it sees.
    mirrored: bool,
}

impl View {
    /// `out`: what it sees of the raw `picture`; both `shape = [channels, height, width]`.
    pub(super) fn look<T: Copy + Into<f32>>(self, shape: &[usize], picture: &[T], out: &mut [f32]) {
        let &[_, height, width] = shape else { panic!("{shape:?} is not the shape of a picture") };
        // The columns of `out` that lie on the picture.
        let from = (-self.left).clamp(0, width as isize) as usize;
        let to = (width as isize - self.left).clamp(0, width as isize) as usize;
        for (planes, picture) in out.chunks_exact_mut(height * width).zip(picture.chunks_exact(height * width)) {
            for (y, row) in planes.chunks_exact_mut(width).enumerate() {
                row.fill(0.0);
                if let Some(y) = y.checked_add_signed(self.top).filter(|y| *y < height) {
                    let seen = &picture[y * width..(y + 1) * width];
                    let seen = &seen[(self.left.max(0) as usize).min(width)..];
                    row[from..to].iter_mut().zip(seen).for_each(|(out, &x)| *out = x.into());
                }
                if self.mirrored {
                    row.reverse();
                }
            }
        }
    }
}

/// Whether samples of this shape can be augmented so.
///
/// # Errors
/// Where they are no pictures, or smaller than what is cropped.
pub(super) fn check(augment: Augment, shape: &[usize]) -> Result<(), DataError> {
    match *shape {
        [_, height, width] if augment.crop < height.min(width) => Ok(()),
        [_, height, width] => Err(DataError::Crop { crop: augment.crop, height, width }),
        _ => Err(DataError::NoPictures { shape: shape.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Batch, Dataset, Features, Raw, Scale, Targets};
    use proptest::prelude::*;

    fn pictures(samples: usize, shape: [usize; 3]) -> Dataset {
        let values = (0..samples * shape.iter().product::<usize>()).map(|i| (i * 7 % 251 + 1) as u8).collect();
        Dataset::new(shape.into(), Features::U8(values), Targets::Class((0..samples as u32).collect()))
    }

    proptest! {
        #[test]
        fn a_view_is_a_crop_of_the_padded_picture(
            shape in [1usize..4, 1usize..7, 1usize..7], top in -7isize..8, left in -7isize..8, mirrored in any::<bool>(),
        ) {
            let [channels, height, width] = shape;
            let picture: Vec<u8> = (0..channels * height * width).map(|i| i as u8 + 1).collect();
            let mut out = vec![f32::NAN; picture.len()];
            View { top, left, mirrored }.look(&shape, &picture, &mut out);
            for (i, got) in out.into_iter().enumerate() {
                let (c, y, x) = (i / (height * width), i / width % height, i % width);
                let x = if mirrored { width - 1 - x } else { x };
                let (y, x) = (y as isize + top, x as isize + left);
                let inside = (0..height as isize).contains(&y) && (0..width as isize).contains(&x);
                let want = if inside { picture[(c * height + y as usize) * width + x as usize] as f32 } else { 0.0 };
                prop_assert_eq!(got, want);
            }
        }

        #[test]
        fn a_sample_is_drawn_alike_in_the_whole_set_and_in_its_partition(
            seed in any::<u64>(), epoch in 0u64..9, partitions in 1u32..5, hashed in any::<bool>(),
        ) {
            let data = pictures(23, [2, 5, 6]);
            let Ok(parts) = Partitions::new(23, partitions, hashed.then_some(seed)) else { return Ok(()) };
            let scale = Scale { per_feature: false, unit: 1.0 };
            let prepared = Raw::new(data.clone(), None, None, scale).prepare(true).prepared;
            let draw = Draw::new(seed, epoch, Some(Augment { crop: 2, flip: true }));
            let (mut read, mut sent) = (Batch::empty(), Batch::empty());
            for p in 0..partitions {
                let rows: Vec<usize> = (0..parts.len(p)).map(|i| parts.sample(p, i)).collect();
                read.fill(&data, &prepared, rows.iter().copied(), Some(draw), true);
                let part = data.select(&rows);
                sent.fill(&part, &prepared, 0..rows.len(), Some(draw.of_partition(&parts, p)), true);
            }
            prop_assert_eq!(read.inputs, sent.inputs);
        }
    }

    #[test]
    fn every_offset_comes_in_some_epoch_and_half_of_the_pictures_are_mirrored() {
        let augment = Some(Augment { crop: 2, flip: true });
        let views: Vec<View> = (0..1000).map(|epoch| Draw::new(1, epoch, augment).view(3).unwrap()).collect();
        for offset in -2..=2 {
            let count = |of: fn(&View) -> isize| views.iter().filter(|view| of(view) == offset).count();
            assert!((150..250).contains(&count(|v| v.top)) && (150..250).contains(&count(|v| v.left)), "{offset}");
        }
        assert!((450..550).contains(&views.iter().filter(|view| view.mirrored).count()));
        let same = |draw: Draw<'_>, row| draw.view(row) == Draw::new(1, 0, augment).view(0);
        let differs = |other: Vec<bool>| other.iter().filter(|same| **same).count() < 50;
        assert!(differs((0..100).map(|seed| same(Draw::new(seed + 2, 0, augment), 0)).collect()), "the seed counts");
        assert!(differs((0..100).map(|row| same(Draw::new(1, 0, augment), row + 1)).collect()), "the sample counts");
        let crops = Draw::new(1, 0, Some(Augment { crop: 2, flip: false }));
        assert!((0..100).all(|row| !crops.view(row).unwrap().mirrored));
        assert_eq!(Draw::new(1, 0, None).view(0), None);
    }

    #[test]
    fn pictures_move_in_training_alone_and_their_padding_is_raw() {
        let data = pictures(40, [3, 4, 4]);
        let scale = Scale { per_feature: false, unit: 1.0 };
        let prepared = Raw::new(data.clone(), None, None, scale).prepare(true).prepared;
        let fill = |draw: Option<Draw<'_>>| {
            let mut batch = Batch::empty();
            batch.fill(&data, &prepared, 0..40, draw, false);
            batch.inputs
        };
        let still = fill(None);
        assert_eq!(fill(Some(Draw::new(1, 0, None))), still);
        assert_eq!(fill(Some(Draw::new(1, 0, Some(Augment { crop: 0, flip: false })))), still);
        let moved = fill(Some(Draw::new(1, 0, Some(Augment { crop: 3, flip: false }))));
        assert_ne!(moved, still);
        // No pixel is 0, so that only padding is what 0 becomes.
        for c in 0..3 {
            let padding = (0.0 - prepared.mean[c]) * prepared.inv_std[c];
            let has = |inputs: &[f32]| inputs.chunks_exact(16).skip(c).step_by(3).flatten().any(|x| *x == padding);
            assert!(has(&moved) && !has(&still));
        }
        assert_ne!(fill(Some(Draw::new(1, 1, Some(Augment { crop: 3, flip: false })))), moved, "another epoch");
    }

    #[test]
    fn what_is_no_picture_is_refused() {
        let says = |crop, shape: &[usize], part: &str| {
            let message = check(Augment { crop, flip: true }, shape).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        says(0, &[64], "[64]");
        says(4, &[3, 4, 9], "4x9");
        check(Augment { crop: 3, flip: true }, &[3, 4, 9]).unwrap();
    }
}
