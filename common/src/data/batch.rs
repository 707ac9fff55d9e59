//! Batches: samples of a data set, ready to be computed on.

use super::augment::View;
use super::{Dataset, Draw, Features, Prepared, Targets};
use crate::kernels::vectorized;
use crate::rows::{First, Lookups};
use std::ops::Range;

/// A contiguous batch: inputs `(samples, features)` row-major, ids `(samples, fields)`, and targets.
#[derive(Clone, Debug)]
pub struct Batch {
    pub inputs: Vec<f32>,
    /// Of rows of sparse tables; `NO_ID` where there is none.
    pub ids: Vec<u64>,
    /// What the row of each id is multiplied by; empty where all rows count as they are.
    pub factors: Vec<f32>,
    /// Which rows they ask for, when [`Batch::look_up`] has found out.
    pub lookups: Lookups,
    /// Those rows, `(keys, width)`, when somebody has put them there.
    pub rows: Vec<f32>,
    pub targets: Targets,
    /// How much each target counts in the loss; empty where all count the same.
    pub weights: Vec<f32>,
    /// Rows: each is a sample, or one of a sample's candidates.
    pub samples: usize,
    /// Whether samples have candidates: the first of each has the target 1, the others 0.
    pub chosen: bool,
    /// Memory to draw them in.
    pub drawn: Vec<u32>,
}

/// Appends all tokens but the last, and to `next` the one behind each.
fn window<T: Copy + Into<u32>>(tokens: &[T], inputs: &mut Vec<f32>, next: &mut Vec<u32>) {
    let (_, behind) = tokens.split_at(1);
    inputs.extend(tokens[..behind.len()].iter().map(|&token| token.into() as f32));
    next.extend(behind.iter().map(|&token| token.into()));
}

/// Appends the inputs of one raw sample.
fn normalise<T: Copy + Into<f32>>(raw: &[T], prepared: &Prepared, inputs: &mut Vec<f32>) {
    let start = inputs.len();
    inputs.resize(start + raw.len(), 0.0);
    normalise_to(raw, prepared, &mut inputs[start..]);
}

/// The same of what a view of the sample shows.
fn normalise_view<T: Copy + Into<f32>>(
    raw: &[T],
    view: View,
    shape: &[usize],
    prepared: &Prepared,
    inputs: &mut Vec<f32>,
) {
    let start = inputs.len();
    inputs.resize(start + 2 * raw.len(), 0.0);
    let (out, seen) = inputs[start..].split_at_mut(raw.len());
    view.look(shape, raw, seen);
    normalise_to(seen, prepared, out);
    inputs.truncate(start + raw.len());
}

fn normalise_to<T: Copy + Into<f32>>(raw: &[T], prepared: &Prepared, out: &mut [f32]) {
    let scales = (&prepared.mean[..], &prepared.inv_std[..]);
    vectorized(
        #[inline(always)]
        || match scales {
            (&[mean], &[inv_std]) => out.iter_mut().zip(raw).for_each(|(out, &x)| *out = (x.into() - mean) * inv_std),
            (mean, inv_std) if mean.len() < raw.len() => {
                let plane = raw.len() / mean.len();
                assert_eq!(plane * mean.len(), raw.len(), "statistics of other channels");
                let planes = out.chunks_exact_mut(plane).zip(raw.chunks_exact(plane));
                for ((out, raw), (mean, inv_std)) in planes.zip(mean.iter().zip(inv_std)) {
                    out.iter_mut().zip(raw).for_each(|(out, &x)| *out = (x.into() - mean) * inv_std);
                }
            }
            (mean, inv_std) => {
                assert_eq!((mean.len(), inv_std.len()), (raw.len(), raw.len()), "statistics of other features");
                let scales = mean.iter().zip(inv_std);
                for ((out, &x), (mean, inv_std)) in out.iter_mut().zip(raw).zip(scales) {
                    *out = (x.into() - mean) * inv_std;
                }
            }
        },
    );
}

impl Batch {
    /// A batch without samples, to be filled.
    pub fn empty() -> Batch {
        let (inputs, ids, factors, drawn) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (lookups, rows, targets, weights) = (Lookups::none(), Vec::new(), Targets::Class(Vec::new()), Vec::new());
        Batch { inputs, ids, factors, lookups, rows, targets, weights, samples: 0, chosen: false, drawn }
    }

    /// Removes all samples and keeps the memory.
    pub fn clear(&mut self) {
        self.samples = 0;
        self.inputs.clear();
        self.ids.clear();
        self.factors.clear();
        self.weights.clear();
        match &mut self.targets {
            Targets::Class(t) => t.clear(),
            Targets::Value(t) => t.clear(),
            Targets::Next | Targets::Seen(_) => {}
        }
    }

