//! Goal: who is told to end does so in good order: a server finishes what guests have begun, a copy
//! leaves nothing half done behind, and who is told twice ends at once.
//!
//! Method: the built program, sent signals at a moment that shows from outside.

mod cli;

use cli::{Shell, send};
use nix::sys::signal::Signal;
use serde_json::json;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::Duration;

/// A vhost-user request for the features.
fn get_features() -> Vec<u8> {
    let header = [1_u32, 1, 0];
    header.into_iter().flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_server_that_is_told_twice_ends_at_once() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
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
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
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
}
