//! Counter-based random numbers: every draw is a pure function of a key and an index.
//!
//! The mixer is SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
//! Nothing has a history, so any worker can draw for any partition at any step, and resuming is free.

/// What the numbers are for; part of every key, so that two uses never share a stream.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub enum Purpose {
    Init = 1,
    Shuffle = 2,
    Dropout = 3,
    Synthetic = 4,
    Partition = 5,
    Split = 6,
    Augment = 7,
    Generate = 8,
    Ngram = 9,
    Id = 10,
    Negative = 11,
}

/// The key of one stream of numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

/// A bijection of 64 bits, whose results are as good as random.
#[inline(always)]
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What [`mix`] made `z` of.
pub(crate) fn unmix(mut z: u64) -> u64 {
    // The inverses of its factors modulo 2^64; a shift by more than half is undone by one by twice as much.
    z ^= (z >> 31) ^ (z >> 62);
    z = z.wrapping_mul(0x3196_42b2_d24d_8ec3);
    z ^= (z >> 27) ^ (z >> 54);
    z = z.wrapping_mul(0x96de_1b17_3f11_9089);
    z ^ (z >> 30) ^ (z >> 60)
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl Key {
    /// The key for a seed and a purpose.
    pub fn new(seed: u64, purpose: Purpose) -> Key {
        Key(mix(mix(seed.wrapping_add(GAMMA)) ^ (purpose as u64).wrapping_mul(GAMMA)))
    }

    /// A key below this one: `key.with(step).with(partition)`.
    pub fn with(self, part: u64) -> Key {
        Key(mix(self.0 ^ mix(part.wrapping_add(GAMMA)).wrapping_mul(GAMMA)))
    }

    /// A key below this one, from a name.
    pub fn named(self, name: &str) -> Key {
        name.bytes().fold(self.with(name.len() as u64), |k, b| k.with(b as u64))
    }

    /// The key itself: a hash of all that it was made from.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// The `i`-th 64 bits.
    #[inline(always)]
    pub fn u64(self, i: u64) -> u64 {
        mix(self.0.wrapping_add(i.wrapping_add(1).wrapping_mul(GAMMA)))
    }

    /// The `i`-th 32-bit draw for bulk use in kernels: a 32-bit finaliser over the key's halves and the index.
    #[inline(always)]
    pub fn u32_fast(self, i: u32) -> u32 {
        let mut z = i.wrapping_mul(0x9e37_79b9) ^ (self.0 as u32);
        z = (z ^ (z >> 16)).wrapping_mul(0x21f0_aaad);
        z = (z ^ (z >> 15)).wrapping_add((self.0 >> 32) as u32).wrapping_mul(0x735a_2d97);
        z ^ (z >> 15)
    }

    /// The `i`-th uniform number in `[0, 1)`, with 24 bits.
    pub fn uniform(self, i: u64) -> f32 {
        (self.u64(i) >> 40) as f32 * (1.0 / (1u64 << 24) as f32)
    }

    /// The `i`-th standard normal number (Box-Muller over two draws, in f64).
    pub fn normal(self, i: u64) -> f32 {
        let u = ((self.u64(2 * i) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let v = (self.u64(2 * i + 1) >> 11) as f64 / (1u64 << 53) as f64;
        (libm::sqrt(-2.0 * libm::log(u)) * libm::cos(2.0 * std::f64::consts::PI * v)) as f32
    }

    /// The `i`-th integer in `0..n` (multiply-shift; bias below 2^-32 for n < 2^32).
    pub fn below(self, i: u64, n: u64) -> u64 {
        ((self.u64(i) as u128 * n as u128) >> 64) as u64
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(self, n: usize) -> Vec<u32> {
        let mut p: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            p.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        p
    }
}
