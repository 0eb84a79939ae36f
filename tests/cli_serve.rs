//! Goal: `tidepool serve` is a good citizen of its host: it uses what it may and rests where it
//! cannot, ends as it is told to, and says plainly what it cannot serve.
//!
//! Method: the built program, as its users see it: limits, signals, sockets, messages.

mod cli;

use cli::Shell;
use serde_json::Value;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Asks a back end for its features; whether it answered within `limit`. It must not hang up.
fn is_served(client: &mut UnixStream, limit: Duration) -> bool {
    client.set_read_timeout(Some(limit)).expect("timeout");
    let get_features: Vec<u8> = [1_u32, 1, 0]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    let mut reply = [0; 20];
    client.write_all(&get_features).expect("not turned away");
    match client.read_exact(&mut reply) {
        Ok(()) => true,
        Err(e) if e.kind() == ErrorKind::WouldBlock => false,
        Err(e) => panic!("turned away: {e}"),
    }
}

fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).expect("the server listens")
}

/// Pool `p` with disks `d-1` to `d-90`.
fn ninety_disks() -> Shell {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:d", "--size", "1M"]);
    shell.ok(&["disk", "fork", "p:d", "d", "-n", "90"]);
    shell
}

#[test]
fn as_many_descriptors_are_used_as_there_may_be() {
    let shell = ninety_disks();
    let mut server = shell.serve_after("ulimit -Sn 130", &["p", "--sockets", "run"]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).expect("it runs");
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let words: Vec<&str> = files.expect("a limit").split_whitespace().collect();
    assert_eq!(words[3], words[4], "the soft limit is the hard one");
    assert_ne!(words[3], "130");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_server_without_descriptors_rests_until_it_has_some() {
    let shell = ninety_disks();
    let args = ["p", "--sockets", "run", "--workers", "1"];
    // Whether one is left over in the end or none.
    for limit in ["ulimit -n 140", "ulimit -n 141"] {
        run_short(&shell, limit, &args);
    }
}

fn run_short(shell: &Shell, limit: &str, args: &[&str]) {
    let mut server = shell.serve_after(limit, args);
    let socket = |n: u32| shell.path(&format!("run/d-{n}.sock"));
    let mut clients: Vec<UnixStream> = (1..=80).map(|n| connect(&socket(n))).collect();
    let soon = Duration::from_millis(50);
    let answers = clients.iter_mut().map(|client| is_served(client, soon));
    let served = answers.filter(|is_served| *is_served).count();
    assert!((1..80).contains(&served), "{served} of 80 are served");
    let before = server.cpu_ticks();
    let mut last = connect(&socket(90));
    assert!(!is_served(&mut last, Duration::from_secs(1)));
    let ticks = server.cpu_ticks() - before;
    assert!(ticks < 25, "{ticks} ticks in a second of waiting");
    drop(clients);
    assert!(
        is_served(&mut last, Duration::from_secs(20)),
        "there are descriptors again"
    );
    let (status, told) = server.stop_and_listen();
    assert_eq!(status, Some(0));
    let is_waiting = |kind: &String| kind == "client_waits";
    assert!(!told.is_empty() && told.iter().all(is_waiting), "{told:?}");
}

#[test]
fn pools_whose_sockets_would_have_the_same_names_are_refused() {
    let shell = Shell::new();
    fs::create_dir(shell.path("other")).expect("a directory");
    for pool in ["p", "other/p"] {
        shell.ok(&["pool", "create", pool, "--size", "64M"]);
        shell.ok(&["disk", "create", &format!("{pool}:a"), "--size", "1M"]);
    }
    for twice in [["p", "other/p"], ["p", "p"]] {
        let refused = shell.run(&[
            "serve",
            twice[0],
            twice[1],
            "--sockets",
            "run",
            "-o",
            "json",
        ]);
        assert_eq!(refused.code, 2, "{refused:?}");
        assert_eq!(refused.stdout, "", "nothing is served");
        let error = refused.error();
        assert!(
            error["message"]
                .as_str()
                .expect("a text")
                .contains("p.*.sock"),
            "{error}"
        );
        assert!(
            error["hint"]
                .as_str()
                .expect("a text")
                .contains("--sockets"),
            "{error}"
        );
    }
}

#[test]
fn a_disk_that_cannot_be_served_stops_no_other() {
    let shell = Shell::new();
    shell.pool();
    let image = shell.image("base.raw", 1 << 20, 1);
    // Names may have 128 bytes, and the path of a socket 107.
    let long = "n".repeat(128);
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    shell.ok(&["disk", "create", "p:gone", "--base", &image]);
    shell.ok(&["disk", "create", &format!("p:{long}"), "--size", "1M"]);
    shell.ok(&["disk", "create", "p:taken", "--size", "1M"]);
    shell.ok(&["disk", "snapshot", &format!("p:{long}@s")]);
    fs::remove_file(&image).expect("a file");
    fs::create_dir(shell.path("run")).expect("a directory");
    fs::write(shell.path("run/taken.sock"), "mine").expect("writes");
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    assert_eq!(server.names(), ["a", &long, &format!("{long}@s")]);
    let refused: Vec<(&str, &str)> = server
        .refused()
        .iter()
        .map(|event| (text(event, "name"), text(event, "kind")))
        .collect();
    assert_eq!(refused, [("gone", "base"), ("taken", "socket")]);
    assert!(text(&server.refused()[0], "reason").contains("base.raw"));
    assert!(text(&server.refused()[0], "hint").contains("tidepool disk rebase p:gone"));
    // What it says is where clients find it, whatever it is called.
    let sockets: Vec<String> = server.sockets().into_iter().map(str::to_owned).collect();
    for socket in &sockets {
        assert!(socket.len() <= 107, "{socket}");
        let mut client = connect(&shell.path(socket));
        assert!(is_served(&mut client, Duration::from_secs(20)));
    }
    assert_eq!(server.stop(), Some(0));
    assert_eq!(
        fs::read(shell.path("run/taken.sock")).expect("it is there"),
        b"mine"
    );
    let mut again = shell.serve(&["p", "--sockets", "run"]);
    assert_eq!(again.sockets(), sockets, "the same each time");
    assert_eq!(again.stop(), Some(0));
}

fn text<'a>(event: &'a Value, field: &str) -> &'a str {
    event[field].as_str().expect("a text")
}

