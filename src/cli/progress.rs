//! How far long work has come: a bar with rate and time left on a terminal, a plain line every few
//! seconds elsewhere, nothing for programs. On standard error, so that results stay clean.

use super::human;
use super::output::{self, Format, Output};
use crate::sys::clock;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// How it is shown.
enum Face {
    Bar(ProgressBar),
    Lines { next: Instant },
    None,
}

/// One long piece of work.
pub(super) struct Progress {
    what: String,
    began: Instant,
    face: Face,
    done: u64,
}

impl Progress {
    /// Begins to show `what`.
    pub(super) fn new(output: Output, what: &str) -> Self {
        let began = clock::now();
        let face = match output.format {
            Format::Json => Face::None,
            Format::Text if std::io::stderr().is_terminal() => Face::Bar(bar(what)),
            Format::Text => Face::Lines {
                next: began + LINE_EVERY,
            },
        };
        let (what, done) = (what.to_owned(), 0);
        Self {
            what,
            began,
            face,
            done,
        }
    }

    /// `done` of `total` bytes.
    pub(super) fn update(&mut self, done: u64, total: u64) {
        self.done = done;
        match &mut self.face {
            Face::None => {}
            Face::Bar(bar) => {
                bar.set_length(total);
                bar.set_position(done);
            }
            Face::Lines { next } => {
                let now = clock::now();
                if now >= *next {
                    *next = now + LINE_EVERY;
                    let text = line(&self.what, done, total, now - self.began);
                    output::note(&text);
                }
            }
        }
    }

    /// It is over, well or not.
    pub(super) fn finish(self) {
        match self.face {
            Face::None => {}
            Face::Bar(bar) => bar.finish_and_clear(),
            Face::Lines { .. } if self.done == 0 => {}
            Face::Lines { .. } => {
                let seconds = (clock::now() - self.began).as_secs_f64();
                let done = human::bytes(self.done);
                output::note(&format!("{}: {done} in {seconds:.1} s\n", self.what));
            }
        }
    }

    /// Waits so that no more than `per_second` bytes are done in a second on average.
    pub(super) fn throttle(&self, per_second: u64) {
        let due = Duration::from_secs_f64(as_f64(self.done) / as_f64(per_second.max(1)));
        let spent = clock::now() - self.began;
        if due > spent {
            std::thread::sleep(due - spent);
        }
    }
}

fn bar(what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // Whatever the sizes, it fits in 40 columns with something left for the bar: a line that is
    // longer than the terminal is wide is not drawn over but added to.
    let template = "{prefix} [{wide_bar}] {percent}%{rate}";
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    let style = style.with_key("rate", write_rate);
    bar.set_style(style.progress_chars("=> "));
    bar.set_prefix(what.to_owned());
    bar
}

/// Rate and time left, once something can be said of them.
fn write_rate(state: &ProgressState, to: &mut dyn Write) {
    let rate = rate(state.pos(), state.elapsed());
    if rate > 0 {
        let left = HumanDuration(state.eta());
        let rate = human::bytes(rate);
        write!(to, " {rate}/s {left:#} left").expect("a string takes everything");
    }
}

/// Bytes in a second, on average.
fn rate(done: u64, spent: Duration) -> u64 {
    let spent = u64::try_from(spent.as_millis()).unwrap_or(u64::MAX);
    done.saturating_mul(1000) / spent.max(1)
}

fn line(what: &str, done: u64, total: u64, spent: Duration) -> String {
    let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
    let rate = as_f64(done) / spent.as_secs_f64().max(0.001);
    let left = as_f64(total.saturating_sub(done)) / rate.max(1.0);
    format!(
        "{what}: {percent} % of {}, {}/s, {left:.0} s left\n",
        human::bytes(total),
        human::bytes(self::rate(done, spent)),
    )
}

/// For rates: rounding does not matter.
#[expect(
    clippy::cast_precision_loss,
    reason = "a rate is shown with three digits"
)]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_tell_share_rate_and_time_left() {
        let text = line("importing", 1 << 30, 4 << 30, Duration::from_secs(2));
        assert_eq!(text, "importing: 25 % of 4G, 512M/s, 6 s left\n");
        let text = line("importing", 0, 0, Duration::ZERO);
        assert_eq!(text, "importing: 100 % of 0, 0/s, 0 s left\n");
    }
}
