//! What a run tells: counters in the layout people know from nvprof, where the time went, and
//! whether it was right.
//!
//! Everything is plain data: a [`Summary`] is filled in by the workload, printed by
//! [`Summary::render`] and written as JSON by [`Summary::write_json`]. A run is good when every
//! [`Check`] passed; there is at least one, or it is not.

use std::fmt::{self, Write as _};
use std::io;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use serde::{Serialize, Serializer};

use crate::cli::{Delivery, Granule};

/// Bytes in a page.
const PAGE: u64 = 4096;

/// One run, told.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// `pagerank`, `saxpy` or `list`.
    pub(crate) workload: &'static str,
    pub(crate) input: Input,
    pub(crate) setup: Setup,
    /// The highest ranks, where the workload has ranks.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) top: Vec<Ranked>,
    pub(crate) counters: Counters,
    pub(crate) time: Time,
    pub(crate) checks: Vec<Check>,
}

/// What the workload ran on.
#[derive(Debug, Serialize)]
pub(crate) struct Input {
    /// The file, or how it was generated.
    pub(crate) name: String,
    /// How much of what it has: (133, "packages"). In JSON: a map from the second to the first.
    #[serde(serialize_with = "sizes_as_map")]
    pub(crate) sizes: Vec<(u64, &'static str)>,
}

fn sizes_as_map<S: Serializer>(
    sizes: &[(u64, &'static str)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(sizes.iter().map(|&(n, of)| (of, n)))
}

/// The accelerator it ran on.
#[derive(Debug, Serialize)]
pub(crate) struct Setup {
    pub(crate) workers: usize,
    /// In bytes; `None` if as much as is asked for.
    pub(crate) device_memory: Option<u64>,
    /// In JSON: in bytes.
    pub(crate) granule: Granule,
    pub(crate) delivery: Delivery,
    pub(crate) seed: u64,
}

/// A node among the highest.
#[derive(Debug, Serialize)]
pub(crate) struct Ranked {
    pub(crate) name: String,
    pub(crate) rank: f64,
    pub(crate) in_edges: u64,
}

/// What the runtime and the accelerator counted, as of the end of verification: the CPU has read
/// the result by then.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Counters {
    pub(crate) to_device: Migrations,
    pub(crate) to_host: Migrations,
    /// Pages that both sides held at once, to read.
    pub(crate) duplicated_pages: u64,
    /// Of those, pages that somebody then wrote.
    pub(crate) collapsed_pages: u64,
    /// Pages the device used at the host's address because they could not move.
    pub(crate) in_place_pages: u64,
    /// Rounds of far faults that the device's reads took.
    pub(crate) far_faults_read: u64,
    /// … and its writes.
    pub(crate) far_faults_write: u64,
    /// Far faults that another worker's round had resolved meanwhile.
    pub(crate) far_faults_coalesced: u64,
    /// Rounds begun again because an invalidation came between.
    pub(crate) retries: u64,
    /// CPU loads from pages that the device had.
    pub(crate) cpu_faults_read: u64,
    /// CPU stores to pages that the device had, or had a copy of.
    pub(crate) cpu_faults_write: u64,
    /// Invalidations that reached the device.
    pub(crate) invalidations: u64,
    /// Accesses whose translation was cached.
    pub(crate) translation_hits: u64,
    /// Accesses whose translation was not.
    pub(crate) translation_misses: u64,
    /// Faults and events that should not exist. One is a bug of the runtime.
    pub(crate) anomalies: u64,
}

impl Counters {
    /// Translations served from the cache, of all; `None` if there were none.
    pub(crate) fn translation_hit_rate(&self) -> Option<f64> {
        let all = self.translation_hits + self.translation_misses;
        (all > 0).then(|| self.translation_hits as f64 / all as f64)
    }
}

/// What moved one way.
#[derive(Debug, Default)]
pub(crate) struct Migrations {
    /// Movements: each took a run of pages in one go.
    pub(crate) runs: u64,
    /// What moved them.
    pub(crate) pages: ByCause,
}

/// Pages by why they moved.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(crate) struct ByCause {
    /// The other side touched them.
    pub(crate) demand: u64,
    /// They lay beside what was touched, or were asked for ahead of time.
    pub(crate) prefetch: u64,
    /// The program asked.
    pub(crate) explicit: u64,
    /// Device memory was full.
    pub(crate) evict: u64,
    /// The mirror or the accelerator went away.
    pub(crate) drop: u64,
}

impl ByCause {
    /// In the order of the report.
    fn named(&self) -> [(&'static str, u64); 5] {
        [
            ("demand", self.demand),
            ("prefetch", self.prefetch),
            ("explicit", self.explicit),
            ("evict", self.evict),
            ("drop", self.drop),
        ]
    }
}

impl Migrations {
    /// Pages, whatever moved them.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.named().iter().map(|&(_, pages)| pages).sum()
    }

