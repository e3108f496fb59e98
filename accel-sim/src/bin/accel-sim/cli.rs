//! The command line: what may be asked, and in which units.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use accel_sim::MAX_WORKERS;
use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use svm::addr::PAGE_SIZE;

use crate::input::{Format, rmat};

/// A simulated accelerator that works on the memory of its process, page by page, where it lies.
///
/// Exit status: 0 when the result is verified, 1 when it is not or could not be computed, 2 for bad
/// input or a bad command line.
#[derive(Debug, Parser)]
#[command(name = "accel-sim", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a workload on the accelerator, check its result, report what moved
    #[command(subcommand)]
    Run(Workload),
    /// Say what this machine lets us do, and what to do about the rest
    Doctor,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Workload {
    /// Rank the nodes of a graph by PageRank
    Pagerank(Pagerank),
    /// y += a * x over two arrays
    Saxpy(Saxpy),
    /// Walk a linked list whose nodes lie in random order
    List(List),
}

impl Workload {
    pub(crate) fn common(&self) -> &Common {
        match self {
            Workload::Pagerank(args) => &args.common,
            Workload::Saxpy(args) => &args.common,
            Workload::List(args) => &args.common,
        }
    }
}

/// `run pagerank`.
#[derive(Debug, Args)]
pub(crate) struct Pagerank {
    /// A Cargo.lock, a Matrix Market file or an edge list
    #[arg(long, value_name = "FILE", conflicts_with = "rmat")]
    pub(crate) input: Option<PathBuf>,
    /// The format of the input, if its name does not tell
    #[arg(long, value_enum, requires = "input")]
    pub(crate) format: Option<Format>,
    /// Generate an R-MAT graph of 2^SCALE nodes and 16 times as many edges; SCALE is 0 to 28
    #[arg(long, value_name = "SCALE", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(0..=i64::from(rmat::MAX_SCALE)))]
    pub(crate) rmat: u32,
    /// Stop after so many iterations in any case; 1 or more
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) iterations: u32,
    /// Stop when an iteration moves all ranks together by no more than this; above 0 and below 1
    #[arg(long, value_name = "EPSILON", default_value_t = 1e-9, value_parser = tolerance)]
    pub(crate) tolerance: f64,
    /// The chance of following an edge rather than jumping anywhere; from 0 to below 1
    #[arg(long, value_name = "D", default_value_t = 0.85, value_parser = damping)]
    pub(crate) damping: f64,
    /// How many of the highest ranks to print
    #[arg(long, value_name = "K", default_value_t = 10)]
    pub(crate) top: usize,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// `run saxpy`.
#[derive(Debug, Args)]
pub(crate) struct Saxpy {
    /// How many elements, such as 65536 or 4M; 4096 or more
    #[arg(long, default_value = "4M", value_parser = count)]
    pub(crate) n: u32,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// `run list`.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// How many nodes, such as 65536 or 4M; 1 or more
    #[arg(long, default_value = "64K", value_parser = count)]
    pub(crate) n: u32,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What all workloads understand.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Worker threads of the accelerator, 1 to 256 [default: one per CPU]
    #[arg(long, value_name = "N",
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_WORKERS as u64))]
    pub(crate) workers: Option<usize>,
    /// Device memory, such as 64M; a page (4K) or more, and enough for what the workers hold at once.
    /// Less than the workload needs means eviction [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = device_memory)]
    pub(crate) device_memory: Option<Size>,
    /// Who resolves a CPU's fault: the faulting thread itself, or a monitor thread
    #[arg(long, value_enum, default_value_t = Delivery::Inline)]
    pub(crate) delivery: Delivery,
    /// How much moves at a time
    #[arg(long, value_enum, default_value_t = Granule::K64)]
    pub(crate) granule: Granule,
    /// The seed of all that is random
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write the report to this file as well, as JSON; with `-` to standard output, and the report for
    /// people then to standard error
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// Who resolves a CPU's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Delivery {
    /// The faulting thread itself, in a signal handler
    Inline,
    /// A monitor thread
    Thread,
}

impl fmt::Display for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Delivery::Inline => "inline",
            Delivery::Thread => "thread",
        })
    }
}

/// How much moves at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(into = "u64")]
pub(crate) enum Granule {
    /// One page
    #[value(name = "4k")]
    K4,
    /// Sixteen pages
    #[value(name = "64k")]
    K64,
    /// A whole block of 512 pages
    #[value(name = "2m")]
    M2,
}

impl Granule {
    /// In bytes.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Granule::K4 => 4 << 10,
            Granule::K64 => 64 << 10,
            Granule::M2 => 2 << 20,
        }
    }
}