    /// How many samples its `rows` are.
    pub fn samples_of(&self, rows: Range<usize>) -> usize {
        match &self.targets {
            Targets::Value(targets) if self.chosen => targets[rows].iter().filter(|target| **target == 1.0).count(),
            Targets::Class(_) | Targets::Value(_) | Targets::Next | Targets::Seen(_) => rows.len(),
        }
    }

    /// Finds out which rows its ids ask for.
    pub fn look_up(&mut self) {
        self.lookups.plan(&self.ids);
    }

    /// Room for the rows that its ids ask for, which hold anything.
    pub fn make_room(&mut self, width: usize) {
        self.rows.resize(self.lookups.keys().len() * width, 0.0);
    }

    /// Puts rows of `width` values there as they are before anybody has touched them.
    pub fn put_rows(&mut self, first: &First, width: usize) {
        self.make_room(width);
        for (key, row) in self.lookups.keys().iter().zip(self.rows.chunks_exact_mut(width.max(1))) {
            first.fill(*key, row);
        }
    }

    /// Puts the given samples, normalised, behind those that are there (`append`) or in their place.
    ///
    /// `draw` decides where an epoch's windows of tokens begin, how its pictures change, and which candidates samples have; without it
    /// samples are as they are. Allocates only until the batch has had its largest size.
    ///
    /// # Panics
    /// Where targets of another kind are there already, a row does not exist, or `prepared` has other features.
    pub fn fill(
        &mut self,
        data: &Dataset,
        prepared: &Prepared,
        rows: impl Iterator<Item = usize>,
        draw: Option<Draw<'_>>,
        append: bool,
    ) {
        if !append {
            self.clear();
        }
        let targets = data.targets.of_batch();
        if self.samples == 0 && std::mem::discriminant(&self.targets) != std::mem::discriminant(&targets) {
            self.targets = targets;
        }
        self.chosen = matches!(data.targets, Targets::Seen(_));
        let width = data.sample_len();
        let mut rows = rows.peekable();
        while let Some(row) = rows.next() {
            let stored = row * width..(row + 1) * width;
            // Samples lie anywhere: the next one comes while this one is worked on.
            if let Some(next) = rows.peek() {
                data.features.fetch(next * width..(next + 1) * width);
            }
            self.ids.extend_from_slice(data.ids.of(row));
            let mut each = 1;
            self.factors.extend_from_slice(data.ids.factors_of(row));
            self.weights.extend(data.weights.get(row));
            match (&mut self.targets, &data.targets) {
                (Targets::Class(to), Targets::Class(from)) => to.push(from[row]),
                (Targets::Value(to), Targets::Value(from)) => to.push(from[row]),
                (Targets::Class(to), Targets::Next) => {
                    let from = stored.start + prepared.shift(draw);
                    let tokens = from..from + prepared.shape[0] + 1;
                    match &data.features {
                        Features::U8(v) => window(&v[tokens], &mut self.inputs, to),
                        Features::U32(v) => window(&v[tokens], &mut self.inputs, to),
                        Features::F32(_) => panic!("tokens are whole numbers"),
                    }
                    self.samples += 1;
                    continue;
                }
                (Targets::Value(to), Targets::Seen(seen)) => {
                    prepared.candidates(data.ids.of(row), seen, draw.map(|draw| draw.of_row(row)), &mut self.drawn);
                    for item in &self.drawn {
                        self.ids.extend([data.ids.of(row)[0], prepared.item_id(*item)]);
                    }
                    each += self.drawn.len();
                    to.push(1.0);
                    to.resize(to.len() + self.drawn.len(), 0.0);
                }
                (Targets::Class(_) | Targets::Value(_) | Targets::Next | Targets::Seen(_), _) => {
                    panic!("a batch holds targets of one kind")
                }
            }
            let (view, inputs) = (draw.and_then(|draw| draw.view(row)), &mut self.inputs);
            let start = inputs.len();
            match (&data.features, view) {
                (Features::U8(v), None) => normalise(&v[stored], prepared, inputs),
                (Features::U8(v), Some(view)) => normalise_view(&v[stored], view, &data.shape, prepared, inputs),
                (Features::F32(v), None) => normalise(&v[stored], prepared, inputs),
                (Features::F32(v), Some(view)) => normalise_view(&v[stored], view, &data.shape, prepared, inputs),
                (Features::U32(v), _) => inputs.extend(v[stored].iter().map(|&token| token as f32)),
            }
            // All candidates have the sample's numbers.
            let end = inputs.len();
            (1..each).for_each(|_| inputs.extend_from_within(start..end));
            self.samples += each;
        }
    }
}
