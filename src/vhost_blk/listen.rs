//! Listening sockets: one thread accepts for all disks; each client is served by a thread of its
//! own, one client a disk. While a disk has a client, the next waits in the socket's backlog.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sync::{Arc, Condvar, Mutex, spawn_named};
use crate::sys::clock;
use crate::sys::fd::Event;

use super::device::Device;
use super::session::{PickWorker, Session};

/// Bytes of a socket path: `sun_path` less its terminator, unix(7).
pub(super) const PATH_BYTES_MAX: usize = 107;
/// How long a client may take from the first byte of a message to the last, or to take a reply.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(10);
/// How often that is looked at while there are clients.
const WATCH_INTERVAL_MS: u16 = 2000;

/// How long nobody is accepted after descriptors, threads or memory ran out: who waits, waits on.
const SHORTAGE_MS: u16 = 200;

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
    /// Spreads disks over workers.
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

    /// Removes the socket, ends the session, if there is one, and waits until its queues are
    /// drained.
    ///
    /// The client hears of it last. It goes by the used rings from the moment we hang up (QEMU sets
    /// a queue back to its used index and comes again), so nothing may be completed after that:
    /// only our reading ends here, and the session hangs up when its queues are drained.
    pub(super) fn close(&self) {
        let mut client = self.client.lock();
        if !std::mem::replace(&mut client.is_closed, true) {
            // Fails if somebody removed it already.
            drop(fs::remove_file(&self.path));
        }
        client.shut(Shutdown::Read);
        while client.is_running {
            let waited = self.changed.wait_for(&mut client, MESSAGE_TIME_MAX);
            if waited.timed_out() && !client.is_draining {
                // It does not take the reply that it asked for.
                client.shut(Shutdown::Both);
            }
        }
    }

    fn is_free(&self) -> bool {
        !self.client.lock().is_running
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

#[derive(Debug, Default)]
struct Ports {
    list: Vec<Arc<Port>>,
    is_closed: bool,
}

/// What the accepting thread and the server share.
#[derive(Debug)]
pub(super) struct Reception {
    ports: Mutex<Ports>,
    changed: Event,
}

impl Reception {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            ports: Mutex::new(Ports::default()),
            changed: Event::new()?,
        })
    }

    pub(super) fn add(&self, port: Arc<Port>) {
        self.ports.lock().list.push(port);
        self.wake();
    }

    /// Takes no more clients for `port`; the one it has goes on.
    pub(super) fn remove(&self, port: &Arc<Port>) {
        self.ports
            .lock()
            .list
            .retain(|held| !Arc::ptr_eq(held, port));
        self.wake();
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
    /// As poll(2).
    pub(super) fn run(self: &Arc<Self>, assign: &Assign) -> io::Result<()> {
        let mut is_short = false;
        loop {
            self.changed.clear()?;
            let ports = {
                let ports = self.ports.lock();
                if ports.is_closed {
                    return Ok(());
                }
                ports.list.clone()
            };
            let (free, busy): (Vec<_>, Vec<_>) = ports.into_iter().partition(|p| p.is_free());
            let mut fds = vec![PollFd::new(self.changed.as_fd(), PollFlags::POLLIN)];
            let listening = if is_short { &[] } else { free.as_slice() };
            fds.extend(
                listening
                    .iter()
                    .map(|p| PollFd::new(p.listener.as_fd(), PollFlags::POLLIN)),
            );
            let timeout = match (is_short, busy.is_empty()) {
                (true, _) => PollTimeout::from(SHORTAGE_MS),
                (false, true) => PollTimeout::NONE,
                (false, false) => PollTimeout::from(WATCH_INTERVAL_MS),
            };
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let waiting: Vec<bool> = fds[1..]
                .iter()
                .map(|fd| fd.any().unwrap_or(false))
                .collect();
            let callers = listening.iter().zip(waiting);
            let accepted = callers
                .filter(|(_, is_waiting)| *is_waiting)
                .try_for_each(|(port, _)| self.accept(port, assign));
            is_short = accepted.is_err_and(|error| is_shortage(&error));
            let now = clock::now();
            busy.iter().for_each(|port| port.watch(now));
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
        let (reception, theirs) = (Arc::clone(self), Arc::clone(port));
        let pick = assign(port.offset, usize::from(port.device.queues_max));
        let started = spawn_named("vblk-session", move || {
            // Whatever happens in a session, its port must be free again afterwards.
            let _done = Guard {
                port: &theirs,
                reception: &reception,
            };
            serve(&theirs, stream, handle, pick);
        });
        started.map(drop).inspect_err(|_| release(port))
    }
}

/// Whether it is the host that is short of something, not the client that is gone.
fn is_shortage(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    !matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

struct Guard<'a> {
    port: &'a Port,
    reception: &'a Reception,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        release(self.port);
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
    let device = Arc::clone(&port.device);
    Session::serve(device, stream, handle, pick, heard, next, draining);
}