    fn bytes(&self) -> u64 {
        self.pages() * PAGE
    }

    /// Bytes in a movement, on average.
    fn average(&self) -> u64 {
        self.bytes().checked_div(self.runs).unwrap_or(0)
    }
}

impl Serialize for Migrations {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Json {
            runs: u64,
            pages: u64,
            bytes: u64,
            average_bytes: u64,
            pages_by_cause: ByCause,
        }
        Json {
            runs: self.runs,
            pages: self.pages(),
            bytes: self.bytes(),
            average_bytes: self.average(),
            pages_by_cause: self.pages,
        }
        .serialize(serializer)
    }
}

/// Where the wall time went. In JSON: seconds.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Time {
    /// Reading or generating the input.
    pub(crate) parse: Duration,
    /// Laying it out in memory the device will share.
    pub(crate) build: Duration,
    /// On the accelerator, faults included.
    pub(crate) kernel: Duration,
    /// The oracle, and the comparison on the CPU, which brings the result home.
    pub(crate) verify: Duration,
}

impl Time {
    fn phases(&self) -> [(&'static str, Duration); 4] {
        [
            ("parse", self.parse),
            ("build", self.build),
            ("kernel", self.kernel),
            ("verify", self.verify),
        ]
    }

    fn total(&self) -> Duration {
        self.phases().iter().map(|&(_, time)| time).sum()
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(
            self.phases()
                .map(|(phase, time)| (phase, time.as_secs_f64())),
        )
    }
}

/// Runs `work` and adds the time it took to `phase`.
pub(crate) fn timed<R>(phase: &mut Duration, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    *phase += start.elapsed();
    result
}

/// One thing that must hold for the run to be called verified.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    /// What was looked at.
    pub(crate) name: &'static str,
    /// What was found.
    pub(crate) found: String,
    /// What it should have been.
    pub(crate) expected: String,
    pub(crate) passed: bool,
}

impl Check {
    /// `found` is a number, and not above `limit`.
    pub(crate) fn at_most(name: &'static str, found: f64, limit: f64) -> Check {
        Check {
            name,
            found: format!("{found:.3e}"),
            expected: format!("at most {limit:.1e}"),
            // Not `!(found > limit)`: that would let a NaN pass.
            passed: found <= limit,
        }
    }

    /// `found` is `expected`, give or take `within`.
    pub(crate) fn near(name: &'static str, found: f64, expected: f64, within: f64) -> Check {
        Check {
            name,
            found: format!("{found:.12}"),
            expected: format!("{expected} ± {within:.0e}"),
            passed: (found - expected).abs() <= within,
        }
    }

    /// `found` is exactly `expected`.
    pub(crate) fn equal<T: PartialEq + fmt::Display>(
        name: &'static str,
        found: T,
        expected: T,
    ) -> Check {
        Check {
            name,
            found: found.to_string(),
            expected: expected.to_string(),
            passed: found == expected,
        }
    }

    /// What every run must show, however right its result: pages moved both ways, and the runtime
    /// met nothing that should not exist.
    pub(crate) fn of_counters(counters: &Counters) -> [Check; 3] {
        let moved = |name, migrations: &Migrations| Check {
            name,
            found: migrations.pages().to_string(),
            expected: "more than none".to_owned(),
            passed: migrations.pages() > 0,
        };
        [
            moved("pages migrated to the device", &counters.to_device),
            moved("pages migrated to the host", &counters.to_host),
            Check::equal("anomalies in the runtime", counters.anomalies, 0),
        ]
    }
}

impl Summary {
    /// Whether everything that was checked held.
    pub(crate) fn verified(&self) -> bool {
        !self.checks.is_empty() && self.checks.iter().all(|check| check.passed)
    }

    /// The report for people; its last line is `verified`, or `NOT VERIFIED` and why.
    pub(crate) fn render(&self) -> String {
        let mut text = String::new();
        // Writing to a String can't fail.
        let _ = self.render_to(&mut text);
        text
    }

