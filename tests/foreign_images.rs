//! Goal: an image is read as what it is, or refused with what helps; and what a guest may have written
//! leads to no file of the host.
//!
//! Method: images of `qemu-img`, of every format it makes and every feature of qcow2 that is read,
//! compared with what `qemu-img` itself reads; chains of them that have no end, or lead to pipes and
//! sockets; the same through the built program. Images that only begin like others are made up.

mod cli;

use cli::Shell;
use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use tidepool::cowdisk::Base;
use tidepool::format::catalogue::BaseFormat;

/// Whether `qemu-img` and `qemu-io` are there; says so if not.
fn has_qemu(test: &str) -> bool {
    let is_there = |program: &str| {
        let mut command = Command::new(program);
        command.arg("--version").stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let has_all = is_there("qemu-img") && is_there("qemu-io");
    if !has_all {
        #[expect(clippy::print_stdout, reason = "a test that did not run says so")]
        {
            println!("SKIPPED: {test}: qemu-img or qemu-io is not installed");
        }
    }
    has_all
}

/// A file, to be changed behind everybody's back.
#[expect(clippy::disallowed_methods, reason = "the test plays another program")]
fn writable(path: &Path) -> File {
    File::options().write(true).open(path).expect("a file")
}

/// Runs a program of QEMU's in `dir`, words separated by spaces.
fn qemu(dir: &Path, words: &str) {
    let mut words = words.split(' ');
    let mut command = Command::new(words.next().expect("a program"));
    let output = command.args(words).current_dir(dir).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {text}");
}

/// Bytes that differ from place to place.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    let mut bytes: Vec<u8> = std::iter::repeat_with(&mut next)
        .flatten()
        .take(len)
        .collect();
    bytes.truncate(len);
    bytes
}

/// Neither a disk can be made over the image, nor can it be imported; both say `says`.
fn refused(shell: &Shell, image: &str, format: Option<&str>, says: &[&str]) {
    let base_format = format.map_or(vec![], |format| vec!["--base-format", format]);
    let import_format = format.map_or(vec![], |format| vec!["--format", format]);
    let create = [
        &["disk", "create", "p:new", "--base", image][..],
        &base_format,
    ]
    .concat();
    let import = [&["disk", "import", image, "p:new"][..], &import_format].concat();
    for args in [create, import] {
        let outcome = shell.run(&args);
        assert_eq!(outcome.code, 1, "{args:?}: {outcome:?}");
        for word in says {
            assert!(
                outcome.stderr.contains(word),
                "{word:?}: {args:?}: {outcome:?}"
            );
        }
    }
}

#[test]
fn formats_that_are_not_read_are_refused_by_name() {
    if !has_qemu("formats_that_are_not_read_are_refused_by_name") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    fs::write(shell.path("raw"), noise(1 << 20, 1)).expect("writes");
    let dir = shell.path(".");
    for (format, name) in [
        ("vmdk", "VMDK"),
        ("vhdx", "VHDX"),
        ("vdi", "VDI"),
        ("vpc", "VHD"),
        ("qed", "QED"),
        ("parallels", "Parallels"),
    ] {
        qemu(
            &dir,
            &format!("qemu-img convert -f raw -O {format} raw s.{format}"),
        );
        let convert = format!("qemu-img convert -f {format} -O qcow2 s.{format}");
        refused(
            &shell,
            &format!("s.{format}"),
            None,
            &[name, &convert, "raw"],
        );
    }
    qemu(
        &dir,
        "qemu-img convert -f raw -O vmdk -o subformat=monolithicFlat raw text.vmdk",
    );
    refused(&shell, "text.vmdk", None, &["VMDK"]);
    qemu(
        &dir,
        "qemu-img convert -f raw -O vpc -o subformat=fixed raw fixed.vpc",
    );
    refused(&shell, "fixed.vpc", None, &["VHD"]);
    fs::write(shell.path("s.luks"), b"LUKS\xba\xbe\0\x01 and more").expect("writes");
    refused(&shell, "s.luks", None, &["LUKS", "driver=luks"]);
    fs::write(shell.path("s.gz"), b"\x1f\x8b\x08\0 and more").expect("writes");
    refused(&shell, "s.gz", None, &["gzip", "gzip -dk s.gz"]);
    // Who says that it is flat is believed.
    shell.ok(&["disk", "import", "s.vdi", "p:flat", "--format", "raw"]);
    shell.ok(&[
        "disk",
        "create",
        "p:over",
        "--base",
        "s.gz",
        "--base-format",
        "raw",
    ]);
}

