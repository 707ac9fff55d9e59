//! The fully connected layer.

use super::activation::{activate_columns, deactivate, finish, keeps_slopes, through};
use super::{Blocks, Grads, Layer, Params, Pass, over_rows, rows_each, tree_spare, tree_sum};
use crate::job;
use crate::kernels::gemm::{Packed, Through, product_apart, product_through, product_with, product_with_apart};
use crate::kernels::{self, Finish, Mat, Start, column_sums, gemm};
use crate::layout::{CHUNK, Init, Kind, Role, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// `y = f(x w^T + b)`; `w`: `(outputs, inputs)`, `b`: `(outputs)`. Of a sample of shape `[positions, inputs]`, each
/// position is a row of its own.
pub struct Linear {
    pub inputs: usize,
    /// `[outputs]`, or `[positions, outputs]`.
    pub out_shape: Vec<usize>,
    pub init: Init,
    /// How the bias begins, where there is one.
    pub bias: Option<Init>,
    /// The activation `f` behind it, where there is one.
    pub activation: Option<job::Activation>,
}

/// Outputs that are computed, and then activated, together, and weights for which that is done: both stay in the second-level cache.
const GROUP: usize = 1 << 14;
const WEIGHTS: usize = 1 << 18;

impl Linear {
    pub(super) fn outputs(&self) -> usize {
        self.out_shape[self.out_shape.len() - 1]
    }

    /// Rows of a sample.
    fn positions(&self) -> usize {
        self.out_shape[..self.out_shape.len() - 1].iter().product()
    }

    fn weights(&self) -> usize {
        self.inputs * self.outputs()
    }

    /// Of so many rows of the weights' gradient.
    fn blocks(&self, rows: usize) -> Blocks {
        Blocks { rows, row_len: self.inputs, limit: 1 << 16, most: rows, extra: 0 }
    }

    /// Rows of the weights whose gradient is announced together, and whose outputs may be computed before those of others: about a
    /// chunk of them, but enough of them to be computed well, and no more than 16 times.
    fn strip(&self) -> usize {
        let rows = (CHUNK / self.inputs.max(1)).max(self.outputs().div_ceil(16)).max(96);
        rows.next_multiple_of(8 * kernels::lanes())
    }

    /// The last of the first `missing` outputs, which are computed together where others may have to wait for their weights: those
    /// whose weights come first. What is less than a strip comes last, when all wait for it.
    pub(super) fn last_of(&self, missing: usize) -> Range<usize> {
        missing.saturating_sub(self.strip())..missing
    }

    /// Where the weights of an output begin among the layer's trainable values.
    pub(super) fn weights_of(&self, output: usize) -> usize {
        output * self.inputs
    }

    /// The activation, where the product does not compute it at its end.
    fn behind(&self) -> Option<job::Activation> {
        self.activation.filter(|kind| finish(*kind).is_none())
    }

    /// `outputs` of [`Layer::forward`]; the others of `y` stay as they are. `params` holds the layer's trainable values from
    /// [`Linear::weights_of`] the first of them on.
    pub(super) fn forward_of(
        &self,
        outputs: Range<usize>,
        pass: &Pass<'_>,
        params: &[f32],
        x: &[f32],
        y: &mut [f32],
        saved: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (i, o, positions) = (self.inputs, self.outputs(), self.positions());
        let (w_oi, b_o) = params.split_at(self.weights_of(o - outputs.start));
        let w_oi = Mat::new(w_oi, outputs.len(), i);
        let start = if self.bias.is_some() { Start::Columns(&b_o[outputs.clone()]) } else { Start::Zero };
        let rows = pass.segments.total() * positions;
        let Some(activation) = self.behind() else {
            let finish = self.activation.and_then(finish).unwrap_or(Finish::Keep);
            return over_rows(rows, (y, o), (x, i), |_, y, x| {
                product_apart(&mut y[outputs.start..], o, Mat::new(x, x.len() / i, i), w_oi.t(), start, finish);
            });
        };
        // Where the weights stay at hand, a few rows at a time, whose sums are, too, when they are activated; whole tiles of 6 or of 8.
        let (each, few) = (rows_each(rows), (GROUP / outputs.len().max(1)).max(1).next_multiple_of(24));
        let packed = (few < each && i * outputs.len() <= WEIGHTS).then(|| Packed::of(w_oi.t(), few, scratch));
        let group = if packed.is_some() { few } else { each };
        let run = |(y, x): (&mut [f32], &[f32]), mut slopes: Option<&mut [f32]>| {
            for (n, (y, x)) in y.chunks_mut(group * o).zip(x.chunks(group * i)).enumerate() {
                let x = Mat::new(x, y.len() / o, i);
                match packed {
                    Some(w_io) => product_with_apart(&mut y[outputs.start..], o, x, w_io, start, Finish::Keep),
                    None => product_apart(&mut y[outputs.start..], o, x, w_oi.t(), start, Finish::Keep),
                }
                let slopes = slopes.as_deref_mut().map(|slopes| &mut slopes[n * group * o..][..y.len()]);
                activate_columns(activation, y, slopes, o, outputs.clone());
            }
        };
        let threads = y.par_chunks_mut(each * o).zip(x.par_chunks(each * i));
        if pass.train && keeps_slopes(activation) {
            threads.zip(saved.par_chunks_mut(each * o)).for_each(|(rows, slopes)| run(rows, Some(slopes)));
        } else {
            threads.for_each(|rows| run(rows, None));
        }
    }

    /// How the layer above may compute the gradient of this one's sums at once, and not that of its outputs `y`, where it can; `saved` is
    /// what this one kept.
    pub(super) fn through<'a>(&self, y: &'a [f32], saved: &'a [f32]) -> Option<Through<'a>> {
        self.activation.and_then(|kind| through(kind, y, saved))
    }

    /// The activation that the gradient that came from above has to go through.
    fn ahead(&self, above: Above<'_>) -> Option<job::Activation> {
        self.activation.filter(|_| !above.is_of_sums)
    }

    /// Floats for [`Linear::backward_in_halves`]: the sums' gradient, then what the parameters' gradients need.
    pub(super) fn scratch_of_halves(&self, rows: usize, segments: usize) -> usize {
        let (rows, outputs) = (rows * self.positions(), self.outputs());
        let trees = self.blocks(outputs).scratch(segments).max(tree_spare(segments, outputs));
        rows * outputs + self.packed(rows, segments) + trees
    }

    /// Room for the inputs of `rows` rows in `segments` segments, packed for all parts of the weights' gradient; it is
    /// needed where this is the first layer.
    fn packed(&self, rows: usize, segments: usize) -> usize {
        if self.strip() < self.outputs() { Packed::room(rows, self.inputs) + segments * Packed::room(0, 0) } else { 0 }
    }
}

impl Layer for Linear {
    fn out_shape(&self) -> &[usize] {
        &self.out_shape
    }

    fn tensors(&self) -> Vec<Tensor> {
        let tensor = |name: &str, shape: &[usize], init| Tensor {
            name: name.into(),
            shape: shape.into(),
            role: Role::Trainable,
            kind: if name == "bias" { Kind::Bias } else { Kind::Weight },
            init,
        };
        let mut all = vec![tensor("weight", &[self.outputs(), self.inputs], self.init)];
        all.extend(self.bias.map(|init| tensor("bias", &[self.outputs()], init)));
        all
    }

    /// The job's layers that it stands for: its activation is one, too.
    fn span(&self) -> usize {
        1 + usize::from(self.activation.is_some())
    }

    /// The slopes of the activation, where they are kept.
    fn saved(&self, rows: usize, _: usize) -> usize {
        if self.activation.is_some_and(keeps_slopes) { rows * self.positions() * self.outputs() } else { 0 }
    }

    /// Forward those weights that are packed, where the activation comes behind the product; backward the sums' gradient, where it is not the
    /// output's, then what the parameters' gradients need.
    fn scratch(&self, rows: usize, segments: usize) -> usize {
        let near = self.outputs().min(WEIGHTS / self.inputs.max(1));
        let packed = if self.behind().is_some() { Packed::room(self.inputs, near) } else { 0 };
        let sums = if self.activation.is_none() { rows * self.positions() * self.outputs() } else { 0 };
        packed.max(self.scratch_of_halves(rows, segments) - sums)
    }

    fn multiply_adds(&self) -> u64 {
        (self.positions() * self.weights()) as u64
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
        self.forward_of(0..self.outputs(), pass, params.trainable, x, y, saved, scratch);
    }

    fn as_linear(&self) -> Option<&Linear> {
        Some(self)
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
        let above = Above { dy, is_of_sums: false };
        self.backward_between(pass, params, x, y, above, dx, None, grads.trainable, saved, scratch);
    }
}

/// The gradient that comes from above: that of a layer's outputs, or of its sums, before the activation.
#[derive(Clone, Copy)]
pub(super) struct Above<'a> {
    pub dy: &'a [f32],
    pub is_of_sums: bool,
}