    fn render_to(&self, out: &mut String) -> fmt::Result {
        let sizes: Vec<String> = self
            .input
            .sizes
            .iter()
            .map(|(n, of)| format!("{n} {of}"))
            .collect();
        writeln!(
            out,
            "{} of {}: {}",
            self.workload,
            self.input.name,
            sizes.join(", ")
        )?;
        let memory = self
            .setup
            .device_memory
            .map_or("unlimited".to_owned(), size);
        let Setup {
            workers,
            granule,
            delivery,
            ..
        } = &self.setup;
        let plural = if *workers == 1 { "" } else { "s" };
        writeln!(
            out,
            "{workers} worker{plural}, device memory {memory}, granule {}, delivery {delivery}",
            size(granule.bytes())
        )?;

        if !self.top.is_empty() {
            let mut table = columns(&[
                (Right, "#"),
                (Left, "Name"),
                (Right, "Rank"),
                (Right, "In-edges"),
            ]);
            for (place, ranked) in self.top.iter().enumerate() {
                table.add_row([
                    (place + 1).to_string(),
                    ranked.name.clone(),
                    format!("{:.6}", ranked.rank),
                    ranked.in_edges.to_string(),
                ]);
            }
            section(out, "Highest ranks", &table)?;
        }
        section(out, "Migrations", &self.migrations())?;
        section(out, "Events", &self.events())?;
        section(out, "Time", &self.times())?;

        let mut table = columns(&[
            (Left, "Check"),
            (Right, "Found"),
            (Left, "Expected"),
            (Left, ""),
        ]);
        for check in &self.checks {
            let verdict = if check.passed { "ok" } else { "FAILED" };
            table.add_row([check.name, &check.found, &check.expected, verdict]);
        }
        section(out, "Verification", &table)?;

        writeln!(out)?;
        match self.failures() {
            None => writeln!(out, "verified"),
            Some(failures) => writeln!(out, "NOT VERIFIED: {failures}"),
        }
    }

    /// What failed, in one line; `None` if the run is verified.
    pub(crate) fn failures(&self) -> Option<String> {
        if self.verified() {
            return None;
        }
        let failed = self.checks.iter().filter(|check| !check.passed);
        let failed: Vec<String> = failed
            .map(|check| {
                format!(
                    "{} is {}, expected {}",
                    check.name, check.found, check.expected
                )
            })
            .collect();
        Some(if failed.is_empty() {
            "nothing was checked".to_owned()
        } else {
            failed.join("; ")
        })
    }

    fn migrations(&self) -> Table {
        let mut table = columns(&[
            (Right, "Count"),
            (Right, "Avg Size"),
            (Right, "Total Size"),
            (Right, "Pages"),
            (Left, "Name"),
        ]);
        let Counters {
            to_device, to_host, ..
        } = &self.counters;
        for (migrations, name) in [(to_device, "Host To Device"), (to_host, "Device To Host")] {
            table.add_row([
                migrations.runs.to_string(),
                size(migrations.average()),
                size(migrations.bytes()),
                migrations.pages().to_string(),
                name.to_owned(),
            ]);
            for (cause, pages) in migrations
                .pages
                .named()
                .into_iter()
                .filter(|&(_, pages)| pages > 0)
            {
                let (bytes, pages) = (size(pages * PAGE), pages.to_string());
                table.add_row([
                    String::new(),
                    String::new(),
                    bytes,
                    pages,
                    format!("  {cause}"),
                ]);
            }
        }
        table
    }

    fn events(&self) -> Table {
        let counters = &self.counters;
        let mut table = columns(&[(Right, "Count"), (Left, "Name")]);
        for (count, name) in [
            (counters.far_faults_read, "Far faults, read"),
            (counters.far_faults_write, "Far faults, write"),
            (counters.far_faults_coalesced, "Far faults, coalesced"),
            (counters.retries, "Retries (interrupted by an invalidation)"),
            (counters.cpu_faults_read, "CPU page faults, read"),
            (counters.cpu_faults_write, "CPU page faults, write"),
            (counters.invalidations, "Invalidations"),
            (counters.duplicated_pages, "Pages duplicated"),
            (counters.collapsed_pages, "Pages collapsed by a write"),
            (counters.in_place_pages, "Pages used in place"),
        ] {
            table.add_row([count.to_string(), name.to_owned()]);
        }
        if let Some(rate) = counters.translation_hit_rate() {
            table.add_row([
                format!("{:.2}%", rate * 100.0),
                "Translation-cache hit rate".to_owned(),
            ]);
        }
        table
    }

    fn times(&self) -> Table {
        let mut table = columns(&[(Right, "Time(%)"), (Right, "Time"), (Left, "Name")]);
        let total = self.time.total();
        for (phase, time) in self.time.phases() {
            let percent = 100.0 * time.as_secs_f64() / total.as_secs_f64().max(f64::MIN_POSITIVE);
            table.add_row([format!("{percent:.2}%"), duration(time), phase.to_owned()]);
        }
        table
    }

