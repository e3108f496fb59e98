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
    /// How much of what it has: (133, "packages").
    pub(crate) sizes: Vec<(u64, &'static str)>,
}

/// The accelerator it ran on.
#[derive(Debug, Serialize)]
pub(crate) struct Setup {
    pub(crate) workers: usize,
    /// In bytes; `None` if as much as is asked for.
    pub(crate) device_memory: Option<u64>,
    /// In bytes.
    pub(crate) granule: u64,
    pub(crate) delivery: String,
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
    /// Rounds of far faults that the device's reads took.
    pub(crate) far_faults_read: u64,
    /// … and its writes.
    pub(crate) far_faults_write: u64,
    /// Far faults that found another worker already fetching the same block.
    pub(crate) far_faults_coalesced: u64,
    /// Rounds begun again because an invalidation came between.
    pub(crate) retries: u64,
    /// Faults of CPU threads on pages that the device had.
    pub(crate) cpu_faults: u64,
    /// Invalidations that reached the device.
    pub(crate) invalidations: u64,
    /// Accesses whose translation was cached.
    pub(crate) translation_hits: u64,
    /// Accesses whose translation was not.
    pub(crate) translation_misses: u64,
    /// Pages that changed owner, by way and cause.
    pub(crate) migrations: Vec<Migrations>,
    /// Pages the device was given a read-only copy of. The CPU kept them too, so these are not
    /// migrations.
    pub(crate) duplications: Transfers,
}

impl Counters {
    /// Pages that went one way, whatever the cause.
    pub(crate) fn migrated(&self, way: Way) -> u64 {
        let that_way = self
            .migrations
            .iter()
            .filter(|migrations| migrations.way == way);
        that_way.map(|migrations| migrations.transfers.pages).sum()
    }

    /// Translations served from the cache, of all; `None` if there were none.
    pub(crate) fn translation_hit_rate(&self) -> Option<f64> {
        let all = self.translation_hits + self.translation_misses;
        (all > 0).then(|| self.translation_hits as f64 / all as f64)
    }
}

/// Migrations of one way and cause.
#[derive(Debug, Serialize)]
pub(crate) struct Migrations {
    pub(crate) way: Way,
    pub(crate) cause: Cause,
    #[serde(flatten)]
    pub(crate) transfers: Transfers,
}

/// Which way pages went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Way {
    HostToDevice,
    DeviceToHost,
}

impl Way {
    /// In the order of the report.
    const ALL: [Way; 2] = [Way::HostToDevice, Way::DeviceToHost];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Way::HostToDevice => "Host To Device",
            Way::DeviceToHost => "Device To Host",
        })
    }
}

/// Why pages went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Cause {
    /// The other side touched them.
    Demand,
    /// They were asked for ahead of time.
    Prefetch,
    /// Device memory was full.
    Evict,
    /// A write elsewhere, or the program changed its mappings.
    Coherence,
    /// The mirror or the accelerator was dropped.
    Drop,
}

impl Cause {
    /// In the order of the report.
    const ALL: [Cause; 5] = [
        Cause::Demand,
        Cause::Prefetch,
        Cause::Evict,
        Cause::Coherence,
        Cause::Drop,
    ];
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cause::Demand => "demand",
            Cause::Prefetch => "prefetch",
            Cause::Evict => "evict",
            Cause::Coherence => "coherence",
            Cause::Drop => "drop",
        })
    }
}

/// A number of transfers, each of some pages in one go.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Transfers {
    pub(crate) count: u64,
    /// In all of them.
    pub(crate) pages: u64,
    /// In the smallest.
    pub(crate) min_pages: u64,
    /// In the largest.
    pub(crate) max_pages: u64,
}

impl Transfers {
    fn bytes(&self) -> u64 {
        self.pages * PAGE
    }

    fn average_bytes(&self) -> u64 {
        self.bytes().checked_div(self.count).unwrap_or(0)
    }
}

