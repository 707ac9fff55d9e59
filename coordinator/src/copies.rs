//! Copies of weights for the wire, because the weights' own memory is used again: of a chunk's version one that all streams share,
//! made by the update while it has the values at hand, or by the first stream that takes it.

use crate::sum::Spare;
use bytes::Bytes;
use std::hash::Hasher;
use std::sync::{Arc, Weak};
use unisono_common::ids::Version;
use unisono_common::layout::le_bytes;

/// Copies that exist at once, at most, where an update makes one: streams that are slower make their own.
pub const AT_ONCE: usize = 16;

struct Copy {
    version: Version,
    values: Vec<f32>,
    checksum: Option<u64>,
    spare: Arc<Spare>,
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.spare.put(std::mem::take(&mut self.values));
    }
}

/// One that is being made, from the chunk's beginning to its end.
pub struct Copying {
    copy: Copy,
    checksum: Option<unisono_proto::Checksum>,
}

impl Copying {
    /// Of a chunk of `len` values.
    pub fn of(version: Version, len: usize, needs_checksum: bool, spare: &Arc<Spare>) -> Copying {
        let mut values = spare.take(len);
        values.clear();
        let copy = Copy { version, values, checksum: None, spare: spare.clone() };
        Copying { copy, checksum: needs_checksum.then(unisono_proto::Checksum::new) }
    }

    /// Goes on with the next values.
    pub fn add(&mut self, values: &[f32]) {
        self.copy.values.extend_from_slice(values);
        self.checksum.iter_mut().for_each(|checksum| checksum.write(le_bytes(values)));
    }

    fn end(self) -> Arc<Copy> {
        let Copying { mut copy, checksum } = self;
        copy.checksum = checksum.map(|checksum| checksum.finish());
        Arc::new(copy)
    }
}

struct Shared(Arc<Copy>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        le_bytes(&self.0.values)
    }
}

/// A chunk of weights that a stream sends.
pub struct Sent {
    pub version: Version,
    /// XXH3 (64 bits), where streams need one.
    pub checksum: Option<u64>,
    pub bytes: Bytes,
}

/// Those of one chunk.
#[derive(Default)]
pub struct Copies {
    /// The last of either place, while they are on their way.
    last: [Weak<Copy>; 2],
    /// The one that the update made, until so many streams have taken it.
    made: Option<(Arc<Copy>, usize)>,
}

impl Copies {
    /// Whether one that an update made waits for streams that have not taken it.
    #[cfg(test)]
    pub fn any_waits(&self) -> bool {
        self.made.is_some()
    }

    /// An update is through, and has made this one for so many streams, where it was to make one.
    pub fn updated(&mut self, copy: Option<Copying>, streams: usize) {
        self.made = copy.map(|copy| (copy.end(), streams));
        if let Some((made, _)) = &self.made {
            self.last[made.version.place() as usize % 2] = Arc::downgrade(made);
        }
    }

    /// The weights of `version`, which are `values`, for one more stream.
    pub fn send(&mut self, version: Version, values: &[f32], needs_checksum: bool, spare: &Arc<Spare>) -> Sent {
        let last = &mut self.last[version.place() as usize % 2];
        let copy = last.upgrade().filter(|copy| copy.version == version).unwrap_or_else(|| {
            let mut copy = Copying::of(version, values.len(), needs_checksum, spare);
            copy.add(values);
            let copy = copy.end();
            *last = Arc::downgrade(&copy);
            copy
        });
        if let Some((made, streams)) = &mut self.made
            && made.version == version
        {
            *streams -= 1;
            if *streams == 0 {
                self.made = None;
            }
        }
        Sent { version, checksum: copy.checksum, bytes: Bytes::from_owner(Shared(copy)) }
    }
}