    /// The report for programs: this struct, with `verified` and the hit rate beside it.
    pub(crate) fn write_json(&self, mut to: impl io::Write) -> io::Result<()> {
        #[derive(Serialize)]
        struct Json<'a> {
            #[serde(flatten)]
            summary: &'a Summary,
            translation_hit_rate: Option<f64>,
            verified: bool,
        }
        let json = Json {
            summary: self,
            translation_hit_rate: self.counters.translation_hit_rate(),
            verified: self.verified(),
        };
        serde_json::to_writer_pretty(&mut to, &json)?;
        writeln!(to)?;
        to.flush()
    }
}

use CellAlignment::{Left, Right};

/// A table without lines, its columns aligned and named as told.
fn columns(columns: &[(CellAlignment, &str)]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|&(_, name)| name));
    for (column, &(alignment, _)) in table.column_iter_mut().zip(columns) {
        column.set_cell_alignment(alignment);
    }
    table
}

/// A heading and its table, without trailing blanks.
fn section(out: &mut String, heading: &str, table: &Table) -> fmt::Result {
    writeln!(out, "\n{heading}:")?;
    for line in table.lines() {
        // The table itself begins each line with a blank.
        writeln!(out, " {}", line.trim_end())?;
    }
    Ok(())
}

/// Bytes for people: `4.0 KiB`, `1.5 MiB`.
fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut scaled = bytes as f64 / 1024.0;
    let mut unit = 0;
    // What would be printed as 1024.0 goes to the next unit.
    while scaled >= 1023.95 && unit + 1 < units.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{scaled:.1} {}", units[unit])
}