impl Linear {
    /// [`Layer::backward`] where layers follow each other: the gradient from above may be that of the sums, and `dx` becomes that of
    /// the sums of the linear layer below, where it goes `through` its activation.
    pub(super) fn backward_between(
        &self,
        pass: &Pass<'_>,
        params: Params<'_>,
        x: &[f32],
        y: &[f32],
        above: Above<'_>,
        dx: Option<&mut [f32]>,
        through: Option<Through<'_>>,
        grads: &mut [f32],
        saved: &[f32],
        scratch: &mut [f32],
    ) {
        let (dy, scratch) = match self.ahead(above) {
            None => (above.dy, scratch),
            Some(kind) => {
                let (sums, scratch) = scratch.split_at_mut(above.dy.len());
                deactivate(kind, y, saved, above.dy, sums);
                (&*sums, scratch)
            }
        };
        self.parameters(pass, x, dy, dx.is_none(), grads, scratch);
        if let Some(dx) = dx {
            self.input(pass, params, dy, dx, through);
        }
    }

    /// [`Linear::backward_between`] with the inputs' gradient first, that of the outputs below; gives what computes and announces the
    /// parameters'. `scratch` is that of [`Linear::scratch_of_halves`].
    pub(super) fn backward_in_halves<'a>(
        &'a self,
        pass: Pass<'a>,
        params: Params<'_>,
        x: &'a [f32],
        y: &[f32],
        above: Above<'_>,
        dx: &mut [f32],
        grads: &'a mut [f32],
        saved: &[f32],
        scratch: &'a mut [f32],
    ) -> impl FnOnce() + 'a {
        let (sums, scratch) = scratch.split_at_mut(above.dy.len());
        match self.ahead(above) {
            Some(kind) => deactivate(kind, y, saved, above.dy, sums),
            None => sums.copy_from_slice(above.dy),
        }
        self.input(&pass, params, sums, dx, None);
        move || self.parameters(&pass, x, sums, false, grads, scratch)
    }

    /// The inputs' gradient, of that of the sums `dy`, or what it becomes `through` the activation below.
    fn input(&self, pass: &Pass<'_>, params: Params<'_>, dy: &[f32], dx: &mut [f32], through: Option<Through<'_>>) {
        let (i, o) = (self.inputs, self.outputs());
        let w_oi = Mat::new(params.trainable, o, i);
        over_rows(pass.segments.total() * self.positions(), (dx, i), (dy, o), |first, dx, dy| {
            let through = through.map(|through| through.from(first * i));
            product_through(dx, Mat::new(dy, dy.len() / o, o), w_oi, through);
        });
    }

    /// The parameters' gradients, of that of the sums `dy`, announced; part by part, if they are the `last` of the model's.
    fn parameters(&self, pass: &Pass<'_>, x: &[f32], dy: &[f32], last: bool, grads: &mut [f32], scratch: &mut [f32]) {
        let (i, o, positions) = (self.inputs, self.outputs(), self.positions());
        let (dw_oi, db_o) = grads.split_at_mut(self.weights());
        let segments = pass.segments;
        let rows_of = |segment| {
            let samples = segments.rows(segment);
            samples.start * positions..samples.end * positions
        };
        if self.bias.is_some() {
            tree_sum(0, segments.len(), db_o, scratch, &mut |segment, out| {
                let rows = rows_of(segment);
                column_sums(&dy[rows.start * o..rows.end * o], out);
            });
            pass.finish_from(dw_oi.len(), db_o);
        }
        let of = |segment: usize| {
            let rows = rows_of(segment);
            let (dy, x) = (&dy[rows.start * o..rows.end * o], &x[rows.start * i..rows.end * i]);
            (Mat::new(dy, rows.len(), o), Mat::new(x, rows.len(), i))
        };
        // What comes last of all comes part by part, so that its update need not wait for the whole.
        if last && self.strip() < o {
            let (mut room, scratch) = scratch.split_at_mut(self.packed(segments.total() * positions, segments.len()));
            let mut split = |segment| {
                let len = Packed::room(rows_of(segment).len(), i);
                room.split_off_mut(..len).unwrap_or_default()
            };
            let rooms: Vec<_> = (0..segments.len()).map(|segment| (segment, split(segment))).collect();
            let pack = |(segment, room)| Packed::of(of(segment).1, self.strip(), room);
            let xs: Vec<_> = rooms.into_par_iter().map(pack).collect();
            let mut missing = o;
            while missing > 0 {
                let rows = self.last_of(missing);
                let out = &mut dw_oi[rows.start * i..rows.end * i];
                self.blocks(rows.len()).sum(segments.len(), out, scratch, |segment, block, out, _| {
                    let dy = of(segment).0.part(rows.start + block.start, block.len());
                    product_with(out, dy.t(), xs[segment], Start::Zero, Finish::Keep);
                });
                pass.finish_from(rows.start * i, out);
                missing = rows.start;
            }
        } else {
            self.blocks(o).sum(segments.len(), dw_oi, scratch, |segment, block, out, _| {
                let (dy, x) = of(segment);
                gemm(out, dy.part(block.start, block.len()).t(), x, false);
            });
            pass.finish_from(0, dw_oi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Activation, LayerNorm, Rows, Segments, Sequential};
    use super::*;
    use crate::rng::{Key, Purpose};
    use std::cell::RefCell;

    fn values(salt: u64, n: usize) -> Vec<f32> {
        let key = Key::new(salt, Purpose::Synthetic);
        (0..n as u64).map(|i| key.normal(i)).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    /// Outputs, and the gradients of parameters and inputs, of layers that follow each other; outputs in parts, where there are any.
    fn both_ways(
        layers: &[&dyn Layer],
        parts: &[usize],
        (rows, segments): (usize, &Segments),
        (train, wants_inputs): (bool, bool),
        x: &[f32],
        params: &[f32],
        dy: &[f32],
    ) -> [Vec<u32>; 3] {
        let key = Key::new(0, Purpose::Dropout);
        let pass = Pass { segments, train, key, first: 0, finished: &|_, _| {}, finished_rows: None };
        let (mut outputs, mut kept) = (vec![x.to_vec()], Vec::new());
        let params = Params { trainable: params, running: &[], rows: Rows::NONE };
        for layer in layers {
            let mut y = vec![f32::NAN; rows * layer.out_shape().iter().product::<usize>()];
            let mut saved = vec![f32::NAN; layer.saved(rows, segments.len())];
            let mut scratch = vec![f32::NAN; layer.scratch(rows, segments.len())];
            let x = outputs.last().expect("the inputs");
            match layer.as_linear().filter(|_| !parts.is_empty()) {
                Some(linear) => {
                    for part in parts.windows(2).rev() {
                        let mine = &params.trainable[linear.weights_of(part[0])..];
                        linear.forward_of(part[0]..part[1], &pass, mine, x, &mut y, &mut saved, &mut scratch);
                    }
                }
                None => layer.forward(&pass, params, x, &mut y, &mut saved, &mut scratch),
            }
            outputs.push(y);
            kept.push(saved);
        }
        let y = bits(outputs.last().expect("the inputs"));
        if !train {
            return [y, vec![], vec![]];
        }
        let (mut dy, mut gradient) = (dy.to_vec(), vec![f32::NAN; params.trainable.len()]);
        for (i, layer) in layers.iter().enumerate().rev() {
            let mut dx = vec![f32::NAN; outputs[i].len()];
            let mut scratch = vec![f32::NAN; layer.scratch(rows, segments.len())];
            let own: &mut [f32] = if layer.tensors().is_empty() { &mut [] } else { &mut gradient };
            let grads = Grads { trainable: own, running: &mut [], rows: &mut [] };
            let (x, y) = (&outputs[i], &outputs[i + 1]);
            let wanted = (i > 0 || wants_inputs).then_some(&mut dx[..]);
            layer.backward(&pass, params, x, y, &dy, wanted, grads, &mut kept[i], &mut scratch);
            dy = dx;
        }
        [y, bits(&gradient), if wants_inputs { bits(&dy) } else { vec![] }]
    }

    /// An activation that is computed with the sums is that of a layer behind them: of a few rows and of many, on any threads, of
    /// outputs that come in parts, and without a way back.
    #[test]
    fn an_activation_with_the_sums_is_one_behind_them() {
        use job::Activation::{Gelu, LeakyRelu, Relu, Sigmoid, Silu, Tanh};
        let zero = Init::Constant(0.0);
        for (rows, inputs, outputs, parts) in [
            (200, 33, 300, vec![0, 150, 300]),
            (3, 5, 24, vec![0, 1, 24]),
            (100, 520, 520, vec![]),
            (2, 1, 20_000, vec![]),
        ] {
            let segments = Segments { lo: 0, starts: vec![0, rows / 3, rows] };
            let (x, dy) = (values(1, rows * inputs), values(2, rows * outputs));
            let params = values(3, (inputs + 1) * outputs);
            for kind in [Gelu, Silu, Tanh, Sigmoid, LeakyRelu { slope: -0.5 }, LeakyRelu { slope: 0.5 }, Relu] {
                let linear =
                    |activation| Linear { inputs, out_shape: vec![outputs], init: zero, bias: Some(zero), activation };
                let (together, apart) = (linear(Some(kind)), linear(None));
                let behind = Activation { kind, shape: vec![outputs] };
                for (threads, train) in [(1, true), (2, true), (3, true), (2, false)] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                    let run = |layers: &[&dyn Layer], parts: &[usize]| {
                        pool.install(|| both_ways(layers, parts, (rows, &segments), (train, true), &x, &params, &dy))
                    };
                    let expected = run(&[&apart, &behind], &[]);
                    assert!(run(&[&together], &[]) == expected, "{rows}x{inputs}x{outputs}, {kind:?}, {threads}");
                    if !parts.is_empty() {
                        assert!(run(&[&together], &parts) == expected, "{kind:?} in parts, {threads} threads");
                    }
                }
            }
        }
    }

    /// Linear layers in a row give the gradients of layers with their activations between them, to the bit: of rows and of positions,
    /// of partitions without samples, with and without those of the inputs, above and below other layers.
    #[test]
    fn a_gradient_through_an_activation_is_one_after_it() {
        use job::Activation::{Gelu, LeakyRelu, Relu, Sigmoid, Silu, Tanh};
        let zero = Init::Constant(0.0);
        for (rows, positions, [inputs, first, second, outputs]) in
            [(200, 1, [33, 70, 48, 5]), (3, 7, [5, 24, 1, 130]), (50, 1, [1, 600, 17, 600])]
        {
            let segments = Segments { lo: 0, starts: vec![0, rows / 3, rows / 3, rows] };
            let (x, dy) = (values(1, rows * positions * inputs), values(2, rows * positions * outputs));
            let params = values(3, (inputs + 1) * first + (first + 1) * second + 2 * second + (second + 1) * outputs);
            for kind in [Gelu, Silu, Tanh, Sigmoid, LeakyRelu { slope: -0.5 }, LeakyRelu { slope: 0.5 }, Relu] {
                let linear = |inputs, outputs, activation| -> Box<dyn Layer> {
                    let out_shape = vec![positions, outputs];
                    Box::new(Linear { inputs, out_shape, init: zero, bias: Some(zero), activation })
                };
                let behind =
                    |outputs| -> Box<dyn Layer> { Box::new(Activation { kind, shape: vec![positions, outputs] }) };
                let end = || -> [Box<dyn Layer>; 2] {
                    let norm = LayerNorm { shape: vec![positions, second], dims: 1, centered: true, eps: 1e-5 };
                    [Box::new(norm), linear(second, outputs, None)]
                };
                let together = [linear(inputs, first, Some(kind)), linear(first, second, Some(kind))];
                let apart = [linear(inputs, first, None), behind(first), linear(first, second, None), behind(second)];
                let chain = |layers| Sequential::new(&[positions, inputs], layers);
                let together = chain(together.into_iter().chain(end()).collect());
                let apart = chain(apart.into_iter().chain(end()).collect());
                for (threads, wants_inputs) in [(1, true), (2, true), (3, true), (2, false)] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
                    let how = (true, wants_inputs);
                    let run = |chain: &Sequential| {
                        pool.install(|| both_ways(&[chain], &[], (rows, &segments), how, &x, &params, &dy))
                    };
                    assert!(run(&together) == run(&apart), "{rows}x{inputs}x{first}, {kind:?}, {threads} threads");
                }
            }
        }
    }

    /// The weights' gradient comes in parts where nobody wants that of the inputs: in several, and with the same bits.
    #[test]
    fn a_gradients_parts_are_those_of_the_whole() {
        let (rows, inputs, outputs) = (7, 784, 300);
        let zero = Init::Constant(0.0);
        let layer = Linear {
            inputs,
            out_shape: vec![outputs],
            init: zero,
            bias: Some(zero),
            activation: Some(job::Activation::Relu),
        };
        let (x, y, dy) = (values(1, rows * inputs), values(2, rows * outputs), values(3, rows * outputs));
        let parameters = values(4, (inputs + 1) * outputs);
        let segments = Segments { lo: 0, starts: vec![0, 3, 3, rows] };
        let run = |dx: Option<&mut [f32]>| {
            let starts = RefCell::new(Vec::new());
            let finished = |from: usize, _: &[f32]| starts.borrow_mut().push(from);
            let key = Key::new(0, Purpose::Dropout);
            let pass =
                Pass { segments: &segments, train: true, key, first: 0, finished: &finished, finished_rows: None };
            let mut gradient = vec![f32::NAN; parameters.len()];
            let grads = Grads { trainable: &mut gradient, running: &mut [], rows: &mut [] };
            let params = Params { trainable: &parameters, running: &[], rows: Rows::NONE };
            let mut scratch = vec![f32::NAN; layer.scratch(rows, segments.len())];
            layer.backward(&pass, params, &x, &y, &dy, dx, grads, &mut [], &mut scratch);
            assert!(gradient.iter().all(|g| g.is_finite()));
            (starts.into_inner(), bits(&gradient))
        };
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
            let (parts, gradient) = pool.install(|| run(None));
            let (whole, same) = pool.install(|| run(Some(&mut vec![0.0; rows * inputs])));
            assert!(parts.len() > whole.len() && gradient == same, "{parts:?} and {whole:?}");
            // From the bias on, strip by strip; what is less than one comes last.
            let strips: Vec<usize> = parts.windows(2).map(|of| of[0] - of[1]).collect();
            let (short, strips) = strips.split_last().expect("several");
            let strip = layer.strip() * inputs;
            assert!(strips.iter().all(|len| *len == strip) && *short == outputs * inputs % strip, "{parts:?}");
        }
    }
}
