//! Goal: the command line keeps its contract: exit status, JSON with the documented fields, errors
//! that say what, to which object and what to do, and no harm done by bad input.
//!
//! Method: the built program is run as a user would, in a directory of its own. `qemu-img`, where
//! it is installed, makes the images that are imported and judges those that are exported.

mod cli;

use cli::{Outcome, Shell, has_qemu_img, skip};
use serde_json::{Value, json};
use std::fs;

const COMMANDS: &[&[&str]] = &[
    &["pool", "create"],
    &["pool", "info"],
    &["pool", "check"],
    &["pool", "dump"],
    &["pool", "restore"],
    &["pool", "undo"],
    &["pool", "resize"],
    &["pool", "ls"],
    &["pool", "trim"],
    &["disk", "create"],
    &["disk", "ls"],
    &["disk", "info"],
    &["disk", "tree"],
    &["disk", "rm"],
    &["disk", "rename"],
    &["disk", "resize"],
    &["disk", "set"],
    &["disk", "fork"],
    &["disk", "snapshot"],
    &["disk", "rollback"],
    &["disk", "commit"],
    &["disk", "flatten"],
    &["disk", "import"],
    &["disk", "export"],
    &["disk", "diff"],
    &["disk", "map"],
    &["serve"],
    &["completions"],
];

#[test]
fn every_command_has_help_with_examples_and_a_version() {
    let shell = Shell::new();
    for command in COMMANDS {
        let help = shell.run(&[command, &["--help"][..]].concat());
        assert_eq!(help.code, 0, "{command:?}: {help:?}");
        assert!(help.stdout.contains("Usage: tidepool"), "{command:?}");
        assert!(help.stdout.contains("Examples:\n"), "{command:?}");
        assert!(help.stdout.contains("--output <FORMAT>"), "{command:?}");
        let version = shell.run(&[command, &["--version"][..]].concat());
        assert_eq!(version.code, 0, "{command:?}");
        assert!(version.stdout.contains(env!("CARGO_PKG_VERSION")));
    }
    let top = shell.run(&["--help"]);
    for command in ["pool", "disk", "serve", "completions"] {
        assert!(top.stdout.contains(command), "{command} in --help");
    }
}

#[test]
fn every_command_without_its_arguments_is_usage() {
    let shell = Shell::new();
    for command in COMMANDS
        .iter()
        .filter(|command| **command != ["pool", "ls"])
    {
        let text = shell.run(command);
        assert_eq!(text.code, 2, "{command:?}: {text:?}");
        assert!(text.stderr.contains("required"), "{command:?}: {text:?}");
        assert_eq!(text.stdout, "");
        let json = shell.run(&[command, &["--output", "json"][..]].concat());
        assert_eq!(json.code, 2, "{command:?}");
        assert_eq!(json.error()["kind"], "usage", "{command:?}");
    }
    assert_eq!(shell.run(&[]).code, 2);
    assert_eq!(shell.run(&["frobnicate"]).code, 2);
}

