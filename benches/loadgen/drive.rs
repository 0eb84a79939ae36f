//! The closed loop: keep the queue at its depth, count what completes between the end of the
//! warm-up and the deadline, then let the rest drain.

use std::error::Error;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::{Device, Done, Kind};
use crate::measure::{CpuTimes, Histogram, now};
use crate::random::Random;
use crate::workload::{Model, Workload};
use crate::{Args, Wait};

/// Looks at the used ring before a spinning client gives its backend up.
const SPIN_LOOKS_MAX: u64 = 5_000_000_000;

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Flight {
    kind: Kind,
    block: u32,
    begun: Instant,
}

/// Beginning or end of the measured stretch.
#[derive(Clone, Copy, Debug)]
struct Mark {
    at: Instant,
    cpu: CpuTimes,
}

/// One run on one device.
pub(crate) struct Driver {
    args: Args,
    device: Device,
    workload: Workload,
    model: Option<Model>,
    flights: Vec<Option<Flight>>,
    idle: Vec<u16>,
    data: Vec<u8>,
    scratch: Vec<u8>,
    submitted: u64,
    is_measuring: bool,
    requests: Histogram,
    flushes: Histogram,
}

impl Driver {
    pub(crate) fn new(args: &Args, device: Device, workload: Workload) -> Self {
        let block = usize::try_from(args.block).expect("a block is at most 1 MiB");
        let model = args
            .verify
            .then(|| Model::new(workload.blocks(), args.seed));
        Self {
            args: args.clone(),
            device,
            workload,
            model,
            flights: vec![None; usize::from(args.depth)],
            idle: (0..args.depth).rev().collect(),
            data: vec![0; block],
            scratch: vec![0; block],
            submitted: 0,
            is_measuring: false,
            requests: Histogram::new(),
            flushes: Histogram::new(),
        }
    }

    /// Runs to the end and reports.
    ///
    /// # Errors
    /// The backend failed a request, or what was read is not what was written.
    pub(crate) fn run(mut self) -> Result<serde_json::Value, Box<dyn Error>> {
        self.fill_buffers();
        let begun = now();
        let warm_at = begun + Duration::try_from_secs_f64(self.args.warmup)?;
        let deadline = warm_at + Duration::try_from_secs_f64(self.args.seconds)?;
        let first = if self.args.warmup > 0.0 {
            self.stretch(warm_at)?;
            self.mark()
        } else {
            self.mark()
        };
        self.is_measuring = true;
        let is_cut = self.stretch(deadline)?;
        // A run that ended by itself ends with its last completion; one cut at the deadline ends
        // there, and what is still in flight is not counted.
        let last = self.mark();
        self.is_measuring = false;
        if is_cut {
            self.drain()?;
        }
        let verified = self.verify()?;
        Ok(self.report(first, last, verified))
    }

    fn mark(&self) -> Mark {
        Mark {
            cpu: CpuTimes::read(self.args.backend_pid),
            at: now(),
        }
    }

    /// Data that neither compresses nor repeats between slots.
    fn fill_buffers(&mut self) {
        let mut rng = Random(self.args.seed ^ 0x5eed);
        for slot in 0..self.args.depth {
            for word in self.data.chunks_mut(8) {
                let bytes = rng.next().to_le_bytes();
                word.copy_from_slice(&bytes[..word.len()]);
            }
            self.device.fill(slot, &self.data);
        }
    }

    /// Keeps the queue full until `until`; true if that is why it stopped, false if the workload
    /// ended and everything has completed.
    ///
    /// # Errors
    /// As for [`Driver::refill`] and [`Driver::settle`].
    fn stretch(&mut self, until: Instant) -> Result<bool, Box<dyn Error>> {
        let mut done = Vec::with_capacity(self.flights.len());
        loop {
            self.refill()?;
            if self.idle.len() == self.flights.len() {
                return Ok(false);
            }
            let at = self.wait(&mut done)?;
            if at >= until {
                // Completions past the deadline are not of this stretch.
                let was_measuring = std::mem::replace(&mut self.is_measuring, false);
                self.settle(&done, at)?;
                self.is_measuring = was_measuring;
                return Ok(true);
            }
            self.settle(&done, at)?;
        }
    }

    /// Waits for everything in flight.
    ///
    /// # Errors
    /// As for [`Driver::settle`].
    fn drain(&mut self) -> Result<(), Box<dyn Error>> {
        let mut done = Vec::new();
        while self.idle.len() < self.flights.len() {
            let at = self.wait(&mut done)?;
            self.settle(&done, at)?;
        }
        Ok(())
    }

    /// Submits until the queue is at its depth or there is nothing more to do.
    ///
    /// # Errors
    /// The ring refused a request or the backend could not be notified.
    fn refill(&mut self) -> Result<(), Box<dyn Error>> {
        let mut has_new = false;
        while let Some(slot) = self.idle.last().copied() {
            if self.args.ops.is_some_and(|ops| self.submitted >= ops) {
                break;
            }
            let Some((kind, block)) = self.workload.next() else {
                break;
            };
            if let Some(model) = self.model.as_mut().filter(|_| kind != Kind::Flush) {
                if !model.claim(block) {
                    continue;
                }
                if kind == Kind::Write {
                    model.stamp_next(block, &mut self.data);
                    self.device.fill(slot, &self.data);
                }
            }
            self.idle.pop();
            self.submit(kind, slot, block)?;
            self.submitted += 1;
            has_new = true;
        }
        if has_new {
            self.device.kick()?;
        }
        Ok(())
    }

