//! VMMs as they are: what each says when it connects, resets, unplugs, restores and connects again,
//! as tables, played to a server, with a guest's requests in between.

mod scripts;

use std::os::fd::AsFd;

use tidepool::cowdisk::Disk;
use tidepool::vhost_blk::EventKind;

use crate::client::{Ram, Vq, WRITE, Wire, eventfd, feature, req};
use crate::disk::{self, Kind};
use crate::guest::{Bench, DATA, GPA, Guest, IN, OK, RAM};

const SIZE: u64 = 4 << 20;
const QUEUE: u16 = 128;

/// One message, or what happens between messages. Numbers are queues unless said otherwise.
#[derive(Debug, Clone, Copy)]
enum Step {
    Connect,
    Owner,
    GetFeatures,
    /// Virtio features; less what is not offered.
    SetFeatures(u64),
    GetProtocol,
    /// Protocol features; less what is not offered.
    SetProtocol(u64),
    QueueNum,
    MaxSlots,
    /// Bytes.
    Config(u32),
    AddRegion,
    MemTable,
    Num(u32),
    Base(u32, Base),
    Addr(u32),
    Kick(u32),
    Call(u32),
    Err(u32),
    Enable(u32, bool),
    /// GET_VRING_BASE.
    Stop(u32),
    /// The driver makes a new ring for queue 0, elsewhere.
    Fresh,
    /// The guest writes and reads on queue 0, and finds what it wrote.
    Io,
    /// The guest makes this many reads available on queue 0; nobody serves it.
    Post(u16),
    /// They are answered.
    Answered,
    /// The VMM hangs up.
    Leave,
    /// The server ends in good order, and is there again.
    Restart,
}

/// Where a VMM wants a ring to go on.
#[derive(Debug, Clone, Copy)]
enum Base {
    Zero,
    /// As GET_VRING_BASE said.
    Told,
    /// The used index in the ring.
    Used,
    /// The avail index in the ring.
    Avail,
}

/// Of which messages a VMM wants an answer (REPLY_ACK).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Acks {
    None,
    Memory,
    All,
}

struct Script {
    vmm: &'static str,
    /// Where its order of messages was seen.
    source: &'static str,
    acks: Acks,
    steps: &'static [&'static [Step]],
    /// Queues that go on elsewhere than the VMM said.
    corrected: usize,
}

struct Player {
    bench: Bench,
    disk: Disk,
    guest: Guest,
    acks: Acks,
    is_negotiated: bool,
    event_idx: bool,
    offered: (u64, u64),
    rings: u64,
    told: u16,
    posted: u16,
    round: u8,
}

impl Player {
    fn new(acks: Acks) -> Self {
        let mut disk = None;
        let bench = Bench::with(crate::guest::options(), |dir| {
            let made = disk::make(dir, "disk", SIZE, Kind::Memory, false);
            disk.insert(made).clone()
        });
        let guest = Guest {
            wire: Wire::connect(&bench.socket),
            ram: Ram::new(GPA, RAM),
            queues: vec![Vq::new(0, QUEUE, GPA, false), Vq::new(1, QUEUE, GPA, false)],
        };
        Self {
            bench,
            disk: disk.expect("made"),
            guest,
            acks,
            is_negotiated: false,
            event_idx: false,
            offered: (0, 0),
            rings: 0,
            told: 0,
            posted: 0,
            round: 0,
        }
    }

    /// The index that the guest and we see in queue 0's ring at `at`.
    fn index(&self, at: u64) -> u16 {
        self.guest.ram.load_u16(at + 2)
    }

    /// What each kind of base is now.
    fn bases(&self) -> impl Fn(Base) -> u32 + use<> {
        let ring = &self.guest.queues[0];
        let (used, avail) = (self.index(ring.used_at()), self.index(ring.avail_at()));
        let told = self.told;
        move |base| match base {
            Base::Zero => 0,
            Base::Told => told.into(),
            Base::Used => used.into(),
            Base::Avail => avail.into(),
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "the others are the next's")]
    fn is_accepted(&mut self, step: Step) -> bool {
        let is_of_memory = matches!(step, Step::AddRegion | Step::MemTable);
        let bases = self.bases();
        let acks = match self.acks {
            Acks::None => false,
            Acks::Memory => is_of_memory,
            Acks::All => true,
        };
        let Guest { wire, ram, queues } = &mut self.guest;
        wire.acks = acks && self.is_negotiated;
        let hva = ram.hva - ram.gpa;
        let queue = |q: u32| &queues[usize::try_from(q).expect("small")];
        match step {
            Step::Owner => wire.tell(req::SET_OWNER, &[], &[]),
            Step::SetFeatures(bits) => {
                let bits = bits & self.offered.0;
                // Of rings to come as well: not every VMM says it again.
                self.event_idx = bits & feature::EVENT_IDX != 0;
                queues[0].event_idx = self.event_idx;
                wire.tell(req::SET_FEATURES, &bits.to_le_bytes(), &[])
            }
            Step::SetProtocol(bits) => {
                let bits = bits & self.offered.1;
                self.is_negotiated = bits & 8 != 0;
                wire.tell(req::SET_PROTOCOL_FEATURES, &bits.to_le_bytes(), &[])
            }
            Step::AddRegion => wire.mem_region(req::ADD_MEM_REG, ram),
            Step::MemTable => wire.set_mem_table(&[ram]),
            Step::Num(q) => wire.vring_state(req::SET_VRING_NUM, q, QUEUE.into()),
            Step::Base(q, base) => wire.vring_state(req::SET_VRING_BASE, q, bases(base)),
            Step::Addr(q) => {
                let vq = queue(q);
                let mut bytes = q.to_le_bytes().to_vec();
                bytes.extend([0; 4]);
                for at in [vq.desc_at(), vq.used_at(), vq.avail_at(), 0] {
                    bytes.extend((at + hva).to_le_bytes());
                }
                wire.tell(req::SET_VRING_ADDR, &bytes, &[])
            }
            Step::Kick(q) => wire.vring_fd(req::SET_VRING_KICK, q, queue(q).kick.as_fd()),
            Step::Call(q) => wire.vring_fd(req::SET_VRING_CALL, q, queue(q).call.as_fd()),
            Step::Err(q) => wire.vring_fd(req::SET_VRING_ERR, q, eventfd().as_fd()),
            Step::Enable(q, is_on) => wire.vring_state(req::SET_VRING_ENABLE, q, is_on.into()),
            _ => self.is_done(step),
        }
    }