/// A duration for people, to four digits: `1.234ms`.
fn duration(time: Duration) -> String {
    let nanoseconds = time.as_nanos() as f64;
    let (scale, unit) = match time.as_nanos() {
        0..1_000 => (1.0, "ns"),
        1_000..1_000_000 => (1e3, "µs"),
        1_000_000..1_000_000_000 => (1e6, "ms"),
        _ => (1e9, "s"),
    };
    let scaled = nanoseconds / scale;
    let decimals = match scaled {
        100.0.. => 1,
        10.0.. => 2,
        _ => 3,
    };
    format!("{scaled:.decimals$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        let counters = Counters {
            to_device: Migrations {
                runs: 4,
                pages: ByCause {
                    demand: 10,
                    prefetch: 30,
                    ..ByCause::default()
                },
            },
            to_host: Migrations {
                runs: 2,
                pages: ByCause {
                    evict: 512,
                    ..ByCause::default()
                },
            },
            duplicated_pages: 16,
            far_faults_read: 3,
            far_faults_write: 2,
            retries: 1,
            cpu_faults_read: 5,
            invalidations: 9,
            translation_hits: 999,
            translation_misses: 1,
            ..Counters::default()
        };
        let mut checks = vec![Check::near("sum of ranks", 1.0, 1.0, 1e-6)];
        checks.extend(Check::of_counters(&counters));
        Summary {
            workload: "pagerank",
            input: Input {
                name: "Cargo.lock".to_owned(),
                sizes: vec![(3, "packages"), (2, "dependencies")],
            },
            setup: Setup {
                workers: 2,
                device_memory: Some(64 << 20),
                granule: Granule::K64,
                delivery: Delivery::Inline,
                seed: 1,
            },
            top: vec![Ranked {
                name: "libc 0.2.0".to_owned(),
                rank: 0.5,
                in_edges: 2,
            }],
            counters,
            time: Time {
                parse: Duration::from_micros(250),
                build: Duration::from_micros(250),
                kernel: Duration::from_millis(1),
                verify: Duration::from_micros(500),
            },
            checks,
        }
    }

    #[test]
    fn the_report_reads_as_it_should() {
        let expected = "\
pagerank of Cargo.lock: 3 packages, 2 dependencies
2 workers, device memory 64.0 MiB, granule 64.0 KiB, delivery inline

Highest ranks:
  #  Name            Rank  In-edges
  1  libc 0.2.0  0.500000         2

Migrations:
  Count  Avg Size  Total Size  Pages  Name
      4  40.0 KiB   160.0 KiB     40  Host To Device
                     40.0 KiB     10    demand
                    120.0 KiB     30    prefetch
      2   1.0 MiB     2.0 MiB    512  Device To Host
                      2.0 MiB    512    evict

Events:
   Count  Name
       3  Far faults, read
       2  Far faults, write
       0  Far faults, coalesced
       1  Retries (interrupted by an invalidation)
       5  CPU page faults, read
       0  CPU page faults, write
       9  Invalidations
      16  Pages duplicated
       0  Pages collapsed by a write
       0  Pages used in place
  99.90%  Translation-cache hit rate

Time:
  Time(%)     Time  Name
   12.50%  250.0µs  parse
   12.50%  250.0µs  build
   50.00%  1.000ms  kernel
   25.00%  500.0µs  verify

Verification:
  Check                                  Found  Expected
  sum of ranks                  1.000000000000  1 ± 1e-6        ok
  pages migrated to the device              40  more than none  ok
  pages migrated to the host               512  more than none  ok
  anomalies in the runtime                   0  0               ok

verified
";
        assert_eq!(summary().render(), expected);
    }

    #[test]
    fn verified_comes_last_or_why_not() {
        let mut summary = summary();
        assert!(summary.render().ends_with("\n\nverified\n"));
        assert_eq!(summary.failures(), None);

        summary
            .checks
            .push(Check::at_most("L1 to the oracle", f64::NAN, 1e-9));
        assert!(!summary.verified());
        let reason = "NOT VERIFIED: L1 to the oracle is NaN, expected at most 1.0e-9\n";
        assert!(summary.render().ends_with(reason), "{}", summary.render());

        summary.checks.clear();
        assert_eq!(summary.failures().as_deref(), Some("nothing was checked"));
    }

    #[test]
    fn a_run_in_which_nothing_moved_is_a_failure() {
        let mut summary = summary();
        let failed = |counters: &Counters| {
            let checks = Check::of_counters(counters).into_iter();
            checks
                .filter(|check| !check.passed)
                .map(|check| check.name)
                .collect::<Vec<_>>()
        };
        assert!(failed(&summary.counters).is_empty());
        summary.counters.to_host = Migrations::default();
        assert_eq!(failed(&summary.counters), ["pages migrated to the host"]);
        summary.counters.to_device = Migrations::default();
        assert_eq!(failed(&summary.counters).len(), 2);
        summary.checks = Check::of_counters(&summary.counters).into();
        let reason = "pages migrated to the device is 0, expected more than none; \
                      pages migrated to the host is 0, expected more than none";
        assert_eq!(summary.failures().as_deref(), Some(reason));
    }

    #[test]
    fn an_anomaly_is_a_failure() {
        let mut summary = summary();
        summary.counters.anomalies = 1;
        let [to_device, to_host, anomalies] = Check::of_counters(&summary.counters);
        assert!(to_device.passed && to_host.passed && !anomalies.passed);
    }

    #[test]
    fn checks() {
        assert!(Check::at_most("", 1e-9, 1e-9).passed && !Check::at_most("", 1.1e-9, 1e-9).passed);
        assert!(Check::near("", 0.9999995, 1.0, 1e-6).passed);
        assert!(
            !Check::near("", 1.00001, 1.0, 1e-6).passed
                && !Check::near("", f64::NAN, 1.0, 1e-6).passed
        );
        assert!(Check::equal("", 3, 3).passed && !Check::equal("", 3, 4).passed);
    }

    #[test]
    fn json_says_what_the_table_says() {
        let mut bytes = Vec::new();
        summary().write_json(&mut bytes).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["verified"], true);
        assert_eq!(json["workload"], "pagerank");
        assert_eq!(json["translation_hit_rate"], 0.999);
        assert_eq!(json["input"]["sizes"]["packages"], 3);
        assert_eq!(json["setup"]["granule"], 65536);
        assert_eq!(json["setup"]["delivery"], "inline");
        assert_eq!(json["time"]["kernel"], 0.001);
        assert_eq!(json["top"][0]["name"], "libc 0.2.0");
        let expected = serde_json::json!({
            "runs": 4, "pages": 40, "bytes": 163_840, "average_bytes": 40_960,
            "pages_by_cause": { "demand": 10, "prefetch": 30, "explicit": 0, "evict": 0, "drop": 0 },
        });
        assert_eq!(json["counters"]["to_device"], expected);
        assert_eq!(json["checks"][0]["passed"], true);
    }

    #[test]
    fn units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4.0 KiB"),
            (1_572_864, "1.5 MiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (nanoseconds, text) in [
            (0, "0.000ns"),
            (1_500, "1.500µs"),
            (12_345_678, "12.35ms"),
            (123_456_789, "123.5ms"),
            (61_000_000_000, "61.00s"),
        ] {
            assert_eq!(duration(Duration::from_nanos(nanoseconds)), text);
        }
    }
}
