//! Goal: a slip on the command line destroys nothing, and what an error advises can be done there and
//! then, and does no harm.
//!
//! Method: the built program is run as a user would, in a directory of its own. What was there before
//! is compared with what is there after, and advice is followed.

mod cli;
#[path = "common/small.rs"]
mod small;

use cli::Shell;
use serde_json::Value;
use small::Small;
use std::fs;
use std::io::Write;
use std::process::Stdio;

/// A pool `p` with the disk `a` over the base `base.raw`, and another pool `q`.
fn two_pools() -> Shell {
    let shell = Shell::new();
    shell.pool();
    shell.image("base.raw", 1 << 20, 0);
    shell.ok(&["disk", "create", "p:a", "--base", "base.raw"]);
    shell.ok(&["pool", "create", "q", "--size", "64M"]);
    shell.ok(&["disk", "create", "q:b", "--size", "1M"]);
    shell
}

#[test]
fn no_flag_lets_an_export_replace_what_lives() {
    let shell = two_pools();
    let _server = shell.serve(&["q"]);
    std::os::unix::fs::symlink("base.raw", shell.path("link")).expect("links");
    let before = |name: &str| fs::read(shell.path(name)).expect("reads");
    for (target, kind, says) in [
        ("p", "exists", "it is a pool"),
        ("q", "exists", "it is a pool"),
        ("base.raw", "in_use", "the base of `a`"),
        ("link", "in_use", "the base of `a`"),
    ] {
        let bytes = before(target);
        for format in ["raw", "qcow2"] {
            let args = [
                "disk", "export", "p:a", target, "--force", "--format", format, "-o", "json",
            ];
            let outcome = shell.run(&args);
            assert_eq!(outcome.code, 1, "{target}: {outcome:?}");
            assert_eq!(outcome.error()["kind"], kind, "{target}: {outcome:?}");
            assert!(outcome.stderr.contains(says), "{target}: {outcome:?}");
        }
        assert!(before(target) == bytes, "{target} was changed");
        assert!(!shell.path(&format!("{target}.partial")).exists());
    }
    assert_eq!(
        shell.json(&["pool", "check", "p"])["faults"],
        Value::Array(vec![])
    );
}

#[test]
fn an_export_does_not_replace_what_another_program_has_open() {
    let shell = two_pools();
    shell.image("other.raw", 1 << 20, 0);
    shell.ok(&["disk", "create", "q:o", "--base", "other.raw"]);
    let mut server = shell.serve(&["q"]);
    let export = [
        "disk",
        "export",
        "p:a",
        "other.raw",
        "--force",
        "-o",
        "json",
    ];
    let outcome = shell.run(&export);
    assert_eq!(
        (outcome.code, &outcome.error()["kind"]),
        (1, &Value::from("locked"))
    );
    assert_eq!(server.stop(), Some(0));
    // Nobody has it open any more: replacing it is what --force is for.
    shell.ok(&export[..5]);
    let base = fs::read(shell.path("base.raw")).expect("reads");
    assert!(fs::read(shell.path("other.raw")).expect("reads") == base);
}

#[test]
fn what_a_killed_export_left_is_told_from_one_that_runs() {
    let shell = two_pools();
    fs::write(shell.path("e.partial"), "left").expect("writes");
    let outcome = shell.run(&["disk", "export", "p:a", "e", "-o", "json"]);
    assert_eq!(outcome.error()["kind"], "exists");
    let hint = outcome.error()["hint"].as_str().expect("a hint").to_owned();
    assert!(hint.contains("rm 'e.partial'"), "{hint}");
    assert_eq!(
        fs::read(shell.path("e.partial")).expect("still there"),
        b"left"
    );
    fs::remove_file(shell.path("e.partial")).expect("as advised");
    shell.ok(&["disk", "export", "p:a", "e"]);
}