#[test]
fn a_server_that_can_serve_nothing_fails_and_says_why() {
    let shell = Shell::new();
    shell.pool();
    let image = shell.image("base.raw", 1 << 20, 1);
    shell.ok(&["disk", "create", "p:a", "--base", &image]);
    shell.ok(&["disk", "create", "p:b", "--base", &image]);
    fs::remove_file(&image).expect("a file");
    let refused = shell.run(&["serve", "p", "--sockets", "run", "-o", "json"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert_eq!(
        refused.stdout.lines().count(),
        2,
        "one for each: {refused:?}"
    );
    // The errors are the last line: clap and the kernel say nothing before.
    assert_eq!(refused.error()["kind"], "base");
    assert_eq!(shell.json(&["pool", "info", "p"])["is_clean"], true);
}

#[test]
fn too_few_descriptors_are_said_before_anything_is_served() {
    let shell = ninety_disks();
    shell.ok(&["disk", "fork", "p:d", "e", "-n", "90"]);
    let args = ["p", "--sockets", "run", "--workers", "1"];
    let mut command = shell.after("ulimit -n 140", &args);
    let output = command.output().expect("starts");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(said.contains("181 disks need"), "{said}");
    assert!(said.contains("may have 140"), "{said}");
    assert!(said.contains("LimitNOFILE"), "{said}");
}

#[test]
fn why_a_client_was_disconnected_is_said() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:d", "--size", "1M"]);
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    let mut rude = connect(&shell.path("run/d.sock"));
    // SET_FEATURES, with features nobody offered.
    let head = [2_u32, 1, 8].into_iter().flat_map(u32::to_le_bytes);
    let message: Vec<u8> = head.chain(u64::MAX.to_le_bytes()).collect();
    rude.write_all(&message).expect("not turned away yet");
    let event = server.next_event();
    assert_eq!(event["event"], "session_refused", "{event}");
    assert_eq!(event["name"], "d");
    assert!(!event["reason"].as_str().expect("text").is_empty());
    // Who leaves politely is no event: the next is the end.
    assert!(is_served(
        &mut connect(&shell.path("run/d.sock")),
        Duration::from_secs(20)
    ));
    assert_eq!(server.stop(), Some(0));
}
