//! Listening sockets: one thread accepts for all disks; each client is served by a thread of its
//! own, one client a disk. While a disk has a client, the next waits in the socket's backlog.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::format::units::bytes_of;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, Vital, spawn_named};
use crate::sys::clock;
use crate::sys::fd::Event;

use super::device::Device;
use super::events::EventKind;
use super::session::{PickWorker, Session};

/// Bytes of a socket path: `sun_path` less its terminator, unix(7).
pub(super) const PATH_BYTES_MAX: usize = 107;
/// How long a client may take from the first byte of a message to the last, or to take a reply.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(10);
/// How often that is looked at while there are clients.
/// How long a session may take to end once its client was cut off.
const END_TIME_MAX: Duration = Duration::from_secs(1);
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How long nobody is accepted after descriptors, threads or memory ran out: who waits, waits on.
const SHORTAGE: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
struct Client {
    /// To shut down with.
    stream: Option<Arc<UnixStream>>,
    is_running: bool,
    /// No client is taken any more.
    is_closed: bool,
    /// A message has begun to arrive at this time and is not whole yet.
    message_began: Option<Instant>,
    /// No further message is read; what waits is for the queues to end.
    is_draining: bool,
    session: Option<Arc<Session>>,
}

impl Client {
    fn shut(&self, how: Shutdown) {
        if let Some(stream) = &self.stream {
            // Fails if the client has gone by itself, which is as good.
            drop(stream.shutdown(how));
        }
    }
}

/// One disk's socket.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) device: Arc<Device>,
    listener: UnixListener,
    path: PathBuf,
    /// Spreads disks over workers; no other port of the server has the same.
    offset: usize,
    client: Mutex<Client>,
    changed: Condvar,
}

impl Port {
    /// Binds `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// `InvalidInput` if the path is too long, `AddrInUse` if somebody listens, `AlreadyExists` if
    /// there is something else; otherwise as bind(2).
    pub(super) fn bind(device: Arc<Device>, path: &Path, offset: usize) -> io::Result<Self> {
        let bytes = path.as_os_str().len();
        if bytes > PATH_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "socket path {} has {bytes} bytes; the most is {PATH_BYTES_MAX}: use a \
                     shorter directory",
                    path.display()
                ),
            ));
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            device,
            listener,
            path: path.to_owned(),
            offset,
            client: Mutex::new(Client::default()),
            changed: Condvar::new(),
        })
    }

    /// The socket's path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// As [`Port::begin_closing`] and [`Port::wait_closed`], for one port.
    pub(super) fn close(&self) {
        self.wait_closed(self.begin_closing());
    }

    /// Removes the socket and ends the session, if there is one. Says until when its client may take
    /// the reply that it asked for, if it did.
    ///
    /// The client hears of it last. It goes by the used rings from the moment we hang up (QEMU sets
    /// a queue back to its used index and comes again), so nothing may be completed after that:
    /// only our reading ends here, and the session hangs up when its queues are drained.
    pub(super) fn begin_closing(&self) -> Instant {
        let mut client = self.client.lock();
        if !std::mem::replace(&mut client.is_closed, true) {
            // Fails if somebody removed it already.
            drop(fs::remove_file(&self.path));
        }
        client.shut(Shutdown::Read);
        clock::now() + MESSAGE_TIME_MAX
    }

    /// Waits until the session has ended and its queues are drained. A client that has not taken its
    /// reply at `deadline` is cut off.
    ///
    /// A session that is held up even then is left behind, its queues drained by us: it is closing a
    /// descriptor that its client sent, of a file on FUSE, and whoever serves that file does not
    /// answer. Nothing can end such a close(2).
    pub(super) fn wait_closed(&self, deadline: Instant) {
        let mut client = self.client.lock();
        self.wait_until(&mut client, deadline);
        if client.is_running && !client.is_draining {
            client.shut(Shutdown::Both);
            self.wait_until(&mut client, deadline + END_TIME_MAX);
        }
        while client.is_running && client.is_draining {
            self.changed.wait(&mut client);
        }
        if client.is_running {
            let session = client.session.clone();
            drop(client);
            session.iter().for_each(|session| session.end());
            self.device.silence();
        }
    }

    fn wait_until(&self, client: &mut MutexGuard<'_, Client>, deadline: Instant) {
        while client.is_running {
            let left = deadline.saturating_duration_since(clock::now());
            if left.is_zero() {
                return;
            }
            self.changed.wait_for(client, left);
        }
    }

    /// What it is known by to the epoll instance.
    fn number(&self) -> u64 {
        bytes_of(self.offset)
    }

    /// Cuts off a client that stopped in the middle of a message.
    fn watch(&self, now: Instant) {
        let client = self.client.lock();
        let is_late = client
            .message_began
            .is_some_and(|began| now.saturating_duration_since(began) > MESSAGE_TIME_MAX);
        if is_late {
            client.shut(Shutdown::Both);
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.close();
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            format!("{} exists and is not a socket", path.display()),
        ));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_somebody) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("somebody is listening on {}", path.display()),
        )),
    }
}

