//! Layers one after another, and around them.

use super::linear::Above;
use super::{Grads, Layer, Params, Pass, RowTable, over_rows};
use crate::kernels;
use crate::layout::{Role, Tensor};
use std::cell::Cell;
use std::ops::Range;

/// `y = layers[n-1](... layers[0](x))`; tensors are named `index.name`, as PyTorch's `nn.Sequential` does
/// with the job's layers.
///
/// `saved` holds the activations between the layers, then what each layer keeps.
pub struct Sequential {
    layers: Vec<Box<dyn Layer>>,
    /// Values of a sample that enters.
    in_len: usize,
    out_shape: Vec<usize>,
    /// Trainable and running values of each layer.
    sizes: Vec<(usize, usize)>,
    /// The place of each layer in the job.
    places: Vec<usize>,
    /// The linear layer whose own gradient may wait for those of sparse tables below it, where there is one.
    above_tables: Option<usize>,
}

/// How far a chain's forward pass has come.
#[derive(Default)]
pub(crate) struct Begun {
    /// The layers that have run.
    layers: usize,
    /// Outputs of the next one that are there: its last ones.
    outputs: usize,
}

fn len(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl Sequential {
    /// Chains `layers`, of which the first takes `in_shape`.
    pub fn new(in_shape: &[usize], layers: Vec<Box<dyn Layer>>) -> Sequential {
        let out_shape = layers.last().map_or(in_shape, |l| l.out_shape()).to_vec();
        let size = |l: &dyn Layer, trainable: bool| {
            l.tensors().iter().filter(|t| (t.role == Role::Trainable) == trainable).map(Tensor::len).sum()
        };
        let sizes = layers.iter().map(|l| (size(l.as_ref(), true), size(l.as_ref(), false))).collect();
        let ends = layers.iter().scan(0, |end, l| {
            *end += l.span();
            Some(*end)
        });
        let places = ends.zip(&layers).map(|(end, l)| end - l.span()).collect();
        let mut chain = Sequential { layers, in_len: len(in_shape), out_shape, sizes, places, above_tables: None };
        let first = chain.first();
        if chain.layers.get(first).is_some_and(|layer| !layer.tables().is_empty()) {
            chain.above_tables = (first..chain.layers.len()).find(|i| chain.layers[*i].as_linear().is_some());
        }
        chain
    }

    /// Trainable and running values of all layers.
    fn size(&self) -> (usize, usize) {
        self.sizes.iter().fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1))
    }

    /// Values between the layers, a sample: the outputs of all but the last.
    fn between(&self) -> usize {
        self.layers.iter().rev().skip(1).map(|l| len(l.out_shape())).sum()
    }

    /// The widest of them.
    fn widest(&self) -> usize {
        self.layers.iter().rev().skip(1).map(|l| len(l.out_shape())).max().unwrap_or(0)
    }

    /// The first layer with parameters; nobody needs the gradient of its inputs unless somebody needs that of all.
    fn first(&self) -> usize {
        let learns = |i: &usize| self.sizes[*i] != (0, 0) || !self.layers[*i].tables().is_empty();
        (0..self.layers.len()).find(learns).unwrap_or(self.layers.len())
    }

    /// Whether a run ahead that has `begun` could go on, if there were more parameters.
    pub(crate) fn goes_on(&self, begun: &Begun) -> bool {
        let first = self.first();
        begun.layers <= first && self.layers.get(first).is_some_and(|layer| layer.as_linear().is_some())
    }

    fn inner_scratch(&self, rows: usize, segments: usize) -> usize {
        self.layers.iter().map(|l| l.scratch(rows, segments)).max().unwrap_or(0)
    }

    /// What a layer that waits keeps until it is its turn.
    fn waiting_scratch(&self, rows: usize, segments: usize) -> usize {
        let waiting = self.above_tables.and_then(|i| self.layers[i].as_linear());
        waiting.map_or(0, |linear| linear.scratch_of_halves(rows, segments))
    }

    /// [`Layer::forward`] with parameters that each layer gets when its turn comes: `params(trainable, running)` gives those
    /// at these places among all of the chain's. `None` where it gives none: then `y` is not there, but a run with the same memory
    /// may go on where this one has `begun`.
    ///
    /// A run `ahead` ends with the first layer that has parameters. If it is linear, it asks for these part by part, from the last
    /// outputs to the first: so their gradients are announced, and so they change.
    pub(crate) fn run<'p>(
        &self,
        pass: &Pass<'_>,
        mut params: impl FnMut(Range<usize>, Range<usize>) -> Option<Params<'p>>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
        begun: &mut Begun,
        ahead: bool,
    ) -> Option<()> {
        let (rows, segments) = (pass.segments.total(), pass.segments.len());
        let (mut between, mut kept) = saved.split_at_mut(self.between() * rows);
        let (mut trainable, mut running) = (0, 0);
        let mut x = x;
        let mut y = Some(y);
        for (i, (layer, &(t, r))) in self.layers.iter().zip(&self.sizes).enumerate() {
            let (first, of_running) = (trainable, running..running + r);
            (trainable, running) = (trainable + t, running + r);
            let (saved, rest) = kept.split_at_mut(layer.saved(rows, segments));
            kept = rest;
            let out: &mut [f32] = if i + 1 == self.layers.len() {
                y.take().unwrap_or_default()
            } else {
                let (out, rest) = between.split_at_mut(len(layer.out_shape()) * rows);
                between = rest;
                out
            };
            if i >= begun.layers {
                let pass = Pass { key: pass.key.with(self.places[i] as u64), ..*pass };
                match layer.as_linear() {
                    Some(linear) => {
                        while begun.outputs < linear.outputs() {
                            let missing = linear.outputs() - begun.outputs;
                            let some = if ahead { linear.last_of(missing) } else { 0..missing };
                            let mine = params(first + linear.weights_of(some.start)..trainable, of_running.clone())?;
                            let scratch = &mut scratch[..linear.scratch(rows, segments)];
                            linear.forward_of(some.clone(), &pass, mine.trainable, x, out, saved, scratch);
                            begun.outputs += some.len();
                        }
                    }
                    None if ahead && i >= self.first() => return None,
                    None => {
                        let mine = params(first..trainable, of_running)?;
                        layer.forward(&pass, mine, x, out, saved, &mut scratch[..layer.scratch(rows, segments)]);
                    }
                }
                *begun = Begun { layers: i + 1, outputs: 0 };
            }
            x = out;
            if ahead && i >= self.first() {
                return None;
            }
        }
        if let Some(y) = y {
            y.copy_from_slice(x); // no layers at all
        }
        Some(())
    }
}

