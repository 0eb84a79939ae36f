//! Any command line is understood or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

fuzz_target!(|data: &[u8]| {
    let words = data.split(|byte| *byte == 0).take(32);
    let args = words.map(|word| OsString::from_vec(word.to_vec()));
    let _ = tidepool::cli::is_understood(std::iter::once("tidepool".into()).chain(args));
});
