//! The disk below: a volatile cache in which every block keeps all of its unflushed versions, any
//! one of which a power cut may leave.

use crate::pool::Batch;
use std::rc::Rc;

/// What a guest writes; no two writes write the same. 0 is zeros.
pub(crate) type Value = u64;

/// A small generator.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ (z >> 31)) % n as u64).expect("below a usize")
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// What a block holds. A batch fills two blocks, and counts if both hold it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Content {
    Data(Value),
    Batch(Rc<Batch>),
    /// The superblock: the number of the opening.
    Opening(u32),
}

#[derive(Debug, Clone)]
struct Block {
    /// Each with the time it was written: the durable one first, the present one last.
    versions: Vec<(u64, Content)>,
    /// A flush of versions up to this time failed. The cache calls them clean, so that no later
    /// flush saves them (fsyncgate).
    lost_until: u64,
}

/// Moment at which a flush began.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Began(u64);

/// See the module. Blocks are numbered.
#[derive(Debug, Clone)]
pub(crate) struct Device {
    blocks: Vec<Block>,
    now: u64,
}

impl Device {
    pub(crate) fn new(blocks: usize) -> Self {
        let empty = Block {
            versions: vec![(0, Content::Data(0))],
            lost_until: 0,
        };
        Self {
            blocks: vec![empty; blocks],
            now: 1,
        }
    }

    /// The present version, durable or not.
    pub(crate) fn read(&self, at: usize) -> &Content {
        let (_, content) = self.blocks[at].versions.last().expect("never empty");
        content
    }

    pub(crate) fn value(&self, at: usize) -> Value {
        match self.read(at) {
            Content::Data(value) => *value,
            Content::Batch(_) | Content::Opening(_) => panic!("block {at} is metadata"),
        }
    }

    /// The write is in the cache.
    pub(crate) fn write(&mut self, at: usize, content: Content) {
        self.now += 1;
        self.blocks[at].versions.push((self.now, content));
    }

    /// A durable write of this block has completed.
    pub(crate) fn settle(&mut self, at: usize) {
        let versions = &mut self.blocks[at].versions;
        versions.drain(..versions.len() - 1);
    }

    /// A durable write of this block has failed: it may or may not be there, and no flush saves it.
    pub(crate) fn fail(&mut self, at: usize) {
        self.blocks[at].lost_until = self.now;
    }

    pub(crate) fn flush_begin(&self) -> Began {
        Began(self.now)
    }

    /// The flush of the blocks `covered` is over. It saves what was written before it began.
    pub(crate) fn flush_end(
        &mut self,
        Began(began): Began,
        is_ok: bool,
        covered: impl Fn(usize) -> bool,
    ) {
        for (at, block) in self.blocks.iter_mut().enumerate() {
            if block.versions.len() == 1 || !covered(at) {
                continue;
            }
            let last = block.versions.iter().rposition(|(time, _)| *time <= began);
            let last = last.expect("a flush begins after the durable version");
            if !is_ok && last > 0 {
                block.lost_until = began;
            } else if block.versions[last].0 > block.lost_until {
                block.versions.drain(..last);
            }
        }
    }

    /// Every block has one of its versions, and that one is durable.
    pub(crate) fn power_cut(&mut self, random: &mut Random) {
        let bias = random.below(4);
        for block in &mut self.blocks {
            let len = block.versions.len();
            let kept = match bias {
                0 => 0,
                1 => len - 1,
                _ => random.below(len),
            };
            block.versions = vec![block.versions.swap_remove(kept)];
            block.lost_until = 0;
        }
    }
}
