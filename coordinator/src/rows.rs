//! Sparse tables: the rows that were touched, the open reduction tree of their gradients, and the update.
//!
//! What rows become is computed as soon as their own gradients are there, beside those that there are. They change between two steps
//! only, when all gradients of a step are there, dense and sparse: until then, whoever joins or is slow can still read those of the
//! open step. A checkpoint that is being written copies only rows that change meanwhile.
//!
//! Locks are taken in the order of the fields. While rows are computed, the pool's threads may take up what else the pool has to do.
//! That may be a chunk, which waits for its lock: whoever holds one must not wait for a change of rows. It must never be rows
//! that came, for these wait for locks that are held here.

use crate::lock;
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::watch;
use unisono_common::ids::Step;
use unisono_common::job;
use unisono_common::kernels;
use unisono_common::layout::le_bytes;
use unisono_common::loss::LossSums;
use unisono_common::optim::sum_squares;
use unisono_common::rows::optim::RowOptimizer;
use unisono_common::rows::sums::{RowSums, merge};
use unisono_common::rows::{First, RowBlock, RowLayout};
use unisono_common::tree::{Node, Offer, Open};
use unisono_proto::shm::{Capacity, Memory, Plan, RowPart, RowStore};

/// Gradient sums of some rows.
pub enum RowGradient {
    /// Where a worker computed them; the keys are a copy, which stays as it was checked.
    Slot(Vec<u64>, RowPart),
    Sums(RowSums),
    /// The root's two halves, that are still to be added.
    Both(Box<[RowGradient; 2]>),
}

impl RowGradient {
    /// Keys, and gradients, `(keys, width)`.
    pub fn parts(&self) -> (&[u64], &[f32]) {
        match self {
            RowGradient::Slot(keys, part) => (keys, part.values().1),
            RowGradient::Sums(sums) => sums.parts(),
            RowGradient::Both(_) => unreachable!("only the root's two halves wait to be added"),
        }
    }

    /// One or two that are still to be added up.
    fn halves(&self) -> [(&[u64], &[f32]); 2] {
        match self {
            RowGradient::Both(both) => [both[0].parts(), both[1].parts()],
            one => [one.parts(), (&[], &[])],
        }
    }

    /// What may wait for long: it keeps no slot from its worker.
    fn kept(self) -> RowGradient {
        match self {
            RowGradient::Slot(keys, part) if !part.may_wait() => {
                let values = part.values().1.to_vec();
                RowGradient::Sums(RowSums { keys, values })
            }
            other => other,
        }
    }
}

/// A node's sums.
struct Part {
    gradient: RowGradient,
    sums: LossSums,
    partitions: u32,
}

/// The rows, and what is known of each.
struct Held {
    /// The step whose gradients are taken next.
    step: Step,
    store: RowStore,
    keys: Vec<u64>,
}

/// A checkpoint that has not taken all rows yet.
struct Keeping {
    /// Rows that there were at its step, and those of them that it has taken.
    rows: usize,
    taken: usize,
    /// Those of the others that have changed since, as they were.
    old: HashMap<u32, Vec<f32>>,
}

/// The open step's gradients, and what becomes of them.
struct Coming {
    tree: Open<Part>,
    /// Whether all are there.
    is_whole: bool,
    whole: Option<Part>,
    next: Option<Next>,
    /// Memory for them.
    spare: Vec<f32>,
}

/// The rows of the next step.
struct Next {
    plan: Plan,
    /// What they were computed from. It is kept until they are there: when its slots become free their workers wake, and are
    /// awake when the next orders come.
    whole: Part,
    /// The place in a row of the first value that is not finite.
    bad: Option<usize>,
}

