//! The vhost-user-blk back end: disks served to any VMM over Unix sockets.
//!
//! ```text
//! client --socket--> session (a thread a client) --messages--> worker (a thread, a ring)
//! client --kick----------------------------------------------> worker --I/O--> pool, base
//! client <-call----------------------------------------------- worker
//!     worker <-> copies (threads of each pool), reads of bases (of each base), flusher (one a pool)
//! ```
//! Invariants:
//! - A queue is served by one worker; everything about it is that worker's alone. Nothing on the
//!   data path takes a lock that another worker takes.
//! - A request holds the generation of guest memory it came from until it is answered.
//! - Every request is answered once: `Task` is the one place that decides when.
//! - What waits (busy, full, starved) is parked and bounded by the sizes of the queues; nothing
//!   waits for space longer than the no-space timeout, or when its queue is to stop.
//! - A client can harm its own session only.

mod bounce;
mod crew;
#[cfg(all(test, feature = "shuttle"))]
mod crew_model;
mod device;
mod events;
mod files;
mod helpers;
mod lane;
mod listen;
mod mailbox;
mod session;
mod stats;
mod task;
mod worker;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::cowdisk::{Disk, DiskError};
use crate::format::units::DiskId;
use crate::sync::{Arc, JoinHandle, Mutex, Vital, spawn_named};

use device::Device;
pub use events::{Event, EventKind};
use helpers::{Flusher, Helpers};
use listen::{Assign, Port, Reception};
pub use stats::{DiskStats, OpCounts};
use worker::{WorkerHandle, WorkerOptions};

/// Most queues of one disk.
pub const QUEUES_MAX: u16 = 256;
/// Most workers.
pub const WORKERS_MAX: usize = 64;
/// Longest time that adaptive polling may look about before sleeping.
pub const POLLING_US_MAX: u32 = 1000;

/// How a [`Server`] behaves.
#[derive(Debug, Clone, Copy)]
pub struct ServerOptions {
    /// Worker threads, 1 to [`WORKERS_MAX`]; the queues of all disks are spread over them.
    pub workers: usize,
    /// How long a write waits for space in a full pool before the guest gets an error.
    pub no_space_timeout: Duration,
    /// How long at most, in microseconds, a worker looks for more requests before it sleeps, where
    /// that has paid lately; 0 for not at all. At most [`POLLING_US_MAX`].
    pub polling_us: u32,
    /// Takes guest memory in files of any kind. A worker that touches memory of a file whose storage
    /// hangs does so too, with all the disks that it serves: without this only memfds and files on
    /// tmpfs and hugetlbfs are taken.
    pub any_memory: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            workers: cpus.min(4),
            no_space_timeout: Duration::from_secs(60),
            polling_us: 0,
            any_memory: false,
        }
    }
}

/// Why a disk is not served, or no longer as it should be.
#[derive(Debug, Error)]
pub enum ServeError {
    /// This disk is being served, on whatever socket.
    #[error("disk {0} is being served already")]
    Duplicate(String),
    /// No disk is being served there.
    #[error("no disk is being served on {0}")]
    Unknown(PathBuf),
    /// An impossible number of queues.
    #[error("{0} queues are not between 1 and {QUEUES_MAX}")]
    Queues(u16),
    /// The pool has no file that a ring could read and write.
    #[error("disk {0} has no file that can be served")]
    NoFile(String),
    /// The socket could not be made.
    #[error("cannot listen on {path}")]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The last flush failed.
    #[error("cannot flush disk {name}")]
    Flush {
        /// Which disk.
        name: String,
        /// Why.
        source: DiskError,
    },
}

/// Serves disks until it is shut down or dropped.
#[derive(Debug)]
pub struct Server {
    workers: Arc<Vec<WorkerHandle>>,
    helpers: Helpers,
    reception: Arc<Reception>,
    acceptor: Option<JoinHandle<()>>,
    ports: Mutex<Ports>,
    events: Option<SyncSender<Event>>,
    any_memory: bool,
}