/// Slips, the kind of the error, what it must say, and what it must not.
const SLIPS: &[(&[&str], &str, &str, &str)] = &[
    (
        &["pool", "create", "no/such/p", "--size", "1G"],
        "not_found",
        "mkdir -p no/such",
        "pool create",
    ),
    (
        &["pool", "info", "no/such/p"],
        "not_found",
        "mkdir -p no/such",
        "pool create",
    ),
    (
        &["disk", "export", "p:a", "no/such/e"],
        "not_found",
        "mkdir -p no/such",
        "pool create",
    ),
    (
        &["pool", "create", "p/x", "--size", "1G"],
        "not_found",
        "not a directory",
        "mkdir",
    ),
    (
        &["pool", "create", "/dev/null", "--size", "1G"],
        "exists",
        "neither a file nor a block device",
        "remove",
    ),
    (
        &["pool", "create", "q", "--size", "1G"],
        "exists",
        "choose a name",
        "remove",
    ),
    (
        &["disk", "rename", "p:a", "a"],
        "exists",
        "under that name",
        "choose",
    ),
    (
        &["disk", "fork", "p:a", "a"],
        "exists",
        "choose another name",
        "remove",
    ),
    (
        &["pool", "info", "p:a"],
        "not_found",
        "`p` is a pool",
        "pool create",
    ),
    (
        &["disk", "ls", "p:a"],
        "not_found",
        "`p` is a pool",
        "pool create",
    ),
    (
        &["disk", "set", "p:a", "--limit", "2M"],
        "invalid",
        "never be reached",
        "raise",
    ),
    (
        &["disk", "set", "p:a", "--limit", "512K", "--reserve", "600K"],
        "invalid",
        "more than the limit",
        "larger",
    ),
    (
        &["disk", "create", "p:n", "--size", "1M", "--reserve", "2M"],
        "invalid",
        "never be used",
        "limit",
    ),
    (
        &["disk", "info", "nope:a"],
        "not_found",
        "no such pool",
        "disk ls",
    ),
];

#[test]
fn advice_fits_the_slip_and_does_no_harm() {
    let shell = two_pools();
    for &(args, kind, says, must_not) in SLIPS {
        let outcome = shell.run(&[args, &["-o", "json"]].concat());
        assert_eq!(outcome.code, 1, "{args:?}: {outcome:?}");
        assert_eq!(outcome.error()["kind"], kind, "{args:?}: {outcome:?}");
        assert!(outcome.stderr.contains(says), "{args:?}: {outcome:?}");
        assert!(!outcome.stderr.contains(must_not), "{args:?}: {outcome:?}");
    }
}

#[test]
fn the_directory_that_is_missing_can_be_made_as_advised() {
    let shell = Shell::new();
    let create = ["pool", "create", "no/such/p", "--size", "64M"];
    assert_eq!(shell.run(&create).code, 1);
    fs::create_dir_all(shell.path("no/such")).expect("mkdir -p");
    shell.ok(&create);
}

#[test]
fn disks_of_two_sizes_are_not_called_the_same() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:short", "--size", "1M"]);
    shell.ok(&["disk", "create", "p:long", "--size", "2M"]);
    let text = shell.ok(&["disk", "diff", "p:short", "long"]).stdout;
    assert!(text.contains("their sizes differ"), "{text}");
    assert!(!text.contains("are the same"), "{text}");
    let json = shell.json(&["disk", "diff", "p:short", "long"]);
    assert_eq!(json["a_size_bytes"], 1 << 20);
    assert_eq!(json["b_size_bytes"], 2 << 20);
}

#[test]
fn a_full_host_is_not_a_full_pool() {
    let Some(small) = Small::mount("a_full_host_is_not_a_full_pool") else {
        return;
    };
    let shell = Shell::new();
    let pool = small.path().join("p");
    let pool = pool.to_str().expect("UTF-8");
    shell.ok(&["pool", "create", pool, "--size", "64M"]);
    let image = shell.image("image", 32 << 20, 0);
    let disk = format!("{pool}:a");
    let outcome = shell.run(&["disk", "import", &image, &disk, "-o", "json"]);
    assert_eq!(outcome.error()["kind"], "no_space", "{outcome:?}");
    assert!(outcome.stderr.contains("on the host"), "{outcome:?}");
    let info = shell.json(&["pool", "info", pool]);
    let (host, free) = (&info["host_free_bytes"], &info["free_bytes"]);
    assert!(host.as_u64() < free.as_u64(), "{info}");
    // As advised.
    shell.ok(&["pool", "trim", pool]);
    shell.image("image", 8 << 20, 0);
    shell.ok(&["disk", "import", &image, &disk]);
}

#[test]
fn names_are_listed_in_their_natural_order() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:vm", "--size", "1M"]);
    shell.ok(&["disk", "fork", "p:vm", "vm", "-n", "11"]);
    let names = |command: &str| {
        let all = shell.json(&["disk", command, "p"]);
        let all = all["disks"].as_array().expect("a list").clone();
        let names = all.iter().filter_map(|disk| disk["name"].as_str());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut expected = vec!["vm".to_owned()];
    expected.extend((1..=11).map(|n| format!("vm-{n}")));
    assert_eq!(names("ls"), expected);
    assert_eq!(names("tree"), expected);
}

