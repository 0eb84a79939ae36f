//! A block front end of one's own: a disk as an NBD export on a Unix socket, for one client.
//!
//! `cargo run --example nbd -- POOL DISK SOCKET`, then `qemu-img info nbd:unix:SOCKET`.
//!
//! The protocol is the fixed newstyle handshake and simple replies of
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>. Everything below the
//! socket is six calls of [`Disk`]; a front end with a ring of its own would use `plan_read` and
//! `plan_write` instead, and move the bytes itself.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use tidepool::cowdisk::{Disk, DiskError, DiskErrorKind};
use tidepool::pool::{OpenOptions, Pool};
use tidepool::storage::{Access, FileStorage};

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// HAS_FLAGS, SEND_FLUSH, SEND_TRIM, SEND_WRITE_ZEROES.
const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6;
/// The most a request may move: no client asks for more without having been told.
const LEN_MAX: u32 = 32 << 20;

fn take<const N: usize>(stream: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_u32(stream: &mut UnixStream) -> std::io::Result<u32> {
    take(stream).map(u32::from_be_bytes)
}

fn take_u64(stream: &mut UnixStream) -> std::io::Result<u64> {
    take(stream).map(u64::from_be_bytes)
}

/// Options until the client goes on to requests (`true`) or leaves (`false`).
fn shake_hands(stream: &mut UnixStream, disk: &Disk) -> Result<bool, Box<dyn Error>> {
    stream.write_all(b"NBDMAGICIHAVEOPT")?;
    // FIXED_NEWSTYLE and NO_ZEROES.
    stream.write_all(&3_u16.to_be_bytes())?;
    let has_zeroes = take_u32(stream)? & 2 == 0;
    loop {
        if take_u64(stream)? != OPTION_MAGIC {
            return Err("the client does not speak NBD".into());
        }
        let (option, len) = (take_u32(stream)?, take_u32(stream)?);
        let mut data = vec![0; usize::try_from(len.min(4096))?];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| -> std::io::Result<()> {
            stream.write_all(&OPTION_REPLY_MAGIC.to_be_bytes())?;
            stream.write_all(&option.to_be_bytes())?;
            stream.write_all(&kind.to_be_bytes())?;
            stream.write_all(&u32::try_from(data.len()).unwrap_or(0).to_be_bytes())?;
            stream.write_all(data)
        };
        match option {
            // EXPORT_NAME: any name is this disk.
            1 => {
                stream.write_all(&disk.size().to_be_bytes())?;
                stream.write_all(&TRANSMISSION_FLAGS.to_be_bytes())?;
                stream.write_all(&vec![0; if has_zeroes { 124 } else { 0 }])?;
                return Ok(true);
            }
            // ABORT.
            2 => {
                reply(1, &[])?;
                return Ok(false);
            }
            // INFO and GO: NBD_INFO_EXPORT, then ACK.
            6 | 7 => {
                let mut info = 0_u16.to_be_bytes().to_vec();
                info.extend_from_slice(&disk.size().to_be_bytes());
                info.extend_from_slice(&TRANSMISSION_FLAGS.to_be_bytes());
                reply(3, &info)?;
                reply(1, &[])?;
                if option == 7 {
                    return Ok(true);
                }
            }
            // ERR_UNSUP.
            _ => reply(0x8000_0001, &[])?,
        }
    }
}

fn errno(error: &DiskError) -> u32 {
    match error.kind() {
        DiskErrorKind::NoSpace | DiskErrorKind::LimitReached => 28,
        DiskErrorKind::OutOfRange | DiskErrorKind::Request => 22,
        DiskErrorKind::ReadOnly => 1,
        DiskErrorKind::Deleted
        | DiskErrorKind::Base
        | DiskErrorKind::Io
        | DiskErrorKind::Poisoned
        | DiskErrorKind::Interrupted
        | DiskErrorKind::Damaged => 5,
    }
}

fn serve(stream: &mut UnixStream, disk: &Disk) -> Result<(), Box<dyn Error>> {
    loop {
        if take_u32(stream)? != REQUEST_MAGIC {
            return Err("the client does not speak NBD".into());
        }
        let [_, flags, _, command] = take::<4>(stream)?;
        let cookie = take_u64(stream)?;
        let (offset, len) = (take_u64(stream)?, take_u32(stream)?);
        let moves_data = command < 2;
        if moves_data && len > LEN_MAX {
            return Err("the client asks for too much at once".into());
        }
        let mut data = vec![0; if moves_data { usize::try_from(len)? } else { 0 }];
        let result = match command {
            0 => disk.read_at(&mut data, offset),
            1 => {
                stream.read_exact(&mut data)?;
                disk.write_at(&data, offset)
            }
            2 => return Ok(()),
            3 => disk.flush(),
            4 => disk.discard(offset, u64::from(len)),
            // NO_HOLE asks for allocated zeros.
            6 => disk.write_zeroes(offset, u64::from(len), flags & 2 == 0),
            _ => return Err("a command that was not offered".into()),
        };
        let error = result.as_ref().err().map_or(0, errno);
        stream.write_all(&REPLY_MAGIC.to_be_bytes())?;
        stream.write_all(&error.to_be_bytes())?;
        stream.write_all(&cookie.to_be_bytes())?;
        if command == 0 && error == 0 {
            stream.write_all(&data)?;
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, name, socket] = arguments.as_slice() else {
        return Err("usage: nbd POOL DISK SOCKET".into());
    };
    let file = Arc::new(FileStorage::open(path, Access::ReadWrite)?);
    let pool = Pool::open(file, &OpenOptions::default())?;
    let disk = Disk::open(&pool, name)?;
    let listener = UnixListener::bind(socket)?;
    // One client after another, until the socket has been removed.
    loop {
        let (mut stream, _) = listener.accept()?;
        // One that breaks off, or breaks the rules, ends its own connection only.
        let served = shake_hands(&mut stream, &disk).and_then(|goes_on| match goes_on {
            true => serve(&mut stream, &disk),
            false => Ok(()),
        });
        drop(served);
        disk.flush()?;
        if std::fs::metadata(socket).is_err() {
            break;
        }
    }
    drop(disk);
    Ok(pool.close()?)
}
