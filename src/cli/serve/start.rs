//! Putting disks on sockets: every one that can be served is, and of every other it is said why not.

use super::super::failure::Failure;
use super::super::human;
use super::bases::{Openers, Wish};
use super::ending::Ending;
use super::sockets::Sockets;
use super::tell::Teller;
use super::{Owned, Serve, stem};
use crate::cowdisk::{Disk, DiskError};
use crate::format::catalogue::Row;
use crate::sync::Arc;
use crate::sys::fd;
use crate::vhost_blk::{ServeError, Server};
use serde_json::json;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long disks whose bases answer wait for others, to be served in the order of their names.
const IN_ORDER: Duration = Duration::from_millis(200);
/// How long bases may be silent, all of them, before the disks over those that are left are given up.
const BASE_SILENCE_MAX: Duration = Duration::from_secs(5);
/// Descriptors for a first client, and to look about.
const DESCRIPTORS_SPARE: u64 = 8;

/// A disk to be served.
struct Wanted<'a> {
    owned: &'a Owned,
    row: Row,
    /// What its socket is named after.
    name: String,
}

impl Wanted<'_> {
    fn object(&self) -> String {
        format!("{}:{}", self.owned.path.display(), self.row.name)
    }
}

/// See the module.
pub(super) struct Start<'a> {
    args: &'a Serve,
    sockets: &'a Sockets,
    server: &'a Server,
    teller: &'a Teller,
    ending: &'a Ending,
    served: usize,
    /// Why not, of the first that is not, and how many there are.
    refused: Option<(Failure, usize)>,
}

/// How many are served, and how many are not.
pub(super) struct Started {
    pub(super) served: usize,
    pub(super) refused: usize,
}

impl<'a> Start<'a> {
    pub(super) fn new(
        args: &'a Serve,
        sockets: &'a Sockets,
        server: &'a Server,
        teller: &'a Teller,
        ending: &'a Ending,
    ) -> Self {
        Self {
            args,
            sockets,
            server,
            teller,
            ending,
            served: 0,
            refused: None,
        }
    }

    /// Opens a socket for each disk of each pool, until the server is to end.
    ///
    /// # Errors
    /// There are none, none of them can be served, or there are more than there may be descriptors.
    pub(super) fn run(mut self, pools: &[Owned]) -> Result<Started, Failure> {
        let wanted = wanted(pools);
        if wanted.is_empty() {
            return Err(nothing_to_serve(self.args));
        }
        check_descriptors(wanted.len())?;
        self.ending.admit_guests();
        let mut openers = Openers::start(by_base(&wanted));
        let is_over = || self.ending.is_told();
        let mut opened = BTreeMap::new();
        while let Some((place, disk)) = openers.next(IN_ORDER, is_over) {
            opened.insert(place, disk);
        }
        for (place, wish) in wanted.iter().enumerate() {
            if self.ending.is_told() {
                break;
            }
            if wish.row.base.is_none() {
                self.put(wish, Disk::open(&wish.owned.pool, &wish.row.name));
            } else if let Some(disk) = opened.remove(&place) {
                self.put(wish, disk);
            }
        }
        while let Some((place, disk)) = openers.next(BASE_SILENCE_MAX, || self.ending.is_told()) {
            self.put(&wanted[place], disk);
        }
        if !self.ending.is_told() {
            for place in openers.into_left() {
                self.give_up(&wanted[place]);
            }
        }
        self.finish()
    }

    fn finish(self) -> Result<Started, Failure> {
        let refused = self.refused.as_ref().map_or(0, |(_, count)| *count);
        match self.refused {
            Some((first, count)) if self.served == 0 && !self.ending.is_told() => {
                let more = match count {
                    1 => String::new(),
                    _ => format!(" (and {} more are not served)", count - 1),
                };
                let what = format!("{}{more}", first.what);
                Err(Failure { what, ..first })
            }
            Some(_) | None => Ok(Started {
                served: self.served,
                refused,
            }),
        }
    }

    /// Serves a disk that was opened, or says why not.
    fn put(&mut self, wish: &Wanted<'_>, disk: Result<Disk, DiskError>) {
        let disk = match disk {
            Ok(disk) => disk,
            Err(e) => {
                return self.refuse(wish, Failure::disk(wish.object(), &e));
            }
        };
        let (size, is_read_only) = (disk.size(), disk.is_read_only());
        let socket = self.sockets.path(&wish.name);
        if let Err(e) = self.server.add(disk, &socket, self.args.queues) {
            return self.refuse(wish, failed_to_serve(&wish.object(), &e));
        }
        let event = json!({
            "event": "serving",
            "pool": wish.owned.path,
            "name": wish.row.name,
            "socket": socket,
            "size_bytes": size,
            "is_read_only": is_read_only,
        });
        let access = if is_read_only { ", read-only" } else { "" };
        let (socket, object) = (socket.display(), wish.object());
        let text = format!("{socket}  {object}, {}{access}", human::bytes(size));
        self.teller.say(&event, &text);
        self.served += 1;
    }