/// Command lines, and what must be said about them.
const NONSENSE: &[(&[&str], &str)] = &[
    (
        &["pool", "create", "x", "--size", "5.5Q"],
        "sizes look like",
    ),
    (&["pool", "create", "x", "--size", "0"], "zero bytes"),
    (&["pool", "create", "x", "--size", "99999999T"], "2^63"),
    (&["pool", "create", "x", "--size", "-1G"], "-1"),
    (
        &["pool", "create", "x", "--size", "1G", "--cluster", "65K"],
        "power of two",
    ),
    (
        &["pool", "create", "x", "--size", "1G", "--cluster", "2M"],
        "16K to 1M",
    ),
    (&["pool", "create", "x"], "--size"),
    (
        &["disk", "create", "p:a/b", "--size", "1G"],
        "`a/b` has '/'",
    ),
    (&["disk", "create", "p:..", "--size", "1G"], "begins with"),
    (&["disk", "create", "p:", "--size", "1G"], "empty"),
    (&["disk", "create", "p", "--size", "1G"], "POOL:NAME"),
    (&["disk", "create", "p:a@s", "--size", "1G"], "snapshot"),
    (&["disk", "create", "p:a"], "--size"),
    (
        &[
            "disk",
            "create",
            "p:a",
            "--size",
            "1G",
            "--base-format",
            "raw",
        ],
        "--base",
    ),
    (
        &[
            "disk",
            "create",
            "p:a",
            "--size",
            "1G",
            "--base",
            "b",
            "--base-format",
            "vmdk",
        ],
        "qcow2",
    ),
    (&["disk", "snapshot", "p:a"], "POOL:NAME@SNAPSHOT"),
    (&["disk", "rollback", "p:a@s@t"], "'@'"),
    (&["disk", "fork", "p:a", "q:b"], "another pool"),
    (&["disk", "fork", "p:a", "b", "-n", "0"], "0"),
    (&["disk", "set", "p:a"], "--limit"),
    (&["disk", "set", "p:a", "--ephemeral", "maybe"], "maybe"),
    (
        &["disk", "export", "p:a", "-", "--format", "qcow2"],
        "standard output",
    ),
    (&["serve", "p", "--workers", "0"], "0"),
    (&["serve", "p", "--queues", "300"], "300"),
    (&["serve", "p", "--return", "sometimes"], "sometimes"),
    (&["completions", "tcsh"], "tcsh"),
];

#[test]
fn words_that_make_no_sense_are_usage_and_say_why() {
    let shell = Shell::new();
    shell.pool();
    for &(args, says) in NONSENSE {
        let text = shell.run(args);
        assert_eq!(text.code, 2, "{args:?}: {text:?}");
        assert!(
            text.stderr.contains(says),
            "{args:?} must say {says:?}: {text:?}"
        );
        let json = shell.run(&[args, &["-o", "json"]].concat());
        assert_eq!(json.code, 2, "{args:?}");
        assert_eq!(json.error()["kind"], "usage", "{args:?}");
    }
    assert!(!shell.path("x").exists(), "nothing was made");
}

