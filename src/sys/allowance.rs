//! How many mappings one client may have at once. A process has a limited number of them
//! (`vm.max_map_count`), and a client keeps old ones for as long as requests on them last.

use std::io;

use crate::sync::Arc;
use crate::sync::global::atomic::{AtomicUsize, Ordering};

use super::sigbus;

/// Mappings that every client may have, whatever the others have.
const ASSURED: usize = 64;
/// Mappings that no client needs more of: the largest table of vhost-user twice, while one takes the
/// other's place, and as much again on which requests wait.
const MOST: usize = 2048;

/// One client's mappings are counted here.
#[derive(Debug, Default)]
pub struct Allowance(Arc<AtomicUsize>);

/// One mapping, for as long as it is there.
#[derive(Debug)]
pub(super) struct Counted(Arc<AtomicUsize>);

impl Allowance {
    /// Counts one more.
    ///
    /// # Errors
    /// `QuotaExceeded`: the client has as many as it may have, or more than it is assured of while the
    /// process has little to spare.
    pub(super) fn count(&self) -> io::Result<Counted> {
        let held = self.0.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&self.0));
        if held < ASSURED || (held < MOST && !sigbus::is_crowded()) {
            return Ok(counted);
        }
        let what = format!(
            "{held} regions of this client's memory are mapped: those it has taken away stay so \
             while requests on them wait"
        );
        Err(io::Error::new(io::ErrorKind::QuotaExceeded, what))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_share_back_when_mappings_end() {
        let (one, other) = (Allowance::default(), Allowance::default());
        let mut held: Vec<Counted> = (0..MOST).map_while(|_| one.count().ok()).collect();
        assert!(held.len() >= ASSURED);
        let refused = one.count().map(drop).map_err(|error| error.kind());
        assert_eq!(refused, Err(io::ErrorKind::QuotaExceeded));
        other.count().map(drop).expect("another has its own");
        held.pop();
        one.count().map(drop).expect("there is one less");
    }
}
