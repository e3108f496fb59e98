//! How a case is measured.
//!
//! A *subject* is one way to do a job: [`arm`](Subject::arm) puts the pages into the state in which the job is to be done,
//! untimed; [`pass`](Subject::pass) does it many times and records each. A *case* pairs ours with its floor and runs
//! them in turns, the order swapped from round to round, so that what disturbs the machine disturbs both. Of each round it
//! keeps the ratio of the two medians; the case's ratio is the median of those, and their quartiles are its spread.
//! The first rounds are thrown away.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use crate::machine::Setting;
use crate::report::{Figure, Outcome, Target};

/// What every bench takes on its command line.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Write the results to this file. (A relative path is taken from where the command was typed.)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write plots to this directory. (As for --json.)
    #[arg(long, value_name = "DIR")]
    pub plot: Option<PathBuf>,
    /// Few rounds: to see that it works, not how fast.
    #[arg(long)]
    pub quick: bool,
    /// Rounds for each case.
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Only the cases whose name contains this.
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Args {
    /// The command line, its paths as they were meant.
    #[must_use]
    pub fn of_command_line() -> Self {
        let mut args = Self::parse();
        for path in [&mut args.json, &mut args.plot].into_iter().flatten() {
            *path = as_typed(path);
        }
        args
    }

    /// Rounds for each case.
    #[must_use]
    pub fn rounds(&self, usual: usize) -> usize {
        self.rounds.unwrap_or(if self.quick { 3 } else { usual })
    }

    /// Whether a case of this name was asked for.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.filter
            .as_ref()
            .is_none_or(|filter| name.contains(filter.as_str()))
    }
}

/// A path as it was meant where the command was typed: cargo runs a bench in its package's directory, and leaves the shell's in `PWD`.
/// Where there is no shell, it is taken from the workspace's root.
fn as_typed(path: &Path) -> PathBuf {
    let Some(package) = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from) else {
        return path.to_owned();
    };
    let typed_at = std::env::var_os("PWD").map(PathBuf::from);
    let typed_at = typed_at.filter(|dir| dir.is_absolute() && dir.is_dir());
    typed_at
        .or_else(|| package.parent().map(Path::to_owned))
        .map_or_else(|| path.to_owned(), |dir| dir.join(path))
}

/// Durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Samples {
    histogram: Histogram<u64>,
}

impl Default for Samples {
    fn default() -> Self {
        Self::new()
    }
}

impl Samples {
    /// None yet; three significant figures, up to a minute.
    ///
    /// # Panics
    /// Never: the bounds are in order.
    #[must_use]
    pub fn new() -> Self {
        Self {
            histogram: Histogram::new_with_bounds(1, 60_000_000_000, 3)
                .expect("the bounds are in order"),
        }
    }

    /// Records one duration.
    pub fn record(&mut self, ns: u64) {
        self.histogram.saturating_record(ns.max(1));
    }

    /// Times `job` and records it.
    pub fn time<R>(&mut self, job: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = job();
        self.record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        result
    }

    /// The quantile `q`, 0 to 1.
    #[must_use]
    pub fn quantile(&self, q: f64) -> u64 {
        self.histogram.value_at_quantile(q)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.histogram.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.histogram.is_empty()
    }

    /// Adds another's samples.
    ///
    /// # Panics
    /// Never: all have the same bounds.
    pub fn absorb(&mut self, other: &Self) {
        self.histogram
            .add(&other.histogram)
            .expect("all have the same bounds");
    }
}

/// One way to do a job.
pub trait Subject {
    /// Puts everything into the state before the job. Untimed.
    ///
    /// # Errors
    /// Whatever ends the bench.
    fn arm(&mut self) -> Result<()>;

    /// Does the job over and over, each time timed.
    ///
    /// # Errors
    /// Whatever ends the bench.
    fn pass(&mut self, samples: &mut Samples) -> Result<()>;
}

/// What is measured, and against which target.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, stable over time: results are compared by it.
    pub name: String,
    /// How faults reach the resolver, or "-".
    pub delivery: &'static str,
    /// What else runs.
    pub setting: Setting,
    /// Which floor.
    pub floor: &'static str,
    /// What was to be reached.
    pub target: Option<Target>,
}

/// Rounds at the start of a case that are thrown away.
pub const WARM_UP: usize = 2;

/// Runs the two in turns.
///
/// # Errors
/// What ended one of them.
pub fn compare(
    case: Case,
    rounds: usize,
    floor: &mut dyn Subject,
    ours: &mut dyn Subject,
    progress: &Progress,
) -> Result<Outcome> {
    let (mut of_floor, mut of_ours) = (Samples::new(), Samples::new());
    let mut ratios = Vec::with_capacity(rounds);
    for round in 0..rounds + WARM_UP {
        let (mut a, mut b) = (Samples::new(), Samples::new());
        let mut turns: [(&mut dyn Subject, &mut Samples); 2] =
            [(&mut *floor, &mut a), (&mut *ours, &mut b)];
        if round % 2 == 1 {
            turns.reverse();
        }
        for (subject, samples) in turns {
            subject.arm()?;
            subject.pass(samples)?;
        }
        progress.step(&case.name);
        if round >= WARM_UP {
            ratios.push(b.quantile(0.5) as f64 / a.quantile(0.5) as f64);
            of_floor.absorb(&a);
            of_ours.absorb(&b);
        }
    }
    Ok(Outcome::new(
        case,
        Figure::of(&of_floor),
        Figure::of(&of_ours),
        ratios,
    ))
}

/// Runs `job` for each of `parts` on a thread of its own, together, and gathers what they measured. Says how long it took from when
/// the first began until the last was done.
///
/// # Errors
/// What one of them ended with.
pub fn side_by_side<P: Send>(
    parts: impl IntoIterator<Item = P>,
    samples: &mut Samples,
    job: impl Fn(P, &mut Samples) -> Result<()> + Sync,
) -> Result<Duration> {
    let parts: Vec<_> = parts.into_iter().collect();
    let start = &std::sync::Barrier::new(parts.len());
    let job = &job;
    let all: Vec<Result<(Samples, Instant, Instant)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .into_iter()
            .map(|part| {
                scope.spawn(move || {
                    let mut samples = Samples::new();
                    start.wait();
                    let begun = Instant::now();
                    job(part, &mut samples).map(|()| (samples, begun, Instant::now()))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    let mut whole: Option<(Instant, Instant)> = None;
    for of_one in all {
        let (of_one, begun, done) = of_one?;
        samples.absorb(&of_one);
        whole = Some(whole.map_or((begun, done), |(first, last)| {
            (first.min(begun), last.max(done))
        }));
    }
    Ok(whole.map_or(Duration::ZERO, |(first, last)| last - first))
}

/// The progress of a whole bench.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar for `steps` rounds.
    #[must_use]
    pub fn new(cases: usize, rounds: usize) -> Self {
        let bar = ProgressBar::new((cases * (rounds + WARM_UP)) as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    fn step(&self, name: &str) {
        self.0.set_message(name.to_owned());
        self.0.inc(1);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}