/// Commands that fail, the kind, and what must be said.
const FAILURES: &[(&[&str], &str, &str)] = &[
    (&["pool", "info", "nope"], "not_found", "no such pool"),
    (
        &["pool", "info", "foreign"],
        "not_a_pool",
        "not a Tidepool pool",
    ),
    (&["pool", "info", "short"], "damaged", "cut short"),
    (&["pool", "info", "empty"], "damaged", "cut short"),
    (
        &["pool", "info", "dir"],
        "not_a_pool",
        "neither a regular file",
    ),
    (
        &["pool", "create", "p", "--size", "1G"],
        "exists",
        "exists already",
    ),
    (
        &["pool", "create", "dir", "--size", "1G"],
        "exists",
        "exists already",
    ),
    (
        &["pool", "create", "no/p", "--size", "1G"],
        "not_found",
        "no/p",
    ),
    (
        &["pool", "create", "tiny", "--size", "1M"],
        "invalid",
        "at least 16 MiB",
    ),
    (&["pool", "ls", "nope"], "not_found", "nope"),
    (&["disk", "ls", "foreign"], "not_a_pool", "foreign"),
    (&["disk", "info", "p:b"], "not_found", "`b`"),
    (
        &["disk", "create", "p:a", "--size", "1M"],
        "exists",
        "`a` exists already",
    ),
    (
        &["disk", "create", "p:b", "--size", "1000000T"],
        "invalid",
        "bytes",
    ),
    (
        &["disk", "create", "p:b", "--base", "nope"],
        "not_found",
        "nope",
    ),
    (&["disk", "create", "p:b", "--base", "dir"], "io", "neither"),
    (
        &[
            "disk",
            "create",
            "p:b",
            "--base",
            "foreign",
            "--base-format",
            "qcow2",
        ],
        "base",
        "qcow2",
    ),
    (
        &["disk", "create", "p:b", "--size", "9T", "--reserve", "9T"],
        "invalid",
        "reserved",
    ),
    (&["disk", "rm", "p:a"], "has_dependents", "a@s"),
    (&["disk", "rm", "p:b"], "not_found", "`b`"),
    (&["disk", "rename", "p:a", "a"], "exists", "exists"),
    (
        &["disk", "resize", "p:a", "--size", "512K"],
        "invalid",
        "--shrink",
    ),
    (
        &["disk", "resize", "p:b", "--size", "512K"],
        "not_found",
        "`b`",
    ),
    (&["disk", "fork", "p:b", "c"], "not_found", "`b`"),
    (&["disk", "fork", "p:a", "a"], "exists", "`a`"),
    (&["disk", "snapshot", "p:a@s"], "exists", "a@s"),
    (&["disk", "rollback", "p:a@t"], "not_found", "a@t"),
    (&["disk", "commit", "p:a"], "invalid", "not forked"),
    (&["disk", "flatten", "p:a"], "invalid", "no base"),
    (&["disk", "import", "nope", "p:n"], "not_found", "nope"),
    (&["disk", "import", "foreign", "p:a"], "exists", "`a`"),
    (&["disk", "export", "p:a", "foreign"], "exists", "--force"),
    (&["disk", "export", "p:a", "dir"], "invalid", "regular file"),
    (
        &["disk", "export", "p:a", "no/file"],
        "not_found",
        "no/file",
    ),
    (&["disk", "export", "p:b", "file"], "not_found", "`b`"),
    (&["disk", "diff", "p:a", "b"], "not_found", "`b`"),
    (&["disk", "map", "p:b"], "not_found", "`b`"),
    (
        &["serve", "nope", "--sockets", "sock"],
        "not_found",
        "no such pool",
    ),
];

#[test]
fn failures_have_a_kind_an_object_and_a_hint() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    shell.ok(&["disk", "snapshot", "p:a@s"]);
    fs::write(shell.path("foreign"), vec![7; 3 << 20]).expect("writes");
    fs::write(
        shell.path("short"),
        &fs::read(shell.path("p")).expect("reads")[..3 << 20],
    )
    .expect("writes");
    fs::write(shell.path("empty"), "").expect("writes");
    fs::create_dir(shell.path("dir")).expect("makes");
    for &(args, kind, says) in FAILURES {
        let text = shell.run(args);
        assert_eq!(text.code, 1, "{args:?}: {text:?}");
        assert_eq!(text.stdout, "", "{args:?}");
        assert!(text.stderr.starts_with("tidepool: "), "{args:?}: {text:?}");
        assert!(
            text.stderr.contains(says),
            "{args:?} must say {says:?}: {text:?}"
        );
        let json = shell.run(&[args, &["--output=json"]].concat());
        assert_eq!(json.code, 1, "{args:?}");
        let error = json.error();
        assert_eq!(error["kind"], kind, "{args:?}: {error}");
        assert!(error.to_string().contains(says), "{args:?}: {error}");
        assert!(error["message"].is_string());
        assert!(error["hint"].is_null() || error["hint"].is_string());
        assert!(error["object"].is_string());
    }
    assert!(!shell.path("file").exists() && !shell.path("file.partial").exists());
    assert_eq!(shell.json(&["pool", "check", "p"])["faults"], json!([]));
    let names = shell.json(&["disk", "ls", "p"]);
    let names: Vec<&Value> = names["disks"].as_array().expect("a list").iter().collect();
    assert_eq!(names.len(), 2, "a and a@s, and nothing a failure left");
}

