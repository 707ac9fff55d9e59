//! What frames say: orders to a worker, and its reports.

use super::ring::FRAME;
use crate::WireError;
use unisono_common::loss::LossSums;
use unisono_common::tree::Node;

/// The coordinator asks for a node with the weights of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Order {
    pub step: u64,
    pub generation: u64,
    pub node: Node,
    /// Evaluation sums of the test set instead of gradients.
    pub evaluate: bool,
    /// The gradients of rows of sparse tables are wanted before others.
    pub rows_first: bool,
    /// Whether a coordinator that sleeps is to be woken before all is final.
    pub wakes: bool,
}

/// Opens the push of a node.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Header {
    pub step: u64,
    pub generation: u64,
    pub node: Node,
    pub sums: LossSums,
    /// How many rows of sparse tables it has gradients of.
    pub rows: u32,
}

/// Where a worker's time for one node went, in nanoseconds, one after the other.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Gathering the samples.
    pub data: u64,
    pub forward: u64,
    /// What of these two was over when the worker looked for the order.
    pub ahead: u64,
    /// Loss and backward pass.
    pub backward: u64,
    /// Making messages of the gradient, as far as it was not done beside the backward pass.
    pub encode: u64,
    /// The bytes of gradients that were encoded in that time.
    pub encoded: u64,
}

/// What a worker says of the gradient in one of its slots.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Report {
    /// The slot will hold this node's gradient sum.
    Begin { slot: u32, header: Header },
    /// These chunks of it are final; with the last ones comes what it took.
    Ready { slot: u32, from: u32, to: u32, spent: Option<Spent> },
    /// The gradients of its rows are final.
    Rows { slot: u32 },
}

/// Puts numbers into a frame, one after the other.
struct Words {
    frame: [u32; FRAME],
    at: usize,
}

impl Words {
    fn tagged(tag: u32) -> Words {
        Words { frame: [0; FRAME], at: 0 }.u32(tag)
    }

    fn u32(mut self, value: u32) -> Words {
        self.frame[self.at] = value;
        self.at += 1;
        self
    }

    fn u64(self, value: u64) -> Words {
        self.u32(value as u32).u32((value >> 32) as u32)
    }

    fn node(self, node: Node) -> Words {
        self.u32(node.lo).u32(node.hi)
    }
}

/// Takes numbers out of a frame.
struct Read<'a>(std::slice::Iter<'a, u32>);

impl Read<'_> {
    fn u32(&mut self) -> u32 {
        self.0.next().copied().unwrap_or_default()
    }

    fn u64(&mut self) -> u64 {
        self.u32() as u64 | (self.u32() as u64) << 32
    }

    fn node(&mut self) -> Node {
        Node { lo: self.u32(), hi: self.u32() }
    }
}

fn unknown(tag: u32) -> WireError {
    WireError::Range { field: "frame", value: tag.to_string() }
}

impl Order {
    /// As a frame.
    pub fn to_frame(self) -> [u32; FRAME] {
        let words = Words::tagged(1).u64(self.step).u64(self.generation).node(self.node);
        words.u32(self.evaluate.into()).u32(self.rows_first.into()).u32(self.wakes.into()).frame
    }

    /// From a frame.
    ///
    /// # Errors
    /// A frame of another kind.
    pub fn from_frame(frame: &[u32; FRAME]) -> Result<Order, WireError> {
        let mut read = Read(frame.iter());
        match read.u32() {
            1 => {
                let (step, generation, node) = (read.u64(), read.u64(), read.node());
                let [evaluate, rows_first, wakes] = std::array::from_fn(|_| read.u32() != 0);
                Ok(Order { step, generation, node, evaluate, rows_first, wakes })
            }
            tag => Err(unknown(tag)),
        }
    }
}

impl Report {
    /// As a frame.
    pub fn to_frame(self) -> [u32; FRAME] {
        match self {
            Report::Begin { slot, header: Header { step, generation, node, sums, rows } } => {
                let words = Words::tagged(2).u32(slot).u64(step).u64(generation).node(node);
                words.u64(sums.loss.to_bits()).u64(sums.weight.to_bits()).u64(sums.samples).u32(rows).frame
            }
            Report::Ready { slot, from, to, spent } => {
                let words = |tag| Words::tagged(tag).u32(slot).u32(from).u32(to);
                let Some(Spent { data, forward, ahead, backward, encode, encoded }) = spent else {
                    return words(3).frame;
                };
                words(5).u64(data).u64(forward).u64(ahead).u64(backward).u64(encode).u64(encoded).frame
            }
            Report::Rows { slot } => Words::tagged(4).u32(slot).frame,
        }
    }

    /// From a frame; what it says is not checked yet.
    ///
    /// # Errors
    /// A frame of another kind.
    pub fn from_frame(frame: &[u32; FRAME]) -> Result<Report, WireError> {
        let mut read = Read(frame.iter());
        match read.u32() {
            2 => {
                let (slot, step, generation, node) = (read.u32(), read.u64(), read.u64(), read.node());
                let (loss, weight) = (f64::from_bits(read.u64()), f64::from_bits(read.u64()));
                let sums = LossSums { loss, weight, samples: read.u64() };
                Ok(Report::Begin { slot, header: Header { step, generation, node, sums, rows: read.u32() } })
            }
            tag @ (3 | 5) => {
                let (slot, from, to) = (read.u32(), read.u32(), read.u32());
                let spent = (tag == 5).then(|| {
                    let (data, forward, ahead) = (read.u64(), read.u64(), read.u64());
                    Spent { data, forward, ahead, backward: read.u64(), encode: read.u64(), encoded: read.u64() }
                });
                Ok(Report::Ready { slot, from, to, spent })
            }
            4 => Ok(Report::Rows { slot: read.u32() }),
            tag => Err(unknown(tag)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_say_what_was_put_into_them() {
        let node = Node { lo: 3, hi: u32::MAX };
        for (step, generation, evaluate) in [(0, 0, false), (u64::MAX, 1 << 40, true)] {
            let order = Order { step, generation, node, evaluate, rows_first: !evaluate, wakes: step % 2 == 0 };
            assert_eq!(Order::from_frame(&order.to_frame()), Ok(order));
            assert!(Report::from_frame(&order.to_frame()).is_err());
            let sums = LossSums { loss: -1.5e300, weight: f64::MIN_POSITIVE, samples: step };
            let begin = Report::Begin { slot: 1, header: Header { step, generation, node, sums, rows: u32::MAX } };
            let spent = Spent { data: 1, forward: u64::MAX, ahead: 2, backward: 3, encode: 1 << 33, encoded: step };
            let ready = |spent| Report::Ready { slot: 7, from: 1, to: u32::MAX, spent };
            for report in [begin, ready(None), ready(Some(spent)), Report::Rows { slot: 9 }] {
                assert_eq!(Report::from_frame(&report.to_frame()), Ok(report));
                assert!(Order::from_frame(&report.to_frame()).is_err());
            }
        }
    }
}
