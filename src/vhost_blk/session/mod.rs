//! One client's session: the vhost-user requests (QEMU's interop document) turned into queues on
//! workers.
//!
//! A ring runs when it has a size, addresses and a kick, and is enabled (which it is from the
//! start unless protocol features were negotiated). Whatever is changed on a running ring, other
//! than where to call and the memory table, stops and drains it first.
//!
//! A ring begins at its used index, whatever base the client names. A ring that stops is drained, so
//! the two are the same where a front end keeps the base that GET_VRING_BASE told it, or, as QEMU
//! does without an answer, the used index. Cloud Hypervisor names the avail index instead, when it
//! connects again and in snapshots: what lies between would never be answered. (DPDK and
//! libvhost-user go by the used index too. With INFLIGHT_SHMFD, which is not offered, it would be
//! otherwise.) A client that lies in its own used ring harms its own queue.

mod requests;

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Weak;
use std::sync::mpsc::sync_channel;

use vhost::vhost_user::{BackendReqHandler, Error, Result, VhostUserVirtioFeatures};

use crate::sync::{Arc, Mutex};
use crate::sys::allowance::Allowance;
use crate::sys::fd::EventFd;
use crate::sys::mmap::{GuestMemory, Region};
use crate::virtio::blk;
use crate::virtio::queue::{RingAddresses, SplitQueue};

use crate::vhost_blk::device::{Device, Leash};
use crate::vhost_blk::events::EventKind;
use crate::vhost_blk::mailbox::{LaneId, Mailbox, Message, Start};

/// Most memory regions a client may map.
const MEM_SLOTS_MAX: usize = 509;
/// Most former memory tables that requests may be on still: those that wait keep theirs.
const FORMER_TABLES_MAX: usize = 64;

/// Which worker serves queue `index` of this disk.
pub(in crate::vhost_blk) type PickWorker = Box<dyn Fn(usize) -> Arc<Mailbox> + Send>;

/// A ring's addresses in the front end's address space.
#[derive(Debug, Clone, Copy, Default)]
struct RingHvas {
    desc: u64,
    avail: u64,
    used: u64,
}

#[derive(Debug)]
struct Running {
    worker: Arc<Mailbox>,
    lane: LaneId,
}

#[derive(Debug, Default)]
struct Vring {
    size: u16,
    /// Where the client would go on.
    base: u16,
    at: Option<RingHvas>,
    kick: Option<Arc<EventFd>>,
    call: Option<Arc<EventFd>>,
    error: Option<Arc<EventFd>>,
    is_enabled: bool,
    running: Option<Running>,
}

struct State {
    device: Arc<Device>,
    leash: Arc<Leash>,
    pick: PickWorker,
    features: u64,
    regions: Vec<Region>,
    memory: Arc<GuestMemory>,
    /// Tables before that, as long as requests are on them.
    former: Vec<Weak<GuestMemory>>,
    /// What the client may have mapped.
    allowance: Allowance,
    vrings: Vec<Vring>,
    /// Nothing is started any more.
    is_over: bool,
}

/// See the module.
pub(in crate::vhost_blk) struct Session {
    state: Mutex<State>,
    /// Guest memory may be in files of any kind.
    any_memory: bool,
    /// Told when a whole message has arrived.
    heard: Box<dyn Fn() + Send + Sync>,
}

fn refused(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, error))
}

