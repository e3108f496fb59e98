//! The stress as a command: `stress --seconds 60 --delivery thread --granule 2m`. Exit status 0 if nothing was lost, 1 if something was; 2
//! for a bad command line.

mod arguments;

use std::fmt;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use accel_sim::MAX_WORKERS;
use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use svm::{Delivery, Granule};
use tests::Watchdog;
use tests::stress::{self, ACTORS, Config, LEAST_PAGES};

use self::arguments::{PAGE, seconds};

/// Has threads and devices do every kind of operation on the same memory at once, and fails if a write is lost
#[derive(Debug, Parser)]
#[command(name = "stress")]
struct Args {
    /// How long it starts new operations
    #[arg(long, value_name = "N", default_value_t = Config::default().time.as_secs_f64(), value_parser = seconds)]
    seconds: f64,
    /// Chooses the operations; the interleaving is the machine's
    #[arg(long, value_name = "S", default_value_t = Config::default().seed)]
    seed: u64,
    /// The door for CPU faults
    #[arg(long, value_enum, default_value_t = Door::Inline)]
    delivery: Door,
    /// The granule of all mirrors
    #[arg(long, value_enum, default_value_t = Size::Big)]
    granule: Size,
    /// Workers of each accelerator, 1 to 256
    #[arg(long, value_name = "N", default_value_t = Config::default().workers,
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_WORKERS as u64))]
    workers: usize,
    /// Memory of each accelerator, a page (4096) or more; or none, which is without limit
    #[arg(long, value_name = "BYTES|none", default_value_t = Memory(Config::default().device_memory))]
    device_memory: Memory,
    /// Accelerators on the same memory, 1 to 100
    #[arg(long, value_name = "N", default_value_t = Config::default().accelerators,
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=100))]
    accelerators: usize,
    /// Threads with mirrors of their own, 0 to 1000
    #[arg(long, value_name = "N", default_value_t = Config::default().sessions,
          value_parser = RangedU64ValueParser::<usize>::new().range(0..=1000))]
    sessions: usize,
    /// Pages of each shared mirror, 8 to 1000000
    #[arg(long, value_name = "N", default_value_t = Config::default().shared_pages,
          value_parser = RangedU64ValueParser::<usize>::new().range(LEAST_PAGES as u64..=1_000_000))]
    shared_pages: usize,
    /// Only these actors; may be given again [default: all]
    #[arg(long, value_name = "ACTOR", value_parser = ACTORS)]
    only: Vec<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Door {
    Inline,
    Thread,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Size {
    #[value(name = "4k")]
    Page,
    #[value(name = "64k")]
    Big,
    #[value(name = "2m")]
    Huge,
}

/// In bytes; `None` is without limit.
#[derive(Clone, Copy, Debug)]
struct Memory(Option<usize>);

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "none" => Ok(Self(None)),
            Ok(bytes) if bytes >= PAGE => Ok(Self(Some(bytes))),
            _ => Err(format!("expected bytes, {PAGE} or more, or none")),
        }
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) => bytes.fmt(f),
            None => f.write_str("none"),
        }
    }
}

impl Args {
    fn config(self) -> Config {
        let mut config = Config::default();
        config.time = Duration::from_secs_f64(self.seconds);
        config.seed = self.seed;
        config.delivery = match self.delivery {
            Door::Inline => Delivery::Inline,
            Door::Thread => Delivery::Thread,
        };
        config.granule = match self.granule {
            Size::Page => Granule::Page,
            Size::Big => Granule::Big,
            Size::Huge => Granule::Huge,
        };
        config.workers = self.workers;
        config.device_memory = self.device_memory.0;
        config.accelerators = self.accelerators;
        config.sessions = self.sessions;
        config.shared_pages = self.shared_pages;
        config.only = self.only;
        config
    }
}

fn main() -> ExitCode {
    let config = Args::parse().config();
    // Not half as long again, but a while: a hang must be told from a machine that is busy.
    let _watchdog = Watchdog::with_timeout("stress", config.time + Duration::from_secs(50));
    println!("{config:?}");
    match stress::run(&config) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("FAILED: {what}");
            ExitCode::FAILURE
        }
    }
}