    fn give_up(&mut self, wish: &Wanted<'_>) {
        let base = wish.row.base.as_ref();
        let base = base.map_or("", |base| base.path.as_str());
        let seconds = BASE_SILENCE_MAX.as_secs();
        let what = format!("base image {base}: it could not be opened within {seconds} seconds");
        let hint = "see that what holds it answers, and start the server again";
        self.refuse(wish, Failure::new("base", wish.object(), what).hint(hint));
    }

    fn refuse(&mut self, wish: &Wanted<'_>, why: Failure) {
        let event = json!({
            "event": "refused",
            "pool": wish.owned.path,
            "name": wish.row.name,
            "kind": why.kind,
            "reason": why.what,
            "hint": why.hint,
        });
        let hint = why.hint.as_ref();
        let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
        let text = format!("not served: {}: {}{hint}", wish.object(), why.what);
        self.teller.say(&event, &text);
        match &mut self.refused {
            Some((_, count)) => *count += 1,
            first @ None => *first = Some((why, 1)),
        }
    }
}

fn wanted(pools: &[Owned]) -> Vec<Wanted<'_>> {
    let mut all = Vec::new();
    for owned in pools {
        let stem = stem(&owned.path);
        for item in owned.pool.items() {
            let name = match pools.len() {
                1 => item.row.name.clone(),
                _ => format!("{stem}.{}", item.row.name),
            };
            all.push(Wanted {
                owned,
                row: item.row,
                name,
            });
        }
    }
    all
}

fn by_base(wanted: &[Wanted<'_>]) -> BTreeMap<PathBuf, Vec<Wish>> {
    let mut all: BTreeMap<PathBuf, Vec<Wish>> = BTreeMap::new();
    for (place, wish) in wanted.iter().enumerate() {
        let Some(base) = &wish.row.base else { continue };
        all.entry(PathBuf::from(&base.path))
            .or_default()
            .push(Wish {
                place,
                pool: Arc::clone(&wish.owned.pool),
                name: wish.row.name.clone(),
            });
    }
    all
}

fn nothing_to_serve(args: &Serve) -> Failure {
    let what = "there is no disk to serve";
    Failure::new("not_found", args.pools[0].display(), what)
        .hint("`tidepool disk create POOL:NAME --size 10G` makes one")
}

/// `Err` if there cannot be a socket for each disk and a client besides.
fn check_descriptors(disks: usize) -> Result<(), Failure> {
    let failed = |e: io::Error| {
        let what = format!("cannot tell how many descriptors there may be: {e}");
        Failure::new("io", "the server", what)
    };
    let most = fd::raise_limit().map_err(failed)?;
    let used = fd::count_open().map_err(failed)?;
    let disks = crate::format::units::bytes_of(disks);
    let needed = used.saturating_add(disks).saturating_add(DESCRIPTORS_SPARE);
    if needed <= most {
        return Ok(());
    }
    let what = format!("{disks} disks need {needed} descriptors, and this process may have {most}");
    let hint = "raise the limit (`ulimit -Hn`, or LimitNOFILE= of the systemd unit) to that and a \
                dozen for each client, or serve the pools by servers of their own";
    Err(Failure::new("serve", "the server", what).hint(hint))
}

fn failed_to_serve(object: &str, error: &ServeError) -> Failure {
    match error {
        ServeError::Socket { path, source } => {
            let what = format!("cannot listen on {}: {source}", path.display());
            let failure = Failure::new("socket", object, what);
            match source.kind() == io::ErrorKind::AddrInUse {
                true => failure.hint("another server listens there: choose another --sockets DIR"),
                false => failure,
            }
        }
        ServeError::Flush { source, .. } => Failure::disk(object, source),
        ServeError::Duplicate(_)
        | ServeError::Unknown(_)
        | ServeError::Queues(_)
        | ServeError::NoFile(_)
        | ServeError::Thread(_) => Failure::new("serve", object, error),
    }
}

/// The failure of a server that could not end as it should.
pub(super) fn failed_to_end(error: &ServeError) -> Failure {
    match error {
        ServeError::Flush { name, source } => Failure::disk(name, source),
        ServeError::Socket { .. }
        | ServeError::Duplicate(_)
        | ServeError::Unknown(_)
        | ServeError::Queues(_)
        | ServeError::NoFile(_)
        | ServeError::Thread(_) => Failure::new("serve", "", error),
    }
}
