//! Results: the table that a reader sees, and the JSON that is kept.

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::harness::{Args, Case, Samples};
use crate::machine::{Counter, Machine, Setting};

/// What others need for a fault, by what is published or was measured elsewhere: not in the same run, hence not in a ratio.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Who, and where.
    pub name: &'static str,
    /// The median, from and to, in microseconds.
    pub p50_us: (f64, f64),
    /// The 99th percentile, likewise.
    pub p99_us: Option<(f64, f64)>,
    /// Both in words.
    pub figures: &'static str,
    /// What has to be known to read it.
    pub caveat: &'static str,
}

/// The peers.
pub const PEERS: [Peer; 3] = [
    Peer {
        name: "UMap, on this kind of machine",
        p50_us: (49.0, 65.0),
        p99_us: Some((90.0, 325.0)),
        figures: "49–65 µs, p99 90–325 µs",
        caveat: "the userspace paging library one would take today; 15–18 k faults a second and thread",
    },
    Peer {
        name: "a monitor thread, bare metal elsewhere",
        p50_us: (5.0, 7.0),
        p99_us: None,
        figures: "5–7 µs",
        caveat: "another machine, where an interrupt between CPUs costs 1–2 µs; compare with the thread door",
    },
    Peer {
        name: "an in-thread handler, bare metal elsewhere",
        p50_us: (2.0, 3.0),
        p99_us: None,
        figures: "2–3 µs",
        caveat: "another machine; compare with the inline door",
    },
];

/// A distribution, in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Number of samples.
    pub n: u64,
    /// Median.
    pub p50: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
    /// 99.9th percentile.
    pub p999: u64,
    /// The distribution: nanoseconds at each of 201 evenly spaced quantiles, for plots.
    #[serde(skip)]
    pub curve: Vec<u64>,
}

impl Figure {
    /// Sums up samples.
    #[must_use]
    pub fn of(samples: &Samples) -> Self {
        Self {
            n: samples.len(),
            p50: samples.quantile(0.5),
            p90: samples.quantile(0.9),
            p99: samples.quantile(0.99),
            p999: samples.quantile(0.999),
            curve: (0..=200)
                .map(|i| samples.quantile(f64::from(i) / 200.0))
                .collect(),
        }
    }
}

/// What a case has to reach.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Target {
    /// Ratio of the medians, at most.
    pub p50: f64,
    /// Ratio of the 99th percentiles, at most; 0 for none.
    pub p99: f64,
}

impl Target {
    /// A target for the median, and twice the floor's 99th percentile.
    #[must_use]
    pub const fn p50(ratio: f64) -> Self {
        Self {
            p50: ratio,
            p99: 2.0,
        }
    }

    /// A target for the median alone: of what is a rate, and has no tail.
    #[must_use]
    pub const fn p50_alone(ratio: f64) -> Self {
        Self {
            p50: ratio,
            p99: 0.0,
        }
    }
}

/// What a case came to.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Name of the case.
    pub name: String,
    /// How faults reach the resolver, or "-".
    pub delivery: &'static str,
    /// What else ran.
    pub setting: Setting,
    /// Which floor.
    pub floor_name: &'static str,
    /// The floor's figure.
    pub floor: Figure,
    /// Ours.
    pub ours: Figure,
    /// Median over the rounds of the ratio of the medians.
    pub ratio: f64,
    /// First and third quartile of that ratio.
    pub spread: [f64; 2],
    /// Ratio of the 99th percentiles over all rounds.
    pub ratio_p99: f64,
    /// What was to be reached.
    pub target: Option<Target>,
    /// Whether it was, the median.
    pub met: Option<bool>,
    /// Whether it was, the 99th percentile.
    pub met_p99: Option<bool>,
}

impl Outcome {
    /// Sums a case up.
    #[must_use]
    pub fn new(case: Case, floor: Figure, ours: Figure, mut ratios: Vec<f64>) -> Self {
        ratios.sort_by(f64::total_cmp);
        let at = |q: f64| {
            ratios
                .get((q * (ratios.len().max(1) - 1) as f64).round() as usize)
                .copied()
                .unwrap_or(f64::NAN)
        };
        let ratio_p99 = ours.p99 as f64 / floor.p99 as f64;
        let ratio = at(0.5);
        Self {
            met: case.target.map(|t| ratio <= t.p50),
            met_p99: case
                .target
                .filter(|t| t.p99 > 0.0)
                .map(|t| ratio_p99 <= t.p99),
            name: case.name,
            delivery: case.delivery,
            setting: case.setting,
            floor_name: case.floor,
            floor,
            ours,
            ratio,
            spread: [at(0.25), at(0.75)],
            ratio_p99,
            target: case.target,
        }
    }
}