/// Found without a look at the others: there may be tens of thousands.
#[derive(Debug, Default)]
struct Ports {
    /// In the order in which they were added, by their number.
    list: BTreeMap<usize, Arc<Port>>,
    by_socket: HashMap<PathBuf, usize>,
    disks: HashSet<DiskKey>,
    /// One for each pool that has been seen, by the pool's address.
    flushers: HashMap<usize, Weak<Flusher>>,
    added: usize,
}

/// The address of a disk's pool, which lives as long as the disk is open, and the disk in it.
type DiskKey = (usize, DiskId);

fn pool_key(disk: &Disk) -> usize {
    Arc::as_ptr(disk.pool()).addr()
}

fn disk_key(disk: &Disk) -> DiskKey {
    (pool_key(disk), disk.id())
}

impl Server {
    /// Starts the threads; no disk is served yet.
    ///
    /// # Errors
    /// No threads, no memory, or io_uring is not allowed here (`kernel.io_uring_disabled`).
    pub fn start(options: ServerOptions) -> io::Result<Self> {
        Self::start_with(options, None)
    }

    /// As [`Server::start`], and tells `events` what happens to the clients. It never waits there:
    /// what does not fit is counted in the next [`Event`].
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_reporting(options: ServerOptions, events: SyncSender<Event>) -> io::Result<Self> {
        Self::start_with(options, Some(events))
    }

    fn start_with(options: ServerOptions, events: Option<SyncSender<Event>>) -> io::Result<Self> {
        let ServerOptions {
            workers,
            no_space_timeout,
            polling_us,
            any_memory,
        } = options;
        let polling = Duration::from_micros(polling_us.min(POLLING_US_MAX).into());
        let options = WorkerOptions {
            no_space_timeout,
            polling,
        };
        let handles: io::Result<Vec<WorkerHandle>> = (0..workers.clamp(1, WORKERS_MAX))
            .map(|shard| WorkerHandle::start(shard, options))
            .collect();
        let workers = Arc::new(handles?);
        let reception = Arc::new(Reception::new()?);
        let (accepting, theirs) = (Arc::clone(&reception), Arc::clone(&workers));
        let assign: Assign = Arc::new(move |offset, queues| {
            let workers = Arc::clone(&theirs);
            // The queues of a disk lie side by side, and the next disk begins after them.
            Box::new(move |index| {
                let place = offset.wrapping_mul(queues).wrapping_add(index);
                Arc::clone(&workers[place % workers.len()].mailbox)
            })
        });
        // Last: it ends when the server that is returned says so.
        let acceptor = spawn_named("vblk-accept", move || {
            let _vital = Vital::new();
            accepting
                .run(&assign)
                .expect("poll of our own sockets cannot fail");
        })?;
        Ok(Self {
            workers,
            helpers: Helpers::default(),
            reception,
            acceptor: Some(acceptor),
            ports: Mutex::new(Ports::default()),
            events,
            any_memory,
        })
    }

    /// Serves `disk` on a new socket at `socket`, with up to `queues_max` queues. The socket file
    /// is removed when the disk is.
    ///
    /// # Errors
    /// The variants of [`ServeError`] but `Unknown` and `Flush`.
    pub fn add(&self, disk: Disk, socket: &Path, queues_max: u16) -> Result<(), ServeError> {
        let name = disk.name();
        if !(1..=QUEUES_MAX).contains(&queues_max) {
            return Err(ServeError::Queues(queues_max));
        }
        if disk.data_fd().is_none() {
            return Err(ServeError::NoFile(name));
        }
        let mut ports = self.ports.lock();
        let key = disk_key(&disk);
        if ports.disks.contains(&key) {
            return Err(ServeError::Duplicate(name));
        }
        let flusher = ports.flusher(&disk).map_err(ServeError::Thread)?;
        let helpers = self.helpers.of(&disk);
        let events = self.events.clone();
        let any_memory = self.any_memory;
        let device = Device::new(disk, queues_max, flusher, helpers, events, any_memory);
        let device = Arc::new(device);
        let failed = |source| ServeError::Socket {
            path: socket.to_owned(),
            source,
        };
        let number = ports.added;
        let port = Arc::new(Port::bind(device, socket, number).map_err(failed)?);
        self.reception.add(&port).map_err(failed)?;
        ports.added += 1;
        ports.disks.insert(key);
        ports.by_socket.insert(socket.to_owned(), number);
        ports.list.insert(number, port);
        Ok(())
    }

