//! Of which format an image is that nobody said: told from its bytes, which a guest may have
//! written. So nothing is taken for a flat image that begins like another, and nothing that was only
//! told from its bytes leads to other files.

use super::chain::{check_alone, explain};
use super::file::ImageFile;
use super::qcow2::read_header;
use crate::cowdisk::error::DiskError;
use crate::format::catalogue::BaseFormat;
use crate::format::foreign::{self, Foreign, HEAD_LEN, Seems, Way};
use crate::format::qcow2::Header;
use crate::format::units::{bytes_of, len_of};
use std::path::Path;

/// What an image is.
pub(super) enum Told {
    Raw,
    Qcow2(Box<Header>),
}

/// The format of the image at `path`, of which nobody said it.
///
/// # Errors
/// It cannot be opened, it is of a format that is not read, or it names other files.
pub fn probe(path: &Path) -> Result<BaseFormat, DiskError> {
    let shown = path.display().to_string();
    let fault = |what: String| DiskError::Base {
        path: shown.clone(),
        what,
    };
    let file = ImageFile::open(path).map_err(fault)?;
    match tell(&file).map_err(fault)? {
        Told::Raw => Ok(BaseFormat::Raw),
        Told::Qcow2(header) => {
            check_alone(&header, &shown).map_err(fault)?;
            Ok(BaseFormat::Qcow2)
        }
    }
}

/// Whether what comes from a stream and begins with `head`, at least [`HEAD_LEN`] bytes if there are so
/// many, is a flat image as far as one can tell.
///
/// # Errors
/// It is of another format.
pub fn check_stream(head: &[u8]) -> Result<(), DiskError> {
    let what = match foreign::tell(head, &[]) {
        Seems::Raw => return Ok(()),
        Seems::Qcow2 => "it seems to be a qcow2 image, which cannot be read from a stream: save it to a \
                         file, and import that. If it is a flat image all the same, say raw (--format \
                         raw)"
            .to_owned(),
        Seems::Foreign(foreign) => refuse(foreign, "FILE"),
    };
    let path = "-".to_owned();
    Err(DiskError::Base { path, what })
}

pub(super) fn tell(file: &ImageFile) -> Result<Told, String> {
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        let read = file.read(&mut bytes, at);
        read.map(|()| bytes)
            .map_err(|e| format!("it cannot be read: {e}"))
    };
    let head = read(0, len_of(file.len.min(bytes_of(HEAD_LEN))))?;
    let (tail_at, tail_len) = foreign::tail_of(file.len);
    match foreign::tell(&head, &read(tail_at, tail_len)?) {
        Seems::Raw => Ok(Told::Raw),
        Seems::Qcow2 => {
            let header = read_header(file).map_err(|e| explain(&e, &file.path))?;
            Ok(Told::Qcow2(Box::new(header)))
        }
        Seems::Foreign(foreign) => Err(refuse(foreign, &file.path)),
    }
}

fn refuse(foreign: Foreign, path: &str) -> String {
    let Foreign { name, way } = foreign;
    let help = match way {
        Way::Convert(format) => {
            format!(
                "`qemu-img convert -f {format} -O qcow2 {path} NEW` makes an image that is read"
            )
        }
        Way::Unpack(command) => format!("unpack it first: `{command} {path}`"),
        Way::Archive => format!(
            "`tar -xf {path}` takes out the disk, and `qemu-img convert -O qcow2 DISK NEW` makes an \
             image of it that is read"
        ),
        Way::Decrypt => format!(
            "`qemu-img convert --object secret,id=k,file=KEY --image-opts \
             driver=luks,file.filename={path},key-secret=k -O qcow2 NEW` decrypts it"
        ),
    };
    format!(
        "it seems to be {name}, which is not read; {help}. If it is a flat image all the same, say raw \
         (--format raw, --base-format raw)"
    )
}