impl State {
    fn offered(&self) -> u64 {
        self.device.features() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn has_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    fn rings(memory: &GuestMemory, at: RingHvas) -> Result<RingAddresses> {
        let find = |hva| {
            memory
                .gpa_of(hva)
                .ok_or_else(|| refused(format!("ring at {hva:#x} is not in memory")))
        };
        Ok(RingAddresses {
            desc: find(at.desc)?,
            avail: find(at.avail)?,
            used: find(at.used)?,
        })
    }

    /// Starts a ring that has all it needs; one that has not, or runs already, stays as it is.
    fn start_if_ready(&mut self, index: u32) -> Result<()> {
        let (features, memory) = (self.features, Arc::clone(&self.memory));
        let is_over = self.is_over;
        let (device, leash) = (Arc::clone(&self.device), Arc::clone(&self.leash));
        let slot = usize::try_from(index).unwrap_or(usize::MAX);
        let worker = (self.pick)(slot);
        let vring = self.vring(index)?;
        let (Some(at), Some(kick), None) = (vring.at, &vring.kick, &vring.running) else {
            return Ok(());
        };
        if is_over || !vring.is_enabled || vring.size == 0 {
            return Ok(());
        }
        let rings = Self::rings(&memory, at)?;
        let wanted = blk::queue_features(features);
        let queue = SplitQueue::new(&memory, vring.size, rings, wanted).map_err(refused)?;
        let (named, next) = (vring.base, queue.next_avail());
        if named != next {
            let reason = format_args!("queue {index}: the client named {named}, its ring {next}");
            device.report(EventKind::BaseCorrected, &reason);
        }
        let (reply, answer) = sync_channel(1);
        worker.post(Message::Start(Box::new(Start {
            device,
            leash,
            queue,
            memory,
            kick: Arc::clone(kick),
            call: vring.call.clone(),
            error: vring.error.clone(),
            features,
            reply,
        })));
        let lane = answer.recv().map_err(|_gone| Error::BackendInternalError)?;
        vring.running = Some(Running {
            worker,
            lane: lane.map_err(Error::ReqHandlerError)?,
        });
        Ok(())
    }

    /// Stops and drains a ring; its base is where to go on, and its used index is there too: a
    /// front end that lost us has nothing else to go by.
    fn stop(&mut self, index: u32) -> Result<()> {
        let vring = self.vring(index)?;
        let Some(running) = vring.running.take() else {
            return Ok(());
        };
        let (reply, answer) = sync_channel(1);
        running.worker.post(Message::Stop {
            lane: running.lane,
            reply,
        });
        vring.base = answer.recv().map_err(|_gone| Error::BackendInternalError)?;
        Ok(())
    }

    /// Changes a ring that may be running.
    fn change(&mut self, index: u32, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.stop(index)?;
        change(self.vring(index)?);
        self.start_if_ready(index)
    }

    fn stop_all(&mut self) {
        let mut answers = Vec::new();
        for vring in &mut self.vrings {
            if let Some(running) = vring.running.take() {
                let (reply, answer) = sync_channel(1);
                running.worker.post(Message::Stop {
                    lane: running.lane,
                    reply,
                });
                answers.push(answer);
            }
        }
        for answer in answers {
            // An error means that the worker died, and its queues with it.
            let _drained = answer.recv();
        }
    }

    /// Makes `regions` the memory table, for running rings too. The former regions stay mapped
    /// until the requests on them are done; a client that has many such tables is not served on.
    fn set_regions(&mut self, regions: Vec<Region>) -> Result<()> {
        self.former.retain(|table| table.strong_count() > 0);
        if self.former.len() >= FORMER_TABLES_MAX {
            return Err(refused(format!(
                "requests wait on {FORMER_TABLES_MAX} memory tables that were replaced"
            )));
        }
        self.former.push(Arc::downgrade(&self.memory));
        self.memory = Arc::new(GuestMemory::new(regions.clone()).map_err(Error::ReqHandlerError)?);
        self.regions = regions;
        for vring in &mut self.vrings {
            let (Some(running), Some(at)) = (&vring.running, vring.at) else {
                continue;
            };
            // A ring that is no longer in memory is given up by its worker.
            let rings = Self::rings(&self.memory, at).unwrap_or(RingAddresses {
                desc: u64::MAX,
                avail: u64::MAX,
                used: u64::MAX,
            });
            let (reply, answer) = sync_channel(1);
            running.worker.post(Message::Memory {
                lane: running.lane,
                memory: Arc::clone(&self.memory),
                rings,
                reply,
            });
            answer.recv().map_err(|_gone| Error::BackendInternalError)?;
        }
        Ok(())
    }

    /// Why the session ends, unless its client simply left.
    fn report(&self, error: &Error) {
        if !matches!(error, Error::Disconnected | Error::SocketBroken(_)) {
            self.device.report(EventKind::SessionRefused, error);
        }
    }

    /// Begins anew, for another owner of the same connection: nothing of the former one is left.
    fn renew(&mut self) -> Result<()> {
        self.reset();
        self.features = 0;
        self.set_regions(Vec::new())
    }

    fn reset(&mut self) {
        self.stop_all();
        self.vrings
            .iter_mut()
            .for_each(|vring| *vring = Vring::default());
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    /// Serves `stream`, which is `handle` too, until its client leaves or breaks the protocol, drains its queues, and
    /// hangs up. Calls `begun` at the start, `next` before each message, `heard` when it is whole, `draining` after the
    /// last.
    pub(in crate::vhost_blk) fn serve(
        device: Arc<Device>,
        stream: UnixStream,
        handle: Arc<UnixStream>,
        pick: PickWorker,
        heard: Box<dyn Fn() + Send + Sync>,
        begun: impl FnOnce(&Arc<Self>),
        mut next: impl FnMut() -> bool,
        draining: impl FnOnce(),
    ) {
        let queues = usize::from(device.queues_max);
        let any_memory = device.any_memory;
        let leash = Arc::new(Leash::new(Arc::clone(&device), handle));
        let state = State {
            device,
            leash,
            pick,
            features: 0,
            regions: Vec::new(),
            memory: Arc::default(),
            former: Vec::new(),
            allowance: Allowance::default(),
            vrings: std::iter::repeat_with(Vring::default)
                .take(queues)
                .collect(),
            is_over: false,
        };
        let session = Arc::new(Self {
            state: Mutex::new(state),
            any_memory,
            heard,
        });
        begun(&session);
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&session));
        while next() {
            if let Err(error) = requests.handle_request() {
                session.state.lock().report(&error);
                break;
            }
        }
        draining();
        session.end();
    }

    /// Drains the queues, for good.
    pub(in crate::vhost_blk) fn end(&self) {
        let mut state = self.state.lock();
        state.is_over = true;
        state.stop_all();
    }

    fn lock(&self) -> crate::sync::MutexGuard<'_, State> {
        (self.heard)();
        self.state.lock()
    }
}