impl Outcome {
    /// Whether it is one of the few that say most: a fault on one page.
    #[must_use]
    pub fn is_at_a_glance(&self) -> bool {
        ["F1", "F2", "F3 pinned", "F4", "F5"].contains(&self.floor_name)
            && self.name.ends_with(", 4 KiB")
    }
}

/// A figure that has no floor: a count, or a time that is its own measure.
#[derive(Clone, Debug, Serialize)]
pub struct Note {
    /// What it is.
    pub name: String,
    /// The figure.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What it was to be at most, or at least.
    pub target: Option<f64>,
    /// Whether the target is the least.
    pub at_least: bool,
    /// Whether it is met.
    pub met: Option<bool>,
}

impl Note {
    /// A figure, and what it was to be at most.
    #[must_use]
    pub fn new(
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        target: Option<f64>,
    ) -> Self {
        Self {
            name: name.into(),
            value,
            unit,
            target,
            at_least: false,
            met: target.map(|target| value <= target),
        }
    }

    /// A figure, and what it was to be at least.
    #[must_use]
    pub fn at_least(name: impl Into<String>, value: f64, unit: &'static str, target: f64) -> Self {
        Self {
            at_least: true,
            met: Some(value >= target),
            ..Self::new(name, value, unit, Some(target))
        }
    }
}

/// What one job takes of the kernel, counted over many.
#[derive(Clone, Debug, Serialize)]
pub struct Count {
    /// Name of the job.
    pub name: String,
    /// How faults reach the resolver.
    pub delivery: &'static str,
    /// What else ran.
    pub setting: Setting,
    /// Whether the thread that does it is left to the scheduler.
    pub is_free: bool,
    /// How many there were.
    pub n: u64,
    /// The figures.
    pub figures: Vec<Counted>,
}

/// A figure of a [`Count`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Counted {
    /// What was counted, and by whom.
    #[serde(flatten)]
    pub counter: Counter,
    /// For each job; `None` where it cannot be had.
    pub each: Option<f64>,
}

/// One point of a [`Series`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Point {
    /// The size.
    pub x: f64,
    /// Ours there, in nanoseconds, the median.
    pub p50: u64,
    /// Its ratio to the smallest, or to the floor.
    pub ratio: f64,
    /// First and third quartile of that.
    pub spread: [f64; 2],
}

/// What a cost does as something grows.
#[derive(Clone, Debug, Serialize)]
pub struct Series {
    /// What is measured.
    pub name: String,
    /// What grows.
    pub x: &'static str,
    /// From small to large.
    pub points: Vec<Point>,
    /// The ratio that was not to be exceeded.
    pub target: Option<f64>,
}

impl Series {
    /// A series whose first point is the measure of the others.
    #[must_use]
    pub fn new(name: &str, x: &'static str, target: Option<f64>) -> Self {
        Self {
            name: name.into(),
            x,
            points: Vec::new(),
            target,
        }
    }

    /// Adds what a case came to; before the first, its floor at `smallest`.
    pub fn push(&mut self, smallest: f64, x: f64, outcome: &Outcome) {
        if self.points.is_empty() {
            self.points.push(Point {
                x: smallest,
                p50: outcome.floor.p50,
                ratio: 1.0,
                spread: [1.0, 1.0],
            });
        }
        self.points.push(Point {
            x,
            p50: outcome.ours.p50,
            ratio: outcome.ratio,
            spread: outcome.spread,
        });
    }
}

/// What a bench came to.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Results {
    /// Ours against floors.
    pub cases: Vec<Outcome>,
    /// Figures without a floor.
    pub notes: Vec<Note>,
    /// What jobs take of the kernel.
    pub counts: Vec<Count>,
    /// Costs against sizes.
    pub series: Vec<Series>,
}

#[derive(Serialize)]
struct Document<'a> {
    bench: &'a str,
    date: String,
    quick: bool,
    machine: &'a Machine,
    /// What the runtime found here.
    capabilities: String,
    #[serde(flatten)]
    results: &'a Results,
}

