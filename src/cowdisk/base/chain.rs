//! The files that a base is read from, from the top down: an image, its data file, what it is a
//! difference to, and so on. Each is locked. One loop, with a bound; names come from files that may
//! be anybody's.

use super::file::ImageFile;
use super::probe::{self, Told};
use super::qcow2::{OpenFailed, Qcow2, read_header};
use crate::cowdisk::error::DiskError;
use crate::format::catalogue::BaseFormat;
use crate::format::qcow2::{Header, Place, Refusal};
use std::io;
use std::path::{Path, PathBuf};

/// Most files that a base is read from.
pub(super) const FILES_MAX: usize = 32;

/// An image: raw, or a difference to the next one.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) file: ImageFile,
    /// Where its data is, if not in the file itself.
    pub(super) data: Option<ImageFile>,
    pub(super) qcow2: Option<Qcow2>,
}

impl Layer {
    /// Bytes of the disk in it.
    pub(super) fn len(&self) -> u64 {
        match &self.qcow2 {
            None => self.file.len,
            Some(qcow2) => qcow2.header.size(),
        }
    }

    pub(super) fn data(&self) -> &ImageFile {
        self.data.as_ref().unwrap_or(&self.file)
    }

    /// Where byte `offset` of its disk is, and for how many bytes, at most `max`, that goes on.
    ///
    /// # Errors
    /// A table cannot be read, or says what cannot be.
    pub(super) fn find(&self, offset: u64, max: u64) -> io::Result<(Place, u64)> {
        match &self.qcow2 {
            None => Ok((Place::Data(offset), max)),
            Some(qcow2) => qcow2.find(&self.file, offset, max),
        }
    }

    /// The files it is read from.
    pub(super) fn files(&self) -> impl Iterator<Item = &ImageFile> {
        [&self.file].into_iter().chain(&self.data)
    }
}

/// What an image names.
struct Next {
    path: PathBuf,
    format: Option<BaseFormat>,
    /// The image that names it.
    over: String,
}

fn fault(path: &str, what: impl Into<String>) -> DiskError {
    DiskError::Base {
        path: path.to_owned(),
        what: what.into(),
    }
}

/// Opens the image at `path`, an absolute path without links, and all below it.
///
/// # Errors
/// One of the files is missing, in use by a writer, of a kind or format that is not read, or there
/// twice; or they are more than [`FILES_MAX`].
pub(super) fn open(path: &str, format: BaseFormat) -> Result<Vec<Layer>, DiskError> {
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some(Next {
        path: PathBuf::from(path),
        format: Some(format),
        over: String::new(),
    });
    while let Some(this) = next {
        let named = |e: DiskError| match (e, this.over.as_str()) {
            (DiskError::Base { path, what }, over) if !over.is_empty() => DiskError::Base {
                path,
                what: format!("{what} (it is named by {over})"),
            },
            (e, _) => e,
        };
        let file = open_file(&this.path, &layers).map_err(named)?;
        let (layer, below) = open_layer(file, &this, &layers).map_err(named)?;
        layers.push(layer);
        next = below;
    }
    Ok(layers)
}

/// Opens one more file.
fn open_file(path: &Path, layers: &[Layer]) -> Result<ImageFile, DiskError> {
    let shown = path.display().to_string();
    let path = path.canonicalize();
    let path = path.map_err(|e| fault(&shown, e.to_string()))?;
    let path = path
        .to_str()
        .ok_or_else(|| fault(&shown, "its path is not UTF-8; rename it"))?;
    let file = ImageFile::open(Path::new(path)).map_err(|what| fault(path, what))?;
    let mut files = layers.iter().flat_map(Layer::files);
    if files.any(|other| other.place() == file.place()) {
        let what = "the chain of backing files comes back to it, and has no end; \
                    `qemu-img rebase -u -b BACKING IMAGE` tells an image what it is over";
        return Err(fault(path, what));
    }
    if layers.iter().flat_map(Layer::files).count() >= FILES_MAX {
        let what = format!(
            "it is one more than the {FILES_MAX} files that a base may consist of; \
             `qemu-img convert -O qcow2 IMAGE NEW` makes one file of them all"
        );
        return Err(fault(path, what));
    }
    Ok(file)
}