/// Commands in an order that works, and the fields of their replies.
const REPLIES: &[(&[&str], &[&str])] = &[
    (
        &["disk", "create", "p:a", "--size", "8M", "--limit", "4M"],
        &["pool", "name", "size_bytes", "base"],
    ),
    (
        &["disk", "create", "p:b", "--base", "base.raw", "--ephemeral"],
        &["base"],
    ),
    (
        &["disk", "fork", "p:a", "f", "-n", "3"],
        &["source", "forks"],
    ),
    (&["disk", "snapshot", "p:a@s"], &["name", "snapshot"]),
    (&["disk", "ls", "p"], &["pool", "disks"]),
    (
        &["disk", "info", "p:a"],
        &[
            "pool",
            "name",
            "kind",
            "id",
            "family",
            "parent",
            "size_bytes",
            "used_bytes",
            "shared_bytes",
            "unique_bytes",
            "reclaimable_bytes",
            "base",
            "limit_bytes",
            "limit_used_bytes",
            "reserve_bytes",
            "reserve_left_bytes",
            "is_ephemeral",
            "created",
            "snapshots",
            "forks",
        ],
    ),
    (
        &["disk", "tree", "p"],
        &[
            "pool",
            "capacity_bytes",
            "used_bytes",
            "free_bytes",
            "metadata_bytes",
            "host_allocated_bytes",
            "disks",
        ],
    ),
    (
        &["disk", "set", "p:a", "--limit", "none", "--reserve", "2M"],
        &["limit_bytes", "reserve_bytes", "is_ephemeral"],
    ),
    (
        &["disk", "resize", "p:a", "--size", "16M"],
        &["old_size_bytes", "size_bytes"],
    ),
    (&["disk", "rename", "p:f-3", "g"], &["old_name", "name"]),
    (&["disk", "rollback", "p:a@s"], &["name", "snapshot"]),
    (
        &["disk", "diff", "p:a", "g"],
        &["a", "b", "compared", "bytes", "extents"],
    ),
    (&["disk", "map", "p:b"], &["name", "size_bytes", "extents"]),
    (
        &["disk", "export", "p:b", "b.raw"],
        &["file", "format", "size_bytes", "data_bytes"],
    ),
    (
        &["disk", "import", "b.raw", "p:c"],
        &["file", "format", "size_bytes", "data_bytes"],
    ),
    (&["disk", "flatten", "p:b"], &["name", "data_bytes"]),
    (&["disk", "fork", "p:f-1", "child"], &["forks"]),
    (&["disk", "commit", "p:child"], &["name", "parent"]),
    (&["disk", "rm", "p:a", "--cascade"], &["removed"]),
    (
        &["pool", "resize", "p", "--size", "2G"],
        &["old_capacity_bytes", "capacity_bytes"],
    ),
    (
        &["pool", "trim", "p"],
        &["returned_bytes", "host_allocated_bytes"],
    ),
    (
        &["pool", "check", "p"],
        &[
            "faults",
            "faults_left",
            "is_repaired",
            "is_clean",
            "disks",
            "used_bytes",
            "free_bytes",
        ],
    ),
    (
        &["pool", "info", "p"],
        &[
            "pool",
            "uuid",
            "capacity_bytes",
            "used_bytes",
            "free_bytes",
            "reserved_bytes",
            "metadata_bytes",
            "reclaimable_bytes",
            "host_allocated_bytes",
            "cluster_bytes",
            "disks",
            "snapshots",
            "is_clean",
            "given_up_bytes",
        ],
    ),
    (&["pool", "ls"], &["pools"]),
    (&["completions", "bash"], &["shell", "script"]),
];

