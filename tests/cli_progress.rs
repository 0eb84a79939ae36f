//! Goal: long work shows how far it is, in one line that fits the terminal.
//!
//! Method: the built program on a pseudo-terminal of a given width.

mod cli;

use cli::Shell;
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::Read;

/// What `tidepool` with `args` shows on a terminal of `columns`, and how it ends.
fn show(shell: &Shell, args: &[&str], columns: u16) -> (String, Option<i32>) {
    let size = Winsize {
        ws_row: 24,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = openpty(Some(&size), None).expect("a terminal");
    let mut command = shell.command(args);
    let mut child = command.stderr(pty.slave).spawn().expect("starts");
    // The command has the terminal open as well.
    drop(command);
    let mut shown = Vec::new();
    let mut master = File::from(pty.master);
    let mut part = [0; 4096];
    // It ends with an error when nobody has the terminal open any more.
    while let Ok(len) = master.read(&mut part) {
        if len == 0 {
            break;
        }
        shown.extend_from_slice(&part[..len]);
    }
    let shown = String::from_utf8(shown).expect("UTF-8");
    (shown, child.wait().expect("ends").code())
}

/// The lines that were drawn, one over the other, without the commands to the terminal.
fn lines(shown: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for drawn in shown.split(['\r', '\n']) {
        let mut line = String::new();
        let mut rest = drawn.chars();
        while let Some(c) = rest.next() {
            if c == '\u{1b}' {
                // To the letter that ends it.
                let _command = rest.find(char::is_ascii_alphabetic);
            } else {
                line.push(c);
            }
        }
        lines.push(line);
    }
    lines
}

#[test]
fn progress_is_one_line_on_any_terminal() {
    let shell = Shell::new();
    shell.pool();
    let image = shell.image("image.raw", 16 << 20, 0);
    for columns in [40, 80, 200] {
        shell.ok(&["disk", "create", "p:a", "--base", &image]);
        let flatten = ["disk", "flatten", "p:a", "--throttle", "32M"];
        let (shown, code) = show(&shell, &flatten, columns);
        assert_eq!(code, Some(0), "{shown}");
        let lines = lines(&shown);
        let bars: Vec<&String> = lines.iter().filter(|line| line.contains('[')).collect();
        assert!(bars.len() > 2, "{shown:?}");
        for bar in &bars {
            assert!(
                bar.starts_with("flattening ["),
                "{columns} columns: {bar:?}"
            );
            assert!(bar.contains("%"), "{columns} columns: {bar:?}");
        }
        let last = bars[bars.len() - 1].trim_end();
        assert!(last.contains("=") && last.ends_with(" left"), "{last:?}");
        let widest = lines.iter().map(|line| line.chars().count()).max();
        assert!(
            widest <= Some(columns.into()),
            "{columns} columns: {bars:?}"
        );
        assert_eq!(
            lines.last().map(|line| line.trim()),
            Some(""),
            "it is wiped out"
        );
        shell.ok(&["disk", "rm", "p:a"]);
    }
}
