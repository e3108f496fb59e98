//! The three workloads, each from its input to its summary.
//!
//! A kernel hands its result to a closure *while* the memory is still shared, so that the judge
//! reads it where it lies and pages come home by the CPU's own faults; counters are taken after
//! that.

use std::io::IsTerminal;
use std::thread;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::{Common, List, Pagerank, Saxpy};
use crate::input::{self, Edges, arrays, rmat};
use crate::kernels::{self, Ran};
use crate::oracle::{self, PageRank, Ranking, Walk};
use crate::report::{Check, Counters, Input, Ranked, Setup, Summary, Time, timed};

/// How far apart two rankings may be at most and still prove each other; the farthest two can be is 2.
const MOST_SLACK: f64 = 0.1;

/// `run pagerank`.
pub(crate) fn pagerank(args: &Pagerank) -> anyhow::Result<Summary> {
    let settings = PageRank {
        damping: args.damping,
        tolerance: args.tolerance,
        max_iterations: args.iterations,
    };
    if settings.slack() > MOST_SLACK {
        let why = format!(
            "--tolerance {} with --damping {}: ranks that sum to 1 could differ by {:.2} and still be called the same",
            args.tolerance,
            args.damping,
            settings.slack()
        );
        return Err(input::Error::Vacuous { why }.into());
    }
    let mut time = Time::default();
    let (name, edges) = timed(&mut time.parse, || graph(args))?;
    let setup = setup(&args.common);
    let Ran { verdict, counters } =
        kernels::pagerank::run(&edges, &settings, &setup, &mut time, |ranking| {
            judge_ranking(&edges, &settings, &ranking, args.top)
        })?;
    let (checks, top) = verdict;
    let (nodes, edge_noun) = edges.labels.nouns();
    let sizes = vec![
        (edges.nr_nodes as u64, nodes),
        (edges.list.len() as u64, edge_noun),
    ];
    let input = Input { name, sizes };
    Ok(Summary {
        top,
        ..summary("pagerank", input, setup, checks, counters, time)
    })
}

/// The graph asked for, and what to call it.
fn graph(args: &Pagerank) -> Result<(String, Edges), input::Error> {
    if let Some(path) = &args.input {
        return Ok((path.display().to_string(), input::read(path, args.format)?));
    }
    let seed = args.common.seed;
    let progress = progress_bar();
    let edges = rmat::generate(args.rmat, seed, &progress)?;
    Ok((format!("R-MAT, scale {}, seed {seed}", args.rmat), edges))
}

/// Compares the accelerator's ranks with the sequential ones, and names the highest.
fn judge_ranking(
    edges: &Edges,
    settings: &PageRank,
    found: &Ranking<&[f64]>,
    top: usize,
) -> (Vec<Check>, Vec<Ranked>) {
    /// How far from 1 the ranks may sum, by rounding.
    const SUM_WITHIN: f64 = 1e-6;

    let expected = settings.sequential(edges);
    let distance = oracle::distance(found.ranks, &expected.ranks);
    let slack = settings.slack();
    let checks = vec![
        Check::near("sum of ranks", found.ranks.iter().sum(), 1.0, SUM_WITHIN),
        Check::at_most("distance to the sequential ranks (L1)", distance.l1, slack),
        Check::at_most("largest difference of a rank (Linf)", distance.linf, slack),
        converged(found, settings),
    ];

    let mut in_edges = vec![0; edges.nr_nodes];
    for &(_, to) in &edges.list {
        in_edges[to as usize] += 1;
    }
    let ranked = oracle::top(found.ranks, top)
        .into_iter()
        .map(|node| Ranked {
            name: edges.labels.of(node),
            rank: found.ranks[node as usize],
            in_edges: in_edges[node as usize],
        });
    (checks, ranked.collect())
}

/// The kernel may stop for either of two reasons, and for no other.
fn converged(found: &Ranking<&[f64]>, settings: &PageRank) -> Check {
    let Ranking {
        iterations,
        residual,
        ..
    } = *found;
    Check {
        name: "iterations (and what the last one moved)",
        found: format!("{iterations} ({residual:.3e})"),
        expected: format!(
            "{} or less than {:.1e} moved",
            settings.max_iterations, settings.tolerance
        ),
        passed: iterations == settings.max_iterations
            || (iterations > 0 && residual <= settings.tolerance),
    }
}