#[test]
fn replies_have_the_documented_fields() {
    let shell = Shell::new();
    let created = shell.json(&["pool", "create", "p", "--size", "1G", "--cluster", "128K"]);
    assert_eq!(created["capacity_bytes"], 1 << 30);
    assert_eq!(created["cluster_bytes"], 128 << 10);
    assert_eq!(created["pool"], "p");
    shell.image("base.raw", 3 << 20, 1);
    for &(args, fields) in REPLIES {
        let reply = shell.json(args);
        for field in fields {
            assert!(
                reply.get(field).is_some(),
                "{args:?} has no {field}: {reply}"
            );
        }
    }
    let info = shell.json(&["disk", "info", "p:c"]);
    assert_eq!(info["size_bytes"], 3 << 20);
    let pools = shell.json(&["pool", "ls", "."]);
    assert_eq!(pools["pools"][0]["state"], "idle");
    assert_eq!(
        pools["pools"].as_array().map(Vec::len),
        Some(1),
        "base.raw is no pool"
    );
    let dump = shell.ok(&["pool", "dump", "p"]);
    for line in dump.stdout.lines() {
        let line: Value = serde_json::from_str(line).expect("a JSON object a line");
        assert!(line["kind"].is_string());
    }
}

#[test]
fn text_is_aligned_and_names_every_disk() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:root", "--size", "1M"]);
    shell.ok(&["disk", "fork", "p:root", "a-long-name"]);
    shell.ok(&["disk", "snapshot", "p:root@s"]);
    shell.ok(&["disk", "fork", "p:root@s", "leaf"]);
    let tree = shell.ok(&["disk", "tree", "p"]).stdout;
    let lines: Vec<&str> = tree.lines().collect();
    assert!(lines[1].starts_with("root "), "{tree}");
    assert!(lines[2].starts_with("|- a-long-name"), "{tree}");
    assert!(lines[3].starts_with("`- root@s"), "{tree}");
    assert!(lines[4].starts_with("   `- leaf"), "{tree}");
    let size_end = lines[0].find("SIZE").expect("a heading") + 4;
    for line in &lines[1..5] {
        assert_eq!(&line[size_end - 2..size_end], "1M", "{tree}");
    }
    let list = shell.ok(&["disk", "ls", "p"]).stdout;
    for name in ["a-long-name", "leaf", "root", "root@s"] {
        assert!(list.lines().any(|line| line.starts_with(name)), "{list}");
    }
}

#[test]
fn a_base_that_changed_or_went_away_is_refused_and_nothing_else() {
    let shell = Shell::new();
    shell.pool();
    let base = shell.image("base.raw", 1 << 20, 2);
    shell.ok(&["disk", "create", "p:over", "--base", &base]);
    shell.ok(&["disk", "create", "p:other", "--size", "1M"]);
    let original = fs::read(&base).expect("reads");
    fs::write(&base, &original[..4096]).expect("writes");
    let refused = shell.run(&["disk", "export", "p:over", "x.raw", "-o", "json"]);
    assert_eq!(refused.code, 1);
    assert_eq!(refused.error()["kind"], "base");
    assert!(refused.stderr.contains("changed since"), "{refused:?}");
    fs::remove_file(&base).expect("removes");
    let refused = shell.run(&["disk", "map", "p:over"]);
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("base.raw"), "{refused:?}");
    shell.ok(&["disk", "export", "p:other", "y.raw"]);
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    assert_eq!(server.names(), ["other"], "the other disk is served");
    assert_eq!(server.stop(), Some(0));
    shell.ok(&["disk", "rm", "p:over"]);
    assert_eq!(shell.json(&["pool", "check", "p"])["faults"], json!([]));
}