#[test]
fn encrypted_images_are_refused_wherever_they_are() {
    if !has_qemu("encrypted_images_are_refused_wherever_they_are") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    let dir = shell.path(".");
    for (format, method, name) in [("luks", 2, "LUKS"), ("aes", 1, "AES")] {
        let image = format!("{format}.qcow2");
        let create = match method {
            // That of LUKS needs a quiet machine to measure: the field of its header will do.
            2 => format!("qemu-img create -q -f qcow2 {image} 1M"),
            _ => format!(
                "qemu-img create -q -f qcow2 --object secret,id=s,data=abc \
                 -o encrypt.format=aes,encrypt.key-secret=s {image} 1M"
            ),
        };
        qemu(&dir, &create);
        let mut bytes = fs::read(shell.path(&image)).expect("reads");
        bytes[35] = method;
        fs::write(shell.path(&image), bytes).expect("writes");
        for said in [None, Some("qcow2")] {
            refused(
                &shell,
                &image,
                said,
                &["encrypted", name, "encrypt.key-secret"],
            );
        }
        let over = format!("over-{format}.qcow2");
        qemu(
            &dir,
            &format!("qemu-img create -q -u -f qcow2 -b {image} -F qcow2 {over} 1M"),
        );
        refused(&shell, &over, Some("qcow2"), &[&image, name, &over]);
    }
}

/// A guest writes a qcow2 header to its own disk, which is exported as it is.
#[test]
fn what_a_guest_wrote_leads_to_no_file_of_the_host() {
    if !has_qemu("what_a_guest_wrote_leads_to_no_file_of_the_host") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    let dir = shell.path(".");
    fs::write(shell.path("secret"), [7; 512]).expect("writes");
    qemu(
        &dir,
        "qemu-img create -q -f qcow2 -b secret -F raw guest 64k",
    );
    qemu(
        &dir,
        "qemu-img create -q -f qcow2 -o data_file=elsewhere data 64k",
    );
    for image in ["guest", "data"] {
        writable(&shell.path(image))
            .set_len(1 << 20)
            .expect("a disk");
        refused(&shell, image, None, &["its format was not said"]);
    }
    // Nor through an image that does not say what it is over.
    qemu(
        &dir,
        "qemu-img create -q -u -f qcow2 -b guest -F raw unsaid 1M",
    );
    let mut unsaid = fs::read(shell.path("unsaid")).expect("reads");
    let format = unsaid
        .windows(4)
        .position(|word| word == [0xe2, 0x79, 0x2a, 0xca]);
    unsaid[format.expect("it says the format")] = 0x12;
    fs::write(shell.path("unsaid"), unsaid).expect("writes");
    refused(
        &shell,
        "unsaid",
        Some("qcow2"),
        &["guest", "its format was not said"],
    );
    qemu(
        &dir,
        "qemu-img create -q -u -f qcow2 -b guest -F raw said 1M",
    );
    shell.ok(&[
        "disk",
        "create",
        "p:a",
        "--base",
        "said",
        "--base-format",
        "qcow2",
    ]);
    shell.ok(&[
        "disk",
        "create",
        "p:b",
        "--base",
        "guest",
        "--base-format",
        "raw",
    ]);
    // Whoever says what it is trusts it.
    shell.ok(&[
        "disk",
        "create",
        "p:c",
        "--base",
        "guest",
        "--base-format",
        "qcow2",
    ]);
}