/// `run saxpy`.
pub(crate) fn saxpy(args: &Saxpy) -> anyhow::Result<Summary> {
    /// Two arrays of `f32`, and the oracle's own of both.
    const PER_ELEMENT: u64 = 16;
    /// Fewer need not fill a page, and only whole pages move: nothing would be shown.
    const LEAST: u32 = 4096;
    let n = args.n;
    if n < LEAST {
        let why = format!("--n {n}: {LEAST} elements or more, so that there are pages that move");
        return Err(input::Error::Vacuous { why }.into());
    }
    array_fits_memory(n, PER_ELEMENT)?;
    let mut time = Time::default();
    let setup = setup(&args.common);
    let Ran { verdict, counters } = kernels::saxpy::run(n as usize, &setup, &mut time, |x, y| {
        // The inputs once more, in memory of their own: the oracle trusts nothing that was
        // shared.
        let (mut x_before, mut y_before) = (vec![0.0; x.len()], vec![0.0; y.len()]);
        arrays::saxpy(args.common.seed, &mut x_before, &mut y_before);
        let overwritten = x
            .iter()
            .zip(&x_before)
            .filter(|(now, before)| now != before)
            .count();
        vec![
            Check::equal("input elements changed", overwritten, 0),
            Check::equal(
                "wrong elements",
                oracle::saxpy_errors(arrays::SAXPY_A, &x_before, &y_before, y),
                0,
            ),
        ]
    })?;
    let input = elements("two arrays of f32", n, "elements");
    Ok(summary("saxpy", input, setup, verdict, counters, time))
}

/// `run list`.
pub(crate) fn list(args: &List) -> anyhow::Result<Summary> {
    /// A successor, and a node on the device.
    const PER_NODE: u64 = 32;
    let n = args.n;
    array_fits_memory(n, PER_NODE)?;
    let mut time = Time::default();
    let next = timed(&mut time.parse, || {
        arrays::cycle(n as usize, args.common.seed)
    });
    let setup = setup(&args.common);
    let Ran { verdict, counters } = kernels::list::run(&next, &setup, &mut time, |found: Walk| {
        let expected = Walk::along(&next, arrays::payload);
        vec![
            Check::equal("nodes visited", found.steps, expected.steps),
            Check::equal("sum of payloads", found.sum, expected.sum),
            Check::equal("hash of their order", found.order, expected.order),
        ]
    })?;
    let input = elements("one cycle in random order", n, "nodes");
    Ok(summary("list", input, setup, verdict, counters, time))
}

/// Turns away an array that could not be had.
fn array_fits_memory(n: u32, bytes_each: u64) -> Result<(), input::Error> {
    if input::fits_memory(u64::from(n) * bytes_each) {
        return Ok(());
    }
    Err(input::Error::TooLarge {
        what: format!("--n {n}"),
    })
}

fn elements(name: &str, n: u32, of: &'static str) -> Input {
    Input {
        name: name.to_owned(),
        sizes: vec![(u64::from(n), of)],
    }
}

fn setup(common: &Common) -> Setup {
    let nr_cpus = thread::available_parallelism().map_or(1, usize::from);
    let one_per_cpu = || nr_cpus.min(accel_sim::MAX_WORKERS);
    Setup {
        workers: common.workers.unwrap_or_else(one_per_cpu),
        device_memory: common.device_memory.map(|size| size.0),
        granule: common.granule,
        delivery: common.delivery,
        seed: common.seed,
    }
}

/// Puts a summary together; what every workload must show is checked here.
fn summary(
    workload: &'static str,
    input: Input,
    setup: Setup,
    mut checks: Vec<Check>,
    counters: Counters,
    time: Time,
) -> Summary {
    checks.extend(Check::of_counters(&counters));
    Summary {
        workload,
        input,
        setup,
        top: Vec::new(),
        counters,
        time,
        checks,
    }
}