#[test]
fn many_disks_are_removed_by_one_command() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:vm", "--size", "1M"]);
    shell.ok(&["disk", "fork", "p:vm", "vm", "-n", "12"]);
    shell.ok(&["disk", "snapshot", "p:vm@a"]);
    shell.ok(&["disk", "snapshot", "p:vm-12@a"]);
    let names = || {
        let all = shell.json(&["disk", "ls", "p"]);
        let all = all["disks"].as_array().expect("a list").clone();
        let names = all.iter().filter_map(|disk| disk["name"].as_str());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    // One that is not there, or fits nothing, and nothing is removed.
    for wrong in ["p:nope", "p:x*", "p:vm-?@b"] {
        let outcome = shell.run(&["disk", "rm", "p:vm-1", wrong, "-o", "json"]);
        assert_eq!(outcome.error()["kind"], "not_found", "{outcome:?}");
    }
    assert_eq!(names().len(), 15);
    let removed = shell.json(&["disk", "rm", "p:vm-?", "p:vm@a", "p:vm-10"]);
    let expected = [
        "vm@a", "vm-1", "vm-2", "vm-3", "vm-4", "vm-5", "vm-6", "vm-7", "vm-8", "vm-9", "vm-10",
    ];
    assert_eq!(removed["names"], Value::from(expected.to_vec()));
    assert_eq!(names(), ["vm", "vm-11", "vm-12", "vm-12@a"]);
    // What went before an error is said.
    let outcome = shell.run(&["disk", "rm", "p:*", "-o", "json"]);
    assert_eq!(outcome.error()["kind"], "has_dependents", "{outcome:?}");
    let hint = outcome.error()["hint"].as_str().expect("a hint").to_owned();
    assert!(hint.contains("vm, vm-11"), "{hint}");
    shell.ok(&["disk", "rm", "p:*", "--cascade"]);
    assert_eq!(names(), [""; 0]);
    let outcome = shell.run(&["disk", "rm", "p:a", "q:b"]);
    assert_eq!(outcome.code, 2, "{outcome:?}");
}

/// Runs a command with `bytes` as its standard input.
fn with_input(shell: &Shell, args: &[&str], bytes: &[u8]) -> (bool, String) {
    let mut child = shell
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut input = child.stdin.take().expect("piped");
    // Who refuses what comes does not read it to its end.
    drop(input.write_all(bytes));
    drop(input);
    let output = child.wait_with_output().expect("ends");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    (output.status.success(), text)
}

#[test]
fn a_stream_is_imported_as_it_comes() {
    let shell = Shell::new();
    shell.ok(&["pool", "create", "p", "--size", "64M"]);
    shell.image("image", (5 << 20) + 1024, 3);
    let mut bytes = fs::read(shell.path("image")).expect("reads");
    let import = ["disk", "import", "-", "p:a", "-o", "json"];
    let (is_done, said) = with_input(&shell, &import, &bytes);
    assert!(is_done, "{said}");
    assert_eq!(
        shell.json(&["disk", "info", "p:a"])["size_bytes"],
        (5 << 20) + 1024
    );
    assert!(shell.ok_bytes(&["disk", "export", "p:a", "-"]) == bytes);
    // A length that is no number of sectors is filled up.
    bytes.truncate(1000);
    let (is_done, said) = with_input(&shell, &["disk", "import", "-", "p:b"], &bytes);
    assert!(is_done, "{said}");
    bytes.resize(1024, 0);
    assert!(shell.ok_bytes(&["disk", "export", "p:b", "-"]) == bytes);
    for (bytes, says) in [
        (&b""[..], "nothing in the image"),
        (b"QFI\xfb\0\0\0\x03 and so on", "qcow2"),
        (b"\x1f\x8b\x08 and so on", "gzip"),
    ] {
        let (is_done, said) = with_input(&shell, &["disk", "import", "-", "p:c"], bytes);
        assert!(!is_done && said.contains(says), "{said}");
    }
    let (is_done, said) = with_input(
        &shell,
        &["disk", "import", "-", "p:c", "--format", "qcow2"],
        b"",
    );
    assert!(!is_done && said.contains("standard input"), "{said}");
    let names = shell.json(&["disk", "ls", "p"]);
    assert_eq!(
        names["disks"].as_array().map(Vec::len),
        Some(2),
        "nothing is left"
    );
}