#[test]
fn images_go_in_and_come_out_as_they_were() {
    let shell = Shell::new();
    shell.pool();
    let raw = shell.image("src.raw", 9 << 20, 3);
    shell.ok(&["disk", "import", &raw, "p:raw"]);
    shell.ok(&["disk", "export", "p:raw", "out.raw"]);
    let same = |a: &str, b: &str| fs::read(shell.path(a)).ok() == fs::read(shell.path(b)).ok();
    assert!(same("src.raw", "out.raw"));
    let stream = shell.ok_bytes(&["disk", "export", "p:raw", "-"]);
    assert!(
        stream == fs::read(&raw).expect("reads"),
        "export to standard output"
    );
    shell.ok(&["disk", "export", "p:raw", "out.raw", "--force"]);
    let info = shell.json(&["disk", "info", "p:raw"]);
    assert!(
        info["used_bytes"].as_u64() < Some(6 << 20),
        "holes take no space: {info}"
    );
    let out = fs::metadata(shell.path("out.raw")).expect("stats");
    assert!(
        std::os::unix::fs::MetadataExt::blocks(&out) * 512 < 6 << 20,
        "holes come out"
    );
}

#[test]
fn qcow2_goes_in_and_comes_out_as_it_was() {
    if !has_qemu_img() {
        return skip("qcow2_goes_in_and_comes_out_as_it_was", "no qemu-img");
    }
    let shell = Shell::new();
    shell.pool();
    let raw = shell.image("src.raw", 9 << 20, 3);
    shell.ok(&["disk", "import", &raw, "p:raw"]);
    shell.qemu_img(&["convert", "-O", "qcow2", "src.raw", "src.qcow2"]);
    shell.qemu_img(&["convert", "-c", "-O", "qcow2", "src.raw", "packed.qcow2"]);
    shell.qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "src.raw",
        "-F",
        "raw",
        "chain.qcow2",
    ]);
    for name in ["src", "packed", "chain"] {
        shell.ok(&[
            "disk",
            "import",
            &format!("{name}.qcow2"),
            &format!("p:{name}"),
            // One that leads to other files is read when somebody says what it is.
            "--format",
            "qcow2",
        ]);
        let out = format!("{name}-out.qcow2");
        shell.ok(&[
            "disk",
            "export",
            &format!("p:{name}"),
            &out,
            "--format",
            "qcow2",
        ]);
        shell.qemu_img(&["compare", "-f", "raw", "-F", "qcow2", "src.raw", &out]);
        shell.qemu_img(&["check", "-q", &out]);
        shell.ok(&[
            "disk",
            "create",
            &format!("p:over-{name}"),
            "--base",
            &format!("{name}.qcow2"),
            "--base-format",
            "qcow2",
        ]);
        let diff = shell.json(&[
            "disk",
            "diff",
            "p:raw",
            &format!("over-{name}"),
            "--content",
        ]);
        assert_eq!(diff["bytes"], 0, "{diff}");
    }
}

#[test]
fn forks_differ_only_where_they_were_written() {
    if !has_qemu_img() {
        return skip(
            "forks_differ_only_where_they_were_written",
            "no qemu-img to judge",
        );
    }
    let shell = Shell::new();
    shell.pool();
    let base = shell.image("base.raw", 4 << 20, 4);
    shell.ok(&["disk", "create", "p:base", "--base", &base]);
    shell.ok(&["disk", "fork", "p:base", "one"]);
    shell.ok(&["disk", "fork", "p:one", "p:two"]);
    shell.ok(&["disk", "snapshot", "p:two@before"]);
    shell.ok(&["disk", "fork", "p:two@before", "three"]);
    for name in ["one", "two", "two@before", "three"] {
        let out = format!("{name}.raw");
        shell.ok(&["disk", "export", &format!("p:{name}"), &out]);
        shell.qemu_img(&["compare", "-f", "raw", "-F", "raw", "base.raw", &out]);
        let diff = shell.json(&["disk", "diff", "p:base", name]);
        assert_eq!(diff["bytes"], 0, "{diff}");
    }
    // Flattening writes: the same bytes in other places.
    shell.ok(&["disk", "flatten", "p:three"]);
    shell.ok(&["disk", "export", "p:three", "three.raw", "--force"]);
    shell.qemu_img(&["compare", "-f", "raw", "-F", "raw", "base.raw", "three.raw"]);
    // Shrinking and growing changes the end; commit and rollback carry it to and fro.
    shell.ok(&["disk", "resize", "p:two", "--size", "1M", "--shrink"]);
    shell.ok(&["disk", "resize", "p:two", "--size", "4M"]);
    let diff = shell.json(&["disk", "diff", "p:one", "two", "--content"]);
    assert!(
        diff["extents"][0]["offset"].as_u64() >= Some(1 << 20),
        "{diff}"
    );
    shell.ok(&["disk", "commit", "p:two"]);
    assert_eq!(shell.json(&["disk", "diff", "p:one", "two"])["bytes"], 0);
    shell.ok(&["disk", "rollback", "p:two@before"]);
    assert_eq!(shell.json(&["disk", "diff", "p:base", "two"])["bytes"], 0);
    assert_ne!(
        shell.json(&["disk", "diff", "p:one", "two", "--content"])["bytes"],
        0
    );
    let check = shell.json(&["pool", "check", "p"]);
    assert_eq!(check["faults"], json!([]));
}