/// A progress bar on a terminal, silence elsewhere.
fn progress_bar() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(
        "generating {bar:40} {human_pos}/{human_len} edges, {eta} left",
    ) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Delivery, Granule};
    use crate::graph::CsrMut;
    use crate::report::{ByCause, Migrations};

    const SETTINGS: PageRank = PageRank {
        damping: 0.85,
        tolerance: 1e-9,
        max_iterations: 100,
    };

    /// A PageRank that pulls along the CSR, on one thread: what the accelerator computes, by the
    /// simplest means.
    fn pull(edges: &Edges, settings: &PageRank) -> Ranking<Vec<f64>> {
        let n = edges.nr_nodes;
        let mut offsets = vec![0; n + 1];
        let mut sources = vec![0; edges.list.len()];
        let mut out_degrees = vec![0; n];
        CsrMut {
            offsets: &mut offsets,
            sources: &mut sources,
            out_degrees: &mut out_degrees,
        }
        .fill(edges);
        let mut ranking = Ranking {
            ranks: vec![1.0 / n as f64; n],
            iterations: 0,
            residual: f64::INFINITY,
        };
        while ranking.residual > settings.tolerance && ranking.iterations < settings.max_iterations
        {
            let old = &ranking.ranks;
            let dangling: f64 = (0..n)
                .filter(|&v| out_degrees[v] == 0)
                .map(|v| old[v])
                .sum();
            let next: Vec<f64> = (0..n)
                .map(|v| {
                    let run = offsets[v] as usize..offsets[v + 1] as usize;
                    let share =
                        |&from: &u32| old[from as usize] / f64::from(out_degrees[from as usize]);
                    let pulled: f64 = sources[run].iter().map(share).sum();
                    (1.0 - settings.damping) / n as f64
                        + settings.damping * (pulled + dangling / n as f64)
                })
                .collect();
            ranking.residual = old.iter().zip(&next).map(|(a, b)| (a - b).abs()).sum();
            ranking.iterations += 1;
            ranking.ranks = next;
        }
        ranking
    }

    fn judged(edges: &Edges, found: &Ranking<Vec<f64>>) -> (Vec<Check>, Vec<Ranked>) {
        let Ranking {
            ranks,
            iterations,
            residual,
        } = found;
        let found = Ranking {
            ranks: &ranks[..],
            iterations: *iterations,
            residual: *residual,
        };
        judge_ranking(edges, &SETTINGS, &found, 3)
    }

    fn failed(checks: &[Check]) -> Vec<&'static str> {
        checks
            .iter()
            .filter(|check| !check.passed)
            .map(|check| check.name)
            .collect()
    }

    #[test]
    fn pushing_and_pulling_agree() {
        for (scale, seed) in [(0, 1), (4, 2), (10, 3)] {
            let edges = rmat::generate(scale, seed, &ProgressBar::hidden()).unwrap();
            let found = pull(&edges, &SETTINGS);
            let (checks, top) = judged(&edges, &found);
            assert_eq!(failed(&checks), [""; 0], "{checks:?}");
            assert_eq!(top.len(), 3.min(edges.nr_nodes));
            assert!(top.is_sorted_by(|a, b| a.rank >= b.rank));
        }
    }

    #[test]
    fn one_wrong_rank_is_found() {
        let edges = rmat::generate(8, 1, &ProgressBar::hidden()).unwrap();
        let right = pull(&edges, &SETTINGS);
        let spoil = |change: fn(&mut Ranking<Vec<f64>>)| {
            let mut found = Ranking {
                ranks: right.ranks.clone(),
                ..right
            };
            change(&mut found);
            failed(&judged(&edges, &found).0)
        };
        let distances = [
            "distance to the sequential ranks (L1)",
            "largest difference of a rank (Linf)",
        ];
        // Two swapped: the sum does not notice.
        assert_eq!(spoil(|found| found.ranks.swap(1, 2)), distances);
        // A lost write.
        assert_eq!(spoil(|found| found.ranks[9] = 0.0)[1..], distances);
        // Not a number.
        assert_eq!(spoil(|found| found.ranks[9] = f64::NAN)[1..], distances);
        // A kernel that stopped early of its own will.
        let iterations = ["iterations (and what the last one moved)"];
        assert_eq!(spoil(|found| found.residual = 1.0), iterations);
        assert_eq!(spoil(|found| found.iterations = 0), iterations);
    }

    #[test]
    fn every_summary_checks_that_pages_moved() {
        let moved = |pages| Migrations {
            runs: pages,
            pages: ByCause {
                demand: pages,
                ..ByCause::default()
            },
        };
        let verified = |to_device, to_host| {
            let counters = Counters {
                to_device: moved(to_device),
                to_host: moved(to_host),
                ..Counters::default()
            };
            let setup = Setup {
                workers: 1,
                device_memory: None,
                granule: Granule::K4,
                delivery: Delivery::Inline,
                seed: 0,
            };
            let checks = vec![Check::equal("right", 1, 1)];
            summary(
                "list",
                elements("", 1, "nodes"),
                setup,
                checks,
                counters,
                Time::default(),
            )
            .verified()
        };
        assert!(verified(1, 1));
        assert!(!verified(1, 0) && !verified(0, 1) && !verified(0, 0));
    }
}