    /// What asks for something, and what is no message.
    #[expect(clippy::wildcard_enum_match_arm, reason = "they do not come here")]
    fn is_done(&mut self, step: Step) -> bool {
        match step {
            Step::Connect => {
                self.guest.wire = Wire::connect(&self.bench.socket);
                self.is_negotiated = false;
            }
            Step::GetFeatures => self.offered.0 = self.guest.wire.ask_u64(req::GET_FEATURES),
            Step::GetProtocol => {
                self.offered.1 = self.guest.wire.ask_u64(req::GET_PROTOCOL_FEATURES);
            }
            Step::QueueNum => return self.guest.wire.ask_u64(req::GET_QUEUE_NUM) == 4,
            Step::MaxSlots => return self.guest.wire.ask_u64(req::GET_MAX_MEM_SLOTS) > 8,
            Step::Config(len) => return self.guest.wire.config(0, len).is_some(),
            Step::Stop(q) => match self.guest.wire.stop(q) {
                Some(told) => self.told = told,
                None => return false,
            },
            Step::Fresh => {
                self.rings += 1;
                let at = GPA + self.rings * 0x1_0000;
                self.guest.queues[0] = Vq::new(0, QUEUE, at, self.event_idx);
            }
            Step::Post(count) => self.post(count),
            Step::Io => self.io(),
            Step::Answered => self.wait(),
            Step::Leave => drop(self.guest.wire.stream.shutdown(std::net::Shutdown::Both)),
            Step::Restart => self.restart(),
            _ => unreachable!("{step:?} is a message"),
        }
        true
    }

    fn io(&mut self) {
        self.round += 1;
        let bytes = vec![self.round; 8192];
        assert_eq!(self.guest.write(0, 8, &bytes), OK);
        assert!(self.guest.read(0, 8, bytes.len()) == bytes);
    }

    fn post(&mut self, count: u16) {
        for i in 0..count {
            let at = DATA + (1 << 20) + u64::from(i) * 4096;
            self.guest.put(0, i * 3, IN, 8, &[(at, 4096, WRITE)]);
        }
        self.posted = count;
    }

    fn wait(&mut self) {
        for _ in 0..std::mem::take(&mut self.posted) {
            let (head, _) = self.guest.wait(0).expect("every request is answered");
            let first = u16::try_from(head).expect("a head");
            assert_eq!(self.guest.status(0, first), OK);
            let at = DATA + (1 << 20) + u64::from(first / 3) * 4096;
            assert!(self.guest.ram.read(at, 4096) == [self.round; 4096]);
        }
    }

    fn restart(&mut self) {
        let Bench { server, socket, .. } = &self.bench;
        server.remove(socket).expect("stopped");
        self.guest.wire.wait_hangup();
        server.add(self.disk.clone(), socket, 4).expect("served");
    }
}

#[test]
fn what_vmms_say_is_understood() {
    for script in scripts::SCRIPTS {
        let mut player = Player::new(script.acks);
        for (at, step) in script.steps.iter().copied().flatten().enumerate() {
            let is_accepted = player.is_accepted(*step);
            let Script { vmm, source, .. } = script;
            assert!(is_accepted, "{vmm} ({source}): step {at}, {step:?}");
        }
        let events: Vec<_> = player.bench.events.try_iter().collect();
        let is_corrected = |event: &&tidepool::vhost_blk::Event| {
            event.kind == EventKind::BaseCorrected && event.reason.contains("queue 0")
        };
        let corrected = events.iter().filter(is_corrected).count();
        assert_eq!(corrected, script.corrected, "{}: {events:?}", script.vmm);
        assert_eq!(events.len(), corrected, "{}: {events:?}", script.vmm);
    }
}

#[test]
fn a_region_that_is_sent_again_takes_the_place_of_the_former() {
    let bench = Bench::new(Kind::Memory, SIZE, false);
    let mut guest = Guest::boot(&bench.socket, crate::guest::MODERN);
    assert_eq!(guest.write(0, 0, &[7; 4096]), OK);
    for _ in 0..3 {
        assert!(guest.wire.mem_region(req::ADD_MEM_REG, &guest.ram));
        assert_eq!(guest.read(0, 0, 4096), [7; 4096]);
    }
    // One that only overlaps is refused still.
    let other = Ram::new(GPA + 4096, RAM);
    assert!(!guest.wire.mem_region(req::ADD_MEM_REG, &other));
}