#[test]
fn a_pool_in_use_names_who_has_it_and_how_to_stop_it() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    shell.ok(&["disk", "snapshot", "p:a@s"]);
    let mut server = shell.serve(&["p", "--sockets", "run"]);
    let pid = server.pid().to_string();
    assert_eq!(server.names(), ["a", "a@s"]);
    assert!(shell.path("run/a.sock").exists() && shell.path("run/a@s.sock").exists());
    for args in [
        &["pool", "info", "p"][..],
        &["disk", "rm", "p:a"],
        &["pool", "check", "p"],
    ] {
        let refused = shell.run(&[args, &["-o", "json"]].concat());
        assert_eq!(refused.code, 1, "{refused:?}");
        let error = refused.error();
        assert_eq!(error["kind"], "locked");
        assert_eq!(error["object"], "p");
        assert!(
            error["message"].as_str().expect("text").contains(&pid),
            "{error}"
        );
        assert!(
            error["message"]
                .as_str()
                .expect("text")
                .contains("tidepool serve"),
            "{error}"
        );
        assert!(
            error["hint"]
                .as_str()
                .expect("text")
                .contains(&format!("kill {pid}")),
            "{error}"
        );
    }
    assert_eq!(
        shell.json(&["pool", "ls", "p"])["pools"][0]["state"],
        "locked"
    );
    assert_eq!(server.stop(), Some(0));
    assert!(
        !shell.path("run/a.sock").exists(),
        "sockets go with the server"
    );
    let info = shell.json(&["pool", "info", "p"]);
    assert_eq!(info["is_clean"], true);
}

#[test]
fn two_pools_are_served_under_their_names_and_sockets_that_cannot_be_are_refused() {
    let shell = Shell::new();
    shell.ok(&["pool", "create", "one.pool", "--size", "64M"]);
    shell.ok(&["pool", "create", "two.pool", "--size", "64M"]);
    let none = shell.run(&["serve", "one.pool", "--sockets", "run", "-o", "json"]);
    assert_eq!(
        (none.code, &none.error()["kind"]),
        (1, &json!("not_found")),
        "no disks"
    );
    for pool in ["one", "two"] {
        shell.ok(&["disk", "create", &format!("{pool}.pool:vm"), "--size", "1M"]);
    }
    let mut server = shell.serve(&["one.pool", "two.pool", "--sockets", "run", "--workers", "2"]);
    assert!(shell.path("run/one.vm.sock").exists() && shell.path("run/two.vm.sock").exists());
    assert_eq!(server.stop(), Some(0));
    let long = "x".repeat(120);
    let refused = shell.run(&["serve", "one.pool", "--sockets", &long, "-o", "json"]);
    assert_eq!(refused.code, 1);
    assert_eq!(refused.error()["kind"], "socket");
    assert!(refused.stderr.contains("--sockets"), "{refused:?}");
    let mut read_only = shell.serve(&["one.pool", "--sockets", "run", "--read-only"]);
    shell.ok(&["disk", "ls", "one.pool"]);
    assert_eq!(shell.run(&["disk", "rm", "one.pool:vm"]).code, 1);
    assert_eq!(read_only.stop(), Some(0));
    shell.ok(&["disk", "rm", "one.pool:vm"]);
}

