//! The storm as a command: `storm --seconds 600 --seed 7`. Exit status 0 if nothing was lost, 1 if something was, with the seed; 2 for a
//! bad command line.

mod arguments;

use std::process::ExitCode;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Parser, ValueEnum};
use svm::Delivery;
use tests::Watchdog;
use tests::storm::{self, Config};

use self::arguments::{PAGE, seconds};

/// Changes mirrored mappings in every way there is, while devices and threads work in them, and fails if anything is lost
#[derive(Debug, Parser)]
#[command(name = "storm")]
struct Args {
    /// How long it starts new operations
    #[arg(long, value_name = "N", default_value_t = Config::default().time.as_secs_f64(), value_parser = seconds)]
    seconds: f64,
    /// Chooses the operations; the interleaving is the machine's
    #[arg(long, value_name = "S", default_value_t = Config::default().seed)]
    seed: u64,
    /// The door for CPU faults; with both, each has its turn
    #[arg(long, value_enum, default_value_t = Door::Both)]
    delivery: Door,
    /// Arenas side by side, 1 to 1000
    #[arg(long, value_name = "N", default_value_t = Config::default().arenas,
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    arenas: usize,
    /// Pages of each arena, 1 to 1000000
    #[arg(long, value_name = "N", default_value_t = Config::default().pages,
          value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pages: usize,
    /// Memory of each of the two accelerators, a page (4096) or more; with less than the arenas have they evict
    #[arg(long, value_name = "BYTES", default_value_t = Config::default().device_memory,
          value_parser = RangedU64ValueParser::<usize>::new().range(PAGE as u64..))]
    device_memory: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Door {
    Inline,
    Thread,
    Both,
}

impl Args {
    fn config(&self) -> Config {
        let mut config = Config::default();
        config.time = Duration::from_secs_f64(self.seconds);
        config.seed = self.seed;
        config.delivery = match self.delivery {
            Door::Inline => Some(Delivery::Inline),
            Door::Thread => Some(Delivery::Thread),
            Door::Both => None,
        };
        config.arenas = self.arenas;
        config.pages = self.pages;
        config.device_memory = self.device_memory;
        config
    }
}

fn main() -> ExitCode {
    let config = Args::parse().config();
    // A hang must be told from a machine that is busy.
    let _watchdog = Watchdog::with_timeout("storm", config.time + Duration::from_secs(50));
    println!("{config:?}");
    match storm::run(&config) {
        Ok(report) => {
            println!("{report}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            println!("LOST, seed {}: {what}", config.seed);
            ExitCode::FAILURE
        }
    }
}