impl Layer for Sequential {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut all = Vec::new();
        for (i, layer) in self.places.iter().zip(&self.layers) {
            all.extend(layer.tensors().into_iter().map(|t| Tensor { name: format!("{i}.{}", t.name), ..t }));
        }
        all
    }

    fn tables(&self) -> Vec<RowTable> {
        let mut all = Vec::new();
        for (i, layer) in self.places.iter().zip(&self.layers) {
            all.extend(layer.tables().into_iter().map(|t| RowTable { name: format!("{i}.{}", t.name), ..t }));
        }
        all
    }

    fn saved(&self, rows: usize, segments: usize) -> usize {
        self.between() * rows + self.layers.iter().map(|l| l.saved(rows, segments)).sum::<usize>()
    }

    /// Two gradients between layers, and what a layer needs, and one that waits.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        2 * self.widest() * rows + self.inner_scratch(rows, segments) + self.waiting_scratch(rows, segments)
    }

    fn multiply_adds(&self) -> u64 {
        self.layers.iter().map(|l| l.multiply_adds()).sum()
    }

    /// Of the first layer with parameters: the others' belong to the way there.
    fn input_multiply_adds(&self) -> u64 {
        self.layers.get(self.first()).map_or(0, |l| l.input_multiply_adds())
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let part = |t, r| Some(params.part(t, r));
        let begun = &mut Begun::default();
        self.run(pass, part, x, y, saved, scratch, begun, false).expect("all parameters are there");
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (rows, segments) = (pass.segments.total(), pass.segments.len());
        let (between, mut kept) = saved.split_at_mut(self.between() * rows);
        let (gradients, scratch) = scratch.split_at_mut(2 * self.widest() * rows);
        let (mut above, mut below) = gradients.split_at_mut(self.widest() * rows);
        let (scratch, mut of_waiting) = scratch.split_at_mut(self.inner_scratch(rows, segments));
        let (mut trainable, mut running) = (params.trainable, params.running);
        let Grads { trainable: mut d_trainable, running: mut d_running, rows: d_rows } = grads;
        let mut between = &*between;
        let mut dx = dx;
        let end = if dx.is_some() { 0 } else { self.first() };
        // Where rows come first, the layer above their tables waits until something else than they is announced.
        let waits = pass.finished_rows.and(self.above_tables).filter(|_| dx.is_none());
        let waiting = Cell::new(None::<Box<dyn FnOnce() + '_>>);
        let do_it = || waiting.take().map_or((), |it| it());
        let finished = |from: usize, values: &[f32]| {
            do_it();
            (pass.finished)(from, values);
        };
        // Between two linear layers goes the gradient of the lower one's sums, where the upper one can compute it. One that waits does not.
        let mut is_of_sums = false;
        for (i, (layer, &(t, r))) in self.layers.iter().zip(&self.sizes).enumerate().skip(end).rev() {
            let (rest, mine_t) = trainable.split_at(trainable.len() - t);
            trainable = rest;
            let (rest, mine_r) = running.split_at(running.len() - r);
            running = rest;
            let grad_t = d_trainable.split_off_mut(d_trainable.len() - t..).unwrap_or_default();
            let (rest, grad_r) = d_running.split_at_mut(d_running.len() - r);
            d_running = rest;
            let (rest, saved) = kept.split_at_mut(kept.len() - layer.saved(rows, segments));
            kept = rest;
            let last = i + 1 == self.layers.len();
            let out_len = len(layer.out_shape()) * rows;
            // What lies above: the last layer sees the caller's `y` and `dy`.
            let y = if last { y } else { &between[between.len() - out_len..] };
            if !last {
                between = &between[..between.len() - out_len];
            }
            let in_len = i.checked_sub(1).map_or(self.in_len, |b| len(self.layers[b].out_shape())) * rows;
            let x = if i == 0 { x } else { &between[between.len() - in_len..] };
            let dy = if last { dy } else { &above[..out_len] };
            let into = if i == end { dx.take() } else { Some(&mut below[..in_len]) };
            let (key, first) = (pass.key.with(self.places[i] as u64), pass.first + d_trainable.len());
            let mine = Params { trainable: mine_t, running: mine_r, ..params };
            let linear = layer.as_linear();
            let next = linear.filter(|_| i > end && waits != Some(i)).and_then(|_| self.layers[i - 1].as_linear());
            let through = next.and_then(|next| next.through(x, &kept[kept.len() - next.saved(rows, segments)..]));
            let from_above = Above { dy, is_of_sums };
            is_of_sums = through.is_some();
            let heard = Pass { key, first, finished: &finished, ..*pass };
            let scratch = &mut scratch[..layer.scratch(rows, segments)];
            match (linear, into) {
                (Some(linear), Some(into)) if waits == Some(i) => {
                    let (pass, scratch) = (Pass { key, first, ..*pass }, std::mem::take(&mut of_waiting));
                    waiting.set(Some(Box::new(
                        linear.backward_in_halves(pass, mine, x, y, from_above, into, grad_t, saved, scratch),
                    )));
                }
                (Some(linear), into) => {
                    linear.backward_between(&heard, mine, x, y, from_above, into, through, grad_t, saved, scratch);
                }
                (None, into) => {
                    let into_grads = Grads { trainable: grad_t, running: grad_r, rows: &mut *d_rows };
                    layer.backward(&heard, mine, x, y, dy, into, into_grads, saved, scratch);
                }
            }
            std::mem::swap(&mut above, &mut below);
        }
        do_it();
        if let Some(dx) = dx {
            dx.copy_from_slice(dy); // no layers at all
        }
    }
}

