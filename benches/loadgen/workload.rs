//! Which block comes next, and what is written to it.

use std::error::Error;

use crate::guest::Kind;
use crate::random::Random;
use crate::{Args, Direction, Order};

/// The stream of requests of one run.
#[derive(Debug)]
pub(crate) struct Workload {
    rng: Random,
    order: Order,
    direction: Direction,
    read_percent: u64,
    blocks: u32,
    next: u32,
    shuffled: Vec<u32>,
    flush_every: u64,
    writes_unflushed: u64,
}

impl Workload {
    /// Requests on the first `span` bytes.
    ///
    /// # Errors
    /// The span holds no block, or more than 2^32 of them.
    pub(crate) fn new(args: &Args, span: u64) -> Result<Self, Box<dyn Error>> {
        let blocks = u32::try_from(span / u64::from(args.block))?;
        if blocks == 0 {
            return Err("the disk is smaller than one block".into());
        }
        let mut rng = Random(args.seed);
        let mut shuffled = Vec::new();
        if args.order == Order::Once {
            shuffled = (0..blocks).collect();
            for last in (1..shuffled.len()).rev() {
                let other = usize::try_from(rng.below(last as u64 + 1))?;
                shuffled.swap(last, other);
            }
        }
        Ok(Self {
            rng,
            order: args.order,
            direction: args.rw,
            read_percent: u64::from(args.read_percent),
            blocks,
            next: 0,
            shuffled,
            flush_every: args.flush_every,
            writes_unflushed: 0,
        })
    }

    /// Blocks in the span.
    pub(crate) fn blocks(&self) -> u32 {
        self.blocks
    }

    fn next_block(&mut self) -> Option<u32> {
        let index = self.next;
        match self.order {
            Order::Random => u32::try_from(self.rng.below(u64::from(self.blocks))).ok(),
            Order::Sequential => {
                self.next = (index + 1) % self.blocks;
                Some(index)
            }
            Order::Once => {
                self.next = index.saturating_add(1);
                self.shuffled.get(usize::try_from(index).ok()?).copied()
            }
            Order::Fill => {
                self.next = index.saturating_add(1);
                (index < self.blocks).then_some(index)
            }
        }
    }

    /// The next request and its block; none when an order that ends has ended.
    pub(crate) fn next(&mut self) -> Option<(Kind, u32)> {
        if self.flush_every > 0 && self.writes_unflushed >= self.flush_every {
            self.writes_unflushed = 0;
            return Some((Kind::Flush, 0));
        }
        let block = self.next_block()?;
        let kind = match self.direction {
            Direction::Read => Kind::Read,
            Direction::Write => Kind::Write,
            Direction::Mix if self.rng.below(100) < self.read_percent => Kind::Read,
            Direction::Mix => Kind::Write,
        };
        self.writes_unflushed += u64::from(kind == Kind::Write);
        Some((kind, block))
    }
}

/// Writes the stamp of (`block`, `generation`) over all of `data`: every 8 bytes differ from those
/// of any other place or generation.
pub(crate) fn stamp(data: &mut [u8], seed: u64, block: u32, generation: u32) {
    let mut rng = Random(seed ^ (u64::from(block) << 32) ^ u64::from(generation));
    rng = Random(rng.next());
    for word in data.chunks_mut(8) {
        let bytes = rng.next().to_le_bytes();
        word.copy_from_slice(&bytes[..word.len()]);
    }
}

/// What a correct disk holds: the generation of the last write to every block.
#[derive(Debug)]
pub(crate) struct Model {
    generations: Vec<u32>,
    is_busy: Vec<bool>,
    seed: u64,
}

impl Model {
    pub(crate) fn new(blocks: u32, seed: u64) -> Self {
        let blocks = usize::try_from(blocks).expect("u32 fits a usize");
        Self {
            generations: vec![0; blocks],
            is_busy: vec![false; blocks],
            seed,
        }
    }

    fn index(block: u32) -> usize {
        usize::try_from(block).expect("u32 fits a usize")
    }

    /// Claims a block for one request; false if one is in flight there, whose outcome would then
    /// be undefined.
    pub(crate) fn claim(&mut self, block: u32) -> bool {
        !std::mem::replace(&mut self.is_busy[Self::index(block)], true)
    }

    /// The request on the block has completed.
    pub(crate) fn release(&mut self, block: u32) {
        self.is_busy[Self::index(block)] = false;
    }

    /// Fills `data` with the block's next generation.
    pub(crate) fn stamp_next(&mut self, block: u32, data: &mut [u8]) {
        let generation = &mut self.generations[Self::index(block)];
        *generation += 1;
        stamp(data, self.seed, block, *generation);
    }

    /// The byte offset of the first difference from what was written, if any. A block never
    /// written may hold anything.
    pub(crate) fn check(&self, block: u32, data: &[u8], scratch: &mut [u8]) -> Option<usize> {
        let generation = self.generations[Self::index(block)];
        if generation == 0 {
            return None;
        }
        stamp(scratch, self.seed, block, generation);
        data.iter().zip(scratch.iter()).position(|(a, b)| a != b)
    }

    /// Blocks written at least once.
    pub(crate) fn written(&self) -> Vec<u32> {
        (0..)
            .zip(&self.generations)
            .filter(|(_, generation)| **generation > 0)
            .map(|(block, _)| block)
            .collect()
    }
}