#[test]
fn a_reader_that_goes_away_is_not_an_error() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    shell.ok(&["disk", "fork", "p:a", "f", "-n", "500"]);
    let outcome = shell.run_closed(&["disk", "ls", "p"]);
    assert_eq!(outcome, Some(0));
}

#[test]
fn completions_know_the_commands() {
    let shell = Shell::new();
    for name in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let Outcome { code, stdout, .. } = shell.run(&["completions", name]);
        assert_eq!(code, 0, "{name}");
        assert!(
            stdout.contains("rollback") && stdout.contains("tidepool"),
            "{name}"
        );
    }
}

#[test]
fn an_interrupted_import_leaves_nothing_under_the_name() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a.partial", "--size", "1M"]);
    let image = shell.image("i.raw", 1 << 20, 5);
    let refused = shell.run(&["disk", "import", &image, "p:a"]);
    assert_eq!(refused.code, 1);
    assert!(
        refused.stderr.contains("disk rm p:a.partial"),
        "{refused:?}"
    );
    shell.ok(&["disk", "rm", "p:a.partial"]);
    // Fails for want of space, and cleans up.
    let large = shell.image("large.raw", 80 << 20, 0);
    let refused = shell.run(&["disk", "import", &large, "p:a", "-o", "json"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert_eq!(refused.error()["kind"], "no_space");
    assert_eq!(shell.json(&["disk", "ls", "p"])["disks"], json!([]));
    shell.ok(&["disk", "import", &image, "p:a"]);
}

#[test]
fn a_pool_without_metadata_is_restored_from_its_dump() {
    let shell = Shell::new();
    shell.pool();
    shell.ok(&["disk", "create", "p:a", "--size", "1M"]);
    fs::write(shell.path("dump"), shell.ok(&["pool", "dump", "p"]).stdout).expect("writes");
    let restore = |pool: &str| shell.run(&["pool", "restore", pool, "--from", "dump"]);
    let kept = restore("p");
    assert_eq!(kept.code, 1, "{kept:?}");
    assert!(kept.stderr.contains("no faults") && kept.stderr.contains("--force"));
    let mut bytes = fs::read(shell.path("p")).expect("reads");
    bytes[..3 << 20].fill(0xff);
    fs::write(shell.path("p"), bytes).expect("writes");
    assert_eq!(shell.run(&["disk", "ls", "p"]).code, 1);
    // Nothing in the file says who has had its clusters since.
    let refused = restore("p");
    assert!(
        refused.code == 1 && refused.stderr.contains("--accept-unknown"),
        "{refused:?}"
    );
    shell.ok(&["pool", "restore", "p", "--from", "dump", "--accept-unknown"]);
    shell.ok(&["pool", "check", "p"]);
    assert!(shell.ok(&["disk", "info", "p:a"]).stdout.contains("1M"));
    let refused = restore("q");
    assert!(
        refused.code == 1 && refused.stderr.contains("--metadata-only"),
        "{refused:?}"
    );
    assert!(!shell.path("q").exists(), "a slip makes no pool");
    let made = shell.ok(&["pool", "restore", "q", "--from", "dump", "--metadata-only"]);
    assert!(made.stdout.contains("all data reads as zeros"), "{made:?}");
    shell.ok(&["pool", "check", "q"]);
    let again = shell.run(&["pool", "restore", "q", "--from", "dump", "--metadata-only"]);
    assert_eq!(again.code, 1, "{again:?}");
    fs::write(shell.path("dump"), "{}\n").expect("writes");
    let refused = restore("q");
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("line 1"), "{refused:?}");
}
