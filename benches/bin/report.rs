//! Turns the JSON of a run into the section "Performance" of the README, or prints it.
//!
//! `cargo run --release -p benches --bin report -- benches/results/NAME [--readme README.md]`
//!
//! The section is what stands between two marks, `<!-- performance -->` and `<!-- /performance -->`; if they are not there, it is put
//! before the heading that `--before` names. At the end of every report stands a list of the targets that were missed.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use benches::report::{PEERS, time};
use clap::Parser;
use serde_json::Value;

const BENCHES: [&str; 4] = ["fault_latency", "offload", "protocol", "scaling"];
const BEGIN: &str = "<!-- performance -->";
const END: &str = "<!-- /performance -->";

/// Turns the JSON of a run of the benches into the section "Performance" of the README, and lists the targets that were missed
#[derive(Debug, Parser)]
#[command(name = "report")]
struct Args {
    /// The directory of a run, with the JSON of each bench.
    run: PathBuf,
    /// Put the section into this file, instead of printing it.
    #[arg(long, value_name = "FILE")]
    readme: Option<PathBuf>,
    /// The heading before which a README without the section gets it.
    #[arg(long, default_value = "## More")]
    before: String,
    /// Only the table of targets, as text.
    #[arg(long)]
    targets: bool,
}

/// One target: what was measured, what it was to be at most (or at least), and whether it is.
struct Verdict {
    bench: &'static str,
    name: String,
    is: String,
    target: f64,
    at_least: bool,
    met: bool,
    met_p99: Option<bool>,
}

fn verdicts(bench: &'static str, run: &Value) -> Vec<Verdict> {
    let list = |key: &str| run[key].as_array().cloned().unwrap_or_default();
    let cases = list("cases").into_iter().filter_map(|case| {
        Some(Verdict {
            bench,
            name: format!("{}, {}", what(&case), text(&case, "setting")),
            is: format!(
                "{:.2} x {}",
                number(&case["ratio"]),
                text(&case, "floor_name")
            ),
            target: case["target"]["p50"].as_f64()?,
            at_least: false,
            met: case["met"].as_bool()?,
            met_p99: case["met_p99"].as_bool(),
        })
    });
    // The rates of two threads are rows too, by their time: counted once.
    let is_row = |note: &Value| text(note, "name").starts_with("concurrency, the rate");
    let notes = list("notes").into_iter().filter(|note| !is_row(note));
    let notes = notes.filter_map(|note| {
        let (value, target) = (number(&note["value"]), note["target"].as_f64()?);
        Some(Verdict {
            bench,
            name: text(&note, "name").to_owned(),
            is: format!("{value:.2} {}", text(&note, "unit")),
            target,
            at_least: note["at_least"].as_bool() == Some(true),
            met: note["met"].as_bool()?,
            met_p99: None,
        })
    });
    cases.chain(notes).collect()
}

fn bound(at_least: bool) -> &'static str {
    if at_least { "at least" } else { "at most" }
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or_default()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

fn ns(value: &Value) -> String {
    time(value.as_u64().unwrap_or(0))
}

/// The name of a case, with its door where that is not the usual one.
fn what(case: &Value) -> String {
    match text(case, "delivery") {
        "thread" => format!("{}, thread door", text(case, "name")),
        _ => text(case, "name").to_owned(),
    }
}

/// Cases that have a target, one line for both settings of each.
fn table(run: &Value) -> String {
    let empty = Vec::new();
    let cases = run["cases"].as_array().unwrap_or(&empty);
    let of_target = |case: &&Value| case["target"]["p50"].is_number();
    let mut out = String::from(
        "| | floor | it takes | svm takes | ratio [quartiles] | beside a busy CPU | at most |\n|---|---|---|---|---|---|---|\n",
    );
    let ratio = |case: &Value| {
        let mark = match (case["met"].as_bool(), case["met_p99"].as_bool()) {
            (Some(false), _) => " ✗",
            (_, Some(false)) => " ✓ (p99 ✗)",
            _ => " ✓",
        };
        let [low, high] = [0, 1].map(|i| number(&case["spread"][i]));
        format!("{:.2} [{low:.2} {high:.2}]{mark}", number(&case["ratio"]))
    };
    for case in cases
        .iter()
        .filter(of_target)
        .filter(|case| text(case, "setting") == "quiet")
    {
        let same = |other: &&Value| {
            ["name", "delivery", "floor_name"]
                .iter()
                .all(|&key| text(other, key) == text(case, key))
                && text(other, "setting") == "busy"
        };
        let busy = cases.iter().find(same).map_or_else(|| "–".into(), ratio);
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {busy} | {:.2} |",
            what(case),
            text(case, "floor_name"),
            ns(&case["floor"]["p50"]),
            ns(&case["ours"]["p50"]),
            ratio(case),
            number(&case["target"]["p50"]),
        );
    }
    out
}

