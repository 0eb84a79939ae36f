//! Goal: who is told to end does so in good order: a server finishes what guests have begun, a copy
//! leaves nothing half done behind, and who is told twice ends at once.
//!
//! Method: the built program, sent signals at a moment that shows from outside.

mod cli;

use cli::{Shell, send};
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::json;
use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStderr, ExitStatus, Stdio};
use std::time::Duration;
use tidepool::sys::{file, lock};

/// A vhost-user request for the features.
fn get_features() -> Vec<u8> {
    let header = [1_u32, 1, 0];
    header.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Pool `p` with a disk `a`.
fn one_disk() -> Shell {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    shell
}

#[test]
fn a_server_that_is_told_twice_ends_at_once() {
    let shell = one_disk();
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    let socket = shell.path("run/a.sock");
    // A client that asks and asks and takes no answer holds up an end in good order.
    let mut client = UnixStream::connect(&socket).expect("the server listens");
    let patience = Some(Duration::from_millis(200));
    client.set_write_timeout(patience).expect("timeout");
    while client.write_all(&get_features()).is_ok() {}
    send(server.pid(), Signal::SIGTERM);
    while socket.exists() {
        std::thread::yield_now();
    }
    send(server.pid(), Signal::SIGINT);
    assert_eq!(server.wait().signal(), Some(libc::SIGINT));
    // And nothing is the worse for it.
    assert_eq!(shell.json(&["pool", "check", "p"])["faults"], json!([]));
}

#[test]
fn a_server_ends_with_its_terminal_unless_it_was_told_not_to() {
    let shell = one_disk();
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    send(server.pid(), Signal::SIGHUP);
    assert_eq!(server.wait().code(), Some(0), "in good order");
    assert_eq!(shell.json(&["pool", "info", "p"])["is_clean"], true);
    // As nohup does.
    let mut server = shell.serve_after("trap '' HUP", &["p", "--sockets", "run"]);
    send(server.pid(), Signal::SIGHUP);
    let mut client = UnixStream::connect(shell.path("run/a.sock")).expect("it listens");
    client.write_all(&get_features()).expect("it listens");
    client.read_exact(&mut [0; 20]).expect("it answers");
    drop(client);
    assert_eq!(server.stop(), Some(0));
    // As a script starts what it puts in the background: SIGINT is for whom it is sent to.
    let mut server = shell.serve_after("trap '' INT", &["p", "--sockets", "run"]);
    send(server.pid(), Signal::SIGINT);
    assert_eq!(server.wait().code(), Some(0));
}

/// Has the lock of pool `p`, and no process has it: its descriptor is on its way between two sockets,
/// and so the kernel's alone, as the files of a ring are whose process was killed.
fn orphan(shell: &Shell) -> (UnixStream, UnixStream) {
    let file = file::open(&shell.path("p"), file::Mode::ReadWrite).expect("opens");
    while !lock::try_lock(&file, true).expect("no failure") {
        std::thread::yield_now();
    }
    let pair = UnixStream::pair().expect("sockets");
    let fds = [file.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let bytes = [IoSlice::new(b"x")];
    let sent = sendmsg::<()>(pair.0.as_raw_fd(), &bytes, &rights, MsgFlags::empty(), None);
    assert_eq!(sent, Ok(1));
    pair
}

/// Reads what a command says to people until it says that it waits.
fn wait_until_it_waits(child: &mut Child) -> ChildStderr {
    let mut stderr = child.stderr.take().expect("piped");
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(b"at most\n") {
        let more = stderr.read(&mut byte).expect("reads");
        assert_eq!(more, 1, "ended: {}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
    let said = String::from_utf8(said).expect("UTF-8");
    assert!(said.contains("p: nobody alive has it"), "{said}");
    stderr
}

#[test]
fn what_a_killed_server_left_locked_is_waited_for_and_a_signal_ends_that() {
    let shell = one_disk();
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    send(server.pid(), Signal::SIGKILL);
    server.wait();
    let left = orphan(&shell);
    // Who is told to end while it waits ends, in whatever way it would end later.
    let image = shell.image("image.raw", 1 << 20, 1);
    for args in [
        &["serve", "p", "--sockets", "run"][..],
        &["disk", "import", &image, "p:b"],
        &["disk", "rm", "p:a"],
    ] {
        let mut child = shell.start(args);
        let _stderr = wait_until_it_waits(&mut child);
        let told = tidepool::sys::clock::now();
        send(child.id(), Signal::SIGTERM);
        let status = child.wait().expect("ends");
        assert_eq!(status.signal(), Some(libc::SIGTERM), "{args:?}");
        let took = told.elapsed();
        assert!(took < Duration::from_secs(10), "{args:?}: {took:?}");
    }
    let mut child = shell.start(&["disk", "rm", "p:a"]);
    let _stderr = wait_until_it_waits(&mut child);
    drop(left);
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}

/// Reads nothing of what the server prints, tells it to end once it has begun to serve, and waits.
fn end_unread(shell: &Shell) -> ExitStatus {
    let mut command = shell.command(&["serve", "p", "--sockets", "run", "-o", "json"]);
    let mut server = command.stdout(Stdio::piped()).spawn().expect("starts");
    while !shell.path("run/f-1.sock").exists() {
        assert!(server.try_wait().expect("ours").is_none(), "it began");
        std::thread::yield_now();
    }
    let told = tidepool::sys::clock::now();
    send(server.id(), Signal::SIGTERM);
    let status = server.wait().expect("ends");
    let took = told.elapsed();
    assert!(took < Duration::from_secs(10), "{took:?}");
    status
}

#[test]
fn a_server_whose_output_nobody_reads_starts_and_ends() {
    let shell = one_disk();
    // More than a pipe takes: its thousand lines have some hundred bytes each.
    shell.ok(&["disk", "fork", "p:a", "f", "-n", "1000"]);
    let status = end_unread(&shell);
    assert_eq!(status.code(), Some(0), "in good order");
    assert_eq!(shell.json(&["pool", "info", "p"])["is_clean"], true);
    assert!(!shell.path("run/f-1.sock").exists());
}

/// A pool `big` of 1 GiB and an image of 256 MiB without a hole.
fn large() -> (Shell, String) {
    let shell = Shell::new();
    shell.ok(&["pool", "create", "big", "--size", "1G"]);
    let image = shell.image("image.raw", 256 << 20, 0);
    (shell, image)
}

/// Waits until the file has taken 8 MiB.
fn wait_for_bytes(shell: &Shell, file: &str) {
    let path = shell.path(file);
    while fs::metadata(&path).map_or(0, |file| file.blocks()) < 8 << 11 {
        std::thread::yield_now();
    }
}

/// What it said, and the signal that it ended by.
fn end(mut child: Child, signal: Signal) -> (String, Option<i32>) {
    send(child.id(), signal);
    let status = child.wait().expect("ends");
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("piped");
    stderr.read_to_string(&mut said).expect("UTF-8");
    (said, status.signal())
}

#[test]
fn an_interrupted_copy_leaves_nothing_behind() {
    let (shell, image) = large();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = shell.start(&["disk", "import", &image, "big:a"]);
        wait_for_bytes(&shell, "big");
        let (said, ended_by) = end(child, signal);
        // By the signal, so that a shell leaves the loop that it was in.
        assert_eq!(ended_by, Some(signal as i32), "{said}");
        assert!(said.contains("big:a: interrupted"), "{said}");
        assert_eq!(shell.json(&["disk", "ls", "big"])["disks"], json!([]));
        assert_eq!(shell.json(&["pool", "info", "big"])["is_clean"], true);
        shell.ok(&["pool", "trim", "big"]);
    }
    shell.ok(&["disk", "import", &image, "big:a"]);
    let child = shell.start(&["disk", "export", "big:a", "out.raw"]);
    wait_for_bytes(&shell, "out.raw.partial");
    let (said, ended_by) = end(child, Signal::SIGINT);
    assert_eq!(ended_by, Some(libc::SIGINT), "{said}");
    assert!(!shell.path("out.raw.partial").exists() && !shell.path("out.raw").exists());
    shell.ok(&["disk", "export", "big:a", "out.raw"]);
}

#[test]
fn a_killed_import_says_how_to_go_on() {
    let (shell, image) = large();
    let child = shell.start(&["disk", "import", &image, "big:a"]);
    wait_for_bytes(&shell, "big");
    assert_eq!(end(child, Signal::SIGKILL).1, Some(libc::SIGKILL));
    // The disk is made durable with the first data at the latest, or not at all.
    let left = shell.json(&["disk", "ls", "big"])["disks"].clone();
    if left != json!([]) {
        assert_eq!(left[0]["name"], "a.partial");
        let refused = shell.run(&["disk", "import", &image, "big:a"]);
        assert_eq!(refused.code, 1);
        let remedy = "disk rm big:a.partial";
        assert!(refused.stderr.contains(remedy), "{refused:?}");
        shell.ok(&["disk", "rm", "big:a.partial"]);
    }
    shell.ok(&["disk", "import", &image, "big:a"]);
}
