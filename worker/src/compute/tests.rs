use super::*;
use unisono_common::data::{self, Files};
use unisono_common::ids::{Step, Version};
use unisono_common::job::{self, JobText};
use unisono_proto::shm::memory::BellMemory;
use unisono_proto::shm::{Lane, Memory, Piece, SlotSize, Weights};

const JOB: &str = r#"
    seed = 3
    data = { format = "synthetic", shape = [600], classes = 3, samples = 96, test_samples = 24 }
    model = { kind = "mlp", hidden = [300, 20], dropout = 0.5 }
    [train]
    epochs = 3
    partitions = 3
    micro_batch = 4
    optimizer = { kind = "sgd", lr = 0.1 }
"#;

/// A worker that computes, and its coordinator's weights.
struct Pair {
    compute: Compute,
    link: Link,
    model: Arc<Model>,
    weights: Arc<Weights>,
    pieces: Vec<Piece>,
}

impl Pair {
    fn new() -> Pair {
        let text = JobText { file: "job.toml".into(), base: "/".into(), toml: JOB.into(), overrides: vec![] };
        let job = job::parse(text).expect("a job");
        let opened = data::open(&Files::any(), &job.data, job.seed).expect("data");
        let prepared = opened.prepared.clone();
        let model = Model::build(&job.model, &prepared.signature(&job.train.loss)).expect("a model");
        let (len, model) = (model.layout().len(), Arc::new(model));
        let weights = Arc::new(Weights::create(len).expect("memory"));
        let pieces = weights.pieces((0..model.layout().chunks()).map(|i| model.layout().chunk(i)));
        let file = weights.memory().file().expect("a file").try_clone_to_owned().expect("a second handle");
        let theirs = Weights::of(Memory::open(file, Weights::bytes(len), false).expect("for reading"), len);
        let lane = Arc::new(Lane::private(SlotSize::dense(len)).expect("memory"));
        let (fetch, _) = mpsc::unbounded_channel();
        let link = Link::shared(lane, theirs, BellMemory::create().expect("memory"), Source::None, fetch);
        let compute = Compute::new(job, Samples::Read(Box::new(opened)), prepared, model.clone()).expect("a plan");
        Pair { compute, link, model, weights, pieces }
    }

    /// Puts these weights where those of `step` are.
    fn put(&mut self, step: u64, values: &[f32]) {
        for (i, piece) in self.pieces.iter_mut().enumerate() {
            piece.begin(step).copy_from_slice(&values[self.model.layout().chunk(i)]);
        }
    }

    /// The bits of a node's loss and gradient.
    fn gradient(&mut self, step: u64, node: Node) -> Vec<u64> {
        self.compute.prepare(step, node, &Source::None).expect("there are no rows");
        let mut out = vec![f32::NAN; self.model.layout().len()];
        let weights = Reading::whole(&self.weights, Version::of(Step(step)));
        let computed = self.compute.gradient(step, node, &weights, false, &mut out, &mut [], &mut |_, _| {});
        let (sums, _) = computed.expect("the weights are there");
        [sums.loss.to_bits()].into_iter().chain(out.iter().map(|g| g.to_bits() as u64)).collect()
    }
}

/// What was begun counts for its node and its step alone, and once, and not when anything else was computed meanwhile: it was begun
/// with weights that are none, so that whatever follows from it is none either.
#[test]
fn what_was_begun_counts_for_its_order_only() {
    let (node, other) = (Node { lo: 0, hi: 2 }, Node::leaf(2));
    let mut pair = Pair::new();
    let whole = pair.model.layout().init(1);
    let calm = [(5, node), (5, other), (6, node)].map(|(step, node)| {
        pair.put(step, &whole);
        pair.gradient(step, node)
    });
    let evaluate = |pair: &mut Pair| {
        let sums = pair.compute.evaluate(Node::root(3), &whole, &mut |_, _| Some(()));
        sums.expect("there are no rows").is_finite()
    };
    let begin = |pair: &mut Pair, is_said: bool| {
        pair.put(5, &vec![f32::NAN; whole.len()]);
        (0..pair.pieces.len()).for_each(|i| pair.weights.say(i, if is_said { 5 } else { 3 }));
        pair.compute.begin(5, node, &pair.link);
        pair.put(5, &whole);
    };

    begin(&mut pair, true);
    assert!(f64::from_bits(pair.gradient(5, node)[0]).is_nan(), "it was computed anew");
    assert!(pair.gradient(5, node) == calm[0], "it counted twice");

    begin(&mut pair, false);
    assert!(pair.gradient(5, node) == calm[0], "weights were looked at that have not changed");

    // What had not changed the first time has the second time.
    begin(&mut pair, false);
    begin(&mut pair, true);
    assert!(f64::from_bits(pair.gradient(5, node)[0]).is_nan(), "nothing was looked at a second time");

    begin(&mut pair, true);
    assert!(evaluate(&mut pair) && pair.gradient(5, node) == calm[0], "after an evaluation");

    begin(&mut pair, true);
    assert!(pair.gradient(5, other) == calm[1] && pair.gradient(5, node) == calm[0], "after another node");

    begin(&mut pair, true);
    assert!(pair.gradient(6, node) == calm[2] && pair.gradient(5, node) == calm[0], "after another step");
}