impl From<Granule> for u64 {
    fn from(granule: Granule) -> u64 {
        granule.bytes()
    }
}

/// A number of bytes, written as `65536`, `64K`, `64k`, `64KiB`, `1G`… Units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = number_and_unit(text);
        let shift = match unit.as_str() {
            "" | "b" => Some(0),
            "k" | "kib" => Some(10),
            "m" | "mib" => Some(20),
            "g" | "gib" => Some(30),
            "t" | "tib" => Some(40),
            _ => None,
        };
        let (Some(shift), false) = (shift, number.is_empty()) else {
            return Err("expected a number of bytes such as 65536, 64K, 512MiB or 2G".to_owned());
        };
        scaled(number, shift)
            .map(Size)
            .ok_or_else(|| "more than 2^64 bytes".to_owned())
    }
}

/// A text's leading digits, and what follows them, in lower case.
fn number_and_unit(text: &str) -> (&str, String) {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    (number, unit.to_ascii_lowercase())
}

fn scaled(number: &str, shift: u32) -> Option<u64> {
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// A number of elements: the units of a [`Size`], without its bytes.
fn count(text: &str) -> Result<u32, String> {
    let (number, unit) = number_and_unit(text);
    let shift = match unit.as_str() {
        "" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        _ => None,
    };
    let (Some(shift), false) = (shift, number.is_empty()) else {
        return Err("expected a number of elements such as 65536, 64K or 4M".to_owned());
    };
    scaled(number, shift)
        .and_then(|n| u32::try_from(n).ok())
        .filter(|&n| n > 0)
        .ok_or_else(|| format!("expected 1 to {}", u32::MAX))
}

fn device_memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse()?;
    if size.0 < PAGE_SIZE as u64 {
        return Err(format!("less than a page, which is {PAGE_SIZE} bytes"));
    }
    Ok(size)
}

fn damping(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(damping) if (0.0..1.0).contains(&damping) => Ok(damping),
        _ => Err("expected a number from 0 to below 1".to_owned()),
    }
}

fn tolerance(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(tolerance) if tolerance > 0.0 && tolerance < 1.0 => Ok(tolerance),
        _ => Err("expected a number between 0 and 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64k", 65536),
            ("64KiB", 65536),
            ("16M", 16 << 20),
            ("3g", 3 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in [
            "",
            "M",
            "-1",
            "1.5G",
            "64 M",
            "64MB",
            "16777216T",
            "99999999999999999999",
            "٣",
        ] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn counts() {
        for (text, n) in [
            ("1", 1),
            ("4096", 4096),
            ("64k", 65536),
            ("4M", 1 << 22),
            ("3g", 3 << 30),
            ("4294967295", u32::MAX),
        ] {
            assert_eq!(count(text), Ok(n), "{text}");
        }
        for text in ["", "0", "0K", "M", "-1", "64KiB", "1T", "4G", "4294967296"] {
            assert!(count(text).is_err(), "{text}");
        }
    }

    /// What is enforced is said.
    #[test]
    fn help_tells_ranges_and_defaults() {
        let help = |workload: &str| {
            let mut command = Cli::command();
            let run = command
                .find_subcommand_mut("run")
                .expect("there is a `run`");
            let workload = run.find_subcommand_mut(workload).expect("it can be run");
            // Lines are broken as the terminal is wide.
            let help = workload.render_help().to_string();
            help.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let scales = format!("SCALE is 0 to {}", rmat::MAX_SCALE);
        let workers = format!("1 to {MAX_WORKERS}");
        let memory = format!("a page ({}K) or more", PAGE_SIZE >> 10);
        for (workload, told) in [
            ("pagerank", &*scales),
            ("pagerank", "above 0 and below 1"),
            ("pagerank", "from 0 to below 1"),
            ("pagerank", &workers),
            ("pagerank", &memory),
            ("saxpy", "4096 or more [default: 4M]"),
            ("list", "1 or more [default: 64K]"),
        ] {
            let help = help(workload);
            assert!(help.contains(told), "{told:?} is missing in: {help}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for arguments in [
            "--damping 1",
            "--damping -0.1",
            "--damping nan",
            "--tolerance 0",
            "--tolerance nan",
            "--iterations 0",
            "--rmat 29",
            "--workers 0",
            "--workers 257",
            "--device-memory 4095",
            "--granule 8k",
            "--delivery pigeon",
            "--rmat 3 --input f",
            "--format edge-list",
        ] {
            let line = format!("accel-sim run pagerank {arguments}");
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        let line = "accel-sim run pagerank --input f --granule 2m --device-memory 4K --workers 256 --damping 0 --delivery thread";
        Cli::try_parse_from(line.split(' ')).unwrap();
    }
}