fn open_layer(
    file: ImageFile,
    this: &Next,
    layers: &[Layer],
) -> Result<(Layer, Option<Next>), DiskError> {
    let path = file.path.clone();
    let format = match this.format {
        Some(format) => format,
        None => match probe::tell(&file).map_err(|what| fault(&path, what))? {
            Told::Raw => BaseFormat::Raw,
            Told::Qcow2(header) => {
                check_alone(&header, &path).map_err(|what| fault(&path, what))?;
                BaseFormat::Qcow2
            }
        },
    };
    if format == BaseFormat::Raw {
        let layer = Layer {
            file,
            data: None,
            qcow2: None,
        };
        return Ok((layer, None));
    }
    let header = read_header(&file).map_err(|e| fault(&path, explain(&e, &path)))?;
    let data = open_data(&header, &path, layers)?;
    let below = name_below(&header, &path)?;
    let qcow2 = Qcow2::open(&file, header);
    let qcow2 = qcow2.map_err(|e| fault(&path, format!("its first table cannot be read: {e}")))?;
    let layer = Layer {
        file,
        data,
        qcow2: Some(qcow2),
    };
    let data = layer.data.as_ref().map(ImageFile::place);
    if data == Some(layer.file.place()) {
        return Err(fault(&path, "it names itself as its data file"));
    }
    Ok((layer, below))
}

fn open_data(
    header: &Header,
    path: &str,
    layers: &[Layer],
) -> Result<Option<ImageFile>, DiskError> {
    if !header.is_data_elsewhere() {
        return Ok(None);
    }
    let Some(name) = &header.data_file else {
        let what = "its data is in another file, which it does not name; \
                    `qemu-img amend -o data_file=FILE` makes it";
        return Err(fault(path, what));
    };
    let name = resolve(name, path).map_err(|what| fault(path, what))?;
    open_file(&name, layers).map(Some)
}

fn name_below(header: &Header, path: &str) -> Result<Option<Next>, DiskError> {
    let Some(name) = &header.backing else {
        return Ok(None);
    };
    let format = match header.backing_format.as_deref() {
        None => None,
        Some("raw" | "file" | "host_device") => Some(BaseFormat::Raw),
        Some("qcow2") => Some(BaseFormat::Qcow2),
        Some(other) => {
            let what = format!(
                "its backing file {name} is of the format {other}, which is not read; \
                 `qemu-img convert -O qcow2 {path} NEW` makes one image of both"
            );
            return Err(fault(path, what));
        }
    };
    let name = resolve(name, path).map_err(|what| fault(path, what))?;
    Ok(Some(Next {
        path: name,
        format,
        over: path.to_owned(),
    }))
}

/// The file that the image at `path` means by `name`.
fn resolve(name: &str, path: &str) -> Result<PathBuf, String> {
    let protocol = name
        .find([':', '/'])
        .filter(|at| name[*at..].starts_with(':'));
    if protocol.is_some() {
        return Err(format!(
            "it names `{name}`, which is no file; \
             `qemu-img convert -O qcow2 {path} NEW` makes one image of both"
        ));
    }
    // A name that is absolute stays as it is.
    Ok(Path::new(path)
        .parent()
        .unwrap_or(Path::new("/"))
        .join(name))
}

/// `Err` if an image whose format nobody said names other files: the bytes that say so may have been
/// written by a guest, to whom those files are not to be shown.
pub(super) fn check_alone(header: &Header, path: &str) -> Result<(), String> {
    let (kind, name) = match (&header.backing, header.is_data_elsewhere()) {
        (Some(name), _) => ("backing", name.as_str()),
        (None, true) => ("data", header.data_file.as_deref().unwrap_or("")),
        (None, false) => return Ok(()),
    };
    Err(format!(
        "it seems to be a qcow2 image with the {kind} file `{name}`, but its format was not said, and \
         a guest may have written what it seems to be; say that {path} is qcow2 (--format or \
         --base-format; `qemu-img rebase -u -F qcow2` for a backing file) if it is, or raw"
    ))
}

/// Why an image is not opened, and what helps.
pub(super) fn explain(failed: &OpenFailed, path: &str) -> String {
    let refusal = match failed {
        OpenFailed::Io(e) => return format!("it cannot be read: {e}"),
        OpenFailed::Refused(refusal) => refusal,
    };
    let convert = format!("`qemu-img convert -O qcow2 {path} NEW` makes an image that is read");
    match refusal {
        Refusal::Encrypted(_) => format!(
            "{refusal}; `qemu-img convert --object secret,id=k,file=KEY --image-opts \
             driver=qcow2,file.filename={path},encrypt.key-secret=k -O qcow2 NEW` decrypts it"
        ),
        Refusal::Version(_) | Refusal::Compression(_) | Refusal::Features(_) => {
            format!("{refusal}; {convert}")
        }
        Refusal::Magic | Refusal::Field { .. } | Refusal::Short | Refusal::Name(_) => {
            format!("not readable as qcow2: {refusal}")
        }
    }
}
