//! The daemon under test, and its pool when it is dead.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use tidepool::pool::check::check;
use tidepool::pool::{OpenOptions, Pool};
use tidepool::storage::{Access, FileStorage};
use tidepool::sync::{Mutex, spawn_named};

/// A running `tidepool serve`.
pub(crate) struct Daemon {
    child: Child,
    sockets: PathBuf,
    said: Arc<Mutex<String>>,
    listener: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Serves `pool`. `before` are the words to start the program with, `after` more arguments.
    pub(crate) fn start(pool: &Path, sockets: &Path, before: &[String], after: &[&str]) -> Self {
        std::fs::create_dir_all(sockets).expect("a directory");
        let program = env!("CARGO_BIN_EXE_tidepool").to_owned();
        let mut words = before.iter().cloned().chain([program]);
        let mut child = Command::new(words.next().expect("the program at least"))
            .args(words)
            .arg("serve")
            .arg(pool)
            .arg("--sockets")
            .arg(sockets)
            .args(after)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the daemon starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.contains("ready"));
        assert!(ready, "the daemon says when it is ready");
        let said = Arc::new(Mutex::new(String::new()));
        let heard = Arc::clone(&said);
        let listen = move || {
            for line in lines.map_while(Result::ok) {
                let mut heard = heard.lock();
                heard.push_str(&line);
                heard.push('\n');
            }
        };
        Self {
            child,
            sockets: sockets.to_owned(),
            said,
            listener: Some(spawn_named("listener", listen).expect("a thread")),
        }
    }

    pub(crate) fn socket(&self, disk: &str) -> PathBuf {
        self.sockets.join(format!("{disk}.sock"))
    }

    /// Whether it has said that since it was ready.
    pub(crate) fn has_said(&self, words: &str) -> bool {
        self.said.lock().contains(words)
    }

    /// Ends it; what it had said since it was ready.
    pub(crate) fn kill(mut self) -> String {
        let ended = self.child.try_wait().expect("it is ours");
        assert!(ended.is_none(), "the daemon ended by itself: {ended:?}");
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("it was ours");
        let listener = self.listener.take().expect("joined once");
        listener.join().expect("it does not panic");
        std::mem::take(&mut *self.said.lock())
    }
}

impl Drop for Daemon {
    /// What a failing test leaves running would keep its place busy.
    fn drop(&mut self) {
        drop(self.child.kill()); // an error if it has ended: so much the better
        drop(self.child.wait());
    }
}

/// Opens a dead daemon's pool, after `check` found nothing wrong with it.
pub(crate) fn open_pool(path: &Path) -> Arc<Pool> {
    let file = FileStorage::open(path, Access::ReadWrite).expect("the dead daemon's lock is gone");
    let report = check(&file).expect("readable");
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    Pool::open(Arc::new(file), &OpenOptions::default()).expect("a killed pool opens")
}
