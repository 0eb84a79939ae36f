//! A panic while pools are served, in whatever thread: an invariant is broken, and guests would wait
//! for what the thread was doing. The process ends at once instead, having said what and where. That
//! is safe: a pool opens again as after any crash, and guests reconnect.

use super::output;

const LAST_WORDS: &str = "tidepool: a fault of the server's own ends it now; start it again: what a \
                          flush acknowledged is there\n";

/// From here on a panic ends the process, by SIGABRT, before anything is unwound: what is half done
/// is not touched again.
pub(super) fn abort() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        output::note(LAST_WORDS);
        std::process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{Vital, spawn_named};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const WHICH: &str = "TIDEPOOL_TEST_PANIC";
    const SIGABRT: i32 = 6;

    /// What the process of the test below does; nothing by itself.
    #[test]
    fn panic_as_told() {
        let panics = |is_vital: bool| {
            let thread = spawn_named("broken", move || {
                let _vital = is_vital.then(Vital::new);
                panic!("an invariant");
            });
            let ended = thread.expect("a thread").join();
            assert!(ended.is_err(), "it has panicked");
        };
        match std::env::var(WHICH).as_deref() {
            Ok("server") => {
                abort();
                panics(false);
            }
            Ok("vital") => panics(true),
            Ok("unwind") => {
                crate::sync::set_on_panic(crate::sync::OnPanic::Unwind);
                panics(true);
            }
            Ok("other") => panics(false),
            Ok(_) | Err(_) => {}
        }
    }

    #[test]
    fn a_panic_ends_the_process_where_others_rely_on_the_thread() {
        for (which, signal) in [
            ("server", Some(SIGABRT)),
            ("vital", Some(SIGABRT)),
            ("unwind", None),
            ("other", None),
        ] {
            let mut child = Command::new(std::env::current_exe().expect("this test"));
            child.args([
                "--exact",
                "cli::panics::tests::panic_as_told",
                "--nocapture",
            ]);
            let output = child.env(WHICH, which).output().expect("runs");
            assert_eq!(output.status.signal(), signal, "{which}");
            let said = String::from_utf8_lossy(&output.stderr);
            for part in ["broken", "panics.rs", "an invariant"] {
                assert!(said.contains(part), "{which}: {said}");
            }
            assert_eq!(said.contains(LAST_WORDS), which == "server", "{said}");
        }
    }
}
