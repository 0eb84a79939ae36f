//! Goal: the documents say nothing that is not there.
//!
//! Method: reads every Markdown file of the tree. Relative links must lead to files, and their
//! fragments to headings; every `tidepool ...` command line must be one the program takes (asked by
//! adding `--help` to it, so that nothing is done); every test the specification names must exist.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Least of each that is found in the tree: a reader that sees nothing finds no fault either.
const LINKS_MIN: usize = 30;
const COMMANDS_MIN: usize = 30;
const TESTS_MIN: usize = 30;

fn markdown_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("directory is readable") {
        let path = entry.expect("entry is readable").path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                markdown_files(&path, found);
            }
        } else if path.extension().is_some_and(|e| e == "md") {
            found.push(path);
        }
    }
}

/// Every Markdown file, and its text.
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths = Vec::new();
    markdown_files(Path::new("."), &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("document is readable");
        (path, text)
    };
    paths.into_iter().map(read).collect()
}

/// Lines outside code blocks if `in_blocks` is false, else inside.
fn lines(text: &str, in_blocks: bool) -> Vec<&str> {
    let mut is_inside = false;
    let mut found = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            is_inside = !is_inside;
        } else if is_inside == in_blocks {
            found.push(line);
        }
    }
    found
}

/// Targets of `[text](target)` in `text`, code left out.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in lines(text, false) {
        let plain: String = line.split('`').step_by(2).collect();
        for rest in plain.split("](").skip(1) {
            found.extend(rest.split_once(')').map(|(target, _)| target.to_owned()));
        }
    }
    found
}

/// The fragment that a heading is given by the usual renderers.
fn slug(heading: &str) -> String {
    let lower = heading.trim().to_lowercase();
    let kept = lower
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn slugs(text: &str) -> BTreeSet<String> {
    let headings = lines(text, false)
        .into_iter()
        .filter(|l| l.starts_with('#'));
    headings
        .map(|line| slug(line.trim_start_matches('#')))
        .collect()
}

#[test]
fn relative_links_lead_somewhere() {
    let mut faults = Vec::new();
    let mut count = 0;
    for (path, text) in documents() {
        for target in links(&text) {
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (file, fragment) = target.split_once('#').unwrap_or((&target, ""));
            let there = match file {
                "" => path.clone(),
                file => path.parent().unwrap_or(Path::new(".")).join(file),
            };
            let has_fragment = || {
                let text = fs::read_to_string(&there).unwrap_or_default();
                slugs(&text).contains(fragment)
            };
            if !there.exists() || (!fragment.is_empty() && !has_fragment()) {
                faults.push(format!("{}: `{target}` leads nowhere", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(count >= LINKS_MIN, "only {count} links were found");
}

/// Command lines of `tidepool` in code blocks and code spans, as words. Ends at what a shell does.
fn commands(text: &str) -> Vec<Vec<String>> {
    let block = lines(text, true).join("\n").replace("\\\n", " ");
    let spans = lines(text, false)
        .into_iter()
        .flat_map(|line| line.split('`').skip(1).step_by(2));
    let shown = block.lines().chain(spans);
    shown
        .filter_map(|line| line.trim().strip_prefix("tidepool "))
        .map(|line| {
            line.split_whitespace()
                .take_while(|word| !word.starts_with(['|', '>', '#', '&', ';']))
                .map(str::to_owned)
                .collect()
        })
        .filter(|words: &Vec<String>| {
            // Diagrams have the name in front of what is no command.
            let first = words.first().and_then(|word| word.chars().next());
            first.is_some_and(|c| c.is_ascii_lowercase())
        })
        .collect()
}

#[test]
fn commands_shown_are_commands_taken() {
    let mut faults = Vec::new();
    let mut seen = BTreeSet::new();
    for (path, text) in documents() {
        for words in commands(&text) {
            if !seen.insert(words.clone()) {
                continue;
            }
            let output = Command::new(env!("CARGO_BIN_EXE_tidepool"))
                .args(&words)
                .arg("--help")
                .output()
                .expect("the program runs");
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let line = words.join(" ");
                faults.push(format!("{}: tidepool {line}: {said}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let count = seen.len();
    assert!(count >= COMMANDS_MIN, "only {count} commands were found");
}

/// Code spans that name a test: `file.rs` or `file.rs::function`.
fn tests_named(text: &str) -> Vec<(String, Option<String>)> {
    let rows = lines(text, false)
        .into_iter()
        .filter(|l| l.starts_with('|'));
    let spans = rows.flat_map(|line| line.split('`').skip(1).step_by(2));
    spans
        .filter(|span| {
            ["tests/", "src/", "fuzz/"]
                .iter()
                .any(|dir| span.starts_with(dir))
        })
        .map(|span| match span.split_once("::") {
            Some((file, function)) => (file.to_owned(), Some(function.to_owned())),
            None => (span.to_owned(), None),
        })
        .collect()
}

#[test]
fn tests_that_the_specification_names_exist() {
    let text = fs::read_to_string("docs/SPECIFICATION.md").expect("document is readable");
    let named = tests_named(&text);
    let mut faults = Vec::new();
    for (file, function) in &named {
        let source = fs::read_to_string(file).unwrap_or_default();
        let is_there = match function {
            Some(function) => source.contains(&format!("fn {function}(")),
            None => !source.is_empty(),
        };
        if !is_there {
            faults.push(format!("{file}: {function:?} is not there"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let count = named.len();
    assert!(count >= TESTS_MIN, "only {count} tests are named");
}

#[test]
fn readers_see_what_is_there() {
    let text = "# A b, `c`\n[x](y.md#z) `[no](link)`\n```sh\n[no](link)\ntidepool pool \\\n  ls | cat\n```\n\
                or `tidepool disk ls p`";
    assert_eq!(links(text), ["y.md#z"]);
    assert!(slugs(text).contains("a-b-c"));
    assert_eq!(
        commands(text),
        [vec!["pool", "ls"], vec!["disk", "ls", "p"]]
    );
    assert_eq!(
        tests_named("| `tests/a.rs::b` and `src/c.rs` |\n`tests/not/a/row.rs`"),
        [
            ("tests/a.rs".to_owned(), Some("b".to_owned())),
            ("src/c.rs".to_owned(), None)
        ]
    );
}