    /// Stops serving the disk on `socket`, the path as it was given to [`Server::add`]: names are
    /// unique within a pool only. Its client is disconnected, what was begun is finished and
    /// flushed, and its socket removed.
    ///
    /// # Errors
    /// `Unknown`, or `Flush`; in the latter case the disk is no longer served all the same.
    pub fn remove(&self, socket: &Path) -> Result<(), ServeError> {
        let port = {
            let mut ports = self.ports.lock();
            let found = ports.take(socket);
            found.ok_or_else(|| ServeError::Unknown(socket.to_owned()))?
        };
        self.retire(&port)
    }

    fn retire(&self, port: &Arc<Port>) -> Result<(), ServeError> {
        self.reception.remove(port);
        port.close();
        Self::flush(port)
    }

    fn flush(port: &Port) -> Result<(), ServeError> {
        let disk = &port.device.disk;
        if disk.is_read_only() {
            return Ok(());
        }
        disk.flush().map_err(|source| ServeError::Flush {
            name: disk.name(),
            source,
        })
    }

    /// The names of the disks being served, and their sockets. Disks of two pools may have one
    /// name; a socket has one disk.
    #[must_use]
    pub fn disks(&self) -> Vec<(String, PathBuf)> {
        let ports = self.ports.lock();
        let listed = ports.list.values();
        listed
            .map(|port| (port.device.disk.name(), port.path().to_owned()))
            .collect()
    }

    /// Counters by disk name, since each was added; in the order of [`Server::disks`].
    #[must_use]
    pub fn stats(&self) -> Vec<(String, DiskStats)> {
        let ports = self.ports.lock();
        ports
            .list
            .values()
            .map(|port| (port.device.disk.name(), port.device.stats()))
            .collect()
    }

    /// Stops everything: no new clients, the present ones disconnected, what was begun finished
    /// and flushed, sockets removed, threads ended.
    ///
    /// # Errors
    /// The first flush that failed; everything is stopped all the same.
    pub fn shutdown(mut self) -> Result<(), ServeError> {
        self.stop()
    }

    fn stop(&mut self) -> Result<(), ServeError> {
        self.reception.close();
        if let Some(acceptor) = self.acceptor.take() {
            // A panic was reported by the thread itself.
            drop(acceptor.join());
        }
        let ports = std::mem::take(&mut *self.ports.lock());
        // All end at the same time: with one after the other, clients that take no replies would
        // have their patience added up.
        let ending = ports.list.into_values().map(|port| {
            self.reception.remove(&port);
            let deadline = port.begin_closing();
            (port, deadline)
        });
        let ending: Vec<(Arc<Port>, Instant)> = ending.collect();
        for (port, deadline) in &ending {
            port.wait_closed(*deadline);
        }
        let flushes = ending.iter().map(|(port, _)| Self::flush(port));
        flushes.fold(Ok(()), Result::and)
    }

    /// Worker threads.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Errors go to those who call `shutdown`.
        drop(self.stop());
    }
}

impl Ports {
    /// The port at `socket`, which is forgotten.
    fn take(&mut self, socket: &Path) -> Option<Arc<Port>> {
        let number = self.by_socket.remove(socket)?;
        let port = self.list.remove(&number)?;
        self.disks.remove(&disk_key(&port.device.disk));
        Some(port)
    }

    /// The flusher of the disk's pool.
    fn flusher(&mut self, disk: &Disk) -> io::Result<Arc<Flusher>> {
        let key = pool_key(disk);
        // A flusher lives no longer than the disks that use it, and these keep their pool.
        if let Some(flusher) = self.flushers.get(&key).and_then(Weak::upgrade) {
            return Ok(flusher);
        }
        self.flushers.retain(|_, known| known.strong_count() > 0);
        let flusher = Arc::new(Flusher::start()?);
        self.flushers.insert(key, Arc::downgrade(&flusher));
        Ok(flusher)
    }
}