/// The rows that there are while the next ones are computed.
enum Rows<'a> {
    /// Somebody needs them.
    Beside(&'a RowStore),
    InPlace(&'a mut RowStore),
}

/// What makes an update of the sums of rows' gradients.
#[derive(Clone, Copy)]
pub struct Update {
    pub lr: f32,
    /// What the sums are multiplied by.
    pub factor: f32,
    /// What each value is clamped to then, from `-limit` on.
    pub limit: Option<f32>,
}

/// The sparse tables of one run.
pub struct Tables {
    layout: RowLayout,
    first: First,
    optimizer: RowOptimizer,
    partitions: u32,
    memory: u64,
    coming: Mutex<Coming>,
    held: RwLock<Held>,
    keeping: Mutex<Option<Keeping>>,
    /// The step whose rows are there.
    committed: watch::Sender<u64>,
}

/// Rows as they are sent.
pub struct Pulled {
    /// The step whose rows they are.
    pub step: Step,
    /// Their places among the keys that were asked for (u32), and their values (f32), little-endian.
    pub places: Vec<u8>,
    pub values: Vec<u8>,
}

/// Why an update did not come about.
#[derive(Debug)]
pub enum Failed {
    /// A value of this table is not finite.
    Diverged(String),
    /// There is no room for rows that are new.
    Full(String),
}

/// Rows that a checkpoint takes at once; no rows change meanwhile.
const BLOCK: usize = 16_384;

impl Tables {
    /// Tables of `layout` at `step`, with rows that were kept.
    ///
    /// # Errors
    /// Where the system has not so much address space to give, and rows that do not fit.
    pub fn new(
        layout: RowLayout,
        seed: u64,
        job: &job::Tables,
        partitions: u32,
        step: Step,
        rows: &[RowBlock],
    ) -> Result<Tables> {
        let optimizer = RowOptimizer::new(&job.optimizer, &layout);
        let width = layout.width();
        let capacity = Capacity::of_bytes(width, optimizer.state_len(), job.memory);
        let store = RowStore::create(capacity).context("no memory for the tables; lower train.tables.memory_mb")?;
        let mut held = Held { step, store, keys: Vec::new() };
        for block in rows {
            for (key, row) in block.keys.iter().zip(block.rows.chunks_exact(optimizer.row_len())) {
                if held.store.place(*key, step.0, |to| to.copy_from_slice(row)).is_err() {
                    bail!("{}", full(capacity.rows, job.memory));
                }
                held.keys.push(*key);
            }
        }
        Ok(Tables {
            first: layout.first(seed),
            layout,
            optimizer,
            partitions,
            memory: job.memory,
            coming: Mutex::new(Coming {
                tree: Open::new(partitions),
                is_whole: false,
                whole: None,
                next: None,
                spare: Vec::new(),
            }),
            held: RwLock::new(held),
            keeping: Mutex::new(None),
            committed: watch::Sender::new(step.0),
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What the rows hold.
    pub fn layout(&self) -> &RowLayout {
        &self.layout
    }

    /// How its state is kept.
    pub fn optimizer(&self) -> &RowOptimizer {
        &self.optimizer
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        self.read().keys.len()
    }

    /// Passes the rows' memory on, to be given away.
    pub fn with_memory<R>(&self, give: impl FnOnce(&Memory) -> R) -> R {
        give(self.read().store.memory())
    }

    /// Wakes when the rows of another step are there.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.subscribe()
    }

    /// Takes the checked sums of a node's rows; the loss sums of the whole tree when it is there.
    pub fn accept(&self, step: Step, node: Node, sums: LossSums, gradient: RowGradient) -> Option<LossSums> {
        let width = self.layout.width();
        let mut coming = lock(&self.coming);
        if coming.is_whole || coming.tree.holds(node) || self.read().step != step {
            return None; // late, or there already
        }
        // The root's halves wait for all others; below it, what meets its sibling is summed up at once.
        let root = Node::root(self.partitions);
        let is_half = node.sibling_and_parent(self.partitions).is_none_or(|(_, parent)| parent == root);
        let gradient = if coming.tree.merges(node) && !is_half { gradient } else { gradient.kept() };
        let add = |left: Part, right: Part| {
            let (sums, partitions) = (left.sums + right.sums, left.partitions + right.partitions);
            let gradient = if partitions == self.partitions {
                RowGradient::Both(Box::new([left.gradient, right.gradient]))
            } else {
                RowGradient::Sums(RowSums::of_both(left.gradient.parts(), right.gradient.parts(), width))
            };
            Part { gradient, sums, partitions }
        };
        let part = Part { gradient, sums, partitions: node.len() };
        if coming.tree.offer(node, part, add) != Offer::Complete {
            return None;
        }
        (coming.is_whole, coming.whole) = (true, coming.tree.take_root());
        coming.whole.as_ref().map(|whole| whole.sums)
    }

    /// The sum of squares of the whole tree's gradients, which are multiplied by `factor`, in the order of the keys.
    pub fn sum_squares(&self, factor: f32) -> f64 {
        let coming = lock(&self.coming);
        let Some(whole) = &coming.whole else { return 0.0 };
        let [left, right] = whole.gradient.halves();
        let (mut sum, width) = (0.0, self.layout.width());
        let mut row = vec![0.0; width];
        merge(left.0, right.0, |_, side| {
            side.read((left.1, right.1), width, &mut row);
            kernels::scale(&mut row, factor);
            sum += sum_squares(&row);
        });
        sum
    }

    /// Computes the rows of the next step beside those that there are, on the current thread pool; [`Tables::commit`] puts them in
    /// their place.
    pub fn prepare(&self, update: Update) {
        let (whole, spare) = {
            let mut coming = lock(&self.coming);
            (coming.whole.take(), std::mem::take(&mut coming.spare))
        };
        let Some(whole) = whole else { return };
        let held = self.read();
        let next = self.next(whole, update, held.step.next(), Rows::Beside(&held.store), spare);
        drop(held);
        lock(&self.coming).next = Some(next);
    }

    /// The rows become those of the next step, by `update` where they were not prepared; on the current thread pool.
    ///
    /// # Errors
    /// Values that are not finite, and no room for new rows: then there is no next step.
    pub fn commit(&self, update: Update) -> Result<(), Failed> {
        // Until the step has changed nothing is taken for it: it would be taken for the next one.
        let mut coming = lock(&self.coming);
        let mut held = self.write();
        let mut keeping = lock(&self.keeping);
        let Held { step, store, keys } = &mut *held;
        let Next { mut plan, whole, bad } = match (coming.next.take(), coming.whole.take()) {
            (Some(next), _) => next,
            (None, Some(whole)) => {
                let spare = std::mem::take(&mut coming.spare);
                let rows = if keeping.is_some() { Rows::Beside(store) } else { Rows::InPlace(store) };
                self.next(whole, update, step.next(), rows, spare)
            }
            (None, None) => return Ok(()),
        };
        if let Some(at) = bad {
            return Err(Failed::Diverged(self.layout.table_at(at).map(|t| t.name.clone()).unwrap_or_default()));
        }
        if let Some(keeping) = &mut *keeping {
            for (_, place) in plan.places() {
                if (keeping.taken..keeping.rows).contains(&(place as usize)) {
                    // Where it is there already, it was changed before.
                    keeping.old.entry(place).or_insert_with(|| store.row(place).to_vec());
                }
            }
        }
        store.put(&mut plan).map_err(|_| Failed::Full(full(store.capacity().rows, self.memory)))?;
        if keys.len() < store.len() as usize {
            // Those that are new, in the order of their keys.
            let there = keys.len();
            keys.extend(plan.places().filter(|(_, place)| *place as usize >= there).map(|(key, _)| key));
        }
        *step = step.next();
        let step = *step;
        (coming.is_whole, coming.spare) = (false, plan.into_spare());
        drop((keeping, held, coming));
        self.committed.send_replace(step.0);
        drop(whole);
        Ok(())
    }

    /// The rows of `step`, from the whole tree's gradients.
    fn next(&self, whole: Part, update: Update, step: Step, rows: Rows<'_>, spare: Vec<f32>) -> Next {
        let [left, right] = whole.gradient.halves();
        let most = left.0.len() + right.0.len();
        let (mut keys, mut sides) = (Vec::with_capacity(most), Vec::with_capacity(most));
        merge(left.0, right.0, |key, side| {
            keys.push(key);
            sides.push(side);
        });
        let (width, Update { lr, factor, limit }) = (self.layout.width(), update);
        let update = self.optimizer.at(step.0, lr);
        let bad = Mutex::new(None::<usize>);
        let make = || {
            let (first, optimizer, sides, bad) = (&self.first, &self.optimizer, &sides, &bad);
            let mut gradient = vec![0.0; width];
            #[inline(always)]
            move |(key, i): (u64, usize), is_new, row: &mut [f32]| {
                let (values, state) = row.split_at_mut(width);
                if is_new {
                    first.fill(key, values);
                    optimizer.first_state(values, state);
                }
                sides[i].read((left.1, right.1), width, &mut gradient);
                gradient.iter_mut().for_each(|g| *g *= factor);
                let mut finite = true;
                if let Some(limit) = limit {
                    // It would hide an infinite one.
                    finite = kernels::finite(&gradient);
                    gradient.iter_mut().for_each(|g| *g = g.clamp(-limit, limit));
                }
                if !(update.run(&gradient, values, state) && finite) {
                    let mut pairs = gradient.iter().zip(&*values);
                    let at = pairs.position(|(g, w)| !g.is_finite() || !w.is_finite()).unwrap_or(0);
                    let mut bad = lock(bad);
                    *bad = Some(bad.map_or(at, |first| first.min(at)));
                }
            }
        };
        let plan = match rows {
            Rows::Beside(store) => store.plan(keys, step.0, spare, make),
            Rows::InPlace(store) => store.plan_in_place(keys, step.0, spare, make),
        };
        let bad = bad.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        Next { plan, whole, bad }
    }

    /// The rows of `keys` that there are, at least those that have changed since `since` (or all of them).
    pub fn pull(&self, keys: &[u64], since: Option<Step>) -> Pulled {
        // Most are there, and few of them have changed.
        let room = if since.is_none() { keys.len() } else { 0 };
        let (mut places, mut values) =
            (Vec::with_capacity(4 * room), Vec::with_capacity(4 * self.layout.width() * room));
        let held = self.read();
        held.store.each_row(keys, since.map(|step| step.0), |i, row| {
            places.extend_from_slice(&(i as u32).to_le_bytes());
            values.extend_from_slice(le_bytes(row));
        });
        Pulled { step: held.step, places, values }
    }

    /// Whether the rows are those of a step before `step`.
    pub fn is_before(&self, step: Step) -> bool {
        self.read().step < step
    }

    /// Whether the rows are those of `step`.
    pub fn is_at(&self, step: Step) -> bool {
        self.read().step == step
    }

    /// Promises that [`Tables::flush`] gives the rows as they are now.
    pub fn keep(&self) {
        let held = self.read();
        *lock(&self.keeping) = Some(Keeping { rows: held.keys.len(), taken: 0, old: HashMap::new() });
    }

    /// Gives away all rows that were promised, in the order in which they were first touched.
    pub fn flush(&self, mut give: impl FnMut(&RowBlock)) {
        let len = self.optimizer.row_len();
        loop {
            let held = self.read();
            let Held { store, keys, .. } = &*held;
            let mut keeping = lock(&self.keeping);
            let Some(kept) = keeping.as_mut().filter(|kept| kept.taken < kept.rows) else {
                *keeping = None;
                return;
            };
            let next = (kept.taken + BLOCK).min(kept.rows);
            let mut block = RowBlock { keys: keys[kept.taken..next].to_vec(), rows: Vec::new() };
            block.rows.reserve(block.keys.len() * len);
            for place in kept.taken as u32..next as u32 {
                match kept.old.remove(&place) {
                    Some(old) => block.rows.extend_from_slice(&old),
                    None => block.rows.extend_from_slice(store.row(place)),
                }
            }
            kept.taken = next;
            drop((keeping, held));
            give(&block);
        }
    }
}

fn full(rows: u32, memory: u64) -> String {
    format!(
        "the sparse tables have room for {rows} rows in train.tables.memory_mb = {}, and need more: raise it (a run that is resumed may \
         have more), or take the column with the most values out of data.ids",
        memory >> 20
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_common::layout::Init;
    use unisono_common::rows::{Table, key};

    fn tables(memory: u64, rows: &[RowBlock]) -> Tables {
        let layout = RowLayout::new(vec![Table { name: "a".into(), width: 2, init: Init::Uniform { bound: 1.0 } }]);
        let job = job::Tables { optimizer: job::RowOptimizer::Sgd { lr: 1.0 }, memory };
        Tables::new(layout, 7, &job, 2, Step(5), rows).expect("memory")
    }

    /// Gradients of 1 for the rows of these ids, from each of two partitions.
    fn step(tables: &Tables, step: u64, ids: [&[u64]; 2]) -> Option<LossSums> {
        let mut last = None;
        for (partition, ids) in ids.iter().enumerate() {
            let mut keys: Vec<u64> = ids.iter().map(|id| key(*id)).collect();
            keys.sort();
            let gradient = RowGradient::Sums(RowSums { values: vec![1.0; 2 * keys.len()], keys });
            let sums = LossSums { loss: 1.0, weight: 1.0, samples: 1 };
            last = tables.accept(Step(step), Node::leaf(partition as u32), sums, gradient);
        }
        last
    }

    fn update(lr: f32, factor: f32, limit: Option<f32>) -> Update {
        Update { lr, factor, limit }
    }

    fn value(tables: &Tables, id: u64) -> f32 {
        let mut row = [0.0; 2];
        tables.layout.first(7).fill(key(id), &mut row);
        tables.pull(&[key(id)], None).values.first_chunk().map_or(0.0, |value| f32::from_le_bytes(*value) - row[0])
    }

    #[test]
    fn rows_change_when_all_is_there_and_a_checkpoint_has_them_as_they_were() {
        let tables = tables(1 << 20, &[]);
        assert!(step(&tables, 4, [&[1], &[1]]).is_none(), "it is not the open step");
        assert!(step(&tables, 5, [&[1, 2], &[2, 3]]).is_some_and(|sums| sums.samples == 2));
        assert!(step(&tables, 5, [&[1], &[1]]).is_none(), "it is there already");
        assert_eq!((tables.rows(), value(&tables, 2)), (0, 0.0), "nothing changes before it is committed");
        assert_eq!(tables.sum_squares(0.5), (2.0 + 2.0 + 4.0 * 2.0) / 4.0);
        tables.commit(update(1.0, 0.5, None)).expect("finite");
        assert!(tables.is_at(Step(6)) && tables.rows() == 3);
        let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
        assert!(near(value(&tables, 1), -0.5) && near(value(&tables, 2), -1.0) && near(value(&tables, 3), -0.5));
        // Only what has changed since is pulled again.
        let keys = [1, 9, 2].map(key);
        let pulled = |tables: &Tables, since| -> Vec<u32> {
            tables.pull(&keys, since).places.as_chunks().0.iter().map(|place| u32::from_le_bytes(*place)).collect()
        };
        assert_eq!(pulled(&tables, None), [0, 2]);
        tables.keep();
        step(&tables, 6, [&[2, 9], &[]]);
        tables.commit(update(1.0, 1.0, Some(0.25))).expect("finite");
        assert_eq!(pulled(&tables, Some(Step(6))), [1, 2]);
        assert!(near(value(&tables, 2), -1.25) && near(value(&tables, 9), -0.25));
        // One that changes twice is kept as it was before both.
        step(&tables, 7, [&[2], &[]]);
        tables.commit(update(1.0, 1.0, None)).expect("finite");
        assert_eq!(pulled(&tables, Some(Step(7))), [2]);
        assert!(near(value(&tables, 2), -2.25));
        let mut kept = Vec::new();
        tables.flush(|block| kept.push(block.clone()));
        assert_eq!(kept.iter().map(|block| block.keys.len()).sum::<usize>(), 3, "the fourth is newer");
        let again = self::tables(1 << 20, &kept);
        assert!(near(value(&again, 2), -1.0) && near(value(&again, 3), -0.5) && value(&again, 9) == 0.0);
        tables.flush(|_| panic!("nothing was promised"));
    }

    #[test]
    fn rows_are_the_same_prepared_or_not_and_change_when_they_are_committed() {
        let held = |tables: &Tables| {
            let keys = tables.read().keys.clone();
            let values = tables.pull(&keys, None).values;
            (keys, values)
        };
        // Each at once and prepared, without and with a checkpoint that is written meanwhile.
        let runs = [(false, false), (true, false), (false, true), (true, true)].map(|(early, keeps)| {
            let tables = tables(1 << 20, &[]);
            for (at, ids) in (5..).zip([[&[1, 2][..], &[2, 3]], [&[2, 7], &[]], [&[3, 9], &[1, 9]]]) {
                if keeps {
                    tables.keep();
                }
                step(&tables, at, ids);
                let before = held(&tables);
                if early {
                    tables.prepare(update(0.5, 0.5, None));
                    assert!(step(&tables, at, ids).is_none(), "it is there already");
                }
                assert_eq!(held(&tables), before, "what is prepared is not there yet");
                tables.commit(update(0.5, 0.5, None)).expect("finite");
                assert!(tables.is_at(Step(at + 1)) && held(&tables) != before);
                let (mut keys, mut values) = (Vec::new(), Vec::new());
                tables.flush(|block| {
                    keys.extend_from_slice(&block.keys);
                    values.extend_from_slice(le_bytes(&block.rows));
                });
                assert!(!keeps || (keys, values) == before, "a checkpoint has them as they were");
            }
            held(&tables)
        });
        assert!(runs.iter().all(|run| *run == runs[0]) && runs[0].0.len() == 5);
    }

    #[test]
    fn what_is_not_finite_and_what_does_not_fit_is_said() {
        [false, true].into_iter().for_each(what_is_wrong_is_said);
    }

    fn what_is_wrong_is_said(early: bool) {
        let tables = tables(1 << 10, &[]);
        let ids: Vec<u64> = (0..1000).collect();
        step(&tables, 5, [&ids, &[]]);
        if early {
            tables.prepare(update(1.0, 1.0, None));
        }
        match tables.commit(update(1.0, 1.0, None)) {
            Err(Failed::Full(why)) => {
                let room = tables.read().store.capacity().rows;
                assert!(why.contains("memory_mb") && why.contains(&format!("room for {room} rows")), "{why}");
            }
            other => panic!("{other:?}"),
        }
        let tables = self::tables(1 << 20, &[]);
        step(&tables, 5, [&[1], &[2]]);
        let infinite = update(1.0, f32::INFINITY, Some(1.0));
        if early {
            tables.prepare(infinite);
        }
        assert!(matches!(tables.commit(infinite), Err(Failed::Diverged(table)) if table == "a"));
    }
}