#[test]
fn chains_end_and_lead_to_files_only() {
    if !has_qemu("chains_end_and_lead_to_files_only") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    let dir = shell.path(".");
    let over = |name: &str, below: &str, format: &str| {
        qemu(
            &dir,
            &format!("qemu-img create -q -u -f qcow2 -b {below} -F {format} {name} 1M"),
        );
    };
    over("self", "./self", "qcow2");
    refused(&shell, "self", Some("qcow2"), &["comes back to it"]);
    over("a", "b", "qcow2");
    over("b", "c", "qcow2");
    over("c", "b", "qcow2");
    refused(
        &shell,
        "a",
        Some("qcow2"),
        &["/b: ", "comes back to it", "named by", "/c)"],
    );
    fs::write(shell.path("bottom"), [1; 512]).expect("writes");
    over("l31", "bottom", "raw");
    for n in (0..31).rev() {
        over(&format!("l{n}"), &format!("l{}", n + 1), "qcow2");
    }
    refused(
        &shell,
        "l0",
        Some("qcow2"),
        &["32 files", "qemu-img convert"],
    );
    shell.ok(&["disk", "import", "l1", "p:deep", "--format", "qcow2"]);
    nix::unistd::mkfifo(&shell.path("pipe"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let _socket = UnixListener::bind(shell.path("socket")).expect("a socket");
    for what in ["pipe", "socket", "/dev/zero", "/dev/null", "."] {
        for format in ["raw", "qcow2"] {
            over("x", what, format);
            refused(
                &shell,
                "x",
                Some("qcow2"),
                &["neither a regular file nor a block device"],
            );
            refused(
                &shell,
                what,
                Some(format),
                &["neither a regular file nor a block device"],
            );
        }
        refused(
            &shell,
            what,
            None,
            &["neither a regular file nor a block device"],
        );
    }
    for name in ["nbd://localhost/x", "json:{}", "fat:rw:/etc"] {
        over("x", name, "raw");
        refused(&shell, "x", Some("qcow2"), &[name, "is no file"]);
    }
    over("x", "bottom", "vmdk");
    refused(&shell, "x", Some("qcow2"), &["vmdk", "qemu-img convert"]);
    over("x", "gone", "raw");
    refused(&shell, "x", Some("qcow2"), &["/gone", "No such file"]);
}

/// What is below a base is neither replaced by an export nor written by a commit.
#[test]
fn what_is_below_a_base_is_not_written() {
    if !has_qemu("what_is_below_a_base_is_not_written") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    let dir = shell.path(".");
    fs::write(shell.path("bottom"), [7; 1 << 16]).expect("writes");
    qemu(&dir, "qemu-img create -q -f qcow2 -b bottom -F raw top");
    shell.ok(&[
        "disk",
        "create",
        "p:a",
        "--base",
        "top",
        "--base-format",
        "qcow2",
    ]);
    shell.ok(&["disk", "create", "p:b", "--base", "bottom"]);
    let export = shell.run(&["disk", "export", "p:b", "bottom", "--force"]);
    assert!(
        export.code == 1 && export.stderr.contains("base of `a`"),
        "{export:?}"
    );
    let commit = shell.run(&["disk", "commit", "p:b"]);
    assert!(
        commit.code == 1 && commit.stderr.contains("the base of a too"),
        "{commit:?}"
    );
    assert!(fs::read(shell.path("bottom")).expect("reads") == [7; 1 << 16]);
}

/// What a base reads as, whole, in pieces, and where it says that data is.
fn read(path: &Path, expected: &[u8]) {
    let reference = Base::examine(path, BaseFormat::Qcow2).expect("a file");
    let base = Base::open(&reference).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let len = expected.len();
    assert_eq!(base.len(), len as u64, "{}", path.display());
    let mut bytes = vec![0xee; len];
    base.read_at(&mut bytes, 0).expect("reads");
    assert!(bytes == expected, "{}: other bytes", path.display());
    for n in 0..200_usize {
        let at = n * 7919 % len / 512 * 512;
        let part = &mut bytes[..(512 << (n % 8)).min(len - at)];
        part.fill(0xee);
        base.read_at(part, at as u64).expect("reads");
        assert!(
            *part == expected[at..at + part.len()],
            "{}: at {at}",
            path.display()
        );
    }
    let mut at = 0;
    while let Some((start, end)) = base.next_data(at).expect("looks") {
        let skipped = usize::try_from(at).expect("short")..usize::try_from(start).expect("short");
        assert!(
            expected[skipped].iter().all(|byte| *byte == 0),
            "{}: data at {at}",
            path.display()
        );
        assert!(at <= start && start < end && end <= len as u64);
        at = end;
        if at == len as u64 {
            break;
        }
    }
    let rest = usize::try_from(at).expect("short")..len;
    assert!(
        expected[rest].iter().all(|byte| *byte == 0),
        "{}",
        path.display()
    );
}

/// An image with these options over a packed, shorter one, written in pieces of half a cluster, a
/// subcluster and less, zeros and discards among them.
fn read_over(dir: &Path, options: &str) {
    qemu(
        dir,
        "qemu-img convert -c -f raw -O qcow2 -o cluster_size=32k raw below",
    );
    let over = options.replace("data_file=d64", "data_file=d65");
    qemu(
        dir,
        &format!("qemu-img create -q -f qcow2 -o {over} -b below -F qcow2 over 6M"),
    );
    let commands = [
        "write -P 9 1k 512",
        "write -P 8 70k 66k",
        "write -P 7 4M 4k",
        "write -P 6 5M 100k",
        "write -z 600k 64k",
        "write -z -u 2M 2M",
    ];
    let mut io = Command::new("qemu-io");
    io.current_dir(dir).args(["-f", "qcow2"]);
    // An image of version 2 has no zeros.
    let has_zeros = !options.contains("0.10");
    for command in commands
        .iter()
        .filter(|command| has_zeros || !command.contains("-z"))
    {
        io.args(["-c", command]);
    }
    let output = io.arg("over").output().expect("runs");
    assert!(output.status.success(), "{output:?}");
    qemu(dir, "qemu-img convert -f qcow2 -O raw over expected");
    let expected = fs::read(dir.join("expected")).expect("reads");
    read(&dir.join("over"), &expected);
}

#[test]
fn every_feature_of_qcow2_is_read_as_qemu_reads_it() {
    if !has_qemu("every_feature_of_qcow2_is_read_as_qemu_reads_it") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    // Data, zeros and holes, at places that are no clusters'; not whole clusters in all.
    let mut bytes = vec![0; (4 << 20) + 1536];
    for (n, at) in (1_u8..).zip([0, 70_000, 600_000, 2_000_000, 4_100_000]) {
        let piece = noise(95_000, u64::from(n));
        let end = (at + piece.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&piece[..end - at]);
        // Something to compress.
        bytes[at..][..30_000].fill(n);
    }
    fs::write(dir.join("raw"), &bytes).expect("writes");
    for options in [
        "cluster_size=512",
        "cluster_size=64k",
        "cluster_size=2M",
        "compat=0.10",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=128k,extended_l2=on",
        "cluster_size=64k,data_file=d64",
        "cluster_size=64k,data_file=draw,data_file_raw=on",
    ] {
        qemu(
            dir,
            &format!("qemu-img convert -f raw -O qcow2 -o {options} raw plain"),
        );
        read(&dir.join("plain"), &bytes);
        if !options.contains("data_file") {
            qemu(
                dir,
                &format!("qemu-img convert -c -f raw -O qcow2 -o {options} raw packed"),
            );
            read(&dir.join("packed"), &bytes);
        }
        if !options.contains("data_file_raw") {
            read_over(dir, options);
        }
    }
    // Marked as in use, and as damaged by a writer: still read.
    qemu(dir, "qemu-img convert -f raw -O qcow2 raw plain");
    let mut image = fs::read(dir.join("plain")).expect("reads");
    image[79] |= 3;
    fs::write(dir.join("plain"), &image).expect("writes");
    read(&dir.join("plain"), &bytes);
}

#[test]
fn features_that_are_not_read_are_refused_with_what_helps() {
    if !has_qemu("features_that_are_not_read_are_refused_with_what_helps") {
        return;
    }
    let shell = Shell::new();
    shell.pool();
    let dir = shell.path(".");
    fs::write(shell.path("raw"), [7; 1 << 16]).expect("writes");
    qemu(
        &dir,
        "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd raw zstd",
    );
    refused(
        &shell,
        "zstd",
        None,
        &["zstd", "qemu-img convert -O qcow2 zstd NEW"],
    );
    qemu(&dir, "qemu-img convert -f raw -O qcow2 raw new");
    let mut image = fs::read(shell.path("new")).expect("reads");
    image[72] = 0x80;
    fs::write(shell.path("new"), &image).expect("writes");
    refused(&shell, "new", None, &["features", "qemu-img convert"]);
}

/// Tables that lead anywhere are errors or data of the image, never a panic or a read without end.
#[test]
fn damaged_images_are_errors() {
    if !has_qemu("damaged_images_are_errors") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    fs::write(dir.join("raw"), noise(1 << 20, 3)).expect("writes");
    for options in [
        "-c -o cluster_size=4k",
        "-o cluster_size=16k,extended_l2=on",
    ] {
        qemu(
            dir,
            &format!("qemu-img convert -f raw -O qcow2 {options} raw image"),
        );
        let image = fs::read(dir.join("image")).expect("reads");
        let (mut opened, mut failed) = (0, 0);
        for seed in 0..300_u32 {
            let mut bad = image.clone();
            let random = noise(64, u64::from(seed));
            // Mostly in the header and the tables, which come first.
            for place in random.chunks_exact(4).take(1 + usize::from(random[61]) % 8) {
                let span = [104, 65536, bad.len()][usize::from(place[3]) % 3].min(bad.len());
                let at = usize::from(place[0]) << 8 | usize::from(place[1]);
                bad[at * 31 % span] = place[2];
            }
            if seed % 5 == 0 {
                bad.truncate(usize::from(random[60]) * bad.len() / 256);
            }
            let path = dir.join(format!("bad{seed}"));
            fs::write(&path, &bad).expect("writes");
            let opening =
                Base::examine(&path, BaseFormat::Qcow2).and_then(|base| Base::open(&base));
            if let Ok(base) = opening {
                opened += 1;
                let mut part = vec![0; 1 << 16];
                for at in (0..base.len().min(2 << 20)).step_by(part.len()) {
                    failed += u32::from(base.read_at(&mut part, at).is_err());
                    let next = base.next_data(at);
                    assert!(
                        next.is_err() || next.is_ok_and(|data| data.is_none_or(|(a, b)| a < b))
                    );
                }
            }
            fs::remove_file(&path).expect("there");
        }
        assert!(
            opened > 30 && failed > 30,
            "{opened} opened, {failed} reads failed"
        );
    }
}

/// A file that is cut while it is read gives an error, never zeros in place of what it held.
#[test]
fn a_base_that_is_cut_short_fails_the_read() {
    if !has_qemu("a_base_that_is_cut_short_fails_the_read") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let bytes = noise(1 << 20, 5);
    fs::write(dir.join("raw"), &bytes).expect("writes");
    qemu(dir, "qemu-img convert -f raw -O qcow2 raw plain");
    qemu(dir, "qemu-img convert -c -f raw -O qcow2 raw packed");
    qemu(dir, "qemu-img create -q -f qcow2 -b raw -F raw over");
    qemu(
        dir,
        "qemu-img convert -f raw -O qcow2 -o data_file=elsewhere raw data",
    );
    for (image, cut, format) in [
        ("over", "raw", BaseFormat::Qcow2),
        ("raw", "raw", BaseFormat::Raw),
        ("plain", "plain", BaseFormat::Qcow2),
        ("packed", "packed", BaseFormat::Qcow2),
        ("data", "elsewhere", BaseFormat::Qcow2),
    ] {
        let path = dir.join(image);
        let reference = Base::examine(&path, format).expect("a file");
        let base = Base::open(&reference).expect("opens");
        let mut part = vec![0; 4096];
        base.read_at(&mut part, 1 << 19).expect("reads");
        assert!(part == bytes[1 << 19..][..4096], "{image}");
        let whole = fs::read(dir.join(cut)).expect("reads");
        let file = writable(&dir.join(cut));
        file.set_len(whole.len() as u64 / 4 * 3).expect("cuts");
        let read = base.read_at(&mut part, bytes.len() as u64 - 4096);
        let e = read.expect_err("it is gone").to_string();
        assert!(e.contains("cut short"), "{image}: {e}");
        drop(base);
        fs::write(dir.join(cut), &whole).expect("writes");
    }
}