/// The rows of the table for what others need.
fn peers() -> String {
    let mut out = String::new();
    for peer in PEERS {
        let _ = writeln!(
            out,
            "| *{}* ({}) | *a peer* | *{}* | | | | |",
            peer.name, peer.caveat, peer.figures
        );
    }
    out
}

/// What a reader of a bench's table has to know.
fn footnote(bench: &str) -> &'static str {
    match bench {
        "fault_latency" => {
            "\n*F3 free*: the floor's reader runs where the scheduler likes, its faulter on one CPU, and so does ours: then our monitor goes to \
             that CPU. *F3 pinned*: the floor's reader and faulter are on one CPU, and ours is pinned nowhere. The peers have no ratio, for they \
             were not measured in this run.\n"
        }
        "offload" => {
            "\nBeside a busy CPU one worker does all, on the other. –: not run there: the kernel runs on data in place, which asks nothing of \
             the system, or the row is of the thread door, whose wake-ups are the whole of it. What moves explicitly is asked for, and no fault is \
             taken, so that it goes through neither door.\n"
        }
        "scaling" => {
            "\n–: not run beside a busy CPU, for its own workers or threads keep all CPUs busy. Bookkeeping is what is in RAM beyond the data \
             (RssAnon), page tables apart: a window's take eight bytes for each page that has been in it.\n"
        }
        _ => "",
    }
}

/// The hub's two steps over those of the design that it replaces, by number of ranges.
fn against_rfc(run: &Value) -> String {
    let empty = Vec::new();
    let cases = run["cases"].as_array().unwrap_or(&empty);
    let mut out = String::new();
    for step in ["start and end", "begin and look"] {
        let of_step = cases.iter().filter(|case| {
            text(case, "floor_name") == "RFC" && text(case, "name").starts_with(step)
        });
        let figures: Vec<_> = of_step
            .map(|case| {
                let nr = text(case, "name").rsplit(", ").next().unwrap_or_default();
                let nr = nr.trim_end_matches(" ranges");
                let mark = match case["met"].as_bool() {
                    Some(true) => " ✓",
                    Some(false) => " ✗",
                    None => "",
                };
                format!("{:.2} x{mark} of {nr}", number(&case["ratio"]))
            })
            .collect();
        if !figures.is_empty() {
            let figures = figures.join(", ");
            let _ = writeln!(
                out,
                "- {step}, over the RFC's, by number of ranges: {figures}"
            );
        }
    }
    if !out.is_empty() {
        out.push_str(
            "\nThe RFC's begin costs less whatever their number, for it takes a lock and reads two words; its start does where ranges are few, for it \
             looks through a list. What that saves it loses in retries, since its number is one for all ranges (above). The targets, at most 1, are \
             of many ranges.\n",
        );
    }
    out
}

/// Figures without a floor that start with one of `prefixes`, or, with none, those that have a target.
fn notes(run: &Value, prefixes: &[&str]) -> String {
    let empty = Vec::new();
    let mut out = String::new();
    for note in run["notes"].as_array().unwrap_or(&empty) {
        let name = text(note, "name");
        let is_wanted = if prefixes.is_empty() {
            note["target"].is_number()
        } else {
            prefixes.iter().any(|prefix| name.starts_with(prefix))
        };
        if is_wanted {
            let target = note["target"].as_f64().map_or_else(String::new, |t| {
                let met = note["met"].as_bool() == Some(true);
                let mark = if met { "✓" } else { "✗" };
                format!(
                    " ({} {t}) {mark}",
                    bound(note["at_least"].as_bool() == Some(true))
                )
            });
            let _ = writeln!(
                out,
                "- {name}: {:.2} {}{target}",
                number(&note["value"]),
                text(note, "unit")
            );
        }
    }
    out
}