/// Which worker serves queue `index` of the disk whose offset is given.
pub(super) type Assign = Arc<dyn Fn(usize, usize) -> PickWorker + Send + Sync>;

/// Events taken at once.
const EVENTS_MAX: usize = 64;
/// What the epoll instance says when [`Reception::changed`] was signalled; no port has this number.
const CHANGED: u64 = u64::MAX;

#[derive(Debug, Default)]
struct Ports {
    by_number: HashMap<u64, Arc<Port>>,
    /// Those with a client.
    busy: HashSet<u64>,
    is_closed: bool,
}

/// What the accepting thread and the server share. Whatever happens takes time for the disks that it
/// happens to, and none for the others.
#[derive(Debug)]
pub(super) struct Reception {
    /// Of every port without a client it says once that somebody waits there; the port is put back
    /// when its client has gone.
    epoll: Epoll,
    ports: Mutex<Ports>,
    changed: Event,
}

impl Reception {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let changed = Event::new()?;
        epoll.add(&changed, EpollEvent::new(EpollFlags::EPOLLIN, CHANGED))?;
        Ok(Self {
            epoll,
            ports: Mutex::new(Ports::default()),
            changed,
        })
    }

    /// Takes clients for `port` from now on.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub(super) fn add(&self, port: &Arc<Port>) -> io::Result<()> {
        // Before there can be an event that names it.
        let mut ports = self.ports.lock();
        ports.by_number.insert(port.number(), Arc::clone(port));
        let added = self.epoll.add(&port.listener, first_caller(port));
        if added.is_err() {
            ports.by_number.remove(&port.number());
        }
        Ok(added?)
    }

    /// Takes no more clients for `port`; the one it has goes on.
    pub(super) fn remove(&self, port: &Port) {
        let mut ports = self.ports.lock();
        ports.busy.remove(&port.number());
        if ports.by_number.remove(&port.number()).is_some() {
            let removed = self.epoll.delete(&port.listener);
            removed.expect("it was added, and its descriptor is open");
        }
    }

    pub(super) fn close(&self) {
        self.ports.lock().is_closed = true;
        self.wake();
    }

    fn wake(&self) {
        self.changed
            .signal()
            .expect("writing to our own eventfd cannot fail");
    }

    /// Accepts until closed.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub(super) fn run(self: &Arc<Self>, assign: &Assign) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS_MAX];
        // Ports with a caller, in turn, each once: more than one only while something is short.
        let mut called = VecDeque::new();
        let mut watched = clock::now();
        let mut is_short = false;
        loop {
            let timeout = self.timeout(is_short);
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(nix::errno::Errno::EINTR) => 0,
                Err(errno) => return Err(errno.into()),
            };
            self.changed.clear()?;
            if self.ports.lock().is_closed {
                return Ok(());
            }
            let numbers = events[..count].iter().map(EpollEvent::data);
            called.extend(numbers.filter(|number| *number != CHANGED));
            is_short = !self.take_callers(&mut called, assign, is_short);
            let now = clock::now();
            if now.saturating_duration_since(watched) >= WATCH_INTERVAL {
                watched = now;
                self.busy().iter().for_each(|port| port.watch(now));
            }
        }
    }

    /// Accepts those who wait in turn, until something is short: whoever owns the server is told so,
    /// once. Whether all were accepted.
    fn take_callers(
        self: &Arc<Self>,
        called: &mut VecDeque<u64>,
        assign: &Assign,
        was_short: bool,
    ) -> bool {
        while let Some(number) = called.front() {
            if let Err(error) = self.take_caller(*number, assign) {
                let port = self.ports.lock().by_number.get(number).cloned();
                if let Some(port) = port.filter(|_| !was_short) {
                    port.device.report(EventKind::ClientWaits, &error);
                }
                return false;
            }
            called.pop_front();
        }
        true
    }

    fn timeout(&self, is_short: bool) -> EpollTimeout {
        let wait = match (is_short, self.ports.lock().busy.is_empty()) {
            (true, _) => SHORTAGE,
            (false, true) => return EpollTimeout::NONE,
            (false, false) => WATCH_INTERVAL,
        };
        EpollTimeout::try_from(wait).expect("few milliseconds")
    }

    fn busy(&self) -> Vec<Arc<Port>> {
        let ports = self.ports.lock();
        let busy = ports.busy.iter();
        busy.filter_map(|number| ports.by_number.get(number).cloned())
            .collect()
    }

    /// Accepts who waits at port `number`, if it is still there and he is.
    ///
    /// # Errors
    /// The host is short of something: to be tried again.
    fn take_caller(self: &Arc<Self>, number: u64, assign: &Assign) -> io::Result<()> {
        let port = self.ports.lock().by_number.get(&number).cloned();
        let Some(port) = port else { return Ok(()) };
        match self.accept(&port, assign) {
            Ok(()) => Ok(()),
            Err(error) if is_shortage(&error) => Err(error),
            Err(_gone) => {
                self.listen(&port);
                Ok(())
            }
        }
    }

    /// Waits at `port` for the next caller.
    fn listen(&self, port: &Port) {
        let mut ports = self.ports.lock();
        ports.busy.remove(&port.number());
        if ports.by_number.contains_key(&port.number()) {
            let listening = self.epoll.modify(&port.listener, &mut first_caller(port));
            listening.expect("it was added, and its descriptor is open");
        }
    }

    /// # Errors
    /// As accept4(2) and dup(2); `WouldBlock` and `ConnectionAborted` if the client has given up
    /// meanwhile.
    fn accept(self: &Arc<Self>, port: &Arc<Port>, assign: &Assign) -> io::Result<()> {
        // A client takes two descriptors. With one left it would be accepted to be turned away.
        let spare = port.listener.try_clone()?;
        let (stream, _) = port.listener.accept()?;
        drop(spare);
        stream.set_nonblocking(false)?;
        let handle = Arc::new(stream.try_clone()?);
        {
            let mut client = port.client.lock();
            if client.is_closed {
                return Ok(());
            }
            client.stream = Some(Arc::clone(&handle));
            client.is_running = true;
        }
        self.ports.lock().busy.insert(port.number());
        let (reception, theirs) = (Arc::clone(self), Arc::clone(port));
        let pick = assign(port.offset, usize::from(port.device.queues_max));
        let started = spawn_named("vblk-session", move || {
            // Whatever happens in a session, its port must be free again afterwards.
            let _done = Guard {
                port: &theirs,
                reception: &reception,
            };
            let _vital = Vital::new();
            serve(&theirs, stream, handle, pick);
        });
        started.map(drop).inspect_err(|_| {
            self.ports.lock().busy.remove(&port.number());
            release(port);
        })
    }
}

