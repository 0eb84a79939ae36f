//! The guest next door: as many requests in flight as it can, of every kind and size, and every
//! way to misbehave.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::client::{Desc, INDIRECT, NEXT, Ram, WRITE, req};
use crate::guest::{
    DATA, DISCARD, FLUSH, GET_ID, GPA, Guest, IN, MODERN, OUT, Style, WRITE_ZEROES,
};
use crate::random::Random;

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Reads of 4 KiB: what others are compared with.
    Ordinary,
    /// Every kind and size of request.
    Anything,
    /// The same, and never a flush.
    NeverFlush,
    /// Discards of whole leaves of the map.
    OnlyDiscard,
    /// Zeroes with edges inside blocks, and writes around them.
    PartialZeroes,
    /// First writes all over the disk, until there is no space, and on.
    Fill,
    /// Comes, works and goes without a word, requests in flight.
    Vanish,
    /// Changes its memory tables under its requests.
    Memory,
    /// Rings that are no rings.
    Broken,
}

pub const MOODS: [Mood; 8] = [
    Mood::Anything,
    Mood::NeverFlush,
    Mood::OnlyDiscard,
    Mood::PartialZeroes,
    Mood::Fill,
    Mood::Vanish,
    Mood::Memory,
    Mood::Broken,
];

/// Requests in flight.
const DEPTH: u16 = 32;
/// Descriptors of a request.
const PER_REQUEST: u16 = 4;
/// Its memory: data for one of the longest requests.
const RAM: usize = 80 << 20;
/// Bytes of data it can have in one request.
const DATA_LEN: u64 = (RAM as u64) - (8 << 20);

const STYLE: Style = Style {
    size: DEPTH * PER_REQUEST,
    ..MODERN
};

/// A request: kind, sector, bytes of data in pieces, and for ranges what they say.
struct Request {
    kind: u32,
    sector: u64,
    len: u64,
    range: Option<(u64, u32, u32)>,
}

/// The guest.
pub struct Stranger {
    socket: PathBuf,
    /// Sectors of its disk.
    sectors: u64,
    mood: Mood,
    random: Random,
    /// Answers it got.
    pub answered: u64,
}

impl Stranger {
    pub fn new(socket: &Path, size: u64, mood: Mood, seed: u64) -> Self {
        Self {
            socket: socket.to_owned(),
            sectors: size / 512,
            mood,
            random: Random(seed),
            answered: 0,
        }
    }

    /// Goes on until it is told to stop.
    pub fn run(mut self, stop: &AtomicBool) -> u64 {
        while !stop.load(Ordering::Relaxed) {
            let Some(mut guest) = self.boot() else {
                continue;
            };
            match self.mood {
                Mood::Broken => self.break_ring(&mut guest),
                Mood::Vanish => self.load(&mut guest, 200, stop),
                Mood::Ordinary
                | Mood::Anything
                | Mood::NeverFlush
                | Mood::OnlyDiscard
                | Mood::PartialZeroes
                | Mood::Fill
                | Mood::Memory => self.load(&mut guest, u64::MAX, stop),
            }
        }
        self.answered
    }

    fn boot(&self) -> Option<Guest> {
        Guest::try_boot_on(Ram::new(GPA, RAM), &self.socket, STYLE)
    }

    /// Keeps requests in flight until `most` were answered. What is in flight then stays there.
    fn load(&mut self, guest: &mut Guest, most: u64, stop: &AtomicBool) {
        let mut free: Vec<u16> = (0..DEPTH).map(|slot| slot * PER_REQUEST).collect();
        let mut answered = 0;
        while answered < most && !stop.load(Ordering::Relaxed) {
            while let Some(first) = free.pop() {
                self.put(guest, first);
            }
            // What waits for space may wait for long.
            let wait = Duration::from_millis(20);
            while let Some((head, _)) = guest.queues[0].wait_used(&guest.ram, wait) {
                free.push(u16::try_from(head).expect("a head of ours"));
                answered += 1;
                if free.len() >= usize::from(DEPTH / 4) {
                    break;
                }
            }
            if self.mood == Mood::Memory && self.random.below(4) == 0 {
                // The same memory again: what is in flight keeps the old table.
                let Guest { wire, ram, .. } = guest;
                if !wire.set_mem_table(&[ram]) {
                    break;
                }
            }
        }
        self.answered += answered;
    }