    /// Puts one request into the ring and remembers when.
    ///
    /// # Errors
    /// The ring refused it.
    fn submit(&mut self, kind: Kind, slot: u16, block: u32) -> std::io::Result<()> {
        let begun = now();
        self.flights[usize::from(slot)] = Some(Flight { kind, block, begun });
        let offset = u64::from(block) * u64::from(self.args.block);
        self.device.submit(kind, slot, offset)
    }

    /// Waits for completions and takes all there are; returns the time they were seen.
    ///
    /// # Errors
    /// As for [`Device::sleep`]; a spinning client gives up after [`SPIN_LOOKS_MAX`].
    fn wait(&mut self, done: &mut Vec<Done>) -> Result<Instant, Box<dyn Error>> {
        done.clear();
        match self.args.wait {
            Wait::Spin => {
                let mut looks = 0_u64;
                while !self.device.has_done() {
                    std::hint::spin_loop();
                    looks += 1;
                    // At some nanoseconds a look this is minutes: the backend has gone.
                    if looks == SPIN_LOOKS_MAX {
                        return Err("the backend has completed nothing for very long".into());
                    }
                }
            }
            Wait::Block => {
                // Ask for a notification first, then look, then sleep: a completion that comes
                // between the look and the sleep is notified (virtio 1.2, 2.7.7.1).
                self.device.want_call(true);
                while !self.device.has_done() {
                    self.device.sleep()?;
                }
                self.device.want_call(false);
            }
        }
        let at = now();
        self.device.collect_done(done);
        Ok(at)
    }

    /// Accounts for completions seen at `at` and frees their slots.
    ///
    /// # Errors
    /// The backend failed a request, answered one twice, or returned wrong data.
    fn settle(&mut self, done: &[Done], at: Instant) -> Result<(), Box<dyn Error>> {
        for Done { slot, is_ok } in done {
            let flight = self.flights[usize::from(*slot)]
                .take()
                .ok_or("the backend completed a request twice")?;
            if !is_ok {
                let Flight { kind, block, .. } = flight;
                return Err(format!("the backend failed a {kind:?} of block {block}").into());
            }
            self.idle.push(*slot);
            if self.is_measuring {
                let ns = u64::try_from((at - flight.begun).as_nanos())?;
                match flight.kind {
                    Kind::Read | Kind::Write => self.requests.add(ns),
                    Kind::Flush => self.flushes.add(ns),
                }
            }
            if let Some(model) = self.model.as_mut().filter(|_| flight.kind != Kind::Flush) {
                model.release(flight.block);
                if flight.kind == Kind::Read {
                    self.check(*slot, flight.block)?;
                }
            }
        }
        Ok(())
    }

    /// Compares what a read returned with the model.
    ///
    /// # Errors
    /// It differs.
    fn check(&mut self, slot: u16, block: u32) -> Result<(), Box<dyn Error>> {
        let Some(model) = &self.model else {
            return Ok(());
        };
        self.device.take(slot, &mut self.data);
        match model.check(block, &self.data, &mut self.scratch) {
            None => Ok(()),
            Some(byte) => {
                Err(format!("block {block} differs from what was written at byte {byte}").into())
            }
        }
    }

    /// Reads back every block written; the number of them, or none without `--verify`.
    ///
    /// # Errors
    /// As for [`Driver::settle`].
    fn verify(&mut self) -> Result<Option<usize>, Box<dyn Error>> {
        let Some(model) = &self.model else {
            return Ok(None);
        };
        let written = model.written();
        let mut done = Vec::new();
        let mut left = written.iter();
        loop {
            while let Some(slot) = self.idle.last().copied() {
                let Some(block) = left.next() else { break };
                self.idle.pop();
                self.submit(Kind::Read, slot, *block)?;
            }
            self.device.kick()?;
            if self.idle.len() == self.flights.len() {
                return Ok(Some(written.len()));
            }
            let at = self.wait(&mut done)?;
            self.settle(&done, at)?;
        }
    }

    fn report(&self, first: Mark, last: Mark, verified: Option<usize>) -> serde_json::Value {
        let seconds = (last.at - first.at).as_secs_f64();
        let ops = self.requests.count();
        let iops = ops as f64 / seconds;
        json!({
            "ops": ops,
            "seconds": seconds,
            "iops": iops,
            "mib_per_s": iops * f64::from(self.args.block) / f64::from(1 << 20),
            "latency_us": self.requests.report(),
            "flush_us": self.flushes.report(),
            "cpu_us": first.cpu.per_request(&last.cpu, ops),
            "verified_blocks": verified,
            "features": format!("{:#x}", self.device.features()),
            "capacity": self.device.capacity(),
        })
    }
}