/// Whether it is the host that is short of something, not the client that is gone.
fn is_shortage(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    !matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// To be told, once, that somebody waits at `port`.
fn first_caller(port: &Port) -> EpollEvent {
    let once = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
    EpollEvent::new(once, port.number())
}

struct Guard<'a> {
    port: &'a Port,
    reception: &'a Reception,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        release(self.port);
        self.reception.listen(self.port);
        // Whoever is short of what this client had need not wait.
        self.reception.wake();
    }
}

fn release(port: &Port) {
    let mut client = port.client.lock();
    *client = Client {
        is_closed: client.is_closed,
        ..Client::default()
    };
    port.changed.notify_all();
}

fn serve(port: &Arc<Port>, stream: UnixStream, handle: Arc<UnixStream>, pick: PickWorker) {
    let peek = Arc::clone(&handle);
    let (begins, heard, drains) = (Arc::clone(port), Arc::clone(port), Arc::clone(port));
    let shown = Arc::clone(port);
    let next = move || {
        // Between messages a client may take as long as it likes.
        let mut fds = [PollFd::new(peek.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => break,
                Err(nix::errno::Errno::EINTR) => {}
                Err(_errno) => return false,
            }
        }
        begins.client.lock().message_began = Some(clock::now());
        true
    };
    let heard = Box::new(move || heard.client.lock().message_began = None);
    let draining = move || drains.client.lock().is_draining = true;
    let begun = move |session: &Arc<Session>| {
        shown.client.lock().session = Some(Arc::clone(session));
    };
    let device = Arc::clone(&port.device);
    Session::serve(device, stream, handle, pick, heard, begun, next, draining);
}