    fn put(&mut self, guest: &mut Guest, first: u16) {
        let Request {
            kind,
            sector,
            len,
            range,
        } = self.draw();
        let writable = if matches!(kind, IN | GET_ID) {
            WRITE
        } else {
            0
        };
        let mut bufs = Vec::new();
        if let Some((sector, sectors, flags)) = range {
            let at = DATA + u64::from(first) * 16;
            let mut bytes = sector.to_le_bytes().to_vec();
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            guest.ram.write(at, &bytes);
            bufs.push((at, 16, 0));
        } else if len > 0 {
            let at = DATA + self.random.below((DATA_LEN - len) / 512 + 1) * 512;
            let len = u32::try_from(len).expect("below 80 MiB");
            // In one piece or two, the first of them odd.
            if len > 512 && self.random.below(3) == 0 {
                bufs.push((at, 100, writable));
                bufs.push((at + 100, len - 100, writable));
            } else {
                bufs.push((at, len, writable));
            }
        }
        bufs.truncate(usize::from(PER_REQUEST) - 2);
        guest.put(0, first, kind, sector, &bufs);
    }

    /// Sector and bytes of a range of at most `most` bytes on the disk.
    fn place(&mut self, most: u64) -> (u64, u64) {
        let sectors = 1 + self.random.below((most / 512).min(self.sectors));
        let sector = self.random.below(self.sectors - sectors + 1);
        (sector, sectors * 512)
    }

    fn moved(&mut self, kind: u32, most: u64) -> Request {
        let (sector, len) = self.place(most);
        let range = None;
        Request {
            kind,
            sector,
            len,
            range,
        }
    }

    fn ranged(&mut self, kind: u32, most: u64, flags: u32) -> Request {
        let (sector, len) = self.place(most);
        let sectors = u32::try_from(len / 512).expect("a small disk");
        let range = Some((sector, sectors, flags));
        Request {
            kind,
            sector: 0,
            len: 0,
            range,
        }
    }

    fn draw(&mut self) -> Request {
        match self.mood {
            Mood::Ordinary => {
                let sector = self.random.below(self.sectors / 8) * 8;
                let (kind, len, range) = (IN, 4096, None);
                Request {
                    kind,
                    sector,
                    len,
                    range,
                }
            }
            Mood::OnlyDiscard => self.ranged(DISCARD, u64::MAX, 0),
            Mood::PartialZeroes => match self.random.below(2) {
                0 => self.ranged(WRITE_ZEROES, 64 << 10, 1),
                _ => self.moved(OUT, 8 << 10),
            },
            Mood::Fill => self.moved(OUT, 256 << 10),
            Mood::Anything | Mood::NeverFlush | Mood::Vanish | Mood::Memory | Mood::Broken => {
                self.anything()
            }
        }
    }

    fn anything(&mut self) -> Request {
        let most = [512, 4096, 64 << 10, 1 << 20, 8 << 20][self.index(5)];
        match self.random.below(10) {
            0..3 => self.moved(IN, most),
            3..6 => self.moved(OUT, most),
            6 => self.ranged(DISCARD, most, 0),
            7 => {
                let may_unmap = u32::try_from(self.random.below(2)).expect("a bit");
                self.ranged(WRITE_ZEROES, most, may_unmap)
            }
            8 if self.mood != Mood::NeverFlush => Request {
                kind: FLUSH,
                sector: 0,
                len: 0,
                range: None,
            },
            _ => Request {
                kind: GET_ID,
                sector: 0,
                len: 20,
                range: None,
            },
        }
    }

    fn index(&mut self, n: u64) -> usize {
        usize::try_from(self.random.below(n)).expect("small")
    }

    /// Some proper requests, then one that no driver would make.
    fn break_ring(&mut self, guest: &mut Guest) {
        for slot in 0..DEPTH / 2 {
            self.put(guest, slot * PER_REQUEST);
        }
        let head = DEPTH * PER_REQUEST - 1;
        let desc = match self.random.below(4) {
            // A ring of descriptors.
            0 => Desc(DATA, 16, NEXT, head),
            // Memory that is not there.
            1 => Desc(1 << 60, 16, 0, 0),
            // A table that is its own table.
            2 => Desc(guest.queues[0].desc_at(), 2048, INDIRECT, 0),
            // Nothing at all.
            _ => Desc(DATA, 0, 0, 0),
        };
        let Guest { ram, queues, wire } = guest;
        queues[0].set_desc(ram, head, desc);
        let before = queues[0].avail;
        queues[0].push(ram, head);
        queues[0].show(ram, before);
        self.answered += 1;
        // Whatever becomes of it, draining answers.
        let stopped = wire.ask(req::GET_VRING_BASE, &[0; 8]);
        assert!(stopped.is_some(), "a broken queue can be stopped");
    }
}
