//! The command line: what may be asked, and in which units.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::input::{Format, rmat};

/// A simulated accelerator that works on the memory of its process, page by page, where it lies.
///
/// Exit status: 0 when the result is verified, 1 when it is not or could not be computed, 2 for bad
/// input.
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
    Saxpy(Array),
    /// Walk a linked list whose nodes lie in random order
    List(Array),
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
    /// Generate an R-MAT graph of 2^SCALE nodes and 16 times as many edges
    #[arg(long, value_name = "SCALE", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(0..=i64::from(rmat::MAX_SCALE)))]
    pub(crate) rmat: u32,
    /// Stop after so many iterations in any case
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) iterations: u32,
    /// Stop when an iteration moves all ranks together by no more than this
    #[arg(long, value_name = "EPSILON", default_value_t = 1e-9, value_parser = tolerance)]
    pub(crate) tolerance: f64,
    /// The chance of following an edge rather than jumping anywhere
    #[arg(long, value_name = "D", default_value_t = 0.85, value_parser = damping)]
    pub(crate) damping: f64,
    /// How many of the highest ranks to print
    #[arg(long, value_name = "K", default_value_t = 10)]
    pub(crate) top: usize,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// `run saxpy`, `run list`.
#[derive(Debug, Args)]
pub(crate) struct Array {
    /// How many elements [default: 4194304 for saxpy, which takes 4096 or more, 65536 for list]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) n: Option<u32>,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What all workloads understand.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// Worker threads of the accelerator [default: one per CPU]
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<usize>,
    /// Device memory, such as 64M; less than the workload needs means eviction [default: unlimited]
    #[arg(long, value_name = "SIZE")]
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
    /// Write the report to this file as well, as JSON
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
        const EXPECTED: &str = "expected a number of bytes such as 65536, 64K, 512MiB or 2G";
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(EXPECTED.to_owned()),
        };
        if number.is_empty() {
            return Err(EXPECTED.to_owned());
        }
        let number: Option<u64> = number.parse().ok();
        let bytes = number.and_then(|number| number.checked_mul(1 << shift));
        bytes
            .map(Size)
            .ok_or_else(|| "more than 2^64 bytes".to_owned())
    }
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
    fn numbers_out_of_range_are_refused() {
        for arguments in [
            "--damping 1",
            "--damping -0.1",
            "--damping nan",
            "--tolerance 0",
            "--tolerance nan",
            "--iterations 0",
            "--rmat 29",
            "--granule 8k",
            "--delivery pigeon",
            "--rmat 3 --input f",
            "--format edge-list",
        ] {
            let line = format!("accel-sim run pagerank {arguments}");
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
        let line = "accel-sim run pagerank --input f --granule 2m --device-memory 64M --damping 0 --delivery thread";
        Cli::try_parse_from(line.split(' ')).unwrap();
    }
}
