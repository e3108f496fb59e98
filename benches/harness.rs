//! How a case is measured.
//!
//! A *subject* is one way to do a job: [`arm`](Subject::arm) puts the pages into the state in which the job is to be done,
//! untimed; [`pass`](Subject::pass) does it many times and records each. A *case* pairs ours with its floor and runs
//! them in turns, the order swapped from round to round, so that what disturbs the machine disturbs both. Of each round it
//! keeps the ratio of the two medians; the case's ratio is the median of those, and their quartiles are its spread.
//! The first rounds are thrown away.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{CommandFactory, FromArgMatches, Parser};
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};

use crate::machine::Setting;
use crate::report::{Figure, Outcome, Target};

/// What every bench takes on its command line.
// Not what `--help` says first: that is each bench's own, see `of_command_line`.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Write the results to this file, in a directory that is there. (A relative path is taken from where the command was typed.)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write plots to this directory, which is made if it is not there. (As for --json.)
    #[arg(long, value_name = "DIR")]
    pub plot: Option<PathBuf>,
    /// Few rounds: to see that it works, not how fast.
    #[arg(long)]
    pub quick: bool,
    /// Rounds for each case, 1 to 1000000 [default: 7 to 41, as the case is; 3 with --quick]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pub rounds: Option<usize>,
    /// Only the cases whose name contains this; one that no name contains is answered with the names.
    #[arg(value_name = "FILTER")]
    pub filter: Option<String>,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Args {
    /// The command line of the bench `name`, which does what `about` says; its paths as they were meant.
    #[must_use]
    pub fn of_command_line(name: &'static str, about: &'static str) -> Self {
        let matches = Self::command_of(name, about).get_matches();
        let mut args = Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        for path in [&mut args.json, &mut args.plot].into_iter().flatten() {
            *path = as_typed(path);
        }
        args
    }

    /// The file that is run has a hash in its name, and is run by cargo.
    fn command_of(name: &'static str, about: &'static str) -> clap::Command {
        Self::command()
            .name(name)
            .bin_name(format!("cargo bench -p benches --bench {name} --"))
            .about(about)
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

    /// Those of `cases` that were asked for. Ends the program, with status 2, where the filter fits neither one of them nor of `groups`,
    /// and where the results could not be written: before anything is measured.
    #[must_use]
    pub fn choose<T>(
        &self,
        mut cases: Vec<T>,
        name: impl Fn(&T) -> &str,
        groups: &[&str],
    ) -> Vec<T> {
        let names = cases.iter().map(&name).chain(groups.iter().copied());
        let checked = self.check_filter(names);
        if let Err(what) = checked.and_then(|()| self.check_places()) {
            eprintln!("error: {what}");
            std::process::exit(2);
        }
        cases.retain(|case| self.wants(name(case)));
        cases
    }

    fn check_filter<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<(), String> {
        let names: BTreeSet<_> = names.collect();
        if names.iter().any(|name| self.wants(name)) {
            return Ok(());
        }
        let filter = self.filter.as_deref().unwrap_or_default();
        let mut what = format!("no case has {filter:?} in its name; there are");
        for name in names {
            what.push_str("\n  ");
            what.push_str(name);
        }
        Err(what)
    }

    /// The directory for the plots is made, for the JSON may be meant to go there; what is in the JSON is left until there is something
    /// to put in its place.
    fn check_places(&self) -> Result<(), String> {
        if let Some(dir) = &self.plot {
            match fs::create_dir(dir) {
                Err(_) if dir.is_dir() => {}
                made => made.map_err(|e| format!("cannot make {}: {e}", dir.display()))?,
            }
        }
        if let Some(path) = &self.json {
            let mut options = File::options();
            options.write(true).create(true).truncate(false);
            let opened = options.open(path);
            opened.map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        }
        Ok(())
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

/// A subject that is made anew for every round, and used once before it is measured. What the move of 4 KiB pages costs depends on which pages
/// of RAM they are: of what lives through a case, floor and ours would each keep what luck gave them.
pub struct Fresh<S> {
    make: Box<dyn Fn() -> Result<S>>,
    subject: Option<S>,
}

impl<S> std::fmt::Debug for Fresh<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fresh").finish_non_exhaustive()
    }
}

impl<S> Fresh<S> {
    /// What `make` gives.
    pub fn new(make: impl Fn() -> Result<S> + 'static) -> Self {
        Self {
            make: Box::new(make),
            subject: None,
        }
    }
}

impl<S: Subject> Subject for Fresh<S> {
    fn arm(&mut self) -> Result<()> {
        let subject = self.subject.insert((self.make)()?);
        subject.arm()?;
        subject.pass(&mut Samples::new())?;
        subject.arm()
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        let mut subject = self.subject.take().expect("armed before a pass");
        subject.pass(samples)
    }
}

impl<S: Subject + ?Sized> Subject for Box<S> {
    fn arm(&mut self) -> Result<()> {
        (**self).arm()
    }

    fn pass(&mut self, samples: &mut Samples) -> Result<()> {
        (**self).pass(samples)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Result<Args, clap::Error> {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        let matches = Args::command_of("bench", "Measures").try_get_matches_from(words)?;
        Args::from_arg_matches(&matches)
    }

    #[test]
    fn a_command_line_is_what_cargo_and_people_type() {
        Args::command_of("bench", "Measures").debug_assert();
        let given = args("--quick --bench F6").unwrap();
        assert!(given.bench && given.quick && given.wants("F6 memcpy") && !given.wants("F5"));
        assert_eq!((given.rounds(41), args("").unwrap().rounds(41)), (3, 41));
        for line in [
            "--rounds 0",
            "--rounds 1000001",
            "--rounds -1",
            "--frob",
            "a b",
        ] {
            assert!(args(line).is_err(), "{line}");
        }
    }

    #[test]
    fn help_is_of_the_bench_and_not_of_its_file() {
        let help = Args::command_of("bench", "Measures")
            .render_help()
            .to_string();
        let head =
            "Measures\n\nUsage: cargo bench -p benches --bench bench -- [OPTIONS] [FILTER]\n";
        assert!(help.starts_with(head), "{help}");
    }

    #[test]
    fn a_filter_that_fits_nothing_is_answered_with_the_names() {
        let check = |line| {
            args(line)
                .unwrap()
                .check_filter(["one", "two", "one"].into_iter())
        };
        assert_eq!((check(""), check("w")), (Ok(()), Ok(())));
        let what = "no case has \"three\" in its name; there are\n  one\n  two";
        assert_eq!(check("three"), Err(what.to_owned()));
    }

    #[test]
    fn results_go_where_a_directory_is() {
        let dir = std::env::temp_dir().join(format!("svm-benches-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let places = |json: &str, plot: &str| {
            let given = Args {
                json: Some(dir.join(json)),
                plot: Some(dir.join(plot)),
                ..args("").unwrap()
            };
            given.check_places()
        };
        // Of what is not there one directory is made, and not its parents.
        assert!(places("out.json", "plots").is_err() && !dir.exists());
        fs::create_dir(&dir).unwrap();
        assert_eq!(places("plots/out.json", "plots"), Ok(()));
        let json = dir.join("plots/out.json");
        fs::write(&json, "results").unwrap();
        assert_eq!(places("plots/out.json", "plots"), Ok(()));
        assert_eq!(fs::read_to_string(&json).unwrap(), "results");
        let what = places("missing/out.json", "plots").unwrap_err();
        assert!(
            what.starts_with("cannot write ") && !dir.join("missing").exists(),
            "{what}"
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