/// What a second thread that faults costs the first, and how many turns both come to.
fn rates(run: &Value) -> String {
    let empty = Vec::new();
    let cases = run["cases"].as_array().unwrap_or(&empty);
    let turns = cases
        .iter()
        .find(|case| text(case, "name").ends_with("at once by 2 threads"));
    let turns = turns.map_or_else(String::new, |case| {
        format!(
            "- concurrency, inline: a turn (there and back, 64 KiB, the median) takes {} of a thread alone, and {} of each of two at once\n",
            ns(&case["floor"]["p50"]),
            ns(&case["ours"]["p50"]),
        )
    });
    let both = notes(run, &["concurrency, 2 faulting", "concurrency, the floor"]);
    format!("{turns}{both}")
}

fn section(dir: &Path, runs: &[(&'static str, Value)], all: &[Verdict]) -> Result<String> {
    let of = |bench: &str| {
        runs.iter()
            .find(|(name, _)| *name == bench)
            .map(|(_, run)| run)
    };
    let (_, first) = runs.first().context("no results")?;
    let machine = &first["machine"];
    let mut out = format!(
        "{BEGIN}\n## Performance\n\n\
         An absolute time means little on a shared machine: each figure is a ratio to a *floor* measured in the same run, in turns, the least \
         code that could do the job, without a runtime. F1 and F2 are a bare signal handler that un-protects a page or moves it home; F3 a \
         thread that reads the fault and does so; F4 write-protect and copy; F5 one `UFFDIO_MOVE`; F7 the kernel as a plain loop. A ratio is the \
         median over the rounds of what svm took over what the floor took in the same round: with where the middle half of the rounds lies in \
         brackets, and not the quotient of the two medians beside it.\n\n\
         **{} of {} targets are met** (✓; {} of {} where the 99th percentile is to be at most twice the floor's as well); where the time goes in \
         the others (✗), and what was tried, is in [docs/fault-cost.md](docs/fault-cost.md#what-is-missed-and-why).\n\n\
         {} x {}{}, Linux {}, {}; commit {}{}; load before it: {}{}.\n",
        all.iter().filter(|v| v.met).count(),
        all.len(),
        all.iter().filter(|v| v.met_p99 == Some(true)).count(),
        all.iter().filter(|v| v.met_p99.is_some()).count(),
        machine["nr_cpus"],
        text(machine, "cpu"),
        if machine["is_virtual"].as_bool() == Some(true) {
            " (a virtual machine)"
        } else {
            ""
        },
        text(machine, "kernel"),
        text(first, "date"),
        machine["commit"].as_str().unwrap_or("unknown"),
        if machine["is_changed"].as_bool() == Some(true) {
            " with changes"
        } else {
            ""
        },
        text(machine, "load"),
        if first["quick"].as_bool() == Some(true) {
            "; **few rounds: not a measurement**"
        } else {
            ""
        },
    );
    for (bench, title) in [
        ("fault_latency", "One fault, the median"),
        (
            "offload",
            "Work that changes sides (what it takes beyond the kernel, against copying in and out)",
        ),
        ("scaling", "With size (against the smallest)"),
    ] {
        if let Some(run) = of(bench) {
            let _ = write!(out, "\n**{title}**\n\n{}", table(run));
            if bench == "fault_latency" {
                out.push_str(&peers());
            }
            out.push_str(footnote(bench));
            let more = notes(run, &[]);
            if !more.is_empty() {
                let _ = write!(out, "\n{more}");
            }
            if bench == "scaling" {
                out.push_str(&rates(run));
            }
        }
    }
    if let Some(run) = of("protocol") {
        let _ = write!(
            out,
            "\n**The protocol and the hit path**\n\n{}{}{}",
            notes(run, &[]),
            notes(
                run,
                &[
                    "shootdown, a worker in spans: ",
                    "shootdown, a worker by elements: ",
                    "window of a call, inline door, madvise: calls",
                    "window of a call, inline door, munmap: calls",
                    "retries under disjoint invalidations, the RFC",
                ]
            ),
            against_rfc(run)
        );
    }
    if let Some(run) = of("fault_latency") {
        let steps = notes(run, &["step: ", "F6 "]);
        if !steps.is_empty() {
            let _ = write!(
                out,
                "\n**Where a fault's nanoseconds go** ([docs/fault-cost.md](docs/fault-cost.md))\n\n{steps}"
            );
        }
    }
    let _ = write!(
        out,
        "\nThe peers' figures are published ones, or were measured elsewhere, and not in this run. (The fault groups of GPUs, 9–45 µs, are \
         another thing.)\n"
    );
    for (name, what) in [
        (
            "fault_latency_glance",
            "what one fault takes, beside the floors and the peers",
        ),
        ("fault_latency_ratios", "each kind of fault over its floor"),
        (
            "fault_latency_distributions_quiet",
            "the distributions of each kind of fault and its floor, quiet",
        ),
        (
            "fault_latency_distributions_busy",
            "the same beside a busy CPU",
        ),
        (
            "offload_ratios",
            "work that changes sides, over explicit copies",
        ),
        ("scaling_curves", "cost against size"),
    ] {
        let file = dir.join(format!("{name}.svg"));
        if file.exists() {
            let _ = write!(out, "\n![{what}]({})\n", file.display());
        }
    }
    let _ = write!(
        out,
        "\n**To repeat it**, on a quiet machine: `bash benches/run.sh`; where much has run before, first, as root, \
         `echo 1 > /proc/sys/vm/compact_memory`, for in memory that is in pieces a floor and ours may get pages that are not alike. Or a bench \
         alone, as in\n\n\
         ```sh\ncargo bench -p benches --bench fault_latency -- --json faults.json --plot plots\n```\n\n\
         All figures of this run, with their JSON, are in [{0}]({0}).\n{END}\n",
        dir.display()
    );
    Ok(out)
}

/// `text` with the section in its place.
fn put(text: &str, section: &str, before: &str) -> Result<String> {
    if let (Some(begin), Some(end)) = (text.find(BEGIN), text.find(END)) {
        ensure!(begin < end, "the marks are in the wrong order");
        let rest = text[end + END.len()..].trim_start_matches('\n');
        return Ok(format!("{}{section}\n{rest}", &text[..begin]));
    }
    let at = text
        .find(&format!("\n{before}\n"))
        .with_context(|| format!("there is neither a mark nor a heading {before:?}"))?;
    Ok(format!("{}\n{section}{}", &text[..at], &text[at..]))
}

fn put_into(path: &Path, section: &str, before: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    Ok(std::fs::write(path, put(&text, section, before)?)?)
}

fn read(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

fn main() -> ExitCode {
    match report(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn report(args: &Args) -> Result<()> {
    ensure!(
        args.run.is_dir(),
        "{} is not a directory",
        args.run.display()
    );
    let mut runs = Vec::new();
    for bench in BENCHES {
        let path = args.run.join(format!("{bench}.json"));
        let len = path.metadata().map(|file| file.len());
        if len.as_ref().is_ok_and(|&len| len == 0) {
            eprintln!("{} is empty: its bench was broken off", path.display());
        } else if len.is_ok() {
            let run = read(&path).with_context(|| path.display().to_string())?;
            runs.push((bench, run));
        }
    }
    ensure!(!runs.is_empty(), "no results in {}", args.run.display());
    let all: Vec<_> = runs
        .iter()
        .flat_map(|(bench, run)| verdicts(bench, run))
        .collect();
    if !args.targets {
        let section = section(&args.run, &runs, &all)?;
        match &args.readme {
            Some(path) => {
                let put = put_into(path, &section, &args.before);
                put.with_context(|| path.display().to_string())?;
            }
            None => println!("{section}"),
        }
    }
    for v in &all {
        let verdict = match (v.met, v.met_p99) {
            (false, _) => "MISSED",
            (true, Some(false)) => "met, p99 missed",
            (true, _) => "met",
        };
        if args.targets || verdict != "met" {
            println!(
                "{:15} {:14} {:70} {} ({} {:.2})",
                verdict,
                v.bench,
                v.name,
                v.is,
                bound(v.at_least),
                v.target
            );
        }
    }
    let met = all.iter().filter(|v| v.met).count();
    println!("{met} of {} targets met", all.len());
    Ok(())
}