/// `y = x + body(x)`, or `shortcut(x) + body(x)` where the body's outputs have another shape (He et al., 2016, eq. 1 and 2).
///
/// The body's tensors keep their names, those of the shortcut begin with `shortcut.`. The body's come first.
pub struct Residual {
    pub body: Sequential,
    pub shortcut: Option<Sequential>,
}

impl Residual {
    fn out_len(&self) -> usize {
        len(self.body.out_shape())
    }

    /// Parameters of the body, and of the shortcut.
    fn parts<'a>(&self, params: Params<'a>) -> (Params<'a>, Params<'a>) {
        let (trainable, running) = self.body.size();
        let all = (params.trainable.len(), params.running.len());
        (params.part(0..trainable, 0..running), params.part(trainable..all.0, running..all.1))
    }
}

/// The pass of the shortcut, whose layers draw numbers of their own.
fn beside<'a>(pass: &Pass<'a>) -> Pass<'a> {
    Pass { key: pass.key.named("shortcut"), ..*pass }
}

impl Layer for Residual {
    fn out_shape(&self) -> &[usize] {
        self.body.out_shape()
    }

    fn tables(&self) -> Vec<RowTable> {
        let of_shortcut = self.shortcut.iter().flat_map(|shortcut| shortcut.tables());
        let named = of_shortcut.map(|t| RowTable { name: format!("shortcut.{}", t.name), ..t });
        self.body.tables().into_iter().chain(named).collect()
    }

    fn tensors(&self) -> Vec<Tensor> {
        let of_shortcut = self.shortcut.iter().flat_map(|shortcut| shortcut.tensors());
        let named = of_shortcut.map(|t| Tensor { name: format!("shortcut.{}", t.name), ..t });
        self.body.tensors().into_iter().chain(named).collect()
    }