impl Serialize for Transfers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct InBytes {
            count: u64,
            pages: u64,
            bytes: u64,
            avg_bytes: u64,
            min_bytes: u64,
            max_bytes: u64,
        }
        InBytes {
            count: self.count,
            pages: self.pages,
            bytes: self.bytes(),
            avg_bytes: self.average_bytes(),
            min_bytes: self.min_pages * PAGE,
            max_bytes: self.max_pages * PAGE,
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

    /// Pages moved both ways: a run in which none did has shown nothing, however right its result.
    pub(crate) fn moved(counters: &Counters) -> [Check; 2] {
        let check = |name, way| {
            let pages = counters.migrated(way);
            Check {
                name,
                found: pages.to_string(),
                expected: "more than none".to_owned(),
                passed: pages > 0,
            }
        };
        [
            check("pages migrated to the device", Way::HostToDevice),
            check("pages migrated to the host", Way::DeviceToHost),
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
            size(*granule)
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
        section(out, "Shared memory: migrations", &self.migrations())?;
        section(out, "Shared memory: events", &self.events())?;
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
            (Right, "Min Size"),
            (Right, "Max Size"),
            (Right, "Total Size"),
            (Right, "Pages"),
            (Left, "Name"),
        ]);
        let row = |name: String, transfers: &Transfers| {
            [
                transfers.count.to_string(),
                size(transfers.average_bytes()),
                size(transfers.min_pages * PAGE),
                size(transfers.max_pages * PAGE),
                size(transfers.bytes()),
                transfers.pages.to_string(),
                name,
            ]
        };
        let Counters {
            migrations,
            duplications,
            ..
        } = &self.counters;
        for (way, cause) in Way::ALL
            .iter()
            .flat_map(|way| Cause::ALL.map(|cause| (*way, cause)))
        {
            let these = |m: &&Migrations| (m.way, m.cause) == (way, cause) && m.transfers.count > 0;
            for Migrations { transfers, .. } in migrations.iter().filter(these) {
                table.add_row(row(format!("{way} ({cause})"), transfers));
            }
        }
        if duplications.count > 0 {
            table.add_row(row(
                "Duplicated to Device (read-only)".to_owned(),
                duplications,
            ));
        }
        if table.row_count() == 0 {
            table.add_row(row("(nothing moved)".to_owned(), &Transfers::default()));
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
            (counters.cpu_faults, "CPU page faults"),
            (counters.invalidations, "Invalidations"),
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
        let transfers = |count, pages, min_pages, max_pages| Transfers {
            count,
            pages,
            min_pages,
            max_pages,
        };
        let counters = Counters {
            far_faults_read: 3,
            far_faults_write: 2,
            cpu_faults: 5,
            retries: 1,
            invalidations: 9,
            translation_hits: 999,
            translation_misses: 1,
            migrations: vec![
                Migrations {
                    way: Way::DeviceToHost,
                    cause: Cause::Evict,
                    transfers: transfers(1, 512, 512, 512),
                },
                Migrations {
                    way: Way::HostToDevice,
                    cause: Cause::Demand,
                    transfers: transfers(4, 40, 1, 16),
                },
                Migrations {
                    way: Way::HostToDevice,
                    cause: Cause::Prefetch,
                    transfers: Transfers::default(),
                },
            ],
            duplications: transfers(1, 16, 16, 16),
            ..Counters::default()
        };
        let mut checks = vec![Check::near("sum of ranks", 1.0, 1.0, 1e-6)];
        checks.extend(Check::moved(&counters));
        Summary {
            workload: "pagerank",
            input: Input {
                name: "Cargo.lock".to_owned(),
                sizes: vec![(3, "packages"), (2, "dependencies")],
            },
            setup: Setup {
                workers: 2,
                device_memory: Some(64 << 20),
                granule: 65536,
                delivery: "inline".to_owned(),
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

Shared memory: migrations:
  Count  Avg Size  Min Size  Max Size  Total Size  Pages  Name
      4  40.0 KiB   4.0 KiB  64.0 KiB   160.0 KiB     40  Host To Device (demand)
      1   2.0 MiB   2.0 MiB   2.0 MiB     2.0 MiB    512  Device To Host (evict)
      1  64.0 KiB  64.0 KiB  64.0 KiB    64.0 KiB     16  Duplicated to Device (read-only)

Shared memory: events:
   Count  Name
       3  Far faults, read
       2  Far faults, write
       0  Far faults, coalesced
       1  Retries (interrupted by an invalidation)
       5  CPU page faults
       9  Invalidations
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
        summary
            .counters
            .migrations
            .retain(|migrations| migrations.way == Way::HostToDevice);
        summary.checks = Check::moved(&summary.counters).into();
        assert_eq!(
            summary.failures().as_deref(),
            Some("pages migrated to the host is 0, expected more than none")
        );
        summary.counters.migrations.clear();
        assert_eq!(
            Check::moved(&summary.counters)
                .iter()
                .filter(|check| check.passed)
                .count(),
            0
        );
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
        assert_eq!(json["time"]["kernel"], 0.001);
        assert_eq!(json["top"][0]["name"], "libc 0.2.0");
        let demand = &json["counters"]["migrations"][1];
        let expected = serde_json::json!({
            "way": "host_to_device", "cause": "demand",
            "count": 4, "pages": 40, "bytes": 163840, "avg_bytes": 40960, "min_bytes": 4096, "max_bytes": 65536,
        });
        assert_eq!(*demand, expected);
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