/// Prints the table, and writes what the command line asked for.
///
/// # Errors
/// A file could not be written.
pub fn publish(bench: &str, args: &Args, machine: &Machine, results: &Results) -> Result<()> {
    let Results {
        cases: outcomes,
        notes,
        counts,
        series,
    } = results;
    println!(
        "{bench}: {} x {}, Linux {}, commit {}, load {}",
        machine.nr_cpus,
        machine.cpu,
        machine.kernel,
        machine.build(),
        machine.load
    );
    println!("{}", table(outcomes));
    for note in notes {
        let verdict = note.target.map_or_else(String::new, |t| {
            format!(
                "  (at {} {t:.2}, {})",
                if note.at_least { "least" } else { "most" },
                if note.met == Some(true) {
                    "met"
                } else {
                    "MISSED"
                }
            )
        });
        println!("{}: {:.2} {}{verdict}", note.name, note.value, note.unit);
    }
    print_counts(counts);
    if let Some(path) = &args.json {
        let all = Document {
            bench,
            date: machine.date(),
            quick: args.quick,
            machine,
            // Now, and not at the start: what probing leaves behind is among what the first mirror is to answer for.
            capabilities: format!("{:?}", svm::Capabilities::probe()),
            results,
        };
        // All at once, so that what was there before stays if this cannot be said.
        let text = serde_json::to_vec_pretty(&all)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(dir) = &args.plot {
        let file = |what: &str| dir.join(format!("{bench}_{what}.svg"));
        if !outcomes.is_empty() {
            crate::plot::ratios(&file("ratios"), bench, outcomes)?;
        }
        for setting in [Setting::Quiet, Setting::Busy] {
            // A distribution wants some samples.
            let many: Vec<_> = outcomes
                .iter()
                .filter(|o| o.target.is_some() && o.ours.n >= 200 && o.setting == setting)
                .collect();
            if !many.is_empty() {
                let what = format!("distributions_{}", setting.name());
                let title = format!("{bench}, {}: how many take at most so long", setting.name());
                crate::plot::distributions(&file(&what), &title, &many)?;
            }
        }
        let faults: Vec<_> = outcomes.iter().filter(|o| o.is_at_a_glance()).collect();
        if !faults.is_empty() {
            let title = format!(
                "One fault on 4 KiB: {} x {}, Linux {}, {}",
                machine.nr_cpus,
                machine.cpu,
                machine.kernel,
                machine.date()
            );
            crate::plot::glance(&file("glance"), &title, &faults)?;
        }
        let curves: Vec<_> = series.iter().filter(|s| s.points.len() > 1).collect();
        if !curves.is_empty() {
            let title = format!("{bench}: cost against size (red: not to be exceeded)");
            crate::plot::curves(&file("curves"), &title, &curves)?;
        }
    }
    Ok(())
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_header([
        "case",
        "by",
        "setting",
        "n",
        "floor",
        "floor p50",
        "ours p50",
        "ratio [quartiles]",
        "p99 ratio",
        "target",
        "",
    ]);
    for o in outcomes {
        let verdict = match (o.met, o.met_p99) {
            (None, _) => "",
            (Some(true), None | Some(true)) => "met",
            (Some(true), Some(false)) => "met, p99 missed",
            (Some(false), _) => "MISSED",
        };
        table.add_row(
            [
                o.name.clone(),
                o.delivery.into(),
                o.setting.name().into(),
                o.ours.n.to_string(),
                o.floor_name.into(),
                time(o.floor.p50),
                time(o.ours.p50),
                format!("{:.2} [{:.2} {:.2}]", o.ratio, o.spread[0], o.spread[1]),
                format!("{:.2}", o.ratio_p99),
                o.target
                    .map_or_else(String::new, |t| format!("{:.2}", t.p50)),
                verdict.into(),
            ]
            .map(Cell::new)
            .map(|c| c.set_alignment(CellAlignment::Left)),
        );
    }
    table
}

/// A table of what jobs take of the kernel, and below it whose counts these are.
fn print_counts(counts: &[Count]) {
    let Some(first) = counts.first() else {
        return;
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    let whats = first.figures.iter().map(|figure| figure.counter.what);
    table.set_header(
        ["counts, each", "by", "setting", "n"]
            .into_iter()
            .chain(whats),
    );
    for count in counts {
        let by = match count.is_free {
            true => format!("{}, not pinned", count.delivery),
            false => count.delivery.to_owned(),
        };
        let each = |figure: &Counted| {
            figure
                .each
                .map_or_else(|| "-".into(), |n| format!("{n:.2}"))
        };
        let row = [
            count.name.clone(),
            by,
            count.setting.name().into(),
            count.n.to_string(),
        ];
        table.add_row(row.into_iter().chain(count.figures.iter().map(each)));
    }
    println!("{table}");
    for Counted { counter, .. } in &first.figures {
        println!("{}: {}", counter.what, counter.source);
    }
}

/// A duration as a reader likes it.
#[must_use]
pub fn time(ns: u64) -> String {
    match ns {
        0..10_000 => format!("{ns} ns"),
        10_000..10_000_000 => format!("{:.1} µs", ns as f64 / 1e3),
        _ => format!("{:.1} ms", ns as f64 / 1e6),
    }
}