    /// The body's output, then what the body keeps; then the same of the shortcut.
    fn saved(&self, rows: usize, segments: usize) -> usize {
        let of = |chain: &Sequential| rows * self.out_len() + chain.saved(rows, segments);
        of(&self.body) + self.shortcut.as_ref().map_or(0, of)
    }

    /// What one of both needs, and the gradient of the shortcut's inputs.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        let body = self.body.scratch(rows, segments);
        self.shortcut
            .as_ref()
            .map_or(body, |shortcut| rows * self.body.in_len + body.max(shortcut.scratch(rows, segments)))
    }

    fn multiply_adds(&self) -> u64 {
        self.body.multiply_adds() + self.shortcut.as_ref().map_or(0, Layer::multiply_adds)
    }

    fn input_multiply_adds(&self) -> u64 {
        self.body.input_multiply_adds() + self.shortcut.as_ref().map_or(0, Layer::input_multiply_adds)
    }

    fn forward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (rows, segments, len) = (pass.segments.total(), pass.segments.len(), self.out_len());
        let (out, saved) = saved.split_at_mut(rows * len);
        let (saved, of_shortcut) = saved.split_at_mut(self.body.saved(rows, segments));
        let (body, rest) = self.parts(params);
        let needed = self.body.scratch(rows, segments);
        self.body.forward(pass, body, x, out, saved, &mut scratch[..needed]);
        let x: &[f32] = match &self.shortcut {
            None => x,
            Some(shortcut) => {
                let (side, saved) = of_shortcut.split_at_mut(rows * len);
                let needed = shortcut.scratch(rows, segments);
                shortcut.forward(&beside(pass), rest, x, side, saved, &mut scratch[..needed]);
                side
            }
        };
        over_rows(rows, (y, len), (x, len), |first, y, x| kernels::add(y, x, &out[first * len..][..y.len()]));
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        _: &[f32],
        dy: &[f32],
        mut dx: Option<&mut [f32]>,
        grads: Grads<'_>,
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (rows, segments, len) = (pass.segments.total(), pass.segments.len(), self.out_len());
        let (out, saved) = saved.split_at_mut(rows * len);
        let (saved, of_shortcut) = saved.split_at_mut(self.body.saved(rows, segments));
        let (body, rest) = self.parts(params);
        let (trainable, running) = self.body.size();
        let (d_body, d_rest) = grads.trainable.split_at_mut(trainable);
        let (running, running_rest) = grads.running.split_at_mut(running);
        let d_rows = grads.rows;
        let (around, scratch): (&[f32], _) = match &self.shortcut {
            None => (dy, scratch),
            Some(shortcut) => {
                let (around, scratch) = scratch.split_at_mut(rows * self.body.in_len);
                let (side, saved) = of_shortcut.split_at_mut(rows * len);
                let pass = Pass { first: pass.first + trainable, ..beside(pass) };
                let wanted = dx.is_some().then_some(&mut *around);
                let needed = shortcut.scratch(rows, segments);
                let grads = Grads { trainable: d_rest, running: running_rest, rows: &mut *d_rows };
                shortcut.backward(&pass, rest, x, side, dy, wanted, grads, saved, &mut scratch[..needed]);
                (around, scratch)
            }
        };
        let of_body = Grads { trainable: d_body, running, rows: d_rows };
        let needed = self.body.scratch(rows, segments);
        self.body.backward(pass, body, x, out, dy, dx.as_deref_mut(), of_body, saved, &mut scratch[..needed]);
        if let Some(dx) = dx {
            let len = self.body.in_len;
            over_rows(rows, (dx, len), (around, len), |_, dx, around| kernels::add_into(dx, around));
        }
    }
}

/// `(channels, height, width)` to one row; the values stay where they are.
pub struct Flatten {
    pub len: [usize; 1],
}

impl Layer for Flatten {
    fn out_shape(&self) -> &[usize] {
        &self.len
    }

    fn forward(&self, pass: &Pass<'_>, _: Params<'_>, x: &[f32], y: &mut [f32], _: &mut [f32], _: &mut [f32]) {
        let [len] = self.len;
        over_rows(pass.segments.total(), (y, len), (x, len), |_, y, x| y.copy_from_slice(x));
    }

    fn backward(
        &self,
        pass: &Pass<'_>,
        _: Params<'_>,
        _: &[f32],
        _: &[f32],
        dy: &[f32],
        dx: Option<&mut [f32]>,
        _: Grads<'_>,
        _: &mut [f32],
        _: &mut [f32],
    ) {
        if let Some(dx) = dx {
            let [len] = self.len;
            over_rows(pass.segments.total(), (dx, len), (dy, len), |_, dx, dy| dx.copy_from_slice(dy));
        }
    }
}
